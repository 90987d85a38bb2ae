"""Which tier a chunk is in never shows in what is read; no budget is exceeded; nothing is lost, or written twice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.kernels.quantize import dequantize_chunks, record_bytes
from kvtier.runtime import residency as residency_module
from kvtier.runtime.budget import Budget
from kvtier.runtime.device_pool import DevicePool
from kvtier.runtime.errors import BudgetError, StoreError
from kvtier.runtime.host_pool import HostPool
from kvtier.runtime.residency import Residency
from kvtier.runtime.slot_tier import as_bytes
from kvtier.runtime.tier import Ids

CHUNK, HEAD_DIM, DTYPE = 2, 8, torch.float32
BITS = [None, 8, 4]
SPILL_BATCH = 3
PLENTY = 1000


def item_bytes(bits: int | None) -> int:
    return 2 * CHUNK * HEAD_DIM * DTYPE.itemsize if bits is None else record_bytes(CHUNK, HEAD_DIM, bits)


class Disk(HostPool):
    """A scratch store in memory, which remembers what was written to it and fails when it is told to."""

    name = "disk"

    def __init__(self, n_chunks: int, bits: int | None) -> None:
        super().__init__(Budget("disk", n_chunks * item_bytes(bits)), CHUNK, HEAD_DIM, DTYPE, pin=False, bits=bits)
        self.written: list[int] = []
        self.fails = False

    def put(self, ids: Ids, chunks: torch.Tensor) -> None:
        if self.fails:
            raise StoreError("the device of the store has failed")
        super().put(ids, chunks)
        self.written += ids.tolist()

    def drop(self, ids: Ids) -> None:
        """Of chunks that are gone: their ids will name others."""
        super().drop(ids)
        self.written = [i for i in self.written if i not in set(ids.tolist())]


class Files:
    """The files of a saved sequence, in memory."""

    def __init__(self) -> None:
        self.records: dict[tuple[int, int, int], Any] = {}
        self.fails = False
        self.closed = False

    def read_records(self, chunks: Ids, layers: Ids, heads: Ids, out: Any) -> None:
        assert not self.closed
        if self.fails:
            raise StoreError("the device of the sequence has failed")
        for row, place in enumerate(zip(chunks.tolist(), layers.tolist(), heads.tolist(), strict=True)):
            out[row] = self.records[place]

    def close(self) -> None:
        self.closed = True


class Rig:
    """A residency of tiers that hold a few chunks each, and what everybody who looks at it needs."""

    def __init__(self, bits: int | None, slots: int, host: int, disk: int | None) -> None:
        size = item_bytes(bits)
        self.bits, self.size = bits, size
        chunk_bytes = 2 * CHUNK * HEAD_DIM * DTYPE.itemsize
        self.gpu = Budget("gpu", slots * chunk_bytes)
        device = DevicePool(self.gpu, slots, CHUNK, HEAD_DIM, DTYPE, "cpu")
        pool = HostPool(Budget("host", host * size), CHUNK, HEAD_DIM, DTYPE, pin=False, bits=bits)
        pool._chunks_per_slab = 1  # budgets of a few chunks mean what they say
        self.disk = None if disk is None else Disk(disk, bits)
        self.residency = Residency(device, pool, self.disk, bits)  # type: ignore[arg-type]
        self._seed = 0

    @property
    def host(self) -> HostPool:
        return self.residency.host

    def items(self, n: int) -> torch.Tensor:
        """New items, no two alike."""
        self._seed += 1
        generator = torch.Generator().manual_seed(self._seed)
        return self.residency.pack(torch.randn(n, 2, CHUNK, HEAD_DIM, generator=generator))

    def admit(self, n: int) -> Ids:
        return self.residency.admit(self.items(n))

    def open(self, heads: int, m: int, files: Files | None = None, first: int = 0) -> tuple[Ids, torch.Tensor, Files]:
        """Chunks [heads, m] of a saved sequence, as ids and items [heads * m, ...] in the order of the ids."""
        files = Files() if files is None else files
        ids = self.residency.new_saved(heads * m).reshape(heads, m)
        items = self.items(heads * m)
        self.write(files, ids, items, first)
        self.residency.saved.refer(ids, files, 0, first)  # type: ignore[arg-type]
        return ids.ravel(), items, files

    @staticmethod
    def write(files: Files, ids: Ids, items: torch.Tensor, first: int) -> None:
        for row, (head, chunk) in enumerate(np.ndindex(*ids.shape)):
            files.records[first + chunk, 0, head] = as_bytes(items)[row].copy()

    def chunks(self, items: torch.Tensor) -> torch.Tensor:
        """What items stand for."""
        return items if self.bits is None else dequantize_chunks(items, self.bits, CHUNK, HEAD_DIM, DTYPE)

    def in_device(self, ids: Ids) -> torch.Tensor:
        """What attention would find."""
        return self.residency.device.data[torch.from_numpy(self.residency.fetch(ids))]


@contextmanager
def rigged(bits: int | None, *, slots: int = 4, host: int = 4, disk: int | None = PLENTY) -> Iterator[Rig]:
    with patch.object(residency_module, "SPILL_BATCH", SPILL_BATCH):
        rig = Rig(bits, slots, host, disk)
        yield rig
        rig.residency.close()


def ids_of(*ids: int) -> Ids:
    return np.array(ids, np.int64)


# -- any sequence of operations ----------------------------------------------------------------------------------------


class ResidencyMachine(RuleBasedStateMachine):
    """Beside a dict of items. Chunks are opened, admitted, saved behind the scenes, shared and let go in any order."""

    @initialize(
        bits=st.sampled_from(BITS),
        slots=st.integers(1, 6),
        host=st.integers(1, 8),
        disk=st.sampled_from([None, 0, 3, 6, PLENTY]),
    )
    def start(self, bits: int | None, slots: int, host: int, disk: int | None) -> None:
        self.patch = patch.object(residency_module, "SPILL_BATCH", SPILL_BATCH)
        self.patch.start()
        self.rig = Rig(bits, slots, host, disk)
        self.r = self.rig.residency
        self.r.settle = self.settle
        self.slots = slots
        self.items: dict[int, torch.Tensor] = {}
        self.references: dict[int, int] = {}
        self.recording: list[tuple[Ids, Files, int]] = []
        """Batches [1, m] that wait to be written to a saved sequence; their sequence holds on to them."""
        self.files: list[Files] = []
        self.opened = 100
        self.read_from_disk: set[int] = set()
        self.windows: list[int] = []

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.r.close()
            self.patch.stop()
            budgets = [tier.budget for tier in (self.r.device, self.r.host, self.rig.disk) if tier is not None]
            assert [budget.used_bytes for budget in budgets] == [0, sum(self.windows), 0][: len(budgets)]
            waiting = {id(files) for _, files, _ in self.recording}  # the recorder closes them
            assert all(files.closed for files in self.files if id(files) not in waiting)

    # -- what the model knows --

    def some(self, data: st.DataObject, most: int, among: list[int] | None = None) -> Ids:
        """Up to ``most`` of the live ids, in any order."""
        among = sorted(self.items) if among is None else among
        chosen = data.draw(st.lists(st.sampled_from(among), max_size=most, unique=True)) if among else []
        return np.array(chosen, np.int64)

    def expected(self, ids: Ids) -> torch.Tensor:
        rows = [self.items[i] for i in ids.tolist()]
        return torch.stack(rows) if rows else self.r.empty_items(0)

    def add(self, ids: Ids, items: torch.Tensor) -> None:
        assert not self.items.keys() & set(ids.tolist()), "an id of a live chunk was given away"
        self.items |= dict(zip(ids.tolist(), items, strict=True))
        self.references |= dict.fromkeys(ids.tolist(), 1)

    def on_disk(self, ids: Ids) -> np.ndarray:
        saved = self.r.saved.has(ids)
        return saved if self.rig.disk is None else saved | self.rig.disk.has(ids)

    def fits(self, n_more: int, host_bytes: int = 0) -> bool:
        """Whether ``n_more`` chunks and ``host_bytes`` of something else fit, wherever chunks go."""
        live = np.array(sorted(self.items), np.int64)
        recording = {i for ids, _, _ in self.recording for i in ids.ravel().tolist()}
        homeless = n_more + sum(i not in recording for i in live[~self.on_disk(live)].tolist())
        most = (self.r.host.budget.limit_bytes - sum(self.windows) - host_bytes) // self.rig.size
        room = self.rig.disk.room() if self.rig.disk is not None else 0
        return homeless - room <= most and min(n_more, SPILL_BATCH) <= most

    def settle(self, wait: bool) -> None:
        """As a recorder would: some of what waits has been written by now, or all is waited for."""
        done = len(self.recording) if wait else len(self.recording) // 2
        for ids, files, first in self.recording[:done]:
            self.r.saved.refer(ids, files, 0, first)  # type: ignore[arg-type]
        del self.recording[:done]

    @contextmanager
    def refusal(self, excused: Callable[[], bool]) -> Iterator[None]:
        """An error of the disk while it fails, or a budget that really does not suffice."""
        may_fail = excused()  # before anything has moved
        try:
            yield
        except StoreError:
            assert self.rig.disk is not None
            assert self.rig.disk.fails
        except BudgetError:
            assert may_fail or (self.rig.disk is not None and self.rig.disk.fails)

    # -- what can happen --

    @rule(n=st.integers(1, 7))
    def admit(self, n: int) -> None:
        items = self.rig.items(n)
        with self.refusal(lambda: not self.fits(n)):
            self.add(self.r.admit(items), items)

    @rule(heads=st.integers(1, 2), m=st.integers(1, 4), first=st.integers(0, 3), again=st.booleans())
    def open(self, heads: int, m: int, first: int, again: bool) -> None:
        recording = {id(files) for _, files, _ in self.recording}
        old = next((files for files in self.files if again and not files.closed and id(files) not in recording), None)
        ids, items, files = self.rig.open(heads, m, old, first + self.opened)
        self.opened += 10
        self.add(ids, items)
        if old is None:
            self.files.append(files)

    @rule(data=st.data())
    def record(self, data: st.DataObject) -> None:
        waiting = {i for ids, _, _ in self.recording for i in ids.ravel().tolist()}
        live = np.array(sorted(self.items), np.int64)
        fresh = [i for i in live[~self.on_disk(live)].tolist() if i not in waiting]
        if (ids := self.some(data, 4, fresh)).size:
            self.files.append(Files())
            self.rig.write(self.files[-1], ids[None], self.expected(ids), 5)
            self.recording.append((ids[None], self.files[-1], 5))

    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        ids = self.some(data, self.slots)
        from_disk = ids[~self.r.device.has(ids) & ~self.r.host.has(ids)]
        again = [i for i in from_disk.tolist() if i in self.read_from_disk]
        before, room = set(self.r.host._map.ids().tolist()), self.r.host.room()
        written = len(self.rig.disk.written) if self.rig.disk is not None else 0
        try:
            slots = self.r.fetch(ids)
        except StoreError:
            assert any(files.fails for files in self.files)
            return
        assert torch.equal(self.r.device.data[torch.from_numpy(slots)], self.rig.chunks(self.expected(ids)))
        self.read_from_disk |= set(from_disk.tolist())
        after = set(self.r.host._map.ids().tolist())
        new, gone = after - before, before - after
        assert new <= set(again), "a chunk that was read once came to the host"
        assert self.on_disk(np.array(sorted(gone), np.int64)).all()
        assert len(new) == min(len(again), room + len(gone)), "room in the host was left unused"
        assert len(gone) <= max(0, len(again) - room), "more went than had to"
        assert self.rig.disk is None or len(self.rig.disk.written) == written

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        ids = self.some(data, 12)
        try:
            assert torch.equal(self.r.read(ids), self.expected(ids))
        except StoreError:
            assert any(files.fails for files in self.files)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        ids = self.some(data, 6)
        self.r.share(ids)
        for i in ids.tolist():
            self.references[i] += 1

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = {i for ids, _, _ in self.recording for i in ids.ravel().tolist()}
        ids = self.some(data, 12, [i for i in sorted(self.items) if i not in held])
        self.r.release(ids)
        for i in ids.tolist():
            self.references[i] -= 1
            if not self.references[i]:
                del self.items[i], self.references[i]
                self.read_from_disk.discard(i)

    @rule(nbytes=st.integers(1, 600))
    def take_window(self, nbytes: int) -> None:
        with self.refusal(lambda: not self.fits(0, nbytes)):
            self.r.free_host_bytes(nbytes)
            self.r.host.budget.take(nbytes, "a window")
            self.windows.append(nbytes)

    @precondition(lambda self: getattr(self, "windows", None))
    @rule()
    def give_window(self) -> None:
        self.r.host.budget.give(self.windows.pop())

    @rule(data=st.data())
    def drop_from_the_device(self, data: st.DataObject) -> None:
        self.r.device.drop(self.some(data, 6))

    @rule(fails=st.booleans())
    def fail(self, fails: bool) -> None:
        if self.rig.disk is not None:
            self.rig.disk.fails = fails
        for files in self.files:
            files.fails = fails

    # -- what holds after every step --

    @invariant()
    def every_live_chunk_is_where_it_can_be_read(self) -> None:
        if not hasattr(self, "rig"):
            return
        live = np.array(sorted(self.items), np.int64)
        stored = np.zeros(len(live), np.bool_)
        for tier in (self.r.host, self.rig.disk):
            if tier is not None and (here := tier.has(live)).any():
                found = self.r.empty_items(int(here.sum()))
                tier._read(tier._map.slots_of(live[here]), found)  # ``get`` would count as use
                assert torch.equal(found, self.expected(live[here]))
                stored |= here
        for i, (number, chunk, layer, head) in zip(live.tolist(), self.where(live), strict=True):
            if number >= 0:
                records = self.r.saved.files(number).records
                assert (records[chunk, layer, head] == as_bytes(self.items[i][None])[0]).all()
        assert (stored | self.r.saved.has(live)).all(), "a chunk is lost"
        here = self.r.device.has(live)
        slots = torch.from_numpy(self.r.device.slots_of(live[here]))
        assert torch.equal(self.r.device.data[slots], self.rig.chunks(self.expected(live[here])))

    def where(self, ids: Ids) -> list[list[int]]:
        known = self.r.saved._where
        return [known[i].tolist() if i < len(known) else [-1] * 4 for i in ids.tolist()]

    @invariant()
    def nothing_is_kept_of_chunks_that_are_gone(self) -> None:
        if not hasattr(self, "rig"):
            return
        for tier in (self.r.device, self.r.host, self.rig.disk):
            if tier is not None:
                assert set(tier._map.ids().tolist()) <= self.items.keys()
        assert len(self.r.saved) == sum(where[0] >= 0 for where in self.where(np.array(sorted(self.items), np.int64)))
        touched = np.flatnonzero(self.r._touched).tolist()
        assert set(touched) == self.read_from_disk
        recording = {id(files) for _, files, _ in self.recording}
        numbered = {id(files) for files in self.r.saved._files if files is not None}
        assert all(files.closed == (id(files) not in numbered | recording) for files in self.files)

    @invariant()
    def budgets_and_counters_hold(self) -> None:
        if not hasattr(self, "rig"):
            return
        device, host, disk = self.r.device, self.r.host, self.rig.disk
        assert host.used_bytes + sum(self.windows) == host.budget.used_bytes <= host.budget.limit_bytes
        assert len(device) <= self.slots
        assert device.budget.used_bytes <= device.budget.limit_bytes
        if disk is not None:
            assert disk.budget.used_bytes <= disk.budget.limit_bytes
            assert sorted(disk.written) == disk._map.ids().tolist(), "a chunk was written twice, or left the disk alive"
            assert all(not disk.has(ids_of(i))[0] for ids, _, _ in self.recording for i in ids.ravel().tolist())
        hits = self.r.saved.counters.hits + (disk.counters.hits if disk is not None else 0)
        assert host.counters.hits + host.counters.misses == device.counters.misses
        assert hits == host.counters.misses


ResidencyMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, report_multiple_bugs=False
)
TestAnyOperations = ResidencyMachine.TestCase


# -- one rule at a time ------------------------------------------------------------------------------------------------


@pytest.fixture(params=BITS, ids=["auto", "int8", "int4"])
def bits(request: pytest.FixtureRequest) -> int | None:
    return request.param  # type: ignore[no-any-return]


def in_host(rig: Rig) -> list[int]:
    held: list[int] = rig.host._map.ids().tolist()
    return held


def spilled(rig: Rig, n: int) -> Ids:
    """``n`` chunks that are on the disk alone."""
    ids = rig.admit(n)
    rig.residency.free_host_bytes(rig.host.budget.limit_bytes)
    assert not rig.host.has(ids).any()
    return ids


def test_a_chunk_comes_to_the_host_when_it_is_read_from_the_disk_again(bits: int | None) -> None:
    with rigged(bits) as rig:
        scratch = spilled(rig, 1)
        saved, _, files = rig.open(1, 1)
        ids = np.concatenate([scratch, saved])
        expected = rig.chunks(rig.residency.read(ids))
        for held in ([], ids.tolist(), ids.tolist()):
            rig.residency.device.drop(ids)
            assert torch.equal(rig.in_device(ids), expected)
            assert in_host(rig) == held
        assert rig.host.counters.hits == 2
        assert rig.disk is not None
        assert rig.disk.written == scratch.tolist()
        assert len(files.records) == 1


def test_what_stays_in_the_device_pool_is_not_read_again(bits: int | None) -> None:
    with rigged(bits) as rig:
        ids = spilled(rig, 2)
        for _ in range(3):
            rig.residency.fetch(ids)
        assert in_host(rig) == []
        device, host = rig.residency.device.counters, rig.host.counters
        assert (device.hits, device.misses, host.hits, host.misses) == (4, 2, 0, 2)


@pytest.mark.parametrize("n_unsaved", [0, 1, 2, 4])
def test_only_chunks_that_are_on_disk_make_way_for_one_that_is_read_again(bits: int | None, n_unsaved: int) -> None:
    """The host is full of chunks of which the coldest ``n_unsaved`` are nowhere else."""
    with rigged(bits, slots=8) as rig:
        wanted = spilled(rig, 3)
        rig.residency.fetch(wanted)
        rig.residency.device.drop(wanted)
        unsaved = rig.admit(n_unsaved)
        elsewhere, _, _ = rig.open(1, 4 - n_unsaved)
        for _ in range(2):  # from the sequence to the host
            rig.residency.device.drop(elsewhere)
            rig.residency.fetch(elsewhere)
        assert rig.host.room() == 0
        assert rig.disk is not None
        written = list(rig.disk.written)
        rig.residency.fetch(wanted)
        assert rig.disk.written == written
        assert rig.host.has(unsaved).all()
        n_came = max(0, 3 - n_unsaved)  # of the three coldest so many could go
        assert in_host(rig) == sorted([*unsaved, *elsewhere[n_came:], *wanted[:n_came]])


def test_a_new_chunk_with_an_old_id_has_not_been_read(bits: int | None) -> None:
    with rigged(bits) as rig:
        old = spilled(rig, 1)
        rig.residency.fetch(old)
        rig.residency.release(old)
        items = rig.items(1)
        new = rig.residency.admit(items)
        assert new.tolist() == old.tolist()
        assert rig.residency.device.has(new).tolist() == [False]
        rig.residency.free_host_bytes(rig.host.budget.limit_bytes)
        assert torch.equal(rig.in_device(new), rig.chunks(items))
        assert in_host(rig) == []


@pytest.mark.parametrize("where", ["scratch", "sequence"])
def test_a_chunk_that_is_on_disk_leaves_the_host_without_a_write(bits: int | None, where: str) -> None:
    with rigged(bits) as rig:
        ids = spilled(rig, 2) if where == "scratch" else rig.open(1, 2)[0]
        expected = rig.in_device(ids).clone()
        for _ in range(3):
            rig.residency.device.drop(ids)
            assert torch.equal(rig.in_device(ids), expected)
            rig.residency.free_host_bytes(rig.host.budget.limit_bytes)
            assert in_host(rig) == []
        assert rig.disk is not None
        assert rig.disk.written == (ids.tolist() if where == "scratch" else [])


@pytest.mark.parametrize("disk", [None, 2, PLENTY])
def test_copies_of_saved_chunks_make_way_before_the_host_is_full(bits: int | None, disk: int | None) -> None:
    """New chunks are the coldest of the host, and there is no scratch store for them or a full one: copies go."""
    with rigged(bits, disk=disk) as rig:
        if disk == 2:
            spilled(rig, 2)
        new = rig.admit(2)
        saved, _, _ = rig.open(1, 2)
        for _ in range(2):
            rig.residency.device.drop(saved)
            rig.residency.fetch(saved)
        assert in_host(rig) == [*new, *saved]
        newer = rig.admit(2)
        assert in_host(rig) == ([*saved, *newer] if disk == PLENTY else [*new, *newer])
        if disk != PLENTY:
            with pytest.raises(BudgetError, match=rf"\[budget\] {'disk' if disk else 'host'}"):
                rig.admit(1)
            assert rig.host.has(np.concatenate([new, newer])).all()


def test_whoever_saves_behind_the_scenes_is_asked_before_a_chunk_is_spilled(bits: int | None) -> None:
    with rigged(bits) as rig:
        asked: list[bool] = []
        files, items = Files(), rig.items(4)
        ids = rig.residency.admit(items)
        rig.write(files, ids[None], items, 0)

        def settle(wait: bool) -> None:
            """Half of the chunks have been written."""
            asked.append(wait)
            some = ids[2:] if wait else ids[:2]
            if not rig.residency.saved.has(some).any():
                rig.residency.saved.refer(some[None], files, 0, 2 * wait)  # type: ignore[arg-type]

        rig.residency.settle = settle
        rig.admit(2)
        assert asked == [False]
        rig.admit(1)
        assert asked == [False, False, True]
        assert rig.disk is not None
        assert rig.disk.written == []
        assert torch.equal(rig.in_device(ids), rig.chunks(items))


def test_a_disk_that_fails_loses_nothing(bits: int | None) -> None:
    with rigged(bits, host=6) as rig:
        items = rig.items(8)
        ids = rig.residency.admit(items)
        assert rig.disk is not None
        rig.disk.fails = True
        for _ in range(2):
            with pytest.raises(StoreError, match="has failed"):
                rig.admit(5)
            assert torch.equal(rig.residency.read(ids), items)
            with pytest.raises(StoreError, match="has failed"):
                rig.residency.free_host_bytes(rig.host.budget.limit_bytes)
            assert torch.equal(rig.residency.read(ids), items)
        rig.disk.fails = False
        more = rig.items(5)
        ids = np.concatenate([ids, rig.residency.admit(more)])
        assert torch.equal(rig.residency.read(ids), torch.cat([items, more]))
        assert sorted(rig.disk.written) == sorted(set(rig.disk.written))


def test_a_disk_that_is_full_loses_nothing(bits: int | None) -> None:
    with rigged(bits, host=4, disk=3) as rig:
        items = rig.items(7)
        ids = rig.residency.admit(items)
        with pytest.raises(BudgetError, match=r"\[budget\] disk"):
            rig.admit(1)
        assert torch.equal(rig.residency.read(ids), items)
        rig.residency.release(ids[:2])
        rig.admit(2)
        assert torch.equal(rig.residency.read(ids[2:]), items[2:])


def test_an_unreadable_sequence_leaves_the_tiers_as_they_were(bits: int | None) -> None:
    with rigged(bits) as rig:
        there = rig.admit(2)
        saved, items, files = rig.open(2, 1)
        files.fails = True
        for _ in range(2):
            with pytest.raises(StoreError, match="has failed"):
                rig.residency.fetch(np.concatenate([there[:1], saved]))
        assert not rig.residency.device.has(saved).any()
        assert in_host(rig) == there.tolist()
        files.fails = False
        assert torch.equal(rig.in_device(saved), rig.chunks(items))
        assert in_host(rig) == there.tolist(), "reads that failed do not count"


@pytest.mark.parametrize("where", ["host", "scratch", "sequence"])
def test_reading_to_save_is_no_use(bits: int | None, where: str) -> None:
    """``read`` moves nothing and is no hit or miss of any tier."""
    with rigged(bits) as rig:
        ids = {"host": rig.admit, "scratch": partial(spilled, rig), "sequence": lambda n: rig.open(1, n)[0]}[where](2)
        items = rig.residency.read(ids)
        for _ in range(3):
            assert torch.equal(rig.residency.read(ids), items)
        assert in_host(rig) == (ids.tolist() if where == "host" else [])
        tiers = (rig.residency.device, rig.host, rig.residency.saved, rig.disk)
        assert all(tier.counters.hit_rate is None for tier in tiers if tier is not None)
        assert torch.equal(rig.in_device(ids), rig.chunks(items))
