"""Tables, the JSON figures and the plot, all from the same rows."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from re import fullmatch

from bench.fidelity.analyse import CEILING, FLOOR, Row
from bench.fidelity.rules import RuleRow
from bench.fidelity.runs import Machine, Run, by_machine
from bench.fidelity.svg import Panel, Series, draw

CHUNK = 32
"""Of the cases and the plot."""
PHASES = ("prefill", "tail", "decode")
Summary = dict[str, float]


def mean(values: Iterable[float | None]) -> float:
    """Mean of what is there, without None and nan; nan of nothing."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def summarise(rows: Iterable[Row]) -> Summary:
    """One line of a table: means over texts, layers, steps and heads; p10 and the worst layer of the recall."""
    rows = list(rows)
    by_layer: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        by_layer[row.layer].append(row.recall)
    ranked = sorted(row.recall for row in rows)
    return {
        "bytes": rows[0].bytes,
        "recall": mean(row.recall for row in rows),
        "p10": ranked[len(ranked) // 10],
        "worst_layer": min(mean(v) for v in by_layer.values()),
        "picks": mean(row.picks for row in rows),
        "seeds": mean(row.seeds for row in rows),
        "jaccard": mean(row.jaccard for row in rows),
        "error": mean(row.error for row in rows),
        "needle": mean(row.needle for row in rows),
        "build": mean(row.build_seconds for row in rows),
        "state": rows[0].state_bytes,
    }


def group(rows: Iterable[Row]) -> dict[tuple[str, int, int], dict[str, dict[str, Summary]]]:
    """(model, tokens, chunk) -> variant -> phase -> summary."""
    sorted_rows: dict[tuple[str, int, int], dict[str, dict[str, list[Row]]]] = {}
    for row in rows:
        of = sorted_rows.setdefault((row.model, row.tokens, row.chunk), {}).setdefault(row.variant, {})
        of.setdefault(row.phase, []).append(row)
    return {
        key: {variant: {p: summarise(r) for p, r in phases.items()} for variant, phases in variants.items()}
        for key, variants in sorted_rows.items()
    }


COLUMNS = ("recall", "p10", "worst_layer", "picks", "seeds", "jaccard", "error", "needle")


def table(variants: dict[str, dict[str, Summary]], phase: str) -> str:
    """A Markdown table of all variants at one phase, by bytes and recall; floor and ceiling on top."""
    lines = [f"| {phase} | bytes | " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " | build s/M | state KiB |"]
    lines.append("|---" * (len(COLUMNS) + 4) + "|")
    found = [(name, phases[phase]) for name, phases in variants.items() if phase in phases]
    for name, s in sorted(found, key=lambda v: (v[0] not in (FLOOR, CEILING), v[1]["bytes"], v[1]["recall"])):
        cells = " | ".join("–" if math.isnan(s[c]) else f"{s[c]:.3f}" for c in COLUMNS)
        lines.append(f"| {name} | {s['bytes']:.2f} | {cells} | {s['build']:.1f} | {s['state'] / 1024:.1f} |")
    return "\n".join(lines)


def heading(machine: Machine, command: str) -> str:
    """What gave the tables under it."""
    where = ", ".join(f"{key} {value}" for key, value in machine.items() if value)
    return f"# {where}\n\n`{command}`"


def report(run: Run) -> str:
    """All tables of a run."""
    rows = run.rows
    parts = [heading(run.machine, run.command)]
    for (model, tokens, chunk), variants in sorted(group(rows).items()):
        texts = ", ".join(sorted({r.text for r in rows if (r.model, r.tokens) == (model, tokens)}))
        parts.append(f"\n## {model}, {tokens:,} tokens ({texts}), chunk {chunk}\n")
        parts += [table(variants, phase) + "\n" for phase in PHASES if any(phase in v for v in variants.values())]
    return "\n".join(parts)


def figures(runs: list[Run], default: str, reported: Sequence[str]) -> list[dict[str, object]]:
    """Rows as bench.results.record writes them: recall of the ``reported`` variants at chunk 32.

    ``recall-MODEL-PHASE-VARIANT`` is over all that a machine measured of a model, with ``-TOKENS`` over one length.
    """
    return [figure for same in by_machine(runs) for figure in _figures_of(same, default, reported)]


def _figures_of(runs: list[Run], default: str, reported: Sequence[str]) -> Iterator[dict[str, object]]:
    rows = [row for run in runs for row in run.rows if row.chunk == CHUNK and row.variant in reported]
    for model in sorted({r.model for r in rows}):
        for tokens in (None, *sorted({r.tokens for r in rows if r.model == model})):
            part = [r for r in rows if r.model == model and tokens in (None, r.tokens)]
            lengths = {r.tokens for r in part}
            given = [run.command for run in runs if any(r.model == model and r.tokens in lengths for r in run.rows)]
            for phase in PHASES:
                here = [r for r in part if r.phase == phase]
                for name in dict.fromkeys(r.variant for r in here):
                    figure = _figure(here, "default" if name == default else label(name), name)
                    case = f"recall-{model}-{phase}-{figure.pop('label')}" + ("" if tokens is None else f"-{tokens}")
                    yield {"case": case} | figure | runs[0].machine | {"command": " && ".join(given)}


def label(variant: str) -> str:
    """How a case spells a variant: "keys/16x4" is sketch-16x4-keys, "queries/pq-10x8" is pq-10x8."""
    basis, _, rest = variant.partition("/")
    if not rest:
        return variant
    rest = rest.replace("/", "-")
    if rest[0].isdigit():
        return f"sketch-{rest}-{basis}"
    return rest if basis == "queries" else f"{rest}-{basis}"


def _figure(part: list[Row], label: str, name: str) -> dict[str, object]:
    own = [r for r in part if r.variant == name]
    s = summarise(own)
    return {
        "label": label,
        "value": round(s["recall"], 4),
        "unit": "fraction",
        "ceiling": 1.0,
        "baseline": round(mean(r.recall for r in part if r.variant == FLOOR), 4),
        "variant": name,
        "bytes": s["bytes"],
        "state_bytes": s["state"],
        "samples": len(own),
        "tokens": sorted({r.tokens for r in own}),
        "texts": sorted({r.text for r in own}),
    } | {key: _rounded(s[key]) for key in ("p10", "worst_layer", "picks", "error", "needle")}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def rules_report(rows: list[RuleRow]) -> str:
    """A table per model: rules by phase."""
    lines = []
    for model, tokens in sorted({(r.model, r.tokens) for r in rows}):
        mine = [r for r in rows if (r.model, r.tokens) == (model, tokens)]
        phases = [p for p in PHASES if any(r.phase == p for r in mine)]
        lines += [f"\n## {model}, {tokens:,} tokens ({', '.join(sorted({r.text for r in mine}))})\n"]
        heads = [f"{p}: error | picks" for p in phases]
        lines += ["| rule | " + " | ".join(heads) + " | answer's chunks |", "|---" * (2 * len(phases) + 2) + "|"]
        for rule in dict.fromkeys(r.rule for r in mine):
            of = {p: [r for r in mine if r.rule == rule and r.phase == p] for p in phases}
            cells = [f"{mean(r.error for r in of[p]):.4f} | {mean(r.picks for r in of[p]):.3f}" for p in phases]
            needle = mean(r.needle for p in phases for r in of[p])
            lines.append(f"| {rule} | " + " | ".join(cells) + f" | {needle:.3f} |")
    return "\n".join(lines)


UNJOINED = "means, boxes"
SERIES = {
    UNJOINED: ("#7f7f7f", r"mean|minmax|cuboid|submeans-.*"),
    "sketch, keys' basis": ("#1f77b4", r"keys/\d+x4"),
    "sketch, queries' basis (16 x int4 ships)": ("#d62728", r"sketch-\d+x4"),
    "levels by water-filling": ("#ff9900", r"queries/levels-\d+b"),
    "product codes, keys' basis": ("#aec7e8", r"keys/pq-.*x8"),
    "product codes": ("#2ca02c", r"queries/pq-\d+x8"),
    "product codes in two levels": ("#9467bd", r"queries/pq-\d+x8\+8"),
    "product codes, fitted anew": ("#8c564b", r"queries/pq-\d+x8/refit.*"),
}
"""What the plot shows: name of a series, its colour, and its variants."""


def plot(rows: list[Row], path: Path) -> None:
    """Recall against bytes, an SVG with a row of panels per model and length, one panel per phase."""
    panels = []
    by_length = sorted(group(rows).items(), key=lambda found: found[0][1])
    for (model, tokens, chunk), variants in sorted(by_length, key=lambda found: found[0][0], reverse=True):
        if chunk == CHUNK:
            for phase in PHASES:
                found = {name: p[phase] for name, p in variants.items() if phase in p}
                points = [(s["bytes"], s["recall"], name) for name, s in found.items()]
                series = [
                    Series(name, colour, [p for p in points if fullmatch(spelling, p[2])], joined=name != UNJOINED)
                    for name, (colour, spelling) in SERIES.items()
                ]
                floor = found[FLOOR]["recall"] if FLOOR in found else 0.0
                panels.append(Panel(f"{model}, {tokens // 1024}K, {phase}", series, floor))
    draw(panels, [(name, colour) for name, (colour, _) in SERIES.items()], path)
