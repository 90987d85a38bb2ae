"""Opened sequences stay where they are: read in place, and what goes on from them refers to them."""

import shutil

import numpy as np
import pytest
import torch
import zarr
from models import prompt, tiny_llama
from session_cases import (
    BOOK,
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
    quicken,
)

import kvtier
from kvtier import durable
from kvtier.runtime import committer, sequence_files
from kvtier.runtime.library import Library

pytestmark = pytest.mark.usefixtures("quick_store")

RECORD = 2 * 8 * 16 * 4
"""Bytes of a chunk."""
CHUNKS = 24
"""Of BOOK, in each layer and KV head."""


@pytest.fixture(scope="module")
def chain(model, tmp_path_factory):
    """A store with a text, one that goes on from it, and one that goes on from that: ids, and what comes of each."""
    path = tmp_path_factory.mktemp("chain") / "store"
    ids, expected, cache = [], [], None
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        for text in (BOOK, MORE, prompt(90, seed=4)):
            with kvtier.offload(model, config()) as kv:
                if ids:
                    cache = kv.open(path, ids[-1])
                    logits_of(model, text, cache)
                else:
                    cache = kv.prefill(text)
                ids.append(cache.save(path))
                expected.append((continued(kv, cache), contents(kv, cache)))
                del cache
    return path, ids, expected


@pytest.fixture
def copied(chain, store):
    """A copy of it that can be changed."""
    shutil.copytree(chain[0], store)
    return store, *chain[1:]


def disk(kv):
    return kv.stats()["tiers"]["disk"]


# -- read in place -----------------------------------------------------------------------------------------------------


def test_opening_reads_no_chunk(chain, model):
    path, ids, expected = chain
    with kvtier.offload(model, config()) as kv:
        book = kv.open(path, ids[0])
        assert "disk" not in kv.stats()["tiers"]  # there is none in the settings, and none was needed yet
        assert [tier["chunks"] for tier in kv.stats()["tiers"].values()] == [0, 0]
        assert open_files(path) == []
        fork = book.fork()
        logits_of(model, QUESTION[:, :1], fork)
        tiers = kv.stats()["tiers"]
        assert disk(kv)["chunks"] == CHUNKS * 2 * 2
        assert disk(kv)["hits"] + tiers["host"]["hits"] == tiers["device"]["misses"] == 3 * 2 * 2
        assert disk(kv)["bytes_read"] == disk(kv)["hits"] * RECORD > 0
        assert disk(kv)["bytes_written"] == 0
        assert tiers["host"]["chunks"] == 2 * 2  # one has left the window; those of the store have been read once
        assert_continues(continued(kv, book), expected[0][0])


def test_the_host_gets_what_is_read_a_second_time(chain, model):
    path, ids, expected = chain
    with kvtier.offload(model, config()) as kv:
        book = kv.open(path, ids[0])
        read = []
        for _ in range(4):
            assert_continues(continued(kv, book), expected[0][0])
            read.append((disk(kv)["bytes_read"], kv.stats()["tiers"]["host"]["chunks"]))
        assert 0 < read[0][0] < read[1][0]
        assert read[1][1] > 0
        assert read[1] == read[2] == read[3]  # all that is chosen is in the host by now
        assert read[3][0] <= 2 * CHUNKS * 2 * 2 * RECORD  # none was read a third time


def test_damage_is_met_at_the_first_read_and_named(store, model):
    every = config(select=25)
    with kvtier.offload(model, every) as kv:
        id = kv.prefill(BOOK).save(store)
    file = store / "sequences" / id / "kv" / "c.0.0.0.0"
    with kvtier.offload(model, every) as kv, kvtier.offload(tiny_llama(), every) as later:
        book, other = kv.open(store), later.open(store)
        logits_of(model, QUESTION, book.fork())  # all chunks are chosen, read and checked
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[(1 * sequence_files.SHARD_CHUNKS + 7) * 2 * 4096 + 4096 + 5] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(kvtier.StoreError, match=rf"{file} or .* other data .*\(chunk 7, layer 1, KV head 1\)"):
            logits_of(later.model, QUESTION, other.fork())
        expected = logits_of(model, QUESTION, book.fork())
        file.write_bytes(whole)
        assert torch.equal(logits_of(later.model, QUESTION, other), expected)  # it has never been used


