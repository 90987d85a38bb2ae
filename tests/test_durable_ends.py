"""However a durable reading ends: what was committed is there, nobody is locked out, nothing stays open."""

import gc
import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import tiny_llama
from session_cases import (
    BOOK,
    MORE,
    QUESTION,
    Stop,
    assert_continues,
    config,
    continued,
    kept,
    logits_of,
    open_files,
    quicken,
    read,
    says_it_is_short,
)

import kvtier
from kvtier import durable
from kvtier.runtime import committer, library
from kvtier.runtime.library import Library
from kvtier.runtime.recorder import Recorder
from kvtier.runtime.sequence_files import SequenceFiles

pytestmark = pytest.mark.usefixtures("commits_always")


# -- a device that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 9])
def test_an_error_of_the_recorder_ends_the_reading_and_no_more(k, store, model, right, monkeypatch):
    write, calls = SequenceFiles.write_records, []

    def fails(files, *arguments):
        assert threading.current_thread().name == "kvtier-recorder"
        calls.append(1)
        if len(calls) >= k:
            time.sleep(0.3)  # the next layer's chunks are waiting by then, if they are not those of a block's last
            raise kvtier.StoreError("the device is full")
        write(files, *arguments)

    with kvtier.offload(model, kept(store)) as kv:
        with monkeypatch.context() as patch:
            patch.setattr(SequenceFiles, "write_records", fails)
            with pytest.raises(kvtier.StoreError, match="the device is full"):
                kv.prefill(BOOK)
        assert len(calls) == k  # it does not go on after an error
        entry = Library(store).entry()
        assert not entry.commit.complete
        with says_it_is_short(entry.tokens):
            book = kv.open(store)
        assert book.get_seq_length() == entry.tokens < 220
        logits_of(model, QUESTION, book)
        book, *tokens = read(kv)
        assert tokens == [entry.tokens, 220 - entry.tokens]
        assert_continues(continued(kv, book), right)


def test_an_error_of_the_last_batch_is_raised_by_the_last_commit(store, model, monkeypatch):
    settle = Recorder.settle

    def late(recorder, wait):  # as if the thread had got round to nothing before
        if wait:
            settle(recorder, True)

    monkeypatch.setattr(durable, "FIRST_COMMIT_SECONDS", 1e9)
    monkeypatch.setattr(Recorder, "settle", late)
    monkeypatch.setattr(SequenceFiles, "write_records", lambda *arguments: 1 / 0)
    with kvtier.offload(model, kept(store)) as kv:
        with pytest.raises(ZeroDivisionError):
            kv.prefill(BOOK[:, :60])
        assert Library(store).entries() == []


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("step", ["write_commit", "sync", "publish"])
def test_a_commit_that_fails_leaves_the_one_before(step, k, store, model, right, monkeypatch):
    """Whatever it has written by then: windows are written in turn, all else beyond what counts."""
    owner = committer if step == "write_commit" else SequenceFiles
    do, calls = getattr(owner, step), []

    def fails(*arguments, **more):
        calls.append(1)
        if len(calls) == k:
            raise OSError(28, "No space left on device")
        do(*arguments, **more)

    with kvtier.offload(model, kept(store)) as kv:
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, fails)
            with pytest.raises(kvtier.StoreError, match=r"cannot be written: .*No space left"):
                kv.prefill(BOOK)
        committed = k if step == "publish" else k - 1
        there = [entry.tokens for entry in Library(store).entries()]
        assert there == ([[32, 64, 96, 128, 160, 192, 211, 219, 220][committed - 1]] if committed else [])
        if committed:
            with says_it_is_short(there[0]):
                assert kv.open(store).get_seq_length() == there[0]
        book, *tokens = read(kv)
        assert tokens == [sum(there), 220 - sum(there)]
        assert_continues(continued(kv, book), right)


def test_a_full_device_while_files_are_made(store, model, monkeypatch):
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    with kvtier.offload(model, kept(store)) as kv:
        with monkeypatch.context() as patch:
            patch.setattr(SequenceFiles, "create", fails)
            message = f"{store} cannot be written: .*No space left on device. What was committed before is intact"
            with pytest.raises(kvtier.StoreError, match=message):
                kv.prefill(BOOK)
        assert read(kv)[1:] == (0, 220)


# -- readers and writers -----------------------------------------------------------------------------------------------

READER = """
import json, sys, kvtier
from models import tiny_llama
from session_cases import QUESTION, config
model = tiny_llama()
print("ready", flush=True)
for line in sys.stdin:
    with kvtier.offload(model, config()) as kv:
        book = kv.open(sys.argv[1])
        n = book.get_seq_length()
        out = model.generate(QUESTION, past_key_values=book, max_new_tokens=6, do_sample=False)
    print(json.dumps([n, out[0].tolist()]), flush=True)
"""


