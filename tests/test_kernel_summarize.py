"""kernels/summarize.py: the encoders in Triton against their twins, from a ring and from a tensor, into slabs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvtier.kernels import summarize
from kvtier.kernels.backend import INTERPRETED
from kvtier.kernels.basis import fit_basis
from kvtier.kernels.quantize import packed_size, unpack
from kvtier.kernels.summarize import (
    Keys,
    Slabs,
    encode_cuboid,
    encode_cuboid_triton,
    encode_mean,
    encode_mean_triton,
    encode_minmax,
    encode_minmax_triton,
    encode_sketch,
    encode_sketch_triton,
)

CUDA = torch.cuda.is_available()
if INTERPRETED:
    from interpreter import repair

    repair()

gpu_only = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["sketch", "mean", "minmax", "cuboid"]
PER_SLAB, N_SLABS = 4, 3
EPSILON = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""One unit in the last place, a few in float32: relative to the largest value that is added."""


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
        pytest.param("cuda", marks=gpu_only),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def twins(kind, keys, state, bits):
    """What the twin makes of ``keys`` [R, m, C, D], as a tuple."""
    if kind == "sketch":
        return encode_sketch(keys, *state, bits)
    made = {"mean": encode_mean, "minmax": encode_minmax, "cuboid": encode_cuboid}[kind](keys)
    return made if isinstance(made, tuple) else (made,)


def run(kind, keys, state, bits, out):
    if kind == "sketch":
        encode_sketch_triton(keys, *state, bits, out)
    else:
        encode = {"mean": encode_mean_triton, "minmax": encode_minmax_triton, "cuboid": encode_cuboid_triton}[kind]
        encode(keys, out)


def assert_close(kind, ours, theirs, keys, bits, rank):
    if kind == "minmax":
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    elif kind == "sketch":
        codes, other = (unpack(x[0], bits, rank) for x in (ours, theirs))
        assert (codes - other).abs().max() <= 1
        assert (codes != other).float().mean() <= 1e-3  # a scale that rounds the other way moves several codes
        scale, other = ours[1].float(), theirs[1].float()
        assert ((scale - other).abs() <= 2.0**-7 * other).all()
        assert (scale != other).float().mean() <= 2e-3 + 1 / scale.numel()
    else:
        if kind == "cuboid":
            assert torch.equal(ours[0], theirs[0])
        reach = keys.float().abs().amax() * EPSILON[keys.dtype]
        assert ((ours[-1].float() - theirs[-1].float()).abs() <= reach).all()


