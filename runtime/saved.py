"""Chunks that lie in saved sequences: read in place, never written, moved or removed by this class."""

import numpy as np
import numpy.typing as npt

from kvtier.runtime.sequence_files import Bytes, SequenceFiles
from kvtier.runtime.slots import ABSENT
from kvtier.runtime.tier import Ids, TierCounters


class SavedChunks:
    """Which record of which sequence holds a chunk id. Files are closed when nothing refers to them any more."""

    def __init__(self) -> None:
        self.counters = TierCounters()
        self._files: list[SequenceFiles | None] = []
        self._held: list[int] = []
        """Chunk ids that lie in each of the files."""
        self._where: Ids = np.full((0, 4), ABSENT, np.int64)
        """By id: file, chunk, layer, KV head."""

    def __len__(self) -> int:
        return sum(self._held)

    def refer(self, ids: Ids, files: SequenceFiles, layer: int, first: int) -> None:
        """The chunks ``ids`` [N, m] of one layer are the records of the chunks from ``first`` on."""
        number = self._number(files)
        heads, n = ids.shape
        if ids.size and ids.max() >= len(self._where):
            grown = np.full((max(int(ids.max()) + 1, 2 * len(self._where)), 4), ABSENT, np.int64)
            grown[: len(self._where)] = self._where
            self._where = grown
        where = np.empty((heads, n, 4), np.int64)
        where[..., 0], where[..., 2] = number, layer
        where[..., 1], where[..., 3] = np.arange(first, first + n), np.arange(heads)[:, None]
        assert (self._where[ids, 0] == ABSENT).all(), "an id lies in a sequence already"
        self._where[ids] = where
        self._held[number] += ids.size

    def has(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which of ``ids`` [n] lie in a sequence."""
        found: npt.NDArray[np.bool_] = self.file_of(ids) != ABSENT
        return found

    def file_of(self, ids: Ids) -> Ids:
        """The number of the sequence's files for each of ``ids`` [n], ABSENT for none."""
        found = np.full(len(ids), ABSENT, np.int64)
        known = ids < len(self._where)
        found[known] = self._where[ids[known], 0]
        return found

    def files(self, number: int) -> SequenceFiles:
        """The files with a number."""
        files = self._files[number]
        assert files is not None
        return files

    def get(self, ids: Ids, out: Bytes) -> None:
        """Read the chunks ``ids`` [n], all of which lie in sequences, into ``out`` [n, payload bytes].

        Raises StoreError: a file cannot be read, or does not hold what was written.
        """
        where = self._where[ids]
        for number in np.unique(where[:, 0]).tolist():
            mine = where[:, 0] == number
            part = out if mine.all() else np.empty((int(mine.sum()), out.shape[1]), np.uint8)
            chunks, layers, heads = where[mine, 1:].T
            self.files(number).read_records(chunks, layers, heads, part)
            if part is not out:
                out[mine] = part
        self.counters.bytes_read += out.nbytes

    def drop(self, ids: Ids) -> None:
        """Forget ``ids``; those that lie nowhere are ignored."""
        ids = np.unique(ids)
        numbers = self.file_of(ids)
        self._where[ids[numbers != ABSENT]] = ABSENT
        for number in np.unique(numbers[numbers != ABSENT]).tolist():
            self._held[number] -= int((numbers == number).sum())
            if not self._held[number]:
                self.files(number).close()
                self._files[number] = None

    def close(self) -> None:
        """Close all files."""
        for files in self._files:
            if files is not None:
                files.close()
        self._files, self._held = [], []
        self._where = np.full((0, 4), ABSENT, np.int64)

    def _number(self, files: SequenceFiles) -> int:
        for number, known in enumerate(self._files):
            if known is files:
                return number
        self._files.append(files)
        self._held.append(0)
        return len(self._files) - 1
