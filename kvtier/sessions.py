"""Saving a cache and opening it again: which model it belongs to, and what is refused before any work.

``runtime.session`` writes and reads the tensors, ``runtime.library`` keeps the folder; ``kvtier.durable`` saves while
it reads.
"""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtier.cache import TieredCache
from kvtier.fingerprint import model_facts, weights_digest
from kvtier.runtime.budget import format_bytes
from kvtier.runtime.commit_record import read_slots
from kvtier.runtime.committer import NOTHING, Committer, inherited, reads_from, save_chunks
from kvtier.runtime.engine import Engine
from kvtier.runtime.errors import KvtierError, StoreError, UnsupportedError
from kvtier.runtime.library import Attributes, Entry, Library
from kvtier.runtime.saved_beginning import common_length, read_beginning
from kvtier.runtime.saved_sequence import SavedSequence, read_sequence
from kvtier.runtime.sequence import TieredSequence
from kvtier.runtime.sequence_files import SequenceFiles
from kvtier.runtime.session import difference, fixed_values, layout_attributes, layout_of, make_layout, sequence_id
from kvtier.runtime.tier import Ids
from kvtier.runtime.tiered import TieredEngine

if TYPE_CHECKING:
    from kvtier.offload import Offload

Place = str | os.PathLike[str]


def refusal(kv: "Offload", entry: Entry) -> str | None:
    """Why a saved sequence cannot go on in the block ``kv`` exactly as it was; None: it can."""
    saved, here = entry.attributes["model"], model_facts(kv.model)
    if saved["class"] != here["class"]:
        return f"it was made by a {saved['class']}, this model is a {here['class']}"
    for key in sorted(saved["config"].keys() & here["config"].keys()):  # versions of transformers add fields
        if saved["config"][key] != here["config"][key]:
            return f"its model has config.{key} = {saved['config'][key]!r}, this one {here['config'][key]!r}"
    if different := difference(engine_of(kv), entry):
        return different
    if saved["weights"] != weights_digest(kv.model):
        return f"it was made with other weights ({saved['name']}; this model is {here['name']})"
    return None


def read_otherwise(kv: "Offload", entry: Entry, select: int) -> str | None:
    """Which setting would make reading the same text again give something else than what was saved."""
    here = asdict(kv.geometry) | {"select": select}
    for name, saved in (entry.attributes["geometry"] | {"select": entry.attributes["select"]}).items():
        if saved != here[name] and name != "max":  # a ceiling, no more
            section = "prefill" if name in ("block", "queries", "tail") else "attention"
            return f"it was read with [{section}] {name} = {saved}, here it is {here[name]}"
    return None


def check_method(method: str) -> None:
    """Refuse the ``[attention] method`` that has no chunks to save."""
    if method != "chunks":
        raise UnsupportedError(
            f'[attention] method = "{method}" is not supported with saved sequences: use method = "chunks"'
        )


def engine_of(kv: "Offload") -> TieredEngine:
    """The engine of a block that can save sequences; raises UnsupportedError."""
    check_method(kv.config.attention.method)
    engine: Engine[Any] = kv._runtime.engine
    assert isinstance(engine, TieredEngine)
    return engine


# -- saving ------------------------------------------------------------------------------------------------------------


def describe(kv: "Offload", select: int) -> Attributes:
    """What is written down of a sequence that attends to ``select`` chunks and is made in the block ``kv``."""
    return {
        "fixed": fixed_values(engine_of(kv)),
        "geometry": asdict(kv.geometry),
        "select": select,
        "model": model_facts(kv.model) | {"weights": weights_digest(kv.model)},
    }


def new_files(
    kv: "Offload", library: Library, id: str, attributes: Attributes, parts: list[tuple[str, int]]
) -> SequenceFiles:
    """The files of a new sequence, to be written by this process alone. Raises OSError."""
    layout = make_layout(engine_of(kv), parts[-1][1] if parts else 0)
    held = {"parts": [list(part) for part in parts], "layout": layout_attributes(layout)}
    files = SequenceFiles(library.create(id, attributes | held), layout)
    try:
        files.create()
    except BaseException:
        library.remove(id)
        raise
    return files


def save(kv: "Offload", cache: TieredCache, path: Place) -> str:
    """``TieredCache.save``."""
    if any(sequence.closed for sequence in cache._lane.sequences):
        raise KvtierError("this cache is closed: save it before its offload block ends")
    kv._check_open()
    engine = engine_of(kv)
    if cache.n_rows != 1:
        raise UnsupportedError(f"this cache has {cache.n_rows} rows, one at a time is saved: cache.row(i).save(path)")
    sequence = cache._lane.sequences[0]
    assert isinstance(sequence, TieredSequence)
    if not sequence.length:
        raise UnsupportedError("this cache is empty: pass tokens through the model before it is saved")
    library = kv.library_at(path)
    attributes = describe(kv, sequence.select)
    id = sequence_id(attributes, sequence.tokens.array(), sequence.block_starts, sequence._rewound)
    with library.writing():
        entry = library.read(id)
        if entry is not None and reads_from(engine, sequence, entry.path):
            _go_on(engine, library, sequence, entry)
        elif entry is None or not (_is_complete(entry) and _is_sound(library, entry)):
            _write(kv, engine, library, sequence, id, attributes)
    return id


