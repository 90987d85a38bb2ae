"""Writes what bench files have measured into bench/results."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from bench.results import command_line, record


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Rows by bench name; written when the session ends."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    yield rows
    for bench, measured in rows.items():
        path = record(bench, measured, command_line())
        print(f"\nwrote {len(measured)} figures to {path}")
