"""The same code on CUDA: `make test-gpu`. Every tensor lives on the device that DESIGN.md says."""

import gc

import pytest
import torch
from models import prompt, tiny_llama

import kvtier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TEXT = prompt(700)
GREEDY = {"do_sample": False, "max_new_tokens": 60}
SETTINGS = {
    "attention": {"max": 1024, "sink": 4, "local": 24, "chunk": 8, "select": 100},
    "prefill": {"block": 64, "tail": 16},
    "budget": {"gpu": "64MiB", "host": "64MiB"},
}


@pytest.fixture
def model():
    return tiny_llama(window=1024).cuda()


def settings(tmp_path=None, **attention):
    config = {section: dict(values) for section, values in SETTINGS.items()}
    config["attention"] |= attention
    if tmp_path:
        pytest.importorskip("zarr")
        config["store"] = {"path": str(tmp_path / "store")}
        config["budget"] |= {"disk": "64MiB", "host": "256KiB", "gpu": "4MiB"}
    return config


def largest_difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("store", [False, True], ids=["device and host", "three tiers"])
@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_logits_equal_sdpa_while_everything_is_selected(model, tmp_path, store, kind):
    wanted = {"output_logits": True, "return_dict_in_generate": True} | GREEDY
    ids = TEXT.cuda()
    stock = model.generate(ids, attention_mask=torch.ones_like(ids), **wanted)
    config = settings(tmp_path if store else None) | {"summary": {"kind": kind, "rank": 8}}
    with kvtier.offload(model, config) as kv:
        ours = model.generate(ids, **wanted)
        stats = kv.stats()
    assert ours.sequences.tolist() == stock.sequences.tolist()
    assert largest_difference(ours.logits, stock.logits) < 1e-4
    if store:
        assert stats["tiers"]["disk"]["chunks"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_beyond_the_window(dtype):
    model = tiny_llama(window=128).to("cuda", dtype)
    with kvtier.offload(model, settings(max=128, select=4) | {"prefill": {"block": 16, "tail": 8}}) as kv:
        out = model.generate(prompt(128 * 20).cuda(), **GREEDY)
        assert out.shape[1] == 128 * 20 + 60
        assert kv.stats()["longest_attended"] <= 128


def test_selected_chunks_agree_with_the_cpu(model):
    chosen = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        with kvtier.offload(model, settings(select=6)) as kv:
            model(TEXT[:, :600].to(device))
            chosen[device] = [layer.cpu() for layer in kv._runtime.engine.last_chosen]
    same = torch.stack([(a == b).float().mean() for a, b in zip(chosen["cpu"], chosen["cuda"], strict=True)])
    assert same.mean() > 0.9  # near-ties may fall either way, and shift what follows


def test_tensors_live_where_they_should(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(TEXT)
        fork = cache.fork()
        engine = kv._runtime.engine
        residency, layer = engine.residency, cache._lane.sequences[0].layers[0]
        assert residency.device.data.is_cuda
        assert residency.host.pinned
        assert all(slab.is_pinned() for slab in residency.host.slabs)
        assert all(t.is_cuda for codes in layer.codes.slabs(layer.retired) for t in codes.values())
        assert all(t.is_cuda for t in layer.fitted.state)
        assert not fork._lane.sequences[0].parked.full.tokens.is_cuda
        assert fork._lane.sequences[0].parked is cache._lane.sequences[0].parked


def test_device_memory_stays_within_the_budget_and_is_given_back(model):
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    with kvtier.offload(model, settings(select=6)) as kv:
        cache = kv.prefill(TEXT)
        assert torch.cuda.memory_allocated() - before <= kv.stats()["tiers"]["device"]["budget"]
    del cache, kv
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


def test_reattention_runs(model):
    with kvtier.offload(model, settings(method="reattention", local=64, select=8)) as kv:
        out = model.generate(TEXT.cuda(), **GREEDY)
        assert out.shape[1] == 760
        assert kv.stats()["longest_attended"] <= 1024
