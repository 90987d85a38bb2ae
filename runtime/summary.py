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

    def __init__(self, *, chunk: int, head_dim: int, dtype: torch.dtype, rank: int, bits: int) -> None:
        self.chunk = chunk
        self.head_dim = head_dim
        self.dtype = dtype
        self.rank = rank
        self.bits = bits

    @abstractmethod
    def layout(self) -> Layout:
        """The tensors that one chunk of one KV head takes on the device."""

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

    @abstractmethod
    def encode(self, state: State, keys: torch.Tensor) -> Codes:
        """Summarise the un-rotated ``keys`` [N, m, C, D] of m chunks."""

    @abstractmethod
    def scores(self, state: State, codes: Codes, q: torch.Tensor) -> torch.Tensor:
        """Estimate the largest q.k of each chunk: scaled ``q`` [N, Q, D] float32 -> [N, Q, m] float32."""

    def chunk_bytes(self) -> int:
        """Device bytes of the summary of one chunk of one KV head."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.layout().values())


def make_summary(kind: str, *, chunk: int, head_dim: int, dtype: torch.dtype, rank: int = 16, bits: int = 4) -> Summary:
    """The summary that ``[summary] kind`` names; raises ConfigError for an unknown kind or rank > head_dim."""
    if kind not in KINDS:
        raise ConfigError(f'[summary] kind = "{kind}" is not known; choose one of {", ".join(sorted(KINDS))}')
    module, name = KINDS[kind].split(":")
    cls = cast(type[Summary], getattr(importlib.import_module(module), name))
    return cls(chunk=chunk, head_dim=head_dim, dtype=dtype, rank=rank, bits=bits)
