"""``model.forward`` inside an offload block: checks the call, then feeds the tokens block by block."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kvtier.cache import TieredCache
from kvtier.compat import cache_name, take_cache
from kvtier.runtime.errors import UnsupportedError
from kvtier.runtime.geometry import Geometry

if TYPE_CHECKING:
    from kvtier.offload import Offload

REFUSED = {
    "inputs_embeds": "kvtier keeps token ids, so it needs input_ids, not inputs_embeds",
    "labels": "training losses are not supported inside an offload block: use the model outside of it",
    "output_attentions": "kvtier never has the whole attention matrix",
    "output_hidden_states": "only the last block's hidden states would be returned",
}
"""Arguments that must be unset (or False), and why."""
HANDLED = {
    "attention_mask",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "cache_position",
    "tokenizer",
}
"""Arguments that are served, or harmless: stock ``generate`` hands on the tokenizer that stop strings need."""
INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32}


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
        cache = kv.adopt(cache, ids.shape[0])
        mask = check_mask(arguments.get("attention_mask"), cache, ids)
        _check_positions(arguments.get("position_ids"), cache, mask)
        keep = arguments.get("logits_to_keep", 0)
        if keep is not None and (not isinstance(keep, int) or keep < 0):
            raise UnsupportedError(f"logits_to_keep must be a number, 0 (all) or more; given: {keep!r}")
        output = kv.feed(cache, ids, mask, logits_to_keep=keep or ids.shape[1])
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
    """Token ids [R, n] with n >= 1 below ``vocabulary``, int32 or int64, or an error that says what was given."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.dtype not in INTEGERS:
        given = f"a {ids.dtype} tensor of shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else repr(ids)
        raise UnsupportedError(f"input_ids must be an integer tensor [rows, n]; given: {given}")
    if ids.shape[0] == 0:
        raise ValueError("the batch is empty: at least one row is needed")
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: at least one token is needed")
    tokens: torch.Tensor = ids if ids.dtype == torch.int32 else ids.long()  # embeddings take these two
    if tokens.shape[1] > 1 or tokens.device.type == "cpu":  # a generated token on a GPU is not worth a synchronisation
        least, most = (int(bound) for bound in torch.aminmax(tokens))
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"token id {least if least < 0 else most} is not in the vocabulary (0 .. {vocabulary - 1})"
            )
    return tokens


def check_mask(mask: Any, cache: TieredCache, ids: torch.Tensor) -> torch.Tensor:
    """Which of ``ids`` [R, n] are tokens: bool [R, n] on the CPU. The others are pads, before the tokens of a row.

    ``mask`` : of ``ids``, or of all cached columns and ``ids``; None: all are tokens
    """
    rows, n = ids.shape
    if mask is None:
        return torch.ones(rows, n, dtype=torch.bool)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[0] != rows:
        raise UnsupportedError(f"attention_mask must be 2-D with {rows} rows: kvtier makes its own masks")
    cached = cache._lane.columns
    if mask.shape[1] not in (n, cached + n) and cache._lane.claimed is None:
        raise UnsupportedError(f"attention_mask has {mask.shape[1]} columns for {n} tokens on {cached} cached ones")
    if n == 1 and rows == 1 and mask.is_cuda:  # a generated token on a GPU is not worth a synchronisation
        return torch.ones(1, 1, dtype=torch.bool)
    real = mask[:, -n:].bool().cpu()
    first = real.int().argmax(dim=1)
    for row in range(rows):
        if not real[row].any():
            raise UnsupportedError(f"row {row} of attention_mask is all pads: each row needs at least one token")
        if not real[row, first[row] :].all():
            raise UnsupportedError(
                f"attention_mask has zeros after tokens in row {row}: right padding and gaps are not supported, pad on "
                'the left (tokenizer.padding_side = "left")'
            )
    return real


def _check_positions(position_ids: Any, cache: TieredCache, mask: torch.Tensor) -> None:
    """Positions of a row must count its tokens; ``generate`` makes its own, which do."""
    if position_ids is None or cache._lane.claimed is not None:
        return
    expected = positions(cache, mask)
    fits = isinstance(position_ids, torch.Tensor) and position_ids.shape in (expected.shape, expected[:1].shape)
    given = position_ids.cpu().expand_as(expected) if fits else None
    if given is None or not bool((given == expected)[mask].all()):
        first, last = int(expected[0, 0]), int(expected[0, -1])
        raise UnsupportedError(
            f"position_ids must be {first} .. {last} (kvtier gives positions of its own to what is attended)"
        )


