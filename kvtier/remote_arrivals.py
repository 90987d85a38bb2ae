"""From the store at a URL into a local one: what has to come, and how it comes to count.

It arrives beside the sequences, in ``restore-<id>``, and takes its place when every checksum in it is right.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvtier.remote_folder import Progress, Say
from kvtier.remote_mirror import IDENTITY, Mirror, chain_of, identity_of, is_same_run, problems_of, sizes_of
from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import Entry, Library
from kvtier.runtime.sequence_files import SHARD_CHUNKS
from kvtier.runtime.session import layout_of
from kvtier.runtime.zarr_arrays import group_metadata, sync_folder, write_metadata


def missing(library: Library, chain: Sequence[Entry], say: Say) -> list[Entry]:
    """Which sequences of ``chain`` have to come, so that its last one is whole; those that are there are read for that.

    Raises StoreError if one would take the place of another that may be needed.
    """
    last = chain[-1]
    own = library.read(last.id)
    if own is not None and not is_same_run(own, last) and _is_sound(library, own, say):
        return []
    ends = {entry.id: 0 for entry in chain}
    for entry in chain:
        for id, end in entry.attributes["parts"]:
            ends[id] = max(ends[id], end)
    return [entry for entry in chain if not _is_there(library, entry, None if entry is last else ends[entry.id], say)]


def _is_there(library: Library, entry: Entry, chunks: int | None, say: Say) -> bool:
    """Whether the store has a sequence, whole and up to so many chunks; None: to the commit of ``entry``."""
    own = library.read(entry.id)
    if own is None or own.commit is None:
        return False
    assert entry.commit is not None
    if not is_same_run(own, entry):
        users = [e.id for e in library.entries() if any(id == own.id for id, _ in e.attributes.get("parts", []))]
        if chunks is not None or users:
            of = f", and {users[0]} goes on from it" if users else ""
            raise StoreError(
                f"{own.path} is there already, but from another run, which may differ in rounding{of}: restore into "
                "another folder, or remove that folder if nothing needs it"
            )
        return False
    reaches = own.commit.number >= entry.commit.number if chunks is None else own.commit.chunks >= chunks
    return reaches and not problems_of(library, own, say)


def _is_sound(library: Library, entry: Entry, say: Say) -> bool:
    """Whether a sequence is complete and whole, with all that it goes on from."""
    if entry.commit is None or not entry.commit.complete:
        return False
    try:
        return not any(problems_of(library, part, say) for part in chain_of(library, entry))
    except StoreError:
        return False


class Arrivals(Library):
    """What arrives, as a library together with ``target``, the store where it is to be.

    Parameters
    ----------
    mirror : where it comes from
    target : of which this process is the writer
    id : of the sequence that was asked for
    """

    def __init__(self, mirror: Mirror, target: Library, id: str) -> None:
        super().__init__(target.path / f"restore-{id}")
        self._mirror = mirror
        self._target = target

    def part(self, entry: Entry, id: str, begin: int, end: int) -> Entry:
        """As Library's."""
        if self.folder_of(id).is_dir():
            return super().part(entry, id, begin, end)
        return self._target.part(entry, id, begin, end)

    def restore(self, entries: Sequence[Entry], progress: Progress) -> None:
        """Fetch sequences, check them and put them in their place; raises StoreError."""
        try:
            write_metadata(self.path, group_metadata({}))  # a stranger in the store, but one that zarr knows
            self._fetch(entries, progress)
            for entry in entries:
                self._check(entry, progress.say)
            self._put_in_place(entries)
        except StoreError as error:
            if not self.path.is_dir():
                raise
            raise StoreError(f"{error}. What has arrived is kept in {self.path}") from error.__cause__
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error}. Free space there, or choose another folder, and run this "
                "again: what has arrived is kept there"
            ) from error

    def _fetch(self, entries: Sequence[Entry], progress: Progress) -> None:
        needed = {entry.id: self._begin(entry, progress) for entry in entries}
        nbytes = sum(_disk_bytes(entry, name, size) for entry in entries for name, size in needed[entry.id].items())
        if nbytes > (free := self.free_bytes()):
            raise StoreError(
                f"{format_bytes(nbytes)} are to come, but only {format_bytes(free)} are free in {self._target.path}: "
                "free space there, or choose another folder, and run this again"
            )
        progress.total_bytes = progress.nbytes + sum(sum(names.values()) for names in needed.values())
        for entry in entries:
            folder, names = self.folder_of(entry.id), needed[entry.id]
            size = format_bytes(sum(names.values()))
            progress.say(f"{entry.id}: {entry.tokens:,} tokens, {len(names)} files, {size} to fetch")
            self._mirror.remote.fetch(f"sequences/{entry.id}", folder, names, progress)
            for path, _, _ in os.walk(folder):
                sync_folder(Path(path))

    def _begin(self, entry: Entry, progress: Progress) -> dict[str, int]:
        """Write what is known of a sequence, and say which files have to come: bytes by name."""
        folder, identity = self.folder_of(entry.id), identity_of(self._mirror.folder_of(entry.id))
        if folder.exists() and identity_of(folder) != identity:
            shutil.rmtree(folder)  # what is at the URL has changed since
        for name, data in identity.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            progress.add(len(data))
        here = sizes_of(folder)
        sizes = self._mirror.sizes[entry.id]
        return {name: size for name, size in sizes.items() if name not in IDENTITY and here.get(name) != size}

    def _check(self, entry: Entry, say: Say) -> None:
        """Raise StoreError, with nothing kept, if a sequence is not what was exported."""
        arrived = self.read(entry.id) or Entry(self.folder_of(entry.id), problem="it was removed")
        if not (problems := problems_of(self, arrived, say)):
            return
        shutil.rmtree(self.path)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise StoreError(
            f"{self._mirror.remote.url}/sequences/{entry.id} is damaged: {problems[0]}{more}. Nothing was kept. Run "
            "this again; if it says the same, remove what is damaged there and run `kvtier export` again"
        )

    def _put_in_place(self, entries: Sequence[Entry]) -> None:
        """Let what has arrived count. Raises OSError."""
        for entry in entries:
            target, replaced = self._target.folder_of(entry.id), self.path / f"replaced-{entry.id}"
            shutil.rmtree(replaced, ignore_errors=True)
            if target.exists():
                target.rename(replaced)
            self.folder_of(entry.id).rename(target)
            sync_folder(target.parent)
        shutil.rmtree(self.path)


def _disk_bytes(entry: Entry, name: str, size: int) -> int:
    """About what a file will take from the device: records that were not written are holes."""
    assert entry.commit is not None
    if not name.startswith("kv/c."):
        return size
    layout, shard = layout_of(entry.attributes), int(name.split(".")[2])
    held = max(0, min(SHARD_CHUNKS, entry.commit.chunks - layout.first - shard * SHARD_CHUNKS))
    return min(size, held * layout.n_layers * layout.n_kv_heads * layout.shard.record_bytes)
