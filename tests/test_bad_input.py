"""Bad input in width: any configuration, any call. What is refused names its reason, and nothing is left behind."""

import argparse
import ast
import builtins
import contextlib
import errno
import functools
import gc
import os
import shutil
import warnings
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given
from hypothesis import settings as hypothesis_settings
from models import CACHE_NAME, PAD, VOCAB, assert_untouched, fingerprint, minimum_budget, prompt, settings, tiny_llama
from test_families import tiny
from transformers import DynamicCache, GenerationConfig

import kvtier
from kvtier import cli, generate, needle
from kvtier.forward import REFUSED as REFUSED_ARGUMENTS
from kvtier.runtime import host_pool
from kvtier.runtime.budget import Budget
from kvtier.runtime.device_pool import DevicePool

ROOT = Path(__file__).resolve().parent.parent
GREEDY = {"do_sample": False, "max_new_tokens": 6}
BOOK, QUESTION = prompt(70), prompt(9, seed=1)
TEXT = torch.cat((BOOK, QUESTION), dim=1)
Unsupported = kvtier.UnsupportedError
FEW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """``gc.collect`` looks at what the tests make, not at all of transformers, which takes a second on busy cores."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def shared():
    return tiny_llama()


@pytest.fixture(scope="module")
def answer(shared):
    return shared.generate(TEXT, **GREEDY)[:, 79:].tolist()


@pytest.fixture
def model(shared):
    """A model that must be as it was after every test."""
    before = fingerprint(shared)
    yield shared
    assert_untouched(shared, before)


def tokens_of(model, ids, **arguments):
    return model.generate(ids, **GREEDY, **arguments)[:, ids.shape[1] :].tolist()


def assert_given_back(kv):
    """After the block: nothing of any budget is in use but what the runtime's fixed parts take, and they are closed.

    What a durable store has saved stays on the disk.
    """
    gc.collect()
    runtime = kv._runtime
    fixed = runtime._rotary_bytes() if runtime._sizes is None else runtime._sizes.fixed
    assert runtime._gpu.used_bytes <= fixed
    assert runtime._host.used_bytes == 0
    durable = runtime.config.store.mode == "durable"
    assert runtime._disk is None or durable or runtime._disk.used_bytes == 0
    assert kv.stats()["tiers"].keys() >= {"device", "host"}


# -- any configuration -------------------------------------------------------------------------------------------------


NONSENSE = st.one_of(
    st.sampled_from([True, False, -1, 0, 1.5, float("nan"), float("inf"), "", "x", "4", b"4", [], [4], {}, (), 2**70]),
    st.integers(-(10**6), 10**6),
    st.text(max_size=8),
)


def mostly(valid):
    return st.integers(0, 24).flatmap(lambda n: valid if n else NONSENSE)


NUMBERS = {"max": (64, 512), "sink": (0, 64), "local": (1, 200), "chunk": (1, 40), "select": (0, 60), "picks": (1, 8)}
SIZES = st.one_of(
    st.integers(1, 1 << 26),
    st.builds("{}{}{}".format, st.integers(1, 700), st.sampled_from(["", " "]), st.sampled_from(["KiB", "MiB"])),
    st.sampled_from(["1B", "64MiB", "1%", "12.5%", "0%", "101%", "6GB", "6G", "512TiB", "1e3MiB", "0.4B", "-1MiB"]),
)


@st.composite
def configurations(draw, folder):
    """Sections with some of their keys, most values of the right kind, some keys and sections that do not exist."""
    paths = [folder / "store", folder / "file", folder / "file" / "store", folder / "missing" / "store"]
    keys = {
        "budget": dict.fromkeys(("gpu", "host"), SIZES) | {"disk": SIZES},
        "store": {
            "path": st.sampled_from([str(path) for path in (paths[0], paths[0], *paths)]),
            "mode": st.sampled_from(["spill", "spill", "spill", "durable", "spil"]),
            "dtype": st.sampled_from(["auto", "auto", "auto", "int8", "fp8"]),
        },
        "attention": {"method": st.sampled_from(["chunks", "chunks", "reattention", "paper"])}
        | {key: st.integers(*bounds) for key, bounds in NUMBERS.items()},
        "summary": {
            "kind": st.sampled_from(["sketch", "exact", "cuboid", "minmax", "mean", "skech"]),
            "rank": st.integers(1, 17),
            "bits": st.sampled_from([2, 4, 8, 3]),
        },
        "prefill": {"block": st.integers(1, 80), "queries": st.integers(1, 20), "tail": st.integers(1, 20)},
    }
    config = {}
    for section in draw(st.sets(st.sampled_from(sorted(keys)))):
        some = st.sets(st.sampled_from(sorted(keys[section])), max_size=4)
        config[section] = {key: draw(mostly(keys[section][key])) for key in sorted(draw(some))}
    match draw(st.sampled_from([None] * 12 + ["section", "key", "table"])):
        case "section":
            config[draw(st.sampled_from(["atention", "gpu", "", "zzz"]))] = draw(st.sampled_from([{}, {"gpu": 1}]))
        case "key" if config:
            key = draw(st.sampled_from(["selct", "block", "", "path", "zzz"]))
            config[draw(st.sampled_from(sorted(config)))].setdefault(key, draw(NONSENSE))
        case "table":
            config[draw(st.sampled_from(sorted(keys)))] = draw(st.sampled_from(["6GiB", 3, [], True]))
    return config


def reaches_everything(geometry, n):
    """Whether all chunks of ``n`` tokens are selected, so that the answer is that of full attention."""
    return n <= geometry.sink + geometry.select * geometry.chunk + geometry.local


def names_a_key(message, config):
    """Whether the message names one of the sections or keys that were given."""
    given = {str(key) for values in config.values() if isinstance(values, dict) for key in values}
    return any(f"[{section}]" in message for section in config) or any(key and key in message for key in given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores")
    (path / "file").write_text("not a folder")
    with contextlib.chdir(tmp_path_factory.mktemp("here")):  # a store in a folder of any name is made there
        yield path


@hypothesis_settings(max_examples=150, **FEW)
@given(data=st.data())
def test_a_configuration_works_or_is_refused_by_the_name_of_its_key(shared, answer, folder, data):
    config = data.draw(configurations(folder))
    if isinstance(budget := config.get("budget", {}), dict) and data.draw(st.integers(0, 3)):
        config |= {"budget": {"gpu": "8MiB", "host": "8MiB"} | budget}  # from free memory all takes longer
    before, kv, refusal = fingerprint(shared), None, None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no chunk can be selected")
            with kvtier.offload(shared, config) as kv:
                tokens = tokens_of(shared, QUESTION, past_key_values=kv.prefill(BOOK))
                everything = kv.config.attention.method == "chunks" and reaches_everything(kv.geometry, 79 + 5)
                everything = everything and kv.config.store.dtype == "auto"
                assert all(tier["bytes"] <= tier["budget"] for tier in kv.stats()["tiers"].values())
        assert not everything or tokens == answer
        event("works")
    except kvtier.KvtierError as error:
        refusal = str(error)
        event("refused" if kv is None else "refused in the block")
    assert refusal is None or names_a_key(refusal, config), f"{refusal} does not name a key of {config}"
    if kv is not None:
        assert_given_back(kv)
    assert_untouched(shared, before)
    assert sorted(path.name for path in folder.iterdir()) in (["file"], ["file", "store"])
    assert not list((folder / "store").glob("spill-*")) if (folder / "store").exists() else True


# -- any call ----------------------------------------------------------------------------------------------------------


IDS_DTYPES = [torch.int64] * 16 + [torch.int32, torch.int16, torch.uint8, torch.float32, torch.bool, torch.float16]


@st.composite
def id_tensors(draw):
    shape = draw(
        st.sampled_from(
            [(1, 5), (1, 1), (1, 9), (2, 4), (3, 1), (1, 0), (0, 3), (4,), (), (1, 2, 3), (1, 60)] + [(1, 5)] * 8
        )
    )
    dtype = draw(st.sampled_from(IDS_DTYPES))
    least, most = draw(st.sampled_from([(1, VOCAB - 1)] * 12 + [(0, 3), (-2, 4), (VOCAB - 1, VOCAB)]))
    values = draw(st.lists(st.integers(least, most), min_size=6, max_size=6))
    n = int(torch.Size(shape).numel())
    flat = torch.tensor((values * (n // 6 + 1))[:n])
    return flat.to(dtype).view(shape)


IDS = st.one_of(
    *[id_tensors()] * 6,
    st.sampled_from([TEXT, BOOK, QUESTION, torch.cat((BOOK, BOOK[:, :1]), 1)]),
    st.sampled_from([None, [[5, 6]], "5 6", 5, 1.5, QUESTION.numpy()]),
)


@st.composite
def masks(draw, ids, cached):
    """None, ones, left padding, right padding, gaps and noise; of the ids' length, the whole length or another."""
    rows, n = tuple(ids.shape) if isinstance(ids, torch.Tensor) and ids.ndim == 2 else (1, 3)
    kind = draw(
        st.sampled_from(["none"] * 9 + ["ones", "ones", "left", "left", "right", "noise", "short", "4-D", "list"])
    )
    whole = n + cached if draw(st.booleans()) else n
    mask = torch.ones(rows, whole, dtype=draw(st.sampled_from([torch.int64, torch.bool, torch.float32])))
    match kind:
        case "none":
            return None
        case "left":
            mask[:, : whole - draw(st.integers(0, n))] = 0
        case "right":
            mask[-1:, -1:] = 0
        case "noise":
            mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) > 0.3
        case "short":
            return mask[:, 1:]
        case "4-D":
            return mask[None, None]
        case "list":
            return mask.tolist()
    return mask


