"""Chunks between pinned host memory and the device pool, against a DMA copy; records; encoders of summaries.

The shape is Llama-3.2-3B's: chunks of 32 tokens of 128 dimensions in bf16, 16 KiB for K and V of one head; their int4
records are 5 KiB. Every figure is GPU time from replays of a CUDA graph; each launch in a graph has slots of its own,
spread over 1 GiB of pinned memory.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvtier.kernels.basis import fit_basis
from kvtier.kernels.gather import ALONE, BESIDE, HostSlots, fetch_chunks_triton, store_chunks_triton
from kvtier.kernels.quantize import dequantize_chunks, quantize_chunks_triton, record_bytes
from kvtier.kernels.summarize import Keys, Slabs, encode_sketch, encode_sketch_triton

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CHUNK, DIM, DTYPE = 32, 128, torch.bfloat16
CHUNK_BYTES = 2 * CHUNK * DIM * 2
HOST_BYTES, SLAB_BYTES = 1 << 30, 64 << 20
LAUNCHES = 8
Call = Callable[[], Any]


def capture(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """A graph of all calls, each made once before."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, replays: int = 11) -> float:
    """Median GPU time of a replay."""
    times = []
    for _ in range(replays + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000)
    return statistics.median(times[2:])


@dataclass
class Case:
    """``n`` chunks per launch, as they are or as records of ``bits`` bits, at random places of the host."""

    n: int
    bits: int | None
    item_bytes: int
    host: HostSlots
    pool: torch.Tensor
    """[n, 2, C, D]"""
    count: torch.Tensor
    slots: torch.Tensor
    """[n]"""
    places: torch.Tensor
    """[LAUNCHES, n]"""

    @property
    def launch_bytes(self) -> int:
        """Of the host, read or written by one launch."""
        return self.n * self.item_bytes


def make_case(n: int, bits: int | None) -> Case:
    torch.manual_seed(0)
    chunks = torch.randn(512, 2, CHUNK, DIM, dtype=DTYPE, device="cuda")
    items = (chunks if bits is None else quantize_chunks_triton(chunks, bits)).cpu()
    item_bytes = items[0].nbytes
    per_slab = SLAB_BYTES // item_bytes
    slabs = []
    for _ in range(HOST_BYTES // SLAB_BYTES):
        slab = torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=True)
        whole = slab[: per_slab * item_bytes].view(items.dtype).view(per_slab, *items.shape[1:])
        whole.copy_(items[torch.randint(512, (per_slab,))])
        slabs.append(whole)
    places = torch.stack([torch.randperm(per_slab * len(slabs))[:n] for _ in range(LAUNCHES)])
    pool = torch.full((n, 2, CHUNK, DIM), torch.nan, dtype=DTYPE, device="cuda")
    count = torch.tensor([n], dtype=torch.int32, device="cuda")
    slots = torch.randperm(n, device="cuda").int()
    return Case(n, bits, item_bytes, HostSlots.of(slabs, "cuda"), pool, count, slots, places.int().cuda())


def fetches(case: Case, n_programs: int) -> list[Call]:
    def call(places: torch.Tensor) -> None:
        fetch_chunks_triton(case.pool, case.slots, case.host, places, case.count, case.bits, n_programs)

    return [lambda p=places: call(p) for places in case.places]


def stores(case: Case, n_programs: int) -> list[Call]:
    def call(places: torch.Tensor) -> None:
        store_chunks_triton(case.pool, case.slots, case.host, places, case.count, case.bits, n_programs)

    return [lambda p=places: call(p) for places in case.places]


