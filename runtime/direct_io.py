"""Batched reads and writes of whole records in files, past the page cache.

A batch is sorted by file and offset, neighbours become one request of up to a MiB, and the requests go in pieces
through two page-aligned staging buffers: the device works for one while the records of the other are copied. A piece
is waited for in one call that holds no interpreter lock. Of three engines, the first that works in a folder serves it:
Linux native AIO with O_DIRECT; four threads with O_DIRECT; the page cache, told in advance what will be read.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import platform
import queue
import shutil
import sys
import tempfile
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import StoreError
from kvtier.runtime.tier import Ids

BLOCK_BYTES = 4096
"""Alignment of records, in memory and in files."""
REQUEST_BYTES = 2**20
"""Neighbours are merged up to this size."""
STAGING_BYTES = 4 * 2**20
"""Of one staging buffer: there are two for reads and two for writes. More only for records that are larger."""
SMALL_PIECE_BYTES = 2**20
HUGE_PAGE_BYTES = 2 * 2**20
MAX_REQUESTS = 256
"""Of one piece. Four times this counts against the machine's fs.aio-max-nr, usually 65,536."""
MAX_OPEN_FILES = 128
"""Descriptors kept open at once, half of them for reads; the usual soft limit of a process is 1,024."""
N_THREADS = 4
PATIENCE_SECONDS = 10.0
"""With a kernel that takes no request although none of ours is under way."""

AIO, THREADS, BUFFERED = "native AIO, direct", "threads, direct", "threads, buffered"

Bytes = npt.NDArray[np.uint8]
Tasks = queue.SimpleQueue[Callable[[], None] | None]

