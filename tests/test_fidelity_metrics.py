"""bench.fidelity: metrics and selection rules against brute force."""

import math
import random

import pytest
import torch
from fidelity_cases import SMALL, D, Held, N, one_thread  # noqa: F401

from bench.fidelity import metrics, rules
from bench.fidelity.capture import CONTEXT, Step
from bench.fidelity.problem import default_geometry
from kvtier.kernels.attend import Logits, attend
from kvtier.kernels.select import chunk_weights, exact_scores, top_chunks

# -- metrics -----------------------------------------------------------------------------------------------------------


def test_recall_and_coverage_against_sets():
    chance = random.Random(0)
    exact = torch.tensor([sorted(chance.sample(range(20), 6)) for _ in range(3)])
    chosen = torch.tensor([sorted(chance.sample(range(20), 6)) for _ in range(3)])
    expected = [len(set(a) & set(b)) / 6 for a, b in zip(exact.tolist(), chosen.tolist(), strict=True)]
    assert metrics.recall(chosen, exact, 20).tolist() == pytest.approx(expected)
    tokens = torch.tensor([[chance.randrange(-1, 20) for _ in range(50)] for _ in range(3)])
    inside = [[t in c for t in row if t >= 0] for row, c in zip(tokens.tolist(), chosen.tolist(), strict=True)]
    assert metrics.covered(tokens, chosen, 20).tolist() == pytest.approx([sum(x) / len(x) for x in inside])
    assert metrics.covered(tokens[0], chosen, 20)[0].item() == pytest.approx(sum(inside[0]) / len(inside[0]))


def test_jaccard_against_sets():
    g = torch.Generator().manual_seed(2)
    weights, tokens = torch.rand(2, 10, generator=g), torch.zeros(40, dtype=torch.bool)
    tokens[5:18] = True  # 13 tokens: three chunks of 4
    for head in range(2):
        top = sorted(range(10), key=lambda c: -weights[head, c].item())[:3]
        a, b = {4 * c + i for c in top for i in range(4)}, set(range(5, 18))
        assert metrics.jaccard(weights, tokens, 4)[head].item() == pytest.approx(len(a & b) / len(a | b))


