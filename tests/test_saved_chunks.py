"""Chunks in saved sequences: found by id, read in place, and files are open just as long as an id lies in them."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.runtime import sequence_files
from kvtier.runtime.budget import Budget
from kvtier.runtime.device_pool import DevicePool
from kvtier.runtime.errors import BudgetError, StoreError
from kvtier.runtime.host_pool import HostPool
from kvtier.runtime.recorder import Recorder
from kvtier.runtime.residency import Residency
from kvtier.runtime.saved import SavedChunks
from kvtier.runtime.sequence_files import SequenceFiles, SequenceLayout
from kvtier.runtime.slot_tier import as_bytes, item_format
from kvtier.runtime.tier import Ids

CHUNK, HEAD_DIM = 4, 8
PAYLOAD = 12


class Files:
    """Records whose bytes say which they are; never written."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = 0
        self.fails = False

    def record(self, chunk: int, layer: int, head: int) -> np.ndarray:
        return np.array([self.number, layer, head, *chunk.to_bytes(PAYLOAD - 3, "little")], np.uint8)

    def read_records(self, chunks: Ids, layers: Ids, heads: Ids, out: Any) -> None:
        assert not self.closed
        if self.fails:
            raise StoreError("the device has failed")
        for row, place in enumerate(zip(chunks.tolist(), layers.tolist(), heads.tolist(), strict=True)):
            out[row] = self.record(*place)

    def close(self) -> None:
        self.closed += 1


def refer(saved: SavedChunks, ids: Ids, files: Files, layer: int, first: int) -> dict[int, np.ndarray]:
    """As ``saved.refer``; the record that each id must give."""
    saved.refer(ids, files, layer, first)  # type: ignore[arg-type]
    return {int(ids[head, i]): files.record(first + i, layer, head) for head, i in np.ndindex(*ids.shape)}


def get(saved: SavedChunks, ids: Ids) -> np.ndarray:
    out = np.empty((len(ids), PAYLOAD), np.uint8)
    saved.get(ids, out)
    return out


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_references_match_a_dict(data: st.DataObject) -> None:
    saved = SavedChunks()
    files: list[Files] = []
    records: dict[int, np.ndarray] = {}
    owner: dict[int, Files] = {}
    n_read = 0
    for step in range(data.draw(st.integers(1, 15))):
        what = data.draw(st.sampled_from(["refer", "refer", "get", "drop"]))
        if what == "refer":
            heads, m = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
            free = np.random.default_rng(step).permutation(sorted(set(range(60)) - records.keys()))[: heads * m]
            if free.size < heads * m:
                continue
            alive = [f for f in files if not f.closed]
            if not alive or data.draw(st.booleans()):
                alive = [Files(len(files))]
                files += alive
            mine = refer(saved, free.reshape(heads, m), alive[-1], data.draw(st.integers(0, 9)), 1000 * step)
            records |= mine
            owner |= dict.fromkeys(mine, alive[-1])
        elif what == "get" and records:
            ids = np.array(data.draw(st.lists(st.sampled_from(sorted(records)), max_size=9)), np.int64)
            out = get(saved, ids)
            assert out.tolist() == [records[i].tolist() for i in ids.tolist()]
            n_read += len(ids)
        elif what == "drop":
            ids = np.array(data.draw(st.lists(st.integers(0, 99), max_size=30)), np.int64)
            saved.drop(ids)
            for i in ids.tolist():
                records.pop(i, None)
                owner.pop(i, None)
        assert np.flatnonzero(saved.has(np.arange(100))).tolist() == sorted(records)
        assert len(saved) == len(records)
        for i, number in enumerate(saved.file_of(np.arange(100)).tolist()):
            assert (number >= 0) == (i in records)
            assert number < 0 or saved.files(number) is owner[i]
        assert [f.closed for f in files] == [int(f not in owner.values()) for f in files]
        assert saved.counters.bytes_read == n_read * PAYLOAD
    saved.close()
    assert all(f.closed for f in files)
    assert len(saved) == 0
    saved.close()


