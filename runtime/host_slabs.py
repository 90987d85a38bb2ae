"""The fine codes of two levels: slabs in host memory, read whole or for some chunks of each head."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from kvtier.runtime import slabs
from kvtier.runtime.budget import Budget
from kvtier.runtime.slabs import Slab, SlabList
from kvtier.runtime.summary import Codes, Layout

CPU = torch.device("cpu")


class HostSlabs(SlabList):
    """A ``SlabList`` on the host for a device elsewhere.

    Parameters
    ----------
    budget : ``[budget] host``
    device : where codes go that are read
    make_room : called with a number of bytes before they are taken from the budget; raises BudgetError or StoreError
    """

    def __init__(
        self, layout: Layout, rows: int, budget: Budget, device: torch.device, make_room: Callable[[int], None]
    ) -> None:
        super().__init__(layout, rows, budget, CPU)
        self._to = device
        self._make_room = make_room

    def _empty(self) -> "HostSlabs":
        return HostSlabs(self._layout, self._rows, self._budget, self._to, self._make_room)

    def _new_slab(self) -> Slab:
        self._make_room(slabs.slab_bytes(self._layout, self._rows))
        return super()._new_slab()

    def slabs(self, length: int) -> Iterator[Codes]:
        """The first ``length`` chunks, slab by slab, on the device."""
        for codes in super().slabs(length):
            yield {name: tensor.to(self._to) for name, tensor in codes.items()}

    def gather(self, chosen: torch.Tensor) -> Codes:
        """The chunks ``chosen`` [N, n] of each head, on the device: tensors [N, n, ...] by name.

        Read in the order in which they lie, one copy for each slab.
        """
        chunk = chosen.cpu().numpy()
        slab, place = np.divmod(chunk, slabs.SLAB_CHUNKS)
        place += np.arange(len(chunk))[:, None] * slabs.SLAB_CHUNKS
        order = np.argsort(slab, axis=None, kind="stable")
        index = torch.from_numpy(place.ravel()[order])
        used, begins = np.unique(slab.ravel()[order], return_index=True)
        back = torch.from_numpy(np.argsort(order, kind="stable")).to(self._to)
        parts = list(zip(used.tolist(), begins.tolist(), [*begins[1:].tolist(), chunk.size], strict=True))
        gathered = {}
        for name, (shape, dtype) in self._layout.items():
            staged = torch.empty(chunk.size, *shape, dtype=dtype)
            for i, begin, end in parts:
                lying = self._slabs[i].tensors[name].flatten(0, 1)  # [N * SLAB_CHUNKS, ...]
                torch.index_select(lying, 0, index[begin:end], out=staged[begin:end])
            gathered[name] = staged.to(self._to)[back].view(*chunk.shape, *shape)
        return gathered
