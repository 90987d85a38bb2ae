"""Kinds "mean", "minmax" and "cuboid": against their formulas, as bounds of "exact", in the engine and in a model."""

import functools
import itertools

import numpy as np
import pytest
import torch
from engines import Case, Judge, make_geometry, random_tokens, tiered
from models import minimum_budget, prompt, settings, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

import kvtier
from kvtier.runtime.summary import make_summary

KINDS = ["mean", "minmax", "cuboid"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 1e-4
"""Logits of float32 models, as in the other integration tests."""
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def summary_of(kind, keys, **other):
    """The summary of a kind for ``keys`` [N, m, C, D]."""
    return make_summary(kind, chunk=keys.shape[2], head_dim=keys.shape[3], dtype=keys.dtype, **other)


def scores_of(kind, q, keys, **other):
    """What a kind says of ``q`` [N, Q, D] and the chunks of ``keys`` [N, m, C, D]."""
    summary = summary_of(kind, keys, **other)
    state = summary.fit(keys.flatten(1, 2), None)
    return summary.scores(state, summary.encode(state, keys), q)


def draw(seed, dtype=torch.float32, *, n=2, queries=7, chunks=5, chunk=8, dim=12, grid=False):
    """Queries and keys with dimensions of unlike size and offset, as real keys have.

    ``grid``: small multiples of 1/4, so that no dtype here rounds them and float32 sums of products are exact.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, queries, dim, generator=generator)
    keys = torch.randn(n, chunks, chunk, dim, generator=generator)
    if grid:
        return (4 * q).round() / 4, ((4 * keys).round() / 4).to(dtype)
    offset = 3 * torch.randn(n, 1, 1, dim, generator=generator)
    spread = torch.rand(n, 1, 1, dim, generator=generator) * 4
    return q, (keys * spread + offset).to(dtype)


# -- the formulas, one number at a time in float64 ---------------------------------------------------------------------


def mean_by_hand(q, keys):
    return sum(q_d * sum(values) / len(values) for q_d, values in zip(q, zip(*keys, strict=True), strict=True))


def minmax_by_hand(q, keys):
    columns = list(zip(*keys, strict=True))
    return sum(max(q_d * min(values), q_d * max(values)) for q_d, values in zip(q, columns, strict=True))


def cuboid_by_hand(q, keys):
    total = 0.0
    for q_d, values in zip(q, zip(*keys, strict=True), strict=True):
        centre = (max(values) + min(values)) / 2
        radius = sum(abs(value - centre) for value in values) / len(values)
        total += max(q_d * (centre - radius), q_d * (centre + radius))
    return total


BY_HAND = {"mean": mean_by_hand, "minmax": minmax_by_hand, "cuboid": cuboid_by_hand}
ROUNDINGS = {"mean": 1, "minmax": 0, "cuboid": 3}
"""How often a kind rounds to the model's dtype: the mean; nothing; the centre, which shifts the deviation, and that."""


@every_kind
@every_dtype
@pytest.mark.parametrize("chunk", [1, 2, 8, 33])
def test_scores_equal_the_formula(kind, dtype, chunk):
    """Within the roundings that the kind states, each of half a unit in the last place of the largest key."""
    q, keys = draw(chunk, dtype, chunk=chunk)
    actual = scores_of(kind, q, keys)
    assert actual.shape == (2, 7, 5)
    assert actual.dtype == torch.float32
    unit = torch.finfo(dtype).eps / 2
    sums = 2 * (keys.shape[-1] + chunk) * 2.0**-24  # of float32
    for n, i, j in itertools.product(*map(range, actual.shape)):
        expected = BY_HAND[kind](q[n, i].tolist(), keys[n, j].tolist())
        size = sum(abs(a) * b for a, b in zip(q[n, i].tolist(), keys[n, j].abs().amax(0).tolist(), strict=True))
        assert abs(actual[n, i, j].item() - expected) <= (ROUNDINGS[kind] * unit + sums) * size


def test_the_formulas_differ():
    """By far more than the tolerances above, or one would pass for another."""
    q, keys = draw(0)
    for a, b in itertools.combinations([*KINDS, "exact"], 2):
        assert (scores_of(a, q, keys) - scores_of(b, q, keys)).abs().min() > 1e-3, (a, b)


def test_a_chunk_by_hand():
    """Keys (0, 1), (4, 1), (2, -2), (2, -2): mean (2, -0.5), box 0..4 x -2..1, deviation (1, 1.5) around (2, -0.5)."""
    keys = torch.tensor([[0.0, 1], [4, 1], [2, -2], [2, -2]])[None, None]
    q = torch.tensor([[1.0, 2], [-1, 2], [1, -2], [-1, -2]])[None]
    assert scores_of("exact", q, keys)[0, :, 0].tolist() == [6, 2, 6, 2]
    assert scores_of("mean", q, keys)[0, :, 0].tolist() == [1, -3, 3, -1]
    assert scores_of("minmax", q, keys)[0, :, 0].tolist() == [6, 2, 8, 4]
    assert scores_of("cuboid", q, keys)[0, :, 0].tolist() == [5, 1, 7, 3]


# -- beside the largest q.k --------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("chunk", [1, 2, 5, 32])
@pytest.mark.parametrize("seed", range(5))
def test_minmax_is_an_upper_bound_of_exact(seed, chunk, dtype):
    """Without any tolerance, where float32 rounds nothing."""
    q, keys = draw(seed, dtype, chunk=chunk, grid=True)
    bound, exact = scores_of("minmax", q, keys), scores_of("exact", q, keys)
    assert (bound >= exact).all()
    assert (bound > exact).any() == (chunk > 1)


@every_dtype
def test_minmax_boxes_hold_every_key_and_none_is_larger_than_it_must_be(dtype):
    """Values that use all bits of the dtype: nothing is rounded, so the bound needs no rounding outward."""
    _, keys = draw(1, dtype, chunk=16)
    codes = summary_of("minmax", keys).encode((), keys)
    low, high = codes["low"][:, :, None], codes["high"][:, :, None]
    assert low.dtype == high.dtype == dtype
    assert ((low <= keys) & (keys <= high)).all()
    assert (keys == low).any(dim=2).all()
    assert (keys == high).any(dim=2).all()


@every_dtype
def test_minmax_is_a_bound_for_keys_that_use_all_bits(dtype):
    """Up to the float32 rounding of two sums of D products."""
    q, keys = draw(2, dtype, chunk=16, chunks=50, queries=50)
    bound, exact = scores_of("minmax", q, keys), scores_of("exact", q, keys)
    rounding = 2 * keys.shape[-1] * 2.0**-24 * q.abs() @ keys.float().abs().amax(dim=2).transpose(1, 2)
    assert (bound >= exact - rounding).all()


@pytest.mark.parametrize("seed", range(5))
def test_mean_and_minmax_enclose_exact_and_cuboid(seed):
    """Exact in float32: eighths of quarters, and eighths of those."""
    q, keys = draw(seed, chunk=8, grid=True)
    mean, cuboid, minmax, exact = (scores_of(kind, q, keys) for kind in ("mean", "cuboid", "minmax", "exact"))
    assert ((mean <= exact) & (exact <= minmax)).all()
    assert ((mean <= cuboid) & (cuboid <= minmax)).all()
    assert (cuboid < exact).any(), "cuboid is no upper bound"
    assert (cuboid > exact).any(), "cuboid is no lower bound"


@every_kind
@every_dtype
def test_a_chunk_of_one_token_is_scored_exactly(kind, dtype):
    q, keys = draw(3, dtype, chunk=1, grid=True)
    assert torch.equal(scores_of(kind, q, keys), scores_of("exact", q, keys))


def test_cuboid_of_two_tokens_is_their_box():
    q, keys = draw(4, chunk=2, grid=True)
    assert torch.equal(scores_of("cuboid", q, keys), scores_of("minmax", q, keys))


# -- codes -------------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(("kind", "vectors"), [("mean", 1), ("minmax", 2), ("cuboid", 2)])
def test_the_layout_is_what_encode_makes(kind, vectors, dtype):
    _, keys = draw(5, dtype)
    summary = summary_of(kind, keys)
    codes = summary.encode((), keys)
    assert {name: (t.shape, t.dtype) for name, t in codes.items()} == {
        name: ((2, 5, *shape), expected) for name, (shape, expected) in summary.layout().items()
    }
    assert all(t.dtype == dtype for t in codes.values())
    assert summary.chunk_bytes() == vectors * 12 * dtype.itemsize
    assert sum(t.nbytes for t in codes.values()) == 2 * 5 * summary.chunk_bytes()


@every_kind
def test_nothing_is_fitted(kind):
    _, keys = draw(5)
    summary = summary_of(kind, keys)
    assert summary.fit(keys.flatten(1, 2), None) == ()
    assert summary.state_bytes() == 0


@every_kind
def test_rank_and_bits_are_ignored(kind):
    """Also a rank above head_dim, which "sketch" refuses."""
    q, keys = draw(6)
    assert torch.equal(scores_of(kind, q, keys, rank=1, bits=2), scores_of(kind, q, keys, rank=1000, bits=8))


@every_kind
def test_keys_and_codes_that_are_views(kind):
    """The engine encodes a view of its ring, and scores views of slabs."""
    q, keys = draw(7)
    expected = scores_of(kind, q, keys)
    wide = torch.stack((keys, keys), dim=-1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not wide.is_contiguous()
    summary = summary_of(kind, wide)
    codes = {name: torch.cat((t, t), dim=1)[:, :5] for name, t in summary.encode((), wide).items()}
    assert not any(t.is_contiguous() for t in codes.values())
    torch.testing.assert_close(summary.scores((), codes, q), expected, rtol=0, atol=1e-5)  # sums in another order


class LargestResult(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in torch.utils._pytree.tree_leaves(out))])
        return out


