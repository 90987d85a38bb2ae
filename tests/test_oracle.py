"""The oracles can be wrong too: against independent dense attention, hand-computed numbers and boundaries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ChunkOracle, StepResult, assert_same_choice, choosing_queries, schedule
from oracle_reattention import ReAttentionOracle

D = 8
INV_FREQ = 10000.0 ** -(np.arange(0, D, 2) / D)
LN2, LN3 = math.log(2), math.log(3)


def random_qkv(n, n_heads, n_kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n_heads, n, D))
    k, v = rng.standard_normal((2, n_kv_heads, n, D))
    return q, k, v


def run(oracle, q, k, v, sizes):
    """Feed blocks of the given sizes; all results, and the outputs side by side."""
    results, start = [], 0
    for size in sizes:
        block = slice(start, start + size)
        results.append(oracle.step(q[:, block], k[:, block], v[:, block]))
        start += size
    assert start == q.shape[1] == len(oracle)
    return results, np.concatenate([r.out for r in results], axis=1)


def torch_rope(x, positions, attention_scaling=1.0):
    """RoPE as multiplication of complex numbers x[j] + i x[j + D/2]: not the oracle's formula."""
    x = torch.as_tensor(x, dtype=torch.float64)
    angle = torch.as_tensor(positions, dtype=torch.float64)[:, None] * torch.as_tensor(INV_FREQ)
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1) * attention_scaling


def torch_attention(q, k, v, attention_scaling, scaling):
    """Dense attention with positions 0..n-1, the queries last (bottom-right causal), by torch's sdpa."""
    b, n = q.shape[1], k.shape[1]
    group = q.shape[0] // k.shape[0]
    q = torch_rope(q, range(n - b, n), attention_scaling)
    k = torch_rope(k, range(n), attention_scaling).repeat_interleave(group, dim=0)
    v = torch.as_tensor(v, dtype=torch.float64).repeat_interleave(group, dim=0)
    mask = torch.ones(b, n, dtype=torch.bool).tril(diagonal=n - b)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).numpy()


def chunks(n_heads=4, n_kv_heads=2, sink=3, local=10, chunk=4, select=3, queries=4, **other):
    settings = {"inv_freq": INV_FREQ, "attention_scaling": 1.0, "scaling": D**-0.5} | other
    return ChunkOracle(n_heads, n_kv_heads, D, sink, local, chunk, select, queries, **settings)


def reattention(n_heads=4, n_kv_heads=2, sink=3, local=10, picks=2, span=4, clip=3, **other):
    settings = {"inv_freq": INV_FREQ, "attention_scaling": 1.0, "scaling": D**-0.5} | other
    return ReAttentionOracle(n_heads, n_kv_heads, D, sink, local, picks, span, clip, **settings)


# --- both: attention itself


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
def test_everything_selected_is_dense_attention(heads):
    q, k, v = random_qkv(60, *heads)
    sizes = [9, 9, 9, 6, 1, *[1] * 6, 9, 9, 1, 1]
    expected = torch_attention(q, k, v, 1.3, 0.4)
    for oracle in (
        chunks(*heads, select=1000, attention_scaling=1.3, scaling=0.4),
        reattention(*heads, picks=1000, clip=-1, span=1, attention_scaling=1.3, scaling=0.4),
        reattention(*heads, picks=1, clip=1, span=1000, attention_scaling=1.3, scaling=0.4),
    ):
        results, out = run(oracle, q, k, v, sizes)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
        if isinstance(oracle, ChunkOracle):
            assert results[-1].selectable == (59 - 10 - 3) // 4
            assert results[-1].n_attended == 60
        else:
            assert results[-1].own_view == list(range(60))
            assert not results[-1].dense


