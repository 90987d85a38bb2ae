"""The windows of a sequence: sinks and the newest tokens of every layer, on the device, un-rotated.

A full-attention layer keeps its sinks and the tokens that have not left for the tiers; a layer with a sliding window
keeps just that window. A sequence that does not run is *parked*: immutable host tensors, which forks share until they
run.
"""

import weakref
from dataclasses import dataclass

import torch

from kvtier.runtime.budget import Budget
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.model import ModelShape


@dataclass(frozen=True, slots=True)
class ParkedRing:
    """What a ring held of one sequence, on the host: tokens 0..sink and begin..end of every layer."""

    sinks: torch.Tensor
    """[2, L, N, sinks held, D]"""
    tokens: torch.Tensor
    """[2, L, N, end - begin, D]"""
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.sinks.nbytes + self.tokens.nbytes


class WindowRing:
    """K and V of L layers: the first ``sink`` tokens in fixed places, the newest ``capacity`` tokens in a ring."""

    def __init__(
        self,
        sink: int,
        capacity: int,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sink = sink
        self._capacity = capacity
        self._token_bytes = 2 * n_layers * n_kv_heads * head_dim * dtype.itemsize
        self._data = torch.zeros(2, n_layers, n_kv_heads, sink + capacity, head_dim, dtype=dtype, device=device)

    def _pieces(self, begin: int, end: int) -> list[slice]:
        """Where tokens begin..end lie, in order: at most one stretch of sinks and two of the ring."""
        pieces = [slice(begin, min(end, self.sink))] if begin < self.sink else []
        begin = max(begin, self.sink)
        assert end - begin <= self._capacity, "more tokens than the ring holds"
        while begin < end:
            offset = (begin - self.sink) % self._capacity
            count = min(end - begin, self._capacity - offset)
            pieces.append(slice(self.sink + offset, self.sink + offset + count))
            begin += count
        return pieces

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store ``keys`` and ``values`` [N, b, D] as tokens start..start+b of a layer."""
        done = 0
        for piece in self._pieces(start, start + keys.shape[1]):
            count = piece.stop - piece.start
            self._data[0, layer, :, piece] = keys[:, done : done + count]
            self._data[1, layer, :, piece] = values[:, done : done + count]
            done += count

    def read(self, layer: int, begin: int, end: int, out_k: torch.Tensor, out_v: torch.Tensor) -> None:
        """Copy tokens begin..end of a layer into ``out_k`` and ``out_v`` [N, end - begin, D]."""
        done = 0
        for piece in self._pieces(begin, end):
            count = piece.stop - piece.start
            out_k[:, done : done + count] = self._data[0, layer, :, piece]
            out_v[:, done : done + count] = self._data[1, layer, :, piece]
            done += count

    def layer(self, layer: int) -> torch.Tensor:
        """All places of a layer, [2, N, sink + capacity, D]; token t >= sink is in sink + (t - sink) % capacity."""
        return self._data[:, layer]

    def tokens(self, layer: int, begin: int, end: int) -> torch.Tensor:
        """Tokens begin..end of a layer as a new tensor [2, N, end - begin, D]."""
        return torch.cat([self._data[:, layer, :, piece] for piece in self._pieces(begin, end)], dim=2)

    def parked_bytes(self, begin: int, end: int) -> int:
        """Host bytes that ``park(begin, end)`` takes."""
        return self._token_bytes * (min(self.sink, end) + end - begin)

    def park(self, begin: int, end: int) -> ParkedRing:
        """Copy sinks and tokens begin..end to the host."""
        sinks = self._data[:, :, :, : min(self.sink, end)].to("cpu", copy=True)
        pieces = [self._data[:, :, :, piece] for piece in (slice(0), *self._pieces(begin, end))]
        return ParkedRing(sinks, torch.cat(pieces, dim=3).to("cpu"), begin, end)

    def load(self, parked: ParkedRing) -> None:
        """Put parked tokens back where they belong."""
        self._data[:, :, :, : parked.sinks.shape[3]] = parked.sinks.to(self._data.device)
        done = 0
        for piece in self._pieces(parked.begin, parked.end):
            count = piece.stop - piece.start
            self._data[:, :, :, piece] = parked.tokens[:, :, :, done : done + count].to(self._data.device)
            done += count


@dataclass(frozen=True, slots=True, weakref_slot=True)
class ParkedWindows:
    """The windows of one sequence at ``end`` tokens, on the host; the bytes go back when the last holder lets go."""

    full: ParkedRing
    sliding: ParkedRing
    end: int


class Windows:
    """The windows of one running sequence in all layers.

    Attributes
    ----------
    full : ring of the full-attention layers
    sliding : ring of the layers with a sliding window
    place : by layer, its place in its ring
    """

    def __init__(self, shape: ModelShape, geometry: Geometry) -> None:
        kv = (shape.n_kv_heads, shape.head_dim, shape.dtype, shape.device)
        n_sliding = len(shape.sliding_layers)
        self._shape = shape
        self._geometry = geometry
        self.full = WindowRing(geometry.sink, geometry.window_capacity, shape.n_layers - n_sliding, *kv)
        self.sliding = WindowRing(0, shape.sliding_capacity(geometry.block), n_sliding, *kv)
        counts = {True: 0, False: 0}
        self.place: list[int] = []
        for layer in range(shape.n_layers):
            slides = layer in shape.sliding_layers
            self.place.append(counts[slides])
            counts[slides] += 1

    @staticmethod
    def bytes_needed(shape: ModelShape, geometry: Geometry) -> int:
        """Device bytes of the windows of one sequence, and most host bytes that they take when parked."""
        n_sliding = len(shape.sliding_layers)
        places = (shape.n_layers - n_sliding) * (geometry.sink + geometry.window_capacity)
        places += n_sliding * shape.sliding_capacity(geometry.block)
        return 2 * places * shape.n_kv_heads * shape.head_dim * shape.dtype.itemsize

    def parked_bytes(self, begin: int, end: int) -> int:
        """Host bytes that ``park(begin, end)`` takes."""
        return self.full.parked_bytes(begin, end) + self.sliding.parked_bytes(self._sliding_begin(end), end)

    def park(self, begin: int, end: int, host: Budget) -> ParkedWindows:
        """Copy a sequence of ``end`` tokens, the full layers' from ``begin`` on, to the host; raises BudgetError."""
        nbytes = self.parked_bytes(begin, end)
        what = "the window of a cache that is not running (a fork, or the cache it came from)"
        from_aside = host.take_aside(nbytes, what)
        try:
            sliding = self.sliding.park(self._sliding_begin(end), end)
            parked = ParkedWindows(self.full.park(begin, end), sliding, end)
        except BaseException:
            host.give_aside(nbytes, from_aside)
            raise
        weakref.finalize(parked, host.give_aside, nbytes, from_aside)
        return parked

    def load(self, parked: ParkedWindows) -> None:
        """Put parked windows back."""
        self.full.load(parked.full)
        self.sliding.load(parked.sliding)

    def _sliding_begin(self, end: int) -> int:
        """A token more than the next block needs: the last token may be forgotten and fed again."""
        return max(0, end - (self._shape.sliding_window or 0))
