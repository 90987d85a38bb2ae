"""``kv.explain()``: weights and spans against a direct computation, and what tracing keeps, costs and refuses."""

import gc
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from engines import Case, Judge, make_geometry, random_tokens, tiered
from models import PAD, assert_untouched, fingerprint, prompt, settings, tiny_llama
from test_families import model_of

import kvtier
from kvtier.explain import explain
from kvtier.runtime import trace as trace_module
from kvtier.runtime import weighing
from kvtier.runtime.trace import Trace

BOOK, QUESTION = prompt(300), prompt(9, seed=1)
GREEDY = {"do_sample": False, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def few(**sections):
    """Settings with 3 of about 35 chunks chosen."""
    return settings(select=3, **sections)


class Words:
    """A tokenizer that says what it was asked for."""

    @staticmethod
    def decode(ids, **kwargs):
        return " ".join(f"w{i}" for i in ids)


# -- weights and spans -------------------------------------------------------------------------------------------------


def oracle_weights(case, tokens, blocks):
    """Per block and layer, [N, m] weights of all chunks and which of them are chosen, from the keys, in float64."""
    g, n_kv = case.geometry, case.n_kv_heads
    for begin, end in blocks:
        n_chunks = g.selectable(begin)
        for layer in range(case.n_layers):
            q = tokens.q[layer][:, begin:end][:, g.choosing(end - begin)].double() * case.scaling
            q = q.reshape(n_kv, -1, case.head_dim) * case.attention_scaling**2
            keys = tokens.k[layer][:, g.sink : g.sink + n_chunks * g.chunk].double()
            scores = (q @ keys.mT).unflatten(2, (n_chunks, g.chunk)).amax(dim=3)
            weights = scores.softmax(dim=2).mean(dim=1)
            chosen = torch.zeros_like(weights, dtype=torch.bool)
            chosen.scatter_(1, weights.topk(min(g.select, n_chunks), dim=1).indices, True)
            yield layer, weights, chosen


@pytest.mark.parametrize("score_bytes", [1 << 20, 1], ids=["whole", "in pieces"])
def test_weights_are_those_of_a_direct_computation(monkeypatch, score_bytes):
    """Blocks of several tokens and of one, a block that may choose all chunks, layers, KV heads, groups."""
    monkeypatch.setattr(weighing, "SCORE_BYTES", score_bytes)
    case = Case(make_geometry(sink=3, local=6, chunk=4, select=4, block=16), n_layers=2, group=2)
    tokens = random_tokens(case, 90)
    blocks = [(0, 16), (16, 30), (30, 46), (46, 62), (62, 78), (78, 79), (79, 90)]
    with tiered(case, summary_chunks=3) as rig:
        sequence = rig.new()
        rig.engine.trace = Trace(case.shape, rig.gpu)
        for begin, end in blocks:
            rig.block(sequence, tokens[begin:end])
        steps = rig.engine.trace.steps(sequence)
        found = explain(rig.engine, sequence, steps, 0, None, 4)
        rig.engine.trace.close()
    assert found.blocks == tuple(blocks)
    n = case.geometry.selectable(79)
    by_layer, by_block = np.zeros((2, n)), np.zeros((len(blocks), n))
    each = iter(oracle_weights(case, tokens, blocks))
    for b in range(len(blocks)):
        for _ in range(2):
            layer, weights, chosen = next(each)
            mean = (weights * chosen).mean(dim=0).numpy()
            by_layer[layer, : mean.size] += mean / len(blocks)
            by_block[b, : mean.size] += mean / 2
    np.testing.assert_allclose(found.by_layer, by_layer, atol=1e-6)
    np.testing.assert_allclose(found.by_block, by_block, atol=1e-6)
    assert found.share == pytest.approx(by_layer.sum() / 2, abs=1e-6)


def test_a_planted_span_is_found():
    """Its keys answer the queries of the question, not those before: it rises most, whatever weighs more."""
    case = Case(make_geometry(sink=4, local=16, chunk=8, select=6, block=32), n_layers=2, head_dim=16)
    g = case.geometry
    tokens = random_tokens(case, 400, seed=3)
    common, needle = torch.randn(2, case.head_dim, generator=torch.Generator().manual_seed(9))
    tokens.k[:, :, 12:20].add_(2 * common)  # chunk 1, to which every block gives much
    tokens.q.add_(common)
    tokens.k[:, :, 100:116].add_(needle)  # chunks 12 and 13
    tokens.q[:, :, 390:396].add_(needle)
    with tiered(case) as rig:
        sequence = rig.new()
        rig.feed(sequence, tokens[:380])
        rig.engine.trace = Trace(case.shape, rig.gpu)
        for begin, end in [(380, 390), (390, 395), (395, 396)]:
            rig.block(sequence, tokens[begin:end])
        found = explain(rig.engine, sequence, rig.engine.trace.steps(sequence), 0, Words, 3)
        rig.engine.trace.close()
    best = found.spans[0]
    assert (best.begin, best.end) == (g.sink + 12 * 8, g.sink + 14 * 8)
    assert best.by_block[0] < best.by_block[1]
    assert best.rise == pytest.approx(best.weight - best.by_block[0], abs=1e-6)
    assert best.weight == pytest.approx(sum(best.by_layer.values()) / 2, abs=1e-6)
    assert best.text == Words.decode(tokens.ids[100:116].tolist())
    assert found.by_layer.mean(axis=0).argmax() == 1, "the planted chunks would win by weight alone"


@pytest.mark.parametrize("kind", ["exact", "sketch", "mean"])
def test_the_trace_holds_what_was_chosen(kind):
    """In every block, layer and head; judged by the oracle for exact keys."""
    case = Case(make_geometry(block=10, select=3), group=2, n_layers=2, kind=kind)
    with tiered(case) as rig:
        judge = Judge(rig) if kind == "exact" else None
        sequence = judge.sequence if judge else rig.new()
        rig.engine.trace = trace = Trace(case.shape, rig.gpu)
        seen = []
        for seed in range(8):
            block = random_tokens(case, 10, seed)
            judge.block(block) if judge else rig.block(sequence, block)
            seen.append([None if c is None else c.tolist() for c in rig.engine.last_chosen])
        for step, chosen in zip(trace.steps(sequence), seen, strict=True):
            kept = [step.chosen_mask(layer) for layer in step.layers]
            assert [[row.nonzero().flatten().tolist() for row in mask] for mask in kept] == [c for c in chosen if c]
        assert any(step.layers and step.n_chunks > 3 for step in trace.steps(sequence))
        trace.close()


def test_generate_is_explained_from_the_question_on(model):
    with kvtier.offload(model, few(kind="exact")) as kv:
        book = kv.prefill(BOOK)
        expected = model.generate(QUESTION, past_key_values=book.fork(), **GREEDY)
        with kv.tracing():
            out = model.generate(QUESTION, past_key_values=book.fork(), **GREEDY)
        gc.collect()
        kv.stats()  # frees the chunks of caches that nobody holds
        found = kv.explain(tokenizer=Words)
    assert torch.equal(out, expected)
    assert found.blocks == ((300, 308), (308, 309), (309, 310), (310, 311), (311, 312), (312, 313))
    assert found.layers == (0, 1)
    assert 0 < found.share < 1
    assert found.by_layer.shape == (2, kv.geometry.selectable(312))
    assert found.by_layer.mean(axis=0).sum() == pytest.approx(found.by_block.mean(axis=0).sum(), abs=1e-6)
    for span in found.spans:
        assert (span.begin - 4) % 8 == 0
        assert span.text == Words.decode(BOOK[0, span.begin : span.end].tolist())
        assert span.layer in found.layers
    assert sum(span.end - span.begin for span in found.spans) <= 80
    assert [span.rise for span in found.spans] == sorted((span.rise for span in found.spans), reverse=True)


def test_where_all_chunks_are_attended_weights_add_up_to_one(model):
    with kvtier.offload(model, settings()) as kv:
        with kv.tracing():
            model.generate(BOOK, **GREEDY)
        assert kv.explain().share == pytest.approx(1 - 2 / 14, abs=0.1)  # the first blocks have no chunks
        late = [step for step in kv._trace.steps(kv._traced[-1]._lane.sequences[0]) if step.n_chunks]
        assert all(step.layers[0].chosen is None for step in late)
        with kv.tracing():
            model.generate(QUESTION, past_key_values=kv.prefill(BOOK), **GREEDY)
        found = kv.explain()
    np.testing.assert_allclose(found.by_block[-3:].sum(axis=1), 1, atol=1e-5)


def test_rows_forks_and_samples(model):
    """Each row is explained as it is alone; a fork without what ran before it."""
    with kvtier.offload(model, few()) as kv:
        book = kv.prefill(BOOK)
        long = prompt(14, seed=2)
        batch = torch.cat((torch.nn.functional.pad(QUESTION, (5, 0), value=PAD), long))
        mask = (torch.arange(14) >= torch.tensor([[5], [0]])).long()
        alone, together = book.fork(), book.fork(rows=2)
        with kv.tracing():
            model.generate(long, past_key_values=alone, **GREEDY)
            model.generate(batch, past_key_values=together, attention_mask=mask, **GREEDY)
            model.generate(QUESTION, past_key_values=book, **GREEDY | {"do_sample": True}, num_return_sequences=2)
        one, row = kv.explain(alone), kv.explain(together, row=1)
        assert one.blocks == row.blocks
        np.testing.assert_allclose(one.by_layer, row.by_layer, atol=1e-6)
        assert kv.explain(together, row=0).blocks[0] == (300, 308)
        sample = kv.explain(row=1)
        assert sample.blocks[0] == (308, 309)
        assert kv.explain(book).blocks == ((300, 308),)
        with pytest.raises(kvtier.UnsupportedError, match=r"say which row of the cache is meant: row=0 .. 1, not None"):
            kv.explain(together)
        with pytest.raises(kvtier.UnsupportedError, match="say which row"):
            kv.explain(together, row=2)


@pytest.mark.parametrize("name", ["gemma3", "smollm3"])
def test_hybrids_are_explained_in_their_full_layers(name):
    model = model_of(name)
    config = settings(window=256, select=3, local=8)
    with kvtier.offload(model, config) as kv:
        with kv.tracing():
            model.generate(prompt(120), **GREEDY)
        found = kv.explain()
        assert found.layers == tuple(kv._runtime.engine.shape.full_layers)
        assert 0 < found.share < 1
        assert kv.audit(steps=2).layers[0].layer == found.layers[0]


def test_a_block_that_runs_again_replaces_what_it_left(model):
    """The whole conversation again: the last token is fed again. And a block that failed half-way is not there."""
    with kvtier.offload(model, few()) as kv:
        cache = kv.prefill(BOOK)
        with kv.tracing():
            model.generate(BOOK, past_key_values=cache, **GREEDY)
            engine, attend = kv._runtime.engine, kv._runtime.engine.attend
            engine.attend = lambda sequence, layer, *rest: 1 / 0 if layer else attend(sequence, layer, *rest)
            with pytest.raises(ZeroDivisionError):
                model(QUESTION, past_key_values=cache)
            del engine.attend
            assert kv.explain().blocks == tuple((i, i + 1) for i in range(299, 304))
            model(QUESTION[:, :3], past_key_values=cache)
        assert kv.explain().blocks[-2:] == ((304, 306), (306, 307))


# -- what it prints ----------------------------------------------------------------------------------------------------


def test_table_json_and_plot(model, tmp_path):
    with kvtier.offload(model, few()) as kv:
        book = kv.prefill(BOOK)
        with kv.tracing():
            model.generate(QUESTION, past_key_values=book.fork(), **GREEDY)
        found, plain = kv.explain(tokenizer=Words, top=4), kv.explain(top=1)
    lines = str(found).splitlines()
    assert lines[0].startswith("6 blocks, tokens 300 to 313: the chunks attended to hold ")
    assert lines[2].split()[:2] == ["1", f"{found.spans[0].begin}-{found.spans[0].end}"]
    assert f"{100 * found.spans[0].rise:.2f}%" in lines[2]
    assert lines[3].split()[0] == f"w{BOOK[0, found.spans[0].begin]}"
    assert len(str(plain).splitlines()) == 3
    told = json.loads(json.dumps(found.to_dict()))
    assert told["spans"][0]["begin"] == found.spans[0].begin
    assert told["spans"][0]["by_layer"]["1"] == pytest.approx(found.spans[0].by_layer[1])
    assert told["blocks"][0] == [300, 308]
    found.plot(tmp_path / "why.svg")
    svg = ET.parse(tmp_path / "why.svg").getroot()
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"layer", "block at token", "300-308", "312", "4"} <= set(texts)
    paths = [element.get("d") for element in svg.iter("{http://www.w3.org/2000/svg}path")]
    cells = sum(d.count("M") for d in paths)
    shown = sum(int((each > each.max() * 3.0**-8).sum()) for each in (found.by_layer, found.by_block))
    assert cells == shown
    with pytest.raises(ValueError, match=r"a path that ends in \.svg, not"):
        found.plot(tmp_path / "why.png")


