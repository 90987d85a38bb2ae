"""What the runtime knows of a model: the shape of its attention and its rotary tables."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the runtime needs to know of a model."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    sliding_layers: frozenset[int] = frozenset()
    """Layers in which a token attends to itself and the ``sliding_window - 1`` tokens before it, and to no others."""
    sliding_window: int | None = None

    @property
    def full_layers(self) -> list[int]:
        """Layers that attend to the whole context: the ones that are tiered."""
        return [layer for layer in range(self.n_layers) if layer not in self.sliding_layers]

    def sliding_capacity(self, block: int) -> int:
        """Tokens that a sliding layer holds while a block goes through: what the block's first token sees, and it."""
        return 0 if self.sliding_window is None else self.sliding_window - 1 + block

    def sliding_begin(self, start: int) -> int:
        """First token that the sliding layers of a block at token ``start`` attend to."""
        assert self.sliding_window is not None
        return max(0, start - self.sliding_window + 1)


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary tables of a layer for positions 0..n-1, on the device; they turn the first R of D dimensions."""

    cos: torch.Tensor
    """[n, R] float32, attention_scaling included"""
    sin: torch.Tensor
    """[n, R] float32, attention_scaling included"""
    attention_scaling: float

    def nowhere(self) -> "Rotary":
        """For a layer without positions: R = 0, nothing is turned or scaled."""
        empty = self.cos.new_empty(self.cos.shape[0], 0)
        return Rotary(empty, empty, 1.0)

    def is_partial(self, head_dim: int) -> bool:
        """Whether some dimensions are turned and others are not."""
        return 0 < self.cos.shape[-1] < head_dim

    def unplaced(self, q: torch.Tensor) -> torch.Tensor:
        """``q`` [..., D] for a product with un-rotated keys that is what both, rotated to one position, would give."""
        rotary, factor = self.cos.shape[-1], self.attention_scaling**2
        if rotary == q.shape[-1] or factor == 1.0:
            return q * factor
        return torch.cat((q[..., :rotary] * factor, q[..., rotary:]), dim=-1)
