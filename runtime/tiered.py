"""Method "chunks": the path of a token's K and V through the tiers of one offload block.

``attend`` is called once per layer and block:

1. chunks that have left the window are summarised (``summary``) and admitted to the lower tiers (``residency``);
2. the block's queries weigh the summaries and choose chunks (``layer_selection``);
3. the chosen chunks are fetched into the device pool (``residency``);
4. the block's own K and V go into the ring (``window``); [sinks | chosen chunks | window] is attended with positions
   0..n-1 (``layer_attention``).

A layer with a sliding window has step 4 alone, with that window.
"""

import numpy as np
import torch

from kvtier.kernels.attend import Logits
from kvtier.runtime.budget import Budget
from kvtier.runtime.engine import Engine
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.layer_attention import Attended, make_attention
from kvtier.runtime.layer_selection import make_selection
from kvtier.runtime.model import ModelShape, Rotary
from kvtier.runtime.residency import Residency
from kvtier.runtime.seats import Seats
from kvtier.runtime.sequence import Fitted, LayerChunks, QueryMoment, TieredSequence
from kvtier.runtime.summary import Summary
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
        self._selection = make_selection(summary, shape.device, gpu)
        self.last_chosen: list[torch.Tensor | None] = [None] * shape.n_layers
        """Per layer, the chunks [N, n] that the last block attended to (None before any could be selected)."""

    # -- sequences -----------------------------------------------------------------------------------------------------

    def new_sequence(self, select: int) -> TieredSequence:
        """An empty sequence."""
        return TieredSequence.empty(
            self.shape.n_layers, self.shape.n_kv_heads, self.summary.layout(), self._gpu, self.shape.device, select
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
        if chunks.fitted is None:
            queries = None if chunks.queries is None else chunks.queries.before(start)
            chunks.fitted = Fitted(self.summary.fit(ring.tokens(place, g.sink, start)[0], queries), self._gpu)
            chunks.queries = None
        kv = ring.tokens(place, begin, end).unflatten(2, (last - first, g.chunk))  # [2, N, m, C, D]
        chunks.codes.reserve(last - first)
        items = self.residency.pack(
            kv.permute(1, 2, 0, 3, 4).reshape(-1, 2, g.chunk, self.shape.head_dim)
        )  # [N*m, ...]
        ids = self.residency.admit(items).reshape(n_kv, -1)
        chunks.codes.append(self.summary.encode(chunks.fitted.state, kv[0]))
        chunks.ids = np.concatenate([chunks.ids, ids], axis=1)
        if sequence.recorder is not None:
            sequence.recorder.add(place, first, ids, items)

    def _choose(
        self, chunks: LayerChunks, layer: int, q: torch.Tensor, start: int, select: int, scaling: float
    ) -> torch.Tensor | None:
        """Chunks [N, n] to attend to, ascending, or None when there are none."""
        n_chunks = self.geometry.selectable(start)
        if not n_chunks or not select:
            return None
        if n_chunks <= select:
            return torch.arange(n_chunks, device=q.device).expand(self.shape.n_kv_heads, -1)
        choosing = self.rotary[layer].unplaced(q[:, self.geometry.choosing(q.shape[1])].float()) * scaling
        rows = choosing.reshape(self.shape.n_kv_heads, -1, self.shape.head_dim)  # [N, group*Q, D]
        return self._selection.choose(chunks, rows, n_chunks, select)

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
