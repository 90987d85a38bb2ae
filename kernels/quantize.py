"""Small integers packed into bytes, and the records that the lower tiers keep of a chunk.

``pack`` writes the codes of ``bits`` bits in *planes*: with ``p = 8 // bits`` codes per byte and R codes, byte j holds
the codes j, j + R/p, j + 2R/p, ...; so unpacking gives contiguous runs and needs no interleaving.

A **record** is one chunk of one KV head, K and V, as codes of 4 or 8 bits and the parameters that read them:

    codes        [2, C, D] packed as one run: with 8 bits K's, then V's; with 4 bits byte (t, d) = K's + 16 x V's
    padding      zeros, to a multiple of 16 bytes
    K's pairs    [D] words of 32 bits: one pair (step, zero) per channel, over all tokens of the chunk
    V's pairs    [C, G] words: one per token and group of 32 channels, the last group may be smaller
    padding      zeros, to a multiple of 16 bytes

A word holds the bfloat16 ``step`` in its lower half and the bfloat16 ``zero`` in its upper half; a code stands for
code x step + zero, rounded to the chunk's dtype. The product is exact in float32, so that a fused multiply-add gives
the same bits: torch and Triton agree. Axes and groups: bench/quantize_error.py (keys vary by channel, values by token;
without a zero the error doubles).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from kvtier.kernels.backend import jit, tl

GROUP = 32
"""Channels of V that share a step."""


def quantize(x: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantisation with one scale per slice along ``dim``.

    Parameters
    ----------
    x : Tensor [...], float32
    bits : 2, 4 or 8
    dim : the dimension that shares a scale

    Returns
    -------
    codes : Tensor, shape of x, int8, in -(2^(bits-1) - 1) .. 2^(bits-1) - 1
    scale : Tensor, shape of x with ``dim`` of size 1, bfloat16; codes * scale approximates x to half a scale
    """
    top = (1 << (bits - 1)) - 1
    scale = (x.abs().amax(dim, keepdim=True) / top).to(torch.bfloat16)
    step = scale.float()
    codes = torch.where(step > 0, x / step, torch.zeros_like(x)).round().clamp(-top, top)
    return codes.to(torch.int8), scale


