"""One sequence to and from a zarr group: the arrays, what is fixed in them, and a bounded amount of memory on the way.

============================  ======================================  ==================================================
array                         shape                                   what
============================  ======================================  ==================================================
tokens, block_starts          [n], [blocks] int64
window/sinks                  [2, L, N, sinks held, D]                of the full-attention layers, in their order
window/tokens                 [2, L, N, length - begin, D]            tokens that have not left for the tiers
window/sliding                [2, S, N, length - sliding_begin, D]    of the layers with a sliding window
layers/<layer>/kv             [chunks, N, 2, C, D]                    K (0) and V (1) of each chunk and KV head
layers/<layer>/codes/<name>   [N, chunks, ...]                        summaries, as the kind lays them out
layers/<layer>/fitted/<i>     [N, ...]                                what the summary fitted to the layer
layers/<layer>/queries/sums   [2, N, D, D] float32                    until then: of q q^T before the last block, in it
layers/<layer>/queries/start  [1] int64                               where that block began
============================  ======================================  ==================================================

Keys are un-rotated and unquantised, their dimensions in the order in which rotary embeddings are "rotate half". The
attribute ``dtype`` of an array is that of its values; bfloat16 is stored as uint16. Knows nothing of transformers:
``write_sequence`` returns what must be kept as attributes, to which the caller adds what tells models apart.
"""

import hashlib
import weakref
from dataclasses import asdict
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtier.runtime.errors import StoreError
from kvtier.runtime.residency import Residency
from kvtier.runtime.sequence import Fitted, LayerChunks, QueryMoment, TieredSequence
from kvtier.runtime.sizing import chunk_bytes
from kvtier.runtime.slabs import SLAB_CHUNKS
from kvtier.runtime.slot_tier import TRANSIENT_BYTES
from kvtier.runtime.summary import KINDS, Summary
from kvtier.runtime.tier import Ids
from kvtier.runtime.tiered import TieredEngine
from kvtier.runtime.window import ParkedRing, ParkedWindows

UNRANKED = {"cuboid", "exact", "mean", "minmax"}
"""Kinds of summary whose codes do not depend on ``[summary] rank`` and ``bits``."""
PIECE = 2**16
"""Items of a one-dimensional array in a file."""

Attributes = dict[str, Any]
Part = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


def fixed_values(engine: TieredEngine) -> Attributes:
    """What must be the same where a sequence is saved and where it is opened, by the name that messages use."""
    shape, geometry, summary = engine.shape, engine.geometry, engine._summary
    kind = _kind_of(summary)
    ranked = kind not in UNRANKED
    return {
        "number of layers": shape.n_layers,
        "number of KV heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "list of layers with a sliding window": sorted(shape.sliding_layers),
        "sliding window": shape.sliding_window,
        "dtype": _name(shape.dtype),
        "[attention] sink": geometry.sink,
        "[attention] chunk": geometry.chunk,
        "[attention] local": geometry.local,
        "[summary] kind": kind,
        "[summary] rank": summary.rank if ranked else None,
        "[summary] bits": summary.bits if ranked else None,
    }


def difference(engine: TieredEngine, attributes: Attributes) -> str | None:
    """Why ``engine`` cannot go on with a saved sequence exactly as it was; None: it can."""
    for name, here in fixed_values(engine).items():
        saved = attributes["fixed"].get(name)
        if saved != here:
            return f"it was saved with {name} = {saved}, here it is {here}"
    select, held = attributes["select"], attributes["tokens"] - attributes["window_begin"]
    if select > engine.geometry.select:
        return f"it attends to {select} chunks per KV head, here [attention] select = {engine.geometry.select}"
    if held > engine.geometry.window_capacity:
        most = engine.geometry.window_capacity
        return f"its window holds {held} tokens, here at most {most} fit: raise [prefill] block by {held - most}"
    return None


