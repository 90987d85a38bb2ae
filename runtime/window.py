"""The window ring: sinks and the newest tokens of every layer, on the device, un-rotated.

One ring serves all sequences of an offload block: the sequence that runs is loaded, the others are *parked* as
immutable host tensors, which forks share until they run.
"""

import weakref

import torch

from kvtier.runtime.budget import Budget
from kvtier.runtime.geometry import Geometry


class ParkedWindow:
    """Sinks and window of one sequence on the host: tokens 0..sink and begin..end of every layer."""

    __slots__ = ("__weakref__", "begin", "end", "sinks", "tokens")

    def __init__(self, sinks: torch.Tensor, tokens: torch.Tensor, begin: int, end: int) -> None:
        self.sinks = sinks
        """[2, L, N, sinks held, D]"""
        self.tokens = tokens
        """[2, L, N, end - begin, D]"""
        self.begin = begin
        self.end = end


class WindowRing:
    """K and V of the sinks (fixed places) and of the last ``window_capacity`` tokens (a ring) of every layer."""

    def __init__(
        self,
        geometry: Geometry,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._sink = geometry.sink
        self._capacity = geometry.window_capacity
        places = self._sink + self._capacity
        self._data = torch.zeros(2, n_layers, n_kv_heads, places, head_dim, dtype=dtype, device=device)

    @staticmethod
    def bytes_needed(geometry: Geometry, n_layers: int, n_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Device bytes of the ring."""
        return 2 * n_layers * n_kv_heads * (geometry.sink + geometry.window_capacity) * head_dim * itemsize

    def _pieces(self, begin: int, end: int) -> list[slice]:
        """Where tokens begin..end lie, in order: at most one stretch of sinks and two of the ring."""
        pieces = [slice(begin, min(end, self._sink))] if begin < self._sink else []
        begin = max(begin, self._sink)
        assert end - begin <= self._capacity, "more tokens than the ring holds"
        while begin < end:
            offset = (begin - self._sink) % self._capacity
            count = min(end - begin, self._capacity - offset)
            pieces.append(slice(self._sink + offset, self._sink + offset + count))
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

    def tokens(self, layer: int, begin: int, end: int) -> torch.Tensor:
        """Tokens begin..end of a layer as a new tensor [2, N, end - begin, D]."""
        return torch.cat([self._data[:, layer, :, piece] for piece in self._pieces(begin, end)], dim=2)

    def parked_bytes(self, begin: int, end: int) -> int:
        """Host bytes that ``park(begin, end)`` takes."""
        held = min(self._sink, end) + end - begin
        return self._data[:, :, :, 0].numel() * self._data.itemsize * held

    def park(self, begin: int, end: int, host: Budget) -> ParkedWindow:
        """Copy the running sequence's sinks and tokens begin..end to the host; raises BudgetError."""
        nbytes = self.parked_bytes(begin, end)
        from_aside = host.take_aside(
            nbytes, "the window of a cache that is not running (a fork, or the cache it came from)"
        )
        try:
            sinks = self._data[:, :, :, : min(self._sink, end)].to("cpu", copy=True)
            pieces = [self._data[:, :, :, piece] for piece in (slice(0), *self._pieces(begin, end))]
            parked = ParkedWindow(sinks, torch.cat(pieces, dim=3).to("cpu"), begin, end)
        except BaseException:
            host.give_aside(nbytes, from_aside)
            raise
        weakref.finalize(parked, host.give_aside, nbytes, from_aside)
        return parked

    def load(self, parked: ParkedWindow) -> None:
        """Put a parked window back where its tokens belong."""
        self._data[:, :, :, : parked.sinks.shape[3]] = parked.sinks.to(self._data.device)
        done = 0
        for piece in self._pieces(parked.begin, parked.end):
            count = piece.stop - piece.start
            self._data[:, :, :, piece] = parked.tokens[:, :, :, done : done + count].to(self._data.device)
            done += count