def test_select_nothing_is_sinks_and_window():
    q, k, v = random_qkv(60, 4, 2)
    sizes = [13, 10, 10, *[1] * 27]
    starts = np.cumsum([0, *sizes[:-1]])
    results, _ = run(chunks(select=0), q, k, v, sizes)
    clean, _ = run(reattention(clip=0), q, k, v, sizes)
    for start, size, chunk_result, clean_result in zip(starts, sizes, results, clean, strict=True):
        end = start + size
        first = 3 + max(0, (start - 10 - 3) // 4) * 4
        tokens = [*range(min(3, end)), *range(first, end)]
        expected = torch_attention(q[:, start:end], k[:, tokens], v[:, tokens], 1.0, D**-0.5)
        np.testing.assert_allclose(chunk_result.out, expected, rtol=0, atol=1e-12)
        assert chunk_result.chosen == [[], []]
        assert chunk_result.threshold == [None, None]
        assert chunk_result.n_attended == len(tokens)

        tokens = list(range(end)) if end <= 13 else [0, 1, 2, *range(end - 10, end)]
        expected = torch_attention(q[:, start:end], k[:, tokens], v[:, tokens], 1.0, D**-0.5)
        np.testing.assert_allclose(clean_result.out, expected, rtol=0, atol=1e-12)
        assert clean_result.view == tokens
        assert clean_result.mid == []
        assert clean_result.votes == {}
    assert results[-1].n_attended < 20


def test_selected_chunks_get_fresh_positions():
    """A head attends what its own chosen tokens, moved together, say: not their true positions."""
    q, k, v = random_qkv(80, 4, 2)
    results, _ = run(chunks(), q, k, v, [10] * 7 + [9, 1])
    last = results[-1]
    assert last.selectable == 16
    assert last.threshold == [sorted(w)[-3] for w in last.weights]
    assert last.chosen[0] != last.chosen[1]
    for kv_head, chosen in enumerate(last.chosen):
        tokens = [0, 1, 2, *[3 + 4 * i + j for i in chosen for j in range(4)], *range(67, 80)]
        assert last.n_attended == len(tokens) == 28
        heads = slice(2 * kv_head, 2 * kv_head + 2)
        pair = slice(kv_head, kv_head + 1)
        expected = torch_attention(q[heads, 79:], k[pair, tokens], v[pair, tokens], 1.0, D**-0.5)
        np.testing.assert_allclose(last.out[heads], expected, rtol=0, atol=1e-12)


def test_new_oracles_refuse_nonsense():
    q, k, v = random_qkv(4, 4, 2)
    with pytest.raises(ValueError, match="do not divide"):
        chunks(n_heads=3)
    with pytest.raises(ValueError, match="inv_freq"):
        reattention(inv_freq=INV_FREQ[:2])
    with pytest.raises(ValueError, match="q has shape"):
        chunks().step(q[:2], k, v)
    with pytest.raises(ValueError, match="tokens"):
        chunks().step(q, k[:, :3], v)
    with pytest.raises(ValueError, match="not finite"):
        chunks().step(q, k * np.nan, v)


# --- the schedule


def test_schedule():
    assert schedule(0, 4, 2) == []
    assert schedule(1, 4, 2) == [(0, 1)]
    assert schedule(2, 4, 2) == [(0, 1), (1, 2)]
    assert schedule(3, 4, 2) == [(0, 2), (2, 3)]
    assert schedule(4, 4, 2) == [(0, 1), (1, 3), (3, 4)]
    assert schedule(13, 4, 2) == [(0, 4), (4, 8), (8, 10), (10, 12), (12, 13)]
    assert schedule(9, 4, 0) == [(0, 4), (4, 8), (8, 9)]


def test_choosing_queries():
    assert choosing_queries(1, 16) == [0]
    assert choosing_queries(64, 16) == list(range(64))
    assert choosing_queries(128, 4) == [31, 63, 95, 127]
    assert choosing_queries(65, 4) == [15, 31, 47, 64]
    assert choosing_queries(66, 4) == [15, 32, 48, 65]
    assert choosing_queries(65, 100) == list(range(65))


# --- chunks: which


def hand_example(select):
    """Sink: token 0. Chunk 0: 1, 2. Chunk 1: 3, 4. Window: 5. Query: 6. RoPE turns a quarter per position.

    Scores are q.k * 0.5 * 2**2 = 2 q.k; logits in attention q'.k' * 0.5, with q' and k' twice as long: too.
    """
    oracle = ChunkOracle(
        2,
        1,
        2,
        sink=1,
        local=1,
        chunk=2,
        select=select,
        queries=1,
        inv_freq=[math.pi / 2],
        attention_scaling=2.0,
        scaling=0.5,
    )
    k = np.array([[[0, 0], [1, 0], [-3, 0], [0, 0.5], [0.5, 7], [7, 0.5], [1, 7]]])
    v = np.array([[[8, 17], [99, 99], [99, 99], [16, 0], [0, 17], [4, 17], [2, 34]]])
    q = np.array([[LN2, 0], [0, LN3 / 14]])
    # The first tokens arrive with queries that would choose otherwise, to no effect.
    oracle.step(np.full((2, 6, 2), -5.0), k[:, :6], v[:, :6])
    return oracle.step(q[:, None], k[:, 6:], v[:, 6:])


def test_hand_computed():
    result = hand_example(select=1)
    # Head 0: best q.k are 1 and 0.5 times ln 2: scores 2 ln 2 and ln 2: 4/6 and 2/6.
    # Head 1: 0 and 7 times ln 3 / 14: scores 0 and ln 3: 1/4 and 3/4. Means:
    np.testing.assert_allclose(result.weights, [[11 / 24, 13 / 24]], rtol=1e-14)
    assert result.selectable == 2
    assert result.window_start == 5
    assert result.chosen == [[1]]  # though head 0 alone prefers chunk 0
    np.testing.assert_allclose(result.threshold, [13 / 24], rtol=1e-14)
    # Attended 0 3 4 5 6 at positions 0..4; the query, at 4, has made a whole turn. Keys turned:
    # (0, 0), (-0.5, 0), (-0.5, -7), (0.5, -7), (1, 7).
    assert result.n_attended == 5
    # Head 0 gives 4^x: 1, 1/2, 1/2, 2, 4, sum 8. Head 1 gives 3^(y/7): 1, 1, 1/3, 1/3, 3, sum 17/3.
    first = np.array([1, 1 / 2, 1 / 2, 2, 4]) / 8 @ [[8, 17], [16, 0], [0, 17], [4, 17], [2, 34]]
    np.testing.assert_allclose(first, [4, 24.4375], rtol=1e-14)
    np.testing.assert_allclose(result.out[:, 0], [[4, 24.4375], [94 / 17, 23]], rtol=1e-13)

    assert hand_example(select=2).chosen == [[0, 1]]
    assert hand_example(select=2).threshold == [None]
    assert hand_example(select=2).n_attended == 7


def test_gqa_a_planted_key_is_chosen_by_its_group_only():
    """Heads 0 1 read KV head 0, heads 2 3 read KV head 1: h // group, not h % n_kv."""
    q, k, v = random_qkv(60, 4, 2)
    k *= 0.1
    target = np.zeros(D)
    target[5] = 9.0
    q[:, 59, 5] = 0.0
    k[0, 3 + 4 * 6 + 2] = target  # chunk 6 of KV head 0
    k[1, 3 + 4 * 2 + 1] = target  # chunk 2 of KV head 1
    q[1, 59] = target
    results, _ = run(chunks(select=1, n_heads=4), q, k, v, [10] * 5 + [9, 1])
    assert results[-1].chosen[0] == [6]
    assert results[-1].chosen[1] != [2]
    assert results[-1].weights[0][6] > 0.5 > 0.2 > results[-1].weights[1][2]

    q[1, 59], q[2, 59] = q[2, 59].copy(), target
    results, _ = run(chunks(select=1), q, k, v, [10] * 5 + [9, 1])
    assert results[-1].chosen[1] == [2]
    assert results[-1].chosen[0] != [6]


@pytest.mark.parametrize(
    ("start", "selectable", "attended", "attended_if_none_selected"),
    [
        (0, 0, 1, 1),
        (2, 0, 3, 3),
        (3, 0, 4, 4),  # sink
        (13, 0, 14, 14),  # sink + local
        (14, 0, 15, 15),
        (16, 0, 17, 17),
        (17, 1, 18, 14),  # sink + local + chunk: chunk 0 has left the window
        (18, 1, 19, 15),
        (20, 1, 21, 17),
        (21, 2, 18, 14),  # + a chunk more: now one of two
        (22, 2, 19, 15),
    ],
)
def test_boundary_lengths(start, selectable, attended, attended_if_none_selected):
    """Sink 3, local 10, chunk 4, one chunk selected: a single token after `start` others."""
    q, k, v = random_qkv(start + 1, 4, 2)
    sizes = [start, 1] if start else [1]
    last = run(chunks(select=1), q, k, v, sizes)[0][-1]
    assert last.selectable == selectable
    assert last.window_start == 3 + 4 * selectable
    assert [len(w) for w in last.weights] == [selectable] * 2
    assert last.n_attended == attended
    assert run(chunks(select=0), q, k, v, sizes)[0][-1].n_attended == attended_if_none_selected


def test_a_block_selects_by_its_start_and_not_its_end():
    q, k, v = random_qkv(36, 4, 2)
    results, _ = run(chunks(select=1), q, k, v, [16, 20])
    assert results[1].selectable == 0
    assert results[1].n_attended == 36
    results, _ = run(chunks(select=1), q, k, v, [17, 19])
    assert results[1].selectable == 1


def test_equal_weights_go_to_the_lower_index():
    q, k, v = random_qkv(60, 4, 2)
    k[:, 3:47] = np.tile(k[:, 3:7], (1, 11, 1))
    last = run(chunks(select=3), q, k, v, [60 - 1, 1])[0][-1]
    assert last.selectable == 11
    assert last.chosen == [[0, 1, 2]] * 2
    np.testing.assert_allclose(last.weights, 1 / 11, rtol=1e-14)


def test_only_the_choosing_queries_of_a_long_block_choose():
    """128 tokens, 4 queries: 31, 63, 95, 127."""
    q, k, v = random_qkv(300, 2, 1)
    k *= 0.1
    q[:, 172:] = 0
    k[0, 3 + 4 * 7] = 9.0
    k[0, 3 + 4 * 9] = -9.0
    for query, expected in ((172 + 63, 7), (172 + 62, 0), (172 + 127, 7), (172 + 126, 0)):
        probe = q.copy()
        probe[:, query] = 5.0
        last = run(chunks(2, 1, select=1), probe, k, v, [172, 128])[0][-1]
        assert last.chosen == [[expected]], query
    probe = q.copy()
    probe[:, 172 + 62] = 5.0
    assert run(chunks(2, 1, select=1, queries=128), probe, k, v, [172, 128])[0][-1].chosen == [[7]]
    # A block of 64 chooses with all, whatever `queries` says.
    assert run(chunks(2, 1, select=1), probe, k, v, [172, 64, 64])[0][-2].chosen == [[7]]


def test_pooling_is_a_mean_of_softmaxes_and_not_of_scores():
    """One head shouts for chunk 1; two of three prefer chunk 0 quietly. Softmax first: chunk 0 wins."""
    q, k, v = np.zeros((3, 60, D)), np.zeros((1, 60, D)), np.zeros((1, 60, D))
    k[0, 3] = np.eye(D)[0]
    k[0, 7] = np.eye(D)[1]
    q[0, 59, 1] = 40.0
    q[1:, 59, 0] = 6.0
    last = run(chunks(3, 1, select=1, scaling=1.0), q, k, v, [59, 1])[0][-1]
    # 11 chunks. The quiet heads give e^6 : 1 : 1 ..., the shouting one next to everything to chunk 1.
    sum_of_quiet = np.exp(6) + 10
    expected = [2 / 3 * np.exp(6) / sum_of_quiet, (1 + 2 / sum_of_quiet) / 3]
    np.testing.assert_allclose(last.weights[0][:2], expected, rtol=1e-12)
    assert last.chosen == [[0]]


def test_score_keys_replace_keys_in_scores_only():
    q, k, v = random_qkv(60, 4, 2)
    asked = []

    def mean_keys(kv_head, index, keys):
        np.testing.assert_array_equal(keys, k[kv_head, 3 + 4 * index : 7 + 4 * index])
        asked.append((kv_head, index))
        mean = keys.mean(axis=0, keepdims=True)
        keys[:] = 1e9  # the oracle's own keys must not be within reach
        return np.repeat(mean, 4, axis=0)

    sizes = [20, 20, 19, 1]
    last = run(chunks(select=2, score_keys=mean_keys), q, k, v, sizes)[0][-1]
    assert sorted(asked) == [(n, i) for n in range(2) for i in range(11)]
    for kv_head in range(2):
        means = k[kv_head, 3:47].reshape(11, 4, D).mean(axis=1)
        logits = torch.as_tensor(q[2 * kv_head : 2 * kv_head + 2, 59] @ means.T * D**-0.5)
        np.testing.assert_allclose(last.weights[kv_head], logits.softmax(dim=-1).mean(dim=0), rtol=1e-12)
    exact = run(chunks(select=2), q, k, v, sizes)[0][-1]
    assert exact.chosen != last.chosen
    followed = run_last_forced(chunks(select=2), q, k, v, sizes, last.chosen)
    np.testing.assert_array_equal(followed.out, last.out)


def run_last_forced(oracle, q, k, v, sizes, force):
    n = sum(sizes[:-1])
    run(oracle, q[:, :n], k[:, :n], v[:, :n], sizes[:-1])
    return oracle.step(q[:, n:], k[:, n:], v[:, n:], force=force)


def test_force_follows_a_choice_but_does_not_adopt_it():
    q, k, v = random_qkv(60, 4, 2)
    own = run(chunks(select=2), q, k, v, [59, 1])[0][-1]
    forced = run_last_forced(chunks(select=2), q, k, v, [59, 1], [[4, 1], None])
    assert forced.attended == [[1, 4], own.chosen[1]]
    assert forced.chosen == own.chosen
    tokens = [0, 1, 2, *range(7, 11), *range(19, 23), *range(47, 60)]
    expected = torch_attention(q[:2, 59:], k[:1, tokens], v[:1, tokens], 1.0, D**-0.5)
    np.testing.assert_allclose(forced.out[:2], expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(forced.out[2:], own.out[2:])
    for bad in ([[11], None], [[1, 1], None], [[1], [2, 3]], [[1, 2]]):
        with pytest.raises(ValueError, match=r"forced|force has"):
            run_last_forced(chunks(select=2), q, k, v, [59, 1], bad)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sink=st.integers(0, 5),
    local=st.integers(0, 9),
    chunk=st.integers(1, 5),
    select=st.integers(0, 4),
    block=st.integers(1, 12),
    tail=st.integers(0, 5),
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
)
def test_the_bound_holds_and_nothing_falls_between(sink, local, chunk, select, block, tail, prompts):
    q, k, v = random_qkv(sum(prompts), 2, 1)
    sizes = [end - start for n in prompts for start, end in schedule(n, block, tail)]
    oracle = chunks(2, 1, sink=sink, local=local, chunk=chunk, select=select)
    results, _ = run(oracle, q, k, v, sizes)
    start = 0
    for size, r in zip(sizes, results, strict=True):
        assert size <= max(block, tail)
        assert r.n_attended <= sink + select * chunk + local + chunk - 1 + size
        assert [len(c) for c in r.chosen] == [min(select, r.selectable)]
        assert r.chosen[0] == sorted(set(r.chosen[0]))
        assert set(r.chosen[0]) <= set(range(r.selectable))
        if r.selectable:
            assert local <= start - r.window_start <= local + chunk - 1
            np.testing.assert_allclose(r.weights[0].sum(), 1, rtol=1e-12)
        else:
            assert r.n_attended == start + size
        start += size


# --- comparing choices


def judged(weights, chosen):
    weights = np.array(weights)
    threshold = weights[chosen].min() if 0 < len(chosen) < len(weights) else None
    return StepResult(None, [chosen], [chosen], [weights], [threshold], len(weights), 0, 0)


def test_assert_same_choice():
    tie = judged([0.4, 0.2, 0.2 * (1 - 4e-6), 0.1999], [0, 1])
    assert_same_choice([[0, 1]], tie)
    assert_same_choice([[1, 0]], tie)
    assert_same_choice([np.array([0, 2])], tie)  # a tie
    assert_same_choice([torch.tensor([2, 0])], tie)
    for wrong, message in (
        ([0, 3], r"beyond a tie.*3: 0\.1999"),
        ([1, 2], r"beyond a tie.*0: 0\.4"),  # both of the tie instead of the best
        ([0], "1 chunks .*expected 2"),
        ([0, 1, 2], "3 chunks .*expected 2"),
        ([0, 0], "twice"),
        ([0, 4], "4: not selectable"),
        ([0, -1], "-1: not selectable"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_same_choice([wrong], tie)
    with pytest.raises(AssertionError, match="beyond a tie"):
        assert_same_choice([[0, 2]], tie, rel=1e-6)
    with pytest.raises(AssertionError, match="KV heads"):
        assert_same_choice([[0, 1], [0, 1]], tie)


def test_assert_same_choice_without_a_threshold_or_below_fp32():
    everything, nothing = judged([0.5, 0.5], [0, 1]), judged([0.5, 0.5], [])
    assert_same_choice([[0, 1]], everything)
    assert_same_choice([[]], nothing)
    for result in (everything, nothing):
        with pytest.raises(AssertionError, match="expected"):
            assert_same_choice([[1]], result)
    # fp32 cannot tell 1e-50 from 1e-60, and rightly takes the lower index.
    assert_same_choice([[0, 1]], judged([1.0, 1e-60, 1e-50], [0, 2]))
    with pytest.raises(AssertionError, match="beyond a tie"):
        assert_same_choice([[0, 1]], judged([1.0, 1e-36, 3e-36], [0, 2]))


# --- reattention


def vote_example(clip, span=4, picks=2):
    """Sink 1, local 3, 14 tokens: middle indices 0..9 are tokens 1..10. Three queries of two heads.

    Query (head h, token i) reads key dim 3 h + i: the keys hold the table of scores, row by row.
    """
    score = {  # (head, query): middle index -> score, 0 elsewhere
        (0, 0): {2: 9, 7: 5},
        (0, 1): {2: 9, 9: 6},
        (0, 2): {2: 9, 7: 4},
        (1, 0): {0: 100, 3: 90, 7: 80},  # 7 scores high here, but this query does not pick it
        (1, 1): {9: 4, 5: 3},
        (1, 2): {2: 5, 1: 4, 8: 4},  # 1 and 8 tie for the second pick: the lower
    }
    q, k, v = np.zeros((2, 14, D)), np.zeros((1, 14, D)), np.ones((1, 14, D))
    for (head, query), row in score.items():
        q[head, 11 + query, 3 * head + query] = 1
        for j, value in row.items():
            k[0, 1 + j, 3 * head + query] = value
    oracle = reattention(2, 1, sink=1, local=3, picks=picks, span=span, clip=clip)
    return run(oracle, q, k, v, [4, 3, 3, 1, 3])[0][-1]


def test_reattention_hand_computed():
    result = vote_example(clip=2)
    assert result.votes == {2: 4, 7: 2, 9: 2, 0: 1, 3: 1, 5: 1, 1: 1}
    assert result.best == {2: 9, 7: 5, 9: 6, 0: 100, 3: 90, 5: 3, 1: 4}
    # 2 by votes; then 7 and 9 have two each, and 9 was picked with 6 against 5.
    assert result.seeds == [2, 9]
    # 2 -> 0..3; 9 -> 7..10, clamped to 9. Tokens are one more: the sink.
    assert result.mid == [1, 2, 3, 4, 8, 9, 10]
    assert result.view == result.own_view == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13]

    assert vote_example(clip=1).mid == [1, 2, 3, 4]
    assert vote_example(clip=3).seeds == [2, 7, 9]
    assert vote_example(clip=3).mid == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    # Single votes go by score alone: 100 before 90.
    assert vote_example(clip=4).seeds == [0, 2, 7, 9]
    assert vote_example(clip=7).seeds == vote_example(clip=-1).seeds == [0, 1, 2, 3, 5, 7, 9]
    # Spans: 1 = the seed, 2 = one before, 3 = one on each side.
    assert vote_example(clip=2, span=1).mid == [3, 10]
    assert vote_example(clip=2, span=2).mid == [2, 3, 9, 10]
    assert vote_example(clip=2, span=3).mid == [2, 3, 4, 9, 10]
    assert vote_example(clip=0).view == [0, 11, 12, 13]
    assert vote_example(clip=5, picks=0).view == [0, 11, 12, 13]


def test_reattention_equal_votes_and_scores_go_to_the_lower_index():
    q, k, v = random_qkv(40, 4, 2)
    k[:] = k[:, :1]
    last = run(reattention(picks=5, clip=3, span=1), q, k, v, [12, 10, 10, 7, 1])[0][-1]
    assert last.votes == dict.fromkeys(range(5), 4)
    assert last.seeds == [0, 1, 2]
    assert last.mid == [3, 4, 5]


def test_reattention_pairs_head_h_with_kv_head_h_over_group():
    q, k, v = random_qkv(60, 4, 2)
    k *= 0.1
    k[0, 20] = k[1, 30] = 9.0
    q[:, 59] = 0.0
    for head, token in ((0, 20), (1, 20), (2, 30), (3, 30)):
        probe = q.copy()
        probe[head, 59] = 9.0
        last = run(reattention(picks=1, clip=2, span=1), probe, k, v, [10] * 5 + [9, 1])[0][-1]
        # The three silent heads see equal scores and pick index 0.
        assert last.votes == {0: 3, token - 3: 1}
        assert last.best == {0: 0, token - 3: 9 * 9 * D}
        assert last.mid == [3, token]


@pytest.mark.parametrize(
    ("end", "dense", "view"),
    [
        (3, True, 3),
        (13, True, 13),  # sinks and local
        (14, False, 14),  # one middle token, attended
        (15, False, 14),  # one of two
        (60, False, 14),
    ],
)
def test_reattention_boundary_lengths(end, dense, view):
    q, k, v = random_qkv(end, 4, 2)
    last = run(reattention(span=1, clip=1), q, k, v, [1] * end)[0][-1]
    assert last.dense == dense
    assert len(last.view) == view
    assert bool(last.votes) != dense


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sink=st.integers(0, 4),
    local=st.integers(4, 9),
    picks=st.integers(0, 4),
    span=st.integers(1, 7),
    clip=st.integers(0, 5),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=16),
)
def test_reattention_views(sink, local, picks, span, clip, sizes):
    q, k, v = random_qkv(sum(sizes), 4, 2)
    oracle = reattention(sink=sink, local=local, picks=picks, span=span, clip=clip)
    results, _ = run(oracle, q, k, v, sizes)
    end = 0
    for size, r in zip(sizes, results, strict=True):
        end += size
        assert r.view == r.own_view == sorted(set(r.view))
        assert r.view[: min(sink, end)] == list(range(min(sink, end)))
        last = min(local, end) if not r.dense else end
        assert r.view[-last:] == list(range(end - last, end))
        assert last >= size
        assert len(r.mid) <= clip * span
        assert len(r.seeds) <= clip
        assert len(r.view) <= sink + clip * span + local
        assert r.dense == (end <= sink + local)
        if not r.dense and clip:
            middle = end - sink - local
            assert sum(r.votes.values()) == min(picks, middle) * 4 * size
            assert {sink + j for j in r.seeds} <= set(r.mid)
        expected = torch_attention(q[:, end - size : end], k[:, r.view], v[:, r.view], 1.0, D**-0.5)
        np.testing.assert_allclose(r.out, expected, rtol=0, atol=1e-12)


def test_reattention_refuses_a_block_longer_than_local():
    q, k, v = random_qkv(40, 4, 2)
    oracle = reattention()
    oracle.step(q[:, :13], k[:, :13], v[:, :13])  # dense: any length
    with pytest.raises(ValueError, match="its own future"):
        oracle.step(q[:, 13:24], k[:, 13:24], v[:, 13:24])
    assert len(oracle) == 13


def test_reattention_force():
    q, k, v = random_qkv(40, 4, 2)
    oracle = reattention()
    run(oracle, q[:, :39], k[:, :39], v[:, :39], [10, 10, 10, 9])
    view = [0, 1, 2, 8, 20, *range(30, 40)]
    r = oracle.step(q[:, 39:], k[:, 39:], v[:, 39:], force=view)
    expected = torch_attention(q[:, 39:], k[:, view], v[:, view], 1.0, D**-0.5)
    np.testing.assert_allclose(r.out, expected, rtol=0, atol=1e-12)
    assert r.view == view != r.own_view
