"""Lists of summaries that grow in slabs and are shared by forks, against plain lists."""

import gc
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.runtime import slabs
from kvtier.runtime.budget import Budget
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.slabs import SlabList, slab_bytes
from kvtier.runtime.summary import Codes

LAYOUT = {"codes": ((2, 3), torch.uint8), "scale": ((), torch.float32)}
ROWS, SLAB = 2, 4
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_slabs() -> Iterator[None]:
    with patch.object(slabs, "SLAB_CHUNKS", SLAB):
        yield


def a_budget(n_slabs: int) -> Budget:
    return Budget("gpu", n_slabs * slab_bytes(LAYOUT, ROWS))


def chunks(*values: int) -> Codes:
    """A chunk per value, recognisable in every tensor and row."""
    each = torch.tensor(values)
    codes = (each[None, :, None, None] + 100 * torch.arange(ROWS)[:, None, None, None]).expand(ROWS, -1, 2, 3)
    return {"codes": codes.to(torch.uint8), "scale": -each.float().expand(ROWS, -1)}


def values_of(slab_list: SlabList, length: int | None = None) -> list[int]:
    """The values of the first ``length`` chunks, all tensors and rows agreeing."""
    values: list[int] = []
    for part in slab_list.slabs(len(slab_list) if length is None else length):
        here = part["codes"][0, :, 0, 0].tolist()
        assert 1 <= len(here) <= SLAB
        expected = chunks(*here)
        assert all(torch.equal(part[name], expected[name]) for name in LAYOUT)
        values += here
    return values


def a_list(budget: Budget, *values: int) -> SlabList:
    made = SlabList(LAYOUT, ROWS, budget, CPU)
    if values:
        made.append(chunks(*values))
    return made


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_forks_and_appends_match_plain_lists(data: st.DataObject) -> None:
    budget = a_budget(1000)
    lists, models, value = [a_list(budget)], [[]], 0
    for _ in range(data.draw(st.integers(1, 15))):
        i = data.draw(st.integers(0, len(lists) - 1))
        action = data.draw(st.sampled_from(["append", "append", "fork", "reserve"]))
        if action == "fork":
            lists.append(lists[i].fork())
            models.append(list(models[i]))
        elif action == "reserve":
            lists[i].reserve(data.draw(st.integers(0, 6)))
        else:
            new = [(value + j) % 100 for j in range(data.draw(st.integers(1, 9)))]
            value += len(new)
            lists[i].append(chunks(*new))
            models[i] += new
        assert [values_of(one) for one in lists] == models
    lists.clear()
    assert budget.used_bytes == 0


@pytest.mark.parametrize("length", range(0, 11))
def test_the_first_chunks_alone(length: int) -> None:
    assert values_of(a_list(a_budget(3), *range(10)), min(length, 10)) == list(range(min(length, 10)))


@pytest.mark.parametrize("held", [1, 3, 4, 5, 8])
def test_a_fork_takes_no_bytes_until_it_appends(held: int) -> None:
    budget = a_budget(10)
    parent = a_list(budget, *range(held))
    used = budget.used_bytes
    fork = parent.fork()
    assert budget.used_bytes == used
    fork.append(chunks(50))
    assert budget.used_bytes == used + slab_bytes(LAYOUT, ROWS)
    del parent
    assert values_of(fork) == [*range(held), 50]
    full, partly = divmod(held, SLAB)
    assert budget.used_bytes == (full + 1) * slab_bytes(LAYOUT, ROWS), f"{full} full slabs and one for {partly} + 1"


def test_full_slabs_are_shared_not_copied() -> None:
    parent = a_list(a_budget(10), *range(6))
    fork = parent.fork()
    fork.append(chunks(50))
    first, second = list(parent.slabs(6))
    forked_first, forked_second = list(fork.slabs(6))
    assert first["codes"].data_ptr() == forked_first["codes"].data_ptr()
    assert second["codes"].data_ptr() != forked_second["codes"].data_ptr()


@pytest.mark.parametrize("held", [0, 3, 4])
def test_a_full_budget_changes_nothing(held: int) -> None:
    budget = a_budget(2)
    one = a_list(budget, *range(held))
    with pytest.raises(BudgetError, match=r"\[budget\] gpu"):
        one.append(chunks(*range(50, 60)))
    assert values_of(one) == list(range(held))
    one.append(chunks(*range(60, 60 + 2 * SLAB - held)))
    assert values_of(one) == [*range(held), *range(60, 60 + 2 * SLAB - held)]


def test_a_shared_slab_that_cannot_be_copied_stays_shared() -> None:
    budget = a_budget(1)
    parent = a_list(budget, 1, 2)
    fork = parent.fork()
    with pytest.raises(BudgetError):
        fork.append(chunks(3))
    assert values_of(parent) == values_of(fork) == [1, 2]
    del parent
    gc.collect()


def test_after_reserve_an_append_cannot_fail() -> None:
    budget = a_budget(3)
    one = a_list(budget, 1, 2)
    one.reserve(9)
    budget.take(budget.free_bytes, "somebody else")
    one.append(chunks(*range(3, 12)))
    assert values_of(one) == list(range(1, 12))


@pytest.mark.parametrize("held", [0, 2, SLAB, SLAB + 1])
def test_forks_do_not_share_what_was_reserved_but_not_used(held: int) -> None:
    """A block that fails between ``reserve`` and ``append`` leaves a reserve; a fork may follow."""
    parent = a_list(a_budget(20), *range(held))
    parent.reserve(SLAB + 1)
    fork = parent.fork()
    parent.append(chunks(50))
    fork.append(chunks(60))
    assert values_of(parent) == [*range(held), 50]
    assert values_of(fork) == [*range(held), 60]
