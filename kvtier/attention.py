"""The attention function that transformers calls inside an offload block."""

from typing import Any

import torch
from transformers import AttentionInterface

from kvtier.kernels.attend import Logits
from kvtier.runtime.engine import Engine
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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` [R, H, b, D], ``key`` and ``value`` [R, N, b, D] (the new tokens only) -> [R, b, H, D].

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
    for name, argument in ({"sliding_window": None} | kwargs).items():
        if not _harmless(name, argument, layer, lane.engine):
            given = tuple(argument.shape) if isinstance(argument, torch.Tensor) else argument
            raise UnsupportedError(
                f"layer {layer} ({type(module).__name__}) calls attention with {name}={given}: not supported by kvtier"
            )
    out = lane.attend(layer, query, key, value, Logits(scaling, softcap, s_aux))
    return out.transpose(1, 2), None


def _harmless(name: str, argument: Any, layer: int, engine: Engine[Any]) -> bool:
    """Whether attention as the engine computes it is the same without this keyword argument."""
    if name == "sliding_window" and layer in engine.shape.sliding_layers:
        return bool(argument == engine.shape.sliding_window)
    if argument is None or name in HARMLESS:
        return True
    if name == "dropout":
        return bool(argument == 0)
    if name == "sliding_window":
        return int(argument) >= engine.geometry.max
    return argument is (name == "is_causal")  # a switch that is off, or kvtier's own order


def register() -> None:
    """Make ``NAME`` known to transformers; process-wide and harmless. No mask is registered: then none is built."""
    AttentionInterface.register(NAME, attention)
