"""Rows with the machine and the command that gave them, in a file: results are written from one or several."""

import gzip
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.fidelity.analyse import Row

Machine = dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Run:
    """What one call of ``python -m bench.fidelity`` measured."""

    machine: Machine
    """As ``bench.results.machine`` gives it."""
    command: str
    rows: list[Row]


def save(run: Run, path: Path) -> None:
    """Write ``run`` as gzipped JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        json.dump(asdict(run), file)


def load(path: Path) -> Run:
    """Read what ``save`` wrote."""
    with gzip.open(path, "rt") as file:
        raw = json.load(file)
    return Run(raw["machine"], raw["command"], [Row(**row) for row in raw["rows"]])


def by_machine(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs of one machine together, in the order of their first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(run.machine, sort_keys=True), []).append(run)
    return list(found.values())


def first_of_each(runs: Iterable[Run]) -> list[Row]:
    """All rows, but of a variant at one model, length, chunk and text only those of the first run that has it."""
    owner: dict[tuple[str, int, int, str, str], int] = {}
    rows = []
    for i, run in enumerate(runs):
        for row in run.rows:
            if owner.setdefault((row.model, row.tokens, row.chunk, row.text, row.variant), i) == i:
                rows.append(row)
    return rows
