"""Coarse levels to compare: what proposes chunks whose fine codes are then scored.

All see the coordinates that the sketch's own codes stand for, and give an estimate of the largest product per chunk.
Where a name says "exact", its numbers are not quantised and the bytes are what 8 bits of each would take: a bound of
what the idea can do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.fidelity.quantisers import Product, kmeans, nearest
from kvtier.kernels.coarse import coarse_scores, corners, encode_coarse, fit_coarse
from kvtier.kernels.select import cuboid_scores, exact_scores

Scores = Callable[[torch.Tensor], torch.Tensor]
"""Queries in the sketch's coordinates [N, Q, rank] -> [N, Q, m]."""
FIRST = 128
"""Chunks that codebooks are fitted to."""


@dataclass(frozen=True, slots=True)
class Coarse:
    """One coarse level: ``make`` gets tokens [N, m, C, rank] and the basis' ``to`` [N, D, rank]."""

    name: str
    chunk_bytes: float
    """Of 32 tokens and rank 16."""
    make: Callable[[torch.Tensor, torch.Tensor], Scores]
    full_sum: bool = True
    """Whether the softmax of the second level counts the chunks that are no candidates, too."""


SHIPPED = "corners-7/scale, pq-4x8"


def catalogue() -> list[Coarse]:
    """Everything that was tried and is worth a line."""
    return [
        Coarse(SHIPPED, 30, _shipped),
        Coarse(f"{SHIPPED}/sum of candidates alone", 30, _shipped, full_sum=False),
        Coarse("corners-7/exact", 112, lambda z, to: _points(_corners(z, to))),
        Coarse("corners-7/pq-4x8", 28, lambda z, to: _points(_product(_corners(z, to), 4))),
        Coarse("corners-4/16x4, scales of 8 bits", 48, lambda z, to: _points(_symmetric(_corners(z, to)[:, :, :4], 7))),
        Coarse("farthest-7/scale, pq-4x8", 30, lambda z, _: _points(_scaled_product(_farthest(z, 7)))),
        Coarse("longest-7/scale, pq-4x8", 30, lambda z, _: _points(_scaled_product(_longest(z, 7)))),
        Coarse("every fifth token/scale, pq-4x8", 30, lambda z, _: _points(_scaled_product(z[:, :, ::5]))),
        Coarse("all tokens/pq-1x8", 32, _all_tokens),
        Coarse("all tokens/two directions of 4 bits", 48, lambda z, _: _leading(z, 2)),
        Coarse("all tokens/eight signs", 40, _signs),
        Coarse("means of 2 clusters/exact", 32, lambda z, _: _points(_clusters(z, 2))),
        Coarse("box/exact", 32, lambda z, _: _box(z, 1.0)),
        Coarse("box, half as wide/exact", 32, lambda z, _: _box(z, 0.5)),
        Coarse("mean + 2 deviations/exact", 32, _deviations),
        Coarse("mean and longest token/exact", 32, _mean_and_longest),
        Coarse("mean/exact", 16, lambda z, _: _points(z.mean(dim=2, keepdim=True))),
    ]


def _points(points: torch.Tensor) -> Scores:
    return lambda p: exact_scores(p, points)


def _shipped(z: torch.Tensor, to: torch.Tensor) -> Scores:
    level = fit_coarse(z[:, :FIRST], to)
    codes, scale = encode_coarse(z, level)
    eye = torch.eye(z.shape[3], device=z.device).expand(z.shape[0], -1, -1)
    nothing = torch.zeros(z.shape[0], z.shape[3], device=z.device)
    return lambda p: coarse_scores(p, codes, scale, level, nothing, eye)


def _corners(z: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """As what ships."""
    return corners(z, fit_coarse(z[:, :FIRST], to)[0])


def _scaled_product(points: torch.Tensor) -> torch.Tensor:
    """``points`` [N, m, k, rank] as product codes times the largest length in the chunk."""
    scale = points.norm(dim=3).amax(dim=2)[..., None, None].clamp(min=1e-20)
    return _product(points / scale, 4) * scale


def _product(points: torch.Tensor, groups: int) -> torch.Tensor:
    """``points`` [N, m, k, rank] as product codes fitted to the first chunks'."""
    coded = Product(groups)
    first = points[:, :FIRST].flatten(1, 2)
    coded.fit(first, first.var(dim=1))
    return coded.round_trip(points)


def _symmetric(points: torch.Tensor, top: int) -> torch.Tensor:
    scale = points.abs().amax(dim=2, keepdim=True).clamp(min=1e-20) / top
    return (points / scale).round() * scale


def _farthest(z: torch.Tensor, count: int) -> torch.Tensor:
    """The token farthest from the mean, then always the one farthest from those there are."""
    n, m, _, rank = z.shape
    rows = z.flatten(0, 1)
    away = (rows - rows.mean(dim=1, keepdim=True)).pow(2).sum(dim=2)
    kept = []
    for i in range(count):
        token = rows.gather(1, away.argmax(dim=1)[:, None, None].expand(-1, 1, rank))
        distance = (rows - token).pow(2).sum(dim=2)
        away = torch.minimum(away, distance) if i else distance
        kept.append(token)
    return torch.cat(kept, dim=1).view(n, m, count, rank)


def _longest(z: torch.Tensor, count: int) -> torch.Tensor:
    index = z.norm(dim=3).topk(count, dim=2).indices[..., None]
    return z.gather(2, index.expand(-1, -1, -1, z.shape[3]))


def _all_tokens(z: torch.Tensor, _: torch.Tensor) -> Scores:
    """A codebook of 256 tokens."""
    coded = []
    for rows in z:
        book = kmeans(rows[:FIRST].flatten(0, 1), 256, 6)
        coded.append(book[nearest(rows.flatten(0, 1), book)].view_as(rows))
    return _points(torch.stack(coded))


def _leading(z: torch.Tensor, count: int) -> Scores:
    kept = _symmetric(z[..., :count], 7)
    return lambda p: exact_scores(p[..., :count], kept)


def _signs(z: torch.Tensor, _: torch.Tensor) -> Scores:
    """Signs of eight directions, and their mean size in the chunk."""
    kept = z[..., :8].sign() * z[..., :8].abs().mean(dim=2, keepdim=True)
    return lambda p: exact_scores(p[..., :8], kept)


def _clusters(z: torch.Tensor, count: int) -> torch.Tensor:
    """Means of clusters that begin at the farthest tokens."""
    n, m = z.shape[:2]
    rows, centres = z.flatten(0, 1), _farthest(z, count).flatten(0, 1)
    for _ in range(4):
        mine = torch.nn.functional.one_hot(torch.cdist(rows, centres).argmin(dim=2), count).float()
        size = mine.sum(dim=1)[..., None]
        centres = torch.where(size > 0, mine.mT @ rows / size.clamp(min=1), centres)
    return centres.view(n, m, count, -1)


def _box(z: torch.Tensor, width: float) -> Scores:
    low, high = z.amin(dim=2), z.amax(dim=2)
    return lambda p: cuboid_scores(p, (low + high) / 2, (high - low) / 2 * width)


def _deviations(z: torch.Tensor, _: torch.Tensor) -> Scores:
    mean, variance = z.mean(dim=2), z.var(dim=2)
    return lambda p: p @ mean.mT + 2 * (p.pow(2) @ variance.mT).sqrt()


def _mean_and_longest(z: torch.Tensor, _: torch.Tensor) -> Scores:
    return _points(torch.cat((z.mean(dim=2, keepdim=True), _longest(z, 1)), dim=2))
