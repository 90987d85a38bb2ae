"""Times configurations of the transfers to and from the host: ``python -m bench.sweep_gather``, on a GPU.

Prints a table, the fastest first per case; writes all of it to $OUT/sweep_gather.json, if OUT is set.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.bench_gather import (
    CHUNK,
    DIM,
    LAUNCHES,
    Beside,
    Case,
    capture,
    check_fetch,
    fetches,
    make_case,
    memcpy_gb_per_s,
    microseconds,
    stores,
)
from kvtier.kernels import gather
from kvtier.kernels.quantize import decode_config, encode_config

PLAIN = [(4096, 6), (4096, 3), (2048, 6), (2048, 8), (1024, 8)]
"""Words per tile, stages."""
RECORDS = [(4096, 8, 8), (4096, 8, 4), (4096, 4, 8), (4096, 8, 12), (2048, 4, 12), (4096, 8, 1)]
"""Values per tile, warps, stages."""
ENCODE = [8, 4, 16]
"""Warps."""
PROGRAMS = [8, 16, 32, 64, 132, 264]
FEW = [4, 6, 8, 12, 16]
Changes = dict[str, Any]


def plain(words: int, stages: int) -> Changes:
    return {"TILE_WORDS": words, "STAGES": stages}


def records(values: int, warps: int, stages: int) -> Changes:
    config = decode_config(CHUNK, DIM, values) | {"num_warps": warps}
    return {"decode_config": lambda chunk, dim: config, "RECORD_STAGES": stages}


def encoding(warps: int) -> Changes:
    config = encode_config(CHUNK, DIM) | {"num_warps": warps}
    return {"encode_config": lambda chunk, dim: config}


def tried(row: dict[str, Any], run: Callable[[], float]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        row["value"] = round(run(), 3)
    except Exception as problem:  # a configuration that does not fit is a result
        row |= {"value": None, "why": repr(problem)[:200]}
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def rate(case: Case, calls: list[Callable[[], Any]]) -> float:
    return LAUNCHES * case.launch_bytes / microseconds(capture(calls), replays=5) / 1e3


def transfers(name: str, case: Case, configs: list[tuple[str, Changes]], *, store: bool) -> Iterator[dict[str, Any]]:
    """GB/s with the device idle, by configuration and number of programs."""
    for config, changes in configs:
        with patch.multiple(gather, **changes):
            for n_programs in PROGRAMS:
                row = {"case": name, "config": config, "programs": n_programs, "unit": "GB/s"}

                def run(n_programs: int = n_programs) -> float:
                    if not store:
                        check_fetch(case, n_programs)
                    return rate(case, (stores if store else fetches)(case, n_programs))

                yield tried(row, run)


def overlaps(name: str, case: Case, configs: list[tuple[str, Changes]], repeat: int) -> Iterator[dict[str, Any]]:
    """Ratio beside memory-bound products; compute lasts as long as the gather with BESIDE programs."""
    beside = Beside(microseconds(capture(fetches(case, gather.BESIDE) * repeat), replays=3) / 1000)
    for config, changes in configs:
        with patch.multiple(gather, **changes):
            for n_programs in FEW:
                row = {"case": name, "config": config, "programs": n_programs, "unit": "ratio"}

                def run(row: dict[str, Any] = row, n_programs: int = n_programs) -> float:
                    ratio, alone = beside.ratio(fetches(case, n_programs) * repeat)
                    row |= {"compute_us": round(beside.compute_us), "gather_us": round(alone)}
                    return ratio

                yield tried(row, run)


def sweep() -> Iterator[dict[str, Any]]:
    chunks, int4 = make_case(512, None), make_case(512, 4)
    copies = {"gather": memcpy_gb_per_s(chunks.launch_bytes), "store": memcpy_gb_per_s(chunks.launch_bytes, True)}
    copies["gather-int4"] = memcpy_gb_per_s(int4.launch_bytes)
    for case, value in copies.items():
        yield {"case": case, "config": "memcpy", "programs": 0, "unit": "GB/s", "value": round(value, 3), "seconds": 0}
    of_chunks = [(f"{c}", plain(*c)) for c in PLAIN]
    of_records = [(f"{c}", records(*c)) for c in RECORDS]
    yield from transfers("gather", chunks, of_chunks, store=False)
    yield from transfers("gather-int4", int4, of_records, store=False)
    yield from transfers("store", chunks, of_chunks[:4], store=True)
    yield from transfers("store-int4", int4, [(f"{w} warps", encoding(w)) for w in ENCODE], store=True)
    yield from overlaps("overlap", chunks, of_chunks[:3], 4)
    yield from overlaps("overlap-int4", int4, [of_records[i] for i in (0, 2, 3)], 12)


def main() -> None:
    print(torch.cuda.get_device_name())
    rows = list(sweep())
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "sweep_gather.json").write_text(json.dumps(rows, indent=1))
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        ranked = sorted((r for r in of_case if r["value"] is not None), key=lambda r: r["value"])
        best = ranked[:12] if of_case[0]["unit"] == "ratio" else ranked[::-1][:12]
        print(f"\n{case} ({of_case[0]['unit']}; {sum(r['seconds'] for r in of_case):.0f} s)")
        for row in best:
            more = f"  compute {row['compute_us']} us, gather {row['gather_us']} us" if "gather_us" in row else ""
            print(f"  {row['value']:8.3f}  {row['config']:16} P={row['programs']}{more}")
        for row in of_case:
            if row["value"] is None:
                print(f"  failed: {row['config']} P={row['programs']}: {row['why']}")


if __name__ == "__main__":
    main()
