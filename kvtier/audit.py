"""``kv.audit()``: how near the chosen chunks come to what exact scores would choose, on the user's own data."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvtier.kernels.select import top_chunks
from kvtier.runtime.sequence import TieredSequence
from kvtier.runtime.summary import Summary, layout_bytes, make_summary
from kvtier.runtime.tiered import TieredEngine
from kvtier.runtime.trace import Step
from kvtier.runtime.weighing import by_keys, weigh

GOOD_RECALL = 0.85
"""What the summaries aim at (docs/summaries.md)."""
GOOD_WEIGHT = 0.9
"""Share of the weight below which even the exact choice leaves much out."""
NEARLY = 0.97
"""Of what the exact choice holds: then what is missed hardly matters."""
MOST_NAMED = 5
"""Layers that a suggestion names."""


@dataclass(frozen=True, slots=True)
class LayerAudit:
    """Of one layer, mean over audited blocks and KV heads unless it says otherwise."""

    layer: int
    recall: float
    """Share of the exactly chosen chunks that were chosen."""
    worst: float
    """Recall of the KV head and block with the least."""
    weight: float
    """Exact weight of the chunks that were chosen, of 1 for all that could be."""
    exact_weight: float
    """Exact weight of the exactly chosen chunks: the most that as many chunks can hold."""


@dataclass(frozen=True, slots=True)
class Audit:
    """Choice beside exact choice. ``print`` shows a table.

    Exact weights come from the keys as host and disk hold them: with ``[store] dtype`` "int8" or "int4" those are the
    de-quantised ones, which are what is attended to, whereas summaries were made of the keys before.
    """

    blocks: tuple[tuple[int, int], ...]
    """Tokens (begin, end) of the blocks that were audited."""
    layers: tuple[LayerAudit, ...]
    """The layers with full attention."""
    n_chunks: int
    """Chunks that the last of the blocks could choose from."""
    n_chosen: int
    """Chunks that it attended to, per KV head."""
    suggestion: str
    """What to change, in words; empty if nothing."""

    @property
    def recall(self) -> float:
        """Mean over layers."""
        return sum(layer.recall for layer in self.layers) / len(self.layers)

    @property
    def weight(self) -> float:
        """Exact weight of the chosen chunks, mean over layers."""
        return sum(layer.weight for layer in self.layers) / len(self.layers)

    @property
    def exact_weight(self) -> float:
        """Exact weight of the exactly chosen chunks, mean over layers."""
        return sum(layer.exact_weight for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, with ``recall``, ``weight`` and ``exact_weight``."""
        means = {name: getattr(self, name) for name in ("recall", "weight", "exact_weight")}
        return means | asdict(self)

    def __str__(self) -> str:
        first, last = self.blocks[0][0], self.blocks[-1][1]
        lines = [
            f"{len(self.blocks)} blocks of tokens {first} to {last}, {self.n_chosen} of {self.n_chunks} chunks chosen",
            f"{'layer':>7}{'recall':>9}{'worst':>8}{'weight':>9}{'exact choice':>14}",
        ]
        row = "{:>7}{:>9.3f}{:>8.3f}{:>9.3f}{:>14.3f}".format
        lines += [row(x.layer, x.recall, x.worst, x.weight, x.exact_weight) for x in self.layers]
        worst = min(layer.worst for layer in self.layers)
        lines.append(row("mean", self.recall, worst, self.weight, self.exact_weight))
        return "\n".join([*lines, *([self.suggestion] if self.suggestion else [])])