def _go_on(engine: TieredEngine, library: Library, sequence: TieredSequence, entry: Entry) -> None:
    """Save a cache that reads its chunks from the sequence that it is saved as: what is missing there is added.

    Written anew, the sequence would lose them. Raises StoreError, BudgetError.
    """
    if not _is_sound(library, entry):
        raise StoreError(
            f"this cache reads its chunks from {entry.path}, where something else is damaged (`kvtier verify` lists "
            "it): save to another folder"
        )
    assert entry.commit is not None
    if _is_complete(entry):
        return
    files = SequenceFiles(entry.path, layout_of(entry.attributes))
    try:
        save_chunks(engine, sequence, files, entry.commit.chunks)
        Committer(engine, files, entry.commit, None).commit(sequence, complete=True)
    finally:
        files.close()


def _is_complete(entry: Entry) -> bool:
    return entry.commit is not None and entry.commit.complete


def _is_sound(library: Library, entry: Entry) -> bool:
    """Whether all of a sequence that is read when it is opened is as it was saved."""
    if entry.problem is not None:
        return False
    try:
        saved = SavedSequence(library, entry)
        saved.tokens(), saved.block_starts()
        for name in saved.commit.arrays:
            saved.array(name)
        return all(sum(1 for _ in files.read_codes(end)) >= 0 for files, end in saved.parts)
    except StoreError:
        return False


def _write(
    kv: "Offload", engine: TieredEngine, library: Library, sequence: TieredSequence, id: str, attributes: Attributes
) -> None:
    """Write a whole sequence by reference to what the library has of it. Raises StoreError, BudgetError."""
    parts = inherited(engine, sequence, library)
    _check_room(engine, library, sequence, parts[-1][1] if parts else 0)
    files = None
    try:
        files = new_files(kv, library, id, attributes, parts)
        save_chunks(engine, sequence, files)
        Committer(engine, files, NOTHING, None).commit(sequence, complete=True)
    except BaseException as error:
        if files is not None:
            library.remove(id)
        if isinstance(error, OSError) and not isinstance(error, StoreError):
            raise StoreError(
                f"{library.path} cannot be written: {error}. What was saved before is intact; free space there, or "
                "save to another folder"
            ) from error
        raise
    finally:
        if files is not None:
            files.close()


def _check_room(engine: TieredEngine, library: Library, sequence: TieredSequence, first: int) -> None:
    """Meet a device that is too full before any work."""
    layout = make_layout(engine, first)
    layers = [sequence.layers[layer].retired - first for layer in engine.shape.full_layers]
    per_chunk = layout.n_kv_heads * layout.shard.record_bytes + sum(map(layout.code_bytes, layout.codes))
    nbytes, free = sum(layers) * per_chunk + engine.window_bytes, library.free_bytes()
    if nbytes > free:
        raise StoreError(
            f"the sequence takes {format_bytes(nbytes)}, but only {format_bytes(free)} are free in {library.path}: "
            "free space there, or save to another folder"
        )


# -- opening -----------------------------------------------------------------------------------------------------------


def open_sequence(kv: "Offload", library: Library, id: str | None) -> TieredSequence:
    """A saved sequence in the block ``kv``; raises StoreError or BudgetError."""
    check_method(kv.config.attention.method)
    entry = library.entry(id)
    entry.check()
    if reason := refusal(kv, entry):
        raise StoreError(
            f"the saved sequence {entry.path} cannot go on here: {reason}. Open it with the model and settings it was "
            "saved with (`kvtier inspect` shows them), or read the text again"
        )
    if not _is_complete(entry) and (shorter := _older(library, entry) or _unfinished(library, entry)):
        warnings.warn(shorter, stacklevel=3)
    return read_latest(kv, library, entry)


def _older(library: Library, entry: Entry) -> str | None:
    """What to say when the newest commit is one that cannot be read, so that the one before counts."""
    damaged = [slot for slot in read_slots(entry.path / "commit") if isinstance(slot, str)]
    now = library.read(entry.id)
    if not damaged or now is None or now.commit != entry.commit:  # a writer was at it
        return None
    return (
        f"{damaged[0]}: the saved sequence {entry.path} is opened as it was at the commit before, with "
        f"{entry.tokens} tokens; if more were saved, put back a copy of that folder or read the text again"
    )


def _unfinished(library: Library, entry: Entry) -> str | None:
    """What to say of a sequence that holds the beginning of its text alone."""
    n_tokens = entry.attributes.get("text_tokens")  # written since readings say how far they were to go
    if n_tokens == entry.tokens:
        return None
    of = f"{entry.tokens} of the {n_tokens} tokens" if n_tokens else f"{entry.tokens} tokens"
    return (
        f"the saved sequence {entry.path} is not complete: its reading was interrupted, or goes on. It is opened with "
        f'the first {of} of its text; to read on, read that text with [store] path = "{library.path}" and mode = '
        '"durable": it goes on there'
    )


