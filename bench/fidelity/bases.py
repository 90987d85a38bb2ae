"""Linear maps of keys to coordinates whose squared errors are what a query sees, and back."""

from dataclasses import dataclass

import torch

FLOOR = 1e-6
"""Directions that queries use less than this share of the first one count as used this much."""


@dataclass(frozen=True, slots=True)
class Basis:
    """Coordinates z = (k - mean) @ to; q.(k - mean) = (q @ back^T).z; leading coordinates vary most."""

    mean: torch.Tensor
    """[N, D] float32"""
    to: torch.Tensor
    """[N, D, D]"""
    back: torch.Tensor
    """[N, D, D]: k - mean = z @ back"""
    variance: torch.Tensor
    """[N, D]: of each coordinate, over the keys that it was fitted to"""

    def coordinates(self, keys: torch.Tensor) -> torch.Tensor:
        """``keys`` [N, ..., D] float32 -> the same shape."""
        extra = (1,) * (keys.ndim - 3)
        mean = self.mean.view(self.mean.shape[0], *extra, 1, -1)
        return (keys - mean) @ self.to.view(self.to.shape[0], *extra, *self.to.shape[1:])

    def project(self, q: torch.Tensor) -> torch.Tensor:
        """``q`` [N, Q, D] -> what multiplies coordinates, [N, Q, D]."""
        return q @ self.back.transpose(1, 2)


def fit_basis(kind: str, keys: torch.Tensor, q_outer: torch.Tensor, *, centred: bool = True, seed: int = 0) -> Basis:
    """Fit a basis to ``keys`` [N, n, D] and the queries' second moment ``q_outer`` [N, D, D], both float32.

    kind : "keys": principal directions of the keys (what the first sketch shipped with)
           "far": what ships (kernels.basis): of y = C_q^(1/4) (k - mean), each key with weight |y|^4
           "queries": principal directions of C_q^(1/2) (k - mean): the mean squared error of q.k is least
           "spread": "queries", then a random rotation of the leading 16 coordinates that levels their variances
           "random": a random rotation
           "none": the keys' own dimensions
    """
    mean = keys.mean(dim=1) if centred else torch.zeros_like(keys[:, 0])
    x = keys - mean[:, None]
    covariance = (x.transpose(1, 2) @ x / keys.shape[1]).double().cpu()
    eye = torch.eye(keys.shape[2], dtype=torch.float64).expand_as(covariance)
    if kind == "keys":
        to = torch.linalg.eigh(covariance)[1].flip(-1)
        back = to.transpose(1, 2)
    elif kind == "far":
        root, inverse = _roots(q_outer.double().cpu(), 0.25)
        y = x.double() @ root.to(x.device)
        y = y * y.pow(2).sum(dim=2, keepdim=True)
        vectors = torch.linalg.eigh((y.transpose(1, 2) @ y).cpu())[1].flip(-1)
        to, back = root @ vectors, vectors.transpose(1, 2) @ inverse
    elif kind in ("queries", "spread"):
        root, inverse = _roots(q_outer.double().cpu())
        vectors = torch.linalg.eigh(root @ covariance @ root)[1].flip(-1)
        vectors = vectors @ _rotation(16, seed, keys.shape[2]) if kind == "spread" else vectors
        to, back = root @ vectors, vectors.transpose(1, 2) @ inverse
    elif kind == "random":
        to = _rotation(keys.shape[2], seed, keys.shape[2]).expand_as(covariance)
        back = to.transpose(1, 2)
    elif kind == "none":
        to = back = eye
    else:
        raise ValueError(f"no basis of kind {kind}")
    to, back = to.float().contiguous().to(keys.device), back.float().contiguous().to(keys.device)
    return Basis(mean, to, back, (x @ to).pow(2).mean(dim=1))


def _roots(outer: torch.Tensor, power: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """``outer`` [N, D, D] to a power, by default its square root, and the inverse."""
    values, vectors = torch.linalg.eigh(outer)
    values = torch.maximum(values, values[:, -1:] * FLOOR) ** power
    return (vectors * values[:, None]) @ vectors.mT, (vectors / values[:, None]) @ vectors.mT


def _rotation(n: int, seed: int, size: int) -> torch.Tensor:
    """A random rotation of the first ``n`` of ``size`` coordinates, float64."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.eye(size, dtype=torch.float64)
    turned[:n, :n] = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return turned
