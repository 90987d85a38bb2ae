"""Selection with ``[summary] levels = 2``: coarse codes on the device propose, fine codes from the host decide.

The coarse level of a layer is made from its fine codes when it is first needed, and follows them slab by slab or chunk
by chunk as they come; nothing else depends on when that happens. While all chunks are candidates, and until the first
slab is full, to which codebooks are fitted, the fine codes of all are scored: the same bits as with one level.
"""

import torch

from kvtier.kernels.coarse import candidate_weights
from kvtier.kernels.select import chunk_weights, top_chunks
from kvtier.runtime import slabs
from kvtier.runtime.budget import Budget
from kvtier.runtime.host_slabs import HostSlabs
from kvtier.runtime.layer_selection import SCORE_BYTES, TorchSelection
from kvtier.runtime.sequence import Coarse, Fitted, LayerChunks
from kvtier.runtime.slabs import SlabList
from kvtier.runtime.summary import Codes
from kvtier.runtime.summary_sketch import SketchSummary


class TwoLevelSelection(TorchSelection):
    """Any device, in torch.

    Parameters
    ----------
    gpu : charged for the coarse codes and what is fitted to a layer for them
    """

    def __init__(self, summary: SketchSummary, gpu: Budget) -> None:
        super().__init__(summary)
        self._sketch = summary
        self._gpu = gpu

    def choose(self, chunks: LayerChunks, rows: torch.Tensor, n_chunks: int, select: int) -> torch.Tensor:
        if not self._sketch.proposes(n_chunks, select, slabs.SLAB_CHUNKS):
            return super().choose(chunks, rows, n_chunks, select)
        assert chunks.fitted is not None
        assert isinstance(chunks.codes, HostSlabs)
        coarse = self._follow(chunks, n_chunks)
        parts = rows.split(max(1, SCORE_BYTES // (4 * rows.shape[0] * n_chunks)), dim=1)
        kept = [self._coarse_scores(chunks, coarse, parts[0], n_chunks)] if len(parts) == 1 else []
        weights = torch.zeros(rows.shape[0], n_chunks, device=rows.device)
        for part in parts:
            scores = kept[0] if kept else self._coarse_scores(chunks, coarse, part, n_chunks)
            weights += chunk_weights(scores) * (part.shape[1] / rows.shape[1])
        candidates = top_chunks(weights, self._sketch.overfetch * select)
        codes = chunks.codes.gather(candidates)
        weights = torch.zeros(candidates.shape, device=rows.device)
        for part in parts:
            scores = kept[0] if kept else self._coarse_scores(chunks, coarse, part, n_chunks)
            fine = self._fine_scores(chunks, codes, part)
            weights += candidate_weights(scores, candidates, fine) * (part.shape[1] / rows.shape[1])
        return candidates.gather(1, top_chunks(weights, select))

    def _follow(self, chunks: LayerChunks, n_chunks: int) -> Coarse:
        """The coarse level of at least the first ``n_chunks`` chunks. Raises BudgetError."""
        assert chunks.fitted is not None
        device = chunks.fitted.state[0].device
        if chunks.coarse is None:
            first = _on(device, chunks.codes.part(0, slabs.SLAB_CHUNKS))
            fitted = Fitted(self._sketch.fit_coarse(chunks.fitted.state, first), self._gpu)
            layout = self._sketch.device_layout()
            chunks.coarse = Coarse(fitted, SlabList(layout, len(chunks.ids), self._gpu, device))
        coarse = chunks.coarse
        if n_chunks > len(coarse.codes):  # else a fork would copy what it shares
            coarse.codes.reserve(n_chunks - len(coarse.codes))
        for begin in range(len(coarse.codes), n_chunks, slabs.SLAB_CHUNKS):
            fine = _on(device, chunks.codes.part(begin, min(begin + slabs.SLAB_CHUNKS, n_chunks)))
            coarse.codes.append(self._sketch.encode_coarse(coarse.fitted.state, fine))
        return coarse

    def _coarse_scores(self, chunks: LayerChunks, coarse: Coarse, rows: torch.Tensor, n_chunks: int) -> torch.Tensor:
        """Of all chunks, [N, R, n_chunks]."""
        assert chunks.fitted is not None
        state, level = chunks.fitted.state, coarse.fitted.state
        parts = [self._sketch.coarse_scores(state, level, codes, rows) for codes in coarse.codes.slabs(n_chunks)]
        return torch.cat(parts, dim=-1)

    def _fine_scores(self, chunks: LayerChunks, codes: Codes, rows: torch.Tensor) -> torch.Tensor:
        """Of the candidates, from their ``codes``: [N, R, n]."""
        assert chunks.fitted is not None
        parts = zip(*(tensor.split(slabs.SLAB_CHUNKS, dim=1) for tensor in codes.values()), strict=True)
        state = chunks.fitted.state
        scores = [self._sketch.scores(state, dict(zip(codes, part, strict=True)), rows) for part in parts]
        return torch.cat(scores, dim=-1)


def _on(device: torch.device, codes: Codes) -> Codes:
    return {name: tensor.to(device) for name, tensor in codes.items()}
