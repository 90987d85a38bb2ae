"""Batched reads and writes of whole records in files, past the page cache.

A batch is sorted by file and offset, neighbours become one request of up to a MiB, and the requests go in pieces
through two page-aligned staging buffers: the device works for one while the records of the other are copied. A piece
is waited for in one call that holds no interpreter lock. Of three engines, the first that works in a folder serves it:
Linux native AIO with O_DIRECT; four threads with O_DIRECT; the page cache, told in advance what will be read.
"""

import bisect
import contextlib
import errno
import mmap
import os
import shutil
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.direct_lanes import (
    BLOCK_BYTES,
    MAX_REQUESTS,
    N_THREADS,
    AioLane,
    Bytes,
    CallLane,
    Lane,
    Piece,
    Tasks,
    TransferError,
    libc,
    open_locked,
    start_threads,
)
from kvtier.runtime.errors import StoreError
from kvtier.runtime.tier import Ids

REQUEST_BYTES = 2**20
"""Neighbours are merged up to this size."""
STAGING_BYTES = 4 * 2**20
"""Of one staging buffer: there are two for reads and two for writes. More only for records that are larger."""
SMALL_PIECE_BYTES = 2**20
MAX_OPEN_FILES = 128
"""Descriptors kept open at once, half of them for reads; the usual soft limit of a process is 1,024."""

AIO, THREADS, BUFFERED = "native AIO, direct", "threads, direct", "threads, buffered"

_MEANINGS: dict[int | None, tuple[str, str]] = {  # and what to do
    errno.ENOENT: ("Something removed it while kvtier used it.", "leave the folder to kvtier"),
    errno.EMFILE: ("This process has too many files open.", "raise its limit (ulimit -n)"),
    errno.ENFILE: ("All processes together have too many files open.", "raise fs.file-max"),
    errno.EACCES: ("The rights do not allow it.", "change them"),
    errno.EROFS: ("The file system is mounted read-only, perhaps after an error.", "check the device and its log"),
}
_warned: set[str] = set()  # of these reasons this process was told


