"""Names of chunks: small integers that are counted and recycled."""

import numpy as np

from kvtier.runtime.tier import Ids


class ChunkIds:
    """Hands out chunk ids, counts their references and recycles those that nobody refers to."""

    def __init__(self) -> None:
        self._references = np.zeros(1024, dtype=np.int32)
        self._next = 0
        self._free: list[Ids] = []

    def new(self, n: int) -> Ids:
        """``n`` ids with one reference each."""
        recycled = np.concatenate([*self._free, np.empty(0, np.int64)])
        ids, rest = recycled[:n], recycled[n:]
        self._free = [rest] if rest.size else []
        fresh = np.arange(self._next, self._next + n - ids.size, dtype=np.int64)
        self._next += fresh.size
        if self._next > self._references.size:
            grown = np.zeros(max(self._next, 2 * self._references.size), dtype=np.int32)
            grown[: self._references.size] = self._references
            self._references = grown
        ids = np.concatenate([ids, fresh])
        self._references[ids] = 1
        return ids

    def share(self, ids: Ids) -> None:
        """One more reference to each of ``ids``."""
        self._references[ids] += 1

    def release(self, ids: Ids) -> Ids:
        """One reference less to each of ``ids``; returns those that nobody refers to any more."""
        self._references[ids] -= 1
        dead: Ids = ids[self._references[ids] == 0]
        if dead.size:
            self._free.append(dead)
        return dead
