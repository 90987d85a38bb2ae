"""``[store] mode = "durable"``: a text is saved while it is read, and only what the store does not have is read."""

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kvtier.cache import TieredCache
from kvtier.runtime.budget import Budget
from kvtier.runtime.commit_record import Commit
from kvtier.runtime.committer import NOTHING, Committer, inherited
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import Attributes, Library
from kvtier.runtime.recorder import Recorder
from kvtier.runtime.sequence import TieredSequence
from kvtier.runtime.sequence_files import SequenceFiles
from kvtier.runtime.session import layout_of, sequence_id
from kvtier.sessions import Found, describe, engine_of, find, new_files, open_found

if TYPE_CHECKING:
    from kvtier.offload import Offload

COMMIT_SHARE = 0.05
"""Commits take at most this share of the time: the next one waits until the last one's time is so little of it."""
FIRST_COMMIT_SECONDS = 1.0
"""The first one comes after so much time."""


def read(
    kv: "Offload", library: Library, budget: Budget, ids: torch.Tensor, select: int, on_block: Callable[[int], object]
) -> tuple[TieredCache, int]:
    """The cache of token ``ids`` [n] (CPU), saved to the last token, and how many of them the store had.

    What the store has of them is continued: in place if it is what an interrupted reading of the same text left, else
    by a new sequence that refers to it.

    Parameters
    ----------
    library : of which this process is the writer
    budget : ``[budget] disk``
    on_block : called with the number of tokens that the cache holds after each block

    Raises
    ------
    StoreError, BudgetError
        The store cannot be written, or a budget does not suffice. What was committed stays.
    """
    attributes = describe(kv, select)
    found, sequence, id, damaged = _begin(kv, library, ids, select, attributes)
    cache, resumed = kv._wrap([sequence]), sequence.length
    if resumed < len(ids) and damaged:
        _warn(damaged, id, len(ids) - resumed)
    on_block(resumed)
    try:
        own = found.entry if found is not None and found.entry.id == id else None
        last = NOTHING if own is None or own.commit is None else own.commit
        files = None if own is None else SequenceFiles(own.path, layout_of(own.attributes))
        if resumed < len(ids):
            parts = inherited(engine_of(kv), sequence, library)
            files = files or new_files(kv, library, id, attributes | {"text_tokens": len(ids)}, parts)
            _Writing(kv, files, last, budget, sequence, on_block).feed(cache, ids[None, resumed:])
        elif files is not None and not last.complete:  # killed between the last block and this
            Committer(engine_of(kv), files, last, None).commit(sequence, complete=True)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{library.path} cannot be written: {error}. What was committed before is intact; free space there, or "
            "choose another [store] path"
        ) from error
    finally:
        library.settle()
    return cache, resumed


def _warn(damaged: dict[str, str], id: str, n_tokens: int) -> None:
    """Say that ``n_tokens`` are read which the store may have; ``damaged``: reasons by id, as ``find`` returns them."""
    lines = []
    for other, reason in damaged.items():
        then = "Whether it holds this text cannot be told"
        if other == id:
            then = "It is of this text; it is kept until the text has been read and saved again"
        lines.append(f"{reason}. {then}.")
    warnings.warn(f"{' '.join(lines)} {n_tokens} tokens are read", stacklevel=5)


def _begin(
    kv: "Offload", library: Library, ids: torch.Tensor, select: int, attributes: Attributes
) -> tuple[Found | None, TieredSequence, str, dict[str, str]]:
    """What the store has of ``ids``, opened; the id of the sequence that all of them will be; and what is damaged."""
    found, damaged = find(kv, library, ids.numpy(), select, lambda entry, reason: None)
    while True:
        sequence = engine_of(kv).new_sequence(select) if found is None else open_found(kv, library, found)
        rest, starts = len(ids) - sequence.length, list(sequence.block_starts)
        if rest:
            starts += [sequence.length + begin for begin, _ in kv.geometry.schedule(rest)]
        id = sequence_id(attributes, ids.numpy(), starts, rewound=False)
        own = library.read(id) if found is not None and found.entry.id != id else None
        if own is None or own.problem is not None or id in damaged:
            return found, sequence, id, damaged
        # An interrupted reading of these tokens goes on, although another sequence has more of them: that one can refer
        # to its chunks, which would be lost if it was written anew.
        engine_of(kv).release(sequence)
        found = Found(own, own.tokens)


class _Writing:
    """The rest of a text goes through the model and into the files of its sequence."""

    def __init__(
        self,
        kv: "Offload",
        files: SequenceFiles,
        last: Commit,
        budget: Budget,
        sequence: TieredSequence,
        on_block: Callable[[int], object],
    ) -> None:
        self._kv = kv
        self._sequence = sequence
        self._on_block = on_block
        self._committer = Committer(engine_of(kv), files, last, budget)
        self._recorder = Recorder(files, engine_of(kv).residency, budget)
        self._next_commit = time.perf_counter() + FIRST_COMMIT_SECONDS

    def feed(self, cache: TieredCache, ids: torch.Tensor) -> None:
        """Read token ``ids`` [1, n], committing now and then and at the end."""
        self._sequence.recorder = self._recorder
        try:
            mask = torch.ones_like(ids, dtype=torch.bool)
            self._kv.feed(cache, ids, mask, logits_to_keep=1, on_block=self._after_block)
            self._commit(complete=True)
        finally:
            self._sequence.recorder = None
            self._recorder.close()
            if not self._committer.last.complete:  # what was written, but is not known to be there, closes nothing
                self._recorder.files.close()

    def _after_block(self, done: int) -> None:
        self._on_block(self._sequence.length)
        if time.perf_counter() >= self._next_commit:
            self._commit(complete=False)

    def _commit(self, *, complete: bool) -> None:
        started = time.perf_counter()
        self._recorder.settle(True)
        self._committer.commit(self._sequence, complete=complete)
        now = time.perf_counter()
        self._next_commit = now + (now - started) / COMMIT_SHARE
