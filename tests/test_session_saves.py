"""Saving that is interrupted leaves no trace; where and what cannot be saved is refused."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import zarr
from models import minimum_budget, tiny_llama
from session_cases import (
    BOOK,
    MORE,
    Stop,
    assert_continues,
    assert_same,
    commit_always,
    config,
    contents,
    continued,
    kept,
    logits_of,
    quicken,
    says_it_is_short,
    stopper,
)

import kvtier
from kvtier import sessions
from kvtier.runtime import committer, library, sequence_files, tiered
from kvtier.runtime.library import Library
from kvtier.runtime.residency import Residency


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    if request.function is not test_everything_is_on_the_disk_before_it_is_visible:
        quicken(monkeypatch)


# -- interrupted saves -------------------------------------------------------------------------------------------------

STEPS = {
    "before its files": (sessions, "new_files"),
    "in its files": (sequence_files.SequenceFiles, "create"),
    "in a shard": (sequence_files.RecordIO, "write"),
    "in the codes": (sequence_files.SequenceFiles, "write_codes"),
    "in the window": (committer.Committer, "_write_window"),
    "before it is on the disk": (sequence_files.SequenceFiles, "sync"),
    "before the record": (committer, "write_commit"),
    "after the record": (sequence_files.SequenceFiles, "publish"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_an_interrupted_save_leaves_what_was_there_and_nothing_else(step, error, store, monkeypatch):
    model = tiny_llama()
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        id = book.save(store)
        before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
        other = kv.prefill(MORE)

        def fails(*arguments, **more):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(*STEPS[step], fails)
            expected = kvtier.StoreError if isinstance(error, OSError) else KeyboardInterrupt
            message = r"What was (saved|committed) before is intact; free space there, or"
            with pytest.raises(expected, match=message if isinstance(error, OSError) else None):
                other.save(store)
        assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
        assert {path.name for path in (store / "sequences").iterdir()} == {id, "zarr.json"}
        assert_same(contents(kv, kv.open(store)), contents(kv, book))
        assert other.save(store) != id  # and nothing is locked


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("damage", ["tokens", "commit"])
def test_an_interrupted_save_leaves_what_it_was_to_replace(step, damage, store, monkeypatch):
    """A damaged sequence, most of which is intact; saving again replaces it once the new one is complete."""
    with kvtier.offload(tiny_llama(), config()) as kv:
        book = kv.prefill(BOOK)
        id = book.save(store)
        for file in (store / "sequences" / id / damage).glob("c.*"):
            file.write_bytes(b"")
        before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}

        def fails(*arguments, **more):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(*STEPS[step], fails)
            with pytest.raises(kvtier.StoreError, match="is intact; free space there, or"):
                book.save(store)
        assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
        assert book.save(store) == id
        assert {path.name for path in (store / "sequences").iterdir()} == {id, "zarr.json"}
        assert_same(contents(kv, kv.open(store)), contents(kv, book))


def test_everything_is_on_the_disk_before_it_is_visible(store, monkeypatch):
    """What was synced since it was last changed is marked by a time of change of 0."""
    fsync, fdatasync, write_commit = os.fsync, os.fdatasync, committer.write_commit

    def sync(fd):
        fsync(fd)
        os.utime(fd, ns=(0, 0))

    def changed(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.stat().st_mtime_ns}

    def record(folder, commit):
        assert changed(folder.parent) - {"commit/c.0", "commit/c.1"} == set()
        assert folder.parent.stat().st_mtime_ns == folder.parent.parent.stat().st_mtime_ns == 0
        write_commit(folder, commit)
        assert changed(folder) == set()
        numbers.append(commit.number)

    numbers = []
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "fdatasync", lambda fd: sync(fd) or fdatasync(fd))
    monkeypatch.setattr(committer, "write_commit", record)
    with kvtier.offload(tiny_llama(), config()) as kv:
        kv.prefill(BOOK).save(store)
        book = kv.open(store)
        logits_of(kv.model, MORE, book)
        id = book.save(store)
    assert numbers == [1, 2, 1, 2]
    assert changed(store / "sequences" / id) == set()
    assert Library(store).entry(id).attributes["parts"] != []


def test_one_writer_at_a_time(store):
    with kvtier.offload(tiny_llama(), config()) as kv:
        book = kv.prefill(BOOK)
        id = book.save(store)
        with Library(store).writing():
            with pytest.raises(kvtier.StoreError, match=rf"process {os.getpid()} is writing to .*store: try again"):
                book.save(store)
            kv.open(store)  # readers do not mind
        assert book.save(store) == id


def test_a_full_device_is_met_before_any_work(store, monkeypatch):
    full = shutil._ntuple_diskusage(2**30, 2**30 - 4096, 4096)
    monkeypatch.setattr(library.shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(sessions, "new_files", None)
    with (
        kvtier.offload(tiny_llama(), config()) as kv,
        pytest.raises(kvtier.StoreError, match=r"takes \d.* [KM]iB, but only 4.00 KiB are free in .*store"),
    ):
        kv.prefill(BOOK).save(store)


# -- where and what cannot be saved ------------------------------------------------------------------------------------


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
    assert [path.name for path in (*foreign.iterdir(), *later.iterdir())] == ["zarr.json"] * 2


def test_a_store_that_may_not_be_written(store, monkeypatch):
    """Tests may run as root, for whom everything may be written: the refusal is the system's."""
    opened = os.open

    def refuse(path, flags, *arguments, **more):
        if flags & (os.O_WRONLY | os.O_RDWR) and Path(path).is_relative_to(store):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *arguments, **more)

    with kvtier.offload(tiny_llama(), config()) as kv:
        book = kv.prefill(BOOK)
        book.save(store)
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(
            kvtier.StoreError, match=r"cannot be used as a store: .*Permission denied.*choose another one"
        ):
            kv.prefill(MORE).save(store)
        assert_same(contents(kv, kv.open(store)), contents(kv, book))


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


