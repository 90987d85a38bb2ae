"""Memory of the host pool: mapped, pinned, given back exactly once; and the pool, also where nothing can be pinned."""

import errno
import gc
import mmap
import os
import resource
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tier_contract import CHUNK, HEAD_DIM, empty_chunks, ids_of, random_chunks, same_bits

from kvtier.kernels.gather import HostSlots
from kvtier.runtime import host_pool
from kvtier.runtime.budget import Budget
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.host_memory import HUGE_PAGE_BYTES, HostBlock, PinningRefused, Staging, allocate
from kvtier.runtime.host_pool import HostPool
from kvtier.runtime.slot_tier import TRANSIENT_BYTES

PAGE, MIB = mmap.PAGESIZE, 2**20
ITEM = 2 * CHUNK * HEAD_DIM * 2
"""Bytes of a chunk in half precision."""
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def is_mapped(address: int, nbytes: int) -> bool:
    """Whether all bytes of a range are mapped, by /proc/self/maps."""
    covered = address
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
        if begin <= covered < end:
            covered = end
    return covered >= address + nbytes


def statm_bytes() -> tuple[int, int]:
    """Address space and resident memory of this process."""
    size, resident = Path("/proc/self/statm").read_text().split()[:2]
    return int(size) * PAGE, int(resident) * PAGE


def resident_bytes() -> int:
    return statm_bytes()[1]


def whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


@dataclass
class FakeCudart:
    """Pins nothing, knows everything: what is registered now, how often it was asked, what was wrong with it."""

    refused: frozenset[int] = frozenset()
    """Calls of cudaHostRegister, counted from 0, that fail."""
    from_then_on: bool = False
    """Those after a refused one fail, too."""
    calls: int = 0
    registered: dict[int, int] = field(default_factory=dict)
    """Bytes by address."""
    unregistered: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls += 1
        if self.calls - 1 in self.refused or (self.from_then_on and any(n < self.calls for n in self.refused)):
            return 2
        if flags or nbytes <= 0 or address % PAGE or nbytes % PAGE or not is_mapped(address, nbytes):
            self.wrong.append(f"register({address:#x}, {nbytes}, {flags})")
        if any(begin < address + nbytes and address < begin + size for begin, size in self.registered.items()):
            self.wrong.append(f"{address:#x} is registered already")
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        nbytes = self.registered.pop(address, None)
        if nbytes is None:
            return 713
        if not is_mapped(address, nbytes):
            self.wrong.append(f"{address:#x} was unmapped before it was unregistered")
        self.unregistered.append(address)
        return 0

    @staticmethod
    def cudaGetErrorString(code: int) -> str:
        return f"string of {code}"

    @property
    def registered_bytes(self) -> int:
        return sum(self.registered.values())


@contextmanager
def fake_cuda(refused: Sequence[int] = (), from_then_on: bool = False) -> Iterator[FakeCudart]:
    """A cudart that must be used rightly, and has nothing registered at the end."""
    cudart = FakeCudart(frozenset(refused), from_then_on)
    with patch.object(torch.cuda, "cudart", lambda: cudart), patch.object(torch.cuda, "is_initialized", lambda: False):
        yield cudart
        assert cudart.wrong == []
        assert cudart.registered == {}


@pytest.fixture
def cudart() -> Iterator[FakeCudart]:
    with fake_cuda() as fake:
        yield fake


