"""Fixed-size records in the shard files of a zarr v3 array: offsets by arithmetic, I/O by ``runtime.direct_io``.

One file holds ``S`` records of ``R`` bytes: record ``i`` of the array is at byte ``(i % S) * R`` of file
``c/<i // S>/0``. The shard index that zarr readers want follows the records and never changes: it lists
every record at that place, written or not. Payloads are padded to a multiple of 4096 bytes, for reads that
bypass the page cache.

The checksum of each record stays in the memory of the process that wrote it, and every read is checked against it.
That finds what the device or another program made of a record, and a write that never arrived: then an older record,
another one or zeros are in its place. Cost: 1.7 us for a record of 16 KiB (10 GB/s), which the disk beside it takes
20 us to read (0.8 GB/s); 0.9 us for one of 4 KiB (one core of an AMD EPYC, google_crc32c 1.9, random records from a
virtual disk).
"""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.commit_record import checksums
from kvtier.runtime.direct_io import RecordIO, no_room
from kvtier.runtime.direct_lanes import BLOCK_BYTES as BLOCK_BYTES
from kvtier.runtime.direct_lanes import Bytes
from kvtier.runtime.errors import StoreError
from kvtier.runtime.tier import Ids

SHARD_BYTES = 16 * 2**20
"""Records of one file, about: a full device is met at most this far ahead of its last byte."""

