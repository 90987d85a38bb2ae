"""The three tiers against the contract, and what only one of them does."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tier_contract import CHUNK, HEAD_DIM, TierContract, empty_chunks, ids_of, random_chunks, same_bits

from kvtier.kernels.quantize import record_bytes
from kvtier.runtime import host_pool
from kvtier.runtime.budget import Budget
from kvtier.runtime.device_pool import DevicePool
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.host_pool import HostPool
from kvtier.runtime.slots import SlotMap
from kvtier.runtime.store import StoreTier
from kvtier.runtime.tier import Tier


def payload_bytes(dtype: torch.dtype) -> int:
    return 2 * CHUNK * HEAD_DIM * dtype.itemsize


class TestDevicePool(TierContract):
    @contextmanager
    def make(self, n_chunks: int, dtype: torch.dtype) -> Iterator[tuple[Tier, Budget]]:
        budget = Budget("gpu", n_chunks * payload_bytes(dtype) + 100)
        pool = DevicePool(budget, n_chunks, CHUNK, HEAD_DIM, dtype, "cpu")
        yield pool, budget
        pool.close()

    def test_attention_can_gather_from_data(self) -> None:
        pool = DevicePool(Budget("gpu", 2**20), 8, CHUNK, HEAD_DIM, torch.float16, "cpu")
        chunks = random_chunks(3, torch.float16)
        pool.put(ids_of(5, 3, 8), chunks)
        slots = pool.slots_of(ids_of(8, 5, 4))
        assert slots[2] == -1
        assert same_bits(pool.data[torch.from_numpy(slots[:2])], chunks[[2, 0]])

    def test_touch_counts_as_use(self) -> None:
        pool = DevicePool(Budget("gpu", 2**20), 8, CHUNK, HEAD_DIM, torch.float16, "cpu")
        pool.put(ids_of(1, 2), random_chunks(2, torch.float16))
        pool.touch(ids_of(1))
        assert pool.coldest(2).tolist() == [2, 1]

    def test_more_than_the_budget(self) -> None:
        budget = Budget("gpu", 10 * payload_bytes(torch.float16))
        with pytest.raises(BudgetError, match=r"\[budget\] gpu = 20.00 KiB .* 22.00 KiB needed"):
            DevicePool(budget, 11, CHUNK, HEAD_DIM, torch.float16, "cpu")
        assert budget.used_bytes == 0

    def test_more_than_the_device(self) -> None:
        budget = Budget("gpu", 2**30)
        with (
            patch.object(torch, "empty", side_effect=torch.OutOfMemoryError("no memory")),
            pytest.raises(BudgetError, match="Lower"),
        ):
            DevicePool(budget, 11, CHUNK, HEAD_DIM, torch.float16, "cpu")
        assert budget.used_bytes == 0


SLAB_CHUNKS = 5


@contextmanager
def small_slabs(budget: Budget, dtype: torch.dtype, bits: int | None = None) -> Iterator[HostPool]:
    item_bytes = payload_bytes(dtype) if bits is None else record_bytes(CHUNK, HEAD_DIM, bits)
    with (
        patch.object(host_pool, "SLAB_BYTES", SLAB_CHUNKS * item_bytes + 1),
        patch.object(host_pool, "FEWEST_SLABS", 1),
    ):
        pool = HostPool(budget, CHUNK, HEAD_DIM, dtype, pin=False, bits=bits)
    yield pool
    pool.close()


class HostContract(TierContract):
    @contextmanager
    def make(self, n_chunks: int, dtype: torch.dtype) -> Iterator[tuple[Tier, Budget]]:
        budget = Budget("host", n_chunks * self.item_bytes(dtype) + 100)
        with small_slabs(budget, dtype, self.bits) as pool:
            yield pool, budget


class TestHostPoolOfInt8(HostContract):
    bits = 8


class TestHostPoolOfInt4(HostContract):
    bits = 4


class TestHostPool(HostContract):
    def test_slabs_are_allocated_when_needed(self) -> None:
        with self.make(12, torch.float32) as (tier, _):
            size = payload_bytes(torch.float32)
            assert tier.used_bytes == 0
            tier.put(np.arange(1), random_chunks(1, torch.float32))
            assert tier.used_bytes == SLAB_CHUNKS * size
            tier.put(np.arange(1, 12), random_chunks(11, torch.float32))
            assert tier.used_bytes == 12 * size  # the last slab has two

    def test_slabs_of_a_small_budget_are_small(self) -> None:
        size = payload_bytes(torch.float32)
        pool = HostPool(Budget("host", 64 * size), CHUNK, HEAD_DIM, torch.float32, pin=False)
        pool.put(np.arange(1), random_chunks(1, torch.float32))
        assert pool.used_bytes == 2 * size
        pool.close()

    def test_room_follows_the_other_users_of_the_budget(self) -> None:
        size = payload_bytes(torch.float32)
        budget = Budget("host", 12 * size)
        with small_slabs(budget, torch.float32) as pool:
            budget.take(8 * size, "a window")
            assert pool.room() == 4
            pool.put(np.arange(4), random_chunks(4, torch.float32))
            budget.give(8 * size)
            assert pool.room() == 8
            pool.put(np.arange(4, 12), random_chunks(8, torch.float32))
            out = empty_chunks(12, torch.float32)
            pool.get(np.arange(12), out)
            expected = torch.cat([random_chunks(4, torch.float32), random_chunks(8, torch.float32)])
            assert same_bits(out, expected)

    @settings(max_examples=25, deadline=None)
    @given(n=st.integers(1, 40), kept=st.integers(0, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
    def test_release_moves_what_lives(self, n: int, kept: int, share: float, seed: int) -> None:
        budget = Budget("host", 40 * payload_bytes(torch.float16))
        with small_slabs(budget, torch.float16) as pool:
            chunks = random_chunks(n, torch.float16)
            pool.put(np.arange(n), chunks)
            left = np.random.default_rng(seed).permutation(n)[:kept]
            pool.drop(np.setdiff1d(np.arange(n), left))
            nbytes = int(share * pool.used_bytes)
            n_more = pool.chunks_to_drop(nbytes)
            assert n_more <= len(pool)
            cold = pool.coldest(n_more)
            pool.drop(cold)
            left = left[~np.isin(left, cold)]
            before = budget.free_bytes
            pool.release(nbytes)
            assert budget.free_bytes >= before + nbytes
            assert pool.used_bytes == budget.used_bytes == sum(slab.nbytes for slab in pool.slabs)
            out = empty_chunks(len(left), torch.float16)
            pool.get(left, out)
            assert same_bits(out, chunks[torch.from_numpy(left)])
            again = pool.room()
            pool.put(np.arange(100, 100 + again), random_chunks(again, torch.float16))
            pool.get(left, out)
            assert same_bits(out, chunks[torch.from_numpy(left)])

    def test_more_than_allocated_cannot_be_released(self) -> None:
        with small_slabs(Budget("host", 2**20), torch.float32) as pool:
            pool.put(np.arange(7), random_chunks(7, torch.float32))
            assert pool.chunks_to_drop(pool.used_bytes + 1) > len(pool)
            with pytest.raises(AssertionError, match="drop"):
                pool.release(pool.used_bytes + 1)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="pinning works here")
    def test_refused_pinning_is_warned_of_once(self) -> None:
        pool = HostPool(Budget("host", 2**24), CHUNK, HEAD_DIM, torch.float16, pin=True)
        with pytest.warns(UserWarning, match="cannot be pinned"):
            pool.put(np.arange(1), random_chunks(1, torch.float16))
        assert not pool.pinned
        pool.put(np.arange(1, 5000), random_chunks(4999, torch.float16))
        assert len(pool.slabs) > 1

    def test_machine_has_less_than_the_budget(self) -> None:
        budget = Budget("host", 2**24)
        pool = HostPool(budget, CHUNK, HEAD_DIM, torch.float16, pin=False)
        with (
            patch.object(host_pool, "HostBlock", side_effect=MemoryError("can't allocate memory")),
            pytest.raises(BudgetError, match=r"Lower \[budget\] host"),
        ):
            pool.put(np.arange(1), random_chunks(1, torch.float16))
        assert (budget.used_bytes, len(pool)) == (0, 0)


class StoreContract(TierContract):
    @contextmanager
    def make(self, n_chunks: int, dtype: torch.dtype) -> Iterator[tuple[Tier, Budget]]:
        # metadata, then records of 4 KiB in at least 8 shards, each with an index and a folder
        budget = Budget("disk", 10 * 4096 + 8 * 3 * 4096 + (n_chunks + 8) * 4096)
        with tempfile.TemporaryDirectory() as folder:
            tier = StoreTier(folder, budget, CHUNK, HEAD_DIM, dtype, bits=self.bits)
            yield tier, budget
            tier.close()


class TestStoreTier(StoreContract):
    pass


class TestStoreTierOfInt8(StoreContract):
    bits = 8


class TestStoreTierOfInt4(StoreContract):
    bits = 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("contract", [HostContract, StoreContract])
def test_a_tier_of_records_refuses_chunks(contract: type[TierContract], bits: int) -> None:
    """And the reverse: what was not quantised never gets where records are kept."""
    records, chunks = contract(), contract()
    records.bits = bits
    with records.make(4, torch.float32) as (of_records, _), chunks.make(4, torch.float32) as (of_chunks, _):
        wrong = [(of_records, chunks), (of_chunks, records)]
        for tier, other in wrong:
            with pytest.raises(AssertionError, match=r"expected \("):
                tier.put(np.arange(2), other.items(2, torch.float32))
            assert len(tier) == 0
        assert of_records.chunk_bytes < of_chunks.chunk_bytes or of_chunks.name == "disk"  # a block of the device each


class TestSlotMap:
    def test_coldest_stays_right_when_candidates_run_out(self) -> None:
        slots, rng = SlotMap(300), np.random.default_rng(0)
        with patch("kvtier.runtime.slots._CANDIDATES", 8):
            used_at: dict[int, int] = {}
            for clock in range(200):
                ids = rng.permutation(300)[:3]
                held = slots.slots_of(ids) >= 0
                slots.touch(ids[held])
                slots.assign(ids[~held])
                # one call each: the touched are older than the new
                used_at |= dict.fromkeys(ids[held].tolist(), 2 * clock)
                used_at |= dict.fromkeys(ids[~held].tolist(), 2 * clock + 1)
                coldest = slots.coldest(4).tolist()
                assert coldest == sorted(used_at, key=lambda i: (used_at[i], i))[:4]
                slots.free(ids_of(coldest[0]))
                del used_at[coldest[0]]

    def test_ids_and_counts(self) -> None:
        slots = SlotMap(4)
        slots.assign(ids_of(7, 2, 9))
        slots.free(ids_of(2, 2, -1, 55))
        assert slots.ids().tolist() == [7, 9]
        assert (len(slots), slots.n_free, slots.n_slots) == (2, 2, 4)
        assert slots.slots_of(ids_of(-1, 2, 10**9)).tolist() == [-1, -1, -1]

    @pytest.mark.parametrize("ids", [(1, 1), (-1,), (5,), (1, 2, 3, 4)], ids=str)
    def test_wrong_ids_are_a_bug_of_the_caller(self, ids: tuple[int, ...]) -> None:
        slots = SlotMap(4)
        slots.assign(ids_of(5))
        with pytest.raises(AssertionError):
            slots.assign(ids_of(*ids))

    def test_fresh_slots_are_handed_out_in_order(self) -> None:
        slots = SlotMap(10)
        assert slots.assign(np.arange(10)[::-1].copy()).tolist() == list(range(10))
