"""``kvtier plan``: whether a context fits, which bytes go where, how fast it can be at best, and what to change.

Reads the config of a model and nothing else; allocates nothing, but for ``measure``.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvtier import memory
from kvtier.advice import Advisor
from kvtier.bandwidth import assumed, measure
from kvtier.build import check_store
from kvtier.config import BudgetConfig, Config, Size, resolve_geometry
from kvtier.footprint import Footprint, TierBytes
from kvtier.memory import Available, Budgets
from kvtier.offload import ConfigSource
from kvtier.outline import Outline, outline
from kvtier.rates import RESOURCES, rates
from kvtier.rope import trained_window
from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import ConfigError, UnsupportedError
from kvtier.runtime.library import Library

SHARE = Size(percent=75)
"""Of what is free: the budget that is not given."""
ELSEWHERE = "(on another machine)"
"""Stands for a store path that is not given."""


def plan(
    model: str | os.PathLike[str],
    tokens: int,
    config: ConfigSource = None,
    *,
    device: str | None = None,
    gpu: str | int | None = None,
    host: str | int | None = None,
    disk: str | int | None = None,
    weights: str = "auto",
    rows: int = 1,
    forks: int = 0,
    miss: float = 0.5,
    card: str | None = None,
    measured: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """What ``kvtier plan --json`` prints.

    Parameters
    ----------
    model : a hub name, a folder, a .gguf file or a config.json
    tokens : length of the context
    config : as ``kvtier.offload`` takes it
    device : "cuda" or "cpu"; None: cuda if there is one
    gpu, host, disk : ``[budget]`` in place of the configuration's, such as "24GiB", for another machine: they are not
        compared with what is free here. A disk without ``[store] path`` is one of mode "spill"
    weights : "auto" (as stored), "bfloat16", "float16", "float32", "int8", "int4"
    rows : sequences of a batch, each as long as the context
    forks : forks held beside them, each of which has gone on
    miss : share of the chosen chunks that are not in the device pool when they are needed
    card : whose bandwidths are assumed, a key of ``kvtier.bandwidth.ASSUMED``; None: the one that is here
    measured : measure this machine's bandwidths, in less than 30 s, in place of assuming them
    say : takes a line for people while that is going on

    Returns
    -------
    dict
        ``model``: name, class, parameters, weights, weight_bytes, dtype (of K and V), layers, tiered_layers, kv_heads,
        head_dim, trained_window. ``tokens``, ``rows``, ``forks``, ``device``. ``settings``: what the run would resolve
        of attention, prefill, summary and store. ``fits``: a run gets through. ``tiers``: by "device", "host" and,
        with a store, "disk": ``budget``, ``needed`` (of it, at the peak), ``fits``, ``lines`` (bytes by what they are;
        needed is their sum, or what the block refuses to begin without), ``used`` (as ``kv.stats()["tiers"][...]
        ["bytes"]`` says when the context has been read), ``taken`` (really, on the disk with what no budget counts),
        ``chunks``, ``problem`` (None, or why this machine has no such budget). ``rates``: miss, bandwidths (with
        their source), prefill and decode, each with its bound and its terms: what, resource, amount, rate, seconds,
        arithmetic. ``advice`` and ``notes``: sentences.

    Raises
    ------
    ConfigError, BudgetError, StoreError, UnsupportedError, KvtierError
        Whatever ``kvtier.offload`` refuses but for budgets that are too small; no such model; wrong arguments.
    """
    _check(tokens=tokens, rows=rows, forks=forks, miss=miss)
    settings = Config.load(config)
    given = {n: Size.parse(v, f"--{n}") for n, v in (("gpu", gpu), ("host", host), ("disk", disk)) if v is not None}
    if "disk" in given and settings.store.path is None:
        settings = replace(settings, store=replace(settings.store, path=ELSEWHERE))
    _check_method(settings)
    where = _device(device)
    seen = outline(model, weights)
    geometry = resolve_geometry(settings, trained_window(seen.config))
    budgets, problems = _Resolving(where, seen.weight_bytes, settings, given).budgets()
    saved = 0 if "disk" in given else _saved_before(settings)
    held = {"rows": rows, "forks": forks, "saved": saved}
    footprint = Footprint.of(seen.anatomy, geometry, settings, budgets, where == "cuda", **held)
    path = None if settings.store.path == ELSEWHERE else settings.store.path
    bandwidths = measure(where, path, say) if measured else assumed(where, card)
    tiers = {n: _tier(t, problems.get(n)) for n, t in footprint.tiers(tokens).items()}
    return {
        "model": _model(seen),
        "tokens": tokens,
        "rows": rows,
        "forks": forks,
        "device": where,
        "settings": _settings(footprint, settings),
        "fits": all(tier["fits"] for tier in tiers.values()),
        "tiers": tiers,
        "rates": rates(footprint, seen, tokens, bandwidths, miss),
        "advice": Advisor(footprint, tokens, settings).lines(),
        "notes": [*seen.notes, *_notes(footprint, seen, tokens, where), *_note_of_saved(saved, path)],
    }


def _check(**values: Any) -> None:
    """Refuse numbers that mean nothing."""
    for name, least in (("tokens", 1), ("rows", 1), ("forks", 0)):
        if type(values[name]) is not int or values[name] < least:
            raise ConfigError(f"{name} = {values[name]!r}: a whole number of at least {least} is expected")
    miss = values["miss"]
    if isinstance(miss, bool) or not isinstance(miss, int | float) or not 0 <= miss <= 1:
        raise ConfigError(f"miss = {miss!r}: a share from 0 to 1 is expected, such as 0.5")


def _check_method(settings: Config) -> None:
    check_store(settings)
    if settings.attention.method != "chunks":
        raise UnsupportedError(
            f'[attention] method = "{settings.attention.method}" keeps all K and V on the device: nothing to plan, '
            'use method = "chunks"'
        )


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f'there is no device {device!r}: give "cuda" or "cpu"') from error
    if kind not in ("cuda", "cpu"):
        raise UnsupportedError(f'kvtier runs on "cuda" devices and on the "cpu", not on "{device}"')
    return kind


class _Resolving:
    """Budgets as a run would resolve them once the weights are loaded.

    Parameters
    ----------
    given : sizes for another machine, by the names of ``[budget]``
    """

    def __init__(self, device: str, weight_bytes: int, settings: Config, given: dict[str, Size]) -> None:
        self._device = device
        self._weight_bytes = weight_bytes
        self._settings = settings
        self._given = given
        own = settings.budget
        self._sizes: dict[str, Size | None] = {"gpu": own.gpu, "host": own.host, "disk": own.disk, **given}
        self.problems: dict[str, str] = {}

    def budgets(self) -> tuple[Budgets, dict[str, str]]:
        """And what is wrong with them on this machine, by tier."""
        if self._device == "cpu":
            gpu, host = self._shared()
        else:
            gpu, host = self._of("gpu", "device", self._gpu_here()), self._of("host", "host", memory.available_host())
        return Budgets(gpu, host, self._disk()), self.problems

    def _gpu_here(self) -> Available | None:
        if not torch.cuda.is_available():
            return None
        free = memory.free_device_bytes("cuda")
        return Available(max(0, free - self._weight_bytes), "free on the GPU once the weights are there")

    def _of(self, name: str, tier: str, here: Available | None) -> int:
        size = self._sizes[name] or SHARE
        if size.bytes is None and here is None:
            raise ConfigError(f"there is no {self._device} device here to take {size} of: give --{name}, such as 24GiB")
        nbytes = size.resolve(0 if here is None else here.bytes)
        if name not in self._given and here is not None and nbytes > here.bytes:
            self.problems[tier] = (
                f"[budget] {name} = {format_bytes(nbytes)}, but this machine has {format_bytes(here.bytes)} "
                f"({here.limit}); --{name} plans for another one"
            )
        return nbytes

    def _shared(self) -> tuple[int, int]:
        """On the CPU both pools and the weights are host memory."""
        sizes = {name: self._sizes[name] for name in ("gpu", "host")}
        known = [size.bytes for size in sizes.values() if size is not None and size.bytes is not None]
        free = memory.available_host()
        here = Available(max(0, free.bytes - self._weight_bytes), f"{free.limit}, once the weights are there")
        if len(known) < 2:
            if self._given.keys() & sizes.keys() and sum(known) > here.bytes:
                raise ConfigError("for another machine without a GPU give both --gpu and --host, such as 8GiB")
            return memory._shared_budgets(BudgetConfig(sizes["gpu"], sizes["host"]), here)
        if sum(known) > here.bytes and not sizes.keys() <= self._given.keys():
            self.problems["host"] = (
                f"[budget] gpu + host = {format_bytes(sum(known))}, but this machine has {format_bytes(here.bytes)} "
                f"for both ({here.limit}); --gpu and --host plan for another one"
            )
        return known[0], known[1]

    def _disk(self) -> int | None:
        path, size = self._settings.store.path, self._sizes["disk"]
        if path is None:
            return memory._disk_budget(size, None)
        if path == ELSEWHERE or ("disk" in self._given and size is not None and size.bytes is not None):
            if size is None or size.bytes is None:
                raise ConfigError(f"--disk {size} is a share of a disk that is not known: give bytes, such as 300GiB")
            return size.bytes
        return self._of("disk", "disk", Available(memory.free_disk_bytes(path), f"free on the disk of {path}"))


def _saved_before(settings: Config) -> int:
    """Bytes of the sequences in the store, which a run in mode "durable" counts."""
    store = settings.store
    if store.path is None or store.mode != "durable" or not Path(store.path).is_dir():
        return 0
    library = Library(store.path)
    return 0 if library.is_new() else library.nbytes


# -- the report --------------------------------------------------------------------------------------------------------


def _model(seen: Outline) -> dict[str, Any]:
    shape = seen.anatomy.shape
    return {
        "name": seen.name,
        "class": seen.kind,
        "parameters": seen.parameters,
        "weights": seen.weights,
        "weight_bytes": seen.weight_bytes,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "layers": shape.n_layers,
        "tiered_layers": len(shape.full_layers),
        "kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "trained_window": trained_window(seen.config),
    }


def _settings(footprint: Footprint, settings: Config) -> dict[str, Any]:
    g, s = footprint.geometry, footprint.summary
    return {
        "attention": {name: getattr(g, name) for name in ("max", "sink", "local", "chunk", "select")},
        "prefill": {name: getattr(g, name) for name in ("block", "queries", "tail")},
        "summary": {"kind": settings.summary.kind, "rank": s.rank, "bits": s.bits, "levels": s.levels},
        "store": {"path": settings.store.path, "mode": settings.store.mode, "dtype": settings.store.dtype},
    }


def _tier(tier: TierBytes, problem: str | None) -> dict[str, Any]:
    return {
        "budget": tier.budget,
        "needed": tier.needed,
        "fits": tier.fits and problem is None,
        "lines": {name: nbytes for name, nbytes in tier.lines.items() if nbytes},
        "used": tier.used,
        "taken": tier.on_device,
        "chunks": tier.chunks,
        "problem": problem,
    }


def _notes(f: Footprint, seen: Outline, tokens: int, device: str) -> list[str]:
    notes = []
    if not f.n_full:
        notes.append(f"every layer has a sliding window of {f.shape.sliding_window} tokens: nothing is tiered")
    tail = f.changed(forks=f.forks + 1)
    more = tail.device(tokens).needed - f.device(tokens).needed
    window = tail.host(tokens).used - f.host(tokens).used
    if not f.forks:
        notes.append(
            f"each fork that is held takes up to {format_bytes(more)} of the device and {format_bytes(max(0, window))} "
            "of the host; two on the host are in the figures"
        )
    if device == "cuda":
        total = seen.weight_bytes + f.device(tokens).needed
        notes.append(
            f"the GPU holds the weights, too: {format_bytes(total)} in all, and beyond that what a forward needs "
            "(about a GiB with CUDA itself)"
        )
    return notes


def _note_of_saved(saved: int, path: str | None) -> list[str]:
    """A plan takes no token ids, so that it cannot know whether the store has them."""
    if not saved:
        return []
    return [
        f"{format_bytes(saved)} that are saved in {path} are counted beside this text, as if it was another one: what "
        "is stored of it is not written again, so if it was read there before, the disk needs that much less"
    ]


PLACES = {"cuda": "a GPU", "cpu": "the CPU"}
LABELS = {
    "windows": "windows of the newest tokens",
    "scratch": "scratch of attention",
    "rotary": "rotary tables",
    "summaries": "summaries of all chunks",
    "fitting": "fitting the summaries, at the beginning",
    "selection": "scratch of selection",
    "pool": "pool of the chunks in use",
    "chunks": "chunks",
    "fine_codes": "fine codes of the summaries",
    "slab_rounding": "free places in the last slab",
    "padding": "padding of records",
    "free_places": "free places in the last shard",
    "shard_indices": "indices and folders of shards",
    "metadata": "metadata",
    "checksums": "checksums",
    "tokens": "token ids",
    "saved_before": "saved there before",
}


def table(report: dict[str, Any]) -> str:
    """The same for people."""
    m, fits = report["model"], report["fits"]
    what = f"{report['tokens']:,} tokens" + (f" in each of {report['rows']} rows" if report["rows"] > 1 else "")
    tiered = "" if m["tiered_layers"] == m["layers"] else f" ({m['tiered_layers']} tiered)"
    heads = f"{m['layers']} layers{tiered}, {m['kv_heads']} KV heads of {m['head_dim']}"
    heads += f", trained on {m['trained_window']:,}"
    store = report["settings"]["store"]
    kept = f"; kept as {store['dtype']}" if store["dtype"] != "auto" else ""
    lines = [
        f"{m['name']}: {m['parameters'] / 1e9:.3g} B parameters, {heads} tokens",
        f"{what} on {PLACES[report['device']]}{kept}: " + ("it fits" if fits else "IT DOES NOT FIT"),
        "",
        f"{'tier':<44}{'needed':>12}{'budget':>12}",
        f"{'device, weights (in no budget)':<44}{format_bytes(m['weight_bytes']):>12}{'-':>12}",
    ]
    for name, tier in report["tiers"].items():
        lines += _tier_lines(name, tier)
    lines += ["", *_rate_lines(report["rates"], report["device"]), ""]
    for title in ("advice", "notes"):
        lines += [f"{title}:", *(f"- {line}" for line in report[title]), ""] if report[title] else []
    return "\n".join(lines[:-1])


def _tier_lines(name: str, tier: dict[str, Any]) -> list[str]:
    mark = "" if tier["fits"] else "  does not fit"
    lines = [f"{name:<44}{format_bytes(tier['needed']):>12}{format_bytes(tier['budget']):>12}{mark}"]
    for line, nbytes in tier["lines"].items():
        chunks = f" ({tier['chunks']:,})" if line == "chunks" else ""
        label = LABELS.get(line, line)
        if line == "windows" and name != "device":
            label = "parked windows" if name == "host" else "windows at the last two commits"
        lines.append(f"  {label + chunks:<42}{format_bytes(nbytes):>12}")
    if tier["needed"] > sum(tier["lines"].values()):
        lines.append(f"  {'below this a run does not begin':<42}{format_bytes(tier['needed']):>12}")
    if tier["taken"] - tier["used"] > tier["used"] // 1000:
        lines.append(f"  {'files in all, with what no budget counts':<42}{format_bytes(tier['taken']):>12}")
    if tier["problem"]:
        lines.append(f"  {tier['problem']}")
    return lines


def _rate_lines(r: dict[str, Any], device: str) -> list[str]:
    names = RESOURCES | ({"device_memory": "memory"} if device == "cpu" else {})
    prefill, decode, bw = r["prefill"], r["decode"], r["bandwidths"]
    minutes = prefill["seconds"] / 60
    took = f"{minutes:.3g} min" if minutes < 120 else f"{minutes / 60:.3g} h"
    if minutes < 2:
        took = f"{prefill['seconds']:.3g} s"
    lines = [
        f"at best, on {bw['device']}, with {100 * r['miss']:.0f}% of the chosen chunks missing in the pool",
        f"read     {prefill['tokens_per_s']:,.0f} tokens/s, {took} in all (bound by the "
        f"{names[prefill['bound']]}); for a block of {prefill['block']} tokens, on average:",
        *_term_lines(prefill["terms"], names),
        f"answer   {decode['ms_per_token']:.3g} ms a token, {decode['tokens_per_s']:.3g} tokens/s (bound by the "
        f"{names[decode['bound']]}); for one token:",
        *_term_lines(decode["terms"], names),
        f"rates: {bw['source']}",
    ]
    return lines


def _term_lines(terms: list[dict[str, Any]], names: dict[str, str]) -> list[str]:
    return [
        f"  {names[t['resource']]:<22}{t['what']:<38}{t['arithmetic']:<34}{1e3 * t['seconds']:>9.3f} ms" for t in terms
    ]
