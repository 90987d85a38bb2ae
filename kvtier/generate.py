"""``model.generate`` inside an offload block: refuses what cannot be served, gives stock code what it needs."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from kvtier.compat import cache_name, take_cache
from kvtier.forward import check_arguments, check_mask
from kvtier.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from kvtier.cache import TieredCache
    from kvtier.offload import Offload

ONE = {
    "num_beams": "beam search is not supported",
    "num_return_sequences": "several sequences of one prompt are not supported yet: fork() the cache for each",
    "num_beam_groups": "beam search is not supported",
    "guidance_scale": "classifier-free guidance runs a second sequence and is not supported",
}
"""Settings that must be 1 (or unset), and why."""
UNSET = {
    "prompt_lookup_num_tokens": "assisted decoding is not supported",
    "assistant_early_exit": "assisted decoding is not supported",
    "penalty_alpha": "contrastive search is not supported",
    "dola_layers": "DoLa decoding needs the hidden states of all layers and is not supported",
    "cache_implementation": "kvtier is the cache",
    "output_attentions": "kvtier never has the whole attention matrix",
    "output_hidden_states": "only the last block's hidden states would be returned",
    "token_healing": "token healing changes tokens that may already be cached",
}
"""Settings that must be unset (or False), and why."""
UNSET_ARGUMENTS = {
    "assistant_model": "assisted decoding is not supported",
    "negative_prompt_ids": "classifier-free guidance runs a second sequence and is not supported",
    "custom_generate": "custom decoding loops are not supported",
    "inputs_embeds": "kvtier keeps token ids, so it needs ids, not inputs_embeds",
}


def wrap_generate(kv: "Offload", original: Callable[..., Any]) -> Callable[..., Any]:
    """A generate that takes the same arguments and runs the stock method on a kvtier cache."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        kwargs = dict(signature.bind_partial(*args).arguments) | kwargs
        inputs, generation_config = kwargs.pop("inputs", None), kwargs.pop("generation_config", None)
        check_settings(generation_config, kv.model.generation_config, kwargs)
        cache = take_cache(kwargs)
        given = [ids for ids in (inputs, kwargs.pop("input_ids", None)) if ids is not None]
        if len(given) != 1:
            raise UnsupportedError("give the prompt's token ids once, as the first argument or as input_ids=")
        ids = kv.check_ids(given[0])
        cache = kv.adopt(cache)
        mask = kwargs.pop("attention_mask", None)
        check_mask(mask, cache.get_seq_length(), ids.shape[1])
        if mask is None:
            pad, eos = (
                effective(name, generation_config, kv.model.generation_config, kwargs)
                for name in ("pad_token_id", "eos_token_id")
            )
            check_padding(ids, pad, eos)
        if kwargs.pop("position_ids", None) is not None:
            raise UnsupportedError("position_ids: kvtier gives positions of its own to what is attended")
        kwargs.update(call_arguments(cache, ids, kv.model.device))
        kwargs[cache_name(kv.model.forward)] = cache
        kwargs["prefill_chunk_size"] = None  # stock chunking feeds a cached prompt twice; blocks are kvtier's own
        return original(ids, generation_config=generation_config, **kwargs)

    return generate


def check_settings(given: GenerationConfig | None, default: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """Refuse settings that cannot be served, wherever they come from: arguments, the given config, the model's."""

    def setting(name: str) -> Any:
        return effective(name, given, default, kwargs)

    for name, reason in UNSET_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"generate({name}=...): {reason}")
    for name, reason in ONE.items():
        if setting(name) not in (None, 1):
            raise UnsupportedError(f"generate({name}={setting(name)}): {reason}")
    for name, reason in UNSET.items():
        if setting(name) not in (None, False):
            raise UnsupportedError(f"generate({name}={setting(name)!r}): {reason}")
    check_arguments({"use_cache": setting("use_cache")})


def effective(
    name: str, given: GenerationConfig | None, default: GenerationConfig | None, kwargs: dict[str, Any]
) -> Any:
    """The value of a generation setting: from the arguments, else the given config, else the model's; None if unset."""
    sources = (kwargs.get(name), getattr(given, name, None), getattr(default, name, None))
    return next((value for value in sources if value is not None), None)


def check_padding(ids: torch.Tensor, pad: Any, eos: Any) -> None:
    """Without a mask stock ``generate`` takes pad tokens in a prompt for padding: refuse them, they may be real."""
    ends = eos if isinstance(eos, list) else [eos]
    if isinstance(pad, int) and pad not in ends and bool((ids == pad).any()):
        raise UnsupportedError(
            f"the prompt contains the pad token {pad} and no attention_mask: padding is not supported yet. If these "
            "are real tokens, pass attention_mask=torch.ones_like(ids)"
        )


def call_arguments(cache: "TieredCache", ids: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """Mask and positions that make stock ``generate`` feed exactly the tokens that the cache lacks.

    Ids that begin with all cached ids are the whole conversation (all of them cached: the last is fed again). Otherwise
    they are new tokens, and stock ``generate`` knows so by a mask that is longer than the ids.
    """
    cached, n = cache.get_seq_length(), ids.shape[1]
    if cached and begins_with(ids[0], cache.token_ids):
        if n == cached:
            cache.rewind()
        length, start = n, 0
    else:
        length, start = cached + n, cached
    return {
        "attention_mask": torch.ones(1, length, dtype=torch.bool, device=ids.device),
        "position_ids": torch.arange(start, length, device=ids.device)[None],
    }


def begins_with(ids: torch.Tensor, prefix: torch.Tensor) -> bool:
    """Whether ``ids`` [n] starts with all of ``prefix`` [m]."""
    return ids.shape[0] >= prefix.shape[0] and bool((ids[: prefix.shape[0]].cpu() == prefix).all())