# -- what goes on from a saved sequence --------------------------------------------------------------------------------


def test_a_save_after_an_append_writes_the_new_chunks_alone(chain, model):
    path, ids, expected = chain
    entries = {entry.id: entry for entry in Library(path).entries()}
    parts = [entries[id].attributes["parts"] for id in ids]
    assert parts[0] == []
    ends = [entries[id].commit.chunks for id in ids]
    assert ends[0] == CHUNKS < ends[1] < ends[2]
    assert parts[1:] == [[[ids[0], ends[0]]], [[ids[0], ends[0]], [ids[1], ends[1]]]]
    for id, first, end in zip(ids, [0, *ends], ends, strict=False):
        group = zarr.open_group(path / "sequences" / id, mode="r")
        assert group["kv"].shape[1] == group["codes/codes"].shape[1] == group["crc/codes"].shape[0] == end - first
        assert group["tokens"].shape == (entries[id].tokens,)
    with kvtier.offload(model, config()) as kv:
        for id, (goes_on, held) in zip(ids, expected, strict=True):
            cache = kv.open(path, id)
            assert_continues(continued(kv, cache), goes_on)
            assert_same(contents(kv, cache), held)
            del cache
            kv.stats()  # what nobody holds any more is let go of at the next call
            assert open_files(path) == []


def test_forks_of_forks(chain, store, model):
    """Two branches from one opened sequence, and a branch of a branch: each refers to what it shares."""
    shutil.copytree(chain[0], store)
    ids = chain[1]
    with kvtier.offload(model, config()) as kv:
        book = kv.open(store, ids[0])
        saved, expected = [], []
        for seed in (5, 6):
            fork = book.fork()
            logits_of(model, prompt(70, seed=seed), fork)
            saved.append(fork.save(store))
            expected.append(contents(kv, fork))
        logits_of(model, prompt(40, seed=7), fork)
        saved.append(fork.save(store))  # its middle was computed in this block, so it lies nowhere else
        expected.append(contents(kv, fork))
    library = Library(store)
    assert [library.entry(id).attributes["parts"] for id in saved] == [[[ids[0], CHUNKS]]] * 3
    with kvtier.offload(model, config()) as kv:
        fork = kv.open(store, saved[0]).fork()
        logits_of(model, prompt(40, seed=8), fork)
        saved.append(fork.fork(select=1).save(store))
        end = library.entry(saved[0]).commit.chunks
        assert library.entry(saved[3]).attributes["parts"] == [[ids[0], CHUNKS], [saved[0], end]]
        expected.append(contents(kv, fork) | {"select": torch.tensor(1)})
    with kvtier.offload(model, config()) as kv:
        for id, held in zip(saved, expected, strict=True):
            assert_same(contents(kv, kv.open(store, id)), held)


def test_parts_across_shard_borders(store, model, monkeypatch):
    """Five chunks to a file, with parts that begin and end anywhere."""
    for module in (sequence_files, committer):
        monkeypatch.setattr(module, "SHARD_CHUNKS", 5)
    id, n = None, [0]
    for i, length in enumerate((120, 1, 30, 77, 150)):
        with kvtier.offload(model, config()) as kv:
            cache = kv.new_cache() if id is None else kv.open(store, id)
            logits_of(model, prompt(length, seed=i), cache)
            id = cache.save(store)
            n.append(Library(store).entry(id).commit.chunks)
            expected, goes_on = contents(kv, cache), continued(kv, cache)
    assert {end % 5 for end in n[1:]} != {0}
    with kvtier.offload(model, config()) as kv:
        cache = kv.open(store, id)
        assert_continues(continued(kv, cache), goes_on)
        assert_same(contents(kv, cache), expected)