def read_latest(kv: "Offload", library: Library, entry: Entry) -> TieredSequence:
    """The sequence at its last commit, also while its writer commits the next ones."""
    while True:
        try:
            return read_sequence(SavedSequence(library, entry), engine_of(kv))
        except StoreError:
            now = library.read(entry.id)
            if now is None or now.commit == entry.commit or now.problem is not None:
                raise
            entry = now


@dataclass(frozen=True, slots=True)
class Found:
    """A saved sequence whose first ``length`` tokens are what is looked for; all of them, or its beginning."""

    entry: Entry
    length: int


def find(
    kv: "Offload", library: Library, ids: Ids, select: int, refused: Callable[[Entry, str], None]
) -> tuple[Found | None, dict[str, str]]:
    """What a store has of ``ids`` [n], from the first on, as ``kv`` would read them: the longest.

    Parameters
    ----------
    select : chunks that ``kv`` would attend to per KV head and step
    refused : told of those sequences of exactly these tokens that were read otherwise, and why

    Returns
    -------
    The longest, and by id the reasons why it cannot be told what others hold.
    """
    best, damaged = None, {}
    for entry in library.entries():
        try:
            entry.check()
            saved = SavedSequence(library, entry)
            is_all = entry.tokens <= len(ids) and not (saved.tokens() != ids[: entry.tokens]).any()
            length = entry.tokens if is_all else common_length(saved, engine_of(kv), ids)
            if length <= (best.length if best else 0):
                continue
            reason = refusal(kv, entry) or read_otherwise(kv, entry, select)
        except StoreError as error:
            damaged[entry.id] = str(error)
            continue
        if reason is None:
            best = Found(entry, length)
        elif is_all and entry.tokens == len(ids):
            refused(entry, reason)
    return best, damaged


def open_found(kv: "Offload", library: Library, found: Found) -> TieredSequence:
    """What ``find`` has found, as a sequence of the block ``kv``; raises StoreError or BudgetError."""
    if found.length == found.entry.tokens:
        return read_latest(kv, library, found.entry)
    return read_beginning(SavedSequence(library, found.entry), engine_of(kv), found.length)


class Session:
    """``kvtier run --session``: the sequence of a store that holds a context, read or opened.

    Parameters
    ----------
    path : of the store
    id : the sequence to open; None: the one of the context, or the only one
    say : takes what happened, a line for people
    """

    def __init__(self, path: Place, id: str | None, say: Callable[[str], None]) -> None:
        self.store = Library(path)
        self.opened = False
        self.id = id
        self.seconds = 0.0
        """Time that opening or saving took."""
        self._say = say

    def check(self, *, must_exist: bool) -> None:
        """Refuse what can be refused before a model is loaded: no store, no such sequence. Raises StoreError."""
        if must_exist:
            self.store.entry(self.id)
        elif not self.store.is_new():
            self.store.check()

    def book(self, kv: "Offload", ids: Sequence[int] | None) -> TieredCache:
        """The cache of token ``ids``, opened if the store has it, else read and saved; None: the one of ``id``."""
        entry = self.store.entry(self.id) if ids is None else self._find(kv, ids)
        if entry is not None:
            return self._open(kv, entry)
        assert ids is not None
        book = kv.prefill(ids)
        started = time.perf_counter()
        self.id = book.save(self.store.path)
        self.seconds = time.perf_counter() - started
        self._say(f"saved {len(ids)} tokens to {self.store.path} as {self.id} in {self.seconds:.1f} s")
        return book

    def report(self) -> Attributes:
        """The part "session" of ``kvtier run --json``."""
        return {"store": str(self.store.path), "id": self.id, "opened": self.opened, "seconds": self.seconds}

    def _open(self, kv: "Offload", entry: Entry) -> TieredCache:
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            book = kv.open(self.store.path, entry.id)
        for warning in warned:
            self._say(str(warning.message))
        self.id, self.opened, self.seconds = entry.id, True, time.perf_counter() - started
        self._say(f"opened {entry.tokens} tokens from {self.store.path} in {self.seconds:.1f} s")
        return book

    def _find(self, kv: "Offload", ids: Sequence[int]) -> Entry | None:
        """The sequence of exactly these tokens that was read as ``kv`` would read them; says why others are not."""
        if self.store.is_new():
            return None
        found, damaged = find(kv, self.store, np.asarray(ids, dtype=np.int64), kv.geometry.select, self._refused)
        if found is not None and found.entry.tokens == len(ids) == found.length:
            return found.entry
        for reason in damaged.values():
            self._say(f"{reason}. Whether it holds this context cannot be told: it is read")
        return None

    def _refused(self, entry: Entry, reason: str) -> None:
        self._say(f"{self.store.path} has this context, but not as it would be read now: {entry.id}: {reason}")
