"""Chunks in device memory, allocated at once, so that attention can gather straight from one tensor."""

import torch

from kvtier.runtime.budget import Budget, format_bytes
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.slot_tier import SlotTier
from kvtier.runtime.tier import Ids


class DevicePool(SlotTier):
    """A fixed number of slots on one device ("cpu" is a device like any other).

    Parameters
    ----------
    budget
        ``[budget] gpu``.
    n_slots
        Chunks that the pool can hold.
    chunk, head_dim, dtype
        Of a chunk ``[2, C, D]``: tokens, elements, type.
    device
        Where the pool lives.

    Attributes
    ----------
    data
        All slots, ``[n_slots, 2, C, D]``.

    Raises
    ------
    BudgetError
        At construction, if the budget or the device cannot hold the slots; from ``put``, if too few are free.
    """

    name = "gpu"

    def __init__(
        self,
        budget: Budget,
        n_slots: int,
        chunk: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(budget, chunk, head_dim, dtype)
        what = f"a pool of {n_slots} chunks"
        self._take(n_slots * self.chunk_bytes, what)
        try:
            self.data = torch.empty((n_slots, *self._shape), dtype=dtype, device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self._give(self._used_bytes)
            raise BudgetError(
                f"[budget] {budget.name} = {format_bytes(budget.limit_bytes)} is more than {device} "
                f"can hold: {what} ({format_bytes(n_slots * self.chunk_bytes)}) could not be allocated "
                f"({error}). Lower [budget] {budget.name}, or free memory on the device."
            ) from error
        self._map.add_slots(n_slots)

    def room(self) -> int:
        return self._map.n_free

    def slots_of(self, ids: Ids) -> Ids:
        """The slots in ``data`` of ``ids`` [n]: int64 [n] on the host, -1 for those not held."""
        return self._map.slots_of(ids)

    def touch(self, ids: Ids) -> None:
        """Mark ``ids`` [n], all held, as used: attention reads ``data`` itself, without ``get``."""
        self._map.touch(ids)

    def put(self, ids: Ids, chunks: torch.Tensor) -> None:
        if len(ids) > self.room():
            raise BudgetError(
                f"the device pool is full: {len(ids)} chunks to store, {self.room()} of {self._map.n_slots} "
                f"slots free. Drop chunks first, or raise [budget] {self.budget.name}."
            )
        super().put(ids, chunks)

    def _make_room(self, n: int) -> None:
        assert n <= self._map.n_free

    def _write(self, slots: Ids, chunks: torch.Tensor) -> None:
        self.data.index_copy_(0, self._on_device(slots), chunks.to(self.data.device))

    def _read(self, slots: Ids, out: torch.Tensor) -> None:
        index = self._on_device(slots)
        if out.device == self.data.device and out.is_contiguous():
            torch.index_select(self.data, 0, index, out=out)
        else:
            out.copy_(self.data.index_select(0, index))

    def _release_all(self) -> None:
        self.data = self.data.new_empty((0, *self._shape))

    def _on_device(self, slots: Ids) -> torch.Tensor:
        return torch.from_numpy(slots).to(self.data.device)
