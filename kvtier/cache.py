"""TieredCache: the transformers cache that stands for one sequence of an offload block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtier.runtime.engine import Engine
from kvtier.runtime.errors import UnsupportedError
from kvtier.runtime.sequence import Sequence

if TYPE_CHECKING:
    from kvtier.offload import Offload


class Lane:
    """One sequence and the engine that runs it: what a cache and its layers share."""

    def __init__(self, engine: Engine[Any], sequence: Sequence) -> None:
        self.engine = engine
        self.sequence = sequence
        self._in_block = False

    @contextmanager
    def block(self, ids: torch.Tensor) -> Iterator[None]:
        """Around one forward of a block of token ``ids`` [b]; after an exception the sequence is as before it."""
        self.engine.activate(self.sequence)
        self._in_block = True
        try:
            yield
        finally:
            self._in_block = False
        self.engine.commit(self.sequence, ids)

    def check_in_block(self) -> None:
        """Raise UnsupportedError unless a block of this sequence is going through the model."""
        if not self._in_block:
            raise UnsupportedError(
                "a kvtier cache was used around the model's forward, or outside its offload block: call model(...) or "
                "model.generate(...) inside the block, not an inner module such as model.model(...)"
            )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of the running block in one layer: q [H, b, D], k and v [N, b, D] -> [H, b, D]."""
        return self.engine.attend(self.sequence, layer, q, k, v, scaling)


class TieredLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What transformers sees of one layer: ``update`` only marks the new keys, attention does the rest."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, lane: Lane, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lane = lane
        self._layer = layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the offload block has allocated everything."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new K and V [1, N, b, D] as they came, K marked with where it belongs."""
        self._lane.check_in_block()
        key_states = key_states.view(key_states.shape)  # a tensor object of our own to mark
        key_states._kvtier = (self._lane, self._layer)  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._lane.sequence.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """Kvtier does its own offloading."""

    def prefetch(self) -> None:
        """Kvtier does its own prefetching."""

    def reset(self) -> None:
        raise UnsupportedError("a kvtier cache cannot be reset: make a new one with kv.new_cache()")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise UnsupportedError("beam search is not supported: a kvtier cache cannot be reordered")


class TieredCache(Cache):
    """One sequence whose KV cache is spread over the tiers. Made by ``kv.new_cache()`` and ``kv.prefill()``.

    Pass it to ``model.generate(ids, past_key_values=cache)`` inside its offload block; afterwards it holds the prompt
    and all generated tokens but the last one, which was never fed to the model: pass it first on the next turn.
    """

    def __init__(self, owner: "Offload", lane: Lane) -> None:
        super().__init__(layers=[TieredLayer(lane, i) for i in range(lane.engine.shape.n_layers)])
        self._owner = owner
        self._lane = lane

    @property
    def token_ids(self) -> torch.Tensor:
        """The cached token ids, [length] int64 on the CPU (a copy)."""
        return torch.from_numpy(self._lane.sequence.tokens.array().copy())

    def fork(self, select: int | None = None) -> "TieredCache":
        """A cache with the same past that goes its own way: chunks are shared, only counters are copied.

        The window of a cache that is not running is kept in host memory, shared by forks until they run. ``select``
        changes how many chunks the fork attends to (0: sinks and window alone); default as this cache.

        Raises BudgetError when the window does not fit the host budget.
        """
        return self._owner._fork(self, select)

    def rewind(self) -> None:
        """Forget the last token, so that feeding it again gives its logits again."""
        sequence = self._lane.sequence
        if not sequence.can_rewind():
            raise UnsupportedError("the last block of this cache was longer than a token: pass new tokens to go on")
        sequence.rewind()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError("a kvtier cache cannot be cropped (assisted decoding is not supported): fork() before")

    def activate_past_recording(self) -> None:
        raise UnsupportedError("assisted decoding is not supported with a kvtier cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UnsupportedError("a kvtier cache holds one sequence: use fork() for several continuations")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise UnsupportedError("a kvtier cache holds one sequence")

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        sequence = self._lane.sequence
        state = "closed" if sequence.closed else f"{sequence.length} tokens"
        return f"TieredCache({state})"
