"""Memory of the host pool: pages of its own, which CUDA pins by registering them, and buffers on the way to a device.

Huge pages of an anonymous mapping, touched and registered, cost 0.07 s per GiB on an H100's host. torch's pinned
allocator takes 0.52 to 0.65 s and rounds sizes up to a power of two (shared notes, gpu_limits.md).
"""

import contextlib
import mmap
import os
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtier.runtime.budget import format_bytes

HUGE_PAGE_BYTES = 2 * 2**20
TOUCH_THREADS = 8
"""As many as the notes measured: 0.037 s per GiB of huge pages."""
TOUCH_BYTES = 4 * 2**20
"""Of one thread, at least: starting it takes as long as the kernel needs for about 1 MiB."""

_SUCCESS, _UNLOADING = 0, 4
_ERROR_NAMES = {
    1: "cudaErrorInvalidValue",
    2: "cudaErrorMemoryAllocation",
    3: "cudaErrorInitializationError",
    _UNLOADING: "cudaErrorCudartUnloading",
    35: "cudaErrorInsufficientDriver",
    100: "cudaErrorNoDevice",
    304: "cudaErrorOperatingSystem",
    712: "cudaErrorHostMemoryAlreadyRegistered",
    713: "cudaErrorHostMemoryNotRegistered",
    801: "cudaErrorNotSupported",
    999: "cudaErrorUnknown",
}  # torch's bindings name none but success

Bytes = npt.NDArray[np.uint8]


class PinningRefused(Exception):
    """CUDA, or the lack of it, does not let host memory be pinned; the message has the name of CUDA's error."""


class HostBlock:
    """Memory that begins at a page and grows in place.

    What is reserved is address space alone. Plain memory is taken page by page as it is written; touching it ahead
    would cost the same and take it earlier. Pinned memory is taken at once.

    Tensors over the block keep its addresses valid. Where one outlives ``release``, the memory is given back all the
    same: the tensor reads zeros, and what is written to it is in no budget.

    Parameters
    ----------
    room_bytes
        What it can grow to.

    Attributes
    ----------
    nbytes
        What can be used, at first nothing. In memory that is rounded up to a page.

    Raises
    ------
    MemoryError
        The machine does not give so much address space: RLIMIT_AS, strict overcommit, too many mappings.
    """

    def __init__(self, room_bytes: int) -> None:
        assert room_bytes > 0, f"a block of {room_bytes} bytes"
        self.nbytes = 0
        self._mapping: _Mapping | None = _Mapping(room_bytes)
        self._registered: list[int] = []  # addresses of pinned ranges, which follow each other
        self._pinned_bytes = 0
        self._unpin = weakref.finalize(self._mapping, _unregister, self._registered, os.getpid())
        self._unpin.atexit = False  # the process gives everything back by itself then, and faster

    @property
    def pinned(self) -> bool:
        """Whether the device can read all of it."""
        return 0 < self.nbytes <= self._pinned_bytes

    @property
    def data(self) -> torch.Tensor:
        """What can be used: uint8 [nbytes]. Its address is a multiple of the page size, from 2 MiB on of 2 MiB."""
        assert self._mapping is not None, "the block is released"
        return torch.from_numpy(self._mapping.pages[: self.nbytes])

    def grow(self, nbytes: int, *, pin: bool) -> None:
        """Let ``nbytes`` be used, which are more than now; ``pin`` what is new, in ranges of whole pages.

        Raises PinningRefused, with the block as it was.
        """
        assert self._mapping is not None, "the block is released"
        assert self.nbytes < nbytes <= len(self._mapping.pages), f"{self.nbytes} bytes cannot grow to {nbytes}"
        assert not pin or self._pinned_bytes >= self.nbytes, "plain memory cannot grow by pinned"
        self._mapping.use_huge_pages(nbytes)
        begin, end = _whole_pages(self.nbytes), _whole_pages(nbytes)
        if pin and begin < end:
            self._register(self._mapping.pages[begin:end])
            self._pinned_bytes = end
        self.nbytes = nbytes

    def release(self) -> None:
        """Unpin the memory and give it back, now; a second call does nothing.

        Waits for the current device, which may be reading the memory; whoever has another one read it waits before.
        """
        if self._mapping is None:
            return
        self._unpin()
        self._mapping.discard()
        self._mapping = None
        self.nbytes = self._pinned_bytes = 0

    def _register(self, pages: Bytes) -> None:
        cudart = _cudart()
        _touch(pages)
        address = pages.ctypes.data
        code = cudart.cudaHostRegister(address, len(pages), 0)
        if int(code) != _SUCCESS:
            _clear_error()
            raise PinningRefused(f"cudaHostRegister of {format_bytes(len(pages))}: {_describe(cudart, code)}")
        self._registered.append(address)


def allocate(nbytes: int, *, pin: bool, room_bytes: int | None = None) -> HostBlock:
    """A block of ``nbytes``, pinned or plain, that can grow to ``room_bytes``.

    Raises MemoryError, or PinningRefused, with nothing allocated.
    """
    block = HostBlock(room_bytes or nbytes)
    try:
        block.grow(nbytes, pin=pin)
    except BaseException:
        block.release()
        raise
    return block


