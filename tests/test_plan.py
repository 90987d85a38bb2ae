"""``kvtier plan``: its bytes are those of real runs, it fits where a run gets through, its advice works."""

import functools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import prompt, settings, tiny_config, tiny_llama
from test_families import FAMILIES, model_of, tiny

import kvtier
from kvtier import bandwidth, durable, memory
from kvtier.advice import size
from kvtier.bandwidth import ASSUMED, Bandwidths
from kvtier.config import Config, Size, resolve_geometry
from kvtier.families import examine
from kvtier.footprint import Footprint, smallest
from kvtier.memory import Available, Budgets
from kvtier.outline import outline
from kvtier.plan import plan, table
from kvtier.runtime.budget import Budget
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.layer_selection import TritonSelection
from kvtier.runtime.model import ModelShape
from kvtier.runtime.sizing import n_blocks, selection_bytes
from kvtier.runtime.summary import make_summary

KIB, MIB, GIB = 2**10, 2**20, 2**30
CLOSE = 0.02
LLAMA_3B = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rope_theta": 500000.0,
}
BIG = {"device": "cuda", "gpu": "17GiB", "host": "100GiB", "disk": "300GiB"}


@functools.cache
def llama():
    return tiny_llama()


def write_config(folder, model):
    """The folder of a model without its weights."""
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    return folder


@pytest.fixture
def big(tmp_path):
    """A folder with the config of Llama-3.2-3B."""
    folder = tmp_path / "llama-3b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_3B))
    return folder


@pytest.fixture
def commits(monkeypatch):
    """Reading commits once after a summary has been fitted, as any that takes a second does, and at the end."""
    after = durable._Writing._after_block

    def after_block(self, done):
        is_first = self._committer.last.number == 0
        fitted = any(layer.fitted is not None for layer in self._sequence.layers)
        self._next_commit = 0.0 if is_first and (fitted or done > 250) else float("inf")
        after(self, done)

    monkeypatch.setattr(durable._Writing, "_after_block", after_block)


def on_device(folder):
    """Bytes that a folder takes from the device, as ``du`` counts them."""
    return sum(
        os.lstat(os.path.join(at, name)).st_blocks * 512 for at, _, names in os.walk(folder) for name in [*names, "."]
    )


def budgets(gpu="16MiB", host="16MiB", disk="64MiB"):
    return {"gpu": gpu, "host": host} | ({"disk": disk} if disk else {})


def configured(tmp_path, *, window=256, budget=None, **other):
    budget = budget or budgets()
    store = {"path": str(tmp_path / "store"), **other.pop("store", {})} if "disk" in budget else {}
    return settings(window=window, select=3, budget=budget, **({"store": store} if store else {}), **other)


def footprint_of(folder, config, triton=False, **more):
    """The footprint that ``plan`` makes."""
    config = Config.load(config)
    seen = outline(folder)
    geometry = resolve_geometry(config, kvtier.rope.trained_window(seen.config))
    b = config.budget
    limits = Budgets(b.gpu.bytes, b.host.bytes, b.disk and b.disk.bytes)
    return Footprint.of(seen.anatomy, geometry, config, limits, triton, **more)


def read(model, config, n, rows=1, forks=0):
    """What a run has when it has read ``n`` tokens: the tiers of ``kv.stats()``, and what its store takes."""
    with kvtier.offload(model, config) as kv:
        book = kv.prefill(torch.cat([prompt(n, seed=i) for i in range(rows)]))
        held = [book.fork() for _ in range(forks)]
        for fork in held:
            model.generate(prompt(2, seed=9), past_key_values=fork, max_new_tokens=2, do_sample=False)
        path = config.get("store", {}).get("path")
        return kv.stats()["tiers"], on_device(path) if path else 0


# -- bytes are those of a run ------------------------------------------------------------------------------------------

RUNS = {
    "all in host": ("llama", {"budget": budgets(disk=None)}),
    "spill": ("llama", {"budget": budgets(host="200KiB")}),
    "spill int8": ("llama", {"budget": budgets(host="100KiB"), "store": {"dtype": "int8"}}),
    "spill int4": ("llama", {"budget": budgets(host="90KiB"), "store": {"dtype": "int4"}}),
    "nothing to spill": ("llama", {}),
    "durable": ("llama", {"store": {"mode": "durable"}}),
    "durable, small host": ("llama", {"budget": budgets(host="150KiB"), "store": {"mode": "durable"}}),
    "durable int8": ("llama", {"budget": budgets(host="100KiB"), "store": {"mode": "durable", "dtype": "int8"}}),
    "durable int4": ("llama", {"store": {"mode": "durable", "dtype": "int4"}}),
    "durable minmax": ("llama", {"kind": "minmax", "store": {"mode": "durable"}}),
    "two levels": ("llama", {"budget": budgets(host="200KiB"), "summary": {"levels": 2}}),
    "two levels, durable": ("llama", {"summary": {"levels": 2}, "store": {"mode": "durable"}}),
    "half precision": ("bfloat16", {"budget": budgets(host="60KiB")}),
    "sliding layers": ("gemma3", {"budget": budgets(host="220KiB")}),
    "sliding layers, durable": ("gemma3", {"budget": budgets(host="220KiB"), "store": {"mode": "durable"}}),
    "layers without positions": ("smollm3-hybrid", {"budget": budgets(host="150KiB")}),
    "partial rotary": ("phi3-partial", {"budget": budgets(host="60KiB"), "store": {"dtype": "int8"}}),
}


