"""The disk tier against the device: batches of records read and shards appended, as shares of the best raw path.

``store-read-64``: ``StoreTier.get`` of 64 random records, not in the page cache, against the fastest of three ways to
read as many records of the same files into page-aligned memory: a loop of preadv with O_DIRECT; posix_fadvise(WILLNEED)
for all, then preadv; four threads of preadv with O_DIRECT. ``-busy``: while another Python thread computes. The ways
are interleaved in random order, each time with other records; medians.

``store-append``: shards of 16 MiB, allocated before, filled and made durable by ``ShardFiles`` one after the other,
against one O_DIRECT pwritev and fdatasync for each. ``store-append-put``: ``StoreTier.put`` of as much, which creates
each shard, publishes it to zarr readers and makes nothing durable, against creating and allocating such files and
writing each with O_DIRECT in one call.

``value`` is our throughput over that of the best raw path, ``ceiling`` the raw path's in GB/s. Run it alone:
``python -m pytest bench/bench_tiers.py``. Data, at most 1.2 GiB at once, go to a folder in KVTIER_BENCH_DIR (or the
system's temporary folder) and are removed.
"""

import os
import queue
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtier.runtime.budget import Budget
from kvtier.runtime.shards import ShardFiles, ShardLayout
from kvtier.runtime.slot_tier import as_bytes
from kvtier.runtime.store import StoreTier
from kvtier.runtime.tier import Ids

STORED_BYTES = 2**30
APPENDED_BYTES = 256 * 2**20
PIECE_BYTES = 16 * 2**20
N_RECORDS = 64
ROUNDS = 15
HEAD_DIM = 128
CHUNK_TOKENS = {"": 512, "-64k": 128, "-8k": 16}
"""By what the case's name ends with; bfloat16: records of 256, 64 and 8 KiB."""

Read = Callable[[Ids], torch.Tensor]
"""Reads records into memory [64, bytes]."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("KVTIER_BENCH_DIR")) as name:
        yield Path(name)


def aligned(nbytes: int) -> torch.Tensor:
    """Memory that O_DIRECT takes, in huge pages (numpy asks for them)."""
    memory = np.empty(max(nbytes, 2**22) + 2**21, np.uint8)
    memory.fill(1)
    begin = -memory.ctypes.data % 2**21
    return torch.from_numpy(memory[begin : begin + nbytes])


@contextmanager
def busy_thread(wanted: bool) -> Iterator[None]:
    done = threading.Event()

    def spin() -> None:
        while not done.is_set():
            pass

    thread = threading.Thread(target=spin)
    if wanted:
        thread.start()
    yield
    done.set()
    if wanted:
        thread.join()


class RawReads:
    """Three ways to read records of a store's files, which are open already."""

    def __init__(self, store: StoreTier) -> None:
        shards = [store._shards.file_of(i) for i in range(store._shards.n_shards)]
        self._direct = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in shards]
        self.buffered = [os.open(path, os.O_RDONLY) for path in shards]
        self._store = store
        self._size = store._layout.record_bytes
        self._memory = aligned(N_RECORDS * self._size).reshape(N_RECORDS, self._size)
        self._view = memoryview(self._memory.numpy().reshape(-1))
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        for _ in range(4):
            threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        for _ in range(4):
            self._tasks.put(None)
        for fd in (*self._direct, *self.buffered):
            os.close(fd)

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _requests(self, slots: Ids, fds: list[int]) -> list[tuple[int, memoryview, int]]:
        shards, inside = np.divmod(slots, self._store._layout.n_records)
        parts = [self._view[i * self._size : (i + 1) * self._size] for i in range(len(slots))]
        numbers = zip(shards.tolist(), inside.tolist(), strict=True)
        return [(fds[s], part, i * self._size) for part, (s, i) in zip(parts, numbers, strict=True)]

    def plain(self, slots: Ids) -> torch.Tensor:
        for fd, part, offset in self._requests(slots, self._direct):
            os.preadv(fd, [part], offset)
        return self._memory

    def willneed(self, slots: Ids) -> torch.Tensor:
        requests = self._requests(slots, self.buffered)
        for fd, _, offset in requests:
            os.posix_fadvise(fd, offset, self._size, os.POSIX_FADV_WILLNEED)
        for fd, part, offset in requests:
            os.preadv(fd, [part], offset)
        return self._memory

    def threads(self, slots: Ids) -> torch.Tensor:
        requests = iter(self._requests(slots, self._direct))
        finished: queue.SimpleQueue[None] = queue.SimpleQueue()

        def work() -> None:
            for fd, part, offset in requests:
                os.preadv(fd, [part], offset)
            finished.put(None)

        for _ in range(4):
            self._tasks.put(work)
        for _ in range(4):
            finished.get()
        return self._memory


