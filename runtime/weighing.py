"""Weights of all chunks for the blocks of a trace: from their summaries, as they were chosen, or from the keys."""

from collections.abc import Callable, Iterator

import torch

from kvtier.kernels.select import exact_scores
from kvtier.runtime.sequence import TieredSequence
from kvtier.runtime.tiered import TieredEngine
from kvtier.runtime.trace import Step

Score = Callable[[torch.Tensor, int], torch.Tensor]
"""Queries [N, R, D] float32 and a number of chunks m -> the largest q.k of each of the first m, [N, R, m] float32."""
SCORE_BYTES = 128 << 20
"""Scores, and weights, are made in parts of at most this size. Keys are read once for each part."""
READ_BYTES = 16 << 20
"""Chunks that are read back at a time."""


def weigh(score: Score, steps: list[Step], layer: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """DESIGN's weights of all chunks in one layer: the mean over choosing queries of the softmax over chunks.

    Returns
    -------
    Iterator of (indices of s of the ``steps``, weights [N, s, m] float32 on the device; 0 where there was no chunk yet)
    """
    n_rows = [step.layers[layer].queries.shape[1] for step in steps]
    row_bytes = 4 * steps[0].layers[layer].queries.shape[0] * max(step.n_chunks for step in steps)
    most_rows = max(1, SCORE_BYTES // row_bytes)
    begin = 0
    while begin < len(steps):
        end = begin + 1
        while end < len(steps) and sum(n_rows[begin : end + 1]) <= most_rows:
            end += 1
        yield list(range(begin, end)), _weigh(score, steps[begin:end], layer, most_rows)
        begin = end


def _weigh(score: Score, steps: list[Step], layer: int, most_rows: int) -> torch.Tensor:
    """Weights [N, s, m] of a few ``steps``, ``most_rows`` queries at a time."""
    rows = torch.cat([step.layers[layer].queries for step in steps], dim=1)
    device = rows.device
    sizes = torch.tensor([step.layers[layer].queries.shape[1] for step in steps], device=device)
    number = torch.arange(len(steps), device=device)
    step_of = number.repeat_interleave(sizes)
    n_chunks = torch.tensor([step.n_chunks for step in steps], device=device)
    m = int(n_chunks.max())
    weights = torch.zeros(rows.shape[0], len(steps), m, device=device)
    for begin in range(0, rows.shape[1], most_rows):
        mine = step_of[begin : begin + most_rows]
        scores = score(rows[:, begin : begin + most_rows], m)
        scores.masked_fill_(torch.arange(m, device=device) >= n_chunks[mine, None], -torch.inf)
        share = (mine == number[:, None]) / sizes[:, None]
        weights += share @ scores.softmax(dim=-1)
    return weights


def by_summaries(engine: TieredEngine, sequence: TieredSequence, layer: int) -> Score:
    """What the chunks of a layer were chosen by."""
    chunks = sequence.layers[layer]

    def score(rows: torch.Tensor, n_chunks: int) -> torch.Tensor:
        assert chunks.fitted is not None
        state = chunks.fitted.state
        return torch.cat([engine.summary.scores(state, codes, rows) for codes in chunks.codes.slabs(n_chunks)], dim=-1)

    return score


def by_keys(engine: TieredEngine, sequence: TieredSequence, layer: int) -> Score:
    """What exact selection would choose by: the keys, as host and disk have them, read back without moving anything.

    Raises StoreError: a chunk cannot be read back as it was written.
    """
    ids, residency = sequence.layers[layer].ids, engine.residency
    step = max(1, READ_BYTES // (residency.host.item_bytes * len(ids)))

    def score(rows: torch.Tensor, n_chunks: int) -> torch.Tensor:
        parts = []
        for begin in range(0, n_chunks, step):
            wanted = ids[:, begin : min(begin + step, n_chunks)]
            keys = residency.look(wanted.ravel())[:, 0].unflatten(0, wanted.shape)
            parts.append(exact_scores(rows, keys))
        return torch.cat(parts, dim=-1)

    return score
