"""``kvtier.offload``: the context manager around a stock transformers model."""

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType, TracebackType
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationMixin

from kvtier import attention
from kvtier.build import build_runtime
from kvtier.cache import Lane, TieredCache
from kvtier.compat import attention_name, set_attention_name
from kvtier.config import Config
from kvtier.families import check_mode, examine
from kvtier.forward import check_ids, run_blocks, wrap_forward
from kvtier.generate import wrap_generate
from kvtier.rope import identity_rotary
from kvtier.runtime.errors import KvtierError, UnsupportedError
from kvtier.runtime.geometry import Geometry
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


@contextmanager
def recording_off() -> Iterator[None]:
    """Neither gradients nor inference tensors: what is allocated here is written to later, in any mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Offload:
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
        self._stack = ExitStack()
        self._open = self._entered = False
        self._dead: deque[CachedSequence] = deque()
        self._caches: weakref.WeakSet[TieredCache] = weakref.WeakSet()
        self._clock = Clock()
        self._last_stats: Stats | None = None

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
            attention.register()
            stack.callback(set_attention_name, self.model.config, attention_name(self.model.config))
            set_attention_name(self.model.config, attention.NAME)
            rotary = self._anatomy.rotary
            rotary_dim = 2 * rotary.original_inv_freq.numel()  # type: ignore[operator]
            self._replace(stack, rotary, "forward", identity_rotary(rotary_dim))
            if self._anatomy.family.stock_inputs:
                inputs = MethodType(GenerationMixin.prepare_inputs_for_generation, self.model)
                self._replace(stack, self.model, "prepare_inputs_for_generation", inputs)
            self._forward = self.model.forward
            self._replace(stack, self.model, "forward", wrap_forward(self, self.model.forward))
            self._replace(stack, self.model, "generate", wrap_generate(self, self.model.generate))
            self._stack = stack.pop_all()
        self._open = True
        return self

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
        for cache in self._caches:
            self._runtime.engine.release(cache._lane.sequence)
        self._stack.close()

    # -- caches --------------------------------------------------------------------------------------------------------

    def new_cache(self) -> TieredCache:
        """An empty cache, to be passed as ``past_key_values`` to ``model.generate`` or ``model(...)`` in this block."""
        self._check_open()
        return self._wrap(self._runtime.engine.new_sequence(self.geometry.select))

    def prefill(
        self, ids: torch.Tensor | Sequence[int], *, select: int | None = None, progress: bool | None = None
    ) -> TieredCache:
        """Read ``ids`` once and return the cache that holds exactly these tokens.

        Parameters
        ----------
        ids : token ids [n] or [1, n], on any device, or a list of ints
        select : chunks attended per KV head and step while reading and later; default ``[attention] select``
        progress : show a progress bar on stderr; None shows it on a terminal only
        """
        cache = self.new_cache()
        if select is not None:
            cache = cache.fork(select=select)
        if not isinstance(ids, torch.Tensor):
            ids = torch.as_tensor(ids) if len(ids) else torch.empty(0, dtype=torch.int64)
        tokens = self.check_ids(ids[None] if ids.ndim == 1 else ids)
        disable = None if progress is None else not progress
        with tqdm(total=tokens.shape[1], unit="tok", desc="prefill", disable=disable) as bar:
            self.feed(cache, tokens, logits_to_keep=1, on_block=lambda end: bar.update(end - bar.n))
        return cache

    def feed(
        self,
        cache: TieredCache,
        ids: torch.Tensor,
        *,
        logits_to_keep: int,
        on_block: Callable[[int], Any] | None = None,
    ) -> Any:
        """Append ``ids`` [1, n] to ``cache`` by DESIGN's schedule; the model's output with the last tokens' logits.

        ``model(...)`` and ``model.generate(...)`` come through here; call it for the progress callback, which gets the
        number of tokens done after each block.
        """
        self._check_open()
        check_mode(self.model)
        self._reap()
        started, was_empty = time.perf_counter(), cache.get_seq_length() == 0
        schedule = self.geometry.schedule(ids.shape[1])
        device = self._anatomy.shape.device
        ignore = on_block or (lambda end: None)
        with recording_off():
            output = run_blocks(self._forward, cache, ids, schedule, device, logits_to_keep, ignore)
        self._clock.add(ids.shape[1], was_empty, started)
        return output

    def check_ids(self, ids: Any) -> torch.Tensor:
        """Token ids [1, n] that this model can read, or an error that says what was given."""
        return check_ids(ids, self.model.config.vocab_size)

    def adopt(self, cache: Any) -> TieredCache:
        """The cache that a call runs on: the given one if it belongs to this block, a new one for None."""
        self._check_open()
        if cache is None:
            return self.new_cache()
        if not isinstance(cache, TieredCache):
            raise UnsupportedError(
                f"past_key_values is a {type(cache).__name__}; inside an offload block it must come from "
                "kv.new_cache(), kv.prefill() or fork() (or be left out)"
            )
        if cache._owner is not self:
            raise UnsupportedError("this cache belongs to another offload block: its chunks are not in this one")
        return cache

    def _fork(self, cache: TieredCache, select: int | None) -> TieredCache:
        self._check_open()
        self._reap()
        most = self.geometry.select
        if select is not None and not 0 <= select <= most:
            raise ValueError(f"select must be 0 .. {most} ([attention] select), not {select}")
        sequence = cache._lane.sequence
        with recording_off():
            return self._wrap(self._runtime.engine.fork(sequence, sequence.select if select is None else select))

    def _wrap(self, sequence: CachedSequence) -> TieredCache:
        self._reap()
        cache = TieredCache(self, Lane(self._runtime.engine, sequence))
        weakref.finalize(cache, self._dead.append, sequence)
        self._caches.add(cache)
        return cache

    def _reap(self) -> None:
        """Free the chunks of caches that nobody holds any more. Here, not in a finalizer: that could run anywhere."""
        while self._dead:
            self._runtime.engine.release(self._dead.popleft())

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
