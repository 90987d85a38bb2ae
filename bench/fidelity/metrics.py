"""How near a choice of chunks comes to the exact one, and to the paper's choice of tokens."""

from dataclasses import dataclass

import torch

from bench.fidelity.capture import Step
from bench.fidelity.problem import LayerCapture
from kvtier.kernels.attend import rotate
from kvtier.kernels.vote import elect_seeds, spread
from kvtier.runtime.geometry import Geometry

PICKS = 4
"""Tokens that each query head picks: the paper's k, and the default of ``[attention] picks``."""
ELECTORS = 64
"""Queries of a block that vote in the paper's rule here, evenly spaced; the paper lets all of them."""


def recall(chosen: torch.Tensor, exact: torch.Tensor, n_chunks: int) -> torch.Tensor:
    """Share of the chunks ``exact`` [N, n] that are in ``chosen`` [N, n'], per KV head: [N] float32."""
    return _mask(chosen, n_chunks).gather(1, exact).float().mean(dim=1)


def _mask(chunks: torch.Tensor, n_chunks: int) -> torch.Tensor:
    """``chunks`` [N, n] as booleans [N, n_chunks]."""
    out = torch.zeros(chunks.shape[0], n_chunks, dtype=torch.bool, device=chunks.device)
    return out.scatter_(1, chunks, True)


# -- the paper's choice ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class PaperChoice:
    """What ``[attention] method = "reattention"`` picks at one step, where it lies among the middle chunks."""

    picks: torch.Tensor
    """[N, group*b*k]: chunk of each (head, query)'s tokens before the vote, by KV head; -1: in the window."""
    seeds: torch.Tensor
    """[seeds]: chunk of each elected token, -1 likewise."""
    tokens: torch.Tensor
    """[m*C] bool: middle tokens that are attended (seeds with their neighbours)."""


def paper_choice(capture: LayerCapture, step: Step, geometry: Geometry, n_chunks: int) -> PaperChoice:
    """ReAttention with the geometry's sink, local, span = chunk and clip = select, on exact un-rotated q.k."""
    g, n_kv = geometry, capture.meta.kv_heads
    end = step.start + step.size
    keys = capture.kv_until(step)[0][:, g.sink : max(g.sink + 1, end - g.local)].float()
    q = capture.q(step)[:, evenly(step.size, ELECTORS)].float()
    index, score = _pick(q.reshape(n_kv, -1, q.shape[-1]), keys)
    seeds = elect_seeds(index, score, keys.shape[1], g.select)
    tokens = torch.zeros(n_chunks * g.chunk, dtype=torch.bool, device=keys.device)
    attended = spread(seeds, g.chunk, keys.shape[1])
    tokens[attended[attended < len(tokens)]] = True

    def chunk_of(token: torch.Tensor) -> torch.Tensor:
        chunk = token // g.chunk
        return torch.where(chunk < n_chunks, chunk, -1)

    return PaperChoice(chunk_of(index.flatten(1)), chunk_of(seeds), tokens)


def picked_tokens(capture: LayerCapture, step: Step, sink: int) -> torch.Tensor:
    """Positions [N, n] of the ``PICKS`` tokens with the largest un-rotated q.k between sinks and step, per query."""
    q = capture.q(step)[:, evenly(step.size, ELECTORS)].float()
    keys = capture.kv_until(step)[0][:, sink : step.start].float()
    return _pick(q.reshape(keys.shape[0], -1, q.shape[-1]), keys)[0].flatten(1) + sink


def _pick(rows: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``PICKS`` largest q.k of each of ``rows`` [N, R, D] over ``keys`` [N, m, D]: index and score [N, R, k]."""
    parts = [
        (part @ keys.transpose(1, 2)).topk(min(PICKS, keys.shape[1]), dim=-1)
        for part in rows.split(max(1, (32 << 20) // (keys.shape[0] * keys.shape[1])), dim=1)
    ]
    return torch.cat([p.indices for p in parts], dim=1), torch.cat([p.values for p in parts], dim=1)


def covered(chunks: torch.Tensor, chosen: torch.Tensor, n_chunks: int) -> torch.Tensor:
    """Share of tokens, given by their ``chunks`` [N, n] or [n], that ``chosen`` [N, s] or the window has: [N].

    Tokens with chunk -1 are in the window and always attended: they are left out of the count; nan if all are.
    """
    chunks = chunks.expand(chosen.shape[0], -1)
    inside = _mask(chosen, n_chunks).gather(1, chunks.clamp(min=0))
    counted = chunks >= 0
    return (inside & counted).sum(dim=1) / counted.sum(dim=1)


def jaccard(weights: torch.Tensor, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    """|A & B| / |A | B| of the paper's middle ``tokens`` [m*C] and as many in the chunks of largest weight, per head.

    ``weights`` [N, m] -> [N].
    """
    n = max(1, round(int(tokens.sum()) / chunk))
    chosen = _mask(weights.topk(n, dim=1).indices, weights.shape[1]).repeat_interleave(chunk, dim=1)
    return (chosen & tokens).sum(dim=1) / (chosen | tokens).sum(dim=1)


# -- what comes out of attention ---------------------------------------------------------------------------------------


def attended_output(
    capture: LayerCapture, step: Step, geometry: Geometry, chosen: torch.Tensor, queries: int
) -> torch.Tensor:
    """Attention of ``queries`` evenly spaced queries of a step over [sinks | chosen | window]: [H, queries, D] float32.

    Positions 0..n-1 are given in that order, as kernels.attend does for a whole block.
    """
    g = geometry
    keys, values = (_assemble(x, chosen, step, g) for x in capture.kv_until(step))
    n = keys.shape[1]
    which = torch.tensor(evenly(step.size, queries), device=keys.device)
    at = n - step.size + which
    q = rotate(capture.q(step)[:, which].float(), capture.cos[at], capture.sin[at])
    keys = rotate(keys, capture.cos[:n], capture.sin[:n])
    scores = q.unflatten(0, (keys.shape[0], -1)) @ keys[:, None].transpose(2, 3) * capture.scaling  # [N, group, Q, n]
    scores.masked_fill_(torch.arange(n, device=keys.device) > at[:, None], -torch.inf)
    out: torch.Tensor = scores.softmax(dim=-1) @ values[:, None]
    return out.flatten(0, 1)


def _assemble(x: torch.Tensor, chosen: torch.Tensor, step: Step, g: Geometry) -> torch.Tensor:
    """[sinks | chosen chunks | window] of ``x`` [N, end, D], float32."""
    middle = x[:, g.sink : g.window_start(step.start)].unflatten(1, (-1, g.chunk))
    index = chosen[..., None, None].expand(-1, -1, g.chunk, x.shape[2])
    picked = middle.gather(1, index).flatten(1, 2)
    return torch.cat((x[:, : g.sink], picked, x[:, g.window_start(step.start) :]), dim=1).float()


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """|o - ref| / |ref| over all heads and queries."""
    return float((output - reference).norm() / reference.norm())


def evenly(size: int, count: int) -> list[int]:
    """At most ``count`` indices below ``size``, the last of each stretch."""
    count = min(size, count)
    return [(i + 1) * size // count - 1 for i in range(count)]
