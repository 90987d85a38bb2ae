"""The commit record: whatever happens to one slot, the other counts, and nothing else is ever taken for a commit."""

import dataclasses
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.runtime import commit_record
from kvtier.runtime.commit_record import SLOT_BYTES, Commit, checksum, read_commit, read_slots, write_commit
from kvtier.runtime.errors import StoreError
from kvtier.runtime.summary import KINDS

pytestmark = pytest.mark.usefixtures("quick_store")

FIRST = Commit(1, 100, 9, 4, False, False, 1, 76, 100, 2**32 - 1, 7, {"fitted/0": ("float32", [2, 2, 16], 11)})
SECOND = dataclasses.replace(FIRST, number=2, tokens=130, chunks=13, blocks=5, window=0, complete=True, rewound=True)


def as_read(commit):
    """JSON has no tuples."""
    return dataclasses.replace(commit, arrays={name: list(array) for name, array in commit.arrays.items()})


@pytest.fixture
def folder(tmp_path):
    """With two commits, so that slot 0 holds the second one."""
    write_commit(tmp_path, FIRST)
    write_commit(tmp_path, SECOND)
    return tmp_path


def test_never_written(tmp_path):
    assert read_commit(tmp_path) is None
    assert read_commit(tmp_path / "no such folder") is None
    (tmp_path / "c.1").touch()  # killed before the first byte
    assert read_commit(tmp_path) is None
    (tmp_path / "c.1").write_bytes(bytes(100))  # of zeros that the file system has put there
    assert read_commit(tmp_path) is None
    assert read_slots(tmp_path) == [None, None]


def test_commits_alternate_and_the_newest_counts(tmp_path):
    for number in range(1, 6):
        commit = dataclasses.replace(FIRST, number=number, tokens=10 * number)
        other = tmp_path / f"c.{1 - number % 2}"
        before = other.read_bytes() if other.exists() else None
        write_commit(tmp_path, commit)
        assert read_commit(tmp_path) == as_read(commit)
        assert (other.read_bytes() if other.exists() else None) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.0", "c.1"]
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [SLOT_BYTES] * 2
    assert [slot.number for slot in read_slots(tmp_path)] == [4, 5]


def test_a_shorter_record_leaves_nothing_of_a_longer_one(tmp_path):
    long = dataclasses.replace(FIRST, arrays={f"fitted/{i}": ("float32", [2, 2, 16], i) for i in range(40)})
    write_commit(tmp_path, long)
    write_commit(tmp_path, dataclasses.replace(FIRST, number=3))
    assert read_commit(tmp_path) == as_read(dataclasses.replace(FIRST, number=3))
    slot = (tmp_path / "c.1").read_bytes()
    assert slot.rstrip(b"\0").endswith(b"}}")
    assert b"fitted/1" not in slot


def test_the_layout_is_what_the_module_says(folder):
    slot = (folder / "c.0").read_bytes()
    assert slot[:8] == b"kvtier.1"
    assert int.from_bytes(slot[8:16], "little") == 2
    length = int.from_bytes(slot[16:20], "little")
    payload = slot[24 : 24 + length]
    assert json.loads(payload)["tokens"] == 130
    assert int.from_bytes(slot[20:24], "little") == checksum(slot[8:20] + payload)
    assert not slot[24 + length :].strip(b"\0")


def test_the_newer_slot_torn_at_any_byte(folder):
    """As much of a third commit as was written, over the first one: either it is whole, or the second counts."""
    path, before = folder / "c.1", (folder / "c.1").read_bytes()
    third = dataclasses.replace(FIRST, number=3, tokens=999)
    write_commit(folder, third)
    after = path.read_bytes()
    end = len(after.rstrip(b"\0"))
    assert end < 400
    seen = set()
    for n in (*range(end + 2), 512, 1024, 4095):
        path.write_bytes(after[:n] + before[n:])
        commit = read_commit(folder)
        assert commit in (as_read(SECOND), as_read(third)), n
        assert n < end or commit == as_read(third), n
        seen.add(commit.number)
        path.write_bytes(after[:n])  # or the file was cut off there
        assert read_commit(folder) == as_read(SECOND), n
    assert seen == {2, 3}


