"""Fixed-size records in the shard files of a zarr v3 array: offsets by arithmetic, I/O by system calls.

One file holds ``S`` records of ``R`` bytes: record ``i`` of the array is at byte ``(i % S) * R`` of file
``c/<i // S>/0``. The shard index that zarr readers want follows the records and never changes: it lists
every record at that place, written or not. Payloads are padded to a multiple of 4096 bytes, for reads that
bypass the page cache.
"""

import errno
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import StoreError
from kvtier.runtime.tier import Ids

BLOCK_BYTES = 4096
"""Alignment of records, and what file systems hand out at least."""
SHARD_BYTES = 16 * 2**20
"""Records of one file, about: a full device is met at most this far ahead of its last byte."""
MAX_OPEN_FILES = 128
"""Shards kept open at once; the usual soft limit of a process is 1024 files."""

_INDEX_ENTRY_BYTES = 16
_INDEX_CHECKSUM_BYTES = 4
_DIRECTORY_BYTES = 2 * BLOCK_BYTES  # each shard has its own, and an entry in the one above
_RECORDS_PER_CALL = 512  # a record and its padding are two buffers, and the kernel takes 1024

Payload = npt.NDArray[np.uint8]
"""Payloads of records, [n, payload_bytes], contiguous."""


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


@dataclass(frozen=True, slots=True)
class _Run:
    """Records that lie side by side in one file."""

    shard: int
    offset: int
    rows: Ids
    """Where their payloads are in the caller's array."""


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
        self.n_shards = 0
        self._path = array_path
        self._index = layout.index()
        self._fds: OrderedDict[int, int] = OrderedDict()  # least recently used first
        pad_bytes = layout.record_bytes - layout.payload_bytes
        self._zeros = memoryview(bytes(pad_bytes))
        self._sink = memoryview(bytearray(pad_bytes))

    def file_of(self, shard: int) -> Path:
        """Path of a shard, by zarr's default chunk key encoding."""
        return self._path / "c" / str(shard) / "0"

    def add(self) -> None:
        """Create the next shard in full size, so that a full device is met here and not at a later write."""
        path = self.file_of(self.n_shards)
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
        self.n_shards += 1

    def remove_last(self) -> None:
        """Undo the last ``add``."""
        self.n_shards -= 1
        if (fd := self._fds.pop(self.n_shards, None)) is not None:
            os.close(fd)
        shutil.rmtree(self.file_of(self.n_shards).parent, ignore_errors=True)

    def write(self, records: Ids, payload: Payload) -> None:
        """Write ``payload`` [n, payload_bytes] to ``records`` [n], no two equal."""
        view = payload.reshape(-1).data
        for run in self._runs(records):
            buffers = self._buffers(view, run.rows, self._zeros)
            try:
                _expect(os.pwritev(self._fd(run.shard), buffers, run.offset), sum(map(len, buffers)))
            except OSError as error:
                raise self._failed("written", run.shard, error) from error

    def read(self, records: Ids, payload: Payload) -> None:
        """Read ``records`` [n] into ``payload`` [n, payload_bytes], in the caller's order."""
        view = payload.reshape(-1).data
        runs = list(self._runs(records))
        # As many runs as files may be open, so that none is opened twice.
        for begin in range(0, len(runs), MAX_OPEN_FILES):
            group = runs[begin : begin + MAX_OPEN_FILES]
            for run in group if len(group) > 1 else ():
                self._announce(run)
            for run in group:
                self._read_run(run, view)

    def close(self) -> None:
        """Close all files."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _announce(self, run: _Run) -> None:
        """Start the read of a run in the kernel: the device then works on many while we wait for each."""
        try:
            length = len(run.rows) * self.layout.record_bytes
            os.posix_fadvise(self._fd(run.shard), run.offset, length, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise self._failed("read", run.shard, error) from error

    def _read_run(self, run: _Run, view: memoryview) -> None:
        buffers = self._buffers(view, run.rows, self._sink)
        try:
            _expect(os.preadv(self._fd(run.shard), buffers, run.offset), sum(map(len, buffers)))
        except OSError as error:
            raise self._failed("read", run.shard, error) from error

    def _runs(self, records: Ids) -> Iterator[_Run]:
        """``records`` in the order of the device, neighbours merged."""
        order = np.argsort(records, kind="stable")
        shards, inside = np.divmod(records[order], self.layout.n_records)
        begins_run = (np.diff(inside, prepend=-2) != 1) | (np.diff(shards, prepend=-1) != 0)
        begins_run |= np.arange(len(order)) % _RECORDS_PER_CALL == 0
        begins = np.flatnonzero(begins_run)
        ends = np.append(begins[1:], len(order))
        offsets = inside[begins] * self.layout.record_bytes
        columns = (shards[begins].tolist(), offsets.tolist(), begins.tolist(), ends.tolist())
        for shard, offset, begin, end in zip(*columns, strict=True):
            yield _Run(shard, offset, order[begin:end])

    def _buffers(self, view: memoryview, rows: Ids, padding: memoryview) -> list[memoryview]:
        """The memory of ``rows``, padding between them; one buffer if they lie side by side there, too."""
        size = self.layout.payload_bytes
        first, n = int(rows[0]), len(rows)
        if n == 1 or (not padding and (np.diff(rows) == 1).all()):
            return [view[first * size : (first + n) * size]]
        pieces = [view[row * size : (row + 1) * size] for row in rows.tolist()]
        if not padding:
            return pieces
        return [buffer for piece in pieces for buffer in (piece, padding)]

    def _fd(self, shard: int) -> int:
        fd = self._fds.get(shard)
        if fd is None:
            if len(self._fds) >= MAX_OPEN_FILES:
                os.close(self._fds.popitem(last=False)[1])
            fd = self._fds[shard] = os.open(self.file_of(shard), os.O_RDWR)
        else:
            self._fds.move_to_end(shard)
        return fd

    def _failed(self, verb: str, shard: int, error: OSError) -> StoreError:
        return StoreError(
            f"{self.file_of(shard)} cannot be {verb}: {error}. Was the file changed while kvtier used it? "
            "Other files are not affected; check the device, or choose another [store] path."
        )

    def _no_room(self, path: Path, error: OSError) -> StoreError:
        needed = format_bytes(self.layout.disk_bytes)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = format_bytes(shutil.disk_usage(self._path).free)
            reason = "the device is full" if error.errno == errno.ENOSPC else "your quota is used up"
            return StoreError(
                f"{path}: {reason}: {needed} were needed for the next chunks, {free} are free. Nothing "
                "stored is damaged. Free space there, lower [budget] disk to what the device can hold, or "
                "choose another [store] path."
            )
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
