"""Which chunks a block attends to: scores from summaries, weights, the largest ``select`` of them.

All of it in float32, without atomics: the same set on every run of one device and version.
"""

import torch

from kvtier.kernels.quantize import unpack


def exact_scores(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Largest q.k over the tokens of each chunk.

    Parameters
    ----------
    q : Tensor [N, Q, D], float32
        Scaled, un-rotated queries of the heads that share a KV head (Q = group x queries).
    keys : Tensor [N, m, C, D]

    Returns
    -------
    Tensor [N, Q, m], float32
    """
    n, m, c, d = keys.shape
    scores = q @ keys.reshape(n, m * c, d).float().transpose(1, 2)  # [N, Q, m*C]
    return scores.view(n, -1, m, c).amax(dim=-1)


def sketch_scores(
    q: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    basis: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """The same from sketches: q.k estimated as q.mean + sum_r (q.basis_r) scale_r code_r.

    Parameters
    ----------
    q : Tensor [N, Q, D], float32
    codes : Tensor [N, m, C, packed], uint8
    scale : Tensor [N, m, rank], bfloat16
    mean : Tensor [N, D]; basis : Tensor [N, D, rank], both float32

    Returns
    -------
    Tensor [N, Q, m], float32
    """
    n, m, c, _ = codes.shape
    rank = basis.shape[-1]
    tokens = unpack(codes, bits, rank).mul_(scale.float()[:, :, None])  # [N, m, C, rank]
    projected = q @ basis  # [N, Q, rank]
    scores = projected @ tokens.view(n, m * c, rank).transpose(1, 2)  # [N, Q, m*C]
    return scores.view(n, -1, m, c).amax(dim=-1) + q @ mean[..., None]


def mean_scores(q: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """q.mean of each chunk.

    ``q`` [N, Q, D] float32, ``mean`` [N, m, D] in the model's dtype -> [N, Q, m] float32.
    """
    return q @ mean.float().transpose(1, 2)


def minmax_scores(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Largest q.x over the box ``low`` to ``high`` of each chunk: sum_d max(q_d low_d, q_d high_d).

    The sign of q_d decides which of the two is the larger: two matrix products, nothing of size [N, Q, m, D].

    Parameters
    ----------
    q : Tensor [N, Q, D], float32
    low, high : Tensor [N, m, D] each, in the model's dtype

    Returns
    -------
    Tensor [N, Q, m], float32
    """
    scores = q.clamp(min=0) @ high.float().transpose(1, 2)
    return scores.baddbmm_(q.clamp(max=0), low.float().transpose(1, 2))


def cuboid_scores(q: torch.Tensor, centre: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Largest q.x over the box ``centre`` - ``deviation`` to ``centre`` + ``deviation``: q.centre + |q|.deviation.

    Parameters
    ----------
    q : Tensor [N, Q, D], float32
    centre, deviation : Tensor [N, m, D] each, in the model's dtype

    Returns
    -------
    Tensor [N, Q, m], float32
    """
    scores = q @ centre.float().transpose(1, 2)
    return scores.baddbmm_(q.abs(), deviation.float().transpose(1, 2))


def chunk_weights(scores: torch.Tensor) -> torch.Tensor:
    """Weight of each chunk for a KV head: the mean over its queries of the softmax over chunks.

    ``scores`` [N, Q, m] float32 -> [N, m] float32.
    """
    return scores.softmax(dim=-1).mean(dim=1)


def top_chunks(weights: torch.Tensor, select: int) -> torch.Tensor:
    """Indices of the ``select`` largest weights per KV head, ties to the lower index, in order of position.

    ``weights`` [N, m] float32 -> [N, min(select, m)] int64, ascending.
    """
    order = torch.sort(weights, dim=-1, descending=True, stable=True).indices
    return order[:, :select].sort(dim=-1).values
