"""The files of a saved sequence: what is written is read again, wherever it is, and what is damaged is named."""

import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from session_cases import open_files, quicken

from kvtier.runtime import sequence_files
from kvtier.runtime.errors import StoreError
from kvtier.runtime.sequence_files import GrowingArray, SequenceFiles, SequenceLayout
from kvtier.runtime.zarr_arrays import array_metadata, write_metadata

L, N, S, PAYLOAD = 2, 3, 4, 5000
R = 8192
CODES = {"codes": ((5, 2), torch.uint8), "scale": ((5,), torch.bfloat16)}
SLOW = hypothesis_settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)
    monkeypatch.setattr(sequence_files, "SHARD_CHUNKS", S)


def make(folder, first=0, layers=L, heads=N, payload=PAYLOAD):
    """Files of a new sequence."""
    files = SequenceFiles(folder, SequenceLayout(layers, heads, payload, CODES, first))
    files.create()
    return files


def again(files):
    """The same files as another process sees them."""
    files.sync()
    files.close()
    return SequenceFiles(files.folder, files.layout)


def payload(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, PAYLOAD), np.uint8)


def read(files, chunks, layers, heads):
    out = np.empty((len(chunks), files.layout.payload_bytes), np.uint8)
    files.read_records(*(np.array(column, np.int64) for column in (chunks, layers, heads)), out)
    return out


@pytest.fixture
def written(tmp_path):
    """Files with 10 chunks from chunk 3 on, and the records [chunk, layer, head, bytes]."""
    files, records = make(tmp_path / "s", first=3), payload(10, L, N)
    for layer in range(L):
        files.write_records(layer, 3, np.ascontiguousarray(records[:, layer]))
    files.publish(13, 0, 0)
    yield again(files), records
    files.close()


# -- records -----------------------------------------------------------------------------------------------------------


@given(data=st.data())
@SLOW
def test_records_match_a_dict(data, tmp_path_factory):
    layers, heads, shard = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    first, nbytes = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([1, 4095, 4096, 4097]))
    expected, counter = {}, itertools.count()
    with patch.object(sequence_files, "SHARD_CHUNKS", shard):
        files = make(tmp_path_factory.mktemp("s"), first, layers, heads, nbytes)
        for _ in range(data.draw(st.integers(1, 12))):
            match data.draw(st.sampled_from(["write", "write", "read", "read", "again"])):
                case "write":
                    layer, chunk = data.draw(st.integers(0, layers - 1)), first + data.draw(st.integers(0, 12))
                    m = data.draw(st.integers(1, 7))
                    records = np.random.default_rng(next(counter)).integers(0, 256, (m, heads, nbytes), np.uint8)
                    files.write_records(layer, chunk, records)
                    places = itertools.product(range(chunk, chunk + m), [layer], range(heads))
                    expected |= dict(zip(places, records.reshape(-1, nbytes), strict=True))
                case "read" if expected:
                    places = data.draw(st.lists(st.sampled_from(sorted(expected)), min_size=1, max_size=20))
                    out = read(files, *zip(*places, strict=True))
                    assert (out == np.stack([expected[place] for place in places])).all()
                case "again":
                    files = again(files)
        files = again(files)
        for place, record in expected.items():
            assert (read(files, *zip(place, strict=True)) == record).all()
        files.close()


def test_records_are_where_the_module_says(written):
    files, records = written
    names = {path.name: path for path in (files.folder / "kv").glob("c.*")}
    assert set(names) == {f"c.0.{i}.0.0" for i in range(3)}  # 4, 4 and 2 chunks
    index_bytes = L * S * N * 16 + 4
    for name, path in names.items():
        data = path.read_bytes()
        assert len(data) == L * S * N * R + index_bytes
        assert data[-index_bytes:] == files.layout.shard.index()
        shard = int(name.split(".")[2])
        for layer, inside, head in np.ndindex(L, S, N):
            chunk = shard * S + inside
            if chunk < 10:
                at = ((layer * S + inside) * N + head) * R
                assert data[at : at + PAYLOAD] == records[chunk, layer, head].tobytes()
                assert not any(data[at + PAYLOAD : at + R])


