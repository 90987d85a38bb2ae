"""``[summary] kind = "cuboid"``: the centre of a chunk's keys and their mean deviation from it (ArkVale)."""

import torch

from kvtier.kernels.select import cuboid_scores
from kvtier.kernels.summarize import encode_cuboid
from kvtier.runtime.summary import Codes, Layout, State, Summary


class CuboidSummary(Summary):
    """score = q.c + sum_d |q_d| r_d, the largest q.k over the box c - r to c + r.

    c_d = (min_d + max_d) / 2 and r_d = mean_t |k_td - c_d|: a box inside that of "minmax", so an estimate between
    "mean" and "minmax" (up to rounding) and no bound of the largest q.k on either side.

    Source: "cuboid-mean" of ArkVale (Chen et al., NeurIPS 2024), whose boxes are of rotated keys; here the keys are
    un-rotated. Two vectors in the model's dtype per chunk; ``[summary] rank`` and ``bits`` are ignored.
    """

    kernel_kind = "cuboid"

    def layout(self) -> Layout:
        return {"centre": ((self.head_dim,), self.dtype), "deviation": ((self.head_dim,), self.dtype)}

    def encode(self, state: State, keys: torch.Tensor) -> Codes:
        centre, deviation = encode_cuboid(keys)
        return {"centre": centre, "deviation": deviation}

    def scores(self, state: State, codes: Codes, q: torch.Tensor) -> torch.Tensor:
        return cuboid_scores(q, codes["centre"], codes["deviation"])
