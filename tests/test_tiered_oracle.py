"""Method "chunks" against the oracle of DESIGN.md's definitions, and that results depend on nothing else:
not on where chunks are, not on forks, not on blocks that failed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from engines import (
    Case,
    Judge,
    Rig,
    Tokens,
    cases,
    codes_of,
    make_geometry,
    one_thread,  # noqa: F401
    random_tokens,
    sketched_keys,
    tiered,
    tight,
    with_select,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels.basis import fit_basis
from kvtier.kernels.quantize import pack, packed_size, quantize, unpack
from kvtier.kernels.select import sketch_scores
from kvtier.kernels.summarize import encode_sketch
from kvtier.runtime import layer_selection
from kvtier.runtime import residency as residency_module
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.residency import Residency
from kvtier.runtime.sequence import QueryMoment, TieredSequence

KINDS = ["exact", "sketch"]
APPENDS = st.lists(st.integers(1, 45), min_size=1, max_size=3)


def assert_same(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit-identical, said with a short message."""
    assert out.shape == expected.shape
    same = (out == expected).all(dim=-1).all(dim=1)  # [L, n]
    assert same.all(), f"layers and tokens that differ: {(~same).nonzero().tolist()[:8]}"


def chosen_count(rig: Rig) -> list[int]:
    """Chunks that the last block attended to, per layer."""
    return [0 if chosen is None else chosen.shape[1] for chosen in rig.engine.last_chosen]


# -- beside the oracle -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(case=cases(), appends=APPENDS, steps=st.integers(0, 10), seed=st.integers(0, 99), piece=st.integers(0, 3))
def test_exact_matches_the_oracle(case: Case, appends: list[int], steps: int, seed: int, piece: int) -> None:
    """Several appends, decode steps, then one append more; slabs of summaries and pieces of scores cut anywhere."""
    score_bytes = [1, 400, 4000, layer_selection.SCORE_BYTES][piece]
    with tiered(case, summary_chunks=3) as rig, patch.object(layer_selection, "SCORE_BYTES", score_bytes):
        judge = Judge(rig)
        for i, n in enumerate(appends):
            judge.feed(random_tokens(case, n, 1000 * seed + i))
        judge.decode(random_tokens(case, steps, 1000 * seed + 98))
        judge.feed(random_tokens(case, appends[0], 1000 * seed + 99))


