"""Transfers of one staging buffer's requests, past the page cache: by Linux native AIO, in threads, or in the caller's.

``runtime.direct_io`` cuts batches into pieces and has two lanes take turns.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import platform
import queue
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.runtime.tier import Ids

BLOCK_BYTES = 4096
"""Alignment of records, in memory and in files."""
HUGE_PAGE_BYTES = 2 * 2**20
MAX_REQUESTS = 256
"""Of one piece. Four times this counts against the machine's fs.aio-max-nr, usually 65,536."""
REQUESTS_PER_CALL = 16
"""The device gets to know of requests when the call that submits them returns."""
N_THREADS = 4
PATIENCE_SECONDS = 10.0
"""With a kernel that takes no request although none of ours is under way."""

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


class TransferError(Exception):
    """Request ``index`` of a piece failed because of ``cause``."""

    def __init__(self, index: int, cause: Exception) -> None:
        super().__init__(index, cause)
        self.index = index
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Piece:
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
    slots: Ids | slice
    """Record of each row in the staging buffer."""


class Lane(ABC):
    """A staging buffer and the requests of one piece between it and files.

    ``start`` and ``finish`` raise TransferError; ``settle`` is due then, and after any other exception.
    """

    def __init__(self, nbytes: int, writes: bool) -> None:
        self.memory = _staging(nbytes)
        self._writes = writes

    @abstractmethod
    def start(self, fds: Ids, piece: Piece) -> None:
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


class AioLane(Lane):
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
        if not self._context[0]:
            syscall("io_setup", MAX_REQUESTS, self._context.ctypes.data)

    def start(self, fds: Ids, piece: Piece) -> None:
        self.settle()
        try:
            self._set_up()
        except OSError as error:
            raise TransferError(0, error) from error
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
                raise TransferError(self._n_submitted, OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
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
                syscall("io_destroy", int(self._context[0]))  # returns when nothing runs any more
            self._context[0] = 0
        self._busy = False

    def _submit(self) -> None:
        """Hand over as much as the kernel takes now."""
        while self._n_submitted < self._n:
            first = self._addresses[self._n_submitted :]
            few = min(self._n - self._n_submitted, REQUESTS_PER_CALL)
            try:
                # Writes may wait here for space in the file, reads do not.
                n = syscall("io_submit", int(self._context[0]), few, first.ctypes.data, locked=not self._writes)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINTR):
                    return
                raise TransferError(self._n_submitted, error) from error
            self._n_submitted += n

    def _reap(self, fewest: int) -> None:
        """Wait for ``fewest`` requests; see to all that are done."""
        most = self._n_submitted - self._n_done
        if not most:
            return
        try:
            address = self._events.ctypes.data
            n = syscall("io_getevents", int(self._context[0]), fewest, most, address, locked=fewest == 0)
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
            raise TransferError(index, error) from error


class CallLane(Lane):
    """``preadv`` and ``pwritev``: in threads that take ``tasks``, else in the caller's, reads announced in advance."""

    def __init__(self, nbytes: int, writes: bool, tasks: Tasks | None) -> None:
        super().__init__(nbytes, writes)
        self._tasks = tasks
        self._changed = threading.Condition()
        self._requests: list[tuple[int, int, int, int]] = []
        self._todo: Iterator[int] | None = None  # indices, shared by the workers; another object for each piece
        self._n_workers = self._n_left = 0
        self._failed: TransferError | None = None

    def start(self, fds: Ids, piece: Piece) -> None:
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
                with contextlib.suppress(OSError):  # of which the read will tell
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
            failed = TransferError(index, error)
        finally:
            with self._changed:
                self._n_workers -= 1
                self._n_left -= n_done
                self._failed = self._failed or failed
                self._changed.notify_all()


def _staging(nbytes: int) -> Bytes:
    """Zeros [nbytes] in huge pages, if there are any: a request of scattered pages took up to twice as long."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    begin = -array.ctypes.data % HUGE_PAGE_BYTES
    return array[begin : begin + nbytes]


def start_threads() -> Tasks:
    """A queue of calls for N_THREADS threads, each of which ends at a None."""
    tasks: Tasks = queue.SimpleQueue()

    def work() -> None:
        while (task := tasks.get()) is not None:
            task()

    for i in range(N_THREADS):
        threading.Thread(target=work, name=f"kvtier-io-{i}", daemon=True).start()
    return tasks


@functools.cache
def _libc_syscall(locked: bool) -> Any:
    function = libc("syscall", locked)
    function.argtypes = [ctypes.c_long] * 6
    function.restype = ctypes.c_long
    return function


@functools.cache
def libc(name: str, locked: bool) -> Any:
    """A function of the C library. To get the interpreter lock back takes 5 ms while another thread computes.

    ``locked``: keep the lock, since the call is short. 5 ms: ``sys.getswitchinterval``.
    """
    return getattr((ctypes.PyDLL if locked else ctypes.CDLL)(None, use_errno=True), name)


def open_locked(file: Path, flags: int) -> int:
    """``os.open`` that keeps the interpreter lock: a batch may open as many files as it has records."""
    fd: int = libc("open", True)(os.fsencode(file), flags)
    return fd if fd >= 0 else os.open(file, flags)  # which raises, or was interrupted


def syscall(name: str, *arguments: int, locked: bool = False) -> int:
    """A system call of native AIO. Raises OSError."""
    number = _SYSCALLS.get(platform.machine(), {}).get(name)
    if number is None or sys.platform != "linux" or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"not known on {sys.platform}, {platform.machine()}")
    result: int = _libc_syscall(locked)(number, *arguments, *[0] * (5 - len(arguments)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
