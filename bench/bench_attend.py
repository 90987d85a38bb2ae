"""Attention kernels against the machine's ceiling and torch's own attention on contiguous, rotated operands.

The shape is Llama-3.2-3B's: 24/8 heads of 128, bf16. Every figure is GPU time from replays of a CUDA graph that cycles
through several sets of inputs, more than the 50 MB of L2 together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.timing import microseconds
from kvtier.kernels.assemble import Sources, assemble_triton, gather_attended, ring_offsets
from kvtier.kernels.attend import Logits, rotate
from kvtier.kernels.attend_decode import DecodeConfig, DecodeWorkspace, attend_decode_triton
from kvtier.kernels.attend_prefill import attend_prefill_triton, flash_torch, flash_triton

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HEADS, KV_HEADS, DIM = 24, 8, 128
SINK, CHUNK, SELECT, LOCAL = 32, 32, 160, 3040
ATTENDED = SINK + SELECT * CHUNK + LOCAL
"""8,192"""
LOGITS = Logits(DIM**-0.5)


@dataclass
class Inputs:
    """One layer: sources, a block of queries, and what torch's attention would be given."""

    sources: Sources
    cos: torch.Tensor
    sin: torch.Tensor
    q: torch.Tensor
    """[H, b, D]"""
    new: tuple[torch.Tensor, torch.Tensor]
    """[N, b, D] each"""
    turned_q: torch.Tensor
    keys: torch.Tensor
    """[N, 8192, D], rotated and contiguous"""
    values: torch.Tensor


def make_inputs(block: int, seed: int) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    capacity = LOCAL + CHUNK - 1 + block
    ring = random(2, KV_HEADS, SINK + capacity, DIM)
    n_slots = 2 * KV_HEADS * SELECT
    pool = random(n_slots, 2, CHUNK, DIM)
    slots = torch.randperm(n_slots, generator=generator, device="cuda")[: KV_HEADS * SELECT].int()
    begin = SINK + 1000 * CHUNK
    lengths = torch.tensor([[SINK, SELECT, begin, begin + LOCAL]], dtype=torch.int32, device="cuda")
    sources = Sources([ring], ring_offsets([ring]), SINK, lengths, pool, slots.view(1, KV_HEADS, SELECT))
    frequencies = 500000.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64, device="cuda") / DIM)
    angles = torch.arange(ATTENDED, dtype=torch.float64, device="cuda")[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=1)
    cos, sin = angles.cos().float(), angles.sin().float()
    q = random(block, HEADS, DIM).transpose(0, 1)
    new = tuple(random(block, KV_HEADS, DIM).transpose(0, 1) for _ in range(2))
    keys, values = gather_attended(sources, 0, (new[0], new[1]))
    turned_q = rotate(q, cos[-block:], sin[-block:]).contiguous()
    keys = rotate(keys, cos, sin)
    return Inputs(sources, cos, sin, q, (new[0], new[1]), turned_q, keys.contiguous(), values.contiguous())


def bytes_per_second() -> float:
    """Of device memory: read and written by a copy of 1 GiB."""
    source = torch.randint(0, 100, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: target.copy_(source)], rounds=2, replays=8) * 1e6


def operations_per_second() -> float:
    """Of a product of two bf16 matrices [8192, 8192]."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / microseconds([lambda: a @ b], rounds=2, replays=8) * 1e6


def workspace(config: DecodeConfig | None = None) -> DecodeWorkspace:
    device = torch.device("cuda")
    return DecodeWorkspace.empty(1, HEADS, KV_HEADS, DIM, ATTENDED, torch.bfloat16, device, config)


def decode_calls(inputs: list[Inputs], space: DecodeWorkspace) -> list[Callable[[], torch.Tensor]]:
    def call(x: Inputs) -> torch.Tensor:
        q, new = x.q.view(1, HEADS, DIM), (x.new[0].view(1, KV_HEADS, DIM), x.new[1].view(1, KV_HEADS, DIM))
        return attend_decode_triton(q, x.sources, x.cos, x.sin, LOGITS, new, workspace=space)

    return [lambda x=x: call(x) for x in inputs]


def torch_decode_calls(inputs: list[Inputs]) -> list[Callable[[], torch.Tensor]]:
    def call(x: Inputs) -> torch.Tensor:
        folded = x.turned_q.view(1, KV_HEADS, HEADS // KV_HEADS, DIM)
        return F.scaled_dot_product_attention(folded, x.keys[None], x.values[None], scale=LOGITS.scaling)

    return [lambda x=x: call(x) for x in inputs]


def prefill_calls(inputs: list[Inputs], scratch: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    def call(x: Inputs) -> torch.Tensor:
        return attend_prefill_triton(x.q, x.sources, x.cos, x.sin, LOGITS, x.new, scratch=scratch)

    return [lambda x=x: call(x) for x in inputs]


def prefill_torch_calls(inputs: list[Inputs], scratch: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """Assembled by our kernel, attended by torch's flash attention."""

    def call(x: Inputs) -> torch.Tensor:
        turned = torch.empty_like(x.turned_q)
        assemble_triton(x.sources, x.cos, x.sin, scratch[0], scratch[1], x.new, x.q, turned)
        return flash_torch(turned, scratch[0, :, :ATTENDED], scratch[1, :, :ATTENDED], LOGITS.scaling)

    return [lambda x=x: call(x) for x in inputs]


