"""Which sequences run: each has a seat, windows on the device; the windows of all others are parked on the host."""

from dataclasses import dataclass

from kvtier.runtime.budget import Budget
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.model import ModelShape
from kvtier.runtime.residency import Residency
from kvtier.runtime.sequence import TieredSequence
from kvtier.runtime.window import Windows


@dataclass(eq=False, slots=True)
class Seat:
    """Windows on the device and the sequence that has them."""

    windows: Windows
    sequence: TieredSequence | None = None


class Seats:
    """One seat at least, as many as a batch has rows at most; seats that nobody needs are given back.

    The bytes of the first seat are taken by whoever makes this (``runtime.sizing``), those of the others here.
    """

    def __init__(self, shape: ModelShape, geometry: Geometry, residency: Residency, gpu: Budget, host: Budget) -> None:
        self._shape = shape
        self._geometry = geometry
        self._residency = residency
        self._gpu = gpu
        self._host = host
        self._bytes = Windows.bytes_needed(shape, geometry)
        self._seats = [Seat(Windows(shape, geometry))]

    def windows_of(self, sequence: TieredSequence) -> Windows:
        """The windows of a sequence that runs."""
        seat = self._seat_of(sequence)
        assert seat is not None, "the sequence does not run"
        return seat.windows

    def activate(self, sequences: list[TieredSequence]) -> None:
        """Seat ``sequences``, beside each other, parking others where seats are short. Raises BudgetError."""
        new = [sequence for sequence in sequences if self._seat_of(sequence) is None]
        if not new:
            return
        self._give_back(len(sequences))
        try:
            while len(self._seats) < len(sequences):
                self._gpu.take(self._bytes, f"the windows of row {len(self._seats) + 1} of a batch of {len(sequences)}")
                self._seats.append(Seat(Windows(self._shape, self._geometry)))
        except BaseException:
            self._give_back(1)
            raise
        free = [seat for seat in self._seats if not any(seat.sequence is s for s in sequences)]
        free.sort(key=lambda seat: seat.sequence is not None)
        for sequence, seat in zip(new, free, strict=False):
            if seat.sequence is not None:
                self.park(seat.sequence)
            seat.sequence = None
            if sequence.parked is not None:
                seat.windows.load(sequence.parked)
            seat.sequence, sequence.parked = sequence, None

    def park(self, sequence: TieredSequence) -> None:
        """Give ``sequence`` an up-to-date parked window, if it runs and has one to keep. It keeps its seat."""
        seat, parked = self._seat_of(sequence), sequence.parked
        if seat is None or not sequence.length or (parked and parked.end == sequence.length):
            return
        sequence.parked = None
        retired = [sequence.layers[layer].retired for layer in self._shape.full_layers]
        least = min(retired, default=0)  # they differ after a block that failed half-way
        begin = min(self._geometry.sink + least * self._geometry.chunk, sequence.length)
        if not retired:
            begin = sequence.length
        try:
            self._residency.free_host_bytes(seat.windows.parked_bytes(begin, sequence.length))
            sequence.parked = seat.windows.park(begin, sequence.length, self._host)
        except BaseException:
            self._drop_copies()
            raise

    def release(self, sequence: TieredSequence) -> None:
        """The seat of a sequence that nobody needs any more is given back, unless it is the last."""
        seat = self._seat_of(sequence)
        if seat is not None:
            seat.sequence = None
            self._give_back(1)

    def _drop_copies(self) -> None:
        """Parked windows of sequences that have a seat are not needed."""
        for seat in self._seats:
            if seat.sequence is not None:
                seat.sequence.parked = None

    def _give_back(self, n: int) -> None:
        """Give free seats back, down to ``n``."""
        for seat in [seat for seat in self._seats if seat.sequence is None]:
            if len(self._seats) > n:
                self._seats.remove(seat)
                self._gpu.give(self._bytes)

    def _seat_of(self, sequence: TieredSequence) -> Seat | None:
        return next((seat for seat in self._seats if seat.sequence is sequence), None)