def token_digest(ids: Ids) -> str:
    """A hash of token ids [n], by which equal texts are found."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def stored_bytes(engine: TieredEngine, sequence: TieredSequence) -> int:
    """About what a sequence takes on disk: K and V of all its tokens, and the summaries."""
    shape, n_kv = engine.shape, engine.shape.n_kv_heads
    one = n_kv * (chunk_bytes(shape, engine.geometry) + engine._summary.chunk_bytes())
    chunks = sum(layer.retired for layer in sequence.layers) * one
    held = min(sequence.length, engine.geometry.sink + engine.geometry.window_capacity)
    return chunks + 2 * shape.n_layers * n_kv * held * shape.head_dim * shape.dtype.itemsize


# -- writing -----------------------------------------------------------------------------------------------------------


def write_sequence(group: Any, engine: TieredEngine, sequence: TieredSequence) -> Attributes:
    """Write all of a sequence into an empty zarr group; returns its attributes.

    Host memory: the parked window, counted in the host budget, and a few batches of chunks of up to 4 MiB.

    Raises
    ------
    BudgetError
        The window of a running sequence does not fit the host budget.
    StoreError, OSError
        Chunks cannot be read, arrays cannot be written.
    """
    engine._seats.park(sequence)
    ids = sequence.tokens.array()
    _write(group, "tokens", torch.from_numpy(ids), PIECE)
    _write(group, "block_starts", torch.tensor(sequence.block_starts, dtype=torch.int64), PIECE)
    begin, sliding_begin = _write_window(group.create_group("window"), sequence)
    layers = group.create_group("layers")
    for layer in engine.shape.full_layers:
        _write_layer(layers.create_group(str(layer)), engine, sequence.layers[layer])
    return {
        "tokens": sequence.length,
        "tokens_sha256": token_digest(ids),
        "select": sequence.select,
        "rewound": sequence._rewound,
        "window_begin": begin,
        "sliding_begin": sliding_begin,
        "fixed": fixed_values(engine),
        "geometry": asdict(engine.geometry),
    }


def _write_window(group: Any, sequence: TieredSequence) -> tuple[int, int]:
    """Write the parked windows up to the sequence's length; returns where the two begin."""
    parked, end = sequence.parked, sequence.length
    assert parked is not None
    assert parked.end >= end  # more by one, if the last token was forgotten after it had been parked
    begin, sliding_begin = min(parked.full.begin, end), min(parked.sliding.begin, end)
    for name, tensor in (
        ("sinks", parked.full.sinks[:, :, :, :end]),
        ("tokens", parked.full.tokens[:, :, :, : end - begin]),
        ("sliding", parked.sliding.tokens[:, :, :, : end - sliding_begin]),
    ):
        array = _create(group, name, tensor.shape, tensor.dtype, (2, 1, *tensor.shape[2:]))
        for layer in range(tensor.shape[1]):
            array[:, layer : layer + 1] = _raw(tensor[:, layer : layer + 1])
    return begin, sliding_begin