_SYSCALLS = {
    "x86_64": {"io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209},
    "aarch64": {"io_setup": 0, "io_destroy": 1, "io_submit": 2, "io_getevents": 4},
}
# struct iocb and struct io_event of linux/aio_abi.h on little-endian machines
_IOCB = np.dtype(
    {
        "names": ["tag", "opcode", "fd", "memory", "nbytes", "offset"],
        "formats": ["<u8", "<u2", "<u4", "<u8", "<i8", "<i8"],
        "offsets": [0, 16, 20, 24, 32, 40],
        "itemsize": 64,
    }
)
_EVENT = np.dtype([("tag", "<i8"), ("iocb", "<u8"), ("result", "<i8"), ("result2", "<i8")])
_MEANINGS: dict[int | None, tuple[str, str]] = {  # and what to do
    errno.ENOENT: ("Something removed it while kvtier used it.", "leave the folder to kvtier"),
    errno.EMFILE: ("This process has too many files open.", "raise its limit (ulimit -n)"),
    errno.ENFILE: ("All processes together have too many files open.", "raise fs.file-max"),
    errno.EACCES: ("The rights do not allow it.", "change them"),
    errno.EROFS: ("The file system is mounted read-only, perhaps after an error.", "check the device and its log"),
}
_warned: set[str] = set()  # of these reasons this process was told


class _TransferError(Exception):
    """Request ``index`` of a piece failed because of ``cause``."""

    def __init__(self, index: int, cause: Exception) -> None:
        super().__init__(index, cause)
        self.index = index
        self.cause = cause


@dataclass(frozen=True, slots=True)
class _Piece:
    """Requests [q] that share a staging buffer, and the caller's rows [r] that are in it."""

    which: Ids
    """File of a request, by the caller's numbers."""
    offsets: Ids
    """In the file, in bytes."""
    places: Ids
    """In the staging buffer, in bytes."""
    lengths: Ids
    """In bytes."""
    rows: Ids
    slots: Ids
    """Record of each row in the staging buffer."""


class _Lane(ABC):
    """A staging buffer and the requests of one piece between it and files.

    ``start`` and ``finish`` raise _TransferError; ``settle`` is due then, and after any other exception.
    """

    def __init__(self, nbytes: int, writes: bool) -> None:
        self.memory = _staging(nbytes)
        self._writes = writes

    @abstractmethod
    def start(self, fds: Ids, piece: _Piece) -> None:
        """Begin; ``fds`` [q] stay open until ``finish``."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all is done."""

    @abstractmethod
    def settle(self) -> None:
        """Return when no request is under way any more, whatever happened before."""

    def close(self) -> None:
        self.settle()

    def _transfer(self, fd: int, memory: Bytes, offset: int, done: int = 0) -> None:
        """Read or write what is missing of a request."""
        call = os.pwritev if self._writes else os.preadv
        while done < len(memory):
            n = call(fd, [memory[done:].data], offset + done)
            if n < BLOCK_BYTES:
                reason = f"{done + n} of {len(memory)} bytes transferred, the file is too short"
                raise OSError(errno.EIO, reason)
            done += n // BLOCK_BYTES * BLOCK_BYTES  # O_DIRECT goes on at whole blocks only


class _AioLane(_Lane):
    """Linux native AIO. Raises OSError where it is not to be had."""

    def __init__(self, nbytes: int, writes: bool) -> None:
        super().__init__(nbytes, writes)
        self._context = np.zeros(1, np.uint64)
        self._iocbs = np.zeros(MAX_REQUESTS, _IOCB)
        self._iocbs["tag"] = np.arange(MAX_REQUESTS)
        self._iocbs["opcode"] = int(writes)  # IOCB_CMD_PREAD is 0, IOCB_CMD_PWRITE is 1
        self._addresses = self._iocbs.ctypes.data + np.arange(MAX_REQUESTS) * _IOCB.itemsize
        self._events = np.zeros(MAX_REQUESTS, _EVENT)
        self._n = self._n_submitted = self._n_done = 0
        self._busy = False
        self._set_up()

    def _set_up(self) -> None:
        _syscall("io_setup", MAX_REQUESTS, self._context.ctypes.data)

    def start(self, fds: Ids, piece: _Piece) -> None:
        self.settle()
        if not self._context[0]:
            self._set_up()
        iocbs = self._iocbs[: len(fds)]
        iocbs["fd"], iocbs["offset"], iocbs["nbytes"] = fds, piece.offsets, piece.lengths
        iocbs["memory"] = self.memory.ctypes.data + piece.places
        self._n, self._n_submitted, self._n_done = len(fds), 0, 0
        self._busy = True
        self._submit()

    def finish(self) -> None:
        self._reap(0)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._n_done < self._n:
            self._submit()
            if n_running := self._n_submitted - self._n_done:
                self._reap(n_running if self._n_submitted == self._n else 1)
                deadline = time.monotonic() + PATIENCE_SECONDS
            elif time.monotonic() > deadline:
                raise _TransferError(self._n_submitted, OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
            else:
                time.sleep(1e-3)
        self._busy = False

    def settle(self) -> None:
        # Not by counting what runs: Ctrl-C can come between a system call and the note of its result.
        if self._busy:
            self.close()

    def close(self) -> None:
        if self._context[0]:
            with contextlib.suppress(OSError):
                _syscall("io_destroy", int(self._context[0]))  # returns when nothing runs any more
            self._context[0] = 0
        self._busy = False

    def _submit(self) -> None:
        """Hand over as much as the kernel takes now."""
        while (n_left := self._n - self._n_submitted) > 0:
            first = self._addresses[self._n_submitted :]
            try:
                # Writes may wait here for space in the file, reads do not.
                n = _syscall("io_submit", int(self._context[0]), n_left, first.ctypes.data, locked=not self._writes)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINTR):
                    return
                raise _TransferError(self._n_submitted, error) from error
            self._n_submitted += n

    def _reap(self, fewest: int) -> None:
        """Wait for ``fewest`` requests; see to all that are done."""
        most = self._n_submitted - self._n_done
        if not most:
            return
        try:
            address = self._events.ctypes.data
            n = _syscall("io_getevents", int(self._context[0]), fewest, most, address, locked=fewest == 0)
        except InterruptedError:  # the signal's handler runs before the next call
            return
        self._n_done += n
        events = self._events[:n]
        for event in events[events["result"] != self._iocbs["nbytes"][events["tag"]]]:
            self._complete(int(event["tag"]), int(event["result"]))

    def _complete(self, index: int, result: int) -> None:
        """Transfer the rest of a request that ended early, or say why it failed."""
        iocb = self._iocbs[index]
        place = int(iocb["memory"]) - self.memory.ctypes.data
        memory = self.memory[place : place + int(iocb["nbytes"])]
        try:
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            self._transfer(int(iocb["fd"]), memory, int(iocb["offset"]), result // BLOCK_BYTES * BLOCK_BYTES)
        except OSError as error:
            raise _TransferError(index, error) from error


class _CallLane(_Lane):
    """``preadv`` and ``pwritev``: in threads that take ``tasks``, else in the caller's, reads announced in advance."""

    def __init__(self, nbytes: int, writes: bool, tasks: Tasks | None) -> None:
        super().__init__(nbytes, writes)
        self._tasks = tasks
        self._changed = threading.Condition()
        self._requests: list[tuple[int, int, int, int]] = []
        self._todo: Iterator[int] | None = None  # indices, shared by the workers; another object for each piece
        self._n_workers = self._n_left = 0
        self._failed: _TransferError | None = None

    def start(self, fds: Ids, piece: _Piece) -> None:
        self.settle()
        columns = (fds, piece.offsets, piece.places, piece.lengths)
        self._requests = list(zip(*(column.tolist() for column in columns), strict=True))
        self._n_left, self._failed = len(fds), None
        self._todo = todo = iter(range(len(fds)))
        if self._tasks is not None:
            for _ in range(N_THREADS):
                self._tasks.put(functools.partial(self._work, todo))
        elif not self._writes:
            for fd, offset, _, length in self._requests:
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)

    def finish(self) -> None:
        if self._tasks is None and self._todo is not None:
            self._work(self._todo)
        with self._changed:
            self._changed.wait_for(lambda: not self._n_left or self._failed)
            if self._failed:
                raise self._failed

    def settle(self) -> None:
        with self._changed:
            self._todo = None  # tasks that still wait for a thread are void
            self._changed.wait_for(lambda: not self._n_workers)

    def _work(self, todo: Iterator[int]) -> None:
        with self._changed:
            if todo is not self._todo:
                return
            self._n_workers += 1
        n_done, index, failed = 0, 0, None
        try:
            for index in todo:
                if todo is not self._todo:
                    break
                fd, offset, place, length = self._requests[index]
                self._transfer(fd, self.memory[place : place + length], offset)
                n_done += 1
        except Exception as error:  # raised in the caller's thread
            failed = _TransferError(index, error)
        finally:
            with self._changed:
                self._n_workers -= 1
                self._n_left -= n_done
                self._failed = self._failed or failed
                self._changed.notify_all()


class _Side:
    """Reads, or writes: two lanes that take turns, and their open files. One batch at a time."""

    def __init__(self, verb: str, lanes: Sequence[_Lane], flags: int) -> None:
        self.lock = threading.Lock()
        self._verb = verb
        self._lanes = lanes
        self._flags = flags | os.O_CLOEXEC
        self._fds: OrderedDict[Path, int] = OrderedDict()  # least recently used first
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

    def start(self, turn: int, files: Sequence[Path], piece: _Piece) -> None:
        numbers = piece.which.tolist()
        fds = {number: self.fd(files[number]) for number in dict.fromkeys(numbers)}
        with self._explained(files, piece):
            self._lanes[turn % 2].start(np.array([fds[number] for number in numbers]), piece)

    def finish(self, turn: int, files: Sequence[Path], piece: _Piece) -> None:
        with self._explained(files, piece):
            self._lanes[turn % 2].finish()

    @contextlib.contextmanager
    def _explained(self, files: Sequence[Path], piece: _Piece) -> Iterator[None]:
        try:
            yield
        except _TransferError as failed:
            i = failed.index
            file, offset, nbytes = files[piece.which[i]], int(piece.offsets[i]), int(piece.lengths[i])
            raise _explain(file, self._verb, offset, nbytes, failed.cause) from failed.cause

    def fd(self, file: Path) -> int:
        """The file's descriptor, which stays open while the next piece starts: see ``RecordIO._plan``."""
        with self._fds_lock:
            if file in self._fds:
                self._fds.move_to_end(file)
                return self._fds[file]
            if len(self._fds) >= 2 * _files_of_a_piece():
                os.close(self._fds.popitem(last=False)[1])
            try:
                fd = self._fds[file] = os.open(file, self._flags)
            except OSError as error:
                raise _explain(file, self._verb, 0, 0, error) from error
            return fd

    def forget(self, file: Path) -> None:
        with self._fds_lock:
            if (fd := self._fds.pop(file, None)) is not None:
                os.close(fd)

    def close(self) -> None:
        with self.lock:
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
        Exists. A temporary file of one block, which is removed, shows which engine serves.
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
            self._tasks = _start_threads()
        if not lanes:
            lanes = [_CallLane(staging_bytes, writes, self._tasks) for writes in (False, False, True, True)]
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
                    # numpy keeps the interpreter lock in this assignment, and not in one to a slice: see _syscall
                    out[piece.rows] = staged[_slice_of(piece.slots), : self._payload_bytes]

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
                    staged[piece.slots, : self._payload_bytes] = payload[_slice_of(piece.rows)]
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

    def _plan(self, which: Ids, offsets: Ids, payload: Bytes) -> list[_Piece]:
        """The distinct records in the order of the device, neighbours in one request, in pieces that fit."""
        assert payload.dtype == np.uint8, f"payloads are {payload.dtype}"
        assert payload.shape == (len(which), self._payload_bytes), f"payloads {payload.shape}, {self._payload_bytes}"
        assert not (offsets % BLOCK_BYTES).any(), "an offset is not a multiple of 4096"
        order = np.lexsort((offsets, which))
        which, offsets = which[order], offsets[order]
        new_file = _breaks(which, 0)
        fresh = new_file | _breaks(offsets, 0)
        records = np.cumsum(fresh) - 1  # of the rows
        which, offsets, new_file = which[fresh], offsets[fresh], new_file[fresh]
        places = np.arange(len(which))
        begins_run = new_file | _breaks(offsets, self.record_bytes)
        in_run = places - np.maximum.accumulate(np.where(begins_run, places, 0))
        firsts = np.flatnonzero(in_run % max(1, REQUEST_BYTES // self.record_bytes) == 0)
        ends = np.append(firsts[1:], len(which))
        n_files = np.cumsum(new_file)[firsts]
        # At least two pieces, unless they are small: then the copy of the first costs no time.
        capacity = max(-(-len(which) // 2), SMALL_PIECE_BYTES // self.record_bytes)
        capacity = max(1, min(capacity, STAGING_BYTES // self.record_bytes))
        pieces, begin = [], 0
        while begin < len(firsts):
            first = firsts[begin]
            end = min(
                int(np.searchsorted(ends, first + capacity, "right")),
                int(np.searchsorted(n_files, n_files[begin] + _files_of_a_piece())),
                begin + MAX_REQUESTS,
            )
            mine, rows = firsts[begin:end], slice(*np.searchsorted(records, (first, ends[end - 1])).tolist())
            sizes = (ends[begin:end] - mine) * self.record_bytes
            in_staging = (mine - first) * self.record_bytes
            pieces.append(_Piece(which[mine], offsets[mine], in_staging, sizes, order[rows], records[rows] - first))
            begin = end
        return pieces


def _engine_of(folder: Path, nbytes: int) -> tuple[str, list[_Lane]]:
    """The engine that serves ``folder``, and two lanes for reads and two for writes if it is native AIO."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".kvtier-probe-") as file:
            file.truncate(BLOCK_BYTES)  # a hole: a full device has room for it
            path = Path(file.name)
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


def _try_aio(path: Path, nbytes: int) -> tuple[list[_Lane], OSError | None]:
    """Two lanes for reads and two for writes, one of which has read ``path``; or none and why."""
    lanes: list[_Lane] = []
    zero = np.zeros(1, np.int64)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        for writes in (False, False, True, True):
            lanes.append(_AioLane(nbytes, writes))
        lanes[0].start(zero + fd, _Piece(zero, zero, zero, zero + BLOCK_BYTES, zero, zero))
        lanes[0].finish()
    except (OSError, _TransferError) as error:
        for lane in lanes:
            lane.close()
        cause = error.cause if isinstance(error, _TransferError) else error
        assert isinstance(cause, OSError)
        return [], cause
    finally:
        os.close(fd)
    return lanes, None


def _staging(nbytes: int) -> Bytes:
    """Zeros [nbytes] in huge pages, if there are any: a request of scattered pages took up to twice as long."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    begin = -array.ctypes.data % HUGE_PAGE_BYTES
    return array[begin : begin + nbytes]


def _start_threads() -> Tasks:
    """A queue of calls for N_THREADS threads, each of which ends at a None."""
    tasks: Tasks = queue.SimpleQueue()

    def work() -> None:
        while (task := tasks.get()) is not None:
            task()

    for i in range(N_THREADS):
        threading.Thread(target=work, name=f"kvtier-io-{i}", daemon=True).start()
    return tasks


def _files_of_a_piece() -> int:
    """At most: reads and writes have two pieces each under way, and the files of all of them stay open."""
    return max(1, MAX_OPEN_FILES // 4)


def _breaks(values: Ids, step: int) -> npt.NDArray[np.bool_]:
    """Where a value [n] is not the one before it and ``step``; the first is not."""
    breaks = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1] + step, out=breaks[1:])
    return breaks


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


@functools.cache
def _libc_syscall(locked: bool) -> Callable[..., int]:
    function = (ctypes.PyDLL if locked else ctypes.CDLL)(None, use_errno=True).syscall
    function.argtypes = [ctypes.c_long] * 6
    function.restype = ctypes.c_long
    return function


def _syscall(name: str, *arguments: int, locked: bool = False) -> int:
    """A system call of native AIO; ``locked``: one so short that the interpreter lock is kept. Raises OSError.

    To get the lock back takes 5 ms (``sys.getswitchinterval``) while another thread computes.
    """
    number = _SYSCALLS.get(platform.machine(), {}).get(name)
    if number is None or sys.platform != "linux" or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"not known on {sys.platform}, {platform.machine()}")
    result = _libc_syscall(locked)(number, *arguments, *[0] * (5 - len(arguments)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


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