@every_kind
def test_scores_make_nothing_larger_than_the_scores(kind):
    """Where there are more queries than dimensions: never [N, Q, m, D]."""
    q, keys = draw(8, torch.bfloat16, queries=40, chunks=30)
    summary = summary_of(kind, keys)
    codes = summary.encode((), keys)
    with LargestResult() as largest:
        assert summary.scores((), codes, q).numel() == 2 * 40 * 30
    assert largest.numel == 2 * 40 * 30


@every_kind
def test_scores_leave_queries_and_codes_as_they_were(kind):
    q, keys = draw(9)
    summary = summary_of(kind, keys)
    codes = summary.encode((), keys)
    before = q.clone(), {name: t.clone() for name, t in codes.items()}
    summary.scores((), codes, q)
    assert torch.equal(q, before[0])
    assert all(torch.equal(codes[name], before[1][name]) for name in codes)


# -- in the engine: beside the oracle, which scores these points instead of the keys -----------------------------------


def corners(low, high):
    """All corners [2^D, D] of a box: the largest q.k over a box is at one of them."""
    choices = np.array(list(itertools.product([False, True], repeat=len(low))))
    return np.where(choices, high, low)


def mean_point(kv_head, index, keys):
    return keys.mean(axis=0, keepdims=True)


def minmax_corners(kv_head, index, keys):
    return corners(keys.min(axis=0), keys.max(axis=0))