def check(
    kind,
    device,
    *,
    ring,
    chunk,
    dim,
    dtype=torch.float32,
    m=2,
    groups=2,
    heads=2,
    rank=8,
    bits=4,
    each=False,
    room=None,
):
    """All chunks of all rows, one of the rows with fewer; what lies beside them in the slabs stays as it was."""
    rows = groups * heads
    sink, capacity = (3, room or (m + 1) * chunk - 1) if ring else (0, m * chunk)
    data = torch.randn(rows, sink + capacity, dim).to(dtype) + 0.5
    first = torch.arange(rows, dtype=torch.int32) * 2 + 1 if each else torch.tensor([3], dtype=torch.int32)
    count = torch.full_like(first, m)
    if each:
        count[1] -= 1
    keys = torch.empty(rows, m, chunk, dim, dtype=dtype)
    for row in range(rows):
        begin = int(first.expand(rows)[row]) * chunk if ring else 0
        places = sink + (begin + torch.arange(m * chunk)) % capacity
        keys[row] = data[row, places].view(m, chunk, dim)
    state = fit_basis(torch.randn(rows, 4 * dim, dim), torch.eye(dim).expand(rows, -1, -1), rank)[
        :2
    ]  # no direction without variance, whose codes are noise
    expected = twins(kind, keys, state, bits)
    slabs = [
        [torch.full((heads, PER_SLAB, *x.shape[2:]), 77, dtype=x.dtype, device=device) for _ in range(groups * N_SLABS)]
        for x in expected
    ]
    tables = [torch.tensor([s.data_ptr() for s in of], device=device).view(groups, N_SLABS) for of in slabs]
    on_device = Keys(data.to(device), sink if ring else None, chunk, m, first.to(device), count.to(device))
    run(kind, on_device, tuple(x.to(device) for x in state), bits, Slabs(tuple(tables), heads, PER_SLAB))
    ours = [torch.empty_like(x) for x in expected]
    for i, of in enumerate(slabs):
        whole = torch.stack(of).cpu().view(groups, N_SLABS, heads, PER_SLAB, *expected[i].shape[2:])
        whole = whole.transpose(1, 2).reshape(rows, N_SLABS * PER_SLAB, *expected[i].shape[2:])
        for row in range(rows):
            begin, n = int(first.expand(rows)[row]), int(count.expand(rows)[row])
            ours[i][row, :n] = whole[row, begin : begin + n]
            ours[i][row, n:] = expected[i][row, n:]
            rest = torch.cat((whole[row, :begin], whole[row, begin + n :]))
            assert (rest == 77).all()
    assert_close(kind, ours, expected, keys, bits, rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ring", [True, False], ids=["ring", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_twin(device, kind, ring, dtype):
    check(kind, device, ring=ring, chunk=32, dim=64, dtype=dtype, rank=16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunk", "dim"), [(8, 80), (5, 6), (16, 96)])
def test_odd_shapes(device, kind, chunk, dim):
    check(kind, device, ring=True, chunk=chunk, dim=dim, rank=min(dim, 7), each=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rank", [1, 5, 16, 64])
def test_any_rank_and_bits(device, rank, bits):
    check("sketch", device, ring=False, chunk=8, dim=64, rank=rank, bits=bits, groups=1)


@pytest.mark.parametrize("kind", KINDS)
def test_none_and_each_row_its_own(device, kind):
    check(kind, device, ring=True, chunk=4, dim=16, m=1, each=True)


def test_keys_that_equal_the_mean_have_codes_of_zero(device):
    data = torch.ones(1, 8, 16, device=device)
    mean, basis = torch.ones(1, 16, device=device), torch.eye(16, device=device)[None, :, :4].contiguous()
    codes = torch.full((1, 4, 8, packed_size(4, 4)), 255, dtype=torch.uint8, device=device)
    scales = torch.full((1, 4, 4), torch.nan, dtype=torch.bfloat16, device=device)
    tables = tuple(torch.tensor([[x.data_ptr()]], device=device) for x in (codes, scales))
    one = torch.ones(1, dtype=torch.int32, device=device)
    encode_sketch_triton(Keys(data, None, 8, 1, one, one), mean, basis, 4, Slabs(tables, 1, 4))
    assert (unpack(codes[:, 1], 4, 4) == 0).all()
    assert (scales[:, 1] == 0).all()
    assert (codes[:, [0, 2, 3]] == 255).all()


@settings(max_examples=15, deadline=None, phases=[Phase.generate])
@given(
    kind=st.sampled_from(KINDS),
    ring=st.booleans(),
    chunk=st.integers(1, 9),
    dim=st.integers(2, 40),
    bits=st.sampled_from([2, 4, 8]),
    each=st.booleans(),
)
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_any_shape(kind, ring, chunk, dim, bits, each):
    torch.manual_seed(0)
    check(kind, "cpu", ring=ring, chunk=chunk, dim=dim, rank=1 + dim // 2, bits=bits, each=each)


def launch_all(shapes=((32, 128, torch.bfloat16, 16, 4),)):
    """Every kernel; ``compile_only`` runs this."""
    one = torch.ones(1, dtype=torch.int32)
    for chunk, dim, dtype, rank, bits in shapes:
        keys = Keys(torch.empty(2, 32 + 4096, dim, dtype=dtype), 32, chunk, 1, one, one)
        slabs = Slabs((torch.zeros(1, 16, dtype=torch.int64),) * 2, 2, 128)
        for kind in KINDS:
            run(kind, keys, (torch.empty(2, dim), torch.empty(2, dim, rank)), bits, slabs)


def launch_other_shapes():
    shapes = [(32, dim, dtype, 16, 4) for dim in (64, 80, 96, 256) for dtype in (torch.float32, torch.bfloat16)]
    launch_all((*shapes, (128, 256, torch.float32, 16, 4), (32, 256, torch.bfloat16, 256, 8)))


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
    command = [sys.executable, "-m", "compile_only", str(capability), "test_kernel_summarize", function]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {kernel for kernel, _ in found} == {"_sketch_kernel", "_vectors_kernel"}
    assert max(shared for _, shared in found) <= 99 << 10


class TestOnGpu:
    pytestmark = gpu_only

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("chunk", "dim"), [(32, 64), (32, 80), (32, 96), (32, 128), (32, 256), (128, 256)])
    def test_all_layers_at_once(self, kind, chunk, dim, dtype):
        check(kind, "cuda", ring=True, chunk=chunk, dim=dim, dtype=dtype, m=8, groups=28, heads=2, rank=16)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("dim", [64, 128, 256])
    def test_full_rank(self, dim, bits):
        check("sketch", "cuda", ring=False, chunk=32, dim=dim, rank=dim, bits=bits, m=8)

    def test_one_compiled_variant_for_any_number_of_chunks(self):
        before = None
        for m in range(1, 10):
            for kind in KINDS:
                check(kind, "cuda", ring=True, chunk=16, dim=64, m=m, room=10 * 16 - 1)
            kernels = (summarize._sketch_kernel, summarize._vectors_kernel)
            variants = [len(kernel.device_caches[0][0]) for kernel in kernels]
            before = before or variants
            assert variants == before