# -- saved as what it was opened from ----------------------------------------------------------------------------------


def test_an_opened_reading_that_was_interrupted_is_completed_in_place(store, monkeypatch):
    commit_always(monkeypatch)
    model, stop = tiny_llama(), stopper(monkeypatch)
    stop(5)
    with kvtier.offload(model, kept(store)) as kv, pytest.raises(Stop):
        kv.prefill(BOOK)
    entry = Library(store).entry()
    with kvtier.offload(model, config()) as kv:
        with says_it_is_short(160):
            book = kv.open(store)
        beginning = book.fork()
        logits_of(model, BOOK[:, 160:], book)
        assert book.save(store) == entry.id
        assert_same(contents(kv, kv.open(store)), contents(kv, kv.prefill(BOOK)))
        id = beginning.save(store)  # a text of its own, with chunks of the other one
    whole = Library(store).entry(entry.id)
    assert (whole.tokens, whole.commit.complete, whole.attributes) == (220, True, entry.attributes)
    assert Library(store).entry(id).attributes["parts"] == [[entry.id, entry.commit.chunks]]
    with kvtier.offload(model, config()) as kv:
        assert_continues(continued(kv, kv.open(store, entry.id)), continued(kv, kv.prefill(BOOK)))


def test_what_a_cache_reads_from_is_not_replaced(store, tmp_path):
    """Its chunks would be lost with the damaged rest."""
    with kvtier.offload(tiny_llama(), config()) as kv:
        expected = continued(kv, kv.prefill(BOOK))
        kv.prefill(BOOK).save(store)
        book = kv.open(store)
        file = Library(store).entry().path / "tokens" / "c.0"
        file.write_bytes(b"1" + file.read_bytes()[1:])
        message = f"this cache reads its chunks from {file.parents[1]}, where something else is damaged"
        with pytest.raises(kvtier.StoreError, match=message):
            book.save(store)
        book.save(tmp_path / "other")
        assert_continues(continued(kv, kv.open(tmp_path / "other")), expected)


def test_what_a_cache_reads_from_is_not_replaced_without_its_commits(store, tmp_path):
    with kvtier.offload(tiny_llama(), config()) as kv:
        expected = continued(kv, kv.prefill(BOOK))
        id = kv.prefill(BOOK).save(store)
        book = kv.open(store)
        for slot in (store / "sequences" / id / "commit").glob("c.*"):
            slot.unlink()
        with pytest.raises(kvtier.StoreError, match=f"this cache reads its chunks from {store}/sequences/{id}, where"):
            book.save(store)
        book.save(tmp_path / "other")
        assert_continues(continued(kv, kv.open(tmp_path / "other")), expected)
        kv.prefill(BOOK).save(store)  # one that was read does
        assert_continues(continued(kv, kv.open(store)), expected)


@pytest.mark.parametrize("step", ["fit", "admit"])
def test_a_cache_whose_last_call_failed_half_way(step, store, monkeypatch):
    """The first chunks have left the window in one layer of two; the other one has something fitted, or has not."""
    owner, name = (tiered, "Fitted") if step == "fit" else (Residency, "admit")
    model, calls, do = tiny_llama(), [], getattr(owner, name)

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise kvtier.BudgetError("full")
        return do(*arguments)

    with kvtier.offload(model, config()) as kv:
        cache = kv.new_cache()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(kvtier.BudgetError, match="full"):
                logits_of(model, BOOK, cache)
        with pytest.raises(kvtier.UnsupportedError, match="the last call on this cache failed half-way: call it again"):
            cache.save(store)
        logits_of(model, BOOK[:, cache.get_seq_length() :], cache)
        cache.save(store)
        assert_same(contents(kv, kv.open(store)), contents(kv, cache))
        assert_same(contents(kv, cache), contents(kv, kv.prefill(BOOK)))
