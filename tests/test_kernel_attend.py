"""The attention kernels against float64: decode, assembling and prefill, from ring and pool.

On the CPU they run in Triton's interpreter, with ``-m gpu`` on CUDA.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import assemble
from kvtier.kernels import attend_decode as decode
from kvtier.kernels import attend_prefill as prefill
from kvtier.kernels.assemble import Sources, gather_attended, ring_offsets
from kvtier.kernels.attend import Logits, attend, rotate
from kvtier.kernels.backend import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    import interpreter

    interpreter.repair()

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}
"""Relative RMS error."""
CUDA = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]
CPU = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")
MOST_SHARED = 99 << 10


@pytest.fixture(params=[pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=GPU)])
def device(request):
    return request.param


@dataclass(frozen=True)
class Case:
    """Random sources of a batch; ``chosen`` chunks and a ``window`` of tokens per row."""

    kv_heads: int = 2
    group: int = 3
    dim: int = 32
    rotary: int | None = None
    chunk: int = 8
    sink: int = 4
    capacity: int = 43
    chosen: tuple[int, ...] = (6,)
    window: tuple[int, ...] = (30,)
    begin: int = 100
    """First token of the window: anywhere after the sinks."""
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    has_sink: bool = False
    device: str = "cpu"
    seed: int = 0

    @property
    def turned(self):
        return self.dim if self.rotary is None else self.rotary

    def longest(self):
        pairs = zip(self.chosen, self.window, strict=True)
        return max(self.sink + c * self.chunk + w for c, w in pairs)


class Inputs:
    """Tensors of a case, and the same in float64."""

    def __init__(self, case, block=None):
        self.case = case
        self._random = torch.Generator().manual_seed(case.seed)
        batch, heads = len(case.chosen), case.kv_heads * case.group
        rings = [self.random(2, 2, case.kv_heads, case.sink + case.capacity, case.dim)[:, 1] for _ in case.chosen]
        most = max(case.chosen)
        pool = slots = None
        if most:
            n_slots = batch * case.kv_heads * most + 3
            pool = self.random(n_slots, 2, case.chunk, case.dim)
            slots = torch.full((batch, case.kv_heads, most + 1), -1, dtype=torch.int32)
            order = torch.randperm(n_slots, generator=self._random)[: n_slots - 3].int()
            order = order.view(batch, case.kv_heads, most)
            for row, chosen in enumerate(case.chosen):
                slots[row, :, :chosen] = order[row, :, :chosen]
            slots = slots.to(case.device)
        lengths = [(case.sink, c, case.begin, case.begin + w) for c, w in zip(case.chosen, case.window, strict=True)]
        lengths = torch.tensor(lengths, dtype=torch.int32, device=case.device)
        self.sources = Sources(rings, ring_offsets(rings), case.sink, lengths, pool, slots)
        self.cos, self.sin = tables(case, case.longest())
        sink = self.random(heads) if case.has_sink else None
        self.logits = Logits(case.dim**-0.5, case.softcap, sink)
        shape = (batch,) if block is None else (block,)
        self.q = self.random(*shape, heads, case.dim)
        self.new = (self.random(*shape, case.kv_heads, case.dim), self.random(*shape, case.kv_heads, case.dim))
        if block is not None:  # laid out as transformers does
            self.q, self.new = self.q.transpose(0, 1), tuple(x.transpose(0, 1) for x in self.new)

    def random(self, *shape):
        return torch.randn(*shape, generator=self._random).to(self.case.device, self.case.dtype)

    def double(self, new):
        """Sources, logits and new K and V in float64; written rings are these copies."""
        s, sink = self.sources, self.logits.sink
        sources = replace(s, rings=[r.double() for r in s.rings], pool=None if s.pool is None else s.pool.double())
        logits = replace(self.logits, sink=None if sink is None else sink.double())
        return sources, logits, tuple(x.double() for x in self.new) if new else None


def tables(case, n):
    frequencies = 10000.0 ** -(torch.arange(0, case.turned, 2, dtype=torch.float64) / max(1, case.turned))
    angles = torch.arange(n, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=1).to(case.device)
    return (angles.cos() * 1.1).float(), (angles.sin() * 1.1).float()


def poisoned(x):
    return torch.full_like(x, float("nan"))


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


SMALL = decode.DecodeConfig(16, 4, 2, 6)
"""Sets of some tens of tokens take several tiles and several programs."""


def run_decode(case, new=True, window=None, config=SMALL):
    """Run the kernel on a case and compare output and rings with the twin in float64; returns the output."""
    x = Inputs(case)
    batch, heads, dim = x.q.shape
    workspace = decode.DecodeWorkspace.empty(
        batch, heads, case.kv_heads, dim, case.longest(), case.dtype, x.q.device, config
    )
    workspace.parts.fill_(float("nan"))
    workspace.stats.fill_(float("nan"))
    sources, logits, fresh = x.double(new)
    expected = decode.attend_decode(x.q.double(), sources, x.cos.double(), x.sin.double(), logits, fresh, window)
    out = poisoned(x.q)
    given = x.new if new else None
    back = decode.attend_decode_triton(x.q, x.sources, x.cos, x.sin, x.logits, given, window, out, workspace=workspace)
    assert back is out
    assert error(out, expected) < TOLERANCE[case.dtype]
    for ring, written in zip(x.sources.rings, sources.rings, strict=True):
        assert torch.equal(ring.double(), written)
    assert not workspace.count.any()
    return out


def run_prefill(case, block, new=True, window=None, row=0):
    x = Inputs(case, block)
    sources, logits, fresh = x.double(new)
    cos, sin = x.cos.double(), x.sin.double()
    keys, values = gather_attended(sources, row, fresh)
    n = keys.shape[1]
    expected = attend(x.q.double(), keys, values, cos[:n], sin[:n], logits, window)
    scratch = torch.full((2, case.kv_heads, case.longest() + 7, case.dim), float("nan")).to(x.q)
    out, given = poisoned(x.q), x.new if new else None
    prefill.attend_prefill_triton(x.q, x.sources, x.cos, x.sin, x.logits, given, window, out, row, scratch=scratch)
    assert error(out, expected) < TOLERANCE[case.dtype]
    assert error(scratch[0, :, :n], rotate(keys, cos[:n], sin[:n])) < TOLERANCE[case.dtype]
    assert torch.equal(scratch[1, :, :n].double(), values)
    assert scratch[:, :, n:].isnan().all(), "nothing is written beyond the set"
    for ring, written in zip(x.sources.rings, sources.rings, strict=True):
        assert torch.equal(ring.double(), written)


CASES = {
    "plain": Case(),
    "rows of different lengths, partly rotated": Case(dim=80, rotary=32, chosen=(6, 0, 3), window=(30, 43, 1)),
    "no positions, softcap": Case(group=1, dim=96, rotary=0, chunk=6, softcap=5.0),
    "sinks that take part, window alone": Case(group=2, dim=64, sink=0, chosen=(0,), window=(37,), has_sink=True),
    "more heads than a tile": Case(kv_heads=1, group=33, chosen=(2,), window=(5,)),
    "wide": Case(kv_heads=1, group=1, dim=256, chosen=(3,), window=(20,)),
    "fp16": Case(dim=128, kv_heads=1, dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_decode_equals_float64(name, device):
    run_decode(replace(CASES[name], device=device))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("more heads than a tile", "wide")])
def test_prefill_equals_float64(name, device):
    case = replace(CASES[name], device=device)
    run_prefill(case, min(case.window[0], 21))


def test_decode_of_tokens_that_are_in_the_ring_with_a_window(device):
    run_decode(Case(device=device), new=False, window=19)


@pytest.mark.parametrize("has_sink", [False, True])
def test_prefill_with_a_sliding_window(has_sink, device):
    case = Case(sink=0, chosen=(0,), capacity=90, window=(80,), has_sink=has_sink, device=device)
    run_prefill(case, 53, new=False, window=11)


@given(
    case=st.builds(
        Case,
        kv_heads=st.integers(1, 2),
        group=st.integers(1, 5),
        dim=st.sampled_from([16, 48, 64]),
        rotary=st.sampled_from([0, 2, 10, 16]),
        chunk=st.integers(1, 9),
        sink=st.integers(0, 5),
        capacity=st.integers(20, 31),
        chosen=st.tuples(st.integers(0, 5), st.integers(0, 5)),
        window=st.tuples(st.integers(1, 20), st.integers(1, 20)),
        begin=st.integers(5, 90),
        softcap=st.sampled_from([None, 3.0]),
        has_sink=st.booleans(),
    ),
    window=st.sampled_from([None, 1, 12]),
    new=st.booleans(),
)
@settings(max_examples=6, deadline=None)
@CPU
def test_any_shape(case, window, new):
    if case.softcap:
        case = replace(case, has_sink=False)
    run_decode(case, new, window)
    run_prefill(case, min(case.window[1], 7), new, window, row=1)


@pytest.mark.parametrize("end", [3, 4, 5, 27])
def test_the_first_tokens_of_a_sequence(end, device):
    """The new tokens are sinks themselves: a block from the start on, then one token."""
    case = Case(device=device, chosen=(0,), window=(30,), begin=4)
    for block in (end, None):
        x = Inputs(case, block)
        x.sources.lengths.copy_(torch.tensor([[min(4, end), 0, 4, end]]))
        sources, logits, new = x.double(True)
        args, double_args = (x.cos, x.sin, x.logits, x.new), (x.cos.double(), x.sin.double(), logits, new)
        if block is None:
            workspace = decode.DecodeWorkspace.empty(1, 6, 2, 32, 34, x.q.dtype, x.q.device, SMALL)
            actual = decode.attend_decode_triton(x.q, x.sources, *args, workspace=workspace)
            expected = decode.attend_decode(x.q.double(), sources, *double_args)
        else:
            scratch = torch.empty(2, 2, 34, 32, device=device)
            actual = prefill.attend_prefill_triton(x.q, x.sources, *args, scratch=scratch)
            expected = prefill.attend_prefill(x.q.double(), sources, *double_args)
        assert error(actual, expected) < 1e-5
        assert torch.equal(x.sources.rings[0].double(), sources.rings[0])


def test_the_same_bits_every_time(device):
    first, second = (run_decode(Case(device=device, dtype=torch.float16)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_row_without_tokens_gives_zeros(device):
    x = Inputs(Case(device=device, chosen=(6, 2), window=(30, 9)))
    x.sources.lengths[1] = 0
    workspace = decode.DecodeWorkspace.empty(2, 6, 2, 32, 82, torch.float32, x.q.device, SMALL)
    out, ring = poisoned(x.q), x.sources.rings[1].clone()
    decode.attend_decode_triton(x.q, x.sources, x.cos, x.sin, x.logits, x.new, None, out, workspace=workspace)
    assert not out[1].any()
    assert torch.isfinite(out[0]).all()
    assert torch.equal(x.sources.rings[1], ring)


def test_a_row_of_a_batch_gives_what_the_row_alone_gives(device):
    """With the same number of programs per head."""
    pair = Case(device=device, chosen=(6, 3), window=(30, 17))
    x = Inputs(pair)
    s = x.sources
    outs = []
    for rows in (slice(0, 2), slice(1, 2)):
        rings = s.rings[rows]
        part = Sources(rings, ring_offsets(rings), s.sink, s.lengths[rows], s.pool, s.slots[rows])
        q = x.q[rows].contiguous()
        workspace = decode.DecodeWorkspace.empty(2, 6, 2, 32, pair.longest(), q.dtype, q.device, SMALL)
        outs.append(
            decode.attend_decode_triton(q, part, x.cos, x.sin, x.logits, None, None, poisoned(q), workspace=workspace)
        )
    assert torch.equal(outs[0][1], outs[1][0])


# -- compiled without a GPU --------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **constants):
        self.args, self.constants = args, constants


def recorded(dtype, dim, group):
    """(kernel, launch) of each kernel in its default configuration."""
    case = Case(dim=dim, group=group, dtype=dtype, chunk=32, sink=32, capacity=128, chosen=(2,), window=(100,))
    x, y = Inputs(case), Inputs(case, block=64)
    kernels = (decode, "_decode_kernel"), (assemble, "_assemble_kernel"), (prefill, "_flash_kernel")
    recorders = []
    for module, name in kernels:
        recorders.append((getattr(module, name), Recorder()))
        setattr(module, name, recorders[-1][1])
    workspace = decode.DecodeWorkspace.empty(1, 2 * group, 2, dim, 196, dtype, x.q.device)
    decode.attend_decode_triton(x.q, x.sources, x.cos, x.sin, x.logits, x.new, workspace=workspace)
    scratch = torch.empty(2, 2, 224, dim, dtype=dtype)
    prefill.attend_prefill_triton(y.q, y.sources, y.cos, y.sin, y.logits, y.new, scratch=scratch)
    for (module, name), (kernel, _) in zip(kernels, recorders, strict=True):
        setattr(module, name, kernel)
    return recorders


def compile_kernel(kernel, launch, capability):
    """Bytes of shared memory of one launch's kernel on a device of that compute capability."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
    types[torch.int64] = "i64"
    constants = dict(launch.constants)
    warps = constants.pop("num_warps")
    signature, attributes = dict.fromkeys(constants, "constexpr"), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, launch.args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{types[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return compiled.metadata.shared


def compile_all(shapes):
    """Prints [[kernel, capability, shape, bytes of shared memory], ...]."""
    found = []
    for dtype, dim, group in shapes:
        for kernel, launch in recorded(getattr(torch, dtype), dim, group):
            for capability in (89, 90):
                shared = compile_kernel(kernel, launch, capability)
                found.append([kernel.__name__, capability, [dtype, dim, group], shared])
    print(json.dumps(found))


@pytest.mark.parametrize(
    "shapes",
    [
        [("bfloat16", 128, 3)],
        pytest.param(
            [("float16", 64, 3), ("bfloat16", 80, 1), ("bfloat16", 96, 7), ("bfloat16", 256, 20)],
            marks=pytest.mark.slow,
        ),
        pytest.param([("float32", d, 4) for d in (64, 80, 96, 128, 256)], marks=pytest.mark.slow),
    ],
    ids=["default", "other dims", "float32"],
)
def test_shared_memory_fits_every_device(shapes):
    """In a process without the interpreter."""
    here = Path(__file__).parent
    code = f"import test_kernel_attend as t; t.compile_all({shapes!r})"
    path = os.pathsep.join((str(here), str(here.parent)))
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(shapes) * 6
    too_much = [case for case in found if case[-1] > MOST_SHARED]
    assert not too_much


# -- on the GPU alone --------------------------------------------------------------------------------------------------

LARGE = Case(
    kv_heads=4, dim=128, chunk=32, sink=32, capacity=700, chosen=(60, 7), window=(650, 31), begin=9000, device="cuda"
)


@pytest.fixture
def gpu():
    if not CUDA:
        pytest.skip("no CUDA device")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_long_sets_on_the_gpu(dim, dtype):
    case = replace(LARGE, dim=dim, dtype=dtype)
    run_decode(case, config=None)
    run_prefill(case, 300)
    run_prefill(replace(case, softcap=20.0), 64)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_sliding_layers_on_the_gpu():
    case = replace(LARGE, sink=0, chosen=(0,), window=(600,), has_sink=True, dtype=torch.bfloat16)
    run_decode(case, config=None, window=513)
    run_prefill(case, 88, window=513)


def variants(kernel):
    """Compiled variants of a kernel on this device."""
    return sum(len(caches[0]) for caches in kernel.device_caches.values())


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_nothing_is_compiled_again_as_the_context_grows():
    case = replace(LARGE, chosen=(60,), window=(650,), dtype=torch.bfloat16)
    x, y = Inputs(case), Inputs(case, 64)
    n = case.longest()
    workspace = decode.DecodeWorkspace.empty(1, 12, 4, 128, n, torch.bfloat16, x.q.device)
    scratch = torch.empty(2, 4, n, 128, dtype=torch.bfloat16, device="cuda")
    kernels = decode._decode_kernel, assemble._assemble_kernel, prefill._flash_kernel
    counts = []
    for i in range(20):
        for inputs in (x, y):
            inputs.sources.lengths.copy_(torch.tensor([[32, 3 * i, 9000 + i, 9100 + 17 * i]]))
        decode.attend_decode_triton(x.q, x.sources, x.cos, x.sin, x.logits, x.new, workspace=workspace)
        prefill.attend_prefill_triton(y.q, y.sources, y.cos, y.sin, y.logits, y.new, scratch=scratch)
        counts.append([variants(kernel) for kernel in kernels])
    assert counts[0] == counts[-1]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_one_graph_serves_every_length_and_every_sequence():
    case = replace(LARGE, dtype=torch.bfloat16)
    x = Inputs(case)
    s, q = x.sources, x.q
    workspace = decode.DecodeWorkspace.empty(2, 12, 4, 128, case.longest(), q.dtype, q.device)
    out = poisoned(q)

    def step():
        decode.attend_decode_triton(q, s, x.cos, x.sin, x.logits, x.new, None, out, workspace=workspace)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    rings = list(s.rings)
    for i in range(4):
        s.lengths[:, 1] = torch.tensor([60 - 9 * i, i])
        s.lengths[:, 3] -= 5
        if i == 2:  # the rows swap their places on the device
            rings.reverse()
            s.rows.copy_(s.rows.flip(0))
        out.fill_(float("nan"))
        graph.replay()
        now = replace(s, rings=rings)
        assert error(out, decode.attend_decode(q, now, x.cos, x.sin, x.logits).double()) < 1e-2


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_pool_beyond_2_31_elements():
    case = Case(kv_heads=2, dim=128, chunk=32, sink=32, capacity=64, dtype=torch.bfloat16, device="cuda")
    x = Inputs(case)
    s = x.sources
    n_slots = 2**31 // (2 * 32 * 128) + 40
    pool = torch.empty(n_slots, 2, 32, 128, dtype=torch.bfloat16, device="cuda")
    pool[-s.pool.shape[0] :] = s.pool
    far = replace(s, pool=pool, slots=torch.where(s.slots >= 0, s.slots + n_slots - s.pool.shape[0], -1))
    workspace = decode.DecodeWorkspace.empty(1, 6, 2, 128, case.longest(), x.q.dtype, x.q.device)
    near_out, far_out = (
        decode.attend_decode_triton(x.q, y, x.cos, x.sin, x.logits, workspace=workspace) for y in (s, far)
    )
    assert torch.equal(near_out, far_out)
