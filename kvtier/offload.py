"""``kvtier.offload``: the context manager around a stock transformers model."""

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType, TracebackType
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationMixin

from kvtier import attention, durable, sessions
from kvtier.build import build_runtime
from kvtier.cache import Lane, TieredCache
from kvtier.compat import attention_name, set_attention_name
from kvtier.config import Config
from kvtier.families import check_mode, examine
from kvtier.forward import Feeding, check_ids, check_mask, run_blocks, wrap_forward
from kvtier.generate import wrap_generate
from kvtier.lookback import Lookback
from kvtier.rope import identity_rotary
from kvtier.runtime.errors import KvtierError, UnsupportedError
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.library import Library
from kvtier.runtime.sequence import Sequence as CachedSequence
from kvtier.stats import Clock, Stats

ConfigSource = str | os.PathLike[str] | Mapping[str, object] | Config | None


def offload(model: Any, config: ConfigSource = None) -> "Offload":
    """Serve ``model`` with a tiered KV cache inside a ``with`` block.

    Parameters
    ----------
    model : a transformers causal language model in eval mode, on one device. Untouched outside the block.
    config : path of a TOML file, nested dict with the same keys, ``kvtier.Config``, or None for defaults sized from
        free memory.

    Raises
    ------
    ConfigError, BudgetError, StoreError, UnsupportedError
        Before any work, naming the key or the reason.

    Examples
    --------
    >>> with kvtier.offload(model, "kvtier.toml") as kv:  # doctest: +SKIP
    ...     book = kv.prefill(ids)
    ...     out = model.generate(question_ids, past_key_values=book.fork(), max_new_tokens=64)
    """
    return Offload(model, config)


