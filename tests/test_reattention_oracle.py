"""Method "reattention" against the oracle of the paper's rule.

The numbers that are chosen from are on a grid: no choice depends on rounding.
"""

from unittest.mock import patch

import pytest
import torch
from engines import (
    PLENTY,
    Case,
    ReAttentionJudge,
    Rig,
    Tokens,
    cases,
    make_geometry,
    one_thread,  # noqa: F401
    random_tokens,
    reattention,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import vote
from kvtier.kernels.vote import elect_seeds, pick_tokens, spread
from kvtier.runtime.errors import BudgetError

CASE = Case(make_geometry(sink=3, local=9, chunk=3, select=4, block=8), n_layers=2)


def grid(case: Case, n: int, seed: int = 0) -> Tokens:
    return random_tokens(case, n, seed, grid=True)


# -- beside the oracle -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    case=cases(local_holds_block=True),
    appends=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    steps=st.integers(0, 6),
    seed=st.integers(0, 99),
    piece=st.integers(0, 2),
)
def test_it_matches_the_oracle(case: Case, appends: list[int], steps: int, seed: int, piece: int) -> None:
    with patch.object(vote, "SCORE_BYTES", [1, 2000, vote.SCORE_BYTES][piece]):
        judge = ReAttentionJudge(reattention(case))
        for i, n in enumerate(appends):
            judge.feed(grid(case, n, 1000 * seed + i))
        judge.decode(grid(case, steps, 1000 * seed + 99))


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("beyond", [-3, -1, 0, 1, 2, 3, 6, 20])
def test_every_boundary(group: int, beyond: int) -> None:
    """A block and a token that end ``beyond`` tokens behind sink + local: dense up to there."""
    case = Case(CASE.geometry, group=group)
    g = case.geometry
    for n in (g.block, 1):
        judge = ReAttentionJudge(reattention(case))
        judge.feed(grid(case, g.sink + g.local + beyond - n))
        [result] = judge.block(grid(case, n, seed=n))
        assert result.dense == (beyond <= 0)
        if beyond > 0:
            assert 0 < len(result.mid) <= min(beyond, g.select * g.chunk)


def test_while_everything_fits_the_view_is_everything() -> None:
    rig = reattention(CASE)
    rig.feed(rig.new(), grid(CASE, CASE.geometry.sink + CASE.geometry.local))
    assert [view.tolist() for view in rig.engine.last_view] == [list(range(12))] * 2


@pytest.mark.parametrize("select", [0, 1, 2, 4])
def test_select_of_a_sequence_clips_the_seeds(select: int) -> None:
    judge = ReAttentionJudge(reattention(CASE), select)
    judge.feed(grid(CASE, 60))
    for result in judge.block(grid(CASE, 8, seed=1)):
        assert len(result.seeds) == select


def test_equal_tokens_tie_to_the_lower_index() -> None:
    """Keys of period 5: every score occurs many times."""
    case = Case(CASE.geometry, picks=3)
    tokens = grid(case, 80)
    tokens.k[:] = tokens.k[:, :, torch.arange(80) % 5]
    judge = ReAttentionJudge(reattention(case))
    judge.feed(tokens)
    judge.block(grid(case, 8, seed=1))
    judge.decode(grid(case, 3, seed=2))


def test_all_equal_keys_take_the_first_tokens() -> None:
    case = Case(CASE.geometry, picks=2)
    tokens = grid(case, 60)
    tokens.k[:] = tokens.k[:, :, :1]
    judge = ReAttentionJudge(reattention(case))
    judge.feed(tokens)
    assert judge.rig.engine.last_view[0].tolist() == [0, 1, 2, 3, 4, 5, *range(51, 60)]


def test_the_group_of_a_head() -> None:
    """Heads 0 and 1 read KV head 0, heads 2 and 3 KV head 1: h // group, not h % n_kv."""
    keys = torch.zeros(2, 6, 2)
    keys[0, 1, 0] = keys[1, 4, 0] = 1.0
    q = torch.zeros(4, 1, 2)
    q[..., 0] = 1.0
    indices, scores = pick_tokens(q, keys, 1)
    assert indices.flatten().tolist() == [1, 1, 4, 4]
    assert scores.flatten().tolist() == [1.0] * 4


def test_votes_then_best_score_then_index() -> None:
    indices = torch.tensor([[[7, 3], [7, 5], [2, 5], [3, 9], [8, 9]]])
    scores = torch.tensor([[[1.0, 4.0], [1.0, 6.0], [9.0, 6.0], [4.0, 0.5], [9.0, 0.5]]])
    by_rank = [5, 3, 7, 9, 2, 8]  # two votes: 6.0, 4.0, 1.0, 0.5; one vote: 9.0 twice
    for clip in range(1, 8):
        assert elect_seeds(indices, scores, 10, clip).tolist() == sorted(by_rank[:clip])


