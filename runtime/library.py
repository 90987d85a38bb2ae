"""The saved sequences of a store: which there are, whether they are whole, who may write.

``<path>`` is a zarr v3 group, ``<path>/sequences/<id>`` the group of one sequence (``runtime.sequence_files``). It can
be the folder of the disk tier too. The attribute ``kvtier`` of a sequence's group says what the sequence is and never
changes; its commit record says how far it has come. A sequence can go on from others of the same store: its ``parts``
say which hold its first chunks.

Until its first commit a sequence has a folder ``uncommitted`` and is not there: its writer was killed, or is at it. The
next writer removes it. A sequence without a commit and without that folder has lost its commits: it is damaged, and
kept. A sequence that is written anew is kept aside until the new one is complete (``runtime.asides``).
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvtier.runtime import asides
from kvtier.runtime.commit_record import UNCOMMITTED, Commit, checksum, read_commit
from kvtier.runtime.errors import StoreError
from kvtier.runtime.store import VERSION as STORE_VERSION
from kvtier.runtime.zarr_arrays import METADATA, PARTIAL, create_metadata, group_metadata, sync_folder, write_metadata

VERSION = 2
"""Of the layout of a saved sequence."""

Attributes = dict[str, Any]
"""What a sequence's group says of it, as JSON."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A sequence of a store. ``problem``: why it cannot be read; ``attributes`` is empty and ``commit`` None then."""

    path: Path
    attributes: Attributes = field(default_factory=dict)
    commit: Commit | None = None
    problem: str | None = None

    @property
    def id(self) -> str:
        return asides.id_of(self.path)

    @property
    def is_replaced(self) -> bool:
        """Whether this is what was there before a writer began to write it anew, which has committed nothing yet."""
        return self.path.name != self.id

    @property
    def tokens(self) -> int:
        """Committed tokens."""
        return self.commit.tokens if self.commit else 0

    @property
    def nbytes(self) -> int:
        """Bytes that its files take from the device."""
        files = (Path(folder) / name for folder, _, names in os.walk(self.path) for name in names)
        return sum(file.stat().st_blocks * 512 for file in files if file.exists())

    def check(self) -> None:
        """Raise StoreError if there is a problem."""
        if self.problem is not None:
            raise StoreError(
                f"the saved sequence {self.path} is damaged: {self.problem}. Nothing of it was used; remove that "
                "folder and save the sequence again, or put back a copy of it"
            )


