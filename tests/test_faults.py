"""Faults, each caused: no wrong token comes of bad data, what was committed is still there, messages say what to do."""

import errno
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from fault_child import answer, config
from models import minimum_budget, prompt, tiny_llama
from test_verify import committed, flip, sequence_of, write

import kvtier
from kvtier import durable
from kvtier.runtime import direct_io
from kvtier.runtime.errors import BudgetError, StoreError
from kvtier.runtime.host_pool import HostPool
from kvtier.runtime.library import Library
from kvtier.verify_store import verify_store

ROOT = Path(__file__).parents[1]
N = 250
"""Tokens that are read: 9 blocks, 28 chunks in 2 layers of 2 KV heads."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A commit after every block; no fsync; the plain engine of ``RecordIO``: an AIO context takes 30 ms to close."""
    monkeypatch.setattr(durable, "FIRST_COMMIT_SECONDS", 0)
    monkeypatch.setattr(durable, "COMMIT_SHARE", 1e9)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    monkeypatch.setattr(direct_io, "_engine_of", lambda folder, nbytes: (direct_io.BUFFERED, []))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def right(model):
    """What follows the text, by dtype, when nothing goes wrong and there is no store."""
    found = {}
    for dtype in ("auto", "int4"):
        with kvtier.offload(model, config(dtype=dtype)) as kv:
            found[dtype] = answer(kv, kv.prefill(prompt(N)))
    return found


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A store whose reading was interrupted after 6 blocks, and one that was completed; not to be changed."""
    folder = tmp_path_factory.mktemp("originals")
    write(folder / "interrupted", tiny_llama(), prompt(N), stop_after=6)
    write(folder / "complete", tiny_llama(), prompt(N))
    return folder


@pytest.fixture
def interrupted(originals, tmp_path):
    return Path(shutil.copytree(originals / "interrupted", tmp_path / "interrupted"))


@pytest.fixture
def complete(originals, tmp_path):
    return Path(shutil.copytree(originals / "complete", tmp_path / "complete"))


class Children:
    """tests/fault_child.py: ``ask`` has it do something in a fresh process."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        command = [sys.executable, str(ROOT / "tests" / "fault_child.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, **request):
        self.start(**request)
        return self.result()

    def start(self, **request):
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()

    def result(self):
        return json.loads(self.process.stdout.readline())

    def is_done(self):
        return bool(select.select([self.process.stdout], [], [], 0)[0])


@pytest.fixture(scope="module")
def children():
    children = Children()
    yield children
    children.process.stdin.close()
    assert children.process.wait(60) == 0
    children.process.stdout.close()


def commit_of(path):
    """The commit of the only sequence; None if there is none, or no store."""
    library = Library(path)
    entries = [] if library.is_new() or not (path / "zarr.json").exists() else library.entries()
    assert len(entries) <= 1
    return entries[0].commit if entries else None


def resumed_and_answered(model, path, **other):
    """Read the text into a store, as far as it is not there: how many tokens were, and what follows."""
    with kvtier.offload(model, config(path, **other)) as kv:
        book = kv.prefill(prompt(N))
        return kv.stats()["prefill"]["resumed_tokens"], answer(kv, book)


# -- killed ------------------------------------------------------------------------------------------------------------