def _write_layer(group: Any, engine: TieredEngine, chunks: LayerChunks) -> None:
    n, n_kv = chunks.retired, engine.shape.n_kv_heads
    record = (2, engine.geometry.chunk, engine.shape.head_dim)
    most = max(1, TRANSIENT_BYTES // (n_kv * chunk_bytes(engine.shape, engine.geometry)))
    step = -(-n // -(-n // most)) if n else 1  # zarr pads the last file: as many files, but none almost empty
    shape = (n, n_kv, *record)
    kv = _create(group, "kv", shape, engine.shape.dtype, (step, *shape[1:]))
    for begin in range(0, n, step):
        ids = chunks.ids[:, begin : begin + step]
        batch = _read_chunks(engine.residency, np.ascontiguousarray(ids.T).ravel())
        kv[begin : begin + ids.shape[1]] = _raw(batch).reshape(-1, *shape[1:])
    for name, (per_chunk, dtype) in engine._summary.layout().items():
        codes = _create(group, f"codes/{name}", (n_kv, n, *per_chunk), dtype, (n_kv, SLAB_CHUNKS, *per_chunk))
        for i, slab in enumerate(chunks.codes.slabs(n)):
            codes[:, i * SLAB_CHUNKS : i * SLAB_CHUNKS + slab[name].shape[1]] = _raw(slab[name])
    if chunks.fitted is not None:
        fitted = group.create_group("fitted")
        for i, tensor in enumerate(chunks.fitted.state):
            _write(fitted, str(i), tensor, tensor.shape[0])
    if chunks.queries is not None:
        queries = group.create_group("queries")
        _write(queries, "sums", torch.stack((chunks.queries._total, chunks.queries._last)), 2)
        _write(queries, "start", torch.tensor([chunks.queries._start]), 1)


def _read_chunks(residency: Residency, ids: Ids) -> torch.Tensor:
    """K and V of ``ids`` [m] from the host or the store: [m, 2, C, D] on the host."""
    data = residency.device.data
    out = torch.empty((ids.size, *data.shape[1:]), dtype=data.dtype)
    in_host = residency.host.has(ids)
    if in_host.all():
        residency.host.get(ids, out)
        return out
    assert residency.store is not None, "a live chunk is in no tier"
    for tier, here in ((residency.host, in_host), (residency.store, ~in_host)):
        part = torch.empty((int(here.sum()), *out.shape[1:]), dtype=out.dtype)
        tier.get(ids[here], part)
        out[torch.from_numpy(here)] = part
    return out


def _create(group: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: tuple[int, ...]) -> Any:
    """An array in files of ``pieces`` values, checksummed. Zeros are written too: a missing file is a lost one."""
    from zarr.codecs import Crc32cCodec

    return group.create_array(
        name,
        shape=tuple(shape),
        dtype="uint16" if dtype == torch.bfloat16 else _name(dtype),
        chunks=tuple(max(1, min(piece, size)) for piece, size in zip(pieces, shape, strict=True)),
        chunk_key_encoding={"name": "default", "separator": "."},  # "/" makes a chain of folders for every file
        filters=None,
        compressors=(Crc32cCodec(),),
        fill_value=0,
        attributes={"dtype": _name(dtype)},
        config={"write_empty_chunks": True},
    )


def _write(group: Any, name: str, tensor: torch.Tensor, piece: int) -> None:
    """Write a small tensor as an array, in files of ``piece`` items of its first dimension."""
    _create(group, name, tensor.shape, tensor.dtype, (piece, *tensor.shape[1:]))[...] = _raw(tensor)


def _raw(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The values as numpy has them."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind_of(summary: Summary) -> str:
    cls = type(summary)
    return next(kind for kind, where in KINDS.items() if where == f"{cls.__module__}:{cls.__qualname__}")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_sequence(group: Any, engine: TieredEngine, attributes: Attributes) -> TieredSequence:
    """The sequence of a zarr group, not running, its chunks admitted to the tiers below the device.

    ``attributes`` : what ``write_sequence`` returned; ``difference`` has found none

    Raises
    ------
    BudgetError
        A tier has no room. Nothing is kept of what was read.
    StoreError
        An array cannot be read or its checksum is wrong. Nothing is kept either.
    """
    sequence = engine.new_sequence(attributes["select"])
    try:
        sequence.tokens.append(_tensor(group, "tokens"))
        sequence.length = len(sequence.tokens)
        sequence.block_starts = _tensor(group, "block_starts").tolist()
        sequence._rewound = attributes["rewound"]
        _read_window(group, engine, sequence, attributes)
        for layer in engine.shape.full_layers:
            _read_layer(group[f"layers/{layer}"], engine, sequence.layers[layer])
    except BaseException:
        engine.release(sequence)
        raise
    return sequence


def _read_window(group: Any, engine: TieredEngine, sequence: TieredSequence, attributes: Attributes) -> None:
    """Give ``sequence`` its parked windows, accounted as ``Windows.park`` does."""
    arrays = [group[f"window/{name}"] for name in ("sinks", "tokens", "sliding")]
    nbytes = sum(array.size for array in arrays) * engine.shape.dtype.itemsize
    residency, end = engine.residency, sequence.length
    residency.free_host_bytes(nbytes)
    host = residency.host.budget
    from_aside = host.take_aside(nbytes, "the window of a sequence that is opened")
    try:
        sinks, tokens, sliding = (_tensor(group, f"window/{name}") for name in ("sinks", "tokens", "sliding"))
        full = ParkedRing(sinks, tokens, attributes["window_begin"], end)
        no_sinks = sliding[:, :, :, :0]
        parked = ParkedWindows(full, ParkedRing(no_sinks, sliding, attributes["sliding_begin"], end), end)
    except BaseException:
        host.give_aside(nbytes, from_aside)
        raise
    weakref.finalize(parked, host.give_aside, nbytes, from_aside)
    sequence.parked = parked


def _read_layer(group: Any, engine: TieredEngine, chunks: LayerChunks) -> None:
    residency, kv = engine.residency, group["kv"]
    n, n_kv = kv.shape[:2]
    step = kv.chunks[0]
    at_once = engine.geometry.block // engine.geometry.chunk + 1  # as a block retires: any host budget has room for it
    ids, done = np.empty((n_kv, n), dtype=np.int64), 0
    for begin in range(0, n, step):
        for batch in _tensor(group, "kv", slice(begin, min(begin + step, n))).split(at_once):  # [m, N, 2, C, D]
            ids[:, done : done + len(batch)] = residency.admit(batch.flatten(0, 1)).reshape(-1, n_kv).T
            done += len(batch)
            chunks.ids = ids[:, :done]  # known to ``release`` from here on
    _read_learned(group, engine, chunks)
    chunks.codes.reserve(n)
    names = engine._summary.layout()
    for begin in range(0, n, SLAB_CHUNKS):
        part = (slice(None), slice(begin, min(begin + SLAB_CHUNKS, n)))
        chunks.codes.append({name: _tensor(group, f"codes/{name}", part) for name in names})


def _read_learned(group: Any, engine: TieredEngine, chunks: LayerChunks) -> None:
    """What the summary has fitted to the layer, or the queries that it will be fitted to."""
    device, budget = engine.shape.device, engine.residency.device.budget
    if "fitted" in group:
        state = (_tensor(group, f"fitted/{i}") for i in range(len(list(group["fitted"].array_keys()))))
        chunks.fitted = Fitted(tuple(tensor.to(device) for tensor in state), budget)
    if "queries" in group:
        queries = QueryMoment(engine.shape.n_kv_heads, engine.shape.head_dim, device, budget)
        sums = _tensor(group, "queries/sums")
        queries._total.copy_(sums[0])
        queries._last.copy_(sums[1])
        queries._start = int(_tensor(group, "queries/start"))
        chunks.queries = queries


def _tensor(group: Any, name: str, part: Part = ...) -> torch.Tensor:
    """Values of an array as a tensor on the host, their checksums verified; raises StoreError."""
    try:
        array = group[name]
        values = np.ascontiguousarray(array[part])
        dtype = getattr(torch, array.attrs["dtype"])
        return torch.from_numpy(values).view(dtype)
    except Exception as error:  # whatever zarr makes of a damaged file
        raise StoreError(
            f"{group.store_path}/{name} cannot be read: {error}. Nothing of the saved sequence was used; remove its "
            "folder and save it again, or put back a copy of it"
        ) from error