def expected(case: Case) -> torch.Tensor:
    """What the pool holds after the last of ``fetches``."""
    places = case.places[-1].tolist()
    items = torch.stack([case.host.slabs[p // case.host.per_slab][p % case.host.per_slab] for p in places])
    if case.bits is not None:
        items = dequantize_chunks(items, case.bits, CHUNK, DIM, DTYPE)
    pool = torch.empty_like(items)
    pool[case.slots.cpu().long()] = items
    return pool


def check_fetch(case: Case, n_programs: int) -> None:
    case.pool.fill_(torch.nan)
    fetches(case, n_programs)[-1]()
    assert torch.equal(case.pool.cpu(), expected(case))


def memcpy_gb_per_s(nbytes: int, to_host: bool = False) -> float:
    """Of contiguous copies of ``nbytes``, one after the other in a graph."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    source, target = (device, host) if to_host else (host, device)
    graph = capture([lambda: target.copy_(source, non_blocking=True)] * LAUNCHES)
    return LAUNCHES * nbytes / microseconds(graph) / 1e3


def torch_gather_gb_per_s(case: Case) -> float:
    """``index_select`` into a pinned buffer by the CPU, one copy to the device; the indices are on the host already."""
    slab = case.host.slabs[0]
    staging = torch.empty((case.n, *slab.shape[1:]), dtype=slab.dtype, pin_memory=True)
    target = torch.empty_like(staging, device="cuda")
    indices = [torch.randperm(len(slab))[: case.n] for _ in range(12)]
    times = []
    for index in indices:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        torch.index_select(slab, 0, index, out=staging)
        target.copy_(staging, non_blocking=True)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return case.launch_bytes / statistics.median(times[2:]) / 1e6


def keep(figures: Any, case: str, value: float, unit: str, ceiling: float | None, baseline: float | None) -> None:
    numbers = {"value": value, "ceiling": ceiling, "baseline": baseline}
    rounded = {name: None if number is None else round(number, 3) for name, number in numbers.items()}
    share = None if not ceiling else round((value / ceiling if "GB/s" in unit else ceiling / value), 3)
    figures["kernels"].append({"case": case, "unit": unit, "share": share, **rounded})


@pytest.mark.parametrize(("n", "bits"), [(512, None), (512, 8), (512, 4), (2048, 4)])
def bench_gather(benchmark: Any, figures: Any, n: int, bits: int | None) -> None:
    """Source bytes per second with the device idle; 512 int4 records are 2.5 MiB, and 1,639 are 8 MiB."""
    case = make_case(n, bits)
    check_fetch(case, ALONE)
    ceiling = memcpy_gb_per_s(case.launch_bytes)
    graph = capture(fetches(case, ALONE))
    value = LAUNCHES * case.launch_bytes / microseconds(graph) / 1e3
    benchmark.pedantic(lambda: (graph.replay(), torch.cuda.synchronize()), rounds=10, warmup_rounds=2)
    benchmark.extra_info["GB/s"] = value
    name = f"gather-{n}x16k" + ("" if bits is None else f"-int{bits}")
    keep(figures, name, value, "GB/s of source bytes", ceiling, torch_gather_gb_per_s(case))


@pytest.mark.parametrize("bits", [None, 4])
def bench_store(benchmark: Any, figures: Any, bits: int | None) -> None:
    """Bytes written to the host per second; with records the pool is rewritten too."""
    case = make_case(512, bits)
    case.pool.normal_()
    ceiling = memcpy_gb_per_s(case.launch_bytes, to_host=True)
    graph = capture(stores(case, ALONE))
    value = LAUNCHES * case.launch_bytes / microseconds(graph) / 1e3
    benchmark.pedantic(lambda: (graph.replay(), torch.cuda.synchronize()), rounds=10, warmup_rounds=2)
    keep(figures, "store-512x16k" + ("" if bits is None else f"-int{bits}"), value, "GB/s", ceiling, None)


class Beside:
    """A memory-bound product, and something on a second stream with priority, in one graph: a fork and a join."""

    def __init__(self, compute_ms: float) -> None:
        self.x = torch.randn(1, 3072, dtype=DTYPE, device="cuda")
        self.weights = [torch.randn(3072, 16384, dtype=DTYPE, device="cuda") for _ in range(10)]
        self.side = torch.cuda.Stream(priority=-1)
        once = microseconds(capture(self.products(10)))
        self.compute = self.products(max(10, round(10 * compute_ms * 1000 / once)))
        self.compute_us = microseconds(capture(self.compute))

    def products(self, n: int) -> list[Call]:
        return [lambda i=i: self.x @ self.weights[i % 10] for i in range(n)]

    def ratio(self, calls: list[Call]) -> tuple[float, float]:
        """Time of both over that of the longer one alone, and the time of ``calls`` alone in us."""
        alone_us = microseconds(capture(calls))

        def both() -> None:
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                for call in calls:
                    call()
            for product in self.compute:
                product()
            main.wait_stream(self.side)

        return microseconds(capture([both])) / max(self.compute_us, alone_us), alone_us


@pytest.mark.parametrize("bits", [None, 4])
def bench_gather_overlap(benchmark: Any, figures: Any, bits: int | None) -> None:
    """Baseline: DMA copies of as many contiguous bytes in place of the gather. No host could issue those by itself."""
    case = make_case(512, bits)
    check_fetch(case, BESIDE)
    calls = fetches(case, BESIDE) * (4 if bits is None else 12)
    beside = Beside(microseconds(capture(calls)) / 1000)
    value, alone_us = beside.ratio(calls)
    host = torch.empty(case.launch_bytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    baseline, _ = beside.ratio([lambda: device.copy_(host, non_blocking=True)] * len(calls))
    graph = capture(calls)
    benchmark.pedantic(lambda: (graph.replay(), torch.cuda.synchronize()), rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(compute_us=beside.compute_us, gather_us=alone_us, ratio=value)
    keep(figures, "gather-overlap" + ("" if bits is None else f"-int{bits}"), value, "ratio", 1.0, baseline)


def sketch_call(layers: int, heads: int, m: int) -> tuple[Call, Call, int]:
    """Sketches of ``m`` chunks of every layer and head: our launch, torch's, and the bytes to move."""
    rows, rank, per_slab = layers * heads, 16, 128
    ring = torch.randn(rows, 32 + 3104 + 1024, DIM, dtype=DTYPE, device="cuda")
    every_way = torch.eye(DIM, device="cuda").expand(rows, -1, -1)
    mean, basis, _ = fit_basis(ring[:, :256], every_way, rank)
    codes = torch.empty(layers, heads, per_slab, CHUNK, rank // 2, dtype=torch.uint8, device="cuda")
    scales = torch.empty(layers, heads, per_slab, rank, dtype=torch.bfloat16, device="cuda")
    tables = tuple(torch.tensor([[t.data_ptr()] for t in x], device="cuda") for x in (codes, scales))
    first, count = (torch.tensor([x], dtype=torch.int32, device="cuda") for x in (0, m))
    keys, slabs = Keys(ring, 32, CHUNK, m, first, count), Slabs(tables, heads, per_slab)
    lone = ring[:, 32 : 32 + m * CHUNK].unflatten(1, (m, CHUNK))
    nbytes = lone.nbytes + basis.nbytes + rows * m * (CHUNK * rank // 2 + 2 * rank)
    return (
        lambda: encode_sketch_triton(keys, mean, basis, 4, slabs),
        lambda: encode_sketch(lone, mean, basis, 4),
        nbytes,
    )


def device_bytes_per_us() -> float:
    """Of device memory: read and written by a copy of 1 GiB."""
    source = torch.randint(0, 100, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(capture([lambda: target.copy_(source)]))


@pytest.mark.parametrize(("layers", "m"), [(1, 32), (28, 1)], ids=["a block", "a step"])
def bench_summarize(benchmark: Any, figures: Any, layers: int, m: int) -> None:
    """A block of 1,024 tokens of a layer; one chunk of each of 28 layers. Inputs may stay in the L2 cache."""
    ours, theirs, nbytes = sketch_call(layers, 8, m)
    value, baseline = (microseconds(capture([call] * 8)) / 8 for call in (ours, theirs))
    benchmark.pedantic(ours, rounds=10, warmup_rounds=2)
    keep(figures, f"summarize-sketch-{layers}x{m}", value, "us", nbytes / device_bytes_per_us(), baseline)


def bench_quantize(benchmark: Any, figures: Any) -> None:
    """Int4 records of 4,096 chunks in device memory: 64 MiB read, 20 MiB written."""
    chunks = torch.randn(4096, 2, CHUNK, DIM, dtype=DTYPE, device="cuda")
    out = torch.empty(4096, record_bytes(CHUNK, DIM, 4), dtype=torch.uint8, device="cuda")
    value = microseconds(capture([lambda: quantize_chunks_triton(chunks, 4, out)] * 4)) / 4
    benchmark.pedantic(lambda: quantize_chunks_triton(chunks, 4, out), rounds=10, warmup_rounds=2)
    keep(figures, "quantize-4096x16k", value, "us", (chunks.nbytes + out.nbytes) / device_bytes_per_us(), None)