def test_any_byte_of_the_newest_slot_changed(folder):
    path, whole = folder / "c.0", (folder / "c.0").read_bytes()
    for at in range(len(whole.rstrip(b"\0"))):
        for bit in (1, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            assert read_commit(folder) == as_read(FIRST), at
            assert read_slots(folder)[0] == f"the checksum of {path} is wrong"


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_garbage_is_never_a_commit(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("garbage")
    write_commit(folder, FIRST)
    length = data.draw(st.sampled_from([1, 23, 24, 25, 512, SLOT_BYTES - 1, SLOT_BYTES, SLOT_BYTES + 1]))
    garbage = np.random.default_rng(data.draw(st.integers(0, 2**32))).bytes(length)
    header = data.draw(st.integers(0, 24))  # as much of it as makes sense
    (folder / "c.0").write_bytes((folder / "c.1").read_bytes()[:header] + garbage[header:])
    assert read_commit(folder) == as_read(FIRST)


@pytest.mark.parametrize(
    "damage", [b"", b"x", b"x" * SLOT_BYTES, bytes(SLOT_BYTES)], ids=["empty", "short", "garbage", "zeros"]
)
def test_one_slot_of_any_content(damage, folder):
    (folder / "c.0").write_bytes(damage)
    assert read_commit(folder) == as_read(FIRST)
    write_commit(folder, dataclasses.replace(SECOND, number=2))
    (folder / "c.1").write_bytes(damage)
    assert read_commit(folder) == as_read(SECOND)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b"x" * SLOT_BYTES, r"the checksum of .*c\.0 is wrong"),
        (b"x" * 100, r".*c\.0 has 100 bytes instead of 4096"),
        (b"x" * (SLOT_BYTES + 1), r".*c\.0 has 4097 bytes instead of 4096"),
    ],
    ids=["garbage", "short", "long"],
)
def test_both_slots_damaged(damage, reason, folder):
    for i in (0, 1):
        (folder / f"c.{i}").write_bytes(damage)
    with pytest.raises(StoreError, match=f"its commit record cannot be read: {reason}"):
        read_commit(folder)
    (folder / "c.1").unlink()  # one damaged, one never written: there was a commit
    with pytest.raises(StoreError, match=reason):
        read_commit(folder)


def test_a_slot_that_cannot_be_read_is_damaged(folder):
    (folder / "c.0").unlink()
    (folder / "c.0").mkdir()
    assert read_commit(folder) == as_read(FIRST)
    assert "Is a directory" in read_slots(folder)[0]


def test_a_write_that_fails_leaves_the_newest_commit(folder, monkeypatch):
    def fails(fd, data, offset):
        written(fd, data[:100], offset)
        raise OSError(28, "No space left on device")

    written = os.pwrite
    monkeypatch.setattr(commit_record.os, "pwrite", fails)
    with pytest.raises(OSError, match="No space left"):
        write_commit(folder, dataclasses.replace(FIRST, number=3, blocks_crc=8))
    assert read_commit(folder) == as_read(SECOND)


def test_the_longest_record_fits(tmp_path):
    """All arrays that there can be, numbers as long as they get; and one that does not fit is no silent loss."""
    most = 2**40
    names = [f"fitted/{i}" for i in range(len(KINDS) + 4)]
    names += [f"window0/{part}" for part in ("sinks", "tokens", "sliding", "queries/sums", "queries/start")]
    arrays = {name: ("float32", [2, 1000, 1000, 100000, 1000], 2**32 - 1) for name in names}
    commit = Commit(2**64 - 2, most, most, most, True, True, 1, most, most, 2**32 - 1, 2**32 - 1, arrays)
    write_commit(tmp_path, commit)
    assert read_commit(tmp_path) == as_read(commit)
    huge = dataclasses.replace(commit, arrays={f"fitted/{i}": arrays["fitted/0"] for i in range(100)})
    with pytest.raises(AssertionError, match="too long"):
        write_commit(tmp_path, huge)
    assert read_commit(tmp_path) == as_read(commit)


def test_checksums_go_on_from_one_another():
    data = np.arange(1000, dtype="<i8")
    assert checksum(data[100:], checksum(data[:100])) == checksum(data) == checksum(data.tobytes())
    assert checksum(b"123456789") == 0xE3069283  # crc32c of every standard