def kills(children, folder, right, n, seed):
    """Kill readings ``n`` times at random moments, each store up to 4 times before its reading may end.

    After each kill: what is committed, which never shrinks. Returns how many tokens that was.
    """
    generator, found, store = random.Random(seed), [], 0
    events = {dtype: children.ask(do="read", path=folder / dtype, n=N, dtype=dtype)["events"] for dtype in right}
    assert min(events.values()) > 300
    while len(found) < n:
        path, dtype, before = folder / str(store), ("auto", "int4")[store % 2], 0
        for kills_left in range(min(4, n - len(found)), -1, -1):
            request = {"do": "read", "path": path, "n": N, "dtype": dtype, "seed": generator.random()}
            if kills_left and generator.random() < 0.8:
                request["kill_at"] = generator.randrange(events[dtype] * (N - before) // N + 40)
            elif kills_left:
                request["kill_after_s"] = generator.uniform(0.01, 0.3)
            result, commit = children.ask(**request), commit_of(path)
            tokens = 0 if commit is None else commit.tokens
            print(f"seed {seed}, store {store}: {request}: {tokens} tokens")
            assert tokens >= before
            assert commit is None or verify_store(path)["ok"]
            if "signal" not in result:
                assert (result["answer"], result["resumed_tokens"]) == (right[dtype], before)
                assert commit.complete
                break
            assert result == {"signal": signal.SIGKILL}
            found.append(tokens)
            before = tokens
        store += 1
    return found


@pytest.mark.parametrize(("n", "seed"), [(10, 6), pytest.param(50, 7, marks=pytest.mark.slow)])
def test_killed_at_random_moments(children, tmp_path, right, n, seed):
    """kill -9: verify finds nothing, nothing committed is lost, the answers are those without a kill."""
    tokens = kills(children, tmp_path, right, n, seed)
    assert len(tokens) == n
    assert len(set(tokens)) > n // 10  # at many places


def test_killed_at_every_place_of_a_row(children, interrupted, right):
    """One store, killed a bit later each time until its reading is done."""
    before = commit_of(interrupted).tokens
    for kill_at in range(0, 1000, 11):
        result = children.ask(do="read", path=interrupted, n=N, kill_at=kill_at, seed=kill_at)
        assert verify_store(interrupted)["ok"]
        tokens = commit_of(interrupted).tokens
        assert tokens >= before
        if "answer" in result:
            break
        assert result == {"signal": signal.SIGKILL}
        before = tokens
    assert kill_at > 50
    assert (result["answer"], result["resumed_tokens"]) == (right["auto"], before)


@pytest.mark.parametrize("how", ["prefill", "save"])
def test_killed_before_the_last_commit(originals, tmp_path, model, right, how):
    """All tokens are committed, but not that they are all: the chunks that are read from there are not written anew."""
    write(tmp_path / "store", model, prompt(N), stop_after=10)
    folder, before = sequence_of(tmp_path / "store"), commit_of(tmp_path / "store")
    assert (before.tokens, before.complete) == (N, False)
    made = json.loads((folder / "zarr.json").read_text())["attributes"]["kvtier"]["created"]
    if how == "prefill":
        assert resumed_and_answered(model, tmp_path / "store") == (N, right["auto"])
    else:
        with kvtier.offload(model, config()) as kv:
            book = kv.open(tmp_path / "store")
            assert book.save(tmp_path / "store") == folder.name
            assert answer(kv, book) == right["auto"]
    after = commit_of(tmp_path / "store")
    assert (after.tokens, after.complete, after.number) == (N, True, before.number + 2)  # in both slots
    assert json.loads((folder / "zarr.json").read_text())["attributes"]["kvtier"]["created"] == made
    assert verify_store(tmp_path / "store")["ok"]
    with kvtier.offload(model, config()) as kv:
        assert answer(kv, kv.open(tmp_path / "store")) == right["auto"]


def test_an_interrupted_reading_that_another_sequence_goes_on_from(tmp_path, model, right):
    """A longer text has taken over what was read; the shorter one goes on where it was, and both stay readable."""
    path, longer = tmp_path / "store", torch.cat([prompt(N), prompt(60, seed=5)], dim=1)
    write(path, model, prompt(N), stop_after=4)
    folder = sequence_of(path)
    write(path, model, longer)
    [[id, _]] = Library(path).read(sequence_of(path).name).attributes["parts"]
    assert id == folder.name
    with kvtier.offload(model, config()) as kv:
        expected = answer(kv, kv.prefill(longer))
    assert resumed_and_answered(model, path) == (128, right["auto"])
    assert verify_store(path)["ok"]
    with kvtier.offload(model, config()) as kv:
        assert answer(kv, kv.open(path, folder.name)) == right["auto"]
        assert answer(kv, kv.open(path, sequence_of(path).name)) == expected


# -- bad data ----------------------------------------------------------------------------------------------------------


def outcome(model, path, **other):
    """What follows a saved text, or why there is nothing: (None, answer) or (message, None); a warning is a message."""
    try:
        with kvtier.offload(model, config(**other)) as kv, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = answer(kv, kv.open(path))
            return (str(warned[0].message) if warned else None), found
    except StoreError as error:
        return str(error), None


def names(message, folder, name):
    """Whether a message names a file, or the small array that it is all of."""
    array = folder / name if name.startswith(("kv/", "codes/", "crc/", "commit/")) else (folder / name).parent
    return re.search(rf"{re.escape(str(array))}\b", message) is not None


def test_a_flipped_bit_in_any_file(complete, model, right):
    """Every file, two committed bytes each: refused with the file's name, or without effect."""
    folder, generator = sequence_of(complete), random.Random(3)
    refused, unharmed = set(), set()
    for name, counts in sorted(committed(folder).items()):
        for _ in range(2):
            position = generator.choice(np.flatnonzero(counts).tolist())
            flip(folder / name, position, bit := generator.randrange(8))
            message, found = outcome(model, complete)
            flip(folder / name, position, bit)
            assert found in (None, right["auto"]), f"{name}, byte {position}"
            if message is None:
                unharmed.add(name)
            else:
                assert names(message, folder, name), f"{name}, byte {position}: {message}"
                assert "put back a copy" in message
                refused.add(name)
    assert outcome(model, complete) == (None, right["auto"])
    # metadata of arrays is for other programs; nobody looks at the older commit, and at chunks that are not chosen
    assert all(name.endswith("/zarr.json") or name.startswith(("commit/", "kv/", "crc/kv/")) for name in unharmed)
    assert {name for name in refused if name.startswith(("codes/", "fitted/", "window"))}
    assert {"zarr.json", "tokens/c.0", "block_starts/c.0", "crc/codes/c.0"} <= refused


def test_a_damaged_newest_commit(interrupted, model, right):
    """The one before counts: opening says so, reading on reads again what came after it."""
    before, folder = commit_of(interrupted), sequence_of(interrupted)
    flip(folder / f"commit/c.{before.number % 2}", 100)
    said = rf"the checksum of .*/commit/c.{before.number % 2} is wrong: .* at the commit before, with 160 tokens"
    with kvtier.offload(model, config()) as kv, pytest.warns(UserWarning, match=said):
        assert kv.open(interrupted).get_seq_length() == before.tokens - 32
    assert resumed_and_answered(model, interrupted) == (before.tokens - 32, right["auto"])
    assert verify_store(interrupted)["ok"]


@pytest.mark.parametrize("file", ["kv/c.0.0.0.0", "crc/kv/c.0.0.0"])
def test_flipped_bits_in_chunks_that_are_chosen(complete, model, file):
    """Whatever a query chooses: its record, or the checksum of it."""
    folder = sequence_of(complete)
    data = np.frombuffer((folder / file).read_bytes(), np.uint8).copy()
    places = np.flatnonzero(committed(folder)[file])
    if file.startswith("kv/"):
        places = places[places < 2 * 128 * 2 * 4096]  # not the index
    data[places] ^= 1
    (folder / file).write_bytes(data.tobytes())
    message, _ = outcome(model, complete)
    assert re.search(r"chunk \d+, layer 0, KV head [01]", message)
    assert str(folder / file) in message
    assert "Nothing of it was used" not in message  # it is found while generating


TORN = ("tokens/c.0", "block_starts/c.0", "codes/scale/c.0.0.0.0", "crc/codes/c.0", "kv/c.0.0.0.0", "crc/kv/c.0.0.0")


def torn(folder, name, how, generator):
    """Damage what a block that was being written would have changed: all that follows the committed bytes."""
    counts = committed(folder)[name]
    data = np.frombuffer((folder / name).read_bytes(), np.uint8).copy()
    assert not counts.all()
    if how == "zeros":
        data[~counts] = 0
    elif how == "garbage":
        data[~counts] = generator.integers(0, 256, int((~counts).sum()), np.uint8)
    else:
        data = data[: np.flatnonzero(counts)[-1] + 1]
    (folder / name).write_bytes(data.tobytes())


@pytest.mark.parametrize("how", ["zeros", "garbage", "cut off"])
def test_a_torn_last_block(interrupted, model, right, how):
    """What was never committed does not matter, whatever state it is in."""
    folder, before = sequence_of(interrupted), commit_of(interrupted).tokens
    for name in TORN:
        if how != "cut off" or not name.startswith(("codes/", "kv/")):  # their length is always the same
            torn(folder, name, how, np.random.default_rng(0))
    assert resumed_and_answered(model, interrupted) == (before, right["auto"])
    assert commit_of(interrupted).complete
    assert verify_store(interrupted)["ok"]


@pytest.mark.parametrize("how", ["zeros", "garbage", "cut off"])
@pytest.mark.parametrize("name", TORN)
def test_a_torn_end_of_what_was_committed(interrupted, model, right, name, how):
    """The last committed bytes are damaged: refused by name, or read again; never a wrong answer."""
    folder = sequence_of(interrupted)
    places = np.flatnonzero(committed(folder)[name])
    if name.startswith("kv/"):
        places = places[places < 2 * 128 * 2 * 4096]
    data = np.frombuffer((folder / name).read_bytes(), np.uint8).copy()
    data[places[-40:]] = {"zeros": 0, "garbage": 0xA5}.get(how, 0)
    (folder / name).write_bytes(data[: places[-20]].tobytes() if how == "cut off" else data.tobytes())
    assert any(name in line for line in verify_store(interrupted)["sequences"][0]["problems"])
    message = found = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            _, found = resumed_and_answered(model, interrupted)
        except StoreError as error:
            message = str(error)
    assert found == right["auto"] or names(message, folder, name)
    said = [str(warning.message) for warning in warned]  # it is read anew, and never silently
    assert len(said) == (name == "tokens/c.0")
    assert all(names(line, folder, name) for line in said)


# -- devices -----------------------------------------------------------------------------------------------------------


FULL = r"(?i)(device is full|no space left on device).*(nothing stored is damaged|is intact).*free space there"


class Device:
    """A small file system of its own."""

    def __init__(self, mount_point, kind, mib, image):
        self.path = mount_point / "store"
        self._mount_point = mount_point
        mount_point.mkdir()
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "kvtier-test", mount_point]
        else:
            image.write_bytes(b"")
            os.truncate(image, mib * 2**20)
            _run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", image)
            command = ["mount", "-o", "loop", image, mount_point]
        _run(*command)

    def read_only(self, yes):
        _run("mount", "-o", f"remount,{'ro' if yes else 'rw'}", self._mount_point)

    def fill(self, leave_bytes):
        """Another program leaves so few bytes."""
        free = shutil.disk_usage(self._mount_point).free
        (self._mount_point / "filler").write_bytes(bytes(max(0, free - leave_bytes)))

    def make_room(self):
        (self._mount_point / "filler").unlink()

    def close(self):
        subprocess.run(["umount", "-l", self._mount_point], check=True, capture_output=True)


