"""Saving, opening and verifying 1M tokens of SmolLM2-135M's shape; spilling. Random int4 records and codes, no model.

``python -m pytest bench/bench_sessions.py``; KVTIER_BENCH_DIR says where (a folder on the device that is meant),
KVTIER_BENCH_TOKENS how many tokens (1M: about 12 GB on disk, 9 GB of host memory).
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtier.runtime.budget import Budget
from kvtier.runtime.committer import NOTHING, Committer, save_chunks
from kvtier.runtime.device_pool import DevicePool
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.host_pool import HostPool
from kvtier.runtime.library import Library
from kvtier.runtime.model import ModelShape, Rotary
from kvtier.runtime.residency import Residency
from kvtier.runtime.saved_sequence import SavedSequence, read_sequence
from kvtier.runtime.sequence import Fitted, TieredSequence
from kvtier.runtime.sequence_files import SequenceFiles
from kvtier.runtime.session import fixed_values, layout_attributes, make_layout
from kvtier.runtime.store import StoreTier
from kvtier.runtime.summary import make_summary
from kvtier.runtime.tiered import TieredEngine
from kvtier.verify_store import verify_store

TOKENS = int(os.environ.get("KVTIER_BENCH_TOKENS", 2**20))
BITS = 4
SHAPE = ModelShape(30, 9, 3, 64, torch.bfloat16, torch.device("cpu"))
GEOMETRY = Geometry(max=8192, sink=32, local=3585, chunk=32, select=110, block=1024, queries=16, tail=64)
RECORD = (GEOMETRY.chunk, SHAPE.head_dim, SHAPE.dtype)
PLENTY = 1 << 40


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("KVTIER_BENCH_DIR")) as name:
        yield Path(name)


@pytest.fixture
def engine() -> Iterator[TieredEngine]:
    gpu, host = Budget("gpu", PLENTY), Budget("host", PLENTY)
    summary = make_summary("sketch", chunk=GEOMETRY.chunk, head_dim=SHAPE.head_dim, dtype=SHAPE.dtype)
    residency = Residency(DevicePool(gpu, 1024, *RECORD, "cpu"), HostPool(host, *RECORD, False, BITS), None, BITS)
    tables = [Rotary(torch.ones(GEOMETRY.max, 64), torch.zeros(GEOMETRY.max, 64), 1.0)] * SHAPE.n_layers
    engine = TieredEngine(SHAPE, GEOMETRY, tables, summary, residency, gpu, host)
    yield engine
    engine.close()


def filled(engine: TieredEngine, n_tokens: int) -> TieredSequence:
    """A sequence of ``n_tokens`` random tokens whose last blocks are still in the window."""
    sequence = engine.new_sequence(GEOMETRY.select)
    generator = torch.Generator().manual_seed(0)
    n = GEOMETRY.selectable(n_tokens)
    items = torch.randint(0, 256, (256 * SHAPE.n_kv_heads, engine.residency.host.item_bytes), dtype=torch.uint8)
    for chunks in sequence.layers:
        state = [torch.randn(3, 64, generator=generator), *(torch.randn(3, 64, 16) for _ in range(2))]
        chunks.fitted = Fitted(tuple(state), engine.residency.device.budget)
        ids = []
        for begin in range(0, n, 256):
            m = min(256, n - begin)
            codes = {
                "codes": torch.randint(0, 256, (3, m, GEOMETRY.chunk, 8), dtype=torch.uint8, generator=generator),
                "scale": torch.rand(3, m, 16, generator=generator).to(torch.bfloat16),
            }
            chunks.codes.append(codes)
            ids.append(engine.residency.admit(items[: m * SHAPE.n_kv_heads]).reshape(SHAPE.n_kv_heads, -1))
        chunks.ids = np.concatenate(ids, axis=1)
    sequence.tokens.append(torch.randint(0, 49152, (n_tokens,), generator=generator))
    sequence.length = n_tokens
    sequence.block_starts = list(range(0, n_tokens, GEOMETRY.block))
    engine.activate([sequence])
    return sequence


def save(engine: TieredEngine, sequence: TieredSequence, library: Library) -> None:
    layout = make_layout(engine, 0)
    held = {"parts": [], "layout": layout_attributes(layout), "fixed": fixed_values(engine), "select": sequence.select}
    with library.writing():
        files = SequenceFiles(library.create("sequence", held), layout)
        files.create()
        save_chunks(engine, sequence, files)
        Committer(engine, files, NOTHING, None).commit(sequence, complete=True)
        files.close()


def raw_append_gb_per_s(folder: Path, nbytes: int = 1 << 30) -> float:
    """What the device takes: O_DIRECT writes of 16 MiB, then fdatasync."""
    import mmap

    piece = mmap.mmap(-1, 16 << 20)
    piece.write(os.urandom(1 << 20) * 16)
    path = folder / "raw"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
    try:
        started = time.perf_counter()
        for offset in range(0, nbytes, len(piece)):
            os.pwrite(fd, piece, offset)
        os.fdatasync(fd)
        return nbytes / (time.perf_counter() - started) / 1e9
    finally:
        os.close(fd)
        path.unlink()


def keep(figures: dict[str, list[dict[str, Any]]], case: str, value: float, unit: str, **more: Any) -> None:
    figures["tiers"].append({"case": case, "value": round(value, 4), "unit": unit, "tokens": TOKENS} | more)


def bench_sessions(benchmark: Any, figures: Any, engine: TieredEngine, folder: Path) -> None:
    """``save-1m``, ``open-1m``, ``verify-1m``: seconds. Opening leaves records on disk; verifying reads them all."""
    raw = raw_append_gb_per_s(folder)
    sequence, library = filled(engine, TOKENS), Library(folder / "store")
    started = time.perf_counter()
    save(engine, sequence, library)
    saved = time.perf_counter() - started
    engine.release(sequence)
    entry = library.entry("sequence")
    nbytes = entry.nbytes

    def open_it() -> TieredSequence:
        return read_sequence(SavedSequence(library, entry), engine)

    opened = benchmark.pedantic(open_it, rounds=1)
    assert opened.length == TOKENS
    engine.release(opened)
    started = time.perf_counter()
    assert verify_store(library.path)["ok"]
    verified = time.perf_counter() - started
    keep(figures, "save-1m", saved, "s", ceiling=round(nbytes / raw / 1e9, 2), gigabytes=round(nbytes / 1e9, 2))
    keep(figures, "open-1m", benchmark.stats["min"], "s")
    keep(figures, "verify-1m", verified, "s", gigabytes=round(nbytes / 1e9, 2))
    shutil.rmtree(library.path)


def bench_spill(benchmark: Any, figures: Any, folder: Path) -> None:
    """``spill``: GB/s of chunks that leave a full host pool for the scratch store, records of 8 KiB (bf16)."""
    gpu, host, disk = Budget("gpu", PLENTY), Budget("host", 1 << 30), Budget("disk", 4 << 30)
    store = StoreTier(folder / "scratch", disk, *RECORD)
    residency = Residency(DevicePool(gpu, 8, *RECORD, "cpu"), HostPool(host, *RECORD, False), store)
    chunks = torch.randn(4096, 2, *RECORD[:2]).to(SHAPE.dtype)
    try:
        while residency.host.room() > len(chunks):
            residency.admit(chunks)
        n = len(residency.host)
        benchmark.pedantic(residency.make_host_room, args=(n,), rounds=1)
        nbytes = n * residency.host.item_bytes
        ceiling = round(raw_append_gb_per_s(folder), 3)
        keep(figures, "spill", nbytes / benchmark.stats["min"] / 1e9, "GB/s", ceiling=ceiling)
    finally:
        residency.close()
