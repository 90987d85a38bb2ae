"""Attention of one block over the attended set, with fresh consecutive positions.

Here in torch, on keys and values that lie beside each other; ``attend_decode`` and ``attend_prefill`` have the Triton
kernels, which start from where the parts of the set lie (``assemble``).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Logits:
    """How a layer makes attention logits from q.k."""

    scaling: float
    """Factor of q.k."""
    softcap: float | None = None
    """Logits are bent to softcap x tanh(logit / softcap) (Gemma 2)."""
    sink: torch.Tensor | None = None
    """[H]: a learned logit per query head that takes part in the softmax and attends to nothing (gpt-oss)."""


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
    turned, half = head * cos, rotary // 2
    turned[..., :half].addcmul_(second, sin[..., :half], value=-1)
    turned[..., half:].addcmul_(first, sin[..., half:])
    rotated = turned.to(x.dtype)
    return rotated if rotary == x.shape[-1] else torch.cat((rotated, x[..., rotary:]), dim=-1)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    logits: Logits,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of the last ``b`` of ``n`` tokens over all n, causal from the bottom right.

    Parameters
    ----------
    q : Tensor [H, b, D], un-rotated
    keys, values : Tensor [N, n, D], un-rotated, in the order of their new positions; H a multiple of N
    cos, sin : Tensor [n, R], float32, for the positions 0 .. n-1
    logits : what becomes of q.k
    window : a token attends to itself and the ``window - 1`` tokens before it; None: to all before it

    Returns
    -------
    Tensor [H, b, D], q's dtype
    """
    block = q.shape[1]
    if window is not None:  # what no query sees
        unseen = max(0, keys.shape[1] - block - window + 1)
        keys, values, cos, sin = keys[:, unseen:], values[:, unseen:], cos[unseen:], sin[unseen:]
    n = keys.shape[1]
    q = rotate(q, cos[n - block :], sin[n - block :])
    return attend_rotated(q, rotate(keys, cos, sin), values, logits, window)


def attend_rotated(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, logits: Logits, window: int | None = None
) -> torch.Tensor:
    """``attend`` for queries and keys that have their positions already."""
    heads, block, dim = q.shape
    kv_heads, n, _ = keys.shape
    mask = None if block == 1 and (window is None or window >= n) else _mask(block, n, window, q.device)
    if logits.softcap is not None:
        return _softcapped(q, keys, values, mask, logits)
    if logits.sink is not None:
        return _with_sink(q, keys, values, mask, logits)
    if mask is None:  # the heads of a group become queries of their KV head: no copy of the keys
        folded = q.reshape(1, kv_heads, heads // kv_heads, dim)
        out = F.scaled_dot_product_attention(folded, keys[None], values[None], scale=logits.scaling)
        return out.reshape(heads, 1, dim)
    out = F.scaled_dot_product_attention(
        q[None], keys[None], values[None], attn_mask=mask, scale=logits.scaling, enable_gqa=heads != kv_heads
    )
    return out[0]


def _mask(block: int, n: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of n tokens each of the last ``block`` attends to: [block, n] bool."""
    mask = torch.ones(block, n, dtype=torch.bool, device=device).tril(n - block)
    return mask if window is None else mask.triu(n - block - window + 1)


def _with_sink(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, logits: Logits
) -> torch.Tensor:
    """As a key of zeros whose logit is the sink's, with a value of zeros."""
    assert logits.sink is not None
    heads, block, _ = q.shape
    n = keys.shape[1]
    bias = q.new_zeros(heads, block, n + 1)
    bias[:, :, n] = logits.sink[:, None]
    if mask is not None:
        bias[:, :, :n].masked_fill_(~mask, -torch.inf)
    keys, values = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))
    gqa = heads != keys.shape[0]
    out = F.scaled_dot_product_attention(
        q[None], keys[None], values[None], attn_mask=bias[None], scale=logits.scaling, enable_gqa=gqa
    )
    return out[0]


def _softcapped(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, logits: Logits
) -> torch.Tensor:
    """One KV head at a time, so that few logits exist at once."""
    assert logits.softcap is not None
    assert logits.sink is None, "no known model has both"
    group = q.shape[0] // keys.shape[0]
    out = torch.empty_like(q)
    for head, (k, v) in enumerate(zip(keys, values, strict=True)):
        rows = slice(head * group, (head + 1) * group)
        x = torch.tanh((q[rows] @ k.T).float() * (logits.scaling / logits.softcap)) * logits.softcap
        if mask is not None:
            x.masked_fill_(~mask, -torch.inf)
        out[rows] = x.softmax(dim=-1).to(v.dtype) @ v
    return out