class Library:
    """A folder of saved sequences. Any number of readers, one writer at a time.

    Parameters
    ----------
    path : the folder; made by the first save if its parent exists
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self._sequences = self.path / "sequences"
        self._lock_fd: int | None = None

    def is_new(self) -> bool:
        """Whether there is nothing yet: no folder, or an empty one."""
        try:
            return all(_is_partial(path) for path in self.path.iterdir())
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

    # -- reading -------------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All committed sequences, the oldest first, those that cannot be read last; raises StoreError for no store."""
        self.check()
        entries = [entry for id in {*map(asides.id_of, self._folders())} if (entry := self.read(id)) is not None]
        return sorted(entries, key=lambda entry: (entry.attributes.get("created", "~"), entry.id))

    def read(self, id: str) -> Entry | None:
        """One sequence, whatever state it is in; None if nothing of it was committed."""
        return next((entry for folder in self._places(id) if (entry := _read(folder)) is not None), None)

    def entry(self, id: str | None = None) -> Entry:
        """The sequence with this id; the only one for None. Raises StoreError, saying what is there."""
        entries = self.entries()
        there = ", ".join(f"{e.id} ({e.tokens or '?'} tokens)" for e in entries)
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

    def folder_of(self, id: str) -> Path:
        """Where a sequence with this id is or would be."""
        return self._sequences / id

    def replaced(self, id: str) -> list[Path]:
        """Where what a sequence was before it was written anew is kept, the newest first."""
        return asides.replaced(self._sequences / id)

    @property
    def nbytes(self) -> int:
        """Bytes that all sequences take from the device, with what is kept of those that are written anew."""
        entries = self.entries()
        kept = {path for entry in entries for path in (entry.path, *self.replaced(entry.id))}
        return sum(Entry(path).nbytes for path in kept)

    def part(self, entry: Entry, id: str, begin: int, end: int) -> Entry:
        """The sequence of this store that holds the chunks begin..end of ``entry``; raises StoreError."""
        held = self.read(id)
        problem = _lacks(held, begin, end)
        if problem is not None:  # while it is written anew, what it was before may do
            before = [_read(folder) for folder in self.replaced(id)]
            held = next((other for other in before if _lacks(other, begin, end) is None), None)
        if held is None:
            raise StoreError(
                f"the saved sequence {entry.path} goes on from {self._sequences / id}: {problem}. Nothing was used; "
                "put back a copy of that folder"
            )
        return held

    # -- writing -------------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one writer; a second time in the same library it is so already.

        Raises StoreError: the folder cannot be used, or somebody else is writing.
        """
        if self._lock_fd is not None:
            yield
            return
        self.lock()
        try:
            yield
        finally:
            self.unlock()

    def lock(self) -> None:
        """Become the one writer until ``unlock``; what killed writers never committed goes. Raises StoreError."""
        try:
            self._lock_fd = self._locked()
            self._recover()
        except BaseException as error:
            self._release()
            if isinstance(error, BlockingIOError):
                raise StoreError(
                    f"{self._holder()} is writing to {self.path}: try again when it is done, or use another folder. "
                    "Reading what is saved there works meanwhile"
                ) from error
            if isinstance(error, OSError) and not isinstance(error, StoreError):  # a file system without locks
                raise self._unusable(error) from error
            raise

    def unlock(self) -> None:
        """Let others write; what has been written anew completely is not kept twice any more."""
        if self._lock_fd is None:
            return
        try:
            self.settle()
        finally:
            self._release()

    def create(self, id: str, attributes: Attributes) -> Path:
        """The folder of a new sequence, which is there for others after its first commit; only while writing.

        A sequence of this id stays aside until the new one is complete. Raises OSError, with nothing changed.
        """
        assert self._lock_fd is not None, "only the writer creates sequences"
        folder, new = self._sequences / id, self._sequences / f"{id}{asides.NEW}"
        record = attributes | {"version": VERSION, "created": datetime.now(UTC).isoformat(timespec="microseconds")}
        record = json.loads(json.dumps(record))
        try:
            shutil.rmtree(new, ignore_errors=True)
            write_metadata(new / UNCOMMITTED, group_metadata({}))
            write_metadata(new, group_metadata({"kvtier": record | {"crc32c": checksum(_canonical(record))}}))
            asides.put_aside(folder)
            new.rename(folder)
            sync_folder(self._sequences)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            with suppress(OSError):  # then the next writer does it
                asides.settle_one(folder)
            raise
        return folder

    def remove(self, id: str) -> None:
        """Take back the last ``create`` of this id: what was there before is there again; only while writing."""
        assert self._lock_fd is not None, "only the writer removes sequences"
        with suppress(OSError):  # then the next writer does it
            asides.discard(self._sequences / id)
            asides.put_back(self._sequences / id)

    def settle(self) -> None:
        """What has been written anew is no longer kept as it was before, or again if nothing was committed."""
        with suppress(OSError):  # then the next writer does it
            asides.settle(self._sequences)

    def _locked(self) -> int:
        """A descriptor of the store's metadata, which this process has locked; made where there is none."""
        while True:
            self._create()
            fd = os.open(self.path / METADATA, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), (self.path / METADATA).stat()):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # another program has replaced the file: who locks it now does not see this lock

    def _release(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _recover(self) -> None:
        """Put right what killed writers have left."""
        for path in self.path.iterdir():
            if _is_partial(path):
                path.unlink(missing_ok=True)
        if not (self._sequences / METADATA).exists():
            write_metadata(self._sequences, group_metadata({}))
            sync_folder(self.path)
        asides.recover(self._sequences)

    def free_bytes(self) -> int:
        """Bytes free on the device."""
        return shutil.disk_usage(self.path).free

    def _create(self) -> None:
        if self.is_new():
            if not self.path.parent.is_dir():
                # not created: it is often a mount point whose device is missing
                raise StoreError(f"{self.path}: there is no folder {self.path.parent}; create it, or mount it")
            create_metadata(self.path, group_metadata({"kvtier": {"version": STORE_VERSION}}))
        self.check()

    def _folders(self) -> list[Path]:
        """Of the sequences, and beside them."""
        try:
            return [folder for folder in self._sequences.iterdir() if folder.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unusable(error) from error

    def _places(self, id: str) -> Iterator[Path]:
        """Where a sequence can be: in its place, or aside while that has no commit."""
        folder = self._sequences / id
        if asides.id_of(folder) == folder.name:
            yield folder
            yield from self.replaced(id)

    def _holder(self) -> str:
        """Who has the lock, for people."""
        try:
            inode = str((self.path / METADATA).stat().st_ino)
            for line in Path("/proc/locks").read_text().splitlines():
                fields = line.split()
                if {"FLOCK", "WRITE"} <= set(fields):  # others share locks
                    process, place = fields[fields.index("WRITE") + 1 :][:2]
                    if place.split(":")[-1] == inode:
                        return f"process {process}"
        except (OSError, ValueError, IndexError):
            pass  # not on Linux, or not allowed
        return "another process"

    def _unusable(self, error: OSError) -> StoreError:
        return StoreError(f"{self.path} cannot be used as a store: {error}; expected a folder, choose another one")


def _read(folder: Path) -> Entry | None:
    """The sequence in a folder, whatever state it is in; None if nothing of it was committed."""
    is_uncommitted = (folder / UNCOMMITTED).exists()  # asked first: it goes once there is a commit
    try:
        commit = read_commit(folder / "commit")
        if commit is None:
            is_sequence = any((folder / name).exists() for name in (METADATA, "commit", "tokens"))
            return Entry(folder, problem=_lost(folder)) if is_sequence and not is_uncommitted else None
        attributes = json.loads((folder / METADATA).read_bytes())["attributes"]["kvtier"]
        expected, version = attributes.pop("crc32c"), attributes["version"]
    except (OSError, StoreError) as error:
        return Entry(folder, problem=str(error))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Entry(folder, problem=f"its {METADATA} cannot be read ({error!r})")
    if version != VERSION:
        return Entry(folder, problem=f"it has layout version {version}, this kvtier reads {VERSION}")
    if checksum(_canonical(attributes)) != expected:
        return Entry(folder, problem=f"the checksum of its {METADATA} is wrong")
    return Entry(folder, attributes, commit)


def _lost(folder: Path) -> str:
    """The problem of a sequence without a commit that is not one to come."""
    problem = "commit: c.0 and c.1 are missing or empty"
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        if n_tokens := json.loads((folder / "tokens" / METADATA).read_bytes())["shape"][0]:
            return f"{problem}, although {n_tokens} tokens were committed"
    return f"{problem} (an earlier kvtier that was killed while it wrote has left that, too)"


def _lacks(held: Entry | None, begin: int, end: int) -> str | None:
    """Why a sequence cannot give another one its chunks begin..end; None: it can."""
    if held is not None and held.problem is not None:
        return held.problem
    if held is None or held.commit is None or held.commit.chunks < end:
        return "it is not there, or shorter than it was"
    if held.attributes["layout"]["first_chunk"] > begin:
        return f"it was saved anew and does not hold chunk {begin} any more"
    return None


def _is_partial(path: Path) -> bool:
    """Whether this is what a process leaves that is killed when it makes a store."""
    return path.name.startswith(METADATA) and path.name.endswith(PARTIAL)


def _canonical(value: Attributes) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