def model_named(name):
    if name == "bfloat16":
        return tiny_llama(dtype=torch.bfloat16, kv_heads=1, head_dim=16, layers=3)
    return llama() if name == "llama" else model_of(name)


@pytest.mark.usefixtures("commits")
@pytest.mark.parametrize("run", RUNS)
def test_bytes_are_those_of_a_run(run, tmp_path):
    """The device, host and budget of the disk to the byte, the disk itself within 2%: directories differ."""
    name, given_ = RUNS[run]
    model, config, n = model_named(name), configured(tmp_path, **given_), 411
    weights = str(model.dtype).removeprefix("torch.")
    report = plan(write_config(tmp_path / "model", model), n, config, device="cpu", weights=weights)
    tiers, taken = read(model, config, n)
    assert report["fits"]
    assert {name: t["used"] for name, t in report["tiers"].items()} == {name: t["bytes"] for name, t in tiers.items()}
    for tier in report["tiers"].keys() - {"device"}:
        assert report["tiers"][tier]["chunks"] == tiers[tier]["chunks"]
    if taken:
        assert report["tiers"]["disk"]["taken"] == pytest.approx(taken, rel=CLOSE)
    uses_disk = report["tiers"].get("disk", {"chunks": 0})["chunks"] > 0
    assert uses_disk == (run not in ("all in host", "nothing to spill")), "not what is to be tested"


@pytest.mark.parametrize("n", [1, 30, 59, 60, 61, 92, 1087, 1088, 1089])
def test_bytes_at_the_edges_of_chunks_and_slabs(n, tmp_path):
    """A slab of summaries holds 128 chunks of 8 tokens."""
    config = configured(tmp_path, budget=budgets(disk=None))
    report = plan(write_config(tmp_path / "model", llama()), n, config, device="cpu")
    tiers, _ = read(llama(), config, n)
    assert {name: t["used"] for name, t in report["tiers"].items()} == {name: t["bytes"] for name, t in tiers.items()}


@pytest.mark.parametrize(
    ("n", "overfetch", "host"),
    [(61, 8, 0), (1079, 8, 0), (1087, 8, 0), (1095, 8, 0), (1095, 70, 0), (1095, 8, 300 * KIB)],
)
def test_bytes_of_two_levels(n, overfetch, host, tmp_path):
    """The coarse one comes when a slab of 128 chunks is full, or where 210 candidates are not all chunks.

    The second slab of fine codes has chunks spilled where the host is small.
    """
    budget = budgets(host=host) if host else budgets(disk=None)
    config = configured(tmp_path, budget=budget, summary={"levels": 2, "overfetch": overfetch})
    report = plan(write_config(tmp_path / "model", llama()), n, config, device="cpu")
    tiers, _ = read(llama(), config, n)
    assert {name: t["used"] for name, t in report["tiers"].items()} == {name: t["bytes"] for name, t in tiers.items()}


@pytest.mark.parametrize("rows", [2, 4])
def test_bytes_of_a_batch(rows, tmp_path):
    config = configured(tmp_path, budget=budgets(host="400KiB"))
    report = plan(write_config(tmp_path / "model", llama()), 400, config, device="cpu", rows=rows)
    tiers, _ = read(llama(), config, 400, rows=rows)
    assert {name: t["used"] for name, t in report["tiers"].items()} == {name: t["bytes"] for name, t in tiers.items()}


def test_bytes_of_forks_that_went_on(tmp_path):
    """Their windows differ by the few tokens of each; the host's budget must hold the longest possible ones."""
    config = configured(tmp_path, budget=budgets(disk=None))
    report = plan(write_config(tmp_path / "model", llama()), 611, config, device="cpu", forks=3)
    tiers, _ = read(llama(), config, 611, forks=3)
    assert report["tiers"]["host"]["used"] == pytest.approx(tiers["host"]["bytes"], rel=CLOSE)
    assert report["tiers"]["host"]["needed"] >= tiers["host"]["bytes"]
    assert report["tiers"]["device"]["used"] >= tiers["device"]["bytes"]


EDGES = {
    "no disk": (budgets(disk=None), {}),
    "spill": (budgets(host="200KiB", disk="8MiB"), {}),
    "spill int4": (budgets(host="80KiB", disk="8MiB"), {"dtype": "int4"}),
    "durable": (budgets(host="100KiB", disk="8MiB"), {"mode": "durable"}),
    "two levels": (budgets(host="300KiB", disk="8MiB"), {}),
}