@settings(max_examples=30, deadline=None)
@given(case=cases(kind="sketch"), appends=APPENDS, steps=st.integers(0, 10), seed=st.integers(0, 99))
def test_sketch_matches_an_oracle_that_scores_what_the_codes_say(
    case: Case, appends: list[int], steps: int, seed: int
) -> None:
    with tiered(case, summary_chunks=3) as rig:
        judge = Judge(rig)
        for i, n in enumerate(appends):
            judge.feed(random_tokens(case, n, 1000 * seed + i))
        judge.decode(random_tokens(case, steps, 1000 * seed + 99))


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("beyond", [None, 0, 1, 3, 4, 5, 8, 12, 16], ids=str)
def test_every_boundary(group: int, beyond: int | None) -> None:
    """A block and a token after exactly sink tokens (None), sink + local + ``beyond`` tokens (chunk 4, select 2)."""
    case = Case(group=group)
    g = case.geometry
    held = g.sink if beyond is None else g.sink + g.local + beyond
    with tiered(case) as rig:
        judge = Judge(rig)
        judge.feed(random_tokens(case, held))
        selectable = 0 if beyond is None else beyond // g.chunk
        for n in (g.block, 1):
            results = judge.block(random_tokens(case, n, seed=n))
            assert [r.selectable for r in results] == [selectable]
            assert chosen_count(rig) == [min(selectable, g.select)]
            selectable = max(0, (held + n - g.sink - g.local) // g.chunk)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_a_long_block_chooses_with_the_last_query_of_each_stretch(group: int) -> None:
    case = Case(make_geometry(block=96, queries=5, tail=8), group=group)
    with tiered(case) as rig:
        judge = Judge(rig)
        judge.feed(random_tokens(case, 70))
        for n in (64, 65, 96):
            judge.block(random_tokens(case, n, seed=n))
            assert chosen_count(rig) == [case.geometry.select]


@pytest.mark.parametrize("score_bytes", [1, 1000, 3000])
def test_weights_do_not_depend_on_how_scores_are_cut(score_bytes: int) -> None:
    """Pieces of uneven numbers of queries: 40 rows, of which a piece takes 1, 3 to 5, or 9 to 15."""
    case = Case(make_geometry(block=10, select=3), group=4)
    with tiered(case) as rig, patch.object(layer_selection, "SCORE_BYTES", score_bytes):
        judge = Judge(rig)
        judge.feed(random_tokens(case, 120))
        for seed in range(12):
            judge.block(random_tokens(case, 10, seed))


@pytest.mark.parametrize(
    ("scaling", "attention_scaling", "winner"),
    [(1.0, 0.5, 2), (1.0, 0.7, 2), (1.0, 1.0, 0), (0.25, 1.0, 2), (0.25, 2.0, 0)],
)
def test_the_temperature_decides(scaling: float, attention_scaling: float, winner: int) -> None:
    """Two heads of a group score three chunks 4, 0, 3 and 0, 4, 3. With t = scaling x attention_scaling^2 chunk 2 is
    best while 2 exp(3t) > exp(4t) + 1, below t = 0.6; then chunk 0, which ties with chunk 1.
    """
    case = Case(make_geometry(0, 1, 1, 1), 1, 1, 2, 4, attention_scaling, scaling)
    k = torch.eye(4)[None, None]
    q = torch.tensor([[4.0, 0, 3, 0], [0, 4, 3, 0]])[None, :, None]
    with tiered(case) as rig:
        judge = Judge(rig)
        judge.block(Tokens(q.expand(-1, -1, 4, -1), k, k, torch.arange(4)))
        judge.block(Tokens(q, k[:, :, -1:], k[:, :, -1:], torch.arange(1)))
        assert rig.engine.last_chosen[0].tolist() == [[winner]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_chunks", [3, 7, 16, 33])
@pytest.mark.parametrize("n_queries", [1, 5, 80])
def test_exact_ties_go_to_the_lower_index(kind: str, n_chunks: int, n_queries: int) -> None:
    """All chunks alike: the first ones win. Then two better ones, alike again, and one place."""
    geometry = make_geometry(block=80, queries=4)
    case = Case(geometry, attention_scaling=2.0, scaling=0.25, kind=kind, rank=8, bits=8)
    tokens = random_tokens(case, geometry.sink + n_chunks * geometry.chunk + geometry.local, grid=True)
    middle = tokens.k[:, :, geometry.sink : geometry.sink + n_chunks * geometry.chunk]
    middle.unflatten(2, (n_chunks, -1))[:] = middle[:, :, None, : geometry.chunk].clone()
    with tiered(case) as rig:
        judge = Judge(rig)
        judge.feed(tokens)
        result = judge.block(random_tokens(case, n_queries, seed=5, grid=True))[0]
        assert result.selectable == n_chunks
        if kind == "exact":  # sums of codes are not exact in float32
            assert rig.engine.last_chosen[0].tolist() == [[0, 1]] * case.n_kv_heads


@pytest.mark.parametrize("twins", [(2, 6), (3, 5), (0, 1), (6, 7)])
def test_of_two_equal_chunks_the_lower_takes_the_last_place(twins: tuple[int, int]) -> None:
    case = with_select(Case(attention_scaling=1.0, scaling=0.25), 1)
    g = case.geometry
    tokens = random_tokens(case, g.sink + 8 * g.chunk + g.local, grid=True)
    chunks = tokens.k[:, :, g.sink : g.sink + 8 * g.chunk].unflatten(2, (8, g.chunk))
    chunks[:] = chunks.clone() / 8
    query = random_tokens(case, 1, seed=3, grid=True)
    query.q[:] = query.q[:, :1]  # heads agree
    for twin in twins:
        chunks[:, :, twin, 1] = 4 * query.q[:, :1, 0]
    with tiered(case) as rig:
        judge = Judge(rig)
        judge.feed(tokens)
        judge.block(query)
        assert rig.engine.last_chosen[0].tolist() == [[twins[0]]] * case.n_kv_heads


def test_a_context_of_40_windows_never_exceeds_the_bound() -> None:
    case = Case(with_select(Case(), 3).geometry, head_dim=4, n_kv_heads=1)
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, random_tokens(case, 40 * case.geometry.max))
        assert case.geometry.bound - case.geometry.block < rig.engine.longest_attended <= case.geometry.bound


@pytest.mark.parametrize("kind", KINDS)
def test_select_of_a_sequence_can_be_below_the_geometrys(kind: str) -> None:
    case = replace(Case(kind=kind), geometry=with_select(Case(), 3).geometry)
    for select in (0, 1, 3):
        with tiered(case) as rig:
            judge = Judge(rig, select)
            judge.feed(random_tokens(case, 60))
            assert chosen_count(rig) == [select]


# -- the sketch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [6, 13])
def test_the_basis_comes_from_all_keys_held_when_the_first_chunk_leaves(local: int) -> None:
    case = Case(make_geometry(local=local), n_layers=2, kind="sketch")
    g = case.geometry
    tokens = random_tokens(case, 60)
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, tokens)
        starts = [start for start in sequence.block_starts if start >= g.sink + g.chunk + g.local]
        for layer in range(case.n_layers):
            q = tokens.q[layer, :, : starts[0]].reshape(case.n_kv_heads, -1, case.head_dim)
            expected = fit_basis(tokens.k[layer, :, g.sink : starts[0]], q.mT @ q, case.rank)
            for ours, theirs in zip(sequence.layers[layer].fitted.state, expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_block_that_is_repeated_counts_its_queries_once() -> None:
    """A block that failed half-way, a token that was forgotten, a fork before the fit: as if nothing had been."""
    case = Case(n_layers=2, kind="sketch")
    tokens = random_tokens(case, 60)

    def states(sequence: TieredSequence) -> list[torch.Tensor]:
        assert all(layer.queries is None for layer in sequence.layers)
        return [tensor for layer in sequence.layers for tensor in layer.fitted.state]

    with tiered(case) as rig:
        straight, repeated = rig.new(), rig.new()
        for sequence in (straight, repeated):
            if sequence is repeated:
                rig.engine.activate([repeated])
                rig.attend(repeated, 0, random_tokens(case, 3, seed=5))  # the second layer never saw it
            rig.block(sequence, tokens[:5])
            rig.block(sequence, tokens[5:6])
        fork = rig.fork(repeated)
        repeated.rewind()
        rig.block(repeated, tokens[5:6])
        for sequence in (straight, repeated, fork):
            rig.feed(sequence, tokens[6:])
        for sequence in (repeated, fork):
            for ours, theirs in zip(states(sequence), states(straight), strict=True):
                assert torch.equal(ours, theirs)


def test_the_moment_of_the_queries_is_in_the_budget_until_the_fit() -> None:
    case = Case(n_layers=2, kind="sketch")
    tokens = random_tokens(case, 60)
    with tiered(case) as rig:
        sequence = rig.new()
        rig.block(sequence, tokens[:5])
        one = QueryMoment.bytes_needed(case.n_kv_heads, case.head_dim)
        assert rig.gpu.used_bytes == rig.residency.device.used_bytes + 2 * one
        fork = rig.fork(sequence)
        assert rig.gpu.used_bytes == rig.residency.device.used_bytes + 4 * one
        rig.engine.release(fork)
        del fork
        rig.feed(sequence, tokens[5:])
        summaries = sum(layer.codes._slabs[0].tensors["codes"].nbytes for layer in sequence.layers)
        summaries += sum(layer.codes._slabs[0].tensors["scale"].nbytes for layer in sequence.layers)
        fitted = sum(tensor.nbytes for layer in sequence.layers for tensor in layer.fitted.state)
        assert rig.gpu.used_bytes == rig.residency.device.used_bytes + summaries + fitted


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_stand_for_the_chunks_keys(bits: int) -> None:
    case = Case(n_layers=2, kind="sketch", rank=8, bits=bits)
    g = case.geometry
    tokens = random_tokens(case, 50)
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, tokens)
        for layer in range(case.n_layers):
            scale = codes_of(sequence, layer)["scale"].float()
            for kv_head, index in np.ndindex(case.n_kv_heads, sequence.layers[layer].retired):
                begin = g.sink + index * g.chunk
                keys = tokens.k[layer, kv_head, begin : begin + g.chunk].double().numpy()
                to = sequence.layers[layer].fitted.state[1][kv_head].double().numpy()
                error = np.abs((sketched_keys(case, sequence, layer, kv_head, index) - keys) @ to)
                bound = scale[kv_head, index].numpy() * (0.5 + (2 ** (bits - 1)) / 256)
                assert (error <= bound * (1 + 1e-4)).all()


