"""From coordinates to few bits and back. ``round_trip`` returns what the stored codes stand for."""

import functools
from abc import ABC, abstractmethod

import torch

from kvtier.kernels.quantize import quantize

Z = torch.Tensor
"""Coordinates, leading ones with the largest variance."""


class Quantiser(ABC):
    """Fitted once per layer to coordinates [N, n, D]."""

    name: str

    @abstractmethod
    def fit(self, z: Z, variance: torch.Tensor) -> float:
        """Learn from ``z`` [N, n, D] with ``variance`` [N, D]; the bytes of the state per KV head, basis included."""

    @abstractmethod
    def round_trip(self, z: Z) -> Z:
        """``z`` [N, m, C, D] as the codes have it."""

    @abstractmethod
    def token_bits(self, chunk: int, head_dim: int) -> float:
        """Bits of the codes per token and KV head, scales included."""


def basis_bytes(head_dim: int, rank: int) -> float:
    """A float32 mean and two float32 maps of ``rank`` directions."""
    return 4.0 * head_dim * (1 + 2 * rank)


class Truncated(Quantiser):
    """The leading ``rank`` coordinates unharmed: what truncation alone costs. Stored as bf16, counted so."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name = f"first-{rank}"

    def fit(self, z: Z, variance: torch.Tensor) -> float:
        return basis_bytes(z.shape[-1], self.rank)

    def round_trip(self, z: Z) -> Z:
        return _only(z, z[..., : self.rank].to(torch.bfloat16).float())

    def token_bits(self, chunk: int, head_dim: int) -> float:
        return 16.0 * self.rank


class ChunkScale(Quantiser):
    """Symmetric codes of ``bits`` bits of the leading ``rank`` coordinates, one scale per chunk and coordinate.

    ``scale_bits`` 16: bfloat16, as the sketch first shipped; 8: rounded up to a power of 2^(1/8).
    """

    def __init__(self, rank: int, bits: int, scale_bits: int = 16) -> None:
        self.rank, self.bits, self.scale_bits = rank, bits, scale_bits
        self.name = f"{rank}x{bits}" + ("" if scale_bits == 16 else f"s{scale_bits}")

    def fit(self, z: Z, variance: torch.Tensor) -> float:
        return basis_bytes(z.shape[-1], self.rank)

    def round_trip(self, z: Z) -> Z:
        kept = z[..., : self.rank]
        if self.scale_bits == 16:
            codes, scale = quantize(kept, self.bits, dim=2)
            return _only(z, codes.float() * scale.float())
        top = (1 << (self.bits - 1)) - 1
        step = (kept.abs().amax(2, keepdim=True) / top).clamp(min=1e-20)
        step = 2.0 ** (torch.ceil(step.log2() * 8) / 8)
        return _only(z, (kept / step).round().clamp(-top, top) * step)

    def token_bits(self, chunk: int, head_dim: int) -> float:
        return self.rank * (self.bits + self.scale_bits / chunk)


class Levels(Quantiser):
    """Lloyd-Max levels of a Gaussian, scaled to each coordinate's deviation at the fit; no scale per chunk.

    ``bits``: of each coordinate (the rest get none), or a total per token that is spread by reverse water-filling,
    for each head its own way.
    """

    def __init__(self, bits: tuple[int, ...] | int) -> None:
        self._bits = bits
        self.total = bits if isinstance(bits, int) else sum(bits)
        self.name = f"levels-{self.total}b" if isinstance(bits, int) else "levels-" + _spelled(bits)

    def fit(self, z: Z, variance: torch.Tensor) -> float:
        n_kv, _, dim = z.shape
        if isinstance(self._bits, int):
            self.bits = torch.stack([spread_bits(v, self._bits) for v in variance.cpu()])
        else:
            padded = self._bits + (0,) * (dim - len(self._bits))
            self.bits = torch.tensor(padded[:dim]).expand(n_kv, -1)
        self._deviation = variance.sqrt()
        rank = int((self.bits > 0).sum(dim=1).max())
        return basis_bytes(dim, rank) + 5 * rank

    def round_trip(self, z: Z) -> Z:
        out = torch.zeros_like(z)
        for head in range(z.shape[0]):
            for bits in self.bits[head].unique().tolist():
                if bits:
                    where = (self.bits[head] == bits).nonzero().squeeze(1).to(z.device)
                    levels = gaussian_levels(bits).to(z.device)
                    scale = self._deviation[head, where].clamp(min=1e-20)
                    edges = (levels[1:] + levels[:-1]) / 2
                    index = torch.bucketize((z[head][..., where] / scale).contiguous(), edges)
                    out[head][..., where] = levels[index] * scale
        return out

    def token_bits(self, chunk: int, head_dim: int) -> float:
        return float(self.total)


class Product(Quantiser):
    """Product quantisation: ``groups`` codes of ``bits`` bits, each an entry of a codebook learned at the fit.

    A group holds coordinates whose share of information adds up to about the same; coordinates under the water level
    of the bit budget get none. ``coarse`` > 0: first a code of so many bits for all coordinates, then the rest.
    """

    def __init__(self, groups: int, bits: int = 8, *, coarse: int = 0, rounds: int = 6) -> None:
        self.groups, self.bits, self.coarse, self.rounds = groups, bits, coarse, rounds
        self.name = f"pq-{groups}x{bits}" + (f"+{coarse}" if coarse else "")

    def fit(self, z: Z, variance: torch.Tensor) -> float:
        self._heads = [self._fit_head(rows, v) for rows, v in zip(z, variance, strict=True)]
        dim = z.shape[-1]
        floats = max(sum(book.numel() for _, book in books) + c.numel() + r.numel() for c, r, books in self._heads)
        rank = max(sum(len(columns) for columns, _ in books) for _, _, books in self._heads)
        return basis_bytes(dim, dim if self.coarse else rank) + 2 * floats

    def _fit_head(self, rows: Z, variance: torch.Tensor) -> "Head":
        """``rows`` [n, D] -> the coarse codebook, a rotation of what it leaves, and the groups' codebooks."""
        eye = torch.eye(rows.shape[1], device=rows.device)
        centres, turned = rows.new_zeros(0, rows.shape[1]), eye[:0]
        if self.coarse:
            centres = kmeans(rows, 1 << self.coarse, self.rounds)
            rest = rows - centres[nearest(rows, centres)]
            values, turned = torch.linalg.eigh((rest.T @ rest / len(rest)).cpu())
            turned = turned.flip(-1).to(rows.device)
            rows, variance = rest @ turned, values.flip(-1)
        groups = share_out(variance.cpu(), self.groups, self.bits)
        books = [(columns, kmeans(rows[:, columns], 1 << self.bits, self.rounds)) for columns in groups]
        return centres, turned, books

    def round_trip(self, z: Z) -> Z:
        return torch.stack(
            [self._head_trip(rows.flatten(0, 1), *head) for rows, head in zip(z, self._heads, strict=True)]
        ).view_as(z)

    def _head_trip(self, rows: Z, centres: Z, turned: Z, books: "Books") -> Z:
        base = centres[nearest(rows, centres)] if self.coarse else torch.zeros_like(rows)
        rest = (rows - base) @ turned if self.coarse else rows
        out = torch.zeros_like(rows)
        for columns, book in books:
            out[:, columns] = book[nearest(rest[:, columns], book)]
        return base + out @ turned.T if self.coarse else out

    def token_bits(self, chunk: int, head_dim: int) -> float:
        return float(self.groups * self.bits + self.coarse)


