"""Writes the chunks of a sequence to its files behind the scenes, while the next block is computed.

One thread, one queue. Whoever adds chunks waits only when the queue is full: the device does not keep up with the
model. A chunk counts as saved once ``settle`` has seen it written; it counts for others after the next commit.
"""

import queue
import threading
from collections import deque
from dataclasses import dataclass

import torch

from kvtier.runtime.budget import Budget
from kvtier.runtime.residency import Residency
from kvtier.runtime.sequence_files import SequenceFiles
from kvtier.runtime.slot_tier import as_bytes
from kvtier.runtime.tier import Ids

QUEUE = 8
"""Batches, each the chunks that a block retires in one layer, that wait to be written at most."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks of one layer: ids [N, m] and items [N*m, ...] from chunk ``first`` on."""

    layer: int
    first: int
    ids: Ids
    items: torch.Tensor


class Recorder:
    """Write-behind of one sequence. Errors of the thread are raised by the next call; then nothing more is written.

    Parameters
    ----------
    files : of the sequence
    residency : told which chunks are saved
    budget : ``[budget] disk``, charged for what is written; None: nothing is counted
    """

    def __init__(self, files: SequenceFiles, residency: Residency, budget: Budget | None) -> None:
        self.files = files
        self._residency = residency
        self._budget = budget
        self._queue: queue.Queue[Batch | None] = queue.Queue(QUEUE)
        self._written: deque[Batch] = deque()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kvtier-recorder", daemon=True)
        self._thread.start()
        residency.settle = self.settle

    def add(self, layer: int, first: int, ids: Ids, items: torch.Tensor) -> None:
        """Have the chunks ``ids`` [N, m] of one layer written, whose ``items`` [N*m, ...] nobody changes any more.

        Raises StoreError or BudgetError: an earlier batch could not be written.
        """
        self.settle(False)
        if self._budget is not None:
            self._budget.take(ids.size * self.files.layout.shard.record_bytes, f"{ids.size} chunks of a saved sequence")
        self._queue.put(Batch(layer, first, ids, items))

    def settle(self, wait: bool) -> None:
        """Tell the residency what has been written; ``wait``: until all has. Raises the thread's StoreError."""
        if wait:
            self._queue.join()
        while self._written:
            batch = self._written.popleft()
            self._residency.saved.refer(batch.ids, self.files, batch.layer, batch.first)
            self._residency.saved.counters.bytes_written += batch.items.nbytes
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop the thread; what waits is still written, unless that has failed. A second call does nothing."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._residency.settle = lambda wait: None

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                if self._error is None:
                    heads, m = batch.ids.shape
                    payload = as_bytes(batch.items).reshape(heads, m, -1).swapaxes(0, 1)
                    self.files.write_records(batch.layer, batch.first, payload)
                    self._written.append(batch)
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()
        self._queue.task_done()
