"""Selection of one layer: queries weigh the summaries of all selectable chunks, the largest weights win.

Two ways that give the same: torch, and Triton kernels on CUDA, which find the slabs of summaries through a table on the
device and read the number of chunks there.
"""

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from kvtier.kernels.backend import runs_triton
from kvtier.kernels.select import SelectWorkspace, SlabSummaries, chunk_weights, select_triton, top_chunks
from kvtier.runtime.budget import Budget
from kvtier.runtime.sequence import LayerChunks
from kvtier.runtime.summary import Codes, Summary

SCORE_BYTES = 64 << 20
"""Scores [N, queries, chunks] are weighed in torch in pieces of at most this size."""
PIECE_BYTES = 512 << 10
"""Summaries that one call of torch scores: smaller calls cost more than what they do, larger ones leave the cache."""
FEWEST_CHUNKS = 1024
"""That Triton's scratch is made for."""


class LayerSelection(ABC):
    """Chooses chunks."""

    @abstractmethod
    def choose(self, chunks: LayerChunks, rows: torch.Tensor, n_chunks: int, select: int) -> torch.Tensor:
        """The ``select`` of the first ``n_chunks`` chunks, which are more, that weigh most, per KV head.

        Parameters
        ----------
        rows : Tensor [N, R, D], float32, the choosing queries of a KV head's query heads, scaled and without positions

        Returns
        -------
        Tensor [N, select], integers, ascending
        """


class TorchSelection(LayerSelection):
    """Any device."""

    def __init__(self, summary: Summary) -> None:
        self._summary = summary

    def choose(self, chunks: LayerChunks, rows: torch.Tensor, n_chunks: int, select: int) -> torch.Tensor:
        return top_chunks(self._weigh(chunks, rows, n_chunks), select)

    def _weigh(self, chunks: LayerChunks, rows: torch.Tensor, n_chunks: int) -> torch.Tensor:
        """Weights [N, n_chunks] float32."""
        assert chunks.fitted is not None
        step = max(1, SCORE_BYTES // (4 * rows.shape[0] * n_chunks))
        weights = torch.zeros(rows.shape[0], n_chunks, device=rows.device)
        for part in rows.split(step, dim=1):
            pieces = [self._summary.scores(chunks.fitted.state, codes, part) for codes in _pieces(chunks, n_chunks)]
            weights += chunk_weights(torch.cat(pieces, dim=-1)) * (part.shape[1] / rows.shape[1])
        return weights


def _pieces(chunks: LayerChunks, n_chunks: int) -> Iterator[Codes]:
    """The summaries of the first ``n_chunks`` chunks: small slabs beside each other, large ones as they lie."""
    slabs = chunks.codes.slabs(n_chunks)
    while first := next(slabs, None):
        nbytes = sum(t.nbytes for t in first.values())
        more = list(itertools.islice(slabs, max(0, PIECE_BYTES // nbytes - 1)))
        if more:
            yield {name: torch.cat([t, *(slab[name] for slab in more)], dim=1) for name, t in first.items()}
        else:
            yield first


class TritonSelection(LayerSelection):
    """CUDA devices, every kind of summary but the keys themselves.

    Parameters
    ----------
    gpu : charged for scratch that grows with the number of chunks
    """

    def __init__(self, summary: Summary, gpu: Budget) -> None:
        self._summary = summary
        self._gpu = gpu
        self._work: dict[tuple[int, int], SelectWorkspace] = {}
        """By query rows and chunks to choose."""
        self._n_chunks: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def choose(self, chunks: LayerChunks, rows: torch.Tensor, n_chunks: int, select: int) -> torch.Tensor:
        assert chunks.fitted is not None
        kind, rank = self._summary.kernel_kind, 0
        basis = None
        if kind == "sketch":
            basis = chunks.fitted.state[2]
            rank = basis.shape[2]
        tables = chunks.codes.tables()
        summaries = SlabSummaries(
            kind, tuple(t for t, _ in tables), tuple(x for _, x in tables), self._summary.bits, basis
        )
        work = self._workspace(rows, n_chunks, select, rank)
        chosen, _ = select_triton(rows.contiguous(), summaries, self._count(n_chunks, rows.device), work)
        return chosen.clone()  # the workspace serves the next layer, too

    def _workspace(self, rows: torch.Tensor, n_chunks: int, select: int, rank: int) -> SelectWorkspace:
        """Scratch for so many rows and chunks; it grows by doubling. Raises BudgetError."""
        key = (rows.shape[1], select)
        work = self._work.get(key)
        if work is None or work.capacity < n_chunks:
            if work is not None:
                self._gpu.give(_bytes_of(self._work.pop(key)))
            capacity = max(FEWEST_CHUNKS, 1 << (n_chunks - 1).bit_length())
            work = SelectWorkspace.new(rows.shape[0], rows.shape[1], capacity, select, rows.device, rank)
            self._gpu.take(_bytes_of(work), f"scores of {capacity} chunks")
            self._work[key] = work
        return work

    def _count(self, n_chunks: int, device: torch.device) -> torch.Tensor:
        """[1] int32 on the device; the layers of a block have the same."""
        if self._n_chunks[0] != n_chunks:
            self._n_chunks = n_chunks, torch.tensor([n_chunks], dtype=torch.int32, device=device)
        return self._n_chunks[1]


def _bytes_of(work: SelectWorkspace) -> int:
    return sum(getattr(work, name).nbytes for name in work.__slots__ if name != "capacity")


def make_selection(summary: Summary, device: torch.device, gpu: Budget) -> LayerSelection:
    """Triton's on CUDA devices, torch's elsewhere, for exact keys and, with a warning, where there is no Triton."""
    if device.type != "cuda" or summary.kernel_kind == "exact":
        return TorchSelection(summary)
    if runs_triton(torch.empty(0, device=device)):
        return TritonSelection(summary, gpu)
    warnings.warn("selection runs in torch, more slowly than in Triton: Triton is not installed", stacklevel=2)
    return TorchSelection(summary)
