"""The coordinates in which keys are sketched: few of them carry most of what queries see. Torch on every device.

The fit is small, happens once per layer and sequence, and runs in float64 on the CPU: one implementation, one basis.
"""

import torch

LEAST_USED = 1e-6
"""Directions that queries use less than this share of the first one count as used this much."""


def fit_basis(keys: torch.Tensor, q_outer: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal directions of C_q^(1/2) (k - mean): of all maps to ``rank`` numbers, q.k is estimated best from these.

    C_q is the second moment of the queries, so a direction counts by what queries make of it, not by how much keys
    differ in it (own measurements: docs/summaries.md; with C_q = 1 it is the principal components of the keys).
    Sign: the largest component of each direction is positive.

    Parameters
    ----------
    keys : Tensor [N, n, D]
        The un-rotated keys then held after the sinks.
    q_outer : Tensor [N, D, D], float32
        Sum (or mean) of q q^T over the un-rotated queries so far, of all query heads of the KV head.
    rank : int
        Directions kept, at most D.

    Returns
    -------
    mean : Tensor [N, D], float32
    to : Tensor [N, D, rank], float32
        Coordinates of a key are (k - mean) @ to, largest variance first.
    back : Tensor [N, D, rank], float32
        q.(k - mean) is estimated as (q @ back).coordinates.
    """
    x = keys.float()
    mean = x.mean(dim=1)
    x = x - mean[:, None]
    covariance = (x.transpose(1, 2) @ x / keys.shape[1]).double().cpu()
    used, directions = torch.linalg.eigh(q_outer.double().cpu())
    used = torch.maximum(used, used[:, -1:] * LEAST_USED).clamp(min=torch.finfo(torch.float32).tiny)
    used = (used / used[:, -1:]).sqrt()  # the scale of the queries cancels out
    root = (directions * used[:, None]) @ directions.mT
    inverse = (directions / used[:, None]) @ directions.mT
    vectors = torch.linalg.eigh(root @ covariance @ root)[1].flip(-1)[..., :rank]
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    vectors = vectors * vectors.gather(1, largest).sign()
    to, back = (x.float().contiguous().to(keys.device) for x in (root @ vectors, inverse @ vectors))
    return mean, to, back
