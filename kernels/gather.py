"""Chunks of the device pool: laid out for attention, fetched from pinned host memory and stored there.

The host's slots lie in slabs of equal size; a *table* on the device holds the slabs' addresses, so that more slabs need
no new launch and no new capture. A slot holds a chunk as it is, or its record (``kernels.quantize``).

``fetch`` and ``store`` run as few programs that keep several loads under way each: 8 to 16 of them reach the speed of
the link and leave the other processors to what runs beside them (shared notes, gpu_limits.md, B1 to B4).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtier.kernels.backend import jit, tl
from kvtier.kernels.quantize import (
    address,
    decode_config,
    dequantize_chunks,
    dequantize_kernel,
    encode_config,
    next_power_of_2,
    quantize_chunks,
    quantize_kernel,
    shape_constants,
)

BESIDE = 16
"""Programs of a transfer that runs beside compute."""
ALONE = 64
"""Programs of a transfer that has the device for itself."""
TILE_WORDS = 4096
"""32-bit words that a program copies at once."""
STAGES = 6
"""Stages of a program's pipeline: loads of up to 5 tiles are under way."""
RECORD_STAGES = 8
"""The same for records, which are a third as long."""


@dataclass(frozen=True, slots=True)
class HostSlots:
    """Slots in host memory that the device can reach; all slabs but the last hold ``per_slab`` of them."""

    slabs: Sequence[torch.Tensor]
    """[per_slab, 2, C, D] of the pool's dtype, or records [per_slab, bytes] uint8: pinned, contiguous. The twins read
    them; whoever launches kernels keeps them alive."""
    table: torch.Tensor
    """[>= slabs] int64 on the device: their addresses, 16-byte aligned."""
    per_slab: int

    @classmethod
    def of(cls, slabs: Sequence[torch.Tensor], device: torch.device | str) -> "HostSlots":
        """Slots of ``slabs`` with a new table; for pinned memory the device's addresses are the host's."""
        assert all(slab.is_contiguous() and slab.data_ptr() % 16 == 0 for slab in slabs)
        table = torch.tensor([slab.data_ptr() for slab in slabs], dtype=torch.int64, device=device)
        return cls(slabs, table, slabs[0].shape[0])


def gather_chunks(pool: torch.Tensor, slots: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor) -> None:
    """Copy chunks out of the pool, per KV head, one after the other.

    Parameters
    ----------
    pool : Tensor [slots, 2, C, D]
    slots : Tensor [N, n], int64, on the pool's device
    out_k, out_v : Tensor [N, n*C, D], written
    """
    n = slots.shape[1]
    chunks = pool[slots]  # [N, n, 2, C, D]
    out_k.unflatten(1, (n, -1)).copy_(chunks[:, :, 0])
    out_v.unflatten(1, (n, -1)).copy_(chunks[:, :, 1])


# -- torch -------------------------------------------------------------------------------------------------------------


