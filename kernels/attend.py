"""Attention of one block over the attended set, with fresh consecutive positions."""

import torch
import torch.nn.functional as F


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first ``R`` dimensions in float32 ("rotate half", as Llama).

    ``x`` [..., n, D], ``cos`` and ``sin`` [n, R] float32 -> [..., n, D] in x's dtype; dimensions from R on stay, and
    R = 0 turns nothing.
    """
    rotary = cos.shape[-1]
    if not rotary:
        return x
    head = x[..., :rotary].float()
    first, second = head.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotated = (head * cos + turned * sin).to(x.dtype)
    return rotated if rotary == x.shape[-1] else torch.cat((rotated, x[..., rotary:]), dim=-1)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Softmax attention of the last ``b`` of ``n`` tokens over all n, causal from the bottom right.

    Parameters
    ----------
    q : Tensor [H, b, D], un-rotated
    keys, values : Tensor [N, n, D], un-rotated, in the order of their new positions; H a multiple of N
    cos, sin : Tensor [n, R], float32, for the positions 0 .. n-1
    scaling : factor of q.k

    Returns
    -------
    Tensor [H, b, D], q's dtype
    """
    heads, block, dim = q.shape
    kv_heads, n, _ = keys.shape
    q = rotate(q, cos[n - block :], sin[n - block :])
    keys = rotate(keys, cos, sin)
    if block == 1:  # one query: the heads of a group become queries of their KV head, no mask, no copy of the keys
        folded = q.view(1, kv_heads, heads // kv_heads, dim)
        out = F.scaled_dot_product_attention(folded, keys[None], values[None], scale=scaling)
        return out.reshape(heads, 1, dim)
    causal = torch.ones(block, n, dtype=torch.bool, device=q.device).tril(n - block)
    out = F.scaled_dot_product_attention(
        q[None], keys[None], values[None], attn_mask=causal, scale=scaling, enable_gqa=heads != kv_heads
    )
    return out[0]
