"""bench.fidelity: cases, tables and the plot, from rows that are made up."""

import json

import pytest
from fidelity_cases import row

from bench.fidelity import __main__ as command
from bench.fidelity import catalogue, report
from bench.fidelity.runs import Run, first_of_each, load, save

CARD, OTHER = {"gpu": "card", "cpu": None, "torch": "2"}, {"gpu": None, "cpu": "chip", "torch": "2"}


def run(*rows, machine=CARD, command="python -m bench.fidelity"):
    return Run(machine, command, list(rows))


def cases(*runs):
    return {(f["case"], f["gpu"]): f for f in report.figures(list(runs), "sketch-16x4", catalogue.REPORTED)}


def test_cases_are_means_of_their_rows():
    first = run(
        row("sketch-16x4", recall=0.5, layer=0, bytes=9.0),
        row("sketch-16x4", recall=0.75, layer=1, bytes=9.0, text="code"),
        row("sketch-16x4", recall=0.1, phase="decode", bytes=9.0),
        row("random", recall=0.25),
        row("sketch-8x2", recall=0.4),
        row("mean", recall=0.4, chunk=64),
        command="one",
    )
    second = run(row("sketch-16x4", recall=1.0, tokens=200, error=None), command="two")
    found = cases(first, second)
    assert sorted(case for case, _ in found) == [
        *("recall-m-decode-default", "recall-m-decode-default-100", "recall-m-prefill-default"),
        *("recall-m-prefill-default-100", "recall-m-prefill-default-200"),
        *("recall-m-prefill-random", "recall-m-prefill-random-100"),
    ]
    one, whole = (found[f"recall-m-prefill-default{end}", "card"] for end in ("-100", ""))
    assert (one["value"], one["worst_layer"], one["samples"], one["baseline"]) == (0.625, 0.5, 2, 0.25)
    assert (one["texts"], one["bytes"], one["variant"], one["command"]) == (
        ["code", "prose"],
        9.0,
        "sketch-16x4",
        "one",
    )
    assert (whole["value"], whole["samples"], whole["tokens"]) == (0.75, 3, [100, 200])
    assert (whole["command"], whole["unit"], whole["torch"]) == ("one && two", "fraction", "2")
    assert found["recall-m-prefill-default-200", "card"]["error"] is None


def test_machines_are_kept_apart():
    found = cases(run(row("exact", recall=1.0)), run(row("exact", recall=0.5), machine=OTHER))
    assert [found["recall-m-prefill-exact", gpu]["value"] for gpu in ("card", None)] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("variant", "spelled"),
    [
        ("minmax", "minmax"),
        ("sketch-32x4", "sketch-32x4"),
        ("keys/16x4", "sketch-16x4-keys"),
        ("queries/pq-10x8", "pq-10x8"),
        ("keys/pq-10x8", "pq-10x8-keys"),
        ("queries/pq-10x8/refit-16384", "pq-10x8-refit-16384"),
    ],
)
def test_names_of_cases(variant, spelled):
    assert report.label(variant) == spelled


def test_every_reported_variant_exists_and_has_a_case_of_its_own():
    known = {v.name for make in [*catalogue.SETS.values(), catalogue.short] for v in make()}
    assert set(catalogue.REPORTED) <= known | {"random", "exact"}
    assert catalogue.DEFAULT in catalogue.REPORTED
    assert len({report.label(name) for name in catalogue.REPORTED}) == len(catalogue.REPORTED)


def test_a_later_run_adds_only_what_is_missing():
    first, second = run(row("mean", recall=0.1)), run(row("mean", recall=0.9), row("exact"), row("mean", text="code"))
    assert first_of_each([first, second]) == [first.rows[0], *second.rows[1:]]
    assert first_of_each([first]) == first.rows


def test_from_rows_writes_the_results_anew(tmp_path):
    phases = [row(name, phase=phase) for phase in report.PHASES for name in ("mean", "sketch-16x4", "random")]
    runs = [run(*phases, command="one"), run(*phases, machine=OTHER, command="two")]
    for i, each in enumerate(runs):
        save(each, tmp_path / "rows" / f"{i}.json.gz")
        assert load(tmp_path / "rows" / f"{i}.json.gz") == each
    out = tmp_path / "out"
    command.main(["--from-rows", *map(str, sorted((tmp_path / "rows").iterdir())), "--out", str(out)])
    assert len(json.loads((out / "fidelity.json").read_text())) == 2 * 2 * 9
    text = (out / "fidelity.md").read_text()
    assert text.count("| mean |") == 2 * 3
    assert text.index("# gpu card, torch 2\n\n`one`") < text.index("# cpu chip, torch 2\n\n`two`")
    plot = (out / "fidelity.svg").read_text()
    assert plot.count("<title>mean: 9.00 B, 0.500</title>") == 3  # the first run's alone
    assert plot.count('class="t"') == 3