def fetch_chunks(
    pool: torch.Tensor,
    slots: torch.Tensor,
    host: HostSlots,
    host_slots: torch.Tensor,
    count: torch.Tensor,
    bits: int | None = None,
) -> None:
    """Copy chunks from host memory into the pool.

    Parameters
    ----------
    pool : Tensor [slots, 2, C, D], contiguous, written
    slots : Tensor [n], int32: where chunk i goes, no two equal
    host : of chunks; of records of ``bits`` bits unless that is None
    host_slots : Tensor [n], int32: where chunk i comes from
    count : Tensor [1], int32: the first ``count`` entries of both lists count, none if 0
    """
    _, _, chunk, dim = pool.shape
    n = int(count)
    for slot, place in zip(slots[:n].tolist(), host_slots[:n].tolist(), strict=True):
        item = host.slabs[place // host.per_slab][place % host.per_slab]
        if bits is not None:
            item = dequantize_chunks(item[None], bits, chunk, dim, pool.dtype)[0]
        pool[slot] = item.to(pool.device)


def store_chunks(
    pool: torch.Tensor,
    slots: torch.Tensor,
    host: HostSlots,
    host_slots: torch.Tensor,
    count: torch.Tensor,
    bits: int | None = None,
) -> None:
    """The reverse: copy chunks of the pool into host memory.

    Parameters as of ``fetch_chunks``. With ``bits`` the host gets records, and the chunks in the pool become what their
    records stand for (DESIGN.md, "Quantised tiers").
    """
    _, _, chunk, dim = pool.shape
    n = int(count)
    for slot, place in zip(slots[:n].tolist(), host_slots[:n].tolist(), strict=True):
        item = pool[slot]
        if bits is not None:
            item = quantize_chunks(pool[slot : slot + 1], bits)[0]
            pool[slot] = dequantize_chunks(item[None], bits, chunk, dim, pool.dtype)[0]
        host.slabs[place // host.per_slab][place % host.per_slab] = item.to("cpu")


def retire_chunks(
    ring: torch.Tensor, sink: int, first: torch.Tensor, count: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor
) -> None:
    """Copy chunks that leave the window from the ring into the pool.

    Parameters
    ----------
    ring : Tensor [2, R, sink + capacity, D]: K and V of R rows (layer and KV head), middle token p of a row at place
        sink + p % capacity
    first : Tensor [1] or [R], int32: first chunk to copy, of all rows or of each
    count : Tensor, same shape, int32: how many, at most m
    pool : Tensor [slots, 2, C, D], contiguous, written
    slots : Tensor [R, m], int32: slot of chunk first + j of each row
    """
    rows, m = slots.shape
    chunk, capacity = pool.shape[2], ring.shape[2] - sink
    for row in range(rows):
        begin, n = int(first.expand(rows)[row]), int(count.expand(rows)[row])
        for j in range(min(n, m)):
            tokens = torch.arange((begin + j) * chunk, (begin + j + 1) * chunk, device=ring.device)
            pool[int(slots[row, j])] = ring[:, row, sink + tokens % capacity]


# -- Triton ------------------------------------------------------------------------------------------------------------


@jit
def _copy_kernel(
    pool,  # [slots, 2, C, D]
    slots,  # [n] int32
    table,  # [slabs] int64
    host_slots,  # [n] int32
    count,  # [1] int32
    PER_SLAB: tl.constexpr,
    ITEM: tl.constexpr,
    ALIGN: tl.constexpr,
    BW: tl.constexpr,
    TO_HOST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs take turns at tiles of BW words, each with the loads of its next ones under way."""
    TILES: tl.constexpr = (ITEM // 4 + BW - 1) // BW
    n = tl.load(count) * TILES
    for i in tl.range(tl.program_id(0), n, tl.num_programs(0), num_stages=STAGES):
        p_pool = address(pool, None, slots, i // TILES, 1, ITEM, ALIGN).to(tl.pointer_type(tl.int32))
        p_host = address(pool, table, host_slots, i // TILES, PER_SLAB, ITEM, ALIGN).to(tl.pointer_type(tl.int32))
        o_w = (i % TILES) * BW + tl.arange(0, BW)
        m_w = o_w < ITEM // 4
        if TO_HOST:
            p_from, p_to = p_pool, p_host
        else:
            p_from, p_to = p_host, p_pool
        if ITEM % (4 * BW) == 0:
            tl.store(p_to + o_w, tl.load(p_from + o_w))
        else:
            tl.store(p_to + o_w, tl.load(p_from + o_w, mask=m_w), mask=m_w)


@jit
def _retire_kernel(
    ring,  # [2, R, places, D]
    first,  # [1] or [R] int32
    count,  # same
    pool,  # [slots, 2, C, D]
    slots,  # [R, m] int32
    stride_kv,
    stride_row,
    SINK: tl.constexpr,
    CAPACITY: tl.constexpr,
    EACH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """One program per chunk, row and half (K or V)."""
    i_j, i_r, i_kv = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_j >= tl.load(count + i_r * EACH):
        return
    o_slot = tl.load(slots + i_r * tl.num_programs(0) + i_j).to(tl.int64)
    p_from = ring + i_kv.to(tl.int64) * stride_kv + i_r.to(tl.int64) * stride_row
    p_to = pool + (o_slot * 2 + i_kv) * (C * D)
    o_c, o_d = tl.arange(0, BC), tl.arange(0, BD)
    # [BC]
    o_place = SINK + ((tl.load(first + i_r * EACH) + i_j).to(tl.int64) * C + o_c) % CAPACITY
    # [BC, BD]
    m_x = (o_c < C)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_from + o_place[:, None] * D + o_d[None, :], mask=m_x)
    tl.store(p_to + o_c[:, None] * D + o_d[None, :], b_x, mask=m_x)


def fetch_chunks_triton(
    pool: torch.Tensor,
    slots: torch.Tensor,
    host: HostSlots,
    host_slots: torch.Tensor,
    count: torch.Tensor,
    bits: int | None = None,
    n_programs: int = BESIDE,
) -> None:
    """``fetch_chunks`` in one launch, the same bits, no host synchronisation.

    ``n_programs``: processors that take part, BESIDE compute or ALONE.
    """
    _, _, chunk, dim = pool.shape
    assert pool.is_contiguous()
    assert slots.dtype == host_slots.dtype == count.dtype == torch.int32
    if bits is None:
        _copy(pool, slots, host, host_slots, count, n_programs, to_host=False)
        return
    dequantize_kernel[(n_programs,)](
        host.table, host.table, host_slots, pool, slots, count, PER_SLAB=host.per_slab, STAGES=RECORD_STAGES,
        **decode_config(chunk, dim), **shape_constants(chunk, dim, bits, pool.dtype),
    )  # fmt: skip


def store_chunks_triton(
    pool: torch.Tensor,
    slots: torch.Tensor,
    host: HostSlots,
    host_slots: torch.Tensor,
    count: torch.Tensor,
    bits: int | None = None,
    n_programs: int = BESIDE,
) -> None:
    """``store_chunks`` in one launch, the same bits, no host synchronisation; ``n_programs`` as for the fetch."""
    _, _, chunk, dim = pool.shape
    assert pool.is_contiguous()
    assert slots.dtype == host_slots.dtype == count.dtype == torch.int32
    if bits is None:
        _copy(pool, slots, host, host_slots, count, n_programs, to_host=True)
        return
    quantize_kernel[(n_programs,)](
        pool, slots, host.table, host.table, host_slots, count, PER_SLAB=host.per_slab, REWRITE=True,
        **encode_config(chunk, dim), **shape_constants(chunk, dim, bits, pool.dtype),
    )  # fmt: skip


def _copy(
    pool: torch.Tensor,
    slots: torch.Tensor,
    host: HostSlots,
    host_slots: torch.Tensor,
    count: torch.Tensor,
    n_programs: int,
    to_host: bool,
) -> None:
    item = pool[0].nbytes
    words = min(TILE_WORDS, next_power_of_2(item // 4))
    _copy_kernel[(n_programs,)](
        pool, slots, host.table, host_slots, count, PER_SLAB=host.per_slab, ITEM=item, ALIGN=math.gcd(item, 16),
        BW=words, TO_HOST=to_host, STAGES=STAGES, num_warps=max(1, min(8, words // 256)),
    )  # fmt: skip


def retire_chunks_triton(
    ring: torch.Tensor, sink: int, first: torch.Tensor, count: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor
) -> None:
    """``retire_chunks`` in one launch, for all layers at once if ``ring`` holds them all; inner dimensions dense."""
    (rows, m), (_, _, chunk, dim) = slots.shape, pool.shape
    assert ring.stride()[2:] == (dim, 1)
    assert pool.is_contiguous()
    assert slots.is_contiguous()
    assert ring.dtype == pool.dtype
    _retire_kernel[(m, rows, 2)](
        ring, first, count, pool, slots, ring.stride(0), ring.stride(1), SINK=sink, CAPACITY=ring.shape[2] - sink,
        EACH=int(first.numel() > 1), C=chunk, D=dim, BC=next_power_of_2(chunk), BD=next_power_of_2(dim),
    )  # fmt: skip
