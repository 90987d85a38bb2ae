"""Training batches: prose with needles, then questions with their answers, many per sequence."""

import multiprocessing as mp
import queue
import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.needle_model.task import Encoder, Haystack, Needle, NeedleMaker, answer_ids

OTHER, PROSE, ANSWER = 0, 1, 2
"""What a token is to the loss: only prose and answers can be predicted, keys and planted values are random."""

PROSE_WEIGHT = 0.05
"""Small: the model is to find, not to learn seven books by heart."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long sequences are, stage by stage."""

    batch_tokens: int
    window: int
    stages: tuple[tuple[tuple[int, float], ...], ...]
    """Per stage: (length, share of the batches)."""

    @property
    def loss_tokens(self) -> int:
        return self.batch_tokens // 4


@dataclass(frozen=True, slots=True)
class Batch:
    """Flat arrays of one batch; ``length`` says where sequences end."""

    length: int
    ids: npt.NDArray[np.int64]
    """[T]."""
    positions: npt.NDArray[np.int64]
    """[T]."""
    index: npt.NDArray[np.int64]
    """[M]: the tokens whose next token counts."""
    targets: npt.NDArray[np.int64]
    """[M]."""
    weights: npt.NDArray[np.float32]
    """[M]; zero where there is nothing to predict."""
    answer: npt.NDArray[np.int64]
    """[M]: number of the answer that the target belongs to, -1 for prose."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that stay together."""

    ids: list[int]
    kinds: list[int]


def make_batch(encoder: Encoder, haystack: Haystack, recipe: Recipe, stage: int, chance: random.Random) -> Batch:
    lengths, shares = zip(*recipe.stages[stage], strict=True)
    length = chance.choices(lengths, shares)[0]
    n = recipe.batch_tokens // length
    sequences = [make_sequence(encoder, haystack, length, recipe.window, chance) for _ in range(n)]
    ids = np.concatenate([each[0] for each in sequences])
    kinds = np.stack([each[1] for each in sequences])
    positions = np.concatenate([each[2] for each in sequences])
    return _with_loss(length, ids, positions, kinds, recipe.loss_tokens, chance.getrandbits(64))


def _with_loss(length: int, ids: Any, positions: Any, kinds: Any, n_loss: int, seed: int) -> Batch:
    """Answers of a sequence weigh together as the square root of their number, all answers 1, prose PROSE_WEIGHT."""
    following = np.zeros_like(kinds)
    following[:, :-1] = kinds[:, 1:]
    per_token = (1 / np.sqrt((following == ANSWER).sum(1, keepdims=True).clip(1))).repeat(length, 1).reshape(-1)
    following = following.reshape(-1)
    answers = np.flatnonzero(following == ANSWER)[:n_loss]
    prose = np.flatnonzero(following == PROSE)
    chosen = np.random.default_rng(seed).permutation(prose)[: n_loss - len(answers)]
    index = np.zeros(n_loss, dtype=np.int64)
    weights = np.zeros(n_loss, dtype=np.float32)
    answer = np.full(n_loss, -1, dtype=np.int64)
    end = len(answers) + len(chosen)
    index[: len(answers)], index[len(answers) : end] = answers, chosen
    weights[: len(answers)] = per_token[answers] / per_token[answers].sum()
    weights[len(answers) : end] = PROSE_WEIGHT / max(len(chosen), 1)
    answer[: len(answers)] = np.cumsum(np.diff(answers, prepend=answers[:1] - 2) > 1) - 1
    targets = np.append(ids, 0)[index + 1]
    return Batch(length, ids.astype(np.int64), positions, index, targets.astype(np.int64), weights, answer)


def make_sequence(
    encoder: Encoder, haystack: Haystack, length: int, window: int, chance: random.Random
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8], npt.NDArray[np.int64]]:
    """Ids, kinds and positions, ``length`` of each."""
    context, questions = _pieces(encoder, haystack, length, chance)
    groups = _groups(context, chance)
    groups.append(questions)
    sizes = [sum(len(piece.ids) for piece in group) for group in groups]
    pieces = [piece for group in groups for piece in group]
    ids = np.array([i for piece in pieces for i in piece.ids], dtype=np.int32)
    kinds = np.array([kind for piece in pieces for kind in piece.kinds], dtype=np.int8)
    assert len(ids) == length
    return ids, kinds, _positions(sizes, length, window, chance)


def _pieces(
    encoder: Encoder, haystack: Haystack, length: int, chance: random.Random
) -> tuple[list[Piece], list[Piece]]:
    """BOS, prose and needles; then the questions with their answers. Together ``length`` tokens."""
    crowded = chance.random() < 0.75
    question_tokens = length * (chance.uniform(0.1, 0.5) if crowded else 0.02)
    needle_tokens = length * (chance.uniform(0.1, 0.45) if crowded else chance.uniform(0.0, 0.2))
    needles: list[Needle] = []
    planted: list[Piece] = []
    for needle in _needles(chance):
        needles.append(needle)
        planted.append(_planted(encoder, needle))
        needle_tokens -= len(planted[-1].ids)
        if needle_tokens <= 0:
            break
    questions: list[Piece] = []
    free = length - 1 - sum(len(piece.ids) for piece in planted)
    for needle in chance.sample(needles, len(needles)):
        asked = encoder.encode(needle.question)
        answer = answer_ids(encoder, needle)
        size = len(asked) + len(answer)
        if size > free or (questions and question_tokens < size):
            break
        questions.append(Piece(asked + answer, [OTHER] * len(asked) + [ANSWER] * len(answer)))
        free -= size
        question_tokens -= size
    chance.shuffle(planted)
    return [Piece([encoder.bos], [OTHER]), *_mixed(haystack, free, planted, chance)], questions


