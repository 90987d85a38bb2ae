"""``kv.audit()``: recall and weights against a direct computation, wherever chunks are; what it suggests."""

import json

import pytest
import torch
from engines import Case, make_geometry, random_tokens, tiered, tight
from models import prompt, settings, tiny_llama
from test_explain import BOOK, GREEDY, QUESTION, few, oracle_weights

import kvtier
from kvtier.audit import Audit, LayerAudit, audit, sample, suggest
from kvtier.runtime import slabs, weighing
from kvtier.runtime.summary import make_summary
from kvtier.runtime.trace import Trace

GEOMETRY = make_geometry(sink=3, local=6, chunk=4, select=4, block=16)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def audited(model, config, steps=8, ids=BOOK):
    with kvtier.offload(model, config) as kv:
        book = kv.prefill(ids)
        with kv.tracing():
            model.generate(QUESTION, past_key_values=book.fork(), **GREEDY)
        return kv.audit(steps=steps)


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize("kind", ["mean", "minmax"])
def test_figures_are_those_of_a_direct_computation(monkeypatch, kind, pieces):
    if pieces:
        monkeypatch.setattr(weighing, "SCORE_BYTES", 1)
        monkeypatch.setattr(weighing, "READ_BYTES", 1)
    case = Case(GEOMETRY, n_layers=2, group=2, kind=kind)
    tokens = random_tokens(case, 120)
    blocks = [(i, i + 15) for i in range(0, 120, 15)]
    with tight(case) as rig:
        sequence = rig.new()
        rig.engine.trace = Trace(case.shape, rig.gpu)
        for begin, end in blocks:
            rig.block(sequence, tokens[begin:end])
        steps = [step for step in rig.engine.trace.steps(sequence) if step.n_chunks > 4]
        found = audit(rig.engine, sequence, steps)
        masks = [step.chosen_mask(layer) for step in steps for layer in range(2)]
        rig.engine.trace.close()
    late = [block for block in blocks if GEOMETRY.selectable(block[0]) > 4]
    assert found.blocks == tuple(late)
    assert (found.n_chunks, found.n_chosen) == (24, 4)
    figures = {0: [], 1: []}
    for mask, (layer, weights, exact) in zip(masks, oracle_weights(case, tokens, late), strict=True):
        recall = (mask & exact).sum(dim=1) / 4
        figures[layer].append(torch.stack((recall, (weights * mask).sum(dim=1), (weights * exact).sum(dim=1))))
    for layer in found.layers:
        each = torch.stack(figures[layer.layer])  # [blocks, 3, N]
        recall, weight, most = each.mean(dim=(0, 2)).tolist()
        assert layer.recall == pytest.approx(recall, abs=1e-6)
        assert layer.worst == pytest.approx(float(each[:, 0].min()), abs=1e-6)
        assert layer.weight == pytest.approx(weight, abs=1e-5)
        assert layer.exact_weight == pytest.approx(most, abs=1e-5)
        assert 0 < layer.recall < 1
        assert layer.weight < layer.exact_weight < 1
    assert found.recall == pytest.approx(sum(x.recall for x in found.layers) / 2)


def test_exact_keys_recall_everything_and_means_do_not(model):
    exact, mean = audited(model, few(kind="exact")), audited(model, few(kind="mean"))
    assert exact.recall == 1
    assert min(layer.worst for layer in exact.layers) == 1
    assert exact.weight == pytest.approx(exact.exact_weight)
    assert mean.recall < 0.9
    assert mean.weight < mean.exact_weight


def test_where_all_chunks_are_attended_there_is_nothing_to_miss(model):
    found = audited(model, settings(kind="mean"))
    assert found.recall == 1
    assert found.weight == pytest.approx(1, abs=1e-5)
    assert found.n_chosen == found.n_chunks
    assert found.suggestion == ""


@pytest.mark.parametrize("where", ["disk", "saved", "int8"])
def test_keys_come_from_wherever_chunks_are(model, tmp_path, where):
    """The same figures, and no chunk has moved."""
    expected = audited(model, few(kind="mean"))
    config = few(kind="mean")
    with kvtier.offload(model, config) as kv:
        kv.prefill(BOOK).save(tmp_path / "sessions")
    if where == "disk":
        with pytest.raises(kvtier.BudgetError) as refusal:
            kvtier.offload(model, {**config, "budget": {"host": "1B"}})
        host = int(str(refusal.value).split("at least ")[1].split(" bytes")[0])
        config = {**config, "budget": {"host": host, "disk": "16MiB"}, "store": {"path": str(tmp_path / "scratch")}}
    if where == "int8":
        config = {**config, "store": {"dtype": "int8"}}
    with kvtier.offload(model, config) as kv:
        book = kv.open(tmp_path / "sessions") if where == "saved" else kv.prefill(BOOK)
        with kv.tracing():
            model.generate(QUESTION, past_key_values=book.fork(), **GREEDY)
        residency = kv._runtime.engine.residency
        lengths = [len(t) for t in (residency.device, residency.host, residency.saved)]
        coldest = residency.host.coldest(50).tolist()
        found = kv.audit()
        assert [len(t) for t in (residency.device, residency.host, residency.saved)] == lengths
        assert residency.host.coldest(50).tolist() == coldest
        if where != "int8":
            assert kv.stats()["tiers"]["disk"]["bytes_read"] > 0
    if where == "int8":
        assert found.recall == pytest.approx(expected.recall, abs=0.1)
        assert found.weight == pytest.approx(expected.weight, abs=0.02)
    else:
        assert found.to_dict() == expected.to_dict()


