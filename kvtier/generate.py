"""``model.generate`` inside an offload block: refuses what cannot be served, gives stock code what it needs."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from kvtier.compat import cache_name, take_cache
from kvtier.forward import check_arguments, check_mask, positions
from kvtier.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from kvtier.cache import TieredCache
    from kvtier.offload import Offload

ONE = {
    "num_beams": "beam search is not supported",
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
        default = kv.model.generation_config
        check_settings(generation_config, default, kwargs)
        setting = functools.partial(effective, given=generation_config, default=default, kwargs=kwargs)
        call = prepare(kv, inputs, kwargs, setting)
        if (n := setting("num_return_sequences") or 1) > 1:
            call = call.expanded(kv, n)
            kwargs["num_return_sequences"] = 1
        if call.cache.n_rows > 1:
            stop_at_the_end_of_rows(call.cache, kwargs, setting)
        kwargs["attention_mask"] = call.mask.to(call.ids.device)
        kwargs[cache_name(kv.model.forward)] = call.cache
        kwargs["prefill_chunk_size"] = None  # stock chunking feeds a cached prompt twice; blocks are kvtier's own
        with call.claiming():
            kwargs["position_ids"] = call.positions()
            return original(call.ids, generation_config=generation_config, **kwargs)

    return generate


@dataclass(frozen=True, slots=True)
class Call:
    """What one ``generate`` runs on: the ids and mask [R, n] that it is given, of which it feeds the last ``fed``."""

    cache: "TieredCache"
    ids: torch.Tensor
    mask: torch.Tensor
    fed: int
    again: bool
    """The cache holds all of it: the last token is fed again."""

    def positions(self) -> torch.Tensor:
        """Position of each column's token in its row, [R, n] int64: those fed follow the cached ones."""
        rest = positions(self.cache, self.mask[:, -self.fed :])
        before = rest[:, :1] - torch.arange(self.ids.shape[1] - self.fed, 0, -1)
        return torch.cat((before.clamp(min=0), rest), dim=1).to(self.ids.device)

    @contextmanager
    def claiming(self) -> Iterator[None]:
        """While stock ``generate`` runs, the cache says that all columns but the last ``fed`` are cached."""
        lane = self.cache._lane
        with self.cache.rewound(self.ids[:, -1:]) if self.again else nullcontext():
            lane.claimed = self.ids.shape[1] - self.fed
            try:
                yield
            finally:
                lane.claimed = None
                lane.ended.clear()

    def expanded(self, kv: "Offload", n: int) -> "Call":
        """``n`` rows for each: all but the last token is fed once, then forked."""
        ids, mask = self.ids[:, -self.fed :], self.mask[:, -self.fed :]
        if self.fed > 1:
            kv.feed(self.cache, ids, mask, logits_to_keep=1, hold_last=True)
        rows = [row for row in range(self.cache.n_rows) for _ in range(n)]
        index = torch.tensor(rows)
        forks = kv._fork(self.cache, None, rows)
        return Call(forks, self.ids[index.to(self.ids.device)], self.mask[index], 1, self.again)


def prepare(kv: "Offload", inputs: Any, kwargs: dict[str, Any], setting: Callable[[str], Any]) -> Call:
    """Take ids, cache and mask out of the arguments and find out which tokens are new.

    Ids that begin with all cached ids are the whole conversation (all of them cached: the last is fed again). Otherwise
    they are new tokens.
    """
    cache = take_cache(kwargs)
    given = [ids for ids in (inputs, kwargs.pop("input_ids", None)) if ids is not None]
    if len(given) != 1:
        raise UnsupportedError("give the prompt's token ids once, as the first argument or as input_ids=")
    ids = kv.check_ids(given[0])
    cache = kv.adopt(cache, ids.shape[0])
    given_mask = kwargs.pop("attention_mask", None)
    mask = check_mask(given_mask, cache, ids)
    if given_mask is None:
        check_padding(ids, setting("pad_token_id"), setting("eos_token_id"))
    if kwargs.pop("position_ids", None) is not None:
        raise UnsupportedError("position_ids: kvtier gives positions of its own to what is attended")
    n = n_new(cache, ids, mask)
    return Call(cache, ids, mask, max(n, 1), again=not n)


