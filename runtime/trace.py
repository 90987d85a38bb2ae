"""What blocks chose, and with which queries: kept where ``kv.tracing()`` asks for it, for ``explain`` and ``audit``.

A trace keeps the tensors that selection has made anyway: nothing is computed for it but queries where every chunk is
attended, and nothing waits for the device. Weights are computed when somebody asks (``runtime.weighing``).
"""

from collections import Counter
from dataclasses import dataclass, field

import torch

from kvtier.runtime.budget import Budget
from kvtier.runtime.model import ModelShape
from kvtier.runtime.sequence import TieredSequence

MOST_BYTES = 256 << 20
"""That a trace keeps on the device: the newest blocks. A token of an 8B model takes 0.6 MB, a block of 64 34 MB."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Of one layer in one block."""

    queries: torch.Tensor
    """[N, R, D] float32: the choosing queries of a KV head's query heads, scaled and without positions."""
    chosen: torch.Tensor | None
    """[N, n] int32, ascending: the chunks attended to; None: all that could be chosen."""

    @property
    def nbytes(self) -> int:
        """Device bytes."""
        return self.queries.nbytes + (0 if self.chosen is None else self.chosen.nbytes)


@dataclass(slots=True)
class Step:
    """One block of one sequence: tokens start..end."""

    sequence: TieredSequence
    start: int
    end: int
    n_chunks: int
    """Chunks that could be chosen."""
    nbytes: int = 0
    forgotten: bool = False
    """There was no room for it."""
    layers: dict[int, Choice] = field(default_factory=dict)
    """Empty where no chunk was attended."""

    def chosen_mask(self, layer: int) -> torch.Tensor:
        """Which chunks were attended to in a layer, [N, n_chunks] bool on the device."""
        choice = self.layers[layer]
        n_kv = choice.queries.shape[0]
        if choice.chosen is None:
            return torch.ones(n_kv, self.n_chunks, dtype=torch.bool, device=choice.queries.device)
        mask = torch.zeros(n_kv, self.n_chunks, dtype=torch.bool, device=choice.queries.device)
        return mask.scatter_(1, choice.chosen.long(), True)


class Trace:
    """The newest blocks of the sequences that ran while this was the engine's.

    Parameters
    ----------
    gpu : charged for what is kept. Where it has no room, blocks are forgotten, the oldest first: a trace stops nothing.
    """

    def __init__(self, shape: ModelShape, gpu: Budget) -> None:
        self._gpu = gpu
        self._n_layers = len(shape.full_layers)
        self._first_layer = shape.full_layers[0] if shape.full_layers else 0
        self._steps: dict[tuple[int, int], Step] = {}
        """By sequence and start: a block that is processed again replaces what it left before."""
        self._nbytes = 0
        self._forgotten: Counter[int] = Counter()
        """Blocks by sequence."""

    def add(
        self,
        sequence: TieredSequence,
        layer: int,
        n_tokens: int,
        queries: torch.Tensor,
        n_chunks: int,
        chosen: torch.Tensor | None,
    ) -> None:
        """One layer of a block of ``n_tokens`` after the last one of ``sequence``.

        Parameters
        ----------
        queries : Tensor [N, R, D], float32, that nobody writes to any more
        chosen : Tensor [N, n], integers, ascending; None: no chunk is attended
        """
        choice = None
        if chosen is not None:
            choice = Choice(queries, None if chosen.shape[1] == n_chunks else chosen.int())
        key = id(sequence), sequence.length
        if layer == self._first_layer:
            self._begin(key, Step(sequence, sequence.length, sequence.length + n_tokens, n_chunks), choice)
        step = self._steps.get(key)
        if step is not None and choice is not None and not step.forgotten:
            step.layers[layer] = choice

    def _begin(self, key: tuple[int, int], step: Step, choice: Choice | None) -> None:
        """Take the bytes of all layers of ``step``, which are those of the first one each."""
        if key in self._steps:
            self._drop(key)
        needed = 0 if choice is None else self._n_layers * choice.nbytes
        step.forgotten = needed > min(MOST_BYTES, self._gpu.free_bytes + self._nbytes)
        while not step.forgotten and needed > min(MOST_BYTES - self._nbytes, self._gpu.free_bytes):
            oldest = next(iter(self._steps))
            self._forgotten[oldest[0]] += 1
            self._drop(oldest)
        if not step.forgotten:
            self._gpu.take(needed, "the trace of a block")
            self._nbytes += needed
            step.nbytes = needed
        self._steps[key] = step

    def _drop(self, key: tuple[int, int]) -> None:
        step = self._steps.pop(key)
        self._nbytes -= step.nbytes
        self._gpu.give(step.nbytes)

    def steps(self, sequence: TieredSequence) -> list[Step]:
        """The blocks of ``sequence`` that are kept and have gone through every layer, in order."""
        mine = (s for s in self._steps.values() if s.sequence is sequence and s.end <= sequence.length)
        return sorted((s for s in mine if not s.forgotten), key=lambda s: s.start)

    def n_forgotten(self, sequence: TieredSequence) -> int:
        """Blocks of ``sequence`` that there was no room for."""
        refused = sum(s.forgotten for s in self._steps.values() if s.sequence is sequence)
        return refused + self._forgotten[id(sequence)]

    def close(self) -> None:
        """Give everything back. A second call does nothing."""
        for key in list(self._steps):
            self._drop(key)