def _run(*command):
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', '') or error}")


@pytest.fixture
def device(tmp_path):
    devices = []

    def make(kind="tmpfs", mib=8):
        devices.append(Device(tmp_path / "device", kind, mib, tmp_path / "image"))
        return devices[-1]

    yield make
    for made in devices:
        made.close()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_the_device_fills_up_while_reading_durably(device, model, right, kind):
    """Real: what was committed is intact, caches go on, and with more room the reading goes on where it was."""
    device = device(kind)
    with kvtier.offload(model, config(device.path, disk="5MiB")) as kv:
        first = kv.prefill(prompt(100, seed=8))
        before = answer(kv, first)
        device.fill(leave_bytes=400 * 1024)
        with pytest.raises(StoreError, match=FULL) as failed:
            kv.prefill(prompt(N))
        assert str(device.path) in str(failed.value)
        assert len(re.findall("is intact|is damaged", str(failed.value))) == 1  # said once, by whom it happened to
        assert answer(kv, first) == before
        assert verify_store(device.path)["ok"]
        tokens = [entry.tokens for entry in Library(device.path).entries() if entry.tokens != 100]
        device.make_room()
        assert answer(kv, kv.prefill(prompt(N))) == right["auto"]
        assert kv.stats()["prefill"]["resumed_tokens"] == sum(tokens)
    assert verify_store(device.path)["ok"]
    assert resumed_and_answered(model, device.path, disk="5MiB") == (N, right["auto"])


