"""What the tests of saved sequences share: texts, settings, and what "the same to the last bit" compares."""

import gc
import os
from contextlib import nullcontext

import pytest
import torch
from models import CACHE_NAME, prompt, settings, tiny_llama
from test_families import FAMILIES, tiny

from kvtier import durable
from kvtier.runtime import direct_io

BOOK, MORE, QUESTION = prompt(220), prompt(61, seed=2), prompt(9, seed=1)
ROOMY = {"gpu": "16MiB", "host": "16MiB"}

KINDS = {
    "sketch": (tiny_llama, {}),
    "sketch bfloat16": (lambda: tiny_llama(dtype=torch.bfloat16), {}),
    "sketch float16": (lambda: tiny_llama(dtype=torch.float16), {"summary": {"bits": 2}}),
    "mean": (tiny_llama, {"kind": "mean"}),
    "exact bfloat16": (lambda: tiny_llama(dtype=torch.bfloat16), {"kind": "exact"}),
    "cuboid without sinks": (tiny_llama, {"kind": "cuboid", "sink": 0}),
    "minmax int8": (tiny_llama, {"kind": "minmax", "store": {"dtype": "int8"}}),
    "sketch bfloat16 int4": (lambda: tiny_llama(dtype=torch.bfloat16), {"store": {"dtype": "int4"}}),
    "gemma3": (lambda: tiny(FAMILIES["gemma3"][0], **FAMILIES["gemma3"][1]), {"window": 256}),
    "interleaved": (lambda: tiny(FAMILIES["cohere"][0], **FAMILIES["cohere"][1]), {"window": 256}),
}
"""Models and settings, by what is special about them."""


def quicken(monkeypatch):
    """No fsync, and the plain engine of ``RecordIO``: hundreds of fsyncs and AIO contexts take longer than all else."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    monkeypatch.setattr(direct_io, "_engine_of", lambda folder, nbytes: (direct_io.BUFFERED, []))


def config(select=3, budget=ROOMY, **other):
    """Settings with which a text of ``BOOK`` has 24 chunks in each layer, 3 of which are attended."""
    return settings(select=select, budget=budget, **other)


def logits_of(model, ids, cache):
    """Feed ``ids``; their logits."""
    with torch.no_grad():
        return model(ids, **{CACHE_NAME: cache}).logits


def contents(kv, cache):
    """Everything that a cache holds, as tensors and numbers by name."""
    engine, sequence = kv._runtime.engine, cache._lane.sequences[0]
    engine._seats.park(sequence)
    full, sliding = sequence.parked.full, sequence.parked.sliding
    found = {
        "tokens": cache.token_ids,
        "block_starts": torch.tensor(sequence.block_starts),
        "select": torch.tensor(sequence.select),
        "sinks": full.sinks,
        "window": full.tokens[:, :, :, : sequence.length - full.begin],
        "sliding": sliding.tokens[:, :, :, : sequence.length - sliding.begin],
    }
    for layer, chunks in enumerate(sequence.layers):
        for i, ids in enumerate(chunks.ids.T):
            found[f"layer {layer} chunk {i}"] = engine.residency.device.data[engine.residency.fetch(ids)].clone()
        for i, slab in enumerate(chunks.codes.slabs(chunks.retired)):
            found |= {f"layer {layer} {name} {i}": tensor for name, tensor in slab.items()}
        for i, tensor in enumerate(chunks.fitted.state if chunks.fitted else ()):
            found[f"layer {layer} fitted {i}"] = tensor
        if chunks.queries is not None:
            found[f"layer {layer} queries"] = torch.stack((chunks.queries._total, chunks.queries._last))
            found[f"layer {layer} start"] = torch.tensor(chunks.queries._start)
    return found


def assert_same(found, expected):
    """Two results of ``contents``."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


def continued(kv, cache):
    """What comes of a cache: tokens and logits of two turns, and the chunks that every layer chose last."""
    fork = cache.fork()
    out = kv.model.generate(
        QUESTION,
        past_key_values=fork,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    chosen = [None if chunks is None else chunks.clone() for chunks in kv._runtime.engine.last_chosen]
    return out.sequences, torch.stack(out.logits), logits_of(kv.model, MORE, fork), chosen


def assert_continues(found, expected):
    """Two results of ``continued``."""
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    assert any(chunks is not None for chunks in expected[3])
    for mine, theirs in zip(found[3], expected[3], strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


def used_bytes(kv):
    """Bytes in use by tier."""
    gc.collect()
    return {name: tier["bytes"] for name, tier in kv.stats()["tiers"].items()}


def open_files(folder):
    """Files below ``folder`` that this process holds open."""
    gc.collect()
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the one that listed the folder
            continue
    return sorted(link for link in links if link.startswith(str(folder)))


# -- [store] mode = "durable" ------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a reading."""


def commit_always(monkeypatch):
    """A commit after every block."""
    monkeypatch.setattr(durable, "FIRST_COMMIT_SECONDS", 0)
    monkeypatch.setattr(durable, "COMMIT_SHARE", 1e9)


def stopper(monkeypatch):
    """A function that has readings stopped when so many blocks have been read; None: not any more."""
    after, blocks = durable._Writing._after_block, []

    def counted(writing, done):
        after(writing, done)
        blocks.append(done)
        if len(blocks) == stop.at:
            raise Stop

    def stop(at):
        stop.at = at
        blocks.clear()

    stop.at = None
    monkeypatch.setattr(durable._Writing, "_after_block", counted)
    return stop


def kept(path, own=None, **other):
    """Settings of a block that keeps what it reads: ``own`` of a kind, and other tables."""
    own = own or {}
    store = own.get("store", {}) | {"path": str(path), "mode": "durable"}
    return config(**({"budget": ROOMY | {"disk": "64MiB"}} | own | other | {"store": store}))


def says_it_is_short(tokens):
    """Opening the first ``tokens`` of BOOK says so; nothing is said of all."""
    message = (
        rf"is not complete: its reading was interrupted.* the first {tokens} of the 220 tokens of its text; to read"
    )
    return pytest.warns(UserWarning, match=message) if tokens < 220 else nullcontext()


def read(kv, ids=BOOK, **other):
    """A text, and how many of its tokens were there and how many were computed; one alone counts as a step."""
    before = kv.stats()
    book = kv.prefill(ids, **other)
    after = kv.stats()
    resumed = after["prefill"]["resumed_tokens"] - before["prefill"]["resumed_tokens"]
    computed = after["prefill"]["computed_tokens"] - before["prefill"]["computed_tokens"]
    return book, resumed, computed + after["decode"]["steps"] - before["decode"]["steps"]
