"""How fast a machine moves bytes and multiplies: assumed by the name of its device, or measured here.

What is measured takes less than half a minute and at most a GiB of memory and of temporary files, which are removed.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtier.runtime.direct_io import BUFFERED, RecordIO
from kvtier.runtime.errors import ConfigError, KvtierError

BUFFER_BYTES = 2**28
"""Of one measured copy: there are two."""
FILE_BYTES = 2**29
"""Written to the disk, if it takes no longer than ``DISK_SECONDS`` and leaves half of what is free."""
RECORD_BYTES = 2**18
BATCH = 64
"""Records of one write or read: 16 MiB."""
SECONDS = 0.5
"""Of one measurement, about."""
DISK_SECONDS = 5.0
"""Of writing, and of reading."""


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Rates of one machine, in bytes and floating-point operations per second."""

    device: str
    device_memory: float
    """Read by a kernel that does nothing else."""
    matmul: float
    """Of large matrices in bfloat16 on a GPU, in float32 on the CPU."""
    host_memory: float
    """Copied by one memcpy; a byte copied counts once."""
    link_up: float
    """From pinned host memory to the device."""
    link_down: float
    disk_read: float
    """Records of 256 KiB at random places, 64 at a time, past the page cache."""
    disk_append: float
    source: str
    """Where the figures are from."""

    def report(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


_GPU_NOTES = "shared notes gpu_limits.md (one H100, 23 Nov 2026)"
_DISK_NOTES = "disk: a virtual disk, disk.md; a good NVMe reads 5 times as much"
_DISK = {"disk_read": 1.07e9, "disk_append": 2.0e9}
ASSUMED = {
    # HBM read by Triton; 6 products of 8192^3 in 8.415 ms; pinned copies of 256 MiB; memcpy in 8 threads
    "H100": Bandwidths("H100", 3092e9, 784e12, 31e9, 54.5e9, 55.1e9, **_DISK, source=f"{_GPU_NOTES}; {_DISK_NOTES}"),
    "H200": Bandwidths(
        "H200", 4800e9, 784e12, 31e9, 54.5e9, 55.1e9, **_DISK,
        source=f"memory: NVIDIA's figure; the rest as H100, {_GPU_NOTES}; {_DISK_NOTES}",
    ),
    "RTX 4090": Bandwidths(
        "RTX 4090", 1008e9, 165e12, 20e9, 25e9, 25e9, **_DISK,
        source=f"NVIDIA's figures for memory and bfloat16; PCIe 4.0 x16 less a fifth; {_DISK_NOTES}",
    ),
    # one thread of gpu_limits.md copies 6.3 GB/s; matmul as a desktop with AVX2 and 8 cores
    "CPU": Bandwidths(
        "CPU", 40e9, 0.5e12, 20e9, 20e9, 20e9, **_DISK, source=f"a desktop with two channels of DDR5; {_DISK_NOTES}"
    ),
}  # fmt: skip
"""Assumptions, by the kind of device."""


def assumed(device: str, card: str | None = None) -> Bandwidths:
    """The figures for the GPU that is here, for the one named ``card``, or for a CPU.

    A GPU that is not in ``ASSUMED`` is taken for the slowest one in it; ``source`` says so.

    Raises
    ------
    ConfigError
        ``card`` is not in ``ASSUMED``.
    """
    if card is not None:
        if card not in ASSUMED:
            raise ConfigError(f"no figures for {card!r}: known are {', '.join(ASSUMED)}; --measure takes them here")
        return ASSUMED[card]
    if device == "cpu":
        return ASSUMED["CPU"]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for known, figures in ASSUMED.items():
        if name is not None and known in name:
            return figures
    slowest = ASSUMED["RTX 4090"]
    why = "there is no GPU here" if name is None else f"no figures for {name}"
    return replace(slowest, source=f"{why}: those of an {slowest.device} ({slowest.source})")


def measure(
    device: str, folder: str | os.PathLike[str] | None, say: Callable[[str], object] = lambda line: None
) -> Bandwidths:
    """Measure this machine.

    Parameters
    ----------
    device : "cuda" or "cpu"
    folder : of the store: the disk of this folder, or of the nearest one above it that exists, is measured. None: the
        disk is not, and the assumed figures stay
    say : takes a line for people before each part

    Raises
    ------
    KvtierError
        There is no such device, or the folder cannot be written.
    """
    on = torch.device(device)
    if on.type == "cuda" and not torch.cuda.is_available():
        raise KvtierError("nothing to measure: there is no CUDA device here; leave --measure out, or give --device cpu")
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else "CPU"
    with torch.inference_mode():
        say("measuring memory and link")
        host = _host_memory()
        up, down = (host, host) if on.type == "cpu" else _link(on)
        say("measuring the device")
        memory, matmul = _device_memory(on), _matmul(on)
    disk, where = dict(_DISK), f"disk not measured, there is no store: assumed as in {_DISK_NOTES}"
    if folder is not None:
        say("measuring the disk")
        disk, where = _disk(Path(folder))
    return Bandwidths(name, memory, matmul, host, up, down, **disk, source=f"measured here; {where}")


# -- memory and compute ------------------------------------------------------------------------------------------------


def _rate(amount: float, step: Callable[[], object], on: torch.device) -> float:
    """``amount`` per second of the quickest of several ``step``, after one that does not count."""

    def timed() -> float:
        started = time.perf_counter()
        step()
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        return time.perf_counter() - started

    timed()
    best, end = timed(), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        best = min(best, timed())
    return amount / best


def _host_memory() -> float:
    source, target = torch.ones(BUFFER_BYTES, dtype=torch.uint8), torch.empty(BUFFER_BYTES, dtype=torch.uint8)
    return _rate(BUFFER_BYTES, lambda: target.copy_(source), torch.device("cpu"))


def _link(on: torch.device) -> tuple[float, float]:
    pinned = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=on)
    up = _rate(BUFFER_BYTES, lambda: there.copy_(pinned, non_blocking=True), on)
    return up, _rate(BUFFER_BYTES, lambda: pinned.copy_(there, non_blocking=True), on)


