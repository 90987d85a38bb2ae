"""Stage two: every variant on the same captured layers and steps, against exact selection."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.fidelity import metrics
from bench.fidelity.problem import LayerCapture, Problem, Question, measured_steps, read_meta
from bench.fidelity.variants import Variant
from kvtier.kernels.select import chunk_weights, top_chunks
from kvtier.runtime.geometry import Geometry

FLOOR, CEILING = "random", "exact"
SCORE_BYTES = 256 << 20
MakeVariants = Callable[[], list[Variant]]


@dataclass(slots=True)
class Row:
    """One variant at one step of one layer."""

    model: str
    text: str
    tokens: int
    chunk: int
    layer: int
    step: str
    phase: str
    variant: str
    bytes: float
    """Of codes, per token and KV head."""
    state_bytes: float
    """Fixed, per KV head."""
    build_seconds: float
    """Fit and encode, per million tokens and KV head."""
    recall: float
    worst_head: float
    picks: float
    seeds: float
    jaccard: float
    needle: float | None
    """Share of KV heads whose set has the answer's chunks; None where nothing is asked."""
    error: float | None
    """Of the output against exact selection; None where it was not computed."""


def analyse(
    folder: Path, make: MakeVariants, geometry: Geometry, *, device: str, decode: int, layers: int, queries: int
) -> Iterator[Row]:
    """Rows of all variants, of ``random`` and of ``exact``, for a capture.

    Parameters
    ----------
    decode : decode steps per ask
    layers : at most so many of the captured layers, evenly spread
    queries : queries of a step whose output is compared; 0 leaves that out
    """
    meta = read_meta(folder)
    steps = measured_steps(meta, geometry, decode)
    if not steps:
        return
    every = max(1, -(-len(meta.layers) // layers))
    for layer in meta.layers[every // 2 :: every]:
        problem = Problem(LayerCapture(folder, meta, layer, device), geometry, steps)
        judges = [Judge(problem, question, queries) for question in problem.questions]
        yield from _bounds(judges)
        for variant in make():
            yield from _measure(variant, problem, judges)


def _bounds(judges: Iterable["Judge"]) -> Iterator[Row]:
    """Floor and ceiling: random chunks, and exact scores."""
    for judge in judges:
        exact = judge.question.exact
        generator = torch.Generator().manual_seed(judge.question.step.start)
        yield judge.row(FLOOR, torch.rand(exact.shape, generator=generator).to(exact.device))
        row = judge.row(CEILING, exact)
        row.bytes = 2.0 * judge.problem.keys.shape[3]
        yield row


def _measure(variant: Variant, problem: Problem, judges: Iterable["Judge"]) -> Iterator[Row]:
    _synchronise(problem.keys)
    started = time.perf_counter()
    variant.fit(problem.fit_keys, problem.q_outer)
    variant.encode(problem.keys)
    _synchronise(problem.keys)
    n_kv, n_chunks, chunk, dim = problem.keys.shape
    seconds = (time.perf_counter() - started) / (n_kv * n_chunks * chunk) * 1e6
    for judge in judges:
        row = judge.row(variant.name, weigh(variant, judge.question))
        row.bytes, row.state_bytes = variant.token_bytes(chunk, dim), variant.state_bytes()
        row.build_seconds = seconds
        yield row


def weigh(variant: Variant, question: Question) -> torch.Tensor:
    """Weights [N, n_chunks] of the chunks for a step, as runtime.tiered computes them."""
    n, rows, _ = question.rows.shape
    chunk_tokens = 32 * question.n_chunks
    part_rows = max(1, SCORE_BYTES // (4 * n * chunk_tokens))
    weights = torch.zeros(n, question.n_chunks, device=question.rows.device)
    for part in question.rows.split(part_rows, dim=1):
        weights += chunk_weights(variant.scores(part, question.n_chunks)) * (part.shape[1] / rows)
    return weights


def _synchronise(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


class Judge:
    """One step: what does not depend on the variant is computed once."""

    def __init__(self, problem: Problem, question: Question, queries: int) -> None:
        self.problem = problem
        self.question = question
        self._queries = queries
        capture, step, g = problem.capture, question.step, problem.geometry
        self._paper = metrics.paper_choice(capture, step, g, question.n_chunks)
        self._answer = self._answer_chunks()
        self._reference = self._output(question.chosen) if queries else None

    def _answer_chunks(self) -> torch.Tensor | None:
        """Chunks that hold the answer to the step's ask, if there is one and it lies among the middle chunks."""
        meta, g, step = self.problem.capture.meta, self.problem.geometry, self.question.step
        if step.ask < 0 or meta.spans[step.ask][1] == 0:
            return None
        begin, end = meta.spans[step.ask]
        first, last = (begin - g.sink) // g.chunk, (end - 1 - g.sink) // g.chunk
        if first < 0 or last >= self.question.n_chunks:
            return None
        return torch.arange(first, last + 1, device=self.question.exact.device)

    def _output(self, chosen: torch.Tensor) -> torch.Tensor:
        p = self.problem
        return metrics.attended_output(p.capture, self.question.step, p.geometry, chosen, self._queries)

    def row(self, name: str, weights: torch.Tensor) -> Row:
        """All metrics of a variant that gives the chunks these ``weights`` [N, n_chunks]."""
        q, g, meta = self.question, self.problem.geometry, self.problem.capture.meta
        chosen = top_chunks(weights, g.select)
        recall = metrics.recall(chosen, q.chosen, q.n_chunks)
        needle = None if self._answer is None else metrics.covered(self._answer, chosen, q.n_chunks).mean().item()
        error = None if self._reference is None else metrics.relative_error(self._output(chosen), self._reference)
        return Row(
            model=meta.model,
            text=meta.text,
            tokens=meta.tokens,
            chunk=g.chunk,
            layer=self.problem.capture.layer,
            step=q.step.name,
            phase=q.step.phase,
            variant=name,
            bytes=0.0,
            state_bytes=0.0,
            build_seconds=0.0,
            recall=recall.mean().item(),
            worst_head=recall.min().item(),
            picks=metrics.covered(self._paper.picks, chosen, q.n_chunks).nanmean().item(),
            seeds=metrics.covered(self._paper.seeds, chosen, q.n_chunks).nanmean().item(),
            jaccard=metrics.jaccard(weights, self._paper.tokens, g.chunk).mean().item(),
            needle=needle,
            error=error,
        )
