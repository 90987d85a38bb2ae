"""``python -m bench.fidelity``: how near a summary's choice of chunks comes to the exact one.

Captures what is missing in the scratch folder, analyses it, keeps the rows there in fidelity_rows.json.gz, and writes
bench/results/fidelity.json, fidelity.md beside it and docs/fidelity.svg, in place of those that are there.
``--from-rows`` writes these three from the rows of earlier runs, so that figures of several machines stand together.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.fidelity import catalogue
from bench.fidelity.analyse import Row, analyse
from bench.fidelity.capture import capture
from bench.fidelity.models import load
from bench.fidelity.problem import default_geometry, read_meta
from bench.fidelity.report import figures, heading, plot, report, rules_report
from bench.fidelity.rules import compare
from bench.fidelity.runs import Run, first_of_each, save
from bench.fidelity.runs import load as load_run
from bench.fidelity.texts import KINDS, make_text
from bench.fidelity.variants import Variant
from bench.results import FOLDER, machine

ROWS = "fidelity_rows.json.gz"
DOCS = FOLDER.parent.parent / "docs"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__)
    p.add_argument("--models", nargs="+", default=["smollm2"], help="smollm2, gemma3, NAME=FOLDER")
    p.add_argument("--tokens", nargs="+", type=int, default=[16384])
    p.add_argument("--texts", nargs="+", choices=KINDS, default=list(KINDS))
    p.add_argument("--scratch", type=Path, default=Path(".out/fidelity"), help="where captures lie")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--max", type=int, default=None, help="[attention] max of the capture; default DESIGN's")
    p.add_argument("--block", type=int, default=None, help="[prefill] block of the capture; default DESIGN's")
    p.add_argument("--blocks", type=int, default=4, help="prefill blocks whose queries are kept")
    p.add_argument("--asks", type=int, default=4, help="questions per text")
    p.add_argument("--steps", type=int, default=16, help="decode steps per question")
    p.add_argument("--decode", type=int, default=4, help="of these, analysed")
    p.add_argument("--layers", type=int, default=1000, help="layers analysed, evenly spread")
    p.add_argument("--queries", type=int, default=0, help="queries of a step whose output error is computed")
    p.add_argument("--chunks", nargs="+", type=int, default=[32])
    p.add_argument("--sets", nargs="+", choices=[*catalogue.SETS, "short"], default=["short"])
    p.add_argument("--capture-only", action="store_true")
    p.add_argument(
        "--rules",
        type=int,
        default=None,
        metavar="MAX",
        help="compare rules instead, for MAX attended tokens",
    )
    p.add_argument("--from-rows", nargs="+", type=Path, metavar="FILE", help=f"measure nothing; files called {ROWS}")
    p.add_argument("--out", type=Path, default=FOLDER, help="folder of all three; default as above")
    return p.parse_args(argv)


def capture_missing(args: argparse.Namespace) -> list[Path]:
    """Folders of all wanted captures; a model is loaded only if one is missing."""
    folders = []
    for spec in args.models:
        name, _, path = spec.partition("=")
        loaded: tuple[Any, Any] | None = None
        for tokens in args.tokens:
            for kind in args.texts:
                folder = args.scratch / f"{name}-{kind}-{tokens}{_suffix(args)}"
                folders.append(folder)
                if (folder / "meta.json").exists():
                    continue
                dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
                loaded = loaded or load(name, path, args.scratch, args.device, dtype)
                started = time.perf_counter()
                text = make_text(kind, loaded[0], tokens, args.asks)
                sizes = {"blocks": args.blocks, "steps": args.steps, "max_": args.max, "block": args.block}
                capture(name, *loaded, text, folder, **sizes)
                said = [answer for answer in read_meta(folder).answers if answer[0]]
                found = sum(heard.strip().startswith(expected) for expected, heard in said)
                print(f"{folder.name}: {time.perf_counter() - started:.0f} s, answers {found}/{len(said)}", flush=True)
    return folders


def _suffix(args: argparse.Namespace) -> str:
    given = {"max": args.max, "block": args.block}
    return "".join(f"-{key}{value}" for key, value in given.items() if value)


def variants_of(sets: list[str]) -> list[Variant]:
    """The variants of the named sets, each once."""
    made = [v for name in sets for v in (catalogue.short() if name == "short" else catalogue.SETS[name]())]
    return list({v.name: v for v in made}.values())


def analyse_all(args: argparse.Namespace, folders: list[Path]) -> Iterator[Row]:
    """All rows, folder by folder."""
    for folder in folders:
        meta = read_meta(folder)
        for chunk in args.chunks:
            g = default_geometry(meta.geometry["max"], chunk=chunk, block=meta.geometry["block"])
            started = time.perf_counter()
            yield from analyse(
                folder,
                lambda: variants_of(args.sets),
                g,
                device=args.device,
                decode=args.decode,
                layers=args.layers,
                queries=args.queries,
            )
            print(f"{folder.name}, chunk {chunk}: {time.perf_counter() - started:.0f} s", flush=True)


def publish(runs: list[Run], out: Path) -> None:
    """Write the three files of results of ``runs``; the plot goes to docs/ if the others go to bench/results."""
    out.mkdir(parents=True, exist_ok=True)
    cases = figures(runs, catalogue.DEFAULT, catalogue.REPORTED)
    (out / "fidelity.json").write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")
    (out / "fidelity.md").write_text("\n\n".join(report(run) for run in runs) + "\n")
    plot(first_of_each(runs), (DOCS if out == FOLDER else out) / "fidelity.svg")


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.from_rows:
        publish([load_run(path) for path in args.from_rows], args.out)
        return
    torch.set_grad_enabled(False)
    folders = capture_missing(args)
    if args.capture_only:
        return
    command = " ".join(["python -m bench.fidelity", *argv])
    if args.rules:
        sizes = {"device": args.device, "decode": args.decode, "layers": args.layers, "queries": args.queries or 16}
        compared = [row for folder in folders for row in compare(folder, args.rules, **sizes)]
        args.out.mkdir(parents=True, exist_ok=True)
        text = heading(machine(), command) + "\n" + rules_report(compared)
        (args.out / "fidelity_rules.md").write_text(text + "\n")
        return
    run = Run(machine(), command, list(analyse_all(args, folders)))
    save(run, args.scratch / ROWS)
    publish([run], args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