def packed_size(n_codes: int, bits: int) -> int:
    """Bytes that ``n_codes`` codes of ``bits`` bits take, rounded up to whole bytes."""
    return -(-n_codes * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes ``[..., R]`` (int8) into ``[..., packed_size(R, bits)]`` (uint8), offset by 2^(bits-1)."""
    return _pack_planes((codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), bits)


def _pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes ``[..., R]`` (uint8, below 2^bits)."""
    per_byte = 8 // bits
    planes = packed_size(codes.shape[-1], bits)
    codes = F.pad(codes, (0, planes * per_byte - codes.shape[-1]))
    packed = codes[..., :planes].clone()
    for plane in range(1, per_byte):
        packed |= codes[..., plane * planes : (plane + 1) * planes] << (plane * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, n_codes: int) -> torch.Tensor:
    """The inverse of ``pack``: ``[..., n_codes]`` float32 (whole numbers)."""
    return _unpack(packed, bits, n_codes).float().sub_(1 << (bits - 1))


def unpack_planes(packed: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """``pack``'s codes before their offset, one after the other: ``8 // bits`` uint8 Tensors of ``packed``'s shape."""
    mask = (1 << bits) - 1
    return [(packed >> shift) & mask for shift in range(0, 8, bits)]


def _unpack(packed: torch.Tensor, bits: int, n_codes: int) -> torch.Tensor:
    return torch.cat(unpack_planes(packed, bits), dim=-1)[..., :n_codes]


# -- records: torch ----------------------------------------------------------------------------------------------------


def record_words(chunk: int, head_dim: int, bits: int) -> slice:
    """The bytes of a record that hold its words."""
    begin = -(-packed_size(2 * chunk * head_dim, bits) // 16) * 16
    return slice(begin, begin + 4 * (head_dim + chunk * -(-head_dim // GROUP)))


def record_bytes(chunk: int, head_dim: int, bits: int) -> int:
    """Bytes of the record of one chunk of ``chunk`` tokens and one KV head, a multiple of 16."""
    return int(-(-record_words(chunk, head_dim, bits).stop // 16) * 16)


def quantize_chunks(chunks: torch.Tensor, bits: int) -> torch.Tensor:
    """The records of whole chunks.

    Parameters
    ----------
    chunks : Tensor [n, 2, C, D]
        NaN or infinity spoils all that shares its pair: a channel of K, a group of a token of V. None of it is finite
        when it is read.
    bits : 4 or 8

    Returns
    -------
    Tensor [n, record_bytes(C, D, bits)], uint8
    """
    n, _, chunk, dim = chunks.shape
    top = (1 << bits) - 1
    keys, values = chunks.float().unbind(1)  # [n, C, D]
    step_k, zero_k = _fit(keys.amin(1), keys.amax(1), top)  # [n, D]
    short = -dim % GROUP
    low = F.pad(values, (0, short), value=torch.inf).unflatten(2, (-1, GROUP)).amin(3)
    high = F.pad(values, (0, short), value=-torch.inf).unflatten(2, (-1, GROUP)).amax(3)
    step_v, zero_v = _fit(low, high, top)  # [n, C, G]
    codes = torch.stack([_encode(keys, step_k[:, None], zero_k[:, None], top),
                         _encode(values, _spread(step_v, dim), _spread(zero_v, dim), top)], dim=1)  # fmt: skip
    pairs = [torch.stack((step, zero), dim=-1).flatten(1) for step, zero in ((step_k, zero_k), (step_v, zero_v))]
    records = chunks.new_zeros(n, record_bytes(chunk, dim, bits), dtype=torch.uint8)
    records[:, : packed_size(2 * chunk * dim, bits)] = _pack_planes(codes.flatten(1), bits)
    records[:, record_words(chunk, dim, bits)] = torch.cat(pairs, dim=1).to(torch.bfloat16).view(torch.uint8)
    return records


def dequantize_chunks(records: torch.Tensor, bits: int, chunk: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """What records stand for.

    ``records`` [n, record_bytes(C, D, bits)] uint8 -> chunks [n, 2, C, D] of ``dtype``.
    """
    n, groups = records.shape[0], -(-head_dim // GROUP)
    n_codes = 2 * chunk * head_dim
    packed = records[:, : packed_size(n_codes, bits)]
    codes = _unpack(packed, bits, n_codes).float().view(n, 2, chunk, head_dim)
    words = records[:, record_words(chunk, head_dim, bits)].contiguous().view(torch.bfloat16).float()
    pairs_k = words[:, : 2 * head_dim].unflatten(1, (1, head_dim, 2))
    pairs_v = words[:, 2 * head_dim :].unflatten(1, (chunk, groups, 2))
    step_v, zero_v = (_spread(x, head_dim) for x in pairs_v.unbind(-1))
    keys = codes[:, 0] * pairs_k[..., 0] + pairs_k[..., 1]
    values = codes[:, 1] * step_v + zero_v
    return torch.stack((keys, values), dim=1).to(dtype)


def _fit(low: torch.Tensor, high: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and zero for values between ``low`` and ``high``: float32 that bfloat16 holds exactly."""
    zero = (low + 0.0).to(torch.bfloat16).float()  # + 0.0: there is one zero
    step = ((high - zero) * (1 / top)).clamp(min=0).to(torch.bfloat16).float()
    return step, zero


def _encode(x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    quotient = (x - zero) / step
    quotient = torch.where((step > 0) & (quotient > 0), quotient, torch.zeros_like(x))  # NaN is not above 0
    return quotient.clamp(max=top).round().to(torch.uint8)


def _spread(x: torch.Tensor, dim: int) -> torch.Tensor:
    """One value per group -> one per channel: [n, C, G] -> [n, C, dim]."""
    return x.repeat_interleave(GROUP, dim=-1)[..., :dim]


# -- records: Triton ---------------------------------------------------------------------------------------------------


@jit
def address(base, table, slots, i_n, PER_SLAB: tl.constexpr, BYTES: tl.constexpr, ALIGN: tl.constexpr):
    """Where item ``i_n`` lies: slot slots[i_n], or i_n itself, of ``base`` or of the slab that ``table`` names.

    ``BYTES`` of an item; ``ALIGN``: what the addresses of all items are multiples of.
    """
    i_slot = tl.cast(i_n, tl.int64) if slots is None else tl.load(slots + i_n).to(tl.int64)
    if table is None:
        p_item = base.to(tl.pointer_type(tl.uint8)) + i_slot * BYTES
    else:
        p_slab = tl.load(table + i_slot // PER_SLAB).to(tl.pointer_type(tl.uint8))
        p_item = p_slab + (i_slot % PER_SLAB) * BYTES
    return tl.multiple_of(p_item, ALIGN)


@jit
def round_even(x):
    """float32 below 2^22 to the nearest int32, ties to even: the sum with 1.5 x 2^23 has no bits below 1."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)


@jit
def _round_bf16(x):
    """The bits of the bfloat16 nearest to float32 ``x``, ties to even, in the upper half of an int32."""
    b_bits = x.to(tl.int32, bitcast=True)
    # a NaN with all bits set, as the hardware makes it, would be rounded to zero
    return tl.where(x == x, (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536, 0x7FC00000)


@jit
def _least(a, b):
    """The smaller one, NaN if one is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _largest(a, b):
    """The larger one, NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _fit_words(b_low, b_high, TOP: tl.constexpr):
    """As ``_fit``, and the words that hold the two: step, zero float32, words int32."""
    b_zero = _round_bf16(b_low + 0.0)
    b_step = _round_bf16(_largest((b_high - b_zero.to(tl.float32, bitcast=True)) * (1.0 / TOP), 0.0))
    b_word = b_zero | ((b_step >> 16) & 0xFFFF)
    return b_step.to(tl.float32, bitcast=True), b_zero.to(tl.float32, bitcast=True), b_word


@jit
def _encode_block(b_x, b_step, b_zero, TOP: tl.constexpr):
    """As ``_encode``, int32."""
    b_quotient = tl.where(b_step > 0, tl.div_rn(b_x - b_zero, tl.where(b_step > 0, b_step, 1.0)), 0.0)
    return round_even(tl.minimum(tl.where(b_quotient > 0, b_quotient, 0.0), TOP))  # NaN is not above 0


@jit
def decode_block(b_code, b_word):
    """Codes (int32, 0 .. 255) and the words of their pairs -> float32. No conversion of integers: it is slow."""
    b_whole = (b_code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0  # 2^23 + code, minus 2^23
    b_step = (b_word << 16).to(tl.float32, bitcast=True)
    b_zero = (b_word & -65536).to(tl.float32, bitcast=True)
    return b_whole * b_step + b_zero


@jit
def quantize_kernel(
    source,  # [slots, 2, C, D]
    source_slots,  # [n] int32, or None: 0, 1, 2, ...
    records,  # [slots, RECORD] uint8 where there is no table
    table,  # [slabs] int64: addresses of slabs of records, or None
    record_slots,  # [n] int32, or None: 0, 1, 2, ...
    count,  # [1] int32: chunks, or None: one per program
    PER_SLAB: tl.constexpr,
    RECORD: tl.constexpr,
    ALIGN: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BC: tl.constexpr,
    BG: tl.constexpr,
    GROUP: tl.constexpr,
    REWRITE: tl.constexpr,
):
    """Programs take turns at chunks; REWRITE: the chunk becomes what its record stands for."""
    TOP: tl.constexpr = (1 << BITS) - 1
    G: tl.constexpr = (D + GROUP - 1) // GROUP
    WORDS: tl.constexpr = (2 * C * D * BITS // 8 + 15) // 16 * 16
    dtype: tl.constexpr = source.dtype.element_ty
    ITEM: tl.constexpr = 2 * C * D * (dtype.primitive_bitwidth // 8)
    n = tl.num_programs(0)
    if count is not None:
        n = tl.load(count)
    o_c = tl.arange(0, BC)
    m_c = (o_c < C)[:, None]
    for i_n in tl.range(tl.program_id(0), n, tl.num_programs(0), num_stages=1):
        p_x = address(source, None, source_slots, i_n, 1, ITEM, ALIGN).to(tl.pointer_type(dtype))
        p_record = address(records, table, record_slots, i_n, PER_SLAB, RECORD, 16)
        p_words = (p_record + WORDS).to(tl.pointer_type(tl.int32))
        for begin in tl.static_range(0, G, BG):
            o_g = begin + tl.arange(0, BG)
            o_d = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BG, GROUP]
            m_d = o_d < D
            o_x = o_c[:, None, None] * D + o_d[None, :, :]  # [BC, BG, GROUP]
            m_x = m_c[:, :, None] & m_d[None, :, :]
            # [BC, BG, GROUP]
            b_k = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
            b_v = tl.load(p_x + C * D + o_x, mask=m_x, other=0.0).to(tl.float32)
            # [BG, GROUP]
            b_low = tl.reduce(tl.where(m_x, b_k, float("inf")), 0, _least)
            b_high = tl.reduce(tl.where(m_x, b_k, -float("inf")), 0, _largest)
            b_step_k, b_zero_k, b_word_k = _fit_words(b_low, b_high, TOP)
            tl.store(p_words + o_d, b_word_k, mask=m_d)
            # [BC, BG]
            b_low = tl.reduce(tl.where(m_x, b_v, float("inf")), 2, _least)
            b_high = tl.reduce(tl.where(m_x, b_v, -float("inf")), 2, _largest)
            b_step_v, b_zero_v, b_word_v = _fit_words(b_low, b_high, TOP)
            tl.store(p_words + D + o_c[:, None] * G + o_g[None, :], b_word_v, mask=m_c & (o_g < G)[None, :])
            # [BC, BG, GROUP]
            b_code_k = _encode_block(b_k, b_step_k[None, :, :], b_zero_k[None, :, :], TOP)
            b_code_v = _encode_block(b_v, b_step_v[:, :, None], b_zero_v[:, :, None], TOP)
            if BITS == 4:
                tl.store(p_record + o_x, (b_code_k | (b_code_v << 4)).to(tl.uint8), mask=m_x)
            else:
                tl.store(p_record + o_x, b_code_k.to(tl.uint8), mask=m_x)
                tl.store(p_record + C * D + o_x, b_code_v.to(tl.uint8), mask=m_x)
            if REWRITE:
                b_k = decode_block(b_code_k, b_word_k[None, :, :])
                b_v = decode_block(b_code_v, b_word_v[:, :, None])
                tl.store(p_x + o_x, b_k.to(dtype), mask=m_x)
                tl.store(p_x + C * D + o_x, b_v.to(dtype), mask=m_x)
        o_pad = tl.arange(0, 16)
        if WORDS > 2 * C * D * BITS // 8:
            tl.store(p_record + WORDS - 16 + o_pad, 0, mask=o_pad >= 2 * C * D * BITS // 8 - (WORDS - 16))
        if RECORD > WORDS + 4 * (D + C * G):
            tl.store(p_record + RECORD - 16 + o_pad, 0, mask=o_pad >= WORDS + 4 * (D + C * G) - (RECORD - 16))


@jit
def dequantize_kernel(
    records,  # [slots, RECORD] uint8 where there is no table
    table,  # [slabs] int64: addresses of slabs of records, or None
    record_slots,  # [n] int32, or None: 0, 1, 2, ...
    out,  # [slots, 2, C, D]
    out_slots,  # [n] int32, or None: 0, 1, 2, ...
    count,  # [1] int32: chunks, or None: one tile per program
    PER_SLAB: tl.constexpr,
    RECORD: tl.constexpr,
    ALIGN: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BC: tl.constexpr,
    BG: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs take turns at tiles of BC tokens, each with the loads of its next ones under way."""
    G: tl.constexpr = (D + GROUP - 1) // GROUP
    WORDS: tl.constexpr = (2 * C * D * BITS // 8 + 15) // 16 * 16
    TILES: tl.constexpr = (C + BC - 1) // BC
    dtype: tl.constexpr = out.dtype.element_ty
    ITEM: tl.constexpr = 2 * C * D * (dtype.primitive_bitwidth // 8)
    n = tl.num_programs(0)
    if count is not None:
        n = tl.load(count) * TILES
    o_g = tl.arange(0, BG)
    o_d = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BG, GROUP]
    m_d = o_d < D
    for i in tl.range(tl.program_id(0), n, tl.num_programs(0), num_stages=STAGES):
        p_record = address(records, table, record_slots, i // TILES, PER_SLAB, RECORD, 16)
        p_words = (p_record + WORDS).to(tl.pointer_type(tl.int32))
        p_out = address(out, None, out_slots, i // TILES, 1, ITEM, ALIGN).to(tl.pointer_type(dtype))
        o_c = (i % TILES) * BC + tl.arange(0, BC)
        o_x = o_c[:, None, None] * D + o_d[None, :, :]  # [BC, BG, GROUP]
        m_x = (o_c < C)[:, None, None] & m_d[None, :, :]
        o_w = o_c[:, None] * G + o_g[None, :]  # [BC, BG]
        m_w = (o_c < C)[:, None] & (o_g < G)[None, :]
        # [BG, GROUP] and [BC, BG]
        b_word_k = tl.load(p_words + o_d, mask=m_d, other=0)
        b_word_v = tl.load(p_words + D + o_w, mask=m_w, other=0)
        # [BC, BG, GROUP]
        b_byte = tl.load(p_record + o_x, mask=m_x, other=0).to(tl.int32)
        if BITS == 4:
            b_code_k, b_code_v = b_byte & 15, b_byte >> 4
        else:
            b_code_k = b_byte
            b_code_v = tl.load(p_record + C * D + o_x, mask=m_x, other=0).to(tl.int32)
        b_k = decode_block(b_code_k, b_word_k[None, :, :])
        b_v = decode_block(b_code_v, b_word_v[:, :, None])
        tl.store(p_out + o_x, b_k.to(dtype), mask=m_x)
        tl.store(p_out + C * D + o_x, b_v.to(dtype), mask=m_x)


def shape_constants(chunk: int, head_dim: int, bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants that the kernels on records share: one set per model and setting."""
    item = 2 * chunk * head_dim * dtype.itemsize
    return {
        "C": chunk,
        "D": head_dim,
        "BITS": bits,
        "GROUP": GROUP,
        "RECORD": record_bytes(chunk, head_dim, bits),
        "ALIGN": math.gcd(item, 16),
    }


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def encode_config(chunk: int, head_dim: int) -> dict[str, int]:
    """Tile of ``quantize_kernel``: all tokens, groups for 8,192 values of K and of V at most; 16 to 32 per thread."""
    tokens = next_power_of_2(chunk)
    groups = min(next_power_of_2(-(-head_dim // GROUP)), max(1, 8192 // (tokens * GROUP)))
    return {"BC": tokens, "BG": groups, "num_warps": max(1, min(8, tokens * groups * GROUP // 512))}


def decode_config(chunk: int, head_dim: int, values: int = 4096) -> dict[str, int]:
    """Tile of ``dequantize_kernel``: all groups, tokens for ``values`` values of K and of V at most; 16 per thread."""
    groups = next_power_of_2(-(-head_dim // GROUP))
    tokens = min(next_power_of_2(chunk), max(1, values // (groups * GROUP)))
    return {"BC": tokens, "BG": groups, "num_warps": max(1, min(8, tokens * groups * GROUP // 512))}


def quantize_chunks_triton(chunks: torch.Tensor, bits: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """``quantize_chunks`` in one launch, the same bits; ``chunks`` contiguous, ``out`` as it returns."""
    n, _, chunk, dim = chunks.shape
    assert chunks.is_contiguous()
    if out is None:
        out = chunks.new_empty(n, record_bytes(chunk, dim, bits), dtype=torch.uint8)
    assert out.shape == (n, record_bytes(chunk, dim, bits)) and out.is_contiguous()  # noqa: PT018
    if n:
        quantize_kernel[(n,)](
            chunks, None, out, None, None, None, PER_SLAB=1, REWRITE=False,
            **encode_config(chunk, dim), **shape_constants(chunk, dim, bits, chunks.dtype),
        )  # fmt: skip
    return out


def dequantize_chunks_triton(records: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """``dequantize_chunks`` in one launch, the same bits, into ``out`` [n, 2, C, D], contiguous."""
    n, _, chunk, dim = out.shape
    assert records.shape == (n, record_bytes(chunk, dim, bits)) and records.is_contiguous()  # noqa: PT018
    assert out.is_contiguous()
    config = decode_config(chunk, dim)
    if n:
        dequantize_kernel[(n * -(-chunk // config["BC"]),)](
            records, None, None, out, None, None, PER_SLAB=1, STAGES=1,
            **config, **shape_constants(chunk, dim, bits, out.dtype),
        )  # fmt: skip