class _Side:
    """Reads, or writes: two lanes that take turns, and their open files. One batch at a time."""

    def __init__(self, verb: str, lanes: Sequence[Lane], flags: int) -> None:
        self.lock = threading.Lock()
        self._verb = verb
        self._lanes = lanes
        self._flags = flags | os.O_CLOEXEC
        self._fds: OrderedDict[Path, int] = OrderedDict()  # least recently used first
        self._closed = False
        self._fds_lock = threading.Lock()  # files are forgotten while a batch of others runs

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """When this ends, nothing is under way: the next batch uses the same memory."""
        with self.lock:
            try:
                yield
            except BaseException:
                for lane in self._lanes:
                    lane.settle()
                raise

    def records(self, turn: int, record_bytes: int) -> Bytes:
        """The staging buffer as records."""
        memory = self._lanes[turn % 2].memory
        return memory[: len(memory) // record_bytes * record_bytes].reshape(-1, record_bytes)

    def start(self, turn: int, files: Sequence[Path], piece: Piece) -> None:
        numbers = piece.which.tolist()
        fds = {number: self.fd(files[number]) for number in dict.fromkeys(numbers)}
        with self._explained(files, piece):
            self._lanes[turn % 2].start(np.array([fds[number] for number in numbers]), piece)

    def finish(self, turn: int, files: Sequence[Path], piece: Piece) -> None:
        with self._explained(files, piece):
            self._lanes[turn % 2].finish()

    @contextlib.contextmanager
    def _explained(self, files: Sequence[Path], piece: Piece) -> Iterator[None]:
        try:
            yield
        except TransferError as failed:
            i = failed.index
            file, offset, nbytes = files[piece.which[i]], int(piece.offsets[i]), int(piece.lengths[i])
            raise _explain(file, self._verb, offset, nbytes, failed.cause) from failed.cause

    def fd(self, file: Path) -> int:
        """The file's descriptor, which stays open until the next piece has started and this one is done."""
        with self._fds_lock:
            assert not self._closed, "this RecordIO is closed"
            if file in self._fds:
                self._fds.move_to_end(file)
                return self._fds[file]
            if len(self._fds) >= 2 * _files_of_a_piece():
                libc("close", True)(self._fds.popitem(last=False)[1])
            try:
                fd = self._fds[file] = open_locked(file, self._flags)
            except OSError as error:
                raise _explain(file, self._verb, 0, 0, error) from error
            return fd

    def forget(self, file: Path) -> None:
        with self._fds_lock:
            if (fd := self._fds.pop(file, None)) is not None:
                os.close(fd)

    def close(self) -> None:
        with self.lock:
            self._closed = True
            closing = [threading.Thread(target=lane.close) for lane in self._lanes]
            for thread in closing:  # at once: io_destroy takes 30 ms
                thread.start()
            for thread in closing:
                thread.join()
            for file in list(self._fds):
                self.forget(file)


class RecordIO:
    """Reads and writes records of ``payload_bytes``, padded to a multiple of 4096, in files below ``folder``.

    One thread may read while another writes. After an error or Ctrl-C nothing is under way any more; what a write that
    failed was to change is undefined.

    Parameters
    ----------
    folder
        Exists; may be read-only if it has files. One of them, else a temporary one, shows which engine serves.
    payload_bytes
        Bytes of a record that mean something. Padding is written as zeros.

    Attributes
    ----------
    record_bytes
        The payload, padded.
    path_name
        The engine: "native AIO, direct", "threads, direct" or "threads, buffered".

    Raises
    ------
    StoreError
        No file can be made in ``folder``.
    """

    def __init__(self, folder: Path, payload_bytes: int) -> None:
        assert payload_bytes > 0, f"records of {payload_bytes} bytes"
        self.record_bytes = -(-payload_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._payload_bytes = payload_bytes
        self._tasks: Tasks | None = None
        staging_bytes = max(STAGING_BYTES, self.record_bytes)
        self.path_name, lanes = _engine_of(folder, staging_bytes)
        direct = 0 if self.path_name == BUFFERED else os.O_DIRECT
        if self.path_name == THREADS:
            self._tasks = start_threads()
        if not lanes:
            lanes = [CallLane(staging_bytes, writes, self._tasks) for writes in (False, False, True, True)]
        self._reads = _Side("read", lanes[:2], os.O_RDONLY | direct)
        self._writes = _Side("written", lanes[2:], os.O_RDWR | direct)

    def read(self, files: Sequence[Path], which: Ids, offsets: Ids, out: Bytes) -> None:
        """Read records into ``out``.

        Parameters
        ----------
        files
            Those that ``which`` numbers.
        which, offsets
            [n]: the file of each record, as an index into ``files``, and where it begins there, in bytes, a multiple of
            4096. A record may be asked for several times.
        out
            [n, payload_bytes].

        Raises
        ------
        StoreError
            A file is missing or too short, or the device fails; ``out`` is undefined then.
        """
        pieces = self._plan(which, offsets, out)
        with self._reads.batch():
            for turn in range(len(pieces) + 1):
                if turn < len(pieces):
                    self._reads.start(turn, files, pieces[turn])
                if turn > 0:
                    piece = pieces[turn - 1]
                    self._reads.finish(turn - 1, files, piece)
                    staged = self._reads.records(turn - 1, self.record_bytes)
                    # numpy keeps the interpreter lock in this assignment, and not in one to a slice: see libc
                    out[piece.rows] = staged[piece.slots, : self._payload_bytes]

    def write(self, files: Sequence[Path], which: Ids, offsets: Ids, payload: Bytes) -> None:
        """Write ``payload`` [n, payload_bytes] to records, no two of them the same; other arguments as of ``read``.

        Files exist and are long enough, or grow. Durable after ``sync``. Raises StoreError when a file is missing or
        the device is full or fails.
        """
        pieces = self._plan(which, offsets, payload)
        assert sum(piece.lengths.sum() for piece in pieces) == len(which) * self.record_bytes, "a record occurs twice"
        with self._writes.batch():
            for turn in range(len(pieces) + 2):
                if turn > 1:
                    self._writes.finish(turn - 2, files, pieces[turn - 2])
                if turn < len(pieces):
                    piece = pieces[turn]
                    staged = self._writes.records(turn, self.record_bytes)
                    slots = np.arange(len(piece.rows))
                    staged[slots, : self._payload_bytes] = payload[_slice_of(piece.rows)]
                    self._writes.start(turn, files, piece)

    def sync(self, file: Path) -> None:
        """Make durable what was written to ``file``. Raises StoreError."""
        with self._writes.lock:
            fd = self._writes.fd(file)
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise _explain(file, "written", 0, 0, error) from error

    def forget(self, file: Path) -> None:
        """Close ``file``, which will be removed or replaced and of which nothing is being read or written."""
        self._reads.forget(file)
        self._writes.forget(file)

    def close(self) -> None:
        """Close all files and free all memory. A second call does nothing."""
        closing = threading.Thread(target=self._writes.close)
        closing.start()
        self._reads.close()
        closing.join()
        if self._tasks is not None:
            for _ in range(N_THREADS):
                self._tasks.put(None)
            self._tasks = None

    def _plan(self, which: Ids, offsets: Ids, payload: Bytes) -> list[Piece]:
        """The distinct records in the order of the device, neighbours in one request, in pieces that fit."""
        assert payload.dtype == np.uint8, f"payloads are {payload.dtype}"
        assert payload.shape == (len(which), self._payload_bytes), f"payloads {payload.shape}, {self._payload_bytes}"
        assert not (offsets % BLOCK_BYTES).any(), "an offset is not a multiple of 4096"
        order = np.lexsort((offsets, which))
        which, offsets = which[order], offsets[order]
        repeats = (which[1:] == which[:-1]) & (offsets[1:] == offsets[:-1])
        records = None  # of the rows; the rows' own numbers as long as no record occurs twice
        if repeats.any():
            fresh = np.append(True, ~repeats)
            records = np.cumsum(fresh) - 1
            which, offsets = which[fresh], offsets[fresh]
        firsts = self._requests(which, offsets)
        pieces = []
        for begin, end in self._cut(which, firsts):
            first, last = firsts[begin], firsts[end] if end < len(firsts) else len(which)
            mine, ends = firsts[begin:end], np.append(firsts[begin + 1 : end], last)
            rows, slots = slice(first, last), slice(0, last - first)
            if records is not None:
                rows = slice(*np.searchsorted(records, (first, last)).tolist())
                slots = records[rows] - first
            sizes = (ends - mine) * self.record_bytes
            places = (mine - first) * self.record_bytes
            pieces.append(Piece(which[mine], offsets[mine], places, sizes, order[rows], slots))
        return pieces

    def _requests(self, which: Ids, offsets: Ids) -> Ids:
        """The first record of each request."""
        numbers = np.arange(len(which))
        joins = (which[1:] == which[:-1]) & (offsets[1:] - offsets[:-1] == self.record_bytes)
        if not joins.any():
            return numbers
        run_begins = np.maximum.accumulate(np.where(np.append(True, ~joins), numbers, 0))
        return np.flatnonzero((numbers - run_begins) % max(1, REQUEST_BYTES // self.record_bytes) == 0)

    def _cut(self, which: Ids, firsts: Ids) -> Iterator[tuple[int, int]]:
        """Requests, begin and end, of each piece."""
        # At least two pieces, unless they are small: then the copy of the first costs no time.
        capacity = max(-(-len(which) // 2), SMALL_PIECE_BYTES // self.record_bytes)
        capacity = max(1, min(capacity, STAGING_BYTES // self.record_bytes))
        starts = [*firsts.tolist(), len(which)]
        files = which[firsts]
        n_files = np.cumsum(files != np.append(files[:1], files[:-1])).tolist()
        begin = 0
        while begin < len(firsts):
            fits = bisect.bisect_right(starts, starts[begin] + capacity, begin) - 1
            open_at_once = bisect.bisect_left(n_files, n_files[begin] + _files_of_a_piece(), begin)
            end = min(fits, open_at_once, begin + MAX_REQUESTS)
            yield begin, end
            begin = end


def _engine_of(folder: Path, nbytes: int) -> tuple[str, list[Lane]]:
    """The engine that serves ``folder``, and two lanes for reads and two for writes if it is native AIO."""
    try:
        with _some_file(folder) as path:
            no_direct = _refusal_of_direct(path)
            lanes, no_aio = ([], None) if no_direct else _try_aio(path, nbytes)
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be used: no file can be made there, or read: {error}. Free space there, check the rights "
            "and the device, or choose another [store] path."
        ) from error
    if no_direct is not None:
        _tell_once(
            f"{folder}: the file system does not do O_DIRECT ({no_direct}), so the disk tier goes through the page "
            "cache. That takes host memory which no budget counts, and more processor time. A [store] path on a local "
            "disk with ext4 or xfs avoids it.",
            f"{BUFFERED} {no_direct.errno}",
        )
        return BUFFERED, []
    if no_aio is not None:
        _tell_once(
            f"{folder}: native AIO is refused ({no_aio}), so the disk tier uses {N_THREADS} threads. That takes more "
            "processor time, and much longer while another Python thread is busy: 64 chunks of 256 KiB took 250 ms "
            "instead of 16 ms. Allow io_setup, io_submit, io_getevents and io_destroy in the sandbox, or raise "
            "fs.aio-max-nr if others use it up.",
            f"{THREADS} {no_aio.errno}",
        )
        return THREADS, []
    return AIO, lanes


@contextlib.contextmanager
def _some_file(folder: Path) -> Iterator[Path]:
    """A file of at least a block: one that is in ``folder``, which may be read-only, else one that goes afterwards."""
    with os.scandir(folder) as entries:
        there = next((entry.path for entry in entries if entry.is_file() and entry.stat().st_size >= BLOCK_BYTES), None)
    if there is not None:
        yield Path(there)
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".kvtier-probe-") as file:
        file.truncate(BLOCK_BYTES)  # a hole: a full device has room for it
        yield Path(file.name)


def _refusal_of_direct(path: Path) -> OSError | None:
    """Why ``path`` cannot be read with O_DIRECT. Raises OSError for what has nothing to do with it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.preadv(fd, [mmap.mmap(-1, BLOCK_BYTES)], 0)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return error
        raise
    return None


def _try_aio(path: Path, nbytes: int) -> tuple[list[Lane], OSError | None]:
    """Two lanes for reads and two for writes, one of which has read ``path``; or none and why."""
    lanes: list[Lane] = []
    zero = np.zeros(1, np.int64)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        for writes in (False, False, True, True):
            lanes.append(AioLane(nbytes, writes))
        lanes[0].start(zero + fd, Piece(zero, zero, zero, zero + BLOCK_BYTES, zero, slice(0, 1)))
        lanes[0].finish()
    except (OSError, TransferError) as error:
        for lane in lanes:
            lane.close()
        cause = error.cause if isinstance(error, TransferError) else error
        assert isinstance(cause, OSError)
        return [], cause
    finally:
        os.close(fd)
    return lanes, None


def _files_of_a_piece() -> int:
    """At most: reads and writes have two pieces each under way, all of whose files are open."""
    return max(1, MAX_OPEN_FILES // 4)


def _slice_of(ids: Ids) -> Ids | slice:
    """``ids``, as a slice if they count up: numpy copies it without an intermediate copy."""
    first, last = int(ids[0]), int(ids[-1])
    if last - first == len(ids) - 1 and (np.diff(ids) == 1).all():
        return slice(first, last + 1)
    return ids


def _tell_once(message: str, reason: str) -> None:
    if reason not in _warned:
        warnings.warn(message, stacklevel=4)
        _warned.add(reason)


def no_room(path: Path, nbytes: int, code: int) -> StoreError:
    """The error for ``nbytes`` that the device of ``path`` cannot take: ``code`` is ENOSPC or EDQUOT."""
    folder = next(parent for parent in path.parents if parent.exists())
    free = format_bytes(shutil.disk_usage(folder).free)
    reason = "the device is full" if code == errno.ENOSPC else "your quota is used up"
    return StoreError(
        f"{path}: {reason}: {format_bytes(nbytes)} were needed for the next chunks, {free} are free. Nothing "
        "stored is damaged. Free space there, lower [budget] disk to what the device can hold, or "
        "choose another [store] path."
    )


def _explain(file: Path, verb: str, offset: int, nbytes: int, error: Exception) -> StoreError:
    """The error for ``nbytes`` at ``offset`` of ``file`` that cannot be ``verb``."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return no_room(file, nbytes, code)
    meaning, advice = _MEANINGS.get(code, ("Was the file changed while kvtier used it?", "check the device"))
    return StoreError(
        f"{file} cannot be {verb} at byte {offset}: {error}. {meaning} Other files are not affected; {advice}, or "
        "choose another [store] path."
    )