def cuboid_corners(kv_head, index, keys):
    centre = (keys.min(axis=0) + keys.max(axis=0)) / 2
    radius = np.abs(keys - centre).mean(axis=0)
    return corners(centre - radius, centre + radius)


POINTS = {"mean": mean_point, "minmax": minmax_corners, "cuboid": cuboid_corners}


def judge_of(rig, kind):
    judge = Judge(rig)
    for oracle in judge.oracles:
        oracle.score_keys = POINTS[kind]
    return judge


@every_kind
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_the_engine_chooses_what_the_formula_says(kind, group, chunk):
    """Chunks and outputs of prefill, decode and an append, with slabs of three summaries."""
    case = Case(make_geometry(chunk=chunk), n_layers=2, group=group, head_dim=6, kind=kind)
    with tiered(case, summary_chunks=3) as rig:
        judge = judge_of(rig, kind)
        judge.feed(random_tokens(case, 90, 1))
        judge.decode(random_tokens(case, 10, 2))
        judge.feed(random_tokens(case, 30, 3))


def test_the_oracle_notices_another_kind():
    for kind, other in itertools.permutations(KINDS, 2):
        case = Case(head_dim=6, kind=kind)
        with tiered(case) as rig:
            judge = judge_of(rig, other)
            with pytest.raises(AssertionError, match="chosen but should not be"):
                judge.feed(random_tokens(case, 150, 1))


