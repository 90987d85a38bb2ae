"""bench.fidelity: texts, a capture against the engine that it was made with, and the analysis of it."""

from types import SimpleNamespace

import pytest
import torch
from fidelity_cases import SMALL, D, one_thread  # noqa: F401
from models import prompt, tiny_llama

import kvtier
from bench.fidelity import analyse as analysis
from bench.fidelity import capture as capturing
from bench.fidelity import metrics, report, texts
from bench.fidelity.analyse import CEILING, FLOOR, analyse
from bench.fidelity.capture import CONTEXT, capture, sampled_blocks
from bench.fidelity.problem import LayerCapture, Problem, default_geometry, measured_steps, read_meta
from bench.fidelity.quantisers import ChunkScale, Product, Truncated
from bench.fidelity.variants import Coded, Shipped
from kvtier.kernels.select import chunk_weights, top_chunks
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.summary import make_summary

# -- captures ----------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single characters."""

    bos_token_id = 1

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def get_vocab(self):
        return {}


@pytest.mark.parametrize("kind", texts.KINDS)
def test_a_text_has_its_length_and_its_answers(kind):
    text = texts.make_text(kind, Letters(), 6000, 3)
    assert len(text.ids) == 6000
    assert len(text.asks) == 3
    assert texts.make_text(kind, Letters(), 6000, 3) == text
    for ask in text.asks:
        assert ask.ids
        if ask.answer:
            begin, end = ask.span
            assert ask.answer in Letters().decode(text.ids[begin:end])
            assert ask.answer not in Letters().decode(ask.ids)
            assert abs(begin / 6000 - ask.depth) < 0.1
    assert sum(bool(ask.answer) for ask in text.asks) == (0 if kind == "code" else 3)


