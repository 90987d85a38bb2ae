"""What a store at a URL has: its small files, as a library; and what tells one state of a sequence from another."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtier.remote_folder import RemoteFolder, Say
from kvtier.runtime.commit_record import UNCOMMITTED
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import Entry, Library
from kvtier.runtime.zarr_arrays import METADATA, PARTIAL
from kvtier.verify_store import verify_sequence

COMMITS = ("commit/c.0", "commit/c.1")
IDENTITY = (METADATA, *COMMITS)
"""Files that say which sequence it is, when it was made and how far it has come."""
UNFINISHED = "export.unfinished"
"""In a sequence at a URL: its export goes on, or was interrupted. Holds a digest of what is being exported."""


class Mirror(Library):
    """The store at a URL in a local ``folder``, as far as it was asked for; raises StoreError.

    A sequence whose export is not finished is not there.
    """

    def __init__(self, remote: RemoteFolder, folder: Path) -> None:
        super().__init__(folder)
        self.remote = remote
        self.sizes: dict[str, dict[str, int]] = {}
        """Bytes of all files of the sequences that were asked for, by id and name."""
        if METADATA not in remote.entries(must_exist=True):
            raise StoreError(
                f"{remote.url} is not a kvtier store: it has no {METADATA}; expected what `kvtier export` has written"
            )
        (folder / METADATA).write_bytes(remote.read(METADATA))
        with self.named():
            self.check()

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors speak of the URL."""
        try:
            yield
        except StoreError as error:
            raise StoreError(f"{error}".replace(str(self.path), self.remote.url)) from None

    def read(self, id: str) -> Entry | None:
        """As Library's; its commits come last, so that what has none is being exported."""
        self._load(id)
        is_exported = UNFINISHED not in self.sizes[id] and any(name in self.sizes[id] for name in COMMITS)
        return super().read(id) if is_exported else None

    def entry(self, id: str | None = None) -> Entry:
        """As Library's."""
        there = sorted(name for name, kind in self.remote.entries("sequences").items() if kind == "directory")
        for name in there if id is None or id not in there else [id]:
            self._load(name)
        unfinished = [name for name in self.sizes if UNFINISHED in self.sizes[name]]
        if unfinished and (id in unfinished or len(unfinished) == len(there)):
            raise StoreError(
                f"the export of {', '.join(unfinished)} to {self.remote.url} is not finished: run `kvtier export` "
                "again, it goes on where it stopped"
            )
        if not there:
            raise StoreError(f"{self.remote.url} holds no saved sequence: `kvtier export` writes one")
        return super().entry(id)

    def part(self, entry: Entry, id: str, begin: int, end: int) -> Entry:
        """As Library's."""
        if "/" in id or id in ("", ".", ".."):
            raise StoreError(f"the saved sequence {entry.path} goes on from {id!r}, which kvtier did not write")
        self._load(id)
        return super().part(entry, id, begin, end)

    def _load(self, id: str) -> None:
        if id in self.sizes:
            return
        self.sizes[id] = sizes = self.remote.sizes(f"sequences/{id}")
        for name in (METADATA,) if UNFINISHED in sizes else IDENTITY:
            if name in sizes:
                path = self.folder_of(id) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.remote.read(f"sequences/{id}/{name}", sizes[name]))


def chain_of(library: Library, entry: Entry) -> list[Entry]:
    """A sequence after all that it goes on from; raises StoreError if one of them is not there."""
    chain: dict[str, Entry] = {}
    seen = {entry.id}

    def visit(entry: Entry) -> None:
        begin = 0
        for id, end in entry.attributes["parts"]:
            part = library.part(entry, id, begin, end)
            begin = end
            if id not in seen:
                seen.add(id)
                visit(part)
        chain[entry.id] = entry

    visit(entry)
    return list(chain.values())


def problems_of(library: Library, entry: Entry, say: Say) -> list[str]:
    """What is damaged in one sequence, not in those that it goes on from: lines that begin with the file."""
    checked = verify_sequence(library, entry, lambda line: say(f"checking {line}"))
    problems: list[str] = ["it was removed meanwhile"] if checked is None else checked.report()["problems"]
    return problems


def is_same_run(a: Entry, b: Entry) -> bool:
    """Whether two sequences of the same id are the same, perhaps at different commits.

    Others are equal but for rounding, which is too little where a third one goes on from them.
    """
    return bool(a.attributes.get("created") == b.attributes.get("created"))


def identity_of(folder: Path) -> dict[str, bytes]:
    """The files IDENTITY of a sequence, as far as they are there."""
    return {name: (folder / name).read_bytes() for name in IDENTITY if (folder / name).is_file()}


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of the files of a sequence by name, without commits and what a writer is about to rename or remove."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != PARTIAL)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files if file.name != "partial"}
    left_out = (*COMMITS, f"{UNCOMMITTED}/{METADATA}")
    return {name: size for name, size in sorted(sizes.items()) if name not in left_out}
