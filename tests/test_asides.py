"""Nothing that was stored is lost: lost commits, sequences that are written anew, stores that many make at once."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_library import COMMIT, create, names

from kvtier.inspect_store import describe_store, table
from kvtier.runtime import library as library_module
from kvtier.runtime.commit_record import UNCOMMITTED, write_commit
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import Library
from kvtier.verify_store import verify_store

pytestmark = pytest.mark.usefixtures("quick_store")

BEGUN = dataclasses.replace(COMMIT, tokens=32, chunks=4, complete=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- commits that are lost ---------------------------------------------------------------------------------------------


def slots_of(folder):
    return [folder / "commit" / name for name in ("c.0", "c.1")]


LOSSES = {
    "deleted": lambda folder: [slot.unlink(missing_ok=True) for slot in slots_of(folder)],
    "truncated": lambda folder: [slot.write_bytes(b"") for slot in slots_of(folder)],
    "zeros": lambda folder: [slot.write_bytes(bytes(4096)) for slot in slots_of(folder)],
    "the folder of it": lambda folder: shutil.rmtree(folder / "commit"),
    "and the metadata": lambda folder: [shutil.rmtree(folder / "commit"), (folder / "zarr.json").unlink()],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sequence_that_lost_its_commits_is_kept_and_shown(loss, path):
    library = Library(path)
    with library.writing():
        folder = create(library, "a")
        (folder / "tokens").mkdir()
        (folder / "tokens" / "zarr.json").write_text(json.dumps({"shape": [100]}))
    LOSSES[loss](folder)
    before = contents(path)
    with Library(path).writing():
        assert contents(path) == before
    assert contents(path) == before
    problem = "commit: c.0 and c.1 are missing or empty, although 100 tokens were committed"
    assert [(entry.id, entry.problem) for entry in Library(path).entries()] == [("a", problem)]
    with pytest.raises(StoreError, match=f"the saved sequence {folder} is damaged: {problem}.*put back a copy of it"):
        Library(path).entry("a").check()
    [sequence] = verify_store(path)["sequences"]
    assert (sequence["id"], sequence["ok"], sequence["problems"]) == ("a", False, [problem])
    line, advice = table(describe_store(path)).splitlines()[1:]
    assert line == f"{'a':<14}damaged: {problem}"
    assert "what is damaged is kept: put back a copy of its folder, or read and save the same text again" in advice


def test_of_which_nobody_says_that_it_was_committed(path):
    """Neither that it was not: an earlier kvtier, killed before the first commit, has left no mark."""
    library = Library(path)
    with library.writing():
        folder = create(library, "a", None)
        shutil.rmtree(folder / UNCOMMITTED)
    with library.writing():
        assert names(path) == {"a"}
    assert "missing or empty (an earlier kvtier that was killed while it wrote" in library.entry().problem


def test_the_mark_goes_with_the_first_commit_or_with_the_next_writer(path):
    library = Library(path)
    with library.writing():
        folder = create(library, "a", None)
        assert (folder / UNCOMMITTED).is_dir()
        write_commit(folder / "commit", BEGUN)
        assert not (folder / UNCOMMITTED).exists()
        (folder / UNCOMMITTED).mkdir()  # as if killed in between
        assert library.entry().tokens == 32
    with library.writing():
        assert not (folder / UNCOMMITTED).exists()
    assert library.entry().tokens == 32


def test_a_first_commit_that_cannot_be_read_is_no_reason_to_remove_anything(path):
    library = Library(path)
    with library.writing():
        folder = create(library, "a", None)
        (folder / "commit" / "c.1").write_bytes(b"x" * 4096)
    with library.writing():
        assert names(path) == {"a"}
    assert "the checksum of" in library.entry().problem


# -- sequences that are written anew -----------------------------------------------------------------------------------


class KilledError(BaseException):
    """Raised by all that changes the disk, once the process is to be dead."""


class Death:
    """Ends what is done in this process at the ``kill_at``-th change of the disk; nothing changes after it."""

    CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "pwrite", "fsync", "fdatasync")

    def __init__(self, monkeypatch, kill_at):
        self.left = kill_at
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))

    def watched(self, call):
        def watched(*arguments, **more):
            self.left -= 1
            if self.left < 0:
                raise KilledError
            return call(*arguments, **more)

        return watched


@pytest.mark.parametrize("state", ["complete", "not complete", "lost"])
def test_killed_at_every_place_of_writing_anew(state, tmp_path, monkeypatch):
    """What was there is there until the new one is complete; of the new one, what was committed."""
    seen = set()
    for kill_at in itertools.count():
        path = tmp_path / str(kill_at)
        library = Library(path)
        with library.writing():
            folder = create(library, "a", BEGUN if state == "not complete" else COMMIT, name="old")
            (folder / "data").write_bytes(b"old")
        if state == "lost":
            LOSSES["deleted"](folder)
        before = contents(folder)
        with monkeypatch.context() as patch:
            death = Death(patch, kill_at)
            library = Library(path)
            try:
                with library.writing():
                    new = create(library, "a", None, name="new")
                    write_commit(new / "commit", dataclasses.replace(BEGUN, tokens=64))
                    write_commit(new / "commit", dataclasses.replace(COMMIT, number=2, tokens=200))
                    write_commit(new / "commit", dataclasses.replace(COMMIT, number=3, tokens=200))
            except KilledError:
                pass
            finally:
                library._release()

        whole = Library(path).read("a")
        assert whole is not None
        seen_by_readers = None if whole.problem else whole.tokens
        with Library(path).writing():
            after, kept = Library(path).read("a"), Library(path).replaced("a")
            assert after.path == folder
            assert (None if after.problem else after.tokens) == seen_by_readers
            if after.attributes.get("name") == "new":
                assert after.tokens in (64, 200)
                assert [contents(old) for old in kept] == ([before] if after.tokens == 64 else [])
                seen.add(after.tokens)
            else:
                assert contents(folder) == before
                assert kept == []
                seen.add("old")
            assert not [name for name in names(path) if name.endswith((".new", ".removed"))]
            assert not (folder / UNCOMMITTED).exists()
        if death.left >= 0:
            break
    assert kill_at > 20
    assert seen == {"old", 64, 200}


def test_several_are_kept_until_one_is_complete(path):
    """The second attempt was committed, and damaged in its turn."""
    library = Library(path)
    with library.writing():
        create(library, "a", name="first")
        folder = create(library, "a", BEGUN, name="second")
    LOSSES["deleted"](folder)
    with library.writing():
        create(library, "a", None, name="third")
        assert [
            json.loads((old / "zarr.json").read_text())["attributes"]["kvtier"]["name"] for old in library.replaced("a")
        ] == [
            "second",
            "first",
        ]
        assert library.read("a").problem.startswith("commit: c.0 and c.1 are missing")  # the second, by readers
    with library.writing():
        assert [old.name for old in library.replaced("a")] == ["a.replaced1"]
        assert library.read("a").path == folder
        third = create(library, "a", BEGUN, name="third")
        write_commit(third / "commit", dataclasses.replace(COMMIT, number=2))
    assert names(path) == {"a"}
    assert library.entry().attributes["name"] == "third"


def test_a_sequence_that_cannot_be_made_leaves_the_old_one(path, monkeypatch):
    library = Library(path)
    with library.writing():
        folder = create(library, "a")
        before = contents(path)

        def fails(*arguments):
            raise OSError(28, "No space left on device")

        for name in ("write_metadata", "sync_folder"):
            with monkeypatch.context() as patch:
                patch.setattr(library_module, name, fails)
                with pytest.raises(OSError, match="No space left"):
                    library.create("a", {"parts": []})
            assert contents(path) == before
            assert library.entry().path == folder


def test_inspect_says_what_is_kept(path):
    library = Library(path)
    with library.writing():
        create(library, "a")
        nbytes = library.nbytes
        create(library, "a", BEGUN, model={"name": "llama"}, text_tokens=100)
        [kept] = library.replaced("a")
        assert library.nbytes > nbytes  # both count
    [sequence] = describe_store(path)["sequences"]
    assert (sequence["replaced"], sequence["tokens"], sequence["text_tokens"]) == ([str(kept)], 32, 100)
    _, line, more = table(describe_store(path)).splitlines()
    assert line.endswith("llama, not complete: 32 of 100 tokens")
    assert more == f"  written anew; until that is complete, what it was is kept in {kept}"


def test_what_goes_on_from_a_sequence_has_the_old_one_while_it_is_written_anew(path):
    library = Library(path)
    with library.writing():
        create(library, "a")
        user = library.read(create(library, "b", parts=[["a", 9]]).name)
        folder = create(library, "a", None)
        assert library.part(user, "a", 0, 9).path.name == "a.replaced1"
        write_commit(folder / "commit", BEGUN)  # it holds too little
        assert library.part(user, "a", 0, 9).path.name == "a.replaced1"
        assert library.part(user, "a", 0, 4).path.name == "a"
        write_commit(folder / "commit", dataclasses.replace(COMMIT, number=2))
        assert library.part(user, "a", 0, 9).path.name == "a"
        assert library.read("a.replaced1") is None  # no id: nobody goes on from there


# -- stores that many make at once -------------------------------------------------------------------------------------

RACE = """
import os, sys
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import Library