class TestHostBlock:
    @pytest.mark.parametrize("nbytes", [1, PAGE, 3 * PAGE + 5, 2 * MIB, 5 * MIB + 3])
    @pytest.mark.parametrize("pin", [False, True])
    def test_zeros_that_can_be_written(self, cudart: FakeCudart, nbytes: int, pin: bool) -> None:
        block = allocate(nbytes, pin=pin)
        data = block.data
        assert (data.dtype, tuple(data.shape), block.nbytes, block.pinned) == (torch.uint8, (nbytes,), nbytes, pin)
        assert data.data_ptr() % (HUGE_PAGE_BYTES if nbytes >= HUGE_PAGE_BYTES else PAGE) == 0
        assert cudart.registered == ({data.data_ptr(): whole_pages(nbytes)} if pin else {})
        assert not data.any()
        data.fill_(7)
        assert (block.data == 7).all()
        block.release()

    def test_huge_pages_only_where_they_fit(self) -> None:
        """One at the end could take up to 2 MiB more than the budget was told."""
        if not Path("/sys/kernel/mm/transparent_hugepage").exists():
            pytest.skip("a kernel without huge pages")
        block = allocate(5 * MIB, pin=False, room_bytes=16 * MIB)
        assert huge_bytes(block) == 4 * MIB
        block.grow(9 * MIB, pin=False)
        assert huge_bytes(block) == 8 * MIB
        block.release()

    def test_plain_memory_is_taken_when_it_is_written(self) -> None:
        before = resident_bytes()
        block = allocate(48 * MIB, pin=False)
        assert resident_bytes() - before < 8 * MIB
        block.data[: 32 * MIB].fill_(1)
        assert 24 * MIB < resident_bytes() - before < 40 * MIB
        block.release()

    @pytest.mark.parametrize("n_cpus", [1, 2, 3, 64])
    def test_several_threads_touch_what_is_pinned(self, cudart: FakeCudart, n_cpus: int) -> None:
        """One alone does not: registering does the same."""
        before = resident_bytes()
        with patch.object(os, "cpu_count", lambda: n_cpus):
            block = allocate(33 * MIB + 5, pin=True)
        touched = resident_bytes() - before
        assert touched < 8 * MIB if n_cpus == 1 else 32 * MIB < touched < 40 * MIB
        assert cudart.registered_bytes == whole_pages(33 * MIB + 5)
        assert not block.data.any()
        block.release()

    def test_memory_that_no_thread_could_touch_is_pinned_all_the_same(self, cudart: FakeCudart) -> None:
        with patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
            block = allocate(32 * MIB, pin=True)
        assert block.pinned
        block.release()

    @pytest.mark.parametrize("pin", [False, True])
    def test_growing_keeps_address_and_contents(self, cudart: FakeCudart, pin: bool) -> None:
        block = allocate(100, pin=pin, room_bytes=3 * MIB)
        view, address = block.data, block.data.data_ptr()
        view.fill_(9)
        for nbytes in (200, PAGE, PAGE + 1, 2 * MIB + 7, 3 * MIB):
            block.grow(nbytes, pin=pin)
            assert (block.data.data_ptr(), block.nbytes, block.pinned) == (address, nbytes, pin)
            assert sorted(cudart.registered) == [*cudart.registered]  # one after the other: whole pages, no gap
            assert cudart.registered_bytes == (whole_pages(nbytes) if pin else 0)
        assert (block.data[:100] == 9).all()
        assert not block.data[100:].any()
        assert cudart.calls == (4 if pin else 0)  # 200 and PAGE bytes lie in the first page
        block.release()
        assert len(cudart.unregistered) == cudart.calls

    @pytest.mark.parametrize("pin", [False, True])
    def test_release_gives_memory_and_addresses_back_once(self, cudart: FakeCudart, pin: bool) -> None:
        size, resident = statm_bytes()
        block = allocate(32 * MIB, pin=pin)
        address = block.data.fill_(1).data_ptr()
        assert resident_bytes() - resident > 24 * MIB
        for _ in range(2):
            block.release()
            assert (block.nbytes, block.pinned) == (0, False)
            assert cudart.unregistered == [address] * pin
            assert resident_bytes() - resident < 8 * MIB
            assert statm_bytes()[0] - size < 16 * MIB
            assert not is_mapped(address, 32 * MIB)
        with pytest.raises(AssertionError, match="released"):
            _ = block.data
        with pytest.raises(AssertionError, match="released"):
            block.grow(33 * MIB, pin=False)

    @pytest.mark.parametrize("pin", [False, True])
    def test_a_view_outlives_release_as_zeros(self, cudart: FakeCudart, pin: bool) -> None:
        resident = resident_bytes()
        block = allocate(32 * MIB, pin=pin)
        view, address = block.data.fill_(1).view(torch.int32)[MIB:], block.data.data_ptr()
        block.release()
        assert cudart.unregistered == [address] * pin
        assert resident_bytes() - resident < 8 * MIB
        assert is_mapped(address, 32 * MIB)
        assert not view[:MIB].any()
        view[0] = 5
        assert view[0] == 5
        del view
        assert not is_mapped(address, 32 * MIB)
        assert cudart.unregistered == [address] * pin

    @pytest.mark.parametrize("in_cycle", [False, True], ids=["", "in a cycle"])
    @pytest.mark.parametrize("pin", [False, True])
    def test_a_forgotten_block_goes_with_its_last_view(self, cudart: FakeCudart, pin: bool, in_cycle: bool) -> None:
        block = allocate(32 * MIB, pin=pin)
        array, address = block.data.fill_(3).numpy()[5:], block.data.data_ptr()
        if in_cycle:
            block.itself = block  # type: ignore[attr-defined]
        del block
        gc.collect()
        assert cudart.unregistered == []
        assert (array == 3).all()
        del array
        assert not is_mapped(address, 32 * MIB)
        assert cudart.unregistered == [address] * pin

    def test_a_fork_unregisters_nothing(self, cudart: FakeCudart) -> None:
        block, other = allocate(PAGE, pin=True), allocate(PAGE, pin=True)
        with patch.object(os, "getpid", lambda: -1):
            block.release()
            del other
        assert cudart.unregistered == []
        cudart.registered.clear()

    def test_a_refusal_names_the_error_and_leaves_nothing(self) -> None:
        size, resident = statm_bytes()
        message = r"cudaHostRegister of 32.00 MiB: cudaErrorMemoryAllocation \(string of 2\)"
        with fake_cuda(refused=[0]), pytest.raises(PinningRefused, match=message) as caught:
            allocate(32 * MIB, pin=True)
        assert resident_bytes() - resident < 8 * MIB  # although the traceback holds the frames
        del caught
        assert statm_bytes()[0] - size < 24 * MIB

    def test_an_error_without_a_name(self, cudart: FakeCudart) -> None:
        with (
            patch.object(cudart, "cudaHostRegister", lambda *_: 12345, create=True),
            pytest.raises(PinningRefused, match=r"CUDA error 12345 \(string of 12345\)"),
        ):
            allocate(PAGE, pin=True)

    def test_a_block_that_may_not_grow_is_as_it_was(self) -> None:
        with fake_cuda(refused=[1]) as cudart:
            block = allocate(PAGE, pin=True, room_bytes=4 * PAGE)
            block.data.fill_(1)
            with pytest.raises(PinningRefused):
                block.grow(3 * PAGE, pin=True)
            assert (block.nbytes, block.pinned, cudart.registered_bytes) == (PAGE, True, PAGE)
            block.grow(3 * PAGE, pin=False)
            assert (block.nbytes, block.pinned, cudart.registered_bytes) == (3 * PAGE, False, PAGE)
            assert (block.data[:PAGE] == 1).all()
            with pytest.raises(AssertionError, match="plain memory"):
                block.grow(4 * PAGE, pin=True)
            block.release()

    def test_what_cannot_be_unpinned_is_said(self) -> None:
        with fake_cuda() as cudart:
            block = allocate(PAGE, pin=True)
            cudart.registered.clear()
            with pytest.warns(UserWarning, match="stays pinned until .* cudaErrorHostMemoryNotRegistered"):
                block.release()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="pinning works here")
    def test_no_cuda(self) -> None:
        with pytest.raises(PinningRefused, match="CUDA cannot be used: "):
            allocate(PAGE, pin=True)

    def test_more_than_there_are_addresses(self) -> None:
        with pytest.raises(MemoryError, match=r"mmap of 1024.00 TiB: "):
            allocate(1 << 50, pin=False)

    @pytest.mark.parametrize("nbytes", [0, 1, 2 * PAGE])
    def test_growing_by_nothing_or_past_its_room(self, nbytes: int) -> None:
        block = allocate(1, pin=False, room_bytes=PAGE)
        with pytest.raises(AssertionError, match="cannot grow"):
            block.grow(nbytes, pin=False)


