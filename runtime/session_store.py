"""Saved sequences on disk: which there are, whether they are whole, and how a new one comes to be.

``<path>`` is a zarr v3 group, ``<path>/sequences/<id>`` the group of one sequence (``runtime.session`` says what is in
it). It can be the folder of ``[store] path`` too. The attribute ``kvtier`` of a sequence's group is its commit record:
what the sequence is, a checksum of every node below, and a checksum of itself. A sequence is written under another name
and renamed when all of it is on the disk, so one that is listed was saved to the end. The id is a hash of the content:
saving the same again changes nothing. Listing what is there reads one small file per sequence.
"""

import fcntl
import hashlib
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import StoreError
from kvtier.runtime.store import VERSION as STORE_VERSION

VERSION = 1
"""Of the layout of a saved sequence."""

METADATA = "zarr.json"
CHECKSUM_BYTES = 4
"""Every file of an array ends with the crc32c of what is before it (zarr's codec of that name)."""

Attributes = dict[str, Any]
"""What the commit record says of a sequence, as JSON."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A sequence that is listed. ``problem`` says why its record cannot be read; ``attributes`` is empty then."""

    path: Path
    attributes: Attributes
    problem: str | None = None

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def nbytes(self) -> int:
        """Bytes of its files, as they were when it was saved."""
        return sum(node["bytes"] for node in self.attributes.get("nodes", {}).values())

    def verify(self) -> None:
        """Check the record, the metadata and the checksum, length and presence of every file; raises StoreError.

        What the files hold is checked against their checksums when they are read.
        """
        if self.problem is not None:
            raise self.damaged(self.problem)
        for name, node in self.attributes["nodes"].items():
            try:
                text = _contents(self.path / name / METADATA, sync=False)
                same = _crc32c(text) == node["metadata"]  # or nothing in it can be relied upon
                same = same and _examine(self.path / name, sync=False) == node
            except OSError as error:
                raise self.damaged(f"{name} cannot be read ({error})") from error
            if not same:
                raise self.damaged(f"{name} is not what was saved")

    def damaged(self, reason: str) -> StoreError:
        """The error that says what is wrong with this sequence and what to do."""
        return StoreError(
            f"the saved sequence {self.path} is damaged: {reason}. Nothing of it was used; remove that folder and save "
            "the sequence again, or put back a copy of it"
        )

    def group(self) -> Any:
        """Its zarr group, read-only."""
        import zarr

        try:
            return zarr.open_group(self.path, mode="r", zarr_format=3)
        except Exception as error:  # whatever zarr makes of it
            raise self.damaged(f"zarr cannot open it ({error})") from error