def fill(store: StoreTier) -> int:
    """Chunks until the store is full, chunk i in slot i and its number in its first bytes; how many."""
    n, step = STORED_BYTES // store._layout.record_bytes, PIECE_BYTES // store._layout.record_bytes
    chunks = torch.randint(0, 256, (step, store._layout.payload_bytes), dtype=torch.uint8)
    for begin in range(0, n, step):
        chunks[:, :8] = torch.arange(begin, begin + step).view(torch.uint8).reshape(step, 8)
        store.put(np.arange(begin, begin + step), chunks.view(torch.bfloat16).reshape(step, *store._shape))
    assert (store._map.slots_of(np.arange(n)) == np.arange(n)).all()
    return n


def median_seconds(ways: dict[str, Read], n_stored: int, cached: list[int]) -> dict[str, float]:
    """Of each way to read 64 random records."""
    rng = np.random.default_rng()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name in rng.permutation(list(ways)).tolist():
            slots = rng.choice(n_stored, N_RECORDS, replace=False)
            for fd in cached:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            memory = ways[name](slots)
            if turn > 0:  # the first opens files and touches memory
                seconds[name].append(time.perf_counter() - begin)
            assert memory[:, :8].contiguous().view(torch.int64).reshape(-1).tolist() == slots.tolist()
    return {name: statistics.median(values) for name, values in seconds.items()}


def keep(figures: Any, benchmark: Any, case: str, nbytes: int, seconds: dict[str, float]) -> None:
    best = min((name for name in seconds if name != "ours"), key=seconds.__getitem__)
    row = {
        "case": case,
        "value": round(seconds[best] / seconds["ours"], 3),
        "unit": "of the best raw path",
        "ceiling": round(nbytes / seconds[best] / 1e9, 3),
        "ceiling_unit": "GB/s",
        "baseline": best,
        "milliseconds": {name: round(value * 1e3, 2) for name, value in seconds.items()},
    }
    benchmark.extra_info.update(row)
    figures["tiers"].append(row)
    print(f"\n{case}: {row['value']} of {row['ceiling']} GB/s ({best}); ms {row['milliseconds']}")


