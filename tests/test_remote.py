"""Export to object storage and restore: memory:// and file:// everywhere, S3 where moto and s3fs are installed."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as fsspec_registry
from models import CACHE_NAME, prompt, settings, tiny_llama
from test_families import FAMILIES, SLIDING_ONLY, tiny

import kvtier
from kvtier import durable, remote_arrivals, remote_folder, verify_store
from kvtier.remote import export_sequence, restore_sequence
from kvtier.remote_folder import Progress, RemoteFolder
from kvtier.remote_mirror import UNFINISHED, Mirror
from kvtier.runtime import direct_io
from kvtier.runtime.commit_record import checksum
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import Library

ROOMY = {"gpu": "16MiB", "host": "16MiB", "disk": "64MiB"}
SHORT, LONG = 330, 460
URL = "memory://bucket/books"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No fsync, the plain engine of ``RecordIO``, and nothing left of the last test in memory://."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    monkeypatch.setattr(direct_io, "_engine_of", lambda folder, nbytes: (direct_io.BUFFERED, []))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])


class Killed(BaseException):
    """Ends what goes on, as a kill would."""


def gemma():
    return tiny(FAMILIES["gemma3"][0], **FAMILIES["gemma3"][1])


def sliding_only():
    return tiny(SLIDING_ONLY["mistral"][0], **SLIDING_ONLY["mistral"][1])


KINDS = {
    "auto": (tiny_llama, {}),
    "int4": (tiny_llama, {"store": {"dtype": "int4"}}),
    "some layers slide": (gemma, {"window": 256}),
    "all layers slide": (sliding_only, {"window": 256}),
}


def config_of(kind, path):
    make, config = KINDS.get(kind, KINDS["auto"])
    store = {"path": path, "mode": "durable"} | config.get("store", {})
    return make(), settings(**{"select": 3, "budget": ROOMY} | config | {"store": store})


def write(path, kind, ids, stop_after=None):
    """Read ``ids`` durably, committing after every block; the reading is killed after so many blocks."""
    model, config = config_of(kind, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(os, "fdatasync", lambda fd: None)
        if stop_after is not None:
            patch.setattr(durable, "FIRST_COMMIT_SECONDS", 0)
            patch.setattr(durable, "COMMIT_SHARE", 1e9)
            after, n = durable._Writing._after_block, iter(range(1, 1000))

            def counted(writing, done):
                after(writing, done)
                if next(n) == stop_after:
                    raise Killed

            patch.setattr(durable._Writing, "_after_block", counted)
        try:
            with kvtier.offload(model, config) as kv:
                kv.prefill(ids)
        except Killed:
            assert stop_after is not None


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Stores of every kind, made when asked for; not to be changed."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = path = tmp_path_factory.mktemp("originals") / "store"
            if kind == "parts":
                write(path, kind, prompt(LONG)[:, :SHORT])
                write(path, kind, prompt(LONG))
            elif kind == "unfinished part":
                write(path, kind, prompt(LONG), stop_after=9)
                write(path, kind, torch.cat([prompt(LONG)[:, :250], prompt(90, seed=1)], 1))
            else:
                write(path, kind, prompt(SHORT))
        return made[kind]

    return get


@pytest.fixture
def store(tmp_path, originals):
    """A copy of one of the stores."""

    def get(kind="auto"):
        return Path(shutil.copytree(originals(kind), tmp_path / "store"))

    return get


def sequences(path):
    """Entries of a store, those with others to go on from last."""
    return sorted(Library(path).entries(), key=lambda entry: (len(entry.attributes["parts"]), entry.tokens))


def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def stamps_of(path):
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in Path(path).rglob("*")}


def objects_of(url):
    """What is in memory:// below ``url``, by name."""
    root = "/" + url.removeprefix("memory://") + "/"
    return {name.removeprefix(root): file.getvalue() for name, file in MemoryFileSystem.store.items()}


def put_object(name, data):
    MemoryFileSystem().pipe_file(f"/bucket/books/{name}", data)


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def answer(kind, path, id):
    """Logits [1, n, vocabulary] of a question about a saved sequence."""
    model, config = config_of(kind, path)
    with kvtier.offload(model, config) as kv, torch.no_grad():
        return model(prompt(20, seed=7), **{CACHE_NAME: kv.open(path, id)}).logits


def damage_count(path):
    return sum(len(sequence["problems"]) for sequence in verify_store.verify_store(path)["sequences"])


def killed_after(monkeypatch, n):
    """Whatever moves files is killed when ``n`` of them (of pieces, when fetching) have been moved."""
    add, left, lock = Progress.add, [n], threading.Lock()

    def counted(progress, nbytes, files=1):
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
        add(progress, nbytes, files)

    monkeypatch.setattr(Progress, "add", counted)


@pytest.fixture
def failing(monkeypatch):
    """Lets a method of the file system at memory:// fail after ``n`` calls."""

    def fail(name, error, n=0, fs=MemoryFileSystem):
        method, left = getattr(fs, name), [n]

        def limited(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise error
            return method(*args, **kwargs)

        monkeypatch.setattr(fs, name, limited)

    return fail


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "parts", "unfinished part"])
@pytest.mark.filterwarnings("ignore:every layer has a sliding window")  # the model is made to be so
def test_there_and_back(originals, kind, tmp_path):
    path, back = originals(kind), tmp_path / "back"
    entry = sequences(path)[-1]
    files = files_of(path)
    sent = export_sequence(path, URL, entry.id)
    assert objects_of(URL) == files
    came = restore_sequence(URL, back, entry.id)
    assert files_of(back) == files
    assert damage_count(back) == 0
    expected = {"id": entry.id, "tokens": entry.tokens, "url": URL}
    of_sequences = {name: data for name, data in files.items() if name.count("/") > 1}
    expected |= {"files": len(of_sequences), "bytes": sum(map(len, of_sequences.values()))}
    for report, where in ((sent, path), (came, back)):
        assert report.pop("seconds") > 0
        assert json.loads(json.dumps(report)) == expected | {"store": str(where)}
    assert torch.equal(answer(kind, back, entry.id), answer(kind, path, entry.id))