def _needles(chance: random.Random) -> Iterator[Needle]:
    """Endless needles. In half of the sequences most are rivals of a few: same form, nearly the same key."""
    maker = NeedleMaker(chance, near=chance.choice([0.0, 0.5, 0.9]))
    n_favourites = chance.choice([0, 0, 0, 1, 3, 10])
    favourites: list[Needle] = []
    for needle in maker.draw(n_favourites):
        favourites.append(needle)
        yield needle
    while True:
        if favourites and chance.random() < 0.7:
            yield maker.rival(chance.choice(favourites))
        else:
            yield from maker.draw(1)


def _planted(encoder: Encoder, needle: Needle) -> Piece:
    ids = encoder.encode(needle.sentence)
    return Piece(ids, [OTHER] * len(ids))


def _mixed(haystack: Haystack, n_prose: int, planted: list[Piece], chance: random.Random) -> Iterator[Piece]:
    """``n_prose`` tokens of prose with the needles after random sentences."""
    prose = haystack.take(n_prose, chance) if n_prose else np.zeros(0, np.int32)
    ends = [0, *haystack.sentence_ends(prose).tolist(), n_prose]
    used = 0
    for end, piece in zip(sorted(chance.choices(ends, k=len(planted))), planted, strict=True):
        if end > used:
            yield Piece(prose[used:end].tolist(), [PROSE] * (end - used))
            used = end
        yield piece
    yield Piece(prose[used:].tolist(), [PROSE] * (n_prose - used))


def _groups(pieces: list[Piece], chance: random.Random) -> list[list[Piece]]:
    """Runs of pieces that keep their places relative to each other; BOS and what follows it is the first."""
    average = chance.choice([64, 256, 1024])
    groups: list[list[Piece]] = [[]]
    size, wanted = 0, chance.uniform(0.5, 1.5) * average
    for piece in pieces:
        groups[-1].append(piece)
        size += len(piece.ids)
        if size > wanted:
            groups.append([])
            size, wanted = 0, chance.uniform(0.5, 1.5) * average
    return groups


def _positions(sizes: list[int], length: int, window: int, chance: random.Random) -> npt.NDArray[np.int64]:
    """Positions below ``window``: consecutive (half of the sequences), with gaps, or in shuffled order with gaps.

    kvtier scores keys without positions and gives the chosen ones new positions: what is retrieved must not depend on
    distances. No position occurs twice, so that what stands before a token stays what it was.
    """
    if chance.random() < 0.5:
        return np.arange(length)
    order = list(range(1, len(sizes)))
    if chance.random() < 0.6:
        chance.shuffle(order)
    spare = window - length
    marks = sorted(chance.randint(0, spare) for _ in order)
    begins = [0] * len(sizes)
    position = sizes[0]
    for group, mark in zip(order, marks, strict=True):
        begins[group] = position + mark
        position += sizes[group]
    return np.concatenate([np.arange(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)])


class BatchSource:
    """Endless batches of the current stage: made by worker processes, or here when there are none."""

    def __init__(self, encoder: Encoder, haystack: Haystack, recipe: Recipe, seed: int, n_workers: int) -> None:
        self._made = (encoder, haystack, recipe)
        self._chance = random.Random(seed)
        context = mp.get_context("fork")  # the text is shared, and nothing is imported again
        self._stage: Any = context.Value("i", 0)
        self._workers: list[Any] = []
        if n_workers:
            self._queue: Any = context.Queue(maxsize=2 * n_workers)
            for i in range(n_workers):
                arguments = (encoder, haystack, recipe, seed * 1000 + i, self._stage, self._queue)
                self._workers.append(context.Process(target=_work, args=arguments, daemon=True))
                self._workers[-1].start()

    @property
    def stage(self) -> int:
        return int(self._stage.value)

    def advance(self) -> None:
        self._stage.value += 1

    def next(self) -> Batch:
        if not self._workers:
            return make_batch(*self._made, self.stage, self._chance)
        while True:
            try:
                batch: Batch = self._queue.get(timeout=30)
                return batch
            except queue.Empty:
                if not all(worker.is_alive() for worker in self._workers):
                    raise RuntimeError("a worker that makes batches has died") from None

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()


def _work(
    encoder: Encoder, haystack: Haystack, recipe: Recipe, seed: int, stage: "Synchronized[int]", batches: Any
) -> None:
    chance = random.Random(seed)
    while True:
        batches.put(make_batch(encoder, haystack, recipe, stage.value, chance))