def test_a_full_sketch_chooses_almost_as_the_keys_do() -> None:
    same = total = 0
    for seed in range(6):
        chosen = []
        for kind in KINDS:
            case = Case(with_select(Case(), 5).geometry, kind=kind, rank=8, bits=8)
            with tiered(case) as rig:
                rig.feed(rig.new(), random_tokens(case, 120, seed))
                chosen.append(rig.engine.last_chosen[0].tolist())
        for exact, sketch in zip(*chosen, strict=True):
            same, total = same + len(set(exact) & set(sketch)), total + len(exact)
    assert same >= 0.95 * total


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), shape=st.tuples(*[st.integers(1, 6)] * 3), seed=st.integers(0, 999))
def test_quantisation_is_right_to_half_a_scale(bits: int, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-3, 4, (1,), generator=generator)
    codes, scale = quantize(x, bits, dim=1)
    top = 2 ** (bits - 1) - 1
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.bfloat16, (shape[0], 1, shape[2]))
    assert codes.abs().max() <= top
    rounding = 2**-8 * top  # of the scale to bfloat16: clamping the largest value can cost that much
    error = (codes * scale.float() - x).abs()
    assert (error <= scale.float() * (0.5 + 1e-5 + rounding * (codes.abs() == top))).all()
    largest = x.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.float() * top, largest, rtol=2**-8, atol=0)


