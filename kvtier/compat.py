"""The few places where kvtier touches what transformers does not promise, or what its versions name differently.

``tests/test_compat.py`` fails when one of them moves, and when another file of kvtier/ touches a private name.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

CACHE_NAMES = ("cache", "past_key_values")
"""The argument that carries the cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""


def cache_name(function: Callable[..., Any]) -> str:
    """How ``function`` (a model's forward) calls its cache argument."""
    return next(name for name in CACHE_NAMES if name in inspect.signature(function).parameters)


def take_cache(arguments: dict[str, Any]) -> Any:
    """Remove the cache from keyword arguments, under whichever name it was given, and return it (or None)."""
    given = [arguments.pop(name) for name in CACHE_NAMES if name in arguments]
    return next((cache for cache in given if cache is not None), None)


def attention_name(config: PreTrainedConfig) -> str | None:
    """The attention implementation that a model's config names."""
    name: str | None = config._attn_implementation_internal
    return name


def set_attention_name(config: PreTrainedConfig, name: str | None) -> None:
    """Switch the attention implementation without transformers' own dispatch, which may import hub kernels."""
    config._attn_implementation_internal = name


FREQUENCIES = "original_inv_freq"
"""The buffer of a rotary module with the frequencies of the trained window; with several sets, its names' ending."""


def is_rotary(module: torch.nn.Module) -> bool:
    """Whether ``module`` makes the cos and sin of a model.

    Before transformers 5.24 the original frequencies of a stretched rope and those in use may be one tensor.
    """
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return any(name.endswith(FREQUENCIES) for name, _ in buffers)


def frequencies(rotary: torch.nn.Module, layer_type: str | None) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [R/2] of a rotary module and the factor of its cos and sin, as they were when it was made.

    ``layer_type`` picks a set where layers differ (Gemma 3, OLMo 3); modules with one set ignore it.
    """
    prefix = "" if hasattr(rotary, FREQUENCIES) else f"{layer_type}_"
    return getattr(rotary, f"{prefix}{FREQUENCIES}"), float(getattr(rotary, f"{prefix}attention_scaling"))


def sliding_window(where: torch.nn.Module | PreTrainedConfig) -> int | None:
    """The sliding window of an attention module or a config, in tokens."""
    window = getattr(where, "sliding_window", None)
    return None if window is None else int(window)


def layer_type(config: PreTrainedConfig, layer: int) -> str | None:
    """What kind of layer a config says it is, or None where all are alike."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    return kinds[layer] if kinds else None


def is_causal(attention: torch.nn.Module) -> bool:
    """Whether an attention module lets a token attend to those before it alone."""
    return bool(getattr(attention, "is_causal", True))


def uses_rope(attention: torch.nn.Module) -> bool:
    """Whether an attention module of SmolLM3 rotates its queries and keys."""
    return bool(attention.use_rope)
