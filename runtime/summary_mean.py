"""``[summary] kind = "mean"``: the mean of a chunk's keys. The smallest summary, and the one that misses the most."""

import torch

from kvtier.kernels.select import mean_scores
from kvtier.kernels.summarize import encode_mean
from kvtier.runtime.summary import Codes, Layout, State, Summary


class MeanSummary(Summary):
    """score = q.mean_t(k_t): at most the chunk's largest q.k (up to rounding), far below it where one token stands out.

    Source: the landmarks of ShadowKV (arXiv 2410.21465), which takes the means after rotary positions; here the keys
    are un-rotated. One vector in the model's dtype per chunk; ``[summary] rank`` and ``bits`` are ignored.
    """

    kernel_kind = "mean"

    def layout(self) -> Layout:
        return {"mean": ((self.head_dim,), self.dtype)}

    def encode(self, state: State, keys: torch.Tensor) -> Codes:
        return {"mean": encode_mean(keys)}

    def scores(self, state: State, codes: Codes, q: torch.Tensor) -> torch.Tensor:
        return mean_scores(q, codes["mean"])