@pytest.mark.parametrize("edge", EDGES)
def test_fits_where_a_run_gets_through_to_the_byte(edge, tmp_path):
    """For each budget: the least that the plan allows runs, one byte less is a BudgetError."""
    budget, store = EDGES[edge]
    summary = {"summary": {"levels": 2}} if edge == "two levels" else {}
    config, n = configured(tmp_path, budget=budget, store=store, **summary), 240
    folder = write_config(tmp_path / "model", llama())
    footprint = footprint_of(folder, config)
    for name in budget:
        least = footprint.least_budget(n, name)
        for nbytes in (least - 1, least):
            changed = config | {"budget": budget | {name: nbytes}}
            if store.get("mode"):
                changed["store"] = changed["store"] | {"path": str(tmp_path / f"store-{name}-{nbytes}")}
            assert plan(folder, n, changed, device="cpu")["fits"] == (nbytes == least)
            if nbytes == least:
                read(llama(), changed, n)
            else:
                with pytest.raises(kvtier.BudgetError):
                    read(llama(), changed, n)


@pytest.mark.parametrize("kind", ["sketch", "minmax"])
@pytest.mark.parametrize("tokens", [300, 700, 5_000, 40_000])
def test_scratch_of_selection_is_what_it_allocates(kind, tokens):
    """On CUDA. The scratch itself is plain tensors, so the CPU can make it."""
    shape = ModelShape(2, 4, 2, 16, torch.float32, torch.device("cpu"))
    geometry = Geometry(512, 4, 64, 8, 12, 128, 16, 40)
    summary = make_summary(kind, chunk=8, head_dim=16, dtype=torch.float32, rank=8)
    budget = Budget("gpu", GIB)
    selection = TritonSelection(summary, budget)
    for begin, end in geometry.schedule(tokens):
        if geometry.selectable(begin) > geometry.select:
            rows = torch.empty(2, 2 * len(geometry.choosing(end - begin)), 16)
            selection._workspace(rows, geometry.selectable(begin), 12, 8 if kind == "sketch" else 0)
    assert budget.used_bytes > 0
    assert selection_bytes(shape, geometry, summary, tokens) == budget.used_bytes


@hypothesis_settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 70), st.data())
def test_blocks_are_counted_without_listing_them(tokens, block, data):
    geometry = Geometry(10**6, 4, 64, 8, 12, block, 16, data.draw(st.integers(1, block)))
    assert n_blocks(geometry, tokens) == len(geometry.schedule(tokens))


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_alone_tells_what_the_model_does(family, tmp_path):
    model = model_of(family)
    seen, real = outline(write_config(tmp_path / "model", model), "float32"), examine(model)
    assert replace(seen.anatomy.shape, device=torch.device("cpu")) == real.shape
    assert (seen.anatomy.layers, seen.anatomy.family, seen.anatomy.cos_width) == (
        real.layers,
        real.family,
        real.cos_width,
    )
    assert all(p.device.type == "meta" for p in seen.anatomy.rotary.buffers())
    assert seen.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert seen.parameters == sum(p.numel() for p in model.parameters())


def test_weights_of_a_step_by_hand(tmp_path):
    """Of four experts two count, of the input embedding nothing; a tied one is the output layer."""
    model = tiny("MixtralConfig", sliding_window=None, num_local_experts=4, num_experts_per_tok=2)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    embedding, output = sizes["model.embed_tokens.weight"], sizes["lm_head.weight"]
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    assert experts > 0
    seen = outline(write_config(tmp_path / "model", model), "bf16")
    assert seen.layer_parameters == sum(sizes.values()) - embedding - output - experts // 2
    assert seen.step_bytes == 2 * (seen.layer_parameters + output)
    tied = outline(
        write_config(tmp_path / "tied", SimpleNamespace(config=tiny_config(tie_word_embeddings=True))), "bf16"
    )
    assert tied.step_bytes == tied.weight_bytes == 2 * tied.parameters


