"""Stage one: run a model through kvtier and keep its un-rotated K, V and the queries of some blocks.

Selection while reading is exact ("kind = exact") and the geometry is DESIGN's default, so that what is recorded is what
an ideal summary would have met, at any length. One folder per model, text and length:

    meta.json             ``Meta``
    rotary.safetensors    cos, sin [max, R]: positions 0..max-1
    layer<i>.safetensors  k, v [N, T, D] of the context; k.<ask>, v.<ask> [N, t, D] of what followed; per step
                          q.<step> [H, b, D]; q_outer [blocks, N, D, D]: after each block of the context, the sum of
                          q q^T over all queries so far
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import kvtier
from bench.fidelity.texts import Text
from kvtier.runtime.geometry import Geometry

CONTEXT = -1
"""``Step.ask`` of a step that belongs to the context."""
DTYPE = torch.bfloat16
"""Of what is kept, whatever the model computes in."""


@dataclass(frozen=True, slots=True)
class Step:
    """One block whose queries were kept."""

    name: str
    phase: str
    """ "prefill" | "tail" | "decode" """
    ask: int
    start: int
    """Tokens before the block, those of the ask included."""
    size: int


@dataclass(slots=True)
class Meta:
    """What a capture was made from."""

    model: str
    text: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: list[int]
    scaling: list[float]
    """Per layer in ``layers``: factor of q.k."""
    geometry: dict[str, int]
    dtype: str
    block_starts: list[int] = field(default_factory=list)
    """Of the context; one ``q_outer`` for each."""
    steps: list[Step] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Per ask, where its answer is in the context."""
    answers: list[tuple[str, str]] = field(default_factory=list)
    """Per ask, what was expected and what the model said."""


