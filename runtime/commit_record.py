"""The commit record of a saved sequence: two slots written in turn, so that one of them is always whole.

On the disk it is a zarr array of 8192 bytes in two files of 4096, ``commit/c.0`` and ``commit/c.1``. A slot:
``magic [8] | number uint64 | length uint32 | crc32c uint32 | JSON [length] | zeros``; the checksum is of everything but
itself, the highest number whose checksum is right counts.

Until the first commit is on the disk, the sequence's folder holds a folder ``UNCOMMITTED``: without it and without a
commit, a sequence has lost its commits.
"""

import json
import os
import shutil
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvtier.runtime.errors import StoreError
from kvtier.runtime.zarr_arrays import sync_folder

SLOT_BYTES = 4096
UNCOMMITTED = "uncommitted"
"""In a sequence's folder until its first commit; a zarr group, since zarr warns of what is none."""
_MAGIC = b"kvtier.1"
_HEADER = struct.Struct("<8sQII")


@dataclass(frozen=True, slots=True)
class Commit:
    """How much of a sequence's files counts. Whatever lies beyond was never committed."""

    number: int
    """Of this commit, from 1 on."""
    tokens: int
    chunks: int
    """Middle chunks, those inherited from other sequences included."""
    blocks: int
    complete: bool
    """Whether this is what was to be saved; else a prefill that was interrupted, or goes on."""
    rewound: bool
    window: int
    """0 or 1: which of the two window groups."""
    window_begin: int
    sliding_begin: int
    tokens_crc: int
    """crc32c of the committed part of ``tokens``."""
    blocks_crc: int
    arrays: dict[str, tuple[str, list[int], int]]
    """Small arrays in one file each: dtype, shape and crc32c by name."""

    @property
    def window_name(self) -> str:
        """Of the group that holds the window."""
        return f"window{self.window}"


def checksum(data: object, start: int = 0) -> int:
    """crc32c of bytes or a contiguous numpy array, going on from ``start``; imported late, like zarr."""
    import google_crc32c

    value: int = google_crc32c.extend(start, data)
    return value


def checksums(records: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """crc32c of each of ``records`` [n, bytes], contiguous: uint32 [n]."""
    return np.fromiter((checksum(record) for record in records), np.uint32, len(records))


def read_commit(folder: Path) -> Commit | None:
    """The last commit in the array ``folder``, None if there was none; raises StoreError if none can be read."""
    slots = read_slots(folder)
    whole = [slot for slot in slots if isinstance(slot, Commit)]
    if whole:
        return max(whole, key=lambda commit: commit.number)
    problem = next((slot for slot in slots if isinstance(slot, str)), None)
    if problem is not None:
        raise StoreError(f"its commit record cannot be read: {problem}")
    return None


def read_slots(folder: Path) -> list[Commit | str | None]:
    """Both slots: the commit, what is wrong with it, or None for one that was never written."""
    return [_read_slot(folder / f"c.{i}") for i in (0, 1)]


def write_commit(folder: Path, commit: Commit) -> None:
    """Put ``commit`` on the disk, over the older slot; raises OSError with the newer slot unharmed.

    ``folder`` : of the array, in the sequence's folder
    """
    payload = json.dumps(asdict(commit), separators=(",", ":")).encode()
    assert len(payload) <= SLOT_BYTES - _HEADER.size, "the commit record is too long"
    head = struct.pack("<QI", commit.number, len(payload))
    header = _HEADER.pack(_MAGIC, commit.number, len(payload), checksum(head + payload))
    path = folder / f"c.{commit.number % 2}"
    is_new = not path.exists()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(fd, (header + payload).ljust(SLOT_BYTES, b"\0"), 0)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    if is_new:
        sync_folder(folder)
        end_uncommitted(folder.parent)


def end_uncommitted(sequence: Path) -> None:
    """After the first commit: on the disk when this returns, so that it is never taken for one that had none."""
    if (sequence / UNCOMMITTED).exists():
        shutil.rmtree(sequence / UNCOMMITTED)
        sync_folder(sequence)


def _read_slot(path: Path) -> Commit | str | None:
    """A commit, what is wrong with it, or None for a slot that was never written."""
    try:
        slot = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error)
    if not slot.strip(b"\0"):
        return None  # created, and killed before it was written
    if len(slot) != SLOT_BYTES:
        return f"{path} has {len(slot)} bytes instead of {SLOT_BYTES}"
    magic, number, length, expected = _HEADER.unpack_from(slot)
    payload = slot[_HEADER.size : _HEADER.size + length]
    if magic != _MAGIC or checksum(struct.pack("<QI", number, length) + payload) != expected:
        return f"the checksum of {path} is wrong"
    return Commit(**json.loads(payload))
