"""Two levels of a sketch: the coarse level's arithmetic, what is chosen, what it takes, and that it is never stored."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import Case, make_geometry, one_thread, random_tokens, tiered  # noqa: F401
from models import prompt, settings, tiny_llama
from session_cases import assert_continues, assert_same, contents, continued, quicken

import kvtier
from bench.fidelity.coarse import SHIPPED, catalogue
from bench.fidelity.excerpt import Excerpt
from bench.fidelity.twolevel import measure
from kvtier.kernels import coarse
from kvtier.kernels.select import chunk_weights, top_chunks
from kvtier.runtime import slabs, two_levels
from kvtier.runtime.errors import ConfigError
from kvtier.runtime.summary import make_summary
from kvtier.runtime.tiered import TieredEngine
from kvtier.runtime.two_levels import TwoLevelSelection

N, M, C, DIM, RANK = 2, 40, 14, 10, 5
"""Rank 5: no multiple of the groups."""
FILE = Path(__file__).parent / "data" / "fidelity_smollm2.safetensors"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def fitted():
    tokens = draw(N, M, C, RANK) * torch.tensor([4.0, 3, 2, 1, 1])
    return tokens, coarse.fit_coarse(tokens, draw(N, DIM, RANK, seed=1))


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_bytes_by_hand(fitted):
    assert [coarse.kept_tokens(chunk) for chunk in (1, 2, 6, 14, 32, 64)] == [1, 1, 1, 3, 7, 15]
    summary = make_summary("sketch", chunk=32, head_dim=128, dtype=torch.bfloat16, levels=2)
    assert summary.chunk_bytes() == 30  # less than one for each token
    assert summary.layout() == make_summary("sketch", chunk=32, head_dim=128, dtype=torch.bfloat16).layout()
    asked = [(24, 3, 16), (25, 3, 16), (127, 3, 128), (128, 3, 128)]
    assert [summary.proposes(*each) for each in asked] == [False, True, False, True]
    assert N * coarse.level_bytes(RANK) == sum(x.nbytes for x in fitted[1])


def test_corners_are_chosen_one_by_one(fitted):
    """Each the token that raises the sum over directions of the largest product the most."""
    tokens, (directions, _) = fitted
    found = coarse.corners(tokens, directions)
    for head, chunk in [(0, 0), (1, 7), (0, 39)]:
        products = (tokens[head, chunk] @ directions[head].T).numpy()
        largest, kept = products.min(axis=0), []
        for _ in range(3):
            sums = [np.maximum(products[i], largest).sum() for i in range(C)]
            kept.append(int(np.argmax(sums)))
            largest = np.maximum(largest, products[kept[-1]])
        assert torch.equal(found[head, chunk], tokens[head, chunk, kept])
        assert len(set(kept)) == 3


def test_of_equal_tokens_the_first():
    tokens = torch.zeros(1, 1, 8, RANK)
    tokens[..., 3:6, 0] = 5.0
    tokens[..., 3, 1] = tokens[..., 4, 1] = tokens[..., 5, 1] = 0.0
    directions = torch.eye(RANK)[None, :1]
    marked = tokens.clone()
    marked[..., 1] = torch.arange(8)  # no direction sees it
    assert coarse.corners(marked, directions)[0, 0, 0, 1] == 3


def test_scores_are_those_of_the_nearest_entries(fitted):
    tokens, level = fitted
    codes, scale = coarse.encode_coarse(tokens, level)
    assert codes.shape == (N, M, 3, coarse.GROUPS)
    q, mean, back = draw(N, 5, DIM, seed=2), draw(N, DIM, seed=3), draw(N, DIM, RANK, seed=4)
    kept = coarse.corners(tokens, level[0])
    scores = coarse.coarse_scores(q, codes, scale, level, mean, back)
    torch.testing.assert_close(scale[..., 0], kept.norm(dim=3).amax(dim=2).bfloat16())
    for head, chunk in [(0, 3), (1, 20)]:
        stood_for = torch.zeros(3, RANK)
        for i in range(3):
            for group in range(coarse.GROUPS):
                columns = list(range(group, RANK, coarse.GROUPS))
                book = level[1][head, group, :, : len(columns)]
                size = scale[head, chunk].float()
                nearest = (book - kept[head, chunk, i, columns] / size).pow(2).sum(dim=1).argmin()
                stood_for[i, columns] = book[nearest] * size
        expected = (q[head] @ back[head] @ stood_for.T).amax(dim=1) + q[head] @ mean[head]
        torch.testing.assert_close(scores[head, :, chunk], expected)


def test_with_fewer_tokens_than_entries_every_token_is_one(fitted):
    """Up to entries that float32 cannot tell apart: numbers below 1 whose squares differ by its epsilon."""
    tokens, level = fitted
    points, stood_for = _coded(tokens, level)
    assert points.shape[1] == 120 < coarse.BOOK
    torch.testing.assert_close(stood_for, points, atol=torch.finfo(torch.float32).eps ** 0.5, rtol=0)


def test_books_follow_the_tokens(monkeypatch):
    """Lloyd's rounds lower the squared error of random entries: by 61% here, one round by 40%."""
    tokens, to = draw(1, 300, C, RANK), draw(1, DIM, RANK, seed=1)
    errors = []
    for rounds in (0, 1, coarse.ROUNDS):
        monkeypatch.setattr(coarse, "ROUNDS", rounds)
        points, stood_for = _coded(tokens, coarse.fit_coarse(tokens, to))
        errors.append((points - stood_for).pow(2).sum().item())
    assert errors[2] < errors[1] < errors[0]