def test_a_sequence_without_chunks_of_its_own(store, model):
    with kvtier.offload(model, config()) as kv:
        kv.prefill(prompt(221)).save(store)
    with kvtier.offload(model, config()) as kv:
        book = kv.open(store)
        logits_of(model, QUESTION[:, :3], book)
        id = book.save(store)
        expected = continued(kv, book)
    entry = Library(store).entry(id)
    assert entry.attributes["parts"][0][1] == entry.commit.chunks == CHUNKS + 1
    assert list(entry.path.glob("kv/c.*")) == []
    with kvtier.offload(model, config()) as kv:
        assert_continues(continued(kv, kv.open(store, id)), expected)


def test_elsewhere_nothing_is_referred_to(chain, store, model):
    path, ids, expected = chain
    with kvtier.offload(model, config()) as kv:
        assert kv.open(path, ids[2]).save(store) == ids[2]
    entry = Library(store).entry()
    assert entry.attributes["parts"] == []
    with kvtier.offload(model, config()) as kv:
        assert_continues(continued(kv, kv.open(store)), expected[2][0])


# -- parts that are gone or damaged ------------------------------------------------------------------------------------


def lost(folder):
    shutil.rmtree(folder)


def without_commit(folder):
    for slot in folder.glob("commit/c.*"):
        slot.unlink()


def unreadable(folder):
    for slot in folder.glob("commit/c.*"):
        slot.write_bytes(b"x" * 4096)


def other_attributes(folder):
    file = folder / "zarr.json"
    file.write_text(file.read_text().replace('"payload_bytes": 1024', '"payload_bytes": 1025'))


def later_version(folder):
    file = folder / "zarr.json"
    file.write_text(file.read_text().replace('"version": 2', '"version": 3'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lost, "it is not there, or shorter than it was"),
        (without_commit, r"commit: c\.0 and c\.1 are missing or empty, although \d+ tokens were committed"),
        (unreadable, "its commit record cannot be read: the checksum of .*c.0 is wrong"),
        (other_attributes, "the checksum of its zarr.json is wrong"),
        (later_version, "it has layout version 3, this kvtier reads 2"),
    ],
)
@pytest.mark.parametrize("part", [0, 1])
def test_a_part_that_cannot_be_used_is_named(part, damage, reason, copied, model):
    path, ids, expected = copied
    folder = path / "sequences" / ids[part]
    damage(folder)
    with kvtier.offload(model, config()) as kv:
        with pytest.raises(
            kvtier.StoreError, match=rf"{ids[2]} goes on from {folder}: {reason}.*put back a copy of that"
        ):
            kv.open(path, ids[2])
        if part == 1:
            assert_continues(continued(kv, kv.open(path, ids[0])), expected[0][0])
            kv.stats()
        assert open_files(path) == []


@pytest.mark.parametrize("name", ["codes/codes/c.0.0.0.0.0", "codes/scale/c.0.0.0.0", "crc/codes/c.0"])
def test_damaged_summaries_of_a_part_are_refused(name, copied, model):
    path, ids, _ = copied
    file = path / "sequences" / ids[1] / name
    data = bytearray(file.read_bytes())
    data[1] ^= 1
    file.write_bytes(data)
    with kvtier.offload(model, config()) as kv:
        with pytest.raises(kvtier.StoreError, match=rf"{ids[1]} is damaged: .*{file}.* \(codes of chunk {CHUNKS}\)"):
            kv.open(path, ids[2])
        kv.open(path, ids[0])


