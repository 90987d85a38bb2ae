"""From a sequence of an engine to the files of a store.

The window at a commit is a group of arrays in one file each (L full-attention layers, S with a sliding window):

==================  ================================  ==================================================================
array               shape                             what
==================  ================================  ==================================================================
sinks               [2, L, N, sinks held, D]          K (0) and V (1)
tokens              [2, L, N, length - begin, D]      tokens that have not left for the tiers
sliding             [2, S, N, length - begin, D]      of the layers with a sliding window
queries/sums        [2, L, N, D, D] float32           until a summary is fitted: of q q^T before the last block, in it
queries/start       [L] int64                         where that block began
==================  ================================  ==================================================================

Keys are un-rotated, their dimensions in the order in which rotary embeddings are "rotate half"; here they are
unquantised.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kvtier.runtime.budget import Budget
from kvtier.runtime.commit_record import Commit, checksum, write_commit
from kvtier.runtime.errors import StoreError, UnsupportedError
from kvtier.runtime.library import Library
from kvtier.runtime.sequence import TieredSequence
from kvtier.runtime.sequence_files import SHARD_CHUNKS, SequenceFiles
from kvtier.runtime.slot_tier import TRANSIENT_BYTES, as_bytes
from kvtier.runtime.tiered import TieredEngine
from kvtier.runtime.zarr_arrays import dtype_name, group_metadata, sync_folder, write_metadata, write_whole

NOTHING = Commit(0, 0, 0, 0, False, False, 0, 0, 0, 0, 0, {})
"""Before the first commit."""

Described = tuple[str, list[int], int]
"""Dtype, shape and crc32c of a small array."""


class Committer:
    """Brings the files of one sequence up to date with the sequence.

    Parameters
    ----------
    engine : whose sequence it is
    files : of the sequence
    last : the last commit in them
    budget : ``[budget] disk``, charged for all but the records; None: nothing is counted
    """

    def __init__(self, engine: TieredEngine, files: SequenceFiles, last: Commit, budget: Budget | None) -> None:
        self.last = last
        self.files = files
        self._engine = engine
        self._budget = budget
        self._charged = 0

    def commit(self, sequence: TieredSequence, *, complete: bool) -> None:
        """Commit all of ``sequence``, whose chunks have been written; on the disk when this returns.

        Raises
        ------
        BudgetError
            The window of a running sequence does not fit the host budget, or the files the disk budget.
        StoreError
            The files cannot be written. The last commit still counts.
        """
        try:
            self.last = self._commit(sequence, complete)
        except StoreError:
            raise
        except OSError as error:
            raise self.files.unwritable(error) from error

    def _commit(self, sequence: TieredSequence, complete: bool) -> Commit:
        last, files, engine = self.last, self.files, self._engine
        engine.park(sequence)
        chunks = retired_everywhere(engine, sequence)
        ids, starts = sequence.tokens.array(), np.array(sequence.block_starts, np.int64)
        slot = 1 - last.window
        self._charge(sequence, chunks)
        files.tokens.write(last.tokens, ids[last.tokens :])
        files.block_starts.write(last.blocks, starts[last.blocks :])
        self._write_codes(sequence, chunks)
        arrays = {name: array for name, array in last.arrays.items() if name.startswith("fitted/")}
        if not arrays:
            arrays = self._write_fitted(sequence)
        window, begins = self._write_window(sequence, f"window{slot}")
        files.sync()
        commit = Commit(
            number=last.number + 1,
            tokens=sequence.length,
            chunks=chunks,
            blocks=len(starts),
            complete=complete,
            rewound=sequence._rewound,
            window=slot,
            window_begin=begins[0],
            sliding_begin=begins[1],
            tokens_crc=checksum(ids[last.tokens :].astype("<i8"), last.tokens_crc),
            blocks_crc=checksum(starts[last.blocks :].astype("<i8"), last.blocks_crc),
            arrays=arrays | window,
        )
        write_commit(files.folder / "commit", commit)
        if complete:  # in both slots: damage to one of them takes nothing back
            commit = replace(commit, number=commit.number + 1)
            write_commit(files.folder / "commit", commit)
        files.publish(chunks, sequence.length, len(starts), sync=complete)
        return commit

    def _charge(self, sequence: TieredSequence, chunks: int) -> None:
        """Take what the new codes, tokens and, the first time, two windows add from the budget."""
        if self._budget is None:
            return
        layout = self.files.layout
        per_chunk = layout.n_layers * (sum(map(layout.code_bytes, layout.codes)) + 4 * layout.n_kv_heads) + 4
        nbytes = (chunks - max(self.last.chunks, layout.first)) * per_chunk + 8 * (sequence.length - self.last.tokens)
        if not self._charged:
            nbytes += 2 * self._engine.window_bytes
        self._budget.take(nbytes, "the summaries and the window of a saved sequence")
        self._charged += nbytes

    def _write_codes(self, sequence: TieredSequence, chunks: int) -> None:
        layers = [sequence.layers[layer].codes for layer in self._engine.shape.full_layers]
        begin = max(self.last.chunks, self.files.layout.first)
        while layers and begin < chunks:
            end = min(chunks, (begin // SHARD_CHUNKS + 1) * SHARD_CHUNKS)
            parts = [codes.part(begin, end) for codes in layers]
            names = self.files.layout.codes
            self.files.write_codes(begin, {name: torch.stack([part[name] for part in parts]) for name in names})
            begin = end

    def _write_fitted(self, sequence: TieredSequence) -> dict[str, Described]:
        """What the summary has fitted, once it has in every layer."""
        states = [sequence.layers[layer].fitted for layer in self._engine.shape.full_layers]
        if not states or any(state is None for state in states):
            return {}
        columns = zip(*(state.state for state in states if state is not None), strict=True)
        return dict(self._write_array(f"fitted/{i}", torch.stack(column)) for i, column in enumerate(columns))

    def _write_window(self, sequence: TieredSequence, name: str) -> tuple[dict[str, Described], tuple[int, int]]:
        """Write the parked windows up to the sequence's length; returns the arrays and where the two begin."""
        parked, end = sequence.parked, sequence.length
        assert parked is not None
        assert parked.end >= end  # more by one, if the last token was forgotten after it had been parked
        begin, sliding_begin = min(parked.full.begin, end), min(parked.sliding.begin, end)
        arrays = [
            self._write_array(f"{name}/sinks", parked.full.sinks[:, :, :, :end]),
            self._write_array(f"{name}/tokens", parked.full.tokens[:, :, :, : end - begin]),
            self._write_array(f"{name}/sliding", parked.sliding.tokens[:, :, :, : end - sliding_begin]),
        ]
        moments = [sequence.layers[layer].queries for layer in self._engine.shape.full_layers]
        if moments and all(moment is not None for moment in moments):
            sums = torch.stack([torch.stack((m._total, m._last)) for m in moments if m is not None], dim=1)
            starts = torch.tensor([m._start for m in moments if m is not None])
            arrays += [
                self._write_array(f"{name}/queries/sums", sums),
                self._write_array(f"{name}/queries/start", starts),
            ]
        return dict(arrays), (begin, sliding_begin)

    def _write_array(self, name: str, tensor: torch.Tensor) -> tuple[str, Described]:
        folder = self.files.folder / name
        parents = [parent for parent in folder.parents if parent.is_relative_to(self.files.folder)]
        is_new = not folder.is_dir()
        for parent in reversed(parents):
            if not parent.is_dir():
                write_metadata(parent, group_metadata({}))
        values = write_whole(folder, tensor)
        for parent in parents if is_new else ():
            sync_folder(parent)
        return name, (dtype_name(tensor.dtype), list(tensor.shape), checksum(np.ascontiguousarray(values).reshape(-1)))


