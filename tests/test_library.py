"""The folder of saved sequences: one writer, any readers, what killed writers leave, what is no store of ours."""

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.runtime import library as library_module
from kvtier.runtime.commit_record import Commit, checksum, write_commit
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import VERSION, Library

pytestmark = pytest.mark.usefixtures("quick_store")

COMMIT = Commit(1, 100, 9, 4, True, False, 1, 76, 100, 0, 0, {})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def create(library, id, commit=COMMIT, **attributes):
    """A sequence with nothing in it; not committed for None."""
    held = {"parts": [], "layout": {"first_chunk": 0}}
    folder = library.create(id, held | attributes)
    (folder / "commit").mkdir()
    if commit is not None:
        write_commit(folder / "commit", commit)
    return folder


def names(path):
    return {folder.name for folder in (path / "sequences").glob("*/")}


# -- one writer --------------------------------------------------------------------------------------------------------

HOLD = """
import os, sys
from kvtier.runtime.library import Library
library = Library(sys.argv[1])
library.lock()
folder = library.create("half", {"parts": []})
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def other_process(path):
    """A process that writes to ``path`` until it is killed, or its stdin is closed."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert select.select([process.stdout], [], [], 120)[0]
            assert process.stdout.readline() == "locked\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_until_the_first_is_gone(path):
    with Library(path).writing():
        pass
    library = Library(path)
    with other_process(path) as process:
        message = rf"^process {process.pid} is writing to {path}: try again when it is done.*Reading .* works meanwhile"
        with pytest.raises(StoreError, match=message), library.writing():
            pass
        with pytest.raises(StoreError, match=message):
            library.lock()
        assert Library(path).entries() == []  # readers are served, and what is not committed is not there
        assert names(path) == {"half"}
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(path) == {"half"}
    with library.writing():  # the lock went with the process, and so did what it had not committed
        assert names(path) == set()


def test_the_same_library_is_its_own_writer(path):
    library, other = Library(path), Library(path)
    with library.writing():
        with library.writing():
            create(library, "a")
        create(library, "b")  # still locked
        with pytest.raises(StoreError, match=f"process {os.getpid()} is writing"):
            other.lock()
    with other.writing():
        pass
    library.lock()
    with library.writing():
        pass
    with pytest.raises(StoreError, match="is writing"):
        other.lock()
    library.unlock()
    library.unlock()  # does nothing
    other.lock()
    other.unlock()


def test_an_error_while_writing_unlocks(path):
    library = Library(path)
    with pytest.raises(KeyboardInterrupt), library.writing():
        raise KeyboardInterrupt
    with Library(path).writing():
        pass


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), KeyboardInterrupt()], ids=["no locks", "ctrl-c"])
def test_a_lock_that_fails_leaves_nothing_open(error, path, monkeypatch):
    def fails(*arguments):
        raise error

    with Library(path).writing():
        pass
    opened = len(os.listdir("/proc/self/fd"))
    library = Library(path)
    with monkeypatch.context() as patch:
        patch.setattr(library_module.fcntl, "flock", fails)
        expected = StoreError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match=r"cannot be used as a store: .*No locks|^$"):
            library.lock()
    assert len(os.listdir("/proc/self/fd")) == opened
    with library.writing():
        pass


def test_only_the_writer_creates_and_removes(path):
    library = Library(path)
    for call in (lambda: library.create("a", {}), lambda: library.remove("a")):
        with pytest.raises(AssertionError, match="only the writer"):
            call()


@pytest.mark.parametrize("locks", ["", "nonsense\n", "1: POSIX  ADVISORY  WRITE 17 08:01:11 0 EOF\n"])
def test_where_the_holder_is_not_known(path, monkeypatch, locks):
    read_text = Path.read_text

    def text(file, *arguments, **more):
        return locks if file == Path("/proc/locks") else read_text(file, *arguments, **more)

    with Library(path).writing():
        monkeypatch.setattr(Path, "read_text", text)
        with pytest.raises(StoreError, match=r"^another process is writing to"):
            Library(path).lock()


