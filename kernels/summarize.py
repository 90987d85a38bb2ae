"""What a chunk leaves on the device: a sketch, or one or two vectors (mean, box, cuboid).

A sketch is a few low-precision numbers per key, in a basis of the layer's own keys. Why it is the default and not one
or two vectors per chunk: at equal bytes, chunk means and boxes miss the needle that low-rank token codes find
(shared notes, summaries.md: 6 of 6 needles at 16K against 1 of 6 for means).
"""

import torch

from kvtier.kernels.quantize import pack, quantize


def fit_basis(keys: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and principal directions of one layer's keys, per KV head.

    The eigen-decomposition runs in float32 on the CPU, whatever the device: it is small, happens once per layer and
    sequence, and one implementation gives one basis. Sign: the largest component of each direction is positive.

    Parameters
    ----------
    keys : Tensor [N, n, D]
        The un-rotated keys then held after the sinks.
    rank : int
        Directions kept, at most D.

    Returns
    -------
    mean : Tensor [N, D], float32
    basis : Tensor [N, D, rank], float32, orthonormal columns, largest variance first
    """
    x = keys.float()
    mean = x.mean(dim=1)
    x = x - mean[:, None]
    covariance = (x.transpose(1, 2) @ x / keys.shape[1]).cpu()
    _, vectors = torch.linalg.eigh(covariance)
    basis = vectors.flip(-1)[..., :rank]
    largest = basis.abs().argmax(dim=1, keepdim=True)
    basis = basis * basis.gather(1, largest).sign()
    return mean, basis.contiguous().to(keys.device)


def encode_sketch(
    keys: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the keys of m chunks: coordinates of k - mean, one scale per chunk and direction.

    Parameters
    ----------
    keys : Tensor [N, m, C, D]
    mean, basis : as ``fit_basis`` returns them
    bits : 2, 4 or 8

    Returns
    -------
    codes : Tensor [N, m, C, packed_size(rank, bits)], uint8
    scale : Tensor [N, m, rank], bfloat16
    """
    coordinates = (keys.float() - mean[:, None, None]) @ basis[:, None]  # [N, m, C, rank]
    codes, scale = quantize(coordinates, bits, dim=2)
    return pack(codes, bits), scale.squeeze(2)


def encode_mean(keys: torch.Tensor) -> torch.Tensor:
    """Mean of the keys of each chunk, computed in float32.

    ``keys`` [N, m, C, D] -> [N, m, D] in the keys' dtype.
    """
    return keys.mean(dim=2, dtype=torch.float32).to(keys.dtype)


def encode_minmax(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each dimension over the keys of each chunk; nothing is rounded.

    ``keys`` [N, m, C, D] -> low, high: [N, m, D] each, in the keys' dtype.
    """
    return keys.amin(dim=2), keys.amax(dim=2)


def encode_cuboid(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre of the box around each chunk's keys, and the mean distance of the keys from it in each dimension.

    Computed in float32; the distances are from the centre as it is stored.

    Parameters
    ----------
    keys : Tensor [N, m, C, D]

    Returns
    -------
    centre, deviation : Tensor [N, m, D] each, in the keys' dtype
    """
    low, high = encode_minmax(keys)
    centre = ((low.float() + high.float()) / 2).to(keys.dtype)
    deviation = (keys.float() - centre.float()[:, :, None]).abs().mean(dim=2)
    return centre, deviation.to(keys.dtype)
