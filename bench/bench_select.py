"""Selection against the machine's read bandwidth and against torch: un-rotated queries in, chosen chunks out.

The shape is Llama-3.2-3B's: 8 KV heads of 128, group 3; sketches of 16 directions at 4 bits, chunks of 32 tokens. Every
figure is GPU time from replays of a CUDA graph that cycles through sets of inputs, more than the 50 MB of L2 together.
"""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench.timing import microseconds
from kvtier.kernels.select import (
    SelectConfig,
    SelectWorkspace,
    SlabSummaries,
    chunk_weights,
    select_triton,
    sketch_scores,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HEADS, DIM, RANK, BITS, CHUNK = 8, 128, 16, 4, 32
CASES = {
    "select-mean-65536": ("mean", 65536, 64, 3),
    "select-mean-16384": ("mean", 16384, 64, 3),
    "select-sketch-131072": ("sketch", 131072, 111, 3),
    "select-prefill-131072": ("sketch", 131072, 111, 48),
}
"""Kind, chunks, select, query rows for each KV head."""


@dataclass
class Inputs:
    """One layer."""

    q: torch.Tensor
    summaries: SlabSummaries
    n_chunks: torch.Tensor
    work: SelectWorkspace

    def run(self, config: SelectConfig | None = None) -> torch.Tensor:
        return select_triton(self.q, self.summaries, self.n_chunks, self.work, config)[0]

    def by_torch(self) -> torch.Tensor:
        """The same with torch's operations."""
        codes = self.summaries.like
        if self.summaries.kind == "mean":
            scores = (self.q.to(codes[0].dtype) @ codes[0].transpose(1, 2)).float()
        else:
            assert self.summaries.basis is not None
            mean = self.q.new_zeros(HEADS, DIM)
            scores = sketch_scores(self.q, codes[0], codes[1], mean, self.summaries.basis, BITS)
        return chunk_weights(scores).topk(self.work.chosen.shape[1]).indices.sort(dim=-1).values


def make_inputs(case: str, seed: int) -> Inputs:
    kind, chunks, select, rows = CASES[case]
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    q = random(HEADS, rows, DIM) / DIM**0.5
    if kind == "mean":
        summaries = SlabSummaries.of(kind, (random(HEADS, chunks, DIM).bfloat16(),))
    else:
        size = (HEADS, chunks, CHUNK, RANK * BITS // 8)
        codes = torch.randint(256, size, generator=generator, device="cuda", dtype=torch.uint8)
        scale = (0.1 + random(HEADS, chunks, RANK).abs() / 10).bfloat16()
        basis = torch.linalg.qr(random(HEADS, DIM, RANK)).Q.contiguous()
        summaries = SlabSummaries.of(kind, (codes, scale), BITS, basis)
    n_chunks = torch.tensor([chunks], dtype=torch.int32, device="cuda")
    work = SelectWorkspace.new(HEADS, rows, chunks, select, q.device, RANK if kind == "sketch" else 0)
    return Inputs(q, summaries, n_chunks, work)


def nbytes(case: str) -> int:
    """What has to be read: the summaries, once (a prefill's second pass counts against it)."""
    kind, chunks, _, _ = CASES[case]
    return HEADS * chunks * (2 * DIM if kind == "mean" else CHUNK * RANK * BITS // 8 + 2 * RANK)


@functools.cache
def bandwidth() -> float:
    """Bytes a microsecond that this device reads: the better of a sum over, and (both ways) a copy of, 2 GiB."""
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    read = x.nbytes / microseconds([lambda: x.sum()], 1)
    return max(read, 2 * x.nbytes / microseconds([lambda: y.copy_(x)], 1))


@pytest.mark.parametrize("case", CASES)
def bench_select(benchmark: Any, figures: Any, case: str) -> None:
    sets = [make_inputs(case, seed) for seed in range(max(1, -(-(128 << 20) // nbytes(case))))]
    assert torch.equal(sets[0].run().long(), sets[0].run().long())
    ceiling = nbytes(case) / bandwidth()
    slow = case.startswith("select-prefill") or case.startswith("select-sketch")
    baseline = microseconds([x.by_torch for x in sets], rounds=1, replays=3 if slow else 15)
    value = microseconds([x.run for x in sets])
    benchmark.pedantic(sets[0].run, rounds=10, warmup_rounds=2)
    benchmark.extra_info.update(us=value, ceiling_us=ceiling, share=ceiling / value, torch_us=baseline)
    row = {"case": case, "value": value, "unit": "us", "ceiling": ceiling, "baseline": baseline}
    figures["kernels"].append({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