def retired_everywhere(engine: TieredEngine, sequence: TieredSequence) -> int:
    """Chunks that have left the window, the same in every layer but after a block that failed half-way.

    Raises UnsupportedError then: a layer where they have left holds later tokens in their place.
    """
    layers = [sequence.layers[layer] for layer in engine.shape.full_layers]
    if len({(chunks.fitted is None, chunks.retired) for chunks in layers}) > 1:
        raise UnsupportedError("the last call on this cache failed half-way: call it again, then save it")
    return layers[0].retired if layers else 0


def save_chunks(engine: TieredEngine, sequence: TieredSequence, files: SequenceFiles, first: int | None = None) -> None:
    """Write the records of the chunks from ``first`` on (None: all that ``files`` is to hold), a few at a time."""
    first = files.layout.first if first is None else first
    end = retired_everywhere(engine, sequence)
    step = max(1, TRANSIENT_BYTES // (engine.shape.n_kv_heads * files.layout.payload_bytes))
    for place, layer in enumerate(engine.shape.full_layers):
        for begin in range(first, end, step):
            ids = np.ascontiguousarray(sequence.layers[layer].ids[:, begin : min(begin + step, end)].T)  # [m, N]
            payload = as_bytes(engine.residency.read(ids.ravel()))
            files.write_records(place, begin, payload.reshape(*ids.shape, -1))


def reads_from(engine: TieredEngine, sequence: TieredSequence, folder: Path) -> bool:
    """Whether any chunk of ``sequence`` lies in the saved sequence ``folder``."""
    saved, n = engine.residency.saved, retired_everywhere(engine, sequence)
    layers = [sequence.layers[layer].ids[:, :n].ravel() for layer in engine.shape.full_layers]
    numbers = np.unique(saved.file_of(np.concatenate(layers))) if layers else np.empty(0, np.int64)
    return any(saved.files(number).folder == folder for number in numbers.tolist() if number >= 0)


def inherited(engine: TieredEngine, sequence: TieredSequence, library: Library) -> list[tuple[str, int]]:
    """The sequences of ``library`` that hold the first chunks, in order: id, and the chunk before which each ends."""
    saved, n = engine.residency.saved, retired_everywhere(engine, sequence)
    if not n:
        return []
    ids = np.stack([sequence.layers[layer].ids[:, :n] for layer in engine.shape.full_layers])  # [L, N, n]
    numbers = saved.file_of(ids.ravel()).reshape(-1, n)
    same = (numbers == numbers[0]).all(axis=0) & (numbers[0] >= 0)
    numbers = numbers[0, : n if same.all() else int(same.argmin())]
    parts: list[tuple[str, int]] = []
    for end in [*np.flatnonzero(np.diff(numbers)) + 1, len(numbers)] if len(numbers) else []:
        folder = saved.files(int(numbers[end - 1])).folder
        held = library.read(folder.name) if folder == library.folder_of(folder.name) else None
        if held is None or held.commit is None:
            break
        if parts and parts[-1][0] == folder.name:  # an interrupted reading that went on: opened twice, the same files
            parts.pop()
        parts.append((folder.name, min(int(end), held.commit.chunks)))
        if held.commit.chunks < end:
            break
    return parts