@pytest.mark.parametrize(
    ("span", "expected"),
    [(1, [0, 5, 9]), (2, [0, 4, 5, 8, 9]), (3, [0, 1, 4, 5, 6, 8, 9]), (4, [0, 1, 3, 4, 5, 6, 7, 8, 9])],
)
def test_neighbours_are_clamped_to_the_middle(span: int, expected: list[int]) -> None:
    assert spread(torch.tensor([0, 5, 9]), span, 10).tolist() == expected


# -- sequences ---------------------------------------------------------------------------------------------------------


def fresh(case: Case, *appends: Tokens) -> torch.Tensor:
    """What the last of these appends gives on a sequence of its own."""
    rig = reattention(case)
    sequence = rig.new()
    return [rig.feed(sequence, tokens) for tokens in appends][-1]


@pytest.mark.parametrize("held", [2, 12, 13, 50])
def test_a_fork_and_its_parent_go_on_as_if_alone(held: int) -> None:
    past, one, two, three = (random_tokens(CASE, n, seed) for seed, n in enumerate((held, 25, 20, 15)))
    rig = reattention(CASE)
    parent = rig.new()
    rig.feed(parent, past)
    fork = rig.fork(parent)
    assert torch.equal(rig.feed(fork, one), fresh(CASE, past, one))
    assert torch.equal(rig.feed(parent, two), fresh(CASE, past, two))
    fork_of_fork = rig.fork(fork)
    assert torch.equal(rig.feed(fork_of_fork, three), fresh(CASE, past, one, three))
    assert torch.equal(rig.feed(fork, two), fresh(CASE, past, one, two))
    for sequence in (parent, fork, fork_of_fork, fork):
        rig.engine.release(sequence)
    assert rig.gpu.used_bytes == 0


def test_a_fork_without_selection() -> None:
    past, more = random_tokens(CASE, 50), random_tokens(CASE, 1, seed=1)
    rig = reattention(CASE)
    parent = rig.new()
    rig.feed(parent, past)
    rig.feed(rig.fork(parent, select=0), more)
    assert rig.engine.last_view[0].tolist() == [0, 1, 2, *range(42, 51)]


def test_rewinding_tokens_is_exact() -> None:
    past, wrong, right = (random_tokens(CASE, n, seed) for seed, n in enumerate((40, 9, 20)))
    rig = reattention(CASE)
    sequence = rig.new()
    rig.feed(sequence, past)
    for i in range(9):
        rig.block(sequence, wrong[i : i + 1])
    while sequence.length > 40 and sequence.can_rewind():
        sequence.rewind()
    kept = [wrong[i : i + 1] for i in range(sequence.length - 40)]
    assert len(kept) < 9
    assert torch.equal(rig.feed(sequence, right), fresh(CASE, past, *kept, right))


def bytes_of_a_layer(rig: Rig, block: Tokens) -> int:
    """Bytes that one layer takes for a first block."""
    rig.block(rig.new(), block)
    return rig.gpu.used_bytes // CASE.n_layers


@pytest.mark.parametrize("failing", [0, 1])
def test_a_block_that_fails_half_way_can_be_repeated(failing: int) -> None:
    block, more = random_tokens(CASE, 8), random_tokens(CASE, 30, seed=1)
    layer_bytes = bytes_of_a_layer(reattention(CASE), block)
    rig = reattention(CASE, PLENTY)
    others = PLENTY - failing * layer_bytes - layer_bytes // 2
    rig.gpu.take(others, "others")
    sequence = rig.new()
    with pytest.raises(BudgetError, match=r"\[budget\] gpu"):
        rig.block(sequence, block)
    assert (sequence.length, rig.gpu.used_bytes) == (0, others + failing * layer_bytes)
    rig.gpu.give(others)
    rig.block(sequence, block)
    alone = reattention(CASE)
    twin = alone.new()
    alone.block(twin, block)
    assert torch.equal(rig.feed(sequence, more), alone.feed(twin, more))


@pytest.mark.parametrize("layers_that_fit", [0, 1])
def test_a_fork_that_does_not_fit_takes_nothing(layers_that_fit: int) -> None:
    rig = reattention(CASE)
    sequence = rig.new()
    rig.feed(sequence, random_tokens(CASE, 20))
    layer_bytes = rig.gpu.used_bytes // 2
    others = rig.gpu.free_bytes - layers_that_fit * layer_bytes - layer_bytes // 2
    rig.gpu.take(others, "others")
    used = rig.gpu.used_bytes
    with pytest.raises(BudgetError, match=r"\[budget\] gpu .* a fork"):
        rig.fork(sequence)
    assert rig.gpu.used_bytes == used
    rig.gpu.give(others)
    rig.engine.release(rig.fork(sequence))
    rig.engine.release(sequence)
    assert rig.gpu.used_bytes == 0
