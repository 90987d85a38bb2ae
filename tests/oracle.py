"""What method "chunks" must compute: one layer, one sequence, slowly, in float64.

Written from DESIGN.md ("Exact definitions", "The path of one token") alone: it imports nothing of kvtier and
shares no code with it. Tests feed the same un-rotated q, k, v to kvtier and to `ChunkOracle`, and compare the
chosen chunks (`assert_same_choice`) and the outputs.

Shapes: H query heads, N KV heads, D dims of a head, C tokens of a chunk, b tokens of the current block.
Query head h belongs to KV head h // (H // N). Inputs are anything numpy can read as float64.
"""

from dataclasses import dataclass

import numpy as np

# Blocks of up to this many tokens choose with all their queries.
ALL_QUERIES_CHOOSE_UP_TO = 64

# Weights are fp32 in kvtier: whatever is smaller than this may be anything down to zero there.
FP32_SMALLEST_NORMAL = 2.0**-126


def schedule(n, block, tail):
    """Blocks [(start, end), ...] of n new tokens: `block` at a time, then `tail`, then the last one alone."""
    tail_end = max(n - 1, 0)
    tail_start = max(tail_end - tail, 0)
    blocks = [(start, min(start + block, tail_start)) for start in range(0, tail_start, block)]
    if tail_end > tail_start:
        blocks.append((tail_start, tail_end))
    if n > 0:
        blocks.append((n - 1, n))
    return blocks