_INDEX_ENTRY_BYTES = 16
_INDEX_CHECKSUM_BYTES = 4
_DIRECTORY_BYTES = 2 * BLOCK_BYTES  # each shard has its own, and an entry in the one above


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Sizes of one record and one shard file.

    Attributes
    ----------
    payload_bytes
        Bytes of a record that mean something.
    record_bytes
        R: the payload, padded.
    n_records
        S: records per shard.
    """

    payload_bytes: int
    record_bytes: int
    n_records: int

    @classmethod
    def fit(cls, payload_bytes: int, limit_bytes: int) -> "ShardLayout":
        """Shards of at most SHARD_BYTES, of which 8 or more fill ``limit_bytes`` almost completely."""
        record_bytes = _padded(payload_bytes)
        largest = cls(payload_bytes, record_bytes, max(1, SHARD_BYTES // record_bytes))
        n_shards = max(8, -(-limit_bytes // largest.disk_bytes))
        share = limit_bytes // n_shards // BLOCK_BYTES * BLOCK_BYTES - _DIRECTORY_BYTES - _INDEX_CHECKSUM_BYTES
        n_records = share // (record_bytes + _INDEX_ENTRY_BYTES)
        return cls(payload_bytes, record_bytes, min(max(1, n_records), largest.n_records))

    @property
    def file_bytes(self) -> int:
        """Length of a shard file: records, index, checksum of the index."""
        return self.n_records * (self.record_bytes + _INDEX_ENTRY_BYTES) + _INDEX_CHECKSUM_BYTES

    @property
    def disk_bytes(self) -> int:
        """What a shard takes from the device: whole blocks, its directory included."""
        return _padded(self.file_bytes) + _DIRECTORY_BYTES

    def index(self) -> bytes:
        """The index of every shard: (offset, length) of each record, little-endian uint64, and a crc32c."""
        import google_crc32c  # comes with zarr, which importing kvtier does not need

        entries = np.empty((self.n_records, 2), "<u8")
        entries[:, 0] = np.arange(self.n_records, dtype=np.uint64) * self.record_bytes
        entries[:, 1] = self.record_bytes
        encoded = entries.tobytes()
        checksum: int = google_crc32c.value(encoded)
        return encoded + checksum.to_bytes(_INDEX_CHECKSUM_BYTES, "little")


class ShardFiles:
    """The shard files of one array. Every failure is a StoreError that names the file.

    Parameters
    ----------
    array_path
        Folder of the array, which exists.
    layout
        Sizes.
    """

    def __init__(self, array_path: Path, layout: ShardLayout) -> None:
        self.layout = layout
        self._path = array_path
        self._index = layout.index()
        self._files: list[Path] = []
        self._sums = np.zeros(0, np.uint32)
        """By record, what was written last; with room to grow. Like page tables, no budget counts it."""
        self._made: RecordIO | None = None

    @property
    def n_shards(self) -> int:
        """Shards that exist."""
        return len(self._files)

    @property
    def path_name(self) -> str:
        """How records go to the device: see ``RecordIO``."""
        return self._io.path_name

    @property
    def _io(self) -> RecordIO:
        """Made for the first shard, so that a failure is one of ``add``."""
        if self._made is None:
            self._made = RecordIO(self._path, self.layout.payload_bytes)
        return self._made

    def file_of(self, shard: int) -> Path:
        """Path of a shard, by zarr's default chunk key encoding."""
        return self._path / "c" / str(shard) / "0"

    def add(self) -> None:
        """Create the next shard in full size, so that a full device is met here and not at a later write."""
        path, _ = self.file_of(self.n_shards), self._io
        try:
            path.parent.mkdir(parents=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                os.posix_fallocate(fd, 0, self.layout.file_bytes)
                _expect(os.pwrite(fd, self._index, self.layout.file_bytes - len(self._index)), len(self._index))
            finally:
                os.close(fd)
        except BaseException as error:  # Ctrl-C must not leave half a shard either
            shutil.rmtree(path.parent, ignore_errors=True)
            if isinstance(error, OSError):
                raise self._no_room(path, error) from error
            raise
        self._files.append(path)
        lacking = self.n_shards * self.layout.n_records - len(self._sums)
        if lacking > 0:
            self._sums = np.append(self._sums, np.zeros(max(lacking, len(self._sums)), np.uint32))

    def remove_last(self) -> None:
        """Undo the last ``add``."""
        path = self._files.pop()
        self._io.forget(path)
        shutil.rmtree(path.parent, ignore_errors=True)

    def write(self, records: Ids, payload: Bytes) -> None:
        """Write ``payload`` [n, payload_bytes] to ``records`` [n], no two equal."""
        shards, offsets = self._places(records)
        for shard in np.unique(shards).tolist():
            self._check_length(self._files[shard])
        self._io.write(self._files, shards, offsets, payload)
        self._sums[records] = checksums(payload)

    def read(self, records: Ids, payload: Bytes) -> None:
        """Read ``records`` [n] into ``payload`` [n, payload_bytes], in the caller's order.

        Raises StoreError also when one of them is not what ``write`` wrote; ``payload`` must not be used then.
        """
        shards, offsets = self._places(records)
        self._io.read(self._files, shards, offsets, payload)
        wrong = np.flatnonzero(checksums(payload) != self._sums[records])
        if wrong.size:
            first = wrong[0]
            raise StoreError(
                f"{self._files[shards[first]]} holds other data at byte {offsets[first]} than were written there "
                f"({wrong.size} of {len(records)} chunks read): another program changed the file, or the device lost a "
                "write or damages what it keeps. None of these chunks was used. Caches that need them cannot go on, "
                "all others can: check the device, or choose another [store] path, and read the text again."
            )

    def close(self) -> None:
        """Close all files."""
        if self._made is not None:
            self._made.close()

    def _check_length(self, path: Path) -> None:
        """Refuse a file that was cut off: written to, it would grow again, with zeros where chunks were."""
        try:
            size, expected = path.stat().st_size, self.layout.file_bytes
        except OSError:
            return  # if the file is not open, the write says so
        if size != expected:
            raise StoreError(
                f"{path} cannot be written: it has {size} bytes, it was made with {expected}. Was the file changed "
                "while kvtier used it? Other files are not affected; check the device, or choose another [store] path."
            )

    def _places(self, records: Ids) -> tuple[Ids, Ids]:
        """Shard and byte offset in it of each record."""
        shards, inside = np.divmod(records, self.layout.n_records)
        return shards, inside * self.layout.record_bytes

    def _no_room(self, path: Path, error: OSError) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return no_room(path, self.layout.disk_bytes, error.errno)
        needed = format_bytes(self.layout.disk_bytes)
        return StoreError(
            f"{path} cannot be created with {needed}: {error}. Nothing stored is damaged. "
            "Check the rights and the device, or choose another [store] path."
        )


def _padded(nbytes: int) -> int:
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def _expect(transferred: int, asked: int) -> None:
    """A file that is as long as we made it never gives or takes less than asked."""
    if transferred != asked:
        raise OSError(errno.EIO, f"{transferred} of {asked} bytes transferred, the file is too short")
