"""Positions: a model's trained window and rotary tables, and the identity that stands in for its rotary module."""

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from kvtier.runtime.engine import Rotary

STRETCHED = ("linear", "dynamic", "yarn", "longrope")
"""Rope types whose max_position_embeddings is beyond what was trained."""


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope settings of a config; {} when there are none."""
    return dict(getattr(config, "rope_parameters", None) or {})


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


def rotary_tables(rotary: torch.nn.Module, n: int, device: torch.device) -> Rotary:
    """Cos and sin for positions 0..n-1 with the model's own frequencies, frozen at the trained window.

    ``original_inv_freq`` and ``attention_scaling`` are what transformers computes when the module is made.
    """
    inv_freq = cast(torch.Tensor, rotary.original_inv_freq).to(device="cpu", dtype=torch.float32)
    scaling = float(cast(float, rotary.attention_scaling))
    angles = torch.arange(n, dtype=torch.float32)[:, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return Rotary((angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device), scaling)


def identity_rotary(rotary_dim: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A forward for a rotary module that turns nothing: queries and keys reach the cache without positions, exactly.

    cos 1 and sin 0 come in x's dtype, or a half-precision model would be promoted to float32.
    """

    def forward(x: torch.Tensor, position_ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (1, 1, rotary_dim)  # broadcasts over rows and tokens
        return torch.ones(shape, dtype=x.dtype, device=x.device), torch.zeros(shape, dtype=x.dtype, device=x.device)

    return forward
