"""Triton where it is installed, a stand-in where it is not, and who runs what.

Kernel files import ``tl`` and ``jit`` from here, so that they can be read without Triton: the torch twins run then.
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = SimpleNamespace(constexpr=Any)

__all__ = ["INTERPRETED", "jit", "n_processors", "runs_triton", "tl", "triton"]

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on the CPU, for tests."""


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, or the function itself where there is no Triton and nobody will call it."""
    return function if triton is None else triton.jit(function)


def runs_triton(x: torch.Tensor) -> bool:
    """Whether the runtime uses Triton kernels for ``x``; otherwise it uses the torch twins."""
    return triton is not None and x.is_cuda


@functools.cache
def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 4 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