def huge_bytes(block: HostBlock) -> int:
    """Bytes from the block's beginning on for which huge pages were asked."""
    covered = begin = block.data.data_ptr()
    first, last = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head:
            first, last = (int(part, 16) for part in head.split("-"))
        elif line.startswith("VmFlags:") and first <= covered < last and " hg" in line:
            covered = last
    return covered - begin


class FakeDevice:
    """Does what its stream is told one by one, and only when it has to or wants to."""

    def __init__(self) -> None:
        self.work: list[Any] = []
        self.done = 0

    def advance(self, to: int) -> None:
        while self.done < min(to, len(self.work)):
            source, target = self.work[self.done]
            target.copy_(source)
            self.done += 1

    def event(self) -> "FakeEvent":
        return FakeEvent(self)

    @contextmanager
    def as_cuda(self) -> Iterator[None]:
        with (
            patch.object(torch.cuda, "Event", self.event),
            patch.object(torch.cuda, "current_stream", lambda device: self),
        ):
            yield


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.after = 0

    def record(self, stream: FakeDevice) -> None:
        assert stream is self.device
        self.after = len(stream.work)

    def synchronize(self) -> None:
        self.device.advance(self.after)


class OnDevice:
    """A tensor of the fake device: copies to it are done later."""

    device = torch.device("cuda")

    def __init__(self, owner: FakeDevice, data: torch.Tensor) -> None:
        self.owner, self.data = owner, data
        self.shape, self.dtype = data.shape, data.dtype

    def is_contiguous(self) -> bool:
        return True

    def __getitem__(self, index: Any) -> "OnDevice":
        return OnDevice(self.owner, self.data[index])

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:
        assert non_blocking, "the copy would be waited for"
        assert source.shape == self.shape
        self.owner.work.append((source, self.data))