# -- in a model --------------------------------------------------------------------------------------------------------


def greedy(model, ids, steps, **arguments):
    out = model.generate(ids, max_new_tokens=steps, **GREEDY, **arguments)
    return out.sequences.tolist(), torch.cat(out.logits)


def assert_equal_to(expected, actual):
    assert actual[0] == expected[0]
    assert (actual[1] - expected[1]).abs().max() < TOLERANCE


@functools.cache
def small_model(dtype=torch.float32):
    return tiny_llama(window=64, dtype=dtype)


def small_window(kind, **other):
    return settings(window=64, sink=2, local=8, chunk=4, block=16, kind=kind, **other)


@every_kind
def test_logits_equal_transformers_while_every_chunk_is_selected(kind):
    model, ids = tiny_llama(), prompt(300)
    with torch.no_grad():
        expected = model(ids).logits
    decoded = greedy(model, ids, 40)
    with kvtier.offload(model, settings(kind=kind)) as kv:
        cache = kv.new_cache()
        with torch.no_grad():
            actual = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
        assert_equal_to(decoded, greedy(model, ids, 40))
        assert kv.stats()["tiers"]["device"]["hits"] > 0, "no chunk left the window: nothing was tested"


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_twenty_windows_stay_within_the_bound(kind, dtype):
    with kvtier.offload(small_model(dtype), small_window(kind)) as kv:
        book = kv.prefill(prompt(20 * 64))
        tokens, logits = greedy(small_model(dtype), prompt(9, 1), 20, past_key_values=book)
        assert book.get_seq_length() == 20 * 64 + 9 + 19
    longest = kv.stats()["longest_attended"]
    assert longest <= kv.geometry.bound <= kv.geometry.max == 64
    assert longest > kv.geometry.bound - kv.geometry.chunk, "the bound is not reached: something is not attended"
    assert len(tokens[0]) == 29
    assert logits.isfinite().all()


def test_the_configured_kind_is_the_one_that_chooses():
    """Beyond the window every kind answers in its own way."""
    logits = {}
    for kind in [*KINDS, "exact", "sketch"]:
        with kvtier.offload(small_model(), small_window(kind)) as kv:
            logits[kind] = greedy(small_model(), prompt(9, 1), 1, past_key_values=kv.prefill(prompt(640)))[1]
    for a, b in itertools.combinations(logits, 2):
        assert (logits[a] - logits[b]).abs().max() > 10 * TOLERANCE, (a, b)


@every_kind
def test_forks_answer_as_if_alone(kind):
    """The last slab of summaries is partly filled and shared; every side adds chunks of its own to it."""
    model, questions = small_model(), [prompt(21, seed) for seed in (1, 2)]
    with kvtier.offload(model, small_window(kind)) as kv:
        alone = [greedy(model, q, 20, past_key_values=kv.prefill(prompt(640))) for q in questions]
        assert alone[0][0] != alone[1][0]
        book = kv.prefill(prompt(640))
        forks = [book.fork() for _ in questions]
        for expected, question, fork in zip(alone, questions, forks, strict=True):
            assert_equal_to(expected, greedy(model, question, 20, past_key_values=fork))
        assert_equal_to(alone[1], greedy(model, questions[1], 20, past_key_values=book))


@every_kind
def test_three_tiers_answer_as_one(kind, tmp_path):
    """Where a chunk happens to be never changes a result."""
    model, config = small_model(), small_window(kind)
    least = {name: minimum_budget(model, config, name) for name in ("gpu", "host")}
    budget = {"gpu": 2 * least["gpu"], "host": least["host"], "disk": "16MiB"}  # summaries grow with the context
    answers = []
    for more in ({}, {"budget": budget, "store": {"path": str(tmp_path / "store")}}):
        with kvtier.offload(model, {**config, **more}) as kv:
            book = kv.prefill(prompt(640))
            answers.append(greedy(model, prompt(9, 1), 20, past_key_values=book))
            tiers = kv.stats()["tiers"]
    assert tiers.keys() == {"device", "host", "disk"}
    assert all(tier["chunks"] > 0 for tier in tiers.values())
    assert_equal_to(*answers)