GENERATE = {
    "max_new_tokens": st.sampled_from([1, 2, 6, 0, -1]),
    "do_sample": st.booleans(),
    "num_return_sequences": st.sampled_from([1, 2, 0, -1]),
    "num_beams": st.sampled_from([1, 2, 0]),
    "temperature": st.sampled_from([1.0, 0.5, 0.0, -1.0]),
    "top_k": st.sampled_from([5, 0, -1]),
    "eos_token_id": st.sampled_from([3, [3, 4], 3 * VOCAB]),
    "pad_token_id": st.sampled_from([PAD, 5]),
    "use_cache": st.booleans(),
    "return_dict_in_generate": st.booleans(),
    "output_scores": st.booleans(),
    "output_attentions": st.booleans(),
    "output_hidden_states": st.booleans(),
    "prompt_lookup_num_tokens": st.sampled_from([None, 3]),
    "cache_implementation": st.sampled_from([None, "static", "quantized", "x"]),
    "guidance_scale": st.sampled_from([1, 1.5]),
    "use_mtp": st.booleans(),
    "penalty_alpha": st.sampled_from([None, 0.6]),
    "prefill_chunk_size": st.sampled_from([None, 1, 16]),
    "repetition_penalty": st.sampled_from([1.0, 2.0, 0.0]),
    "stop_strings": st.sampled_from([None, "x"]),
    "generation_config": st.sampled_from([None, GenerationConfig(max_new_tokens=2), GenerationConfig(num_beams=2)]),
    "inputs": st.sampled_from([None, BOOK]),
    "not_an_argument": st.sampled_from([None, 3]),
}
FORWARD = {
    "logits_to_keep": st.sampled_from([0, 1, 5, 500, -1, 1.5, "x", True, None, torch.tensor([1])]),
    "position_ids": st.sampled_from(
        [None, torch.arange(5)[None], torch.arange(70, 75)[None], torch.tensor(3), [1], "x"]
    ),
    "use_cache": st.sampled_from([None, True, False]),
    "return_dict": st.sampled_from([None, True, False]),
    "output_attentions": st.booleans(),
    "output_hidden_states": st.booleans(),
    "labels": st.sampled_from([None, QUESTION]),
    "inputs_embeds": st.sampled_from([None, torch.zeros(1, 5, 32)]),
    "not_an_argument": st.sampled_from([None, 3]),
    "num_items_in_batch": st.sampled_from([None, 1]),
}


