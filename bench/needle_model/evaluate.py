"""In-window needle rate: one question per context, over lengths, depths and numbers of distractors.

An answer is right if greedy decoding gives exactly the value and then the end token. One forward pass over context,
question and answer tells: greedy decoding gives the answer if and only if each of its tokens is the likeliest after the
tokens before it. ``generate()`` is checked against it by tests/test_needle_model.py.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.needle_model.task import Encoder, Haystack, Needle, answer_ids, build_context, tries

LENGTHS = (1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Try:
    """One question: ``ids`` end with the answer."""

    ids: list[int]
    n_answer: int
    needle: Needle
    length: int
    depth: float
    n_distractors: int


def make_tries(encoder: Encoder, haystack: Haystack, n: int, seed: int, lengths: Sequence[int] = LENGTHS) -> list[Try]:
    """``n`` tries whose context, question and answer together have exactly ``length`` tokens."""
    chance = random.Random(seed)
    made = []
    for length, depth, n_distractors in tries(chance, lengths, n):
        context_seed = chance.getrandbits(32)
        tail: list[int] = []
        while True:  # the needle does not depend on the length, but the length on the needle
            context = build_context(encoder, haystack, length - len(tail), [depth], n_distractors, context_seed)
            needle = context.needles[0]
            answer = answer_ids(encoder, needle)
            if tail:
                break
            tail = encoder.encode(needle.question) + answer
        made.append(Try(context.ids.tolist() + tail, len(answer), needle, length, depth, n_distractors))
    return made


@torch.no_grad()
def found(model: Any, made: Sequence[Try], batch_tokens: int = 65_536) -> list[bool]:
    """Whether greedy decoding answers each try."""
    hits = {}
    for batch in _batches(sorted(range(len(made)), key=lambda i: made[i].length), made, batch_tokens):
        ids = torch.tensor([made[i].ids for i in batch], device=model.device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for row, i in enumerate(batch):
            n = made[i].n_answer
            likeliest = model.lm_head(hidden[row, -n - 1 : -1]).argmax(-1)
            hits[i] = bool((likeliest == ids[row, -n:]).all())
    return [hits[i] for i in range(len(made))]


def _batches(order: list[int], made: Sequence[Try], batch_tokens: int) -> Iterator[list[int]]:
    """Runs of tries of one length."""
    batch: list[int] = []
    for i in order:
        length = made[i].length
        if batch and (length != made[batch[0]].length or (len(batch) + 1) * length > batch_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def summary(made: Sequence[Try], hits: Sequence[bool]) -> dict[str, Any]:
    """The rate, in all and by what a try is made of; the misses in full."""
    groups: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for each, hit in zip(made, hits, strict=True):
        groups["length"][str(each.length)].append(hit)
        groups["depth"][f"{int(each.depth * 5) * 20}%"].append(hit)
        groups["distractors"][str(each.n_distractors)].append(hit)
        groups["key"][each.needle.key_kind].append(hit)
        groups["value"][each.needle.value_kind].append(hit)
    missed = [
        {"key": t.needle.key, "length": t.length, "depth": round(t.depth, 3), "distractors": t.n_distractors}
        for t, hit in zip(made, hits, strict=True)
        if not hit
    ]
    rates = {name: {of: f"{sum(h)}/{len(h)}" for of, h in sorted(group.items())} for name, group in groups.items()}
    return {"tries": len(hits), "found": sum(hits), "rate": sum(hits) / len(hits), "by": rates, "missed": missed[:20]}