@pytest.mark.parametrize("file", ["kv", "crc/kv"])
def test_lost_chunks_of_a_part_are_met_when_they_are_read(file, copied, model):
    path, ids, _ = copied
    next((path / "sequences" / ids[0] / file).glob("c.*")).unlink()
    with kvtier.offload(model, config()) as kv:
        book = kv.open(path, ids[2])
        with pytest.raises(kvtier.StoreError, match=rf"{ids[0]} is damaged: .*{file}/c\.0\.0"):
            logits_of(model, QUESTION, book)


def test_a_part_that_was_saved_anew_serves_as_before(copied, model):
    """Damaged, and then saved from a cache that was read from the first token on: it holds more chunks of its own."""
    path, ids, expected = copied
    file = path / "sequences" / ids[1] / "tokens" / "c.0"
    file.write_bytes(b"1" * file.stat().st_size)
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        logits_of(model, MORE, book)
        assert book.save(path) == ids[1]
        assert Library(path).entry(ids[1]).attributes["parts"] == []
        cache = kv.open(path, ids[2])
        assert_continues(continued(kv, cache), expected[2][0])
        assert_same(contents(kv, cache), expected[2][1])


def test_a_part_that_holds_fewer_chunks_than_before_is_refused(store, model):
    """The reverse: saved whole, damaged, and saved anew from a cache that refers to another sequence."""
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        first = book.save(store)
        logits_of(model, MORE, book)
        second = book.save(store)
    with kvtier.offload(model, config()) as kv:
        book = kv.open(store, second)
        logits_of(model, QUESTION, book)
        third = book.save(store)
    file = store / "sequences" / second / "block_starts" / "c.0"
    file.write_bytes(b"1" * file.stat().st_size)
    with kvtier.offload(model, config()) as kv:
        book = kv.open(store, first)
        logits_of(model, MORE, book)
        assert book.save(store) == second
        assert Library(store).entry(second).attributes["parts"] == [[first, CHUNKS]]
        message = rf"{third} goes on from .*{second}: it was saved anew and does not hold chunk 0 any more"
        with pytest.raises(kvtier.StoreError, match=message):
            kv.open(store, third)


def test_what_goes_on_from_a_reading_that_was_interrupted(store, model, monkeypatch):
    """Half of its chunks were opened, half recorded: both lie in the same sequence, which is referred to once."""
    monkeypatch.setattr(durable, "FIRST_COMMIT_SECONDS", 0)
    monkeypatch.setattr(durable, "COMMIT_SHARE", 1e9)
    kept = config(budget=ROOMY | {"disk": "16MiB"}, store={"path": str(store), "mode": "durable"})
    after = durable._Writing._after_block

    def stop(writing, done):
        after(writing, done)
        if done >= 128:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(durable._Writing, "_after_block", stop)
        with pytest.raises((InterruptedError, kvtier.StoreError)), kvtier.offload(model, kept) as kv:
            kv.prefill(BOOK)
    with kvtier.offload(model, kept) as kv:
        fork = kv.prefill(BOOK).fork()
        assert kv.stats()["prefill"]["resumed_tokens"] == 128
        (first,) = [entry.id for entry in Library(store).entries()]
        logits_of(model, MORE, fork)
        id = fork.save(store)
        expected, goes_on = contents(kv, fork), continued(kv, fork)
    assert Library(store).entry(id).attributes["parts"] == [[first, CHUNKS]]
    with kvtier.offload(model, config()) as kv:
        cache = kv.open(store, id)
        assert_continues(continued(kv, cache), goes_on)
        assert_same(contents(kv, cache), expected)


def test_two_caches_of_one_sequence_read_it_independently(chain, model):
    path, ids, expected = chain
    with kvtier.offload(model, config()) as kv:
        first, second = kv.open(path, ids[1]), kv.open(path, ids[1])
        sequences = [cache._lane.sequences[0] for cache in (first, second)]
        assert not np.isin(sequences[0].layers[0].ids, sequences[1].layers[0].ids).any()
        del first, sequences
        assert_continues(continued(kv, second), expected[1][0])
