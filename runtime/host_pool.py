"""Chunks in host memory, in slabs that are allocated when needed and given back when others need them."""

import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from kvtier.runtime.budget import Budget, format_bytes
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.slot_tier import TRANSIENT_BYTES, SlotTier, as_bytes
from kvtier.runtime.tier import Ids

SLAB_BYTES = 4 * 2**20
"""Size of a slab: small enough to hand back, and a power of two, to which torch rounds pinned memory up."""
FEWEST_SLABS = 32
"""A budget is divided into at least this many slabs, so what a half-empty one withholds from others is little."""

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
        ``[budget] host``. Bytes are taken slab by slab; the last slab is smaller if less is left.
    chunk, head_dim, dtype
        Of a chunk ``[2, C, D]``: tokens, elements, type.
    pin
        Pin the slabs, so that the device can read them. Where that is refused the pool goes on with ordinary
        memory, after one warning.

    Attributes
    ----------
    slabs
        Tensors ``[slots, 2, C, D]``; slot numbers run through them in order.
    """

    name = "host"

    def __init__(self, budget: Budget, chunk: int, head_dim: int, dtype: torch.dtype, pin: bool) -> None:
        super().__init__(budget, chunk, head_dim, dtype)
        self.slabs: list[torch.Tensor] = []
        self._rows: list[Rows] = []  # the same memory
        self._first_slot: Ids = np.empty(0, np.int64)  # of each slab
        self._pin = pin
        slab_bytes = min(SLAB_BYTES, budget.limit_bytes // FEWEST_SLABS)
        self._chunks_per_slab = max(1, slab_bytes // self.chunk_bytes)

    @property
    def pinned(self) -> bool:
        """Whether slabs are pinned: as asked for, until the machine refuses."""
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
        del self.slabs[n_slabs:], self._rows[n_slabs:]
        self._first_slot = self._first_slot[:n_slabs]
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
            n_chunks = min(self._chunks_per_slab, self.budget.free_bytes // self.chunk_bytes)
            slab = self._allocate(n_chunks)
            self.slabs.append(slab)
            self._rows.append(self._as_rows(slab))
            self._first_slot = np.append(self._first_slot, self._map.n_slots)
            self._map.add_slots(n_chunks)

    def _allocate(self, n_chunks: int) -> torch.Tensor:
        """A slab, its bytes taken; BudgetError if the machine has less memory than the budget says."""
        nbytes = n_chunks * self.chunk_bytes
        self._take(nbytes, f"a slab of {n_chunks} chunks")
        try:
            return self._empty(n_chunks)
        except RuntimeError as error:
            self._give(nbytes)
            raise BudgetError(
                f"[budget] {self.budget.name} = {format_bytes(self.budget.limit_bytes)} is more than this "
                f"machine can hold: after {format_bytes(self._used_bytes)} of chunks, {format_bytes(nbytes)} "
                f"could not be allocated ({error}). Lower [budget] {self.budget.name}."
            ) from error
        except BaseException:  # the warning below, where warnings are errors
            self._give(nbytes)
            raise

    def _empty(self, n_chunks: int) -> torch.Tensor:
        shape = (n_chunks, *self._shape)
        if self._pin:
            try:
                return torch.empty(shape, dtype=self._dtype, pin_memory=True)
            except RuntimeError as error:
                self._pin = False
                warnings.warn(
                    f"host memory cannot be pinned, so copies to the device are slower: {error} "
                    "(often `ulimit -l` is too low, or there is no CUDA device)",
                    stacklevel=2,
                )
        return torch.empty(shape, dtype=self._dtype)

    def _write(self, slots: Ids, chunks: torch.Tensor) -> None:
        rows = self._as_rows(chunks.cpu().contiguous())
        for slab, index, where in self._by_slab(slots):
            slab[index] = rows[where]

    def _read(self, slots: Ids, out: torch.Tensor) -> None:
        if out.device.type == "cpu" and out.is_contiguous():
            self._read_rows(slots, self._as_rows(out))
            return
        step = min(len(slots), max(1, TRANSIENT_BYTES // self.chunk_bytes))
        # torch keeps and reuses pinned memory, so this allocates the first time only
        staging = torch.empty((step, *self._shape), dtype=self._dtype, pin_memory=self._pin)
        for begin in range(0, len(slots), step):
            part = slots[begin : begin + step]
            self._read_rows(part, self._as_rows(staging)[: len(part)])
            out[begin : begin + step].copy_(staging[: len(part)])

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
        self.slabs.clear()
        self._rows.clear()

    def _as_rows(self, chunks: torch.Tensor) -> Rows:
        rows: Rows = as_bytes(chunks).view(f"V{self._payload_bytes}")[:, 0]
        return rows
