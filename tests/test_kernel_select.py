"""``select_triton`` against float64 and the torch twins: scores, weights, the exact choice, slabs, batches, graphs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import select as kernel
from kvtier.kernels.backend import INTERPRETED
from kvtier.kernels.basis import fit_basis
from kvtier.kernels.quantize import unpack
from kvtier.kernels.select import (
    GROUP,
    SelectConfig,
    SelectWorkspace,
    SlabSummaries,
    chunk_weights,
    cuboid_scores,
    mean_scores,
    minmax_scores,
    select_triton,
    sketch_scores,
    top_chunks,
)
from kvtier.kernels.summarize import encode_cuboid, encode_mean, encode_minmax, encode_sketch

triton = pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENCODE = {"mean": lambda keys: (encode_mean(keys),), "minmax": encode_minmax, "cuboid": encode_cuboid}
SCORES = {"mean": mean_scores, "minmax": minmax_scores, "cuboid": cuboid_scores}


@pytest.fixture(autouse=True, scope="module")
def scalars_as_loop_bounds():
    """Triton 3.6's interpreter turns [n] into the n of a loop, which numpy >= 2.4 refuses."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    yield
    interpreter._patch_lang_tensor = original


def poisoned(n, rows, capacity, select, rank=0, stored_rows=0):
    """A workspace without a number in it."""
    work = SelectWorkspace.new(n, rows, capacity, select, DEVICE, rank, stored_rows)
    for tensor in (work.weights, work.scores, work.parts, work.maxima, work.projected, work.factors):
        tensor.fill_(float("nan"))
    work.chosen.fill_(-7)
    work.groups.fill_(1 << 30)
    return work


def problem(kind, n, rows, dim, chunks, *, rank=16, bits=4, chunk=8, dtype=torch.float32, seed=0, spread=0.3):
    """Queries, summaries of clustered keys, and float64 scores from exactly what the summaries hold."""
    torch.manual_seed(seed)
    q = torch.randn(n, rows, dim, device=DEVICE) * spread
    keys = torch.randn(n, chunks, 1, dim, device=DEVICE) + torch.randn(n, chunks, chunk, dim, device=DEVICE) / 2
    keys = keys.to(dtype)
    if kind != "sketch":
        tensors = ENCODE[kind](keys)
        return q, tensors, {}, SCORES[kind](q.double(), *(Doubled(x) for x in tensors))
    mean, to, back = fit_basis(keys.flatten(1, 2), q.mT @ q, rank)
    codes, scale = encode_sketch(keys, mean, to, bits)
    return q, (codes, scale), {"bits": bits, "basis": back}, double_sketch(q, codes, scale, mean, back, bits)


class Doubled:
    """A tensor that the twins' ``.float()`` turns into float64."""

    def __init__(self, x):
        self.float = x.double


def double_sketch(q, codes, scale, mean, basis, bits):
    tokens = unpack(codes, bits, basis.shape[-1]).double() * scale.double()[:, :, None]
    scores = torch.einsum("nqr,nmcr->nqmc", q.double() @ basis.double(), tokens).amax(dim=-1)
    return scores + q.double() @ mean.double()[..., None]


def error(ours, reference):
    """Relative RMS error."""
    assert not ours.isnan().any()
    return ((ours.double() - reference).norm() / reference.norm()).item()


