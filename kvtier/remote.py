"""``kvtier export`` and ``kvtier restore``: saved sequences in object storage. Loads no model.

What is at a URL is a store like a local one, file by file: any reader of zarr v3 opens it. A sequence travels with
those that it goes on from. At the URL its commit record goes last, and until all is there it has a file
``export.unfinished``.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtier.remote_arrivals import Arrivals, missing
from kvtier.remote_folder import Progress, RemoteFolder, Say
from kvtier.remote_mirror import COMMITS, UNFINISHED, Mirror, chain_of, identity_of, is_same_run, problems_of, sizes_of
from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import Entry, Library
from kvtier.runtime.zarr_arrays import METADATA

Place = str | os.PathLike[str]


def export_sequence(
    store: Place,
    url: str,
    id: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
    force: bool = False,
) -> dict[str, Any]:
    """Copy a saved sequence, and those that it goes on from, to a URL that fsspec serves.

    What is there already is not sent again. An export that was interrupted is not a sequence there; the next one goes
    on with it. What is damaged here is refused, not copied.

    Parameters
    ----------
    store : the folder, which may be read-only
    url : such as ``s3://bucket/books``: empty, or a store
    id : of the sequence; None: the only one
    options : for fsspec's file system, such as ``endpoint_url``; None: its driver finds them
    say : takes lines about how far it is
    force : send every file, also in place of what another run has exported

    Returns
    -------
    What ``kvtier export --json`` prints; ``files`` and ``bytes`` count what was sent.

    Raises
    ------
    StoreError
        The sequence is not there, not complete or damaged, or the URL cannot be written. No message holds secrets of
        ``url`` or ``options``.
    """
    started = time.perf_counter()
    library, remote = Library(store), RemoteFolder(url, options)
    entry = library.entry(id)
    entry.check()
    assert entry.commit is not None
    if not entry.commit.complete:
        raise StoreError(
            f"the saved sequence {entry.path} is not complete: its reading was interrupted, or goes on. Read the same "
            "text again with the same model and settings (it goes on where it stopped), then export it"
        )
    chain, progress = chain_of(library, entry), Progress(say, "sent")
    _prepare(remote, library)
    with tempfile.TemporaryDirectory() as folder:
        mirror = Mirror(remote, Path(folder))
        theirs = None if force else mirror.read(entry.id)
        if theirs is not None and theirs.commit and theirs.commit.complete and not is_same_run(entry, theirs):
            say(f"{entry.id} is there already, from another run")
            return _report(entry, remote, library, progress, started)
        exports = [export for part in chain if (export := _plan(mirror, library, part, force)) is not None]
        for export in exports:
            export.check_source(say)
        for export in exports:
            export.run(remote, progress)
    if not exports:
        say(f"{entry.id} is there already")
    return _report(entry, remote, library, progress, started)


def restore_sequence(
    url: str,
    store: Place,
    id: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Copy a sequence that ``export_sequence`` has written to a URL, and those that it goes on from, into a store.

    What is there already and whole is left as it is; what is damaged there is replaced. Everything that arrives is
    checked before it counts.

    Parameters
    ----------
    url : of the store, such as ``s3://bucket/books``
    store : the folder; made if its parent exists
    id : of the sequence; None: the only one
    options, say : as for ``export_sequence``

    Returns
    -------
    What ``kvtier restore --json`` prints; ``files`` and ``bytes`` count what was fetched.

    Raises
    ------
    StoreError
        The sequence is not there or damaged (then nothing is kept), the URL cannot be read, or the folder cannot be
        written (then what has arrived is kept for the next time). No message holds secrets.
    """
    started = time.perf_counter()
    library, remote, progress = Library(store), RemoteFolder(url, options), Progress(say, "fetched")
    if not library.is_new():
        library.check()
    with tempfile.TemporaryDirectory() as folder:
        mirror = Mirror(remote, Path(folder))
        with mirror.named():
            entry = mirror.entry(id)
            entry.check()
            chain = chain_of(mirror, entry)
        with library.writing():
            if needed := missing(library, chain, say):
                Arrivals(mirror, library, entry.id).restore(needed, progress)
            else:
                say(f"{entry.id} is there already")
    return _report(entry, remote, library, progress, started)


def _report(entry: Entry, remote: RemoteFolder, library: Library, progress: Progress, started: float) -> dict[str, Any]:
    return {
        "id": entry.id,
        "tokens": entry.tokens,
        "files": progress.files,
        "bytes": progress.nbytes,
        "seconds": time.perf_counter() - started,
        "url": remote.url,
        "store": str(library.path),
    }


