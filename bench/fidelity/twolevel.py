"""Which coarse level proposes the right chunks: ``python -m bench.fidelity.twolevel CAPTURE ...``.

A coarse level proposes overfetch x select candidates, the sketch's own codes (16 x int4) of these alone are scored, and
the ``select`` largest weights are taken. Counted, per capture and ``--select``, is the share of the picks that one
level, all chunks scored by their sketches, makes, mean over layers, KV heads and steps of a phase.

What matters is candidates / all chunks: at 4M tokens 8 x 111 of 131,072 are .7%. Captures of 16K to 64K tokens come
there with a small ``--select``. Captures: ``python -m bench.fidelity --capture-only``.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.fidelity.coarse import SHIPPED, Coarse, catalogue
from bench.fidelity.metrics import recall
from bench.fidelity.problem import LayerCapture, Problem, Question, default_geometry, measured_steps, read_meta
from bench.results import record
from kvtier.kernels.coarse import candidate_weights, decode_sketch
from kvtier.kernels.select import chunk_weights, exact_scores, top_chunks
from kvtier.runtime.summary import make_summary

OVERFETCH = (2, 4, 8, 16, 32)
PHASES = ("prefill", "tail", "decode")
RANK, BITS = 16, 4


@dataclass(slots=True)
class Asked:
    """A step, and what one level makes of it."""

    question: Question
    projected: torch.Tensor
    """[N, Q, rank]"""
    fine: torch.Tensor
    """[N, Q, m]; what does not depend on the chunk is left out."""
    weights: torch.Tensor
    """[N, m]"""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one coarse level at one step."""

    same: float
    """Share of one level's picks that both make."""
    proposed: float
    """Share of them among the candidates."""
    mass: float
    """Weight of the picks over that of one level's."""
    share: float
    """Candidates over all chunks."""


def measure(problem: Problem, selects: list[int], candidates: list[Coarse]) -> Iterator[tuple[Any, Figures]]:
    """((coarse level, select, overfetch, phase), figures) of all steps of a layer."""
    chunk, dim = problem.keys.shape[2:]
    summary = make_summary("sketch", chunk=chunk, head_dim=dim, dtype=torch.bfloat16, rank=RANK, bits=BITS)
    _, to, back = state = summary.fit(problem.fit_keys.bfloat16(), problem.q_outer)
    codes = summary.encode(state, problem.keys.bfloat16())
    tokens = decode_sketch(codes["codes"], codes["scale"], BITS)
    asked = []
    for question in problem.questions:
        projected = question.rows @ back
        fine = exact_scores(projected, tokens[:, : question.n_chunks])
        asked.append(Asked(question, projected, fine, chunk_weights(fine)))
    for candidate in candidates:
        scores = candidate.make(tokens, to)
        for one in asked:
            coarse = scores(one.projected)[..., : one.question.n_chunks]
            for select in selects:
                for overfetch in OVERFETCH:
                    if select * overfetch < one.question.n_chunks:
                        key = (candidate, select, overfetch, one.question.step.phase)
                        yield key, _compare(one, coarse, select, overfetch, candidate.full_sum)


def _compare(one: Asked, coarse: torch.Tensor, select: int, overfetch: int, full_sum: bool) -> Figures:
    n_chunks = one.question.n_chunks
    wanted = top_chunks(one.weights, select)
    proposed = top_chunks(chunk_weights(coarse), select * overfetch)
    fine = one.fine.gather(2, proposed[:, None].expand(-1, coarse.shape[1], -1))
    weights = candidate_weights(coarse, proposed, fine) if full_sum else chunk_weights(fine)
    picked = proposed.gather(1, top_chunks(weights, select))
    return Figures(
        same=recall(picked, wanted, n_chunks).mean().item(),
        proposed=recall(proposed, wanted, n_chunks).mean().item(),
        mass=(one.weights.gather(1, picked).sum() / one.weights.gather(1, wanted).sum()).item(),
        share=select * overfetch / n_chunks,
    )


def measure_capture(
    folder: Path, selects: list[int], candidates: list[Coarse], layers: int, decode: int
) -> dict[tuple[Coarse, int, int], dict[str, list[Figures]]]:
    """Figures by coarse level, select and overfetch, and by phase."""
    meta = read_meta(folder)
    g = default_geometry(meta.geometry["max"], block=meta.geometry["block"])
    g = replace(g, select=min(selects, default=g.select))
    found: dict[tuple[Coarse, int, int], dict[str, list[Figures]]] = defaultdict(lambda: defaultdict(list))
    every = max(1, -(-len(meta.layers) // layers))
    for layer in meta.layers[every // 2 :: every]:
        problem = Problem(LayerCapture(folder, meta, layer, "cpu"), g, measured_steps(meta, g, decode))
        for (candidate, select, overfetch, phase), figures in measure(problem, selects, candidates):
            found[candidate, select, overfetch][phase].append(figures)
    return found


def _mean(figures: list[Figures], name: str) -> float:
    return sum(getattr(f, name) for f in figures) / len(figures)


def rows_of(capture: str, found: dict[tuple[Coarse, int, int], dict[str, list[Figures]]]) -> Iterator[dict[str, Any]]:
    """Rows for ``bench.results``: of what ships all, of the others overfetch 4 and 8."""
    for (candidate, select, overfetch), phases in found.items():
        if candidate.name != SHIPPED and overfetch not in (4, 8):
            continue
        same = {phase: _mean(phases[phase], "same") for phase in PHASES if phase in phases}
        every = [f for figures in phases.values() for f in figures]
        yield {
            "case": f"twolevel-{capture}-select{select}-overfetch{overfetch}-{candidate.name}",
            "value": sum(same.values()) / len(same),
            "unit": "share of one level's picks, mean of phases",
            "bytes_per_chunk": candidate.chunk_bytes,
            **same,
            "proposed": _mean(every, "proposed"),
            "mass": _mean(every, "mass"),
            "candidates": _mean(every, "share"),
        }


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="python -m bench.fidelity.twolevel", description=__doc__)
    p.add_argument("captures", nargs="+", type=Path)
    p.add_argument("--select", nargs="+", type=int, default=[12])
    p.add_argument("--layers", type=int, default=6, help="layers of each, evenly spread")
    p.add_argument("--decode", type=int, default=4, help="decode steps per question")
    p.add_argument("--only", default="", help="coarse levels whose name has this")
    args = p.parse_args(argv)
    torch.set_grad_enabled(False)
    candidates = [c for c in catalogue() if args.only in c.name]
    command = " ".join(["python -m bench.fidelity.twolevel", *argv])
    print(f"{'':76}{'share':>7}{'prefill':>9}{'tail':>8}{'decode':>8}{'mean':>8}{'proposed':>10}{'mass':>7}")
    for folder in args.captures:
        rows = list(rows_of(folder.name, measure_capture(folder, args.select, candidates, args.layers, args.decode)))
        for row in rows:
            phases = "".join(f"{row[phase]:8.3f}" if phase in row else f"{'-':>8}" for phase in PHASES)
            print(
                f"{row['case'].removeprefix('twolevel-'):<76}{row['candidates']:7.3f} {phases}{row['value']:8.3f}"
                f"{row['proposed']:10.3f}{row['mass']:7.3f}"
            )
        record("twolevel", rows, command)


if __name__ == "__main__":
    main(sys.argv[1:])
