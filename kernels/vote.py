"""ReAttention's own selection (arXiv 2407.15176, exact mode): queries pick tokens, votes are counted."""

import torch

SCORE_BYTES = 64 << 20
"""Scores [H, rows, m] are made in pieces of at most this size."""


def pick_tokens(q: torch.Tensor, keys: torch.Tensor, picks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``picks`` largest q.k of every query of every head, ties to the lower index.

    Parameters
    ----------
    q : Tensor [H, b, D], un-rotated
    keys : Tensor [N, m, D], un-rotated; head h reads KV head h // (H / N)

    Returns
    -------
    indices : Tensor [H, b, min(picks, m)], int64
    scores : Tensor, same shape, float32
    """
    group = q.shape[0] // keys.shape[0]
    keys = keys.float().repeat_interleave(group, dim=0).transpose(1, 2)  # [H, D, m]
    rows = max(1, SCORE_BYTES // (4 * q.shape[0] * keys.shape[2]))
    parts = []
    for part in q.float().split(rows, dim=1):
        ranked = torch.sort(part @ keys, dim=-1, descending=True, stable=True)
        parts.append((ranked.indices[..., :picks], ranked.values[..., :picks]))
    return torch.cat([i for i, _ in parts], dim=1), torch.cat([s for _, s in parts], dim=1)


def elect_seeds(indices: torch.Tensor, scores: torch.Tensor, n_tokens: int, clip: int) -> torch.Tensor:
    """The at most ``clip`` tokens with most votes; ties by higher best score, then by lower index. Ascending.

    ``indices`` and ``scores`` as ``pick_tokens`` returns them -> Tensor [<= clip], int64.
    """
    flat, best = indices.flatten(), torch.full((n_tokens,), -torch.inf, device=scores.device)
    votes = torch.bincount(flat, minlength=n_tokens)
    best.scatter_reduce_(0, flat, scores.flatten(), "amax")
    seeds = votes.nonzero().squeeze(1)
    if seeds.numel() > clip:
        by_score = torch.sort(best[seeds], descending=True, stable=True).indices
        by_votes = torch.sort(votes[seeds][by_score], descending=True, stable=True).indices
        seeds = seeds[by_score[by_votes][:clip]].sort().values
    return seeds


def spread(seeds: torch.Tensor, span: int, n_tokens: int) -> torch.Tensor:
    """Each seed with its neighbours -span//2 .. (span+1)//2 - 1, clamped to the middle: ascending, distinct, int64."""
    offsets = torch.arange(-(span // 2), (span + 1) // 2, device=seeds.device)
    tokens: torch.Tensor = (seeds[:, None] + offsets).clamp(0, n_tokens - 1).unique()
    return tokens