def tiny_model():
    return tiny_llama(layers=2, heads=4, kv_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A capture of a tiny model, in float32, and what its engine returned at each layer and start."""
    folder, outputs = tmp_path_factory.mktemp("fidelity"), {}
    ids = prompt(760, seed=4)[0].tolist()
    asks = (texts.Ask(ids[700:720], "x", (300, 304), 0.4), texts.Ask(ids[720:760]))
    inner = capturing.Recorder.__call__

    def watched(self, sequence, layer, *args):
        out = inner(self, sequence, layer, *args)
        outputs[self.ask, layer, sequence.length] = (out, self._engine.last_chosen[layer])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capturing, "DTYPE", torch.float32)
        patch.setattr(capturing.Recorder, "__call__", watched)
        capture("tiny", Letters(), tiny_model(), texts.Text("prose", ids[:700], asks), folder, blocks=2, steps=3)
    return folder, outputs


def test_a_capture_gives_the_engine_s_choice_and_output(captured):
    """From the files alone: the chunks that the engine chose, and what its attention returned."""
    folder, outputs = captured
    meta = read_meta(folder)
    g = Geometry(**meta.geometry)
    assert g == default_geometry(512)
    seen = set()
    steps = measured_steps(meta, g, 2)
    for layer in meta.layers:
        problem = Problem(LayerCapture(folder, meta, layer, "cpu"), g, steps)
        for question in problem.questions:
            step = question.step
            out, chosen = outputs[step.ask, layer, step.start]
            assert torch.equal(question.chosen, chosen)
            ours = metrics.attended_output(problem.capture, step, g, chosen, 10_000)
            torch.testing.assert_close(ours, out, rtol=1e-3, atol=1e-4)
            seen.add((step.phase, step.ask))
    assert {("prefill", CONTEXT), ("tail", 0), ("tail", 1), ("decode", 0), ("decode", 1)} <= seen


def test_the_queries_moments_are_those_of_all_queries_before(captured):
    folder, _ = captured
    meta = read_meta(folder)
    layer = LayerCapture(folder, meta, 1, "cpu")
    last = next(s for s in meta.steps if s.ask == CONTEXT and s.phase == "tail")
    after = meta.block_starts[meta.block_starts.index(last.start) + 1]
    n_before, n_after = last.start * 2, after * 2  # two query heads per KV head
    assert after == last.start + last.size
    added = layer.q_outer(after) * n_after - layer.q_outer(last.start) * n_before
    rows = layer.q(last).reshape(2, -1, 16)
    torch.testing.assert_close(added, rows.mT @ rows, rtol=1e-2, atol=1e-2)


def test_a_sketch_is_fitted_to_what_the_engine_fits_it_to(captured):
    """The first layer's keys and queries do not depend on the choice of chunks: the engine's own fit is ours."""
    folder, _ = captured
    meta = read_meta(folder)
    g = Geometry(**meta.geometry)
    problem = Problem(LayerCapture(folder, meta, 0, "cpu"), g, measured_steps(meta, g, 1))
    ours = make_summary("sketch", chunk=g.chunk, head_dim=16, dtype=torch.float32, rank=4)
    mean, to, back = ours.fit(problem.fit_keys, problem.q_outer)
    with kvtier.offload(tiny_model(), {"summary": {"kind": "sketch", "rank": 4}}) as kv:
        book = kv.prefill(prompt(760, seed=4)[0, :700].tolist())
        theirs = book._lane.sequences[0].layers[0].fitted.state
    torch.testing.assert_close(theirs[0], mean)
    torch.testing.assert_close(theirs[1] @ theirs[2].mT, to @ back.mT, rtol=1e-3, atol=1e-3)


def test_layers_with_a_sliding_window_are_not_recorded():
    shape = SimpleNamespace(sliding_layers=frozenset({0}))
    engine = SimpleNamespace(shape=shape, geometry=SMALL, attend=lambda sequence, layer, q, k, v, logits: q + layer)
    recorder = capturing.Recorder(engine, 8, {0})
    q, kv = torch.ones(4, 8, D), torch.ones(2, 8, D)
    for layer in (0, 1):
        assert torch.equal(recorder(SimpleNamespace(length=0), layer, q, kv, kv, 0.5), q + layer)
    assert list(recorder.tensors) == [1]
    assert recorder.scaling == {1: 0.5}


def test_sampled_blocks_are_full_blocks_and_the_tail():
    g = default_geometry(8192)
    starts = sampled_blocks(g, 65536, 4)
    tail = {b for b, e in g.schedule(65536) if e - b == g.tail}
    assert tail < starts
    full = sorted(starts - tail)
    assert len(full) == 4
    assert all(b % 1024 == 0 and b >= 16384 for b in full)


def test_analysis_has_floor_ceiling_and_every_variant(captured):
    folder, _ = captured
    g = Geometry(**read_meta(folder).geometry)

    def make():
        return [Shipped("mean"), Coded("queries", Truncated(16)), Coded("queries", Product(4, 4))]

    rows = list(analyse(folder, make, g, device="cpu", decode=2, layers=9, queries=4))
    by = {}
    for row in rows:
        by.setdefault(row.variant, []).append(row)
    assert set(by) == {FLOOR, CEILING, "mean", "queries/first-16", "queries/pq-4x4"}
    assert {len(each) for each in by.values()} == {len(rows) // 5}
    assert all(row.recall == 1.0 and row.error == 0.0 for row in by[CEILING])

    def mean(name):
        return report.mean(row.recall for row in by[name])

    assert mean("queries/first-16") > 0.95  # all 16 dimensions in bfloat16
    assert mean(FLOOR) < mean("queries/pq-4x4") < mean("queries/first-16")
    asked = [row for row in by[CEILING] if row.needle is not None]
    assert {row.step.split(".")[0] for row in asked} == {"ask0"}


def test_weights_in_pieces_are_weights_at_once(captured, monkeypatch):
    folder, _ = captured
    meta = read_meta(folder)
    g = Geometry(**meta.geometry)
    problem = Problem(LayerCapture(folder, meta, 0, "cpu"), g, measured_steps(meta, g, 1))
    variant = Coded("queries", ChunkScale(4, 4))
    variant.fit(problem.fit_keys, problem.q_outer)
    variant.encode(problem.keys)
    question = problem.questions[0]
    whole = chunk_weights(variant.scores(question.rows, question.n_chunks))
    monkeypatch.setattr(analysis, "SCORE_BYTES", 1)
    torch.testing.assert_close(analysis.weigh(variant, question), whole)
    assert top_chunks(whole, g.select).shape == (2, g.select)
