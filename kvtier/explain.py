"""``kv.explain()``: which spans of a text the last blocks attended to, by layer and weight."""

import os
import textwrap
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.heatmap import Heatmap, draw
from kvtier.runtime.sequence import TieredSequence
from kvtier.runtime.tiered import TieredEngine
from kvtier.runtime.trace import Step
from kvtier.runtime.weighing import by_summaries, weigh

Weights = npt.NDArray[np.float32]
LINES = 3
"""Of a span's text that are printed, at most."""


@dataclass(frozen=True, slots=True)
class Span:
    """Adjacent chunks that were attended to: tokens begin..end of the cache, counted from a row's first real token."""

    begin: int
    end: int
    weight: float
    """Mean over blocks, layers and KV heads of its chunks' weight where they were attended to, 0 where not."""
    rise: float
    """Weight above the least that any of the blocks gives its chunks; all of it, if there is one block.

    Spans are ranked by it: some chunks, often the first of a text, get much weight from every block, whatever it is
    about. In 6 of 6 answers of SmolLM2-135M about facts in 6,000 tokens of a novel the fact's chunk had the largest
    rise of 171, and the 4th to 8th largest weight.
    """
    by_layer: dict[int, float]
    """The same for each layer with full attention."""
    by_block: tuple[float, ...]
    """The same for each block that is explained."""
    text: str | None
    """None without a tokenizer."""

    @property
    def layer(self) -> int:
        """Where it weighs most."""
        return max(self.by_layer, key=self.by_layer.__getitem__)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What blocks of tokens attended to beside sinks and window. ``print`` shows a table.

    A chunk's weight for a KV head and block is its share among the chunks that could be chosen: the softmax over chunks
    of their largest position-free q.k, as the summaries (of two levels, the fine codes) estimate it, mean over choosing
    queries and the head's query heads. It decides what is attended to; it is not the attention that the model then
    pays, of which sinks and window have their part.
    """

    spans: tuple[Span, ...]
    """By rise, the largest first."""
    blocks: tuple[tuple[int, int], ...]
    """Tokens (begin, end) of each block that is explained: those of the question, then one a generated token."""
    n_forgotten: int
    """Earlier blocks that the trace had no room for."""
    sink: int
    """Tokens before the first chunk."""
    chunk: int
    """Tokens of a chunk."""
    layers: tuple[int, ...]
    """Layers with full attention."""
    by_layer: Weights
    """[layers, chunks]: weight of each chunk where it was attended to, mean over blocks and KV heads."""
    by_block: Weights
    """[blocks, chunks]: the same, mean over layers and KV heads."""

    @property
    def share(self) -> float:
        """Weight of all chunks that were attended to: 1 if all were, always."""
        return float(self.by_layer.sum(axis=1).mean()) if self.by_layer.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ``spans`` (begin, end, rise, weight, by_layer, text), ``blocks``, ``n_forgotten``, ``share``."""
        spans = [
            {
                "begin": span.begin,
                "end": span.end,
                "rise": span.rise,
                "weight": span.weight,
                "by_layer": {str(layer): weight for layer, weight in span.by_layer.items()},
                "text": span.text,
            }
            for span in self.spans
        ]
        blocks = [list(block) for block in self.blocks]
        return {"spans": spans, "blocks": blocks, "n_forgotten": self.n_forgotten, "share": self.share}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write an SVG: weight over the text, by layer and by block. Raises ValueError for another kind of file."""
        if os.fspath(path).rpartition(".")[2].lower() != "svg":
            raise ValueError(f"a plot is written as SVG: give a path that ends in .svg, not {os.fspath(path)!r}")
        marks = [(span.begin, span.end, str(rank)) for rank, span in enumerate(self.spans, 1)]
        labels = [f"{begin}" if end == begin + 1 else f"{begin}-{end}" for begin, end in self.blocks]
        maps = [
            Heatmap("layer", [str(layer) for layer in self.layers], self.by_layer),
            Heatmap("block at token", labels, self.by_block),
        ]
        draw(maps, marks, self.sink, self.chunk, path)

    def __str__(self) -> str:
        first, last = self.blocks[0][0], self.blocks[-1][1]
        forgotten = f" ({self.n_forgotten} before them had no room in the trace)" if self.n_forgotten else ""
        head = f"{len(self.blocks)} blocks, tokens {first} to {last}{forgotten}"
        if not self.spans:
            return f"{head}: sinks and window alone were attended to"
        lines = [
            f"{head}: the chunks attended to hold {100 * self.share:.1f}% of the weight",
            f"{'':>4}{'tokens':>19}{'rise':>9}{'weight':>9}{'layer':>7}",
        ]
        for rank, span in enumerate(self.spans, 1):
            where = f"{span.begin}-{span.end}"
            lines.append(f"{rank:>4}{where:>19}{100 * span.rise:>8.2f}%{100 * span.weight:>8.2f}%{span.layer:>7}")
            if span.text is not None:
                text = textwrap.fill(" ".join(span.text.split()), 96, max_lines=LINES, placeholder=" ...")
                lines.append(textwrap.indent(text, "     "))
        return "\n".join(lines)


def explain(
    engine: TieredEngine, sequence: TieredSequence, steps: list[Step], n_forgotten: int, tokenizer: Any, top: int
) -> Explanation:
    """What ``steps`` of ``sequence`` attended to; see ``Offload.explain``."""
    layers = engine.shape.full_layers
    n_chunks = max((step.n_chunks for step in steps if step.layers), default=0)
    by_layer = np.zeros((len(layers), n_chunks), np.float32)
    by_block = np.zeros((len(steps), n_chunks), np.float32)
    where = [i for i, step in enumerate(steps) if step.layers]
    for row, layer in enumerate(layers if where else []):
        score = by_summaries(engine, sequence, layer)
        for part, weights in weigh(score, [steps[i] for i in where], layer):
            mine = [where[i] for i in part]
            for i, weight in zip(mine, weights.unbind(dim=1), strict=True):
                kept = weight[:, : steps[i].n_chunks] * steps[i].chosen_mask(layer)  # [N, m]
                mean = kept.mean(dim=0).cpu().numpy()
                by_layer[row, : mean.size] += mean / len(steps)
                by_block[i, : mean.size] += mean / len(layers)
    g = engine.geometry
    spans = _spans(by_layer, by_block, layers, top, g.sink, g.chunk)
    if tokenizer is not None:
        ids = sequence.tokens.array()
        spans = [_with_text(span, tokenizer, ids) for span in spans]
    blocks = tuple((step.start, step.end) for step in steps)
    return Explanation(tuple(spans), blocks, n_forgotten, g.sink, g.chunk, tuple(layers), by_layer, by_block)


def _spans(by_layer: Weights, by_block: Weights, layers: list[int], top: int, sink: int, chunk: int) -> list[Span]:
    """The ``top`` chunks that rise most, adjacent ones as one span; the one that rises most first."""
    total = by_layer.mean(axis=0)
    rise = total - by_block.min(axis=0) if len(by_block) > 1 else total
    best = np.sort(np.argsort(-rise, kind="stable")[:top])
    best = best[rise[best] > 0]
    cuts = [0, *(np.flatnonzero(np.diff(best) > 1) + 1).tolist(), best.size] if best.size else []
    spans = []
    for first, last in pairwise(cuts):
        here = slice(int(best[first]), int(best[last - 1]) + 1)
        weights = by_layer[:, here].sum(axis=1)
        spans.append(
            Span(
                sink + here.start * chunk,
                sink + here.stop * chunk,
                float(total[here].sum()),
                float(rise[here].sum()),
                {layer: float(weight) for layer, weight in zip(layers, weights, strict=True)},
                tuple(by_block[:, here].sum(axis=1).tolist()),
                None,
            )
        )
    return sorted(spans, key=lambda span: -span.rise)


def _with_text(span: Span, tokenizer: Any, ids: npt.NDArray[np.int64]) -> Span:
    text = tokenizer.decode(ids[span.begin : span.end].tolist(), clean_up_tokenization_spaces=False)
    return replace(span, text=text)
