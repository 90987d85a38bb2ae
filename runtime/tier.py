"""What every tier of chunk storage does: the contract of the device pool, the host pool and the disk store.

A *chunk* is the K and V of ``chunk`` consecutive tokens of one KV head of one layer: a tensor ``[2, C, D]`` in the
model's dtype (index 0 is K without positions, 1 is V). A *chunk id* is a small non-negative integer that names one
chunk for as long as any sequence refers to it (``runtime.residency`` hands ids out and recycles them). A tier maps ids
to slots and knows nothing of layers, heads, sequences or models.

Tiers never decide what to move: ``runtime.residency`` does.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int64]


@dataclass(slots=True)
class TierCounters:
    """Running totals of one tier since it was made."""

    hits: int = 0
    """Chunks that were asked of this tier and found there."""
    misses: int = 0
    """Chunks that were asked of this tier and had to come from the tier below."""
    bytes_read: int = 0
    """Payload bytes (chunks x 2 x C x D x itemsize) copied out of this tier by ``get``."""
    bytes_written: int = 0
    """Payload bytes copied into this tier by ``put``."""

    @property
    def hit_rate(self) -> float | None:
        """Hits over all chunks asked for, or None before the first was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


class Tier(ABC):
    """One place where chunks live, with a hard byte budget.

    ``tests/tier_contract.py`` holds the conformance class: every tier passes the same tests.
    """

    name: str
    """The key of ``[budget]`` that bounds this tier: "gpu", "host" or "disk"."""
    counters: TierCounters

    @property
    @abstractmethod
    def chunk_bytes(self) -> int:
        """Bytes that one chunk costs in this tier's budget, padding included."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes now allocated in this tier, free slots included; never above the budget."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of chunks held."""

    @abstractmethod
    def room(self) -> int:
        """How many more chunks ``put`` can take now: free slots plus slots that the budget still allows."""

    @abstractmethod
    def has(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which of ``ids`` [n] are held, as a bool array [n]."""

    @abstractmethod
    def put(self, ids: Ids, chunks: torch.Tensor) -> None:
        """Store ``chunks`` [n, 2, C, D] under ``ids`` [n], none of which is held yet, as the most recently used.

        Raises BudgetError, or StoreError for a device that is full or fails, with nothing stored and nothing lost.
        """

    @abstractmethod
    def get(self, ids: Ids, out: torch.Tensor) -> None:
        """Copy the chunks of ``ids`` [n], all held, into ``out`` [n, 2, C, D] (any device) and mark them used.

        Raises StoreError for a device that fails, or gives back other bytes than it got: ``out`` is undefined then.
        """

    @abstractmethod
    def drop(self, ids: Ids) -> None:
        """Forget ``ids``; those not held are ignored. Their slots can be used again."""

    @abstractmethod
    def coldest(self, n: int) -> Ids:
        """The ``n`` least recently used ids (all, if fewer are held), coldest first, ties to the lower id."""

    @abstractmethod
    def close(self) -> None:
        """Give every byte back (and remove scratch files). A second call does nothing."""
