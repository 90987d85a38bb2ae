"""The attended sets of one layer: where their parts lie, and how to lay them out for attention.

The set of a KV head is [sinks | chosen chunks, in order | window]: sinks and window are in a ring, chunks in slots of
the device pool. Its tokens have the positions 0..n-1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtier.kernels.attend import rotate
from kvtier.kernels.backend import jit, tl


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the attended sets of one layer lie, for a batch of B rows.

    All lengths are on the device, so that one launch (and one CUDA graph) serves every length.
    """

    rings: Sequence[torch.Tensor]
    """Per row [2, N, sink + capacity, D]: sinks, then token t in place sink + (t - sink) % capacity. One shape, one
    set of strides; rows of D elements without gaps."""
    rows: torch.Tensor
    """[B] int64: elements from the first ring's memory to each row's (``ring_offsets``). Kernels go by this alone: it
    may be rewritten under a captured graph, as long as every ring has the shape of the first."""
    sink: int
    """Places for sinks in a ring."""
    lengths: torch.Tensor
    """[B, 4] int32: sinks held, chunks chosen, first token of the window (``sink`` or more), tokens of the sequence.
    New tokens count."""
    pool: torch.Tensor | None = None
    """[slots, 2, C, D], contiguous: chunks in device memory; None where no chunks are attended."""
    slots: torch.Tensor | None = None
    """[B, N, M] int32: the slot of each chosen chunk, in order; what follows the chosen ones (-1) is not read."""

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""
        return 1 if self.pool is None else self.pool.shape[2]

    def attended(self, row: int) -> tuple[int, int, int, int, int]:
        """The four lengths of a row and their sum, the attended length, on the host: this waits for the device."""
        sinks, chosen, begin, end = self.lengths[row].tolist()
        return sinks, chosen, begin, end, sinks + chosen * self.chunk + max(0, end - begin)


