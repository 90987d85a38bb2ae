"""``[summary] kind = "exact"``: the keys themselves stay on the device. The reference for every other kind."""

import torch

from kvtier.kernels.select import exact_scores
from kvtier.runtime.summary import Codes, Layout, State, Summary


class ExactSummary(Summary):
    """score = max over the chunk's tokens of q.k (ReAttention's criterion, arXiv 2407.15176, at chunk granularity)."""

    kernel_kind = "exact"

    def layout(self) -> Layout:
        return {"keys": ((self.chunk, self.head_dim), self.dtype)}

    def encode(self, state: State, keys: torch.Tensor) -> Codes:
        return {"keys": keys}

    def scores(self, state: State, codes: Codes, q: torch.Tensor) -> torch.Tensor:
        return exact_scores(q, codes["keys"])
