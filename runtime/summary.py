"""The summary of a chunk's keys: the interface, and the table of the kinds that ``[summary] kind`` can name.

A summary lives on the device and answers one question: how large can q.k be for a token of this chunk? To add a kind,
write ``runtime/summary_<kind>.py`` with a subclass and add its line to ``KINDS``.
"""

import importlib
from abc import ABC, abstractmethod
from typing import cast

import torch

from kvtier.runtime.errors import ConfigError

State = tuple[torch.Tensor, ...]
"""What a kind fits to a layer once (``()`` if nothing): immutable, shared by forks, leading dimension KV heads."""
Codes = dict[str, torch.Tensor]
"""The summaries of m chunks: tensors [N, m, ...] by name."""
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each code tensor for one chunk of one KV head."""

KINDS = {
    "cuboid": "kvtier.runtime.summary_cuboid:CuboidSummary",
    "exact": "kvtier.runtime.summary_exact:ExactSummary",
    "mean": "kvtier.runtime.summary_mean:MeanSummary",
    "minmax": "kvtier.runtime.summary_minmax:MinMaxSummary",
    "sketch": "kvtier.runtime.summary_sketch:SketchSummary",
}


class Summary(ABC):
    """One kind of key summary. Stateless: what it fits to a layer is handed back and passed in again."""

    kernel_kind: str
    """What ``kernels.select`` calls it, "exact" for what it has no kernel for."""
    needs_queries = False
    """Whether ``fit`` looks at the queries."""
    levels = 1
    """2: what ``encode`` returns lies on the host, and a coarse level on the device."""
    overfetch = 8
    """Of two levels: candidates for each chunk that is chosen."""

    def __init__(self, *, chunk: int, head_dim: int, dtype: torch.dtype, rank: int, bits: int) -> None:
        self.chunk = chunk
        self.head_dim = head_dim
        self.dtype = dtype
        self.rank = rank
        self.bits = bits

    @abstractmethod
    def layout(self) -> Layout:
        """The tensors that ``encode`` makes of one chunk of one KV head."""

    def device_layout(self) -> Layout:
        """The tensors that it takes on the device."""
        return self.layout()

    def fit(self, keys: torch.Tensor, q_outer: torch.Tensor | None) -> State:
        """Called once per layer and sequence, when the first chunk leaves the window.

        Parameters
        ----------
        keys : Tensor [N, n, D], all un-rotated keys then held after the sinks
        q_outer : Tensor [N, D, D] float32, the sum of q q^T over the un-rotated queries of all tokens before the block
            that is being processed; None unless ``needs_queries``
        """
        return ()

    def state_bytes(self) -> int:
        """Device bytes of what ``fit`` returns, per KV head."""
        return 0

    def coarse_state_bytes(self) -> int:
        """Of what is fitted for the coarse level, per KV head; 0 with one level."""
        return 0

    def proposes(self, n_chunks: int, select: int, first: int) -> bool:
        """Whether a coarse level, fitted to the ``first`` chunks, chooses candidates among ``n_chunks`` chunks."""
        return self.levels == 2 and n_chunks > self.overfetch * select and n_chunks >= first

    @abstractmethod
    def encode(self, state: State, keys: torch.Tensor) -> Codes:
        """Summarise the un-rotated ``keys`` [N, m, C, D] of m chunks."""

    @abstractmethod
    def scores(self, state: State, codes: Codes, q: torch.Tensor) -> torch.Tensor:
        """Estimate the largest q.k of each chunk: scaled ``q`` [N, Q, D] float32 -> [N, Q, m] float32."""

    def chunk_bytes(self) -> int:
        """Device bytes of the summary of one chunk of one KV head."""
        return layout_bytes(self.device_layout())


def layout_bytes(layout: Layout) -> int:
    """Bytes of one chunk of one KV head."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())


def make_summary(
    kind: str,
    *,
    chunk: int,
    head_dim: int,
    dtype: torch.dtype,
    rank: int = 16,
    bits: int = 4,
    levels: int = 1,
    overfetch: int = 8,
) -> Summary:
    """What ``[summary]`` names; raises ConfigError for an unknown kind, rank > head_dim, two levels of no sketch."""
    if kind not in KINDS:
        raise ConfigError(f'[summary] kind = "{kind}" is not known; choose one of {", ".join(sorted(KINDS))}')
    module, name = KINDS[kind].split(":")
    cls = cast(type[Summary], getattr(importlib.import_module(module), name))
    summary = cls(chunk=chunk, head_dim=head_dim, dtype=dtype, rank=rank, bits=bits)
    if levels == 2 and summary.kernel_kind != "sketch":
        raise ConfigError(
            f'[summary] levels = 2 goes with kind = "sketch" alone, whose codes the coarse level is made of, not with '
            f'"{kind}": leave levels out'
        )
    summary.levels, summary.overfetch = levels, overfetch
    return summary
