"""Selection rules, each with exact scores: what pays whatever the summary is.

The reference is full attention with the model's own positions, so this runs on captures inside the trained window
(made with ``--max`` of the whole window) and analyses them as if the window were a part of it. Measured per rule, at
equal attended tokens: output error against full attention, the paper's picks, and the answer's chunks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.fidelity import metrics
from bench.fidelity.capture import Step
from bench.fidelity.problem import LayerCapture, measured_steps, read_meta
from kvtier.kernels.attend import rotate
from kvtier.kernels.select import exact_scores, top_chunks
from kvtier.runtime.geometry import Geometry

Weigh = Callable[[torch.Tensor], torch.Tensor]
"""Scores [N, group, Q, m] -> weights [N, m]."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How chunks are chosen from exact scores."""

    name: str
    geometry: Geometry
    choosing: int
    """Queries of a block that choose, evenly spaced."""
    weigh: Weigh
    shared: bool = False
    """One set for all KV heads, by the mean of their weights."""
    neighbours: int = 0
    """Chunks attended on either side of a chosen one."""


def softmax_mean(scores: torch.Tensor) -> torch.Tensor:
    """DESIGN's weight."""
    return scores.softmax(dim=-1).mean(dim=(1, 2))


def softmax_max(scores: torch.Tensor) -> torch.Tensor:
    """The largest share that any query gives a chunk."""
    return scores.softmax(dim=-1).amax(dim=(1, 2))


def score_mean(scores: torch.Tensor) -> torch.Tensor:
    """Means of raw scores; a softmax keeps their order and makes them weights."""
    return scores.mean(dim=(1, 2)).softmax(dim=-1)


def score_max(scores: torch.Tensor) -> torch.Tensor:
    """The largest raw score of any query."""
    return scores.amax(dim=(1, 2)).softmax(dim=-1)


def votes(top: int) -> Weigh:
    """Every query names its ``top`` chunks; ties of votes go by the mean softmax."""

    def weigh(scores: torch.Tensor) -> torch.Tensor:
        named = torch.zeros_like(scores).scatter_(-1, scores.topk(min(top, scores.shape[-1]), dim=-1).indices, 1.0)
        return named.sum(dim=(1, 2)) + softmax_mean(scores) / 2

    return weigh


def rules(g: Geometry) -> list[Rule]:
    """The rules that are compared, around DESIGN's for geometry ``g``."""
    base = Rule("design: 16 queries, softmax mean, per head", g, 16, softmax_mean)
    found = [base]
    found += [replace(base, name=f"{n} choosing queries", choosing=n) for n in (4, 64, g.block)]
    weighs: dict[str, Weigh] = {"softmax max": softmax_max, "score mean": score_mean, "score max": score_max}
    weighs |= {f"votes, {n} each": votes(n) for n in (1, 4, 16)}
    found += [replace(base, name=name, weigh=weigh) for name, weigh in weighs.items()]
    found += [replace(base, name="votes, 4 each, all queries", weigh=votes(4), choosing=g.block)]
    found += [replace(base, name="one set for all heads", shared=True)]
    found += [replace(base, name=f"and {n} neighbours on either side", neighbours=n) for n in (1, 2)]
    for share in (0.125, 0.25, 0.75, 0.875):
        found.append(replace(base, name=f"select {share:g} of the rest", geometry=split(g, share)))
    found += [replace(base, name=f"sink {n}", geometry=split(replace(g, sink=n), 0.5)) for n in (4, 128)]
    found += [replace(base, name=f"chunk {n}", geometry=split(replace(g, chunk=n), 0.5)) for n in (8, 16, 64)]
    return found


def split(g: Geometry, share: float) -> Geometry:
    """``g`` with ``share`` of what sinks and block leave selected, the remainder local."""
    rest = g.max - g.sink - (g.chunk - 1) - g.block
    select = int(rest * share) // g.chunk
    return replace(g, select=select, local=rest - select * g.chunk)


def choose(rule: Rule, capture: LayerCapture, step: Step) -> torch.Tensor:
    """Chunks [N, n] that a rule attends to at a step, ascending."""
    g, n_kv = rule.geometry, capture.meta.kv_heads
    n_chunks = g.selectable(step.start)
    q = capture.q(step)[:, metrics.evenly(step.size, rule.choosing if step.size > 64 else step.size)].float()
    keys = capture.keys[:, g.sink : g.sink + n_chunks * g.chunk].unflatten(1, (n_chunks, g.chunk))
    scores = exact_scores(q.reshape(n_kv, -1, q.shape[-1]) * capture.scaling, keys)
    weights = rule.weigh(scores.view(n_kv, -1, q.shape[1], n_chunks))
    if rule.shared:
        weights = weights.mean(dim=0, keepdim=True).expand_as(weights)
    if rule.neighbours:
        weights = _with_neighbours(weights, rule.neighbours, g.select)
    return top_chunks(weights, g.select)


