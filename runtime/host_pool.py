"""Chunks in host memory, in slabs that are allocated when needed and given back when others need them."""

import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from kvtier.runtime.budget import Budget, format_bytes
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.host_memory import HostBlock, PinningRefused, Staging
from kvtier.runtime.slot_tier import TRANSIENT_BYTES, SlotTier, as_bytes
from kvtier.runtime.tier import Ids

SLAB_BYTES = 64 * 2**20
"""Size of a slab: 4 ms of touching and pinning (gpu_limits.md, A: 0.066 s per GiB), beside which a call's own cost is
little; 128 GiB are 2,048 addresses for the device."""
FEWEST_SLABS = 32
"""A budget is divided into at least this many slabs, so what a half-empty one withholds from others is little."""
STAGING_BYTES = 2**20
"""Of each of two buffers, at most TRANSIENT_BYTES: copies of 1 MiB reach 47 of the link's 54 GB/s, and gathering the
next MiB takes eight times as long (gpu_limits.md, A)."""

Rows = npt.NDArray[np.void]
"""Chunks as opaque items [n], which numpy copies with one memcpy each, in the calling thread.

torch's index_select of 512 chunks of 8 KiB takes 0.06 ms when all cores are idle and 4 to 16 ms when they are
not, as its threads wait for each other; numpy takes 0.1 to 0.2 ms.
"""


