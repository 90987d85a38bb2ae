"""Method "reattention": the paper's own rule (arXiv 2407.15176), exact, with all K and V on the device.

The reference that chunk selection is compared with: no tiers, no summaries, every token scored. Sink, local, span
(= ``chunk``), clip (= ``select``) and picks come from ``[attention]``; blocks follow the schedule of method "chunks".
Differences from the published code, all deliberate: query head h scores KV head h // group, no alignment of the local
window to 128 tokens, exact top-k, ties by best score and then by index.
"""

from dataclasses import dataclass, field

import torch

from kvtier.kernels.attend import Logits, attend
from kvtier.kernels.vote import elect_seeds, pick_tokens, spread
from kvtier.runtime.budget import Budget
from kvtier.runtime.engine import Engine
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.model import ModelShape, Rotary
from kvtier.runtime.sequence import Sequence

GROWTH_TOKENS = 1024
"""K and V of a layer grow by at least this many tokens, or by half."""


@dataclass
class DenseSequence(Sequence):
    """A sequence with all its K and V on the device."""

    kv: list[torch.Tensor] = field(default_factory=list)
    """Per layer [2, N, capacity, D]; the first ``length`` tokens are valid."""


class ReAttentionEngine(Engine[DenseSequence]):
    """ReAttention by the letter."""

    def __init__(self, shape: ModelShape, geometry: Geometry, rotary: list[Rotary], picks: int, gpu: Budget) -> None:
        super().__init__(shape, geometry, rotary)
        self._picks = picks
        self._gpu = gpu
        self.last_view: list[torch.Tensor] = [torch.empty(0, dtype=torch.int64)] * shape.n_layers
        """Per layer, the token positions [n] that the last block attended to, ascending."""

    def new_sequence(self, select: int) -> DenseSequence:
        s = self.shape
        empty = [torch.empty(2, s.n_kv_heads, 0, s.head_dim, dtype=s.dtype, device=s.device) for _ in range(s.n_layers)]
        return DenseSequence(select=select, kv=empty)

    def fork(self, sequence: DenseSequence, select: int) -> DenseSequence:
        """A copy: this method has no chunks to share."""
        self._gpu.take(sum(kv.nbytes for kv in sequence.kv), "a fork (method reattention copies all K and V)")
        return DenseSequence(
            select=select,
            length=sequence.length,
            tokens=sequence.tokens.copy(),
            block_starts=list(sequence.block_starts),
            kv=[kv.clone() for kv in sequence.kv],
            _rewound=sequence._rewound,
        )

    def release(self, sequence: DenseSequence) -> None:
        if not sequence.closed:
            sequence.closed = True
            self._gpu.give(sum(kv.nbytes for kv in sequence.kv))
            sequence.kv = []

    def activate(self, sequences: list[DenseSequence]) -> None:
        """Nothing to do: every sequence is on the device."""

    def attend(
        self, sequence: DenseSequence, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logits: Logits
    ) -> torch.Tensor:
        start, end = sequence.length, sequence.length + q.shape[1]
        kv = self._grow(sequence, layer, end)
        kv[0, :, start:end], kv[1, :, start:end] = k, v
        rotary = self.rotary[layer]
        if layer in self.shape.sliding_layers:
            begin = self.shape.sliding_begin(start)
            cos, sin = rotary.cos[: end - begin], rotary.sin[: end - begin]
            keys, values = kv[0, :, begin:end], kv[1, :, begin:end]
            return attend(q, keys, values, cos, sin, logits, self.shape.sliding_window)
        view = self._view(layer, q, kv[0, :, :end], end, sequence.select)
        self.last_view[layer] = view
        n = view.numel()
        self.longest_attended = max(self.longest_attended, n)
        return attend(q, kv[0, :, view], kv[1, :, view], rotary.cos[:n], rotary.sin[:n], logits)

    def _view(self, layer: int, q: torch.Tensor, keys: torch.Tensor, end: int, select: int) -> torch.Tensor:
        """Positions [n] that the block attends to, one set for all heads and queries."""
        g = self.geometry
        if end <= g.sink + g.local:
            return torch.arange(end, device=q.device)
        sinks = torch.arange(g.sink, device=q.device)
        local = torch.arange(end - g.local, end, device=q.device)
        if not select:
            return torch.cat((sinks, local))
        middle = keys[:, g.sink : end - g.local]
        if self.rotary[layer].is_partial(q.shape[-1]):  # else all of q.k has one factor, which changes no choice
            q = self.rotary[layer].unplaced(q.float())
        indices, scores = pick_tokens(q, middle, self._picks)
        seeds = elect_seeds(indices, scores, middle.shape[1], select)
        return torch.cat((sinks, spread(seeds, g.chunk, middle.shape[1]) + g.sink, local))

    def _grow(self, sequence: DenseSequence, layer: int, length: int) -> torch.Tensor:
        """K and V of a layer with room for ``length`` tokens; raises BudgetError with the sequence unchanged."""
        old = sequence.kv[layer]
        if old.shape[2] >= length:
            return old
        room = length + max(GROWTH_TOKENS, length // 2)
        new_bytes = self._token_bytes() * room
        self._gpu.take(new_bytes, f"K and V of {room} tokens of a layer (method reattention keeps all on the device)")
        new = torch.empty(2, old.shape[1], room, old.shape[3], dtype=old.dtype, device=old.device)
        new[:, :, : sequence.length] = old[:, :, : sequence.length]
        self._gpu.give(old.nbytes)
        sequence.kv[layer] = new
        return new

    def _token_bytes(self) -> int:
        return 2 * self.shape.n_kv_heads * self.shape.head_dim * self.shape.dtype.itemsize

    def close(self) -> None:
        """Give everything back; the engine cannot be used any more."""
        self.rotary = []