def _as_tensor(ids: Sequence[int]) -> torch.Tensor:
    """A list of token ids as a tensor; raises UnsupportedError for anything else."""
    try:
        return torch.as_tensor(ids) if len(ids) else torch.empty(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedError(f"prefill takes token ids, a tensor or a list of integers, not {ids!r:.80}") from error


def _advance(bar: "tqdm[Any]", before: int, done: int) -> None:
    """Show that ``done`` tokens have been read after those ``before``."""
    bar.update(before + done - bar.n)


@contextmanager
def recording_off() -> Iterator[None]:
    """Neither gradients nor inference tensors: what is allocated here is written to later, in any mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Offload(Lookback):
    """One offload block. Use it as a context manager; ``kvtier.offload`` makes it."""

    def __init__(self, model: Any, config: ConfigSource = None) -> None:
        self.model = model
        self.config = Config.load(config)
        self._anatomy = examine(model)
        if attention_name(model.config) == attention.NAME:
            raise UnsupportedError(
                "this model, or one that shares its config object, is inside an offload block already"
            )
        self._runtime = build_runtime(self.config, self._anatomy, model.config)
        self._order = self._anatomy.order()
        self._stack = ExitStack()
        self._open = self._entered = False
        self._dead: deque[CachedSequence] = deque()
        self._caches: weakref.WeakSet[TieredCache] = weakref.WeakSet()
        self._clock = Clock()
        self._last_stats: Stats | None = None
        self._library: Library | None = None

    @property
    def geometry(self) -> Geometry:
        """The resolved ``[attention]`` and ``[prefill]`` values."""
        return self._runtime.geometry

    # -- entering and leaving ------------------------------------------------------------------------------------------

    def __enter__(self) -> "Offload":
        if attention_name(self.model.config) == attention.NAME:
            raise UnsupportedError(
                "this model, or one that shares its config object, is inside an offload block already"
            )
        if self._entered:
            raise KvtierError("an offload block can be entered once: call kvtier.offload(model, config) again")
        self._entered = True
        with ExitStack() as stack, recording_off():
            stack.callback(self._runtime.close)
            self._runtime.open()
            self._open_library(stack)
            attention.register()
            stack.callback(set_attention_name, self.model.config, attention_name(self.model.config))
            set_attention_name(self.model.config, attention.NAME)
            rotary = self._anatomy.rotary
            self._replace(stack, rotary, "forward", identity_rotary(self._anatomy.cos_width))
            if self._anatomy.family.stock_inputs:
                inputs = MethodType(GenerationMixin.prepare_inputs_for_generation, self.model)
                self._replace(stack, self.model, "prepare_inputs_for_generation", inputs)
            self._forward = self.model.forward
            self._replace(stack, self.model, "forward", wrap_forward(self, self.model.forward))
            self._replace(stack, self.model, "generate", wrap_generate(self, self.model.generate))
            self._stack = stack.pop_all()
        self._open = True
        return self

    def _open_library(self, stack: ExitStack) -> None:
        """Mode "durable": be the store's one writer. Raises StoreError, BudgetError."""
        store = self.config.store
        if store.path is not None and store.mode == "durable":
            library = Library(store.path)
            library.lock()
            stack.callback(library.unlock)
            self._runtime.disk.take(library.nbytes, f"what is saved in {store.path} already")
            self._library = library

    def library_at(self, path: str | os.PathLike[str]) -> Library:
        """The saved sequences of a folder."""
        library = Library(path)
        return self._library if self._library is not None and self._library.path == library.path else library

    @staticmethod
    def _replace(stack: ExitStack, module: Any, name: str, value: Callable[..., Any]) -> None:
        """Set an instance attribute and remember how to put back what was there."""
        if name in vars(module):
            stack.callback(setattr, module, name, vars(module)[name])
        else:
            stack.callback(delattr, module, name)
        setattr(module, name, value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        self._last_stats = self._collect()
        self._forget()
        for cache in self._caches:
            self._release(cache._lane.sequences)
        self._stack.close()

    # -- caches --------------------------------------------------------------------------------------------------------

    def new_cache(self, rows: int = 1) -> TieredCache:
        """An empty cache, to be passed as ``past_key_values`` to ``model.generate`` or ``model(...)`` in this block.

        ``rows`` : sequences of the batch
        """
        self._check_open()
        if type(rows) is not int or rows < 1:
            raise ValueError(f"a cache has at least one row, not {rows!r}")
        return self._wrap([self._runtime.engine.new_sequence(self.geometry.select) for _ in range(rows)])

    def prefill(
        self,
        ids: torch.Tensor | Sequence[int],
        *,
        attention_mask: torch.Tensor | None = None,
        select: int | None = None,
        progress: bool | None = None,
    ) -> TieredCache:
        """Read ``ids`` once and return the cache that holds exactly these tokens.

        Parameters
        ----------
        ids : token ids [n] or [rows, n], on any device, or a list of ints
        attention_mask : [rows, n], 0 at pads, which come before the tokens of a row; None: there are none
        select : chunks attended per KV head and step while reading and later; default ``[attention] select``
        progress : show a progress bar on stderr; None shows it on a terminal only
        """
        if not isinstance(ids, torch.Tensor):
            ids = _as_tensor(ids)
        tokens = self.check_ids(ids[None] if ids.ndim == 1 else ids)
        cache = self.new_cache(tokens.shape[0])
        if select is not None:
            cache = cache.fork(select=select)
        mask = check_mask(attention_mask, cache, tokens)
        disable = None if progress is None else not progress
        with tqdm(total=int(mask.sum()), unit="tok", desc="prefill", disable=disable) as bar:
            if self._library is not None:
                return self._prefill_durably(cache, tokens.cpu(), mask, bar)
            self.feed(cache, tokens, mask, logits_to_keep=1, on_block=lambda done: bar.update(done - bar.n))
        return cache

    def _prefill_durably(
        self, cache: TieredCache, tokens: torch.Tensor, mask: torch.Tensor, bar: "tqdm[Any]"
    ) -> TieredCache:
        """Read each row of ``tokens`` [rows, n] into the store; ``cache`` says how, and is left empty."""
        assert self._library is not None
        books, done = [], 0
        with recording_off():
            for ids, real, sequence in zip(tokens, mask, cache._lane.sequences, strict=True):
                at = partial(_advance, bar, done)
                book, resumed = durable.read(self, self._library, self._runtime.disk, ids[real], sequence.select, at)
                self._clock.resumed_tokens += resumed
                done += int(real.sum())
                books.append(book)
        if len(books) == 1 and bool(mask.all()):
            return books[0]
        rows = [self._runtime.engine.fork(book._lane.sequences[0], book._lane.sequences[0].select) for book in books]
        batch = self._wrap(rows)
        batch._lane.pads = (~mask).sum(dim=1).tolist()
        return batch

    def open(self, path: str | os.PathLike[str], id: str | None = None) -> TieredCache:
        """The cache that ``cache.save(path)`` wrote, also in another process: what follows is the same to the last bit.

        Parameters
        ----------
        path : folder of the store
        id : what ``save`` returned, and ``kvtier inspect`` lists; None: the only one

        Raises
        ------
        StoreError
            No store, no such id (the message lists those there are), another model, chunk, sink, local, dtype or
            summary than it was saved with, or damaged files. Chunks stay in the store and are checked when they are
            first read: generate can raise it, too.
        BudgetError
            It does not fit the budgets; whatever was read has been given back.
        """
        self._check_open()
        self._reap()
        with recording_off():
            return self._wrap([sessions.open_sequence(self, self.library_at(path), id)])

    def feed(
        self,
        cache: TieredCache,
        ids: torch.Tensor,
        mask: torch.Tensor,
        *,
        logits_to_keep: int,
        on_block: Callable[[int], Any] | None = None,
        hold_last: bool = False,
    ) -> Any:
        """Append ``ids`` [rows, n] to ``cache`` by DESIGN's schedule; the model's output with the last tokens' logits.

        ``model(...)`` and ``model.generate(...)`` come through here.

        Parameters
        ----------
        mask : [rows, n] bool on the CPU, False at pads
        on_block : called with the number of tokens done after each block
        hold_last : leave the last token of each row out; then nothing is returned
        """
        self._check_open()
        check_mode(self.model)
        self._reap()
        self._ran(cache)
        started, was_empty = time.perf_counter(), cache._lane.columns == 0
        device = self._anatomy.shape.device
        with recording_off():
            feeding = Feeding(self._forward, cache, ids, mask, logits_to_keep, device)
            run_blocks(feeding, self.geometry, on_block or (lambda done: None), hold_last=hold_last)
        held = len(feeding.rows) if hold_last else 0
        self._clock.add(feeding.n_tokens - held, len(feeding.rows), was_empty, started)
        return None if hold_last else feeding.output()

    def check_ids(self, ids: Any) -> torch.Tensor:
        """Token ids [rows, n] that this model can read, or an error that says what was given."""
        return check_ids(ids, self.model.config.vocab_size)

    def adopt(self, cache: Any, rows: int) -> TieredCache:
        """The cache that a call of ``rows`` rows runs on: the given one if it belongs here, a new one for None."""
        self._check_open()
        if cache is None:
            return self.new_cache(rows)
        if not isinstance(cache, TieredCache):
            raise UnsupportedError(
                f"past_key_values is a {type(cache).__name__}; inside an offload block it must come from "
                "kv.new_cache(), kv.prefill() or fork() (or be left out)"
            )
        if cache._owner is not self:
            raise UnsupportedError("this cache belongs to another offload block: its chunks are not in this one")
        if cache.n_rows != rows:
            raise UnsupportedError(
                f"input_ids has {rows} rows, the cache {cache.n_rows}: use kv.new_cache(rows={rows}), or "
                f"fork(rows={rows}) of a cache of one row"
            )
        return cache

    def _fork(self, cache: TieredCache, select: int | None, rows: list[int]) -> TieredCache:
        """A cache whose rows are forks of these ``rows`` of ``cache``."""
        self._check_open()
        self._reap()
        most = self.geometry.select
        if select is not None and (type(select) is not int or not 0 <= select <= most):
            raise ValueError(f"select must be 0 .. {most} ([attention] select), not {select!r}")
        lane, forks = cache._lane, []
        with recording_off():
            try:
                for row in rows:
                    sequence = lane.sequences[row]
                    forks.append(self._runtime.engine.fork(sequence, sequence.select if select is None else select))
            except BaseException:
                self._release(forks)
                raise
        fork = self._wrap(forks)
        fork._lane.pads = [lane.pads[row] for row in rows]
        return fork

    def _save(self, cache: TieredCache, path: str | os.PathLike[str]) -> str:
        self._reap()
        with recording_off():
            return sessions.save(self, cache, path)

    def _wrap(self, sequences: list[CachedSequence]) -> TieredCache:
        self._reap()
        cache = TieredCache(self, Lane(self._runtime.engine, sequences, self._order))
        weakref.finalize(cache, self._dead.extend, sequences)
        self._caches.add(cache)
        return cache

    def _reap(self) -> None:
        """Free the chunks of caches that nobody holds any more. Here, not in a finalizer: that could run anywhere."""
        while self._dead:
            self._release([self._dead.popleft()])

    def _release(self, sequences: list[CachedSequence]) -> None:
        for sequence in sequences:
            self._runtime.engine.release(sequence)

    def _check_open(self) -> None:
        if not self._open:
            raise KvtierError("this offload block is not open: use it as `with kvtier.offload(model, config) as kv:`")

    # -- what happened -------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """What the block has done so far (after it: in all). A dict; ``print`` shows a table."""
        if self._open:
            return self._collect()
        if self._last_stats is None:
            self._check_open()
        assert self._last_stats is not None
        return self._last_stats

    def _collect(self) -> Stats:
        self._reap()
        return Stats(**self._runtime.report(), **self._clock.report())