class HostPool(SlotTier):
    """Chunks in ordinary or pinned host memory.

    Parameters
    ----------
    budget
        ``[budget] host``. Bytes are taken slab by slab; the last slab is smaller if less is left, and grows in place
        when there is more. The rounding of a slab to a page of memory is not counted.
    chunk, head_dim, dtype, bits
        Of a chunk ``[2, C, D]``: tokens, elements, type; bits a number of its record, None: kept as it is.
    pin
        Pin the slabs, so that the device can read them. Where that is refused the pool goes on with ordinary
        memory, after one warning. Either way ``get`` goes through two small pinned buffers, which no budget counts.

    Attributes
    ----------
    slabs
        Tensors ``[slots, 2, C, D]``, page-aligned; slot numbers run through them in order, and all but the last have
        the same number of them. Whoever has the device read them waits for that before ``release`` and ``close``.
    """

    name = "host"

    def __init__(
        self, budget: Budget, chunk: int, head_dim: int, dtype: torch.dtype, pin: bool, bits: int | None = None
    ) -> None:
        super().__init__(budget, chunk, head_dim, dtype, bits)
        self.slabs: list[torch.Tensor] = []
        self._rows: list[Rows] = []  # the same memory
        self._blocks: list[HostBlock] = []  # which holds it
        self._first_slot: Ids = np.empty(0, np.int64)  # of each slab
        self._pin = self._wants_pinned = pin
        self._warned = False
        self._staging: Staging | None = None
        slab_bytes = min(SLAB_BYTES, budget.limit_bytes // FEWEST_SLABS)
        self._chunks_per_slab = max(1, slab_bytes // self.chunk_bytes)

    @property
    def pinned(self) -> bool:
        """Whether all slabs are pinned: as asked for, until the machine refuses one."""
        return self._pin

    def room(self) -> int:
        return 0 if self._closed else self._map.n_free + self.budget.free_bytes // self.chunk_bytes

    def chunks_to_drop(self, nbytes: int) -> int:
        """How many chunks must be dropped before ``release(nbytes)``.

        Whole slabs go, so it can be more than ``nbytes`` hold; it is more than are held if the pool has not
        allocated that much.
        """
        if nbytes > self._used_bytes:
            return max(len(self) + 1, -(-nbytes // self.chunk_bytes))
        return max(0, self._map.n_slots - self._slots_after(nbytes) - self._map.n_free)

    def release(self, nbytes: int) -> None:
        """Give at least ``nbytes`` back to the budget, for another of its users; no chunk is lost.

        The last slabs go, and chunks in them move to free slots in the others. Only while
        ``chunks_to_drop(nbytes)`` is 0.
        """
        n_more = self.chunks_to_drop(nbytes)
        assert n_more == 0, f"drop {n_more} chunks before releasing {nbytes} bytes"
        n_before = self._map.n_slots
        old, new = self._map.truncate(self._slots_after(nbytes))
        self._move(old, new)
        n_slabs = int(np.searchsorted(self._first_slot, self._map.n_slots))
        self._remove_slabs(n_slabs)
        self._give((n_before - self._map.n_slots) * self.chunk_bytes)

    def _slots_after(self, nbytes: int) -> int:
        """Slots that remain once the fewest last slabs that hold ``nbytes`` are gone."""
        most = (self._used_bytes - max(0, nbytes)) // self.chunk_bytes
        boundaries = np.append(self._first_slot, self._map.n_slots)
        return int(boundaries[np.searchsorted(boundaries, most, side="right") - 1])

    def _move(self, old: Ids, new: Ids) -> None:
        """Copy chunks between slots, a bounded number at a time."""
        step = max(1, TRANSIENT_BYTES // self.chunk_bytes)
        for begin in range(0, len(old), step):
            source, target = old[begin : begin + step], new[begin : begin + step]
            chunks = torch.empty((len(source), *self._shape), dtype=self._dtype)
            self._read(source, chunks)
            self._write(target, chunks)

    def _make_room(self, n: int) -> None:
        while self._map.n_free < n:
            in_last = self._map.n_slots % self._chunks_per_slab  # if that is short
            n_chunks = min(self._chunks_per_slab - in_last, self.budget.free_bytes // self.chunk_bytes)
            self._allocate(n_chunks, in_last)
            if in_last:
                self._remove_views(len(self.slabs) - 1)
            self._first_slot = np.append(self._first_slot, self._map.n_slots - in_last)
            slab = self._blocks[-1].data.view(self._dtype).view(in_last + n_chunks, *self._shape)
            self.slabs.append(slab)
            self._rows.append(self._as_rows(slab))
            self._map.add_slots(n_chunks)

    def _allocate(self, n_chunks: int, in_last: int) -> None:
        """Memory for ``n_chunks`` more in the last slab, which has ``in_last``, or in a new one if that is 0.

        The bytes are taken; BudgetError if the machine has less memory than the budget says.
        """
        nbytes = n_chunks * self.chunk_bytes
        self._take(nbytes, f"a slab of {n_chunks} chunks")
        try:
            if in_last == 0:
                self._blocks.append(self._empty())
            self._grow(self._blocks[-1], (in_last + n_chunks) * self.chunk_bytes)
        except (RuntimeError, MemoryError) as error:
            self._give(nbytes)
            self._release_blocks(len(self.slabs))
            raise BudgetError(
                f"[budget] {self.budget.name} = {format_bytes(self.budget.limit_bytes)} is more than this "
                f"machine can hold: after {format_bytes(self._used_bytes)} of chunks, {format_bytes(nbytes)} "
                f"could not be allocated ({error}). Lower [budget] {self.budget.name}."
            ) from error
        except BaseException:  # the warning below, where warnings are errors
            self._give(nbytes)
            self._release_blocks(len(self.slabs))
            raise

    def _empty(self) -> HostBlock:
        return HostBlock(self._chunks_per_slab * self.chunk_bytes)

    def _grow(self, block: HostBlock, nbytes: int) -> None:
        if self._pin:
            try:
                block.grow(nbytes, pin=True)
                return
            except PinningRefused as error:
                self._pin = False
                self._warn(error)
        block.grow(nbytes, pin=False)

    def _stage(self) -> Staging:
        """The buffers through which ``get`` reaches a device, made when they are first needed."""
        if self._staging is None:
            nbytes = max(1, STAGING_BYTES // self.chunk_bytes) * self.chunk_bytes
            try:
                self._staging = Staging(nbytes, pin=self._wants_pinned)
            except PinningRefused as error:
                self._staging = Staging(nbytes, pin=False)
                self._warn(error)
        return self._staging

    def _warn(self, error: PinningRefused) -> None:
        """Say once, for slabs and buffers, that what is not pinned by now stays ordinary."""
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"host memory cannot be pinned any further, so copies to the device are slower: {error} (often "
            "`ulimit -l` or a container's limit is too low, WSL allows little, or there is no CUDA device)",
            stacklevel=2,
        )

    def _write(self, slots: Ids, chunks: torch.Tensor) -> None:
        rows = self._as_rows(chunks.cpu().contiguous())
        for slab, index, where in self._by_slab(slots):
            slab[index] = rows if len(index) == len(slots) else rows[where]

    def _read(self, slots: Ids, out: torch.Tensor) -> None:
        if out.device.type == "cpu" and out.is_contiguous():
            self._read_rows(slots, self._as_rows(out))
            return
        staging = self._stage()
        step = staging.nbytes // self.chunk_bytes
        for begin in range(0, len(slots), step):
            part = slots[begin : begin + step]
            chunks = staging.lend()[: len(part) * self.chunk_bytes].view(self._dtype).view(len(part), *self._shape)
            self._read_rows(part, self._as_rows(chunks))
            staging.send(chunks, out[begin : begin + step])

    def _read_rows(self, slots: Ids, rows: Rows) -> None:
        for slab, index, where in self._by_slab(slots):
            if len(index) == len(slots):
                np.take(slab, index, out=rows, mode="clip")  # the other modes copy through a buffer
            else:
                rows[where] = slab[index]

    def _by_slab(self, slots: Ids) -> Iterator[tuple[Rows, Ids, Ids]]:
        """For every slab that ``slots`` touch: its rows, the indices in it, and their places in ``slots``."""
        slab_of = np.searchsorted(self._first_slot, slots, side="right") - 1
        if (slab_of == slab_of[0]).all():
            yield self._rows[slab_of[0]], slots - self._first_slot[slab_of[0]], np.arange(len(slots))
            return
        order = np.argsort(slab_of, kind="stable")
        inside = slots - self._first_slot[slab_of]
        begins = np.flatnonzero(np.diff(slab_of[order], prepend=-1))
        for begin, end in zip(begins, [*begins[1:], len(order)], strict=True):
            where = order[begin:end]
            yield self._rows[slab_of[where[0]]], inside[where], where

    def _release_all(self) -> None:
        self._remove_slabs(0)
        if self._staging is not None:
            self._staging.release()

    def _remove_slabs(self, n_left: int) -> None:
        self._remove_views(n_left)
        self._release_blocks(n_left)

    def _remove_views(self, n_left: int) -> None:
        del self.slabs[n_left:], self._rows[n_left:]
        self._first_slot = self._first_slot[:n_left]

    def _release_blocks(self, n_left: int) -> None:
        for block in self._blocks[n_left:]:
            block.release()
        del self._blocks[n_left:]

    def _as_rows(self, chunks: torch.Tensor) -> Rows:
        rows: Rows = as_bytes(chunks).view(f"V{self._payload_bytes}")[:, 0]
        return rows