def _device_memory(on: torch.device) -> float:
    """Bytes read and written by a copy on a GPU, which reads no faster; read by a product with a vector on the CPU."""
    if on.type == "cuda":
        source = torch.ones(BUFFER_BYTES, dtype=torch.uint8, device=on)
        target = torch.empty_like(source)
        return _rate(2 * 8 * BUFFER_BYTES, lambda: [target.copy_(source) for _ in range(8)], on)
    matrix = torch.ones(BUFFER_BYTES // 4 // 4096, 4096)
    vector = torch.ones(4096)
    return _rate(BUFFER_BYTES, lambda: matrix @ vector, on)


def _matmul(on: torch.device) -> float:
    n, dtype = (8192, torch.bfloat16) if on.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=on, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _rate(2.0 * n**3, lambda: torch.matmul(a, b, out=out), on)


# -- disk --------------------------------------------------------------------------------------------------------------


def _disk(folder: Path) -> tuple[dict[str, float], str]:
    """Rates of the disk of ``folder`` as ``runtime.direct_io`` uses it, and how that was."""
    place = Path(os.path.abspath(folder.expanduser()))
    place = next(p for p in (place, *place.parents) if p.is_dir())
    n_records = min(FILE_BYTES, shutil.disk_usage(place).free // 2) // RECORD_BYTES // BATCH * BATCH
    if not n_records:
        raise KvtierError(f"the disk of {place} is full: nothing can be measured there; choose another [store] path")
    try:
        with _temporary(place) as file:
            io = RecordIO(file.parent, RECORD_BYTES)
            try:
                written, append = _append(io, file, n_records)
                read = _read(io, file, written)
            finally:
                io.close()
    except KvtierError:
        raise
    except OSError as error:
        raise KvtierError(f"the disk of {place} cannot be measured: {error}; choose another [store] path") from error
    how = f"disk of {place}: {written * RECORD_BYTES >> 20} MiB, {io.path_name}"
    if io.path_name == BUFFERED:
        how += ": the page cache may have helped"
    return {"disk_read": read, "disk_append": append}, how


@contextmanager
def _temporary(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".kvtier-measure-", dir=place) as folder:
        file = Path(folder) / "records"
        file.touch()
        yield file


def _append(io: RecordIO, file: Path, n_records: int) -> tuple[int, float]:
    """Records written until the time is up, and bytes per second, on the disk."""
    os.truncate(file, n_records * RECORD_BYTES)
    payload = torch.randint(0, 256, (BATCH, RECORD_BYTES), dtype=torch.uint8).numpy()
    started, done = time.perf_counter(), 0
    while done < n_records and time.perf_counter() < started + DISK_SECONDS:
        offsets = (done + np.arange(BATCH)) * RECORD_BYTES
        io.write([file], np.zeros(BATCH, np.int64), offsets, payload)
        done += BATCH
    io.sync(file)
    return done, done * RECORD_BYTES / (time.perf_counter() - started)


def _read(io: RecordIO, file: Path, n_records: int) -> float:
    """Bytes per second of records in random order, each once, until the time is up."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    order = torch.randperm(n_records).numpy()
    out = np.empty((BATCH, RECORD_BYTES), np.uint8)
    started, done = time.perf_counter(), 0
    while done < n_records and time.perf_counter() < started + DISK_SECONDS:
        io.read([file], np.zeros(BATCH, np.int64), order[done : done + BATCH] * RECORD_BYTES, out)
        done += BATCH
    return done * RECORD_BYTES / (time.perf_counter() - started)
