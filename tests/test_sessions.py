"""Saved and opened caches: the same to the last bit, in bounded memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zarr
from models import minimum_budget, prompt, tiny_llama
from session_cases import (
    BOOK,
    KINDS,
    MORE,
    QUESTION,
    ROOMY,
    assert_continues,
    assert_same,
    config,
    contents,
    continued,
    logits_of,
    open_files,
    used_bytes,
)
from test_families import SLIDING_ONLY, tiny

import kvtier
from kvtier.runtime import committer, sequence_files, slabs
from kvtier.runtime.library import Library
from kvtier.runtime.residency import Residency
from kvtier.runtime.sizing import windows_set_aside

pytestmark = pytest.mark.usefixtures("quick_store")


# -- the same to the last bit ------------------------------------------------------------------------------------------


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
        assert_continues(continued(kv, book), goes_on)
        assert_same(contents(kv, book), expected)
    assert open_files(store) == []


def test_in_another_process_and_after_a_kill(store):
    """The other process saves one sequence, and is killed in the middle of a second save."""
    code = """
import os, sys, torch, kvtier
from models import prompt, settings, tiny_llama
from kvtier import sessions
with kvtier.offload(tiny_llama(), settings(select=3, budget={"gpu": "16MiB", "host": "16MiB"})) as kv:
    print(kv.prefill(prompt(220)).save(sys.argv[1]), flush=True)
    other = kv.prefill(prompt(200, seed=5))
    write = sessions.save_chunks
    def killed(*arguments):
        write(*arguments)
        os._exit(9)
    sessions.save_chunks = killed
    other.save(sys.argv[1])
