"""Engines without a model: both methods on the CPU in float32, fed with random q, k, v beside the oracles."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from oracle import ChunkOracle, StepResult, assert_same_choice
from oracle_reattention import ReAttentionOracle, ReAttentionResult

from kvtier.kernels.attend import Logits
from kvtier.kernels.quantize import unpack
from kvtier.runtime import host_pool, slabs
from kvtier.runtime.budget import Budget
from kvtier.runtime.device_pool import DevicePool
from kvtier.runtime.engine import Engine
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.host_pool import HostPool
from kvtier.runtime.model import ModelShape, Rotary
from kvtier.runtime.reattention import ReAttentionEngine
from kvtier.runtime.residency import Residency
from kvtier.runtime.sequence import Sequence, TieredSequence
from kvtier.runtime.store import StoreTier
from kvtier.runtime.summary import make_summary
from kvtier.runtime.tiered import TieredEngine

CPU = torch.device("cpu")
PLENTY = 64 * 2**20


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Import it where everything is tiny: threads that wait for each other cost most of the time on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def make_geometry(
    sink: int = 3,
    local: int = 6,
    chunk: int = 4,
    select: int = 2,
    block: int = 8,
    queries: int = 3,
    tail: int = 4,
) -> Geometry:
    """A geometry whose ``max`` is its bound."""
    longest = sink + select * chunk + local + chunk - 1 + block
    return Geometry(longest, sink, local, chunk, select, block, queries, tail)


DEFAULT_GEOMETRY = make_geometry()


@dataclass(frozen=True)
class Case:
    """What an engine and its oracles are made of."""

    geometry: Geometry = DEFAULT_GEOMETRY
    n_layers: int = 1
    n_kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    attention_scaling: float = 1.25
    scaling: float = 0.3
    kind: str = "exact"
    rank: int = 4
    bits: int = 4
    levels: int = 1
    overfetch: int = 8
    picks: int = 2

    @property
    def shape(self) -> ModelShape:
        n_heads = self.n_kv_heads * self.group
        return ModelShape(self.n_layers, n_heads, self.n_kv_heads, self.head_dim, torch.float32, CPU)

    @property
    def inv_freq(self) -> np.ndarray:
        """Llama's frequencies on a grid of 2^-10: the angles are exact in float32, so 1e-5 is a fair tolerance."""
        frequencies = 100.0 ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        return np.ceil(frequencies * 1024) / 1024

    @property
    def chunk_bytes(self) -> int:
        return 2 * self.geometry.chunk * self.head_dim * 4

    @property
    def window_bytes(self) -> int:
        """The largest parked window."""
        places = self.geometry.sink + self.geometry.window_capacity
        return 2 * self.n_layers * self.n_kv_heads * places * self.head_dim * 4

    def rotaries(self) -> list[Rotary]:
        """The tables of each layer."""
        return [self.rotary()] * self.n_layers

    def rotary(self) -> Rotary:
        """Tables as kvtier/rope.py makes them."""
        inv_freq = torch.tensor(self.inv_freq, dtype=torch.float32)
        angles = torch.arange(self.geometry.max, dtype=torch.float32)[:, None] * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        scaling = self.attention_scaling
        return Rotary(angles.cos() * scaling, angles.sin() * scaling, scaling)


@st.composite
def geometries(draw: st.DrawFn, *, local_holds_block: bool = False) -> Geometry:
    block = draw(st.one_of(st.integers(1, 20), st.integers(65, 80)))
    return make_geometry(
        sink=draw(st.integers(0, 5)),
        local=draw(st.integers(block, block + 8) if local_holds_block else st.integers(1, 12)),
        chunk=draw(st.integers(1, 8)),
        select=draw(st.integers(0, 5)),
        block=block,
        queries=draw(st.integers(1, 5)),
        tail=draw(st.integers(1, min(block, 10))),
    )


@st.composite
def cases(draw: st.DrawFn, *, kind: str = "exact", local_holds_block: bool = False) -> Case:
    head_dim = 2 * draw(st.integers(2, 8))
    return Case(
        draw(geometries(local_holds_block=local_holds_block)),
        n_layers=draw(st.integers(1, 2)),
        n_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 8])),
        head_dim=head_dim,
        attention_scaling=draw(st.sampled_from([0.7, 1.0, 1.25, 1.6])),
        scaling=draw(st.sampled_from([0.1, 0.25, 0.4])),
        kind=kind,
        rank=draw(st.integers(1, head_dim)),
        bits=draw(st.sampled_from([2, 4, 8])),
        picks=draw(st.integers(1, 6)),
    )


@dataclass(frozen=True)
class Tokens:
    """Un-rotated q [L, H, n, D], k and v [L, N, n, D], and ids [n]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return self.ids.numel()

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.q[:, :, part], self.k[:, :, part], self.v[:, :, part], self.ids[part])

    def arrays(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v of a layer, for an oracle."""
        return self.q[layer].numpy(), self.k[layer].numpy(), self.v[layer].numpy()

    def __add__(self, other: "Tokens") -> "Tokens":
        q, k, v = (torch.cat(pair, dim=2) for pair in ((self.q, other.q), (self.k, other.k), (self.v, other.v)))
        return Tokens(q, k, v, torch.cat((self.ids, other.ids)))


