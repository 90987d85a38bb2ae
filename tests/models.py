"""Tiny random Llama models, prompts for them and settings that fit them: what the integration tests share."""

import copy
import inspect
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvtier

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other, ten times as long on busy cores

VOCAB = 97
PAD = 0
WINDOW = 512
"""Trained window of ``tiny_llama()``, whatever its rope type."""


def rope_parameters(kind, window=WINDOW):
    """Rope settings of a model that was trained on ``window`` tokens."""
    factors = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": window},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": window // 8,
        },
    }
    return {"rope_type": kind, "rope_theta": 10000.0, **factors[kind]}


def tiny_config(*, layers=2, heads=4, kv_heads=2, head_dim=16, window=WINDOW, rope="default", **other):
    """A LlamaConfig trained on ``window`` tokens; a stretched rope claims four times as many, as such models do."""
    claimed = 4 * window if rope in ("linear", "dynamic", "yarn") else window
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": claimed,
        "rope_parameters": rope_parameters(rope, window),
        "initializer_range": 0.1,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    return LlamaConfig(**settings | other)


def tiny_llama(*, seed=0, dtype=torch.float32, **shape):
    """A random model in eval mode. The same arguments give the same weights; every call makes its own config."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**shape)).to(dtype).eval()


def prompt(n, seed=0):
    """``n`` random token ids [1, n] without the pad token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (1, n), generator=generator)


def settings(*, window=WINDOW, sink=4, local=16, chunk=8, block=32, select=None, kind="sketch", rank=8, **sections):
    """A kvtier configuration that selects as many chunks as the window allows; keyword tables are merged in."""
    if select is None:
        select = (window - sink - local - (chunk - 1) - block) // chunk
    tables = {
        "attention": {"sink": sink, "local": local, "chunk": chunk, "select": select},
        "summary": {"kind": kind, "rank": rank},
        "prefill": {"block": block, "tail": min(8, block)},
    }
    return {name: {**tables.get(name, {}), **sections.get(name, {})} for name in {**tables, **sections}}


def minimum_budget(model, config, name):
    """The smallest ``[budget]`` ``name`` that kvtier says it needs, in bytes."""
    tiny = {**config, "budget": {**config.get("budget", {}), name: "1B"}}
    with pytest.raises(kvtier.BudgetError) as refusal:
        kvtier.offload(model, tiny)
    return int(re.search(r"at least (\d+) bytes", str(refusal.value))[1])


def token_bytes(model):
    """Bytes of K and V of one token in all layers."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize


def cache_of(output):
    """The cache in a model's or generate's output, under the name that this transformers has."""
    return output["cache"] if "cache" in output else output["past_key_values"]


CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this transformers calls the cache argument of a forward: for calls outside an offload block."""


def fingerprint(model):
    """Everything that an offload block could leave changed: attributes of modules, configs, classes."""
    modules = {name: _attributes(module) for name, module in model.named_modules()}
    configs = {
        "config": copy.deepcopy(vars(model.config)),
        "generation_config": copy.deepcopy(vars(model.generation_config)),
    }
    classes = {kind: dict(vars(kind)) for kind in {type(module) for module in model.modules()}}
    weights = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}
    return modules, configs, classes, weights


def _attributes(module):
    """An instance's attributes by identity; its tables of hooks, parameters and children as they are now."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}


def assert_untouched(model, before):
    """``model`` has exactly the attributes, settings and weights of ``fingerprint(model)`` taken before."""
    modules, configs, classes, weights = fingerprint(model)
    assert modules.keys() == before[0].keys()
    for name, attributes in modules.items():
        _assert_same_objects(attributes, before[0][name], f"module {name!r}")
    assert configs == before[1]
    for kind, attributes in classes.items():
        _assert_same_objects(attributes, before[2][kind], kind.__name__)
    assert weights.keys() == before[3].keys()
    assert all(torch.equal(weights[name], before[3][name]) for name in weights)


def _assert_same_objects(now, before, where):
    assert now.keys() == before.keys(), where
    for name, value in now.items():
        same = value == before[name] if isinstance(value, dict) else value is before[name]
        assert same, f"{where}: {name} was {before[name]!r}, is {value!r}"