def test_two_levels_are_audited_against_the_keys_too(model, monkeypatch):
    """Fewer candidates, less recall; where all chunks are candidates, that of one level."""
    monkeypatch.setattr(slabs, "SLAB_CHUNKS", 16)
    one, all_of_them, few_of_them = (
        audited(model, few(summary=levels))
        for levels in ({}, {"levels": 2, "overfetch": 40}, {"levels": 2, "overfetch": 1})
    )
    assert all_of_them.layers == one.layers
    assert few_of_them.recall < one.recall
    assert few_of_them.exact_weight == pytest.approx(one.exact_weight, rel=0.05)


def test_steps_are_sampled_evenly(model):
    assert sample(list(range(10)), 3) == [2, 5, 9]
    assert sample(list(range(3)), 8) == [0, 1, 2]
    assert audited(model, few(), steps=2).blocks == ((309, 310), (312, 313))


def test_table_and_json(model):
    found = audited(model, few(kind="mean"), steps=3)
    lines = str(found).splitlines()
    assert lines[0] == "3 blocks of tokens 308 to 313, 3 of 36 chunks chosen"
    assert [line.split()[0] for line in lines[1:5]] == ["layer", "0", "1", "mean"]
    assert lines[4].split()[1] == f"{found.recall:.3f}"
    assert lines[5:] == found.suggestion.splitlines()
    told = json.loads(json.dumps(found.to_dict()))
    assert told["recall"] == found.recall
    assert told["layers"][1]["layer"] == 1
    assert told["blocks"][-1] == [312, 313]


def figures(recall, weight=0.5, most=0.6, layers=2):
    """An audit of layers with these figures, the last with the least recall."""
    each = tuple(LayerAudit(i, recall - i / 100, recall / 2, weight, most) for i in range(layers))
    return Audit(((0, 1),), each, 100, 10, "")


def summary(kind="sketch", rank=16, bits=4, levels=1):
    return make_summary(kind, chunk=32, head_dim=64, dtype=torch.bfloat16, rank=rank, bits=bits, levels=levels)


@pytest.mark.parametrize(
    ("now", "suggested"),
    [
        (summary(), "Try [summary] rank = 32: 18 bytes per token and KV head on the device instead of 9."),
        (summary(rank=48), "Try [summary] rank = 64: 36 bytes per token and KV head on the device instead of 27."),
        (summary(rank=64), "Try [summary] bits = 8: 68 bytes per token and KV head on the device instead of 36."),
        (summary(rank=64, bits=8), 'Try [summary] kind = "exact": 128 bytes per token and KV head on the device'),
        (summary("mean"), 'Try [summary] kind = "sketch": 9 bytes per token and KV head on the device instead of 4.'),
        (
            summary(levels=2),
            "overfetch = 16, for more candidates, or rank = 32: 18 bytes per token and KV head on the host",
        ),
        (summary("exact"), "Choices were exact for the keys before they were quantised"),
    ],
)
def test_a_low_recall_suggests_the_next_better_summary(now, suggested):
    text = suggest(figures(0.6, 0.5, 0.95), now)
    assert text.startswith("Recall is low, least in layers 1 (0.59), 0 (0.60).")
    assert suggested in text
    assert "weighs little" not in text
    assert "Even the exact choice" not in text


def test_other_suggestions():
    assert suggest(figures(0.99, 0.95, 0.96), summary()) == ""
    assert "98.9% of what the exact choice holds is there" in suggest(figures(0.6, 0.94, 0.95), summary())
    assert suggest(figures(0.99, 0.5, 0.5), summary()) == (
        "Even the exact choice of 10 chunks holds 50% of the weight alone: raise [attention] select (local, block or a "
        "larger max make room for it)."
    )
    assert suggest(figures(0.5, layers=9), summary()).count("(0.4") == 5


def test_an_audit_can_be_taken_of_a_prompt_alone(model):
    with kvtier.offload(model, few(kind="exact")) as kv:
        with kv.tracing():
            model(prompt(200), logits_to_keep=1)
        assert kv.audit().recall == 1


def test_tiers_are_read_once_for_each_layer():
    case = Case(GEOMETRY, n_layers=2, kind="mean")
    with tiered(case) as rig:
        sequence = rig.new()
        rig.engine.trace = Trace(case.shape, rig.gpu)
        rig.feed(sequence, random_tokens(case, 100))
        steps = [step for step in rig.engine.trace.steps(sequence) if step.layers]
        before = rig.residency.host.counters.bytes_read
        audit(rig.engine, sequence, steps)
        chunks = 2 * case.n_kv_heads * max(step.n_chunks for step in steps)
        assert rig.residency.host.counters.bytes_read - before == chunks * case.chunk_bytes
        rig.engine.trace.close()
