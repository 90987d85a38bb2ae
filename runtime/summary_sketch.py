"""``[summary] kind = "sketch"``: low-rank, low-precision codes of every key (the default)."""

import torch

from kvtier.kernels.basis import fit_basis
from kvtier.kernels.coarse import (
    GROUPS,
    coarse_scores,
    decode_sketch,
    encode_coarse,
    fit_coarse,
    kept_tokens,
    level_bytes,
)
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

    def coarse_state_bytes(self) -> int:
        return level_bytes(self.rank) if self.levels == 2 else 0

    def encode(self, state: State, keys: torch.Tensor) -> Codes:
        mean, to, _ = state
        codes, scale = encode_sketch(keys, mean, to, self.bits)
        return {"codes": codes, "scale": scale}

    def scores(self, state: State, codes: Codes, q: torch.Tensor) -> torch.Tensor:
        mean, _, back = state
        return sketch_scores(q, codes["codes"], codes["scale"], mean, back, self.bits)

    # -- the coarse level, with ``levels`` = 2 -------------------------------------------------------------------------

    def device_layout(self) -> Layout:
        if self.levels == 1:
            return self.layout()
        return {
            "coarse": ((kept_tokens(self.chunk), GROUPS), torch.uint8),
            "coarse_scale": ((1,), torch.bfloat16),
        }

    def fit_coarse(self, state: State, codes: Codes) -> State:
        """Called once per layer and sequence, with the ``codes`` of the first chunks."""
        return fit_coarse(decode_sketch(codes["codes"], codes["scale"], self.bits), state[1])

    def encode_coarse(self, level: State, codes: Codes) -> Codes:
        """The coarse codes of chunks, from their ``codes``."""
        directions, books = level
        tokens = decode_sketch(codes["codes"], codes["scale"], self.bits)
        coarse, scale = encode_coarse(tokens, (directions, books))
        return {"coarse": coarse, "coarse_scale": scale}

    def coarse_scores(self, state: State, level: State, codes: Codes, q: torch.Tensor) -> torch.Tensor:
        """``scores`` from coarse codes."""
        mean, _, back = state
        directions, books = level
        return coarse_scores(q, codes["coarse"], codes["coarse_scale"], (directions, books), mean, back)