def test_an_id_lies_in_one_sequence() -> None:
    saved, other = SavedChunks(), Files(1)
    refer(saved, np.array([[4, 7]]), Files(0), 0, 0)
    with pytest.raises(AssertionError, match="lies in a sequence already"):
        refer(saved, np.array([[9, 7]]), other, 0, 0)
    saved.drop(np.array([7]))
    refer(saved, np.array([[9, 7]]), other, 0, 0)
    assert saved.file_of(np.array([4, 7, 9, 5])).tolist() == [0, 1, 1, -1]


def test_a_file_that_fails_changes_nothing() -> None:
    saved, good, bad = SavedChunks(), Files(0), Files(1)
    records = refer(saved, np.array([[0, 1], [2, 3]]), good, 1, 5) | refer(saved, np.array([[4, 5]]), bad, 0, 0)
    bad.fails = True
    for _ in range(2):
        with pytest.raises(StoreError, match="has failed"):
            get(saved, np.arange(6))
    assert saved.has(np.arange(6)).all()
    assert saved.counters.bytes_read == 0
    assert get(saved, np.arange(4)).tolist() == [records[i].tolist() for i in range(4)]
    bad.fails = False
    assert get(saved, np.arange(6)).tolist() == [records[i].tolist() for i in range(6)]


# -- in files ----------------------------------------------------------------------------------------------------------


LAYERS, HEADS, SHARD = 2, 3, 4
BITS = [None, 8, 4]
CODES = {"mean": ((2,), torch.float32)}


@pytest.fixture(autouse=True)
def small_shards() -> Any:
    with patch.object(sequence_files, "SHARD_CHUNKS", SHARD):
        yield


def items_of(n: int, residency: Residency, seed: int = 0) -> torch.Tensor:
    return residency.pack(torch.randn(n, 2, CHUNK, HEAD_DIM, generator=torch.Generator().manual_seed(seed)))


def tiers(bits: int | None, host_chunks: int = 64, slots: int = 64) -> Residency:
    """Without a scratch store."""
    chunk = (CHUNK, HEAD_DIM, torch.float32)
    shape, dtype = item_format(*chunk, bits)
    size = torch.empty(shape, dtype=dtype).nbytes
    device = DevicePool(Budget("gpu", 2**20), slots, *chunk, "cpu")
    pool = HostPool(Budget("host", host_chunks * size), *chunk, pin=False, bits=bits)
    pool._chunks_per_slab = 1
    return Residency(device, pool, None, bits)


def files_in(folder: Path, residency: Residency, first: int = 0) -> SequenceFiles:
    folder.mkdir(exist_ok=True)
    layout = SequenceLayout(LAYERS, HEADS, residency.host.item_bytes, CODES, first)
    files = SequenceFiles(folder, layout)
    files.create()
    return files


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize("bits", BITS)
def test_records_are_read_in_place(tmp_path: Path, bits: int | None, first: int) -> None:
    """Of a sequence that begins, or that goes on from chunk 6 on; of several shards, in any order."""
    residency, m = tiers(bits, host_chunks=30), 2 * SHARD + 1
    files = files_in(tmp_path / "a", residency, first)
    items = torch.stack([items_of(m * HEADS, residency, layer).unflatten(0, (m, HEADS)) for layer in range(LAYERS)])
    for layer in range(LAYERS):
        files.write_records(layer, first, as_bytes(items[layer].flatten(0, 1)).reshape(m, HEADS, -1))
    files.sync()
    files.close()
    before = contents(tmp_path)
    ids = residency.new_saved(LAYERS * HEADS * m).reshape(LAYERS, HEADS, m)
    again = SequenceFiles(tmp_path / "a", files.layout)
    for layer in range(LAYERS):
        residency.saved.refer(ids[layer], again, layer, first)
    by_id = items.transpose(1, 2).flatten(0, 2)
    random = np.random.default_rng(0)
    for part in np.array_split(random.permutation(ids.size), 5):
        assert torch.equal(residency.read(ids.ravel()[part]), by_id[torch.from_numpy(part)])
    for _ in range(3):  # from the disk, from the disk and to the host, from host and disk
        for part in np.array_split(random.permutation(ids.size), 3):
            found = residency.device.data[torch.from_numpy(residency.fetch(ids.ravel()[part]))]
            assert torch.equal(found, residency._unpack(by_id[torch.from_numpy(part)]))
            residency.device.drop(ids.ravel())
    assert residency.host.counters.hits > 0
    residency.release(ids.ravel())
    assert contents(tmp_path) == before
    residency.close()


