"""The attention function that transformers calls inside an offload block."""

from typing import Any

import torch
from transformers import AttentionInterface

from kvtier.runtime.errors import UnsupportedError

NAME = "kvtier"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` [1, H, b, D], ``key`` and ``value`` [1, N, b, D] (the new tokens only) -> [1, b, H, D]."""
    mark = getattr(key, "_kvtier", None)
    if mark is None:
        raise UnsupportedError(
            "attention inside an offload block was called without a kvtier cache: call model(...) or "
            "model.generate(...)"
        )
    lane, layer = mark
    out = lane.attend(layer, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None], None


def register() -> None:
    """Make ``NAME`` known to transformers; process-wide and harmless. No mask is registered: then none is built."""
    AttentionInterface.register(NAME, attention)
