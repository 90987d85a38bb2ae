"""What is written as files is what zarr itself would write, and any zarr reader sees the values, bit for bit."""

import json
import os
import warnings

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from models import prompt, tiny_llama
from session_cases import BOOK, KINDS, MORE, ROOMY, config, logits_of

import kvtier
from kvtier import durable
from kvtier.kernels.quantize import dequantize_chunks
from kvtier.runtime import zarr_arrays
from kvtier.runtime.commit_record import SLOT_BYTES
from kvtier.runtime.library import Library
from kvtier.runtime.slot_tier import as_bytes
from kvtier.runtime.zarr_arrays import (
    array_metadata,
    dtype_name,
    group_metadata,
    piece_path,
    raw,
    read_whole,
    stored_type,
    tensor_of,
    write_at,
    write_metadata,
    write_whole,
)

pytestmark = pytest.mark.usefixtures("quick_store")

DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
DTYPES += [torch.float16, torch.float32, torch.float64, torch.bfloat16]
SHAPES = {
    "a vector": ((10,), (4,), None),
    "empty": ((0,), (4,), None),
    "one file": ((2, 3, 4), (2, 3, 4), None),
    "nothing in one dimension": ((2, 0, 4), (2, 1, 4), None),
    "files": ((5, 7, 3), (2, 7, 3), None),
    "sharded": ((3, 5, 2, 16), (3, 4, 2, 16), (1, 1, 1, 16)),
    "an empty one, sharded": ((3, 0, 2, 16), (3, 4, 2, 16), (1, 1, 1, 16)),
}


