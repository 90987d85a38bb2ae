"""Decode attention: one query token per row, straight from ring and pool, split over the attended set.

One launch. A program takes a stretch of the attended set of one KV head, turns keys by their slot positions as it reads
them, and leaves its partial softmax in a workspace; the last program of a head to finish combines the partials, always
in the same order. Queries of a group share the keys (padded to the 16 rows of a tensor core tile).

Reading a rotary table of float32 beside keys of 16 bits would double the traffic (512 bytes of cos and sin a token for
256 bytes of K at D = 128). So for 16-bit types a program reads the table for its first tile alone and then turns cos
and sin themselves on by a tile's length; the error of a step, 1e-7, is far below that of a 16-bit key. For float32 the
table is read throughout.
"""

import math
from dataclasses import dataclass

import torch

from kvtier.kernels.assemble import Sources, gather_attended, locate, padded, slots_of
from kvtier.kernels.attend import Logits, attend
from kvtier.kernels.backend import jit, n_processors, tl

NO_WINDOW = 2**31 - 1
"""As ``window``: longer than any attended set."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is compiled and launched."""

    tile: int
    """Tokens per step of a program's loop."""
    warps: int
    stages: int
    """Tiles in flight + 1 (software pipelining)."""
    programs: int
    """Programs per multiprocessor that the set is split into."""


def decode_config(head_dim: int, itemsize: int) -> DecodeConfig:
    """The configuration for heads of ``head_dim`` elements of ``itemsize`` bytes; at most 99 KiB of shared memory."""
    wide = head_dim > 128
    if itemsize == 4:
        return DecodeConfig(16, 8, 2, 2) if wide else DecodeConfig(32, 8, 2, 2)
    if head_dim <= 64:
        return DecodeConfig(64, 4, 4, 3)
    return DecodeConfig(32, 4, 3, 2) if wide else DecodeConfig(64, 8, 3, 1)


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Partial results of a launch. One serves all layers of a stream; ``count`` is zero between launches."""

    parts: torch.Tensor
    """[B, H, splits, D] float32"""
    stats: torch.Tensor
    """[B, H, splits, 2] float32: largest logit (base 2) and sum of the weights"""
    count: torch.Tensor
    """[B * N * head blocks] int32: programs that have finished"""
    config: DecodeConfig

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        longest: int,
        dtype: torch.dtype,
        device: torch.device,
        config: DecodeConfig | None = None,
    ) -> "DecodeWorkspace":
        """For attended sets of up to ``longest`` tokens (longer ones work, with more tokens per program)."""
        config = config or decode_config(head_dim, dtype.itemsize)
        blocks = batch * kv_heads * -(-(heads // kv_heads) // _head_rows(heads // kv_heads))
        splits = config.programs * n_processors(device) // blocks
        splits = max(1, min(splits, -(-longest // config.tile)))
        parts = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=device)
        stats = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=device)
        return cls(parts, stats, torch.zeros(blocks, dtype=torch.int32, device=device), config)

    @property
    def nbytes(self) -> int:
        return self.parts.nbytes + self.stats.nbytes + self.count.nbytes


def _head_rows(group: int) -> int:
    """Query heads of one KV head that a program takes together: 16 or 32."""
    return 16 if group <= 16 else 32


def attend_decode(
    q: torch.Tensor,
    sources: Sources,
    cos: torch.Tensor,
    sin: torch.Tensor,
    logits: Logits,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the newest token of every row over its attended set; torch, which waits for the device.

    Parameters
    ----------
    q : Tensor [B, H, D], un-rotated
    sources : where the sets lie; keys are un-rotated there
    cos, sin : Tensor [positions, R], float32, of positions 0 .. longest set - 1; both halves of R alike
    logits : what becomes of q.k
    new : K and V [B, N, D] of the newest token, un-rotated: written to the ring as token ``end - 1``; None: it is there
    window : attend to the last ``window`` tokens of the set alone
    out : Tensor [B, H, D], written; None: a new one

    Returns
    -------
    Tensor [B, H, D], q's dtype
    """
    out = torch.empty_like(q) if out is None else out
    for row in range(q.shape[0]):
        fresh = None if new is None else (new[0][row, :, None], new[1][row, :, None])
        keys, values = gather_attended(sources, row, fresh)
        n = keys.shape[1]
        out[row] = attend(q[row, :, None], keys, values, cos[:n], sin[:n], logits, window)[:, 0]
    return out