def test_parts_are_what_they_say(originals):
    short, long = sequences(originals("parts"))
    assert long.attributes["parts"][0][0] == short.id
    part, entry = sequences(originals("unfinished part"))
    assert not part.commit.complete
    assert entry.commit.complete
    assert entry.attributes["parts"][0][0] == part.id


def test_what_is_there_is_not_sent_again(originals, failing):
    path, said = originals("parts"), []
    short, long = sequences(path)
    assert export_sequence(path, URL, short.id)["files"] > 0
    alone = objects_of(URL)
    assert not any(long.id in name for name in alone)
    assert export_sequence(path, URL, long.id)["files"] == len(objects_of(URL)) - len(alone)
    assert {name: data for name, data in objects_of(URL).items() if name in alone} == alone
    for name in ("pipe_file", "put_file", "rm"):
        failing(name, AssertionError)
    report = export_sequence(path, URL, long.id, say=said.append)
    assert (report["files"], report["bytes"]) == (0, 0)
    assert said == [f"{long.id} is there already"]


def test_restoring_what_is_there_changes_nothing(originals, tmp_path):
    path, back = originals("parts"), tmp_path / "back"
    short, long = sequences(path)
    export_sequence(path, URL, long.id)
    assert restore_sequence(URL, back, short.id)["files"] > 0
    before = stamps_of(back / "sequences" / short.id)
    n_files = len(files_of(path / "sequences" / long.id))
    assert restore_sequence(URL, back, long.id)["files"] == n_files
    assert stamps_of(back / "sequences" / short.id) == before
    before, said = stamps_of(back), []
    report = restore_sequence(URL, back, long.id, say=said.append)
    assert (report["files"], report["bytes"]) == (0, 0)
    assert said[-1] == f"{long.id} is there already"
    assert stamps_of(back) == before


def test_restoring_into_the_store_it_came_from(store):
    path = store("parts")
    long = sequences(path)[-1]
    export_sequence(path, URL, long.id)
    before = stamps_of(path)
    assert restore_sequence(URL, path, long.id)["files"] == 0
    assert stamps_of(path) == before


def test_any_zarr_reader_opens_the_url(originals):
    path = originals("int4")
    [entry] = sequences(path)
    export_sequence(path, URL)
    here, there = zarr.open_group(path, mode="r"), zarr.open_group(URL, mode="r")
    assert_same_zarr(here, there, entry)


def assert_same_zarr(here, there, entry):
    assert type(there.store).__name__ == "FsspecStore"
    assert dict(there.attrs) == dict(here.attrs)
    names = sorted(name for name, _ in here.members(max_depth=None))
    assert sorted(name for name, _ in there.members(max_depth=None)) == names
    arrays = {name: array for name, array in here.members(max_depth=None) if isinstance(array, zarr.Array)}
    for name, array in arrays.items():
        np.testing.assert_array_equal(there[name][:], array[:])
    tokens = there[f"sequences/{entry.id}/tokens"][:]
    np.testing.assert_array_equal(tokens, prompt(SHORT)[0].numpy())
    assert there[f"sequences/{entry.id}/kv"][:].any()


def test_holes_stay_holes(originals, tmp_path, monkeypatch):
    path, back = originals("auto"), tmp_path / "back"
    export_sequence(path, URL)
    restore_sequence(URL, back)
    shard = next(back.glob("sequences/*/kv/c.0.0.0.0"))
    assert shard.stat().st_blocks * 512 < shard.stat().st_size - 2**18


