"""Saving a cache and opening it again: which model it belongs to, and what is refused before any work.

``runtime.session`` writes and reads the tensors, ``runtime.session_store`` keeps the folder.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvtier.cache import TieredCache
from kvtier.runtime.engine import Engine
from kvtier.runtime.errors import KvtierError, StoreError, UnsupportedError
from kvtier.runtime.sequence import TieredSequence
from kvtier.runtime.session import difference, read_sequence, stored_bytes, token_digest, write_sequence
from kvtier.runtime.session_store import Attributes, Entry, SessionStore
from kvtier.runtime.tiered import TieredEngine

if TYPE_CHECKING:
    from kvtier.offload import Offload

Place = str | os.PathLike[str]

IMMATERIAL = {
    *("architectures", "attn_implementation", "chunk_size_feed_forward", "dtype", "experts_implementation", "id2label"),
    *("initializer_range", "is_encoder_decoder", "label2id", "name_or_path", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "pretraining_tp", "problem_type", "return_dict", "torch_dtype"),
    *("transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Fields of a model's config that change nothing in what it makes of given tokens; ``dtype`` is compared elsewhere."""
SAMPLES = 256
"""Values of each weight tensor that its fingerprint looks at."""


def model_facts(model: Any) -> Attributes:
    """What tells models apart, but for their weights: class and config; and the name, for people."""
    fields = model.config.to_dict()
    material = {k: v for k, v in fields.items() if k not in IMMATERIAL and k[0].isalpha()}
    name = next((v for k, v in fields.items() if k.endswith("name_or_path") and v), fields["model_type"])
    return {
        "class": type(model).__name__,
        "name": name,
        "config": json.loads(json.dumps(material, default=str, sort_keys=True)),
    }


