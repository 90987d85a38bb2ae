"""The coordinates in which keys are sketched: few of them carry most of what queries see. Torch on every device.

The fit is small, happens once per layer and sequence, and runs in float64: one implementation, one basis.
"""

import torch

LEAST_USED = 1e-6
"""Directions that queries use less than this share of the first one count as used this much."""
USE = 0.25
"""Power of C_q that scales a direction: 1/2 for the least mean error of q.k over early queries, 0 for keys alone."""


def fit_basis(keys: torch.Tensor, q_outer: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Directions of the far keys, as queries see them: principal directions of y = C_q^(1/4) (k - mean), weighted.

    C_q is the second moment of the queries: a direction counts by what queries make of it, too, not only by how much
    keys differ in it. Its fourth root, not its square root: the queries so far are not those that will ask. A key
    counts with |y|^4: keys far from the mean are the largest q.k, and rare (names, numbers), so that plain principal
    directions leave them out (own measurements of both: docs/summaries.md).
    Sign: the largest component of each direction is positive.

    Parameters
    ----------
    keys : Tensor [N, n, D], finite
        The un-rotated keys then held after the sinks.
    q_outer : Tensor [N, D, D], float32, finite
        Sum (or mean) of q q^T over the un-rotated queries so far, of all query heads of the KV head.
    rank : int
        Directions kept, at most D.

    Returns
    -------
    mean : Tensor [N, D], float32
    to : Tensor [N, D, rank], float32
        Coordinates of a key are (k - mean) @ to, largest weighted variance first.
    back : Tensor [N, D, rank], float32
        q.(k - mean) is estimated as (q @ back).coordinates.
    """
    x = keys.float()
    mean = x.mean(dim=1)
    used, directions = torch.linalg.eigh(q_outer.double().cpu())
    used = torch.maximum(used, used[:, -1:] * LEAST_USED).clamp(min=torch.finfo(torch.float32).tiny)
    used = (used / used[:, -1:]) ** USE  # the scale of the queries cancels out
    root = (directions * used[:, None]) @ directions.mT
    inverse = (directions / used[:, None]) @ directions.mT
    y = (x - mean[:, None]).double() @ root.to(keys.device)
    energy = y.pow(2).sum(dim=2, keepdim=True)
    y = y * (energy / energy.mean(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
    vectors = torch.linalg.eigh((y.mT @ y / keys.shape[1]).cpu())[1].flip(-1)[..., :rank]
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    vectors = vectors * vectors.gather(1, largest).sign()
    to, back = (x.float().contiguous().to(keys.device) for x in (root @ vectors, inverse @ vectors))
    return mean, to, back