def _prepare(remote: RemoteFolder, library: Library) -> None:
    """Make the URL a store, unless something is there. Raises StoreError."""
    there = remote.entries()
    if not there:
        remote.write(METADATA, (library.path / METADATA).read_bytes())
    elif METADATA not in there:
        raise StoreError(
            f"{remote.url} is not a kvtier store, and not empty (it holds {min(there)!r}): choose another folder"
        )
    if METADATA not in remote.entries("sequences"):
        remote.write(f"sequences/{METADATA}", (library.path / "sequences" / METADATA).read_bytes())


def _plan(mirror: Mirror, library: Library, entry: Entry, force: bool) -> "_Export | None":
    """What has to be sent of one sequence; None: nothing. Raises StoreError if something else is in its place."""
    assert entry.commit is not None
    export = _Export(mirror, library, entry)
    theirs = mirror.read(entry.id)
    if force:
        return export
    if theirs is not None and theirs.commit is not None:
        if not is_same_run(entry, theirs):
            raise StoreError(
                f"{mirror.remote.url} has {entry.id} from another run, which may differ in rounding: choose another "
                f"URL, or remove {mirror.remote.url}/sequences/{entry.id} if nothing there needs it"
            )
        if theirs.commit.number > entry.commit.number:
            return None  # of a sequence that grew on another machine; ours is its beginning
    export.skip_what_is_there()
    return export if export.files or export.is_unfinished else None


class _Export:
    """One sequence goes to a URL."""

    def __init__(self, mirror: Mirror, library: Library, entry: Entry) -> None:
        mirror.read(entry.id)
        self._mirror, self._library, self._entry = mirror, library, entry
        self._folder = f"sequences/{entry.id}"
        self._there = mirror.sizes[entry.id]
        self._identity = identity_of(entry.path)  # before anything else: a writer may be at what is not complete
        self._digest = hashlib.sha256(repr(sorted(self._identity.items())).encode()).hexdigest().encode()
        self._sizes = sizes_of(entry.path)
        self.files = dict(self._sizes)
        """To send: bytes by name."""

    @property
    def is_unfinished(self) -> bool:
        """Whether an export was interrupted there."""
        return UNFINISHED in self._there

    def skip_what_is_there(self) -> None:
        """Send only files that are not there, if those that are belong to what is being exported."""
        if self.is_unfinished:
            marker = self._mirror.remote.read(f"{self._folder}/{UNFINISHED}", self._there[UNFINISHED])
            goes_on = marker == self._digest
        else:
            goes_on = identity_of(self._mirror.folder_of(self._entry.id)) == self._identity
        if goes_on:
            self.files = {name: size for name, size in self._sizes.items() if self._there.get(name) != size}

    def check_source(self, say: Say) -> None:
        """Raise StoreError if what is to be sent is damaged."""
        if problems := problems_of(self._library, self._entry, say):
            raise StoreError(
                f"the saved sequence {self._entry.path} is damaged: {problems[0]}. Nothing was exported; `kvtier "
                "verify` lists all that is damaged"
            )

    def run(self, remote: RemoteFolder, progress: Progress) -> None:
        """Send it, the commit last. Raises StoreError."""
        entry, nbytes = self._entry, sum(self.files.values())
        progress.total_bytes += nbytes
        progress.say(f"{entry.id}: {entry.tokens:,} tokens, {len(self.files)} files, {format_bytes(nbytes)} to send")
        # What is replaced goes before the marker says whose files are there: sizes do not tell old ones from new ones.
        replaced = [name for name in (*COMMITS, *self.files) if name in self._there]
        remote.remove(f"{self._folder}/{name}" for name in dict.fromkeys(replaced))
        remote.write(f"{self._folder}/{UNFINISHED}", self._digest)
        remote.send(entry.path, self._folder, self.files, progress)
        self._check(remote)
        for name in COMMITS:
            if data := self._identity.get(name):
                remote.write(f"{self._folder}/{name}", data)
                progress.add(len(data))
        remote.remove([f"{self._folder}/{UNFINISHED}"])

    def _check(self, remote: RemoteFolder) -> None:
        """Before the commit: all is there, and it is what the commit is about. Raises StoreError."""
        entry, there = self._entry, remote.sizes(self._folder)
        for name, size in self._sizes.items():
            if there.get(name) != size:
                raise StoreError(
                    f"{remote.url}/{self._folder}/{name} has {there.get(name, 0)} bytes, {size} were sent: does "
                    "somebody else write there? Run this again: it goes on where it stopped"
                )
        if identity_of(entry.path) != self._identity or self._library.read(entry.id) != entry:
            raise StoreError(
                f"{entry.path} was written while it was exported, so that the copy does not count: export it again "
                "when that is done"
            )
