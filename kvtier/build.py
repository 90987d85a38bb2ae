"""From a configuration and a model to a runtime: every check first, then every allocation."""

import warnings
from typing import Any

from transformers import PreTrainedConfig

from kvtier.compat import frequencies
from kvtier.config import Config, resolve_geometry
from kvtier.families import Anatomy
from kvtier.memory import Budgets, resolve_budgets
from kvtier.rope import rotary_tables, trained_window
from kvtier.runtime.budget import Budget
from kvtier.runtime.device_pool import DevicePool
from kvtier.runtime.engine import Engine
from kvtier.runtime.errors import ConfigError, UnsupportedError
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.host_pool import HostPool
from kvtier.runtime.model import Rotary
from kvtier.runtime.reattention import ReAttentionEngine
from kvtier.runtime.residency import Residency
from kvtier.runtime.saved import SavedChunks
from kvtier.runtime.sizing import DeviceSizes, check_host_budget, device_sizes, windows_set_aside
from kvtier.runtime.store import StoreTier
from kvtier.runtime.summary import Summary, make_summary
from kvtier.runtime.tier import Tier, TierCounters
from kvtier.runtime.tiered import TieredEngine


class Runtime:
    """Budgets, tiers and engine of one offload block. ``open`` allocates, ``close`` gives everything back."""

    engine: Engine[Any]

    def __init__(self, config: Config, anatomy: Anatomy, geometry: Geometry, budgets: Budgets) -> None:
        self.config = config
        self.geometry = geometry
        self._anatomy = anatomy
        self._gpu = Budget("gpu", budgets.gpu_bytes)
        self._host = Budget("host", budgets.host_bytes)
        self._disk = None if budgets.disk_bytes is None else Budget("disk", budgets.disk_bytes)
        self._residency: Residency | None = None
        self._engine_open = False
        shape = anatomy.shape
        self._summary: Summary | None = None
        self._sizes: DeviceSizes | None = None
        if config.attention.method == "chunks":
            s = config.summary
            more = {"rank": s.rank, "bits": s.bits, "levels": s.levels, "overfetch": s.overfetch}
            self._summary = make_summary(
                s.kind, chunk=geometry.chunk, head_dim=shape.head_dim, dtype=shape.dtype, **more
            )
            self._sizes = device_sizes(shape, geometry, self._summary, self._rotary_bytes(), budgets.gpu_bytes)
            check_host_budget(shape, geometry, budgets.host_bytes, config.store.bits, self._summary)

    def open(self) -> None:
        """Allocate the fixed parts. Raises BudgetError or StoreError with everything given back."""
        shape = self._anatomy.shape
        if self.config.attention.method == "reattention":
            self._gpu.take(self._rotary_bytes(), "rotary tables")
            picks = self.config.attention.picks
            self.engine = ReAttentionEngine(shape, self.geometry, self._rotary(), picks, self._gpu)
            self._engine_open = True
            return
        assert self._summary is not None
        assert self._sizes is not None
        self._gpu.take(self._sizes.fixed, "window ring, attention scratch and rotary tables")
        self._host.set_aside(windows_set_aside(shape, self.geometry))
        self._residency = self._open_tiers(self._sizes.pool_slots)
        self.engine = TieredEngine(
            shape, self.geometry, self._rotary(), self._summary, self._residency, self._gpu, self._host
        )
        self._engine_open = True

    def _open_tiers(self, pool_slots: int) -> Residency:
        shape, chunk = self._anatomy.shape, self.geometry.chunk
        record = (chunk, shape.head_dim, shape.dtype)
        bits = self.config.store.bits
        store = None
        if self._disk is not None:
            assert self.config.store.path is not None
            store = StoreTier(self.config.store.path, self._disk, *record, bits=bits)
        device = DevicePool(self._gpu, pool_slots, *record, shape.device)
        host = HostPool(self._host, *record, pin=shape.device.type == "cuda", bits=bits)
        return Residency(device, host, store, bits)

    @property
    def gpu(self) -> Budget:
        """Of the device."""
        return self._gpu

    @property
    def disk(self) -> Budget:
        """Of the disk, in a configuration with a store."""
        assert self._disk is not None
        return self._disk

    def _table_of(self, layer: int) -> tuple[str | None, int]:
        """Which rotary table a layer needs: its set of frequencies, and the number of positions (0: no rotation)."""
        positions, shape = self._anatomy.layers[layer], self._anatomy.shape
        slides = layer in shape.sliding_layers
        longest = shape.sliding_capacity(self.geometry.block) if slides else self.geometry.max
        return positions.layer_type, longest if positions.rotates else 0

    def _rotary_bytes(self) -> int:
        tables = {self._table_of(layer) for layer in range(self._anatomy.shape.n_layers)}
        return sum(2 * n * 2 * frequencies(self._anatomy.rotary, kind)[0].numel() * 4 for kind, n in tables)

    def _rotary(self) -> list[Rotary]:
        """Per layer; layers that need the same table share it."""
        tables: dict[tuple[str | None, int], Rotary] = {}
        per_layer = []
        for layer in range(self._anatomy.shape.n_layers):
            kind, n = self._table_of(layer)
            if (kind, n) not in tables:
                longest = n or self.geometry.max
                table = rotary_tables(self._anatomy.rotary, kind, longest, self._anatomy.shape.device)
                tables[kind, n] = table if n else table.nowhere()
            per_layer.append(tables[kind, n])
        return per_layer

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        if self._engine_open:
            self._engine_open = False
            self.engine.close()
        elif self._residency is not None:  # ``open`` failed between the tiers and the engine
            self._residency.close()

    def report(self) -> dict[str, Any]:
        """The tiers' part of ``kv.stats()``."""
        r = self._residency
        tiers: dict[str, tuple[Budget, Tier | None]] = {
            "device": (self._gpu, r.device if r else None),
            "host": (self._host, r.host if r else None),
        }
        if self._disk is not None:
            tiers["disk"] = (self._disk, r.store if r else None)
        reports = {name: _tier_report(*tier) for name, tier in tiers.items()}
        if r and (self._disk is not None or r.saved.counters != TierCounters()):
            nothing = _tier_report(Budget("disk", 0), None)
            reports["disk"] = _with_saved(reports.get("disk", nothing), r.saved)
        return {
            "tiers": reports,
            "stalls": {
                "fetch_seconds": r.stall_seconds if r else 0.0,
                "spill_seconds": r.spill_seconds if r else 0.0,
            },
            "longest_attended": self.engine.longest_attended,
        }


