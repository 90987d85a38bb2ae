"""What runs the attention of one offload block: one interface, one class per ``[attention] method``.

A block of new tokens becomes part of its sequence only when ``commit`` is called after the last layer: an exception in
between leaves the sequence as it was before the block.
"""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch

from kvtier.kernels.attend import Logits
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.model import ModelShape, Rotary
from kvtier.runtime.sequence import Sequence

AnySequence = TypeVar("AnySequence", bound=Sequence)


class Engine(ABC, Generic[AnySequence]):
    """Device state of one offload block; many sequences, those of one cache running at a time.

    Parameters
    ----------
    rotary : per layer, tables for as many positions as the layer attends to at most
    """

    def __init__(self, shape: ModelShape, geometry: Geometry, rotary: list[Rotary]) -> None:
        assert len(rotary) == shape.n_layers
        self.shape = shape
        self.rotary = rotary
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
    def activate(self, sequences: list[AnySequence]) -> None:
        """Make ``sequences`` the ones that run.

        Raises BudgetError when there is no room for them beside each other, or when others cannot be parked.
        """

    @abstractmethod
    def attend(
        self, sequence: AnySequence, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logits: Logits
    ) -> torch.Tensor:
        """Attention of a block of ``b`` new tokens of a running sequence in one layer.

        Parameters
        ----------
        q : Tensor [H, b, D], un-rotated
        k, v : Tensor [N, b, D], un-rotated
        logits : what the model makes of q.k

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
