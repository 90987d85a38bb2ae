"""TieredCache: the transformers cache that stands for one sequence of an offload block."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvtier.kernels.attend import Logits
from kvtier.runtime.engine import Engine
from kvtier.runtime.errors import UnsupportedError
from kvtier.runtime.sequence import Sequence

if TYPE_CHECKING:
    from kvtier.offload import Offload


class Lane:
    """The sequences of one cache, one per row of a batch, and the engine that runs them: what its layers share.

    Parameters
    ----------
    order : a permutation of the dimensions of queries and keys that makes the model's rotary embedding "rotate half",
        int64 [D]; None: it is
    """

    def __init__(self, engine: Engine[Any], sequences: list[Sequence], order: torch.Tensor | None) -> None:
        self.engine = engine
        self.sequences = sequences
        self.pads = [0] * len(sequences)
        """Pads that each row has had: never stored, but transformers counts them."""
        self.claimed: int | None = None
        """Inside ``generate``: the columns that it is to take for cached, so that it feeds all others."""
        self.ended: set[int] = set()
        """Inside ``generate``: rows that have ended. They are not fed any more."""
        self._order = order
        self._rows: list[int] = []

    @property
    def columns(self) -> int:
        """Length of the longest row, pads included."""
        return max(s.length + pads for s, pads in zip(self.sequences, self.pads, strict=True))

    @contextmanager
    def block(self, rows: list[int], ids: torch.Tensor) -> Iterator[None]:
        """Around one forward of token ``ids`` [len(rows), b]; after an exception the sequences are as before it."""
        self.engine.activate(self.sequences)
        self._rows = rows
        try:
            yield
        finally:
            self._rows = []
        for row, row_ids in zip(rows, ids, strict=True):
            self.engine.commit(self.sequences[row], row_ids)

    def check_in_block(self, n_rows: int) -> None:
        """Raise UnsupportedError unless a block of so many rows of this cache is going through the model."""
        if not self._rows:
            raise UnsupportedError(
                "a kvtier cache was used around the model's forward, or outside its offload block: call model(...) or "
                "model.generate(...) inside the block, not an inner module such as model.model(...)"
            )
        assert n_rows == len(self._rows)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logits: Logits) -> torch.Tensor:
        """Attention of the running block in one layer: q [R, H, b, D], k and v [R, N, b, D] -> [R, H, b, D]."""
        if self._order is not None:
            q, k = q[..., self._order], k[..., self._order]
        out = [
            self.engine.attend(self.sequences[row], layer, q[i], k[i], v[i], logits) for i, row in enumerate(self._rows)
        ]
        return torch.stack(out)


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
        """The new K and V [R, N, b, D] as they came, K marked with where it belongs."""
        self._lane.check_in_block(key_states.shape[0])
        key_states = key_states.view(key_states.shape)  # a tensor object of our own to mark
        key_states._kvtier = (self._lane, self._layer)  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._lane.columns if self._lane.claimed is None else self._lane.claimed

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
    """One sequence, or a batch of them, whose KV cache is spread over the tiers.

    Made by ``kv.new_cache()`` and ``kv.prefill()``. Pass it to ``model.generate(ids, past_key_values=cache)`` inside
    its offload block; afterwards each row holds its prompt and all its generated tokens but the last one, which was
    never fed to the model: pass it first on the next turn.
    """

    def __init__(self, owner: "Offload", lane: Lane) -> None:
        super().__init__(layers=[TieredLayer(lane, i) for i in range(lane.engine.shape.n_layers)])
        self._owner = owner
        self._lane = lane

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return len(self._lane.sequences)

    @property
    def token_ids(self) -> torch.Tensor:
        """The cached token ids of a cache of one row, [length] int64 on the CPU (a copy)."""
        if self.n_rows != 1:
            raise UnsupportedError(f"this cache has {self.n_rows} rows: use cache.row(i).token_ids")
        return torch.from_numpy(self._lane.sequences[0].tokens.array().copy())

    def fork(self, select: int | None = None, rows: int | None = None) -> "TieredCache":
        """A cache with the same past that goes its own way: chunks are shared, only counters are copied.

        The window of a cache that is not running is kept in host memory, shared by forks until they run.

        Parameters
        ----------
        select : chunks that the fork attends to per KV head and step (0: sinks and window alone); default as this cache
        rows : a batch of so many forks of a cache of one row; default as many rows as this cache

        Raises
        ------
        BudgetError
            The window does not fit the host budget.
        """
        if rows is None:
            return self._owner._fork(self, select, list(range(self.n_rows)))
        if self.n_rows != 1 or type(rows) is not int or rows < 1:
            raise UnsupportedError(
                f"fork(rows={rows!r}) of a cache of {self.n_rows} rows: it takes 1 row and makes >= 1"
            )
        return self._owner._fork(self, select, [0] * rows)

    def row(self, index: int) -> "TieredCache":
        """A fork of one row of a batch, without its pads. Raises IndexError."""
        fork = self._owner._fork(self, None, [range(self.n_rows)[index]])
        fork._lane.pads = [0]
        return fork

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write this cache of one row into a store, a folder that holds many; returns the id that ``kv.open`` takes.

        The id is a hash of the content, so saving the same again changes nothing. A save that is interrupted leaves
        nothing behind. What is saved is not counted in ``[budget] disk``; pads are not saved.

        Parameters
        ----------
        path : the folder; made if its parent exists. It can be that of ``[store] path``.

        Raises
        ------
        StoreError
            The folder is not a kvtier store, its device is too full, or another process is saving to it.
        BudgetError
            The window of a cache that has just run does not fit the host budget.
        UnsupportedError
            The cache has several rows (use ``cache.row(i).save(path)``) or no tokens, or the method is "reattention".
        """
        return self._owner._save(self, path)

    def rewind(self) -> None:
        """Forget the last token of every row, so that feeding it again gives its logits again."""
        if not all(sequence.can_rewind() for sequence in self._lane.sequences):
            raise UnsupportedError("the last block of this cache was longer than a token: pass new tokens to go on")
        for sequence in self._lane.sequences:
            sequence.rewind()

    @contextmanager
    def rewound(self, ids: torch.Tensor) -> Iterator[None]:
        """Around a call that feeds the last tokens ``ids`` [rows, 1] again; where it did not, they are kept."""
        lengths = [sequence.length for sequence in self._lane.sequences]
        self.rewind()
        try:
            yield
        finally:
            for sequence, length, token in zip(self._lane.sequences, lengths, ids, strict=True):
                if sequence.length < length:
                    Sequence.commit(sequence, token)  # not the subclass's: a parked window is still up to date

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError("a kvtier cache cannot be cropped (assisted decoding is not supported): fork() before")

    def activate_past_recording(self) -> None:
        raise UnsupportedError("assisted decoding is not supported with a kvtier cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UnsupportedError("a kvtier cache is not expanded in place: use fork(rows=...) for several continuations")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise UnsupportedError("rows of a kvtier cache are not selected in place: use row(i)")

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        sequences = self._lane.sequences
        lengths = ", ".join(str(s.length) for s in sequences)
        return "TieredCache(closed)" if sequences[0].closed else f"TieredCache({lengths} tokens)"