def some_of(draw, arguments):
    most = draw(st.sampled_from([0, 0, 1, 1, 2, 3]))
    names = sorted(draw(st.sets(st.sampled_from(sorted(arguments)), max_size=most)))
    return {name: draw(arguments[name]) for name in names}


def caches(kv, book, closed):
    """A cache to call with, made anew for each call."""
    return {
        "none": lambda: None,
        "fork": book.fork,
        "blind fork": lambda: book.fork(select=0),
        "new": kv.new_cache,
        "new, of two rows": lambda: kv.new_cache(rows=2),
        "two forks": lambda: book.fork(rows=2),
        "of another kind": DynamicCache,
        "of a closed block": lambda: closed,
        "text": lambda: "cache",
        "legacy": lambda: ((torch.zeros(1), torch.zeros(1)),),
    }


@st.composite
def calls(draw, kv, book, closed):
    """(what is called, on which cache), with random arguments."""
    what = draw(st.sampled_from(["generate"] * 4 + ["forward"] * 3 + ["prefill", "fork", "new_cache", "row"]))
    cache = caches(kv, book, closed)[draw(st.sampled_from(["none", *["fork"] * 9, *caches(kv, book, closed)]))]()
    ids = draw(IDS)
    cached = cache.get_seq_length() if isinstance(cache, kvtier.TieredCache) and cache is not closed else 0
    model, whole = kv.model, st.one_of(st.none(), st.integers(-3, 60))
    match what:
        case "generate" | "forward":
            arguments = {"max_new_tokens": 3} if what == "generate" else {}
            arguments |= some_of(draw, GENERATE if what == "generate" else FORWARD)
            arguments["attention_mask"] = draw(masks(ids, cached))
            arguments[draw(st.sampled_from(["past_key_values", "cache"]))] = cache
            return what, cache, lambda: getattr(model, what)(ids, **arguments)
        case "prefill":
            ids = ids if isinstance(ids, torch.Tensor) else draw(st.sampled_from([[5, 6], [], (3,), [1.5]]))
            mask, select = draw(masks(ids, 0)), draw(whole)
            return what, None, lambda: kv.prefill(ids, attention_mask=mask, select=select)
        case "fork":
            select, rows = draw(whole), draw(st.sampled_from([None, None, 0, -1, 1, 3]))
            return what, cache, lambda: book.fork(select=select, rows=rows)
        case "row":
            index = draw(st.integers(-4, 4))
            return what, cache, lambda: book.row(index)
        case _:
            rows = draw(st.integers(-1, 3))
            return what, cache, lambda: kv.new_cache(rows)