def weights_digest(model: Any) -> str:
    """A hash of names, shapes, dtypes and ``SAMPLES`` evenly spaced values of every weight tensor.

    A sample: it tells other models and further training apart, not a single changed value.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        step = flat.numel() // SAMPLES | 1  # odd: an even step would meet one column of a matrix again and again
        picked = flat[::step].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(picked.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def refusal(kv: "Offload", entry: Entry) -> str | None:
    """Why a saved sequence cannot go on in the block ``kv`` exactly as it was; None: it can."""
    saved, here = entry.attributes["model"], model_facts(kv.model)
    if saved["class"] != here["class"]:
        return f"it was made by a {saved['class']}, this model is a {here['class']}"
    for key in sorted(saved["config"].keys() & here["config"].keys()):  # versions of transformers add fields
        if saved["config"][key] != here["config"][key]:
            return f"its model has config.{key} = {saved['config'][key]!r}, this one {here['config'][key]!r}"
    if different := difference(_engine(kv), entry.attributes):
        return different
    if saved["weights"] != weights_digest(kv.model):
        return f"it was made with other weights ({saved['name']}; this model is {here['name']})"
    return None


def check_method(method: str) -> None:
    """Refuse the ``[attention] method`` that has no chunks to save."""
    if method != "chunks":
        raise UnsupportedError(
            f'[attention] method = "{method}" is not supported with saved sequences: use method = "chunks"'
        )


def _engine(kv: "Offload") -> TieredEngine:
    check_method(kv.config.attention.method)
    engine: Engine[Any] = kv._runtime.engine
    assert isinstance(engine, TieredEngine)
    return engine


def save(kv: "Offload", cache: TieredCache, path: Place) -> str:
    """``TieredCache.save``."""
    if any(sequence.closed for sequence in cache._lane.sequences):
        raise KvtierError("this cache is closed: save it before its offload block ends")
    kv._check_open()
    engine = _engine(kv)
    if cache.n_rows != 1:
        raise UnsupportedError(f"this cache has {cache.n_rows} rows, one at a time is saved: cache.row(i).save(path)")
    sequence = cache._lane.sequences[0]
    assert isinstance(sequence, TieredSequence)
    if not sequence.length:
        raise UnsupportedError("this cache is empty: pass tokens through the model before it is saved")
    with SessionStore(path).writing(stored_bytes(engine, sequence)) as draft:
        attributes = write_sequence(draft.group, engine, sequence)
        return draft.commit(attributes | {"model": model_facts(kv.model) | {"weights": weights_digest(kv.model)}})


def open_sequence(kv: "Offload", store: SessionStore, id: str | None) -> TieredSequence:
    """Read a saved sequence into the tiers of the block ``kv``; raises StoreError or BudgetError."""
    engine, entry = _engine(kv), store.entry(id)
    if entry.problem is not None:
        raise entry.damaged(entry.problem)
    if reason := refusal(kv, entry):
        raise StoreError(
            f"the saved sequence {entry.path} cannot go on here: {reason}. Open it with the model and settings it was "
            "saved with (`kvtier inspect` shows them), or read the text again"
        )
    entry.verify()
    return read_sequence(entry.group(), engine, entry.attributes)


class Session:
    """``kvtier run --session``: the sequence of a store that holds a context, read or opened.

    Parameters
    ----------
    path : of the store
    id : the sequence to open; None: the one of the context, or the only one
    say : takes what happened, a line for people
    """

    def __init__(self, path: Place, id: str | None, say: Callable[[str], None]) -> None:
        self.store = SessionStore(path)
        self.opened = False
        self.id = id
        self.seconds = 0.0
        """Time that opening or saving took."""
        self._say = say

    def check(self, *, must_exist: bool) -> None:
        """Refuse what can be refused before a model is loaded: no store, no such sequence. Raises StoreError."""
        if must_exist:
            self.store.entry(self.id)
        elif not self.store.is_new():
            self.store.check()

    def book(self, kv: "Offload", ids: Sequence[int] | None) -> TieredCache:
        """The cache of token ``ids``, opened if the store has it, else read and saved; None: the one of ``id``."""
        entry = self.store.entry(self.id) if ids is None else self._find(kv, ids)
        if entry is not None:
            return self._open(kv, entry)
        assert ids is not None
        book = kv.prefill(ids)
        started = time.perf_counter()
        self.id = book.save(self.store.path)
        self.seconds = time.perf_counter() - started
        self._say(f"saved {len(ids)} tokens to {self.store.path} as {self.id} in {self.seconds:.1f} s")
        return book

    def report(self) -> Attributes:
        """The part "session" of ``kvtier run --json``."""
        return {"store": str(self.store.path), "id": self.id, "opened": self.opened, "seconds": self.seconds}

    def _open(self, kv: "Offload", entry: Entry) -> TieredCache:
        started = time.perf_counter()
        book = kv.open(self.store.path, entry.id)
        self.id, self.opened, self.seconds = entry.id, True, time.perf_counter() - started
        self._say(f"opened {entry.attributes['tokens']} tokens from {self.store.path} in {self.seconds:.1f} s")
        return book

    def _find(self, kv: "Offload", ids: Sequence[int]) -> Entry | None:
        """The sequence of exactly these tokens that was read as ``kv`` would read them; says why others are not."""
        if self.store.is_new():
            return None
        digest = token_digest(np.asarray(ids, dtype=np.int64))
        reasons = []
        for entry in self.store.entries():
            if entry.attributes.get("tokens_sha256") == digest:
                reason = refusal(kv, entry) or read_otherwise(kv, entry)
                if reason is None:
                    return entry
                reasons.append(f"{entry.id}: {reason}")
        for reason in reasons:
            self._say(f"{self.store.path} has this context, but not as it would be read now: {reason}")
        return None


def read_otherwise(kv: "Offload", entry: Entry) -> str | None:
    """Which setting would make reading the same text again give something else than what was saved."""
    here = asdict(kv.geometry)
    for name, saved in (entry.attributes["geometry"] | {"select": entry.attributes["select"]}).items():
        if saved != here[name] and name != "max":  # a ceiling, no more
            section = "prefill" if name in ("block", "queries", "tail") else "attention"
            return f"it was read with [{section}] {name} = {saved}, here it is {here[name]}"
    return None
