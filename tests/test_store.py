"""What the disk tier does beyond the contract: files that zarr reads, errors of paths and devices, scratch."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from tier_contract import CHUNK, DTYPES, HEAD_DIM, empty_chunks, random_chunks, same_bits

from kvtier.kernels.quantize import quantize_chunks
from kvtier.runtime import direct_io, direct_lanes, shards
from kvtier.runtime.budget import Budget
from kvtier.runtime.errors import BudgetError, StoreError
from kvtier.runtime.shards import ShardLayout
from kvtier.runtime.store import StoreTier

ROOT = Path(__file__).parents[1]
MIB = 2**20


def open_store(path: Path, limit_bytes: int = 4 * MIB, dtype: torch.dtype = torch.float32) -> StoreTier:
    return StoreTier(path, Budget("disk", limit_bytes), CHUNK, HEAD_DIM, dtype)


@pytest.fixture
def system_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records go through os.preadv and os.pwritev, which a test can replace."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSYS, "no native AIO in this test")

    monkeypatch.setattr(direct_lanes, "syscall", refuse)
    monkeypatch.setattr(direct_io, "_tell_once", lambda *_: None)


def bytes_on_disk(folder: Path) -> int:
    paths = [folder, *folder.rglob("*")]
    return sum(max(path.stat().st_blocks * 512, path.stat().st_size) for path in paths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zarr_reads_every_byte_of_every_record(tmp_path: Path, dtype: torch.dtype) -> None:
    store = open_store(tmp_path, dtype=dtype)
    chunks = random_chunks(300, dtype)
    ids = np.random.default_rng(0).permutation(300)
    for part in np.array_split(np.arange(300), 4):
        store.put(ids[part], chunks[torch.from_numpy(part)])
    root = zarr.open_group(tmp_path, mode="r")
    assert dict(root.attrs) == {"kvtier": {"version": 1}}
    [(_, group)] = list(root.groups())
    attributes = group.attrs["kvtier"]
    assert isinstance(attributes, dict)
    assert attributes["dtype"] == str(dtype).removeprefix("torch.")
    assert (attributes["version"], attributes["chunk"], attributes["head_dim"]) == (1, CHUNK, HEAD_DIM)
    array = group["kv"]
    assert isinstance(array, zarr.Array)
    records = np.asarray(array[:])
    payload = chunks.flatten(1).view(torch.uint8).numpy()
    slots = store._map.slots_of(ids)
    assert (records[slots, : payload.shape[1]] == payload).all()
    assert (records[slots, payload.shape[1] :] == 0).all()
    never_written = np.setdiff1d(np.arange(len(records)), slots)
    assert (records[never_written] == 0).all()
    store.close()


def test_layout_of_a_shard_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    chunks = random_chunks(200, torch.float32)
    store.put(np.arange(200), chunks)
    n_records = store._layout.n_records
    encoded = (store.scratch / "kv" / "c" / "1" / "0").read_bytes()
    assert len(encoded) == n_records * (4096 + 16) + 4
    assert encoded[:4096] == chunks[n_records].numpy().tobytes()
    index, checksum = encoded[n_records * 4096 : -4], encoded[-4:]
    expected = [[i * 4096, 4096] for i in range(n_records)]
    assert np.frombuffer(index, "<u8").reshape(-1, 2).tolist() == expected
    assert int.from_bytes(checksum, "little") == google_crc32c.value(index)
    metadata = json.loads((store.scratch / "kv" / "zarr.json").read_text())
    [sharding] = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["index_location"] == "end"
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes"]
    assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    assert metadata["shape"] == [store._shards.n_shards * n_records, 4096]
    store.close()


@pytest.mark.parametrize("limit_bytes", [100_000, 300_000, MIB, 7 * MIB])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_files_never_exceed_the_budget(tmp_path: Path, limit_bytes: int, dtype: torch.dtype) -> None:
    store = open_store(tmp_path / "store", limit_bytes, dtype)
    n = store.room()
    store.put(np.arange(n), random_chunks(n, dtype))
    assert store.room() == 0
    assert bytes_on_disk(tmp_path / "store") <= store.used_bytes <= limit_bytes
    assert n * store.chunk_bytes <= limit_bytes
    store.close()


def test_small_budgets_are_used_and_large_ones_have_large_shards() -> None:
    for limit_bytes in (MIB, 10 * MIB, 200 * MIB):
        layout = ShardLayout.fit(8192, limit_bytes)
        usable = limit_bytes // layout.disk_bytes * layout.n_records * 8192
        assert usable > 0.8 * limit_bytes
    assert ShardLayout.fit(16384, 300 * 2**30).n_records > 1000
    assert ShardLayout.fit(64 * MIB, 2**30).n_records == 1


def test_budget_below_the_metadata(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"\[budget\] disk = 9.77 KiB"):
        open_store(tmp_path, 10_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_device_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = open_store(tmp_path)
    n = store._layout.n_records
    chunks = random_chunks(n + 1, torch.float32)
    store.put(np.arange(n), chunks[:n])
    used_bytes, files = store.used_bytes, sorted(tmp_path.rglob("*"))

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError) as caught:
            store.put(np.array([n]), chunks[n:])
    for part in (str(store.scratch), "were needed", "are free", "Nothing stored is damaged", "lower [budget] disk"):
        assert part in str(caught.value)
    assert (store.used_bytes, store.budget.used_bytes, len(store)) == (used_bytes, used_bytes, n)
    assert sorted(tmp_path.rglob("*")) == files
    out = empty_chunks(n + 1, torch.float32)
    store.get(np.arange(n), out[:n])
    store.put(np.array([n]), chunks[n:])  # space was made
    store.get(np.array([n]), out[n:])
    assert same_bits(out, chunks)
    store.close()


def test_metadata_that_cannot_be_written_undoes_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    used_bytes, files = store.used_bytes, sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: os.close(-1))
        with pytest.raises(StoreError, match=r"zarr.json cannot be written"):
            store.put(np.arange(1), random_chunks(1, torch.float32))
    assert (store.used_bytes, len(store)) == (used_bytes, 0)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "c"] == files
    store.put(np.arange(1), random_chunks(1, torch.float32))
    store.close()


def put_second(store: StoreTier, chunks: torch.Tensor) -> None:
    store.put(np.array([1]), chunks[1:])


def get_first(store: StoreTier, chunks: torch.Tensor) -> None:
    store.get(np.array([0]), torch.empty_like(chunks[:1]))


@pytest.mark.usefixtures("system_calls")
@pytest.mark.parametrize(("call", "transfer"), [("pwritev", put_second), ("preadv", get_first)])
def test_device_errors_name_the_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    transfer: Callable[[StoreTier, torch.Tensor], None],
) -> None:
    store = open_store(tmp_path)
    chunks = random_chunks(2, torch.float32)
    store.put(np.array([0]), chunks[:1])
    before = (store.used_bytes, store.counters.bytes_read, store.counters.bytes_written)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, broken)
        with pytest.raises(StoreError, match=r"kv/c/0/0 cannot be .*Input/output error"):
            transfer(store, chunks)
    assert (store.used_bytes, store.counters.bytes_read, store.counters.bytes_written) == before
    assert store.has(np.arange(2)).tolist() == [True, False]
    store.put(np.array([1]), chunks[1:])
    out = empty_chunks(2, torch.float32)
    store.get(np.arange(2), out)
    assert same_bits(out, chunks)
    store.close()


def test_short_reads_are_errors(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put(np.arange(8), random_chunks(8, torch.float32))
    os.truncate(store.scratch / "kv" / "c" / "0" / "0", 3 * 4096 + 100)
    store.get(np.arange(3), empty_chunks(3, torch.float32))
    with pytest.raises(StoreError, match="100 of 4096 bytes"):
        store.get(np.array([3]), empty_chunks(1, torch.float32))
    store.close()


def test_path_errors_say_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file, expected a folder"):
        open_store(tmp_path / "file")
    with pytest.raises(StoreError, match=r"there is no folder .*missing"):
        open_store(tmp_path / "missing" / "store")
    with pytest.raises(StoreError, match="cannot be used"):
        open_store(Path("/proc/kvtier"))  # not even root can write there
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"zarr_format": 3, "node_type": "group", "attributes": {}}', "kvtier did not write"),
        ("not json", "kvtier did not write"),
        ('{"attributes": {"kvtier": {"version": 99}}}', "layout version 99"),
    ],
    ids=["foreign", "broken", "newer"],
)
def test_foreign_stores_are_left_alone(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "zarr.json").write_text(content)
    budget = Budget("disk", MIB)
    with pytest.raises(StoreError, match=reason):
        StoreTier(tmp_path, budget, CHUNK, HEAD_DIM, torch.float32)
    assert budget.used_bytes == 0
    assert [path.name for path in tmp_path.iterdir()] == ["zarr.json"]
    assert (tmp_path / "zarr.json").read_text() == content


def test_without_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(StoreError, match="pip install zarr"):
        open_store(tmp_path)


def test_importing_the_store_does_not_import_zarr() -> None:
    code = "import sys, kvtier.runtime.store; print([m for m in ('zarr', 'google_crc32c') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_close_leaves_an_empty_group(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new")
    store.put(np.arange(3), random_chunks(3, torch.float32))
    store.close()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["zarr.json"]
    assert list(zarr.open_group(tmp_path / "new", mode="r").members()) == []


HOLDER = """
import sys, numpy as np, torch
from kvtier.runtime.budget import Budget
from kvtier.runtime.store import StoreTier
store = StoreTier(sys.argv[1], Budget("disk", 2**20), 16, 32, torch.float32)
store.put(np.arange(2), torch.ones(2, 2, 16, 32))
print(store.scratch, flush=True)
sys.stdin.read()
"""


def test_stale_scratch_goes_and_live_scratch_stays(tmp_path: Path) -> None:
    here = open_store(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        scratch = Path(holder.stdout.readline().strip())
        open_store(tmp_path).close()
        assert (scratch / "kv" / "c" / "0" / "0").exists()  # of a live process
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    (tmp_path / "spill-1-half").mkdir()  # of a removal that was interrupted
    open_store(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [here.scratch.name, "zarr.json"]
    here.put(np.arange(1), random_chunks(1, torch.float32))
    here.close()


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 4096)
    monkeypatch.setattr(direct_io, "MAX_OPEN_FILES", 7)
    n_open = len(os.listdir("/proc/self/fd"))
    store = open_store(tmp_path, MIB)
    chunks = random_chunks(50, torch.float32)
    store.put(np.arange(50), chunks)
    assert store._shards.n_shards == 50
    out = empty_chunks(50, torch.float32)
    store.get(np.arange(50), out)
    assert same_bits(out, chunks)
    assert len(os.listdir("/proc/self/fd")) <= n_open + 7 + 1  # and the lock
    store.close()
    assert len(os.listdir("/proc/self/fd")) == n_open


@pytest.mark.usefixtures("system_calls")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_neighbours_are_read_and_written_in_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    store = open_store(tmp_path, 64 * MIB, dtype)
    assert store._shards.path_name != direct_io.AIO
    calls = []
    preadv, pwritev = os.preadv, os.pwritev

    def counted_read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(("read", sum(map(len, buffers))))
        return preadv(fd, buffers, offset)

    def counted_write(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(("write", sum(map(len, buffers))))
        return pwritev(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted_read)
    monkeypatch.setattr(os, "pwritev", counted_write)
    chunks = random_chunks(1000, dtype)
    store.put(np.arange(1000), chunks)
    order = np.random.default_rng(0).permutation(1000)
    out = empty_chunks(1000, dtype)
    store.get(order, out)
    assert same_bits(out, chunks[torch.from_numpy(order)])
    store.close()
    sizes = [1000 % 256 * 4096, MIB, MIB, MIB]  # 256 records a call
    assert sorted(calls) == [("read", size) for size in sizes] + [("write", size) for size in sizes]


# -- records that are not what was written ----------------------------------------------------------------------------


FORMS = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.float32, 8), (torch.float32, 4)]


def some_items(n: int, dtype: torch.dtype, bits: int | None, seed: int = 0) -> torch.Tensor:
    """Chunks, or records of so many ``bits``."""
    chunks = torch.randn(n, 2, CHUNK, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return chunks if bits is None else quantize_chunks(chunks, bits)


def read_ids(store: StoreTier, *ids: int) -> torch.Tensor:
    out = torch.empty((len(ids), *store._shape), dtype=store._dtype)
    store.get(np.array(ids), out)
    return out


class Shard:
    """The first file of a store; a record is 4096 bytes."""

    def __init__(self, store: StoreTier) -> None:
        self.path = store.scratch / "kv" / "c" / "0" / "0"

    def __getitem__(self, slot: int) -> bytes:
        return self.path.read_bytes()[slot * 4096 : (slot + 1) * 4096]

    def __setitem__(self, slot: int, record: bytes) -> None:
        assert len(record) == 4096
        with self.path.open("r+b") as file:
            file.seek(slot * 4096)
            file.write(record)


def flipped(record: bytes, bit: int) -> bytes:
    return bytes(byte ^ (1 << bit % 8) if i == bit // 8 else byte for i, byte in enumerate(record))


@pytest.mark.parametrize(("dtype", "bits"), FORMS, ids=str)
def test_one_flipped_bit_is_refused_wherever_it_is(tmp_path: Path, dtype: torch.dtype, bits: int | None) -> None:
    with contextlib.closing(StoreTier(tmp_path, Budget("disk", MIB), CHUNK, HEAD_DIM, dtype, bits)) as store:
        items = some_items(3, dtype, bits)
        store.put(np.arange(3), items)
        shard, end = Shard(store), 8 * store.item_bytes
        whole = shard[1]
        for bit in (0, end - 1, *np.random.default_rng(0).integers(0, end, 30).tolist()):
            shard[1] = flipped(whole, bit)
            with pytest.raises(StoreError, match=rf"{shard.path} holds other data at byte 4096 than were written"):
                read_ids(store, 1)
        for bit in range(end, 8 * 4096, 997):  # padding, which nobody reads
            shard[1] = flipped(whole, bit)
            assert same_bits(read_ids(store, 0, 1, 2), items)


def another(how: str, old: bytes, new: bytes, neighbour: bytes) -> bytes:
    """What is in the place of ``new``, which replaced ``old``."""
    torn = {"torn": new[:512] + old[512:], "torn the other way": old[:512] + new[512:]}
    return {"older": old, "neighbour": neighbour, "zeros": bytes(4096), **torn}[how]


@pytest.mark.parametrize("how", ["older", "neighbour", "zeros", "torn", "torn the other way"])
@pytest.mark.parametrize(("dtype", "bits"), FORMS, ids=str)
def test_another_record_in_its_place_is_refused(tmp_path: Path, dtype: torch.dtype, bits: int | None, how: str) -> None:
    with contextlib.closing(StoreTier(tmp_path, Budget("disk", MIB), CHUNK, HEAD_DIM, dtype, bits)) as store:
        old, items = some_items(3, dtype, bits, seed=1), some_items(3, dtype, bits, seed=2)
        store.put(np.arange(3), old)
        shard = Shard(store)
        older = shard[1]
        store.drop(np.arange(3))
        store.put(np.arange(3), items)
        whole, neighbour = shard[1], shard[2]
        shard[1] = another(how, older, whole, neighbour)
        before = (store.counters.bytes_read, store.coldest(3).tolist())
        refused = rf"{shard.path} holds other data at byte 4096 .*\(1 of 3 chunks read\).*None of these chunks was used"
        for _ in range(2):  # at every read
            with pytest.raises(StoreError, match=refused + ".*check the device.*read the text again"):
                read_ids(store, 2, 1, 0)
        assert (store.counters.bytes_read, store.coldest(3).tolist()) == before
        assert same_bits(read_ids(store, 0, 2), items[[0, 2]])
        shard[1] = whole
        assert same_bits(read_ids(store, 0, 1, 2), items)


def test_a_record_that_changes_after_its_first_read_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(open_store(tmp_path)) as store:
        items = some_items(1, torch.float32, None)
        store.put(np.arange(1), items)
        assert same_bits(read_ids(store, 0), items)
        shard = Shard(store)
        shard[0] = flipped(shard[0], 77)
        strided = torch.zeros(1, 2, CHUNK, 2 * HEAD_DIM)[..., ::2]
        for out in (torch.empty_like(items), strided):
            with pytest.raises(StoreError, match="holds other data at byte 0 "):
                store.get(np.arange(1), out)
        assert (strided == 0).all()


def test_a_write_that_never_arrives_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device says yes, and keeps what was there; in every shard."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * 4096)
    with contextlib.closing(open_store(tmp_path)) as store:
        old, items = some_items(10, torch.float32, None, seed=1), some_items(10, torch.float32, None, seed=2)
        store.put(np.arange(10), old)
        store.drop(np.arange(10))
        store.put(np.arange(5), items[:5])
        with monkeypatch.context() as patched:
            patched.setattr(direct_io.RecordIO, "write", lambda *_: None)
            store.put(np.arange(5, 10), items[5:])
        assert same_bits(read_ids(store, *range(5)), items[:5])
        for i in range(5, 10):
            with pytest.raises(StoreError, match="holds other data at byte"):
                read_ids(store, i)
        store.drop(np.arange(5, 10))
        store.put(np.arange(5, 10), items[5:])
        assert same_bits(read_ids(store, *range(10)), items)


def test_a_write_that_fails_leaves_no_checksum_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot goes to the next chunk, whose checksum counts."""
    with contextlib.closing(open_store(tmp_path)) as store:
        items = some_items(2, torch.float32, None)
        with monkeypatch.context() as patched:
            patched.setattr(direct_io.RecordIO, "write", lambda *_: os.close(-1))
            with pytest.raises(OSError, match="Bad file descriptor"):
                store.put(np.arange(1), items[:1])
        store.put(np.arange(1), items[1:])
        assert same_bits(read_ids(store, 0), items[1:])
