"""The coarse level of a sketch: a byte per token, from which candidates are proposed whose fine codes are then scored.

A few tokens of a chunk are kept, as ``GROUPS`` bytes each: which of ``BOOK`` entries of a codebook, times the chunk's
scale, comes nearest to the token's coordinates r with r % GROUPS = g. The scale is the largest length of a kept token:
without it the books of some layers, whose tokens' lengths differ a lot, miss what later texts bring. Bytes: 2 and 4 for
each kept token, 7 of 32: 30, whatever head_dim and rank are; a sketch of 16 x 4 bits has 288. Beside the chunks: the
books, 1 KiB x rank for each KV head, and the directions, 512 bytes x rank.

*Which tokens are kept* decides how well it proposes. The largest q.k of a chunk is that of a corner of its tokens'
convex hull; the corners kept are those that random queries see: directions are drawn once, with the queries' second
moment as the basis has it (to^T to = V^T C_q^(1/2) V, the moment of q.back for a q of moment C_q), and tokens are added
one by one, each the one that raises the sum over directions of the largest product the most.

*Candidates and the normaliser.* A chunk's weight is the mean over queries of softmax over all chunks; over candidates
alone the queries would count differently (one whose weight lies elsewhere too much). So the sum of the softmax takes
the coarse scores of all others, moved by the mean difference between fine and coarse scores of the candidates.

Everything is computed from the sketch's own codes: the coarse level is never stored. Sources: product quantisation is
Jegou et al. (PAMI 2011); figures, and what was tried instead: docs/summaries.md. In torch, without atomics: the same
bits on every run of one device and version.
"""

import torch

from kvtier.kernels.quantize import unpack

GROUPS = 4
"""Bytes of a token that is kept."""
BOOK = 256
"""Entries of a group's codebook: what a byte can tell."""
DIRECTIONS = 128
"""Random queries that choose tokens: 32 propose worse by .02 of the picks, 512 no better."""
ROUNDS = 6
"""Of Lloyd's algorithm, from random points."""
SEED = 0

Level = tuple[torch.Tensor, torch.Tensor]
"""What ``fit_coarse`` returns."""


