"""Tries tile sizes of ``select_triton`` on the cases of ``bench_select``: ``python -m bench.sweep_select [CASE ...]``.

Scoring passes and weighing are tried apart, their kernels compiled beforehand by one process for each processor. Prints
the best first, and writes everything to $OUT/sweep_select.json.
"""

import functools
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.bench_select import CASES, Inputs, bandwidth, make_inputs, microseconds, nbytes
from kvtier.kernels import select as kernel
from kvtier.kernels.select import SelectConfig, select_config

KERNELS = ("project_kernel", "score_kernel", "weigh_kernel")


def scoring(case: str, base: SelectConfig) -> Iterator[SelectConfig]:
    """Configurations of the passes over the summaries."""
    if case.startswith("select-mean"):
        for tile, warps in ((64, 4), (128, 4), (128, 8)):
            for stages, per_processor in ((3, 2), (3, 3), (3, 4), (5, 2), (1, 4), (1, 8)):
                yield replace(base, tile=tile, warps=warps, stages=stages, per_processor=per_processor)
    elif case.startswith("select-sketch"):
        for tile, tokens, warps in ((64, 8, 4), (64, 4, 4), (64, 16, 4), (128, 4, 8), (32, 16, 4)):
            for stages, per_processor in ((3, 3), (3, 4), (3, 6), (5, 4), (1, 5)):
                yield replace(base, tile=tile, tokens=tokens, warps=warps, stages=stages, per_processor=per_processor)
    else:
        shapes = [(3, 16, 64, 4, 4), (3, 16, 64, 2, 4), (3, 16, 32, 8, 4), (3, 16, 64, 8, 8), (3, 16, 128, 4, 8)]
        shapes += [(1, 64, 64, 4, 4), (1, 64, 64, 2, 4), (1, 64, 64, 4, 8), (1, 64, 128, 2, 8)]
        for blocks, rows, tile, tokens, warps in shapes:
            for per_processor in (2, 3):
                sizes = {"blocks": blocks, "rows": rows, "tile": tile, "tokens": tokens, "warps": warps}
                yield replace(base, **sizes, per_processor=per_processor)


def weighing(base: SelectConfig) -> Iterator[SelectConfig]:
    """Configurations of ``weigh_kernel``."""
    for tile, warps, search, per_processor in itertools.product((1024, 2048), (8, 16), (2048, 4096), (1, 2)):
        sizes = {"weigh_tile": tile, "weigh_warps": warps, "search_tile": search, "weigh_per_processor": per_processor}
        yield replace(base, **sizes)


class Warm:
    """Stands for a kernel and compiles it instead of running it."""

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.jitted.warmup(*args, grid=grid, **options)


def compile_one(job: tuple[str, str, SelectConfig]) -> None:
    """In a process of its own: fills Triton's cache."""
    case, part, config = job
    for name in KERNELS:
        if not isinstance(getattr(kernel, name), Warm):
            setattr(kernel, name, Warm(getattr(kernel, name)))
    try:
        PARTS[part](kept_inputs(case), config)
    except Exception as error:
        print(f"{case} {config}: {type(error).__name__} {str(error)[:100]}", flush=True)


@functools.cache
def kept_inputs(case: str) -> Inputs:
    return make_inputs(case, 0)


def score_only(inputs: Inputs, config: SelectConfig) -> None:
    """``select_triton`` without its last kernel."""
    weigh = kernel._weigh
    kernel._weigh = lambda *_: None
    try:
        inputs.run(config)
    finally:
        kernel._weigh = weigh


def weigh_only(inputs: Inputs, config: SelectConfig) -> None:
    """The last kernel of ``select_triton`` alone."""
    score, project = kernel._score, kernel._project
    kernel._score = kernel._project = lambda *_: None
    try:
        inputs.run(config)
    finally:
        kernel._score, kernel._project = score, project


PARTS = {"score": score_only, "weigh": weigh_only}


def changed(config: SelectConfig, base: SelectConfig) -> str:
    return " ".join(f"{k}={v}" for k, v in asdict(config).items() if v != asdict(base)[k]) or "default"


def attempt(sets: list[Inputs], part: Any, config: SelectConfig, wanted: torch.Tensor) -> float:
    """Microseconds of one part with ``config``, or infinity if it is wrong or does not run."""
    try:
        if not torch.equal(sets[0].run(config), wanted):
            return float("inf")
        return microseconds([lambda x=x: part(x, config) for x in sets], rounds=2, replays=7)
    except Exception as error:
        print(f"{config}: {type(error).__name__} {str(error)[:120]}", flush=True)
        return float("inf")


def sweep(case: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All results of a case, and the lines to print."""
    sets = [make_inputs(case, seed) for seed in range(max(1, -(-(128 << 20) // nbytes(case))))]
    base = select_config(sets[0].summaries, sets[0].q.shape[2], sets[0].q.shape[1])
    wanted = sets[0].run(base).clone()
    agrees = len(set(wanted.ravel().tolist()) & set(sets[0].by_torch().ravel().tolist())) / wanted.unique().numel()
    found: list[dict[str, Any]] = []
    best = {}
    ceiling = nbytes(case) / bandwidth()
    lines = [f"{case}: ceiling {ceiling:.1f} us, chosen as by torch {agrees:.4f}"]
    for name, configs in (("score", [base, *scoring(case, base)]), ("weigh", [base, *weighing(base)])):
        rows = [(attempt(sets, PARTS[name], config, wanted), config) for config in dict.fromkeys(configs)]
        rows.sort(key=lambda row: row[0])
        best[name] = rows[0][1]
        found += [{"case": case, "part": name, "us": us, **asdict(config)} for us, config in rows]
        lines += [f"  {name} {us:7.1f}  {changed(config, base)}" for us, config in rows[:6]]
        lines += [f"  {name} {us:7.1f}  default" for us, config in rows[6:] if config == base]
    fields = {k: v for k, v in asdict(best["weigh"]).items() if k.startswith(("weigh", "search"))}
    together = replace(best["score"], **fields)
    for name, config in (("default", base), ("best", together)):
        us = attempt(sets, Inputs.run, config, wanted)
        found.append({"case": case, "part": name, "us": us, **asdict(config)})
        lines.append(f"  {name:7} {us:7.1f} us, {ceiling / us:.0%} of the ceiling  {changed(config, base)}")
    return found, lines


def main() -> None:
    start = time.perf_counter()
    cases = sys.argv[1:] or list(CASES)
    jobs = []
    for case in cases[::-1]:
        x = kept_inputs(case)
        base = select_config(x.summaries, x.q.shape[2], x.q.shape[1])
        jobs += [(case, "score", config) for config in (base, *scoring(case, base))]
        jobs += [(case, "weigh", config) for config in (base, *weighing(base))]
    kept_inputs.cache_clear()
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, jobs, chunksize=1)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    found: list[dict[str, Any]] = []
    lines: list[str] = []
    for case in cases:
        results, table = sweep(case)
        found += results
        lines += table
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "sweep_select.json").write_text(json.dumps(found, indent=1))
    print("\n".join([*lines, f"{torch.cuda.get_device_name()}, {time.perf_counter() - start:.0f} s"]))


if __name__ == "__main__":
    main()
