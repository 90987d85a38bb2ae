"""What every tier must do. A subclass says how its tier is made; see test_tiers.py."""

from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels.quantize import record_bytes
from kvtier.runtime.budget import Budget
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.tier import Ids, Tier

CHUNK, HEAD_DIM = 16, 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ids_of(*ids: int) -> Ids:
    return np.array(ids, dtype=np.int64)


def random_chunks(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every bit pattern, NaNs with payloads included."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 2, CHUNK, HEAD_DIM * dtype.itemsize)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)


def empty_chunks(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((n, 2, CHUNK, HEAD_DIM), dtype=dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Model:
    """A tier as a dict, with the time of last use of every id."""

    def __init__(self) -> None:
        self.chunks: dict[int, torch.Tensor] = {}
        self.used_at: dict[int, int] = {}
        self.clock = 0

    def use(self, ids: Ids) -> None:
        self.clock += 1
        self.used_at |= dict.fromkeys(ids.tolist(), self.clock)

    def coldest(self, n: int) -> list[int]:
        return sorted(self.chunks, key=lambda i: (self.used_at[i], i))[:n]


class TierContract:
    bits: int | None = None
    """Of a number in the records that the tier keeps; None: it keeps chunks as they are."""

    def items(self, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        """What ``put`` takes: chunks, or records [n, bytes], of any bits."""
        if self.bits is None:
            return random_chunks(n, dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (n, self.item_bytes(dtype)), dtype=torch.uint8, generator=generator)

    def empty(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """What ``get`` fills."""
        return torch.empty_like(self.items(n, dtype))

    def item_bytes(self, dtype: torch.dtype) -> int:
        if self.bits is None:
            return 2 * CHUNK * HEAD_DIM * dtype.itemsize
        return record_bytes(CHUNK, HEAD_DIM, self.bits)

    def make(self, n_chunks: int, dtype: torch.dtype) -> AbstractContextManager[tuple[Tier, Budget]]:
        """An empty tier with room for ``n_chunks`` chunks, or a few more, and its budget, which is otherwise unused."""
        raise NotImplementedError

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_round_trip_is_bit_exact_in_any_order(self, dtype: torch.dtype) -> None:
        with self.make(40, dtype) as (tier, _):
            chunks = self.items(40, dtype)
            ids = np.random.default_rng(0).permutation(1000)[:40]
            tier.put(ids[:25], chunks[:25])
            tier.put(ids[25:], chunks[25:])
            order = np.random.default_rng(1).permutation(40)
            out = self.empty(40, dtype)
            tier.get(ids[order], out)
            assert same_bits(out, chunks[torch.from_numpy(order)])

    def test_strided_chunks_and_out(self) -> None:
        with self.make(8, torch.float32) as (tier, _):
            chunks = self.items(16, torch.float32)[::2]
            tier.put(np.arange(8), chunks)
            wide = torch.zeros((*chunks.shape[:-1], 2 * chunks.shape[-1]), dtype=chunks.dtype)
            tier.get(np.arange(8), wide[..., ::2])
            assert same_bits(wide[..., ::2], chunks)
            assert (wide[..., 1::2] == 0).all()

    def test_empty_calls(self) -> None:
        with self.make(2, torch.float32) as (tier, _):
            tier.put(ids_of(), self.empty(0, torch.float32))
            tier.get(ids_of(), self.empty(0, torch.float32))
            tier.drop(ids_of())
            assert (len(tier), len(tier.has(ids_of())), len(tier.coldest(3))) == (0, 0, 0)

    def test_counters(self) -> None:
        with self.make(5, torch.float16) as (tier, _):
            payload_bytes = self.item_bytes(torch.float16)
            tier.put(np.arange(5), self.items(5, torch.float16))
            tier.get(np.arange(3), self.empty(3, torch.float16))
            assert (tier.counters.bytes_written, tier.counters.bytes_read) == (5 * payload_bytes, 3 * payload_bytes)
            assert (tier.counters.hits, tier.counters.misses, tier.counters.hit_rate) == (0, 0, None)
            assert tier.chunk_bytes >= payload_bytes

    def test_full_tier_refuses_and_keeps_everything(self) -> None:
        with self.make(10, torch.bfloat16) as (tier, budget):
            n = tier.room()
            assert n >= 10
            chunks = self.items(n + 1, torch.bfloat16)
            tier.put(np.arange(n - 1), chunks[: n - 1])
            before = (tier.room(), tier.used_bytes, tier.coldest(n).tolist(), tier.counters.bytes_written)
            with pytest.raises(BudgetError, match=rf"\[budget\] {tier.name}"):
                tier.put(np.arange(n - 1, n + 1), chunks[n - 1 :])
            after = (tier.room(), tier.used_bytes, tier.coldest(n).tolist(), tier.counters.bytes_written)
            assert after == before
            assert tier.has(np.arange(n + 1)).tolist() == [True] * (n - 1) + [False] * 2
            tier.put(ids_of(n), chunks[n:])
            assert tier.room() == 0
            assert tier.used_bytes <= budget.limit_bytes
            out = self.empty(n, torch.bfloat16)
            tier.get(np.append(np.arange(n - 1), n), out)
            assert same_bits(out, torch.cat([chunks[: n - 1], chunks[n:]]))

    def test_least_recently_used_first_ties_to_the_lower_id(self) -> None:
        with self.make(6, torch.float32) as (tier, _):
            chunks = self.items(6, torch.float32)
            tier.put(ids_of(9, 4, 7), chunks[:3])
            tier.put(ids_of(2, 1), chunks[3:5])
            assert tier.coldest(9).tolist() == [4, 7, 9, 1, 2]
            tier.get(ids_of(4), self.empty(1, torch.float32))
            assert tier.coldest(3).tolist() == [7, 9, 1]
            assert tier.has(ids_of(4, 5)).tolist() == [True, False]  # asking is not using
            tier.drop(ids_of(7))
            tier.put(ids_of(7), chunks[5:])
            assert tier.coldest(9).tolist() == [9, 1, 2, 4, 7]
            assert tier.coldest(0).tolist() == []

    def test_dropping_absent_ids_is_ignored(self) -> None:
        with self.make(3, torch.float32) as (tier, _):
            tier.put(ids_of(5), self.items(1, torch.float32))
            room = tier.room()
            tier.drop(ids_of(0, 6, 123456789))
            assert (len(tier), tier.room()) == (1, room)
            tier.drop(ids_of(5, 5))
            assert (len(tier), tier.room()) == (0, room + 1)

    def test_reused_slots_hold_the_new_chunk(self) -> None:
        with self.make(4, torch.float16) as (tier, _):
            n = tier.room()
            old, new = self.items(n, torch.float16, seed=1), self.items(n, torch.float16, seed=2)
            tier.put(np.arange(n), old)
            used_bytes = tier.used_bytes
            tier.drop(np.arange(0, n, 2))
            again = np.arange(0, n, 2) + 100
            tier.put(again, new[::2])
            assert tier.used_bytes == used_bytes
            out = self.empty(n, torch.float16)
            tier.get(np.concatenate([again, np.arange(1, n, 2)]), out)
            assert same_bits(out, torch.cat([new[::2], old[1::2]]))

    def test_close_gives_every_byte_back_and_can_be_repeated(self) -> None:
        with self.make(4, torch.float32) as (tier, budget):
            tier.put(np.arange(3), self.items(3, torch.float32))
            assert budget.used_bytes == tier.used_bytes >= 3 * self.item_bytes(torch.float32)
            for _ in range(2):
                tier.close()
                assert (budget.used_bytes, tier.used_bytes, len(tier), tier.room()) == (0, 0, 0, 0)

    def test_random_operations_match_a_dict(self) -> None:
        # made here: hypothesis objects to one test that subclasses share
        settings(max_examples=40, deadline=None)(given(data=st.data())(self.check_random_operations))()

    def check_random_operations(self, data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        with self.make(data.draw(st.integers(1, 24)), dtype) as (tier, budget):
            model = Model()
            for step in range(data.draw(st.integers(1, 25))):
                operation = data.draw(st.sampled_from([self.step_put, self.step_put, self.step_get, self.step_drop]))
                operation(tier, model, np.random.default_rng(data.draw(st.integers(0, 2**20))), dtype, step)
                assert tier.used_bytes == budget.used_bytes <= budget.limit_bytes
                assert len(tier) == len(model.chunks)
                assert np.flatnonzero(tier.has(np.arange(64))).tolist() == sorted(model.chunks)
                n = data.draw(st.integers(0, 30))
                assert tier.coldest(n).tolist() == model.coldest(n)

    def step_put(self, tier: Tier, model: Model, rng: np.random.Generator, dtype: torch.dtype, step: int) -> None:
        absent = np.setdiff1d(np.arange(64), list(model.chunks))
        ids = rng.permutation(absent)[: rng.integers(0, 16)]
        chunks = self.items(len(ids), dtype, seed=step)
        if len(ids) > tier.room():
            room = tier.room()
            with pytest.raises(BudgetError):
                tier.put(ids, chunks)
            assert tier.room() == room
            return
        tier.put(ids, chunks)
        model.chunks |= dict(zip(ids.tolist(), chunks, strict=True))
        model.use(ids)

    def step_get(self, tier: Tier, model: Model, rng: np.random.Generator, dtype: torch.dtype, step: int) -> None:
        ids = rng.permutation(np.array(list(model.chunks), np.int64))[: rng.integers(0, 16)]
        out = self.empty(len(ids), dtype)
        tier.get(ids, out)
        for i, chunk in zip(ids.tolist(), out, strict=True):
            assert same_bits(chunk, model.chunks[i])
        model.use(ids)

    @staticmethod
    def step_drop(tier: Tier, model: Model, rng: np.random.Generator, dtype: torch.dtype, step: int) -> None:
        ids = rng.permutation(64)[: rng.integers(0, 24)]
        tier.drop(ids)
        for i in ids.tolist():
            model.chunks.pop(i, None)