def positions(cache: TieredCache, mask: torch.Tensor) -> torch.Tensor:
    """Position of each new token in its row, [R, n] int64 on the CPU; at pads, that of the row's first new token."""
    lengths = torch.tensor([sequence.length for sequence in cache._lane.sequences])
    return lengths[:, None] + (mask.long().cumsum(dim=1) - 1).clamp(min=0)


class Feeding:
    """One append to a cache: which rows get which tokens, in which blocks, and the logits that come back.

    Parameters
    ----------
    original : the model's own forward
    ids, mask : [R, n]
    keep : logits are kept for the last so many columns
    """

    def __init__(
        self,
        original: Callable[..., Any],
        cache: TieredCache,
        ids: torch.Tensor,
        mask: torch.Tensor,
        keep: int,
        device: torch.device,
    ) -> None:
        self._original = original
        self._name = cache_name(original)
        self._cache = cache
        self._lane = cache._lane
        self._device = device
        self._keep = min(keep, ids.shape[1])
        self._columns = ids.shape[1]
        self.rows = [row for row in range(ids.shape[0]) if row not in self._lane.ended]
        self.tokens = {row: ids[row, mask[row].to(ids.device)] if self._columns > 1 else ids[row] for row in self.rows}
        self._kept: dict[int, list[torch.Tensor]] = {row: [] for row in self.rows}
        self._output: Any = None

    @property
    def n_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(tokens.numel() for tokens in self.tokens.values())

    def block(self, row: int, begin: int, end: int) -> None:
        """Feed tokens begin..end of a row."""
        tokens = self.tokens[row]
        self._run([row], tokens[None, begin:end], max(0, end - max(begin, tokens.numel() - self._keep)))

    def last(self) -> None:
        """Feed the last token of every row."""
        self._run(self.rows, torch.stack([self.tokens[row][-1:] for row in self.rows]), 1)

    def count_pads(self) -> None:
        """All has been fed: transformers counts the pads before it too."""
        for row, tokens in self.tokens.items():
            self._lane.pads[row] += self._columns - tokens.numel()

    def _run(self, rows: list[int], ids: torch.Tensor, keep: int) -> None:
        ids = ids.to(self._device)
        with self._lane.block(rows, ids):
            self._output = self._original(
                input_ids=ids,
                **{self._name: self._cache},
                use_cache=True,
                logits_to_keep=max(keep, 1),  # the model cannot be asked for none
                return_dict=True,
            )
        if keep:
            for row, logits in zip(rows, self._output.logits, strict=True):
                self._kept[row].append(logits)

    def output(self) -> Any:
        """The last block's output with the logits [R, keep, V] of all; zeros at pads and in rows that had ended."""
        n_rows, vocabulary = len(self._lane.sequences), self._output.logits.shape[-1]
        kept = {row: torch.cat(parts) for row, parts in self._kept.items()}
        if n_rows == 1 and kept[0].shape[0] == self._keep:
            self._output["logits"] = kept[0][None]
            return self._output
        logits = self._output.logits.new_zeros(n_rows, self._keep, vocabulary)
        for row, mine in kept.items():
            logits[row, self._keep - mine.shape[0] :] = mine
        self._output["logits"] = logits
        return self._output


def run_blocks(feeding: Feeding, geometry: Geometry, on_block: Callable[[int], None], *, hold_last: bool) -> None:
    """Feed row by row, by DESIGN's schedule, but the last token of all rows together.

    ``on_block`` gets the number of tokens that are done. ``hold_last`` leaves the last token of each row out.
    """
    done = 0
    for row in feeding.rows:
        for begin, end in geometry.schedule(feeding.tokens[row].numel())[:-1]:
            feeding.block(row, begin, end)
            done += end - begin
            on_block(done)
    if not hold_last:
        feeding.last()
        on_block(done + len(feeding.rows))
    feeding.count_pads()
