"""Method "chunks": the path of a token's K and V through the tiers of one offload block.

``attend`` is called once per layer and block:

1. chunks that have left the window are summarised (``summary``) and admitted to the lower tiers (``residency``);
2. the block's queries weigh the summaries and choose chunks (``layer_selection``);
3. the chosen chunks are fetched into the device pool (``residency``);
4. the block's own K and V go into the ring (``window``); [sinks | chosen chunks | window] is attended with positions
   0..n-1 (``layer_attention``).

A layer with a sliding window has step 4 alone, with that window.
"""

import warnings

import numpy as np
import torch

from kvtier.kernels.attend import Logits
from kvtier.runtime.budget import Budget
from kvtier.runtime.engine import Engine
from kvtier.runtime.finite import check_finite
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.host_slabs import HostSlabs
from kvtier.runtime.layer_attention import Attended, make_attention
from kvtier.runtime.layer_selection import LayerSelection, make_selection
from kvtier.runtime.model import ModelShape, Rotary
from kvtier.runtime.residency import Residency
from kvtier.runtime.seats import Seats
from kvtier.runtime.sequence import Fitted, LayerChunks, QueryMoment, TieredSequence
from kvtier.runtime.slabs import SlabList
from kvtier.runtime.summary import Summary
from kvtier.runtime.summary_sketch import SketchSummary
from kvtier.runtime.trace import Trace
from kvtier.runtime.two_levels import TwoLevelSelection
from kvtier.runtime.window import WindowRing, Windows


