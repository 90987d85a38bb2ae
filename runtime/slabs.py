"""Tensors that only grow, in slabs that forks share.

Summaries and chunk ids of a sequence are append-only: a fork shares every slab by reference and copies the last, partly
filled one only when it appends. Nothing is ever reallocated or moved.
"""

import weakref
from collections.abc import Iterator

import torch

from kvtier.runtime.budget import Budget
from kvtier.runtime.summary import Codes, Layout

SLAB_CHUNKS = 128
"""Chunks per slab: 4,096 tokens at 32 tokens a chunk."""


class Slab:
    """Tensors [N, SLAB_CHUNKS, ...] by name; their bytes go back to the budget when the last user lets go."""

    __slots__ = ("__weakref__", "tensors")

    def __init__(self, layout: Layout, rows: int, budget: Budget, device: torch.device) -> None:
        nbytes = slab_bytes(layout, rows)
        budget.take(nbytes, f"the summaries of {SLAB_CHUNKS} more chunks of a layer")
        self.tensors = {
            name: torch.empty(rows, SLAB_CHUNKS, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in layout.items()
        }
        weakref.finalize(self, budget.give, nbytes)


def slab_bytes(layout: Layout, rows: int) -> int:
    """Bytes of one slab for ``rows`` KV heads."""
    per_chunk = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())
    return rows * SLAB_CHUNKS * per_chunk


class SlabList:
    """A growing list of per-chunk tensors for ``rows`` KV heads; ``fork`` is cheap."""

    def __init__(self, layout: Layout, rows: int, budget: Budget, device: torch.device) -> None:
        self._layout = layout
        self._rows = rows
        self._budget = budget
        self._device = device
        self._slabs: list[Slab] = []
        self._length = 0
        self._tail_is_shared = False
        self._tables: list[torch.Tensor] = []
        self._listed: list[int] = []
        """The slabs in the tables."""

    def __len__(self) -> int:
        return self._length

    def fork(self) -> "SlabList":
        """A list of the same chunks. Whichever side appends first copies the partly filled slab."""
        self._slabs = self._slabs[: -(-self._length // SLAB_CHUNKS)]  # what was only reserved is not shared
        other = self._empty()
        other._slabs = list(self._slabs)
        other._length = self._length
        self._tail_is_shared = other._tail_is_shared = True
        return other

    def reserve(self, n: int) -> None:
        """Make the next ``append`` of up to ``n`` chunks unable to fail; raises BudgetError with nothing changed."""
        used = self._length % SLAB_CHUNKS
        if self._tail_is_shared and used:
            own = self._new_slab()
            shared = self._slabs[self._length // SLAB_CHUNKS]
            for name, tensor in own.tensors.items():
                tensor[:, :used] = shared.tensors[name][:, :used]
            self._slabs[self._length // SLAB_CHUNKS :] = [own]
        self._tail_is_shared = False
        while len(self._slabs) * SLAB_CHUNKS < self._length + n:
            self._slabs.append(self._new_slab())

    def _empty(self) -> "SlabList":
        return SlabList(self._layout, self._rows, self._budget, self._device)

    def _new_slab(self) -> Slab:
        return Slab(self._layout, self._rows, self._budget, self._device)

    def append(self, values: Codes) -> None:
        """Add the chunks of ``values`` (tensors [N, m, ...]) after the last one."""
        count = next(iter(values.values())).shape[1]
        self.reserve(count)
        done = 0
        while done < count:
            slab, offset = divmod(self._length, SLAB_CHUNKS)
            take = min(count - done, SLAB_CHUNKS - offset)
            for name, tensor in self._slabs[slab].tensors.items():
                tensor[:, offset : offset + take] = values[name][:, done : done + take]
            self._length += take
            done += take

    def tables(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each tensor of the layout: the slabs' addresses, int64 [1, room] on the device, and any of them."""
        slabs = self._slabs
        if self._listed != [id(slab) for slab in slabs]:
            room = max(64, 1 << (len(slabs) - 1).bit_length())
            addresses = [[slab.tensors[name].data_ptr() for slab in slabs] for name in self._layout]
            padded = [row + [0] * (room - len(row)) for row in addresses]
            self._tables = list(torch.tensor(padded, dtype=torch.int64, device=self._device)[:, None].unbind())
            self._listed = [id(slab) for slab in slabs]
        return [(table, slabs[0].tensors[name]) for table, name in zip(self._tables, self._layout, strict=True)]

    def slabs(self, length: int) -> Iterator[Codes]:
        """The first ``length`` chunks, slab by slab: views [N, up to SLAB_CHUNKS, ...]."""
        return self._views(0, length)

    def part(self, begin: int, end: int) -> Codes:
        """The chunks begin..end, copied where they lie: tensors [N, end - begin, ...] by name."""
        slabs = list(self._views(begin // SLAB_CHUNKS, end))
        skip = begin % SLAB_CHUNKS
        return {name: torch.cat([slab[name] for slab in slabs], dim=1)[:, skip:] for name in self._layout}

    def _views(self, first_slab: int, length: int) -> Iterator[Codes]:
        for begin in range(first_slab * SLAB_CHUNKS, length, SLAB_CHUNKS):
            used = min(SLAB_CHUNKS, length - begin)
            yield {name: t[:, :used] for name, t in self._slabs[begin // SLAB_CHUNKS].tensors.items()}
