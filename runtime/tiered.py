"""Method "chunks": the path of a token's K and V through the tiers of one offload block.

``attend`` is called once per layer and block:

1. chunks that have left the window are summarised (``summary``) and admitted to the lower tiers (``residency``);
2. the block's queries weigh the summaries and choose chunks (``kernels.select``);
3. the chosen chunks are fetched into the device pool (``residency``);
4. the block's own K and V go into the ring (``window``);
5. [sinks | chosen chunks | window] is assembled and attended with positions 0..n-1 (``kernels.attend``).
"""

import numpy as np
import torch

from kvtier.kernels.attend import attend
from kvtier.kernels.gather import gather_chunks
from kvtier.kernels.select import chunk_weights, top_chunks
from kvtier.runtime.budget import Budget
from kvtier.runtime.engine import Engine, ModelShape, Rotary
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.residency import Residency
from kvtier.runtime.sequence import Fitted, LayerChunks, TieredSequence
from kvtier.runtime.summary import Summary
from kvtier.runtime.window import WindowRing

SCORE_BYTES = 64 << 20
"""Scores [N, queries, chunks] are weighed in pieces of at most this size."""


class TieredEngine(Engine[TieredSequence]):
    """Ring, tiers and scratch of one offload block; runs one sequence at a time."""

    def __init__(
        self,
        shape: ModelShape,
        geometry: Geometry,
        rotary: Rotary,
        summary: Summary,
        residency: Residency,
        gpu: Budget,
        host: Budget,
    ) -> None:
        super().__init__(shape, geometry, rotary)
        self.residency = residency
        self._gpu = gpu
        self._host = host
        self._summary = summary
        kv = (shape.n_kv_heads, shape.head_dim)
        self._ring = WindowRing(geometry, shape.n_layers, *kv, shape.dtype, shape.device)
        attended = (2, shape.n_kv_heads, geometry.bound, shape.head_dim)
        self._attended = torch.empty(attended, dtype=shape.dtype, device=shape.device)
        self._running: TieredSequence | None = None
        self.last_chosen: list[torch.Tensor | None] = [None] * shape.n_layers
        """Per layer, the chunks [N, n] that the last block attended to (None before any could be selected)."""

    # -- sequences -----------------------------------------------------------------------------------------------------

    def new_sequence(self, select: int) -> TieredSequence:
        """An empty sequence."""
        return TieredSequence.empty(
            self.shape.n_layers, self.shape.n_kv_heads, self._summary.layout(), self._gpu, self.shape.device, select
        )

    def fork(self, sequence: TieredSequence, select: int) -> TieredSequence:
        """A sequence that shares the past of another; its window is parked on the host and shared until either runs."""
        self._park(sequence)
        for layer in sequence.layers:
            self.residency.share(layer.ids.ravel())
        return sequence.fork(select)

    def release(self, sequence: TieredSequence) -> None:
        """Forget a sequence; chunks that no other sequence shares leave every tier. A second call does nothing."""
        if sequence.closed:
            return
        sequence.closed = True
        if self._running is sequence:
            self._running = None
        for layer in sequence.layers:
            self.residency.release(layer.ids.ravel())
        sequence.layers = []
        sequence.parked = None

    def activate(self, sequence: TieredSequence) -> None:
        """Put the window of ``sequence`` into the ring; the sequence that was there is parked. Raises BudgetError."""
        if self._running is sequence:
            return
        if self._running is not None:
            self._park(self._running)
        self._running = sequence
        if sequence.parked is not None:
            self._ring.load(sequence.parked)

    def _park(self, sequence: TieredSequence) -> None:
        """Give ``sequence`` an up-to-date parked window, if it runs and has one to keep."""
        parked = sequence.parked
        if self._running is not sequence or not sequence.length or (parked and parked.end == sequence.length):
            return
        sequence.parked = None
        retired = min(layer.retired for layer in sequence.layers)  # they differ after a block that failed half-way
        begin = min(self.geometry.sink + retired * self.geometry.chunk, sequence.length)
        self.residency.free_host_bytes(self._ring.parked_bytes(begin, sequence.length))
        sequence.parked = self._ring.park(begin, sequence.length, self._host)

    # -- one block -----------------------------------------------------------------------------------------------------

    def attend(
        self, sequence: TieredSequence, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Steps 1 to 5 above, for a block of ``b`` new tokens in one layer."""
        assert self._running is sequence
        start = sequence.length
        chunks = sequence.layers[layer]
        self._retire(chunks, layer, start)
        chosen = self._choose(chunks, layer, q, start, sequence.select, scaling)
        self.last_chosen[layer] = chosen
        self._ring.write(layer, start, k, v)
        n = self._assemble(chunks, layer, chosen, start, start + q.shape[1])
        keys, values = self._attended[0, :, :n], self._attended[1, :, :n]
        rotary = self.rotary[layer]
        return attend(q, keys, values, rotary.cos[:n], rotary.sin[:n], scaling)

    def _retire(self, chunks: LayerChunks, layer: int, start: int) -> None:
        """Summarise and store the chunks that the block at ``start`` can select and the last one could not."""
        first, last = chunks.retired, self.geometry.selectable(start)
        if last <= first:
            return
        g, n_kv = self.geometry, self.shape.n_kv_heads
        begin, end = g.sink + first * g.chunk, g.sink + last * g.chunk
        if chunks.fitted is None:
            chunks.fitted = Fitted(self._summary.fit(self._ring.tokens(layer, g.sink, start)[0]), self._gpu)
        kv = self._ring.tokens(layer, begin, end).unflatten(2, (last - first, g.chunk))  # [2, N, m, C, D]
        chunks.codes.reserve(last - first)
        records = kv.permute(1, 2, 0, 3, 4).reshape(-1, 2, g.chunk, self.shape.head_dim)  # [N*m, 2, C, D]
        ids = self.residency.admit(records)
        chunks.codes.append(self._summary.encode(chunks.fitted.state, kv[0]))
        chunks.ids = np.concatenate([chunks.ids, ids.reshape(n_kv, -1)], axis=1)

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
        return top_chunks(self._weigh(chunks, rows, n_chunks), select)

    def _weigh(self, chunks: LayerChunks, rows: torch.Tensor, n_chunks: int) -> torch.Tensor:
        """Weights [N, n_chunks] float32 of all selectable chunks for the query ``rows`` [N, R, D]."""
        assert chunks.fitted is not None
        step = max(1, SCORE_BYTES // (4 * rows.shape[0] * n_chunks))
        weights = torch.zeros(rows.shape[0], n_chunks, device=rows.device)
        for part in rows.split(step, dim=1):
            slabs = [self._summary.scores(chunks.fitted.state, codes, part) for codes in chunks.codes.slabs(n_chunks)]
            weights += chunk_weights(torch.cat(slabs, dim=-1)) * (part.shape[1] / rows.shape[1])
        return weights

    def _assemble(self, chunks: LayerChunks, layer: int, chosen: torch.Tensor | None, start: int, end: int) -> int:
        """Write [sinks | chosen chunks | window up to ``end``] into the scratch; returns the attended length."""
        g = self.geometry
        keys, values = self._attended[0], self._attended[1]
        n = min(g.sink, end)
        self._ring.read(layer, 0, n, keys[:, :n], values[:, :n])
        if chosen is not None:
            picked = np.take_along_axis(chunks.ids, chosen.cpu().numpy(), axis=1)
            slots = self.residency.fetch(picked.ravel()).reshape(picked.shape)
            length = picked.shape[1] * g.chunk
            pool = self.residency.device.data
            on_device = torch.from_numpy(np.ascontiguousarray(slots)).to(pool.device)
            gather_chunks(pool, on_device, keys[:, n : n + length], values[:, n : n + length])
            n += length
        begin = max(g.sink, g.window_start(start))
        if end > begin:
            self._ring.read(layer, begin, end, keys[:, n : n + end - begin], values[:, n : n + end - begin])
            n += end - begin
        assert n <= g.bound
        self.longest_attended = max(self.longest_attended, n)
        return n

    def close(self) -> None:
        """Give everything back; the engine cannot be used any more."""
        self._running = None
        self.rotary = []
        del self._ring, self._attended
        self.residency.close()