def test_zeros_are_exact() -> None:
    codes, scale = quantize(torch.zeros(2, 3, 4), 4, dim=1)
    assert not codes.any()
    assert not scale.any()


@pytest.mark.parametrize("bits", [2, 4, 8])
@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 21), seed=st.integers(0, 999))
def test_packing_round_trip(bits: int, rank: int, seed: int) -> None:
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (3, 2, rank), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 2, packed_size(rank, bits)))
    assert packed.shape[-1] == -(-rank * bits // 8)
    assert torch.equal(unpack(packed, bits, rank), codes.float())


def test_packing_leaves_its_input_alone() -> None:
    codes = torch.tensor([[-7, 7, 0]], dtype=torch.int8)
    pack(codes, 4)
    assert codes.tolist() == [[-7, 7, 0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scores_are_the_largest_of_what_codes_stand_for(bits: int) -> None:
    generator = torch.Generator().manual_seed(6)
    keys, q = torch.randn(2, 5, 4, 6, generator=generator) + 1, torch.randn(2, 3, 6, generator=generator)
    mean, to, back = fit_basis(keys.flatten(1, 2), q.mT @ q, 3)
    codes, scale = encode_sketch(keys, mean, to, bits)
    decoded = (unpack(codes, bits, 3) * scale[:, :, None]) @ back[:, None].transpose(2, 3) + mean[:, None, None]
    expected = torch.einsum("nqd,nmcd->nqmc", q, decoded).amax(-1)
    torch.testing.assert_close(sketch_scores(q, codes, scale, mean, back, bits), expected, rtol=0, atol=1e-5)


def test_one_scale_per_chunk_and_direction() -> None:
    keys = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(4))
    mean, basis, _ = fit_basis(keys.flatten(1, 2), torch.eye(6).expand(2, 6, 6), 3)
    codes, scale = encode_sketch(keys, mean, basis, 8)
    assert (codes.shape, scale.shape) == ((2, 5, 4, 3), (2, 5, 3))
    alone = [encode_sketch(keys[:, i : i + 1], mean, basis, 8) for i in range(5)]
    torch.testing.assert_close(torch.cat([s for _, s in alone], dim=1), scale)


# -- where chunks are does not matter ----------------------------------------------------------------------------------


def assert_every_tier_was_used(residency: Residency) -> None:
    assert residency.store is not None
    assert residency.device.counters.misses > 0
    assert residency.host.counters.hits > 0
    assert residency.store.counters.bytes_written > 0
    assert residency.store.counters.bytes_read > 0


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_tiers_give_the_same_bits_as_large_ones(kind: str) -> None:
    case = Case(n_layers=2, kind=kind)
    tokens = random_tokens(case, 100)
    with tiered(case) as roomy, tight(case, windows=0) as small:
        assert_same(roomy.feed(roomy.new(), tokens), small.feed(small.new(), tokens))
        assert_every_tier_was_used(small.residency)
        assert roomy.residency.host.counters.misses == 0


@settings(max_examples=25, deadline=None)
@given(case=cases(), appends=APPENDS, seed=st.integers(0, 99))
def test_any_geometry_in_tiny_tiers_gives_the_same_bits(case: Case, appends: list[int], seed: int) -> None:
    with tiered(case) as roomy, tight(case, windows=0) as small:
        sequences = roomy.new(), small.new()
        for i, n in enumerate(appends):
            tokens = random_tokens(case, n, 1000 * seed + i)
            assert_same(roomy.feed(sequences[0], tokens), small.feed(sequences[1], tokens))


# -- forks -------------------------------------------------------------------------------------------------------------


def tokens_of(case: Case, *seeds_and_lengths: tuple[int, int]) -> list[Tokens]:
    return [random_tokens(case, n, seed) for seed, n in seeds_and_lengths]


def fresh(case: Case, *appends: Tokens, select: int | None = None) -> torch.Tensor:
    """What the last of these appends gives on a sequence of its own."""
    with tiered(case) as rig:
        sequence = rig.new(select)
        return [rig.feed(sequence, tokens) for tokens in appends][-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [4, 9, 13, 37, 60])
def test_a_fork_and_its_parent_go_on_as_if_alone(kind: str, held: int) -> None:
    case = Case(n_layers=2, kind=kind)
    past, one, two, three = tokens_of(case, (0, held), (1, 30), (2, 25), (3, 20))
    with tight(case, windows=3) as rig:
        parent = rig.new()
        rig.feed(parent, past)
        fork = rig.fork(parent)
        assert_same(rig.feed(fork, one), fresh(case, past, one))
        assert_same(rig.feed(parent, two), fresh(case, past, two))
        fork_of_fork = rig.fork(fork)
        assert_same(rig.feed(fork_of_fork, three), fresh(case, past, one, three))
        assert_same(rig.feed(fork, two), fresh(case, past, one, two))
        assert_every_tier_was_used(rig.residency)


@pytest.mark.parametrize("held", [0, 1, 2, 3])
def test_a_fork_of_no_more_than_the_sinks(held: int) -> None:
    case = Case()
    past, more = tokens_of(case, (0, held), (1, 30))
    appends = [past] if held else []
    with tiered(case) as rig:
        parent = rig.new()
        for tokens in appends:
            rig.feed(parent, tokens)
        fork = rig.fork(parent)
        assert_same(rig.feed(fork, more), fresh(case, *appends, more))
        assert_same(rig.feed(parent, more), fresh(case, *appends, more))


@pytest.mark.parametrize("kind", KINDS)
def test_three_forks_take_turns_token_by_token(kind: str) -> None:
    case = Case(n_layers=2, kind=kind)
    past, *ways = tokens_of(case, (0, 61), (1, 15), (2, 15), (3, 15))
    with tight(case, windows=4) as rig:
        parent = rig.new()
        rig.feed(parent, past)
        forks = [rig.fork(parent) for _ in ways]
        outs: list[list[torch.Tensor]] = [[] for _ in ways]
        for i in range(15):
            for fork, tokens, out in zip(forks, ways, outs, strict=True):
                out.append(rig.block(fork, tokens[i : i + 1]))
        with tiered(case) as alone:
            for tokens, out in zip(ways, outs, strict=True):
                sequence = alone.new()
                alone.feed(sequence, past)
                expected = [alone.block(sequence, tokens[i : i + 1]) for i in range(15)]
                assert_same(torch.cat(out, dim=2), torch.cat(expected, dim=2))


def test_a_fork_without_selection() -> None:
    case = Case(n_layers=2)
    past, more = tokens_of(case, (0, 60), (1, 20))
    with tiered(case) as rig:
        parent = rig.new()
        rig.feed(parent, past)
        fork = rig.fork(parent, select=0)
        assert_same(rig.feed(fork, more), fresh(case, past, more, select=0))
        assert rig.engine.last_chosen == [None, None]
        assert_same(rig.feed(parent, more), fresh(case, past, more))


@dataclass
class Twin:
    """A sequence among forks, and one that lives alone and gets the same tokens."""

    forked: TieredSequence
    alone: TieredSequence
    rig: Rig
    history: list[Tokens]
    rewound: bool = False


FAMILY = 4


class Family:
    """Sequences that fork, append, rewind and leave in any order; each must do what its twin does."""

    def __init__(self, case: Case, rig: Rig, solitude: Rig, data: st.DataObject) -> None:
        self.case, self.rig, self.solitude, self.data = case, rig, solitude, data
        self.twins = [Twin(rig.new(), solitude.new(), solitude, [])]
        self.seed = 0

    def append(self, twin: Twin) -> None:
        self.seed += 1
        tokens = random_tokens(self.case, self.data.draw(st.integers(1, 30)), self.seed)
        self.feed(twin, tokens)
        twin.history.append(tokens)

    def feed(self, twin: Twin, tokens: Tokens) -> None:
        assert_same(self.rig.feed(twin.forked, tokens), self.solitude.feed(twin.alone, tokens))

    def repeat_last(self, twin: Twin) -> None:
        """Rewind, and feed the last token again."""
        if twin.history:
            before = twin.forked.tokens.array().tolist()
            twin.forked.rewind()
            twin.alone.rewind()
            self.feed(twin, twin.history[-1][-1:])
            assert twin.forked.tokens.array().tolist() == before

    def fork(self, twin: Twin) -> None:
        """The twin of a fork starts from scratch."""
        if len(self.twins) == FAMILY:
            return
        alone = self.solitude.new()
        for tokens in twin.history:
            self.solitude.feed(alone, tokens)
        self.twins.append(Twin(self.rig.fork(twin.forked), alone, self.solitude, list(twin.history)))

    def release(self, twin: Twin) -> None:
        if len(self.twins) > 1:
            self.rig.engine.release(twin.forked)
            self.solitude.engine.release(twin.alone)
            self.twins.remove(twin)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_family_of_forks(kind: str, data: st.DataObject) -> None:
    geometry = make_geometry(sink=data.draw(st.integers(0, 2)), block=data.draw(st.integers(2, 9)), tail=2)
    case = Case(geometry, n_layers=2, kind=kind)
    with tight(case, windows=FAMILY) as rig, tiered(case) as solitude:
        family = Family(case, rig, solitude, data)
        family.feed(family.twins[0], start := random_tokens(case, geometry.sink + 1, 999))
        family.twins[0].history.append(start)
        steps = [family.append, family.append, family.fork, family.repeat_last, family.release]
        for _ in range(data.draw(st.integers(1, 10))):
            step = data.draw(st.sampled_from(steps))
            step(data.draw(st.sampled_from(family.twins)))
        for twin in family.twins:
            rig.engine.release(twin.forked)
        assert_nothing_left(rig)


def assert_nothing_left(rig: Rig) -> None:
    """No chunk in any tier, no summary, no parked window."""
    r = rig.residency
    assert r.store is not None
    assert [len(tier) for tier in (r.device, r.host, r.store)] == [0, 0, 0]
    assert rig.gpu.used_bytes == r.device.used_bytes
    assert rig.host.used_bytes == r.host.used_bytes


@pytest.mark.parametrize("parent_first", [True, False])
def test_the_last_release_frees_every_chunk_in_every_tier(parent_first: bool) -> None:
    case = Case(n_layers=2, kind="sketch")
    past, one, two = tokens_of(case, (0, 60), (1, 20), (2, 20))
    with tight(case, windows=2) as rig:
        parent = rig.new()
        rig.feed(parent, past)
        fork = rig.fork(parent)
        rig.feed(fork, one)
        assert_every_tier_was_used(rig.residency)
        first, second = (parent, fork) if parent_first else (fork, parent)
        rig.engine.release(first)
        rig.engine.release(first)
        assert_same(rig.feed(second, two), fresh(case, past, *([one] if parent_first else []), two))
        rig.engine.release(second)
        assert_nothing_left(rig)
        again = rig.new()
        assert_same(rig.feed(again, past), fresh(case, past))


def test_rewinding_a_token_repeats_it_exactly() -> None:
    case = Case(n_layers=2, kind="sketch")
    with tight(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, random_tokens(case, 50))
        for i in range(12):
            token = random_tokens(case, 1, seed=i)
            out = rig.block(sequence, token)
            sequence.rewind()
            assert_same(rig.block(sequence, token), out)
        assert sequence.length == len(sequence.tokens) == 62
        assert sequence.block_starts[-12:] == list(range(50, 62))


@pytest.mark.parametrize("elsewhere", ["nothing", "another runs", "a fork runs"])
def test_another_token_after_a_rewind(elsewhere: str) -> None:
    case = Case(n_layers=2, kind="sketch")
    past, wrong, right = tokens_of(case, (0, 50), (1, 1), (2, 30))
    with tight(case, windows=2) as rig:
        sequence = rig.new()
        rig.feed(sequence, past)
        rig.block(sequence, wrong)
        if elsewhere == "a fork runs":
            rig.feed(rig.fork(sequence), right)
        sequence.rewind()
        if elsewhere == "another runs":
            rig.feed(rig.new(), right)
        assert_same(rig.feed(sequence, right), fresh(case, past, right))


def test_a_fork_of_a_rewound_sequence_cannot_be_rewound_again() -> None:
    """The token before is no longer in the ring."""
    case = Case(n_layers=2)
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, random_tokens(case, 50))
        for i in range(2):
            rig.block(sequence, random_tokens(case, 1, seed=i))
        sequence.rewind()
        assert not sequence.can_rewind()
        assert not rig.fork(sequence).can_rewind()


def test_a_parked_window_is_not_that_of_other_tokens() -> None:
    """A fork is taken, then the parent's last token is replaced: the parked window is as long, but another."""
    case = Case(n_layers=2)
    past, wrong, right, more = tokens_of(case, (0, 50), (1, 1), (2, 1), (3, 20))
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, past)
        rig.block(sequence, wrong)
        rig.fork(sequence)
        sequence.rewind()
        rig.block(sequence, right)
        rig.feed(rig.new(), past)
        assert_same(rig.feed(sequence, more), fresh(case, past, right, more))