def attend_decode_triton(
    q: torch.Tensor,
    sources: Sources,
    cos: torch.Tensor,
    sin: torch.Tensor,
    logits: Logits,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    window: int | None = None,
    out: torch.Tensor | None = None,
    *,
    workspace: DecodeWorkspace,
) -> torch.Tensor:
    """``attend_decode`` in one launch, without waiting for the device: it captures in a CUDA graph.

    ``q``, ``new``, ``cos``, ``sin``, ``out`` are contiguous. A row whose lengths are all 0 gives zeros.
    """
    batch, heads, dim = q.shape
    ring, chunks, slots = sources.rings[0], sources.pool, sources.slots
    kv_heads, rotary, config = ring.shape[1], cos.shape[1], workspace.config
    out = torch.empty_like(q) if out is None else out
    assert dim % 16 == rotary % 2 == 0
    assert all(x.is_contiguous() for x in (q, out, cos, sin, *(new or ())))
    assert (ring.stride(2), ring.stride(3)) == (dim, 1)
    assert chunks is None or (slots is not None and chunks.is_contiguous() and slots.stride(2) == 1)
    group, splits = heads // kv_heads, workspace.parts.shape[2]
    rows = _head_rows(group)
    key, value = new or (q, q)
    _decode_kernel[(splits, kv_heads * -(-group // rows), batch)](
        q, ring, sources.rows, ring if chunks is None else chunks, sources.lengths if slots is None else slots,
        sources.lengths, key, value, cos, sin, q if logits.sink is None else logits.sink,
        workspace.parts, workspace.stats, workspace.count, out,
        ring.stride(0), ring.stride(1), *((0, 0) if slots is None else slots.stride()[:2]),
        ring.shape[2] - sources.sink, window or NO_WINDOW, cos.shape[0],
        logits.scaling / (logits.softcap or 1.0), (logits.softcap or 1.0) * math.log2(math.e),
        SINK=sources.sink, C=sources.chunk, D=dim, R=rotary, HALF=padded(dim // 2), N=kv_heads, GROUP=group, BG=rows,
        GP=min(rows, padded(group)), BT=config.tile, SPLITS=splits, SP=padded(splits), STAGES=config.stages,
        HAS_CHUNKS=chunks is not None, HAS_NEW=new is not None, HAS_SINK=logits.sink is not None,
        HAS_SOFTCAP=logits.softcap is not None, STEPPED=q.dtype != torch.float32, num_warps=config.warps,
    )  # fmt: skip
    return out


@jit
def _decode_kernel(
    p_q,
    p_ring,
    p_rows,
    p_pool,
    p_slots,
    p_lengths,
    p_new_k,
    p_new_v,
    p_cos,
    p_sin,
    p_sink,
    p_parts,
    p_stats,
    p_count,
    p_out,
    ring_kv,
    ring_head,
    slots_row,
    slots_head,
    capacity,
    window,
    positions,
    scaling,
    unit,
    SINK: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
    GP: tl.constexpr,
    BT: tl.constexpr,
    SPLITS: tl.constexpr,
    SP: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_CHUNKS: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STEPPED: tl.constexpr,
):
    """Grid (splits, N x head blocks, B). Dimensions are held in two halves, so that rotary pairs meet.

    ``scaling`` is divided by the softcap; ``unit`` is the softcap (or 1) x log2(e): logits are to base 2.
    """
    i_s, i_p, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    HEAD_BLOCKS: tl.constexpr = (GROUP + BG - 1) // BG
    i_n, i_g = i_p // HEAD_BLOCKS, i_p % HEAD_BLOCKS * BG
    i_h = (i_b * N + i_n) * GROUP + i_g  # first query head

    n_sinks = tl.load(p_lengths + i_b * 4)
    n_chosen = tl.load(p_lengths + i_b * 4 + 1)
    begin = tl.load(p_lengths + i_b * 4 + 2)
    end = tl.load(p_lengths + i_b * 4 + 3)
    n = n_sinks + n_chosen * C + tl.maximum(end - begin, 0)
    first = tl.maximum(n - window, 0)
    n_tiles = tl.maximum(tl.cdiv(n - first, BT), 1)
    n_active = tl.minimum(n_tiles, SPLITS)
    if i_s >= n_active:
        return
    i_begin, i_end = i_s * n_tiles // n_active, (i_s + 1) * n_tiles // n_active

    o_g, o_t, o_h = tl.arange(0, BG), tl.arange(0, BT), tl.arange(0, HALF)
    m_h, m_r = o_h < D // 2, o_h < R // 2
    if R == D:
        o_1, o_2 = o_h, o_h + D // 2
    else:  # pairs i, i + R/2 first, then the halves of what is not turned
        o_1 = tl.where(m_r, o_h, o_h + R // 2)
        o_2 = tl.where(m_r, o_h + R // 2, o_h + D // 2)
    dtype = p_out.dtype.element_ty
    p_ring += tl.multiple_of(tl.load(p_rows + i_b), 16) + i_n.to(tl.int64) * ring_head
    p_slots += i_b * slots_row + i_n.to(tl.int64) * slots_head
    p_new_k += (i_b * N + i_n) * D
    p_new_v += (i_b * N + i_n) * D
    ring_begin = (begin - SINK) % capacity
    base = first + i_begin * BT
    b_slot = tl.zeros([BT], tl.int32)
    if HAS_CHUNKS:
        b_slot = slots_of(base + o_t, n_sinks, n_chosen, p_slots, C)

    # the query at its position
    m_g = i_g + o_g < GROUP
    p_heads = p_q + (i_h + o_g)[:, None] * D
    b_q1 = tl.load(p_heads + o_1[None, :], mask=m_g[:, None] & m_h[None, :], other=0).to(tl.float32)
    b_q2 = tl.load(p_heads + o_2[None, :], mask=m_g[:, None] & m_h[None, :], other=0).to(tl.float32)
    last = tl.maximum(n - 1, 0)
    b_cos = tl.load(p_cos + last * R + o_h, mask=m_r, other=1)[None, :]
    b_sin = tl.load(p_sin + last * R + o_h, mask=m_r, other=0)[None, :]
    b_x1 = (b_q1 * b_cos - b_q2 * b_sin).to(dtype)  # [BG, HALF]
    b_x2 = (b_q2 * b_cos + b_q1 * b_sin).to(dtype)

    if STEPPED:
        o_turn = (base + o_t)[:, None] * R + o_h[None, :]
        m_turn = (base + o_t < n)[:, None] & m_r[None, :]
        b_c = tl.load(p_cos + o_turn, mask=m_turn, other=1)  # [BT, HALF]
        b_s = tl.load(p_sin + o_turn, mask=m_turn, other=0)
        m_step = m_r & (positions > BT)
        unscaled = 1.0 / tl.load(p_cos + o_h, mask=m_step, other=1)  # cos 0 = attention_scaling
        b_step_c = (tl.load(p_cos + BT * R + o_h, mask=m_step, other=1) * unscaled)[None, :]
        b_step_s = (tl.load(p_sin + BT * R + o_h, mask=m_step, other=0) * unscaled)[None, :]

    b_m = tl.full([BG], -float("inf"), tl.float32)
    b_l = tl.zeros([BG], tl.float32)
    b_o1 = tl.zeros([BG, HALF], tl.float32)
    b_o2 = tl.zeros([BG, HALF], tl.float32)
    for i_t in tl.range(i_begin, i_end, num_stages=STAGES):
        o_j = first + i_t * BT + o_t
        m_j = o_j < n
        p_k, p_v, _ = locate(o_j, b_slot, n_sinks, n_chosen, ring_begin, p_ring, p_pool, ring_kv, capacity, SINK, C, D)
        if HAS_NEW:
            p_k = tl.where(o_j == n - 1, p_new_k, p_k)
            p_v = tl.where(o_j == n - 1, p_new_v, p_v)
        if HAS_CHUNKS:  # a tile ahead: the pipeline of K and V must not wait for it
            b_slot = slots_of(o_j + BT, n_sinks, n_chosen, p_slots, C)
        m_kv = m_j[:, None] & m_h[None, :]
        b_k1 = tl.load(p_k[:, None] + o_1[None, :], mask=m_kv, other=0).to(tl.float32)  # [BT, HALF]
        b_k2 = tl.load(p_k[:, None] + o_2[None, :], mask=m_kv, other=0).to(tl.float32)
        b_v1 = tl.load(p_v[:, None] + o_h[None, :], mask=m_kv, other=0)
        b_v2 = tl.load(p_v[:, None] + (o_h + D // 2)[None, :], mask=m_kv, other=0)
        if not STEPPED:
            o_turn = o_j[:, None] * R + o_h[None, :]
            b_c = tl.load(p_cos + o_turn, mask=m_j[:, None] & m_r[None, :], other=1)
            b_s = tl.load(p_sin + o_turn, mask=m_j[:, None] & m_r[None, :], other=0)
        b_r1 = (b_k1 * b_c - b_k2 * b_s).to(dtype)
        b_r2 = (b_k2 * b_c + b_k1 * b_s).to(dtype)
        if STEPPED:
            b_turned = b_c * b_step_c - b_s * b_step_s
            b_s = b_s * b_step_c + b_c * b_step_s
            b_c = b_turned
        b_x = tl.dot(b_x1, tl.trans(b_r1), input_precision="ieee")  # [BG, BT]
        b_x = tl.dot(b_x2, tl.trans(b_r2), b_x, input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            b_x = 1 - 2 / (tl.exp(2 * b_x) + 1)  # tanh
        b_x = tl.where(m_j[None, :], b_x * unit, -float("inf"))
        b_top = tl.maximum(b_m, tl.max(b_x, 1))
        b_safe = tl.where(b_top == -float("inf"), 0.0, b_top)
        b_p = tl.exp2(b_x - b_safe[:, None])
        b_less = tl.exp2(b_m - b_safe)
        b_m = b_top
        b_l = b_l * b_less + tl.sum(b_p, 1)
        b_o1 = tl.dot(b_p.to(dtype), b_v1, b_o1 * b_less[:, None], input_precision="ieee")  # [BG, HALF]
        b_o2 = tl.dot(b_p.to(dtype), b_v2, b_o2 * b_less[:, None], input_precision="ieee")

    if HAS_NEW and i_s == n_active - 1:  # other programs read it from where it came
        place = tl.where(end > SINK, SINK + tl.maximum(end - 1 - SINK, 0) % capacity, end - 1)
        p_place = p_ring + place.to(tl.int64) * D + o_h
        for i_half in tl.static_range(0, D, D // 2):
            tl.store(p_place + i_half, tl.load(p_new_k + i_half + o_h, mask=m_h), mask=m_h & (n > 0))
            tl.store(p_place + ring_kv + i_half, tl.load(p_new_v + i_half + o_h, mask=m_h), mask=m_h & (n > 0))

    o_part = (i_h + o_g) * SPLITS + i_s
    p_rows_out = p_parts + o_part[:, None] * D + o_h[None, :]
    tl.store(p_stats + o_part * 2, b_m, mask=m_g)
    tl.store(p_stats + o_part * 2 + 1, b_l, mask=m_g)
    tl.store(p_rows_out, b_o1, mask=m_g[:, None] & m_h[None, :])
    tl.store(p_rows_out + D // 2, b_o2, mask=m_g[:, None] & m_h[None, :])
    tl.debug_barrier()  # all of this program's stores come before its count
    p_count += i_b * N * HEAD_BLOCKS + i_p
    if tl.atomic_add(p_count, 1, sem="acq_rel") == n_active - 1:
        tl.store(p_count, 0)
        _combine(p_parts, p_stats, p_sink, p_out, i_h, i_n * GROUP + i_g, i_g, n_active, D, HALF, GROUP, GP, SPLITS, SP,
                 HAS_SINK)  # fmt: skip


@jit
def _combine(
    p_parts,
    p_stats,
    p_sink,
    p_out,
    i_h,
    i_sink,
    i_g,
    n_active,
    D: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    GP: tl.constexpr,
    SPLITS: tl.constexpr,
    SP: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """Write GP query heads from ``n_active`` partial softmaxes each."""
    BS: tl.constexpr = min(SP, max(1, 8192 // (GP * 2 * HALF)))
    LOG2E: tl.constexpr = 1.4426950408889634
    o_g, o_s, o_d = tl.arange(0, GP), tl.arange(0, SP), tl.arange(0, 2 * HALF)
    m_g = i_g + o_g < GROUP
    m_s = m_g[:, None] & (o_s < n_active)[None, :]
    p_stat = p_stats + ((i_h + o_g)[:, None] * SPLITS + o_s[None, :]) * 2
    b_m = tl.load(p_stat, mask=m_s, other=-float("inf"), cache_modifier=".cg")  # [GP, SP]
    b_l = tl.load(p_stat + 1, mask=m_s, other=0, cache_modifier=".cg")
    b_top = tl.max(b_m, 1)
    if HAS_SINK:
        b_sink = tl.load(p_sink + i_sink + o_g, mask=m_g, other=0).to(tl.float32) * LOG2E
        b_top = tl.maximum(b_top, b_sink)
    b_safe = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_sum = tl.sum(tl.exp2(b_m - b_safe[:, None]) * b_l, 1)
    if HAS_SINK:
        b_sum += tl.exp2(b_sink - b_safe)
    b_out = tl.zeros([GP, 2 * HALF], tl.float32)
    for i_s in range(0, n_active, BS):
        o_i = i_s + tl.arange(0, BS)
        m_i = m_g[:, None] & (o_i < n_active)[None, :]
        o_part = (i_h + o_g)[:, None] * SPLITS + o_i[None, :]
        b_w = tl.exp2(
            tl.load(p_stats + o_part * 2, mask=m_i, other=-float("inf"), cache_modifier=".cg") - b_safe[:, None]
        )
        m_part = m_i[:, :, None] & (o_d < D)[None, None, :]
        b_part = tl.load(p_parts + o_part[:, :, None] * D + o_d, mask=m_part, other=0, cache_modifier=".cg")
        b_out += tl.sum(b_part * b_w[:, :, None], 1)  # [GP, BS, 2 * HALF]
    b_out /= tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    p_rows = p_out + (i_h + o_g)[:, None] * D + o_d[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_g[:, None] & (o_d < D)[None, :])
