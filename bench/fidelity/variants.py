"""What is compared: one class per kind of summary, all behind ``Variant``.

The kinds that ship go through ``make_summary``, so that what is measured is what ships. A candidate maps keys to
coordinates, quantises those, and scores with what the codes stand for: q.k ~ q.(centre + decode(codes)).
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch

from bench.fidelity.bases import Basis, fit_basis
from bench.fidelity.quantisers import Quantiser
from kvtier.kernels.select import exact_scores
from kvtier.runtime.summary import make_summary


class Variant(ABC):
    """A summary of chunks of keys. ``fit`` once per layer, ``encode`` all chunks, then ``scores`` of a prefix."""

    name: str

    @abstractmethod
    def fit(self, keys: torch.Tensor, q_outer: torch.Tensor) -> None:
        """Learn from the first ``keys`` [N, n, D] and the queries' second moment ``q_outer`` [N, D, D]."""

    @abstractmethod
    def encode(self, keys: torch.Tensor) -> None:
        """Summarise the ``keys`` [N, m, C, D] of all chunks."""

    @abstractmethod
    def scores(self, q: torch.Tensor, n_chunks: int) -> torch.Tensor:
        """Estimate the largest q.k of the first chunks: scaled ``q`` [N, Q, D] float32 -> [N, Q, n_chunks]."""

    @abstractmethod
    def token_bytes(self, chunk: int, head_dim: int) -> float:
        """Device bytes of the codes per token and KV head."""

    def state_bytes(self) -> float:
        """Device bytes per KV head of what ``fit`` learned, however long the context."""
        return 0.0


class Shipped(Variant):
    """A kind of ``[summary] kind``, as it ships."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.bfloat16, **settings: int) -> None:
        self._kind, self._dtype, self._settings = kind, dtype, settings
        self.name = kind + (f"-{settings['rank']}x{settings['bits']}" if settings else "")

    def _make(self, chunk: int, head_dim: int) -> Any:
        return make_summary(self._kind, chunk=chunk, head_dim=head_dim, dtype=self._dtype, **self._settings)

    def fit(self, keys: torch.Tensor, q_outer: torch.Tensor) -> None:
        self._fit_keys, self._q_outer = keys.to(self._dtype), q_outer

    def encode(self, keys: torch.Tensor) -> None:
        self._summary = self._make(keys.shape[2], keys.shape[3])
        self._state = self._summary.fit(self._fit_keys, self._q_outer)
        self._codes = self._summary.encode(self._state, keys.to(self._dtype))

    def scores(self, q: torch.Tensor, n_chunks: int) -> torch.Tensor:
        codes = {name: code[:, :n_chunks] for name, code in self._codes.items()}
        return self._summary.scores(self._state, codes, q)  # type: ignore[no-any-return]

    def token_bytes(self, chunk: int, head_dim: int) -> float:
        return float(self._make(chunk, head_dim).chunk_bytes() / chunk)

    def state_bytes(self) -> float:
        return float(self._summary.state_bytes())


class SubMeans(Variant):
    """``parts`` means per chunk, of consecutive tokens; score = the largest q.mean."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.name = f"submeans-{parts}"

    def fit(self, keys: torch.Tensor, q_outer: torch.Tensor) -> None:
        """Nothing to learn."""

    def encode(self, keys: torch.Tensor) -> None:
        self._means = keys.unflatten(2, (self.parts, -1)).mean(dim=3).to(torch.bfloat16)  # [N, m, parts, D]

    def scores(self, q: torch.Tensor, n_chunks: int) -> torch.Tensor:
        return exact_scores(q, self._means[:, :n_chunks])

    def token_bytes(self, chunk: int, head_dim: int) -> float:
        return 2 * self.parts * head_dim / chunk