def random(shape, dtype):
    """Values whose every byte is random, but for NaNs: their bits are not everybody's to keep."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    size = dtype.itemsize
    values = np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] * size), np.uint8)
    tensor = torch.from_numpy(values).view(dtype)
    return torch.nan_to_num(tensor) if dtype.is_floating_point else tensor


# -- metadata ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_metadata_is_what_zarr_writes(name, dtype, tmp_path):
    shape, piece, inner = SHAPES[name]
    attributes = {"dtype": dtype_name(dtype), "unit": "token"}
    zarr.create_array(
        tmp_path / "theirs",
        shape=shape,
        dtype=stored_type(dtype),
        chunks=piece if inner is None else inner,
        shards=None if inner is None else {"shape": piece, "index_location": "end"},
        compressors=None,
        filters=None,
        fill_value=0,
        attributes=attributes,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    write_metadata(tmp_path / "ours", array_metadata(shape, dtype, piece, inner, {"unit": "token"}))
    ours, theirs = (json.loads((tmp_path / who / "zarr.json").read_text()) for who in ("ours", "theirs"))
    assert ours == theirs
    assert type(ours["fill_value"]) is type(theirs["fill_value"])


def test_the_metadata_of_a_group_is_what_zarr_writes(tmp_path):
    attributes = {"kvtier": {"version": 2, "name": "Größe", "share": 0.1, "none": None, "list": [1, [2]]}}
    zarr.create_group(tmp_path / "theirs", zarr_format=3, attributes=attributes)
    write_metadata(tmp_path / "ours", group_metadata(attributes))
    ours, theirs = (json.loads((tmp_path / who / "zarr.json").read_text()) for who in ("ours", "theirs"))
    assert ours == theirs


def test_metadata_is_replaced_whole(tmp_path, monkeypatch):
    def fails(*arguments):
        raise error

    write_metadata(tmp_path, group_metadata({"a": 1}))
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        for name in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fails)
                with pytest.raises(type(error)):
                    write_metadata(tmp_path, group_metadata({"a": 2}))
            assert [path.name for path in tmp_path.iterdir()] == ["zarr.json"]
            assert zarr.open_group(tmp_path, mode="r").attrs["a"] == 1
    with pytest.raises(TypeError):
        write_metadata(tmp_path, {"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["zarr.json"]
    write_metadata(tmp_path, group_metadata({"a": 2}))
    assert zarr.open_group(tmp_path, mode="r").attrs["a"] == 2


# -- arrays in one file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (0,), (2, 3, 4), (2, 3, 0, 4), (1, 1, 1, 1, 5)], ids=str)
def test_an_array_in_one_file(shape, dtype, tmp_path):
    tensor = random(shape, dtype)
    values = write_whole(tmp_path, tensor)
    assert values.dtype == stored_type(dtype)
    array = zarr.open_array(tmp_path, mode="r")
    assert array.attrs["dtype"] == dtype_name(dtype)
    assert array[...].tobytes() == values.tobytes() == raw(tensor).tobytes()
    again = read_whole(tmp_path, shape, dtype)
    assert again.shape == shape
    assert torch.equal(tensor_of(again, dtype), tensor)
    shorter = random((1,) * len(shape), dtype)
    write_whole(tmp_path, shorter)  # over the longer one
    assert zarr.open_array(tmp_path, mode="r")[...].tobytes() == raw(shorter).tobytes()
    assert piece_path(tmp_path, *(0 for _ in shape)).stat().st_size == dtype.itemsize


def test_tensors_in_any_layout(tmp_path):
    tensor = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1).requires_grad_()[1:]
    write_whole(tmp_path, tensor)
    assert (zarr.open_array(tmp_path, mode="r")[...] == tensor.detach().numpy()).all()


def test_a_file_that_is_too_short(tmp_path):
    write_whole(tmp_path, torch.arange(6))
    path = tmp_path / "c.0"
    with pytest.raises(EOFError, match=rf"{path} holds less than 56 bytes"):
        read_whole(tmp_path, (7,), torch.int64)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_whole(tmp_path, (6,), torch.int64)


def test_writes_go_on_where_the_system_stopped(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(zarr_arrays.os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    write_at(fd, np.arange(20, dtype=np.uint8), 5)
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == bytes(5) + bytes(range(20))


# -- a saved sequence --------------------------------------------------------------------------------------------------


def check_values(kv, cache, read):
    """Everything in the files of a saved cache, through ``read(name)``: a numpy array, however it was come by."""
    engine, sequence = kv._runtime.engine, cache._lane.sequences[0]
    entry, residency, shape = (
        Library(cache.saved_at.parents[1]).read(cache.saved_at.name),
        engine.residency,
        engine.shape,
    )
    commit, first = entry.commit, entry.attributes["layout"]["first_chunk"]
    assert read("tokens").tolist() == sequence.tokens.array().tolist()
    assert read("block_starts").tolist() == sequence.block_starts
    records, sums = read("kv"), read("crc/kv")
    layers = [sequence.layers[layer] for layer in shape.full_layers]
    payload = residency.host.item_bytes
    assert records.shape == (len(layers), commit.chunks - first, shape.n_kv_heads, -(-payload // 4096) * 4096)
    for place, chunks in enumerate(layers):
        for head, chunk in np.ndindex(shape.n_kv_heads, commit.chunks - first):
            ids = chunks.ids[head, first + chunk : first + chunk + 1]
            record = records[place, chunk, head]
            assert record[:payload].tobytes() == as_bytes(residency.read(ids)).tobytes()
            assert not record[payload:].any()
            assert sums[place, chunk, head] == google_crc32c.value(record[:payload].tobytes())
            held = residency.device.data[residency.fetch(ids)][0]
            item = torch.from_numpy(record[:payload].copy())
            if residency.bits is None:
                chunk_there = item.view(held.dtype).view(held.shape)
            else:
                _, tokens, dim = held.shape
                chunk_there = dequantize_chunks(item[None], residency.bits, tokens, dim, held.dtype)[0]
            assert torch.equal(chunk_there, held)
        for name in engine.summary.layout():
            expected = raw(chunks.codes.part(first, commit.chunks)[name].transpose(0, 1))
            assert read(f"codes/{name}")[place].tobytes() == expected.tobytes()
        for i, tensor in enumerate(chunks.fitted.state):
            assert read(f"fitted/{i}")[place].tobytes() == raw(tensor).tobytes()
    check_window(engine, sequence, commit, read)


def check_window(engine, sequence, commit, read):
    engine.park(sequence)
    full, sliding = sequence.parked.full, sequence.parked.sliding
    for name, tensor in (("sinks", full.sinks), ("tokens", full.tokens), ("sliding", sliding.tokens)):
        values = read(f"{commit.window_name}/{name}")
        assert values.dtype == stored_type(tensor.dtype)
        assert values.tobytes() == raw(tensor).tobytes()


@pytest.fixture
def saved(request, tmp_path):
    """A block with a cache that was saved after an append, so that it has a part; every array is in its files."""
    make, own = KINDS[request.param]
    with kvtier.offload(make(), config(**own)) as kv:
        kv.prefill(BOOK).save(tmp_path / "store")
    with kvtier.offload(make(), config(**own)) as kv:
        cache = kv.open(tmp_path / "store")
        logits_of(kv.model, MORE, cache)
        cache.saved_at = tmp_path / "store" / "sequences" / cache.save(tmp_path / "store")
        yield kv, cache


def members(path):
    """Names of all arrays and groups below a folder, as zarr lists them; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(path, mode="r")
        return dict(group.members(max_depth=None))