def _with_neighbours(weights: torch.Tensor, reach: int, select: int) -> torch.Tensor:
    """Weights that fill ``select`` places with the heaviest chunks and, right after each, its neighbours."""
    n_chunks = weights.shape[1]
    order = weights.sort(dim=1, descending=True, stable=True).indices  # [N, m]
    offsets = torch.tensor(sorted(range(-reach, reach + 1), key=abs), device=weights.device)
    wanted = (order[..., None] + offsets).clamp(0, n_chunks - 1).flatten(1)  # by rank, each with its neighbours
    rank = torch.arange(wanted.shape[1], 0, -1, device=weights.device, dtype=weights.dtype).expand_as(wanted)
    return torch.zeros_like(weights).scatter_reduce_(1, wanted, rank, "amax")


def full_output(capture: LayerCapture, step: Step, queries: int) -> torch.Tensor:
    """Attention of evenly spaced queries over all tokens before them, positions as they are: [H, queries, D]."""
    keys, values = (x.float() for x in capture.kv_until(step))
    end = keys.shape[1]
    if end > len(capture.cos):
        raise ValueError(f"{end} tokens are beyond the {len(capture.cos)} positions of the trained window")
    which = torch.tensor(metrics.evenly(step.size, queries), device=keys.device)
    at = step.start + which
    q = rotate(capture.q(step)[:, which].float(), capture.cos[at], capture.sin[at])
    keys = rotate(keys, capture.cos[:end], capture.sin[:end])
    scores = q.unflatten(0, (keys.shape[0], -1)) @ keys[:, None].mT * capture.scaling
    scores.masked_fill_(torch.arange(end, device=keys.device) > at[:, None], -torch.inf)
    out: torch.Tensor = scores.softmax(dim=-1) @ values[:, None]
    return out.flatten(0, 1)


@dataclass(slots=True)
class RuleRow:
    """One rule at one step of one layer."""

    model: str
    text: str
    tokens: int
    layer: int
    phase: str
    rule: str
    error: float
    """Of the output against full attention."""
    picks: float
    """Share of the paper's picks (before its vote) that are attended, those in the window included."""
    needle: float | None


def compare(folder: Path, max_: int, *, device: str, decode: int, layers: int, queries: int) -> Iterator[RuleRow]:
    """All rules at all steps of a capture inside the trained window, for ``max_`` attended tokens."""
    meta = read_meta(folder)
    g = split(Geometry(**meta.geometry | {"max": max_, "block": meta.geometry["block"]}), 0.5)
    steps = measured_steps(meta, g, decode)
    every = max(1, -(-len(meta.layers) // layers))
    for layer in meta.layers[every // 2 :: every]:
        capture = LayerCapture(folder, meta, layer, device)
        for step in steps:
            reference = full_output(capture, step, queries)
            picked = metrics.picked_tokens(capture, step, g.sink)
            for rule in rules(g):
                if rule.geometry.selectable(step.start) <= rule.geometry.select:
                    continue
                chosen = choose(rule, capture, step)
                output = metrics.attended_output(capture, step, rule.geometry, chosen, queries)
                yield RuleRow(
                    meta.model, meta.text, meta.tokens, layer, step.phase, rule.name,
                    metrics.relative_error(output, reference),
                    float(attended_share(picked, chosen, step, rule.geometry).mean()),
                    _needle(meta.spans, chosen, step, rule.geometry),
                )  # fmt: skip


def attended_share(tokens: torch.Tensor, chosen: torch.Tensor, step: Step, g: Geometry) -> torch.Tensor:
    """Share of ``tokens`` [N, n] (positions in the sequence) among sinks, chosen chunks and window: [N]."""
    inside = torch.zeros(chosen.shape[0], g.selectable(step.start) + 1, dtype=torch.bool, device=chosen.device)
    inside.scatter_(1, chosen, True)
    chunk = ((tokens - g.sink) // g.chunk).clamp(0, inside.shape[1] - 1)
    outside_middle = (tokens < g.sink) | (tokens >= g.window_start(step.start))
    return (inside.gather(1, chunk) | outside_middle).float().mean(dim=1)


def _needle(spans: list[tuple[int, int]], chosen: torch.Tensor, step: Step, g: Geometry) -> float | None:
    if step.ask < 0 or spans[step.ask][1] == 0:
        return None
    tokens = torch.arange(*spans[step.ask], device=chosen.device).expand(chosen.shape[0], -1)
    return float(attended_share(tokens, chosen, step, g).mean())
