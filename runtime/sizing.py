"""How the device budget is divided, before anything is allocated."""

from dataclasses import dataclass

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.geometry import ALL_QUERIES_CHOOSE, Geometry
from kvtier.runtime.model import ModelShape
from kvtier.runtime.sequence import QueryMoment
from kvtier.runtime.slabs import SLAB_CHUNKS, slab_bytes
from kvtier.runtime.summary import Summary
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


def chunk_bytes(shape: ModelShape, geometry: Geometry) -> int:
    """Bytes of K and V of one chunk of one KV head."""
    return 2 * geometry.chunk * shape.head_dim * shape.dtype.itemsize


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
    one = chunk_bytes(shape, geometry)
    n_full = len(shape.full_layers)
    per_layer = slab_bytes(summary.layout(), shape.n_kv_heads) + shape.n_kv_heads * summary.state_bytes()
    if summary.needs_queries:
        per_layer += QueryMoment.bytes_needed(shape.n_kv_heads, shape.head_dim)
    layer_chunks = max(1, geometry.select) * shape.n_kv_heads if n_full else 0
    sizes = DeviceSizes(
        ring=Windows.bytes_needed(shape, geometry),
        scratch=scratch_bytes(shape, geometry),
        rotary=rotary_bytes,
        summaries=n_full * per_layer,
        pool_slots=layer_chunks,
        chunk_bytes=one,
    )
    minimum = sizes.fixed + sizes.summaries + layer_chunks * one
    if gpu_bytes < minimum:
        raise BudgetError(
            f"[budget] gpu = {format_bytes(gpu_bytes)} is below the minimum working set {format_bytes(minimum)}: "
            f"window ring {format_bytes(sizes.ring)} + attention scratch {format_bytes(sizes.scratch)} + rotary tables "
            f"{format_bytes(sizes.rotary)} + first summaries {format_bytes(sizes.summaries)} + one layer's "
            f"{layer_chunks} chunks {format_bytes(layer_chunks * one)}. Raise it to at least {minimum} bytes, or lower "
            "[attention] local, select or [prefill] block"
        )
    spare = (gpu_bytes - sizes.fixed - sizes.summaries) // 2 // one
    wanted = POOL_STEPS * layer_chunks * n_full
    slots = max(layer_chunks, min(wanted, spare))
    return DeviceSizes(sizes.ring, sizes.scratch, sizes.rotary, sizes.summaries, slots, one)


def windows_set_aside(shape: ModelShape, geometry: Geometry) -> int:
    """Host bytes kept free for parked windows: two, so that a cache that met a full budget can make way for a fork."""
    return 2 * Windows.bytes_needed(shape, geometry)


def check_host_budget(shape: ModelShape, geometry: Geometry, host_bytes: int) -> None:
    """Refuse a host budget that cannot hold two parked windows and the chunks that one block retires in one layer."""
    one = chunk_bytes(shape, geometry)
    retiring = shape.n_kv_heads * (geometry.block // geometry.chunk + 1)
    window = windows_set_aside(shape, geometry)
    minimum = retiring * one + window
    if host_bytes < minimum:
        raise BudgetError(
            f"[budget] host = {format_bytes(host_bytes)} is below the minimum working set {format_bytes(minimum)}: "
            f"two parked windows {format_bytes(window)} (forks, or the cache they came from) + {retiring} chunks that "
            f"a block of {geometry.block} tokens retires in a layer {format_bytes(retiring * one)}. Raise it to at "
            f"least {minimum} bytes, or lower [attention] local or [prefill] block"
        )
