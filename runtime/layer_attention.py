"""Attention of one layer over [sinks | chosen chunks | window]: the new K and V go to the ring, the set is attended.

Two ways that give the same: torch, which copies the set into a scratch buffer, and Triton kernels on CUDA, which read
ring and pool in place (decode) or lay the set out turned (prefill).
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from kvtier.kernels.assemble import Sources, ring_offsets
from kvtier.kernels.attend import Logits, attend
from kvtier.kernels.attend_decode import DecodeWorkspace, attend_decode_triton
from kvtier.kernels.attend_prefill import attend_prefill_triton
from kvtier.kernels.backend import runs_triton
from kvtier.kernels.gather import gather_chunks
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.model import ModelShape, Rotary
from kvtier.runtime.sizing import longest_attended
from kvtier.runtime.window import WindowRing


@dataclass(frozen=True, slots=True)
class Attended:
    """What the block of tokens start..end of a layer attends to."""

    ring: WindowRing
    place: int
    """Of the layer in the ring."""
    sinks: int
    """Sinks that the sequence has, the block included."""
    begin: int
    """First token of the window, after the sinks."""
    start: int
    end: int
    pool: torch.Tensor
    """[slots, 2, C, D]"""
    slots: torch.Tensor | None = None
    """[N, n] int32 on the device: the chosen chunks' slots in the pool, in order."""
    window: int | None = None
    """The sliding window; None: all of it."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        chosen = 0 if self.slots is None else self.slots.shape[1] * self.pool.shape[2]
        return self.sinks + chosen + max(0, self.end - self.begin)


class LayerAttention(ABC):
    """One way to attend; owns the buffers that it needs."""

    @abstractmethod
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, to: Attended, rotary: Rotary, logits: Logits
    ) -> torch.Tensor:
        """``q`` [H, b, D], ``k`` and ``v`` [N, b, D], un-rotated -> [H, b, D]; k and v are in the ring afterwards."""


def scratch_of(shape: ModelShape, geometry: Geometry) -> torch.Tensor:
    """A buffer for the longest attended set, [2, N, longest, D]."""
    attended = (2, shape.n_kv_heads, longest_attended(shape, geometry), shape.head_dim)
    return torch.empty(attended, dtype=shape.dtype, device=shape.device)


class TorchAttention(LayerAttention):
    """Any device."""

    def __init__(self, shape: ModelShape, geometry: Geometry) -> None:
        self._scratch = scratch_of(shape, geometry)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, to: Attended, rotary: Rotary, logits: Logits
    ) -> torch.Tensor:
        to.ring.write(to.place, to.start, k, v)
        keys, values = self._scratch[0], self._scratch[1]
        n = to.sinks
        to.ring.read(to.place, 0, n, keys[:, :n], values[:, :n])
        if to.slots is not None:
            length = to.slots.shape[1] * to.pool.shape[2]
            gather_chunks(to.pool, to.slots.long(), keys[:, n : n + length], values[:, n : n + length])
            n += length
        if to.end > to.begin:
            length = to.end - to.begin
            to.ring.read(to.place, to.begin, to.end, keys[:, n : n + length], values[:, n : n + length])
            n += length
        assert n == to.length
        return attend(q, keys[:, :n], values[:, :n], rotary.cos[:n], rotary.sin[:n], logits, to.window)


class TritonAttention(LayerAttention):
    """CUDA devices, head_dim a multiple of 16."""

    def __init__(self, shape: ModelShape, geometry: Geometry) -> None:
        self._scratch = scratch_of(shape, geometry)
        longest = longest_attended(shape, geometry)
        heads = (shape.n_heads, shape.n_kv_heads, shape.head_dim)
        self._workspace = DecodeWorkspace.empty(1, *heads, longest, shape.dtype, shape.device)
        self._lengths: tuple[tuple[int, ...], torch.Tensor] = ((), torch.empty(0))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, to: Attended, rotary: Rotary, logits: Logits
    ) -> torch.Tensor:
        ring = to.ring.layer(to.place)
        slots = None if to.slots is None else to.slots[None]
        pool = None if slots is None else to.pool
        chosen = 0 if slots is None else slots.shape[2]
        lengths = self._lengths_of((to.sinks, chosen, to.begin, to.end), q.device)
        sources = Sources([ring], ring_offsets([ring]), to.ring.sink, lengths, pool, slots)
        if q.shape[1] == 1:
            new = (k[None, :, 0].contiguous(), v[None, :, 0].contiguous())
            query = q[None, :, 0].contiguous()
            out = attend_decode_triton(
                query, sources, rotary.cos, rotary.sin, logits, new, to.window, workspace=self._workspace
            )
            return out[0, :, None]
        return attend_prefill_triton(
            q, sources, rotary.cos, rotary.sin, logits, (k, v), to.window, scratch=self._scratch
        )

    def _lengths_of(self, lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """[1, 4] int32 on the device; the layers of a block mostly have the same."""
        if self._lengths[0] != lengths:
            self._lengths = lengths, torch.tensor([lengths], dtype=torch.int32, device=device)
        return self._lengths[1]


def make_attention(shape: ModelShape, geometry: Geometry, rotary_dims: set[int]) -> LayerAttention:
    """Triton's on CUDA devices, torch's elsewhere and, with a warning, where Triton's cannot run.

    ``rotary_dims`` : of the layers' rotary tables
    """
    if shape.device.type != "cuda":
        return TorchAttention(shape, geometry)
    fits = shape.head_dim % 16 == 0 and all(dim % 2 == 0 for dim in rotary_dims)
    if fits and runs_triton(torch.empty(0, device=shape.device)):
        return TritonAttention(shape, geometry)
    why = "Triton is not installed" if fits else f"head_dim {shape.head_dim} is not a multiple of 16"
    warnings.warn(f"attention runs in torch, more slowly than in Triton: {why}", stacklevel=2)
    return TorchAttention(shape, geometry)
