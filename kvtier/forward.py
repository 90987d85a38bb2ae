"""``model.forward`` inside an offload block: checks the call, then feeds the tokens block by block."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kvtier.cache import TieredCache
from kvtier.compat import cache_name, take_cache
from kvtier.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from kvtier.offload import Offload

REFUSED = {
    "inputs_embeds": "kvtier keeps token ids, so it needs input_ids, not inputs_embeds",
    "labels": "training losses are not supported inside an offload block: use the model outside of it",
    "output_attentions": "kvtier never has the whole attention matrix",
    "output_hidden_states": "only the last block's hidden states would be returned",
}
"""Arguments that must be unset (or False), and why."""
HANDLED = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict", "cache_position"}


def wrap_forward(kv: "Offload", original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes the same arguments and runs DESIGN's schedule on the original."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = take_cache(kwargs)
        arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
        arguments.update(arguments.pop("kwargs", {}))
        cache = take_cache(arguments) if cache is None else cache
        ids = arguments.pop("input_ids", None)
        check_arguments(arguments)
        ids = kv.check_ids(ids)
        cache = kv.adopt(cache)
        check_mask(arguments.get("attention_mask"), cache.get_seq_length(), ids.shape[1])
        _check_positions(arguments.get("position_ids"), cache.get_seq_length(), ids.shape[1])
        keep = arguments.get("logits_to_keep", 0)
        if isinstance(keep, torch.Tensor):
            raise UnsupportedError("logits_to_keep must be a number: a tensor of indices is not supported")
        output = kv.feed(cache, ids, logits_to_keep=keep or ids.shape[1])
        return output if arguments.get("return_dict", True) is not False else output.to_tuple()

    return forward


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse what cannot be served, naming the reason."""
    for name, value in arguments.items():
        if name in REFUSED and value is not None and value is not False:
            raise UnsupportedError(f"{name}: {REFUSED[name]}")
        if name not in HANDLED and name not in REFUSED and value is not None:
            raise UnsupportedError(f"the argument {name} of model.forward is not supported inside an offload block")
    if arguments.get("use_cache") is False:
        raise UnsupportedError("use_cache=False: an offload block is the cache; use the model outside of it")


def check_ids(ids: Any, vocabulary: int) -> torch.Tensor:
    """Token ids [1, n] with n >= 1 below ``vocabulary``, or an error that says what was given."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        given = f"a {ids.dtype} tensor of shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else repr(ids)
        raise UnsupportedError(f"input_ids must be an integer tensor [1, n]; given: {given}")
    if ids.shape[0] != 1:
        raise UnsupportedError(f"batch size {ids.shape[0]} is not supported yet: one sequence at a time")
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: at least one token is needed")
    if ids.shape[1] > 1 or ids.device.type == "cpu":  # a generated token on a GPU is not worth a synchronisation
        least, most = (int(bound) for bound in torch.aminmax(ids))
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"token id {least if least < 0 else most} is not in the vocabulary (0 .. {vocabulary - 1})"
            )
    return ids


def check_mask(mask: Any, cached: int, n: int) -> None:
    """An attention mask may only say that every one of ``n`` new, or of all cached and new tokens counts."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise UnsupportedError("attention_mask must be a 2-D tensor of ones: kvtier makes its own masks")
    if mask.shape[1] not in (n, cached + n):
        raise UnsupportedError(f"attention_mask has {mask.shape[1]} columns for {n} tokens on {cached} cached ones")
    if not bool(mask.all()):
        raise UnsupportedError("attention_mask has zeros: padding is not supported yet, give the tokens without pads")


def _check_positions(position_ids: Any, start: int, n: int) -> None:
    if position_ids is None:
        return
    expected = torch.arange(start, start + n, device=position_ids.device)
    if position_ids.shape[-1] != n or not bool((position_ids == expected).all()):
        raise UnsupportedError(
            f"position_ids must be {start} .. {start + n - 1} (kvtier gives positions of its own to what is attended)"
        )


def run_blocks(
    original: Callable[..., Any],
    cache: TieredCache,
    ids: torch.Tensor,
    schedule: list[tuple[int, int]],
    device: torch.device,
    logits_to_keep: int,
    on_block: Callable[[int], None],
) -> Any:
    """Feed ``ids`` [1, n] block by block; the last output, with the logits of the last ``logits_to_keep`` tokens.

    Logits are computed for one token at least in each block, because the model cannot be asked for none.
    """
    name, n = cache_name(original), ids.shape[1]
    logits = []
    output = None
    for begin, end in schedule:
        keep = max(0, end - max(begin, n - logits_to_keep))
        block = ids[:, begin:end].to(device)
        with cache._lane.block(block[0]):
            output = original(
                input_ids=block, **{name: cache}, use_cache=True, logits_to_keep=max(keep, 1), return_dict=True
            )
        if keep:
            logits.append(output.logits)
        on_block(end)
    assert output is not None
    output["logits"] = torch.cat(logits, dim=1)
    return output