def attempt(path, go, done, end):
    library = Library(path)
    os.read(go, 1)
    try:
        library.lock()
        code = 1
    except StoreError as error:
        code = 0 if "is writing to" in str(error) else 2
    except BaseException:
        code = 3
    os.write(done, b"x")
    os.read(end, 1)  # until all have tried
    os._exit(code)

for round in range(int(sys.argv[2])):
    path, n = f"{sys.argv[1]}/{round}", 12
    go, done, end, children = os.pipe(), os.pipe(), os.pipe(), []
    for _ in range(n):
        pid = os.fork()
        if not pid:
            attempt(path, go[0], done[1], end[0])
        children.append(pid)
    os.write(go[1], b"x" * n)
    tried = 0
    while tried < n:
        tried += len(os.read(done[0], n))
    os.write(end[1], b"x" * n)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    left = sorted(os.listdir(path))
    print(sorted(codes, reverse=True)[:2] == [1, 0], codes, left, flush=True)
    for fd in (*go, *done, *end):
        os.close(fd)
"""


def test_of_many_processes_that_make_a_store_one_is_its_writer(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RACE, str(tmp_path), "10"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rounds = done.stdout.splitlines()
    assert len(rounds) == 10
    assert [line for line in rounds if not line.startswith("True")] == []


def test_a_store_whose_making_was_interrupted_is_made(path):
    path.mkdir()
    (path / "zarr.json.4711-1.partial").write_text("{")
    assert Library(path).is_new()
    with Library(path).writing():
        assert {file.name for file in path.iterdir()} == {"zarr.json", "sequences"}
    assert json.loads((path / "zarr.json").read_text())["attributes"] == {"kvtier": {"version": 1}}


def test_a_lock_on_metadata_that_was_replaced_does_not_count(path, monkeypatch):
    """Another program rewrites zarr.json between opening and locking: the lock is taken again, on the new file."""
    with Library(path).writing():
        pass
    flock, replaced = library_module.fcntl.flock, []

    def replacing(fd, how):
        if not replaced:
            replaced.append((path / "zarr.json").stat().st_ino)
            shutil.copy(path / "zarr.json", path / "other")
            (path / "other").replace(path / "zarr.json")
        flock(fd, how)

    monkeypatch.setattr(library_module.fcntl, "flock", replacing)
    opened = len(os.listdir("/proc/self/fd"))
    with Library(path).writing():
        assert (path / "zarr.json").stat().st_ino != replaced[0]
        with pytest.raises(StoreError, match=f"process {os.getpid()} is writing to"):
            Library(path).lock()
        assert len(os.listdir("/proc/self/fd")) == opened + 1


def test_the_holder_is_known_among_others_who_share_locks(path, monkeypatch):
    read_text, shared = Path.read_text, "1: FLOCK  ADVISORY  READ 17 fe:00:11 0 EOF\n"

    def text(file, *arguments, **more):
        found = read_text(file, *arguments, **more)
        return shared + found if file == Path("/proc/locks") else found

    monkeypatch.setattr(Path, "read_text", text)
    with Library(path).writing(), pytest.raises(StoreError, match=f"^process {os.getpid()} is writing to"):
        Library(path).lock()