class TestStaging:
    def test_one_buffer_is_filled_while_the_other_is_under_way(self) -> None:
        device, staging, out = FakeDevice(), Staging(8, pin=False), torch.zeros(5, 8, dtype=torch.uint8)
        finished = []
        with device.as_cuda():
            for i in range(5):
                buffer = staging.lend()
                finished.append(device.done)
                staging.send(buffer.fill_(i + 1), OnDevice(device, out[i]))  # type: ignore[arg-type]
        assert finished == [0, 0, 1, 2, 3]  # the copy before the last must be done, the last may be under way
        staging.release()
        assert device.done == 5
        assert out[:, 0].tolist() == [1, 2, 3, 4, 5]

    @given(parts=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), max_size=20))
    @settings(max_examples=50, deadline=None)
    def test_no_buffer_is_overwritten_before_its_copy_is_done(self, parts: list[tuple[int, int]]) -> None:
        """Parts of so many bytes, before each of which the device does so many copies by itself."""
        device, staging, out = FakeDevice(), Staging(8, pin=False), torch.zeros(20, 8, dtype=torch.uint8)
        with device.as_cuda():
            for i, (nbytes, n_done) in enumerate(parts):
                device.advance(device.done + n_done)
                filled = staging.lend()[:nbytes].fill_(i + 1)
                staging.send(filled, OnDevice(device, out[i, :nbytes]))  # type: ignore[arg-type]
        staging.release()
        for i, (nbytes, _) in enumerate(parts):
            assert out[i].tolist() == [i + 1] * nbytes + [0] * (8 - nbytes)

    def test_a_copy_within_host_memory_is_done_at_once(self) -> None:
        staging, out = Staging(8, pin=False), torch.zeros(8, dtype=torch.uint8)
        staging.send(staging.lend().fill_(3), out)
        staging.lend().fill_(4)
        assert out.tolist() == [3] * 8
        staging.release()

    def test_pinned_in_one_piece_or_refused(self, cudart: FakeCudart) -> None:
        staging = Staging(3 * PAGE, pin=True)
        assert staging.pinned
        assert list(cudart.registered.values()) == [6 * PAGE]
        staging.release()
        staging.release()
        assert len(cudart.unregistered) == 1
        with fake_cuda(refused=[0]), pytest.raises(PinningRefused):
            Staging(PAGE, pin=True)

    def test_an_error_of_the_device_keeps_no_memory(self, cudart: FakeCudart) -> None:
        device, staging, out = FakeDevice(), Staging(8, pin=True), torch.zeros(8, dtype=torch.uint8)
        with device.as_cuda():
            staging.send(staging.lend(), OnDevice(device, out))  # type: ignore[arg-type]
        with patch.object(FakeEvent, "synchronize", side_effect=RuntimeError("an illegal memory access")):
            staging.release()
        assert cudart.registered == {}


PER_SLAB = 5


@contextmanager
def small_slabs(budget: Budget, pin: bool = True, per_slab: int = PER_SLAB) -> Iterator[HostPool]:
    """A pool of chunks in half precision; none of its slabs but the last ends at a page."""
    with patch.object(host_pool, "SLAB_BYTES", per_slab * ITEM), patch.object(host_pool, "FEWEST_SLABS", 1):
        pool = HostPool(budget, CHUNK, HEAD_DIM, torch.float16, pin=pin)
    try:
        yield pool
    finally:
        pool.close()


def fill(pool: HostPool, ids: Sequence[int], seed: int = 0) -> torch.Tensor:
    chunks = random_chunks(len(ids), torch.float16, seed)
    pool.put(ids_of(*ids), chunks)
    return chunks


def held(pool: HostPool, ids: Sequence[int]) -> torch.Tensor:
    out = empty_chunks(len(ids), torch.float16)
    pool.get(ids_of(*ids), out)
    return out


def slab_bytes(pool: HostPool) -> int:
    """In memory: rounded up to pages."""
    return sum(whole_pages(slab.nbytes) for slab in pool.slabs)


def assert_sound(pool: HostPool, others: int = 0) -> None:
    """The budget is exact, and the device could find every slot (``others``: bytes of the budget's other users)."""
    assert pool.used_bytes == sum(slab.nbytes for slab in pool.slabs)
    assert pool.budget.used_bytes == pool.used_bytes + others <= pool.budget.limit_bytes
    counts = [len(slab) for slab in pool.slabs]
    assert counts[:-1] == [PER_SLAB] * len(counts[:-1])
    assert not counts or 0 < counts[-1] <= PER_SLAB
    if pool.slabs:
        assert HostSlots.of(pool.slabs, "cpu").per_slab == counts[0]