def ring_offsets(rings: Sequence[torch.Tensor]) -> torch.Tensor:
    """``Sources.rows`` of ``rings``: [B] int64, elements from the first ring's memory to each one's, on its device."""
    first = rings[0]
    for ring in rings:
        assert (ring.shape, ring.stride(), ring.dtype) == (first.shape, first.stride(), first.dtype)
    bytes_between = [ring.data_ptr() - first.data_ptr() for ring in rings]
    assert not any(n % (16 * first.element_size()) for n in bytes_between), "rings start at multiples of 16 elements"
    return torch.tensor([n // first.element_size() for n in bytes_between], dtype=torch.int64, device=first.device)


def gather_attended(
    sources: Sources, row: int, new: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a row's attended set, un-rotated: [N, n, D] each, new tensors. Waits for the device.

    ``new``: K and V [N, b, D] of the last b tokens of the set; they are written to the ring first.
    """
    sinks, chosen, begin, end, _ = sources.attended(row)
    ring, sink = sources.rings[row], sources.sink
    capacity = ring.shape[2] - sink
    if new is not None:
        tokens = torch.arange(end - new[0].shape[1], end, device=ring.device)
        ring[:, :, torch.where(tokens < sink, tokens, sink + (tokens - sink) % capacity)] = torch.stack(new)
    window = sink + (torch.arange(begin, max(begin, end), device=ring.device) - sink) % capacity
    parts = [ring[:, :, :sinks], ring[:, :, window]]
    if sources.pool is not None and sources.slots is not None and chosen:
        chunks = sources.pool[sources.slots[row, :, :chosen].long()]  # [N, chosen, 2, C, D]
        parts.insert(1, chunks.permute(2, 0, 1, 3, 4).flatten(2, 3))
    keys, values = torch.cat(parts, dim=2)
    return keys, values


ASSEMBLE_TILE = 32
"""Tokens per program of the assembling kernel."""
ASSEMBLE_HEADS = 1
"""KV heads per program, which share what it reads of the rotary tables."""


def assemble(
    sources: Sources,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    q: torch.Tensor | None = None,
    turned_q: torch.Tensor | None = None,
    row: int = 0,
) -> None:
    """Lay out the attended sets of a row, keys turned to the positions 0..n-1; torch, which waits for the device.

    Parameters
    ----------
    sources : where the sets lie
    cos, sin : Tensor [positions, R], float32; both halves of R alike
    keys, values : Tensor [N, S, D], S at least the attended length n; the first n tokens are written
    new : K and V [N, b, D] of the last b tokens of the set, un-rotated, which go to the ring too; None: they are there
    q, turned_q : Tensor [H, b, D]: queries of the last b tokens of the set, and where they go, turned
    row : of ``sources``
    """
    k, v = gather_attended(sources, row, new)
    n = k.shape[1]
    keys[:, :n] = rotate(k, cos[:n], sin[:n])
    values[:, :n] = v
    if q is not None and turned_q is not None:
        turned_q.copy_(rotate(q, cos[n - q.shape[1] : n], sin[n - q.shape[1] : n]))


def assemble_triton(
    sources: Sources,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    q: torch.Tensor | None = None,
    turned_q: torch.Tensor | None = None,
    row: int = 0,
    *,
    tile: int = ASSEMBLE_TILE,
    heads: int = ASSEMBLE_HEADS,
    warps: int = 4,
) -> None:
    """``assemble`` in one launch, without waiting for the device. The last dimension of every tensor has no gaps."""
    ring, chunks, slots = sources.rings[0], sources.pool, sources.slots
    kv_heads, dim, rotary = ring.shape[1], ring.shape[3], cos.shape[1]
    heads = math.gcd(heads, kv_heads)
    key, value = new or (keys, values)
    query, turned = (keys, keys) if q is None or turned_q is None else (q, turned_q)
    block = query.shape[1] if q is not None else key.shape[1]
    assert dim % 16 == rotary % 2 == 0
    assert (keys.stride(), key.stride()) == (values.stride(), value.stride())
    assert all(x.stride(-1) == 1 for x in (keys, key, query, turned))
    assert keys.stride(1) == ring.stride(2) == dim
    assert all(x.is_contiguous() for x in (cos, sin))
    assert q is None or new is None or q.shape[1] == new[0].shape[1]
    kv_tiles = -(-keys.shape[1] // tile)
    q_tiles = 0 if q is None else -(-block // tile)
    _assemble_kernel[(kv_tiles + q_tiles, kv_heads // heads)](
        query, turned, ring, sources.rows[row:], ring if chunks is None else chunks,
        sources.lengths if slots is None else slots[row], sources.lengths[row], key, value, cos, sin, keys, values,
        query.stride(0), query.stride(1), turned.stride(0), turned.stride(1), ring.stride(0), ring.stride(1),
        0 if slots is None else slots.stride(1), key.stride(0), key.stride(1), keys.stride(0),
        ring.shape[2] - sources.sink, block, kv_tiles,
        SINK=sources.sink, C=sources.chunk, D=dim, R=rotary, HALF=padded(dim // 2), HEADS=heads,
        GROUP=query.shape[0] // kv_heads, BT=tile, HAS_CHUNKS=chunks is not None, HAS_NEW=new is not None,
        num_warps=warps if dim <= 128 else 2 * warps,
    )  # fmt: skip


def padded(n: int) -> int:
    """The smallest power of two that is at least n, and 16: the least that tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())


@jit
def _assemble_kernel(
    p_q,
    p_turned,
    p_ring,
    p_row,
    p_pool,
    p_slots,
    p_lengths,
    p_new_k,
    p_new_v,
    p_cos,
    p_sin,
    p_keys,
    p_values,
    q_head,
    q_token,
    turned_head,
    turned_token,
    ring_kv,
    ring_head,
    slots_head,
    new_head,
    new_token,
    keys_head,
    capacity,
    block,
    kv_tiles,
    SINK: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    HAS_CHUNKS: tl.constexpr,
    HAS_NEW: tl.constexpr,
):
    """Grid (tiles of the scratch, then tiles of the queries; blocks of KV heads)."""
    i_t, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64) * HEADS
    n_sinks = tl.load(p_lengths)
    n_chosen = tl.load(p_lengths + 1)
    begin = tl.load(p_lengths + 2)
    end = tl.load(p_lengths + 3)
    n = n_sinks + n_chosen * C + tl.maximum(end - begin, 0)
    o_t, o_h = tl.arange(0, BT), tl.arange(0, HALF)
    m_h, m_r = (o_h < D // 2)[None, :], o_h < R // 2
    if R == D:
        o_1, o_2 = o_h, o_h + D // 2
    else:  # pairs i, i + R/2 first, then the halves of what is not turned
        o_1 = tl.where(m_r, o_h, o_h + R // 2)
        o_2 = tl.where(m_r, o_h + R // 2, o_h + D // 2)
    o_1, o_2, o_h = o_1[None, :], o_2[None, :], o_h[None, :]
    dtype = p_keys.dtype.element_ty

    is_q = i_t >= kv_tiles
    o_i = (i_t - kv_tiles) * BT + o_t  # of the block
    o_j = tl.where(is_q, n - block + o_i, i_t * BT + o_t)  # of the set
    m_j = (o_j < n) & (o_j >= 0)
    if not is_q and i_t * BT >= n:
        return
    m_turn = m_j[:, None] & m_r[None, :]
    b_c = tl.load(p_cos + o_j[:, None] * R + o_h, mask=m_turn, other=1)  # [BT, HALF]
    b_s = tl.load(p_sin + o_j[:, None] * R + o_h, mask=m_turn, other=0)
    m_jh = m_j[:, None] & m_h

    if is_q:
        for i_h in range(i_n * GROUP, (i_n + HEADS) * GROUP):
            p_i = p_q + i_h * q_head + o_i[:, None].to(tl.int64) * q_token
            b_q1 = tl.load(p_i + o_1, mask=m_jh, other=0).to(tl.float32)  # [BT, HALF]
            b_q2 = tl.load(p_i + o_2, mask=m_jh, other=0).to(tl.float32)
            p_i = p_turned + i_h * turned_head + o_i[:, None].to(tl.int64) * turned_token
            tl.store(p_i + o_1, (b_q1 * b_c - b_q2 * b_s).to(dtype), mask=m_jh)
            tl.store(p_i + o_2, (b_q2 * b_c + b_q1 * b_s).to(dtype), mask=m_jh)
        return

    p_ring += tl.multiple_of(tl.load(p_row), 16)
    ring_begin = (begin - SINK) % capacity
    for i_h in tl.static_range(HEADS):
        p_ring_h = p_ring + (i_n + i_h) * ring_head
        b_slot = tl.zeros([BT], tl.int32)
        if HAS_CHUNKS:
            b_slot = slots_of(o_j, n_sinks, n_chosen, p_slots + (i_n + i_h) * slots_head, C)
        p_k, p_v, o_place = locate(
            o_j, b_slot, n_sinks, n_chosen, ring_begin, p_ring_h, p_pool, ring_kv, capacity, SINK, C, D
        )
        if HAS_NEW:
            m_new = o_j >= n - block
            o_new = (i_n + i_h) * new_head + (o_j - (n - block)).to(tl.int64) * new_token
            p_k = tl.where(m_new, p_new_k + o_new, p_k)
            p_v = tl.where(m_new, p_new_v + o_new, p_v)
        b_k1 = tl.load(p_k[:, None] + o_1, mask=m_jh, other=0)  # [BT, HALF]
        b_k2 = tl.load(p_k[:, None] + o_2, mask=m_jh, other=0)
        b_v1 = tl.load(p_v[:, None] + o_h, mask=m_jh, other=0)
        b_v2 = tl.load(p_v[:, None] + o_h + D // 2, mask=m_jh, other=0)
        if HAS_NEW:
            p_place = p_ring_h + o_place[:, None].to(tl.int64) * D
            m_store = m_jh & m_new[:, None]
            tl.store(p_place + o_1, b_k1, mask=m_store)
            tl.store(p_place + o_2, b_k2, mask=m_store)
            tl.store(p_place + ring_kv + o_h, b_v1, mask=m_store)
            tl.store(p_place + ring_kv + o_h + D // 2, b_v2, mask=m_store)
        o_out = (i_n + i_h) * keys_head + o_j[:, None].to(tl.int64) * D
        b_k1, b_k2 = b_k1.to(tl.float32), b_k2.to(tl.float32)
        tl.store(p_keys + o_out + o_1, (b_k1 * b_c - b_k2 * b_s).to(dtype), mask=m_jh)
        tl.store(p_keys + o_out + o_2, (b_k2 * b_c + b_k1 * b_s).to(dtype), mask=m_jh)
        tl.store(p_values + o_out + o_h, b_v1, mask=m_jh)
        tl.store(p_values + o_out + o_h + D // 2, b_v2, mask=m_jh)


@jit
def slots_of(o_j, n_sinks, n_chosen, p_slots, C: tl.constexpr):
    """Slot of the chunk that each token ``o_j`` of a head's attended set is in; 0 for those in none."""
    m_chunk = (o_j >= n_sinks) & (o_j < n_sinks + n_chosen * C)
    return tl.load(p_slots + (o_j - n_sinks) // C, mask=m_chunk, other=0)


@jit
def locate(
    o_j,
    b_slot,
    n_sinks,
    n_chosen,
    ring_begin,
    p_ring,
    p_pool,
    ring_kv,
    capacity,
    SINK: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """Where K and V of tokens ``o_j`` of an attended set lie, and which of them are in the ring at which place.

    ``b_slot`` as ``slots_of`` gives it; ``ring_begin``: (first token of the window - SINK) % capacity; ``p_ring``: of
    the head. Returns pointers to K, pointers to V and places in the ring (of no meaning for tokens in chunks).
    """
    o_window = o_j - (n_sinks + n_chosen * C)
    m_chunk = (o_j >= n_sinks) & (o_window < 0)
    o_place = ring_begin + o_window
    o_place = SINK + tl.where(o_place >= capacity, o_place - capacity, o_place)
    o_place = tl.where(o_j < n_sinks, o_j, o_place)
    o_pool = b_slot.to(tl.int64) * (2 * C * D) + ((o_j - n_sinks) % C) * D
    p_k = tl.where(m_chunk, p_pool + o_pool, p_ring + o_place.to(tl.int64) * D)
    return p_k, p_k + tl.where(m_chunk, C * D, ring_kv), o_place