def sample(steps: list[Step], count: int) -> list[Step]:
    """``count`` of the ``steps``, or all, evenly spaced, the last of each stretch."""
    count = min(count, len(steps))
    return [steps[(i + 1) * len(steps) // count - 1] for i in range(count)]


def audit(engine: TieredEngine, sequence: TieredSequence, steps: list[Step]) -> Audit:
    """How ``steps`` of ``sequence`` chose, which all could choose; see ``Offload.audit``."""
    layers = tuple(_audit_layer(engine, sequence, steps, layer) for layer in engine.shape.full_layers)
    blocks = tuple((step.start, step.end) for step in steps)
    n_chosen = int(steps[-1].chosen_mask(layers[0].layer)[0].sum())
    found = Audit(blocks, layers, steps[-1].n_chunks, n_chosen, "")
    return Audit(blocks, layers, found.n_chunks, n_chosen, suggest(found, engine.summary))


def _audit_layer(engine: TieredEngine, sequence: TieredSequence, steps: list[Step], layer: int) -> LayerAudit:
    recalls, held, most = [], [], []
    for part, weights in weigh(by_keys(engine, sequence, layer), steps, layer):
        for i, weight in zip(part, weights.unbind(dim=1), strict=True):
            exact, chosen = weight[:, : steps[i].n_chunks], steps[i].chosen_mask(layer)  # [N, m]
            best = top_chunks(exact, int(chosen[0].sum()))
            recalls.append(chosen.gather(1, best).float().mean(dim=1))
            held.append((exact * chosen).sum(dim=1))
            most.append(exact.gather(1, best).sum(dim=1))
    recall = torch.stack(recalls)
    means = [float(torch.stack(each).mean()) for each in (held, most)]
    return LayerAudit(layer, float(recall.mean()), float(recall.min()), *means)


def suggest(found: Audit, summary: Summary) -> str:
    """What to change, in words; empty if nothing."""
    advice = []
    if found.recall < GOOD_RECALL:
        low = sorted((x for x in found.layers if x.recall < GOOD_RECALL), key=lambda x: x.recall)[:MOST_NAMED]
        named = ", ".join(f"{x.layer} ({x.recall:.2f})" for x in low)
        advice.append(f"Recall is low, least in layers {named}.")
        if found.weight >= NEARLY * found.exact_weight:
            share = 100 * found.weight / found.exact_weight
            advice.append(f"What is missed weighs little: {share:.1f}% of what the exact choice holds is there.")
        advice.append(_better_summary(summary))
    if found.exact_weight < GOOD_WEIGHT:
        held = 100 * found.exact_weight
        advice.append(
            f"Even the exact choice of {found.n_chosen} chunks holds {held:.0f}% of the weight alone: raise "
            "[attention] select (local, block or a larger max make room for it)."
        )
    return "\n".join(advice)


def _better_summary(now: Summary) -> str:
    """The next better ``[summary]`` and what it costs."""
    rank, bits = now.rank, now.bits
    if now.kernel_kind == "exact":
        return "Choices were exact for the keys before they were quantised: [store] dtype takes what is missing."
    if now.kernel_kind != "sketch":
        better, change = _sketch(now, rank, bits), 'kind = "sketch"'
    elif rank < now.head_dim:
        better = _sketch(now, min(2 * rank, now.head_dim), bits)
        change = f"rank = {better.rank}"
    elif bits < 8:
        better, change = _sketch(now, rank, 8), "bits = 8"
    else:
        better = make_summary("exact", chunk=now.chunk, head_dim=now.head_dim, dtype=now.dtype)
        change = 'kind = "exact"' + ", levels = 1" * (now.levels == 2)
    before, after = (layout_bytes(each.layout()) / now.chunk for each in (now, better))
    cost = (
        f"{after:g} bytes per token and KV head on the {'device' if now.levels == 1 else 'host'} instead of {before:g}"
    )
    if now.levels == 2:
        return f"Try [summary] overfetch = {2 * now.overfetch}, for more candidates, or {change}: {cost}."
    return f"Try [summary] {change}: {cost}."


def _sketch(now: Summary, rank: int, bits: int) -> Summary:
    kept = {"chunk": now.chunk, "head_dim": now.head_dim, "dtype": now.dtype}
    return make_summary("sketch", **kept, rank=min(rank, now.head_dim), bits=bits)  # type: ignore[arg-type]
