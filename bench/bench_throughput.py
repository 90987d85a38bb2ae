"""Prefill and decode tokens/s of kvtier and of stock transformers, side by side in one run (`make bench`).

The model has the shape of SmolLM2-135M (30 layers, 9/3 heads of 64) with random float32 weights: speed does not depend
on what the weights say. Stock is transformers' DynamicCache with sdpa. kvtier runs its defaults for a window of 8,192
on the device where the model is; device and host budgets hold the whole cache: this measures the method, not the disk.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvtier
from kvtier.compat import cache_name

LENGTHS = [2048, 4096, 8192, 16384]
DECODE_STEPS = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().to(DEVICE)


@contextlib.contextmanager
def caches(engine: str, model: LlamaForCausalLM) -> Iterator[Callable[[], Any]]:
    """A function that makes empty caches of an engine."""
    if engine == "stock":
        yield lambda: DynamicCache(config=model.config)
    else:
        with kvtier.offload(model, {"budget": {"gpu": "2GiB", "host": "4GiB"}}) as kv:
            yield kv.new_cache


def read(model: LlamaForCausalLM, ids: torch.Tensor, cache: Any) -> None:
    with torch.no_grad():
        model(ids, **{cache_name(model.forward): cache}, use_cache=True, logits_to_keep=1)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def keep(figures: dict[str, list[dict[str, Any]]], case: str, n_tokens: int, seconds: float) -> None:
    figures["throughput"].append({"case": case, "value": round(n_tokens / seconds, 2), "unit": "tokens/s"})


@pytest.mark.parametrize("engine", ["stock", "kvtier"])
@pytest.mark.parametrize("length", LENGTHS)
def bench_prefill(benchmark: Any, figures: Any, model: LlamaForCausalLM, engine: str, length: int) -> None:
    """Reading ``length`` tokens into an empty cache."""
    ids = torch.randint(1, 49152, (1, length), device=DEVICE)
    with caches(engine, model) as new_cache:
        read(model, ids[:, :256], new_cache())
        benchmark.group = f"prefill {length}"
        benchmark.pedantic(read, setup=lambda: ((model, ids, new_cache()), {}), rounds=2 if length <= 4096 else 1)
    benchmark.extra_info["tokens_per_s"] = length / benchmark.stats["min"]
    keep(figures, f"prefill-{engine}-{length}", length, benchmark.stats["min"])


@pytest.mark.parametrize("engine", ["stock", "kvtier"])
@pytest.mark.parametrize("length", LENGTHS)
def bench_decode(benchmark: Any, figures: Any, model: LlamaForCausalLM, engine: str, length: int) -> None:
    """One token at a time on a cache of ``length`` tokens."""
    ids = torch.randint(1, 49152, (1, length), device=DEVICE)
    with caches(engine, model) as new_cache:
        cache = new_cache()
        read(model, ids, cache)
        benchmark.group = f"decode {length}"
        benchmark.pedantic(read, args=(model, ids[:, :1], cache), rounds=DECODE_STEPS, warmup_rounds=2)
    benchmark.extra_info["tokens_per_s"] = 1 / benchmark.stats["median"]
    keep(figures, f"decode-{engine}-{length}", 1, benchmark.stats["median"])
