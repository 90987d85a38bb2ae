"""Each engine of ``RecordIO`` against plain files, and what it does when the kernel, a file or a device fails."""

import ctypes
import errno
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.runtime import direct_io, direct_lanes
from kvtier.runtime.direct_io import AIO, BUFFERED, THREADS, RecordIO
from kvtier.runtime.errors import StoreError
from kvtier.runtime.tier import Ids

ENGINES = [AIO, THREADS, BUFFERED]
CALL_ENGINES = [THREADS, BUFFERED]
R = 4096


@contextmanager
def refusing(engine: str) -> Iterator[None]:
    """Whatever an engine before this one needs is refused."""
    opened = os.open

    def open_buffered(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "O_DIRECT is refused in this test")
        return opened(path, flags, *args)

    def no_aio(name: str, *_: int, locked: bool = False) -> int:
        raise OSError(errno.ENOSYS, "no native AIO in this test")

    if engine == THREADS:
        with patch.object(direct_lanes, "syscall", no_aio):
            yield
    elif engine == BUFFERED:
        with patch.object(os, "open", open_buffered):
            yield
    else:
        yield


@contextmanager
def record_io(engine: str, folder: Path, payload_bytes: int = R) -> Iterator[RecordIO]:
    with refusing(engine), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        io = RecordIO(folder, payload_bytes)
    try:
        if io.path_name != engine:
            pytest.skip(f"{folder} is served by {io.path_name}, not by {engine}")
        yield io
    finally:
        io.close()


def make_files(folder: Path, n: int, n_records: int, record_bytes: int = R) -> tuple[list[Path], list[bytearray]]:
    """Files of random bytes, and the same bytes."""
    rng = np.random.default_rng(n)
    contents = [bytearray(rng.bytes(n_records * record_bytes)) for _ in range(n)]
    files = [folder / f"file-{i}" for i in range(n)]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    return files, contents


def ids(*values: int) -> Ids:
    return np.array(values, np.int64)


def expected_rows(contents: list[bytearray], which: Ids, offsets: Ids, payload_bytes: int) -> np.ndarray:
    rows = [contents[w][o : o + payload_bytes] for w, o in zip(which.tolist(), offsets.tolist(), strict=True)]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(which), payload_bytes)


def check_read(io: RecordIO, files: list[Path], contents: list[bytearray], which: Ids, offsets: Ids) -> None:
    out = np.full((len(which), io._payload_bytes), 0xA5, np.uint8)
    io.read(files, which, offsets, out)
    assert (out == expected_rows(contents, which, offsets, io._payload_bytes)).all()


def write_both(io: RecordIO, files: list[Path], contents: list[bytearray], which: Ids, offsets: Ids, seed: int) -> None:
    payload = np.random.default_rng(seed).integers(0, 256, (len(which), io._payload_bytes), np.uint8)
    io.write(files, which, offsets, payload)
    for w, o, row in zip(which.tolist(), offsets.tolist(), payload, strict=True):
        contents[w][o : o + io.record_bytes] = row.tobytes().ljust(io.record_bytes, b"\0")


def places_of(records: Ids, n_records: int, record_bytes: int) -> tuple[Ids, Ids]:
    which, inside = np.divmod(records, n_records)
    return which, inside * record_bytes


# -- against an oracle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_random_batches_match_plain_files(engine: str) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        payload_bytes=st.sampled_from([1, 100, 4095, 4096, 4097, 9000, 70_000]),
        n_files=st.integers(1, 12),
        n_records=st.integers(1, 30),
        seed=st.integers(0, 2**20),
        n_batches=st.integers(1, 6),
    )
    def check(payload_bytes: int, n_files: int, n_records: int, seed: int, n_batches: int) -> None:
        rng = np.random.default_rng(seed)
        small = {"STAGING_BYTES": 2**16, "REQUEST_BYTES": 2**14, "SMALL_PIECE_BYTES": 2**15, "MAX_OPEN_FILES": 8}
        with (
            tempfile.TemporaryDirectory() as folder,
            patch.multiple(direct_io, **small),
            record_io(engine, Path(folder), payload_bytes) as io,
        ):
            files, contents = make_files(Path(folder), n_files, n_records, io.record_bytes)
            total = n_files * n_records
            for i in range(n_batches):
                order = rng.permutation(total)[: rng.integers(0, total + 1)]
                write_both(io, files, contents, *places_of(order, n_records, io.record_bytes), seed=i)
                asked = rng.integers(0, total, rng.integers(0, 2 * total))
                check_read(io, files, contents, *places_of(asked, n_records, io.record_bytes))
            assert [file.read_bytes() for file in files] == contents

    check()


