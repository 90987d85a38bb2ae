"""``kvtier verify``: whole stores are ok, every damaged byte that was committed is named, and no other is."""

import dataclasses
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import prompt, settings, tiny_llama
from test_families import FAMILIES, SLIDING_ONLY, tiny

import kvtier
from kvtier import cli, durable, inspect_store, verify_store
from kvtier.runtime import direct_io, session
from kvtier.runtime.commit_record import Commit, checksum, read_commit, write_commit
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import Library
from kvtier.runtime.sequence_checks import SequenceChecks
from kvtier.runtime.sequence_files import PIECE, SHARD_CHUNKS, SequenceFiles, SequenceLayout
from kvtier.runtime.zarr_arrays import write_whole

pytestmark = pytest.mark.usefixtures("quick_store")

ROOMY = {"gpu": "16MiB", "host": "16MiB", "disk": "64MiB"}
SHORT, LONG = 330, 460


class Stop(Exception):
    """Ends a reading."""


def write(path, model, ids, stop_after=None, **config):
    """Read ``ids`` durably, a commit after every block; the reading ends after so many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "FIRST_COMMIT_SECONDS", 0)
        patch.setattr(durable, "COMMIT_SHARE", 1e9)
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(os, "fdatasync", lambda fd: None)
        if stop_after is not None:
            after, n = durable._Writing._after_block, iter(range(1, 1000))

            def counted(writing, done):
                after(writing, done)
                if next(n) == stop_after:
                    raise Stop

            patch.setattr(durable._Writing, "_after_block", counted)
        store = {"path": path, "mode": "durable"} | config.pop("store", {})
        config = settings(**{"select": 3, "budget": ROOMY, "store": store} | config)
        try:
            with kvtier.offload(model, config) as kv:
                kv.prefill(ids)
        except Stop:
            assert stop_after is not None


def gemma():
    return tiny(FAMILIES["gemma3"][0], **FAMILIES["gemma3"][1])


@pytest.mark.filterwarnings("ignore:every layer has a sliding window")  # that is the case here
def sliding_only():
    return tiny(SLIDING_ONLY["mistral"][0], **SLIDING_ONLY["mistral"][1])


KINDS = {
    "sketch": (tiny_llama, {}),
    "bfloat16, exact": (lambda: tiny_llama(dtype=torch.bfloat16), {"kind": "exact"}),
    "int8": (tiny_llama, {"store": {"dtype": "int8"}}),
    "int4, cuboid": (tiny_llama, {"store": {"dtype": "int4"}, "kind": "cuboid"}),
    "some layers slide": (gemma, {"window": 256}),
    "all layers slide": (sliding_only, {"window": 256}),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Stores of every kind, made when asked for; not to be changed."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = path = tmp_path_factory.mktemp("originals") / "store"
            if kind == "parts":
                write(path, tiny_llama(), prompt(LONG)[:, :SHORT])
                write(path, tiny_llama(), prompt(LONG))
            elif kind == "interrupted":
                write(path, tiny_llama(), prompt(LONG), stop_after=9)
            elif kind == "interrupted at once":
                write(path, tiny_llama(), prompt(LONG), stop_after=1)
            else:
                make, config = KINDS[kind]
                write(path, make(), prompt(SHORT), **config)
        return made[kind]

    return get


@pytest.fixture
def store(tmp_path, originals):
    """A copy of one of the stores."""

    def get(kind):
        return Path(shutil.copytree(originals(kind), tmp_path / "store"))

    return get


def sequence_of(path, longest=True):
    """The folder of the sequence with the most tokens, or the fewest."""
    entries = sorted(Library(path).entries(), key=lambda entry: entry.tokens)
    return entries[-1 if longest else 0].path


def problems_of(path, id=None):
    report = verify_store.verify_store(path)
    assert report["ok"] == all(s["ok"] for s in report["sequences"])
    assert all(s["ok"] == (not s["problems"]) for s in report["sequences"])
    return [problem for s in report["sequences"] if id in (None, s["id"]) for problem in s["problems"]]


def flip(path, position, bit=0):
    with path.open("r+b") as file:
        file.seek(position)
        [byte] = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


# -- what was committed, from the description in runtime/sequence_files.py ---------------------------------------------


def committed(folder):
    """By file of a sequence, which of its bytes count: bool [bytes]."""
    commit = read_commit(folder / "commit")
    layout = json.loads((folder / "zarr.json").read_text())["attributes"]["kvtier"]["layout"]
    layers, heads, payload = layout["layers"], layout["kv_heads"], layout["payload_bytes"]
    n, slot_bytes = commit.chunks - layout["first_chunk"], -(-payload // 4096) * 4096
    found = {}

    def count(name, begin, end):
        mask = found.setdefault(name, np.zeros((folder / name).stat().st_size, bool))
        assert 0 <= begin < end <= len(mask), name
        mask[begin:end] = True

    def count_all(name):
        count(name, 0, (folder / name).stat().st_size)

    for array in ("", "commit", "tokens", "block_starts"):
        count_all(str(Path(array, "zarr.json")))
    for i in (0, 1) if commit.number > 1 else (1,):
        length = int.from_bytes((folder / f"commit/c.{i}").read_bytes()[16:20], "little")
        count(f"commit/c.{i}", 0, 24 + length)
    count("tokens/c.0", 0, 8 * commit.tokens)
    count("block_starts/c.0", 0, 8 * commit.blocks)
    for name, (_, shape, _) in commit.arrays.items():
        for node in (name, *(str(parent) for parent in Path(name).parents if parent.name)):
            count_all(f"{node}/zarr.json")
        if 0 not in shape:
            count_all(".".join([f"{name}/c", *("0" for _ in shape)]))
    for node in ("kv", "crc", "crc/kv", "crc/codes", "codes", *(f"codes/{name}" for name in layout["codes"])):
        if layers:
            count_all(f"{node}/zarr.json")
    for shard in range(-(-n // SHARD_CHUNKS) if layers else 0):
        held = min(SHARD_CHUNKS, n - shard * SHARD_CHUNKS)
        count("crc/codes/c.0", 0, 4 * n)
        for layer in range(layers):
            for name, (shape, dtype) in layout["codes"].items():
                one = heads * int(np.prod(shape)) * getattr(torch, dtype).itemsize
                file = f"codes/{name}/c.0.{shard}.0" + ".0" * len(shape)
                count(file, layer * SHARD_CHUNKS * one, (layer * SHARD_CHUNKS + held) * one)
            first = layer * SHARD_CHUNKS * heads
            count(f"crc/kv/c.0.{shard}.0", 4 * first, 4 * (first + held * heads))
            for slot in range(first, first + held * heads):
                count(f"kv/c.0.{shard}.0.0", slot * slot_bytes, slot * slot_bytes + payload)
        end = (folder / f"kv/c.0.{shard}.0.0").stat().st_size
        count(f"kv/c.0.{shard}.0.0", layers * SHARD_CHUNKS * heads * slot_bytes, end)
    return found


# -- whole stores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "parts", "interrupted", "interrupted at once"])
@pytest.mark.filterwarnings("ignore:every layer has a sliding window")  # the model is made to be so
def test_a_whole_store_is_ok(originals, kind):
    path, said = originals(kind), []
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    report = verify_store.verify_store(path, said.append)
    assert report == json.loads(json.dumps(report))
    assert (report["store"], report["ok"]) == (str(path), True)
    for sequence, entry in zip(report["sequences"], Library(path).entries(), strict=True):
        layout = session.layout_of(entry.attributes)
        records = (entry.commit.chunks - layout.first) * layout.n_layers * layout.n_kv_heads
        sums = sum(mask.sum() for name, mask in committed(entry.path).items() if name.startswith(("codes/", "kv/")))
        assert sequence == {
            "id": entry.id,
            "tokens": entry.tokens,
            "chunks": entry.commit.chunks,
            "records": records if layout.n_layers else 0,
            "bytes": sequence["bytes"],
            "ok": True,
            "problems": [],
        }
        assert sequence["bytes"] >= records * layout.payload_bytes + 8 * entry.tokens
        assert sums == 0 or sequence["bytes"] < sums + 2**20
        assert any(entry.id in line for line in said)
    assert report["sequences"][-1]["tokens"] > 0
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_kinds_are_what_they_say(originals):
    [parts] = [entry for entry in Library(originals("parts")).entries() if entry.tokens == LONG]
    assert parts.attributes["parts"]
    [interrupted] = Library(originals("interrupted")).entries()
    assert not interrupted.commit.complete
    assert interrupted.commit.chunks > 0
    [at_once] = Library(originals("interrupted at once")).entries()
    assert (at_once.commit.number, at_once.commit.chunks) == (1, 0)
    assert not (at_once.path / "commit" / "c.0").exists()


def test_text_of_a_whole_store(originals):
    path = originals("parts")
    report = verify_store.verify_store(path)
    lines = verify_store.table(report).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [s["id"] for s in report["sequences"]]
    assert all(line.endswith(" ok") for line in lines[1:-1])
    assert lines[-1] == f"all that was saved in {path} is as it was written"


def test_no_store_and_an_empty_one(tmp_path):
    with pytest.raises(StoreError, match="is not a kvtier store"):
        verify_store.verify_store(tmp_path / "nothing")
    with Library(tmp_path / "store").writing():
        report = verify_store.verify_store(tmp_path / "store")
    assert report == {"store": str(tmp_path / "store"), "sequences": [], "ok": True}
    assert verify_store.table(report) == f"{tmp_path / 'store'} holds no saved sequence"


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flippable(originals, tmp_path_factory):
    """A store, and the bytes of its longest sequence that count."""
    path = Path(shutil.copytree(originals("parts"), tmp_path_factory.mktemp("flips") / "store"))
    return path, committed(sequence_of(path))


@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True
)
@given(data=st.data())
def test_a_flipped_bit_is_named(flippable, data):
    path, counts = flippable
    name = data.draw(st.sampled_from(sorted(counts)), "file")
    places = np.flatnonzero(counts[name])
    position = int(places[data.draw(st.integers(0, len(places) - 1), "committed byte")])
    bit = data.draw(st.integers(0, 7), "bit")
    file = sequence_of(path) / name
    before = file.read_bytes()
    try:
        flip(file, position, bit)
        same = name.endswith("zarr.json") and is_same_json(before, file.read_bytes())  # such as 1e-05 and 1E-05
        report = verify_store.verify_store(path)
        named = [s["id"] for s in report["sequences"] if any(name in problem for problem in s["problems"])]
        assert named == ([] if same else [file.relative_to(path / "sequences").parts[0]])
        assert report["ok"] is same
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("from_the_end", [1, 4, 5, 1000])
def test_a_flipped_bit_in_the_index_of_a_shard_is_named(store, from_the_end):
    path = store("sketch")
    file = sequence_of(path) / "kv/c.0.0.0.0"
    flip(file, file.stat().st_size - from_the_end)
    assert problems_of(path) == ["kv/c.0.0.0.0: was rewritten by another program, or its index is damaged"]


def is_same_json(a, b):
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize("kind", ["sketch", "int8", "some layers slide", "interrupted"])
def test_bytes_that_do_not_count_are_not_reported(store, kind):
    path = store(kind)
    folder, generator = sequence_of(path), np.random.default_rng(0)
    counts, n = committed(folder), 0
    for file in (file for file in folder.rglob("*") if file.is_file()):
        data = np.frombuffer(file.read_bytes(), np.uint8).copy()
        spare = ~counts.get(str(file.relative_to(folder)), np.zeros(len(data), bool))
        data[spare] = generator.integers(0, 256, int(spare.sum()), np.uint8)
        file.write_bytes(data.tobytes())
        n += int(spare.sum())
    assert n > 10**6
    assert problems_of(path) == []


def test_what_a_killed_writer_leaves_is_not_reported(store):
    path = store("interrupted")
    folder = sequence_of(path)
    for name in ("kv/partial", "tokens/zarr.json.partial", "zarr.json.partial", "kv/c.0.1.0.0", "crc/kv/c.0.1.0"):
        (folder / name).write_bytes(b"rest")
    window = read_commit(folder / "commit").window
    shutil.rmtree(folder / f"window{1 - window}")
    (folder.parent / "0123456789ab").mkdir()
    assert problems_of(path) == []


# -- files -------------------------------------------------------------------------------------------------------------


def damage_of(how, file):
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut by a byte":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "a byte longer":
        os.truncate(file, file.stat().st_size + 1)
    else:
        os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("how", ["missing", "empty", "cut by a byte", "halved", "a byte longer"])
@pytest.mark.parametrize("kind", ["parts", "some layers slide"])
def test_missing_and_shortened_files_are_named(store, kind, how):
    path = store(kind)
    folder = sequence_of(path)
    for name in sorted(committed(folder)):
        file = folder / name
        before = file.read_bytes()
        damage_of(how, file)
        if how == "cut by a byte" and name == "zarr.json":
            assert before.endswith(b"}")  # so that cutting it matters
        problems = problems_of(path)
        assert any(name in problem for problem in problems), f"{name}: {problems}"
        file.write_bytes(before)
    assert problems_of(path) == []


def test_a_sequence_without_its_commit_record_is_named(store):
    path = store("parts")
    folder = sequence_of(path)
    shutil.rmtree(folder / "commit")
    [problem] = problems_of(path, folder.name)
    assert problem == f"commit: c.0 and c.1 are missing or empty, although {LONG} tokens were committed"


def test_both_slots_damaged(store):
    path = store("sketch")
    folder = sequence_of(path)
    for i in (0, 1):
        flip(folder / f"commit/c.{i}", 30)
    [sequence] = verify_store.verify_store(path)["sequences"]
    assert (sequence["tokens"], sequence["chunks"], sequence["records"]) == (None, None, 0)
    assert [problem.split(":")[0] for problem in sequence["problems"]] == ["commit/c.0", "commit/c.1"]


@pytest.mark.parametrize(("kind", "fewer"), [("interrupted", 32), ("sketch", 0)])
def test_the_other_slot_counts_where_one_is_damaged(store, kind, fewer):
    """The commit before; of a sequence that is complete both slots say so."""
    path = store(kind)
    folder = sequence_of(path)
    commit = read_commit(folder / "commit")
    slot = commit.number % 2
    flip(folder / f"commit/c.{slot}", 30)
    assert read_commit(folder / "commit").complete == (not fewer)
    [sequence] = verify_store.verify_store(path)["sequences"]
    assert sequence["tokens"] == commit.tokens - fewer
    more = ": reading the text again goes on from there (a power cut can do that, too)" if fewer else ""
    assert sequence["problems"] == [
        f"commit/c.{slot}: its checksum is wrong; the other one, commit {commit.number - 1}, counts" + more
    ]


# -- metadata ----------------------------------------------------------------------------------------------------------


def rewrite(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(("array", "axis"), [("tokens", 0), ("kv", 1), ("crc/codes", 0), ("codes/scale", 1)])
def test_a_shape_may_be_behind_the_commit_but_not_ahead(store, array, axis):
    path = store("sketch")
    file = sequence_of(path) / array / "zarr.json"
    rewrite(file, lambda content: content["shape"].__setitem__(axis, content["shape"][axis] - 3))
    assert problems_of(path) == []
    rewrite(file, lambda content: content["shape"].__setitem__(axis, content["shape"][axis] + 4))
    [problem] = problems_of(path)
    assert problem.startswith(f"{array}/zarr.json: shape is [")


def test_attributes_that_others_add_are_no_damage(store):
    path = store("sketch")
    folder = sequence_of(path)
    zarr.open_array(folder / "kv", mode="r+").attrs["note"] = "mine"
    rewrite(folder / "codes" / "zarr.json", lambda content: content["attributes"].update(note="mine"))
    assert problems_of(path) == []
    rewrite(folder / "kv" / "zarr.json", lambda content: content["attributes"].update(dtype="int8"))
    [problem] = problems_of(path)
    assert problem.startswith("kv/zarr.json: attributes is ")


def test_a_shard_that_zarr_has_rewritten_is_named(store):
    path = store("sketch")
    array = zarr.open_array(sequence_of(path) / "kv", mode="r+")
    array[0, 3] = 0
    problems = problems_of(path)
    assert all(problem.startswith("kv/c.0.0.0.0: ") for problem in problems)
    assert "written were" in problems[0] or "rewritten by another program" in problems[0]


def test_the_rest_is_checked_where_the_attributes_are_unreadable(store):
    path = store("sketch")
    folder = sequence_of(path)
    (folder / "zarr.json").write_text("{")
    flip(folder / "tokens" / "c.0", 8)
    flip(folder / "fitted" / "0" / "c.0.0.0", 8)
    problems = problems_of(path)
    assert [problem.split(":")[0] for problem in problems] == ["tokens/c.0", "fitted/0/c.0.0.0", "zarr.json"]


# -- several -----------------------------------------------------------------------------------------------------------


def test_all_that_is_damaged_is_listed(store):
    path = store("parts")
    short, long = sequence_of(path, longest=False), sequence_of(path)
    heads, record = 2, 4096
    for folder, layer, chunk, head in ((short, 1, 5, 1), (short, 0, 11, 0), (long, 1, 3, 1)):
        flip(folder / "kv/c.0.0.0.0", ((layer * SHARD_CHUNKS + chunk) * heads + head) * record + 17)
    (short / "tokens" / "c.0").unlink()
    (long / "codes" / "scale" / "zarr.json").unlink()
    first = session.layout_of(Library(path).read(long.name).attributes).first
    report = verify_store.verify_store(path)
    found = {s["id"]: s["problems"] for s in report["sequences"]}
    assert found[short.name] == [
        "tokens/c.0: is missing",
        "kv/c.0.0.0.0: chunk 11, layer 0, KV head 0 does not match its checksum in crc/kv/c.0.0.0",
        "kv/c.0.0.0.0: chunk 5, layer 1, KV head 1 does not match its checksum in crc/kv/c.0.0.0",
    ]
    assert found[long.name] == [
        "codes/scale/zarr.json: is missing",
        f"kv/c.0.0.0.0: chunk {first + 3}, layer 1, KV head 1 does not match its checksum in crc/kv/c.0.0.0",
        f"zarr.json: it goes on from {short.name}, which is damaged before chunk {first}",
    ]
    text = verify_store.table(report)
    assert all(f"  {problem}" in text.splitlines() for problems in found.values() for problem in problems)
    assert text.splitlines()[-1] == (
        f"2 of 2 damaged: {short}, {long}. Put back a copy of those folders, or remove those folders and save again"
    )


def test_a_part_matters_up_to_where_the_sequence_goes_on_from_it(store):
    path = store("parts")
    short, long = sequence_of(path, longest=False), sequence_of(path)
    [[id, end]] = Library(path).read(long.name).attributes["parts"]
    assert id == short.name
    flip(short / read_commit(short / "commit").window_name / "sinks" / "c.0.0.0.0.0", 0)
    assert problems_of(path, long.name) == []
    assert len(problems_of(path, short.name)) == 1
    commit = read_commit(short / "commit")
    write_commit(short / "commit", dataclasses.replace(commit, number=commit.number + 1, chunks=end - 1))
    [problem] = problems_of(path, long.name)
    assert "is not there, or shorter than it was" in problem
    shutil.rmtree(short)
    [problem] = problems_of(path, long.name)
    assert problem.startswith("zarr.json: ")
    assert f"goes on from {short}: it is not there" in problem


def test_only_so_many_problems_are_listed(store, monkeypatch):
    path = store("sketch")
    folder = sequence_of(path)
    os.truncate(folder / "crc/kv/c.0.0.0", 0)
    os.truncate(folder / "crc/kv/c.0.0.0", 4 * 2 * SHARD_CHUNKS * 2)
    n = 2 * 2 * read_commit(folder / "commit").chunks
    assert len(problems_of(path)) == n
    monkeypatch.setattr(verify_store, "MOST_PROBLEMS", 5)
    problems = problems_of(path)
    assert len(problems) == 6
    assert problems[-1] == f"and {n - 5} more"


def test_a_device_error_is_a_problem_of_the_records_that_it_hits(store, monkeypatch):
    path, read = store("sketch"), direct_io.RecordIO.read
    bad = (1 * SHARD_CHUNKS * 2 + 7 * 2 + 1) * 4096

    def fail(io, files, which, offsets, out):
        if bad in offsets:
            raise StoreError("long") from OSError(5, "Input/output error")
        read(io, files, which, offsets, out)

    monkeypatch.setattr(direct_io.RecordIO, "read", fail)
    assert problems_of(path) == [
        "kv/c.0.0.0.0: chunk 7, layer 1, KV head 1 cannot be read ([Errno 5] Input/output error)"
    ]


# -- while a writer is at work -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A store after 4 and after 9 blocks, and when all was read."""
    folder, path = tmp_path_factory.mktemp("stages"), tmp_path_factory.mktemp("working") / "store"
    for blocks in (4, 5):
        write(path, tiny_llama(), prompt(LONG), stop_after=blocks)
        shutil.copytree(path, folder / str(blocks))
    write(path, tiny_llama(), prompt(LONG))
    shutil.copytree(path, folder / "complete")
    return folder


