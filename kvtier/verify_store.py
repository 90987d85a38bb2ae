"""``kvtier verify``: is what a store has committed still what was written? Loads no model, changes nothing.

While a writer is at work, whatever looks wrong is looked at again under the next commit.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.commit_record import Commit, read_commit
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import Entry, Library
from kvtier.runtime.sequence_checks import Problem, SequenceChecks
from kvtier.runtime.sequence_files import SHARD_CHUNKS
from kvtier.runtime.session import layout_of
from kvtier.runtime.zarr_arrays import METADATA

MOST_PROBLEMS = 1000
"""Listed of one sequence; further ones are counted."""
BATCH_BYTES = 4 * 2**20
"""Read at a time."""
ATTEMPTS = 100
"""How often something is looked at again because its writer has committed meanwhile."""
SAY_SECONDS = 5.0

Say = Callable[[str], None]


def verify_store(path: str | os.PathLike[str], say: Say = lambda line: None) -> dict[str, Any]:
    """What ``kvtier verify --json`` prints; raises StoreError if ``path`` is no store.

    Of each sequence: tokens and chunks committed (None where that cannot be read), records that were looked at, bytes
    that were compared with a checksum, and ``problems``: lines that begin with the file they are about, as its path in
    the sequence's folder.

    Parameters
    ----------
    path : of the store, which may be read-only
    say : takes lines about how far it is
    """
    library = Library(path)
    found = [verify_sequence(library, entry, say) for entry in library.entries()]
    checked = {sequence.entry.id: sequence for sequence in found if sequence is not None}
    for sequence in checked.values():
        for id, end in sequence.parts:
            if id in checked and checked[id].damaged_from < end:
                sequence.add(f"{METADATA}: it goes on from {id}, which is damaged before chunk {end}")
    sequences = [sequence.report() for sequence in checked.values()]
    ok = all(sequence["ok"] for sequence in sequences)
    return {"store": str(library.path), "sequences": sequences, "ok": ok}


def table(report: dict[str, Any]) -> str:
    """The same for people: a line per sequence, a line per problem, and what to do."""
    store, sequences = report["store"], report["sequences"]
    if not sequences:
        return f"{store} holds no saved sequence"
    lines = [f"{'id':<14}{'tokens':>12}{'records':>12}{'checked':>13}"]
    for s in sequences:
        tokens = "?" if s["tokens"] is None else f"{s['tokens']:,}"
        state = "ok" if s["ok"] else "damaged:"
        lines.append(f"{s['id']:<14}{tokens:>12}{s['records']:>12,}{format_bytes(s['bytes']):>13}  {state}")
        lines += [f"  {problem}" for problem in s["problems"]]
    bad = [f"{store}/sequences/{s['id']}" for s in sequences if not s["ok"]]
    if bad:
        them = "that folder" if len(bad) == 1 else "those folders"
        lines.append(
            f"{len(bad)} of {len(sequences)} damaged: {', '.join(bad)}. Put back a copy of {them}, or remove {them} "
            "and save again"
        )
    else:
        lines.append(f"all that was saved in {store} is as it was written")
    return "\n".join(lines)


def verify_sequence(library: Library, entry: Entry, say: Say) -> "VerifiedSequence | None":
    """Check one sequence; None: it was removed meanwhile."""
    while True:
        sequence = VerifiedSequence(library, entry, say)
        try:
            sequence.check()
        except _ReplacedError:
            now = library.read(entry.id)
            if now is None:
                return None
            entry = now
        else:
            return sequence


class _ReplacedError(Exception):
    """The sequence was removed, or written anew, while it was checked."""


@dataclass
class VerifiedSequence:
    """What the checks of one sequence have found."""

    library: Library
    entry: Entry
    say: Say
    commit: Commit | None = None
    records: int = 0
    problems: list[str] = field(default_factory=list)
    n_more: int = 0
    damaged_from: float = math.inf
    """The first chunk whose data are damaged."""
    said: float = field(default_factory=time.monotonic)
    """When ``say`` was called."""

    def __post_init__(self) -> None:
        layout = layout_of(self.entry.attributes) if self.entry.attributes else None
        self.checks = SequenceChecks(self.entry.path, layout)

    @property
    def parts(self) -> list[tuple[str, int]]:
        """What it goes on from: ids, and the chunk before which each ends."""
        return [(id, end) for id, end in self.entry.attributes.get("parts", [])]

    def report(self) -> dict[str, Any]:
        """The sequence's part of ``verify_store``."""
        return {
            "id": self.entry.id,
            "tokens": self.commit.tokens if self.commit else None,
            "chunks": self.commit.chunks if self.commit else None,
            "records": self.records,
            "bytes": self.checks.bytes_checked,
            "ok": not self.problems,
            "problems": self.problems + ([f"and {self.n_more} more"] if self.n_more else []),
        }

    def add(self, line: str, chunk: int | None = None) -> None:
        """Note a problem, and the chunk from which on it damages data."""
        if chunk is not None:
            self.damaged_from = min(self.damaged_from, chunk)
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(line)
        else:
            self.n_more += 1

    def check(self) -> None:
        """Everything. Raises _ReplacedError."""
        try:
            self._look(self.checks.slots)
            try:
                self.commit = self.checks.commit = read_commit(self.entry.path / "commit")
            except StoreError:
                return  # said already
            if self.commit is None:
                if self.entry.commit is None and self.entry.problem is not None:  # it has lost it
                    self.add(self.entry.problem)
                    return
                raise _ReplacedError
            self.say(f"{self.entry.id}: {self.commit.tokens:,} tokens")
            self._look(self.checks.whole_files)
            if self.entry.problem is not None:
                self.add(f"{METADATA}: {self.entry.problem}")
                return
            self._look(self.checks.metadata)
            self._look(self._parts)
            n = self.commit.chunks - self.checks.layout.first if self.checks.layout.n_layers else 0
            for begin in range(0, n, SHARD_CHUNKS):
                self._check_shard(begin // SHARD_CHUNKS, min(SHARD_CHUNKS, n - begin))
        finally:
            self.checks.close()

    def _check_shard(self, shard: int, n: int) -> None:
        """Codes and records of the first ``n`` chunks of a shard."""
        checks, layout = self.checks, self.checks.layout
        self._look(partial(checks.code_files, shard))
        step = max(1, BATCH_BYTES // (layout.n_layers * sum(map(layout.code_bytes, layout.codes))))
        for begin in range(0, n, step):
            self._look(partial(checks.codes, shard, begin, min(begin + step, n)))
        if not self._look(partial(checks.record_files, shard)):
            return
        step = max(1, BATCH_BYTES // (layout.n_kv_heads * layout.payload_bytes))
        for layer in range(layout.n_layers):
            for begin in range(0, n, step):
                end = min(begin + step, n)
                self._look(partial(checks.records, shard, layer, begin, end))
                self.records += (end - begin) * layout.n_kv_heads
                self._progress()

    def _parts(self) -> Iterator[Problem]:
        begin = 0
        for id, end in self.parts:
            try:
                self.library.part(self.entry, id, begin, end)
            except StoreError as error:
                yield f"{METADATA}: {error}", 0
            begin = end

    def _look(self, check: Callable[[], Iterator[Problem]]) -> bool:
        """Note what ``check`` finds, once no commit can have caused it; whether there is nothing."""
        before = self.checks.bytes_checked
        found = list(check())
        for _ in range(ATTEMPTS):
            if not found or not self._moved():
                break
            self.checks.bytes_checked = before
            found = list(check())
        for line, chunk in found:
            self.add(line, chunk)
        return not found

    def _moved(self) -> bool:
        """Whether the writer has committed since the last look. Raises _ReplacedError."""
        now = self.library.read(self.entry.id)
        if now is None or now.attributes.get("created") != self.entry.attributes.get("created"):
            raise _ReplacedError
        if now.commit is None or self.checks.commit is None or now.commit.number <= self.checks.commit.number:
            return False
        self.checks.commit = now.commit
        return True

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self.said > SAY_SECONDS:
            self.said = now
            assert self.commit is not None
            layout = self.checks.layout
            n_records = (self.commit.chunks - layout.first) * layout.n_layers * layout.n_kv_heads
            done = format_bytes(self.checks.bytes_checked)
            self.say(f"{self.entry.id}: {self.records:,} of {n_records:,} records ({done})")