def test_weights_in_few_bits(tmp_path):
    """Linear layers alone: 28 of them in a hidden size of 32, and what surrounds them in bfloat16."""
    folder = write_config(tmp_path / "model", llama())
    linear = [m for n, m in llama().named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    rows, numbers = sum(m.out_features for m in linear), sum(m.weight.numel() for m in linear)
    rest = 2 * (outline(folder).parameters - numbers)
    assert outline(folder, "int8").weight_bytes == rest + numbers + 4 * rows
    assert outline(folder, "int4").weight_bytes == rest + numbers // 2 + numbers // 64 * 4
    assert outline(folder, "int4").anatomy.shape.dtype == torch.bfloat16


def test_weights_that_are_stored_quantised(tmp_path):
    config = tiny_config(dtype="bfloat16", quantization_config={"quant_method": "gptq", "bits": 4})
    seen = outline(write_config(tmp_path / "model", SimpleNamespace(config=config)))
    assert (seen.weights, seen.anatomy.shape.dtype) == ("int4", torch.bfloat16)


def test_a_config_without_a_dtype_says_what_is_assumed(tmp_path):
    folder = write_config(tmp_path / "model", SimpleNamespace(config=tiny_config()))
    assert "float32 is assumed" in outline(folder).notes[0]
    assert outline(folder, "bf16").notes == ()


def test_a_folder_and_its_config_are_the_same(big):
    assert plan(big, 2**20, **BIG) == plan(str(big / "config.json"), 2**20, **BIG)


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for add, value in (
        (writer.add_context_length, 256),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 48),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, 8),
        (writer.add_vocab_size, 64),
    ):
        add(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    report = plan(tmp_path / "tiny.gguf", 700, configured(tmp_path, budget=budgets(disk=None)), device="cpu")
    model = report["model"]
    assert (model["name"], model["layers"], model["kv_heads"], model["head_dim"]) == ("tiny.gguf", 2, 2, 8)
    assert model["trained_window"] == 256
    assert any("float32" in note for note in report["notes"])


def test_a_model_that_is_refused_is_refused_alike(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)
    with pytest.raises(kvtier.UnsupportedError) as refused:
        kvtier.offload(transformers.GPT2LMHeadModel(config).eval())
    with pytest.raises(kvtier.UnsupportedError, match=re.escape(str(refused.value))):
        plan(write_config(tmp_path / "model", SimpleNamespace(config=config)), 100, device="cpu")


# -- wrong use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": 0}, "tokens = 0: a whole number of at least 1 is expected"),
        ({"tokens": 1.5}, "tokens = 1.5: a whole number"),
        ({"rows": 0}, "rows = 0: a whole number"),
        ({"forks": -1}, "forks = -1: a whole number"),
        ({"miss": 1.5}, "miss = 1.5: a share from 0 to 1"),
        ({"gpu": "24G"}, '--gpu = "24G" is not a size; write "24GiB"'),
        ({"disk": "75%"}, "--disk 75% is a share of a disk that is not known: give bytes"),
        ({"device": "tpu"}, "there is no device 'tpu'"),
        ({"device": "mps"}, 'not on "mps"'),
        ({"weights": "int3"}, "weights 'int3' are not known"),
        ({"card": "Voodoo"}, "no figures for 'Voodoo': known are H100"),
        ({"gpu": None}, "there is no cuda device here to take 75% of: give --gpu"),
        (
            {"config": {"attention": {"method": "reattention"}}},
            'method = "reattention" keeps all K and V on the device',
        ),
        ({"config": {"store": {"mode": "durable"}}, "disk": None}, 'mode = "durable" needs'),
        ({"config": {"attention": {"max": 2**20}}}, "exceeds the model's trained window"),
    ],
)
def test_wrong_use_is_one_line(wrong, message, big, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = {"tokens": 2**20, **BIG, **wrong}
    with pytest.raises(kvtier.KvtierError, match=re.escape(message)) as error:
        plan(big, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "no-such-model"}', "{}"])
def test_a_config_that_cannot_be_read_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(kvtier.KvtierError, match="transformers cannot read the config of") as error:
        plan(tmp_path, 100, device="cpu")
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_there(tmp_path):
    for name in (tmp_path / "no-such", "./no-such", "no-such.gguf"):
        with pytest.raises(kvtier.KvtierError, match=r"the config of '.*no-such.*': there is no such file or folder"):
            plan(name, 100, device="cpu")


# -- budgets of this machine and of others -----------------------------------------------------------------------------


def with_memory(monkeypatch, nbytes):
    monkeypatch.setattr(memory, "available_host", lambda *_: Available(nbytes, "test"))


def limits(report):
    return {name: tier["budget"] for name, tier in report["tiers"].items()}


def test_budgets_are_those_of_a_run_that_has_loaded_the_weights(tmp_path, monkeypatch):
    folder = write_config(tmp_path / "model", llama())
    with_memory(monkeypatch, 64 * MIB)
    planned = plan(folder, 100, {"attention": {"max": 256}}, device="cpu")
    with_memory(monkeypatch, 64 * MIB - planned["model"]["weight_bytes"])
    with kvtier.offload(llama(), {"attention": {"max": 256}}) as kv:
        assert limits(planned) == {name: tier["budget"] for name, tier in kv.stats()["tiers"].items()}


def test_budgets_beyond_this_machine_do_not_fit_unless_another_one_is_meant(tmp_path, monkeypatch):
    folder = write_config(tmp_path / "model", llama())
    config = configured(tmp_path, budget=budgets(host="1GiB", disk=None))
    with_memory(monkeypatch, 64 * MIB)
    here = plan(folder, 100, config, device="cpu")
    assert not here["fits"]
    assert "--gpu and --host plan for another one" in here["tiers"]["host"]["problem"]
    assert here["tiers"]["host"]["problem"] in table(here)
    elsewhere = plan(folder, 100, config, device="cpu", gpu="16MiB", host="1GiB")
    assert elsewhere["fits"]
    assert limits(elsewhere) == {"device": 16 * MIB, "host": GIB}
    with pytest.raises(kvtier.ConfigError, match="give both --gpu and --host"):
        plan(folder, 100, device="cpu", host="1GiB")


def test_a_gpu_that_is_not_here_takes_the_configurations_size(big, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with_memory(monkeypatch, 8 * GIB)
    report = plan(big, 2**17, {"budget": {"gpu": "12GiB"}}, device="cuda")
    assert limits(report) == {"device": 12 * GIB, "host": 6 * GIB}


def test_a_disk_without_a_path_is_one_of_another_machine(big, tmp_path):
    assert limits(plan(big, 2**20, **BIG))["disk"] == 300 * GIB
    config = {"store": {"path": str(tmp_path / "store"), "mode": "durable"}}
    assert limits(plan(big, 2**20, config, **BIG))["disk"] == 300 * GIB
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("commits")
def test_what_a_store_holds_already_counts(tmp_path):
    folder = write_config(tmp_path / "model", llama())
    config = configured(tmp_path, store={"mode": "durable"})
    before = plan(folder, 300, config, device="cpu")["tiers"]["disk"]
    read(llama(), config, 300)
    report = plan(folder, 300, config, device="cpu")
    after = report["tiers"]["disk"]
    assert "are counted beside this text, as if it was another one: what is stored of it" in report["notes"][-1]
    assert "saved_before" not in before["lines"]
    assert after["needed"] == before["needed"] + after["lines"]["saved_before"]
    with kvtier.offload(llama(), config) as kv:  # another text
        kv.prefill(prompt(300, seed=7))
        assert kv.stats()["tiers"]["disk"]["bytes"] == after["used"]


# -- advice ------------------------------------------------------------------------------------------------------------


def advised(report, pattern):
    found = [m for line in report["advice"] if (m := re.search(pattern, line))]
    assert found, report["advice"]
    return found[0][1]


SMALL = {"device": "cuda", "gpu": "17GiB", "host": "48GiB", "disk": "300GiB"}


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_budget_that_is_advised_suffices_and_hardly_less_does(tier, big):
    report = plan(big, 4 * MIB, **SMALL)
    assert not report["fits"]
    least = advised(report, rf'\[budget\] {tier} = "(\S+)" or more')
    assert plan(big, 4 * MIB, **SMALL | {tier: least})["fits"]
    nbytes = Size.parse(least).bytes
    assert not plan(big, 4 * MIB, **SMALL | {tier: nbytes - nbytes // 50})["fits"]


def test_a_device_budget_or_a_smaller_summary_that_is_advised_suffices(big):
    small = BIG | {"gpu": "8GiB"}
    report = plan(big, 4 * MIB, {"store": {"dtype": "int4"}}, **small)
    assert [name for name, tier in report["tiers"].items() if not tier["fits"]] == ["device"]
    least = advised(report, r'\[budget\] gpu = "(\S+)" or more')
    assert plan(big, 4 * MIB, {"store": {"dtype": "int4"}}, **small | {"gpu": least})["fits"]
    rank, bits = re.findall(r"\d+", advised(report, r"(rank = \d+, bits = \d+): then the device suffices"))
    smaller = {"store": {"dtype": "int4"}, "summary": {"rank": int(rank), "bits": int(bits)}}
    assert plan(big, 4 * MIB, smaller, **small)["fits"]


def test_two_levels_that_are_advised_suffice(big):
    small, dtype = BIG | {"gpu": "4GiB"}, {"dtype": "int4"}
    report = plan(big, 4 * MIB, {"store": dtype}, **small)
    assert advised(report, r"levels = 2: then the device suffices; (\S+) GiB of sketches go to the host") == "7.88"
    two = plan(big, 4 * MIB, {"store": dtype, "summary": {"levels": 2}}, **small)
    assert two["fits"]
    assert two["settings"]["summary"]["levels"] == 2
    assert two["tiers"]["host"]["lines"]["fine_codes"] == 28 * 8 * 131072 * 288
    assert "fine codes of the summaries" in table(two)
    terms = {term["what"]: term["amount"] for term in two["rates"]["decode"]["terms"]}
    retired = (4 * MIB - 32 - 3617) // 32
    assert terms["summaries"] == pytest.approx(28 * 8 * retired * 30, rel=1e-4)
    assert terms["fine codes of candidates"] == 28 * 8 * 8 * 111 * 288


def test_a_dtype_that_is_advised_suffices(big):
    dtype = advised(plan(big, 4 * MIB, **SMALL), r'\[store\] dtype = "(\w+)": then it fits')
    assert plan(big, 4 * MIB, {"store": {"dtype": dtype}}, **SMALL)["fits"]


def test_the_length_that_is_advised_fits_and_the_next_chunk_does_not(big):
    most = int(advised(plan(big, 4 * MIB, **SMALL), r"as configured, ([\d,]+) tokens fit").replace(",", ""))
    assert plan(big, most, **SMALL)["fits"]
    assert not plan(big, most + 32, **SMALL)["fits"]


def test_without_a_store_one_is_advised(big):
    given_ = {name: SMALL[name] for name in ("device", "gpu", "host")}
    least = advised(plan(big, 4 * MIB, **given_), r'\[store\] path and \[budget\] disk = "(\S+)" or more')
    assert plan(big, 4 * MIB, **given_, disk=least)["fits"]


def test_budgets_below_any_context(big):
    report = plan(big, 4 * MIB, **SMALL | {"gpu": "100MiB"})
    assert "as configured, no context fits, however short" in report["advice"]
    assert any("the budget is below" in line for line in report["advice"])
    assert "below this a run does not begin" not in table(plan(big, 4 * MIB, **SMALL))


def test_chunks_that_fill_the_blocks_of_the_disk_are_advised(big):
    """Records of int4: 5,120 bytes for 32 tokens of 128 numbers, 3,968 for 24."""
    report = plan(big, 4 * MIB, {"store": {"dtype": "int4"}}, **BIG)
    chunk = int(advised(report, r"\[attention\] chunk = (\d+) it would be 3%"))
    better = plan(big, 4 * MIB, {"store": {"dtype": "int4"}, "attention": {"chunk": chunk}}, **BIG)
    lines = better["tiers"]["disk"]["lines"]
    assert lines["padding"] / (lines["chunks"] + lines["padding"]) == pytest.approx(1 - 3968 / 4096)


def test_the_host_that_is_advised_holds_everything(big):
    report = plan(big, 4 * MIB, {"store": {"dtype": "int4"}}, **BIG)
    host = advised(report, r'with \[budget\] host = "(\S+)" the host holds all of them')
    larger = plan(big, 4 * MIB, {"store": {"dtype": "int4"}}, **BIG | {"host": host})
    assert larger["tiers"]["disk"]["chunks"] == 0


# -- consistency -------------------------------------------------------------------------------------------------------


@st.composite
def footprints(draw):
    heads = draw(st.integers(1, 3))
    shape = ModelShape(
        n_layers := draw(st.integers(1, 6)),
        heads * draw(st.integers(1, 3)),
        heads,
        draw(st.sampled_from([8, 16, 40, 128])),
        draw(st.sampled_from([torch.float32, torch.bfloat16])),
        torch.device("meta"),
        *draw(st.sampled_from([(frozenset(), None), (frozenset(range(0, n_layers, 2)), 24)])),
    )
    sink, local, block = draw(st.integers(0, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 64))
    chunk, select = draw(st.integers(1, 33)), draw(st.integers(0, 5))
    geometry = Geometry(10**6, sink, local, chunk, select, block, 4, draw(st.integers(1, block)))
    kind = draw(st.sampled_from(["sketch", "mean", "minmax", "exact"]))
    summary = make_summary(kind, chunk=chunk, head_dim=shape.head_dim, dtype=shape.dtype, rank=8)
    disk = draw(st.sampled_from([None, 10**5, 10**7, 10**9]))
    limits_ = Budgets(draw(st.integers(10**5, 10**8)), draw(st.integers(10**4, 10**8)), disk)
    durable_ = disk is not None and draw(st.booleans())
    bits = draw(st.sampled_from([None, 8, 4]))
    rows, forks = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    return Footprint(shape, geometry, summary, 1000, limits_, bits, durable_, False, rows, forks)


@hypothesis_settings(max_examples=100, deadline=None)
@given(footprints(), st.integers(1, 20_000), st.integers(0, 3_000))
def test_more_tokens_never_need_less(footprint, tokens, more):
    # Of rows and forks beside each other some things take less later: moments of queries until a chunk leaves the
    # window, copies of slabs that are not full, windows that are up to a chunk longer.
    assume(footprint.rows == 1 and not footprint.forks)
    before, after = footprint.tiers(tokens), footprint.tiers(tokens + more)
    for name, tier in before.items():
        assert min(tier.lines.values()) >= 0
        assert 0 <= tier.used <= tier.needed
        # parked windows grow, too: on a full host fewer chunks fit beside them
        if name != "host" or footprint.budgets.host_bytes - after[name].needed >= footprint.item_bytes:
            assert tier.needed <= after[name].needed
            assert tier.chunks <= after[name].chunks
    if not footprint.durable and "disk" in before:
        assert before["host"].chunks + before["disk"].chunks == footprint.chunks(tokens)
    assert footprint.fits(tokens) or not footprint.fits(tokens + more)


@hypothesis_settings(max_examples=30, deadline=None)
@given(footprints(), st.integers(1, 20_000))
def test_what_would_fit_is_exact(footprint, tokens):
    most = footprint.most_tokens(tokens)
    assert most == 0 or footprint.fits(most)
    assert most == tokens or not footprint.fits(most + 1)
    for name, tier in (("gpu", "device"), ("disk", "disk")):
        if name == "gpu" or footprint.budgets.disk_bytes is not None:
            least = footprint.least_budget(tokens, name)
            assert footprint.changed(**{f"{name}_bytes": least}).fits(tokens, tier)
    least = footprint.least_budget(tokens, "gpu")
    assert not footprint.changed(gpu_bytes=least - 1).fits(tokens, "device")


@hypothesis_settings(deadline=None)
@given(st.integers(1, 10**15))
def test_sizes_in_advice_are_read_back_and_suffice(nbytes):
    parsed = Size.parse(size(nbytes)).bytes
    assert nbytes <= parsed <= nbytes + nbytes // 9


@hypothesis_settings(deadline=None)
@given(st.integers(-50, 50), st.integers(0, 100), st.integers(-60, 160))
def test_smallest(low, span, threshold):
    expected = min(max(low, threshold), low + span)
    assert smallest(low, low + span, lambda n: n >= threshold) == expected


# -- rates -------------------------------------------------------------------------------------------------------------

ROUND = Bandwidths("test", 1e12, 1e14, 1e10, 2e10, 3e10, 1e9, 2e9, "made up")


def rates_of(folder, monkeypatch, bandwidths=ROUND, tokens=4 * MIB, **more):
    monkeypatch.setattr("kvtier.plan.assumed", lambda *_: bandwidths)
    return plan(folder, tokens, {"store": {"dtype": "int4"}}, **BIG, **more)["rates"]


def amounts(terms):
    return {(t["what"], t["resource"]): t["amount"] for t in terms}


def test_a_decode_step_by_hand(big, monkeypatch):
    """28 layers, 8 KV heads, 131,072 tokens fewer chunks than tokens / 32; sketches of 9 bytes a token."""
    r = rates_of(big, monkeypatch)
    chunks = (4 * MIB - 32 - 3536 - 64) // 32  # roughly: what has left the window
    found = amounts(r["decode"]["terms"])
    assert found["weights", "device_memory"] == 2 * 3_212_749_824
    assert found["summaries", "device_memory"] == pytest.approx(28 * 8 * chunks * 9 * 32, rel=1e-3)
    attended = 28 * 8 * 2 * 128 * 2 * 7168  # tokens: all that may be attended but the block
    assert found["attended K and V", "device_memory"] == pytest.approx(attended, rel=0.01)
    assert found["missed chunks", "link_up"] == 0.5 * 28 * 8 * 111 * 5120
    on_disk = 0.292  # 131,072 chunks x 224 x 5,120 bytes against 99 GiB
    from_disk = 0.5 * 28 * 8 * 111 * 8192 * on_disk
    assert found["missed chunks that only the disk has", "disk"] == pytest.approx(from_disk, rel=0.01)
    assert r["decode"]["bound"] == "disk"
    assert r["decode"]["ms_per_token"] == pytest.approx(1e3 * from_disk / 1e9, rel=0.01)
    for term in r["decode"]["terms"] + r["prefill"]["terms"]:
        assert term["seconds"] == term["amount"] / term["rate"]


def test_a_prefill_block_by_hand(big, monkeypatch):
    r = rates_of(big, monkeypatch)
    found = amounts(r["prefill"]["terms"])
    in_layers = 28 * (3072 * 3072 * 2 + 2 * 3072 * 1024 + 3 * 3072 * 8192 + 2 * 3072) + 3072
    assert found["layers", "matmul"] == 2 * in_layers * 1024
    assert found["attention", "matmul"] == pytest.approx(4 * 24 * 128 * 28 * 8192 * 1024, rel=0.01)
    assert found["selection", "matmul"] == pytest.approx(2 * 24 * 16 * 28 * 16 * 2 * MIB, rel=0.02)
    assert found["summaries", "device_memory"] == pytest.approx(28 * 8 * 2 * MIB * 9, rel=0.02)  # half of the context
    assert found["chunks that leave the window", "link_down"] == pytest.approx(28 * 8 * 32 * 5120, rel=0.01)
    seconds = sum(t["seconds"] for t in r["prefill"]["terms"] if t["resource"] == r["prefill"]["bound"])
    assert r["prefill"]["tokens_per_s"] == pytest.approx(1024 / seconds)
    assert r["prefill"]["seconds"] == pytest.approx(4 * MIB / r["prefill"]["tokens_per_s"])


def test_rates_follow_their_causes(big, monkeypatch):
    base = rates_of(big, monkeypatch)
    assert "missed chunks" not in [t["what"] for t in rates_of(big, monkeypatch, miss=0.0)["decode"]["terms"]]
    assert rates_of(big, monkeypatch, miss=1.0)["decode"]["ms_per_token"] == 2 * base["decode"]["ms_per_token"]
    fast_disk = replace(ROUND, disk_read=1e12, disk_append=1e12)
    assert rates_of(big, monkeypatch, fast_disk)["decode"]["bound"] == "device_memory"
    slow_math = replace(ROUND, matmul=1e12)
    assert rates_of(big, monkeypatch, slow_math)["prefill"]["bound"] == "matmul"
    assert rates_of(big, monkeypatch, rows=2, tokens=2 * MIB)["decode"]["tokens_per_s"] > 0


def test_on_the_cpu_all_is_memory(tmp_path):
    """No link: what goes between the pools is copied in the memory that the weights are read from."""
    folder = write_config(tmp_path / "model", llama())
    report = plan(folder, 3000, configured(tmp_path), device="cpu")
    assert {t["resource"] for t in report["rates"]["decode"]["terms"]} == {"device_memory"}
    assert "link" not in table(report)
    assert "device memory" not in table(report)


def test_assumed_figures_by_the_name_of_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert bandwidth.assumed("cuda") is ASSUMED["H100"]
    assert bandwidth.assumed("cuda", "H200") is ASSUMED["H200"]
    assert bandwidth.assumed("cpu") is ASSUMED["CPU"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GeForce 8800")
    assert "no figures for GeForce 8800" in bandwidth.assumed("cuda").source
    for name, figures in ASSUMED.items():
        assert figures.device == name
        assert min(v for v in figures.report().values() if isinstance(v, float)) > 1e8


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("BUFFER_BYTES", 2**22), ("FILE_BYTES", 2**25), ("SECONDS", 0.02)):
        monkeypatch.setattr(bandwidth, name, value)


@pytest.mark.usefixtures("quick")
def test_measuring_leaves_nothing_behind(tmp_path):
    lines = []
    figures = bandwidth.measure("cpu", tmp_path / "not" / "there", lines.append)
    assert list(tmp_path.iterdir()) == []
    assert lines == ["measuring memory and link", "measuring the device", "measuring the disk"]
    assert min(v for v in figures.report().values() if isinstance(v, float)) > 1e6
    assert f"disk of {tmp_path}: 32 MiB" in figures.source


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("when", ["write", "read"])
def test_measuring_that_is_interrupted_leaves_nothing_behind(when, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bandwidth.RecordIO, when, interrupt)
    with pytest.raises(KeyboardInterrupt):
        bandwidth.measure("cpu", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_measuring_a_disk_that_is_full(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(bandwidth.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(kvtier.KvtierError, match="is full: nothing can be measured there"):
        bandwidth.measure("cpu", tmp_path)


@pytest.mark.usefixtures("quick")
def test_measuring_a_disk_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidth, "_append", lambda *_: os.stat(tmp_path / "gone"))
    with pytest.raises(
        kvtier.KvtierError, match=rf"the disk of {tmp_path} cannot be measured: .*gone.*; choose another"
    ):
        bandwidth.measure("cpu", tmp_path)


def test_the_table_is_the_one_in_the_docs(big):
    report = plan(big, 4 * MIB, {"store": {"dtype": "int4"}}, card="RTX 4090", **BIG)
    text = table(report).replace("llama-3b:", "Llama-3.2-3B:")
    assert text in (Path(__file__).parents[1] / "docs" / "plan.md").read_text()


@pytest.mark.usefixtures("quick")
def test_measured_figures_are_used(tmp_path):
    folder = write_config(tmp_path / "model", llama())
    report = plan(folder, 300, configured(tmp_path), device="cpu", measured=True)
    assert "measured here" in report["rates"]["bandwidths"]["source"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_measuring_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(kvtier.KvtierError, match="there is no CUDA device here"):
        bandwidth.measure("cuda", None)


# -- the report --------------------------------------------------------------------------------------------------------

KEYS = {
    "": "model tokens rows forks device settings fits tiers rates advice notes",
    "model": "name class parameters weights weight_bytes dtype layers tiered_layers kv_heads head_dim trained_window",
    "settings": "attention prefill summary store",
    "tiers": "device host disk",
    "rates": "miss bandwidths prefill decode",
}


def test_the_report_is_json_with_the_documented_keys(big):
    report = plan(big, 4 * MIB, {"store": {"dtype": "int4"}}, **BIG)
    assert json.loads(json.dumps(report)) == report
    for name, keys in KEYS.items():
        assert list(report[name] if name else report) == keys.split()
        assert all(key in plan.__doc__ for key in keys.split())
    for tier in report["tiers"].values():
        assert list(tier) == ["budget", "needed", "fits", "lines", "used", "taken", "chunks", "problem"]
        assert sum(tier["lines"].values()) == tier["needed"]


def test_the_table_says_what_does_not_fit(big):
    text = table(plan(big, 4 * MIB, rows=2, **SMALL))
    assert "4,194,304 tokens in each of 2 rows on a GPU: IT DOES NOT FIT" in text
    assert "advice:\n- as configured, " in text


def test_models_of_sliding_layers_alone_need_no_lower_tiers(tmp_path):
    folder = write_config(tmp_path / "model", tiny("MistralConfig", sliding_window=24))
    report = plan(folder, 5000, configured(tmp_path, budget=budgets(disk=None)), device="cpu")
    assert report["fits"]
    assert report["tiers"]["host"]["chunks"] == 0
    assert "every layer has a sliding window of 24 tokens: nothing is tiered" in report["notes"]


def test_nothing_is_allocated_and_no_file_is_made(big, tmp_path, monkeypatch):
    """70B in bfloat16 would be 131 GiB."""
    config = LLAMA_3B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    (big / "config.json").write_text(json.dumps(config | {"num_attention_heads": 64, "tie_word_embeddings": False}))
    before = sorted(tmp_path.rglob("*"))
    report = plan(big, 2**20, {"store": {"path": str(tmp_path / "store"), "mode": "durable"}}, **BIG)
    assert report["model"]["weight_bytes"] > 128 * GIB
    assert sorted(tmp_path.rglob("*")) == before
