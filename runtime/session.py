"""What is fixed in a saved sequence, and what tells it from others. Knows nothing of transformers: callers add that."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from kvtier.runtime.library import Attributes, Entry
from kvtier.runtime.sequence_files import SequenceLayout
from kvtier.runtime.summary import KINDS, Summary
from kvtier.runtime.tier import Ids
from kvtier.runtime.tiered import TieredEngine
from kvtier.runtime.zarr_arrays import dtype_name

UNRANKED = {"cuboid", "exact", "mean", "minmax"}
"""Kinds of summary whose codes do not depend on ``[summary] rank`` and ``bits``."""


def fixed_values(engine: TieredEngine) -> Attributes:
    """What must be the same where a sequence is saved and where it is opened, by the name that messages use."""
    shape, geometry, summary = engine.shape, engine.geometry, engine.summary
    kind = _kind_of(summary)
    ranked = kind not in UNRANKED
    bits = engine.residency.bits
    return {
        "number of layers": shape.n_layers,
        "number of KV heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "list of layers with a sliding window": sorted(shape.sliding_layers),
        "sliding window": shape.sliding_window,
        "dtype": dtype_name(shape.dtype),
        "[store] dtype": "auto" if bits is None else f"int{bits}",
        "[attention] sink": geometry.sink,
        "[attention] chunk": geometry.chunk,
        "[attention] local": geometry.local,
        "[summary] kind": kind,
        "[summary] rank": summary.rank if ranked else None,
        "[summary] bits": summary.bits if ranked else None,
    }


def difference(engine: TieredEngine, entry: Entry) -> str | None:
    """Why ``engine`` cannot go on with a saved sequence exactly as it was; None: it can."""
    attributes, commit = entry.attributes, entry.commit
    assert commit is not None
    for name, here in fixed_values(engine).items():
        saved = attributes["fixed"].get(name)
        if saved != here:
            return f"it was saved with {name} = {saved}, here it is {here}"
    select, held = attributes["select"], commit.tokens - commit.window_begin
    if select > engine.geometry.select:
        return f"it attends to {select} chunks per KV head, here [attention] select = {engine.geometry.select}"
    if held > engine.geometry.window_capacity:
        most = engine.geometry.window_capacity
        return f"its window holds {held} tokens, here at most {most} fit: raise [prefill] block by {held - most}"
    return None


def sequence_id(material: Attributes, ids: Ids, block_starts: Sequence[int], rewound: bool) -> str:
    """The id of a sequence: a hash of the tokens, how they were read, and ``material``, by whom."""
    digest = hashlib.sha256(repr(sorted(material.items())).encode())
    digest.update(ids.astype("<i8").tobytes())
    digest.update(np.asarray(block_starts, "<i8").tobytes() + bytes([rewound]))
    return digest.hexdigest()[:12]


def make_layout(engine: TieredEngine, first: int) -> SequenceLayout:
    """Sizes of the files of a sequence of ``engine`` that holds the chunks from ``first`` on."""
    shape, codes = engine.shape, engine.summary.layout()
    payload_bytes = engine.residency.host.item_bytes
    return SequenceLayout(len(shape.full_layers), shape.n_kv_heads, payload_bytes, codes, first)


def layout_attributes(layout: SequenceLayout) -> Attributes:
    """The same as JSON, for programs without an engine."""
    return {
        "layers": layout.n_layers,
        "kv_heads": layout.n_kv_heads,
        "payload_bytes": layout.payload_bytes,
        "first_chunk": layout.first,
        "codes": {name: [list(shape), dtype_name(dtype)] for name, (shape, dtype) in layout.codes.items()},
    }


def layout_of(attributes: Attributes) -> SequenceLayout:
    """The reverse of ``layout_attributes``, from the attributes of a sequence."""
    a = attributes["layout"]
    codes = {name: (tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in a["codes"].items()}
    return SequenceLayout(a["layers"], a["kv_heads"], a["payload_bytes"], codes, a["first_chunk"])


def _kind_of(summary: Summary) -> str:
    cls = type(summary)
    return next(kind for kind, where in KINDS.items() if where == f"{cls.__module__}:{cls.__qualname__}")
