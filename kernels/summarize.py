"""What a chunk leaves on the device: a sketch, or one or two vectors (mean, box, cuboid).

A sketch is a few low-precision numbers per key, in a basis fitted to the layer (``kernels.basis``). Why it is the
default and not one or two vectors per chunk: docs/summaries.md.

The twins in Triton read the keys where they lie, in the window's ring or in a tensor of their own, and write into the
slabs that a table on the device names: one launch for all rows, even of all layers. Minima, maxima and centres have
the twins' bits. Sums are added in another order, so a mean, a deviation or a scale can round the other way and a code
differ by one where a coordinate lies halfway: fewer than one in 10,000 (directions without variance aside: their codes
are rounding errors, of the size of rounding errors).
"""

from dataclasses import dataclass

import torch

from kvtier.kernels.backend import jit, tl
from kvtier.kernels.quantize import next_power_of_2, pack, packed_size, quantize, round_even


def encode_sketch(
    keys: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the keys of m chunks: coordinates of k - mean, one scale per chunk and direction.

    Parameters
    ----------
    keys : Tensor [N, m, C, D]
    mean, basis : ``mean`` and ``to`` of ``kernels.basis.fit_basis``
    bits : 2, 4 or 8

    Returns
    -------
    codes : Tensor [N, m, C, packed_size(rank, bits)], uint8
    scale : Tensor [N, m, rank], bfloat16
    """
    coordinates = (keys.float() - mean[:, None, None]) @ basis[:, None]  # [N, m, C, rank]
    codes, scale = quantize(coordinates, bits, dim=2)
    return pack(codes, bits), scale.squeeze(2)


def encode_mean(keys: torch.Tensor) -> torch.Tensor:
    """Mean of the keys of each chunk, computed in float32.

    ``keys`` [N, m, C, D] -> [N, m, D] in the keys' dtype.
    """
    return keys.mean(dim=2, dtype=torch.float32).to(keys.dtype)


def encode_minmax(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each dimension over the keys of each chunk; nothing is rounded.

    ``keys`` [N, m, C, D] -> low, high: [N, m, D] each, in the keys' dtype.
    """
    return keys.amin(dim=2), keys.amax(dim=2)


def encode_cuboid(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre of the box around each chunk's keys, and the mean distance of the keys from it in each dimension.

    Computed in float32; the distances are from the centre as it is stored.

    Parameters
    ----------
    keys : Tensor [N, m, C, D]

    Returns
    -------
    centre, deviation : Tensor [N, m, D] each, in the keys' dtype
    """
    low, high = encode_minmax(keys)
    centre = ((low.float() + high.float()) / 2).to(keys.dtype)
    deviation = (keys.float() - centre.float()[:, :, None]).abs().mean(dim=2)
    return centre, deviation.to(keys.dtype)


# -- Triton ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of ``m`` chunks of each of R rows (a layer or sequence, and its KV heads), un-rotated."""

    data: torch.Tensor
    """[R, sink + capacity, D], inner dimensions dense: middle token p of a row at place sink + p % capacity. Or, with
    ``sink`` None, [R, m*C, D]: the m chunks alone."""
    sink: int | None
    chunk: int
    m: int
    """Chunks of each row at most."""
    first: torch.Tensor
    """[1] or [R] int32: number of the first of them, for all rows or for each. It says where summaries go, too."""
    count: torch.Tensor
    """Same shape, int32: how many there are, 0 to m."""


@dataclass(frozen=True, slots=True)
class Slabs:
    """Where summaries go: chunk i of row r to [r % heads, i % per_slab] of slab i // per_slab of group r // heads."""

    tables: tuple[torch.Tensor, ...]
    """For each tensor of the kind, [groups, slabs] int64: addresses of slabs [heads, per_slab, ...]."""
    heads: int
    per_slab: int


@jit
def _target(table, i_r, o_chunk, n_slabs, HEADS: tl.constexpr, PER_SLAB: tl.constexpr):
    """Address of the slab for chunk ``o_chunk`` of row ``i_r``, and the chunk's place in it."""
    p_slab = table + (i_r // HEADS).to(tl.int64) * n_slabs + o_chunk // PER_SLAB
    return tl.load(p_slab), (i_r % HEADS).to(tl.int64) * PER_SLAB + o_chunk % PER_SLAB


@jit
def _token_offsets(i_j, o_chunk, o_c, SINK: tl.constexpr, CAPACITY: tl.constexpr, C: tl.constexpr):
    """Places of tokens ``o_c`` [BC] of a chunk in its row: int64."""
    return i_j.to(tl.int64) * C + o_c if SINK is None else SINK + (o_chunk.to(tl.int64) * C + o_c) % CAPACITY


@jit
def _sketch_kernel(
    keys,  # [R, places, D]
    first,  # [1] or [R] int32
    count,  # same
    mean,  # [R, D] float32
    basis,  # [R, D, RANK] float32
    codes,  # [groups, slabs] int64: slabs [HEADS, PER_SLAB, C, PACKED] uint8
    scales,  # same: slabs [HEADS, PER_SLAB, RANK] bfloat16
    stride_row,
    n_slabs,
    EACH: tl.constexpr,
    SINK: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEADS: tl.constexpr,
    PER_SLAB: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BP: tl.constexpr,
):
    """One program per chunk, row and block of BP bytes of a token; plane by plane, so nothing is interleaved."""
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    i_j, i_r, i_p = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_j >= tl.load(count + i_r * EACH):
        return
    o_chunk = tl.load(first + i_r * EACH) + i_j
    o_codes, o_item = _target(codes, i_r, o_chunk, n_slabs, HEADS, PER_SLAB)
    o_scales, o_item = _target(scales, i_r, o_chunk, n_slabs, HEADS, PER_SLAB)
    o_c, o_d, o_p = tl.arange(0, BC), tl.arange(0, BD), i_p * BP + tl.arange(0, BP)
    p_keys = keys + i_r.to(tl.int64) * stride_row + _token_offsets(i_j, o_chunk, o_c, SINK, CAPACITY, C)[:, None] * D
    p_basis = basis + i_r.to(tl.int64) * (D * RANK)
    # [BC, BP]
    b_packed = tl.zeros([BC, BP], tl.int32)
    for i_plane in tl.static_range(8 // BITS):
        o_r = i_plane * PACKED + o_p
        m_r = (o_p < PACKED) & (o_r < RANK)
        b_y = tl.zeros([BC, BP], tl.float32)
        for begin in tl.static_range(0, D, BD):
            m_d = begin + o_d < D
            m_x = (o_c < C)[:, None] & m_d[None, :]
            # [BC, BD]
            b_x = tl.load(p_keys + begin + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
            b_mean = tl.load(mean + i_r * D + begin + o_d, mask=m_d, other=0.0)
            b_x = tl.where(m_x, b_x - b_mean[None, :], 0.0)
            # [BD, BP]
            p_part = p_basis + (begin + o_d)[:, None] * RANK + o_r[None, :]
            b_basis = tl.load(p_part, mask=m_d[:, None] & m_r[None, :], other=0.0)
            b_y = tl.dot(b_x, b_basis, b_y, input_precision="ieee")
        # [BP]
        b_scale = tl.div_rn(tl.max(tl.abs(b_y), axis=0), tl.full([BP], TOP, tl.float32)).to(tl.bfloat16)
        b_step = b_scale.to(tl.float32)[None, :]
        p_scale = o_scales.to(tl.pointer_type(tl.bfloat16)) + o_item * RANK
        tl.store(p_scale + o_r, b_scale, mask=m_r)
        # [BC, BP]
        b_code = tl.where(b_step > 0, tl.div_rn(b_y, tl.where(b_step > 0, b_step, 1.0)), 0.0)
        b_code = round_even(tl.minimum(tl.maximum(b_code, -TOP), TOP)) + (TOP + 1)
        b_packed |= tl.where(m_r[None, :], b_code, 0) << (i_plane * BITS)
    p_codes = o_codes.to(tl.pointer_type(tl.uint8)) + o_item * (C * PACKED)
    m_codes = (o_c < C)[:, None] & (o_p < PACKED)[None, :]
    tl.store(p_codes + o_c[:, None] * PACKED + o_p[None, :], b_packed.to(tl.uint8), mask=m_codes)


@jit
def _vectors_kernel(
    keys,  # [R, places, D]
    first,  # [1] or [R] int32
    count,  # same
    table0,  # [groups, slabs] int64: slabs [HEADS, PER_SLAB, D] of mean, low or centre, of the keys' dtype
    table1,  # same, of high or deviation
    stride_row,
    n_slabs,
    KIND: tl.constexpr,
    EACH: tl.constexpr,
    SINK: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEADS: tl.constexpr,
    PER_SLAB: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """One program per chunk, row and block of BD dimensions."""
    dtype: tl.constexpr = keys.dtype.element_ty
    i_j, i_r, i_d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_j >= tl.load(count + i_r * EACH):
        return
    o_chunk = tl.load(first + i_r * EACH) + i_j
    o_c, o_d = tl.arange(0, BC), i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    m_c = (o_c < C)[:, None]
    p_keys = keys + i_r.to(tl.int64) * stride_row + _token_offsets(i_j, o_chunk, o_c, SINK, CAPACITY, C)[:, None] * D
    # [BC, BD]
    b_x = tl.load(p_keys + o_d[None, :], mask=m_c & m_d[None, :], other=0.0).to(tl.float32)
    # [BD]
    if KIND == "mean":
        b_0 = tl.sum(b_x, axis=0) / C
    else:
        b_low = tl.min(tl.where(m_c, b_x, float("inf")), axis=0)
        b_high = tl.max(tl.where(m_c, b_x, -float("inf")), axis=0)
        b_0 = b_low
        b_1 = b_high
        if KIND == "cuboid":
            b_0 = (b_low + b_high) * 0.5
            b_away = tl.abs(b_x - b_0.to(dtype).to(tl.float32)[None, :])
            b_1 = tl.sum(tl.where(m_c, b_away, 0.0), axis=0) / C
        o_slab, o_item = _target(table1, i_r, o_chunk, n_slabs, HEADS, PER_SLAB)
        tl.store(o_slab.to(tl.pointer_type(dtype)) + o_item * D + o_d, b_1.to(dtype), mask=m_d)
    o_slab, o_item = _target(table0, i_r, o_chunk, n_slabs, HEADS, PER_SLAB)
    tl.store(o_slab.to(tl.pointer_type(dtype)) + o_item * D + o_d, b_0.to(dtype), mask=m_d)


def encode_sketch_triton(keys: Keys, mean: torch.Tensor, basis: torch.Tensor, bits: int, out: Slabs) -> None:
    """``encode_sketch`` in one launch, into slabs of codes [heads, per_slab, C, packed] and scales [.., rank].

    ``mean`` [R, D] and ``basis`` [R, D, rank], contiguous, of every row.
    """
    rows, _, dim = keys.data.shape
    rank = basis.shape[2]
    packed = packed_size(rank, bits)
    block = max(16, min(32, next_power_of_2(packed)))
    assert mean.is_contiguous()
    assert basis.is_contiguous()
    _sketch_kernel[(keys.m, rows, -(-packed // block))](
        keys.data, keys.first, keys.count, mean, basis, *out.tables, keys.data.stride(0), out.tables[0].stride(0),
        RANK=rank, BITS=bits, PACKED=packed, BC=max(16, next_power_of_2(keys.chunk)),
        BD=max(16, min(64, next_power_of_2(dim))), BP=block,
        num_warps=4 if keys.chunk <= 64 else 8, **_constants(keys, out),
    )  # fmt: skip


def encode_mean_triton(keys: Keys, out: Slabs) -> None:
    """``encode_mean`` in one launch, into slabs [heads, per_slab, D] of the keys' dtype."""
    _encode_vectors("mean", keys, out)


def encode_minmax_triton(keys: Keys, out: Slabs) -> None:
    """``encode_minmax`` in one launch, into slabs of low and of high, [heads, per_slab, D] each."""
    _encode_vectors("minmax", keys, out)


def encode_cuboid_triton(keys: Keys, out: Slabs) -> None:
    """``encode_cuboid`` in one launch, into slabs of centre and of deviation, [heads, per_slab, D] each."""
    _encode_vectors("cuboid", keys, out)


def _encode_vectors(kind: str, keys: Keys, out: Slabs) -> None:
    rows, _, dim = keys.data.shape
    chunk = next_power_of_2(keys.chunk)
    block = min(next_power_of_2(dim), max(32, 8192 // chunk))
    _vectors_kernel[(keys.m, rows, -(-dim // block))](
        keys.data, keys.first, keys.count, out.tables[0], out.tables[-1], keys.data.stride(0),
        out.tables[0].stride(0), KIND=kind, BC=chunk, BD=block,
        num_warps=max(1, min(8, chunk * block // 512)), **_constants(keys, out),
    )  # fmt: skip


def _constants(keys: Keys, out: Slabs) -> dict[str, int | None]:
    """Compile-time constants of both kernels: one set per model and setting."""
    _, places, dim = keys.data.shape
    assert keys.data.stride()[1:] == (dim, 1)
    assert keys.first.dtype == keys.count.dtype == torch.int32
    return {
        "EACH": int(keys.first.numel() > 1),
        "SINK": keys.sink,
        "CAPACITY": 1 if keys.sink is None else places - keys.sink,
        "HEADS": out.heads,
        "PER_SLAB": out.per_slab,
        "C": keys.chunk,
        "D": dim,
    }