class SessionStore:
    """A folder of saved sequences. Any number of readers, one writer at a time.

    Parameters
    ----------
    path : the folder; made by the first save if its parent exists
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self._sequences = self.path / "sequences"

    def is_new(self) -> bool:
        """Whether there is nothing yet: no folder, or an empty one."""
        try:
            return not any(self.path.iterdir())
        except FileNotFoundError:
            return True
        except OSError as error:
            raise self._unusable(error) from error

    def check(self) -> None:
        """Raise StoreError unless the folder is a store that this kvtier reads."""
        if not (self.path / METADATA).is_file():
            raise StoreError(
                f"{self.path} is not a kvtier store: "
                + ("it has no zarr.json" if self.path.is_dir() else "there is no such folder")
                + "; expected a folder that cache.save(path) or `kvtier run --session` has written"
            )
        try:
            version = json.loads((self.path / METADATA).read_text())["attributes"]["kvtier"]["version"]
        except OSError as error:
            raise self._unusable(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.path} holds zarr data that kvtier did not write: choose another folder") from error
        if version != STORE_VERSION:
            raise StoreError(
                f"{self.path} has layout version {version}, this kvtier reads {STORE_VERSION}: use the kvtier that "
                "wrote it, or another folder"
            )

    def entries(self) -> list[Entry]:
        """All saved sequences, the oldest first, those that cannot be read last; raises StoreError for no store."""
        self.check()
        try:
            folders = [folder for folder in self._sequences.iterdir() if folder.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unusable(error) from error
        entries = [_read_entry(folder) for folder in folders]
        return sorted(entries, key=lambda entry: (entry.attributes.get("created", "~"), entry.id))

    def entry(self, id: str | None = None) -> Entry:
        """The sequence with this id; the only one for None. Raises StoreError, saying what is there."""
        entries = self.entries()
        there = ", ".join(f"{e.id} ({e.attributes.get('tokens', '?')} tokens)" for e in entries)
        if not entries:
            raise StoreError(f"{self.path} holds no saved sequence: cache.save(path) writes one")
        if id is None:
            if len(entries) > 1:
                raise StoreError(f"{self.path} holds {len(entries)} sequences, say which by its id: {there}")
            return entries[0]
        for entry in entries:
            if entry.id == id:
                return entry
        raise StoreError(f"{self.path} holds no sequence {id!r}; it holds {there}")

    @contextmanager
    def writing(self, nbytes: int) -> Iterator["Draft"]:
        """A new sequence of about ``nbytes``; it is there once ``Draft.commit`` returns, and not at all without.

        Raises StoreError: the folder cannot be used, is being written by somebody else, or its device is too full.
        """
        folder = self.path / f"saving-{secrets.token_hex(4)}"
        try:
            self._create()
            with self._locked():
                for unfinished in self.path.glob("saving-*"):  # of a killed process: we have the lock
                    shutil.rmtree(unfinished, ignore_errors=True)
                self._check_room(nbytes)
                try:
                    yield Draft(folder, self._sequences)
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error}. What was saved before is intact; free space there, or save "
                "to another folder"
            ) from error

    def _create(self) -> None:
        import zarr

        if self.is_new():
            if not self.path.parent.is_dir():
                # not created: it is often a mount point whose device is missing
                raise StoreError(f"{self.path}: there is no folder {self.path.parent}; create it, or mount it")
            zarr.create_group(self.path, zarr_format=3, attributes={"kvtier": {"version": STORE_VERSION}})
            _contents(self.path / METADATA, sync=True)
        self.check()
        if not (self._sequences / METADATA).exists():
            zarr.create_group(self._sequences, zarr_format=3)
            _contents(self._sequences / METADATA, sync=True)
            _sync(self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock of the one writer; it goes with its process."""
        fd = os.open(self.path / METADATA, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise StoreError(
                f"another process is saving to {self.path}: try again when it is done, or save to another folder"
            ) from error
        finally:
            os.close(fd)

    def _check_room(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.path).free
        if nbytes > free:
            raise StoreError(
                f"the sequence takes {format_bytes(nbytes)}, but only {format_bytes(free)} are free in {self.path}: "
                "free space there, or save to another folder"
            )

    def _unusable(self, error: OSError) -> StoreError:
        return StoreError(f"{self.path} cannot be used as a store: {error}; expected a folder, choose another one")


class Draft:
    """A sequence that is being written."""

    def __init__(self, folder: Path, sequences: Path) -> None:
        import zarr

        self._folder = folder
        self._sequences = sequences
        self.group: Any = zarr.create_group(folder, zarr_format=3)
        """Where its arrays go; every one with the codec crc32c, no fill value left unwritten."""

    def commit(self, attributes: Attributes) -> str:
        """Put everything on the disk and make the sequence visible at once; returns its id."""
        nodes = {
            str(path.parent.relative_to(self._folder)): _examine(path.parent, sync=True)
            for path in sorted(self._folder.rglob(METADATA))
            if path.parent != self._folder
        }
        content = attributes | {"version": VERSION, "nodes": nodes}
        id = hashlib.sha256(_canonical(content)).hexdigest()[:12]
        record = content | {"created": datetime.now(UTC).isoformat(timespec="milliseconds")}
        _write_record(self._folder / METADATA, record | {"crc32c": _crc32c(_canonical(record))})
        for folder, _, _ in os.walk(self._folder):
            _sync(Path(folder))
        self._publish(self._sequences / id)
        return id

    def _publish(self, target: Path) -> None:
        """Rename to ``target``, unless the same is there already, whole."""
        if target.exists():
            try:
                _read_entry(target).verify()
                return
            except StoreError:
                target.rename(self._folder.with_name(f"{self._folder.name}-damaged"))
        self._folder.rename(target)
        _sync(self._sequences)
        shutil.rmtree(self._folder.with_name(f"{self._folder.name}-damaged"), ignore_errors=True)


def _read_entry(folder: Path) -> Entry:
    """A listed sequence, whatever state it is in."""
    try:
        record = json.loads((folder / METADATA).read_bytes())["attributes"]["kvtier"]
        checksum = record.pop("crc32c")
        version = record["version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Entry(folder, {}, f"its commit record in {METADATA} cannot be read ({error!r})")
    if version != VERSION:
        problem = f"it has layout version {version}, this kvtier reads {VERSION}"
        return Entry(folder, {}, problem)
    if _crc32c(_canonical(record)) != checksum:
        return Entry(folder, {}, f"the checksum of its commit record in {METADATA} is wrong")
    return Entry(folder, record)


def _write_record(path: Path, record: Attributes) -> None:
    """Make ``record`` the attribute ``kvtier`` of the group whose metadata are at ``path``."""
    metadata = json.loads(path.read_text()) | {"attributes": {"kvtier": record}}
    with path.open("w") as file:  # not visible yet: no need to replace it as a whole
        json.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())


def _examine(folder: Path, *, sync: bool) -> dict[str, Any]:
    """Checksum of a node's metadata, number, bytes and digest of its files; ``sync``: put them on the disk first."""
    text = _contents(folder / METADATA, sync=sync)
    metadata = json.loads(text)
    node = {"metadata": _crc32c(text), "files": 0, "bytes": len(text)}
    if metadata["node_type"] == "group":
        return node
    digest = hashlib.sha256()
    grid = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    counts = [-(-size // step) for size, step in zip(metadata["shape"], grid, strict=True)]
    for index in itertools.product(*map(range, counts)):
        size, checksum = _tail(folder / ".".join(("c", *map(str, index))), sync=sync)
        digest.update(size.to_bytes(8, "little") + checksum)
        node["files"] += 1
        node["bytes"] += size
    return node | {"digest": digest.hexdigest()[:16]}


def _contents(path: Path, *, sync: bool) -> bytes:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return file.read()


def _tail(path: Path, *, sync: bool) -> tuple[int, bytes]:
    """Length of a file of an array, and the checksum at its end."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if sync:
            os.fsync(fd)
        size = os.fstat(fd).st_size
        return size, os.pread(fd, CHECKSUM_BYTES, max(0, size - CHECKSUM_BYTES))
    finally:
        os.close(fd)


def _sync(folder: Path) -> None:
    """Put a folder's own entries on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _crc32c(data: bytes) -> int:
    """The checksum that zarr's codec computes too; imported late, like zarr."""
    import google_crc32c

    value: int = google_crc32c.value(data)
    return value


def _canonical(value: Attributes) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