def random_tokens(case: Case, n: int, seed: int = 0, *, grid: bool = False) -> Tokens:
    """Gaussian; ``grid``: rounded so that any q.k is exact in float32, in whatever order it is summed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        x = torch.randn(case.n_layers, heads, n, case.head_dim, generator=generator)
        return (4 * x).round() / 4 if grid else x

    q, k, v = draw(case.n_kv_heads * case.group), draw(case.n_kv_heads), draw(case.n_kv_heads)
    return Tokens(q, k, v, torch.randint(0, 1000, (n,), generator=generator))


class Rig:
    """An engine, its budgets and tiers, and how a model would call it."""

    def __init__(self, case: Case, engine: Engine[Any], gpu: Budget, host: Budget, disk: Budget | None = None) -> None:
        self.case = case
        self.engine = engine
        self.gpu, self.host, self.disk = gpu, host, disk

    @property
    def residency(self) -> Residency:
        assert isinstance(self.engine, TieredEngine)
        return self.engine.residency

    def new(self, select: int | None = None) -> Any:
        return self.engine.new_sequence(self.case.geometry.select if select is None else select)

    def fork(self, sequence: Sequence, select: int | None = None) -> Any:
        return self.engine.fork(sequence, sequence.select if select is None else select)

    def attend(self, sequence: Sequence, layer: int, block: Tokens) -> torch.Tensor:
        q, k, v = block.q[layer], block.k[layer], block.v[layer]
        return self.engine.attend(sequence, layer, q, k, v, Logits(self.case.scaling))

    def block(self, sequence: Sequence, block: Tokens) -> torch.Tensor:
        """One forward: out [L, H, b, D]."""
        self.engine.activate([sequence])
        out = [self.attend(sequence, layer, block) for layer in range(self.case.n_layers)]
        self.engine.commit(sequence, block.ids)
        return torch.stack(out)

    def feed(self, sequence: Sequence, tokens: Tokens) -> torch.Tensor:
        """One append, by the schedule: out [L, H, n, D]."""
        schedule = self.case.geometry.schedule(len(tokens))
        return torch.cat([self.block(sequence, tokens[begin:end]) for begin, end in schedule], dim=2)


@contextmanager
def tiered(
    case: Case,
    *,
    slots: int = 4096,
    host_bytes: int = PLENTY,
    disk_bytes: int | None = None,
    summary_chunks: int = slabs.SLAB_CHUNKS,
) -> Iterator[Rig]:
    """Method "chunks". Host slabs hold one chunk, so that budgets of a few chunks mean what they say.

    With ``disk_bytes`` there is a store; ``summary_chunks`` is the size of a slab of summaries.
    """
    shape, g = case.shape, case.geometry
    record = (g.chunk, case.head_dim, torch.float32)
    gpu, host = Budget("gpu", PLENTY), Budget("host", host_bytes)
    disk = None if disk_bytes is None else Budget("disk", disk_bytes)
    sketch = {"rank": case.rank, "bits": case.bits, "levels": case.levels, "overfetch": case.overfetch}
    summary = make_summary(case.kind, chunk=g.chunk, head_dim=case.head_dim, dtype=torch.float32, **sketch)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(slabs, "SLAB_CHUNKS", summary_chunks),
        patch.object(host_pool, "SLAB_BYTES", case.chunk_bytes),
    ):
        store = disk and StoreTier(Path(folder), disk, *record)
        residency = Residency(DevicePool(gpu, slots, *record, CPU), HostPool(host, *record, pin=False), store)
        engine = TieredEngine(shape, g, case.rotaries(), summary, residency, gpu, host)
        try:
            yield Rig(case, engine, gpu, host, disk)
        finally:
            engine.close()


def tight(case: Case, *, windows: int = 1, **more: Any) -> Any:
    """``tiered`` with the smallest device pool, a store, and little room on the host beside ``windows``."""
    g = case.geometry
    slots = max(1, g.select) * case.n_kv_heads
    retiring = case.n_kv_heads * (g.block // g.chunk + 1)
    host_bytes = windows * case.window_bytes + retiring * case.chunk_bytes
    return tiered(case, slots=slots, host_bytes=host_bytes, **({"disk_bytes": PLENTY} | more))


def reattention(case: Case, gpu_bytes: int = PLENTY) -> Rig:
    """Method "reattention"."""
    gpu = Budget("gpu", gpu_bytes)
    engine = ReAttentionEngine(case.shape, case.geometry, case.rotaries(), case.picks, gpu)
    return Rig(case, engine, gpu, Budget("host", 0))


# -- beside the oracles ------------------------------------------------------------------------------------------------


def codes_of(sequence: TieredSequence, layer: int) -> dict[str, torch.Tensor]:
    """The summaries of all chunks of a layer that have left the window, [N, m, ...] by name."""
    parts = list(sequence.layers[layer].codes.slabs(sequence.layers[layer].retired))
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def sketched_keys(case: Case, sequence: TieredSequence, layer: int, kv_head: int, index: int) -> np.ndarray:
    """The keys [C, D] that the sketch of a chunk stands for."""
    codes, state = codes_of(sequence, layer), sequence.layers[layer].fitted.state
    assert state is not None
    mean, _, back = (x[kv_head].double().numpy() for x in state)
    tokens = unpack(codes["codes"][kv_head, index], case.bits, case.rank).double().numpy()
    scale = codes["scale"][kv_head, index].double().numpy()
    return (tokens * scale) @ back.T + mean


class Judge:
    """Feeds blocks to a sequence of a tiered rig and to an oracle per layer, and compares."""

    def __init__(self, rig: Rig, select: int | None = None) -> None:
        self.rig = rig
        self.sequence = rig.new(select)
        self.oracles = [self._oracle(layer) for layer in range(rig.case.n_layers)]

    def _oracle(self, layer: int) -> ChunkOracle:
        case, g = self.rig.case, self.rig.case.geometry
        score_keys = None
        if case.kind == "sketch":

            def score_keys(kv_head: int, index: int, exact: np.ndarray) -> np.ndarray:
                return sketched_keys(case, self.sequence, layer, kv_head, index)

        return ChunkOracle(
            case.n_kv_heads * case.group,
            case.n_kv_heads,
            case.head_dim,
            g.sink,
            g.local,
            g.chunk,
            self.sequence.select,
            g.queries,
            case.inv_freq,
            case.attention_scaling,
            case.scaling,
            score_keys,
        )

    def block(self, block: Tokens) -> list[StepResult]:
        """One block, judged in every layer."""
        engine, g = self.rig.engine, self.rig.case.geometry
        engine.longest_attended = 0
        out = self.rig.block(self.sequence, block)
        results = []
        for layer, oracle in enumerate(self.oracles):
            last = engine.last_chosen[layer]
            chosen = [[]] * self.rig.case.n_kv_heads if last is None else last.tolist()
            assert all(row == sorted(row) for row in chosen)
            result = oracle.step(*block.arrays(layer), force=chosen)
            assert_same_choice(chosen, result)
            np.testing.assert_allclose(out[layer].numpy(), result.out, rtol=0, atol=1e-5)
            assert engine.longest_attended == result.n_attended <= g.bound
            results.append(result)
        return results

    def feed(self, tokens: Tokens) -> list[list[StepResult]]:
        """One append, by the schedule."""
        return [self.block(tokens[begin:end]) for begin, end in self.rig.case.geometry.schedule(len(tokens))]

    def decode(self, tokens: Tokens) -> list[list[StepResult]]:
        """One token at a time."""
        return [self.block(tokens[i : i + 1]) for i in range(len(tokens))]


class ReAttentionJudge:
    """The same for method "reattention". Feed tokens of ``grid``: then no score depends on rounding."""

    def __init__(self, rig: Rig, select: int | None = None) -> None:
        self.rig = rig
        self.sequence = rig.new(select)
        case, g = rig.case, rig.case.geometry
        self.oracles = [
            ReAttentionOracle(
                case.n_kv_heads * case.group,
                case.n_kv_heads,
                case.head_dim,
                g.sink,
                g.local,
                case.picks,
                g.chunk,
                self.sequence.select,
                case.inv_freq,
                case.attention_scaling,
                case.scaling,
            )
            for _ in range(case.n_layers)
        ]

    def block(self, block: Tokens) -> list[ReAttentionResult]:
        engine, g = self.rig.engine, self.rig.case.geometry
        engine.longest_attended = 0
        out = self.rig.block(self.sequence, block)
        results = []
        for layer, oracle in enumerate(self.oracles):
            result = oracle.step(*block.arrays(layer))
            assert engine.last_view[layer].tolist() == result.own_view
            np.testing.assert_allclose(out[layer].numpy(), result.out, rtol=0, atol=1e-5)
            assert len(result.view) <= engine.longest_attended <= g.bound
            results.append(result)
        return results

    def feed(self, tokens: Tokens) -> list[list[ReAttentionResult]]:
        return [self.block(tokens[begin:end]) for begin, end in self.rig.case.geometry.schedule(len(tokens))]

    def decode(self, tokens: Tokens) -> list[list[ReAttentionResult]]:
        return [self.block(tokens[i : i + 1]) for i in range(len(tokens))]


def with_select(case: Case, select: int) -> Case:
    """The same case with another ``select``, ``max`` following."""
    g = case.geometry
    return replace(case, geometry=make_geometry(g.sink, g.local, g.chunk, select, g.block, g.queries, g.tail))