def test_a_mib_of_zeros_becomes_a_hole(tmp_path, monkeypatch):
    """Wherever it begins, also across pieces; the length is kept if a file ends with one."""
    monkeypatch.setattr(remote_folder, "PIECE_BYTES", 3 * 2**20 + 5)
    ends = np.full(2**20, 7, np.uint8)
    for i, (before, zeros, after) in enumerate(
        [(5, 2**20, 1), (2**20, 9 * 2**20 + 3, 3), (12345, 2**21, 0), (0, 2**22, 0)]
    ):
        data = ends[:before].tobytes() + bytes(zeros) + ends[:after].tobytes()
        put_object(f"{i}", data)
        names = {f"{i}": len(data)}
        RemoteFolder(URL, None).fetch("", tmp_path, names, Progress(lambda line: None, "fetched"))
        file = tmp_path / f"{i}"
        assert file.read_bytes() == data
        assert file.stat().st_blocks * 512 <= len(data) - zeros + 3 * remote_folder.HOLE_BYTES
    put_object("empty", b"")
    RemoteFolder(URL, None).fetch("", tmp_path, {"empty": 0}, Progress(lambda line: None, "fetched"))
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_folder_that_is_mounted(originals, tmp_path):
    path, url = originals("auto"), f"file://{tmp_path}/books"
    export_sequence(path, url)
    assert files_of(tmp_path / "books") == files_of(path)
    restore_sequence(url, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(path)
    with pytest.raises(StoreError, match=rf"there is no folder {tmp_path}/missing; create it, or mount it"):
        export_sequence(path, f"file://{tmp_path}/missing/books")


def test_memory_does_not_grow_with_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_folder, "PIECE_BYTES", 2**20)
    monkeypatch.setattr(LocalFileSystem, "async_impl", True)  # several at once, as with object storage
    source, names = tmp_path / "source", {f"{i}": 24 * 2**20 for i in range(4)}
    source.mkdir()
    (tmp_path / "there").mkdir()
    data = np.random.default_rng(0).integers(0, 256, 24 * 2**20, np.uint8).tobytes()
    for name in names:
        (source / name).write_bytes(data)
    folder = RemoteFolder(f"file://{tmp_path}/there", None)
    tracemalloc.start()
    try:
        folder.send(source, "", names, Progress(lambda line: None, "sent"))
        progress = Progress(lambda line: None, "fetched")
        folder.fetch("", tmp_path / "back", names, progress)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (progress.files, progress.nbytes) == (4, 4 * len(data))
    assert all((tmp_path / "back" / name).read_bytes() == data for name in names)
    assert peak < 2.5 * remote_folder.PARALLEL * 2**20


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 20, 31, 32, 40, 64, 65])
def test_an_interrupted_export_is_no_sequence_and_goes_on(originals, tmp_path, n):
    """Killed after ``n`` files of 66: in the part, between its two commits, in the sequence itself."""
    path, back = originals("parts"), tmp_path / "back"
    short, long = sequences(path)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, n)
        with pytest.raises(Killed):
            export_sequence(path, URL, long.id)
    there = objects_of(URL)
    with pytest.raises(StoreError, match=r"is not finished: run `kvtier export` again|holds no sequence"):
        restore_sequence(URL, back, long.id)
    assert not back.exists()
    if n < 33:
        with pytest.raises(StoreError, match=f"the export of {short.id} to {URL} is not finished"):
            restore_sequence(URL, back)
    else:
        restore_sequence(URL, back, short.id)
    rest = export_sequence(path, URL, long.id)
    files = files_of(path)
    assert objects_of(URL) == files
    commits = 4 if n < 33 else 2  # those of a sequence that is not finished are sent again
    missing = [name for name in files if name not in there and name.count("/") > 1 and "commit/c" not in name]
    assert rest["files"] == len(missing) + commits
    restore_sequence(URL, back, long.id)
    assert files_of(back) == files


def test_a_part_whose_export_is_not_finished(originals, tmp_path):
    path = originals("parts")
    short, long = sequences(path)
    export_sequence(path, URL, long.id)
    put_object(f"sequences/{short.id}/{UNFINISHED}", b"of another machine")
    with pytest.raises(StoreError, match=rf"{long.id} goes on from {URL}/sequences/{short.id}: it is not there"):
        restore_sequence(URL, tmp_path / "back", long.id)
    assert export_sequence(path, URL, long.id)["files"] == len(files_of(short.path))
    assert objects_of(URL) == files_of(path)


def test_an_export_that_lost_the_network(originals, failing, monkeypatch):
    path = originals("auto")
    with monkeypatch.context() as patch:
        failing("put_file", ConnectionError("reset by peer"), n=5)
        with pytest.raises(StoreError) as failure:
            export_sequence(path, URL)
        patch.undo()
    message = str(failure.value)
    assert message.startswith(f"{URL}: sequences/")
    assert "cannot be written: ConnectionError: reset by peer. Check the network and the endpoint" in message
    assert isinstance(failure.value.__cause__, ConnectionError)


def test_an_export_of_something_else_goes_on_with_nothing(store, tmp_path):
    """Files of the same size that an interrupted export of an older state has left."""
    path = store("auto")
    [old] = sequences(path)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, 25)
        with pytest.raises(Killed):
            export_sequence(path, URL)
    shutil.rmtree(path)
    write(path, "auto", prompt(SHORT))
    [new] = sequences(path)
    assert (new.id, new.commit.tokens_crc) == (old.id, old.commit.tokens_crc)
    assert new.attributes["created"] != old.attributes["created"]
    files = files_of(path / "sequences" / new.id)
    assert export_sequence(path, URL)["files"] == len(files)
    assert objects_of(URL) == files_of(path)


def test_a_part_that_has_grown_is_sent_again(tmp_path):
    """Its files have the same sizes as before."""
    path = tmp_path / "store"
    write(path, "auto", prompt(LONG), stop_after=9)
    write(path, "auto", torch.cat([prompt(LONG)[:, :250], prompt(90, seed=1)], 1))
    part, entry = sequences(path)
    export_sequence(path, URL, entry.id)
    before = objects_of(URL)
    write(path, "auto", prompt(LONG))
    grown = Library(path).read(part.id)
    assert grown.commit.complete
    assert grown.tokens > part.tokens
    assert export_sequence(path, URL, entry.id)["files"] == len(files_of(grown.path))
    now = objects_of(URL)
    assert now == files_of(path)
    shard = f"sequences/{part.id}/kv/c.0.0.0.0"
    assert len(now[shard]) == len(before[shard])
    assert now[shard] != before[shard]


def test_the_url_may_be_further(tmp_path):
    """A part that grew elsewhere is not taken back."""
    path, older = tmp_path / "store", tmp_path / "older"
    write(path, "auto", prompt(LONG), stop_after=9)
    write(path, "auto", torch.cat([prompt(LONG)[:, :250], prompt(90, seed=1)], 1))
    shutil.copytree(path, older)
    write(path, "auto", prompt(LONG))
    part, entry = sequences(older)
    export_sequence(path, URL, part.id)
    export_sequence(path, URL, entry.id)
    there = objects_of(URL)
    assert export_sequence(older, URL, entry.id)["files"] == 0
    assert objects_of(URL) == there
    back = tmp_path / "back"
    restore_sequence(URL, back, entry.id)
    assert torch.equal(answer("auto", back, entry.id), answer("auto", older, entry.id))
    before = files_of(older)
    assert restore_sequence(URL, older, entry.id)["files"] == 0
    assert files_of(older) == before
    assert restore_sequence(URL, older, part.id)["files"] == len(files_of(path / "sequences" / part.id))
    assert files_of(older) == files_of(path)