@pytest.mark.parametrize("size", CHUNK_TOKENS)
def bench_store_read(benchmark: Any, figures: Any, folder: Path, size: str) -> None:
    budget = Budget("disk", STORED_BYTES + STORED_BYTES // 8)
    store = StoreTier(folder, budget, CHUNK_TOKENS[size], HEAD_DIM, torch.bfloat16)
    n_stored = fill(store)
    raw = RawReads(store)
    out = torch.empty((N_RECORDS, *store._shape), dtype=torch.bfloat16)

    def ours(slots: Ids) -> torch.Tensor:
        store.get(slots, out)
        return out.flatten(1).view(torch.uint8)

    ways: dict[str, Read] = {"ours": ours, "plain": raw.plain, "willneed": raw.willneed, "threads": raw.threads}

    def measure() -> None:
        for name in ("", "-busy"):
            with busy_thread(bool(name)):
                seconds = median_seconds(ways, n_stored, raw.buffered)
            keep(figures, benchmark, f"store-read-64{size}{name}", N_RECORDS * store._layout.record_bytes, seconds)

    benchmark.pedantic(measure, rounds=1)
    raw.close()
    store.close()


def append_shards(folder: Path, chunks: torch.Tensor) -> float:
    """Seconds until APPENDED_BYTES are durable in shards that exist."""
    payload = as_bytes(chunks)
    folder.mkdir()
    shards = ShardFiles(folder, ShardLayout.fit(payload.shape[1], 2**40))
    n_shards, n_records = APPENDED_BYTES // PIECE_BYTES, shards.layout.n_records
    for i in range(n_shards):
        shards.add()
        shards._io.sync(shards.file_of(i))
    begin = time.perf_counter()
    for i in range(n_shards):
        shards.write(np.arange(i * n_records, (i + 1) * n_records), payload[:n_records])
        shards._io.sync(shards.file_of(i))
    seconds = time.perf_counter() - begin
    shards.close()
    shutil.rmtree(folder)
    return seconds * len(chunks) / n_records  # the index takes the room of a record


def append_store(folder: Path, chunks: torch.Tensor) -> float:
    """Seconds of putting APPENDED_BYTES into a new store."""
    store = StoreTier(folder, Budget("disk", 2 * APPENDED_BYTES), chunks.shape[2], HEAD_DIM, chunks.dtype)
    store.put(np.array([0]), chunks[:1])  # opens what is opened once
    begin = time.perf_counter()
    for first in range(1, 1 + APPENDED_BYTES // PIECE_BYTES * len(chunks), len(chunks)):
        store.put(np.arange(first, first + len(chunks)), chunks)
    seconds = time.perf_counter() - begin
    store.close()
    return seconds


def raw_shards(folder: Path, piece: torch.Tensor) -> float:
    """Seconds until as much is durable in files that exist."""
    view = memoryview(piece.numpy())
    fds = [create_file(folder, i) for i in range(APPENDED_BYTES // PIECE_BYTES)]
    for fd in fds:
        os.fsync(fd)
    begin = time.perf_counter()
    for fd in fds:
        assert os.pwritev(fd, [view], 0) == PIECE_BYTES
        os.fdatasync(fd)
    seconds = time.perf_counter() - begin
    for fd in fds:
        os.close(fd)
    shutil.rmtree(folder)
    return seconds


def raw_store(folder: Path, piece: torch.Tensor) -> float:
    """Seconds of writing as much to new files."""
    view = memoryview(piece.numpy())
    begin = time.perf_counter()
    for i in range(APPENDED_BYTES // PIECE_BYTES):
        fd = create_file(folder, i)
        assert os.pwritev(fd, [view], 0) == PIECE_BYTES
        os.close(fd)
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder)
    return seconds


def create_file(folder: Path, i: int) -> int:
    folder.mkdir(exist_ok=True)
    fd = os.open(folder / str(i), os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
    os.posix_fallocate(fd, 0, PIECE_BYTES)
    return fd


def bench_store_append(benchmark: Any, figures: Any, folder: Path) -> None:
    piece = aligned(PIECE_BYTES)
    piece.random_(0, 256)
    chunks = piece.view(torch.bfloat16).reshape(-1, 2, CHUNK_TOKENS[""], HEAD_DIM)

    def measure() -> None:
        cases = (("store-append", append_shards, raw_shards), ("store-append-put", append_store, raw_store))
        for case, ours, raw in cases:
            seconds: dict[str, list[float]] = {"ours": [], "pwritev": []}
            for _ in range(ROUNDS):
                seconds["ours"].append(ours(folder / "ours", chunks))
                seconds["pwritev"].append(raw(folder / "raw", piece))
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            keep(figures, benchmark, case, APPENDED_BYTES, medians)

    benchmark.pedantic(measure, rounds=1)