@pytest.mark.parametrize("bits", BITS)
def test_a_record_that_is_damaged_is_never_used(tmp_path: Path, bits: int | None) -> None:
    residency = tiers(bits)
    files = files_in(tmp_path / "a", residency)
    items = items_of(2 * HEADS, residency)
    files.write_records(1, 0, as_bytes(items).reshape(2, HEADS, -1))
    files.sync()
    files.close()
    path = next((tmp_path / "a" / "kv").glob("c.*"))
    data = bytearray(path.read_bytes())
    at = files.layout.shard.record_bytes * ((1 * SHARD + 1) * HEADS + 2)
    data[at + files.layout.payload_bytes - 1] ^= 1
    path.write_bytes(data)
    again = SequenceFiles(tmp_path / "a", files.layout)
    ids = residency.new_saved(2 * HEADS).reshape(HEADS, 2)
    residency.saved.refer(ids, again, 1, 0)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"holds other data than were written \(chunk 1, layer 1, KV head 2\)"):
            residency.fetch(ids.ravel())
        assert not residency.device.has(ids.ravel()).any()
    sound = ids.ravel()[:-1]
    expected = items.unflatten(0, (2, HEADS)).transpose(0, 1).flatten(0, 1)[:-1]
    assert torch.equal(residency.device.data[torch.from_numpy(residency.fetch(sound))], residency._unpack(expected))
    residency.close()


# -- written behind the scenes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_recorded_chunks_leave_a_full_host_without_another_write(tmp_path: Path, bits: int | None) -> None:
    """There is no scratch store: whatever leaves the host has been recorded, or it would be lost."""
    residency = tiers(bits, host_chunks=2 * HEADS)
    files = files_in(tmp_path / "a", residency)
    disk = Budget("disk", 2**20)
    recorder = Recorder(files, residency, disk)
    ids, items = [], []
    for chunk in range(10):
        for layer in range(LAYERS):
            items.append(items_of(HEADS, residency, 10 * chunk + layer))
            ids.append(residency.admit(items[-1]))
            recorder.add(layer, chunk, ids[-1].reshape(HEADS, 1), items[-1])
            assert residency.host.budget.used_bytes <= residency.host.budget.limit_bytes
    assert len(residency.saved) > 0
    recorder.settle(True)
    assert len(residency.saved) == 10 * LAYERS * HEADS
    assert residency.saved.counters.bytes_written == sum(item.nbytes for item in items)
    assert disk.used_bytes == 10 * LAYERS * HEADS * files.layout.shard.record_bytes
    recorder.close()
    assert torch.equal(residency.read(np.concatenate(ids)), torch.cat(items))
    for _ in range(2):  # nobody records these
        residency.admit(items_of(HEADS, residency))
    with pytest.raises(BudgetError, match=r"\[budget\] host"):
        residency.admit(items_of(HEADS, residency))
    assert torch.equal(residency.read(np.concatenate(ids)), torch.cat(items))
    residency.close()


def test_what_could_not_be_recorded_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    residency = tiers(4, host_chunks=2 * HEADS)
    files = files_in(tmp_path / "a", residency)
    recorder = Recorder(files, residency, None)
    items = items_of(HEADS, residency)
    with patch.object(SequenceFiles, "write_records", side_effect=StoreError("no space left")):
        ids = residency.admit(items)
        recorder.add(0, 0, ids.reshape(HEADS, 1), items)
        for call in (lambda: recorder.settle(True), lambda: residency.admit(items_of(2 * HEADS, residency))):
            with pytest.raises(StoreError, match="no space left"):
                call()
    assert len(residency.saved) == 0
    assert torch.equal(residency.read(ids), items)
    recorder.close()
    with pytest.raises(BudgetError, match=r"\[budget\] host"):
        residency.admit(items_of(2 * HEADS, residency))
    assert torch.equal(residency.read(ids), items)
    residency.close()