ALLOWED = {"row": (kvtier.KvtierError, IndexError)}


@pytest.fixture(scope="module")
def closed(shared):
    """A cache of a block that was left."""
    with kvtier.offload(shared, settings()) as kv:
        return kv.prefill(BOOK)


def tokens_in(cache):
    return [cache.row(row).token_ids.tolist() for row in range(cache.n_rows)]


def check_refusal(error, had, has):
    """Refused before any work, or stock ``generate`` gave up after it had fed something: nothing is ever lost."""
    assert str(error)
    if had is None:
        return
    begins = [row[: len(before)] for row, before in zip(has, had, strict=True)]
    assert begins == had, f"a call that failed took tokens from its cache: {error}"
    assert has == had or not isinstance(error, kvtier.KvtierError), f"a refused call changed its cache: {error}"


@pytest.mark.parametrize("tiers", ["plenty", "three, small"])
@hypothesis_settings(max_examples=60, **FEW)
@given(data=st.data())
def test_a_call_gives_a_result_or_a_reason_and_the_cache_answers_as_before(shared, answer, closed, folder, tiers, data):
    config = settings(select=40, budget={"gpu": "8MiB", "host": "8MiB"})
    if tiers != "plenty":
        budget = {name: 2 * minimum_budget(shared, config, name) for name in ("gpu", "host")}
        config |= {"budget": {**budget, "disk": "16MiB"}, "store": {"path": str(folder / "store")}}
    before = fingerprint(shared)
    with kvtier.offload(shared, config) as kv:
        book = kv.prefill(BOOK)
        for _ in range(2):
            what, cache, call = data.draw(calls(kv, book, closed))
            serves = isinstance(cache, kvtier.TieredCache) and cache is not closed
            had = tokens_in(cache) if serves else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # stock generate's own advice
                try:
                    call()
                    event(f"{what} works")
                except ALLOWED.get(what, (kvtier.KvtierError, ValueError)) as error:
                    event(f"{what} is refused")
                    check_refusal(error, had, tokens_in(cache) if serves else None)
            if serves and tokens_in(cache) == [BOOK[0].tolist()] and cache._lane.sequences[0].select == 40:
                assert tokens_of(shared, QUESTION, past_key_values=cache) == answer
        assert book.token_ids.tolist() == BOOK[0].tolist()
        assert tokens_of(shared, QUESTION, past_key_values=book) == answer
        del book, cache, call
        gc.collect()
        assert {tier["chunks"] for tier in kv.stats()["tiers"].values()} == {0}
    assert_given_back(kv)
    assert_untouched(shared, before)


# -- every refusal is read by a test -----------------------------------------------------------------------------------


