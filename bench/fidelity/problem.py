"""One captured layer, cut into chunks for one geometry: what every summary has to answer, and the exact answers."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.fidelity.capture import CONTEXT, Meta, Step
from kvtier.kernels.select import chunk_weights, exact_scores, top_chunks
from kvtier.runtime.geometry import Geometry


def read_meta(folder: Path) -> Meta:
    """``meta.json`` of a capture."""
    raw = json.loads((folder / "meta.json").read_text())
    steps = [Step(**step) for step in raw.pop("steps")]
    return Meta(**raw, steps=steps)


def default_geometry(max_: int, *, chunk: int = 32, block: int | None = None, sink: int = 32) -> Geometry:
    """DESIGN's default for ``max_`` attended tokens: half of what sinks and block leave is selected."""
    block = max(1, min(1024, max_ // 8)) if block is None else block
    rest = max_ - sink - (chunk - 1) - block
    select = max(0, rest // 2 // chunk)
    return Geometry(max_, sink, rest - select * chunk, chunk, select, block, 16, min(64, block))


class LayerCapture:
    """The tensors of one captured layer on the device where they are analysed."""

    def __init__(self, folder: Path, meta: Meta, layer: int, device: str) -> None:
        self.meta = meta
        self.layer = layer
        self.device = device
        self.scaling = meta.scaling[meta.layers.index(layer)]
        self._tensors = load_file(folder / f"layer{layer:02d}.safetensors", device=device)
        rotary = load_file(folder / "rotary.safetensors", device=device)
        self.cos, self.sin = rotary["cos"], rotary["sin"]

    @property
    def keys(self) -> torch.Tensor:
        """[N, T, D] of the context."""
        return self._tensors["k"]

    def q(self, step: Step) -> torch.Tensor:
        """[H, b, D], un-rotated and not scaled."""
        return self._tensors[f"q.{step.name}"]

    def kv_until(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [N, end, D] of all tokens up to the end of a step."""
        end = step.start + step.size
        if step.ask == CONTEXT:
            return self._tensors["k"][:, :end], self._tensors["v"][:, :end]
        k, v = (torch.cat((self._tensors[n], self._tensors[f"{n}.{step.ask}"]), dim=1)[:, :end] for n in ("k", "v"))
        return k, v

    def q_outer(self, start: int) -> torch.Tensor:
        """Mean of q q^T [N, D, D] over the queries of the context before the block at ``start``."""
        index = self.meta.block_starts.index(start) - 1
        rows: torch.Tensor = self._tensors["q_outer"][index] / (start * (self.meta.heads // self.meta.kv_heads))
        return rows


@dataclass(slots=True)
class Question:
    """One step: its choosing queries and what exact scores choose."""

    step: Step
    n_chunks: int
    rows: torch.Tensor
    """[N, group*Q, D] float32, scaled."""
    exact: torch.Tensor
    """Weights [N, n_chunks] float32 from exact scores."""
    chosen: torch.Tensor
    """[N, select] int64, ascending: what exact scores choose."""


class Problem:
    """A layer under a geometry."""

    def __init__(self, capture: LayerCapture, geometry: Geometry, steps: list[Step]) -> None:
        self.capture = capture
        self.geometry = g = geometry
        meta = capture.meta
        first = next(start for start in meta.block_starts if g.selectable(start) >= 1)
        self.fit_keys = capture.keys[:, g.sink : first].float()
        """[N, n, D]: what a summary is fitted to, as runtime.tiered does."""
        self.q_outer = capture.q_outer(first)
        """[N, D, D]: mean q q^T of the queries before that block, likewise."""
        n_chunks = max(g.selectable(step.start) for step in steps)
        end = g.sink + n_chunks * g.chunk
        assert end <= meta.tokens, "a middle chunk lies beyond the context: ask and decode steps outgrew the window"
        self.keys = capture.keys[:, g.sink : end].float().unflatten(1, (n_chunks, g.chunk))
        """[N, m, C, D] of all middle chunks."""
        self.questions = [self._question(step) for step in steps]

    def choosing(self, step: Step) -> list[int]:
        """Which queries of the step choose; overridden where that is what is studied."""
        return self.geometry.choosing(step.size)

    def _question(self, step: Step) -> Question:
        n_chunks = self.geometry.selectable(step.start)
        q = self.capture.q(step)[:, self.choosing(step)].float() * self.capture.scaling
        rows = q.reshape(self.capture.meta.kv_heads, -1, q.shape[-1])
        weights = chunk_weights(exact_scores(rows, self.keys[:, :n_chunks]))
        return Question(step, n_chunks, rows, weights, top_chunks(weights, self.geometry.select))


def measured_steps(meta: Meta, geometry: Geometry, decode_per_ask: int) -> list[Step]:
    """The kept steps at which there is a choice: more chunks than are selected. Decode steps evenly thinned."""
    steps = [s for s in meta.steps if geometry.selectable(s.start) > geometry.select and s.size <= geometry.block]
    decode: dict[int, list[Step]] = {}
    for step in steps:
        if step.phase == "decode" and step.ask != CONTEXT:
            decode.setdefault(step.ask, []).append(step)
    thinned = [s for each in decode.values() for s in each[:: max(1, len(each) // decode_per_ask)][:decode_per_ask]]
    return [s for s in steps if s.phase != "decode"] + thinned
