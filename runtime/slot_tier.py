"""The part of a tier that is the same for device, host and disk: ids, order of use, counters, checks."""

import math
from abc import abstractmethod

import numpy as np
import numpy.typing as npt
import torch

from kvtier.kernels.quantize import record_bytes
from kvtier.runtime.budget import Budget
from kvtier.runtime.slots import ABSENT, SlotMap
from kvtier.runtime.tier import Ids, Tier, TierCounters

TRANSIENT_BYTES = 4 * 2**20
"""Most bytes of a temporary copy, which no budget counts."""


class SlotTier(Tier):
    """A tier that keeps chunks in numbered slots. Subclasses make room, write slots and read slots.

    Parameters
    ----------
    budget
        Where the bytes come from, possibly shared with other users.
    chunk, head_dim
        C in tokens and D in elements of a chunk ``[2, C, D]``.
    dtype
        Of the chunks.
    bits
        Keep records of so many bits a number (``kernels.quantize``), uint8 ``[bytes]``, in place of chunks.
    """

    def __init__(self, budget: Budget, chunk: int, head_dim: int, dtype: torch.dtype, bits: int | None = None) -> None:
        self.counters = TierCounters()
        self.budget = budget
        self._shape, self._dtype = item_format(chunk, head_dim, dtype, bits)
        self._payload_bytes = math.prod(self._shape) * self._dtype.itemsize
        self._map = SlotMap()
        self._used_bytes = 0
        self._closed = False

    @property
    def chunk_bytes(self) -> int:
        return self._payload_bytes

    @property
    def item_bytes(self) -> int:
        """Bytes of what ``put`` takes for one chunk, without padding."""
        return self._payload_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def __len__(self) -> int:
        return len(self._map)

    def has(self, ids: Ids) -> npt.NDArray[np.bool_]:
        held: npt.NDArray[np.bool_] = self._map.slots_of(ids) != ABSENT
        return held

    def put(self, ids: Ids, chunks: torch.Tensor) -> None:
        self._check(ids, chunks)
        if len(ids) == 0:
            return
        if len(ids) > self.room():
            n_more = len(ids) - self._map.n_free
            raise self.budget.refusal(self._bytes_for(n_more), f"room for {n_more} more chunks")
        self._make_room(len(ids))
        slots = self._map.assign(ids)
        try:
            self._write(slots, chunks)
        except BaseException:
            self._map.free(ids)
            raise
        self.counters.bytes_written += len(ids) * self._payload_bytes

    def get(self, ids: Ids, out: torch.Tensor) -> None:
        self.peek(ids, out)
        if len(ids):
            self._map.touch(ids)

    def peek(self, ids: Ids, out: torch.Tensor) -> None:
        """Like ``get``, but the chunks do not count as used."""
        self._check(ids, out)
        if len(ids) == 0:
            return
        slots = self._map.slots_of(ids)
        assert (slots != ABSENT).all(), f"chunks {ids[slots == ABSENT][:5]} are not in the {self.name} tier"
        self._read(slots, out)
        self.counters.bytes_read += len(ids) * self._payload_bytes

    def drop(self, ids: Ids) -> None:
        self._map.free(ids)

    def coldest(self, n: int) -> Ids:
        return self._map.coldest(n)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._map = SlotMap()
        self._release_all()
        self._give(self._used_bytes)

    def _bytes_for(self, n: int) -> int:
        """Bytes that ``n`` more slots take from the budget, at least."""
        return n * self.chunk_bytes

    @abstractmethod
    def _make_room(self, n: int) -> None:
        """Have at least ``n`` free slots; ``room()`` has promised that the budget allows them."""

    @abstractmethod
    def _write(self, slots: Ids, chunks: torch.Tensor) -> None:
        """Fill ``slots`` [n] from ``chunks`` [n, 2, C, D]."""

    @abstractmethod
    def _read(self, slots: Ids, out: torch.Tensor) -> None:
        """Copy ``slots`` [n] into ``out`` [n, 2, C, D]."""

    @abstractmethod
    def _release_all(self) -> None:
        """Free what the slots live in; the bytes are given back afterwards."""

    def _take(self, nbytes: int, what: str) -> None:
        self.budget.take(nbytes, what)
        self._used_bytes += nbytes

    def _give(self, nbytes: int) -> None:
        self.budget.give(nbytes)
        self._used_bytes -= nbytes

    def _check(self, ids: Ids, chunks: torch.Tensor) -> None:
        assert not self._closed, f"the {self.name} tier is closed"
        expected = (len(ids), *self._shape)
        assert tuple(chunks.shape) == expected, f"chunks {tuple(chunks.shape)}, expected {expected}"
        assert chunks.dtype == self._dtype, f"chunks are {chunks.dtype}, this tier holds {self._dtype}"


def item_format(chunk: int, head_dim: int, dtype: torch.dtype, bits: int | None) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype in which a tier keeps one chunk: as it is, or its record of ``bits`` bits a number."""
    if bits is None:
        return (2, chunk, head_dim), dtype
    return (record_bytes(chunk, head_dim, bits),), torch.uint8


def as_bytes(chunks: torch.Tensor) -> npt.NDArray[np.uint8]:
    """View ``chunks`` [n, 2, C, D] or records [n, bytes], contiguous and on the CPU, as bytes [n, bytes of one]."""
    assert chunks.device.type == "cpu"
    assert chunks.is_contiguous()
    array: npt.NDArray[np.uint8] = chunks.detach().flatten(1).view(torch.uint8).numpy()
    return array