def offload(model, config=None):
    return kvtier.offload(model, config or settings(budget={"gpu": "8MiB", "host": "8MiB"}))


REFUSALS = {
    "an inner module": (
        lambda m, kv: m.model(QUESTION),
        Unsupported,
        r"attention inside an offload block was called without a kvtier cache: call model\(...\)",
    ),
    "an inner module with a cache": (
        lambda m, kv: m.model(QUESTION, **{CACHE_NAME: kv.prefill(BOOK)}, use_cache=True),
        Unsupported,
        r"a kvtier cache was used around the model's forward, or outside .*not an inner module such as model.model",
    ),
    "reset": (
        lambda m, kv: kv.new_cache().reset(),
        Unsupported,
        r"a kvtier cache cannot be reset: make a new one with kv.new_cache\(\)",
    ),
    "repeat": (
        lambda m, kv: kv.new_cache().batch_repeat_interleave(2),
        Unsupported,
        r"a kvtier cache is not expanded in place: use fork\(rows=...\) for several continuations",
    ),
    "saving nothing": (
        lambda m, kv: kv.new_cache().save("/nowhere/store"),
        Unsupported,
        "this cache is empty: pass tokens through the model before it is saved",
    ),
    "tokens of a batch": (
        lambda m, kv: kv.new_cache(rows=2).token_ids,
        Unsupported,
        r"this cache has 2 rows: use cache.row\(i\).token_ids",
    ),
    "forks of a batch": (
        lambda m, kv: kv.new_cache(rows=2).fork(rows=3),
        Unsupported,
        r"fork\(rows=3\) of a cache of 2 rows: it takes 1 row and makes >= 1",
    ),
    "no forks": (
        lambda m, kv: kv.prefill(BOOK).fork(rows=0),
        Unsupported,
        r"fork\(rows=0\) of a cache of 1 rows: it takes 1 row and makes >= 1",
    ),
    "a cache without rows": (
        lambda m, kv: kv.new_cache(rows=0),
        ValueError,
        "a cache has at least one row, not 0",
    ),
    "a token beyond the vocabulary": (
        lambda m, kv: m(torch.tensor([[5, VOCAB]])),
        ValueError,
        r"token id 97 is not in the vocabulary \(0 .. 96\)",
    ),
    "several greedy answers": (
        lambda m, kv: m.generate(QUESTION, num_return_sequences=3, **GREEDY),
        Unsupported,
        r"generate\(num_return_sequences=3\) needs do_sample=True: greedy ones are equal",
    ),
    "the logits of some tokens": (
        lambda m, kv: m(QUESTION, logits_to_keep=torch.tensor([1])),
        Unsupported,
        r"logits_to_keep must be a number, 0 \(all\) or more; given: tensor\(\[1\]\)",
    ),
    "logits from an end that is none": (
        lambda m, kv: m(QUESTION, logits_to_keep=-1),
        Unsupported,
        r"logits_to_keep must be a number, 0 \(all\) or more; given: -1",
    ),
    "positions that are no tensor": (
        lambda m, kv: m(QUESTION, position_ids=[0, 1, 2]),
        Unsupported,
        r"position_ids must be 0 .. 8 \(kvtier gives positions of its own",
    ),
    "complex ids": (
        lambda m, kv: m(QUESTION.to(torch.complex64)),
        Unsupported,
        r"input_ids must be an integer tensor \[rows, n\]; given: a torch.complex64 tensor",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_in_a_block(model, answer, case):
    call, error, message = REFUSALS[case]
    with offload(model) as kv:
        book = kv.prefill(BOOK)
        with pytest.raises(error, match=message):
            call(model, kv)
        assert tokens_of(model, QUESTION, past_key_values=book) == answer
        del book
    assert_given_back(kv)


WRONG_SETTINGS = {
    "no new tokens": ({"max_new_tokens": 0}, ValueError),
    "negative temperature": ({"do_sample": True, "temperature": -1.0}, ValueError),
    "unknown argument": ({"not_an_argument": 3}, ValueError),
    "beams": ({"num_beams": 2}, Unsupported),
}


@pytest.mark.parametrize("ids", [QUESTION, TEXT, BOOK], ids=["new tokens", "the conversation", "exactly the cached"])
@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_a_generate_that_is_refused_by_whomever_leaves_the_cache_as_it_was(model, answer, case, ids):
    wrong, error = WRONG_SETTINGS[case]
    with offload(model) as kv:
        book = kv.prefill(BOOK)
        with pytest.raises(error):
            model.generate(ids, past_key_values=book, **{**GREEDY, **wrong})
        assert book.token_ids.tolist() == BOOK[0].tolist()
        assert tokens_of(model, QUESTION, past_key_values=book) == answer
        del book
    assert_given_back(kv)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32])
