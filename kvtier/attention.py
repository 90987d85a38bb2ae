"""The attention function that transformers calls inside an offload block."""

from typing import Any

import torch
from transformers import AttentionInterface

from kvtier.runtime.errors import UnsupportedError

NAME = "kvtier"
HARMLESS = {"position_ids", "use_cache", "cache_position"}
"""What transformers passes to every attention function, and kvtier's own positions and cache stand for."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` [1, H, b, D], ``key`` and ``value`` [1, N, b, D] (the new tokens only) -> [1, b, H, D].

    Raises UnsupportedError for a mask and for keyword arguments that would change the result and are not known here.
    """
    mark = getattr(key, "_kvtier", None)
    if mark is None:
        raise UnsupportedError(
            "attention inside an offload block was called without a kvtier cache: call model(...) or "
            "model.generate(...)"
        )
    lane, layer = mark
    if attention_mask is not None:
        raise UnsupportedError(
            f"layer {layer} ({type(module).__name__}) passes an attention mask: kvtier makes its own"
        )
    for name, argument in kwargs.items():
        if not _harmless(name, argument, lane.engine.geometry.max):
            given = tuple(argument.shape) if isinstance(argument, torch.Tensor) else argument
            raise UnsupportedError(
                f"layer {layer} ({type(module).__name__}) calls attention with {name}={given}: not supported by kvtier"
            )
    out = lane.attend(layer, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None], None


def _harmless(name: str, argument: Any, longest: int) -> bool:
    """Whether attention over at most ``longest`` tokens is the same without this keyword argument."""
    if argument is None or name in HARMLESS:
        return True
    if name == "dropout":
        return bool(argument == 0)
    if name == "sliding_window":
        return int(argument) >= longest
    return argument is (name == "is_causal")  # a switch that is off, or kvtier's own order


def register() -> None:
    """Make ``NAME`` known to transformers; process-wide and harmless. No mask is registered: then none is built."""
    AttentionInterface.register(NAME, attention)