def test_a_parked_window_goes_when_nobody_needs_it() -> None:
    case = Case(n_layers=2)
    with tiered(case) as rig:
        parent = rig.new()
        rig.feed(parent, random_tokens(case, 30))
        used = rig.host.used_bytes
        fork = rig.fork(parent)
        assert rig.host.used_bytes > used
        rig.block(parent, random_tokens(case, 1))
        rig.engine.release(fork)
        assert rig.host.used_bytes - rig.residency.host.used_bytes == 0


@pytest.mark.parametrize("times", [2, 7, 9, 20])
def test_rewinding_many_tokens_is_exact_or_refused(times: int) -> None:
    """The state before each token, exactly, as often as ``can_rewind`` allows it."""
    case = Case(n_layers=2, kind="sketch")
    past, wrong, right = tokens_of(case, (0, 50), (1, 20), (2, 30))
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, past)
        for i in range(20):
            rig.block(sequence, wrong[i : i + 1])
        left = 20
        while left > 20 - times and sequence.can_rewind():
            sequence.rewind()
            left -= 1
        out = rig.feed(sequence, right)
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, past)
        for i in range(left):
            rig.block(sequence, wrong[i : i + 1])
        assert_same(rig.feed(sequence, right), out)


# -- blocks that fail --------------------------------------------------------------------------------------------------