def test_each_record_is_checked_when_it_is_first_read(written, monkeypatch):
    files, records = written
    checked, checksum = [], sequence_files.checksum
    monkeypatch.setattr(sequence_files, "checksum", lambda data, start=0: checked.append(1) or checksum(data, start))
    assert (read(files, [3, 4, 4], [0, 1, 1], [2, 0, 1]) == records[[0, 1, 1], [0, 1, 1], [2, 0, 1]]).all()
    assert len(checked) == 3
    read(files, [3, 4, 4], [0, 1, 1], [2, 0, 1])
    assert len(checked) == 3
    read(files, [4, 12], [1, 1], [1, 1])
    assert len(checked) == 4
    files.write_records(1, 4, payload(1, N, seed=1))
    del checked[:]
    read(files, [4], [1], [1])
    assert len(checked) == 1  # written since, so it is checked again


def test_what_a_read_returns_is_what_was_checked(written):
    """A record that is damaged after it has been checked is not noticed until the files are opened again."""
    files, records = written
    read(files, [5], [1], [2])
    path = files.folder / "kv" / "c.0.0.0.0"
    data = bytearray(path.read_bytes())
    data[((1 * S + 2) * N + 2) * R + 9] ^= 1
    path.write_bytes(data)
    assert (read(files, [5], [1], [2]) != records[2, 1, 2]).sum() == 1
    with pytest.raises(StoreError, match=rf"{path} or .*{SUMS} holds other data .*chunk 5, layer 1, KV head 2"):
        read(again(files), [5], [1], [2])


def test_only_the_records_that_are_read_are_checked(written):
    files, records = written
    path = files.folder / "kv" / "c.0.1.0.0"
    data = bytearray(path.read_bytes())
    data[((0 * S + 3) * N + 1) * R] ^= 128  # chunk 3 + 4 + 3, layer 0, head 1
    data[((0 * S + 3) * N + 1) * R + PAYLOAD] ^= 128  # padding means nothing
    data[((1 * S + 3) * N + 1) * R + R - 1] ^= 128
    path.write_bytes(data)
    everything = [place for place in np.ndindex(10, L, N) if place != (7, 0, 1)]
    chunks, layers, heads = zip(*everything, strict=True)
    out = read(files, [chunk + 3 for chunk in chunks], layers, heads)
    assert (out == records[chunks, layers, heads]).all()
    with pytest.raises(StoreError, match=rf"{path} .*chunk 10, layer 0, KV head 1"):
        read(files, [3, 10, 11], [0, 0, 1], [0, 1, 1])
    with pytest.raises(StoreError, match=r"chunk 10, layer 0, KV head 1"):  # nor is it taken for checked now
        read(files, [10], [0], [1])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