class TestPool:
    def test_slabs_and_nothing_else_are_pinned(self, cudart: FakeCudart) -> None:
        with small_slabs(Budget("host", 13 * ITEM)) as pool:
            chunks = fill(pool, range(13))
            assert pool.pinned
            assert [len(slab) for slab in pool.slabs] == [5, 5, 3]
            assert sorted(cudart.registered) == sorted(slab.data_ptr() for slab in pool.slabs)
            assert cudart.registered_bytes == slab_bytes(pool)
            assert same_bits(held(pool, range(13)), chunks)
            pool.drop(np.arange(6))
            pool.release(3 * ITEM)
            assert cudart.registered_bytes == slab_bytes(pool) > 0
            assert same_bits(held(pool, range(6, 13)), chunks[6:])
            assert_sound(pool)
            pool.close()
            assert cudart.registered == {}

    @pytest.mark.parametrize("from_then_on", [False, True])
    @pytest.mark.parametrize("refused", range(4))
    def test_refused_pinning(self, refused: int, from_then_on: bool) -> None:
        """Slab by slab, the last of which is a short one that grows."""
        budget = Budget("host", 20 * ITEM)
        with fake_cuda([refused], from_then_on) as cudart, small_slabs(budget) as pool:
            chunks, n = [], 0
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                for n_chunks, others in ((5, 0), (3, 12), (2, 10), (5, 5)):
                    budget.take(others * ITEM, "a window")
                    chunks.append(fill(pool, range(n, n + n_chunks), seed=n))
                    budget.give(others * ITEM)
                    n += n_chunks
                    assert_sound(pool)
            assert len(warned) == 1
            assert "cannot be pinned" in str(warned[0].message)
            assert "cudaErrorMemoryAllocation (string of 2)" in str(warned[0].message)
            assert not pool.pinned
            assert cudart.calls == refused + 1  # it is not asked again
            assert [len(slab) for slab in pool.slabs] == [5, 5, 5]
            assert same_bits(held(pool, range(n)), torch.cat(chunks))
            pool.drop(np.arange(12))
            pool.release(10 * ITEM)
            assert same_bits(held(pool, range(12, 15)), chunks[3][2:])
            pool.close()
            assert (budget.used_bytes, cudart.registered) == (0, {})

    def test_refused_where_warnings_are_errors(self) -> None:
        budget = Budget("host", 20 * ITEM)
        with fake_cuda([1], True) as cudart, small_slabs(budget) as pool:
            chunks = fill(pool, range(5))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(UserWarning, match="cannot be pinned"):
                    fill(pool, range(5, 10))
            assert_sound(pool)
            assert (len(pool), len(pool.slabs), len(pool._blocks), cudart.calls) == (5, 1, 1, 2)
            more = fill(pool, range(5, 10))
            assert same_bits(held(pool, range(10)), torch.cat([chunks, more]))
            assert_sound(pool)

    def test_a_short_slab_grows_in_place(self, cudart: FakeCudart) -> None:
        budget = Budget("host", 12 * ITEM)
        budget.take(5 * ITEM, "a window")
        with small_slabs(budget) as pool:
            chunks = [fill(pool, range(7))]
            short = pool.slabs[-1]
            for given in range(5):
                budget.give(ITEM)
                assert pool.room() == 1
                chunks.append(fill(pool, [7 + given], seed=given))
                assert_sound(pool, (4 - given) * ITEM)
            assert [len(slab) for slab in pool.slabs] == [5, 5, 2]
            assert pool.slabs[1].data_ptr() == short.data_ptr()
            assert cudart.registered_bytes == slab_bytes(pool)
            assert same_bits(held(pool, range(12)), torch.cat(chunks))

    @pytest.mark.parametrize("end", ["release", "close", "forget"])
    @pytest.mark.parametrize("pin", [False, True])
    def test_released_slabs_leave_memory(self, cudart: FakeCudart, pin: bool, end: str) -> None:
        """Also under a view that someone kept; so do all of them in the end."""
        n = 8 * MIB // ITEM
        chunks = random_chunks(n, torch.float16)
        gc.collect()
        resident = resident_bytes()
        with patch.object(host_pool, "SLAB_BYTES", 8 * MIB), patch.object(host_pool, "FEWEST_SLABS", 1):
            pool = HostPool(Budget("host", 64 * MIB), CHUNK, HEAD_DIM, torch.float16, pin=pin)
        for i in range(6):
            pool.put(np.arange(i * n, (i + 1) * n), chunks)
        kept = pool.slabs[-1][:1]
        assert 44 * MIB < resident_bytes() - resident < 56 * MIB
        pool.drop(np.arange(2 * n, 6 * n))
        pool.release(32 * MIB)
        assert 12 * MIB < resident_bytes() - resident < 24 * MIB
        assert cudart.registered_bytes == 16 * MIB * pin
        assert not kept.view(torch.uint8).any()
        if end == "release":
            pool.drop(np.arange(2 * n))
            pool.release(16 * MIB)
        elif end == "close":
            pool.close()
        else:
            del pool
            gc.collect()
        assert resident_bytes() - resident < 8 * MIB
        assert cudart.registered == {}

    @pytest.mark.parametrize("chunks_in_budget", [1, 7, 32, 100, 1000])
    def test_a_budget_is_used_to_the_last_chunk(self, chunks_in_budget: int) -> None:
        pool = HostPool(Budget("host", chunks_in_budget * ITEM + ITEM - 1), CHUNK, HEAD_DIM, torch.float16, pin=False)
        assert pool.room() == chunks_in_budget
        chunks = fill(pool, range(chunks_in_budget))
        assert (pool.room(), pool.used_bytes) == (0, chunks_in_budget * ITEM)
        assert same_bits(held(pool, range(chunks_in_budget)), chunks)
        n = pool._chunks_per_slab
        assert n == max(1, (chunks_in_budget * ITEM + ITEM - 1) // 32 // ITEM)
        pool.close()

    def test_the_machine_maps_less_than_the_budget(self) -> None:
        refusal = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        with small_slabs(Budget("host", 20 * ITEM), pin=False) as pool:
            chunks = fill(pool, range(5))
            with (
                patch.object(mmap, "mmap", side_effect=refusal),
                pytest.raises(
                    BudgetError, match=r"after 10.00 KiB of chunks, .* allocated \(mmap of .*Lower \[budget\] host"
                ),
            ):
                fill(pool, range(5, 10))
            assert_sound(pool)
            assert (len(pool), len(pool._blocks)) == (5, 1)
            more = fill(pool, range(5, 10))
            assert same_bits(held(pool, range(10)), torch.cat([chunks, more]))

    def test_a_slab_that_fails_halfway_is_given_back(self, cudart: FakeCudart) -> None:
        with small_slabs(Budget("host", 20 * ITEM)) as pool:
            fill(pool, range(5))
            before = set(cudart.registered)
            with (
                patch.object(HostBlock, "grow", side_effect=RuntimeError("out of memory")),
                pytest.raises(BudgetError, match=r"could not be allocated \(out of memory\)"),
            ):
                fill(pool, range(5, 8))
            assert_sound(pool)
            assert (len(pool._blocks), set(cudart.registered)) == (1, before)
            chunks = fill(pool, range(5, 8))
            assert same_bits(held(pool, range(5, 8)), chunks)
            assert_sound(pool)

    def test_the_address_space_is_limited(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        with small_slabs(Budget("host", 2**31), pin=False, per_slab=2**30 // ITEM) as pool:
            resource.setrlimit(resource.RLIMIT_AS, (statm_bytes()[0] + 512 * MIB, hard))
            try:
                with pytest.raises(BudgetError, match=r"is more than this machine can hold: .*mmap of 1.00 GiB"):
                    fill(pool, range(1))
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            assert (pool.used_bytes, pool.budget.used_bytes, len(pool)) == (0, 0, 0)
            chunks = fill(pool, range(3))
            assert same_bits(held(pool, range(3)), chunks)


class TestReadsOfADevice:
    """What ``get`` does for an ``out`` on a device, through two buffers."""

    @pytest.mark.parametrize(
        ("refused", "pinned", "pinned_buffers"),
        [((), True, True), ((0,), False, True), ((2,), True, False), ((0, 1), False, False)],
        ids=["all pinned", "buffers pinned", "slabs pinned", "none pinned"],
    )
    def test_through_two_buffers(self, refused: tuple[int, ...], pinned: bool, pinned_buffers: bool) -> None:
        device, n, outs = FakeDevice(), 23, []
        with fake_cuda(refused) as cudart, device.as_cuda():
            pool = HostPool(Budget("host", 24 * ITEM), CHUNK, HEAD_DIM, torch.float16, pin=True)
            pool._chunks_per_slab = 12
            with warnings.catch_warnings(record=True) as warned, patch.object(host_pool, "STAGING_BYTES", 3 * ITEM + 1):
                warnings.simplefilter("always")
                chunks = fill(pool, range(n))
                for seed in range(3):
                    order = np.random.default_rng(seed).permutation(n)
                    out = empty_chunks(n, torch.float16).zero_()
                    pool.get(order, OnDevice(device, out))  # type: ignore[arg-type]
                    assert device.done == len(device.work) - 2  # they are under way
                    outs.append((order, out))
            assert len(warned) == bool(refused)
            assert all("host memory cannot be pinned any further" in str(w.message) for w in warned)
            assert pool.pinned == pinned
            assert pool._staging is not None
            assert pool._staging.pinned == pinned_buffers
            assert pool._staging.nbytes == 3 * ITEM <= TRANSIENT_BYTES
            assert cudart.calls == 2 + pinned  # slabs, until one is refused; the buffers, once
            assert pool.budget.used_bytes == pool.used_bytes == 24 * ITEM  # the buffers are not counted
            pool.close()
        for order, out in outs:
            assert same_bits(out, chunks[torch.from_numpy(order)])

    def test_buffers_of_a_chunk_that_is_larger(self) -> None:
        device = FakeDevice()
        with small_slabs(Budget("host", 8 * ITEM), pin=False) as pool, device.as_cuda():
            with patch.object(host_pool, "STAGING_BYTES", ITEM - 1):
                chunks, out = fill(pool, range(8)), empty_chunks(8, torch.float16)
                pool.get(np.arange(8), OnDevice(device, out))  # type: ignore[arg-type]
            assert len(device.work) == 8
            pool.close()
            assert same_bits(out, chunks)

    def test_their_bound(self) -> None:
        assert host_pool.STAGING_BYTES <= TRANSIENT_BYTES


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_operations_match_a_dict(data: st.DataObject) -> None:
    """Small budgets that another user shares; pinned, plain, or pinned until it is refused."""
    budget = Budget("host", data.draw(st.integers(1, 40)) * ITEM + data.draw(st.integers(0, ITEM - 1)))
    pin, refused = data.draw(st.sampled_from([(False, []), (True, []), (True, [0]), (True, [1]), (True, [3])]))
    with fake_cuda(refused) as cudart, small_slabs(budget, pin) as pool, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        there: dict[int, torch.Tensor] = {}
        others = next_id = 0
        for step in range(data.draw(st.integers(1, 25))):
            what = data.draw(st.sampled_from(["put", "put", "drop", "release", "take", "give"]))
            n = data.draw(st.integers(0, 12))
            if what == "put" and n <= pool.room():
                ids = range(next_id, next_id + n)
                there |= dict(zip(ids, fill(pool, ids, seed=step), strict=True))
                next_id += n
            elif what == "drop":
                for i in [*there][::2][:n]:
                    pool.drop(ids_of(i))
                    del there[i]
            elif what == "release" and pool.chunks_to_drop(n * ITEM) == 0:
                before = budget.free_bytes
                pool.release(n * ITEM)
                assert budget.free_bytes >= before + n * ITEM
            elif what == "take" and n * ITEM <= budget.free_bytes:
                budget.take(n * ITEM, "a window")
                others += n * ITEM
            elif what == "give":
                budget.give(min(others, n * ITEM))
                others -= min(others, n * ITEM)
            assert_sound(pool, others)
            assert len(pool) == len(there)
            assert same_bits(held(pool, [*there]), torch.stack([*there.values()])) if there else True
            if pool.pinned and pin:
                assert cudart.registered_bytes == slab_bytes(pool)
        assert len(warned) == (pin and not pool.pinned)
        pool.close()
        assert (budget.used_bytes, cudart.registered) == (others, {})


class TestOnAGpu:
    pytestmark = gpu

    @staticmethod
    def random_block(nbytes: int, grown_by: int = 0) -> HostBlock:
        block = allocate(nbytes - grown_by, pin=True, room_bytes=nbytes)
        if grown_by:
            block.grow(nbytes, pin=True)
        block.data.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8))
        return block

    @pytest.mark.parametrize("nbytes", [1000, 3 * MIB + 5, 64 * MIB])
    def test_it_is_pinned_and_moves(self, nbytes: int) -> None:
        block = self.random_block(nbytes)
        assert block.pinned
        assert block.data.is_pinned()
        there = torch.empty(nbytes, dtype=torch.uint8, device="cuda").copy_(block.data, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(there.cpu(), block.data)
        block.data.zero_()
        block.data.copy_(there, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(there.cpu(), block.data)
        view = block.data
        block.release()
        assert not view.is_pinned()

    @pytest.mark.parametrize("grown_by", [0, 3 * PAGE, MIB + 5])
    def test_kernels_read_and_write_it_where_it_is(self, grown_by: int) -> None:
        """Also across the border of what was pinned at first and later."""
        from kvtier.kernels.gather import fetch_chunks_triton, store_chunks_triton

        item = 5 * 1024  # of a record, which does not end at a page
        n = 4 * MIB // item
        block = self.random_block(n * item, grown_by)
        host = HostSlots.of([block.data.view(n, item).view(torch.float16).view(n, 2, 20, 64)], "cuda")
        before = host.slabs[0].view(torch.uint8).clone()
        pool = torch.empty(n, 2, 20, 64, dtype=torch.float16, device="cuda")
        slots = torch.arange(n, dtype=torch.int32, device="cuda")
        count = torch.tensor([n], dtype=torch.int32, device="cuda")
        fetch_chunks_triton(pool, slots, host, slots, count)
        torch.cuda.synchronize()
        assert torch.equal(pool.cpu().view(torch.uint8), before)
        store_chunks_triton(pool, slots, host, slots.flip(0).contiguous(), count)
        torch.cuda.synchronize()
        assert torch.equal(host.slabs[0].view(torch.uint8), before.flip(0))
        del host
        block.release()

    def test_a_refusal_does_not_come_back_at_the_next_kernel(self) -> None:
        taken = allocate(8 * PAGE, pin=False)
        cudart = torch.cuda.cudart()
        address = taken.data.data_ptr() + 4 * PAGE
        assert int(cudart.cudaHostRegister(address, 4 * PAGE, 0)) == 0
        with pytest.raises(PinningRefused, match="cudaErrorHostMemoryAlreadyRegistered"):
            taken._register(taken._mapping.pages)  # type: ignore[union-attr]
        assert torch.ones(3, device="cuda").sum().item() == 3
        assert int(cudart.cudaHostUnregister(address)) == 0
        taken.release()

    def test_what_was_unregistered_can_be_registered_again(self) -> None:
        before = resident_bytes()
        for _ in range(20):
            block = self.random_block(16 * MIB)
            assert block.pinned
            block.release()
        assert resident_bytes() - before < 64 * MIB

    def test_memory_is_not_rounded_up(self) -> None:
        """torch's allocator would take 64 MiB."""
        self.random_block(MIB).release()
        before = resident_bytes()
        block = allocate(40 * MIB, pin=True)
        assert 36 * MIB < resident_bytes() - before < 48 * MIB
        block.release()

    @pytest.mark.parametrize("pageable", [False, True])
    def test_reads_of_a_pool(self, pageable: bool) -> None:
        """Also behind a device that is busy, so that every copy waits."""
        pool = HostPool(Budget("host", 64 * MIB), CHUNK, HEAD_DIM, torch.float16, pin=not pageable)
        chunks = fill(pool, range(6000))
        assert pool.pinned != pageable
        assert all(slab.is_pinned() != pageable for slab in pool.slabs)
        order = np.random.default_rng(0).permutation(6000)
        out = torch.empty(6000, *chunks.shape[1:], dtype=torch.float16, device="cuda")
        torch.cuda._sleep(200_000_000)
        pool.get(order, out)
        wide = torch.zeros(100, 2, CHUNK, 2 * HEAD_DIM, dtype=torch.float16, device="cuda")
        pool.get(order[:100], wide[..., ::2])
        torch.cuda.synchronize()
        assert same_bits(out.cpu(), chunks[torch.from_numpy(order)])
        assert same_bits(wide[..., ::2].cpu(), out[:100].cpu())
        pool.close()

    def test_refused_pinning_with_real_copies(self) -> None:
        cudart, calls = torch.cuda.cudart(), 0

        class Limited:
            cudaHostUnregister, cudaGetErrorString = cudart.cudaHostUnregister, cudart.cudaGetErrorString

            @staticmethod
            def cudaHostRegister(address: int, nbytes: int, flags: int) -> Any:
                nonlocal calls
                calls += 1
                return 2 if calls == 2 else cudart.cudaHostRegister(address, nbytes, flags)

        with patch.object(torch.cuda, "cudart", lambda: Limited), patch.object(Limited, "cudaGetErrorString", str):
            pool = HostPool(Budget("host", 64 * MIB), CHUNK, HEAD_DIM, torch.float16, pin=True)
            with pytest.warns(UserWarning, match="cannot be pinned") as warned:
                chunks = fill(pool, range(6000))
            out = torch.empty(6000, *chunks.shape[1:], dtype=torch.float16, device="cuda")
            pool.get(np.arange(6000), out)
            assert len(warned) == 1
            assert [slab.is_pinned() for slab in pool.slabs] == [True, *[False] * (len(pool.slabs) - 1)]
            assert same_bits(out.cpu(), chunks)
            pool.close()