@contextmanager
def nearly_full_host(case: Case, past: Tokens, room: int) -> Iterator[tuple[Rig, TieredSequence, TieredSequence]]:
    """No store; a sequence that holds ``past`` and runs, one that can be released, and room for ``room`` chunks."""
    with tiered(case) as rig, patch.object(residency_module, "SPILL_BATCH", 1):
        other, sequence = rig.new(), rig.new()
        rig.feed(other, random_tokens(case, 60, seed=77))
        rig.feed(sequence, past)
        rig.host.take(rig.host.free_bytes - room * case.chunk_bytes, "others")
        assert rig.residency.host.room() == room
        yield rig, other, sequence


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [13, 29], ids=["first chunks", "more chunks"])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("missing", [1, 3], ids=["one missing", "most missing"])
def test_a_block_that_fails_half_way_can_be_repeated(kind: str, held: int, failing: int, missing: int) -> None:
    """The block after ``held`` tokens retires at least one chunk of both KV heads in each of two layers."""
    case = Case(n_layers=2, kind=kind)
    past, more = tokens_of(case, (0, held), (1, 24))
    block, rest = more[:8], more[8:]
    new_chunks = 2 * (case.geometry.selectable(held) - case.geometry.selectable(held - 1))
    assert new_chunks == 2
    with nearly_full_host(case, past, (failing + 1) * new_chunks - min(missing, new_chunks)) as (rig, other, sequence):
        for _ in range(2):
            with pytest.raises(BudgetError, match=r"\[budget\] host"):
                rig.block(sequence, block)
            assert len(sequence.tokens) == sequence.length == held
            assert len(rig.residency.host) == sum(chunks.ids.size for chunks in other.layers + sequence.layers)
        retired = [layer.retired for layer in sequence.layers]
        assert (retired[0] > retired[1]) == (failing == 1)
        rig.engine.release(other)
        out = torch.cat([rig.block(sequence, block), rig.feed(sequence, rest)], dim=2)
        assert_same(out, after(case, past, block, rest))


