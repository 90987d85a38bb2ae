"""A process that forks a child for each request, so that torch and transformers are imported once: for test_faults.py.

Requests are JSON lines on stdin: ``{"do": name of a function below, ...its arguments}``. To each belongs a JSON line on
stdout: what the function returned, ``{"error": class, "message": text}``, or ``{"signal": n}`` if the child was killed.
With ``"background": true`` the next request does not wait for the child to end. With ``"kill_at": n`` the child kills
itself when it is about to change the disk for the n-th time, with ``"kill_after_s": t`` it is killed at that moment.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zarr  # noqa: F401  (once, here)
from models import prompt, settings, tiny_llama

import kvtier
from kvtier import durable
from kvtier.runtime import direct_io

QUESTION = prompt(9, seed=1)


def config(path=None, *, dtype="auto", mode="durable", host="16MiB", disk="64MiB"):
    """Of a block with a store at ``path``; without one the same chunks go to the host alone."""
    budget, store = {"gpu": "16MiB", "host": host}, {"dtype": dtype}
    if path is not None:
        budget["disk"], store = disk, store | {"path": path, "mode": mode}
    return settings(select=3, budget=budget, store=store)


def answer(kv, book):
    out = kv.model.generate(QUESTION, past_key_values=book.fork(), max_new_tokens=8, do_sample=False)
    return out[0, QUESTION.shape[1] :].tolist()


# -- what is done in a child -------------------------------------------------------------------------------------------


def read(path, n, **other):
    """Read ``n`` tokens durably; what follows them, and how many were there."""
    durable.FIRST_COMMIT_SECONDS, durable.COMMIT_SHARE = 0, 1e9  # a commit after every block
    with kvtier.offload(tiny_llama(), config(path, **other)) as kv:
        book = kv.prefill(prompt(n))
        return {"answer": answer(kv, book), "events": Events.n, **kv.stats()["prefill"]}


def open_saved(path, **other):
    """Open the only sequence, as a reader."""
    with kvtier.offload(tiny_llama(), config(**other)) as kv:
        book = kv.open(path)
        return {"answer": answer(kv, book), "tokens": book.get_seq_length()}


def hold(path, until):
    """Be the writer of a store until the file ``until`` is there."""
    with kvtier.offload(tiny_llama(), config(path)):
        _answer({"pid": os.getpid()})
        while not Path(until).exists():
            time.sleep(0.01)


# -- moments at which it can be killed ---------------------------------------------------------------------------------


class Events:
    """Counts what changes the disk, in all threads; about to do the ``kill_at``-th, the process kills itself.

    Half of the times a part of it is done: some bytes of a write, some records of a batch.
    """

    n = 0
    kill_at: int | None = None
    part: float | None = None

    @classmethod
    def happens(cls, do_part: Callable[[float], object]) -> None:
        cls.n += 1
        if cls.n - 1 == cls.kill_at:
            try:
                if cls.part is not None:
                    do_part(cls.part)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)

    @classmethod
    def watch(cls) -> None:
        pwrite, write = os.pwrite, direct_io.RecordIO.write

        def watched_pwrite(fd, data, offset):
            def some(part):  # whole pages of the file: the kernel heeds a kill between them
                end = (offset + int(part * len(data))) // 4096 * 4096
                pwrite(fd, bytes(data)[: max(0, end - offset)], offset)

            cls.happens(some)
            return pwrite(fd, data, offset)

        def watched_write(io, files, which, offsets, payload):
            def some(part):
                n = int(part * len(which))
                write(io, files, which[:n], offsets[:n], payload[:n])

            cls.happens(some)
            write(io, files, which, offsets, payload)

        os.pwrite, direct_io.RecordIO.write = watched_pwrite, watched_write
        for name in ("ftruncate", "mkdir", "rename", "replace", "rmdir", "unlink"):
            setattr(os, name, cls._watched(getattr(os, name)))
        for name in ("fsync", "fdatasync"):  # what a killed process wrote is there, synced or not
            setattr(os, name, cls._watched(lambda fd: None))

    @classmethod
    def _watched(cls, call):
        def watched(*arguments, **keywords):
            cls.happens(lambda part: call(*arguments, **keywords))
            return call(*arguments, **keywords)

        return watched


# -- requests ----------------------------------------------------------------------------------------------------------


def _answer(content):
    print(json.dumps(content), flush=True)


def _child(do, kill_at, seed, arguments):
    generator = random.Random(seed)
    Events.kill_at = kill_at
    Events.part = generator.choice([None, generator.random()])
    Events.watch()
    try:
        return globals()[do](**arguments)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def _fork(do, kill_at, seed, arguments):
    """Process id of a child, and the descriptor from which its result is read."""
    mine, its = os.pipe()
    pid = os.fork()
    if pid:
        os.close(its)
        return pid, mine
    try:
        os.write(its, json.dumps(_child(do, kill_at, seed, arguments)).encode())
    finally:
        os._exit(0)


def serve():
    torch.set_num_threads(1)
    background = []
    for line in sys.stdin:
        request = json.loads(line)
        after, in_background = request.pop("kill_after_s", None), request.pop("background", False)
        pid, results = _fork(request.pop("do"), request.pop("kill_at", None), request.pop("seed", 0), request)
        if in_background:
            background.append(pid)
            continue
        if after is not None:
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(results, "rb") as file:
            result = file.read()
        _answer({"signal": -code} if code < 0 else json.loads(result))
    for pid in background:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    serve()
