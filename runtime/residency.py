"""Which tier a chunk is in: the policy that moves chunks between the device pool, the host pool and the store.

- A chunk that leaves the window is admitted to the host pool. When the host budget is full, the least recently used
  chunks are spilled to the store first; without a store, or with a full one, that is a BudgetError and nothing is lost.
- A chunk that is attended is fetched into the device pool, which is a cache: dropping from it loses nothing.
- Chunks on disk are read through host memory into the device pool and stay on disk (no promotion yet).

Chunk ids are counted: forks share them, and the last reference frees the chunk in every tier.
"""

import time

import numpy as np
import torch

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.device_pool import DevicePool
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.host_pool import HostPool
from kvtier.runtime.store import StoreTier
from kvtier.runtime.tier import Ids

SPILL_BATCH = 256
"""Chunks per write to the store: bounds the host memory that spilling needs."""


class ChunkIds:
    """Hands out chunk ids, counts their references and recycles those that nobody refers to."""

    def __init__(self) -> None:
        self._references = np.zeros(1024, dtype=np.int32)
        self._next = 0
        self._free: list[Ids] = []

    def new(self, n: int) -> Ids:
        """``n`` ids with one reference each."""
        recycled = np.concatenate([*self._free, np.empty(0, np.int64)])
        ids, rest = recycled[:n], recycled[n:]
        self._free = [rest] if rest.size else []
        fresh = np.arange(self._next, self._next + n - ids.size, dtype=np.int64)
        self._next += fresh.size
        if self._next > self._references.size:
            grown = np.zeros(max(self._next, 2 * self._references.size), dtype=np.int32)
            grown[: self._references.size] = self._references
            self._references = grown
        ids = np.concatenate([ids, fresh])
        self._references[ids] = 1
        return ids

    def share(self, ids: Ids) -> None:
        """One more reference to each of ``ids``."""
        self._references[ids] += 1

    def release(self, ids: Ids) -> Ids:
        """One reference less to each of ``ids``; returns those that nobody refers to any more."""
        self._references[ids] -= 1
        dead: Ids = ids[self._references[ids] == 0]
        if dead.size:
            self._free.append(dead)
        return dead


class Residency:
    """The three tiers of one offload block and the chunks in them."""

    def __init__(self, device: DevicePool, host: HostPool, store: StoreTier | None) -> None:
        self.device = device
        self.host = host
        self.store = store
        self.stall_seconds = 0.0
        """Time spent waiting for chunks that were not in the device pool."""
        self.spill_seconds = 0.0
        self._ids = ChunkIds()

    def admit(self, chunks: torch.Tensor) -> Ids:
        """Store new ``chunks`` [n, 2, C, D] in the host pool, spilling older ones; returns their ids [n].

        Raises BudgetError or StoreError when no tier below has room: chunks already stored stay readable.
        """
        n = chunks.shape[0]
        ids = self._ids.new(n)
        done = 0
        try:
            while done < n:
                take = min(n - done, SPILL_BATCH)
                self.make_host_room(take)
                self.host.put(ids[done : done + take], chunks[done : done + take])
                done += take
        except BaseException:
            self.release(ids)
            raise
        return ids

    def fetch(self, ids: Ids) -> Ids:
        """Bring the chunks ``ids`` [n] (distinct) into the device pool; returns their slots [n] there."""
        held = self.device.has(ids)
        missing = ids[~held]
        self.device.touch(ids[held])
        self.device.counters.hits += int(held.sum())
        self.device.counters.misses += missing.size
        if missing.size:
            started = time.perf_counter()
            excess = missing.size - self.device.room()
            if excess > 0:
                self.device.drop(self.device.coldest(excess))
            in_host = self.host.has(missing)
            self.host.counters.hits += int(in_host.sum())
            self.host.counters.misses += int((~in_host).sum())
            self._copy_up(missing[in_host], missing[~in_host])
            self.stall_seconds += time.perf_counter() - started
        return self.device.slots_of(ids)

    def _copy_up(self, from_host: Ids, from_store: Ids) -> None:
        n = from_host.size + from_store.size
        staged = torch.empty(
            (n, *self.device.data.shape[1:]), dtype=self.device.data.dtype, device=self.device.data.device
        )
        if from_host.size:
            self.host.get(from_host, staged[: from_host.size])
        if from_store.size:
            assert self.store is not None, "a live chunk is in no tier"
            self.store.counters.hits += from_store.size
            self.store.get(from_store, staged[from_host.size :])
        self.device.put(np.concatenate([from_host, from_store]), staged)

    def make_host_room(self, n: int) -> None:
        """Spill least recently used chunks until the host pool can take ``n`` more."""
        lacking = n - self.host.room()
        if lacking > 0:
            self._spill(lacking)

    def free_host_bytes(self, nbytes: int) -> None:
        """Make the host budget able to give ``nbytes`` to something other than chunks."""
        excess = nbytes - self.host.budget.free_bytes - self.host.budget.aside_bytes
        if excess > 0:
            if n := self.host.chunks_to_drop(excess):
                self._spill(n)
            self.host.release(excess)

    def _spill(self, n: int) -> None:
        if self.store is None or n > len(self.host):
            raise self._host_is_full(n)
        started = time.perf_counter()
        victims = self.host.coldest(n)
        for begin in range(0, victims.size, SPILL_BATCH):
            batch = victims[begin : begin + SPILL_BATCH]
            fresh = batch[~self.store.has(batch)]
            if fresh.size:
                staged = torch.empty((fresh.size, *self.device.data.shape[1:]), dtype=self.device.data.dtype)
                self.host.get(fresh, staged)
                self.store.put(fresh, staged)
            self.host.drop(batch)
        self.spill_seconds += time.perf_counter() - started

    def _host_is_full(self, n: int) -> BudgetError:
        budget = self.host.budget
        more = "Raise [budget] host, hold fewer caches at a time"
        return BudgetError(
            f"[budget] host = {format_bytes(budget.limit_bytes)} is full: {format_bytes(budget.used_bytes)} in use, "
            f"{format_bytes(len(self.host) * self.host.chunk_bytes)} of it chunks, and {n} chunks of "
            f"{format_bytes(self.host.chunk_bytes)} would have to go elsewhere. {more}"
            + ("" if self.store else ", or give a disk tier with [store] path and [budget] disk")
        )

    def share(self, ids: Ids) -> None:
        """One more sequence refers to ``ids``."""
        self._ids.share(ids)

    def release(self, ids: Ids) -> None:
        """One sequence less refers to ``ids``; chunks without references leave every tier."""
        dead = self._ids.release(ids)
        for tier in (self.device, self.host, self.store):
            if tier is not None and dead.size:
                tier.drop(dead)

    def close(self) -> None:
        """Give back all memory and scratch files."""
        for tier in (self.device, self.host, self.store):
            if tier is not None:
                tier.close()
