"""The saved sequences of a store: which there are, whether they are whole, who may write.

``<path>`` is a zarr v3 group, ``<path>/sequences/<id>`` the group of one sequence (``runtime.sequence_files``). It can
be the folder of the disk tier too. The attribute ``kvtier`` of a sequence's group says what the sequence is and never
changes; its commit record says how far it has come. A sequence without a commit is not there: its writer was killed, or
is still at it. A sequence can go on from others of the same store: its ``parts`` say which hold its first chunks.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvtier.runtime.commit_record import Commit, checksum, read_commit
from kvtier.runtime.errors import StoreError
from kvtier.runtime.store import VERSION as STORE_VERSION
from kvtier.runtime.zarr_arrays import METADATA, group_metadata, sync_folder, write_metadata

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
        return self.path.name

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

    # -- reading -------------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All committed sequences, the oldest first, those that cannot be read last; raises StoreError for no store."""
        self.check()
        entries = [entry for folder in self._folders() if (entry := self.read(folder.name)) is not None]
        return sorted(entries, key=lambda entry: (entry.attributes.get("created", "~"), entry.id))

    def read(self, id: str) -> Entry | None:
        """One sequence, whatever state it is in; None if nothing of it was committed."""
        folder = self._sequences / id
        try:
            commit = read_commit(folder / "commit")
            if commit is None:
                return None
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

    def part(self, entry: Entry, id: str, begin: int, end: int) -> Entry:
        """The sequence of this store that holds the chunks begin..end of ``entry``; raises StoreError."""
        held = self.read(id) if (self._sequences / id).is_dir() else None
        if held is None or held.problem or held.commit is None or held.commit.chunks < end:
            problem = held.problem if held and held.problem else "it is not there, or shorter than it was"
        elif held.attributes["layout"]["first_chunk"] > begin:
            problem = f"it was saved anew and does not hold chunk {begin} any more"
        else:
            problem = None
        if held is None or problem is not None:
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
        """Become the one writer until ``unlock``; what killed writers left goes. Raises StoreError."""
        try:
            self._create()
            fd = os.open(self.path / METADATA, os.O_RDWR)
        except StoreError:
            raise
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in self._folders():
                if read_commit_quietly(folder) is None:
                    shutil.rmtree(folder, ignore_errors=True)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                raise StoreError(
                    f"{self._holder()} is writing to {self.path}: try again when it is done, or use another folder. "
                    "Reading what is saved there works meanwhile"
                ) from error
            if isinstance(error, OSError) and not isinstance(error, StoreError):  # a file system without locks
                raise self._unusable(error) from error
            raise
        self._lock_fd = fd

    def unlock(self) -> None:
        """Let others write."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def create(self, id: str, attributes: Attributes) -> Path:
        """The folder of a new sequence, which is there for others after its first commit; only while writing.

        Replaces a sequence of this id. Raises OSError.
        """
        assert self._lock_fd is not None, "only the writer creates sequences"
        folder = self._sequences / id
        record = attributes | {"version": VERSION, "created": datetime.now(UTC).isoformat(timespec="microseconds")}
        record = json.loads(json.dumps(record))
        if folder.exists():
            shutil.rmtree(folder)
        write_metadata(folder, group_metadata({"kvtier": record | {"crc32c": checksum(_canonical(record))}}))
        sync_folder(self._sequences)
        return folder

    def remove(self, id: str) -> None:
        """Remove a sequence that was not committed; only while writing."""
        assert self._lock_fd is not None, "only the writer removes sequences"
        shutil.rmtree(self._sequences / id, ignore_errors=True)

    def free_bytes(self) -> int:
        """Bytes free on the device."""
        return shutil.disk_usage(self.path).free

    def _create(self) -> None:
        if self.is_new():
            if not self.path.parent.is_dir():
                # not created: it is often a mount point whose device is missing
                raise StoreError(f"{self.path}: there is no folder {self.path.parent}; create it, or mount it")
            write_metadata(self.path, group_metadata({"kvtier": {"version": STORE_VERSION}}))
        self.check()
        if not (self._sequences / METADATA).exists():
            write_metadata(self._sequences, group_metadata({}))
            sync_folder(self.path)

    def _folders(self) -> list[Path]:
        try:
            return [folder for folder in self._sequences.iterdir() if folder.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unusable(error) from error

    def _holder(self) -> str:
        """Who has the lock, for people."""
        try:
            inode = str((self.path / METADATA).stat().st_ino)
            for line in Path("/proc/locks").read_text().splitlines():
                fields = line.split()
                if "FLOCK" in fields and fields[fields.index("WRITE") + 2].split(":")[-1] == inode:
                    return f"process {fields[fields.index('WRITE') + 1]}"
        except (OSError, ValueError, IndexError):
            pass  # not on Linux, or not allowed
        return "another process"

    def _unusable(self, error: OSError) -> StoreError:
        return StoreError(f"{self.path} cannot be used as a store: {error}; expected a folder, choose another one")


def read_commit_quietly(folder: Path) -> Commit | str | None:
    """The commit of a sequence, why it cannot be read, or None if there was none."""
    try:
        return read_commit(folder / "commit")
    except StoreError as error:
        return str(error)


def _canonical(value: Attributes) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
