"""The bookkeeping of one sequence: what is cached, where its blocks began, which chunks have left the window."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtier.runtime.budget import Budget
from kvtier.runtime.slabs import SlabList
from kvtier.runtime.summary import State
from kvtier.runtime.tier import Ids
from kvtier.runtime.window import ParkedWindows

if TYPE_CHECKING:
    from kvtier.runtime.recorder import Recorder


class TokenLog:
    """The token ids of a sequence, append-only, on the host."""

    def __init__(self) -> None:
        self._ids = np.empty(256, dtype=np.int64)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, ids: torch.Tensor) -> None:
        """Add ``ids`` [n]."""
        n = ids.numel()
        if self._length + n > self._ids.size:
            grown = np.empty(max(self._length + n, 2 * self._ids.size), dtype=np.int64)
            grown[: self._length] = self.array()
            self._ids = grown
        self._ids[self._length : self._length + n] = ids.cpu().numpy()
        self._length += n

    def truncate(self, length: int) -> None:
        """Forget the ids from ``length`` on."""
        self._length = length

    def array(self) -> Ids:
        """A view of the ids, [length] int64."""
        return self._ids[: self._length]

    def copy(self) -> "TokenLog":
        """An independent log with the same ids."""
        other = TokenLog()
        other._ids = self.array().copy()
        other._length = self._length
        return other


@dataclass
class Sequence:
    """One sequence of an offload block, as far as it does not depend on where K and V are."""

    select: int
    """Chunks attended per KV head and step, at most the geometry's."""
    length: int = 0
    tokens: TokenLog = field(default_factory=TokenLog)
    block_starts: list[int] = field(default_factory=list)
    closed: bool = False
    _rewound: bool = False

    def commit(self, ids: torch.Tensor) -> None:
        """A block with the token ``ids`` [b] has gone through every layer."""
        self.block_starts.append(self.length)
        self.tokens.append(ids)
        self.length += ids.numel()
        self._rewound = False

    def can_rewind(self) -> bool:
        """Whether the last thing that happened was a block of a single token, so that it can be processed again."""
        return bool(self.block_starts) and self.block_starts[-1] == self.length - 1 and not self._rewound

    def rewind(self) -> None:
        """Forget the last token, a block of its own: the state before it, exactly. Once, until the next block.

        Nothing else needs undoing: chunks retire when a block begins, so those that the forgotten block retired are
        those that its repetition would retire. Further back, the ring no longer holds the window.
        """
        assert self.can_rewind()
        self.length = self.block_starts.pop()
        self.tokens.truncate(self.length)
        self._rewound = True


class Fitted:
    """What a summary fitted to one layer: immutable, shared by forks; its bytes go back when the last lets go."""

    __slots__ = ("__weakref__", "state")

    def __init__(self, state: State, budget: Budget) -> None:
        nbytes = sum(tensor.nbytes for tensor in state)
        budget.take(nbytes, "what the summary fits to a layer")
        weakref.finalize(self, budget.give, nbytes)
        self.state = state


class QueryMoment:
    """The sum of q q^T over the queries of a layer so far, per KV head: what a summary is fitted to beside the keys.

    A block that is processed again (after a failure, or for a forgotten token) replaces what it added before.
    """

    __slots__ = ("__weakref__", "_budget", "_last", "_start", "_total")

    def __init__(self, n_kv_heads: int, head_dim: int, device: torch.device, budget: Budget) -> None:
        nbytes = self.bytes_needed(n_kv_heads, head_dim)
        budget.take(nbytes, "the second moment of a layer's queries")
        weakref.finalize(self, budget.give, nbytes)
        self._budget = budget
        self._total = torch.zeros(n_kv_heads, head_dim, head_dim, device=device)
        self._last = torch.zeros_like(self._total)
        self._start = -1

    @staticmethod
    def bytes_needed(n_kv_heads: int, head_dim: int) -> int:
        """Device bytes of one layer."""
        return 2 * n_kv_heads * head_dim * head_dim * 4

    def add(self, start: int, q: torch.Tensor) -> None:
        """Add the queries [N, R, D] float32 of the block at token ``start``."""
        if start > self._start:
            self._total += self._last
        torch.matmul(q.mT, q, out=self._last)
        self._start = start

    def before(self, start: int) -> torch.Tensor:
        """The sum over the queries of the tokens before ``start``, [N, D, D] float32."""
        return self._total + self._last if start > self._start else self._total

    def copy(self) -> "QueryMoment":
        """An independent one. Raises BudgetError."""
        n_kv, dim, _ = self._total.shape
        other = QueryMoment(n_kv, dim, self._total.device, self._budget)
        other._total.copy_(self._total)
        other._last.copy_(self._last)
        other._start = self._start
        return other


@dataclass(frozen=True, slots=True)
class Coarse:
    """The coarse level of a layer's chunks, for a summary of two levels."""

    fitted: Fitted
    codes: SlabList
    """Of the first chunks, as many as were proposed from; on the device."""


@dataclass
class LayerChunks:
    """The chunks of one layer that have left the window, in order of position."""

    codes: SlabList
    """Their summaries, on the device; of two levels, the fine codes, on the host."""
    ids: Ids
    """Their chunk ids, [N, retired] int64."""
    fitted: Fitted | None = None
    """What the summary fitted to this layer, from the first chunk on."""
    queries: QueryMoment | None = None
    """The queries so far, until then, for a summary that needs them."""
    coarse: Coarse | None = None
    """Of two levels, from the first choice that needs it on."""

    @property
    def retired(self) -> int:
        """Number of chunks that have left the window."""
        return int(self.ids.shape[1])

    def fork(self) -> "LayerChunks":
        coarse = self.coarse and Coarse(self.coarse.fitted, self.coarse.codes.fork())
        return LayerChunks(self.codes.fork(), self.ids, self.fitted, self.queries and self.queries.copy(), coarse)


@dataclass
class TieredSequence(Sequence):
    """A sequence whose K and V are spread over the tiers. ``runtime.tiered`` moves its tensors; this is what it knows.

    Between blocks every layer holds tokens 0..length: the sinks and the newest tokens in the ring (or parked), the
    retired chunks between them in the tiers.
    """

    layers: list[LayerChunks] = field(default_factory=list)
    parked: ParkedWindows | None = None
    """The windows at ``parked.end`` tokens, on the host."""
    recorder: "Recorder | None" = None
    """Who writes its chunks to a saved sequence; a fork has none."""

    @classmethod
    def empty(cls, n_layers: int, n_kv_heads: int, codes: Callable[[], SlabList], select: int) -> "TieredSequence":
        """A sequence without tokens; ``codes`` makes what holds the summaries of a layer."""
        layers = [LayerChunks(codes(), np.empty((n_kv_heads, 0), dtype=np.int64)) for _ in range(n_layers)]
        return cls(select=select, layers=layers)

    def fork(self, select: int) -> "TieredSequence":
        """A sequence with the same past: chunks, summaries and the parked window are shared, counters copied."""
        return TieredSequence(
            select=select,
            layers=[layer.fork() for layer in self.layers],
            length=self.length,
            tokens=self.tokens.copy(),
            block_starts=list(self.block_starts),
            parked=self.parked,
            _rewound=self._rewound,
        )

    def commit(self, ids: torch.Tensor) -> None:
        """As above; the parked window, if any, is out of date."""
        super().commit(ids)
        self.parked = None