KV, SUMS = "kv/c.0.0.0.0", "crc/kv/c.0.0.0"
DAMAGE = {
    "a record": (
        KV,
        lambda path: flip(path, 5),
        rf"{KV} or .*{SUMS} .*\(chunk 3, layer 0, KV head 0\)",
    ),
    "a checksum": (
        SUMS,
        lambda path: flip(path, 1),
        rf"{KV} or .*{SUMS} .*\(chunk 3, layer 0, KV head 0\)",
    ),
    "checksums lost": (SUMS, lambda path: path.unlink(), rf"{KV} or .*{SUMS} holds other data"),
    "checksums cut": (SUMS, lambda path: path.write_bytes(b""), rf"{KV} or .*{SUMS} holds other data"),
    "checksums a folder": (SUMS, lambda path: path.unlink() or path.mkdir(), rf"Is a directory: '.*{SUMS}'"),
    "the index": (KV, lambda path: flip(path, -30), f"{KV} was rewritten by another program, or its index is damaged"),
    "its checksum": (
        KV,
        lambda path: flip(path, -1),
        f"{KV} was rewritten by another program, or its index is damaged",
    ),
    "cut": (KV, lambda path: path.write_bytes(path.read_bytes()[:-1]), f"{KV} was rewritten by another program"),
    "longer": (KV, lambda path: path.write_bytes(path.read_bytes() + b"x"), f"{KV} was rewritten by another program"),
    "empty": (KV, lambda path: path.write_bytes(b""), f"{KV} was rewritten by another program"),
    "lost": (KV, lambda path: path.unlink(), f"No such file or directory: '.*{KV}'"),
    "zeros": (KV, lambda path: path.write_bytes(bytes(path.stat().st_size)), "was rewritten by another program"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, written):
    files, records = written
    file, damage, reason = DAMAGE[name]
    damage(files.folder / file)
    with pytest.raises(StoreError, match=f"the saved sequence {files.folder} is damaged: .*{reason}.*put back a copy"):
        read(files, [3], [0], [0])
    assert (read(files, [8, 11], [1, 0], [2, 0]) == records[[5, 8], [1, 0], [2, 0]]).all()  # other shards are as before


@pytest.mark.parametrize("part", ["a record", "all of it"])
def test_a_shard_that_zarr_rewrites_is_refused(part, written):
    files, records = written
    array = zarr.open_array(files.folder / "kv", mode="r+")
    assert array[1, 2, 0][:PAYLOAD].tolist() == records[2, 1, 0].tolist()
    if part == "a record":
        array[1, 2, 0] = np.arange(R) % 251
    else:
        array[:] = array[:]
    with pytest.raises(StoreError, match=r"c\.0\.0\.0\.0 was rewritten by another program, or its index is damaged"):
        read(files, [3], [0], [0])


def test_files_are_as_long_as_when_they_are_full_and_mostly_holes(tmp_path):
    files = make(tmp_path)
    files.write_records(0, 0, payload(1, N))
    files.sync()
    stat = (tmp_path / "kv" / "c.0.0.0.0").stat()
    assert stat.st_size == files.layout.shard.file_bytes
    assert stat.st_blocks * 512 < stat.st_size / 2
    files.close()


def test_a_shard_without_its_index_is_never_there(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    files = make(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(sequence_files, "write_at", fails)
        with pytest.raises(
            StoreError, match=r"cannot be written: .*No space left.*What was committed before is intact"
        ):
            files.write_records(0, 0, payload(1, N))
    assert list((tmp_path / "kv").glob("c.*")) == []
    files.write_records(0, 0, payload(1, N))
    assert (read(again(files), [0], [0], [1]) == payload(1, N)[0, 1]).all()
    assert sorted(path.name for path in (tmp_path / "kv").iterdir()) == ["c.0.0.0.0", "zarr.json"]


def test_what_was_written_before_a_crash_is_written_over(tmp_path):
    """Records beyond the last commit, and a shard without checksums: the next writer goes on there."""
    files = make(tmp_path)
    files.write_records(0, 0, payload(2, N))
    files = again(files)
    files.write_records(0, 2, payload(9, N, seed=1))  # killed before the sync: shards 1 and 2 are there already
    files.close()
    files = SequenceFiles(tmp_path, files.layout)
    with pytest.raises(StoreError, match="chunk 2, layer 0"):
        read(files, [2], [0], [0])
    files.write_records(0, 2, payload(4, N, seed=2))
    files = again(files)
    chunks = [0, 1, 2, 3, 4, 5]
    expected = np.concatenate([payload(2, N), payload(4, N, seed=2)])
    assert (read(files, chunks, [0] * 6, [1] * 6) == expected[:, 1]).all()
    files.close()


def test_files_open_at_the_first_use_and_can_be_used_after_close(written):
    files, records = written
    assert open_files(files.folder) == []
    read(files, [3], [0], [0])
    assert len(open_files(files.folder)) == 1
    files.close()
    assert open_files(files.folder) == []
    assert (read(files, [4], [0], [0]) == records[1, 0, 0]).all()
    files.close()


def test_a_layout_without_full_attention_layers(tmp_path):
    files = make(tmp_path, layers=0)
    files.publish(0, 5, 2)
    files.sync()
    assert {path.name for path in tmp_path.iterdir()} == {"commit", "tokens", "block_starts"}


# -- codes -------------------------------------------------------------------------------------------------------------


def codes(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 256, (L, N, n, *shape), generator=generator).to(dtype)
        for name, (shape, dtype) in CODES.items()
    }


@given(first=st.integers(0, 6), steps=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
@SLOW
def test_codes_in_any_steps(first, steps, data, tmp_path_factory):
    files, expected, begin = make(tmp_path_factory.mktemp("s"), first), codes(sum(steps)), 0
    for m in steps:
        files.write_codes(first + begin, {name: tensor[:, :, begin : begin + m] for name, tensor in expected.items()})
        begin += m
        if data.draw(st.booleans()):
            files = again(files)
    files = again(files)
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, begin)] * 2)))
    for low, high, found in (
        (0, begin, list(files.read_codes(first + begin))),
        (a, b, list(files.read_codes(first + b, first + a))),
    ):
        for name, tensor in expected.items():
            parts = [part[name] for part in found]
            assert all(part.dtype == tensor.dtype for part in parts)
            assert torch.equal(torch.cat([tensor[:, :, :0], *parts], dim=2), tensor[:, :, low:high])


