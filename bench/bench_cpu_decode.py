"""Decode on the CPU at long contexts: stock transformers' ms over kvtier's, in one run (on demand, not in CI).

The shape is SmolLM2-135M's with random float32 weights. The caches are not read by the model but filled with random K
and V: stock's DynamicCache directly, kvtier's through windows and tiers, with its defaults for a window of 8,192.
kvtier's chunks are chosen in full at every step. 128K tokens take 12 GB of host memory.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import kvtier
from bench.bench_throughput import model as model  # the fixture
from bench.bench_throughput import read
from kvtier.cache import TieredCache

LENGTHS = {"8k": 8192, "32k": 32_768, "128k": 131_072}
STEPS = {"stock": 4, "kvtier": 8}
BLOCK = 1024


def random_stock(model: LlamaForCausalLM, n_tokens: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(torch.randn(1, 3, n_tokens, 64), torch.randn(1, 3, n_tokens, 64), layer)
    return cache


def fill(cache: TieredCache, n_tokens: int) -> None:
    """Append random tokens as prefill would, without attending: windows, summaries, tiers."""
    engine, sequence = cache._lane.engine, cache._lane.sequences[0]
    engine.activate([sequence])
    shape, windows = engine.shape, engine._seats.windows_of(sequence)
    for start in range(0, n_tokens, BLOCK):
        for layer, chunks in enumerate(sequence.layers):
            k, v = torch.randn(2, shape.n_kv_heads, BLOCK, shape.head_dim)
            if chunks.fitted is None:
                engine._observe(chunks, layer, start, torch.randn(shape.n_heads, BLOCK, shape.head_dim))
            engine._retire(sequence, layer, windows.full, windows.place[layer])
            windows.full.write(windows.place[layer], start, k, v)
        sequence.length += BLOCK
        sequence.block_starts.append(start)
        sequence.tokens.append(torch.randint(1, 49152, (BLOCK,)))


@contextlib.contextmanager
def filled(engine: str, model: LlamaForCausalLM, n_tokens: int) -> Iterator[Any]:
    if engine == "stock":
        yield random_stock(model, n_tokens)
    else:
        with kvtier.offload(model, {"budget": {"gpu": "2GiB", "host": "8GiB"}}) as kv:
            cache = kv.new_cache()
            fill(cache, n_tokens)
            yield cache


@pytest.mark.parametrize("length", LENGTHS)
def bench_cpu_decode(benchmark: Any, figures: Any, model: LlamaForCausalLM, length: str) -> None:
    """``cpu-decode-LENGTH``: how many times faster a token is than with stock transformers."""
    ids, ms = torch.randint(1, 49152, (1, 1)), {}
    for engine, steps in STEPS.items():
        times = []
        with filled(engine, model, LENGTHS[length]) as cache:
            read(model, ids, cache)
            for _ in range(steps):
                started = time.perf_counter()
                read(model, ids, cache)
                times.append(1e3 * (time.perf_counter() - started))
            if engine == "kvtier":
                benchmark.pedantic(read, args=(model, ids, cache), rounds=1)
        ms[engine] = statistics.median(times)
    ratio = ms["stock"] / ms["kvtier"]
    benchmark.extra_info |= {"ratio": ratio} | ms
    row = {"case": f"cpu-decode-{length}", "value": round(ratio, 2), "unit": "stock ms / kvtier ms"}
    figures["longcontext"].append(row | {f"{engine}_ms": round(value, 1) for engine, value in ms.items()})
