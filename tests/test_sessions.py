"""Saved and opened caches: the same to the last bit, refused where they do not belong, damaged never used."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from models import CACHE_NAME, VOCAB, minimum_budget, prompt, settings, tiny_llama
from test_families import FAMILIES, SLIDING_ONLY, tiny

import kvtier
from kvtier import sessions
from kvtier.runtime import session, session_store, slabs
from kvtier.runtime.session_store import SessionStore
from kvtier.runtime.sizing import windows_set_aside

BOOK, MORE, QUESTION = prompt(220), prompt(61, seed=2), prompt(9, seed=1)
ROOMY = {"gpu": "16MiB", "host": "16MiB"}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch, request):
    """Hundreds of them take longer than all else here."""
    if request.function is not test_everything_is_on_the_disk_before_it_is_visible:
        monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def config(select=3, budget=ROOMY, **other):
    return settings(select=select, budget=budget, **other)


def logits_of(model, ids, cache):
    with torch.no_grad():
        return model(ids, **{CACHE_NAME: cache}).logits


def contents(kv, cache):
    """Everything that a cache holds, as tensors and numbers by name."""
    engine, sequence = kv._runtime.engine, cache._lane.sequences[0]
    engine._seats.park(sequence)
    full, sliding = sequence.parked.full, sequence.parked.sliding
    found = {
        "tokens": cache.token_ids,
        "block_starts": torch.tensor(sequence.block_starts),
        "select": torch.tensor(sequence.select),
        "sinks": full.sinks,
        "window": full.tokens[:, :, :, : sequence.length - full.begin],
        "sliding": sliding.tokens[:, :, :, : sequence.length - sliding.begin],
    }
    for layer, chunks in enumerate(sequence.layers):
        for i, ids in enumerate(chunks.ids.T):
            found[f"layer {layer} chunk {i}"] = engine.residency.device.data[engine.residency.fetch(ids)].clone()
        for i, slab in enumerate(chunks.codes.slabs(chunks.retired)):
            found |= {f"layer {layer} {name} {i}": tensor for name, tensor in slab.items()}
        for i, tensor in enumerate(chunks.fitted.state if chunks.fitted else ()):
            found[f"layer {layer} fitted {i}"] = tensor
        if chunks.queries is not None:
            found[f"layer {layer} queries"] = torch.stack((chunks.queries._total, chunks.queries._last))
            found[f"layer {layer} start"] = torch.tensor(chunks.queries._start)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


def continued(kv, cache):
    """What comes of a cache: tokens and logits of two turns, and the chunks that every layer chose last."""
    fork = cache.fork()
    out = kv.model.generate(
        QUESTION,
        past_key_values=fork,
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    chosen = [None if chunks is None else chunks.clone() for chunks in kv._runtime.engine.last_chosen]
    return out.sequences, torch.stack(out.logits), logits_of(kv.model, MORE, fork), chosen


def assert_continues(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    assert any(chunks is not None for chunks in expected[3])
    for mine, theirs in zip(found[3], expected[3], strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


def used_bytes(kv):
    gc.collect()
    return {name: tier["bytes"] for name, tier in kv.stats()["tiers"].items()}


# -- the same to the last bit ------------------------------------------------------------------------------------------

KINDS = {
    "sketch": (tiny_llama, {}),
    "sketch bfloat16": (lambda: tiny_llama(dtype=torch.bfloat16), {}),
    "sketch float16": (lambda: tiny_llama(dtype=torch.float16), {"summary": {"bits": 2}}),
    "mean": (tiny_llama, {"kind": "mean"}),
    "exact bfloat16": (lambda: tiny_llama(dtype=torch.bfloat16), {"kind": "exact"}),
    "cuboid without sinks": (tiny_llama, {"kind": "cuboid", "sink": 0}),
    "gemma3": (lambda: tiny(FAMILIES["gemma3"][0], **FAMILIES["gemma3"][1]), {"window": 256}),
    "interleaved": (lambda: tiny(FAMILIES["cohere"][0], **FAMILIES["cohere"][1]), {"window": 256}),
}


@pytest.mark.parametrize("name", KINDS)
def test_an_opened_cache_is_the_saved_one_and_goes_on_as_it_would(name, store):
    make, own = KINDS[name]
    model = make()
    with kvtier.offload(model, config(**own)) as kv:
        book = kv.prefill(BOOK)
        expected = contents(kv, book)
        id = book.save(store)
        assert_same(contents(kv, book), expected)  # saving has changed nothing
        goes_on = continued(kv, book)
    assert sum(name.startswith("layer 1 chunk") for name in expected) > 20
    with kvtier.offload(make(), config(**own)) as kv:
        book = kv.open(store, id)
        assert_same(contents(kv, book), expected)
        assert_continues(continued(kv, book), goes_on)


def test_in_another_process_and_after_a_kill(store):
    """The other process saves one sequence, and is killed in the middle of a second save."""
    code = """
