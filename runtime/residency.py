"""Which tier a chunk is in: the policy that moves chunks between the device pool, the host pool and the disk.

- A chunk that leaves the window is admitted to the host pool. When the host budget is full, the least recently used
  chunks are spilled: forgotten by the host if a saved sequence or the scratch store holds them, else written to the
  scratch store. Without one, or with a full one, only those go that are on disk; too few of them are a BudgetError, and
  nothing is lost.
- A chunk that is attended is fetched into the device pool, which is a cache: dropping from it loses nothing.
- Chunks on disk are read through host memory into the device pool. The second time that happens to a chunk it is
  admitted to the host pool as well, in place of chunks that are on disk, too.

The host and the disk keep *items*: chunks as they are, or their records (``kernels.quantize``); the device pool holds
what they stand for. Chunk ids are counted: forks share them, and the last reference frees the chunk in every tier.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from kvtier.kernels.quantize import dequantize_chunks, quantize_chunks
from kvtier.runtime.budget import format_bytes
from kvtier.runtime.chunk_ids import ChunkIds
from kvtier.runtime.device_pool import DevicePool
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.host_pool import HostPool
from kvtier.runtime.saved import SavedChunks
from kvtier.runtime.slot_tier import as_bytes, item_format
from kvtier.runtime.store import StoreTier
from kvtier.runtime.tier import Ids

SPILL_BATCH = 256
"""Chunks per write to the store: bounds the host memory that spilling needs."""


class Residency:
    """The tiers of one offload block and the chunks in them.

    Parameters
    ----------
    bits : bits a number of the items of host and disk; None: chunks as they are
    """

    def __init__(self, device: DevicePool, host: HostPool, store: StoreTier | None, bits: int | None = None) -> None:
        self.device = device
        self.host = host
        self.store = store
        self.saved = SavedChunks()
        self.bits = bits
        self.stall_seconds = 0.0
        """Time spent waiting for chunks that were not in the device pool."""
        self.spill_seconds = 0.0
        self.settle: Callable[[bool], None] = lambda wait: None
        """Called when the host is full: whoever writes chunks to a saved sequence behind the scenes says which are
        there (True: once all are)."""
        self._ids = ChunkIds()
        self._touched = np.zeros(0, np.bool_)
        """By id: read from disk once already."""
        _, chunk, head_dim = device.data.shape[1:]
        self._item = item_format(chunk, head_dim, device.data.dtype, bits)

    # -- items ---------------------------------------------------------------------------------------------------------

    def pack(self, chunks: torch.Tensor) -> torch.Tensor:
        """The items [n, ...] on the host of ``chunks`` [n, 2, C, D] of any device."""
        items = chunks if self.bits is None else quantize_chunks(chunks, self.bits)
        return items.cpu().contiguous()

    def empty_items(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Room for ``n`` items."""
        shape, dtype = self._item
        return torch.empty((n, *shape), dtype=dtype, device=device)

    def _unpack(self, items: torch.Tensor) -> torch.Tensor:
        if self.bits is None:
            return items
        _, chunk, head_dim = self.device.data.shape[1:]
        return dequantize_chunks(items, self.bits, chunk, head_dim, self.device.data.dtype)

    # -- chunks come, are used and go ----------------------------------------------------------------------------------

    def admit(self, items: torch.Tensor) -> Ids:
        """Store new ``items`` [n, ...] in the host pool, spilling older ones; returns their ids [n].

        Raises BudgetError or StoreError when no tier below has room: chunks already stored stay readable.
        """
        n = items.shape[0]
        ids = self._ids.new(n)
        done = 0
        try:
            while done < n:
                take = min(n - done, SPILL_BATCH)
                self.make_host_room(take)
                self.host.put(ids[done : done + take], items[done : done + take])
                done += take
        except BaseException:
            self.release(ids)
            raise
        return ids

    def new_saved(self, n: int) -> Ids:
        """Ids of ``n`` chunks that lie in a saved sequence: ``saved.refer`` says where, ``release`` lets go."""
        return self._ids.new(n)

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

    def look(self, ids: Ids) -> torch.Tensor:
        """The chunks [n, 2, C, D] of ``ids`` on the device, beside the pool, without moving anything."""
        return self._unpack(self.read(ids).to(self.device.data.device))

    def read(self, ids: Ids) -> torch.Tensor:
        """The items [n, ...] of ``ids`` on the host, without moving anything: what the host uses least stays so."""
        out = self.empty_items(len(ids))
        in_host = self.host.has(ids)
        if in_host.all():
            self.host.peek(ids, out)
            return out
        for here, read in ((in_host, self.host.peek), (~in_host, self._read_disk)):
            if here.any():
                part = self.empty_items(int(here.sum()))
                read(ids[here], part)
                out[torch.from_numpy(here)] = part
        return out

    def _copy_up(self, from_host: Ids, from_disk: Ids) -> None:
        where = self.device.data.device
        if from_host.size:
            items = self.empty_items(from_host.size, where)
            self.host.get(from_host, items)
            self.device.put(from_host, self._unpack(items))
        if from_disk.size:
            items = self.empty_items(from_disk.size)
            n_saved = int(self.saved.has(from_disk).sum())
            self.saved.counters.hits += n_saved
            if self.store is not None:
                self.store.counters.hits += from_disk.size - n_saved
            self._read_disk(from_disk, items)
            self.device.put(from_disk, self._unpack(items.to(where)))
            self._admit_again(from_disk, items)

    def _read_disk(self, ids: Ids, out: torch.Tensor) -> None:
        """Read ``ids`` [n] from the saved sequences and the scratch store."""
        saved = self.saved.has(ids)
        if saved.any():
            part = out if saved.all() else self.empty_items(int(saved.sum()))
            self.saved.get(ids[saved], as_bytes(part))
            if part is not out:
                out[torch.from_numpy(saved)] = part
        rest = ids[~saved]
        if rest.size:
            assert self.store is not None, "a live chunk is in no tier"
            part = out if rest.size == len(ids) else self.empty_items(rest.size)
            self.store.get(rest, part)
            if part is not out:
                out[torch.from_numpy(~saved)] = part

    def _admit_again(self, ids: Ids, items: torch.Tensor) -> None:
        """Put chunks that were read from disk before into the host pool; they stay on disk, so nothing is written."""
        if len(self._touched) <= ids.max():
            self._touched = np.append(self._touched, np.zeros(int(ids.max()) + 1, np.bool_))
        again = np.flatnonzero(self._touched[ids])
        self._touched[ids] = True
        lacking = len(again) - self.host.room()
        if lacking > 0:
            cold = self.host.coldest(lacking)
            self.host.drop(cold[self._on_disk(cold)])
            again = again[: self.host.room()]
        if again.size:
            self.host.put(ids[again], items[torch.from_numpy(again)])

    def _on_disk(self, ids: Ids) -> npt.NDArray[np.bool_]:
        saved = self.saved.has(ids)
        return saved if self.store is None else saved | self.store.has(ids)

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
        if n > len(self.host):
            raise self._host_is_full(n)
        started = time.perf_counter()
        self.settle(False)
        victims = self._victims(n)
        if victims.size < n or not self._on_disk(victims).all():
            self.settle(True)
            victims = self._victims(n)
        if victims.size < n:
            if self.store is None:
                raise self._host_is_full(n)
            victims = self.host.coldest(n)  # the store will say what it lacks
        for begin in range(0, victims.size, SPILL_BATCH):
            batch = victims[begin : begin + SPILL_BATCH]
            fresh = batch[~self._on_disk(batch)]
            if fresh.size:
                assert self.store is not None
                staged = self.empty_items(fresh.size)
                self.host.get(fresh, staged)
                self.store.put(fresh, staged)
            self.host.drop(batch)
        self.spill_seconds += time.perf_counter() - started

    def _victims(self, n: int) -> Ids:
        """The ``n`` coldest chunks of the host that can leave it, fewer if there are not so many.

        Those that are on disk can, and of the others as many as the store has room for.
        """
        room = 0 if self.store is None else self.store.room()
        looked_at = n
        while True:
            cold = self.host.coldest(looked_at)
            can_go = self._on_disk(cold)
            can_go[np.flatnonzero(~can_go)[:room]] = True
            if can_go.sum() >= n or looked_at >= len(self.host):
                return cold[can_go][:n]
            looked_at *= 2

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
        """One sequence less refers to ``ids``; chunks without references leave every tier, but no saved sequence."""
        dead = self._ids.release(ids)
        if dead.size:
            self._touched[dead[dead < len(self._touched)]] = False
            for tier in (self.device, self.host, self.saved, self.store):
                if tier is not None:
                    tier.drop(dead)

    def close(self) -> None:
        """Give back all memory and scratch files."""
        for tier in (self.device, self.host, self.saved, self.store):
            if tier is not None:
                tier.close()
