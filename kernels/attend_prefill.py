"""Prefill attention: a block of queries of one sequence over its attended sets.

Two launches: ``assemble`` lays the set of every KV head out in a scratch, keys turned to their slot positions (and
writes the block's own K and V to the ring, and turns its queries); then a flash kernel, or torch's own, runs over
contiguous memory. A flash kernel that turned keys itself would save 2 x 33 MB of traffic at 8 heads x 8,192 x 128,
about 25 us, and turn every key once for each of the b / 128 x group programs that read it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from kvtier.kernels.assemble import Sources, assemble_triton, gather_attended, padded
from kvtier.kernels.attend import Logits, attend
from kvtier.kernels.backend import jit, tl


@dataclass(frozen=True, slots=True)
class FlashConfig:
    """How the flash kernel is compiled."""

    queries: int
    """Per program."""
    keys: int
    """Per step of a program's loop."""
    warps: int
    stages: int


def flash_config(head_dim: int, itemsize: int) -> FlashConfig:
    """The configuration for heads of ``head_dim`` elements of ``itemsize`` bytes; at most 99 KiB of shared memory."""
    wide = head_dim > 128
    if itemsize == 4:
        return FlashConfig(32, 16, 4, 1) if wide else FlashConfig(32, 32, 8, 1)
    if head_dim <= 64:
        return FlashConfig(128, 64, 8, 3)
    return FlashConfig(64, 32, 8, 2) if wide else FlashConfig(64, 32, 4, 3)