import os, sys, torch, kvtier
from models import prompt, settings, tiny_llama
from kvtier.runtime import session
with kvtier.offload(tiny_llama(), settings(select=3, budget={"gpu": "16MiB", "host": "16MiB"})) as kv:
    print(kv.prefill(prompt(220)).save(sys.argv[1]), flush=True)
    other = kv.prefill(prompt(200, seed=5))
    write, layers = session._write_layer, []
    def killed(*arguments):
        write(*arguments)
        os._exit(9)
    session._write_layer = killed
    other.save(sys.argv[1])
"""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(store)], env=environment, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert [entry.id for entry in SessionStore(store).entries()] == [done.stdout.strip()]
    assert len(list(store.glob("saving-*"))) == 1
    with kvtier.offload(tiny_llama(), config()) as kv:
        book = kv.open(store)
        assert_continues(continued(kv, book), continued(kv, kv.prefill(BOOK)))
        book.fork(select=2).save(store)  # the lock went with the process
    assert list(store.glob("saving-*")) == []
    assert len(SessionStore(store).entries()) == 2


def test_after_a_turn_and_on_forks(store):
    model = tiny_llama()
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        fork = book.fork(select=1)
        out = model.generate(QUESTION, past_key_values=fork, max_new_tokens=40, do_sample=False)
        ids = [book.save(store), fork.save(store)]
        expected = [continued(kv, book), continued(kv, fork)]
    assert len(set(ids)) == 2
    with kvtier.offload(model, config()) as kv:
        before = used_bytes(kv)
        opened = [kv.open(store, id) for id in ids]
        assert opened[1].token_ids.tolist() == [*BOOK[0].tolist(), *out[0, :-1].tolist()]
        for cache, goes_on in zip(opened, expected, strict=True):
            assert_continues(continued(kv, cache.fork()), goes_on)
            assert_continues(continued(kv, cache), goes_on)
        del opened, cache
        after = used_bytes(kv)
        assert after["device"] == before["device"]
        assert kv.stats()["tiers"]["host"]["chunks"] == 0


def test_what_was_opened_can_be_saved_again_under_the_same_id(store, tmp_path):
    model = tiny_llama()
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        id = book.save(store)
        written = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
        assert book.save(store) == id
        assert {path: path.stat().st_mtime_ns for path in (store / "sequences").rglob("*")} == {
            path: at
            for path, at in written.items()
            if path.is_relative_to(store / "sequences") and path.name != "sequences"
        }
        assert kv.open(store).save(tmp_path / "copy") == id


@pytest.mark.parametrize("ids", [[[0]], [[1, 2, 3]], BOOK[:, :20]], ids=["all zeros", "sinks", "window"])
def test_a_short_cache_without_chunks(ids, store):
    model = tiny_llama()
    with kvtier.offload(model, config()) as kv:
        short = kv.prefill(torch.as_tensor(ids))
        short.save(store)
        opened = kv.open(store)
        assert_same(contents(kv, opened), contents(kv, short))
        assert torch.equal(logits_of(model, BOOK, opened), logits_of(model, BOOK, short))


def test_a_row_of_a_batch(store):
    model = tiny_llama()
    with kvtier.offload(model, config()) as kv:
        both = kv.prefill(torch.cat((BOOK, prompt(220, seed=7))))
        id = both.row(1).save(store)
        expected = continued(kv, both.row(1))
    with kvtier.offload(model, config()) as kv:
        assert_continues(continued(kv, kv.open(store, id)), expected)


@pytest.mark.filterwarnings("ignore:every layer has a sliding window")
def test_a_model_of_sliding_layers_alone(store):
    kind, own = SLIDING_ONLY["mistral"]
    with kvtier.offload(tiny(kind, **own), config(window=256)) as kv:
        book = kv.prefill(BOOK)
        book.save(store)
        expected = logits_of(kv.model, MORE, book)
        assert torch.equal(logits_of(kv.model, MORE, kv.open(store)), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_forgotten_last_token_stays_forgotten(family, store):
    model = tiny_llama() if family == "llama" else KINDS["gemma3"][0]()
    own = {} if family == "llama" else {"window": 256}
    with kvtier.offload(model, config(**own)) as kv:
        book = kv.prefill(BOOK)
        for state in ("running", "parked", "evicted"):
            cache = book.fork()
            expected = logits_of(model, QUESTION[:, :1], cache)
            if state == "parked":
                cache.fork()
            if state == "evicted":
                kv.prefill(MORE)
            cache.rewind()
            id = cache.save(store)
            opened = kv.open(store, id)
            record = SessionStore(store).entry(id).attributes
            window = zarr.open_group(store / "sequences" / id, mode="r")["window"]
            assert window["tokens"].shape[3] == 220 - record["window_begin"]
            assert window["sliding"].shape[3] == 220 - record["sliding_begin"]
            assert opened.token_ids.tolist() == BOOK[0].tolist()
            with pytest.raises(kvtier.UnsupportedError, match="the last block"):
                opened.rewind()
            assert torch.equal(logits_of(model, QUESTION[:, :1], opened), expected)
            assert torch.equal(logits_of(model, QUESTION[:, :1], cache), expected)
            assert torch.equal(logits_of(model, MORE, opened), logits_of(model, MORE, cache))


def test_any_zarr_reader_sees_tokens_keys_and_values(store):
    model = tiny_llama(dtype=torch.bfloat16)
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        expected = contents(kv, book)
        id = book.save(store)
    root = zarr.open_group(store, mode="r")
    assert [name for name, _ in root.members()] == ["sequences"]
    group = root[f"sequences/{id}"]
    assert {name for name, _ in group.members()} == {"tokens", "block_starts", "window", "layers"}
    assert group["tokens"][:].tolist() == BOOK[0].tolist()
    kv_array = group["layers/1/kv"]
    assert kv_array.shape[1:] == (2, 2, 8, 16)
    assert kv_array.attrs["dtype"] == "bfloat16"
    assert (kv_array[4].view(np.int16) == expected["layer 1 chunk 4"].view(torch.int16).numpy()).all()
    assert [codec["name"] for codec in kv_array.metadata.to_dict()["codecs"]] == ["bytes", "crc32c"]


# -- bounded memory and budgets ----------------------------------------------------------------------------------------


def test_chunks_go_in_bounded_batches_from_host_and_disk(store, tmp_path, monkeypatch):
    """Saved from a block that has most chunks on disk: 24 chunks of all heads in 5 files, summaries in 3 slabs."""
    model, more = tiny_llama(), config(budget=ROOMY)
    monkeypatch.setattr(slabs, "SLAB_CHUNKS", 10)
    monkeypatch.setattr(session, "SLAB_CHUNKS", 10)
    with kvtier.offload(model, more) as kv:
        expected = contents(kv, kv.prefill(BOOK))
    one = 2 * 8 * 16 * 4
    monkeypatch.setattr(session, "TRANSIENT_BYTES", 5 * 2 * one)
    sizes, read = [], session._read_chunks
    monkeypatch.setattr(session, "_read_chunks", lambda residency, ids: sizes.append(ids.size) or read(residency, ids))
    host = minimum_budget(model, config(), "host") + 2 * one
    tight = config(budget={"gpu": "16MiB", "host": host, "disk": "16MiB"}, store={"path": str(tmp_path / "spill")})
    with kvtier.offload(model, tight) as kv:
        book = kv.prefill(BOOK)
        tiers = kv.stats()["tiers"]
        assert tiers["disk"]["chunks"] > tiers["host"]["chunks"] > 0
        book.save(store)
        assert max(sizes) == 5 * 2 < sum(sizes)
        assert kv.stats()["tiers"]["host"]["bytes"] <= host
        del book
        opened = kv.open(store)  # does not fit the host either
        tiers = kv.stats()["tiers"]
        assert tiers["disk"]["chunks"] > 0
        assert tiers["host"]["bytes"] <= host
        assert_same(contents(kv, opened), expected)
    assert len(list((store / "sequences").glob("*/layers/0/kv/c.*"))) == 5
    with kvtier.offload(model, more) as kv:
        assert_same(contents(kv, kv.open(store)), expected)


def test_opened_windows_make_chunks_go_to_the_disk(saved, tmp_path):
    model = tiny_llama()
    host = minimum_budget(model, config(), "host") + 40 * 1024
    tight = config(budget={"gpu": "16MiB", "host": host, "disk": "16MiB"}, store={"path": str(tmp_path / "spill")})
    with kvtier.offload(model, tight) as kv:
        opened = []
        for _ in range(6):
            opened.append(kv.open(saved))
            assert kv.stats()["tiers"]["host"]["bytes"] <= host
        windows = [cache._lane.sequences[0].parked for cache in opened]
        nbytes = sum(window.full.nbytes for window in windows)
        assert nbytes > windows_set_aside(kv._anatomy.shape, kv.geometry)
        first = contents(kv, opened[0])
        assert_same(contents(kv, opened[5]), first)


@pytest.mark.parametrize("name", ["host", "gpu"])
def test_what_does_not_fit_is_refused_with_everything_given_back(name, store):
    model, ids = tiny_llama(), prompt(1500)
    summary = {"kind": "exact"}
    with kvtier.offload(model, config(**summary)) as kv:
        kv.prefill(ids).save(store)
    # the smallest pool leaves no bytes for the summaries of a second slab
    least = minimum_budget(model, config(**summary), name)
    tight = config(budget=ROOMY | {name: least + 4096}, **summary)
    with kvtier.offload(model, tight) as kv:
        before, aside = used_bytes(kv), kv._runtime._host.aside_bytes
        with pytest.raises(kvtier.BudgetError, match=rf"\[budget\] {name} = "):
            kv.open(store)
        chunks = [kv.stats()["tiers"][tier]["chunks"] for tier in ("device", "host")]
        assert chunks == [0, 0]
        after = used_bytes(kv)
        assert after["device"] == before["device"]
        assert kv._runtime._host.aside_bytes == aside
        logits_of(model, QUESTION, kv.prefill(BOOK[:, :40]))  # and the block works on


def test_the_opened_window_counts_in_the_host_budget(store):
    model = tiny_llama()
    with kvtier.offload(model, config()) as kv:
        kv.prefill(BOOK).save(store)
    with kvtier.offload(model, config()) as kv:
        budget = kv._runtime._host
        aside = budget.aside_bytes
        cache = kv.open(store)
        window = cache._lane.sequences[0].parked
        nbytes = window.full.nbytes + window.sliding.nbytes
        assert aside - budget.aside_bytes == nbytes > 0
        del window
        logits_of(model, QUESTION, cache)  # it runs: the parked window goes
        assert budget.aside_bytes == aside


# -- interrupted saves -------------------------------------------------------------------------------------------------

STEPS = {
    "in a layer": (session, "_write_layer"),
    "in the window": (session, "_write_window"),
    "before the record": (session_store, "_write_record"),
    "before the rename": (session_store.Draft, "_publish"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_an_interrupted_save_leaves_what_was_there_and_nothing_else(step, error, store, monkeypatch):
    model = tiny_llama()
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        id = book.save(store)
        other = kv.prefill(MORE)

        def fails(*arguments, **more):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(*STEPS[step], fails)
            expected = kvtier.StoreError if isinstance(error, OSError) else KeyboardInterrupt
            with pytest.raises(
                expected, match="What was saved before is intact" if isinstance(error, OSError) else None
            ):
                other.save(store)
        assert {path.name for path in store.iterdir()} == {"zarr.json", "sequences"}
        assert [entry.id for entry in SessionStore(store).entries()] == [id]
        assert_same(contents(kv, kv.open(store)), contents(kv, book))
        assert other.save(store) != id  # and nothing is locked


def test_everything_is_on_the_disk_before_it_is_visible(store, monkeypatch):
    synced, fsync = set(), os.fsync

    def record(fd):
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def publish(draft, target):
        paths = [draft._folder, *draft._folder.rglob("*")]
        assert {str(path) for path in paths} <= synced
        synced.clear()
        rename(draft, target)
        assert str(target.parent) in synced

    rename = session_store.Draft._publish
    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(session_store.Draft, "_publish", publish)
    with kvtier.offload(tiny_llama(), config()) as kv:
        kv.prefill(BOOK).save(store)


def test_one_writer_at_a_time(store):
    with kvtier.offload(tiny_llama(), config()) as kv:
        book = kv.prefill(BOOK)
        book.save(store)
        with SessionStore(store).writing(0):
            with pytest.raises(kvtier.StoreError, match=r"another process is saving to .*store: try again"):
                book.save(store)
            kv.open(store)  # readers do not mind


def test_a_full_device_is_met_before_any_work(store, monkeypatch):
    full = shutil._ntuple_diskusage(2**30, 2**30 - 4096, 4096)
    monkeypatch.setattr(session_store.shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(session, "_write", None)
    with (
        kvtier.offload(tiny_llama(), config()) as kv,
        pytest.raises(kvtier.StoreError, match=r"takes \d.* KiB, but only 4.00 KiB are free in .*store"),
    ):
        kv.prefill(BOOK).save(store)


# -- damaged files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved sequence, to be copied."""
    path = tmp_path_factory.mktemp("saved") / "store"
    with kvtier.offload(tiny_llama(), config()) as kv:
        kv.prefill(BOOK).save(path)
    return path