def kept_tokens(chunk: int) -> int:
    """Tokens of a chunk that are kept: as many as a byte per token pays for beside the scale, at least one."""
    return max(1, (chunk - 2) // GROUPS)


def level_bytes(rank: int) -> int:
    """Bytes of a ``Level`` for each KV head."""
    return 4 * (DIRECTIONS * rank + BOOK * -(-rank // GROUPS) * GROUPS)


def decode_sketch(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Coordinates that the codes of a sketch stand for.

    ``codes`` [N, m, C, packed] uint8, ``scale`` [N, m, rank] bfloat16 -> [N, m, C, rank] float32.
    """
    return unpack(codes, bits, scale.shape[-1]).mul_(scale.float()[:, :, None])


def fit_coarse(tokens: torch.Tensor, to: torch.Tensor) -> Level:
    """Directions that choose tokens, and codebooks of the tokens so chosen.

    Parameters
    ----------
    tokens : Tensor [N, m, C, rank], float32
        Coordinates of the first chunks, as ``decode_sketch`` gives them.
    to : Tensor [N, D, rank], float32
        Of the sketch's basis.

    Returns
    -------
    directions : Tensor [N, DIRECTIONS, rank], float32, of length 1
    books : Tensor [N, GROUPS, BOOK, ceil(rank / GROUPS)], float32
    """
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randn(DIRECTIONS, to.shape[1], generator=generator).to(to.device) @ to
    directions = drawn / drawn.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    points = _grouped(_scaled(corners(tokens, directions))[0].flatten(1, 2))  # [N, GROUPS, n, width]
    picks = torch.randperm(max(BOOK, points.shape[2]), generator=generator)[:BOOK] % points.shape[2]
    books = points[:, :, picks.to(points.device)]
    for _ in range(ROUNDS):
        mine = torch.nn.functional.one_hot(_nearest(points, books), BOOK).to(points.dtype)
        count = mine.sum(dim=2)[..., None]
        books = torch.where(count > 0, mine.mT @ points / count.clamp(min=1), books)
    return directions, books


def corners(tokens: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The tokens of each chunk that the largest products with ``directions`` hang on.

    ``tokens`` [N, m, C, rank], ``directions`` [N, n, rank] -> [N, m, kept_tokens(C), rank], float32; of tokens that add
    the same, the first.
    """
    products = tokens @ directions[:, None].mT  # [N, m, C, n]
    largest = products.amin(dim=2, keepdim=True)
    kept = []
    for _ in range(kept_tokens(tokens.shape[2])):
        gain = (products - largest).clamp_(min=0).sum(dim=3)  # [N, m, C]
        best = gain.argmax(dim=2)[..., None, None]
        kept.append(tokens.gather(2, best.expand(-1, -1, 1, tokens.shape[3])))
        largest = torch.maximum(largest, products.gather(2, best.expand(-1, -1, 1, products.shape[3])))
    return torch.cat(kept, dim=2)


def encode_coarse(tokens: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the kept tokens of m chunks.

    Parameters
    ----------
    tokens : Tensor [N, m, C, rank], float32

    Returns
    -------
    codes : Tensor [N, m, kept_tokens(C), GROUPS], uint8
    scale : Tensor [N, m, 1], bfloat16
    """
    directions, books = level
    n, m = tokens.shape[:2]
    points, scale = _scaled(corners(tokens, directions))
    codes = _nearest(_grouped(points.flatten(1, 2)), books).to(torch.uint8)
    return codes.transpose(1, 2).reshape(n, m, -1, GROUPS), scale


def coarse_scores(
    q: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, level: Level, mean: torch.Tensor, back: torch.Tensor
) -> torch.Tensor:
    """Largest q.k over the kept tokens of each chunk: q.mean + scale max_t sum_g (q.back)_g . book_g[code_tg].

    Parameters
    ----------
    q : Tensor [N, Q, D], float32
    codes, scale : as ``encode_coarse`` returns them
    mean : Tensor [N, D]; back : Tensor [N, D, rank], both float32, of the sketch

    Returns
    -------
    Tensor [N, Q, m], float32
    """
    books = level[1]
    n, m, kept, _ = codes.shape
    index = codes.reshape(n, m * kept, GROUPS).transpose(1, 2).long()[..., None]  # [N, GROUPS, m*kept, 1]
    parts = books.gather(2, index.expand(-1, -1, -1, books.shape[3]))
    projected = _grouped(q @ back)  # [N, GROUPS, Q, width]
    points = parts.permute(0, 1, 3, 2).flatten(1, 2)  # [N, GROUPS*width, m*kept]
    scores = projected.transpose(1, 2).flatten(2) @ points
    best = scores.view(n, -1, m, kept).amax(dim=-1)
    return best * scale.float().transpose(1, 2) + q @ mean[..., None]


def candidate_weights(coarse: torch.Tensor, candidates: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """Weights of the candidates among all chunks, as near to those from fine scores of all as can be.

    Parameters
    ----------
    coarse : Tensor [N, Q, m], float32
        Scores of all chunks.
    candidates : Tensor [N, n], int64
    fine : Tensor [N, Q, n], float32
        Theirs.

    Returns
    -------
    Tensor [N, n], float32
    """
    index = candidates[:, None].expand(-1, coarse.shape[1], -1)
    gap = (fine - coarse.gather(2, index)).mean(dim=2, keepdim=True)
    others = (coarse + gap).scatter_(2, index, -torch.inf).logsumexp(dim=2, keepdim=True)
    total = torch.logaddexp(others, fine.logsumexp(dim=2, keepdim=True))
    return (fine - total).exp().mean(dim=1)


def _scaled(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, m, kept, rank] over their chunk's scale, and the scales [N, m, 1] bfloat16; 1 where all are zero."""
    longest = kept.norm(dim=3).amax(dim=2, keepdim=True).to(torch.bfloat16)
    scale = torch.where(longest > 0, longest, 1)
    return kept / scale.float()[..., None], scale


def _grouped(x: torch.Tensor) -> torch.Tensor:
    """``x`` [N, n, rank] by groups, with zeros where rank is no multiple of them: [N, GROUPS, n, width]."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[2] % GROUPS))
    return padded.view(*x.shape[:2], -1, GROUPS).permute(0, 3, 1, 2).contiguous()


def _nearest(points: torch.Tensor, books: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry: [N, GROUPS, n, width], [N, GROUPS, BOOK, width] -> [N, GROUPS, n] int64."""
    nearness: torch.Tensor = points @ books.mT - books.pow(2).sum(dim=3)[:, :, None] / 2
    return nearness.argmax(dim=3)