CODE_FILES = ["codes/codes/c.0.1.0.0.0", "codes/scale/c.0.1.0.0", "crc/codes/c.0"]


@pytest.mark.parametrize("name", CODE_FILES)
@pytest.mark.parametrize("how", ["flipped", "cut", "lost"])
def test_damaged_codes_are_named(name, how, tmp_path):
    files = make(tmp_path, first=3)
    files.write_codes(3, codes(10))
    files = again(files)
    path = tmp_path / name
    if how == "flipped":
        flip(path, 21 if "crc" in name else (S + 1) * N * 5 * 2)
        reason = rf"one of .*{path}.* \(codes of chunk 8\)"
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:10])
        reason = f"{path} (has 10 bytes|is too short)"
    else:
        path.unlink()
        reason = f"No such file or directory: '{path}'"
    found = files.read_codes(13)
    if "crc" not in name or how == "flipped":
        assert next(found)["codes"].shape[2] == S  # the first shard is as before
    with pytest.raises(StoreError, match=f"damaged: .*{reason}"):
        next(found)


# -- arrays that grow --------------------------------------------------------------------------------------------------


@given(steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 13)), max_size=8), piece=st.integers(1, 6))
@SLOW
def test_a_growing_array_matches_a_list(steps, piece, tmp_path_factory):
    folder, values = tmp_path_factory.mktemp("a"), []
    with patch.object(sequence_files, "PIECE", piece):
        array = GrowingArray(folder, "<i8")
        for i, (back, n) in enumerate(steps):
            first = max(0, len(values) - back)
            new = [1000 * i + j for j in range(n)]
            array.write(first, np.array(new, np.int64))
            values[first : first + n] = new
            assert array.read(len(values)).tolist() == values
        array.sync()
        write_metadata(folder, array_metadata((len(values),), torch.int64, (piece,)))
        assert zarr.open_array(folder, mode="r")[:].tolist() == values
        assert len(list(folder.glob("c.*"))) >= -(-len(values) // piece)
        for n in range(len(values)):
            assert GrowingArray(folder, "<i8").read(n).tolist() == values[:n]


def test_a_growing_array_that_is_too_short(tmp_path, monkeypatch):
    monkeypatch.setattr(sequence_files, "PIECE", 4)
    array = GrowingArray(tmp_path, "<u4")
    array.write(0, np.arange(6))
    assert (tmp_path / "c.1").stat().st_size == 16  # with room for what comes
    assert array.read(6).dtype == np.uint32
    (tmp_path / "c.1").write_bytes(b"1234567")
    with pytest.raises(EOFError, match=r"c\.1 is too short"):
        array.read(6)
    assert array.read(5).tolist()[:4] == [0, 1, 2, 3]
    (tmp_path / "c.0").unlink()
    with pytest.raises(FileNotFoundError):
        array.read(1)
    assert array.read(0).tolist() == []


def test_sync_reaches_each_file_that_was_changed_and_new_ones_folders(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(sequence_files, "_sync_files", lambda paths: synced.append(set(paths)) or paths.clear())
    files = make(tmp_path)
    files.tokens.write(0, np.arange(3))
    files.write_records(1, 0, payload(5, N))
    files.write_codes(0, codes(5))
    files.sync()
    shards = {tmp_path / "crc" / "kv" / f"c.0.{i}.0" for i in (0, 1)}
    shards |= {tmp_path / "codes" / "codes" / f"c.0.{i}.0.0.0" for i in (0, 1)}
    shards |= {tmp_path / "codes" / "scale" / f"c.0.{i}.0.0" for i in (0, 1)}
    single = {tmp_path / "tokens" / "c.0", tmp_path / "crc" / "codes" / "c.0"}
    folders = {path.parent for path in shards | single} | {tmp_path / "kv"}
    assert set.union(*synced) == shards | single | folders
    del synced[:]
    files.write_records(0, 5, payload(1, N))
    files.sync()
    assert set.union(*synced) == {tmp_path / "crc" / "kv" / "c.0.1.0"}
    files.close()