def files_of(store):
    return sorted(path for path in (store / "sequences").glob("*/**/*") if path.is_file())


def test_a_flipped_bit_in_any_file_is_refused(saved, store):
    shutil.copytree(saved, store)
    files = files_of(store)
    names = {path.name for path in files} | {path.parent.name for path in files}
    assert {"tokens", "block_starts", "kv", "codes", "scale", "sinks", "zarr.json", "0", "1"} <= names
    generator = np.random.default_rng(0)
    with kvtier.offload(tiny_llama(), config()) as kv:
        kv.open(store)
        before = used_bytes(kv)
        for path in files:
            whole = path.read_bytes()
            for position in (0, len(whole) - 1, int(generator.integers(len(whole)))):
                flipped = bytearray(whole)
                flipped[position] ^= 1 << int(generator.integers(8))
                path.write_bytes(flipped)
                with pytest.raises(kvtier.StoreError, match=r"remove (that|its) folder"):
                    kv.open(store)
            path.write_bytes(whole)
        assert kv.stats()["tiers"]["host"]["chunks"] == 0
        assert used_bytes(kv)["device"] == before["device"]
        kv.open(store)


@pytest.mark.parametrize("node", ["", "layers/0/kv", "layers"])
def test_a_flipped_bit_anywhere_in_metadata_is_refused(node, saved, store):
    shutil.copytree(saved, store)
    path = SessionStore(store).entry().path / node / "zarr.json"
    whole = path.read_bytes()
    end = whole.index(b', "zarr_format"') if node == "" else len(whole)  # what follows is no part of the record
    for position in range(0, end, max(1, end // 400)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(kvtier.StoreError):
            SessionStore(store).entry().verify()


def test_lost_shortened_and_exchanged_files_are_refused(saved, store):
    with kvtier.offload(tiny_llama(), config()) as kv:
        for damage in ("lost", "shortened", "emptied", "exchanged"):
            shutil.rmtree(store, ignore_errors=True)
            shutil.copytree(saved, store)
            first, second = (next(store.glob(f"sequences/*/layers/{layer}/kv/c.*")) for layer in (0, 1))
            if damage == "lost":
                first.unlink()
            elif damage == "exchanged":  # both are whole and of the right length
                whole = first.read_bytes()
                first.write_bytes(second.read_bytes())
                second.write_bytes(whole)
            else:
                first.write_bytes(first.read_bytes()[: 100 if damage == "shortened" else 0])
            with pytest.raises(kvtier.StoreError, match=r"damaged: layers/0/kv (is not what was saved|cannot be read)"):
                kv.open(store)


def test_a_file_that_is_damaged_while_it_is_read_gives_everything_back(saved, store, monkeypatch):
    """Damage that appears after the check: the checksums of zarr's codec."""
    shutil.copytree(saved, store)
    monkeypatch.setattr(session_store.Entry, "verify", lambda entry: None)
    path = next(store.glob("sequences/*/layers/1/kv/c.*"))
    flipped = bytearray(path.read_bytes())
    flipped[10] ^= 4
    path.write_bytes(flipped)
    with kvtier.offload(tiny_llama(), config()) as kv:
        before = used_bytes(kv)
        with pytest.raises(kvtier.StoreError, match=r"layers/1/kv cannot be read: .*checksum"):
            kv.open(store)
        tiers = kv.stats()["tiers"]
        assert tiers["host"]["chunks"] == 0
        assert used_bytes(kv)["device"] == before["device"]


def test_saving_again_replaces_a_damaged_sequence(saved, store):
    shutil.copytree(saved, store)
    next(store.glob("sequences/*/tokens/c.0")).write_bytes(b"1234")
    with kvtier.offload(tiny_llama(), config()) as kv:
        book = kv.prefill(BOOK)
        with pytest.raises(kvtier.StoreError, match="damaged"):
            kv.open(store)
        assert book.save(store) == SessionStore(saved).entry().id
        assert_same(contents(kv, kv.open(store)), contents(kv, book))
    assert {path.name for path in store.iterdir()} == {"zarr.json", "sequences"}


# -- refused by name ---------------------------------------------------------------------------------------------------


def other_weights():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data *= 1.001
    return model


OTHERS = {
    "class": (lambda: tiny(*FAMILIES["qwen2"][:1]), {}, "made by a LlamaForCausalLM, this model is a Qwen2ForCausalLM"),
    "vocabulary": (lambda: tiny_llama(vocab_size=VOCAB + 1), {}, "has config.vocab_size = 97, this one 98"),
    "depth": (lambda: tiny_llama(layers=3), {}, "has config.num_hidden_layers = 2, this one 3"),
    "rope": (lambda: tiny_llama(rope="llama3"), {}, "has config.rope_parameters = .*default.*, this one .*llama3"),
    "weights": (other_weights, {}, "made with other weights"),
    "seed": (lambda: tiny_llama(seed=1), {}, "made with other weights"),
    "dtype": (lambda: tiny_llama(dtype=torch.bfloat16), {}, "dtype = float32, here it is bfloat16"),
    "chunk": (tiny_llama, {"chunk": 4}, r"\[attention\] chunk = 8, here it is 4"),
    "sink": (tiny_llama, {"sink": 5}, r"\[attention\] sink = 4, here it is 5"),
    "local": (tiny_llama, {"local": 24}, r"\[attention\] local = 16, here it is 24"),
    "kind": (tiny_llama, {"kind": "mean"}, r"\[summary\] kind = sketch, here it is mean"),
    "rank": (tiny_llama, {"rank": 4}, r"\[summary\] rank = 8, here it is 4"),
    "bits": (tiny_llama, {"summary": {"bits": 2}}, r"\[summary\] bits = 4, here it is 2"),
    "select": (tiny_llama, {"select": 2}, r"attends to 3 chunks per KV head, here \[attention\] select = 2"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_or_setting_is_refused_before_any_work(name, saved, monkeypatch):
    make, own, message = OTHERS[name]
    monkeypatch.setattr(session_store.Entry, "verify", None)  # nothing may be read
    with kvtier.offload(make(), config(**own)) as kv, pytest.raises(kvtier.StoreError, match=message):
        kv.open(saved)


def test_rank_and_bits_do_not_matter_to_summaries_that_ignore_them(store):
    with kvtier.offload(tiny_llama(), config(kind="mean", rank=8)) as kv:
        kv.prefill(BOOK).save(store)
    with kvtier.offload(tiny_llama(), config(kind="mean", rank=4)) as kv:
        kv.open(store)


def test_a_window_longer_than_the_ring_is_refused(store):
    """A cache whose last block was long, because it was interrupted, in a block whose blocks are shorter."""
    model = tiny_llama()

    def stop(done):
        raise KeyboardInterrupt

    with kvtier.offload(model, config()) as kv:
        cache = kv.new_cache()
        with pytest.raises(KeyboardInterrupt):
            kv.feed(cache, BOOK, torch.ones(1, 220, dtype=torch.bool), logits_to_keep=1, on_block=stop)
        cache.save(store)
        expected = logits_of(model, MORE, cache)
        assert torch.equal(logits_of(model, MORE, kv.open(store)), expected)
    with (
        kvtier.offload(model, config(block=8, sink=4, local=1)) as kv,
        pytest.raises(kvtier.StoreError, match="local = 16, here it is 1"),
    ):
        kv.open(store)
    with (
        kvtier.offload(model, config(block=2)) as kv,
        pytest.raises(
            kvtier.StoreError, match=r"its window holds 28 tokens, here at most 25 fit: raise \[prefill\] block by 3"
        ),
    ):
        kv.open(store)


def test_names_of_what_is_there(saved, store, tmp_path):
    id = SessionStore(saved).entry().id
    with kvtier.offload(tiny_llama(), config()) as kv:
        with pytest.raises(kvtier.StoreError, match=rf"holds no sequence 'abc'; it holds {id} \(220 tokens\)"):
            kv.open(saved, "abc")
        with pytest.raises(kvtier.StoreError, match=r"holds no sequence '\.\./sequences'"):
            kv.open(saved, "../sequences")
        kv.prefill(BOOK).save(store)
        kv.prefill(MORE).save(store)
        with pytest.raises(kvtier.StoreError, match=r"holds 2 sequences, say which by its id: .*220 tokens.*61 tokens"):
            kv.open(store)
        shutil.rmtree(store / "sequences")
        with pytest.raises(kvtier.StoreError, match="holds no saved sequence"):
            kv.open(store)
        with pytest.raises(kvtier.StoreError, match=r"no such folder; expected a folder that cache\.save"):
            kv.open(tmp_path / "nothing")
        (tmp_path / "text").write_text("a text")
        with pytest.raises(kvtier.StoreError, match="is not a kvtier store: there is no such folder"):
            kv.open(tmp_path / "text")
        with pytest.raises(kvtier.StoreError, match=r"is not a kvtier store: it has no zarr\.json"):
            kv.open(tmp_path)


def test_where_nothing_can_be_saved(store, tmp_path):
    (tmp_path / "text").write_text("a text")
    foreign = tmp_path / "foreign"
    zarr.create_group(foreign, zarr_format=3)
    later = tmp_path / "later"
    zarr.create_group(later, zarr_format=3, attributes={"kvtier": {"version": 99}})
    with kvtier.offload(tiny_llama(), config()) as kv:
        book = kv.prefill(BOOK)
        for path, message in (
            (tmp_path, "is not a kvtier store"),
            (tmp_path / "text", "text cannot be used as a store"),
            (tmp_path / "no" / "store", "there is no folder .*no; create it"),
            (foreign, "holds zarr data that kvtier did not write"),
            (later, "has layout version 99, this kvtier reads 1"),
        ):
            with pytest.raises(kvtier.StoreError, match=message):
                book.save(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "later", "text"]


def test_what_cannot_be_saved(store):
    model = tiny_llama()
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        with pytest.raises(
            kvtier.UnsupportedError, match=r"2 rows, one at a time is saved: cache\.row\(i\)\.save\(path\)"
        ):
            book.fork(rows=2).save(store)
        with pytest.raises(kvtier.UnsupportedError, match="this cache is empty"):
            kv.new_cache().save(store)
    with pytest.raises(kvtier.KvtierError, match="this cache is closed: save it before its offload block ends"):
        book.save(store)
    with pytest.raises(kvtier.KvtierError, match="not open"):
        kv.open(store)
    reattention = config(local=32, attention={"method": "reattention"})
    with kvtier.offload(model, reattention) as kv:
        for call in (lambda: kv.prefill(BOOK[:, :50]).save(store), lambda: kv.open(store)):
            with pytest.raises(kvtier.UnsupportedError, match='"reattention" is not supported with'):
                call()
    assert not store.exists()


def test_the_folder_of_the_spill_store_will_do(store):
    model = tiny_llama()
    host = minimum_budget(model, config(), "host") + 2048
    tight = config(budget={"gpu": "16MiB", "host": host, "disk": "16MiB"}, store={"path": str(store)})
    with kvtier.offload(model, tight) as kv:
        book = kv.prefill(BOOK)
        expected = continued(kv, book)
        book.save(store)
        assert kv.stats()["tiers"]["disk"]["chunks"] > 0
    assert {path.name for path in store.iterdir()} == {"zarr.json", "sequences"}
    with kvtier.offload(model, tight) as kv:
        assert_continues(continued(kv, kv.open(store)), expected)


# -- the fingerprint ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_quick_and_the_same_for_a_model_from_a_folder(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert sessions.weights_digest(loaded) == sessions.weights_digest(model)
    facts = sessions.model_facts(model), sessions.model_facts(loaded)
    assert facts[0]["config"] == facts[1]["config"]
    assert facts[1]["name"] == str(tmp_path)
    json.dumps(facts)


def test_the_fingerprint_does_not_depend_on_being_inside_a_block(saved):
    model = tiny_llama()
    outside = sessions.model_facts(model)
    with kvtier.offload(model, config()):
        assert sessions.model_facts(model) == outside
    assert SessionStore(saved).entry().attributes["model"]["config"] == outside["config"]