@pytest.mark.parametrize("saved", KINDS, indirect=True)
def test_zarr_reads_every_array(saved):
    kv, cache = saved
    nodes = members(cache.saved_at)
    arrays = {name for name, node in nodes.items() if isinstance(node, zarr.Array)}
    commit = Library(cache.saved_at.parents[1]).read(cache.saved_at.name).commit
    codes = {f"codes/{name}" for name in kv._runtime.engine.summary.layout()}
    assert arrays == {"commit", "tokens", "block_starts", "kv", "crc/kv", "crc/codes"} | codes | set(commit.arrays)
    seen = set()
    check_values(kv, cache, lambda name: seen.add(name) or nodes[name][...])
    assert arrays - seen == {"commit", "crc/codes"}
    slots = nodes["commit"][...].tobytes()
    assert slots == b"".join((cache.saved_at / "commit" / f"c.{i}").read_bytes() for i in (0, 1))
    assert len(slots) == 2 * SLOT_BYTES


@pytest.mark.parametrize("saved", ["exact bfloat16", "minmax int8", "gemma3"], indirect=True)
def test_tensorstore_reads_every_array(saved):
    tensorstore = pytest.importorskip("tensorstore")
    kv, cache = saved

    def read(name):
        store = {"driver": "file", "path": str(cache.saved_at / name)}
        return tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result().read().result()

    check_values(kv, cache, read)


@pytest.mark.parametrize("saved", ["sketch bfloat16 int4", "gemma3"], indirect=True)
def test_zarr_lists_a_whole_store_without_a_warning(saved):
    store = saved[1].saved_at.parents[1]
    library = Library(store)
    with library.writing():
        library.create("half", {})  # a writer is at it
    nodes = members(store)
    assert {name for name in nodes if name.count("/") < 2} == {
        *("sequences", "sequences/half"),
        *(f"sequences/{entry.id}" for entry in library.entries()),
    }
    tree = str(zarr.open_group(store, mode="r").tree())
    assert tree.count("kv (") == 2 * 2  # records and their checksums


def test_a_store_with_scratch_and_an_interrupted_reading(tmp_path, monkeypatch):
    """While it is written to: shapes are those of the last commit, and the values before them are there."""
    monkeypatch.setattr(durable, "FIRST_COMMIT_SECONDS", 0)
    monkeypatch.setattr(durable, "COMMIT_SHARE", 1e9)
    store = tmp_path / "store"
    seen, after = [], durable._Writing._after_block

    def look(writing, done):
        after(writing, done)
        nodes = members(writing._committer.files.folder)
        assert nodes["tokens"][...].tolist() == prompt(150, seed=4)[0, :done].tolist()
        assert nodes["kv"].shape[1] == nodes["crc/codes"].shape[0] == writing._committer.last.chunks
        assert nodes["kv"][...].any() == (nodes["kv"].size > 0)
        seen.append(done)
        members(store)

    monkeypatch.setattr(durable._Writing, "_after_block", look)
    kept = config(budget=ROOMY | {"disk": "16MiB"}, store={"path": str(store), "mode": "durable"})
    with kvtier.offload(tiny_llama(), kept) as kv:
        kv.prefill(prompt(150, seed=4))
    assert len(seen) > 5