def after(case: Case, past: Tokens, block: Tokens, rest: Tokens) -> torch.Tensor:
    """What an undisturbed engine gives for a block and an append behind ``past``."""
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, past)
        return torch.cat([rig.block(sequence, block), rig.feed(sequence, rest)], dim=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [13, 29])
def test_others_run_between_a_failed_block_and_its_repetition(kind: str, held: int) -> None:
    """It is parked while its layers differ in how many chunks have left the window; a fork is taken, too."""
    case = Case(n_layers=2, kind=kind)
    past, block, rest, others = tokens_of(case, (0, held), (1, 8), (2, 16), (3, 40))
    with nearly_full_host(case, past, 2) as (rig, other, sequence):
        with pytest.raises(BudgetError, match=r"\[budget\] host"):
            rig.block(sequence, block)
        rig.host.give(rig.host.used_bytes // 2)
        rig.engine.release(other)
        fork = rig.fork(sequence)
        assert_same(rig.feed(rig.new(), others), fresh(case, others))
        expected = after(case, past, block, rest)
        for one in (sequence, fork):
            assert_same(torch.cat([rig.block(one, block), rig.feed(one, rest)], dim=2), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_after_a_failed_block_has_summaries_of_its_own(kind: str) -> None:
    """The block reserved summaries before it failed: two forks must not both fill that reserve."""
    case = Case(n_layers=2, kind=kind)
    past, block, one, two, rest = tokens_of(case, (0, 13), (1, 8), (2, 30), (3, 30), (4, 20))
    with nearly_full_host(case, past, 1) as (rig, _, sequence):
        with pytest.raises(BudgetError, match=r"\[budget\] host"):
            rig.block(sequence, block)
        rig.host.give(rig.host.used_bytes // 2)
        fork = rig.fork(sequence)
        rig.feed(sequence, one)
        rig.feed(fork, two)
        assert_same(rig.feed(sequence, rest), fresh(case, past, one, rest))
        assert_same(rig.feed(fork, rest), fresh(case, past, two, rest))


def test_no_room_for_summaries_leaves_the_sequence_usable() -> None:
    case = Case(n_layers=2)
    past, block, rest = tokens_of(case, (0, 13), (1, 8), (2, 16))
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, past)
        held = rig.gpu.free_bytes
        rig.gpu.take(held, "others")
        with pytest.raises(BudgetError, match=r"\[budget\] gpu .* summaries"):
            rig.block(sequence, block)
        assert len(rig.residency.host) == 0
        rig.gpu.give(held)
        out = torch.cat([rig.block(sequence, block), rig.feed(sequence, rest)], dim=2)
        assert_same(out, after(case, past, block, rest))


def test_parking_uses_host_slots_that_are_free() -> None:
    """The pool keeps the slabs of a released sequence; a window must get their bytes, store or not."""
    case = Case()
    past, more = tokens_of(case, (0, 20), (1, 20))
    with tiered(case) as rig:
        other = rig.new()
        rig.feed(other, random_tokens(case, 200, seed=9))
        rig.host.take(rig.host.free_bytes, "others")
        rig.engine.release(other)
        assert len(rig.residency.host) == 0
        assert rig.residency.host.used_bytes > case.window_bytes
        sequence = rig.new()
        rig.feed(sequence, past)
        fork = rig.fork(sequence)
        assert_same(rig.feed(fork, more), fresh(case, past, more))


def test_no_room_to_park_leaves_the_running_sequence_usable() -> None:
    case = Case()
    past, more = tokens_of(case, (0, 40), (1, 20))
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, past)
        held = rig.host.free_bytes - 3 * case.chunk_bytes
        rig.host.take(held, "others")
        with pytest.raises(BudgetError, match=r"\[budget\] host"):
            rig.fork(sequence)
        with pytest.raises(BudgetError, match=r"\[budget\] host"):
            rig.feed(rig.new(), more)
        rig.host.give(held)
        assert_same(rig.feed(sequence, more), fresh(case, past, more))


def stored_chunk(rig: Rig, chunk_id: int) -> torch.Tensor:
    """A chunk [2, C, D], from the lower tier that has it."""
    tiers = [tier for tier in (rig.residency.host, rig.residency.store) if tier and tier.has(np.array([chunk_id]))[0]]
    out = torch.empty(1, 2, rig.case.geometry.chunk, rig.case.head_dim)
    tiers[0].get(np.array([chunk_id]), out)
    return out[0]


def assert_chunks_read_back(rig: Rig, sequence: TieredSequence, tokens: Tokens) -> None:
    g = rig.case.geometry
    for layer, chunks in enumerate(sequence.layers):
        for kv_head, index in np.ndindex(*chunks.ids.shape):
            part = slice(g.sink + index * g.chunk, g.sink + (index + 1) * g.chunk)
            expected = torch.stack([tokens.k[layer, kv_head, part], tokens.v[layer, kv_head, part]])
            assert torch.equal(stored_chunk(rig, chunks.ids[kv_head, index]), expected)


def feed_until_full(rig: Rig, sequence: TieredSequence, tokens: Tokens, match: str) -> int:
    """Blocks of 8 until a budget is full; the tokens held then."""
    with pytest.raises(BudgetError, match=match):  # noqa: PT012
        for begin in range(0, len(tokens), 8):
            rig.block(sequence, tokens[begin : begin + 8])
    return sequence.length


@pytest.mark.parametrize(("disk_bytes", "match"), [(None, r"\[budget\] host"), (300_000, r"\[budget\] disk")])
def test_full_tiers_name_their_budget_and_lose_nothing(disk_bytes: int | None, match: str) -> None:
    case = Case(n_layers=2)
    tokens = random_tokens(case, 800)
    host_bytes = 2 * case.window_bytes + 30 * case.chunk_bytes
    with tiered(case, slots=4, host_bytes=host_bytes, disk_bytes=disk_bytes) as rig:
        sequence = rig.new()
        held = feed_until_full(rig, sequence, tokens, match)
        assert min(layer.retired for layer in sequence.layers) > 10
        assert_chunks_read_back(rig, sequence, tokens)
        assert feed_until_full(rig, sequence, tokens[held:], match) == held
        assert_chunks_read_back(rig, sequence, tokens)
        assert rig.host.used_bytes <= host_bytes
        rig.engine.release(sequence)
        again = rig.new()
        with tiered(case) as roomy:
            assert_same(rig.feed(again, tokens[:64]), roomy.feed(roomy.new(), tokens[:64]))