class Staging:
    """Two buffers on the way to a device: one is filled while the other's copy is under way.

    Usage: write to what ``lend`` returns, ``send`` it, and again. The copies are work of the device's current stream.

    Parameters
    ----------
    nbytes
        Of each.
    pin
        PinningRefused if the machine does not.
    """

    def __init__(self, nbytes: int, *, pin: bool) -> None:
        self.nbytes = nbytes
        self._block = allocate(2 * nbytes, pin=pin)
        self.pinned = self._block.pinned
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def lend(self) -> torch.Tensor:
        """The buffer whose turn it is, uint8 [nbytes], once the device has read what was sent from it before."""
        self._wait(self._turn)
        return self._block.data[self._turn * self.nbytes :][: self.nbytes]

    def send(self, filled: torch.Tensor, out: torch.Tensor) -> None:
        """Copy ``filled``, a view of the buffer lent last, to ``out`` of the same shape and dtype.

        For a CUDA device this returns while the copy is under way, and it is the other buffer's turn.
        """
        if out.device.type != "cuda":
            out.copy_(filled)
            return
        out.copy_(filled, non_blocking=True)
        event = self._sent[self._turn] or torch.cuda.Event()
        event.record(torch.cuda.current_stream(out.device))
        self._sent[self._turn] = event
        self._turn = 1 - self._turn

    def release(self) -> None:
        """Give the memory back once the device has read it; a second call does nothing."""
        with contextlib.suppress(RuntimeError):  # of an earlier kernel: the copies will not be looked at
            for turn in range(2):
                self._wait(turn)
        self._block.release()

    def _wait(self, turn: int) -> None:
        event = self._sent[turn]
        if event is not None:
            event.synchronize()


class _Mapping:
    """Anonymous private pages, unmapped when neither this nor an array over them is left.

    ``mmap`` itself would not do: it unmaps before it tells whoever watches it, and pages are unregistered first.
    """

    def __init__(self, nbytes: int) -> None:
        size = _whole_pages(nbytes)
        spare = HUGE_PAGE_BYTES if size >= HUGE_PAGE_BYTES else 0  # untouched: for the alignment
        try:
            self._memory = mmap.mmap(-1, size + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"mmap of {format_bytes(size + spare)}: {error.strerror}") from error
        address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._begin = -address % HUGE_PAGE_BYTES if spare else 0
        data = (address + self._begin, False)
        self.__array_interface__ = {"data": data, "shape": (size,), "typestr": "|u1", "version": 3}

    @property
    def pages(self) -> Bytes:
        """All of them, uint8; keeps this object alive."""
        return np.asarray(self)

    def use_huge_pages(self, nbytes: int) -> None:
        """Where they fit into the first ``nbytes``: one that is larger than what was asked for would take more."""
        whole = nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if whole:
            with contextlib.suppress(OSError):  # a kernel without them: slower to touch, otherwise the same
                self._memory.madvise(mmap.MADV_HUGEPAGE, self._begin, whole)

    def discard(self) -> None:
        """Give the pages back; they read as zeros from now on."""
        with contextlib.suppress(OSError):  # of a process that has locked its memory: it goes when it is unmapped
            self._memory.madvise(mmap.MADV_DONTNEED, self._begin, len(self.pages))


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _touch(pages: Bytes) -> None:
    """Have the kernel provide ``pages``, all fresh, in several threads.

    Registering would have it done in one, which is why it pays here and only if there is more than one.
    """
    n_threads = min(TOUCH_THREADS, os.cpu_count() or 1, len(pages) // TOUCH_BYTES)
    if n_threads < 2:
        return
    step = -(-len(pages) // n_threads // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES

    def touch(begin: int) -> None:
        pages[begin : begin + step : mmap.PAGESIZE] = 0  # numpy lets go of the interpreter here

    with contextlib.suppress(RuntimeError), ThreadPoolExecutor(n_threads, "kvtier-touch") as threads:
        list(threads.map(touch, range(0, len(pages), step)))  # where no thread can be started, registering does it


def _unregister(addresses: list[int], pid: int) -> None:
    """Unpin what the process ``pid`` registered at ``addresses``, which are removed from the list: once.

    CUDA does not say that this waits for those who read the memory.
    """
    if os.getpid() != pid:
        return  # a fork has neither our registrations nor a CUDA of its own
    if addresses and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # of an earlier kernel: whoever uses the device meets it
            torch.cuda.synchronize()
    while addresses:
        cudart = torch.cuda.cudart()
        code = cudart.cudaHostUnregister(addresses.pop())
        if int(code) not in (_SUCCESS, _UNLOADING):
            _clear_error()
            warnings.warn(
                f"host memory stays pinned until this process ends: cudaHostUnregister: {_describe(cudart, code)}",
                stacklevel=2,
            )


def _cudart() -> Any:
    try:
        return torch.cuda.cudart()
    except (RuntimeError, AssertionError) as error:  # no driver, no device; a torch without CUDA
        raise PinningRefused(f"CUDA cannot be used: {error}") from error


def _describe(cudart: Any, code: Any) -> str:
    name = _ERROR_NAMES.get(int(code), f"CUDA error {int(code)}")
    return f"{name} ({cudart.cudaGetErrorString(code)})"


def _clear_error() -> None:
    """Have torch raise, here, the error that CUDA remembers of a refused call.

    Otherwise it would at its next kernel, wherever that is; its bindings have no cudaGetLastError.
    """
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")
