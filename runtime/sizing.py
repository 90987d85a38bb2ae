"""How many bytes a context takes: the device budget before anything is allocated, host and disk for ``kvtier plan``."""

import math
from dataclasses import dataclass, replace

import torch

from kvtier.kernels.quantize import record_bytes
from kvtier.kernels.select import SelectWorkspace
from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.geometry import ALL_QUERIES_CHOOSE, Geometry
from kvtier.runtime.host_pool import FEWEST_SLABS, SLAB_BYTES
from kvtier.runtime.layer_selection import FEWEST_CHUNKS
from kvtier.runtime.model import ModelShape
from kvtier.runtime.sequence import QueryMoment
from kvtier.runtime.sequence_files import PIECE, SHARD_CHUNKS, SequenceLayout
from kvtier.runtime.shards import BLOCK_BYTES, ShardLayout
from kvtier.runtime.slabs import SLAB_CHUNKS, slab_bytes
from kvtier.runtime.store import EMPTY_STORE_BYTES
from kvtier.runtime.summary import Layout, Summary, layout_bytes
from kvtier.runtime.window import Windows

POOL_STEPS = 3
"""The device pool aims at this many times the chunks that one step attends to (shared notes, summaries.md)."""


@dataclass(frozen=True, slots=True)
class DeviceSizes:
    """Bytes of each part of the device budget that does not grow with the context, and the pool's slots."""

    ring: int
    scratch: int
    rotary: int
    summaries: int
    """The first slab of every layer and what is fitted to it; more slabs follow as the context grows."""
    pool_slots: int
    chunk_bytes: int

    @property
    def fixed(self) -> int:
        """Taken when the block begins, the pool left out."""
        return self.ring + self.scratch + self.rotary

    @property
    def total(self) -> int:
        """Taken when the first chunks have left the window."""
        return self.fixed + self.summaries + self.pool_slots * self.chunk_bytes


def chunk_bytes(shape: ModelShape, geometry: Geometry) -> int:
    """Bytes of K and V of one chunk of one KV head."""
    return 2 * geometry.chunk * shape.head_dim * shape.dtype.itemsize


def item_bytes(shape: ModelShape, geometry: Geometry, bits: int | None) -> int:
    """Bytes of what host and disk keep of it: the same, or a record of ``bits`` bits a number."""
    return chunk_bytes(shape, geometry) if bits is None else record_bytes(geometry.chunk, shape.head_dim, bits)


def longest_attended(shape: ModelShape, geometry: Geometry) -> int:
    """Most tokens that a step attends to in any layer."""
    return max(geometry.bound, shape.sliding_capacity(geometry.block))


def scratch_bytes(shape: ModelShape, geometry: Geometry) -> int:
    """Buffers of one layer's step: the attended K and V, their rotated copies, the mask, fetched chunks, scores."""
    longest = longest_attended(shape, geometry)
    attended = shape.n_kv_heads * longest * shape.head_dim
    copies = 2 * attended * shape.dtype.itemsize + attended * (2 * 4 + shape.dtype.itemsize)
    mask = geometry.block * longest
    staged = shape.n_kv_heads * geometry.select * chunk_bytes(shape, geometry)
    queries = max(geometry.queries, min(ALL_QUERIES_CHOOSE, geometry.block))
    scores = 4 * shape.n_heads * queries * SLAB_CHUNKS * geometry.chunk
    return copies + mask + 2 * staged + scores