def _coded(tokens, level):
    """The kept tokens [N, m*kept, rank] over their chunks' scales, and what their codes stand for."""
    codes, scale = coarse.encode_coarse(tokens, level)
    points = (coarse.corners(tokens, level[0]) / scale.float()[..., None]).flatten(1, 2)
    stood_for = torch.zeros_like(points)
    for head in range(len(tokens)):
        for group in range(coarse.GROUPS):
            columns = list(range(group, RANK, coarse.GROUPS))
            index = codes[head, ..., group].flatten().long()
            stood_for[head][:, columns] = level[1][head, group][index, : len(columns)]
    return points, stood_for


def test_a_chunk_s_codes_depend_on_no_other(fitted):
    tokens, level = fitted
    together = coarse.encode_coarse(tokens, level)
    alone = zip(*(coarse.encode_coarse(part, level) for part in tokens.split(7, dim=1)), strict=True)
    assert all(torch.equal(a, torch.cat(b, dim=1)) for a, b in zip(together, alone, strict=True))
    again = coarse.fit_coarse(tokens, draw(N, DIM, RANK, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(again, level, strict=True))


def test_weights_of_candidates_directly():
    scores, fine = draw(N, 4, M, seed=5) * 3, draw(N, 4, M, seed=6) * 3
    candidates = top_chunks(chunk_weights(scores), 9)
    index = candidates[:, None].expand(-1, 4, -1)
    found = coarse.candidate_weights(scores, candidates, fine.gather(2, index))
    s, f = scores.double().numpy(), fine.double().numpy()
    for head in range(N):
        chosen, expected = candidates[head].numpy(), np.zeros(9)
        for row in range(4):
            gap = (f[head, row, chosen] - s[head, row, chosen]).mean()
            total = np.exp(np.delete(s[head, row], chosen) + gap).sum() + np.exp(f[head, row, chosen]).sum()
            expected += np.exp(f[head, row, chosen]) / total / 4
        np.testing.assert_allclose(found[head].numpy(), expected, rtol=1e-5)


def test_good_coarse_scores_give_the_weights_of_one_level():
    """Up to a shift of each query, which the candidates show; and whatever they are if all chunks are candidates."""
    fine = draw(N, 4, M, seed=6) * 3
    shifted, everything = fine - draw(N, 4, 1, seed=7), torch.arange(M).expand(N, -1)
    candidates = top_chunks(chunk_weights(fine), 9)
    part = fine.gather(2, candidates[:, None].expand(-1, 4, -1))
    expected = chunk_weights(fine)
    torch.testing.assert_close(coarse.candidate_weights(shifted, candidates, part), expected.gather(1, candidates))
    torch.testing.assert_close(coarse.candidate_weights(draw(N, 4, M), everything, fine), expected)


# -- what is chosen ----------------------------------------------------------------------------------------------------


MEASURED = {"prefill": 0.979, "tail": 1.0, "decode": 0.887}


def test_picks_on_recorded_keys():
    """Of SmolLM2, 4 heads, 4 of up to 101 chunks, 16 of them candidates: floors .02 under what was measured."""
    ships = next(level for level in catalogue() if level.name == SHIPPED)
    same, alone = _picks(ships), _picks(replace(ships, full_sum=False))
    assert all(same[phase] >= MEASURED[phase] - 0.02 for phase in MEASURED)
    assert all(same[phase] >= alone[phase] for phase in MEASURED)
    assert sum(same.values()) > sum(alone.values()) + 0.05, "what the chunks that are no candidates weigh counts"


def _picks(level):
    """The share of one level's picks by phase, at overfetch 4."""
    found = {}
    for (_, _, overfetch, phase), figures in measure(Excerpt(FILE), [4], [level]):
        if overfetch == 4:
            found.setdefault(phase, []).append(figures.same)
    return {phase: sum(values) / len(values) for phase, values in found.items()}


GEOMETRY = make_geometry(sink=3, local=6, chunk=4, select=2, block=16)
TWO = Case(GEOMETRY, n_layers=2, head_dim=16, kind="sketch", rank=8, levels=2, overfetch=3)
SLAB = 16


def choices(case, n=200, tail=4, **more):
    """The chunks that every layer chooses in every block, and the last output."""
    tokens, chosen = random_tokens(case, n), []
    with tiered(case, summary_chunks=SLAB, **more) as rig:
        sequence = rig.new()
        for begin, end in [(0, n - tail), *((i, i + 1) for i in range(n - tail, n))]:
            out = rig.feed(sequence, tokens[begin:end])
            chosen.append([rig.engine.last_chosen[layer].tolist() for layer in range(case.n_layers)])
        made = [layer.coarse is not None for layer in sequence.layers]
    return chosen, out, made


def test_one_level_s_bits_while_all_chunks_are_candidates():
    """47 chunks at the end: 24 x 2 candidates."""
    theirs, expected, _ = choices(replace(TWO, levels=1))
    ours, out, made = choices(replace(TWO, overfetch=24))
    assert (ours, made) == (theirs, [False, False])
    assert torch.equal(out, expected)


def test_one_level_s_bits_until_the_first_slab_is_full():
    theirs, expected, _ = choices(replace(TWO, levels=1), n=70)
    ours, out, made = choices(TWO, n=70)
    assert (ours, made) == (theirs, [False, False])
    assert torch.equal(out, expected)
    assert choices(TWO, n=80)[2] == [True, True]


@pytest.mark.parametrize("score_bytes", [two_levels.SCORE_BYTES, 1200])
def test_choice_is_that_of_the_kernels(score_bytes, monkeypatch):
    """From all codes at once; the 11 queries together, and two at a time."""
    monkeypatch.setattr(two_levels, "SCORE_BYTES", score_bytes)
    with tiered(TWO, summary_chunks=SLAB) as rig:
        sequence = rig.new()
        rig.feed(sequence, random_tokens(TWO, 300))
        chunks, summary = sequence.layers[1], rig.engine.summary
        n = chunks.retired - 1
        codes = chunks.codes.part(0, n)
        mean, to, back = state = chunks.fitted.state
        tokens = coarse.decode_sketch(codes["codes"], codes["scale"], summary.bits)
        level = coarse.fit_coarse(tokens[:, :SLAB], to)
        encoded, fine_codes_decide = coarse.encode_coarse(tokens, level), False
        for seed in range(40):  # a query that counts too much changes few choices
            rows = draw(2, 11, 16, seed=seed)
            scores = coarse.coarse_scores(rows, *encoded, level, mean, back)
            candidates = top_chunks(chunk_weights(scores), 6)
            fine = summary.scores(state, codes, rows).gather(2, candidates[:, None].expand(-1, 11, -1))
            expected = candidates.gather(1, top_chunks(coarse.candidate_weights(scores, candidates, fine), 2))
            assert torch.equal(rig.engine._selection.choose(chunks, rows, n, 2), expected)
            fine_codes_decide |= not torch.equal(expected, top_chunks(chunk_weights(scores), 2))
        assert fine_codes_decide


def test_the_same_choice_on_every_run():
    first, again = choices(TWO), choices(TWO)
    assert first[0] == again[0]
    assert first[0] != choices(replace(TWO, overfetch=1))[0]


def test_where_chunks_are_changes_nothing():
    tight = {"host_bytes": 3 * TWO.window_bytes + 20 * TWO.chunk_bytes, "disk_bytes": 1 << 24, "slots": 4}
    roomy, cramped = choices(TWO), choices(TWO, **tight)
    assert roomy[0] == cramped[0]
    assert torch.equal(roomy[1], cramped[1])


def test_a_fork_goes_its_own_way():
    """Both share what there was, and each gives what it would give alone."""
    tokens, more = random_tokens(TWO, 200), [random_tokens(TWO, 40, seed=i) for i in (1, 2)]
    with tiered(TWO, summary_chunks=SLAB) as rig:
        alone = []
        for each in more:
            sequence = rig.new()
            rig.feed(sequence, tokens)
            alone.append(rig.feed(sequence, each))
        book = rig.new()
        rig.feed(book, tokens)
        fork = rig.fork(book)
        shared, short = fork.layers[0].coarse, rig.fork(book)
        assert shared.fitted is book.layers[0].coarse.fitted
        assert shared.codes._slabs == book.layers[0].coarse.codes._slabs
        rig.feed(short, more[0][:1])
        assert short.layers[0].coarse.codes._slabs == book.layers[0].coarse.codes._slabs, "copied, though no chunk came"
        assert torch.equal(rig.feed(fork, more[0]), alone[0])
        assert torch.equal(rig.feed(book, more[1]), alone[1])


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_host_slabs_gather_what_each_head_names():
    with tiered(TWO, summary_chunks=SLAB) as rig:
        codes = rig.engine._new_codes()
        layout = rig.engine.summary.layout()
        values = {name: torch.randint(0, 99, (2, 50, *shape)).to(dtype) for name, (shape, dtype) in layout.items()}
        codes.append(values)
        chosen = torch.stack([torch.randperm(50)[:20].sort().values for _ in range(2)])
        found = codes.gather(chosen)
        for name, value in values.items():
            assert torch.equal(found[name], torch.stack([value[head, chosen[head]] for head in range(2)]))


def test_budgets_to_the_byte():
    with tiered(TWO, summary_chunks=SLAB) as rig:
        before = rig.gpu.used_bytes, rig.host.used_bytes
        sequence = rig.new()
        rig.feed(sequence, random_tokens(TWO, 300))
        retired = sequence.layers[0].retired
        n_slabs = -(-retired // SLAB)
        fitted = 2 * 2 * 4 * 16 * (1 + 2 * 8)  # layers, heads; mean, to and back
        level = 2 * 2 * 4 * (128 * 8 + 4 * 256 * 2)
        assert rig.gpu.used_bytes - before[0] == fitted + level + 2 * 2 * n_slabs * SLAB * (4 + 2)
        chunks = rig.residency.host.budget.used_bytes - before[1]
        fine = 2 * 2 * n_slabs * SLAB * (4 * 4 + 2 * 8)
        assert chunks == 2 * 2 * retired * TWO.chunk_bytes + fine
        rig.engine.release(sequence)
        del sequence
        rig.residency.free_host_bytes(rig.host.limit_bytes)
        assert (rig.gpu.used_bytes, rig.host.used_bytes) == before


def test_chunks_make_way_for_fine_codes():
    """A host that chunks have filled, with a store below: the next slab of codes has some of them spilled."""
    room = 3 * TWO.window_bytes + 40 * TWO.chunk_bytes
    with tiered(TWO, summary_chunks=SLAB, host_bytes=room, disk_bytes=1 << 24, slots=4) as rig:
        sequence = rig.new()
        rig.feed(sequence, random_tokens(TWO, 300))
        assert len(rig.residency.store) > 0
        assert rig.host.used_bytes <= room
        assert sequence.layers[0].codes.part(0, sequence.layers[0].retired)["codes"].shape[1] == 72


def test_a_host_without_room_for_codes_says_so():
    """And what there was goes on."""
    codes = 2 * 2 * SLAB * (4 * 4 + 2 * 8)
    with tiered(TWO, summary_chunks=SLAB, host_bytes=2 * 2 * 16 * TWO.chunk_bytes + codes) as rig:
        sequence = rig.new()
        with pytest.raises(kvtier.BudgetError):
            rig.feed(sequence, random_tokens(TWO, 300))
        assert sequence.length > 0
        assert rig.host.used_bytes <= rig.host.limit_bytes


# -- what a user writes ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_slabs(monkeypatch):
    """Of 16 chunks, so that a coarse level proposes among 27."""
    monkeypatch.setattr(slabs, "SLAB_CHUNKS", SLAB)


def configured(**summary):
    return settings(window=256, select=3, budget={"gpu": "16MiB", "host": "16MiB"}, summary=summary)


@pytest.mark.usefixtures("small_slabs")
def test_a_saved_cache_goes_on_as_it_would_have(tmp_path, monkeypatch):
    """The coarse level is made anew from the codes in the files: the same bits."""
    quicken(monkeypatch)
    model, two = tiny_llama(), configured(levels=2, overfetch=2)
    with kvtier.offload(model, two) as kv:
        book = kv.prefill(prompt(280))
        assert all(layer.coarse is not None for layer in book._lane.sequences[0].layers)
        book.save(tmp_path / "book")
        held, expected = contents(kv, book), continued(kv, book)
    with kvtier.offload(model, two) as kv:
        book = kv.open(tmp_path / "book")
        assert_same(contents(kv, book), held)
        assert_continues(continued(kv, book), expected)


@pytest.mark.usefixtures("small_slabs")
def test_what_is_saved_with_one_level_can_be_read_with_the_other(tmp_path, monkeypatch):
    quicken(monkeypatch)
    model = tiny_llama()
    for wrote, reads in ((1, 2), (2, 1)):
        with kvtier.offload(model, configured(levels=wrote, overfetch=2)) as kv:
            kv.prefill(prompt(280)).save(tmp_path / f"book{wrote}")
        with kvtier.offload(model, configured(levels=reads, overfetch=2)) as kv:
            book = kv.open(tmp_path / f"book{wrote}")
            continued(kv, book)
            assert book._lane.sequences[0].layers[0].codes.part(0, 5)["codes"].shape[1] == 5


@pytest.mark.parametrize("kind", ["mean", "exact"])
def test_two_levels_of_another_kind_are_refused(kind):
    with pytest.raises(ConfigError, match='goes with kind = "sketch" alone, whose codes the coarse level is made of'):
        kvtier.offload(tiny_llama(), configured(kind=kind, levels=2))


@pytest.mark.parametrize(("key", "value"), [("levels", 3), ("overfetch", 0)])
def test_values_that_make_no_sense(key, value):
    with pytest.raises(ConfigError, match=rf"\[summary\] {key} = {value}"):
        kvtier.Config.load({"summary": {key: value}})


def test_a_host_budget_below_the_first_codes_says_what_they_take():
    with pytest.raises(kvtier.BudgetError, match="first fine codes"):
        kvtier.offload(tiny_llama(), configured(levels=2) | {"budget": {"gpu": "16MiB", "host": "10KiB"}})


def test_on_cuda_torch_selects_and_says_so():
    summary = make_summary("sketch", chunk=4, head_dim=16, dtype=torch.float32, rank=8, levels=2)
    engine = SimpleNamespace(summary=summary, shape=SimpleNamespace(device=torch.device("cuda")), _gpu=None)
    with pytest.warns(UserWarning, match="levels = 2 selects in torch, more slowly"):
        assert type(TieredEngine._make_selection(engine)) is TwoLevelSelection