def test_ids_of_any_integer_type(model, answer, dtype):
    with offload(model) as kv:
        book = kv.prefill(BOOK.to(dtype))
        assert tokens_of(model, QUESTION.to(dtype), past_key_values=book.fork()) == answer
        assert model(QUESTION.to(dtype), past_key_values=book).logits.shape == (1, 9, VOCAB)


def test_hub_kernels(model, monkeypatch):
    monkeypatch.setattr(model, "_use_kernels", True, raising=False)
    assert model.use_kernels
    with pytest.raises(Unsupported, match="the model was loaded with use_kernels=True: hub kernels replace what"):
        offload(model)


@pytest.mark.parametrize("output", ["output_hidden_states", "output_router_logits"])
def test_outputs_asked_for_by_the_config(model, monkeypatch, output):
    monkeypatch.setattr(model.config, output, True, raising=False)
    messages = {
        "output_hidden_states": "config.output_hidden_states = True: only the last block's would be returned",
        "output_router_logits": "config.output_router_logits = True: only the last block's would be returned",
    }
    with pytest.raises(Unsupported, match=messages[output]):
        offload(model)


def test_a_bidirectional_layer():
    model = tiny("GemmaConfig", head_dim=8, use_bidirectional_attention=True)
    with pytest.raises(Unsupported, match=r"self_attn \(GemmaAttention\) is bidirectional: kvtier attends causally"):
        offload(model)


def test_a_block_is_entered_once(model):
    kv = offload(model)
    with kv:
        pass
    message = r"an offload block can be entered once: call kvtier.offload\(model, config\) again"
    with pytest.raises(kvtier.KvtierError, match=message), kv:
        pytest.fail("the block was entered")


def with_store(tmp_path):
    return settings(budget={"gpu": "8MiB", "host": "8MiB", "disk": "8MiB"}, store={"path": str(tmp_path / "store")})


def test_a_device_without_free_space(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=0))
    with pytest.raises(kvtier.StoreError, match=r"store is on a device without free space: choose another directory"):
        offload(model, with_store(tmp_path))


def without(monkeypatch, module):
    """Importing ``module`` fails."""
    original = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_a_store_without_zarr(model, tmp_path, monkeypatch):
    without(monkeypatch, "zarr")
    message = r"the disk tier needs zarr 3, which cannot be imported \(No module named 'zarr'\): pip install zarr"
    with pytest.raises(kvtier.StoreError, match=message), offload(model, with_store(tmp_path)):
        pytest.fail("the block was entered")


def test_a_store_of_another_version(model, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "zarr.json").write_text('{"attributes": {"kvtier": {"version": 99}}}')
    message = r"has layout version 99, this kvtier reads \d+. Use the kvtier that wrote it, or another folder; nothing"
    with pytest.raises(kvtier.StoreError, match=message), offload(model, with_store(tmp_path)):
        pytest.fail("the block was entered")


def failing(kind, *details):
    """A function that raises ``kind(*details)``, a new one each time: an exception keeps the frames it went through."""

    def call(*_, **__):
        raise kind(*details)

    return call


