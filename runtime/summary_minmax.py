"""``[summary] kind = "minmax"``: the box around a chunk's keys (Quest)."""

import torch

from kvtier.kernels.select import minmax_scores
from kvtier.kernels.summarize import encode_minmax
from kvtier.runtime.summary import Codes, Layout, State, Summary


class MinMaxSummary(Summary):
    """score = sum_d max(q_d min_d, q_d max_d), with min_d and max_d over the tokens of the chunk.

    Never below the largest q.k of the chunk: min_d and max_d are values of keys, stored in the keys' own dtype without
    rounding, so the bound holds in bfloat16 too, up to the float32 rounding of the sums. It loosens as chunks grow.

    Source: Quest (arXiv 2406.10774), whose boxes are of rotated keys in pages of 16; here the keys are un-rotated. Two
    vectors in the model's dtype per chunk; ``[summary] rank`` and ``bits`` are ignored.
    """

    kernel_kind = "minmax"

    def layout(self) -> Layout:
        return {"low": ((self.head_dim,), self.dtype), "high": ((self.head_dim,), self.dtype)}

    def encode(self, state: State, keys: torch.Tensor) -> Codes:
        low, high = encode_minmax(keys)
        return {"low": low, "high": high}

    def scores(self, state: State, codes: Codes, q: torch.Tensor) -> torch.Tensor:
        return minmax_scores(q, codes["low"], codes["high"])
