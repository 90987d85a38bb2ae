"""What can lie beside the sequences of a store; made and removed by its writer alone.

==================  ====================================================================================================
<id>.replaced<n>    what ``<id>`` was before it was written anew: kept until that is complete, back if it never begins
<id>.new            ``<id>`` before anything of it is there
<id>.removed        on its way out
==================  ====================================================================================================

All functions but ``id_of`` and ``replaced`` are the writer's; they raise OSError.
"""

import re
import shutil
from pathlib import Path

from kvtier.runtime.commit_record import UNCOMMITTED, Commit, end_uncommitted, read_commit
from kvtier.runtime.errors import StoreError
from kvtier.runtime.zarr_arrays import sync_folder

NEW, REPLACED, REMOVED = ".new", ".replaced", ".removed"
_NAME = re.compile(rf"(?P<id>.+?)(?P<replaced>\{REPLACED}\d+)?(\{NEW}|\{REMOVED})?")


def id_of(folder: Path) -> str:
    """The id of the sequence that a folder is, or is beside."""
    name = _NAME.fullmatch(folder.name)
    assert name is not None
    return name["id"]


def replaced(folder: Path) -> list[Path]:
    """What the sequence ``folder`` was before it was written anew, as far as that is kept, the newest first."""
    numbers = []
    for path in folder.parent.glob(f"*{REPLACED}*"):
        if id_of(path) == folder.name and path.suffix[len(REPLACED) :].isdecimal():
            numbers.append(int(path.suffix[len(REPLACED) :]))
    return [_replaced(folder, number) for number in sorted(numbers, reverse=True)]


def put_aside(folder: Path) -> None:
    """Make way for a new sequence: what was never committed goes, anything else is kept as replaced."""
    if is_uncommitted(folder):
        discard(folder)
    elif folder.exists():
        before = replaced(folder)
        folder.rename(_replaced(folder, int(before[0].suffix[len(REPLACED) :]) + 1 if before else 1))


def put_back(folder: Path) -> None:
    """The sequence ``folder`` is what it was before, if that was kept."""
    if before := replaced(folder):
        before[0].rename(folder)
        sync_folder(folder.parent)


def discard(folder: Path) -> None:
    """Remove a folder; whoever is killed at it leaves nothing that looks like a sequence."""
    removed = folder.with_name(f"{folder.name}{REMOVED}")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def recover(sequences: Path) -> None:
    """Put right what killed writers have left in a folder of sequences."""
    for folder in [folder for folder in sequences.iterdir() if folder.is_dir()]:
        if id_of(folder) == folder.name:
            if is_uncommitted(folder):
                discard(folder)
            elif _commit_of(folder) is not None:
                end_uncommitted(folder)  # else it would be, were the commit ever lost
        elif folder.suffix in (NEW, REMOVED):
            shutil.rmtree(folder, ignore_errors=True)
    settle(sequences)


def settle(sequences: Path) -> None:
    """Decide between the sequences that were to be written anew and what they were before."""
    for id in {id_of(path) for path in sequences.glob(f"*{REPLACED}*")}:
        settle_one(sequences / id)


def settle_one(folder: Path) -> None:
    """The same for one sequence."""
    commit = _commit_of(folder)
    if not folder.exists() or is_uncommitted(folder):
        discard(folder)
        put_back(folder)
    elif isinstance(commit, Commit) and commit.complete:
        for before in replaced(folder):
            discard(before)


def is_uncommitted(folder: Path) -> bool:
    """Whether this is a sequence that had no commit, which nobody can have used."""
    return (folder / UNCOMMITTED).exists() and _commit_of(folder) is None


def _replaced(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}{REPLACED}{number}")


def _commit_of(folder: Path) -> Commit | str | None:
    """The commit of a sequence, why it cannot be read, or None if there is none."""
    try:
        return read_commit(folder / "commit")
    except StoreError as error:
        return str(error)