@pytest.mark.parametrize("size", [1, 5, 16])
def test_the_paper_s_choice_by_hand(size):
    step, held = Step("s", "prefill", CONTEXT, 90, size), Held(SMALL, 120, [size])
    n_chunks = SMALL.selectable(90)
    paper = metrics.paper_choice(held, step, SMALL, n_chunks)
    middle = held.k[:, 3 : 90 + size - 9]
    votes, best, picks = {}, {}, [[], []]
    for head in range(4):
        for query in held.q(step)[head]:
            scores = middle[head // 2] @ query
            for token in scores.topk(4).indices.tolist():
                votes[token] = votes.get(token, 0) + 1
                best[token] = max(best.get(token, -math.inf), scores[token].item())
                picks[head // 2].append(token)
    seeds = sorted(sorted(votes, key=lambda t: (-votes[t], -best[t], t))[:4])
    spread = {min(max(t + o, 0), middle.shape[1] - 1) for t in seeds for o in (-2, -1, 0, 1)}

    def chunks_of(tokens):
        return [t // 4 if t // 4 < n_chunks else -1 for t in tokens]

    assert paper.seeds.tolist() == chunks_of(seeds)
    assert [sorted(row) for row in paper.picks.tolist()] == [sorted(chunks_of(row)) for row in picks]
    assert set(paper.tokens.nonzero().flatten().tolist()) == {t for t in spread if t < 4 * n_chunks}


@pytest.mark.parametrize("size", [1, 5, 16])
def test_the_attended_output_is_that_of_the_kernel(size):
    step, held = Step("s", "prefill", CONTEXT, 90, size), Held(SMALL, 120, [size])
    chosen = torch.tensor([[0, 3, 4, 9], [1, 2, 7, 18]])
    assert SMALL.selectable(90) == 19
    rows = [
        [*range(3), *(3 + 4 * c + i for c in head for i in range(4)), *range(SMALL.window_start(90), 90 + size)]
        for head in chosen.tolist()
    ]
    keys, values = (torch.stack([x[h, rows[h]] for h in range(N)]) for x in held.kv_until(step))
    n = keys.shape[1]
    whole = attend(held.q(step), keys, values, held.cos[:n], held.sin[:n], Logits(held.scaling))
    some = metrics.attended_output(held, step, SMALL, chosen, 3)
    which = {1: [0], 5: [0, 2, 4], 16: [4, 9, 15]}[size]
    torch.testing.assert_close(some, whole[:, which], rtol=1e-4, atol=1e-5)
    assert metrics.relative_error(some, whole[:, which]) < 1e-4
    assert metrics.relative_error(2 * whole, whole) == pytest.approx(1.0)


# -- rules -------------------------------------------------------------------------------------------------------------


def held_step(size=16):
    held, step = Held(SMALL, 120, [size]), Step("s", "prefill", CONTEXT, 90, size)
    held.keys = held.k
    return held, step


def test_every_rule_keeps_the_bound():
    g = default_geometry(2048, block=256)
    for rule in rules.rules(g):
        assert rule.geometry.bound <= 2048, rule.name
        assert rule.geometry.bound > 2048 - rule.geometry.chunk, rule.name
        assert rule.geometry.local > 0
    assert rules.split(g, 0.5) == g
    assert len({rule.name for rule in rules.rules(g)}) == len(rules.rules(g))


@pytest.mark.parametrize("name", ["softmax mean", "softmax max", "score mean", "score max", "votes"])
def test_weights_of_rules_by_hand(name):
    scores = torch.randn(N, 2, 3, 11, generator=torch.Generator().manual_seed(5))
    flat = scores.flatten(1, 2)
    weigh, brute = {
        "softmax mean": (rules.softmax_mean, lambda rows: sum(r.softmax(0) for r in rows)),
        "softmax max": (rules.softmax_max, lambda rows: torch.stack([r.softmax(0) for r in rows]).amax(0)),
        "score mean": (rules.score_mean, lambda rows: sum(rows)),
        "score max": (rules.score_max, lambda rows: torch.stack(list(rows)).amax(0)),
        "votes": (
            rules.votes(3),
            lambda rows: sum((r >= r.sort().values[-3]).float() + r.softmax(0) / 1000 for r in rows),
        ),
    }[name]
    assert torch.equal(weigh(scores).argsort(dim=1), torch.stack([brute(rows) for rows in flat]).argsort(dim=1))


def test_neighbours_come_right_after_their_chunk():
    weights = torch.tensor([[0.1, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.5, 0.0, 0.0]])
    filled = rules._with_neighbours(weights, 1, 6)
    assert top_chunks(filled, 3).tolist() == [[3, 4, 5]]
    assert top_chunks(filled, 6).tolist() == [[3, 4, 5, 6, 7, 8]]
    assert top_chunks(filled, 8).tolist() == [[0, 1, 3, 4, 5, 6, 7, 8]]


def test_a_rule_chooses_as_the_engine_does_and_shares_when_told():
    held, step = held_step()
    own = rules.choose(rules.Rule("r", SMALL, 4, rules.softmax_mean), held, step)
    q = held.q(step) * held.scaling
    chunks = held.k[:, 3 : 3 + 19 * 4].unflatten(1, (19, 4))
    expected = top_chunks(chunk_weights(exact_scores(q.reshape(N, -1, D), chunks)), 4)
    assert torch.equal(own, expected)
    shared = rules.choose(rules.Rule("r", SMALL, 4, rules.softmax_mean, shared=True), held, step)
    assert torch.equal(shared[0], shared[1])
    assert not torch.equal(own[0], own[1])


def test_full_output_is_the_kernel_over_everything():
    held, step = held_step()
    angles = torch.arange(120)[:, None] * torch.logspace(0, -3, D // 2)
    held.cos, held.sin = (torch.cat((f(angles), f(angles)), dim=1) for f in (torch.cos, torch.sin))
    keys, values = held.kv_until(step)
    whole = attend(held.q(step), keys, values, held.cos[:106], held.sin[:106], Logits(held.scaling))
    torch.testing.assert_close(rules.full_output(held, step, 2), whole[:, [7, 15]], rtol=1e-4, atol=1e-5)
    held.cos = held.cos[:100]
    with pytest.raises(ValueError, match="beyond the 100 positions"):
        rules.full_output(held, step, 2)


def test_attended_share_by_hand():
    step = Step("s", "prefill", CONTEXT, 90, 16)
    chosen = torch.tensor([[0, 3, 4, 9], [1, 2, 7, 18]])
    tokens = torch.randint(0, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    expected = []
    for head in range(2):
        inside = {
            *range(3),
            *range(SMALL.window_start(90), 90),
            *(3 + 4 * c + i for c in chosen[head].tolist() for i in range(4)),
        }
        expected.append(sum(t in inside for t in tokens[head].tolist()) / 60)
    assert rules.attended_share(tokens, chosen, step, SMALL).tolist() == pytest.approx(expected)
    held, _ = held_step()
    picked = metrics.picked_tokens(held, step, 3)
    direct = [
        sorted(
            3 + int(t)
            for h in (2 * n, 2 * n + 1)
            for q in held.q(step)[h]
            for t in (held.k[n, 3:90] @ q).topk(4).indices
        )
        for n in range(N)
    ]
    assert [sorted(row) for row in picked.tolist()] == direct