@pytest.mark.parametrize(
    "check", ["slots", "whole_files", "metadata", "code_files", "codes", "record_files", "records"]
)
def test_commits_while_verify_is_at_it_are_no_damage(stages, tmp_path, monkeypatch, check):
    path, original, switched = tmp_path / "store", getattr(SequenceChecks, check), []
    shutil.copytree(stages / "4", path)
    assert {Library(stages / name).entries()[0].id for name in ("4", "5", "complete")} == {sequence_of(path).name}

    def switch(checks, *arguments):
        """All that the writer does until it is done, in the middle of a check."""
        found = original(checks, *arguments)
        if not switched:
            switched.append(True)
            shutil.rmtree(path)
            shutil.copytree(stages / "complete", path)
        return found

    monkeypatch.setattr(SequenceChecks, check, switch)
    report = verify_store.verify_store(path)
    assert switched
    assert [s["problems"] for s in report["sequences"]] == [[]]
    assert report["sequences"][0]["tokens"] == (LONG if check == "slots" else read_commit_of(stages / "4").tokens)


def read_commit_of(path):
    return Library(path).entries()[0].commit


def test_a_sequence_that_is_removed_or_replaced_meanwhile(stages, tmp_path, monkeypatch):
    path, original, todo = tmp_path / "store", SequenceChecks.metadata, []
    monkeypatch.setattr(
        SequenceChecks, "metadata", lambda checks: (todo.pop()() if todo else None, original(checks))[1]
    )
    shutil.copytree(stages / "5", path)
    folder = sequence_of(path)
    todo.append(lambda: shutil.rmtree(folder))
    assert verify_store.verify_store(path)["sequences"] == []

    def replace():
        shutil.rmtree(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.undo()
            write(path, tiny_llama(), prompt(LONG), stop_after=3)

    shutil.copytree(stages / "5", folder.parents[1], dirs_exist_ok=True)
    todo.append(replace)
    [sequence] = verify_store.verify_store(path)["sequences"]
    assert (sequence["problems"], sequence["tokens"]) == ([], read_commit_of(path).tokens)


def test_damage_is_reported_under_a_writer_that_never_stops(store, monkeypatch):
    path = store("sketch")
    folder = sequence_of(path)
    flip(folder / "tokens" / "c.0", 8)
    looks, original = [], SequenceChecks.whole_files

    def busy(checks):
        commit = read_commit(folder / "commit")
        write_commit(folder / "commit", dataclasses.replace(commit, number=commit.number + 2))
        looks.append(1)
        return original(checks)

    monkeypatch.setattr(SequenceChecks, "whole_files", busy)
    assert [problem.split(":")[0] for problem in problems_of(path)] == ["tokens/c.0"]
    assert len(looks) <= verify_store.ATTEMPTS + 1


# -- memory, the command -----------------------------------------------------------------------------------------------


def test_memory_is_bounded(tmp_path):
    """A sequence of 100 MiB of records, codes, tokens and window, of random bytes."""
    layout = SequenceLayout(2, 2, 65536, {"codes": ((16384,), torch.uint8)})
    chunks, tokens, generator = 160, 4 * PIECE + 5, np.random.default_rng(0)
    library = Library(tmp_path / "store")
    with library.writing():
        held = {"layout": session.layout_attributes(layout), "parts": []}
        files = SequenceFiles(library.create("big", held), layout)
        files.create()
        for begin in range(0, chunks, 32):
            for layer in range(2):
                payload = generator.integers(0, 256, (32, 2, 65536), np.uint8)
                files.write_records(layer, begin, payload)
            files.write_codes(begin, {"codes": torch.randint(0, 256, (2, 2, 32, 16384), dtype=torch.uint8)})
        ids = np.arange(tokens)
        files.tokens.write(0, ids)
        files.block_starts.write(0, ids[:1])
        (files.folder / "window1").mkdir()
        (files.folder / "window1" / "zarr.json").write_text(
            '{"attributes": {}, "zarr_format": 3, "node_type": "group"}'
        )
        window = write_whole(files.folder / "window1" / "tokens", torch.rand(4, 2**21))
        files.sync()
        arrays = {"window1/tokens": ("float32", [4, 2**21], checksum(window.reshape(-1)))}
        sums = (checksum(ids), checksum(ids[:1]))
        commit = Commit(1, tokens, chunks, 1, True, False, 1, 0, 0, *sums, arrays)
        write_commit(files.folder / "commit", commit)
        files.publish(chunks, tokens, 1)
        files.close()
    del window, payload
    tracemalloc.start()
    report = verify_store.verify_store(tmp_path / "store")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report["ok"]
    assert report["sequences"][0]["bytes"] > 80 * 2**20
    assert peak_bytes < 16 * 2**20


def test_the_command(store, capsys):
    path = store("sketch")
    folder = sequence_of(path)
    assert cli.main(["verify", str(path)]) == 0
    assert "is as it was written" in capsys.readouterr().out
    flip(folder / "crc/codes/c.0", 4)
    assert cli.main(["verify", str(path), "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert report == verify_store.verify_store(path)
    [problem] = report["sequences"][0]["problems"]
    assert problem.endswith(": chunk 1 does not match its checksum in crc/codes/c.0")
    assert cli.main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert problem in out
    assert f"1 of 1 damaged: {folder}. Put back a copy of that folder, or remove that folder and save again" in out
    assert cli.main(["verify", str(path / "sequences")]) == 1
    assert capsys.readouterr().err.startswith("kvtier: ")


def test_inspect_tells_what_is_not_complete_and_what_needs_others(originals):
    """So that nobody removes a folder that another sequence refers to."""
    path = originals("parts")
    short, long = sequence_of(path, longest=False).name, sequence_of(path).name
    report = inspect_store.describe_store(path)
    assert {s["id"]: (s["parts"], s["complete"]) for s in report["sequences"]} == {
        short: ([], True),
        long: ([short], True),
    }
    lines = {line.split()[0]: line for line in inspect_store.table(report).splitlines()}
    assert lines[short].endswith("  llama")
    assert lines[long].endswith(f"  llama, needs {short}")
    [_, line] = inspect_store.table(inspect_store.describe_store(originals("interrupted"))).splitlines()
    commit = Library(originals("interrupted")).entry().commit
    assert line.endswith(f"  llama, not complete: {commit.tokens} of {LONG} tokens")