def device_sizes(
    shape: ModelShape, geometry: Geometry, summary: Summary, rotary_bytes: int, gpu_bytes: int
) -> DeviceSizes:
    """Divide ``gpu_bytes``; raises BudgetError with the minimum when it is too small to run at all.

    The pool takes up to ``POOL_STEPS`` steps' chunks, but at most half of what the fixed parts leave: summaries need
    the other half to grow with the context.
    """
    least = least_device_sizes(shape, geometry, summary, rotary_bytes)
    one, layer_chunks, minimum = least.chunk_bytes, least.pool_slots, least.total
    if gpu_bytes < minimum:
        raise BudgetError(
            f"[budget] gpu = {format_bytes(gpu_bytes)} is below the minimum working set {format_bytes(minimum)}: "
            f"window ring {format_bytes(least.ring)} + attention scratch {format_bytes(least.scratch)} + rotary tables "
            f"{format_bytes(least.rotary)} + first summaries {format_bytes(least.summaries)} + one layer's "
            f"{layer_chunks} chunks {format_bytes(layer_chunks * one)}. Raise it to at least {minimum} bytes, or lower "
            "[attention] local, select or [prefill] block"
        )
    spare = (gpu_bytes - least.fixed - least.summaries) // 2 // one
    wanted = POOL_STEPS * layer_chunks * len(shape.full_layers)
    return replace(least, pool_slots=max(layer_chunks, min(wanted, spare)))


def least_device_sizes(shape: ModelShape, geometry: Geometry, summary: Summary, rotary_bytes: int) -> DeviceSizes:
    """The least that can run: the pool holds the chunks of one layer."""
    n_full, two_levels = len(shape.full_layers), summary.levels == 2
    per_layer = slab_bytes(summary.device_layout(), shape.n_kv_heads) + moment_bytes(shape, summary)
    per_layer += shape.n_kv_heads * (summary.state_bytes() + summary.coarse_state_bytes())
    return DeviceSizes(
        ring=Windows.bytes_needed(shape, geometry),
        scratch=scratch_bytes(shape, geometry) + two_levels * candidate_bytes(shape, geometry, summary),
        rotary=rotary_bytes,
        summaries=n_full * per_layer,
        pool_slots=max(1, geometry.select) * shape.n_kv_heads if n_full else 0,
        chunk_bytes=chunk_bytes(shape, geometry),
    )


def candidate_bytes(shape: ModelShape, geometry: Geometry, summary: Summary) -> int:
    """Device bytes of the fine codes of a layer's candidates, as they come from the host and in their order."""
    per_head = summary.overfetch * geometry.select * layout_bytes(summary.layout())
    return 2 * shape.n_kv_heads * per_head if shape.full_layers else 0


def moment_bytes(shape: ModelShape, summary: Summary) -> int:
    """Device bytes that a layer needs until its summary is fitted, beside what is fitted then."""
    return QueryMoment.bytes_needed(shape.n_kv_heads, shape.head_dim) if summary.needs_queries else 0


def windows_set_aside(shape: ModelShape, geometry: Geometry) -> int:
    """Host bytes kept free for parked windows: two, so that a cache that met a full budget can make way for a fork."""
    return 2 * Windows.bytes_needed(shape, geometry)


def least_host_bytes(shape: ModelShape, geometry: Geometry, bits: int | None, summary: Summary) -> int:
    """The least that can run: two parked windows, the chunks that one block retires in one layer, first fine codes."""
    chunks = _retiring_chunks(shape, geometry) * item_bytes(shape, geometry, bits)
    return chunks + windows_set_aside(shape, geometry) + fine_bytes(shape, summary, 1)


