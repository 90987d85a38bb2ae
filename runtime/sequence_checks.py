"""Is what a saved sequence has committed still what was written? Reads everything, changes nothing.

Each check yields *problems*: a line that begins with the file it is about, as its path in the sequence's folder, and
the chunk from which on data are damaged (None: no chunk's). What lies beyond the commit does not count. Memory does not
grow with the sequence.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtier.runtime.commit_record import Commit, checksum, read_slots
from kvtier.runtime.errors import StoreError
from kvtier.runtime.sequence_files import PIECE, SHARD_CHUNKS, Bytes, SequenceFiles, SequenceLayout
from kvtier.runtime.zarr_arrays import METADATA, Json, array_metadata, group_metadata, piece_path

Problem = tuple[str, int | None]
BLOCK_BYTES = 2**20
"""Read at a time of files that are read from end to end."""


class SequenceChecks:
    """The checks of one sequence.

    Parameters
    ----------
    folder : of the sequence
    layout : sizes of its files; None if they are not known: then only ``slots`` and ``whole_files`` can be checked
    """

    def __init__(self, folder: Path, layout: SequenceLayout | None) -> None:
        self.folder = folder
        self.commit: Commit | None = None
        """What counts; set before anything but ``slots`` is checked."""
        self.bytes_checked = 0
        """Read and compared with a checksum."""
        self._slot_is_bad = False
        self._files = None if layout is None else SequenceFiles(folder, layout)
        self._sums: npt.NDArray[np.uint32] = np.empty(0, np.uint32)

    @property
    def layout(self) -> SequenceLayout:
        """Sizes of the files."""
        assert self._files is not None
        return self._files.layout

    @property
    def _counts(self) -> Commit:
        assert self.commit is not None
        return self.commit

    def close(self) -> None:
        """Close all files."""
        if self._files is not None:
            self._files.close()

    # -- small files ---------------------------------------------------------------------------------------------------

    def slots(self) -> Iterator[Problem]:
        """Both slots of the commit record: with one of them bad, the other counts, which may be the older one."""
        slots = read_slots(self.folder / "commit")
        good = max((slot for slot in slots if isinstance(slot, Commit)), key=lambda slot: slot.number, default=None)
        self._slot_is_bad = False
        for i, slot in enumerate(slots):
            if isinstance(slot, str):
                path = piece_path(self.folder / "commit", i)
                problem = slot.replace(f"the checksum of {path}", "its checksum").replace(f"{path} ", "")
            elif slot is None and good is not None and good.number > 1:
                problem = "is missing or empty"
            else:
                continue
            self._slot_is_bad = True
            rest = "" if good is None else f"; the other one, commit {good.number}, counts"
            if good is not None and not good.complete:
                rest += ": reading the text again goes on from there (a power cut can do that, too)"
            yield f"commit/c.{i}: {problem}{rest}", None

    def metadata(self) -> Iterator[Problem]:
        """The zarr.json of every array that grows and of every group."""
        commit, layout = self._counts, self.layout
        for group in ("codes", "crc") if layout.n_layers else ():
            yield from self._json(group, group_metadata({}))
        chunks = max(0, commit.chunks - layout.first)
        for name, expected in layout.arrays(chunks, commit.tokens, commit.blocks):
            yield from self._json(name, expected, 0 if len(expected["shape"]) == 1 else 1, fixed=name == "commit")

    def whole_files(self) -> Iterator[Problem]:
        """Tokens, block starts, and the small arrays in one file each."""
        commit = self._counts
        for name, n, expected in (
            ("tokens", commit.tokens, commit.tokens_crc),
            ("block_starts", commit.blocks, commit.blocks_crc),
        ):
            paths = [piece_path(self.folder / name, i) for i in range(-(-n // PIECE))]
            lengths = [8 * min(PIECE, n - i * PIECE) for i in range(len(paths))]
            yield from self._whole(paths, lengths, 8 * PIECE, expected)
        groups = {str(parent) for name in commit.arrays for parent in Path(name).parents if parent.name}
        for group in sorted(groups):
            yield from self._json(group, group_metadata({}))
        for name, (dtype_of, shape, expected) in commit.arrays.items():
            dtype = getattr(torch, dtype_of)
            yield from self._json(name, array_metadata(shape, dtype, shape))
            if nbytes := math.prod(shape) * dtype.itemsize:
                path = piece_path(self.folder / name, *(0 for _ in shape))
                yield from self._whole([path], [nbytes], nbytes, expected)

    def _json(self, name: str, expected: Json, axis: int = 0, *, fixed: bool = True) -> Iterator[Problem]:
        """The metadata of a node; unless ``fixed``, the shape along ``axis`` may be that of an earlier commit."""
        path = self.folder / name / METADATA
        try:
            found = json.loads(path.read_bytes())
            if not fixed:
                found, expected = self._without_age(found, expected, axis)
            wrong = [key for key in expected if not _covers(found.get(key), expected[key])]
        except FileNotFoundError:
            yield f"{self._name(path)}: is missing", None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            yield f"{self._name(path)}: cannot be read ({error})", None
        else:
            for key in wrong:
                was, now = json.dumps(expected[key]), json.dumps(found.get(key))
                yield f"{self._name(path)}: {key} is {now:.200}, written was {was:.200}", None

    def _without_age(self, found: Json, expected: Json, axis: int) -> tuple[Json, Json]:
        """Both with the same length along ``axis``, if the one found can be an earlier one.

        Shapes are published after the commit; one that is ahead of the commit says that a later commit is unreadable.
        """
        length, most = found["shape"][axis], expected["shape"][axis]
        if type(length) is int and length >= 0 and (length <= most or self._slot_is_bad):
            shape = list(expected["shape"])
            shape[axis] = length
            expected = expected | {"shape": shape}
        return found, expected

    def _whole(self, paths: list[Path], lengths: list[int], nbytes: int, expected: int) -> Iterator[Problem]:
        """The first bytes of files of ``nbytes`` each, under one checksum."""
        value, whole = 0, True
        for path, length in zip(paths, lengths, strict=True):
            problems = list(self._size(path, nbytes))
            yield from problems
            try:
                value, n = _stream(path, length, value)
            except OSError as error:
                n = 0
                if not problems:
                    yield f"{self._name(path)}: cannot be read ({error})", None
            self.bytes_checked += n
            whole &= n == length
        if whole and value != expected:
            files = ", ".join(map(self._name, paths))
            yield f"{files}: does not match its checksum in the commit record", None

    def _size(self, path: Path, nbytes: int, chunk: int | None = None) -> Iterator[Problem]:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            yield f"{self._name(path)}: is missing", chunk
        except OSError as error:
            yield f"{self._name(path)}: cannot be read ({error})", chunk
        else:
            if size != nbytes:
                yield f"{self._name(path)}: has {size} bytes, written were {nbytes}", chunk

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    # -- codes ---------------------------------------------------------------------------------------------------------

    def code_files(self, shard: int) -> Iterator[Problem]:
        """The files that hold the codes of a shard, and of their checksums."""
        first = self.layout.first + shard * SHARD_CHUNKS
        for name in self.layout.codes:
            nbytes = self.layout.n_layers * SHARD_CHUNKS * self.layout.code_bytes(name)
            yield from self._size(self._code_path(name, shard), nbytes, first)
        yield from self._size(self._code_sums_path(shard), 4 * PIECE, first)

    def codes(self, shard: int, begin: int, end: int) -> Iterator[Problem]:
        """The codes of chunks begin..end of a shard."""
        n, sums_path = end - begin, self._code_sums_path(shard)
        sums = [0] * n
        try:
            for name in self.layout.codes:
                by_chunk = self._read_codes(name, shard, begin, end)
                sums = [checksum(by_chunk[i], sums[i]) for i in range(n)]
                self.bytes_checked += by_chunk.nbytes
            expected = _read(sums_path, 4 * (shard * SHARD_CHUNKS % PIECE + begin), 4 * n).view("<u4")
        except (OSError, EOFError) as error:
            yield f"{error}".replace(f"{self.folder}/", ""), self.layout.first + shard * SHARD_CHUNKS + begin
            return
        for i in np.flatnonzero(np.array(sums, np.uint32) != expected).tolist():
            chunk = self.layout.first + shard * SHARD_CHUNKS + begin + i
            files = ", ".join(self._name(self._code_path(name, shard)) for name in self.layout.codes)
            yield f"{files}: chunk {chunk} does not match its checksum in {self._name(sums_path)}", chunk

    def _read_codes(self, name: str, shard: int, begin: int, end: int) -> Bytes:
        """Codes of one name by chunk: [chunks, bytes of all layers], as they are summed."""
        one, path = self.layout.code_bytes(name), self._code_path(name, shard)
        layers = [
            _read(path, (layer * SHARD_CHUNKS + begin) * one, (end - begin) * one).reshape(end - begin, one)
            for layer in range(self.layout.n_layers)
        ]
        return np.concatenate(layers, axis=1)

    def _code_path(self, name: str, shard: int) -> Path:
        dims = 1 + len(self.layout.codes[name][0])
        return piece_path(self.folder / "codes" / name, 0, shard, *(0 for _ in range(dims)))

    def _code_sums_path(self, shard: int) -> Path:
        return piece_path(self.folder / "crc" / "codes", shard * SHARD_CHUNKS // PIECE)

    # -- records -------------------------------------------------------------------------------------------------------

    def record_files(self, shard: int) -> Iterator[Problem]:
        """A file of records, its index, and the file of its checksums; without problems ``records`` can follow."""
        first, sizes, path = self.layout.first + shard * SHARD_CHUNKS, self.layout.shard, self._record_path(shard)
        problems = list(self._size(path, sizes.file_bytes, first))
        problems += self._size(self._record_sums_path(shard), 4 * sizes.n_records, first)
        yield from problems
        if problems:
            return
        index = sizes.index()
        try:
            same = bytes(_read(path, sizes.file_bytes - len(index), len(index))) == index
            self._sums = _read(self._record_sums_path(shard), 0, 4 * sizes.n_records).view("<u4")
        except (OSError, EOFError) as error:
            yield f"{error}".replace(f"{self.folder}/", ""), first
            return
        if not same:
            yield f"{self._name(path)}: was rewritten by another program, or its index is damaged", first

    def records(self, shard: int, layer: int, begin: int, end: int) -> Iterator[Problem]:
        """The records of chunks begin..end of a shard, in one layer; after ``record_files``."""
        heads = self.layout.n_kv_heads
        first = (layer * SHARD_CHUNKS + begin) * heads
        slots = np.arange(first, first + (end - begin) * heads)
        out = np.empty((len(slots), self.layout.payload_bytes), np.uint8)
        failed = self._read_records(shard, slots, out)
        path, sums_path = self._name(self._record_path(shard)), self._name(self._record_sums_path(shard))
        for row, (record, slot) in enumerate(zip(out, slots.tolist(), strict=True)):
            chunk = self.layout.first + shard * SHARD_CHUNKS + slot // heads % SHARD_CHUNKS
            at = f"chunk {chunk}, layer {layer}, KV head {slot % heads}"
            if row in failed:
                yield f"{path}: {at} cannot be read ({failed[row]})", chunk
            elif checksum(record) != self._sums[slot]:
                yield f"{path}: {at} does not match its checksum in {sums_path}", chunk

    def _read_records(self, shard: int, slots: npt.NDArray[np.int64], out: Bytes) -> dict[int, str]:
        """Read ``slots`` [n] into ``out`` [n, payload bytes]; why, for each row that cannot be read."""
        assert self._files is not None
        paths, offsets = [self._record_path(shard)], slots * self.layout.shard.record_bytes
        try:
            self._files.io.read(paths, np.zeros_like(slots), offsets, out)
        except StoreError as error:
            if len(slots) == 1:
                return {0: str(error.__cause__ or error)}
            rows = range(len(slots))
            alone = {row: self._read_records(shard, slots[row : row + 1], out[row : row + 1]) for row in rows}
            return {row: failed[0] for row, failed in alone.items() if failed}
        self.bytes_checked += out.nbytes
        return {}

    def _record_path(self, shard: int) -> Path:
        return piece_path(self.folder / "kv", 0, shard, 0, 0)

    def _record_sums_path(self, shard: int) -> Path:
        return piece_path(self.folder / "crc" / "kv", 0, shard, 0)


def _covers(found: Any, expected: Any) -> bool:
    """Whether JSON is what was written; other programs may have added attributes."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(key in found and _covers(found[key], expected[key]) for key in expected)
    return type(found) is type(expected) and bool(found == expected)


def _read(path: Path, offset: int, nbytes: int) -> Bytes:
    """Raises OSError; EOFError when the file is too short."""
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), nbytes, offset)
    if len(data) != nbytes:
        raise EOFError(f"{path}: has fewer than {offset + nbytes} bytes")
    return np.frombuffer(data, np.uint8)


def _stream(path: Path, nbytes: int, value: int) -> tuple[int, int]:
    """The checksum, going on from ``value``, of the first ``nbytes`` of a file; and their number. Raises OSError."""
    done = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(min(BLOCK_BYTES, nbytes - done)):
            value, done = checksum(block, value), done + len(block)
    return value, done