def flash_triton(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    chunk: int,
    logits: Logits,
    window: int | None = None,
    out: torch.Tensor | None = None,
    *,
    config: FlashConfig | None = None,
) -> torch.Tensor:
    """``attend_rotated`` in one launch, the attended length read from the device.

    Parameters
    ----------
    q : Tensor [H, b, D], turned to the last b positions of the set
    keys, values : Tensor [N, S, D], of which the first n tokens count
    lengths : a row of ``Sources.lengths``, and ``chunk`` tokens per chunk: n
    logits, window : as for ``attend``
    out : Tensor [H, b, D], written; may be ``q``; None: a new one

    Returns
    -------
    Tensor [H, b, D], q's dtype
    """
    heads, block, dim = q.shape
    out = torch.empty_like(q) if out is None else out
    config = config or flash_config(dim, q.element_size())
    assert keys.stride() == values.stride()
    assert keys.stride(1) == dim
    assert all(x.stride(-1) == 1 for x in (q, keys, out))
    _flash_kernel[(-(-block // config.queries), heads)](
        q, keys, values, lengths, q if logits.sink is None else logits.sink, out,
        q.stride(0), q.stride(1), keys.stride(0), out.stride(0), out.stride(1), block, window or 0,
        logits.scaling / (logits.softcap or 1.0), (logits.softcap or 1.0) * math.log2(math.e),
        C=chunk, D=dim, BD=padded(dim), GROUP=heads // keys.shape[0], BM=config.queries, BN=config.keys,
        STAGES=config.stages, HAS_SINK=logits.sink is not None, HAS_SOFTCAP=logits.softcap is not None,
        HAS_WINDOW=window is not None, num_warps=config.warps,
    )  # fmt: skip
    return out


def flash_torch(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Torch's flash attention, causal from the bottom right without a mask in memory (16-bit types).

    ``q`` [H, b, D] and ``keys``, ``values`` [N, n, D], all turned -> [H, b, D], whose memory is laid out as [b, H, D].
    torch/nn/attention/bias.py: causal_lower_right goes to flash's own bottom-right causal mode, which knows groups.
    """
    bias = causal_lower_right(q.shape[1], keys.shape[1])
    gqa = q.shape[0] != keys.shape[0]
    out = F.scaled_dot_product_attention(
        q[None], keys[None], values[None], attn_mask=bias, scale=scaling, enable_gqa=gqa
    )
    return out[0]


def attend_prefill(
    q: torch.Tensor,
    sources: Sources,
    cos: torch.Tensor,
    sin: torch.Tensor,
    logits: Logits,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    window: int | None = None,
    out: torch.Tensor | None = None,
    row: int = 0,
) -> torch.Tensor:
    """Attention of a block over the attended sets of a row; torch, which waits for the device.

    Parameters
    ----------
    q : Tensor [H, b, D], un-rotated
    sources, cos, sin, new : as for ``assemble``
    logits, window : as for ``attend``
    out : Tensor [H, b, D], written; None: a new one

    Returns
    -------
    Tensor [H, b, D], q's dtype
    """
    keys, values = gather_attended(sources, row, new)
    n = keys.shape[1]
    attended = attend(q, keys, values, cos[:n], sin[:n], logits, window)
    return attended if out is None else out.copy_(attended)


def attend_prefill_triton(
    q: torch.Tensor,
    sources: Sources,
    cos: torch.Tensor,
    sin: torch.Tensor,
    logits: Logits,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    window: int | None = None,
    out: torch.Tensor | None = None,
    row: int = 0,
    *,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """``attend_prefill`` in two launches, without waiting for the device: it captures in a CUDA graph.

    ``scratch`` [2, N, S, D], S at least the longest attended length, is overwritten. A new ``out`` is laid out as
    [b, H, D].
    """
    if out is None:
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2], dtype=q.dtype, device=q.device).transpose(0, 1)
    assemble_triton(sources, cos, sin, scratch[0], scratch[1], new, q, out, row)
    return flash_triton(out, scratch[0], scratch[1], sources.lengths[row], sources.chunk, logits, window, out)


@jit
def _flash_kernel(
    p_q,
    p_k,
    p_v,
    p_lengths,
    p_sink,
    p_out,
    q_head,
    q_token,
    kv_head,
    out_head,
    out_token,
    block,
    window,
    scaling,
    unit,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Grid (tiles of queries, query heads). ``scaling`` and ``unit`` as for decode: logits are to base 2."""
    i_m, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(p_lengths) + tl.load(p_lengths + 1) * C
    n += tl.maximum(tl.load(p_lengths + 3) - tl.load(p_lengths + 2), 0)
    o_m, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, BD)
    m_q = (o_m < block)[:, None] & (o_d < D)[None, :]
    b_q = tl.load(p_q + i_h * q_head + o_m[:, None].to(tl.int64) * q_token + o_d[None, :], mask=m_q, other=0)
    p_k += i_h // GROUP * kv_head
    p_v += i_h // GROUP * kv_head
    position = n - block + i_m * BM  # of the first query
    i_begin = 0
    if HAS_WINDOW:
        i_begin = tl.maximum(position - window + 1, 0) // BN * BN
    i_diagonal = tl.maximum((position + 1) // BN * BN, i_begin)  # keys before it are seen by all queries of the tile

    b_m = tl.full([BM], -float("inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    b_m, b_l, b_o = _flash_steps(
        b_q, b_m, b_l, b_o, p_k, p_v, i_begin, i_diagonal, n, n - block + o_m, window, scaling, unit,
        D, BD, BN, STAGES, HAS_SOFTCAP, HAS_WINDOW, False,
    )  # fmt: skip
    b_m, b_l, b_o = _flash_steps(
        b_q, b_m, b_l, b_o, p_k, p_v, i_diagonal, tl.minimum(position + BM, n), n, n - block + o_m, window, scaling,
        unit, D, BD, BN, STAGES, HAS_SOFTCAP, HAS_WINDOW, True,
    )  # fmt: skip
    if HAS_SINK:
        b_l += tl.exp2(tl.load(p_sink + i_h).to(tl.float32) * 1.4426950408889634 - b_m)
    b_o /= tl.where(b_l > 0, b_l, 1.0)[:, None]  # queries beyond the block may see nothing
    p_rows = p_out + i_h * out_head + o_m[:, None].to(tl.int64) * out_token + o_d[None, :]
    tl.store(p_rows, b_o.to(p_out.dtype.element_ty), mask=m_q)


@jit
def _flash_steps(
    b_q,
    b_m,
    b_l,
    b_o,
    p_k,
    p_v,
    i_begin,
    i_end,
    n,
    o_position,
    window,
    scaling,
    unit,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Keys i_begin .. i_end of a program, BN at a time; i_begin is a multiple of BN."""
    o_d = tl.arange(0, BD)
    for i_j in tl.range(i_begin, i_end, BN, num_stages=STAGES):
        o_j = i_j + tl.arange(0, BN)
        o_kv = o_j[:, None].to(tl.int64) * D + o_d[None, :]
        m_kv = (o_d < D)[None, :]
        if DIAGONAL:
            m_kv &= (o_j < n)[:, None]
        b_k = tl.load(p_k + o_kv, mask=m_kv, other=0)  # [BN, BD]
        b_v = tl.load(p_v + o_kv, mask=m_kv, other=0)
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
        if HAS_SOFTCAP:
            b_x = 1 - 2 / (tl.exp(2 * scaling * b_x) + 1)  # tanh
            b_x *= unit
        else:
            b_x *= scaling * unit
        if DIAGONAL:
            b_x = tl.where(o_j[None, :] <= o_position[:, None], b_x, -float("inf"))
        if HAS_WINDOW:
            b_x = tl.where(o_j[None, :] > o_position[:, None] - window, b_x, -float("inf"))
        b_top = tl.maximum(b_m, tl.max(b_x, 1))
        b_safe = b_top
        if HAS_WINDOW:  # a tile may hold nothing that a query sees
            b_safe = tl.where(b_top == -float("inf"), 0.0, b_top)
        b_p = tl.exp2(b_x - b_safe[:, None])
        b_less = tl.exp2(b_m - b_safe)
        b_l = b_l * b_less + tl.sum(b_p, 1)
        b_m = b_top
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_less[:, None], input_precision="ieee")
    return b_m, b_l, b_o
