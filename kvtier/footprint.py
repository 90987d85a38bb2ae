"""How many bytes of each tier a context takes under given budgets. Arithmetic: nothing is allocated.

Byte formulas are those of ``runtime.sizing``; what a run takes after it has read so many tokens is compared with them
in tests/test_plan.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from kvtier.build import Runtime
from kvtier.config import Config
from kvtier.families import Anatomy
from kvtier.memory import Budgets
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.model import ModelShape
from kvtier.runtime.sequence_files import SequenceLayout
from kvtier.runtime.shards import BLOCK_BYTES
from kvtier.runtime.sizing import (
    DeviceSizes,
    device_sizes,
    fine_bytes,
    host_slab_chunks,
    item_bytes,
    least_device_sizes,
    least_host_bytes,
    moment_bytes,
    n_blocks,
    parked_bytes,
    saved_bytes,
    selection_bytes,
    spill_bytes,
    summaries_bytes,
    uncharged_bytes,
    windows_set_aside,
)
from kvtier.runtime.slabs import SLAB_CHUNKS, slab_bytes
from kvtier.runtime.store import EMPTY_STORE_BYTES
from kvtier.runtime.summary import Summary
from kvtier.runtime.window import Windows

ENOUGH = 2**60
"""Bytes."""
SPARE_BYTES = 4 * BLOCK_BYTES
"""Of the metadata of a store, which are counted and rarely taken."""


@dataclass(frozen=True, slots=True)
class TierBytes:
    """What a context takes of one tier."""

    lines: dict[str, int]
    """Bytes by what they are; the sum is needed."""
    budget: int
    used: int
    """Counted as in use when everything has been read, as ``kv.stats()`` says: without what is set aside."""
    chunks: int
    """Of one KV head each, that the tier holds then."""
    on_device: int
    """Bytes that it really takes: on the disk more than is counted."""
    least: int = 0
    """Below this ``kvtier.offload`` refuses the budget, whatever the context."""

    @property
    def needed(self) -> int:
        """Bytes of the budget, at the peak."""
        return max(sum(self.lines.values()), self.least)

    @property
    def fits(self) -> bool:
        """Whether a run gets through."""
        return self.needed <= self.budget


@dataclass(frozen=True)
class Footprint:
    """One model under one configuration.

    Attributes
    ----------
    on_gpu : selection runs in Triton there, which takes scratch, but for exact keys
    rows : sequences, each as long as the context
    forks : forks held beside them, each of which has gone on
    saved : bytes that the store holds already
    """

    shape: ModelShape
    geometry: Geometry
    summary: Summary
    rotary_bytes: int
    budgets: Budgets
    bits: int | None
    durable: bool
    on_gpu: bool
    rows: int = 1
    forks: int = 0
    saved: int = 0
    _known: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls, anatomy: Anatomy, geometry: Geometry, config: Config, budgets: Budgets, on_gpu: bool, **more: Any
    ) -> "Footprint":
        """From what ``kvtier.offload`` would see. ``more`` : rows, forks, saved."""
        runtime = Runtime(config, anatomy, geometry, Budgets(ENOUGH, ENOUGH, None))
        summary = runtime._summary
        assert summary is not None, 'method = "chunks"'
        store = config.store
        return cls(
            anatomy.shape,
            geometry,
            summary,
            runtime._rotary_bytes(),
            budgets,
            store.bits,
            store.mode == "durable",
            on_gpu,
            **more,
        )

    def changed(self, **fields: Any) -> "Footprint":
        """The same with other fields; of budgets, ``gpu_bytes``, ``host_bytes`` and ``disk_bytes``."""
        budgets = {name: fields.pop(name) for name in list(fields) if name.endswith("_bytes")}
        return replace(self, budgets=replace(self.budgets, **budgets), _known={}, **fields)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    @property
    def n_full(self) -> int:
        """Layers that are tiered."""
        return len(self.shape.full_layers)

    @property
    def item_bytes(self) -> int:
        """Of a chunk of one KV head on host and disk."""
        return item_bytes(self.shape, self.geometry, self.bits)

    @property
    def layout(self) -> SequenceLayout:
        """Of a saved sequence."""
        return SequenceLayout(self.n_full, self.shape.n_kv_heads, self.item_bytes, self.summary.layout())

    def retired(self, tokens: int) -> int:
        """Chunks per layer and KV head of one sequence that have left the window."""
        return self.geometry.selectable(tokens - 1) if self.n_full and tokens else 0

    def chunks(self, tokens: int) -> int:
        """Chunks of one KV head each, of all layers and rows."""
        return self.rows * self.n_full * self.shape.n_kv_heads * self.retired(tokens)

    def device_sizes(self) -> DeviceSizes:
        """How the device budget is divided; with a budget that is too small, the least that can run."""
        what = (self.shape, self.geometry, self.summary, self.rotary_bytes)
        try:
            return device_sizes(*what, self.budgets.gpu_bytes)
        except BudgetError:
            return least_device_sizes(*what)

    def device(self, tokens: int) -> TierBytes:
        """Of the device budget."""
        sizes, retired = self.device_sizes(), self.retired(tokens)
        one = summaries_bytes(self.shape, self.geometry, self.summary, retired)
        tail = slab_bytes(self.summary.device_layout(), self.shape.n_kv_heads) if retired % SLAB_CHUNKS else 0
        of_a_fork = self.n_full * (tail if retired else moment_bytes(self.shape, self.summary))
        in_triton = self.on_gpu and self.summary.kernel_kind != "exact" and self.summary.levels == 1
        lines = {
            "windows": sizes.ring * self.rows,
            "scratch": sizes.scratch,
            "rotary": sizes.rotary,
            "summaries": self.rows * one + self.forks * of_a_fork,
            "fitting": max(0, sizes.summaries - one),
            "selection": selection_bytes(self.shape, self.geometry, self.summary, tokens) if in_triton else 0,
            "pool": sizes.pool_slots * sizes.chunk_bytes,
        }
        used = sum(lines.values()) - lines["fitting"]
        if self.durable:  # rows are read one after the other, and run beside each other later
            used -= sizes.ring * (self.rows - 1)
        least = least_device_sizes(self.shape, self.geometry, self.summary, self.rotary_bytes).total
        # how full the pool is depends on what is asked: at most its slots
        held = min(sizes.pool_slots, self.chunks(tokens))
        return TierBytes(lines, self.budgets.gpu_bytes, used, held, used, least)

    def host(self, tokens: int) -> TierBytes:
        """Of the host budget: chunks as far as they fit, all of them where there is no disk."""
        one, total, limit = self.item_bytes, self.chunks(tokens), self.budgets.host_bytes
        parked = max(self.forks, self.rows if self.durable else 0) * parked_bytes(self.shape, self.geometry, tokens)
        windows = self.forks * Windows.bytes_needed(self.shape, self.geometry)  # at most, when they have gone on
        others = max(windows_set_aside(self.shape, self.geometry), windows, parked)
        fine = self._fine_bytes(tokens)
        room = max(0, limit - others - fine) // one
        held = total if self.budgets.disk_bytes is None else min(total, room)
        per_slab = host_slab_chunks(limit, one)
        slots = max(held, min(-(-held // per_slab) * per_slab, room))
        lines = {"chunks": held * one, "slab_rounding": (slots - held) * one, "windows": others}
        if self.summary.levels == 2:
            lines["fine_codes"] = fine
        used = slots * one + parked + fine
        least = least_host_bytes(self.shape, self.geometry, self.bits, self.summary)
        return TierBytes(lines, limit, used, held, used, least)

    def _fine_bytes(self, tokens: int) -> int:
        """Of all sequences; a fork that has gone on copies the last slab."""
        retired = self.retired(tokens)
        of_a_fork = fine_bytes(self.shape, self.summary, 1) if retired % SLAB_CHUNKS else 0
        return self.rows * fine_bytes(self.shape, self.summary, retired) + self.forks * of_a_fork

    def disk(self, tokens: int) -> TierBytes | None:
        """Of the disk budget; None without a store."""
        limit = self.budgets.disk_bytes
        if limit is None:
            return None
        retired, total = self.retired(tokens), self.chunks(tokens)
        if not self.durable:
            spilled = total - self.host(tokens).chunks
            lines = spill_bytes(limit, self.item_bytes, spilled)
            used = sum(lines.values())
            return TierBytes(lines, limit, used, spilled, used - SPARE_BYTES)
        window = Windows.bytes_needed(self.shape, self.geometry)
        one = saved_bytes(self.layout, retired, tokens, window)
        lines = {name: self.rows * n for name, n in one.items()}
        lines |= {"metadata": EMPTY_STORE_BYTES, "saved_before": self.saved}
        used = sum(lines.values())
        blocks, fitted = n_blocks(self.geometry, tokens), self.summary.state_bytes()
        beyond = sum(uncharged_bytes(self.layout, retired, tokens, blocks, fitted).values())
        beyond -= window - parked_bytes(self.shape, self.geometry, tokens)
        return TierBytes(lines, limit, used, total, used + self.rows * beyond - SPARE_BYTES)

    def tiers(self, tokens: int) -> dict[str, TierBytes]:
        """All of them, by the names that ``kv.stats()`` uses."""
        if tokens not in self._known:
            tiers = {"device": self.device(tokens), "host": self.host(tokens), "disk": self.disk(tokens)}
            self._known[tokens] = {name: tier for name, tier in tiers.items() if tier is not None}
        known: dict[str, TierBytes] = self._known[tokens]
        return known

    def fits(self, tokens: int, *names: str) -> bool:
        """Whether a context fits the tiers ``names``; none given: all."""
        return all(tier.fits for name, tier in self.tiers(tokens).items() if not names or name in names)

    # -- what would fit ------------------------------------------------------------------------------------------------

    def most_tokens(self, most: int) -> int:
        """The longest context of up to ``most`` tokens that fits; 0: none does."""
        return -smallest(-most, 0, lambda n: n == 0 or self.fits(-n))

    def least_budget(self, tokens: int, name: str) -> int:
        """The smallest budget "gpu", "host" or "disk" with which the context fits there, the others as they are.

        A larger host leaves less to the disk, unless everything is written there.
        """
        tiers = {"gpu": ("device",), "host": ("host",) if self.durable else ("host", "disk"), "disk": ("disk",)}[name]
        return smallest(1, ENOUGH, lambda n: self.changed(**{f"{name}_bytes": n}).fits(tokens, *tiers))


def smallest(low: int, high: int, is_enough: Callable[[int], bool]) -> int:
    """The smallest of ``low`` .. ``high`` that is enough, if all above it are; else some that is."""
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return high