FAILURES = {
    "the store's metadata": (
        (Path, "write_text", OSError, errno.EIO, "input/output error"),
        kvtier.StoreError,
        r"zarr.json cannot be written: .*input/output error. Nothing stored is damaged. Free space there, or choose",
    ),
    "the store's files": (
        (os, "posix_fallocate", OSError, errno.EIO, "input/output error"),
        kvtier.StoreError,
        r"cannot be created with .* input/output error. Nothing stored is damaged. Check the rights and the device",
    ),
    "host memory": (
        (host_pool.HostPool, "_empty", RuntimeError, "out of memory"),
        kvtier.BudgetError,
        r"\[budget\] host = .* is more than this machine can hold: after .* could not be allocated \(out of memory\)",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_machine_fails_in_the_middle_of_a_prefill(model, answer, tmp_path, monkeypatch, case):
    where, error, message = FAILURES[case]
    monkeypatch.setattr(host_pool, "SLAB_BYTES", 8 * 1024)
    config = with_store(tmp_path)
    config["budget"]["host"] = 2 * minimum_budget(model, config, "host") + (1 << 20) * (case == "host memory")
    with offload(model, config) as kv:
        book = kv.prefill(BOOK)
        fork = book.fork()
        with monkeypatch.context() as patch:
            patch.setattr(*where[:2], failing(*where[2:]))
            with pytest.raises(error, match=message) as caught:
                model(prompt(3000, seed=5), past_key_values=fork, logits_to_keep=1)
        del caught, fork
        gc.collect()
        assert tokens_of(model, QUESTION, past_key_values=book) == answer
        del book
    assert_given_back(kv)


def test_a_device_pool_that_cannot_be_allocated(model, monkeypatch):
    monkeypatch.setattr(torch, "empty", failing(RuntimeError, "out of memory"))
    message = r"is more than cpu can hold: a pool of \d+ chunks .* could not be allocated .*out of memory.*, or free"
    with pytest.raises(kvtier.BudgetError, match=message), offload(model):
        pytest.fail("the block was entered")


def test_a_file_of_the_store_that_others_cut_short(model, answer, tmp_path):
    """What it held is lost; the error says so, and the next block works."""
    config = with_store(tmp_path)
    config["budget"] |= {name: minimum_budget(model, config, name) for name in ("gpu", "host")}
    with offload(model, config) as kv:
        book = kv.prefill(prompt(463))
        assert kv.stats()["tiers"]["disk"]["chunks"] > 0
        files = list((tmp_path / "store").glob("spill-*/kv/c/*/*"))
        assert files
        for path in files:
            os.truncate(path, 100)
        message = r"(read at byte \d+: .* the file is too short|written: it has 100 bytes).*Was the file changed"
        with pytest.raises(kvtier.StoreError, match=message) as caught:
            model(prompt(1), past_key_values=book)  # no chunk retires: writing one would make the file long again
        del caught, book
        gc.collect()
        with pytest.raises(kvtier.StoreError, match="cannot be written: it has 100 bytes, it was made with"):
            tokens_of(model, TEXT)  # needs the disk, too
    assert_given_back(kv)
    with offload(model, config):
        assert tokens_of(model, TEXT) == answer


def test_a_folder_of_other_zarr_data(model, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "zarr.json").write_text("{}")
    message = r"holds zarr data that kvtier did not write. Choose another folder; nothing was changed."
    with pytest.raises(kvtier.StoreError, match=message), offload(model, with_store(tmp_path)):
        pytest.fail("the block was entered")


def test_a_device_pool_that_is_full():
    budget = Budget("gpu", 1 << 20)
    pool = DevicePool(budget, 2, 8, 16, torch.float32, "cpu")
    chunks = torch.zeros(3, 2, 8, 16)
    message = r"the device pool is full: 3 chunks to store, 2 of 2 slots free. Drop chunks first, or raise \[budget\]"
    with pytest.raises(kvtier.BudgetError, match=message):
        pool.put(np.arange(3), chunks)
    pool.put(np.arange(2), chunks[:2])
    assert len(pool) == 2


def test_beams_in_groups(model):
    with offload(model), pytest.raises(Unsupported, match=r"num_beam_groups=2\): beam search is not supported"):
        model.generate(QUESTION, num_beam_groups=2, **GREEDY)


def test_a_gguf_file_without_its_packages(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", failing(ImportError, "no gguf"))
    message = r"reading a GGUF file needs more packages: pip install 'kvtier\[demo\]' \(no gguf\)"
    with pytest.raises(kvtier.KvtierError, match=message):
        needle.load_model(tmp_path / "x.gguf")


TOKENS = {
    "many": "'many' is not a number of tokens such as 16K or 16384",
    "": "'' is not a number of tokens such as 16K or 16384",
    "0": "'0' is not a positive number of tokens",
    "-4K": "'-4K' is not a positive number of tokens",
}


@pytest.mark.parametrize("text", TOKENS)
def test_numbers_of_tokens_on_the_command_line(capsys, text):
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", f"--tokens={text}"])
    assert left.value.code == 2
    assert TOKENS[text] in capsys.readouterr().err


# -- and no other ------------------------------------------------------------------------------------------------------


FEW_WORDS, MANY_WORDS = 3, 7
"""Consecutive words of a message: a test that mentions a few that no other message has, or many, reads it."""
BY_HAND = {
    "kvtier/config.py Config.load": "is an unknown key, did you mean",
    "kvtier/config.py _from_mapping": "is an unknown section, did you mean",
    "kvtier/forward.py check_arguments": "training losses are not supported",
    "kvtier/generate.py check_settings": "beam search is not supported",
    "kvtier/remote_folder.py RemoteFolder.failed": "cannot be read: ConnectionError: reset by peer",
    "kvtier/remote_folder.py RemoteFolder.send.send": "/kv cannot be read: ",
    "kvtier/remote_mirror.py Mirror.named": " goes on from ",
    "kvtier/remote_mirror.py Mirror.part": "', which kvtier did not write",
}
"""Messages with too few words of their own: what a test reads there instead. Tables of reasons follow below."""


def documented_strings(tree):
    """Docstrings, by their identity."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.Expr):
            first = node if isinstance(node, ast.Expr) else node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield id(first.value)


def strings(tree):
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


@functools.cache
def read_by_tests():
    """Every string of every test but docstrings and the table above, regular expressions as what they match."""
    texts = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        skipped = set(documented_strings(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "BY_HAND":
                skipped |= {id(child) for child in ast.walk(node)}
        nodes = (n for n in ast.walk(tree) if id(n) not in skipped and isinstance(n, ast.Constant))
        texts += [n.value.replace("\\", "") for n in nodes if isinstance(n.value, str)]
    return "\n".join(texts)


def runs(parts, n):
    """Every ``n`` consecutive words of the fixed parts of a message."""
    split = [part.split(" ") for part in parts]
    return {" ".join(words[i : i + n]) for words in split for i in range(len(words) - n + 1)}


PASSED_ON = ("EOFError", "OSError", "TransferError")
"""What users get as part of a StoreError."""


def errors_made(source):
    """(enclosing function, fixed parts of the message) of every error that a file makes."""

    def visit(node, name):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{name}.{node.name}" if name else node.name
        if isinstance(node, ast.Call) and node.args:
            kind = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if kind.endswith("Error") and kind[:1].isupper() and kind not in PASSED_ON:
                yield name, tuple(strings(node.args[-1]))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, name)

    return list(visit(ast.parse(source), ""))


def unread(sources, texts):
    """Errors of ``sources`` {path: text} that no string in ``texts`` mentions."""
    made = {(path, *error) for path, source in sources.items() for error in errors_made(source)}
    messages = Counter(run for parts in {parts for _, _, parts in made} for run in runs(parts, FEW_WORDS))
    missing = []
    for path, function, parts in sorted(made):
        own = {run for run in runs(parts, FEW_WORDS) if messages[run] == 1} | runs(parts, MANY_WORDS)
        by_hand = BY_HAND.get(f"{path} {function}") if not own else None
        if not any(run in texts for run in ([by_hand] if by_hand else own)):
            missing.append(f"{path} {function}: {' ... '.join(parts)}")
    return missing


def our_sources():
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
            for folder in ("kvtier", "runtime", "kernels")
            for path in sorted((ROOT / folder).glob("*.py"))}  # fmt: skip


def test_every_refusal_is_read_by_a_test():
    missing = unread(our_sources(), read_by_tests())
    assert not missing, "no test mentions three words in a row that only these messages have:\n" + "\n".join(missing)


def test_the_check_finds_an_unread_refusal():
    texts, words = read_by_tests(), ["quite", "unheard", "of"]
    source = f"def f(x):\n    if x:\n        raise ConfigError(f'{{x}} {' '.join(words)}' f' by {{x}} anybody')\n"
    assert unread({"kvtier/new.py": source}, texts) == [f"kvtier/new.py f:  {' '.join(words)} by  ...  anybody"]
    assert unread({"kvtier/new.py": source}, f"{texts} {' '.join(words)}") == []
    assert unread({"kvtier/new.py": source, "kvtier/same.py": source}, texts + " by anybody") != []
    assert len({name for text in our_sources().values() for name in errors_made(text)}) > 80


def test_every_reason_in_the_tables_of_refused_arguments_is_read_by_a_test():
    texts = read_by_tests()
    tables = generate.ONE | generate.UNSET | generate.UNSET_ARGUMENTS | REFUSED_ARGUMENTS
    assert [name for name in tables if name not in texts] == []