Books = list[tuple[list[int], torch.Tensor]]
Head = tuple[torch.Tensor, torch.Tensor, Books]


# -- what they are made of ---------------------------------------------------------------------------------------------


def _only(z: Z, kept: Z) -> Z:
    """``kept`` as the leading coordinates, zeros for the rest."""
    return torch.nn.functional.pad(kept, (0, z.shape[-1] - kept.shape[-1]))


def _spelled(bits: tuple[int, ...]) -> str:
    """ "8x4+16x2" for eight 4-bit and sixteen 2-bit coordinates."""
    runs: list[list[int]] = []
    for b in bits:
        if runs and runs[-1][1] == b:
            runs[-1][0] += 1
        else:
            runs.append([1, b])
    return "+".join(f"{n}x{b}" for n, b in runs)


@functools.cache
def gaussian_levels(bits: int) -> torch.Tensor:
    """Lloyd-Max levels [2^bits] of a standard Gaussian, ascending."""
    normal = torch.distributions.Normal(0.0, 1.0)
    x = normal.icdf((torch.arange(40_001, dtype=torch.float64) + 0.5) / 40_001)
    levels: torch.Tensor = normal.icdf((torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits))
    for _ in range(100):
        index = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        count = torch.bincount(index, minlength=1 << bits)
        levels = torch.zeros_like(levels).scatter_add_(0, index, x) / count
    return levels.float()