"""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(store)], env=environment, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    library = Library(store)
    assert [entry.id for entry in library.entries()] == [done.stdout.strip()]
    assert len(list((store / "sequences").glob("*/"))) == 2
    with kvtier.offload(tiny_llama(), config()) as kv:
        book = kv.open(store)
        assert_continues(continued(kv, book), continued(kv, kv.prefill(BOOK)))
        assert len(list((store / "sequences").glob("*/"))) == 2  # readers remove nothing
        id = book.fork(select=2).save(store)  # the lock went with the process
    assert {folder.name for folder in (store / "sequences").glob("*/")} == {done.stdout.strip(), id}


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
        assert open_files(store) != []
        del opened, cache
        after = used_bytes(kv)
        assert after["device"] == before["device"]
        assert [tier["chunks"] for tier in kv.stats()["tiers"].values()] == [0, 0, 0]
        assert open_files(store) == []  # nothing refers to the sequences any more


def test_what_is_saved_can_be_saved_again_under_the_same_id(store, tmp_path):
    model = tiny_llama()
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        id = book.save(store)
        written = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
        assert book.save(store) == id
        opened = kv.open(store)
        assert opened.save(store) == id
        assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == written
        assert opened.save(tmp_path / "copy") == id
        expected = contents(kv, book)
    assert Library(tmp_path / "copy").entry().attributes["parts"] == []  # it stands for itself
    with kvtier.offload(model, config()) as kv:
        assert_same(contents(kv, kv.open(tmp_path / "copy", id)), expected)


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


@pytest.mark.filterwarnings("ignore:every layer has a sliding window")  # that is the case here
def test_a_model_of_sliding_layers_alone(store):
    kind, own = SLIDING_ONLY["mistral"]
    with kvtier.offload(tiny(kind, **own), config(window=256)) as kv:
        book = kv.prefill(BOOK)
        id = book.save(store)
        assert not (store / "sequences" / id / "kv").exists()
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
            commit = Library(store).entry(id).commit
            window = zarr.open_group(store / "sequences" / id / commit.window_name, mode="r")
            assert commit.rewound
            assert window["tokens"].shape[3] == 220 - commit.window_begin
            assert window["sliding"].shape[3] == 220 - commit.sliding_begin
            assert opened.token_ids.tolist() == BOOK[0].tolist()
            with pytest.raises(kvtier.UnsupportedError, match="the last block"):
                opened.rewind()
            assert torch.equal(logits_of(model, QUESTION[:, :1], opened), expected)
            assert torch.equal(logits_of(model, QUESTION[:, :1], cache), expected)
            assert torch.equal(logits_of(model, MORE, opened), logits_of(model, MORE, cache))


# -- bounded memory and budgets ----------------------------------------------------------------------------------------


def test_chunks_go_in_bounded_batches_from_host_and_disk(store, tmp_path, monkeypatch):
    """Saved from a block that has most chunks on disk: 24 chunks of all heads in 5 files, summaries in 3 slabs."""
    model = tiny_llama()
    monkeypatch.setattr(slabs, "SLAB_CHUNKS", 10)
    for module in (sequence_files, committer):
        monkeypatch.setattr(module, "SHARD_CHUNKS", 5)
    with kvtier.offload(model, config()) as kv:
        expected = contents(kv, kv.prefill(BOOK))
    one = 2 * 8 * 16 * 4
    monkeypatch.setattr(committer, "TRANSIENT_BYTES", 5 * 2 * one)
    sizes, read = [], Residency.read
    monkeypatch.setattr(Residency, "read", lambda residency, ids: sizes.append(ids.size) or read(residency, ids))
    host = minimum_budget(model, config(), "host") + 2 * one
    tight = config(budget={"gpu": "16MiB", "host": host, "disk": "16MiB"}, store={"path": str(tmp_path / "spill")})
    with kvtier.offload(model, tight) as kv:
        book = kv.prefill(BOOK)
        tiers = kv.stats()["tiers"]
        assert tiers["disk"]["chunks"] > tiers["host"]["chunks"] > 0
        book.save(store)
        assert max(sizes) == 5 * 2
        assert sum(sizes) == 24 * 2 * 2
        assert kv.stats()["tiers"]["host"]["bytes"] <= host
        del book
        opened = kv.open(store)
        assert_same(contents(kv, opened), expected)
        assert_same(contents(kv, opened), expected)  # read again: they come to the host
        tiers = kv.stats()["tiers"]
        assert tiers["disk"]["chunks"] == 24 * 2 * 2
        assert tiers["host"]["bytes"] <= host
    assert len(list((store / "sequences").glob("*/kv/c.*"))) == 5
    with kvtier.offload(model, config()) as kv:
        assert_same(contents(kv, kv.open(store)), expected)


def test_opened_windows_make_chunks_go_to_the_disk(saved, tmp_path):
    model = tiny_llama()
    host = minimum_budget(model, config(), "host") + 40 * 1024
    tight = config(budget={"gpu": "16MiB", "host": host, "disk": "16MiB"}, store={"path": str(tmp_path / "spill")})
    with kvtier.offload(model, tight) as kv:
        book = kv.prefill(prompt(230, seed=3))
        expected = contents(kv, book)
        in_host = kv.stats()["tiers"]["host"]["chunks"]
        opened = []
        for _ in range(6):
            opened.append(kv.open(saved))
            assert kv.stats()["tiers"]["host"]["bytes"] <= host
        windows = [cache._lane.sequences[0].parked for cache in opened]
        nbytes = sum(window.full.nbytes for window in windows)
        assert nbytes > windows_set_aside(kv._anatomy.shape, kv.geometry)
        assert kv.stats()["tiers"]["host"]["chunks"] < in_host
        assert_same(contents(kv, book), expected)
        first = contents(kv, opened[0])
        assert_same(contents(kv, opened[5]), first)


def test_what_does_not_fit_the_device_is_refused_with_everything_given_back(store):
    model, ids = tiny_llama(), prompt(1500)
    summary = {"kind": "exact"}
    with kvtier.offload(model, config(**summary)) as kv:
        kv.prefill(ids).save(store)
    # the smallest pool leaves no bytes for the summaries of a second slab
    least = minimum_budget(model, config(**summary), "gpu")
    tight = config(budget=ROOMY | {"gpu": least + 4096}, **summary)
    with kvtier.offload(model, tight) as kv:
        before, aside = used_bytes(kv), kv._runtime._host.aside_bytes
        with pytest.raises(kvtier.BudgetError, match=r"\[budget\] gpu = "):
            kv.open(store)
        assert used_bytes(kv) == before
        assert [tier["chunks"] for tier in kv.stats()["tiers"].values()] == [0, 0]
        assert kv._runtime._host.aside_bytes == aside
        assert open_files(store) == []
        logits_of(model, QUESTION, kv.prefill(BOOK[:, :40]))  # and the block works on


def test_what_does_not_fit_the_host_is_refused_with_everything_given_back(saved):
    """Windows: chunks stay in the store."""
    model = tiny_llama()
    least = minimum_budget(model, config(), "host")
    with kvtier.offload(model, config(budget=ROOMY | {"host": least})) as kv:
        opened = [kv.open(saved)]
        one = used_bytes(kv)["host"]
        opened += [kv.open(saved) for _ in range(least // one - 1)]
        used = used_bytes(kv)
        with pytest.raises(kvtier.BudgetError, match=r"\[budget\] host = "):
            kv.open(saved)
        assert used_bytes(kv) == used
        assert len(opened) > 2  # what is set aside
        assert kv.stats()["tiers"]["host"]["chunks"] == 0
        first = contents(kv, opened[0])
        del opened[1:]
        assert_same(contents(kv, kv.open(saved)), first)


def test_the_opened_window_counts_in_the_host_budget(saved):
    model = tiny_llama()
    with kvtier.offload(model, config()) as kv:
        budget = kv._runtime._host
        aside = budget.aside_bytes
        cache = kv.open(saved)
        window = cache._lane.sequences[0].parked
        nbytes = window.full.nbytes + window.sliding.nbytes
        assert aside - budget.aside_bytes == nbytes > 0
        del window
        logits_of(model, QUESTION, cache)  # it runs: the parked window goes
        assert budget.aside_bytes == aside
