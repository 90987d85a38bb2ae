"""Positions: a model's trained window and rotary tables, and the identity that stands in for its rotary module."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from kvtier.compat import frequencies
from kvtier.runtime.model import Rotary

STRETCHED = ("linear", "dynamic", "yarn", "longrope")
"""Rope types whose max_position_embeddings is beyond what was trained."""


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope settings of a config's full-attention layers (of its first kind of layers, if it has none); or {}."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    by_type = {kind: value for kind, value in rope.items() if isinstance(value, dict)}
    return dict(by_type.get("full_attention") or next(iter(by_type.values()))) if by_type else rope


def trained_window(config: PreTrainedConfig) -> int:
    """W of DESIGN.md: tokens that the model was trained to see at once.

    ``max_position_embeddings``; for linear, dynamic, yarn and longrope scaling the original one
    (``original_max_position_embeddings``, else max / factor). llama3 scaling counts as trained.
    """
    longest = int(config.max_position_embeddings)
    rope = rope_parameters(config)
    if rope.get("rope_type") not in STRETCHED:
        return longest
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(original) if original else int(longest / float(rope.get("factor", 1.0)))


def rotary_tables(rotary: torch.nn.Module, layer_type: str | None, n: int, device: torch.device) -> Rotary:
    """Cos and sin for positions 0..n-1 with the model's own frequencies, frozen at the trained window."""
    inv_freq, scaling = frequencies(rotary, layer_type)
    angles = torch.arange(n, dtype=torch.float32)[:, None] * inv_freq.to(device="cpu", dtype=torch.float32)
    angles = torch.cat((angles, angles), dim=-1)
    return Rotary((angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device), scaling)


def deinterleaved(rotary_dim: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """The order [D] of dimensions that turns rotary pairs (0, 1), (2, 3), ... into those of "rotate half".

    q.k does not depend on the order of dimensions, as long as both have the same.
    """
    turned = torch.arange(rotary_dim).view(-1, 2).T.flatten()
    return torch.cat((turned, torch.arange(rotary_dim, head_dim))).to(device)


def identity_rotary(width: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A forward for a rotary module that turns nothing: queries and keys reach the cache without positions, exactly.

    ``width`` is the last dimension of the model's own cos. cos 1 and sin 0 come in x's dtype, or a half-precision model
    would be promoted to float32.
    """

    def forward(x: torch.Tensor, position_ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (1, 1, width)  # broadcasts over rows and tokens
        return torch.ones(shape, dtype=x.dtype, device=x.device), torch.zeros(shape, dtype=x.dtype, device=x.device)

    return forward