def check(q, summaries, scores, work, counts, config=None, tolerance=1e-5):
    """Weights within ``tolerance`` of float64's; the choice is exactly that of the twin from the same weights."""
    n_chunks = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    chosen, count = select_triton(q, summaries, n_chunks, work, config)
    select, heads = chosen.shape[1], len(q) // len(counts)
    for row in range(len(q)):
        m = counts[row // heads]
        wanted = min(m, select)
        assert count[row] == wanted
        assert (chosen[row, wanted:] == -1).all()
        if m <= select:
            assert chosen[row, :m].tolist() == list(range(m))
        if m:
            weights = scores[row : row + 1, :, :m].softmax(dim=-1).mean(dim=1)
            assert error(work.weights[row : row + 1, :m], weights) < tolerance
            ours = top_chunks(work.weights[row : row + 1, :m], select)
            assert chosen[row, :wanted].tolist() == ours[0].tolist()
    assert not work.counter.any(), "ready for the next call"


CASES = {
    "mean": ("mean", 2, 3, 64, 200, 8, {}),
    "mean, head_dim 80, all rows of a block": ("mean", 1, 40, 80, 70, 9, {}),
    "minmax, head_dim 96": ("minmax", 2, 5, 96, 100, 33, {}),
    "cuboid, fewer chunks than select": ("cuboid", 2, 2, 32, 30, 40, {}),
    "sketch": ("sketch", 2, 3, 64, 150, 9, {"chunk": 16}),
    "sketch, 8 rows, odd rank, odd chunk": ("sketch", 1, 8, 32, 60, 9, {"rank": 11, "chunk": 6}),
    "sketch, 12 rows": ("sketch", 1, 12, 64, 60, 9, {}),
    "sketch, 8 bits": ("sketch", 2, 3, 32, 60, 9, {"bits": 8, "rank": 12}),
    "sketch, 2 bits": ("sketch", 1, 4, 32, 60, 9, {"bits": 2, "rank": 10}),
    "sketch, two passes": ("sketch", 1, 40, 64, 50, 9, {"rank": 20}),
    "sketch, two groups of rows": ("sketch", 2, 66, 32, 40, 5, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_and_choice(case):
    kind, n, rows, dim, chunks, select, options = CASES[case]
    q, tensors, sketch, scores = problem(kind, n, rows, dim, chunks, **options)
    work = poisoned(n, rows, chunks, select, options.get("rank", 16))
    check(q, SlabSummaries.of(kind, tensors, **sketch), scores, work, [chunks])


def test_twins_agree():
    """What the twins would choose is chosen, where no two weights are closer than rounding."""
    q, tensors, sketch, _ = problem("sketch", 2, 3, 64, 100, spread=1.0)
    work = poisoned(2, 3, 100, 9, 16)
    select_triton(q, SlabSummaries.of("sketch", tensors, **sketch), count_of(100), work)
    mean = torch.zeros(2, 64, device=DEVICE)
    twin = chunk_weights(sketch_scores(q, *tensors, mean, sketch["basis"], 4))
    assert error(work.weights[:, :100], twin.double()) < 1e-5
    assert work.chosen.tolist() == top_chunks(twin, 9).tolist()


def count_of(n):
    return torch.tensor([n], dtype=torch.int32, device=DEVICE)


def slabs_of(tensors, slab):
    """Slabs in any order, their last one with numbers beyond the chunks, and tables with more room than slabs."""
    tables, kept = [], []
    for x in tensors:
        n_slabs = -(-x.shape[1] // slab)
        memory = torch.full((n_slabs, x.shape[0], slab, *x.shape[2:]), 100, dtype=x.dtype, device=DEVICE)
        places = list(range(n_slabs))[::-1]
        for i, place in enumerate(places):
            part = x[:, i * slab : (i + 1) * slab]
            memory[place][:, : part.shape[1]] = part
        tables.append([memory[place].data_ptr() for place in places] + [0] * 3)
        kept.append(memory)
    return tables, kept


@pytest.mark.parametrize("kind", ["mean", "sketch"])
def test_slabs_of_a_batch(kind):
    """Sequences of different lengths, each with its own table; chunks beyond the length are never looked at."""
    heads, counts, chunks = 2, [0, 200, 131], 200
    q, tensors, sketch, scores = problem(kind, 3 * heads, 2, 32, chunks)
    rows = [slabs_of([x[i * heads : (i + 1) * heads] for x in tensors], 128) for i in range(3)]
    tables = [torch.tensor([row[0][t] for row in rows], device=DEVICE) for t in range(len(tensors))]
    like = tuple(memory[0] for memory in rows[0][1])
    summaries = SlabSummaries(kind, tuple(tables), like, **sketch)
    check(q, summaries, scores, poisoned(3 * heads, 2, 512, 7, 16), counts)


def test_ties_go_to_the_lower_index():
    q, tensors, _, scores = problem("mean", 1, 2, 32, 150)
    work = poisoned(1, 2, 150, 40)
    check(q * 0, SlabSummaries.of("mean", tensors), scores * 0, work, [150])
    assert work.chosen[0].tolist() == list(range(40))


def test_far_apart_scores():
    """Weights that underflow to zero tie, at the lower index."""
    q, tensors, _, scores = problem("mean", 1, 1, 32, 100, spread=100)
    work = poisoned(1, 1, 100, 60)
    check(q, SlabSummaries.of("mean", tensors), scores, work, [100])
    assert (work.weights[0, :100] == 0).sum() > 40


def test_large_coordinates_stay_finite():
    """Scales up to 8000 are exact in fp16, whatever the size of the query."""
    q, (codes, scale), sketch, _ = problem("sketch", 1, 3, 32, 60, spread=1e-4)
    q, scale = q * 1e5, scale * 512
    reference = double_sketch(q / 1e6, codes, scale, torch.zeros(1, 32, device=DEVICE), sketch["basis"], 4)
    check(q / 1e6, SlabSummaries.of("sketch", (codes, scale), **sketch), reference, poisoned(1, 3, 60, 5, 16), [60])


def test_two_passes_give_what_one_gives():
    q, tensors, sketch, _ = problem("sketch", 2, 6, 32, 90)
    summaries = SlabSummaries.of("sketch", tensors, **sketch)
    one, two = poisoned(2, 6, 90, 9, 16), poisoned(2, 6, 90, 9, 16, stored_rows=1)
    select_triton(q, summaries, count_of(90), one)
    select_triton(q, summaries, count_of(90), two)
    assert error(two.weights[:, :90], one.weights[:, :90].double()) < 1e-6


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_the_search_is_exact(data):
    """Any weights: many equal, zeros, one group with all of the largest; more places than a tile of the search."""
    m = data.draw(st.integers(1, 700))
    select = data.draw(st.integers(1, 90))
    values = data.draw(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6))
    seed = data.draw(st.integers(0, 1 << 30))
    torch.manual_seed(seed)
    weights = torch.rand(1, m) if data.draw(st.booleans()) else torch.tensor(values)[torch.randint(len(values), (1, m))]
    if data.draw(st.booleans()):
        weights = weights.sort(descending=True).values
    weights = weights.to(DEVICE)
    work = poisoned(1, 1, m, select)
    work.scores[0, :, :m] = weights
    config = SelectConfig(64, weigh_tile=128, weigh_warps=4, search_tile=256)
    kernel._weigh(count_of(m), work, config, 1, 1, 1, False, 1)
    assert torch.equal(work.weights[:, :m], weights)
    assert work.chosen[0, : min(m, select)].tolist() == top_chunks(weights, select)[0].tolist()
    assert work.count.item() == min(m, select)


def test_capacity_is_in_whole_groups():
    assert SelectWorkspace.new(1, 1, 1000, 4, DEVICE).capacity % GROUP == 0


COMPILED = {
    "defaults": [("sketch", 3, 128, "bfloat16", 16, 4), ("mean", 3, 128, "bfloat16", 0, 0)],
    "sketches": [
        ("sketch", rows, 128, "bfloat16", rank, bits)
        for rows, rank, bits in (
            (8, 16, 4),
            (48, 16, 4),
            (192, 16, 4),
            (12, 64, 4),
            (48, 64, 8),
            (3, 16, 2),
            (20, 12, 8),
        )
    ],
    "vectors": [
        (kind, rows, dim, dtype, 0, 0)
        for kind in ("mean", "minmax")
        for rows, dim, dtype in ((3, 128, "bfloat16"), (48, 256, "bfloat16"), (3, 80, "float32"), (48, 256, "float32"))
    ],
}


@pytest.mark.parametrize(
    "cases", ["defaults", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sketches", "vectors"))]
)
def test_shared_memory_fits_every_device(cases):
    """Triton compiles without a GPU, but not in a process whose kernels the interpreter runs."""
    here = Path(__file__).parent
    path = os.pathsep.join((str(here), str(here.parent)))
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-c", f"import test_kernel_select as t; t.compile_all({cases!r})"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 2 * 2 * len(COMPILED[cases])
    assert [line for line in found if line[-1] > 99 << 10] == []


class Recorder:
    """Stands for a kernel; compiles what is launched, for two compute capabilities, and prints its shared memory."""

    def __init__(self, jitted, capability):
        self.jitted = jitted
        self.capability = capability

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps=4, **constants):
        types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8"}
        types |= {torch.int32: "i32", torch.int64: "i64"}
        signature, attributes = {}, {}
        for i, (name, value) in enumerate(zip(self.jitted.arg_names, args, strict=False)):
            scalar = "fp32" if isinstance(value, float) else "i32"
            signature[name] = f"*{types[value.dtype]}" if isinstance(value, torch.Tensor) else scalar
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        signature = {name: signature[name] for name in self.jitted.arg_names}
        values = {(self.jitted.arg_names.index(name),): value for name, value in constants.items()}
        source = triton.compiler.ASTSource(self.jitted, signature, values, attributes)
        target = triton.backends.compiler.GPUTarget("cuda", self.capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
        print(json.dumps([self.jitted.__name__, self.capability, constants, compiled.metadata.shared]))


def compile_all(cases):
    """Compile every kernel of ``COMPILED[cases]`` as ``select_triton`` would launch it."""
    names = ("project_kernel", "score_kernel", "weigh_kernel")
    kernels = [getattr(kernel, name) for name in names]
    for capability in (89, 90):
        kernel.n_processors = lambda _: 132
        kernel.has_wgmma = lambda _, capability=capability: capability == 90
        for name, jitted in zip(names, kernels, strict=True):
            setattr(kernel, name, Recorder(jitted, capability))
        for kind, rows, dim, dtype, rank, bits in COMPILED[cases]:
            if kind == "sketch":
                codes = torch.empty(8, 128, 32, rank * bits // 8, dtype=torch.uint8)
                like = (codes, torch.empty(8, 128, rank, dtype=torch.bfloat16))
            else:
                like = (torch.empty(8, 128, dim, dtype=getattr(torch, dtype)),) * (1 if kind == "mean" else 2)
            tables = tuple(torch.zeros(1, 1024, dtype=torch.int64) for _ in like)
            summaries = SlabSummaries(kind, tables, like, bits, torch.empty(8, dim, rank) if rank else None)
            work = SelectWorkspace.new(8, rows, 131072, 111, torch.device("cpu"), rank)
            select_triton(torch.empty(8, rows, dim), summaries, torch.zeros(1, dtype=torch.int32), work)


GPU_CASES = [
    ("mean", 3, 128, {}),
    ("mean", 24, 80, {}),
    ("minmax", 8, 64, {}),
    ("cuboid", 5, 256, {}),
    ("sketch", 3, 128, {"chunk": 32}),
    ("sketch", 4, 64, {"chunk": 64}),
    ("sketch", 7, 64, {"chunk": 32}),
    ("sketch", 12, 128, {"chunk": 32}),
    ("sketch", 48, 128, {"chunk": 32}),
    ("sketch", 192, 128, {"chunk": 32}),
    ("sketch", 3, 96, {"rank": 64, "chunk": 16}),
    ("sketch", 3, 64, {"rank": 24, "chunk": 24}),
    ("sketch", 20, 64, {"rank": 8, "chunk": 8}),
    ("sketch", 3, 64, {"bits": 8, "chunk": 32}),
    ("sketch", 3, 64, {"bits": 2, "chunk": 32}),
    ("sketch", 40, 64, {"bits": 2, "rank": 32, "chunk": 32}),
]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"{case[0]} x{case[1]} d{case[2]} {case[3] or ''}")
def test_on_the_gpu(case, dtype):
    """Scores are as exact as float32 whatever the summaries' dtype: the reference has the same summaries."""
    kind, rows, dim, options = case
    if kind == "sketch" and dtype != torch.bfloat16:
        pytest.skip("a sketch does not depend on the dtype")
    q, tensors, sketch, scores = problem(kind, 4, rows, dim, 3000, dtype=dtype, **options)
    work = poisoned(4, rows, 5000, 111, options.get("rank", 16))
    summaries = SlabSummaries.of(kind, tensors, **sketch)
    for count in (3000, 1, 90, 111, 112, 2999):
        check(q, summaries, scores, work, [count])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
def test_one_graph_serves_every_length():
    """Nothing is compiled and nothing captured anew while the context grows."""
    q, tensors, sketch, scores = problem("sketch", 4, 3, 64, 4000, chunk=32)
    summaries, work = SlabSummaries.of("sketch", tensors, **sketch), poisoned(4, 3, 4000, 64, 16)
    n_chunks = count_of(100)
    select_triton(q, summaries, n_chunks, work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select_triton(q, summaries, n_chunks, work)
    variants = compiled()
    for m in range(200, 4001, 200):
        n_chunks.fill_(m)
        graph.replay()
        weights = scores[:, :, :m].softmax(dim=-1).mean(dim=1)
        assert error(work.weights[:, :m], weights) < 1e-5
        assert torch.equal(work.chosen.long(), top_chunks(work.weights[:, :m], 64))
        check(q, summaries, scores, work, [m])
    assert compiled() == variants


def compiled():
    kernels = (kernel.project_kernel, kernel.score_kernel, kernel.weigh_kernel)
    return [sum(len(cache[0]) for cache in jitted.device_caches.values()) for jitted in kernels]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
def test_the_same_choice_every_time():
    q, tensors, sketch, _ = problem("sketch", 8, 3, 128, 20000, chunk=32)
    summaries, work = SlabSummaries.of("sketch", tensors, **sketch), poisoned(8, 3, 20000, 111, 16)
    select_triton(q, summaries, count_of(20000), work)
    chosen, weights = work.chosen.clone(), work.weights.clone()
    for _ in range(50):
        select_triton(q, summaries, count_of(20000), work)
        assert torch.equal(work.chosen, chosen)
        assert torch.equal(work.weights[:, :20000], weights[:, :20000])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
def test_more_than_2_to_the_31_elements():
    """Means of 8 heads in one slab of 1M chunks, 4 GiB; only the last chunks differ from zero."""
    chunks, n = 1 << 20, 8
    x = torch.zeros(n, chunks, 256, dtype=torch.bfloat16, device=DEVICE)
    q = torch.randn(n, 1, 256, device=DEVICE)
    x[:, -5:] = q.to(x.dtype)
    assert x.numel() >= 1 << 31
    work = SelectWorkspace.new(n, 1, chunks, 5, DEVICE)
    select_triton(q, SlabSummaries.of("mean", (x,)), count_of(chunks), work)
    assert (work.chosen == torch.arange(chunks - 5, chunks, device=DEVICE)).all()