@pytest.mark.parametrize("n", [0, 3, 20, 40, 65])
def test_an_interrupted_restore_goes_on(originals, tmp_path, n):
    path, back = originals("parts"), tmp_path / "back"
    long = sequences(path)[-1]
    export_sequence(path, URL, long.id)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, n)
        with pytest.raises(Killed):
            restore_sequence(URL, back, long.id)
    assert Library(back).entries() == []
    assert [name.name for name in back.iterdir() if name.name not in ("zarr.json", "sequences")] == [
        f"restore-{long.id}"
    ]
    n_files = len([name for name in files_of(path) if name.count("/") > 1])
    rest = restore_sequence(URL, back, long.id)
    assert rest["files"] <= n_files - max(0, n - 6)  # the small files that tell what is there come again
    assert files_of(back) == files_of(path)


def test_a_restore_that_lost_the_network_says_where_it_stopped(originals, tmp_path, failing):
    export_sequence(originals("auto"), URL)
    failing("cat_file", ConnectionError("reset by peer"), n=12)
    with pytest.raises(StoreError, match=r"cannot be read: ConnectionError: reset by peer.*kept in .*/back/restore-"):
        restore_sequence(URL, tmp_path / "back")
    assert Library(tmp_path / "back").entries() == []


def test_a_restore_does_not_go_on_with_something_else(store, tmp_path):
    """Nor does an export: what either was interrupted at has become another sequence of the same tokens and id."""
    path, back = store("auto"), tmp_path / "back"
    export_sequence(path, URL)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, 25)
        with pytest.raises(Killed):
            restore_sequence(URL, back)
    shutil.rmtree(path)
    write(path, "auto", prompt(SHORT))
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, 5)
        with pytest.raises(Killed):
            export_sequence(path, URL, force=True)
    assert not any("commit/c" in name for name in objects_of(URL))  # the old one would be of other data
    export_sequence(path, URL)
    restore_sequence(URL, back)
    assert files_of(back) == files_of(path)


# -- damage ------------------------------------------------------------------------------------------------------------

DAMAGED = [
    "commit/c.0",
    "zarr.json",
    "tokens/c.0",
    "kv/c.0.0.0.0",
    "crc/kv/c.0.0.0",
    "codes/scale/c.0.0.0.0",
    "kv/zarr.json",
]


def damaged_name(path, file):
    """The object of ``file``; a name that holds for all kinds of summaries stands for the first like it."""
    [entry] = sequences(path)
    if file.startswith("codes/"):
        file = str(next((entry.path / "codes").glob("*/c.*")).relative_to(entry.path))
    return f"sequences/{entry.id}/{file}", file


@pytest.mark.parametrize("file", DAMAGED)
def test_a_flipped_bit_is_found(originals, tmp_path, file):
    path, back = originals("auto"), tmp_path / "back"
    export_sequence(path, URL)
    name, file = damaged_name(path, file)
    whole = objects_of(URL)[name]
    put_object(name, flip(whole, whole.index(b'"shape"') + 1 if file == "kv/zarr.json" else 40))
    with pytest.raises(StoreError, match=rf"sequences/\w+( is damaged:.*|.*){file}") as failure:
        restore_sequence(URL, back)
    assert str(back) not in str(failure.value)
    assert not (back / "sequences").exists() or Library(back).entries() == []
    assert not list(back.glob("restore-*"))
    put_object(name, whole)
    restore_sequence(URL, back)
    assert files_of(back) == files_of(path)


@pytest.mark.parametrize("file", DAMAGED[2:])
def test_a_missing_object_is_found_and_sent_again(originals, tmp_path, file):
    path, back = originals("auto"), tmp_path / "back"
    export_sequence(path, URL)
    name, file = damaged_name(path, file)
    MemoryFileSystem().rm(f"/bucket/books/{name}")
    with pytest.raises(StoreError, match=rf"{URL}/sequences/\w+ is damaged: {file}: is missing"):
        restore_sequence(URL, back)
    assert Library(back).entries() == []
    assert not list(back.glob("restore-*"))
    assert export_sequence(path, URL)["files"] == 3  # it, and both commits
    restore_sequence(URL, back)
    assert files_of(back) == files_of(path)


def test_a_file_that_somebody_shortens_while_it_is_read():
    put_object("zarr.json", b"{}")
    with pytest.raises(StoreError, match=rf"{URL}/zarr.json became shorter while it was read: somebody writes there"):
        RemoteFolder(URL, None).read("zarr.json", 10)


def test_a_part_with_the_name_of_another_folder(originals, tmp_path):
    path = originals("auto")
    export_sequence(path, URL)
    mirror = Mirror(RemoteFolder(URL, None), tmp_path)
    for id in ("..", "../../home", ""):
        with pytest.raises(StoreError, match=r"goes on from '.*', which kvtier did not write"):
            mirror.part(Library(path).entry(), id, 0, 1)


def test_a_file_that_is_gone_when_it_is_sent(tmp_path):
    with pytest.raises(StoreError, match=rf"{tmp_path}/kv cannot be read: .*No such file"):
        RemoteFolder(URL, None).send(tmp_path, "sequences/x", {"kv": 1}, Progress(lambda line: None, "sent"))


def test_a_shortened_object_is_found_and_sent_again(originals, tmp_path):
    """As a killed export to a folder leaves it."""
    path, back = originals("auto"), tmp_path / "back"
    export_sequence(path, URL)
    name, file = damaged_name(path, "kv/c.0.0.0.0")
    put_object(name, objects_of(URL)[name][:-1])
    with pytest.raises(StoreError, match=rf"{URL}/sequences/\w+ is damaged: {file}: has \d+ bytes, written were"):
        restore_sequence(URL, back)
    assert export_sequence(path, URL)["files"] == 3
    restore_sequence(URL, back)
    assert files_of(back) == files_of(path)


