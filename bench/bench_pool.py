"""``pool-alloc``: seconds that a GiB of the host pool's memory costs until it can be used, beside torch's allocators.

Pinned memory on a GPU, else plain memory with its first touch. The ceiling is one memset of a GiB: the kernel hands out
zeros. With a GPU there are also slabs of other sizes, and slabs that nobody touched before they were registered: what
``SLAB_BYTES`` and ``host_memory._touch`` rest on.

    python -m pytest bench/bench_pool.py -m "not gpu"       (with a GPU: -m "")
"""

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kvtier.runtime import host_memory
from kvtier.runtime.host_memory import HostBlock, allocate
from kvtier.runtime.host_pool import SLAB_BYTES

GIB, MIB = 2**30, 2**20
ROUNDS = 7
CUDA = torch.cuda.is_available()


def timed(get: Callable[[list[Any]], None], give_back: Callable[[list[Any]], None]) -> tuple[float, float]:
    """Least seconds of filling a list with a GiB of memory, and of emptying it: what others do here only adds to them.

    The first time does not count: a virtual machine may have to ask for its memory then.
    """
    seconds = []
    for _ in range(ROUNDS + 1):
        held: list[Any] = []
        times = [time.perf_counter()]
        for call in (get, give_back):
            call(held)
            times.append(time.perf_counter())
        seconds.append((times[1] - times[0], times[2] - times[1]))
    there, back = zip(*seconds[1:], strict=True)
    return min(there), min(back)


def get_slabs(slab_bytes: int, pin: bool) -> Callable[[list[HostBlock]], None]:
    """The pool's; plain ones are written once."""

    def get(held: list[HostBlock]) -> None:
        for _ in range(GIB // slab_bytes):
            held.append(allocate(slab_bytes, pin=pin))
            if not pin:
                held[-1].data.zero_()

    return get


def release_slabs(held: list[HostBlock]) -> None:
    for block in held:
        block.release()


def get_from_torch(held: list[torch.Tensor]) -> None:
    """A GiB in one piece: a power of two, which torch's pinned allocator does not round up."""
    held.append(torch.empty(GIB, dtype=torch.uint8, pin_memory=CUDA))
    if not CUDA:
        held[0].zero_()


def forget_what_torch_gave(held: list[torch.Tensor]) -> None:
    held.clear()
    if CUDA:
        torch._C._host_emptyCache()  # it keeps pinned memory for the next caller


def memset_seconds() -> float:
    """Of a GiB that is there already."""
    piece = torch.zeros(GIB, dtype=torch.uint8)
    return timed(lambda _: piece.zero_(), lambda _: None)[0]


def keep(figures: dict[str, list[dict[str, Any]]], case: str, value: float, **more: Any) -> None:
    figures["tiers"].append({"case": case, "value": round(value, 4), "unit": "s/GiB"} | more)


def bench_pool_alloc(benchmark: Any, figures: Any) -> None:
    """The pool's slabs, pinned where there is a GPU; giving them back."""
    ceiling = round(memset_seconds(), 4)
    torchs, _ = timed(get_from_torch, forget_what_torch_gave)
    ours, back = benchmark.pedantic(timed, args=(get_slabs(SLAB_BYTES, CUDA), release_slabs), rounds=1)
    kind = {"pinned": CUDA, "slab_mib": SLAB_BYTES // MIB}
    keep(figures, "pool-alloc", ours, ceiling=ceiling, baseline=round(torchs, 4), ratio=round(ours / torchs, 3), **kind)
    keep(figures, "pool-alloc-torch", torchs, ceiling=ceiling, pinned=CUDA)
    keep(figures, "pool-release", back, **kind)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("slab_mib", [4, 16, 256])
def bench_slabs_of_another_size(benchmark: Any, figures: Any, slab_mib: int) -> None:
    value, _ = benchmark.pedantic(timed, args=(get_slabs(slab_mib * MIB, True), release_slabs), rounds=1)
    keep(figures, f"pool-alloc-{slab_mib}mib", value, pinned=True, slab_mib=slab_mib)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def bench_untouched_slabs(benchmark: Any, figures: Any) -> None:
    """Registering alone, which has one thread provide the pages."""
    with patch.object(host_memory, "_touch", lambda pages: None):
        value, _ = benchmark.pedantic(timed, args=(get_slabs(SLAB_BYTES, True), release_slabs), rounds=1)
    keep(figures, "pool-alloc-untouched", value, pinned=True, slab_mib=SLAB_BYTES // MIB)
