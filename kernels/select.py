"""Which chunks a block attends to: scores from summaries, weights, the largest ``select`` of them.

All of it in float32, without float atomics: the same set on every run of one device and version. ``select_triton`` does
it in two to four kernels (``score_kernel`` and ``topk.weigh_kernel``), with no host decision: lengths are read on the
device and every grid is fixed, so it captures in a CUDA graph that stays valid while the context grows.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.kernels.backend import INTERPRETED, n_processors
from kvtier.kernels.quantize import unpack_planes
from kvtier.kernels.select_triton import project_kernel, score_kernel
from kvtier.kernels.topk import weigh_kernel

GROUP = 32
"""Chunks whose largest weight stands for them in the first search of ``topk``."""
STORED_ROWS = 16
"""Scores of up to so many query rows are stored; with more they are computed twice."""
MOST_SPLITS = 256
"""Programs of a KV head in a scoring pass, at most."""
SKETCH_BLOCKS = {16: (1, 16), 32: (1, 32), 48: (3, 16), 1 << 30: (1, 64)}
"""Products and columns that ``select_config`` takes for sketches and up to so many query rows."""


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
    n, m, c, planes = codes.shape
    factors = (q @ basis)[:, None] * scale.float()[:, :, None]  # [N, m, Q, rank]
    offset = factors.sum(-1) * (1 << (bits - 1))
    factors = factors.flatten(0, 1)
    scores = factors.new_zeros(())
    for plane, numbers in enumerate(unpack_planes(codes, bits)):
        part = factors[..., plane * planes : (plane + 1) * planes]
        numbers = numbers[..., : part.shape[-1]].reshape(n * m, c, -1).float()
        scores = torch.baddbmm(scores, part, numbers.transpose(1, 2))  # [N*m, Q, C]
    best = scores.amax(dim=-1).view(n, m, -1) - offset
    return best.transpose(1, 2) + q @ mean[..., None]


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
    n, m = weights.shape
    if m <= select:
        return torch.arange(m, device=weights.device).expand(n, -1)
    weights = weights.nan_to_num()
    least = weights.topk(select, sorted=False).values.amin(dim=-1, keepdim=True)
    above, ties = weights > least, weights == least
    wanted = select - above.sum(dim=-1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(dim=-1) <= wanted))
    return chosen.nonzero()[:, 1].view(n, select)


@dataclass(frozen=True, slots=True)
class SlabSummaries:
    """Summaries of B sequences as the kernels find them.

    Parameters
    ----------
    kind : "mean", "minmax", "cuboid" or "sketch"
    tables : int64 Tensors [B, slabs], one for each tensor of the kind
        Of a mean; low, high; centre, deviation; or codes, scale. Device addresses of slabs [heads, slab, ...], 16-byte
        aligned; read only as far as there are chunks.
    like : one Tensor [heads, slab, ...] for each table
        Any slab: it tells shape and dtype.
    bits : int
        Of a sketch's codes: 2, 4 or 8.
    basis : Tensor [B * heads, D, rank], float32
        Of a sketch.
    """

    kind: str
    tables: tuple[torch.Tensor, ...]
    like: tuple[torch.Tensor, ...]
    bits: int = 8
    basis: torch.Tensor | None = None

    @classmethod
    def of(
        cls, kind: str, tensors: tuple[torch.Tensor, ...], bits: int = 8, basis: torch.Tensor | None = None
    ) -> "SlabSummaries":
        """Of one sequence whose summaries lie in contiguous tensors [heads, m, ...]: a single slab."""
        tables = tuple(torch.tensor([[x.data_ptr()]], dtype=torch.int64, device=x.device) for x in tensors)
        return cls(kind, tables, tensors, bits, basis)


@dataclass(frozen=True, slots=True)
class SelectConfig:
    """Tile sizes of one call, from ``bench/sweep_select.py``."""

    tile: int
    """Chunks per step of a scoring program."""
    tokens: int = 8
    """Tokens of a sketched chunk per step."""
    blocks: int = 1
    rows: int = 16
    """``blocks`` matrix products with ``rows`` columns score a group of query rows, a column for each ..."""
    joined: int = 1
    """... of so many tokens side by side (2: 16 bytes, for sketches of 8 bytes a token) and ..."""
    parts: int = 1
    """... of so many parts of a query (2: both in one product, for sketches of less than 8 bits)."""
    warps: int = 4
    stages: int = 3
    per_processor: int = 4
    weigh_tile: int = 1024
    weigh_warps: int = 8
    weigh_per_processor: int = 2
    search_tile: int = 4096

    @property
    def group(self) -> int:
        """Query rows that one program scores."""
        return self.blocks * self.rows // (self.joined * self.parts)


def select_config(summaries: SlabSummaries, head_dim: int, n_rows: int) -> SelectConfig:
    """The best of the sweep on an H100, by kind and number of query rows."""
    if summaries.kind != "sketch":
        rows = 16 if n_rows <= 16 or len(summaries.like) * _power(head_dim) > 256 else 32
        tile = _vector_tile(len(summaries.like), _power(head_dim), summaries.like[0].element_size(), rows)
        return SelectConfig(tile=tile, rows=rows, warps=4 if head_dim <= 128 else 8)
    nibbles = summaries.bits == 4 and summaries.like[0].shape[3] == 8
    tile = 64 if nibbles else 32
    if n_rows <= 8 and summaries.bits < 8:
        joined = 2 if nibbles else 1
        return SelectConfig(tile=tile, rows=16 if joined * n_rows <= 8 else 32, joined=joined, parts=2)
    blocks, rows = next(shape for most, shape in SKETCH_BLOCKS.items() if n_rows <= most)
    if nibbles and not has_wgmma(summaries.tables[0].device):
        return SelectConfig(tile=32, tokens=4, blocks=1 if n_rows <= 16 else 3, rows=32, joined=2)
    return SelectConfig(tile=tile, tokens=4 if blocks == 1 else 2, blocks=blocks, rows=rows)


def _vector_tile(n_vectors: int, width: int, itemsize: int, rows: int) -> int:
    """The largest tile whose vectors (twice, to read ahead), query parts and scores leave room in 99 KiB."""
    for tile in (64, 32):
        vectors, parts = (2 * tile, 6) if itemsize == 2 else (tile, 8)
        if n_vectors * width * (vectors * itemsize + parts * rows) + 4 * tile * rows <= 96 << 10:
            return tile
    return 16


@dataclass(frozen=True, slots=True)
class SelectWorkspace:
    """Scratch and outputs of ``select_triton``.

    Attributes
    ----------
    capacity : int
        Chunks it is large enough for.
    chosen : Tensor [N, select], int32
        The chosen chunks, ascending, then -1.
    count : Tensor [N], int32
        How many they are.
    weights : Tensor [N, capacity], float32
        Weights of all chunks.
    """

    capacity: int
    chosen: torch.Tensor
    count: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor
    parts: torch.Tensor
    maxima: torch.Tensor
    groups: torch.Tensor
    counter: torch.Tensor
    projected: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def new(
        cls, n: int, n_rows: int, capacity: int, select: int, device: torch.device, rank: int = 0, stored_rows: int = 0
    ) -> "SelectWorkspace":
        """For ``n`` KV heads (of all sequences) with up to ``n_rows`` queries each, and ``capacity`` chunks.

        Scores of up to ``stored_rows`` rows (default: ``n_rows``, at most STORED_ROWS) are stored, with more they are
        computed twice. Takes about 4 n capacity (1 + stored_rows) bytes.
        """
        capacity = -(-capacity // 128) * 128
        stored = max(min(stored_rows or n_rows, STORED_ROWS), -(-n_rows // (32 if rank else 16)))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            capacity,
            chosen=empty(n, select, dtype=torch.int32),
            count=empty(n, dtype=torch.int32),
            weights=empty(n, capacity),
            scores=empty(stored, n, capacity),
            parts=empty(2, n, n_rows, MOST_SPLITS),
            maxima=empty(n, capacity // GROUP),
            groups=empty(n, select, dtype=torch.int32),
            counter=torch.zeros(n, dtype=torch.int32, device=device),
            projected=empty(n, n_rows, rank),
            factors=empty(n, n_rows),
        )


def select_triton(
    q: torch.Tensor,
    summaries: SlabSummaries,
    n_chunks: torch.Tensor,
    work: SelectWorkspace,
    config: SelectConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh all chunks and choose: what ``top_chunks(chunk_weights(<kind>_scores(...)), select)`` does.

    Parameters
    ----------
    q : Tensor [B * heads, R, D], float32, contiguous
        Scaled, un-rotated queries of the heads that share a KV head (R = group x queries).
    summaries : SlabSummaries
    n_chunks : Tensor [B], int32
        Selectable chunks of each sequence, at most ``work.capacity``; read on the device.
    work : SelectWorkspace
        Of the same ``select``; its tensors must stay where they are while a graph that used them lives.

    Returns
    -------
    chosen, count : Tensors [N, select] and [N], int32
        ``work.chosen`` and ``work.count``.
    """
    n, n_rows, head_dim = q.shape
    assert q.is_contiguous()
    assert q.dtype == torch.float32
    config = config or select_config(summaries, head_dim, n_rows)
    groups = -(-n_rows // config.group)
    stored = groups == 1 and n_rows <= STORED_ROWS and n_rows <= work.scores.shape[0]
    assert stored or groups <= work.scores.shape[0]
    splits = n_processors(q.device) * config.per_processor // (n * groups)
    splits = max(1, min(splits, -(-work.capacity // config.tile), MOST_SPLITS))
    if summaries.kind == "sketch":
        _project(q, summaries, work)
    for scoring in ("store",) if stored else ("sum", "weigh"):
        _score(q, summaries, n_chunks, work, config, scoring, (splits, n, groups))
    _weigh(n_chunks, work, config, n_rows, n_rows if stored else groups, splits, stored, n // n_chunks.shape[0])
    return work.chosen, work.count


def _project(q: torch.Tensor, summaries: SlabSummaries, work: SelectWorkspace) -> None:
    """Coordinates of ``q`` in the sketch's basis."""
    n, n_rows, head_dim = q.shape
    assert summaries.basis is not None
    rank = summaries.basis.shape[2]
    assert work.projected.numel() >= n * n_rows * rank
    rows = 16
    project_kernel[(-(-n_rows // rows), n)](
        q,
        summaries.basis,
        work.projected,
        work.factors,
        n_rows,
        D=head_dim,
        BD=_power(head_dim),
        RANK=rank,
        BK=max(16, _power(rank)),
        BR=rows,
    )


def _score(
    q: torch.Tensor,
    summaries: SlabSummaries,
    n_chunks: torch.Tensor,
    work: SelectWorkspace,
    config: SelectConfig,
    scoring: str,
    grid: tuple[int, int, int],
) -> None:
    """One pass over the summaries."""
    sketch = summaries.kind == "sketch"
    shape = _sketch_shape(summaries, config) if sketch else _vector_shape(q.shape[2])
    heads, slab = summaries.like[0].shape[:2]
    assert slab % config.tile == 0 or summaries.tables[0].shape[1] == 1
    score_kernel[grid](
        work.projected if sketch else q,
        work.factors,
        summaries.tables[0],
        summaries.tables[-1],
        summaries.like[0],
        summaries.like[-1],
        n_chunks,
        work.parts,
        work.scores,
        heads,
        q.shape[1],
        summaries.tables[0].shape[1],
        slab,
        work.capacity,
        KIND=summaries.kind,
        PASS=scoring,
        BITS=summaries.bits,
        BM=config.tile,
        BLOCKS=config.blocks,
        BR=config.rows,
        BS=_power(grid[0]),
        STAGES=config.stages,
        JOINED=config.joined,
        PARTS=config.parts,
        num_warps=config.warps,
        **shape,
    )


def _weigh(
    n_chunks: torch.Tensor,
    work: SelectWorkspace,
    config: SelectConfig,
    n_rows: int,
    n_source: int,
    splits: int,
    stored: bool,
    heads: int,
) -> None:
    """Weights from scores (or from the sums of row groups), and the choice."""
    n, select = work.chosen.shape
    programs = n_processors(work.chosen.device) * config.weigh_per_processor // n
    weigh_kernel[(max(1, min(programs, -(-work.capacity // config.weigh_tile))), n)](
        work.scores,
        work.parts,
        n_chunks,
        work.weights,
        work.maxima,
        work.groups,
        work.counter,
        work.chosen,
        work.count,
        heads,
        n_source,
        splits,
        work.capacity,
        select,
        1 / n_rows,
        SCORES=stored,
        GROUP=GROUP,
        BR=_power(n_source),
        BS=_power(splits),
        BT=config.weigh_tile,
        BK=config.search_tile,
        num_warps=config.weigh_warps,
    )


def _vector_shape(head_dim: int) -> dict[str, Any]:
    """What ``score_kernel`` must know of vectors."""
    sizes = {"K": head_dim, "BK": max(16, _power(head_dim)), "ASM": False}
    return sizes | dict.fromkeys(("CHUNK", "RANK", "PACKED", "CT"), 0)


def _sketch_shape(summaries: SlabSummaries, config: SelectConfig) -> dict[str, Any]:
    """What ``score_kernel`` must know of sketches.

    Without wgmma, ``_nibbles`` gives right operands for products over 32 numbers and more alone: Triton then wants
    eight neighbours of a row in a thread.
    """
    assert summaries.basis is not None
    rank, chunk, packed, bits = summaries.basis.shape[2], *summaries.like[0].shape[2:], summaries.bits
    padded = config.joined * (16 if bits == 8 else 8) if packed <= 8 else config.joined * _power(packed)
    width = padded * 8 // bits
    asm = bits == 4 and not INTERPRETED and (width >= 32 or has_wgmma(summaries.tables[0].device))
    sizes = {"K": rank, "BK": width, "CT": min(config.tokens, _power(chunk)), "ASM": asm}
    return sizes | {"CHUNK": chunk, "RANK": rank, "PACKED": packed}


def _power(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Whether Triton multiplies with Hopper's warp-group instructions on ``device``."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