def test_a_missing_or_damaged_part_is_found(originals, tmp_path):
    path, back = originals("parts"), tmp_path / "back"
    short, long = sequences(path)
    export_sequence(path, URL, long.id)
    shard = f"sequences/{short.id}/kv/c.0.0.0.0"
    put_object(shard, flip(objects_of(URL)[shard], 40))
    with pytest.raises(StoreError, match=rf"{URL}/sequences/{short.id} is damaged: kv/c\.0\.0\.0\.0"):
        restore_sequence(URL, back, long.id)
    assert Library(back).entries() == []
    MemoryFileSystem().rm(f"/bucket/books/sequences/{short.id}", recursive=True)
    with pytest.raises(
        StoreError, match=rf"{URL}/sequences/{long.id} goes on from {URL}/sequences/{short.id}: it is not"
    ):
        restore_sequence(URL, back, long.id)
    assert export_sequence(path, URL, long.id)["files"] == len(files_of(short.path))


def test_what_is_damaged_here_is_not_exported(store):
    path = store("parts")
    short, long = sequences(path)
    shard = short.path / "kv" / "c.0.0.0.0"
    shard.write_bytes(flip(shard.read_bytes(), 40))
    with pytest.raises(StoreError, match=rf"{short.path} is damaged: kv/c\.0\.0\.0\.0.*\. Nothing was exported; "):
        export_sequence(path, URL, long.id)
    assert set(objects_of(URL)) == {"zarr.json", "sequences/zarr.json"}


def test_restoring_repairs(store, originals):
    path = store("parts")
    short, long = sequences(path)
    export_sequence(originals("parts"), URL, long.id)
    shard = short.path / "kv" / "c.0.0.0.0"
    shard.write_bytes(flip(shard.read_bytes(), 40))
    shutil.rmtree(long.path / "crc")
    before = stamps_of(long.path)
    assert restore_sequence(URL, path, short.id)["files"] == len(files_of(short.path))
    assert stamps_of(long.path) == before
    restore_sequence(URL, path, long.id)
    assert files_of(path) == files_of(originals("parts"))


def test_a_restore_killed_while_it_replaces_goes_on(store, originals, monkeypatch):
    path = store("auto")
    [entry] = sequences(path)
    export_sequence(originals("auto"), URL)
    shutil.rmtree(entry.path / "crc")
    with monkeypatch.context() as patch:
        rename, done = Path.rename, []

        def once(source, target):
            if target == entry.path:
                raise Killed
            done.append(target)
            return rename(source, target)

        patch.setattr(Path, "rename", once)
        with pytest.raises(Killed):
            restore_sequence(URL, path)
        assert path / f"restore-{entry.id}" / f"replaced-{entry.id}" in done
    assert Library(path).entries() == []
    assert restore_sequence(URL, path)["files"] == 3
    assert files_of(path) == files_of(originals("auto"))


# -- other runs --------------------------------------------------------------------------------------------------------


def test_what_another_run_has_saved_is_there_already(originals, tmp_path):
    other = tmp_path / "other"
    write(other, "auto", prompt(SHORT))
    export_sequence(originals("auto"), URL)
    there, before, said = objects_of(URL), stamps_of(other), []
    assert export_sequence(other, URL, say=said.append)["files"] == 0
    assert said == [f"{sequences(other)[0].id} is there already, from another run"]
    assert restore_sequence(URL, other)["files"] == 0
    assert objects_of(URL) == there
    assert stamps_of(other) == before
    export_sequence(other, URL, force=True)
    assert objects_of(URL) == files_of(other)


def test_what_others_go_on_from_is_not_replaced(originals, tmp_path):
    """Two runs of the same text that may differ in rounding, each continued by another one."""
    path, other = originals("parts"), tmp_path / "other"
    short, long = sequences(path)
    write(other, "parts", prompt(LONG)[:, :SHORT])
    export_sequence(other, URL, short.id)
    there = objects_of(URL)
    with pytest.raises(
        StoreError, match=f"{URL} has {short.id} from another run.*remove {URL}/sequences/{short.id} if"
    ):
        export_sequence(path, URL, long.id)
    assert objects_of(URL) == there
    export_sequence(path, URL + "2", long.id)
    before = stamps_of(other)
    with pytest.raises(StoreError, match=f"{short.id} is there already, but from another run, which may differ"):
        restore_sequence(URL + "2", other, long.id)
    assert stamps_of(other) == before
    mine = tmp_path / "mine"
    shutil.copytree(path, mine)
    shutil.rmtree(mine / "sequences" / short.id / "crc")  # damaged, and the copy at the URL is not the same
    with pytest.raises(
        StoreError, match=f"from another run, which may differ in rounding, and {long.id} goes on from it"
    ):
        restore_sequence(URL, mine, short.id)


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_sequence_that_is_not_complete_is_not_exported(originals):
    path = originals("unfinished part")
    part, _ = sequences(path)
    with pytest.raises(StoreError, match=rf"{part.path} is not complete.*Read the same text again .* then export it"):
        export_sequence(path, URL, part.id)
    assert objects_of(URL) == {}


def test_a_sequence_that_is_written_while_it_is_exported(store, monkeypatch):
    path = store("auto")
    [entry] = sequences(path)
    send = RemoteFolder.send

    def sent(folder, *args):
        send(folder, *args)
        attributes = entry.path / "zarr.json"
        attributes.write_bytes(attributes.read_bytes().replace(b'"created": "2', b'"created": "3'))

    monkeypatch.setattr(RemoteFolder, "send", sent)
    with pytest.raises(StoreError, match=rf"{entry.path} was written while it was exported"):
        export_sequence(path, URL)
    assert f"sequences/{entry.id}/{UNFINISHED}" in objects_of(URL)
    assert not any("commit/c" in name for name in objects_of(URL))