def test_another_process_opens_what_is_committed_while_the_writer_goes_on(store, model, right, monkeypatch):
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    after, asked = durable._Writing._after_block, []

    def ask(writing, done):
        after(writing, done)
        if done in (32, 160, 220):
            process.stdin.write("open\n")
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 120)[0]
            asked.append((done, json.loads(process.stdout.readline())))

    command = [sys.executable, "-c", READER, str(store)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            monkeypatch.setattr(durable._Writing, "_after_block", ask)
            with kvtier.offload(model, kept(store)) as kv:
                assert_continues(continued(kv, kv.prefill(BOOK)), right)
        finally:
            process.kill()
    assert [done for done, _ in asked] == [n for _, (n, _) in asked] == [32, 160, 220]
    for done, (_, tokens) in asked:
        with kvtier.offload(model, config()) as kv:
            cache = kv.new_cache()
            with pytest.raises(Stop):
                kv.feed(cache, BOOK, torch.ones_like(BOOK, dtype=torch.bool), logits_to_keep=1, on_block=stop_at(done))
            out = model.generate(QUESTION, past_key_values=cache, max_new_tokens=6, do_sample=False)
            assert out[0].tolist() == tokens


def stop_at(n):
    def on_block(done):
        if done == n:
            raise Stop

    return on_block


def test_a_block_is_the_writer_until_it_ends(store, model):
    with kvtier.offload(model, kept(store)) as kv:
        book = kv.prefill(BOOK)
        with (
            pytest.raises(kvtier.StoreError, match=rf"process {os.getpid()} is writing to {store}"),
            kvtier.offload(tiny_llama(), kept(store)),
        ):
            pass
        with kvtier.offload(tiny_llama(), config()) as other:
            logits_of(other.model, QUESTION, other.open(store))
            with pytest.raises(kvtier.StoreError, match="is writing to"):
                other.prefill(MORE).save(store)
        book.save(store)  # which is its own writer
    with kvtier.offload(tiny_llama(), kept(store)):
        pass
    with pytest.raises(Stop), kvtier.offload(model, kept(store)):
        raise Stop
    with Library(store).writing():
        pass


def test_a_store_that_cannot_be_used_leaves_the_model_as_it_was(store, model, monkeypatch):
    def fails(*arguments):
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(library.fcntl, "flock", fails)
        with pytest.raises(kvtier.StoreError, match="No locks available"), kvtier.offload(model, kept(store)):
            pass
    shutil.rmtree(store, ignore_errors=True)
    with kvtier.offload(model, kept(store)) as kv:
        assert read(kv, MORE)[1:] == (0, 61)


# -- threads, files and time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["normally", "interrupted", "never committed", "the recorder fails", "the last commit fails"]
)
def test_nothing_stays_open(how, store, model, stop, monkeypatch):
    with kvtier.offload(model, kept(store)):  # zarr has what it opens once
        descriptors = len(os.listdir("/proc/self/fd"))
    if how == "interrupted":
        stop(5)
    if how == "never committed":
        stop(7)
        monkeypatch.setattr(durable, "FIRST_COMMIT_SECONDS", 1e9)
        monkeypatch.setattr(Recorder, "settle", lambda recorder, wait: None)  # nor told that anything was written
    if how == "the recorder fails":
        monkeypatch.setattr(SequenceFiles, "write_records", lambda *arguments: 1 / 0)
    if how == "the last commit fails":
        monkeypatch.setattr(durable.Committer, "_charge", lambda *arguments: 1 / 0)
    try:
        with kvtier.offload(model, kept(store)) as kv:
            book = kv.prefill(BOOK)
            logits_of(model, QUESTION, book)
            assert our_threads() == []  # the recorder ends with the reading
            assert open_files(store / "sequences") != []
    except (Stop, ZeroDivisionError):
        assert how != "normally"
    else:
        assert how == "normally"
    gc.collect()
    assert our_threads() == []
    assert open_files(store) == []
    with kvtier.offload(model, kept(store)):
        assert len(os.listdir("/proc/self/fd")) == descriptors


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("kvtier")]


def test_beginnings_leave_no_file_open(store, model):
    """The window is made from chunks before anything refers to their files, and what then follows can fail."""
    with kvtier.offload(model, kept(store)) as kv:
        kv.prefill(BOOK)
        for n in (60, 150):
            kv.prefill(BOOK[:, :n])
        kv.stats()
        assert open_files(store / "sequences") == []
        codes = Library(store).entries()[0].path / "codes" / "codes" / "c.0.0.0.0.0"
        codes.write_bytes(b"1" + codes.read_bytes()[1:])
        with pytest.raises(kvtier.StoreError, match="codes of chunk 0"):
            kv.prefill(BOOK[:, :180])
        gc.collect()
        kv.stats()
        assert open_files(store / "sequences") == []


def test_commits_take_a_small_share_of_the_time(store, model, monkeypatch):
    """By a clock on which a block takes a second and a commit 0.2 s."""
    monkeypatch.undo()
    quicken(monkeypatch)
    assert (durable.FIRST_COMMIT_SECONDS, durable.COMMIT_SHARE) == (1.0, 0.05)
    now, commits, after, commit = [0.0], [], durable._Writing._after_block, durable.Committer.commit

    def block(writing, done):
        now[0] += 1.001
        after(writing, done)

    def slow(committer, sequence, *, complete):
        now[0] += 0.2
        commit(committer, sequence, complete=complete)
        commits.append(sequence.length)

    monkeypatch.setattr(durable, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(durable._Writing, "_after_block", block)
    monkeypatch.setattr(durable.Committer, "commit", slow)
    with kvtier.offload(model, kept(store)) as kv:
        kv.prefill(BOOK)
    assert commits == [32, 160, 220, 220]  # after 1 s, when 20 times a commit's time has passed, and at the end