class TieredEngine(Engine[TieredSequence]):
    """Seats, tiers and scratch of one offload block."""

    def __init__(
        self,
        shape: ModelShape,
        geometry: Geometry,
        rotary: list[Rotary],
        summary: Summary,
        residency: Residency,
        gpu: Budget,
        host: Budget,
    ) -> None:
        super().__init__(shape, geometry, rotary)
        self.residency = residency
        self._gpu = gpu
        self.summary = summary
        self._seats = Seats(shape, geometry, residency, gpu, host)
        self._attention = make_attention(shape, geometry, {table.cos.shape[-1] for table in rotary})
        self._selection = self._make_selection()
        self.last_chosen: list[torch.Tensor | None] = [None] * shape.n_layers
        """Per layer, the chunks [N, n] that the last block attended to (None before any could be selected)."""
        self.trace: Trace | None = None
        """Who keeps what is chosen; None: nobody."""

    def _make_selection(self) -> LayerSelection:
        summary, device = self.summary, self.shape.device
        if not isinstance(summary, SketchSummary) or summary.levels == 1:
            return make_selection(summary, device, self._gpu)
        if device.type == "cuda":
            warnings.warn("[summary] levels = 2 selects in torch, more slowly than one level in Triton", stacklevel=2)
        return TwoLevelSelection(summary, self._gpu)

    # -- sequences -----------------------------------------------------------------------------------------------------

    def new_sequence(self, select: int) -> TieredSequence:
        """An empty sequence."""
        return TieredSequence.empty(self.shape.n_layers, self.shape.n_kv_heads, self._new_codes, select)

    def _new_codes(self) -> SlabList:
        """What holds the summaries of a layer."""
        layout, heads, device = self.summary.layout(), self.shape.n_kv_heads, self.shape.device
        if self.summary.levels == 1:
            return SlabList(layout, heads, self._gpu, device)
        residency, host = self.residency, self.residency.host.budget
        return HostSlabs(
            layout, heads, host, device, lambda nbytes: residency.free_host_bytes(nbytes + host.aside_bytes)
        )

    def fork(self, sequence: TieredSequence, select: int) -> TieredSequence:
        """A sequence that shares the past of another; its window is parked on the host and shared until either runs."""
        self.park(sequence)
        fork = sequence.fork(select)
        for layer in sequence.layers:
            self.residency.share(layer.ids.ravel())
        return fork

    def release(self, sequence: TieredSequence) -> None:
        """Forget a sequence; chunks that no other sequence shares leave every tier. A second call does nothing."""
        if sequence.closed:
            return
        sequence.closed = True
        self._seats.release(sequence)
        for layer in sequence.layers:
            self.residency.release(layer.ids.ravel())
        sequence.layers = []
        sequence.parked = None

    @property
    def window_bytes(self) -> int:
        """Most bytes of the windows of one sequence."""
        return Windows.bytes_needed(self.shape, self.geometry)

    def park(self, sequence: TieredSequence) -> None:
        """Have an up-to-date copy of the windows on the host. Raises BudgetError."""
        self._seats.park(sequence)

    def activate(self, sequences: list[TieredSequence]) -> None:
        """Seat ``sequences``; others are parked on the host where seats are short. Raises BudgetError."""
        self._seats.activate(sequences)

    # -- one block -----------------------------------------------------------------------------------------------------

    def attend(
        self, sequence: TieredSequence, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logits: Logits
    ) -> torch.Tensor:
        """Steps 1 to 4 above, for a block of ``b`` new tokens in one layer."""
        windows = self._seats.windows_of(sequence)
        start, end = sequence.length, sequence.length + q.shape[1]
        if layer in self.shape.sliding_layers:
            to = self._sliding(windows, layer, start, end)
            return self._attention.attend(q, k, v, to, self.rotary[layer], logits)
        ring, place = windows.full, windows.place[layer]
        chunks = sequence.layers[layer]
        if self.summary.needs_queries and chunks.fitted is None:
            self._observe(chunks, layer, start, q)
        self._retire(sequence, layer, ring, place)
        chosen = self._choose(chunks, layer, q, start, sequence.select, logits.scaling)
        self.last_chosen[layer] = chosen
        if self.trace is not None:
            queries = self._choosing(layer, q, logits.scaling)
            self.trace.add(sequence, layer, q.shape[1], queries, self.geometry.selectable(start), chosen)
        g = self.geometry
        slots = None if chosen is None else self._fetch(chunks, chosen)
        begin = max(g.sink, g.window_start(start))
        to = Attended(ring, place, min(g.sink, end), begin, start, end, self.residency.device.data, slots)
        assert to.length <= g.bound
        self.longest_attended = max(self.longest_attended, to.length)
        return self._attention.attend(q, k, v, to, self.rotary[layer], logits)

    def _sliding(self, windows: Windows, layer: int, start: int, end: int) -> Attended:
        """What a layer with a sliding window attends to. Rotation is relative: positions count from its first token."""
        place, begin = windows.place[layer], self.shape.sliding_begin(start)
        pool, window = self.residency.device.data, self.shape.sliding_window
        return Attended(windows.sliding, place, 0, begin, start, end, pool, window=window)

    def _observe(self, chunks: LayerChunks, layer: int, start: int, q: torch.Tensor) -> None:
        """Count the queries of the block at ``start``, which a summary will be fitted to."""
        n_kv, dim = self.shape.n_kv_heads, self.shape.head_dim
        if chunks.queries is None:
            chunks.queries = QueryMoment(n_kv, dim, self.shape.device, self._gpu)
        chunks.queries.add(start, self.rotary[layer].unplaced(q.float()).reshape(n_kv, -1, dim))

    def _retire(self, sequence: TieredSequence, layer: int, ring: WindowRing, place: int) -> None:
        """Summarise and store the chunks that the block that begins can select and the last one could not."""
        chunks, start = sequence.layers[layer], sequence.length
        first, last = chunks.retired, self.geometry.selectable(start)
        if last <= first:
            return
        g, n_kv = self.geometry, self.shape.n_kv_heads
        begin, end = g.sink + first * g.chunk, g.sink + last * g.chunk
        kv = ring.tokens(place, begin, end).unflatten(2, (last - first, g.chunk))  # [2, N, m, C, D]
        check_finite(layer, self.shape.dtype, keys=kv[0], values=kv[1])
        fitted = chunks.fitted or self._fit(chunks, layer, ring.tokens(place, g.sink, start)[0], start)
        chunks.codes.reserve(last - first)
        items = self.residency.pack(
            kv.permute(1, 2, 0, 3, 4).reshape(-1, 2, g.chunk, self.shape.head_dim)
        )  # [N*m, ...]
        ids = self.residency.admit(items).reshape(n_kv, -1)
        chunks.codes.append(self.summary.encode(fitted.state, kv[0]))
        chunks.ids = np.concatenate([chunks.ids, ids], axis=1)
        if sequence.recorder is not None:
            sequence.recorder.add(place, first, ids, items)

    def _fit(self, chunks: LayerChunks, layer: int, keys: torch.Tensor, start: int) -> Fitted:
        """Fit the summary to the ``keys`` [N, n, D] held, and to the queries before ``start``."""
        queries = None if chunks.queries is None else chunks.queries.before(start)
        seen = {} if queries is None else {"queries": queries}
        check_finite(layer, self.shape.dtype, keys=keys, **seen)
        fitted = chunks.fitted = Fitted(self.summary.fit(keys, queries), self._gpu)
        chunks.queries = None
        return fitted

    def _choose(
        self, chunks: LayerChunks, layer: int, q: torch.Tensor, start: int, select: int, scaling: float
    ) -> torch.Tensor | None:
        """Chunks [N, n] to attend to, ascending, or None when there are none."""
        n_chunks = self.geometry.selectable(start)
        if not n_chunks or not select:
            return None
        if n_chunks <= select:
            return torch.arange(n_chunks, device=q.device).expand(self.shape.n_kv_heads, -1)
        return self._selection.choose(chunks, self._choosing(layer, q, scaling), n_chunks, select)

    def _choosing(self, layer: int, q: torch.Tensor, scaling: float) -> torch.Tensor:
        """The queries of a block that choose, scaled and without positions: [N, group*Q, D] float32."""
        rows = self.rotary[layer].unplaced(q[:, self.geometry.choosing(q.shape[1])].float()) * scaling
        return rows.reshape(self.shape.n_kv_heads, -1, self.shape.head_dim)

    def _fetch(self, chunks: LayerChunks, chosen: torch.Tensor) -> torch.Tensor:
        """Bring the ``chosen`` chunks [N, n] into the device pool; their slots there, [N, n] int32 on the device."""
        picked = np.take_along_axis(chunks.ids, chosen.cpu().numpy(), axis=1)
        slots = self.residency.fetch(picked.ravel()).reshape(picked.shape)
        return torch.from_numpy(slots.astype(np.int32)).to(chosen.device)

    def close(self) -> None:
        """Give everything back; the engine cannot be used any more."""
        self.rotary = []
        del self._seats, self._attention, self._selection
        self.residency.close()