@functools.cache
def gaussian_distortion(bits: int) -> float:
    """Mean squared error of ``gaussian_levels`` on a standard Gaussian; 1 for no bits."""
    if not bits:
        return 1.0
    levels = gaussian_levels(bits).double()
    x = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(40_001, dtype=torch.float64) + 0.5) / 40_001)
    index = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    return float((x - levels[index]).pow(2).mean())


def spread_bits(variance: torch.Tensor, total: int, most: int = 8) -> torch.Tensor:
    """``total`` bits over coordinates of ``variance`` [D], each where it lowers the squared error most: [D] int64."""
    distortion = torch.tensor([gaussian_distortion(b) for b in range(most + 1)] + [0.0])
    bits = torch.zeros(len(variance), dtype=torch.int64)
    for _ in range(total):
        gain = variance * (distortion[bits] - distortion[bits + 1])
        gain[bits >= most] = -torch.inf
        bits[gain.argmax()] += 1
    return bits


def share_out(variance: torch.Tensor, groups: int, bits: int) -> list[list[int]]:
    """Coordinates for each of ``groups`` codes, so that all codes carry about the same information.

    The information of a coordinate is log2 of its deviation over the water level of groups * bits bits; those below
    the level are left out.
    """
    order = variance.argsort(descending=True)
    depth = variance.clamp(min=1e-30).log2()[order] / 2
    budget = groups * bits
    rank = max(r for r in range(1, len(depth) + 1) if (depth[:r] - depth[r - 1]).sum() <= budget or r <= groups)
    level = float(depth[:rank].mean()) - budget / rank
    loads, columns = [0.0] * groups, [[] for _ in range(groups)]  # type: tuple[list[float], list[list[int]]]
    for coordinate, height in zip(order[:rank].tolist(), depth[:rank].tolist(), strict=True):
        least = loads.index(min(loads))
        columns[least].append(coordinate)
        loads[least] += height - level
    return columns


def nearest(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of ``centres`` [k, d] for each row of ``x`` [n, d], in pieces of 64 MiB of distances."""
    norms = centres.pow(2).sum(dim=1) / 2
    rows = max(1, (16 << 20) // len(centres))
    return torch.cat([(part @ centres.T - norms).argmax(dim=1) for part in x.split(rows)])


def kmeans(x: torch.Tensor, k: int, rounds: int, seed: int = 0) -> torch.Tensor:
    """``k`` centres [k, d] of the rows of ``x`` [n, d] by Lloyd's rounds from random rows; empty ones start anew."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(max(k, len(x)), generator=generator)[:k] % len(x)
    centres = x[picks.to(x.device)].clone()
    for _ in range(rounds):
        index = nearest(x, centres)
        count = torch.bincount(index, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, index, x)
        fresh = x[torch.randint(len(x), (k,), generator=generator).to(x.device)]
        centres = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], fresh)
    return centres