def _retiring_chunks(shape: ModelShape, geometry: Geometry) -> int:
    return shape.n_kv_heads * (geometry.block // geometry.chunk + 1)


def check_host_budget(
    shape: ModelShape, geometry: Geometry, host_bytes: int, bits: int | None, summary: Summary
) -> None:
    """Refuse a host budget below ``least_host_bytes``."""
    retiring, window = _retiring_chunks(shape, geometry), windows_set_aside(shape, geometry)
    minimum, fine = least_host_bytes(shape, geometry, bits, summary), fine_bytes(shape, summary, 1)
    if host_bytes < minimum:
        raise BudgetError(
            f"[budget] host = {format_bytes(host_bytes)} is below the minimum working set {format_bytes(minimum)}: "
            f"two parked windows {format_bytes(window)} (forks, or the cache they came from) + {retiring} chunks that "
            f"a block of {geometry.block} tokens retires in a layer {format_bytes(minimum - window - fine)}"
            f"{f' + first fine codes {format_bytes(fine)}' if fine else ''}. Raise it to at least {minimum} bytes, "
            "or lower [attention] local or [prefill] block"
        )


# -- a whole context ---------------------------------------------------------------------------------------------------


def summaries_bytes(shape: ModelShape, geometry: Geometry, summary: Summary, chunks: int) -> int:
    """Device bytes of the summaries of one sequence of which ``chunks`` have left the window, and what is fitted."""
    if not chunks:
        return len(shape.full_layers) * moment_bytes(shape, summary)
    slabs, fitted = _slabs_bytes(summary.device_layout(), shape, chunks), summary.state_bytes()
    if summary.levels == 2:
        proposes = summary.proposes(chunks, geometry.select, SLAB_CHUNKS)
        slabs, fitted = proposes * slabs, fitted + proposes * summary.coarse_state_bytes()
    return len(shape.full_layers) * (slabs + shape.n_kv_heads * fitted)


def fine_bytes(shape: ModelShape, summary: Summary, chunks: int) -> int:
    """Host bytes of the fine codes of one sequence, with two levels."""
    return len(shape.full_layers) * _slabs_bytes(summary.layout(), shape, chunks) if summary.levels == 2 else 0


def _slabs_bytes(layout: Layout, shape: ModelShape, chunks: int) -> int:
    return -(-chunks // SLAB_CHUNKS) * slab_bytes(layout, shape.n_kv_heads)


def selection_bytes(shape: ModelShape, geometry: Geometry, summary: Summary, tokens: int) -> int:
    """Device bytes of the scratch of Triton's selection once ``tokens`` have been read: one for each number of queries.

    As ``runtime.layer_selection`` allocates it.
    """
    most: dict[int, int] = {}  # chunks, by queries that choose
    skipped = _regular_blocks(geometry, tokens) * geometry.block
    for begin, end in geometry.schedule(tokens - skipped) if shape.full_layers else ():
        chunks = geometry.selectable(skipped + begin)
        if chunks > geometry.select > 0:
            most[len(geometry.choosing(end - begin))] = chunks
    total = 0
    for queries, chunks in most.items():
        rank = summary.rank if summary.kernel_kind == "sketch" else 0
        rows, room = shape.n_heads // shape.n_kv_heads * queries, max(FEWEST_CHUNKS, 1 << (chunks - 1).bit_length())
        work = SelectWorkspace.new(shape.n_kv_heads, rows, room, geometry.select, torch.device("meta"), rank)
        total += sum(x.nbytes for x in map(work.__getattribute__, work.__slots__) if isinstance(x, torch.Tensor))
    return total


def n_blocks(geometry: Geometry, tokens: int) -> int:
    """In how many blocks so many tokens are read."""
    skipped = _regular_blocks(geometry, tokens)
    return skipped + len(geometry.schedule(tokens - skipped * geometry.block))


def _regular_blocks(geometry: Geometry, tokens: int) -> int:
    """Blocks at the beginning after which the schedule is that of the remaining tokens, the last full ones too."""
    return max(0, (tokens - 1 - geometry.tail) // geometry.block - 2)


def parked_bytes(shape: ModelShape, geometry: Geometry, tokens: int) -> int:
    """Host bytes of the parked windows of a sequence of ``tokens`` that have just been read."""
    begin = min(geometry.window_start(tokens - 1), tokens) if shape.full_layers else tokens
    return Windows(replace(shape, device=torch.device("meta")), geometry).parked_bytes(begin, tokens)


def host_slab_chunks(host_bytes: int, one: int) -> int:
    """Chunks of ``one`` bytes each in a slab of the host pool."""
    return max(1, min(SLAB_BYTES, host_bytes // FEWEST_SLABS) // one)


def spill_bytes(disk_bytes: int, one: int, chunks: int) -> dict[str, int]:
    """Disk bytes of ``chunks`` items of ``one`` bytes each in the scratch of a store of this budget, by what they are.

    The sum is what ``runtime.store`` takes from the budget: ``padding`` of records to 4096 bytes, ``free_places`` in
    the last shard, ``shard_indices`` with their folders.
    """
    layout = ShardLayout.fit(one, max(0, disk_bytes - EMPTY_STORE_BYTES))
    shards = -(-chunks // layout.n_records)
    return {
        "chunks": chunks * one,
        "padding": chunks * (layout.record_bytes - one),
        "free_places": (shards * layout.n_records - chunks) * layout.record_bytes,
        "shard_indices": shards * (layout.disk_bytes - layout.n_records * layout.record_bytes),
        "metadata": EMPTY_STORE_BYTES,
    }


def saved_bytes(layout: SequenceLayout, chunks: int, tokens: int, window_bytes: int) -> dict[str, int]:
    """Disk bytes that a saved sequence takes from the budget, by what they are.

    ``windows``: of the last commit and the one before. As ``runtime.recorder`` and ``runtime.committer`` count, which
    leave out what ``uncharged_bytes`` has.
    """
    records = chunks * layout.n_layers * layout.n_kv_heads
    return {
        "chunks": records * layout.payload_bytes,
        "padding": records * (layout.shard.record_bytes - layout.payload_bytes),
        "summaries": chunks * layout.n_layers * sum(map(layout.code_bytes, layout.codes)),
        "checksums": 4 * records + 4 * chunks,
        "tokens": 8 * tokens,
        "windows": 2 * window_bytes,
    }


def uncharged_bytes(layout: SequenceLayout, chunks: int, tokens: int, blocks: int, fitted_bytes: int) -> dict[str, int]:
    """What the files of a saved sequence take from the device beyond ``saved_bytes``, in whole blocks of 4096.

    Left out: the moments of queries that a commit writes before anything has left the window.

    Parameters
    ----------
    fitted_bytes : of what a summary fits, per layer and KV head
    """
    shards, rest = -(-chunks // SHARD_CHUNKS), chunks % SHARD_CHUNKS
    n = layout.n_layers
    in_shards = 4 * n * SHARD_CHUNKS * layout.n_kv_heads  # crc/kv
    rounding = shards * _padded(in_shards) - 4 * n * layout.n_kv_heads * chunks
    for name in layout.codes:
        one = layout.code_bytes(name)
        rounding += chunks // SHARD_CHUNKS * _padded(n * SHARD_CHUNKS * one) - chunks * n * one
        if rest:  # a hole after the codes of each layer
            ends = [(layer * SHARD_CHUNKS * one, (layer * SHARD_CHUNKS + rest) * one) for layer in range(n)]
            touched = {b for begin, end in ends for b in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))}
            rounding += len(touched) * BLOCK_BYTES
    for items, width in ((tokens, 8), (chunks, 4)):
        rounding += items // PIECE * _padded(PIECE * width) + _padded(items % PIECE * width) - items * width
    nodes = 2 + 3 + 2 * 4  # folder of sequences, its own, commit, tokens and block starts, two windows
    nodes += 5 + len(layout.codes) if n else 0
    nodes += 4 if chunks and fitted_bytes else 0
    return {
        "shard_indices": shards * _padded(layout.shard.file_bytes - layout.shard.n_records * layout.shard.record_bytes),
        "holes": rounding,
        "fitted": _padded(n * layout.n_kv_heads * fitted_bytes) if chunks else 0,
        "commits": _padded(8 * blocks) + 2 * BLOCK_BYTES,
        "metadata": nodes * 2 * BLOCK_BYTES,
    }


def _padded(nbytes: int) -> int:
    return math.ceil(nbytes / BLOCK_BYTES) * BLOCK_BYTES
