"""What runs the attention of one offload block: one interface, one class per ``[attention] method``.

A block of new tokens becomes part of its sequence only when ``commit`` is called after the last layer: an exception in
between leaves the sequence as it was before the block.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from kvtier.runtime.geometry import Geometry
from kvtier.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the runtime needs to know of a model."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    unrotated: frozenset[int] = frozenset()
    """Layers whose queries and keys have no positions."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary tables for positions 0..max-1, on the device; they turn the first R of D dimensions."""

    cos: torch.Tensor
    """[max, R] float32, attention_scaling included"""
    sin: torch.Tensor
    """[max, R] float32, attention_scaling included"""
    attention_scaling: float

    def nowhere(self) -> "Rotary":
        """For a layer without positions: R = 0, nothing is turned or scaled."""
        return Rotary(self.cos[:, :0], self.sin[:, :0], 1.0)

    def is_partial(self, head_dim: int) -> bool:
        """Whether some dimensions are turned and others are not."""
        return 0 < self.cos.shape[-1] < head_dim

    def unplaced(self, q: torch.Tensor) -> torch.Tensor:
        """``q`` [..., D] for a product with un-rotated keys that is what both, rotated to one position, would give."""
        rotary, factor = self.cos.shape[-1], self.attention_scaling**2
        if rotary == q.shape[-1] or factor == 1.0:
            return q * factor
        return torch.cat((q[..., :rotary] * factor, q[..., rotary:]), dim=-1)


AnySequence = TypeVar("AnySequence", bound=Sequence)


class Engine(ABC, Generic[AnySequence]):
    """Device state of one offload block; many sequences, one of them running at a time."""

    def __init__(self, shape: ModelShape, geometry: Geometry, rotary: Rotary) -> None:
        self.shape = shape
        self.rotary = [rotary.nowhere() if layer in shape.unrotated else rotary for layer in range(shape.n_layers)]
        """Per layer."""
        self.geometry = geometry
        self.longest_attended = 0
        """Largest number of tokens that any step attended to."""

    @abstractmethod
    def new_sequence(self, select: int) -> AnySequence:
        """An empty sequence that attends to at most ``select`` chunks per KV head and step."""

    @abstractmethod
    def fork(self, sequence: AnySequence, select: int) -> AnySequence:
        """A sequence with the same past."""

    @abstractmethod
    def release(self, sequence: AnySequence) -> None:
        """Forget a sequence and what only it refers to. A second call does nothing."""

    @abstractmethod
    def activate(self, sequence: AnySequence) -> None:
        """Make ``sequence`` the one that runs. Raises BudgetError when the one that ran cannot be parked."""

    @abstractmethod
    def attend(
        self, sequence: AnySequence, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of a block of ``b`` new tokens in one layer.

        Parameters
        ----------
        q : Tensor [H, b, D], un-rotated
        k, v : Tensor [N, b, D], un-rotated
        scaling : the factor of q.k that the model passes

        Returns
        -------
        Tensor [H, b, D]
        """

    def commit(self, sequence: AnySequence, ids: torch.Tensor) -> None:
        """The block with token ``ids`` [b] has gone through every layer."""
        sequence.commit(ids)

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""
