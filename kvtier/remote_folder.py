"""A folder at a URL that fsspec serves: listing it, moving files to and from it, and what goes wrong, for people.

Memory does not grow with the files: at most PARALLEL transfers of a few PIECE_BYTES each are under way.
"""

import errno
import inspect
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import numpy as np

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import StoreError

PIECE_BYTES = 8 * 2**20
"""Sent or fetched by one request, where the driver lets us say so; S3 takes 10,000 of them for a file: 80 GiB."""
PARALLEL = 8
"""Transfers at once, where the driver is asynchronous."""
HOLE_BYTES = 2**18
"""Zeros are looked for in blocks of so many bytes, so that any MiB of them has become a hole."""
SAY_SECONDS = 5.0

DRIVERS = {
    **{"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"},
    **{"az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "adl": "adlfs"},
}
"""The package that serves a protocol, where fsspec alone does not."""
CREDENTIALS = {
    "s3fs": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gcsfs": "GOOGLE_APPLICATION_CREDENTIALS",
    "adlfs": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""Environment variables in which a driver finds them."""
SHOWN_OPTIONS = {"endpoint_url", "region_name", "default_region", "project", "signature_version"}
"""Options whose values may appear in messages."""

USER = "://([^/]*|[^?]*:[^?]*)@"
"""Before the host of a URL; a password may hold a slash."""

Say = Callable[[str], None]
Item = TypeVar("Item")


@dataclass
class Progress:
    """Files and bytes that were moved; says so now and then."""

    say: Say
    verb: str
    total_bytes: int = 0
    files: int = 0
    nbytes: int = 0
    _said: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, nbytes: int, files: int = 1) -> None:
        """Count what has arrived; from any thread."""
        with self._lock:
            self.files += files
            self.nbytes += nbytes
            now = time.monotonic()
            if now - self._said > SAY_SECONDS:
                self._said = now
                self.say(f"{self.verb} {format_bytes(self.nbytes)} of {format_bytes(self.total_bytes)}")


class RemoteFolder:
    """The folder at a URL. Names of files are relative to it; whatever fails is a StoreError without secrets.

    Parameters
    ----------
    url : as fsspec takes it, with its protocol
    options : for fsspec's file system, such as keys and ``endpoint_url``
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None) -> None:
        self._secrets = _secrets_of(url, options or {})
        shown = re.sub(r"\?.*", "?***", re.sub(USER, "://***@", url) if "://" in url else re.sub(".*@", "***@", url))
        self.url = shown if shown.endswith("://") else shown.rstrip("/")
        """For people: without secrets."""
        self._protocol = url.partition("://")[0]
        self._fs, root = self._open(url, dict(options or {}))
        self._root = root.rstrip("/")
        parameters = inspect.signature(self._fs.put_file).parameters
        wanted = {"chunksize": PIECE_BYTES, "max_concurrency": 2}
        self._put_options = {name: value for name, value in wanted.items() if name in parameters}

    def _open(self, url: str, options: dict[str, Any]) -> tuple[Any, str]:
        if "://" not in url:
            raise StoreError(f"{self.url} is not a URL: expected one that fsspec serves, such as s3://bucket/folder")
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]
        except ImportError as error:
            raise StoreError(f"{self.url} needs fsspec, which is not installed: pip install fsspec") from error
        try:
            fs, root = url_to_fs(url, **options)
        except ImportError as error:
            driver = DRIVERS.get(self._protocol)
            advice = f"pip install {driver}" if driver else f"fsspec says: {error}"
            raise StoreError(f"{self._protocol}:// needs a driver which is not installed: {advice}") from error
        except Exception as error:
            raise self.failed("it cannot be opened", error) from self._cause(error)
        if getattr(fs, "local_file", False) and not Path(root).parent.is_dir():
            parent = Path(root).parent  # not created: it is often a mount point whose device is missing
            raise StoreError(f"{self.url}: there is no folder {parent}; create it, or mount it")
        return fs, root

    # -- small things --------------------------------------------------------------------------------------------------

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of all files below ``folder``, by their name in it; empty where there is no such folder."""
        self._fs.invalidate_cache()
        base = self._path(folder).strip("/")
        found = self._do("it cannot be listed", self._fs.find, self._path(folder), detail=True)
        sizes = {}
        for path, info in found.items():
            name = path.strip("/").removeprefix(base).strip("/")
            if info["type"] != "file" or not name or path.endswith("/"):
                continue  # some drivers list the folder itself
            if any(part in ("", ".", "..") for part in name.split("/")):
                raise StoreError(f"{self.url} holds a file with the name {name!r}, which kvtier did not write")
            sizes[name] = int(info["size"])
        return sizes

    def entries(self, folder: str = "", *, must_exist: bool = False) -> dict[str, str]:
        """What is in ``folder``: "file" or "directory", by name; empty where there is no such folder."""
        self._fs.invalidate_cache()

        def listed() -> list[Any]:
            try:
                return list(self._fs.ls(self._path(folder), detail=True))
            except FileNotFoundError:
                if must_exist:
                    raise
                return []

        base = self._path(folder).strip("/")
        entries = {}
        for info in self._do("it cannot be listed", listed):
            name = info["name"].strip("/").removeprefix(base).strip("/")
            if name not in ("", ".", "..") and "/" not in name:  # some drivers list the folder itself
                entries[name] = info["type"]
        return entries

    def read(self, name: str, nbytes: int | None = None, offset: int = 0) -> bytes:
        """So many bytes of a file; None: all."""
        part = {} if nbytes is None else {"start": offset, "end": offset + nbytes}
        data: bytes = b""
        if nbytes != 0:
            data = self._do(f"{name} cannot be read", self._fs.cat_file, self._path(name), **part)
        if nbytes is not None and len(data) != nbytes:
            raise StoreError(f"{self.url}/{name} became shorter while it was read: somebody writes there; try again")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""

        def write() -> None:
            self._make_parent(name)
            self._fs.pipe_file(self._path(name), data)

        self._do(f"{name} cannot be written", write)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, those that are there."""

        def remove(name: str) -> None:
            with suppress(FileNotFoundError):
                self._fs.rm(self._path(name))

        for name in names:
            self._do(f"{name} cannot be removed", remove, name)

    # -- files ---------------------------------------------------------------------------------------------------------

    def send(self, source: Path, folder: str, names: Mapping[str, int], progress: Progress) -> None:
        """Send files of the local folder ``source`` into ``folder``; their sizes by name."""

        def send(name: str) -> None:
            remote, local = f"{folder}/{name}".lstrip("/"), str(source / name)

            try:
                self._make_parent(remote)
                self._fs.put_file(local, self._path(remote), **self._put_options)
            except Exception as error:
                if getattr(error, "filename", None) == local:
                    raise StoreError(f"{local} cannot be read: {error}") from error
                raise self.failed(f"{remote} cannot be written", error) from self._cause(error)
            progress.add(names[name])

        self._each(send, names)

    def fetch(self, folder: str, target: Path, names: Mapping[str, int], progress: Progress) -> None:
        """Fetch files of ``folder`` into the local folder ``target``; a file is there when it is whole and on the disk.

        Zeros become holes.
        """
        for parent in {(target / name).parent for name in names}:
            parent.mkdir(parents=True, exist_ok=True)
        files = [_Incoming(target / name, f"{folder}/{name}".lstrip("/"), size) for name, size in names.items()]

        def fetch(piece: tuple[_Incoming, int]) -> None:
            file, offset = piece
            data = self.read(file.name, min(PIECE_BYTES, file.nbytes - offset), offset)
            progress.add(len(data), file.write(offset, data))

        self._each(fetch, [(file, offset) for file in files for offset in file.offsets])

    def _each(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Several at once; after the first that fails no further ones are begun."""
        pool = ThreadPoolExecutor(PARALLEL if self._fs.async_impl else 1)
        try:
            for _ in pool.map(work, items):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def _make_parent(self, name: str) -> None:
        if not self._fs.async_impl:  # object storage has no folders, and some drivers would make a bucket
            self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    # -- errors --------------------------------------------------------------------------------------------------------

    def _do(self, what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # each driver has its own
            raise self.failed(what, error) from self._cause(error)

    def failed(self, what: str, error: Exception) -> StoreError:
        """The error that says what happened at the URL and what to do."""
        reason = " ".join(f"{error}".split()) or "no reason given"
        return StoreError(
            f"{self.url}: {what}: {self._clean(f'{type(error).__name__}: {reason}')}. {_advice(error, self._protocol)}"
        )

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _cause(self, error: Exception) -> Exception | None:
        """``error``, unless it would show a secret to whoever prints it."""
        text = "".join(traceback.format_exception(error))
        return error if self._clean(text) == text else None


class _Incoming:
    """A file that arrives in pieces, in any order."""

    def __init__(self, path: Path, name: str, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self.offsets = range(0, max(1, nbytes), PIECE_BYTES)
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._partial.unlink(missing_ok=True)
        self._left = len(self.offsets)
        self._lock = threading.Lock()

    def write(self, offset: int, data: bytes) -> int:
        """Write one piece; 1 if that was the last one, else 0. Raises OSError."""
        fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            for begin in range(0, len(data), HOLE_BYTES):
                block = memoryview(data)[begin : begin + HOLE_BYTES]
                if np.frombuffer(block, np.uint8).any():
                    at = offset + begin
                    while block:
                        n = os.pwrite(fd, block, at)
                        block, at = block[n:], at + n
            with self._lock:
                self._left -= 1
                if self._left:
                    return 0
            os.ftruncate(fd, self.nbytes)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._partial.rename(self._path)
        return 1


def _secrets_of(url: str, options: Mapping[str, Any]) -> list[str]:
    """What may not appear in a message: user and password of the URL, values of its query and of options."""
    found = set()
    for user in re.findall(USER, url):
        found |= {user, *user.split(":")}
    for query in re.findall(r"\?(.*)", url):
        found |= {part.partition("=")[2] for part in query.split("&")}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key in value:
                walk(value[key], str(key))
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item, name)
        elif isinstance(value, str | bytes) and name not in SHOWN_OPTIONS:
            found.add(value if isinstance(value, str) else value.decode(errors="replace"))
        elif isinstance(value, str):  # an address may hold a password
            found.update(_secrets_of(value, {}))

    walk(options, "")
    found |= {unquote(secret) for secret in found}
    return sorted((secret for secret in found if len(secret) > 3), key=len, reverse=True)


def _advice(error: Exception, protocol: str) -> str:
    """What to do about an error of a driver; they have no classes in common."""
    words = f"{type(error).__name__} {error}".lower()
    if "credential" in words:
        where = CREDENTIALS.get(DRIVERS.get(protocol, ""), "where its driver looks for them")
        return f"Give credentials: {where}, or `options`"
    if isinstance(error, PermissionError) or re.search("forbidden|access denied|401|403", words):
        return "Check which account is used, and that it may list, read and write there"
    if isinstance(error, FileNotFoundError):
        return "Check the URL: there is no such bucket or folder"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free space there, and run this again: it goes on where it stopped"
    if isinstance(error, TypeError | ValueError):
        return "Check the URL, and `options` if some were given"
    if isinstance(error, ConnectionError | TimeoutError) or re.search("connect|timeout|timed out|dns|resolve", words):
        return "Check the network and the endpoint, and run this again: it goes on where it stopped"
    return "If that can pass, run this again: it goes on where it stopped"
