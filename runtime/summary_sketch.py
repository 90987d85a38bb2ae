"""``[summary] kind = "sketch"``: low-rank, low-precision codes of every key (the default)."""

import torch

from kvtier.kernels.basis import fit_basis
from kvtier.kernels.quantize import packed_size
from kvtier.kernels.select import sketch_scores
from kvtier.kernels.summarize import encode_sketch
from kvtier.runtime.errors import ConfigError
from kvtier.runtime.summary import Codes, Layout, State, Summary


class SketchSummary(Summary):
    """score = q.mean + max over tokens of sum_r (q.back_r) scale_r code_r.

    The codes are coordinates (k - mean).to_r in the ``rank`` directions that matter most to the layer's queries
    (``kernels.basis``), in ``bits`` bits (own measurements: docs/summaries.md). 16 directions at 4 bits, chunk 32:
    9 bytes per token and KV head.
    """

    kernel_kind = "sketch"
    needs_queries = True

    def __init__(self, *, chunk: int, head_dim: int, dtype: torch.dtype, rank: int, bits: int) -> None:
        if rank > head_dim:
            raise ConfigError(f"[summary] rank = {rank} is above the model's head_dim {head_dim}: lower it")
        super().__init__(chunk=chunk, head_dim=head_dim, dtype=dtype, rank=rank, bits=bits)

    def layout(self) -> Layout:
        return {
            "codes": ((self.chunk, packed_size(self.rank, self.bits)), torch.uint8),
            "scale": ((self.rank,), torch.bfloat16),
        }

    def fit(self, keys: torch.Tensor, q_outer: torch.Tensor | None) -> State:
        assert q_outer is not None
        return fit_basis(keys, q_outer, self.rank)

    def state_bytes(self) -> int:
        return 4 * self.head_dim * (1 + 2 * self.rank)

    def encode(self, state: State, keys: torch.Tensor) -> Codes:
        mean, to, _ = state
        codes, scale = encode_sketch(keys, mean, to, self.bits)
        return {"codes": codes, "scale": scale}

    def scores(self, state: State, codes: Codes, q: torch.Tensor) -> torch.Tensor:
        mean, _, back = state
        return sketch_scores(q, codes["codes"], codes["scale"], mean, back, self.bits)
