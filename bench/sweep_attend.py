"""Times configurations of the attention kernels: ``python -m bench.sweep_attend``, on a GPU.

Prints a table, the fastest first per kernel; writes all of it to $OUT/sweep_attend.json, if OUT is set.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.bench_attend import (
    ATTENDED,
    CHUNK,
    HEADS,
    KV_HEADS,
    LOGITS,
    Inputs,
    bytes_per_second,
    decode_calls,
    flash_calls,
    make_inputs,
    microseconds,
    prefill_calls,
    prefill_torch_calls,
    scratch,
    torch_decode_calls,
    workspace,
)
from kvtier.kernels.assemble import assemble_triton
from kvtier.kernels.attend_decode import DecodeConfig
from kvtier.kernels.attend_prefill import FlashConfig, flash_torch

DECODE = [
    (32, 4, 4, 3),
    (32, 4, 4, 2),
    (32, 4, 3, 3),
    (32, 4, 5, 2),
    (32, 4, 5, 3),
    (32, 4, 3, 2),
    (64, 4, 3, 2),
    (64, 4, 2, 2),
    (64, 8, 3, 1),
    (64, 8, 3, 2),
    (32, 8, 4, 2),
    (32, 8, 4, 3),
    (32, 2, 4, 3),
    (16, 2, 6, 5),
    (16, 4, 5, 4),
]
FLASH = [
    (128, 64, 8, 2),
    (64, 64, 4, 2),
    (64, 32, 4, 3),
    (64, 32, 4, 4),
    (64, 64, 4, 1),
    (128, 32, 8, 3),
    (128, 64, 4, 2),
]
ASSEMBLE = [(32, 2, 4), (32, 1, 4), (32, 4, 4), (64, 2, 8), (16, 4, 4)]
"""Tokens, heads, warps."""


def close(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS error."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def tried(kernel: str, config: Any, run: Callable[[], tuple[float, float]]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        us, error = run()
    except Exception as problem:  # a configuration that does not fit is a result
        return {"kernel": kernel, "config": list(config), "us": None, "error": None, "why": repr(problem)[:200]}
    seconds = time.perf_counter() - start
    return {"kernel": kernel, "config": list(config), "us": us, "error": error, "seconds": seconds}


def sweep_decode(inputs: list[Inputs]) -> Iterator[dict[str, Any]]:
    expected = torch_decode_calls(inputs)[0]().view(HEADS, -1)
    yield tried("decode torch folded", (), lambda: (microseconds(torch_decode_calls(inputs)), 0.0))

    def grouped(x: Inputs) -> torch.Tensor:
        q = x.turned_q[None]
        return F.scaled_dot_product_attention(q, x.keys[None], x.values[None], scale=LOGITS.scaling, enable_gqa=True)

    calls = [lambda x=x: grouped(x) for x in inputs]
    yield tried("decode torch gqa", (), lambda: (microseconds(calls), 0.0))
    for config in DECODE:

        def run(config: tuple[int, ...] = config) -> tuple[float, float]:
            ours = decode_calls(inputs, workspace(DecodeConfig(*config)))
            return microseconds(ours), close(ours[0]()[0], expected)

        yield tried("decode", config, run)


def sweep_prefill(inputs: list[Inputs]) -> Iterator[dict[str, Any]]:
    space = scratch()
    theirs = [lambda x=x: flash_torch(x.turned_q, x.keys, x.values, LOGITS.scaling) for x in inputs]
    expected = theirs[0]()
    yield tried("prefill torch flash", (), lambda: (microseconds(theirs, 2), 0.0))
    mask = torch.ones(1024, ATTENDED, dtype=torch.bool, device="cuda").tril(ATTENDED - 1024)

    def masked(x: Inputs) -> torch.Tensor:
        q, k, v = x.turned_q[None], x.keys[None], x.values[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=LOGITS.scaling, enable_gqa=True)

    masked_calls = [lambda x=x: masked(x) for x in inputs]
    yield tried(
        "prefill torch mask", (), lambda: (microseconds(masked_calls, 1), close(masked_calls[0]()[0], expected))
    )

    def cudnn(x: Inputs) -> Any:  # no mask: what a split into past and block would cost at least
        q, k, v = x.turned_q[None], x.keys[None], x.values[None]
        args = (q, k, v, None, True, 0.0, False, False)
        return torch.ops.aten._scaled_dot_product_cudnn_attention(*args, scale=LOGITS.scaling)

    cudnn_calls = [lambda x=x: cudnn(x) for x in inputs]
    yield tried("prefill cudnn, no mask", (), lambda: (microseconds(cudnn_calls, 2), 0.0))
    for config in FLASH:

        def run(config: tuple[int, ...] = config) -> tuple[float, float]:
            ours = flash_calls(inputs, FlashConfig(*config))
            return microseconds(ours, 2), close(ours[0](), expected)

        yield tried("prefill flash", config, run)
    for tile, heads, warps in ASSEMBLE:

        def lay(tile: int = tile, heads: int = heads, warps: int = warps) -> tuple[float, float]:
            def call(x: Inputs) -> None:
                turned = torch.empty_like(x.turned_q)
                options = {"tile": tile, "heads": heads, "warps": warps}
                assemble_triton(x.sources, x.cos, x.sin, space[0], space[1], x.new, x.q, turned, **options)

            us = microseconds([lambda x=x: call(x) for x in inputs])
            space.fill_(float("nan"))
            call(inputs[0])
            return us, close(space[0], inputs[0].keys)

        yield tried("assemble", (tile, heads, warps), lay)
    ours, mixed = prefill_calls(inputs, space), prefill_torch_calls(inputs, space)
    yield tried("prefill assemble + our flash", (), lambda: (microseconds(ours, 2), close(ours[0](), expected)))
    yield tried("prefill assemble + torch", (), lambda: (microseconds(mixed, 2), close(mixed[0](), expected)))


def main() -> None:
    start = time.perf_counter()
    ceiling = 2 * KV_HEADS * ATTENDED * 256 / bytes_per_second() * 1e6
    rows = list(sweep_decode([make_inputs(1, seed) for seed in range(6)]))
    rows += list(sweep_prefill([make_inputs(1024, seed) for seed in range(3)]))
    if folder := os.environ.get("OUT"):
        Path(folder, "sweep_attend.json").write_text(json.dumps(rows, indent=1))
    print(f"{torch.cuda.get_device_name()}, chunks of {CHUNK}, decode ceiling {ceiling:.1f} us")
    for row in sorted(rows, key=lambda row: (row["kernel"], row["us"] or 1e9)):
        took = "failed: " + row["why"] if row["us"] is None else f"{row['us']:8.2f} us  error {row['error']:.1e}"
        print(f"{row['kernel']:30} {tuple(row['config'])!s:18} {took}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