# -- what is there -----------------------------------------------------------------------------------------------------


def test_nothing_is_there_before_its_first_commit(path):
    library = Library(path)
    with library.writing():
        folder = create(library, "a", None)
        assert library.read("a") is Library(path).read("a") is None
        assert library.entries() == []
        write_commit(folder / "commit", COMMIT)
        assert Library(path).read("a").commit == COMMIT
    entry = Library(path).entry()
    assert (entry.id, entry.tokens, entry.path, entry.problem) == ("a", 100, folder, None)
    entry.check()
    assert Library(path).read("b") is None


def test_uncommitted_folders_go_when_the_next_writer_comes(path):
    library = Library(path)
    with library.writing():
        create(library, "whole")
        create(library, "half", None)
        damaged = create(library, "damaged")
    (damaged / "commit" / "c.1").write_bytes(b"x" * 4096)
    shutil.rmtree(path / "sequences" / "half" / "commit")  # killed even earlier
    reader = Library(path)
    assert [entry.id for entry in reader.entries()] == ["whole", "damaged"]
    assert reader.entry("whole").problem is None
    assert names(path) == {"whole", "half", "damaged"}
    with Library(path).writing():
        assert names(path) == {"whole", "damaged"}  # damaged is not uncommitted: somebody may have a copy
    assert [entry.id for entry in reader.entries()] == ["whole", "damaged"]


def test_creating_replaces_and_removing_removes(path):
    library = Library(path)
    with library.writing():
        (create(library, "a") / "old").touch()
        folder = create(library, "a", dataclasses.replace(COMMIT, tokens=7))
        assert not (folder / "old").exists()
        assert library.entry().tokens == 7
        library.remove("a")
        library.remove("a")
        assert names(path) == set()


def test_entries_come_oldest_first_and_unreadable_ones_last(path, monkeypatch):
    library = Library(path)
    with library.writing():
        for id in ("z", "m", "a"):
            create(library, id)
    assert [entry.id for entry in library.entries()] == ["z", "m", "a"]
    (path / "sequences" / "z" / "zarr.json").write_text("{")
    assert [entry.id for entry in library.entries()] == ["m", "a", "z"]


def test_an_entry_is_found_by_its_id(path):
    library = Library(path)
    with pytest.raises(StoreError, match=rf"{path} is not a kvtier store: there is no such folder"):
        library.entry()
    with library.writing():
        with pytest.raises(StoreError, match=rf"{path} holds no saved sequence: cache\.save\(path\) writes one"):
            library.entry("a")
        create(library, "a")
        assert library.entry().id == library.entry("a").id == "a"
        folder = create(library, "b")
        (folder / "zarr.json").unlink()
    there = r"a \(100 tokens\), b \(\? tokens\)"
    with pytest.raises(StoreError, match=rf"holds 2 sequences, say which by its id: {there}$"):
        library.entry()
    for id in ("c", "", ".", "../sequences", "a/commit"):
        with pytest.raises(StoreError, match=rf"holds no sequence '{id}'; it holds {there}$"):
            library.entry(id)


def test_bytes_of_an_entry_are_those_of_the_device(path):
    library = Library(path)
    with library.writing():
        folder = create(library, "a")
    before = library.entry().nbytes
    with (folder / "hole").open("wb") as file:
        file.truncate(2**20)
    (folder / "data").write_bytes(b"x" * 10000)
    os.sync()
    assert 10000 <= library.entry().nbytes - before < 2**16


def test_what_is_no_sequence_is_passed_over(path):
    library = Library(path)
    with library.writing():
        create(library, "a")
    (path / "sequences" / "notes.txt").write_text("mine")
    (path / "sequences" / "mine").mkdir()
    assert [entry.id for entry in library.entries()] == ["a"]


# -- damage ------------------------------------------------------------------------------------------------------------


def attributes_of(path, id="a"):
    return json.loads((path / "sequences" / id / "zarr.json").read_text())


