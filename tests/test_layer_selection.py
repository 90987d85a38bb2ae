"""Triton's selection of a layer beside torch's, in the whole engine: the interpreter runs it where there is no GPU."""

import pytest
import torch
from engines import Case, make_geometry, random_tokens, tiered
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import repair

from kvtier.kernels.backend import triton
from kvtier.kernels.select import top_chunks
from kvtier.runtime import layer_selection
from kvtier.runtime.layer_selection import TorchSelection, TritonSelection, make_selection

pytestmark = pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="needs Triton's interpreter")
GEOMETRY = make_geometry(sink=3, local=6, chunk=2, select=3, block=128)
"""131 chunks in 271 tokens: two slabs of summaries."""


def choices(case, triton_selection):
    """The chunks that an engine chooses in each block, and what it gives in the end: two sequences, one a fork."""
    tokens, chosen = random_tokens(case, 300), []
    with tiered(case, slots=20_000, summary_chunks=128) as rig:
        if triton_selection:
            rig.engine._selection = TritonSelection(rig.engine.summary, rig.gpu)
        sequence = rig.new()
        for begin, end in [(0, 260), (260, 262), (262, 285)]:
            fork = rig.fork(sequence, 2) if begin else None
            for each, part in ((sequence, slice(begin, end)), (fork, slice(end, end + 1))):
                if each is not None:
                    rig.feed(each, tokens[part])
                    chosen.append([rig.engine.last_chosen[layer].tolist() for layer in range(case.n_layers)])
        return chosen, rig.feed(sequence, tokens[5:6])


@pytest.mark.parametrize("kind", ["sketch", "mean", "minmax", "cuboid"])
def test_triton_chooses_what_torch_chooses(kind):
    repair()
    case = Case(GEOMETRY, n_layers=2, head_dim=16, kind=kind, rank=8)
    (ours, out), (theirs, expected) = choices(case, True), choices(case, False)
    assert len({str(each) for each in theirs}) > 1
    assert ours == theirs
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_scratch_counts_in_the_budget(monkeypatch):
    repair()
    monkeypatch.setattr(layer_selection, "FEWEST_CHUNKS", 128)
    case = Case(GEOMETRY, n_layers=1, head_dim=16, kind="sketch", rank=8)
    with tiered(case, slots=20_000) as rig:
        selection = rig.engine._selection = TritonSelection(rig.engine.summary, rig.gpu)
        sequence = rig.new()
        rig.feed(sequence, random_tokens(case, 40))
        before = rig.gpu.used_bytes
        small = sum(layer_selection._bytes_of(work) for work in selection._work.values())
        assert small > 0
        rig.feed(sequence, random_tokens(case, 300, seed=1))
        grown = sum(layer_selection._bytes_of(work) for work in selection._work.values())
        codes = len(sequence.layers[0].codes._slabs) - 1
        assert grown > small
        assert rig.gpu.used_bytes - before - (grown - small) == codes * 128 * rig.engine.summary.chunk_bytes() * 2


def test_without_triton_torch_says_why(monkeypatch):
    with tiered(Case(GEOMETRY, head_dim=16, kind="sketch", rank=8)) as rig:
        summary, gpu = rig.engine.summary, rig.gpu
        monkeypatch.setattr(layer_selection, "runs_triton", lambda x: False)
        monkeypatch.setattr(layer_selection.torch, "empty", lambda *size, device: None)
        with pytest.warns(UserWarning, match="selection runs in torch, more slowly than in Triton"):
            assert type(make_selection(summary, torch.device("cuda"), gpu)) is TorchSelection
        assert type(make_selection(summary, torch.device("cpu"), gpu)) is TorchSelection


@pytest.mark.parametrize("nbytes", [1, 3000, 1 << 30])
def test_pieces_of_any_size_choose_the_same(monkeypatch, nbytes):
    case = Case(GEOMETRY, n_layers=1, head_dim=16, kind="sketch", rank=8)
    usual = choices(case, False)[0]
    joined, cat = [], torch.cat
    monkeypatch.setattr(layer_selection, "PIECE_BYTES", nbytes)
    monkeypatch.setattr(layer_selection.torch, "cat", lambda x, dim: joined.append(dim == 1) or cat(x, dim=dim))
    assert choices(case, False)[0] == usual
    assert any(joined) == (nbytes > 3000), "the slabs are beside each other or not"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(0, 1000))
def test_ties_go_to_the_lower_index(n, m, select, values, seed):
    weights = torch.randint(0, values, (n, m), generator=torch.Generator().manual_seed(seed)).float()
    order = torch.sort(weights, dim=-1, descending=True, stable=True).indices
    assert torch.equal(top_chunks(weights, select), order[:, :select].sort(dim=-1).values)


def test_weights_that_are_no_numbers_choose_as_many():
    weights = torch.tensor([[0.5, float("nan"), 0.2, 0.3], [float("nan")] * 4])
    assert top_chunks(weights, 2).tolist() == [[0, 3], [0, 1]]
