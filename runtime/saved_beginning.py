"""The beginning of a saved sequence as a sequence of its own: for texts that begin alike.

What the window held at that place is not saved, but its tokens have become chunks since; from these it is made again.
So the place is the beginning of a block with all tokens before it in chunks, chunks are kept as they are
(``dtype = "auto"``), and every layer is tiered.
"""

import numpy as np
import torch

from kvtier.runtime.saved_sequence import SavedSequence, park, read_learned, refer_to_chunks
from kvtier.runtime.sequence import TieredSequence
from kvtier.runtime.slot_tier import as_bytes
from kvtier.runtime.tier import Ids
from kvtier.runtime.tiered import TieredEngine
from kvtier.runtime.window import ParkedRing, ParkedWindows


def common_length(saved: SavedSequence, engine: TieredEngine, ids: Ids) -> int:
    """Of how many tokens of ``ids`` [n] the sequence can be the beginning, as if they alone were read; 0: of none."""
    geometry, shape = engine.geometry, engine.shape
    if engine.residency.bits is not None or shape.sliding_layers or not shape.full_layers:
        return 0
    tokens = saved.tokens()[: len(ids)]
    different = np.flatnonzero(tokens != ids[: len(tokens)])
    same = int(different[0]) if different.size else len(tokens)
    in_chunks = geometry.sink + saved.commit.chunks * geometry.chunk
    most = min(same, in_chunks, len(ids) - 1 - geometry.tail)
    starts = saved.block_starts()
    regular = np.arange(len(starts)) * geometry.block
    wrong = np.flatnonzero(starts != regular)
    starts = starts[: wrong[0] if wrong.size else len(starts)]
    starts = starts[starts <= most]
    length = int(starts[-1]) if len(starts) else 0
    return length if geometry.selectable(length) else 0


def read_beginning(saved: SavedSequence, engine: TieredEngine, length: int) -> TieredSequence:
    """The first ``length`` tokens, a result of ``common_length``, not running. Raises as ``read_sequence`` does."""
    sequence = engine.new_sequence(saved.entry.attributes["select"])
    try:
        sequence.tokens.append(torch.from_numpy(saved.tokens()[:length]))
        sequence.length = length
        sequence.block_starts = list(range(0, length, engine.geometry.block))
        _make_window(saved, engine, sequence)
        read_learned(saved, engine, sequence)
        refer_to_chunks(saved, engine, sequence, engine.geometry.selectable(length))
    except BaseException:
        engine.release(sequence)
        raise
    return sequence


def _make_window(saved: SavedSequence, engine: TieredEngine, sequence: TieredSequence) -> None:
    """Sinks as they were saved, the window from chunks."""
    geometry, shape, end = engine.geometry, engine.shape, sequence.length
    begin = geometry.window_start(end)
    one = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim

    def windows() -> ParkedWindows:
        sinks = saved.array(f"{saved.commit.window_name}/sinks")
        tokens = _from_chunks(saved, engine, begin, end)
        nothing = tokens[:, :0, :, :0]
        return ParkedWindows(ParkedRing(sinks, tokens, begin, end), ParkedRing(nothing, nothing, end, end), end)

    park(engine, sequence, one * (geometry.sink + end - begin), windows)


def _from_chunks(saved: SavedSequence, engine: TieredEngine, begin: int, end: int) -> torch.Tensor:
    """K and V of tokens begin..end, [2, L, N, end - begin, D], from the records; ``begin`` is where a chunk begins."""
    geometry, shape = engine.geometry, engine.shape
    first, last = (begin - geometry.sink) // geometry.chunk, -(-(end - geometry.sink) // geometry.chunk)
    layers, heads, n = shape.n_layers, shape.n_kv_heads, last - first
    out = torch.empty(layers, heads, n, 2, geometry.chunk, shape.head_dim, dtype=shape.dtype)
    try:
        for chunk in range(first, last):
            files = next(files for files, part_end in saved.parts if chunk < part_end)
            items = engine.residency.empty_items(layers * heads)
            places = np.indices((layers, heads)).reshape(2, -1)
            files.read_records(np.full(layers * heads, chunk), places[0], places[1], as_bytes(items))
            out[:, :, chunk - first] = items.view(layers, heads, *items.shape[1:])
    finally:
        for files, _ in saved.parts:  # those that hold chunks of the sequence are opened again when one is read
            files.close()
    tokens = out.permute(3, 0, 1, 2, 4, 5).flatten(3, 4)  # [2, L, N, tokens, D]
    return tokens[:, :, :, : end - begin].contiguous()
