"""Chunks of the device pool, laid out for attention."""

import torch


def gather_chunks(pool: torch.Tensor, slots: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor) -> None:
    """Copy chunks out of the pool, per KV head, one after the other.

    Parameters
    ----------
    pool : Tensor [slots, 2, C, D]
    slots : Tensor [N, n], int64, on the pool's device
    out_k, out_v : Tensor [N, n*C, D], written
    """
    n = slots.shape[1]
    chunks = pool[slots]  # [N, n, 2, C, D]
    out_k.unflatten(1, (n, -1)).copy_(chunks[:, :, 0])
    out_v.unflatten(1, (n, -1)).copy_(chunks[:, :, 1])