def test_the_attributes_are_as_they_were_given(path):
    library = Library(path)
    given = {"select": 3, "geometry": {"chunk": 8}, "parts": [["b", 7]], "name": "Größe", "share": 0.1}
    with library.writing():
        create(library, "a", **given)
    metadata = attributes_of(path)
    assert metadata["zarr_format"] == 3
    assert metadata["node_type"] == "group"
    held = metadata["attributes"]["kvtier"]
    assert held["version"] == VERSION
    expected = held.pop("crc32c")
    assert expected == checksum(json.dumps(held, sort_keys=True, separators=(",", ":")).encode())
    entry = library.entry()
    assert entry.attributes == held
    assert {key: entry.attributes[key] for key in given} == given


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda held: held.update(version=VERSION + 1),
            f"has layout version {VERSION + 1}, this kvtier reads {VERSION}",
        ),
        (lambda held: held.update(select=4), "the checksum of its zarr.json is wrong"),
        (lambda held: held.update(crc32c=held["crc32c"] ^ 1), "the checksum of its zarr.json is wrong"),
        (lambda held: held.update(crc32c=None), "the checksum of its zarr.json is wrong"),
        (lambda held: held.update(more=1), "the checksum of its zarr.json is wrong"),
        (lambda held: held.pop("parts"), "the checksum of its zarr.json is wrong"),
        (lambda held: held.pop("crc32c"), r"its zarr.json cannot be read \(KeyError"),
        (lambda held: held.pop("version"), r"its zarr.json cannot be read \(KeyError"),
    ],
)
def test_changed_attributes_are_refused(change, problem, path):
    library = Library(path)
    with library.writing():
        folder = create(library, "a", select=3)
    metadata = attributes_of(path)
    change(metadata["attributes"]["kvtier"])
    (folder / "zarr.json").write_text(json.dumps(metadata))
    entry = library.entry()
    assert (entry.attributes, entry.commit, entry.tokens) == ({}, None, 0)
    with pytest.raises(StoreError, match=f"the saved sequence {folder} is damaged: .*{problem}.*put back a copy of it"):
        entry.check()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"attributes": 3}', '{"attributes": {"kvtier": []}}', "\xff\xfe"]
)
def test_attributes_that_are_none_are_a_problem_of_that_sequence_alone(text, path):
    library = Library(path)
    with library.writing():
        folder = create(library, "a")
        create(library, "b")
    (folder / "zarr.json").write_bytes(text.encode("latin-1"))
    assert "cannot be read" in library.entry("a").problem
    library.entry("b").check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), r"is not a kvtier store: it has no zarr\.json"),
        (lambda file: file.write_text("{"), "holds zarr data that kvtier did not write"),
        (lambda file: file.write_text('{"attributes": {}}'), "holds zarr data that kvtier did not write"),
        (
            lambda file: file.write_text('{"attributes": {"kvtier": {"version": 2}}}'),
            "has layout version 2, .* reads 1",
        ),
    ],
)
def test_a_folder_that_is_no_store_of_ours_is_left_alone(change, message, path):
    with Library(path).writing() as _:
        pass
    change(path / "zarr.json")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for call in (Library(path).check, Library(path).entries, Library(path).lock):
        with pytest.raises(StoreError, match=message):
            call()
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_folders_and_files_in_the_way(path, tmp_path):
    with pytest.raises(StoreError, match=rf"there is no folder {tmp_path}/no; create it, or mount it"):
        Library(tmp_path / "no" / "store").lock()
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(StoreError, match=r"file cannot be used as a store: .*Not a directory"):
        Library(file).lock()
    assert file.read_text() == "mine"
    path.mkdir()  # an empty folder is fine
    assert Library(path).is_new()
    with Library(path).writing():
        assert not Library(path).is_new()
    shutil.rmtree(path / "sequences")
    assert Library(path).entries() == []
    (path / "sequences").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot be used as a store: .*choose another one"):
        Library(path).entries()


def test_a_relative_path_and_the_home_folder(path, monkeypatch, tmp_path):
    with Library(path).writing():
        pass
    monkeypatch.chdir(tmp_path)
    assert Library("store").path == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Library("~/store").path == path
    monkeypatch.chdir("/")
    Library(path).check()