def _tier_report(budget: Budget, tier: Tier | None) -> dict[str, Any]:
    counters = TierCounters() if tier is None else tier.counters
    return {
        "bytes": budget.used_bytes,
        "budget": budget.limit_bytes,
        "chunks": 0 if tier is None else len(tier),
        "hits": counters.hits,
        "misses": counters.misses,
        "hit_rate": counters.hit_rate,
        "bytes_read": counters.bytes_read,
        "bytes_written": counters.bytes_written,
    }


def _with_saved(disk: dict[str, Any], saved: SavedChunks) -> dict[str, Any]:
    """The report of the disk tier with the chunks of saved sequences, which are read in place."""
    counters = saved.counters
    hits = disk["hits"] + counters.hits
    return disk | {
        "chunks": disk["chunks"] + len(saved),
        "hits": hits,
        "hit_rate": hits / (hits + disk["misses"]) if hits else disk["hit_rate"],
        "bytes_read": disk["bytes_read"] + counters.bytes_read,
        "bytes_written": disk["bytes_written"] + counters.bytes_written,
    }


def build_runtime(config: Config, anatomy: Anatomy, model_config: PreTrainedConfig) -> Runtime:
    """Check everything that can be checked before anything is allocated."""
    check_store(config)
    if not anatomy.shape.full_layers:
        window = anatomy.shape.sliding_window
        message = f"every layer has a sliding window of {window} tokens: what is older is forgotten, nothing is tiered"
        warnings.warn(message, stacklevel=2)
    geometry = resolve_geometry(config, trained_window(model_config))
    budgets = resolve_budgets(config.budget, anatomy.shape.device, config.store.path)
    return Runtime(config, anatomy, geometry, budgets)


def check_store(config: Config) -> None:
    """Refuse what does not go together in ``[store]``."""
    store, method = config.store, config.attention.method
    if store.mode == "durable" and store.path is None:
        raise ConfigError('[store] mode = "durable" needs [store] path: a directory to keep sequences in')
    if method != "chunks" and (store.mode == "durable" or store.dtype != "auto"):
        given = 'mode = "durable"' if store.mode == "durable" else f'dtype = "{store.dtype}"'
        raise UnsupportedError(
            f'[store] {given} does not go with [attention] method = "{method}", which keeps everything on the device: '
            'use method = "chunks"'
        )
