"""kernels/gather.py: chunks between pinned host memory and the device pool, in torch and in Triton, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import gather, quantize
from kvtier.kernels.backend import INTERPRETED
from kvtier.kernels.gather import (
    HostSlots,
    fetch_chunks,
    fetch_chunks_triton,
    gather_chunks,
    retire_chunks,
    retire_chunks_triton,
    store_chunks,
    store_chunks_triton,
)
from kvtier.kernels.quantize import quantize_chunks, record_bytes

CUDA = torch.cuda.is_available()
if INTERPRETED:
    from interpreter import repair

    repair()

gpu_only = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]
FORMS = [None, 8, 4]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(32, 64), (8, 80), (5, 6), (3, 33)]
PER_SLAB, N_SLABS, N_SLOTS = 5, 3, 7


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
        pytest.param("cuda", marks=gpu_only),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def host_slots(chunk, dim, dtype, bits, device, per_slab=PER_SLAB, n_slabs=N_SLABS):
    """Slabs of random chunks or of their records; the last one is shorter."""
    slabs = []
    for i in range(n_slabs):
        x = torch.randn(per_slab - (i == n_slabs - 1), 2, chunk, dim).to(dtype)
        x = x if bits is None else quantize_chunks(x, bits)
        slabs.append(x.pin_memory() if device == "cuda" else x)
    return HostSlots.of(slabs, device)


def check_fetch(chunk, dim, dtype, bits, device, n_programs=3, count=4, n_slots=N_SLOTS):
    host = host_slots(chunk, dim, dtype, bits, device)
    places = torch.randint(PER_SLAB * N_SLABS - 1, (n_slots,), dtype=torch.int32)
    slots = torch.randperm(n_slots).to(torch.int32)
    expected = torch.full((n_slots, 2, chunk, dim), torch.nan, dtype=dtype)
    fetch_chunks(expected, slots, host, places, torch.tensor([count]), bits)
    pool = torch.full_like(expected, torch.nan, device=device)
    fetch_chunks_triton(pool, slots.to(device), host, places.to(device), ints([count], device), bits, n_programs)
    assert torch.equal(pool.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert pool.isnan().flatten(1).any(1).sum() == n_slots - count


def check_store(chunk, dim, dtype, bits, device, n_programs=3, count=4):
    host = host_slots(chunk, dim, dtype, bits, device)
    before = [slab.clone() for slab in host.slabs]
    pool = torch.randn(N_SLOTS, 2, chunk, dim).to(dtype)
    places = torch.randperm(PER_SLAB * N_SLABS - 1)[:N_SLOTS].to(torch.int32)
    slots = torch.randperm(N_SLOTS).to(torch.int32)
    twin, expected = HostSlots([slab.clone() for slab in before], host.table, PER_SLAB), pool.clone()
    store_chunks(expected, slots, twin, places, torch.tensor([count]), bits)
    pool = pool.to(device)
    store_chunks_triton(pool, slots.to(device), host, places.to(device), ints([count], device), bits, n_programs)
    assert torch.equal(pool.cpu(), expected)
    for ours, theirs in zip(host.slabs, twin.slabs, strict=True):
        assert torch.equal(ours, theirs)
    changed = sum(int((a != b).flatten(1).any(1).sum()) for a, b in zip(host.slabs, before, strict=True))
    assert changed == count


# -- torch -------------------------------------------------------------------------------------------------------------


def test_gather_chunks_lays_out_heads():
    pool = torch.randn(6, 2, 4, 8)
    slots = torch.tensor([[5, 0, 2], [1, 1, 4]])
    keys, values = torch.full((2, 2, 12, 8), torch.nan)
    gather_chunks(pool, slots, keys, values)
    for head in range(2):
        assert torch.equal(keys[head], pool[slots[head], 0].flatten(0, 1))
        assert torch.equal(values[head], pool[slots[head], 1].flatten(0, 1))


@pytest.mark.parametrize("bits", FORMS)
def test_what_is_stored_comes_back(bits):
    """With records the pool already holds what will be fetched."""
    pool = torch.randn(N_SLOTS, 2, 8, 40)
    host = host_slots(8, 40, torch.float32, bits, "cpu")
    slots, places, count = ints([3, 1, 6], "cpu"), ints([13, 0, 5], "cpu"), ints([3], "cpu")
    original = pool.clone()
    store_chunks(pool, slots, host, places, count, bits)
    assert torch.equal(pool, original) == (bits is None)
    fetched = torch.full_like(pool, torch.nan)
    fetch_chunks(fetched, slots, host, places, count, bits)
    assert torch.equal(fetched[slots], pool[slots])
    assert torch.equal(pool[[0, 2, 4, 5]], original[[0, 2, 4, 5]])


# -- Triton ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", FORMS)
@pytest.mark.parametrize(("chunk", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fetch_agrees_bit_for_bit(device, chunk, dim, dtype, bits):
    check_fetch(chunk, dim, dtype, bits, device)


@pytest.mark.parametrize("bits", FORMS)
@pytest.mark.parametrize(("chunk", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_agrees_bit_for_bit(device, chunk, dim, dtype, bits):
    check_store(chunk, dim, dtype, bits, device)


@pytest.mark.parametrize("bits", FORMS)
@pytest.mark.parametrize("count", [0, 1, N_SLOTS])
@pytest.mark.parametrize("n_programs", [1, 16])
def test_any_count_and_any_number_of_programs(device, bits, count, n_programs):
    check_fetch(4, 16, torch.float32, bits, device, n_programs, count)
    check_store(4, 16, torch.float32, bits, device, n_programs, count)


@settings(max_examples=15, deadline=None)
@given(
    chunk=st.integers(1, 9),
    dim=st.integers(1, 70),
    bits=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
    n_programs=st.integers(1, 5),
    count=st.integers(0, 3),
)
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_fetch_agrees_on_any_shape(chunk, dim, bits, dtype, n_programs, count):
    check_fetch(chunk, dim, dtype, bits, "cpu", n_programs, count)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("chunk", "dim"), [(8, 64), (5, 6)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retire_agrees(device, chunk, dim, dtype, each):
    """The ring wraps in the middle of a chunk."""
    rows, sink, m = 3, 2, 2
    ring = torch.randn(2, rows, sink + 3 * chunk - 1, dim).to(dtype)
    first = ints([7, 0, 1000] if each else [8], "cpu")
    count = ints([1, 2, 0] if each else [2], "cpu")
    slots = torch.randperm(8)[: rows * m].view(rows, m).to(torch.int32)
    expected = torch.full((8, 2, chunk, dim), torch.nan, dtype=dtype)
    retire_chunks(ring, sink, first, count, expected, slots)
    pool = torch.full_like(expected, torch.nan, device=device)
    retire_chunks_triton(ring.to(device), sink, first.to(device), count.to(device), pool, slots.to(device))
    assert torch.equal(pool.cpu().view(torch.uint8), expected.view(torch.uint8))


def launch_all(shapes=((32, 128),)):
    """Every kernel of gather and quantize; ``compile_only`` runs this."""
    for chunk, dim in shapes:
        pool = torch.empty(4, 2, chunk, dim, dtype=torch.bfloat16)
        one = ints([1], "cpu")
        for bits in FORMS:
            shape = pool.shape if bits is None else (4, record_bytes(chunk, dim, bits))
            host = HostSlots.of([torch.empty(shape, dtype=pool.dtype if bits is None else torch.uint8)], "cpu")
            fetch_chunks_triton(pool, one, host, one, one, bits)
            store_chunks_triton(pool, one, host, one, one, bits)
        retire_chunks_triton(torch.empty(2, 1, 32 + 4096, dim, dtype=pool.dtype), 32, one, one, pool, one[None])


def launch_other_shapes():
    launch_all(((32, 64), (32, 80), (32, 96), (32, 256), (8, 64), (128, 128)))


@pytest.mark.parametrize(
    ("capability", "function"),
    [
        (89, "launch_all"),
        pytest.param(90, "launch_all", marks=pytest.mark.slow),
        pytest.param(89, "launch_other_shapes", marks=pytest.mark.slow),
        pytest.param(90, "launch_other_shapes", marks=pytest.mark.slow),
    ],
)
def test_shared_memory_fits_every_device(capability, function):
    pytest.importorskip("triton")
    here = Path(__file__).parent
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}
    command = [sys.executable, "-m", "compile_only", str(capability), "test_kernel_gather", function]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {kernel for kernel, _ in found} == {"_copy_kernel", "dequantize_kernel", "quantize_kernel", "_retire_kernel"}
    assert max(shared for _, shared in found) <= 99 << 10


# -- on the GPU alone --------------------------------------------------------------------------------------------------


class TestOnGpu:
    pytestmark = gpu_only

    @pytest.mark.parametrize("bits", FORMS)
    @pytest.mark.parametrize("n_programs", [8, 64, 264])
    @pytest.mark.parametrize(("chunk", "dim"), [(32, 64), (32, 80), (32, 96), (32, 128), (32, 256), (128, 128)])
    def test_many_chunks(self, chunk, dim, bits, n_programs):
        host = host_slots(chunk, dim, torch.bfloat16, bits, "cuda", per_slab=100, n_slabs=6)
        n = 512
        places = torch.randperm(599)[:n].to(torch.int32)
        slots = torch.randperm(n).to(torch.int32)
        expected = torch.empty(n, 2, chunk, dim, dtype=torch.bfloat16)
        fetch_chunks(expected, slots, host, places, torch.tensor([n]), bits)
        pool = torch.full_like(expected, torch.nan, device="cuda")
        fetch_chunks_triton(pool, slots.cuda(), host, places.cuda(), ints([n], "cuda"), bits, n_programs)
        assert torch.equal(pool.cpu(), expected)
        empty = HostSlots.of([torch.zeros_like(slab).pin_memory() for slab in host.slabs], "cuda")
        store_chunks_triton(pool, slots.cuda(), empty, places.cuda(), ints([n], "cuda"), bits, n_programs)
        twin = HostSlots([torch.zeros_like(slab) for slab in host.slabs], host.table, 100)
        store_chunks(expected, slots, twin, places, torch.tensor([n]), bits)
        torch.cuda.synchronize()
        assert torch.equal(pool.cpu(), expected)
        assert all(torch.equal(a, b) for a, b in zip(empty.slabs, twin.slabs, strict=True))

    @pytest.mark.parametrize("bits", FORMS)
    def test_a_graph_follows_counts_and_slots(self, bits):
        host = host_slots(32, 64, torch.bfloat16, bits, "cuda")
        pool = torch.full((N_SLOTS, 2, 32, 64), torch.nan, dtype=torch.bfloat16, device="cuda")
        slots, places, count = ints([0] * N_SLOTS, "cuda"), ints([0] * N_SLOTS, "cuda"), ints([0], "cuda")
        for transfer in (fetch_chunks_triton, store_chunks_triton):  # compiles
            transfer(pool, slots, host, places, count, bits)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fetch_chunks_triton(pool, slots, host, places, count, bits)
            store_chunks_triton(pool, slots, host, places, count, bits)
        for n in (0, 3, N_SLOTS):
            slots.copy_(torch.randperm(N_SLOTS))
            places.copy_(torch.randperm(PER_SLAB * N_SLABS - 1)[:N_SLOTS])
            count.fill_(n)
            pool.fill_(torch.nan)
            expected = pool.cpu()
            fetch_chunks(expected, slots.cpu(), host, places.cpu(), count.cpu(), bits)
            store = HostSlots([slab.clone() for slab in host.slabs], host.table, PER_SLAB)
            store_chunks(expected, slots.cpu(), store, places.cpu(), count.cpu(), bits)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(pool.cpu().view(torch.uint8), expected.view(torch.uint8))
            assert all(torch.equal(a, b) for a, b in zip(host.slabs, store.slabs, strict=True))

    @pytest.mark.parametrize("bits", FORMS)
    def test_a_pool_beyond_two_to_the_31_elements(self, bits):
        host = host_slots(32, 128, torch.bfloat16, bits, "cuda")
        pool = torch.empty((1 << 31) // (2 * 32 * 128) + 8, 2, 32, 128, dtype=torch.bfloat16, device="cuda")
        last = pool.shape[0] - 1
        slots, places, count = ints([last], "cuda"), ints([13], "cuda"), ints([1], "cuda")
        fetch_chunks_triton(pool, slots, host, places, count, bits)
        expected = torch.empty(1, 2, 32, 128, dtype=torch.bfloat16)
        fetch_chunks(expected, ints([0], "cpu"), host, places.cpu(), count.cpu(), bits)
        assert torch.equal(pool[last].cpu(), expected[0])

    def test_one_compiled_variant_for_any_count(self):
        before = None
        for n in range(1, 21):
            for bits in FORMS:
                check_fetch(16, 64, torch.float32, bits, "cuda", count=n, n_slots=n)
            kernels = (gather._copy_kernel, quantize.dequantize_kernel)
            variants = [len(kernel.device_caches[0][0]) for kernel in kernels]
            before = before or variants
            assert variants == before

    def test_pinned_records_are_reached_where_they_lie(self):
        size = record_bytes(32, 64, 4)
        slab = torch.empty(4, size, dtype=torch.uint8, pin_memory=True)
        assert HostSlots.of([slab], "cuda").table.tolist() == [slab.data_ptr()]
