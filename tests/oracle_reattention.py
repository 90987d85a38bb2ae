"""What method "reattention" must compute: the paper's rule in its clean form, slowly, in float64.

Written from notes/reattention.md, section 4, EXACT mode with the pairing h // g, alignment 1 and Le = L. It
imports nothing of kvtier. Middle indices j count from the first token after the sinks: token sink + j.
"""

from dataclasses import dataclass

import numpy as np
from oracle import as_block, attend


@dataclass
class ReAttentionResult:
    out: np.ndarray  # [H, b, D]
    view: list  # attended tokens behind `out`, ascending; one set for all heads and queries
    own_view: list  # the view by the rule; differs from `view` only with `force`
    dense: bool  # everything fits into sinks and local: no selection
    votes: dict  # middle index -> number of (head, query) that picked it; never clipped
    best: dict  # middle index -> largest raw q.k among the (head, query) that picked it
    seeds: list  # middle indices that survived the clip, ascending
    mid: list  # attended middle tokens by the rule (tokens, not middle indices), ascending


class ReAttentionOracle:
    """One layer of one sequence. `step` is one block of a schedule, or one decoded token."""

    def __init__(
        self,
        n_heads,
        n_kv_heads,
        head_dim,
        sink,
        local,
        picks,
        span,
        clip,
        inv_freq,
        attention_scaling,
        scaling,
    ):
        """`picks` per (head, query), `span` tokens per seed, `clip` seeds in all (0: no middle, < 0: all)."""
        self.inv_freq = np.array(inv_freq, dtype=np.float64)
        if n_heads % n_kv_heads:
            raise ValueError(f"{n_heads} query heads do not divide into {n_kv_heads} KV heads")
        if self.inv_freq.shape != (head_dim / 2,):
            raise ValueError(f"inv_freq has shape {self.inv_freq.shape}, head_dim is {head_dim}")
        if min(sink, picks) < 0 or min(local, span) < 1:
            raise ValueError(f"bad sizes: {sink=} {local=} {picks=} {span=} {clip=}")
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.group = n_heads // n_kv_heads
        self.sink, self.local, self.picks, self.span, self.clip = sink, local, picks, span, clip
        self.attention_scaling, self.scaling = float(attention_scaling), float(scaling)
        self.keys = np.zeros((n_kv_heads, 0, head_dim))  # every key ever seen, without position
        self.values = np.zeros((n_kv_heads, 0, head_dim))

    def __len__(self):
        """Tokens seen."""
        return self.keys.shape[1]

    def step(self, q, k, v, force=None):
        """Append a block and attend: q [H, b, D], k and v [N, b, D], all un-rotated.

        `force` (tokens) replaces the view behind `out`; everything else stays the oracle's own.
        """
        q = as_block(q, self.n_heads, self.head_dim, "q")
        k = as_block(k, self.n_kv_heads, self.head_dim, "k")
        v = as_block(v, self.n_kv_heads, self.head_dim, "v")
        b = q.shape[1]
        if not b or k.shape[1] != b or v.shape[1] != b:
            raise ValueError(f"q, k, v have {b}, {k.shape[1]}, {v.shape[1]} tokens")
        end = len(self) + b
        dense = end <= self.sink + self.local
        if not dense and b > self.local:
            raise ValueError(f"a block of {b} tokens, local is {self.local}: it would select from its own future")
        self.keys = np.concatenate([self.keys, k], axis=1)
        self.values = np.concatenate([self.values, v], axis=1)

        votes, best, seeds, mid = {}, {}, [], []
        if dense:
            own_view = list(range(end))
        else:
            if self.clip != 0:
                votes, best = self._vote(q, end)
                seeds = self._clip(votes, best)
                mid = self._spread(seeds, end)
            own_view = [*range(self.sink), *mid, *range(end - self.local, end)]

        view = own_view if force is None else sorted(int(token) for token in force)
        if len(set(view)) != len(view) or view[-b:] != list(range(end - b, end)) or view[0] < 0:
            raise ValueError(f"forced view {view}: not distinct tokens that end with the block")
        out = np.empty_like(q)
        for head in range(self.n_heads):
            kv_head = head // self.group
            out[head] = attend(
                q[head],
                self.keys[kv_head, view],
                self.values[kv_head, view],
                self.inv_freq,
                self.attention_scaling,
                self.scaling,
            )
        return ReAttentionResult(out, list(view), own_view, dense, votes, best, seeds, mid)

    def _vote(self, q, end):
        """Every head and every query of the block picks its largest raw q.k of the middle."""
        votes, best = {}, {}
        for head in range(self.n_heads):
            middle = self.keys[head // self.group, self.sink : end - self.local]
            for query in q[head]:
                # Row sums, not a matrix product: equal keys must give bit-equal scores.
                score = (middle * query).sum(axis=1)
                order = sorted(range(len(score)), key=lambda j: (-score[j], j))
                for j in order[: self.picks]:
                    votes[j] = votes.get(j, 0) + 1
                    best[j] = max(best.get(j, -np.inf), float(score[j]))
        return votes, best

    def _clip(self, votes, best):
        """Most votes first, then the higher best score, then the lower index."""
        order = sorted(votes, key=lambda j: (-votes[j], -best[j], j))
        return sorted(order if self.clip < 0 else order[: self.clip])

    def _spread(self, seeds, end):
        """Each seed with its neighbours, clamped to the middle: `span` tokens, fewer at the edges."""
        last = end - self.local - self.sink - 1
        middle = set()
        for seed in seeds:
            for j in range(seed - (self.span // 2), seed + (self.span + 1) // 2):
                middle.add(min(max(j, 0), last))
        return [self.sink + j for j in sorted(middle)]