class Recorder:
    """Stands in for ``engine.attend``: keeps what it is given and passes it on. Sliding layers only pass."""

    def __init__(self, engine: Any, n_tokens: int, sampled: set[int]) -> None:
        """``sampled``: starts of the context's blocks whose queries are kept, the last one being its tail block."""
        self._engine = engine
        self._attend = engine.attend
        self._n_tokens = n_tokens
        self._sliding = getattr(engine.shape, "sliding_layers", ())
        self._sampled = sampled
        self._tail = max(sampled, default=0)
        self.ask = CONTEXT
        self.tensors: dict[int, dict[str, torch.Tensor]] = {}
        self.scaling: dict[int, float] = {}
        self.steps: dict[str, Step] = {}
        self.block_starts: list[int] = []
        self._outer: dict[int, list[torch.Tensor]] = {}
        self._tails: dict[tuple[int, str], list[torch.Tensor]] = {}

    def __call__(self, sequence: Any, layer: int, q: Any, k: Any, v: Any, logits: Any, *rest: Any) -> Any:
        if layer in self._sliding:
            return self._attend(sequence, layer, q, k, v, logits, *rest)
        start = sequence.length
        self.scaling[layer] = float(getattr(logits, "scaling", logits))
        if getattr(logits, "softcap", None) is not None or getattr(logits, "sink", None) is not None:
            raise NotImplementedError(f"layer {layer} bends its logits: the output error would be wrong")
        if self.ask == CONTEXT:
            self._keep_context(layer, start, q, k, v)
        else:
            for name, tensor in (("k", k), ("v", v)):
                self._tails.setdefault((layer, f"{name}.{self.ask}"), []).append(_kept(tensor))
        if self.ask != CONTEXT or start in self._sampled:
            self._keep_step(layer, start, q)
        return self._attend(sequence, layer, q, k, v, logits, *rest)

    def _keep_context(self, layer: int, start: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        kept = self.tensors.setdefault(layer, {})
        for name, tensor in (("k", k), ("v", v)):
            whole = kept.setdefault(name, torch.zeros(k.shape[0], self._n_tokens, k.shape[2], dtype=DTYPE))
            whole[:, start : start + k.shape[1]] = _kept(tensor)
        rows = q.reshape(k.shape[0], -1, q.shape[2]).float()  # [N, group*b, D]
        sums = self._outer.setdefault(layer, [])
        sums.append((rows.transpose(1, 2) @ rows).cpu() + (sums[-1] if sums else 0))
        if start not in self.block_starts:
            self.block_starts.append(start)

    def _keep_step(self, layer: int, start: int, q: torch.Tensor) -> None:
        size = q.shape[1]
        phase = "decode" if size == 1 else "prefill" if self.ask == CONTEXT and start != self._tail else "tail"
        name = f"{'context' if self.ask == CONTEXT else f'ask{self.ask}'}.{start}"
        self.steps[name] = Step(name, phase, self.ask, start, size)
        self.tensors[layer][f"q.{name}"] = _kept(q)

    def layer(self, layer: int) -> dict[str, torch.Tensor]:
        """All tensors of a layer, for its file."""
        tails = {name: torch.cat(parts, dim=1) for (of, name), parts in self._tails.items() if of == layer}
        return self.tensors[layer] | tails | {"q_outer": torch.stack(self._outer[layer])}


def _kept(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("cpu", DTYPE, copy=True).contiguous()


def sampled_blocks(geometry: Geometry, n_tokens: int, count: int) -> set[int]:
    """Starts of ``count`` full blocks, evenly spread over the last three quarters, and of the context's tail block."""
    schedule = geometry.schedule(n_tokens)
    full = [begin for begin, end in schedule if end - begin == geometry.block and begin >= n_tokens // 4]
    chosen = {full[(2 * i + 1) * len(full) // (2 * count)] for i in range(count)} if full else set()
    return chosen | {schedule[-2][0]}


def capture(
    name: str,
    tokenizer: Any,
    model: Any,
    text: Text,
    folder: Path,
    *,
    blocks: int,
    steps: int,
    max_: int | None = None,
    block: int | None = None,
) -> Path:
    """Read ``text`` and its asks with ``model``; ``blocks`` blocks and ``steps`` decode steps per ask are kept."""
    settings = {
        "budget": _budget(model, len(text.ids)),
        "summary": {"kind": "exact"},
        "attention": {"max": max_},
        "prefill": {"block": block},
    }
    with kvtier.offload(model, settings) as kv:
        engine = kv._runtime.engine
        recorder = Recorder(engine, len(text.ids), sampled_blocks(kv.geometry, len(text.ids), blocks))
        setattr(engine, "attend", recorder)  # noqa: B010  # an attribute of this instance hides the method
        book = kv.prefill(text.ids)
        answers = []
        for i, ask in enumerate(text.asks):
            recorder.ask = i
            said = greedy(model, book.fork(), ask.ids, steps)
            answers.append((ask.answer, tokenizer.decode(said)))
        meta = _meta(name, text, kv, recorder, answers)
        _write(folder, meta, recorder, engine)
    return folder


def _budget(model: Any, n_tokens: int) -> dict[str, int]:
    """Room for all K and V on the host, all keys on the device and 2 GiB more of each, instead of half the machine."""
    c = model.config
    heads = c.num_hidden_layers * c.num_key_value_heads
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    keys = int(1.25 * n_tokens) * heads * dim * model.dtype.itemsize
    return {"gpu": keys + (2 << 30), "host": 2 * keys + (2 << 30)}


def greedy(model: Any, cache: Any, ids: list[int], steps: int) -> list[int]:
    """Feed ``ids``, then ``steps`` tokens of the model's own choice; no end token stops it."""
    said: list[int] = []
    with torch.no_grad():
        out = model(torch.tensor([ids], device=model.device), past_key_values=cache, logits_to_keep=1)
        for _ in range(steps):
            said.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([said[-1:]], device=model.device), past_key_values=cache, logits_to_keep=1)
    return said


def _meta(name: str, text: Text, kv: Any, recorder: Recorder, answers: list[tuple[str, str]]) -> Meta:
    layers = sorted(recorder.tensors)
    first = recorder.tensors[layers[0]]
    n_kv, _, dim = first["k"].shape
    heads = next(tensor for key, tensor in first.items() if key.startswith("q.")).shape[0]
    return Meta(
        model=name,
        text=text.kind,
        tokens=len(text.ids),
        heads=heads,
        kv_heads=n_kv,
        head_dim=dim,
        layers=layers,
        scaling=[recorder.scaling[layer] for layer in layers],
        geometry=asdict(kv.geometry),
        dtype=str(kv.model.dtype).removeprefix("torch."),
        block_starts=recorder.block_starts,
        steps=list(recorder.steps.values()),
        spans=[ask.span for ask in text.asks],
        answers=answers,
    )


def _write(folder: Path, meta: Meta, recorder: Recorder, engine: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rotary = engine.rotary[meta.layers[0]]
    if any(not torch.equal(engine.rotary[layer].cos, rotary.cos) for layer in meta.layers):
        raise NotImplementedError("the layers do not share one rotary table")
    if rotary.attention_scaling != 1.0:
        raise NotImplementedError("an attention_scaling other than 1 is not handled here")
    save_file(
        {"cos": rotary.cos.cpu().contiguous(), "sin": rotary.sin.cpu().contiguous()}, folder / "rotary.safetensors"
    )
    for layer in meta.layers:
        save_file(recorder.layer(layer), folder / f"layer{layer:02d}.safetensors")
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1) + "\n")  # last: a folder with it is complete