def test_a_long_text_is_plotted_in_columns_of_several_chunks(tmp_path):
    from kvtier.heatmap import Heatmap, draw

    weights = np.zeros((3, 1000), np.float32)
    weights[1, 500:505] = 0.1
    draw([Heatmap("layer", ["0", "1", "<2>"], weights)], [(4 + 500 * 8, 4 + 505 * 8, "1")], 4, 8, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text.count("M") == 1
    assert "&lt;2&gt;" in text
    draw([Heatmap("layer", ["0"], np.zeros((1, 0), np.float32))], [], 4, 8, tmp_path / "none.svg")
    ET.parse(tmp_path / "none.svg")


def test_a_short_text_says_so(model, tmp_path):
    with kvtier.offload(model, few()) as kv:
        with kv.tracing():
            model.generate(QUESTION, **GREEDY)
        found = kv.explain(tokenizer=Words)
        assert found.spans == ()
        assert found.share == 0
        assert str(found).endswith("sinks and window alone were attended to")
        found.plot(tmp_path / "none.svg")
        with pytest.raises(kvtier.KvtierError, match="the text fits into sinks and window, or select is 0"):
            kv.audit()


# -- what tracing keeps and costs --------------------------------------------------------------------------------------


def test_nothing_is_kept_without_tracing(model, monkeypatch):
    """No trace, no call, no queries made twice, no byte; and none afterwards."""
    monkeypatch.setattr(Trace, "add", lambda *arguments: pytest.fail("traced"))
    before = fingerprint(model)
    with kvtier.offload(model, few()) as kv:
        engine = kv._runtime.engine
        made, choosing = [], engine._choosing
        engine._choosing = lambda layer, *rest: made.append(layer) or choosing(layer, *rest)
        cache = kv.prefill(BOOK)
        made.clear()
        model(QUESTION[:, :1], past_key_values=cache)
        assert made == [0, 1]
        assert kv._traced == ()
        with pytest.raises(kvtier.KvtierError, match="nothing was traced: run what is"):
            kv.explain()
        with kv.tracing():
            pass
        with pytest.raises(kvtier.KvtierError, match="nothing was traced"):
            kv.audit()
        model(QUESTION[:, :1], past_key_values=cache)
    assert_untouched(model, before)


def test_its_bytes_count_and_come_back(model):
    with kvtier.offload(model, few()) as kv:
        gpu, cache = kv._runtime.gpu, kv.prefill(BOOK)
        model(QUESTION[:, :1], past_key_values=cache)
        before = gpu.used_bytes
        with kv.tracing():
            for _ in range(2):
                model(QUESTION[:, :1], past_key_values=cache)
        queries, chosen = 2 * 2 * 16 * 4, 2 * 3 * 4  # 2 KV heads x 2 heads x 16 x float32; 2 x 3 chunks x int32
        assert gpu.used_bytes - before == 2 * 2 * (queries + chosen)
        with kv.tracing():
            assert gpu.used_bytes == before
            model(QUESTION[:, :1], past_key_values=cache)
            cache.rewind()
            model(QUESTION[:, :1], past_key_values=cache)
        assert kv.explain().blocks == ((303, 304),)
        assert gpu.used_bytes - before == 2 * (queries + chosen)
    del cache
    gc.collect()
    assert gpu.used_bytes <= kv._runtime._sizes.fixed
    assert kv._traced == ()


@pytest.mark.parametrize("short", ["bytes", "budget"])
def test_where_there_is_no_room_the_newest_blocks_are_kept(model, monkeypatch, short):
    step = 2 * (2 * 2 * 16 * 4 + 2 * 3 * 4)
    with kvtier.offload(model, few()) as kv:
        cache = kv.prefill(BOOK)
        gpu = kv._runtime.gpu
        if short == "bytes":
            monkeypatch.setattr(trace_module, "MOST_BYTES", 3 * step)
        else:
            monkeypatch.setattr(gpu, "limit_bytes", gpu.used_bytes + 3 * step)
        with kv.tracing():
            model(QUESTION, past_key_values=cache)
            for i in range(4):
                model(QUESTION[:, i : i + 1], past_key_values=cache)
        found = kv.explain()
        assert found.blocks == ((310, 311), (311, 312), (312, 313))
        assert found.n_forgotten == 3
        assert "(3 before them had no room in the trace)" in str(found)
        monkeypatch.setattr(trace_module, "MOST_BYTES", step - 1)
        with kv.tracing():
            model(QUESTION[:, :1], past_key_values=cache)
        with pytest.raises(kvtier.KvtierError, match=r"the trace holds no block of this cache: \[budget\] gpu has no"):
            kv.explain()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_refusals_say_what_to_do(model):
    with kvtier.offload(model, few()) as kv:
        cache, other = kv.prefill(BOOK), kv.new_cache()
        with kv.tracing():
            with pytest.raises(kvtier.KvtierError, match=r"leave one `with kv\.tracing"), kv.tracing():
                pass
            model(QUESTION, past_key_values=cache)
        with pytest.raises(kvtier.UnsupportedError, match="this cache did not run in the last trace"):
            kv.explain(other)
        with pytest.raises(kvtier.UnsupportedError, match="a str cannot be looked at"):
            kv.explain("book")
        with pytest.raises(ValueError, match="top counts the chunks that are cited, 1 or more, not 0"):
            kv.explain(top=0)
        with pytest.raises(ValueError, match=r"steps counts the blocks that are audited, 1 or more, not 1\.5"):
            kv.audit(steps=1.5)
    for look in (kv.explain, kv.audit, lambda: kv.tracing().__enter__()):
        with pytest.raises(kvtier.KvtierError, match="looks at what the tiers hold: call it inside the offload block"):
            look()
    with kvtier.offload(model, few()) as again:
        again.prefill(BOOK)
        with again.tracing():
            model.generate(QUESTION, **GREEDY)
        with pytest.raises(kvtier.UnsupportedError, match="this cache did not run"):
            again.explain(cache)
    refused = pytest.raises(kvtier.UnsupportedError, match=r"is about chunks, which \[attention\] method")
    with kvtier.offload(model, {"attention": {"method": "reattention"}}) as paper, refused:
        paper.explain()


def test_an_exception_ends_the_trace(model):
    with kvtier.offload(model, few()) as kv:
        cache = kv.prefill(BOOK)
        with pytest.raises(ValueError, match="is not in the vocabulary"), kv.tracing():
            model(QUESTION + 10**6 * model(QUESTION, past_key_values=cache).logits.shape[1], past_key_values=cache)
        assert kv._runtime.engine.trace is None
        assert kv.explain().blocks == ((300, 308), (308, 309))
