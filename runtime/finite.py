"""Refuses NaN and infinity before they become summaries and records, which could make ordinary numbers of them.

Looked at: what a summary is fitted to, and K and V of every chunk that leaves the window. The device is waited for then
anyhow, as chunks are copied to the host, and at no other step for this. Not looked at: the sinks and the window, which
are attended as the model computed them. NaN comes out of NaN there, as it does without kvtier.
"""

import torch

from kvtier.runtime.errors import KvtierError


def check_finite(layer: int, dtype: torch.dtype, **tensors: torch.Tensor) -> None:
    """Raises KvtierError if one of ``tensors`` [N, ...], named for what it is, holds NaN or infinity.

    ``dtype`` : of the model
    """
    for what, tensor in tensors.items():
        low, high = tensor.aminmax()  # NaN if one is
        if not torch.isfinite(torch.stack((low, high))).all():
            raise _refusal(layer, dtype, what, tensor)


def _refusal(layer: int, dtype: torch.dtype, what: str, tensor: torch.Tensor) -> KvtierError:
    heads = (~torch.isfinite(tensor)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if dtype == torch.float16:
        advice = "They were computed in float16, which ends at 65,504: load the model in bfloat16 or float32."
    else:
        advice = "Look for NaN in the model's weights, and in what it computes up to this layer for these tokens."
    return KvtierError(
        f"the {what} of layer {layer} hold NaN or infinity, in KV head{'s' * (len(heads) > 1)} "
        f"{', '.join(map(str, heads))}: chunks that hold them can be neither chosen nor kept. {advice} "
        "This cache cannot go on; other caches can."
    )
