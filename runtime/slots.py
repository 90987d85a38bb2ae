"""Which slot holds which chunk, and which chunk was used last: the bookkeeping that all tiers share.

Every call works on whole arrays of ids; nothing here loops over ids in Python.
"""

import numpy as np
import numpy.typing as npt

from kvtier.runtime.tier import Ids

ABSENT = -1
"""In place of a slot: the id is not held. In place of an id: the slot is free."""

_CANDIDATES = 32_768
"""Least recently used ids that are sorted ahead, so that not every eviction scans all slots."""


class SlotMap:
    """A mapping of chunk ids (small integers, recycled) to slots ``0..n_slots-1``, with a last-use clock.

    The lowest free slots are not searched for, but slots freed together are handed out together and in order,
    which keeps chunks that are stored at once adjacent on disk.
    """

    def __init__(self, n_slots: int = 0) -> None:
        self._n_slots = 0
        self._slot_of: Ids = np.empty(0, np.int64)  # by id
        self._id_of: Ids = np.empty(0, np.int64)  # by slot, as is _used_at; both have room to grow
        self._used_at: Ids = np.empty(0, np.int64)
        self._free: Ids = np.empty(0, np.int64)  # a stack of free slots: its first _n_free entries
        self._n_free = 0
        self._clock = 0
        self._candidates: tuple[Ids, Ids] = (np.empty(0, np.int64), np.empty(0, np.int64))
        self.add_slots(n_slots)

    def __len__(self) -> int:
        return self._n_slots - self._n_free

    @property
    def n_slots(self) -> int:
        """Slots, free or not."""
        return self._n_slots

    @property
    def n_free(self) -> int:
        """Slots that ``assign`` can still hand out."""
        return self._n_free

    def ids(self) -> Ids:
        """All ids held, ascending."""
        return np.flatnonzero(self._slot_of != ABSENT)

    def slots_of(self, ids: Ids) -> Ids:
        """The slots of ``ids`` [n], ABSENT for those not held."""
        known = (ids >= 0) & (ids < len(self._slot_of))
        if known.all():
            return self._slot_of[ids]
        slots = np.full(len(ids), ABSENT, np.int64)
        slots[known] = self._slot_of[ids[known]]
        return slots

    def add_slots(self, n: int) -> None:
        """Append ``n`` free slots, to be handed out after all that are free now."""
        first, self._n_slots = self._n_slots, self._n_slots + n
        self._id_of = _grown(self._id_of, self._n_slots)
        self._used_at = _grown(self._used_at, self._n_slots)
        self._free = _grown(self._free, self._n_slots)
        self._free[n : n + self._n_free] = self._free[: self._n_free].copy()
        self._free[:n] = np.arange(first, self._n_slots)[::-1]
        self._n_free += n

    def truncate(self, n_slots: int) -> tuple[Ids, Ids]:
        """Remove all slots from ``n_slots`` on; ids that live there move to free slots below.

        Returns the old and the new slots [m] of those that moved. The caller copies their contents, and has
        freed enough slots before.
        """
        free = self._free[: self._n_free]
        free = free[free < n_slots]
        old = n_slots + np.flatnonzero(self._id_of[n_slots : self._n_slots] != ABSENT)
        assert len(old) <= len(free), f"{len(old)} chunks to move into {len(free)} free slots"
        new = np.sort(free[len(free) - len(old) :])
        ids = self._id_of[old]
        self._slot_of[ids], self._id_of[new], self._used_at[new] = new, ids, self._used_at[old]
        self._id_of[n_slots : self._n_slots] = ABSENT
        self._n_slots, self._n_free = n_slots, len(free) - len(old)
        self._free[: self._n_free] = free[: self._n_free]
        return old, new

    def assign(self, ids: Ids) -> Ids:
        """Give each of ``ids`` [n], none held and no two equal, a free slot, as the most recently used."""
        assert len(ids) <= self._n_free, f"{len(ids)} ids for {self._n_free} free slots"
        assert (self.slots_of(ids) == ABSENT).all(), "an id is held already"
        if len(ids) == 0:
            return np.empty(0, np.int64)
        assert ids.min() >= 0, f"chunk id {ids.min()}"
        self._slot_of = _grown(self._slot_of, int(ids.max()) + 1)
        slots = np.sort(self._free[self._n_free - len(ids) : self._n_free])
        self._slot_of[ids] = slots
        assert (self._slot_of[ids] == slots).all(), "an id is given twice"
        self._n_free -= len(ids)
        self._id_of[slots] = ids
        self._mark_used(slots)
        return slots

    def free(self, ids: Ids) -> None:
        """Forget ``ids`` [n]; those not held are ignored."""
        slots = self.slots_of(ids)
        slots = np.unique(slots[slots != ABSENT])
        self._slot_of[self._id_of[slots]] = ABSENT
        self._id_of[slots] = ABSENT
        self._push(slots)

    def touch(self, ids: Ids) -> None:
        """Mark ``ids`` [n], all held, as the most recently used."""
        slots = self.slots_of(ids)
        assert (slots != ABSENT).all(), "touched an id that is not held"
        self._mark_used(slots)

    def coldest(self, n: int) -> Ids:
        """The ``n`` least recently used ids (all, if fewer are held), coldest first, ties to the lower id."""
        n = max(0, min(n, len(self)))
        if len(self._still_cold()) < n:
            self._find_candidates(max(2 * n, _CANDIDATES))
        return self._candidates[0][:n].copy()

    def _still_cold(self) -> Ids:
        """Candidates that were neither used nor freed since they were found; the others are let go.

        Nothing else can have become colder meanwhile, so these are still the coldest, in order.
        """
        ids, used_at = self._candidates
        slots = self.slots_of(ids)
        same = slots != ABSENT
        same[same] = self._used_at[slots[same]] == used_at[same]
        self._candidates = ids[same], used_at[same]
        return self._candidates[0]

    def _find_candidates(self, n: int) -> None:
        slots = np.flatnonzero(self._id_of[: self._n_slots] != ABSENT)
        used_at = self._used_at[slots]
        if n < len(slots):
            # with all that share the time of the n-th, so that the lower ids among them win
            cold = used_at <= np.partition(used_at, n - 1)[n - 1]
            slots, used_at = slots[cold], used_at[cold]
        ids = self._id_of[slots]
        order = np.lexsort((ids, used_at))[:n]
        self._candidates = ids[order], used_at[order]

    def _mark_used(self, slots: Ids) -> None:
        self._clock += 1
        self._used_at[slots] = self._clock

    def _push(self, slots: Ids) -> None:
        """Put ``slots``, ascending, on the stack so that the lowest comes off first."""
        self._free[self._n_free : self._n_free + len(slots)] = slots[::-1]
        self._n_free += len(slots)


def _grown(array: Ids, size: int) -> npt.NDArray[np.int64]:
    """``array`` with room for ``size`` entries, new ones ABSENT; doubled, so that growing often is cheap."""
    if size <= len(array):
        return array
    grown = np.full(max(size, 2 * len(array)), ABSENT, np.int64)
    grown[: len(array)] = array
    return grown