class Coded(Variant):
    """Codes of every key in a basis: the candidates for the default."""

    def __init__(self, basis: str, quantiser: Quantiser, *, centred: bool = True, seed: int = 0) -> None:
        self.quantiser = quantiser
        self._kind, self._centred, self._seed = basis, centred, seed
        self.name = f"{basis}/{quantiser.name}" + ("" if centred else "/uncentred")

    def fit(self, keys: torch.Tensor, q_outer: torch.Tensor) -> None:
        self._basis: Basis = fit_basis(self._kind, keys, q_outer, centred=self._centred, seed=self._seed)
        self._state_bytes = self.quantiser.fit(self._basis.coordinates(keys), self._basis.variance)

    def encode(self, keys: torch.Tensor) -> None:
        self._decoded = self.quantiser.round_trip(self._basis.coordinates(keys))  # [N, m, C, D]

    def scores(self, q: torch.Tensor, n_chunks: int) -> torch.Tensor:
        return exact_scores(self._basis.project(q), self._decoded[:, :n_chunks]) + q @ self._basis.mean[..., None]

    def token_bytes(self, chunk: int, head_dim: int) -> float:
        return self.quantiser.token_bits(chunk, head_dim) / 8

    def state_bytes(self) -> float:
        return self._state_bytes


class Refitted(Variant):
    """``inner`` fitted anew every ``every`` tokens ("running updates"): each stretch has a state of its own.

    A stretch is fitted to its own keys; the queries' moments stay those of the first fit.
    """

    def __init__(self, make: Any, every: int) -> None:
        self._make, self._every = make, every
        self.name = f"{make().name}/refit-{every}"

    def fit(self, keys: torch.Tensor, q_outer: torch.Tensor) -> None:
        self._q_outer = q_outer

    def encode(self, keys: torch.Tensor) -> None:
        self._step = max(1, self._every // keys.shape[2])
        self._parts = []
        for part in keys.split(self._step, dim=1):
            inner = self._make()
            inner.fit(part.flatten(1, 2), self._q_outer)
            inner.encode(part)
            self._parts.append(inner)

    def scores(self, q: torch.Tensor, n_chunks: int) -> torch.Tensor:
        counts = [min(self._step, n_chunks - i * self._step) for i in range(math.ceil(n_chunks / self._step))]
        return torch.cat([part.scores(q, n) for part, n in zip(self._parts, counts, strict=False)], dim=-1)

    def token_bytes(self, chunk: int, head_dim: int) -> float:
        """With the states, for they grow with the context."""
        return float(self._parts[0].token_bytes(chunk, head_dim) + self._parts[0].state_bytes() / self._every)


class WithOutlier(Variant):
    """``inner`` and, per chunk, the key that it represents worst (in the queries' metric), as 8-bit numbers."""

    def __init__(self, inner: Coded) -> None:
        self._inner = inner
        self.name = f"{inner.name}/outlier"

    def fit(self, keys: torch.Tensor, q_outer: torch.Tensor) -> None:
        self._inner.fit(keys, q_outer)

    def encode(self, keys: torch.Tensor) -> None:
        inner = self._inner
        inner.encode(keys)
        coordinates = inner._basis.coordinates(keys)
        worst = (coordinates - inner._decoded).pow(2).sum(-1).argmax(dim=2)  # [N, m]
        index = worst[..., None, None].expand(-1, -1, 1, keys.shape[3])
        outlier = coordinates.gather(2, index)
        scale = (outlier.abs().amax(-1, keepdim=True) / 127).to(torch.bfloat16).float().clamp(min=1e-30)
        inner._decoded.scatter_(2, index, (outlier / scale).round() * scale)

    def scores(self, q: torch.Tensor, n_chunks: int) -> torch.Tensor:
        return self._inner.scores(q, n_chunks)

    def token_bytes(self, chunk: int, head_dim: int) -> float:
        """The key, its scale and its place in the chunk."""
        return self._inner.token_bytes(chunk, head_dim) + (head_dim + 2 + 1) / chunk

    def state_bytes(self) -> float:
        return self._inner.state_bytes()