def test_a_file_that_did_not_arrive(store, monkeypatch):
    path = store("auto")
    [entry] = sequences(path)
    put_file = MemoryFileSystem.put_file

    def lossy(fs, local, there, **kwargs):
        if not there.endswith("/tokens/c.0"):
            put_file(fs, local, there, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", lossy)
    with pytest.raises(StoreError, match=rf"{URL}/sequences/{entry.id}/tokens/c\.0 has 0 bytes, 524288 were sent"):
        export_sequence(path, URL)
    assert not any("commit/c" in name for name in objects_of(URL))


def test_a_source_that_disappears(store, monkeypatch):
    path = store("auto")
    [entry] = sequences(path)
    send = RemoteFolder.send

    def late(folder, *args):
        (entry.path / "tokens" / "c.0").unlink()
        send(folder, *args)

    monkeypatch.setattr(RemoteFolder, "send", late)
    with pytest.raises(StoreError, match=rf"^{entry.path}/tokens/c\.0 cannot be read"):
        export_sequence(path, URL)


def test_urls_that_will_not_do(originals, tmp_path, monkeypatch):
    path, back = originals("auto"), tmp_path / "back"
    put_object("notes.txt", b"mine")
    cases = {
        "/mnt/books": r"/mnt/books is not a URL: expected one that fsspec serves, such as s3://bucket/folder",
        "s3:/key:secret@bucket": r"^\*\*\*@bucket is not a URL",
        "nothing://bucket": r"nothing://bucket: it cannot be opened: ValueError: Protocol not known: nothing\. Check",
    }
    for url, message in cases.items():
        with pytest.raises(StoreError, match=message):
            export_sequence(path, url)
        with pytest.raises(StoreError, match=message):
            restore_sequence(url, back)
    with pytest.raises(
        StoreError, match=rf"{URL} is not a kvtier store, and not empty \(it holds 'notes\.txt'\): choose"
    ):
        export_sequence(path, URL)
    with pytest.raises(StoreError, match=rf"{URL} is not a kvtier store: it has no zarr\.json; expected what `kvtier"):
        restore_sequence(URL, back)
    with pytest.raises(
        StoreError, match=r"it cannot be listed: FileNotFoundError.*Check the URL: there is no such bucket"
    ):
        restore_sequence("memory://elsewhere", back)
    put_object("zarr.json", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    for call in (lambda: export_sequence(path, URL), lambda: restore_sequence(URL, back)):
        with pytest.raises(StoreError, match=f"^{URL} holds zarr data that kvtier did not write"):
            call()
    put_object("zarr.json", (path / "zarr.json").read_bytes().replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(StoreError, match=f"^{URL} has layout version 9"):
        restore_sequence(URL, back)
    put_object("zarr.json", (path / "zarr.json").read_bytes())
    with pytest.raises(StoreError, match=f"{URL} holds no saved sequence: `kvtier export` writes one"):
        restore_sequence(URL, back)
    assert not back.exists()


def test_names_of_what_is_there(originals, tmp_path):
    path, back = originals("parts"), tmp_path / "back"
    short, long = sequences(path)
    for id in (None, "nothing", "../sequences"):
        with pytest.raises(StoreError, match=rf"say which by its id: {short.id}|holds no sequence"):
            export_sequence(path, URL, id)
    export_sequence(path, URL, long.id)
    listed = rf"{short.id} \({SHORT} tokens\), {long.id} \({LONG} tokens\)"
    with pytest.raises(StoreError, match=rf"{URL} holds 2 sequences, say which by its id: {listed}"):
        restore_sequence(URL, back)
    for id in ("nothing", "../sequences", ""):
        with pytest.raises(StoreError, match=rf"{URL} holds no sequence '{id}'; it holds {listed}"):
            restore_sequence(URL, back, id)
    assert not back.exists()


def test_nothing_is_written_outside_of_the_store(originals, tmp_path):
    """Whoever writes to the bucket chooses names."""
    path, back = originals("parts"), tmp_path / "back"
    long = sequences(path)[-1]
    export_sequence(path, URL, long.id)
    MemoryFileSystem.store["/bucket/books/sequences/" + long.id + "/a/../../../evil"] = MemoryFileSystem.store[
        "/bucket/books/zarr.json"
    ]
    with pytest.raises(StoreError, match=r"a file with the name .*evil', which kvtier did not write"):
        restore_sequence(URL, back, long.id)
    del MemoryFileSystem.store["/bucket/books/sequences/" + long.id + "/a/../../../evil"]
    name = f"sequences/{long.id}/zarr.json"
    metadata = json.loads(objects_of(URL)[name])
    attributes = metadata["attributes"]["kvtier"]
    del attributes["crc32c"]
    attributes["parts"] = [["../../evil", 1]]
    attributes["crc32c"] = checksum(json.dumps(attributes, sort_keys=True, separators=(",", ":")).encode())
    put_object(name, json.dumps(metadata).encode())
    with pytest.raises(StoreError, match=r"goes on from '\.\./\.\./evil', which kvtier did not write"):
        restore_sequence(URL, back, long.id)
    assert not back.exists()


def test_a_full_disk(originals, tmp_path, monkeypatch):
    export_sequence(originals("auto"), URL)
    back = tmp_path / "back"
    with monkeypatch.context() as patch:
        patch.setattr(remote_arrivals.Arrivals, "free_bytes", lambda library: 2**20)
        with pytest.raises(
            StoreError, match=rf"MiB are to come, but only 1\.00 MiB are free in {back}: free space there"
        ):
            restore_sequence(URL, back)
    pwrite, left = os.pwrite, [4]

    def full(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(
            StoreError, match=r"restore-\w+ cannot be written: .*No space left.*what has arrived is kept"
        ):
            restore_sequence(URL, back)
    assert Library(back).entries() == []
    restore_sequence(URL, back)
    assert files_of(back) == files_of(originals("auto"))


def test_one_writer(originals, tmp_path):
    export_sequence(originals("auto"), URL)
    back = Library(tmp_path / "back")
    with back.writing(), pytest.raises(StoreError, match=rf"is writing to {back.path}: try again when it is done"):
        restore_sequence(URL, back.path)
    with pytest.raises(StoreError, match=rf"there is no folder {tmp_path}/no; create it, or mount it"):
        restore_sequence(URL, tmp_path / "no" / "store")


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs"), ("abfs", "adlfs")])
def test_a_driver_that_is_not_installed(originals, monkeypatch, protocol, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(fsspec_registry, protocol, raising=False)
    with pytest.raises(
        StoreError, match=rf"^{protocol}:// needs a driver which is not installed: pip install {package}$"
    ):
        export_sequence(originals("auto"), f"{protocol}://bucket/books")


def test_without_fsspec(originals, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(StoreError, match=f"^{URL} needs fsspec, which is not installed: pip install fsspec$"):
        export_sequence(originals("auto"), URL)


SECRETS = ["AKIAsecret", "p4ssword", "sig%2Bnature", "sig+nature", "t0ken-in-a-list"]


@pytest.mark.parametrize("where", ["find", "ls", "pipe_file", "put_file", "cat_file"])
def test_secrets_are_in_no_message(originals, where, failing, capsys):
    said = []
    url = "memory://AKIAsecret:p4ssword@bucket/books?sig=sig%2Bnature"
    options = {"headers": ["t0ken-in-a-list"], "client_kwargs": {"endpoint_url": "http://AKIAsecret:p4ssword@host:1"}}
    MemoryFileSystem.clear_instance_cache()
    text = f"no access with {' '.join(SECRETS)} at http://host:1"
    failing(where, PermissionError(text), n=0 if where != "pipe_file" else 1)
    path = originals("auto")
    with pytest.raises(StoreError) as failure:
        export_sequence(path, url, options=options, say=said.append)
    printed = "".join(traceback.format_exception(failure.value)) + "".join(said)
    assert "memory://***@bucket/books?***" in printed
    assert "PermissionError: no access with *** *** *** *** *** at http://host:1. Check which account" in printed
    assert not [secret for secret in SECRETS if secret in printed]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://AKIAsecret:p4ssword@bucket/books", "memory://***@bucket/books"),
        ("memory://AKIAsecret:p4ss/w0rd@bucket/books", "memory://***@bucket/books"),
        ("memory://token@bucket/books", "memory://***@bucket/books"),
        ("memory://bucket/me@home", "memory://bucket/me@home"),
        ("memory://bucket/books/?sig=p4ssword", "memory://bucket/books/?***"),
    ],
)
def test_the_url_of_a_report_has_no_secrets(originals, url, shown):
    assert export_sequence(originals("auto"), url)["url"] == shown


# -- S3 ----------------------------------------------------------------------------------------------------------------

PIECE = 5 * 2**20
"""The smallest part of a multipart upload that S3 takes."""


@pytest.fixture(scope="module")
def server():
    """The address of an S3 server on this machine."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    pytest.importorskip("flask_cors")  # of moto's server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "AWS_ACCESS_KEY_ID": "server", "AWS_SECRET_ACCESS_KEY": "server"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                assert process.poll() is None, "the S3 server did not start"
                assert time.monotonic() < deadline, "the S3 server does not answer"
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture
def s3(server, monkeypatch):
    """A file system with an empty bucket: the file system, the URL of the bucket and the options."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # else credentials are looked for in the network
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    options = {"endpoint_url": server}
    fs, bucket = s3fs.S3FileSystem(**options), f"bucket-{uuid.uuid4().hex}"
    fs.mkdir(bucket)
    return fs, f"s3://{bucket}", options


def s3_objects(fs, url):
    fs.invalidate_cache()
    return {name.partition("/")[2]: fs.cat_file(name) for name in fs.find(url)}


@pytest.mark.parametrize("kind", ["auto", "int4", "some layers slide", "parts"])
def test_s3_there_and_back(s3, originals, kind, tmp_path):
    fs, bucket, options = s3
    path, back, url = originals(kind), tmp_path / "back", f"{bucket}/some/books"
    entry = sequences(path)[-1]
    files = files_of(path)
    sent = export_sequence(path, url, entry.id, options=options)
    assert s3_objects(fs, bucket) == {f"some/books/{name}": data for name, data in files.items()}
    came = restore_sequence(url, back, entry.id, options=options)
    assert files_of(back) == files
    assert sent["files"] == came["files"] == len([name for name in files if name.count("/") > 1])
    assert torch.equal(answer(kind, back, entry.id), answer(kind, path, entry.id))
    assert export_sequence(path, url, entry.id, options=options)["files"] == 0
    before = stamps_of(back)
    assert restore_sequence(url, back, entry.id, options=options)["files"] == 0
    assert stamps_of(back) == before


def test_s3_in_a_bucket_of_its_own_and_without_options(s3, originals, tmp_path, monkeypatch):
    """What the driver finds in the environment will do."""
    fs, bucket, options = s3
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
    export_sequence(originals("auto"), bucket)
    assert s3_objects(fs, bucket) == files_of(originals("auto"))
    restore_sequence(bucket, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(originals("auto"))


def test_s3_zarr_opens_the_url(s3, originals):
    _, bucket, options = s3
    path = originals("int4")
    [entry] = sequences(path)
    export_sequence(path, f"{bucket}/books", options=options)
    there = zarr.open_group(f"{bucket}/books", mode="r", storage_options=options)
    assert_same_zarr(zarr.open_group(path, mode="r"), there, entry)


def test_s3_large_files_go_in_parts(s3, tmp_path, monkeypatch):
    fs, bucket, options = s3
    monkeypatch.setattr(remote_folder, "PIECE_BYTES", PIECE)
    source, names = tmp_path / "source", {f"{i}": 32 * 2**20 + i for i in range(2)}
    source.mkdir()
    for name, size in names.items():
        (source / name).write_bytes(np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes())
    folder = RemoteFolder(bucket, options)
    tracemalloc.start()
    try:
        folder.send(source, "some", names, Progress(lambda line: None, "sent"))
        folder.fetch("some", tmp_path / "back", names, Progress(lambda line: None, "fetched"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert files_of(tmp_path / "back") == files_of(source)
    assert fs.info(f"{bucket}/some/0")["ETag"].strip('"').endswith("-7")  # of 7 parts
    assert peak < 2.5 * remote_folder.PARALLEL * PIECE


@pytest.mark.parametrize("n", [7, 33, 50])
def test_s3_an_interrupted_export_is_no_sequence_and_goes_on(s3, originals, tmp_path, n):
    fs, bucket, options = s3
    path, back, url = originals("parts"), tmp_path / "back", f"{bucket}/books"
    long = sequences(path)[-1]
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, n)
        with pytest.raises(Killed):
            export_sequence(path, url, long.id, options=options)
    with pytest.raises(StoreError, match=r"is not finished: run `kvtier export` again|holds no sequence"):
        restore_sequence(url, back, long.id, options=options)
    assert not back.exists()
    rest = export_sequence(path, url, long.id, options=options)
    n_files = len([name for name in files_of(path) if name.count("/") > 1])
    assert rest["files"] <= n_files - n + 2
    assert s3_objects(fs, bucket) == {f"books/{name}": data for name, data in files_of(path).items()}
    restore_sequence(url, back, long.id, options=options)
    assert files_of(back) == files_of(path)


def test_s3_damaged_and_missing_objects(s3, originals, tmp_path):
    fs, bucket, options = s3
    path, back, url = originals("int4"), tmp_path / "back", f"{bucket}/books"
    [entry] = sequences(path)
    export_sequence(path, url, options=options)
    shard = f"{bucket}/books/sequences/{entry.id}/kv/c.0.0.0.0"
    whole = fs.cat_file(shard)
    fs.pipe_file(shard, flip(whole, 40))
    with pytest.raises(StoreError, match=rf"{url}/sequences/{entry.id} is damaged: kv/c\.0\.0\.0\.0: chunk 0, layer 0"):
        restore_sequence(url, back, options=options)
    assert Library(back).entries() == []
    assert not list(back.glob("restore-*"))
    fs.rm(shard)
    with pytest.raises(StoreError, match=rf"{url}/sequences/{entry.id} is damaged: kv/c\.0\.0\.0\.0: is missing"):
        restore_sequence(url, back, options=options)
    assert export_sequence(path, url, options=options)["files"] == 3
    restore_sequence(url, back, options=options)
    assert files_of(back) == files_of(path)


def test_s3_no_bucket(s3, originals, tmp_path):
    fs, bucket, options = s3
    for call in (
        lambda: export_sequence(originals("auto"), f"{bucket}x/books", options=options),
        lambda: restore_sequence(f"{bucket}x/books", tmp_path / "back", options=options),
    ):
        with pytest.raises(
            StoreError, match=rf"^{bucket}x/books: .*bucket does not exist\. Check the URL: there is no"
        ):
            call()
    assert not fs.exists(f"{bucket}x")
    assert not (tmp_path / "back").exists()


def test_s3_no_credentials(s3, originals, tmp_path, monkeypatch):
    _, bucket, options = s3
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    options = options | {"use_listings_cache": False}  # else it is the file system of the tests before
    for call in (
        lambda: export_sequence(originals("auto"), bucket, options=options),
        lambda: restore_sequence(bucket, tmp_path / "back", options=options),
    ):
        with pytest.raises(
            StoreError, match=rf"^{bucket}: it cannot be listed: .*Give credentials: AWS_PROFILE, or AWS"
        ):
            call()


def test_s3_access_denied(s3, server, originals, tmp_path):
    """With keys that the server does not know, once it asks for them."""
    _, bucket, options = s3
    options = options | {"key": "AKIAnobody", "secret": "verysecret"}

    def ask_after(requests):
        data, headers = requests.encode(), {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{server}/moto-api/reset-auth", data, headers, method="POST")
        urllib.request.urlopen(request, timeout=10).close()

    ask_after("0")
    try:
        with pytest.raises(
            StoreError, match=rf"^{bucket}: it cannot be listed: PermissionError: .*Check which account"
        ):
            restore_sequence(bucket, tmp_path / "back", options=options)
        with pytest.raises(
            StoreError, match=rf"^{bucket}: it cannot be listed: PermissionError: .*Check which"
        ) as failure:
            export_sequence(originals("auto"), bucket, options=options)
        assert "verysecret" not in "".join(traceback.format_exception(failure.value))
    finally:
        ask_after("inf")


def test_s3_no_server(s3, originals):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        options = {
            "endpoint_url": f"http://127.0.0.1:{taken.getsockname()[1]}",
            "config_kwargs": {"retries": {"max_attempts": 0}},
        }
        with pytest.raises(StoreError, match=r"Could not connect to the endpoint.*Check the network and the endpoint"):
            export_sequence(originals("auto"), "s3://bucket/books", options=options)
