"""From the files of a store to a sequence of an engine."""

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvtier.runtime.commit_record import checksum
from kvtier.runtime.library import Entry, Library
from kvtier.runtime.sequence import Fitted, LayerChunks, QueryMoment, TieredSequence
from kvtier.runtime.sequence_files import SequenceFiles
from kvtier.runtime.session import layout_of
from kvtier.runtime.tier import Ids
from kvtier.runtime.tiered import TieredEngine
from kvtier.runtime.window import ParkedRing, ParkedWindows
from kvtier.runtime.zarr_arrays import read_whole, tensor_of


class SavedSequence:
    """A saved sequence and those that it goes on from. Raises StoreError when one of them is not there."""

    def __init__(self, library: Library, entry: Entry) -> None:
        entry.check()
        assert entry.commit is not None
        self.entry = entry
        self.commit = entry.commit
        self.parts: list[tuple[SequenceFiles, int]] = []
        begin = 0
        for id, end in entry.attributes["parts"]:
            part = library.part(entry, id, begin, end)
            self.parts.append((SequenceFiles(part.path, layout_of(part.attributes)), end))
            begin = end
        self.files = SequenceFiles(entry.path, layout_of(entry.attributes))
        if self.commit.chunks > self.files.layout.first:
            self.parts.append((self.files, self.commit.chunks))

    def tokens(self) -> Ids:
        """The committed token ids [n], checked."""
        n, expected = self.commit.tokens, self.commit.tokens_crc
        tokens: Ids = self._checked(self.files.tokens.read, "tokens", n, expected)
        return tokens

    def block_starts(self) -> Ids:
        """Where the committed blocks began [blocks], checked."""
        n, expected = self.commit.blocks, self.commit.blocks_crc
        starts: Ids = self._checked(self.files.block_starts.read, "block_starts", n, expected)
        return starts

    def array(self, name: str) -> torch.Tensor:
        """One of the small arrays, checked, on the host."""
        dtype_of, shape, expected = self.commit.arrays[name]
        dtype = getattr(torch, dtype_of)
        return tensor_of(self._checked(read_whole, name, self.entry.path / name, expected, shape, dtype), dtype)

    def _checked(self, read: Any, name: str, first: int | Path, expected: int, *rest: Any) -> Any:
        try:
            values = read(first, *rest)
        except (OSError, EOFError) as error:
            raise self.files.damaged(f"{self.entry.path / name} cannot be read ({error})") from error
        if checksum(values.reshape(-1)) != expected:
            raise self.files.damaged(f"{self.entry.path / name} is not what was saved")
        return values


def read_sequence(saved: SavedSequence, engine: TieredEngine) -> TieredSequence:
    """The sequence as it was at its last commit, not running; its chunks stay where they are until they are chosen.

    ``difference`` has found none. Raises BudgetError (a tier has no room) and StoreError (files cannot be read, or are
    not what was saved), with nothing kept.
    """
    sequence = engine.new_sequence(saved.entry.attributes["select"])
    try:
        sequence.tokens.append(torch.from_numpy(saved.tokens()))
        sequence.length = len(sequence.tokens)
        sequence.block_starts = saved.block_starts().tolist()
        sequence._rewound = saved.commit.rewound
        _read_window(saved, engine, sequence)
        read_learned(saved, engine, sequence)
        refer_to_chunks(saved, engine, sequence, saved.commit.chunks)
    except BaseException:
        engine.release(sequence)
        raise
    return sequence


def _read_window(saved: SavedSequence, engine: TieredEngine, sequence: TieredSequence) -> None:
    """Give ``sequence`` the windows of the last commit."""
    commit, end = saved.commit, sequence.length
    names = [f"{commit.window_name}/{part}" for part in ("sinks", "tokens", "sliding")]
    n_values = sum(math.prod(commit.arrays[name][1]) for name in names)

    def windows() -> ParkedWindows:
        sinks, tokens, sliding = map(saved.array, names)
        full = ParkedRing(sinks, tokens, commit.window_begin, end)
        no_sinks = sliding[:, :, :, :0]
        return ParkedWindows(full, ParkedRing(no_sinks, sliding, commit.sliding_begin, end), end)

    park(engine, sequence, n_values, windows)


def park(engine: TieredEngine, sequence: TieredSequence, n_values: int, windows: Callable[[], ParkedWindows]) -> None:
    """Give ``sequence`` the ``windows`` of so many K and V values, accounted as ``Windows.park`` does."""
    nbytes = n_values * engine.shape.dtype.itemsize
    engine.residency.free_host_bytes(nbytes)
    host = engine.residency.host.budget
    from_aside = host.take_aside(nbytes, "the window of a sequence that is opened")
    try:
        parked = windows()
    except BaseException:
        host.give_aside(nbytes, from_aside)
        raise
    weakref.finalize(parked, host.give_aside, nbytes, from_aside)
    sequence.parked = parked


def read_learned(saved: SavedSequence, engine: TieredEngine, sequence: TieredSequence) -> None:
    """What the summary has fitted to the layers, or the queries that it will be fitted to."""
    device, budget, commit = engine.shape.device, engine.residency.device.budget, saved.commit
    layers = [sequence.layers[layer] for layer in engine.shape.full_layers]
    states = [saved.array(name) for name in sorted(commit.arrays) if name.startswith("fitted/")]
    for place, chunks in enumerate(layers):
        if states or commit.chunks:
            chunks.fitted = Fitted(tuple(state[place].to(device) for state in states), budget)
    if f"{commit.window_name}/queries/sums" in commit.arrays:
        sums = saved.array(f"{commit.window_name}/queries/sums")
        starts = saved.array(f"{commit.window_name}/queries/start").tolist()
        for place, chunks in enumerate(layers):
            chunks.queries = QueryMoment(engine.shape.n_kv_heads, engine.shape.head_dim, device, budget)
            chunks.queries._total.copy_(sums[0, place])
            chunks.queries._last.copy_(sums[1, place])
            chunks.queries._start = starts[place]


def refer_to_chunks(saved: SavedSequence, engine: TieredEngine, sequence: TieredSequence, n: int) -> None:
    """Give ``sequence`` the first ``n`` chunks: summaries go to the device, ids point into the files."""
    layers: list[LayerChunks] = [sequence.layers[layer] for layer in engine.shape.full_layers]
    heads, residency = engine.shape.n_kv_heads, engine.residency
    for chunks in layers:
        chunks.codes.reserve(n)
        chunks.ids = residency.new_saved(heads * n).reshape(heads, n)
    begin = 0
    for files, last in saved.parts:
        end = min(last, n)
        if end <= begin:
            break
        for codes in files.read_codes(end, begin):
            for place, chunks in enumerate(layers):
                chunks.codes.append({name: tensor[place] for name, tensor in codes.items()})
        for place, chunks in enumerate(layers):
            residency.saved.refer(chunks.ids[:, begin:end], files, place, begin)
        begin = end