def test_the_device_fills_up_while_spilling(device, model, right):
    """Real: chunks that were stored stay readable, and with more room the same call goes on."""
    device = device("tmpfs")
    host = minimum_budget(model, config(device.path, mode="spill", disk="4MiB"), "host")
    with kvtier.offload(model, config(device.path, mode="spill", disk="4MiB", host=f"{host}B")) as kv:
        first = kv.prefill(prompt(100, seed=8))
        before = answer(kv, first)
        device.fill(leave_bytes=10_000)
        with pytest.raises(StoreError, match=r"the device is full.*Nothing stored is damaged.*Free space there"):
            kv.prefill(prompt(N))
        assert answer(kv, first) == before
        device.make_room()
        assert answer(kv, kv.prefill(prompt(N))) == right["auto"]
        assert kv.stats()["tiers"]["disk"]["bytes_written"] > 0
        assert answer(kv, first) == before


def test_the_device_fills_up_while_saving(device, model, right, tmp_path):
    device = device("tmpfs", mib=2)
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(prompt(N))
        with Library(device.path).writing():
            device.fill(leave_bytes=100_000)
        with pytest.raises(StoreError, match=r"only .* free in .*/device/store: free space there, or save to another"):
            book.save(device.path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Library, "free_bytes", lambda library: 10**9)
            with pytest.raises(StoreError, match=FULL):
                book.save(device.path)
        assert verify_store(device.path)["sequences"] == []
        assert answer(kv, book) == right["auto"]
        book.save(tmp_path / "elsewhere")
    assert outcome(model, tmp_path / "elsewhere") == (None, right["auto"])


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_read_only_file_system(device, model, right, kind, monkeypatch):
    """Real: opening and verifying work, with the engine that serves there; saving and reading durably are refused."""
    monkeypatch.undo()
    device = device(kind)
    with kvtier.offload(model, config()) as kv:
        kv.prefill(prompt(N)).save(device.path)
    device.read_only(True)
    assert outcome(model, device.path) == (None, right["auto"])
    assert verify_store(device.path)["ok"]
    with kvtier.offload(model, config()) as kv:
        book = kv.open(device.path)
        longer = kv.prefill(prompt(N + 1))
        with pytest.raises(StoreError, match=r"Read-only file system.*choose another"):
            longer.save(device.path)
        assert answer(kv, book) == right["auto"]
    for mode in ("durable", "spill"):
        block = kvtier.offload(model, config(device.path, mode=mode, disk="1MiB"))
        with pytest.raises(StoreError, match=r"(?i)Read-only file system.*choose another"):
            block.__enter__()
    device.read_only(False)
    assert resumed_and_answered(model, device.path, disk="5MiB") == (N, right["auto"])


