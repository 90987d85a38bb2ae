"""The files of one saved sequence: where each value is, and what is appended to them.

====================  ==========================  ======================================================================
array                 shape                       what
====================  ==========================  ======================================================================
commit                [8192] uint8                how much of all others counts (``runtime.commit_record``)
tokens, block_starts  [n], [blocks] int64
kv                    [L, chunks, N, R] uint8     a record [R]: K and V of one chunk and KV head, and padding
crc/kv                [L, chunks, N] uint32       crc32c of each record's payload
codes/<name>          [L, chunks, N, ...]         summaries, as the kind lays them out
crc/codes             [chunks] uint32             of a chunk's codes, all names and layers
fitted/<i>            [L, N, ...]                 what the summary fitted to the layers
window<0 | 1>/...     see ``runtime.committer``   the window at the last commit and at the one before
====================  ==========================  ======================================================================

L: the full-attention layers, in their order. A file of ``kv``, ``crc/kv`` and ``codes`` holds S chunks of all layers.
In ``kv`` record (layer, chunk, head) is at byte ((layer*S + chunk % S)*N + head) * R of file ``c.0.<chunk // S>.0.0``;
the index of the shard, which zarr readers want, follows the records and never changes. Files are as long as when they
are full from the beginning, with holes. A sequence that goes on from another one holds only the chunks from ``first``
on.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtier.runtime.commit_record import SLOT_BYTES, checksum, checksums
from kvtier.runtime.direct_io import RecordIO
from kvtier.runtime.errors import StoreError
from kvtier.runtime.shards import ShardLayout
from kvtier.runtime.summary import Codes, Layout
from kvtier.runtime.tier import Ids
from kvtier.runtime.zarr_arrays import (
    array_metadata,
    group_metadata,
    piece_path,
    raw,
    stored_type,
    sync_folder,
    tensor_of,
    write_at,
    write_metadata,
)

SHARD_CHUNKS = 128
"""S: 4,096 tokens at 32 tokens a chunk."""
PIECE = 2**16
"""Items in a file of a one-dimensional array."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SequenceLayout:
    """Sizes of one sequence's arrays."""

    n_layers: int
    """L"""
    n_kv_heads: int
    """N"""
    payload_bytes: int
    """Of a record."""
    codes: Layout = field(hash=False)
    """Of one chunk of one KV head."""
    first: int = 0
    """Chunks that other sequences hold."""

    @cached_property
    def shard(self) -> ShardLayout:
        """A file of ``kv``."""
        record_bytes = -(-self.payload_bytes // 4096) * 4096
        return ShardLayout(self.payload_bytes, record_bytes, self.n_layers * SHARD_CHUNKS * self.n_kv_heads)

    def arrays(self, chunks: int, tokens: int, blocks: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and metadata of all arrays that grow, when there are so many chunks (of its own), tokens and blocks."""
        heads, layers, record = self.n_kv_heads, self.n_layers, self.shard.record_bytes
        yield "commit", array_metadata((2 * SLOT_BYTES,), torch.uint8, (SLOT_BYTES,))
        yield "tokens", array_metadata((tokens,), torch.int64, (PIECE,))
        yield "block_starts", array_metadata((blocks,), torch.int64, (PIECE,))
        if not layers:
            return
        shape = (layers, chunks, heads, record)
        piece = (layers, SHARD_CHUNKS, heads, record)
        yield "kv", array_metadata(shape, torch.uint8, piece, inner=(1, 1, 1, record))
        yield "crc/kv", array_metadata(shape[:3], torch.uint32, piece[:3])
        yield "crc/codes", array_metadata((chunks,), torch.uint32, (PIECE,))
        for name, (per_chunk, dtype) in self.codes.items():
            yield f"codes/{name}", array_metadata((*shape[:3], *per_chunk), dtype, (*piece[:3], *per_chunk))

    def code_bytes(self, name: str) -> int:
        """Bytes of one chunk's codes in one layer, all KV heads."""
        per_chunk, dtype = self.codes[name]
        return self.n_kv_heads * math.prod(per_chunk) * dtype.itemsize


class GrowingArray:
    """A one-dimensional array on the disk that only grows, in files of PIECE items."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype)
        self._changed: set[Path] = set()

    def write(self, first: int, values: npt.NDArray[Any]) -> None:
        """Write ``values`` [n] from item ``first`` on. Raises OSError."""
        data = np.ascontiguousarray(values, self._dtype)
        done = 0
        while done < len(data):
            piece, offset = divmod(first + done, PIECE)
            part = data[done : done + PIECE - offset]
            path, size = piece_path(self._folder, piece), self._dtype.itemsize
            _write(path, self._changed, PIECE * size, [(part.view(np.uint8), offset * size)])
            done += len(part)

    def read(self, n: int) -> npt.NDArray[Any]:
        """The first ``n`` items. Raises OSError; EOFError when there are fewer."""
        values = np.empty(n, self._dtype)
        for begin in range(0, n, PIECE):
            part = values[begin : begin + PIECE]
            with open(piece_path(self._folder, begin // PIECE), "rb") as file:
                if file.readinto(part.view(np.uint8).data) != part.nbytes:
                    raise EOFError(f"{file.name} is too short")
        return values

    def sync(self) -> None:
        """Put on the disk what was written. Raises OSError."""
        _sync_files(self._changed)


class SequenceFiles:
    """The arrays of one sequence that grow. One writer, any number of readers; raises StoreError.

    Parameters
    ----------
    folder : of the sequence
    layout : its sizes
    """

    def __init__(self, folder: Path, layout: SequenceLayout) -> None:
        self.folder = folder
        self.layout = layout
        self.tokens = GrowingArray(folder / "tokens", "<i8")
        self.block_starts = GrowingArray(folder / "block_starts", "<i8")
        self._code_checksums = GrowingArray(folder / "crc" / "codes", "<u4")
        self._io: RecordIO | None = None
        self._paths: list[Path] = []
        self._known: dict[int, npt.NDArray[np.uint32]] = {}
        """Checksums of the records of a shard, from its file, in the order of the records."""
        self._verified: dict[int, npt.NDArray[np.bool_]] = {}
        self._changed: set[Path] = set()
        self._dirty: set[int] = set()

    # -- records -------------------------------------------------------------------------------------------------------

    @property
    def io(self) -> RecordIO:
        """Made at the first use."""
        if self._io is None:
            self._io = RecordIO(self.folder / "kv", self.layout.payload_bytes)
        return self._io

    def write_records(self, layer: int, first: int, payload: Bytes) -> None:
        """Write ``payload`` [m, N, payload bytes], the chunks from ``first`` (of all chunks) on of one layer."""
        m, heads = payload.shape[:2]
        shards, slots = self._places(np.arange(first, first + m)[:, None], layer, np.arange(heads))
        for shard in np.unique(shards):
            self._create_shard(int(shard))
        flat = payload.reshape(m * heads, -1)
        self.io.write(self._paths, shards, slots * self.layout.shard.record_bytes, flat)
        sums = checksums(flat)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            self._known[shard][slots[mine]] = sums[mine]
            self._verified[shard][slots[mine]] = False
            self._dirty.add(shard)

    def read_records(self, chunks: Ids, layers: Ids, heads: Ids, out: Bytes) -> None:
        """Read records (chunk, layer, head) [n] into ``out`` [n, payload bytes]; each is checked when first read."""
        shards, slots = self._places(chunks, layers, heads)
        for shard in np.unique(shards).tolist():
            self._open_shard(shard)
        self.io.read(self._paths, shards, slots * self.layout.shard.record_bytes, out)
        for shard in np.unique(shards).tolist():
            mine = np.flatnonzero(shards == shard)
            mine = mine[~self._verified[shard][slots[mine]]]
            for row, expected in zip(mine.tolist(), self._known[shard][slots[mine]].tolist(), strict=True):
                if checksum(out[row]) != expected:
                    at = f"chunk {chunks[row]}, layer {layers[row]}, KV head {heads[row]}"
                    sums = self._sums_path(shard)
                    raise self.damaged(f"{self._paths[shard]} or {sums} holds other data than were written ({at})")
            self._verified[shard][slots[mine]] = True

    def _places(self, chunks: Any, layers: Any, heads: Any) -> tuple[Ids, Ids]:
        """Shard and slot in it of each record [n]."""
        own = np.broadcast_arrays(chunks - self.layout.first, layers, heads)
        shards, inside = np.divmod(own[0].ravel(), SHARD_CHUNKS)
        slots = (own[1].ravel() * SHARD_CHUNKS + inside) * self.layout.n_kv_heads + own[2].ravel()
        return shards.astype(np.int64), slots.astype(np.int64)

    def _name(self, shard: int) -> Path:
        while len(self._paths) <= shard:
            self._paths.append(piece_path(self.folder / "kv", 0, len(self._paths), 0, 0))
        return self._paths[shard]

    def _sums_path(self, shard: int) -> Path:
        return piece_path(self.folder / "crc" / "kv", 0, shard, 0)

    def _create_shard(self, shard: int) -> None:
        """A file of full length with its index, unless it is there."""
        if shard in self._known:
            return
        path, index = self._name(shard), self.layout.shard.index()
        if path.exists():
            self._open_shard(shard)
            return
        try:
            partial = path.with_name("partial")  # whoever is killed here leaves no shard without an index
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                os.ftruncate(fd, self.layout.shard.file_bytes)
                write_at(fd, np.frombuffer(index, np.uint8), self.layout.shard.file_bytes - len(index))
            finally:
                os.close(fd)
            partial.rename(path)
            self._changed.add(path.parent)
        except OSError as error:
            raise self.unwritable(error) from error
        self._know(shard, np.zeros(self.layout.shard.n_records, np.uint32))

    def _open_shard(self, shard: int) -> None:
        """Check that a file is as it was made, and read the checksums of its records."""
        if shard in self._known:
            return
        path, sums, index = self._name(shard), self._sums_path(shard), self.layout.shard.index()
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, self.layout.shard.file_bytes - len(index)))
                tail = file.read()
            known = np.zeros(self.layout.shard.n_records, np.uint32)
            if sums.exists():  # else nothing in this shard was committed, or its checksums are lost: none will be right
                with sums.open("rb") as file:
                    file.readinto(known.view(np.uint8).data)
        except OSError as error:
            raise self.damaged(f"{error}") from error
        if size != self.layout.shard.file_bytes or tail != index:
            raise self.damaged(f"{path} was rewritten by another program, or its index is damaged")
        self._know(shard, known)

    def _know(self, shard: int, sums: npt.NDArray[np.uint32]) -> None:
        self._known[shard] = sums
        self._verified[shard] = np.zeros(len(sums), np.bool_)

    # -- codes ---------------------------------------------------------------------------------------------------------

    def write_codes(self, first: int, codes: Mapping[str, torch.Tensor]) -> None:
        """Write the codes [L, N, m, ...] by name of the chunks from ``first`` on. Raises OSError."""
        stored = {name: raw(tensor.transpose(1, 2)) for name, tensor in codes.items()}  # [L, m, N, ...]
        for name, values in stored.items():
            flat = values.reshape(*values.shape[:2], -1).view(np.uint8)
            self._write_pieces(name, first - self.layout.first, flat)
        self._code_checksums.write(first - self.layout.first, self._sums_of(stored))

    def _write_pieces(self, name: str, first: int, flat: Bytes) -> None:
        """``flat`` [L, m, bytes of a chunk]."""
        one, begin, end = flat.shape[2], first, first + flat.shape[1]
        while begin < end:
            shard, inside = divmod(begin, SHARD_CHUNKS)
            take = min(SHARD_CHUNKS - inside, end - begin)
            path = self._piece(name, shard)
            parts = np.ascontiguousarray(flat[:, begin - first : begin - first + take]).reshape(len(flat), -1)
            offsets = [(layer * SHARD_CHUNKS + inside) * one for layer in range(len(flat))]
            _write(path, self._changed, len(flat) * SHARD_CHUNKS * one, zip(parts, offsets, strict=True))
            begin += take

    def read_codes(self, end: int, begin: int = 0) -> Iterator[Codes]:
        """The codes [L, N, m, ...] of this sequence's own chunks begin..end (of all), checked, a shard at a time."""
        own, n = max(0, begin - self.layout.first), end - self.layout.first
        expected = self._reads(self._code_checksums.read, n)
        for at in range(own // SHARD_CHUNKS * SHARD_CHUNKS, n, SHARD_CHUNKS):
            take, shard = min(SHARD_CHUNKS, n - at), at // SHARD_CHUNKS
            stored = {name: self._reads(self._read_piece, name, shard, take) for name in self.layout.codes}
            wrong = np.flatnonzero(self._sums_of(stored) != expected[at : at + take])
            if wrong.size:
                paths = [self._piece(name, shard) for name in self.layout.codes]
                files = ", ".join(map(str, [*paths, piece_path(self.folder / "crc" / "codes", at // PIECE)]))
                chunk = self.layout.first + at + int(wrong[0])
                raise self.damaged(f"one of {files} holds other data than were written (codes of chunk {chunk})")
            yield {
                name: tensor_of(values, self.layout.codes[name][1]).transpose(1, 2)[:, :, max(0, own - at) :]
                for name, values in stored.items()
            }

    def _reads(self, read: Callable[..., npt.NDArray[Any]], *arguments: Any) -> npt.NDArray[Any]:
        """What ``read`` returns. Raises StoreError."""
        try:
            return read(*arguments)
        except (OSError, EOFError) as error:
            raise self.damaged(str(error)) from error

    def _read_piece(self, name: str, shard: int, n: int) -> npt.NDArray[Any]:
        """[L, n, N, ...] as stored."""
        per_chunk, dtype = self.layout.codes[name]
        path = self._piece(name, shard)
        values = np.fromfile(path, stored_type(dtype))
        shape = (self.layout.n_layers, SHARD_CHUNKS, self.layout.n_kv_heads, *per_chunk)
        if values.size != math.prod(shape):
            raise EOFError(f"{path} has {values.nbytes} bytes")
        return values.reshape(shape)[:, :n]

    def _piece(self, name: str, shard: int) -> Path:
        """The file of the codes ``name``."""
        dims = 3 + len(self.layout.codes[name][0])
        return piece_path(self.folder / "codes" / name, 0, shard, *(0 for _ in range(dims - 2)))

    def _sums_of(self, stored: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint32]:
        """A checksum per chunk of codes [L, m, N, ...] by name."""
        n = next(iter(stored.values())).shape[1]
        sums = [0] * n
        for name in self.layout.codes:
            by_chunk = np.ascontiguousarray(np.swapaxes(stored[name], 0, 1)).reshape(n, -1).view(np.uint8)
            sums = [checksum(by_chunk[i], sums[i]) for i in range(n)]
        return np.array(sums, np.uint32)

    # -- all of it -----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folders and the metadata of empty arrays, on the disk when this returns. Raises OSError."""
        for name, metadata in self.layout.arrays(0, 0, 0):
            write_metadata(self.folder / name, metadata)
        for name in ("codes", "crc") if self.layout.n_layers else ():
            write_metadata(self.folder / name, group_metadata({}))
        sync_folder(self.folder)

    def publish(self, chunks: int, tokens: int, blocks: int, *, sync: bool = True) -> None:
        """Let the shapes that other programs see cover so many chunks (of all), tokens and blocks. Raises OSError."""
        for name, metadata in self.layout.arrays(max(0, chunks - self.layout.first), tokens, blocks):
            if name != "commit":
                write_metadata(self.folder / name, metadata, sync=sync)

    def sync(self) -> None:
        """Put on the disk what was written since the last time. Raises StoreError, OSError."""
        for shard in sorted(self._dirty):
            sums = self._known[shard].view(np.uint8)
            _write(self._sums_path(shard), self._changed, sums.nbytes, [(sums, 0)])
            self.io.sync(self._paths[shard])
        self._dirty.clear()
        _sync_files(self._changed)
        for array in (self.tokens, self.block_starts, self._code_checksums):
            array.sync()

    def close(self) -> None:
        """Close all files."""
        if self._io is not None:
            self._io.close()
            self._io = None

    def damaged(self, reason: str) -> StoreError:
        """The error that says what is wrong with this sequence and what to do."""
        return StoreError(
            f"the saved sequence {self.folder} is damaged: {reason}. Nothing damaged was used; remove that folder and "
            "save the sequence again, or put back a copy of it. `kvtier verify` lists all that is damaged"
        )

    def unwritable(self, error: OSError) -> StoreError:
        """The error for a device that does not take what is written."""
        return StoreError(
            f"{self.folder} cannot be written: {error}. What was committed before is intact; free space there, or "
            "choose another [store] path"
        )


def _write(path: Path, changed: set[Path], nbytes: int, parts: Iterable[tuple[Bytes, int]]) -> None:
    """Write each part at its offset of a file of ``nbytes``, noted in ``changed``; a new one with its folder."""
    changed.update((path,) if path.exists() else (path, path.parent))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.ftruncate(fd, nbytes)
        for data, offset in parts:
            write_at(fd, data, offset)
    finally:
        os.close(fd)


def _sync_files(paths: set[Path]) -> None:
    for path in sorted(paths):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    paths.clear()