@pytest.mark.parametrize("engine", ENGINES)
def test_more_files_than_descriptors_and_more_records_than_requests(engine: str, tmp_path: Path) -> None:
    files, contents = make_files(tmp_path, 150, 8)
    with record_io(engine, tmp_path) as io:
        n_open = len(os.listdir("/proc/self/fd"))
        every_second = np.random.default_rng(0).permutation(150 * 8 // 2) * 2  # no neighbours: 600 requests
        write_both(io, files, contents, *places_of(every_second, 8, R), seed=1)
        check_read(io, files, contents, *places_of(every_second[::-1], 8, R))
        check_read(io, files, contents, *places_of(np.arange(150 * 8), 8, R))
        assert len(os.listdir("/proc/self/fd")) - n_open <= direct_io.MAX_OPEN_FILES
        assert [file.read_bytes() for file in files] == contents


@pytest.mark.parametrize("engine", ENGINES)
def test_records_larger_than_the_staging_buffer(engine: str, tmp_path: Path) -> None:
    payload_bytes = direct_io.STAGING_BYTES + 5
    with record_io(engine, tmp_path, payload_bytes) as io:
        files, contents = make_files(tmp_path, 1, 3, io.record_bytes)
        write_both(io, files, contents, ids(0, 0), ids(2, 0) * io.record_bytes, seed=1)
        check_read(io, files, contents, ids(0, 0, 0), ids(1, 2, 0) * io.record_bytes)


@pytest.mark.parametrize("engine", ENGINES)
def test_strided_rows_and_empty_batches(engine: str, tmp_path: Path) -> None:
    files, contents = make_files(tmp_path, 1, 4)
    with record_io(engine, tmp_path) as io:
        wide = np.zeros((4, 2 * R), np.uint8)
        io.read(files, np.zeros(4, np.int64), np.arange(4)[::-1] * R, wide[:, ::2])
        assert wide[:, ::2].tobytes() == b"".join(bytes(contents[0][i * R :][:R]) for i in (3, 2, 1, 0))
        assert not wide[:, 1::2].any()
        io.read(files, ids(), ids(), np.empty((0, R), np.uint8))
        io.write(files, ids(), ids(), np.empty((0, R), np.uint8))
        assert files[0].read_bytes() == contents[0]


@pytest.mark.parametrize("engine", CALL_ENGINES)
def test_neighbours_share_a_request(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 2, 300)
    with record_io(engine, tmp_path) as io:
        sizes: list[int] = []
        preadv = os.preadv

        def counted(fd: int, buffers: Any, offset: int) -> int:
            sizes.append(sum(map(len, buffers)))
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", counted)
        records = np.setdiff1d(np.arange(600), ids(10))
        check_read(io, files, contents, *places_of(np.random.default_rng(0).permutation(records), 300, R))
    # the first file has a gap at 10, no request crosses files, and none is above a MiB
    assert sorted(sizes) == sorted(n * R for n in (10, 256, 33, 256, 44))


def test_native_aio_submits_neighbours_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 2, 300)
    with record_io(AIO, tmp_path) as io:
        kernel = Kernel(monkeypatch)
        check_read(io, files, contents, *places_of(np.setdiff1d(np.arange(600), ids(10)), 300, R))
        assert kernel.n_submitted == 5


def test_caller_mistakes_are_assertions(tmp_path: Path) -> None:
    files, contents = make_files(tmp_path, 1, 4)
    with record_io(BUFFERED, tmp_path) as io:
        row = np.zeros((2, R), np.uint8)
        with pytest.raises(AssertionError, match="multiple of 4096"):
            io.read(files, ids(0, 0), ids(0, 100), row)
        with pytest.raises(AssertionError, match="occurs twice"):
            io.write(files, ids(0, 0), ids(R, R), row)
        with pytest.raises(AssertionError, match="4096"):
            io.read(files, ids(0, 0), ids(0, R), row[:, 1:])
        assert files[0].read_bytes() == contents[0]


