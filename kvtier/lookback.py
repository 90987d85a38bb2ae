"""What an offload block can say about blocks of tokens that ran: ``kv.tracing``, ``kv.explain``, ``kv.audit``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvtier.audit import Audit, audit, sample
from kvtier.cache import TieredCache
from kvtier.explain import Explanation, explain
from kvtier.runtime.engine import Engine
from kvtier.runtime.errors import KvtierError, UnsupportedError
from kvtier.runtime.sequence import TieredSequence
from kvtier.runtime.tiered import TieredEngine
from kvtier.runtime.trace import Step, Trace

if TYPE_CHECKING:
    from kvtier.build import Runtime

HOW = "run what is to be looked at inside `with kv.tracing():`"


class Lookback:
    """The part of an offload block that looks back. ``Offload`` has it."""

    _runtime: "Runtime"
    _open: bool
    _trace: Trace | None = None
    _traced: tuple[TieredCache, ...] = ()
    """The caches that ran while it was kept, the last one last: held, so that their chunks are still there."""

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Keep what is chosen inside, for ``explain`` and ``audit``, until the next ``tracing`` or the block's end.

        The newest blocks are kept, up to 256 MiB, counted in ``[budget] gpu``: the choosing queries and the chosen
        chunks, 103 KB a generated token for SmolLM2-135M's shape with 96 chunks. Where that budget has no room earlier
        blocks are forgotten; nothing fails for it. Caches that ran are kept, too, and so are their chunks. Outside
        nothing is kept.

        Raises
        ------
        KvtierError
            The offload block is not open, or a trace is being kept already.
        UnsupportedError
            The method is "reattention".
        """
        engine = self._engine_to_look_at("kv.tracing()")
        if engine.trace is not None:
            raise KvtierError("a trace is being kept already: leave one `with kv.tracing():` before the next")
        self._forget()
        engine.trace = self._trace = Trace(engine.shape, self._runtime.gpu)
        try:
            yield
        finally:
            engine.trace = None

    def explain(
        self, cache: TieredCache | None = None, *, row: int | None = None, tokenizer: Any = None, top: int = 10
    ) -> Explanation:
        """Which spans of the text the blocks inside the last ``kv.tracing()`` attended to, by layer and weight.

        Usually those of a question and its answer. Takes about as long as choosing took, and up to 128 MiB of device
        memory twice, which no budget counts.

        Parameters
        ----------
        cache : one that ran there; None: the last one that did
        row : of a batch; None: the only one
        tokenizer : anything with ``decode(ids)``, for the text of the spans
        top : chunks that are cited at most; adjacent ones become one span

        Raises
        ------
        KvtierError
            Nothing was traced, or the offload block has ended.
        UnsupportedError
            The cache did not run there, or has several rows and ``row`` is None.
        """
        engine = self._engine_to_look_at("kv.explain()")
        if type(top) is not int or top < 1:
            raise ValueError(f"top counts the chunks that are cited, 1 or more, not {top!r}")
        sequence, steps, n_forgotten = self._steps(cache, row)
        with torch.inference_mode(False), torch.no_grad():
            return explain(engine, sequence, steps, n_forgotten, tokenizer, top)

    def audit(self, cache: TieredCache | None = None, *, row: int | None = None, steps: int = 8) -> Audit:
        """How many of the chunks that exact scores would choose were chosen, in blocks of the last ``kv.tracing()``.

        Every chunk of the text is read back from host and disk, once or for long texts a few times, and stays where it
        is. Takes up to 128 MiB of device memory twice, which no budget counts.

        Parameters
        ----------
        cache, row : as for ``explain``
        steps : blocks that are audited, evenly spaced; fewer if there are not so many

        Raises
        ------
        KvtierError, UnsupportedError
            As ``explain``; or no chunk could be chosen in any block.
        StoreError
            A chunk cannot be read back as it was written.
        """
        engine = self._engine_to_look_at("kv.audit()")
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps counts the blocks that are audited, 1 or more, not {steps!r}")
        sequence, kept, _ = self._steps(cache, row)
        kept = [step for step in kept if step.layers]
        if not kept:
            raise KvtierError(
                "no block chose a chunk: the text fits into sinks and window, or select is 0. There is nothing to audit"
            )
        with torch.inference_mode(False), torch.no_grad():
            return audit(engine, sequence, sample(kept, steps))

    def _steps(self, cache: Any, row: int | None) -> tuple[TieredSequence, list[Step], int]:
        """The sequence that is meant, its blocks in the trace, at least one, and how many there was no room for."""
        trace = self._trace
        if trace is None or not self._traced:
            raise KvtierError(f"nothing was traced: {HOW} first")
        cache = self._traced[-1] if cache is None else cache
        if not isinstance(cache, TieredCache):
            raise UnsupportedError(f"a {type(cache).__name__} cannot be looked at: pass the cache that ran")
        if not any(cache is each for each in self._traced):
            raise UnsupportedError(f"this cache did not run in the last trace of this offload block: {HOW}")
        if row is None and cache.n_rows == 1:
            row = 0
        if type(row) is not int or not 0 <= row < cache.n_rows:
            raise UnsupportedError(f"say which row of the cache is meant: row=0 .. {cache.n_rows - 1}, not {row!r}")
        sequence = cache._lane.sequences[row]
        assert isinstance(sequence, TieredSequence)
        steps, n_forgotten = trace.steps(sequence), trace.n_forgotten(sequence)
        if not steps:
            why = f": [budget] gpu has no room for them ({n_forgotten} were forgotten)" if n_forgotten else ""
            raise KvtierError(f"the trace holds no block of this cache{why}")
        return sequence, steps, n_forgotten

    def _ran(self, cache: TieredCache) -> None:
        """``cache`` ran; it is kept if a trace is."""
        if self._trace is not None and self._is_tracing():
            self._traced = (*(each for each in self._traced if each is not cache), cache)

    def _is_tracing(self) -> bool:
        engine: Engine[Any] = self._runtime.engine
        return isinstance(engine, TieredEngine) and engine.trace is not None

    def _forget(self) -> None:
        """Let go of the last trace."""
        if self._trace is not None:
            self._trace.close()
        self._trace, self._traced = None, ()

    def _engine_to_look_at(self, caller: str) -> TieredEngine:
        if not self._open:
            raise KvtierError(f"{caller} looks at what the tiers hold: call it inside the offload block")
        engine: Engine[Any] = self._runtime.engine
        if not isinstance(engine, TieredEngine):
            raise UnsupportedError(f'{caller} is about chunks, which [attention] method = "reattention" does not have')
        return engine
