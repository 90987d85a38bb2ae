"""Small signed integers packed into bytes.

``pack`` writes the codes of ``bits`` bits in *planes*: with ``p = 8 // bits`` codes per byte and R codes, byte j holds
the codes j, j + R/p, j + 2R/p, ...; so unpacking gives contiguous runs and needs no interleaving.
"""

import torch


def quantize(x: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantisation with one scale per slice along ``dim``.

    Parameters
    ----------
    x : Tensor [...], float32
    bits : 2, 4 or 8
    dim : the dimension that shares a scale

    Returns
    -------
    codes : Tensor, shape of x, int8, in -(2^(bits-1) - 1) .. 2^(bits-1) - 1
    scale : Tensor, shape of x with ``dim`` of size 1, bfloat16; codes * scale approximates x to half a scale
    """
    top = (1 << (bits - 1)) - 1
    scale = (x.abs().amax(dim, keepdim=True) / top).to(torch.bfloat16)
    step = scale.float()
    codes = torch.where(step > 0, x / step, torch.zeros_like(x)).round().clamp(-top, top)
    return codes.to(torch.int8), scale


def packed_size(n_codes: int, bits: int) -> int:
    """Bytes that ``n_codes`` codes of ``bits`` bits take, rounded up to whole bytes."""
    return -(-n_codes * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes ``[..., R]`` (int8) into ``[..., packed_size(R, bits)]`` (uint8), offset by 2^(bits-1)."""
    per_byte = 8 // bits
    planes = packed_size(codes.shape[-1], bits)
    offset = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    offset = torch.nn.functional.pad(offset, (0, planes * per_byte - codes.shape[-1]))
    packed = offset[..., :planes].clone()
    for plane in range(1, per_byte):
        packed |= offset[..., plane * planes : (plane + 1) * planes] << (plane * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, n_codes: int) -> torch.Tensor:
    """The inverse of ``pack``: ``[..., n_codes]`` float32 (whole numbers)."""
    mask = (1 << bits) - 1
    planes = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.cat(planes, dim=-1)[..., :n_codes].float().sub_(1 << (bits - 1))