# -- failures ----------------------------------------------------------------------------------------------------------


class Kernel:
    """The system calls of native AIO, with faults; ``n_running`` requests are in the kernel and not reaped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._call = direct_lanes.syscall
        self.n_submitted = 0
        self.running: dict[int, int] = {}
        self.at_submit: Callable[[int], int] = lambda n: n
        """Given how many requests are to be submitted: how many the kernel takes; or raises."""
        self.at_wait: Callable[[], None] = lambda: None
        self.fail_with = 0
        """An errno: the result of the next request that is reaped."""
        self.has_contexts = True
        self.most_bytes = 2**30
        """A request transfers at most so much."""
        monkeypatch.setattr(direct_lanes, "syscall", self)

    @property
    def n_running(self) -> int:
        return sum(self.running.values())

    def __call__(self, name: str, context: int, *arguments: int, locked: bool = False) -> int:
        if name == "io_setup" and not self.has_contexts:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if name == "io_submit":
            n, addresses = arguments
            n = self._submit(context, self.at_submit(n), addresses, locked)
            self.running[context] = self.running.get(context, 0) + n
            self.n_submitted += n
            return n
        if name == "io_getevents" and not locked:
            self.at_wait()
        result = self._call(name, context, *arguments, locked=locked)
        if name == "io_getevents":
            self.running[context] -= result
            if result and self.fail_with:
                ctypes.c_int64.from_address(arguments[2] + 16).value = -self.fail_with
                self.fail_with = 0
        if name == "io_destroy":
            self.running[context] = 0
        return result

    def _submit(self, context: int, n: int, addresses: int, locked: bool) -> int:
        """Submit with ``nbytes`` cut to ``most_bytes`` while the kernel looks."""
        pointers = (ctypes.c_uint64 * n).from_address(addresses)
        sizes = [ctypes.c_uint64.from_address(pointer + 32) for pointer in pointers]
        before = [size.value for size in sizes]
        for size in sizes:
            size.value = min(size.value, self.most_bytes)
        try:
            return self._call("io_submit", context, n, addresses, locked=locked)
        finally:
            for size, value in zip(sizes, before, strict=True):
                size.value = value


def scattered(n_files: int, n_records: int) -> tuple[Ids, Ids]:
    """Every second record, in a random order."""
    return places_of(np.random.default_rng(3).permutation(n_files * n_records // 2) * 2, n_records, R)


@pytest.mark.parametrize("engine", ENGINES)
def test_truncated_and_removed_files(engine: str, tmp_path: Path) -> None:
    files, contents = make_files(tmp_path, 3, 40)
    with record_io(engine, tmp_path) as io:
        check_read(io, files, contents, ids(1), ids(0))
        os.truncate(files[1], 8 * R + 100)
        check_read(io, files, contents, ids(1, 1), ids(7 * R, 0))
        with pytest.raises(StoreError, match=r"file-1 cannot be read at byte \d+: .*Was the file changed.*choose"):
            io.read(files, *scattered(3, 40), np.empty((60, R), np.uint8))
        with pytest.raises(StoreError, match=rf"byte {8 * R}: .*100 of {R} bytes transferred, the file is too short"):
            io.read(files, ids(1), ids(8 * R), np.empty((1, R), np.uint8))
        with pytest.raises(StoreError, match=rf"file-1 cannot be read at byte {6 * R}: .*{2 * R + 100} of {4 * R}"):
            io.read(files, ids(1, 1, 1, 1), np.arange(6, 10) * R, np.empty((4, R), np.uint8))
        with pytest.raises(StoreError, match=rf"byte {20 * R}: .*0 of {R} bytes transferred, the file is too short"):
            io.read(files, ids(1), ids(20 * R), np.empty((1, R), np.uint8))
        check_read(io, files, contents, ids(0, 2), ids(R, 3 * R))  # other files are not affected
        for call in (io.read, io.write):
            io.forget(files[2])
            files[2].unlink(missing_ok=True)
            with pytest.raises(StoreError, match=r"file-2 cannot be (read|written).*No such file.*Something removed"):
                call(files, ids(2), ids(0), np.zeros((1, R), np.uint8))
        check_read(io, files, contents, ids(0, 1), ids(R, 3 * R))


DEVICE_ERRORS = [
    (errno.EIO, r"file-\d cannot be {} at byte \d+: .*Input/output error.*check the device"),
    (errno.ENOSPC, r"file-\d: the device is full: .* were needed.*are free.*lower \[budget\] disk"),
    (errno.EDQUOT, r"file-\d: your quota is used up: .* were needed"),
]


@pytest.mark.parametrize(("code", "message"), DEVICE_ERRORS, ids=["EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("verb", ["read", "written"])
@pytest.mark.parametrize("engine", ENGINES)
def test_device_errors(
    engine: str, verb: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io, "STAGING_BYTES", 64 * R)
    files, contents = make_files(tmp_path, 3, 400)
    which, offsets = scattered(3, 400)  # 10 pieces
    with record_io(engine, tmp_path) as io:
        with monkeypatch.context() as patched:
            broken = Broken(code, patched) if engine != AIO else None
            kernel = Kernel(patched) if engine == AIO else None
            if kernel:
                kernel.fail_with = code
            call = io.read if verb == "read" else io.write
            with pytest.raises(StoreError, match=message.format(verb)):
                call(files, which, offsets, np.zeros((600, R), np.uint8))
            if kernel:
                assert (kernel.fail_with, kernel.n_running) == (0, 0)
            if broken:
                assert broken.n_running == 0
        write_both(io, files, contents, which, offsets, seed=1)
        check_read(io, files, contents, which, offsets)


class Broken:
    """os.preadv and os.pwritev that fail at the fifth call; others take their time."""

    def __init__(self, code: int, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.002) -> None:
        self.code = code
        self.seconds = seconds
        self.n_calls = self.n_running = 0
        self._lock = threading.Lock()
        self._calls = {"preadv": os.preadv, "pwritev": os.pwritev}
        for name in self._calls:
            monkeypatch.setattr(os, name, lambda *args, name=name: self.call(name, *args))

    def call(self, name: str, fd: int, buffers: Any, offset: int) -> int:
        with self._lock:
            self.n_calls += 1
            self.n_running += 1
            fails = self.n_calls == 5
        try:
            if fails:
                raise OSError(self.code, os.strerror(self.code))
            time.sleep(self.seconds)
            return self._calls[name](fd, buffers, offset)
        finally:
            with self._lock:
                self.n_running -= 1


def test_a_kernel_that_takes_few_requests_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 3, 100)
    which, offsets = scattered(3, 100)
    refusals = iter([True, True, False, True, False] * 400)

    def at_submit(n: int) -> int:
        if next(refusals):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return min(n, 7)

    with record_io(AIO, tmp_path) as io:
        kernel = Kernel(monkeypatch)
        kernel.at_submit = at_submit
        write_both(io, files, contents, which, offsets, seed=1)
        check_read(io, files, contents, which, offsets)
        assert kernel.n_submitted == 300
        assert [file.read_bytes() for file in files] == contents


def test_a_kernel_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 1, 4)

    def at_submit(n: int) -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with record_io(AIO, tmp_path) as io:
        with monkeypatch.context() as patched:
            patched.setattr(direct_lanes, "PATIENCE_SECONDS", 0.05)
            Kernel(patched).at_submit = at_submit
            with pytest.raises(StoreError, match=r"file-0 cannot be read at byte 4096: .*temporarily unavailable"):
                io.read(files, ids(0), ids(R), np.empty((1, R), np.uint8))
        check_read(io, files, contents, ids(0), ids(R))


def test_no_context_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 1, 4)
    with record_io(AIO, tmp_path) as io:
        with pytest.raises(StoreError, match="too short"):
            io.read(files, ids(0), ids(9 * R), np.empty((1, R), np.uint8))
        with monkeypatch.context() as patched:
            kernel = Kernel(patched)
            kernel.has_contexts = False
            with pytest.raises(StoreError, match=r"file-0 cannot be read at byte 4096: .*temporarily unavailable"):
                io.read(files, ids(0), ids(R), np.empty((1, R), np.uint8))
        check_read(io, files, contents, ids(0), ids(R))


def test_native_aio_goes_on_after_partial_transfers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 2, 64)
    with record_io(AIO, tmp_path) as io:
        Kernel(monkeypatch).most_bytes = 3 * R
        which, offsets = places_of(np.arange(128), 64, R)
        write_both(io, files, contents, which, offsets, seed=1)
        check_read(io, files, contents, which, offsets)
        assert [file.read_bytes() for file in files] == contents


@pytest.mark.parametrize("engine", CALL_ENGINES)
def test_calls_go_on_after_partial_transfers(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 2, 64)
    preadv, pwritev = os.preadv, os.pwritev
    with record_io(engine, tmp_path) as io:
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][: 3 * R]], at))
        monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: pwritev(fd, [buffers[0][: 3 * R]], at))
        which, offsets = places_of(np.arange(128), 64, R)
        write_both(io, files, contents, which, offsets, seed=1)
        check_read(io, files, contents, which, offsets)
        assert [file.read_bytes() for file in files] == contents


def test_a_signal_interrupts_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 3, 400)
    interrupted = []

    def at_wait() -> None:
        if len(interrupted) < 3:
            interrupted.append(True)
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    with record_io(AIO, tmp_path) as io:
        kernel = Kernel(monkeypatch)
        kernel.at_wait = at_wait
        monkeypatch.setattr(direct_lanes.AioLane, "_reap", unhurried(direct_lanes.AioLane._reap))
        check_read(io, files, contents, *scattered(3, 400))
        assert len(interrupted) == 3


def unhurried(reap: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """``_AioLane._reap`` that never finds everything done at its first look."""
    return lambda lane, fewest: reap(lane, fewest) if fewest else None


@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_leaves_nothing_under_way(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 3, 400)
    which, offsets = scattered(3, 400)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with record_io(engine, tmp_path) as io:
        with monkeypatch.context() as patched:
            counts = slow_transfers(engine, patched)
            before = signal.signal(signal.SIGALRM, interrupt)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(KeyboardInterrupt):
                    io.read(files, which, offsets, np.empty((600, R), np.uint8))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            n_running, n_started = counts()
            assert n_running == 0
            assert n_started < 300
        check_read(io, files, contents, which, offsets)


def slow_transfers(engine: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """Make transfers slow enough to be interrupted; returns what tells how many are under way, and how many began."""
    if engine == AIO:
        kernel = Kernel(monkeypatch)
        kernel.at_wait = lambda: time.sleep(30)
        monkeypatch.setattr(direct_lanes.AioLane, "_reap", unhurried(direct_lanes.AioLane._reap))
        return lambda: (kernel.n_running, 0)
    slow = Broken(0, monkeypatch, seconds=0.02)
    slow.n_calls = 5  # the fifth would fail
    return lambda: (slow.n_running, slow.n_calls)


# -- which engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "message"), [(THREADS, "native AIO is refused .*4 threads"), (BUFFERED, "does not do O_DIRECT")]
)
def test_a_refused_engine_is_told_once(
    engine: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io, "_warned", set())
    with record_io(AIO, tmp_path):
        pass  # skips the test where the first engine is refused anyway
    files, contents = make_files(tmp_path, 1, 4)
    with refusing(engine), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ios = [RecordIO(tmp_path, R) for _ in range(3)]
    assert len(caught) == 1
    with pytest.raises(UserWarning, match=message):
        raise caught[0].message
    for io in ios:
        assert io.path_name == engine
        check_read(io, files, contents, ids(0), ids(R))
        io.close()


def test_first_engine_says_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    with record_io(AIO, tmp_path):  # warnings are errors in RecordIO(...) below
        pass
    io = RecordIO(tmp_path, 100)
    assert (io.path_name, io.record_bytes) == ("native AIO, direct", R)
    io.close()
    assert list(tmp_path.iterdir()) == []


def test_contexts_that_run_out_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have taken all but two of fs.aio-max-nr."""
    with record_io(AIO, tmp_path):
        pass
    files, contents = make_files(tmp_path, 1, 4)
    monkeypatch.setattr(direct_io, "_warned", set())
    calls: list[str] = []
    syscall = direct_lanes.syscall

    def few_contexts(name: str, *arguments: int, locked: bool = False) -> int:
        calls.append(name)
        if name == "io_setup" and calls.count(name) > 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return syscall(name, *arguments, locked=locked)

    monkeypatch.setattr(direct_lanes, "syscall", few_contexts)
    with pytest.warns(UserWarning, match=r"temporarily unavailable.*raise fs\.aio-max-nr"):
        io = RecordIO(tmp_path, R)
    assert calls == ["io_setup"] * 3 + ["io_destroy"] * 2
    assert io.path_name == THREADS
    check_read(io, files, contents, ids(0), ids(R))
    io.close()


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_no_file(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(StoreError, match=rf"{tmp_path} cannot be used: no file can be made there.*{os.strerror(code)}"):
        RecordIO(tmp_path, R)
    monkeypatch.undo()
    with pytest.raises(StoreError, match=r"missing cannot be used"):
        RecordIO(tmp_path / "missing", R)


@pytest.mark.parametrize("engine", ENGINES)
def test_everything_is_given_back(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 20, 4)
    before = (len(os.listdir("/proc/self/fd")), threading.active_count())
    calls = []
    syscall = direct_lanes.syscall

    def counted(name: str, *arguments: int, locked: bool = False) -> int:
        calls.append(name)
        return syscall(name, *arguments, locked=locked)

    monkeypatch.setattr(direct_lanes, "syscall", counted)
    with record_io(engine, tmp_path) as io:
        write_both(io, files, contents, *places_of(np.arange(80), 4, R), seed=1)
        io.sync(files[3])
        with pytest.raises(StoreError):
            io.read(files, ids(7), ids(100 * R), np.empty((1, R), np.uint8))
        check_read(io, files, contents, *places_of(np.arange(80), 4, R))
        assert len(os.listdir("/proc/self/fd")) > before[0]
        io.close()
        io.close()
        for call in (io.read, io.write):
            with pytest.raises(AssertionError, match="closed"):
                call(files, ids(0), ids(0), np.zeros((1, R), np.uint8))
    deadline = time.monotonic() + 10
    while threading.active_count() > before[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert calls.count("io_setup") == calls.count("io_destroy")
    assert (len(calls) > 0) == (engine == AIO)


# -- durability, other threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_forget_and_sync(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, contents = make_files(tmp_path, 2, 4)
    with record_io(engine, tmp_path) as io:
        check_read(io, files, contents, ids(0), ids(0))
        write_both(io, files, contents, ids(0), ids(R), seed=1)
        files[0].unlink()
        files[0].write_bytes(b"\7" * 4 * R)
        check_read(io, files, contents, ids(0), ids(R))  # still the old file
        io.forget(files[0])
        contents[0][:] = b"\7" * 4 * R
        check_read(io, files, contents, ids(0), ids(R))
        write_both(io, files, contents, ids(0), ids(R), seed=2)
        assert files[0].read_bytes() == contents[0]
        synced = []
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
            io.sync(files[1])
        assert synced == [str(files[1])]

        def broken(fd: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fdatasync", broken)
        with pytest.raises(StoreError, match=r"file-1 cannot be written.*Input/output error"):
            io.sync(files[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reader_and_a_writer_and_a_busy_thread(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "MAX_OPEN_FILES", 12)  # each evicts descriptors all the time
    monkeypatch.setattr(direct_io, "STAGING_BYTES", 16 * R)
    files, contents = make_files(tmp_path, 20, 8)
    done = threading.Event()
    failures: list[BaseException] = []

    def keep_writing() -> None:
        try:
            for seed in range(40):
                records = np.random.default_rng(seed).permutation(80) * 2 + 1  # odd ones
                write_both(io, files, written, *places_of(records, 8, R), seed=seed)
        except BaseException as error:
            failures.append(error)

    def spin() -> None:
        while not done.is_set():
            pass

    written = [bytearray(content) for content in contents]
    with record_io(engine, tmp_path) as io:
        threads = [threading.Thread(target=target) for target in (keep_writing, spin)]
        for thread in threads:
            thread.start()
        n_reads = 0
        while threads[0].is_alive() or n_reads < 5:
            records = np.random.default_rng(n_reads).permutation(80) * 2  # even ones
            check_read(io, files, contents, *places_of(records, 8, R))
            n_reads += 1
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert [file.read_bytes() for file in files] == written
