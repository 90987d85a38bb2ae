"""The needle model: its shape, and a forward pass for training that is compiled once for sequences of any length.

Everything but attention works on the flat batch [T, D], and T never changes; the weights belong to a stock
LlamaForCausalLM, so what is saved needs no conversion.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

WINDOW = 8192
ROPE_THETA = 1e7
"""High, so that a third of each head's dimensions hardly turn within the window: there keys can be compared at any
distance, and as kvtier does, without positions."""
HEAD_DIM = 64


def make_config(vocab_size: int, bos: int, eos: int, pad: int, tiny: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64 if tiny else 320,
        intermediate_size=128 if tiny else 768,
        num_hidden_layers=2 if tiny else 6,
        num_attention_heads=2 if tiny else 8,
        num_key_value_heads=1 if tiny else 2,
        head_dim=HEAD_DIM,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def make_model(config: LlamaConfig, seed: int) -> Any:
    """Fresh weights, float32; projections that write to the residual stream begin at zero."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


class TrainingPass:
    """Loss and right or wrong of one flat batch."""

    def __init__(self, model: Any, compiled: bool) -> None:
        self.key_noise = 0.0
        """Standard deviation of noise on keys, as a share of a key's own root mean square. A match must then stand out
        by more than the training window asks for: kvtier ranks keys by coarse codes, among millions."""
        self._model = model
        self._eps: float = model.config.rms_norm_eps
        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._project, self._finish, self._loss = wrap(_project), wrap(_finish), wrap(_loss)
        half = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32, device=model.device) / HEAD_DIM
        self._frequencies = ROPE_THETA**-half
        self._dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32

    def __call__(
        self, length: int, ids: Tensor, positions: Tensor, index: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss; log-loss [M] of each target; whether each target [M] was the likeliest token."""
        inner = self._model.model
        angles = positions[:, None].float() * self._frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        x = F.embedding(ids, inner.embed_tokens.weight).to(self._dtype)
        for layer in inner.layers:
            a, m = layer.self_attn, layer.mlp
            norm = layer.input_layernorm.weight
            q, k, v = self._project(x, norm, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, cos, sin, self._eps)
            if self.key_noise:
                size = k.detach().float().square().mean(-1, keepdim=True).sqrt()
                k = k + (self.key_noise * size * torch.randn_like(k, dtype=torch.float32)).to(k.dtype)
            attended = _attend(q, k, v, length)
            norm = layer.post_attention_layernorm.weight
            weights_of_mlp = (m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight)
            x = self._finish(x, attended, a.o_proj.weight, norm, *weights_of_mlp, self._eps)
        out: tuple[Tensor, Tensor, Tensor] = self._loss(
            x, index, targets, weights, inner.norm.weight, inner.embed_tokens.weight, self._eps
        )
        return out


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D], cos and sin [T, 1, D], float32."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def _project(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    h = _norm(x, norm, eps)
    q, k, v = (_linear(h, w).view(len(x), -1, HEAD_DIM) for w in (wq, wk, wv))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _attend(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Causal attention of sequences of ``length`` tokens; q [T, H, D] -> [T, H * D]."""
    q, k, v = (x.view(-1, length, x.shape[1], HEAD_DIM).transpose(1, 2) for x in (q, k, v))
    # On a GPU a kernel that is not fused would need the whole matrix of scores: better to fail.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]) if q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(-1, out.shape[1] * HEAD_DIM)


def _finish(
    x: Tensor, attended: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    x = x + _linear(attended, wo)
    h = _norm(x, norm, eps)
    return x + _linear(F.silu(_linear(h, gate)) * _linear(h, up), down)


def _loss(
    x: Tensor, index: Tensor, targets: Tensor, weights: Tensor, norm: Tensor, embeddings: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _linear(_norm(x[index], norm, eps), embeddings).float()
    each = F.cross_entropy(logits, targets, reduction="none")
    return (each * weights).sum(), each.detach(), logits.argmax(-1) == targets
