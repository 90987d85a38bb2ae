"""The few places where kvtier touches what transformers does not promise, or what its versions name differently."""

import inspect
from collections.abc import Callable
from typing import Any

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