def n_new(cache: "TieredCache", ids: torch.Tensor, mask: torch.Tensor) -> int:
    """How many of the last columns of ``ids`` [R, n] the cache lacks; 0: it holds exactly these."""
    n = ids.shape[1]
    cached = [torch.from_numpy(sequence.tokens.array()) for sequence in cache._lane.sequences]
    if not any(c.numel() for c in cached):
        return n
    rows = ids.cpu()
    tokens = [row[real] for row, real in zip(rows, mask, strict=True)]
    if not all(begins_with(row, c) for row, c in zip(tokens, cached, strict=True)):
        return n
    lacking: set[int] = {row.numel() - c.numel() for row, c in zip(tokens, cached, strict=True)}
    if len(lacking) > 1:
        raise UnsupportedError(
            f"the rows begin with what is cached and go on with different numbers of tokens ({sorted(lacking)}): pass "
            "only the new tokens, padded on the left, with their attention_mask"
        )
    return lacking.pop()


class EndOfRow(StoppingCriteria):
    """The stopping criteria of a batch that can be evaluated by row; remembers which rows have ended.

    Stock ``generate`` goes on feeding pads to rows that have ended: kvtier does not, pads are never stored.
    """

    def __init__(self, cache: "TieredCache", criteria: StoppingCriteriaList) -> None:
        self._lane = cache._lane
        self._criteria = criteria

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        ended: torch.BoolTensor = self._criteria(input_ids, scores, **kwargs)
        self._lane.ended.update(ended.nonzero().flatten().tolist())
        return ended


def stop_at_the_end_of_rows(cache: "TieredCache", kwargs: dict[str, Any], setting: Callable[[str], Any]) -> None:
    """Wrap the stopping criteria in the arguments, so that rows that have ended are not fed any more."""
    eos = setting("eos_token_id")
    if eos is None:
        return  # then stock generate goes on with every row until all have ended
    criteria = StoppingCriteriaList([EosTokenCriteria(eos), *(kwargs.get("stopping_criteria") or [])])
    if setting("stop_strings") is not None and kwargs.get("tokenizer") is not None:
        criteria.append(StopStringCriteria(kwargs["tokenizer"], setting("stop_strings")))
    kwargs["stopping_criteria"] = StoppingCriteriaList([EndOfRow(cache, criteria)])


def check_settings(given: GenerationConfig | None, default: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """Refuse settings that cannot be served, wherever they come from: arguments, the given config, the model's."""
    setting = functools.partial(effective, given=given, default=default, kwargs=kwargs)
    for name, reason in UNSET_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"generate({name}=...): {reason}")
    for name, reason in ONE.items():
        if setting(name) not in (None, 1):
            raise UnsupportedError(f"generate({name}={setting(name)}): {reason}")
    for name, reason in UNSET.items():
        if setting(name) not in (None, False):
            raise UnsupportedError(f"generate({name}={setting(name)!r}): {reason}")
    n = setting("num_return_sequences")
    if n not in (None, 1) and not setting("do_sample"):
        raise UnsupportedError(f"generate(num_return_sequences={n}) needs do_sample=True: greedy ones are equal")
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
            f"the prompt contains the pad token {pad} and no attention_mask: pass the tokenizer's, or, if these "
            "are real tokens, torch.ones_like(ids)"
        )


def begins_with(ids: torch.Tensor, prefix: torch.Tensor) -> bool:
    """Whether ``ids`` [n] starts with all of ``prefix`` [m], both on the CPU."""
    return ids.numel() >= prefix.numel() and bool((ids[: prefix.numel()] == prefix).all())