def failing(call, code, when):
    """A system call that fails with ``code`` on file descriptors for which ``when(path)`` is true."""

    def fails(fd, *arguments):
        if when(os.readlink(f"/proc/self/fd/{fd}")):
            raise OSError(code, os.strerror(code))
        return call(fd, *arguments)

    return fails


def test_the_device_fails_to_read(complete, model, right, monkeypatch):
    """EIO of a file of records: refused with the reason and the file's name; nothing is lost when it is back."""
    with kvtier.offload(model, config()) as kv:
        book = kv.open(complete)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing(os.preadv, errno.EIO, lambda path: "/kv/" in path))
            with pytest.raises(StoreError, match=r"kv/c\.0\.0\.0\.0.*Input/output error.*check the device"):
                answer(kv, book)
            problems = verify_store(complete)["sequences"][0]["problems"]
            assert len(problems) == 4 * commit_of(complete).chunks
            assert all("cannot be read ([Errno 5] Input/output error)" in problem for problem in problems)
        assert answer(kv, book) == right["auto"]


@pytest.mark.parametrize("call", ["pwritev", "pwrite", "fdatasync", "fsync"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_the_device_fails_to_write(tmp_path, model, right, monkeypatch, call, code):
    """In whatever call, from the fourth commit on: the commit before counts, and the same block can go on later."""
    path, commits, commit = tmp_path / "store", [], durable._Writing._commit
    monkeypatch.setattr(durable._Writing, "_commit", lambda *a, **k: (commits.append(1), commit(*a, **k))[1])
    with kvtier.offload(model, config(path)) as kv:
        with monkeypatch.context() as patch:
            fails = failing(getattr(os, call), code, lambda place: str(path) in place and len(commits) > 3)
            patch.setattr(os, call, fails)
            with pytest.raises(StoreError, match=rf"{os.strerror(code)}|device is full") as failed:
                kv.prefill(prompt(N))
        assert str(path) in str(failed.value)
        assert re.search("(?i)free space there|check the device", str(failed.value))
        tokens = commit_of(path).tokens
        assert tokens == 3 * 32 or (call == "pwritev" and tokens == 4 * 32)  # written already when the commit began
        assert verify_store(path)["ok"]
        assert answer(kv, kv.prefill(prompt(N))) == right["auto"]
        assert kv.stats()["prefill"]["resumed_tokens"] == tokens
    assert verify_store(path)["ok"]


def test_the_device_fails_while_spilling(tmp_path, model, right, monkeypatch):
    """EIO, in and out: chunks on the host stay, those on the disk are there again when it is back."""
    host = minimum_budget(model, config(tmp_path / "store", mode="spill"), "host")
    with kvtier.offload(model, config(tmp_path / "store", mode="spill", host=f"{host}B")) as kv:
        book = kv.prefill(prompt(N))
        for call in ("preadv", "pwritev"):
            with monkeypatch.context() as patch:
                patch.setattr(os, call, failing(getattr(os, call), errno.EIO, lambda path: "/spill-" in path))
                with pytest.raises(StoreError, match=r"spill-.*Input/output error.*check the device"):
                    kv.prefill(prompt(N, seed=4)) if call == "pwritev" else answer(kv, book)
            assert answer(kv, book) == right["auto"]


# -- others ------------------------------------------------------------------------------------------------------------


def test_the_folder_goes_before_its_chunks_are_read(complete, model, right):
    with kvtier.offload(model, config()) as kv:
        book, other = kv.open(complete), kv.prefill(prompt(N))
        shutil.rmtree(complete)
        with pytest.raises(StoreError, match=rf"{complete}.*No such file.*put back a copy"):
            answer(kv, book)
        assert answer(kv, other) == right["auto"]
        with pytest.raises(StoreError, match=r"is not a kvtier store|no such folder"):
            kv.open(complete)


def test_the_folder_goes_while_it_is_written(tmp_path, model, right, monkeypatch):
    """Nothing that another process could take for saved is left; the block goes on once there is a folder."""
    path, after = tmp_path / "store", durable._Writing._after_block

    def remove(writing, done):
        after(writing, done)
        if done > 100:
            shutil.rmtree(path, ignore_errors=True)

    with kvtier.offload(model, config(path)) as kv:
        with monkeypatch.context() as patch:
            patch.setattr(durable._Writing, "_after_block", remove)
            with pytest.raises(StoreError, match=rf"{path}.*(No such file|not a kvtier store).*choose another"):
                kv.prefill(prompt(N))
        if path.exists():
            assert Library(path).is_new() or not (path / "zarr.json").exists()
        cache = kv.new_cache()
        assert answer(kv, cache) is not None


@pytest.mark.parametrize("most_open", [128, 1])
def test_the_folder_goes_while_chunks_are_spilled_there(tmp_path, model, right, monkeypatch, most_open):
    """Files that are open stay readable; what cannot be read is refused, and never something else."""
    monkeypatch.setattr(direct_io, "MAX_OPEN_FILES", most_open)
    path = tmp_path / "store"
    host = minimum_budget(model, config(path, mode="spill"), "host")
    with kvtier.offload(model, config(path, mode="spill", host=f"{host}B", disk="1MiB")) as kv:
        book = kv.prefill(prompt(N))
        assert answer(kv, book) == right["auto"]
        assert len(list(path.rglob("kv/c/*/0"))) > 2  # of which two stay open, at least
        shutil.rmtree(path)
        if most_open == 1:
            with pytest.raises(StoreError, match=rf"{path}.*No such file.*choose another"):
                answer(kv, book)
        else:
            assert answer(kv, book) == right["auto"]


def test_the_host_refuses_memory(tmp_path, model, right, monkeypatch):
    """Beyond what fits: BudgetError with advice; what is there stays, and the reading goes on when there is memory."""
    path, empty = tmp_path / "store", HostPool._empty

    def refuse(pool, *arguments):
        if len(pool) > 60:
            raise MemoryError("cannot allocate memory")
        return empty(pool, *arguments)

    with kvtier.offload(model, config(path, host="2MiB")) as kv:
        first = kv.prefill(prompt(100, seed=8))
        before = answer(kv, first)
        with monkeypatch.context() as patch:
            patch.setattr(HostPool, "_empty", refuse)
            with pytest.raises(BudgetError, match=r"host = 2.00 MiB is more than this machine can hold.*Lower"):
                kv.prefill(prompt(N))
            assert answer(kv, first) == before
        [tokens] = [entry.tokens for entry in Library(path).entries() if entry.tokens != 100]
        assert tokens > 0
        assert verify_store(path)["ok"]
        assert answer(kv, kv.prefill(prompt(N))) == right["auto"]
        assert kv.stats()["prefill"]["resumed_tokens"] == tokens


def test_another_program_rewrites_a_shard(complete, model):
    """zarr-python lays out a shard anew, even where it changes no value."""
    array = zarr.open_array(sequence_of(complete) / "kv", mode="r+")
    array[0, 3] = array[0, 3]
    message, _ = outcome(model, complete)
    assert f"{sequence_of(complete) / 'kv/c.0.0.0.0'} was rewritten by another program" in message
    assert "put back a copy" in message
    with pytest.raises(StoreError, match="was rewritten by another program"):
        resumed_and_answered(model, complete)


def test_a_second_writer_is_refused_and_readers_are_served(children, complete, model, right, tmp_path):
    """Across processes: the refusal says who it is; when the writer is killed, the next one is served."""
    holder = children.ask(do="hold", path=complete, until=tmp_path / "never", background=True)["pid"]
    expected = rf"process {holder} is writing to {complete}: try again when it is done, or use another folder"
    block = kvtier.offload(model, config(complete))
    with pytest.raises(StoreError, match="^" + expected):
        block.__enter__()
    refused = children.ask(do="read", path=complete, n=N)
    assert refused["error"] == "StoreError"
    assert re.match(expected, refused["message"])
    assert children.ask(do="open_saved", path=complete) == {"answer": right["auto"], "tokens": N}
    assert outcome(model, complete) == (None, right["auto"])
    assert verify_store(complete)["ok"]
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(prompt(N + 9))
        with pytest.raises(StoreError, match="^" + expected):
            book.save(complete)
    os.kill(holder, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while Library(complete)._holder() == f"process {holder}" and time.monotonic() < deadline:
        time.sleep(0.01)  # its threads end one after the other
    assert resumed_and_answered(model, complete) == (N, right["auto"])


@pytest.mark.parametrize("then", ["read", "spill"])
def test_another_program_cuts_off_a_scratch_file(tmp_path, model, right, then):
    """Also if it is written to afterwards, and so grows again with zeros where chunks were."""
    path = tmp_path / "store"
    host = minimum_budget(model, config(path, mode="spill"), "host")
    with kvtier.offload(model, config(path, mode="spill", host=f"{host}B")) as kv:
        book = kv.prefill(prompt(N))
        assert answer(kv, book) == right["auto"]
        [file] = path.rglob("kv/c/*/0")
        os.truncate(file, 0)
        if then == "spill":
            with pytest.raises(StoreError, match=rf"{file}.*Was the file changed"):
                kv.prefill(prompt(N, seed=4))
        with pytest.raises(StoreError, match=rf"{file}.*Was the file changed"):
            answer(kv, book)


@pytest.mark.filterwarnings("ignore:the saved sequence .* is not complete")  # that is the case here
def test_verify_and_readers_while_another_process_writes(children, model, tmp_path):
    """A commit after every block: all that is looked at meanwhile is whole."""
    path, seen, answers = tmp_path / "store", set(), {}
    children.start(do="read", path=path, n=1000)
    while not children.is_done():
        if commit_of(path) is None:
            continue
        report = verify_store(path)
        assert report["ok"], report
        seen |= {sequence["tokens"] for sequence in report["sequences"]}
        with kvtier.offload(model, config()) as kv:
            book = kv.open(path)
            answers[book.get_seq_length()] = answer(kv, book)
    result = children.result()
    assert result["resumed_tokens"] == 0
    assert len(seen) > 2
    assert verify_store(path)["sequences"][0]["tokens"] == 1000
    n = max(length for length in answers if length % 32 == 0)
    write(tmp_path / "alone", model, prompt(1000), stop_after=n // 32)
    message, found = outcome(model, tmp_path / "alone")
    assert found == answers[n]
    assert f"the first {n} of the 1000 tokens of its text" in message