def scratch() -> torch.Tensor:
    return torch.empty(2, KV_HEADS, ATTENDED, DIM, dtype=torch.bfloat16, device="cuda")


def keep(figures: dict[str, list[dict[str, Any]]], case: str, value: float, ceiling: float, baseline: float) -> None:
    rounded = {"value": round(value, 2), "ceiling": round(ceiling, 2), "baseline": round(baseline, 2)}
    figures["kernels"].append({"case": case, "unit": "us", **rounded, "ratio": round(value / baseline, 3)})


def bench_attend_decode(benchmark: Any, figures: Any) -> None:
    """One token over 8,192 tokens: 33.6 MB of K and V. Torch: sdpa, the group's heads as queries."""
    inputs = [make_inputs(1, seed) for seed in range(6)]
    x = inputs[0]
    ceiling = (x.keys.nbytes + x.values.nbytes) / bytes_per_second() * 1e6
    ours = decode_calls(inputs, workspace())
    torch.testing.assert_close(ours[0]().flatten(), torch_decode_calls(inputs)[0]().flatten(), atol=4e-3, rtol=2e-2)
    value, baseline = microseconds(ours), microseconds(torch_decode_calls(inputs))
    benchmark.pedantic(ours[0], rounds=20, warmup_rounds=3)
    benchmark.extra_info["us in a graph"] = value
    keep(figures, "attend-decode-8192", value, ceiling, baseline)


def bench_attend_prefill(benchmark: Any, figures: Any) -> None:
    """A block of 1,024 tokens over 8,192. Torch: flash, bottom-right causal, on operands that it finds assembled."""
    inputs, space = [make_inputs(1024, seed) for seed in range(3)], scratch()
    visible = 1024 * (ATTENDED - 1024) + 1024 * 1025 // 2
    ceiling = 4 * visible * HEADS * DIM / operations_per_second() * 1e6
    ours = prefill_calls(inputs, space)
    theirs = [lambda x=x: flash_torch(x.turned_q, x.keys, x.values, LOGITS.scaling) for x in inputs]
    torch.testing.assert_close(ours[0](), theirs[0](), atol=4e-3, rtol=2e-2)
    value, baseline = microseconds(ours), microseconds(theirs)
    benchmark.pedantic(ours[0], rounds=10, warmup_rounds=2)
    benchmark.extra_info["us in a graph"] = value
    keep(figures, "attend-prefill-1024x8192", value, ceiling, baseline)
    value = microseconds(prefill_torch_calls(inputs, space))
    keep(figures, "attend-prefill-1024x8192-torch-flash", value, ceiling, baseline)


def bench_assemble(benchmark: Any, figures: Any) -> None:
    """The first launch of a prefill step: 33.6 MB read and written. No torch baseline; today's path is ~30 launches."""
    inputs, space = [make_inputs(1024, seed) for seed in range(3)], scratch()
    calls = [lambda x=x: assemble_triton(x.sources, x.cos, x.sin, *space, x.new, x.q, x.turned_q) for x in inputs]
    value, ceiling = microseconds(calls), 2 * space.nbytes / bytes_per_second() * 1e6
    benchmark.pedantic(calls[0], rounds=10, warmup_rounds=2)
    row = {"case": "assemble-8192", "value": round(value, 2), "unit": "us", "ceiling": round(ceiling, 2)}
    figures["kernels"].append(row)


def flash_calls(inputs: list[Inputs], config: Any) -> list[Callable[[], torch.Tensor]]:
    def call(x: Inputs) -> torch.Tensor:
        lengths = x.sources.lengths[0]
        return flash_triton(x.turned_q, x.keys, x.values, lengths, CHUNK, LOGITS, config=config)

    return [lambda x=x: call(x) for x in inputs]
