import pytest

from kvtier.runtime.budget import Budget, format_bytes
from kvtier.runtime.errors import BudgetError, KvtierError


def test_take_and_give() -> None:
    budget = Budget("host", 100)
    budget.take(60, "a")
    budget.take(40, "b")
    assert (budget.used_bytes, budget.free_bytes) == (100, 0)
    budget.give(60)
    assert (budget.used_bytes, budget.free_bytes) == (40, 60)
    budget.take(0, "nothing")


def test_refusal_says_what_to_change_and_takes_nothing() -> None:
    budget = Budget("host", 3 * 2**29)
    budget.take(2**30, "chunks")
    with pytest.raises(BudgetError) as caught:
        budget.take(2**30, "parked windows")
    message = str(caught.value)
    for part in ("[budget] host = 1.50 GiB", "1.00 GiB in use", "needed for parked windows", "at least 512.00 MiB"):
        assert part in message
    assert isinstance(caught.value, KvtierError | MemoryError)
    assert budget.used_bytes == 2**30


def test_giving_more_than_was_taken_is_a_bug() -> None:
    budget = Budget("disk", 100)
    budget.take(10, "a")
    with pytest.raises(AssertionError):
        budget.give(11)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (3 * 2**29, "1.50 GiB"),
        (5 * 2**40, "5.00 TiB"),
        (5 * 2**50, "5120.00 TiB"),
    ],
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_what_is_set_aside_is_for_those_who_ask_for_it() -> None:
    budget = Budget("host", 100)
    budget.set_aside(40)
    with pytest.raises(BudgetError, match=r"\[budget\] host"):
        budget.take(61, "chunks")
    budget.take(60, "chunks")
    assert budget.take_aside(30, "a window") == 30
    assert (budget.used_bytes, budget.free_bytes, budget.aside_bytes) == (90, 0, 10)
    with pytest.raises(BudgetError):
        budget.take_aside(11, "a window")
    budget.give(60)
    assert budget.take_aside(50, "a window") == 10
    budget.give_aside(50, 10)
    budget.give_aside(30, 30)
    assert (budget.used_bytes, budget.free_bytes, budget.aside_bytes) == (0, 60, 40)