def choosing_queries(b, queries):
    """Which queries of a block of b tokens choose: all of a short block, else the last of each stretch."""
    if b <= ALL_QUERIES_CHOOSE_UP_TO or queries >= b:
        return list(range(b))
    return [(stretch + 1) * b // queries - 1 for stretch in range(queries)]


def rotate(x, positions, inv_freq, attention_scaling):
    """RoPE of x [n, D] at positions [n]: dim j is paired with dim j + D/2 (Llama's "rotate half")."""
    angle = np.outer(positions, inv_freq)
    cos = np.cos(angle) * attention_scaling
    sin = np.sin(angle) * attention_scaling
    half = x.shape[1] // 2
    first, second = x[:, :half], x[:, half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def softmax(x):
    """Softmax of a vector, of any length including zero."""
    if len(x) == 0:
        return np.zeros(0)
    e = np.exp(x - x.max())
    return e / e.sum()


def attend(q, keys, values, inv_freq, attention_scaling, scaling):
    """One query head: q [b, D] over keys, values [n, D] in attended order, which end with the block itself.

    Keys take positions 0..n-1, the queries the last b of them; a query sees the keys up to its position.
    """
    b, n = len(q), len(keys)
    q = rotate(q, np.arange(n - b, n), inv_freq, attention_scaling)
    keys = rotate(keys, np.arange(n), inv_freq, attention_scaling)
    out = np.empty((b, values.shape[1]))
    for i in range(b):
        visible = n - b + i + 1
        probability = softmax(keys[:visible] @ q[i] * scaling)
        out[i] = probability @ values[:visible]
    return out


def as_block(x, heads, head_dim, name):
    """x as a float64 copy [heads, b, head_dim], or a ValueError."""
    x = np.array(x, dtype=np.float64)
    if x.ndim != 3 or x.shape[0] != heads or x.shape[2] != head_dim:
        raise ValueError(f"{name} has shape {x.shape}, expected [{heads}, b, {head_dim}]")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} is not finite")
    return x


@dataclass
class StepResult:
    out: np.ndarray  # [H, b, D]
    chosen: list  # per KV head: sorted chunk indices, always the oracle's own choice
    attended: list  # per KV head: sorted chunk indices behind `out`; differs from `chosen` only with `force`
    weights: list  # per KV head: array [selectable]
    threshold: list  # per KV head: smallest chosen weight, None if none was chosen or none was left out
    selectable: int  # chunks 0..selectable-1 could be selected
    window_start: int  # first token of the window: sink + selectable * chunk
    n_attended: int  # attended tokens, those of the block included; the same for every head


class ChunkOracle:
    """One layer of one sequence. `step` is one block of a schedule, or one decoded token."""

    def __init__(
        self,
        n_heads,
        n_kv_heads,
        head_dim,
        sink,
        local,
        chunk,
        select,
        queries,
        inv_freq,
        attention_scaling,
        scaling,
        score_keys=None,
    ):
        """`score_keys(kv_head, chunk_index, exact_keys [C, D]) -> keys [*, D]`: these are scored instead.

        It is asked once for a chunk, when the chunk becomes selectable. Attention keeps the exact keys.
        """
        self.inv_freq = np.array(inv_freq, dtype=np.float64)
        if n_heads % n_kv_heads:
            raise ValueError(f"{n_heads} query heads do not divide into {n_kv_heads} KV heads")
        if self.inv_freq.shape != (head_dim / 2,):
            raise ValueError(f"inv_freq has shape {self.inv_freq.shape}, head_dim is {head_dim}")
        if min(sink, local, select) < 0 or min(chunk, queries) < 1:
            raise ValueError(f"bad sizes: {sink=} {local=} {chunk=} {select=} {queries=}")
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.group = n_heads // n_kv_heads
        self.sink, self.local, self.chunk, self.select = sink, local, chunk, select
        self.queries = queries
        self.attention_scaling, self.scaling = float(attention_scaling), float(scaling)
        self.score_keys = score_keys
        self.summaries = {}  # (kv head, chunk) -> keys used for scores
        self.keys = np.zeros((n_kv_heads, 0, head_dim))  # every key ever seen, without position
        self.values = np.zeros((n_kv_heads, 0, head_dim))

    def __len__(self):
        """Tokens seen."""
        return self.keys.shape[1]

    def selectable(self, start):
        """How many chunks a block starting at token `start` can select."""
        count = 0
        while self.sink + (count + 1) * self.chunk <= start - self.local:
            count += 1
        return count

    def chunk_tokens(self, index):
        """The tokens of a chunk."""
        first = self.sink + index * self.chunk
        return list(range(first, first + self.chunk))

    def step(self, q, k, v, force=None):
        """Append a block and attend: q [H, b, D], k and v [N, b, D], all un-rotated.

        `force` (per KV head a collection of chunk indices, None = the own choice) sets the chunks behind
        `out`; `chosen`, `weights` and `threshold` stay the oracle's own: one call judges and follows it.
        """
        q = as_block(q, self.n_heads, self.head_dim, "q")
        k = as_block(k, self.n_kv_heads, self.head_dim, "k")
        v = as_block(v, self.n_kv_heads, self.head_dim, "v")
        b = q.shape[1]
        if not b or k.shape[1] != b or v.shape[1] != b:
            raise ValueError(f"q, k, v have {b}, {k.shape[1]}, {v.shape[1]} tokens")

        start = len(self)
        count = self.selectable(start)
        weights = [self._weights(kv_head, q, count) for kv_head in range(self.n_kv_heads)]
        chosen = [self._choose(w) for w in weights]
        threshold = [
            float(w[picked].min()) if 0 < len(picked) < count else None
            for w, picked in zip(weights, chosen, strict=True)
        ]
        attended = self._forced(force, chosen, count)

        self.keys = np.concatenate([self.keys, k], axis=1)
        self.values = np.concatenate([self.values, v], axis=1)
        end = len(self)
        window_start = self.sink + count * self.chunk
        out = np.empty_like(q)
        for kv_head in range(self.n_kv_heads):
            tokens = list(range(min(self.sink, end)))
            for index in attended[kv_head]:
                tokens += self.chunk_tokens(index)
            tokens += range(window_start, end)
            for head in range(kv_head * self.group, (kv_head + 1) * self.group):
                out[head] = attend(
                    q[head],
                    self.keys[kv_head, tokens],
                    self.values[kv_head, tokens],
                    self.inv_freq,
                    self.attention_scaling,
                    self.scaling,
                )
        return StepResult(out, chosen, attended, weights, threshold, count, window_start, len(tokens))

    def _scoring_keys(self, kv_head, index):
        if (kv_head, index) not in self.summaries:
            keys = self.keys[kv_head, self.chunk_tokens(index)]
            if self.score_keys is not None:
                keys = np.array(self.score_keys(kv_head, index, keys), dtype=np.float64)
            self.summaries[kv_head, index] = keys
        return self.summaries[kv_head, index]

    def _weights(self, kv_head, q, count):
        """Mean, over choosing queries and the heads of the group, of the softmax over selectable chunks."""
        total, terms = np.zeros(count), 0
        for head in range(kv_head * self.group, (kv_head + 1) * self.group):
            for i in choosing_queries(q.shape[1], self.queries):
                score = np.empty(count)
                for index in range(count):
                    # Row sums, not a matrix product: equal keys must give bit-equal scores.
                    qk = (self._scoring_keys(kv_head, index) * q[head, i]).sum(axis=1)
                    score[index] = qk.max() * self.scaling * self.attention_scaling**2
                total += softmax(score)
                terms += 1
        return total / terms

    def _choose(self, weights):
        """The `select` largest weights, ties to the lower index, in order of position."""
        by_weight = sorted(range(len(weights)), key=lambda index: (-weights[index], index))
        return sorted(by_weight[: self.select])

    def _forced(self, force, chosen, count):
        if force is None:
            return [list(own) for own in chosen]
        if len(force) != self.n_kv_heads:
            raise ValueError(f"force has {len(force)} sets for {self.n_kv_heads} KV heads")
        attended = []
        for own, given in zip(chosen, force, strict=True):
            indices = list(own) if given is None else sorted(int(index) for index in given)
            if len(set(indices)) != len(indices) or any(not 0 <= index < count for index in indices):
                raise ValueError(f"forced chunks {indices}: not distinct, or not among the {count} selectable")
            attended.append(indices)
        if len({len(indices) for indices in attended}) > 1:
            raise ValueError(f"forced sets of different sizes: {attended}")
        return attended


def assert_same_choice(chosen_by_kvtier, step_result, rel=1e-5):
    """Per KV head: the same chunks, but for those whose weight is within `rel` of the smallest chosen weight.

    As many chunks as the oracle chose, none twice. Underflow of fp32 is also no difference.
    """
    assert len(chosen_by_kvtier) == len(step_result.chosen), (
        f"{len(chosen_by_kvtier)} KV heads, expected {len(step_result.chosen)}"
    )
    for kv_head, own in enumerate(step_result.chosen):
        given = sorted(int(index) for index in chosen_by_kvtier[kv_head])
        weights, threshold = step_result.weights[kv_head], step_result.threshold[kv_head]

        def show(indices, weights=weights):
            known = [f"{i}: {weights[i]:.9g}" if 0 <= i < len(weights) else f"{i}: not selectable" for i in indices]
            return "{" + ", ".join(known) + "}"

        where = f"KV head {kv_head}, {len(weights)} selectable chunks, threshold {threshold}"
        assert len(set(given)) == len(given), f"{where}: chunks chosen twice in {given}"
        assert all(0 <= i < len(weights) for i in given), f"{where}: not selectable in {show(given)}"
        assert len(given) == len(own), f"{where}: {len(given)} chunks {show(given)}, expected {len(own)} {show(own)}"
        extra, missing = sorted(set(given) - set(own)), sorted(set(own) - set(given))
        if not extra:
            continue
        # Both sets have `select` members and something was left out: a threshold exists.
        tolerance = rel * threshold + FP32_SMALLEST_NORMAL
        wrong = [i for i in extra + missing if abs(weights[i] - threshold) > tolerance]
        assert not wrong, (
            f"{where}: chosen but should not be {show(extra)}, should be chosen but is not {show(missing)}; "
            f"beyond a tie (rel {rel:g}): {show(wrong)}"
        )
