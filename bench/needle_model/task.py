"""The needle task: facts hidden in a long text, questions about them, and what counts as an answer.

Training, evaluation and the long-context benchmarks share this file. A needle is one sentence that gives a key its
value; distractors are needles of other keys, many of them near-duplicates. Everything follows from the random generator
that is passed in. No torch here: workers that make training data import it.
"""

import random
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bench.needle_model.words import ADJECTIVES, CITIES, FIRST_NAMES, LAST_NAMES, NOUNS

Ids = npt.NDArray[np.int32]

PIECES = re.compile(r" ?[A-Z]?[a-z]+| ?[A-Z]| ?[0-9]| ?[^\sA-Za-z0-9]+|\n+|\s")
"""How text is cut before byte-pair merges. Digits and capitals of codes stand alone, and a piece never depends on its
neighbours: keys and values get the same tokens wherever they occur, and encoding is a dictionary look-up."""

KEY_KINDS = ("city", "pair", "person", "code", "case")
VALUE_KINDS = ("number", "code", "words")
SHARED_BEGINNING = 0.15
"""Chance that a value begins like another one of the same kind: like its rival's, or like any."""

ANSWER_TOKENS = 16
"""Enough for every value and the end token: what ``max_new_tokens`` should be."""

NOUN_OF_VALUE = {"number": "number", "code": "code", "words": "phrase"}
SENTENCES = (
    " One of the special magic {noun}s for {key} is: {value}.",
    " The secret {noun} of {key} is {value}.",
    " Remember this: for {key} the {noun} is {value}.",
    " In the register {key} is entered with the {noun} {value}.",
    " Note that {key} was given the {noun} {value}.",
)
QUESTIONS = (
    "\n\nQuestion: What is the special magic {noun} for {key}?\nAnswer:",
    "\n\nQuestion: What is the secret {noun} of {key}?\nAnswer:",
    "\n\nQuestion: Which {noun} belongs to {key}?\nAnswer:",
)


class Tokenizer(Protocol):
    """What is needed of a tokenizer of transformers, or of the wrapper around one of ``tokenizers``."""

    def __call__(self, text: str, add_special_tokens: bool = ...) -> Any: ...


class Encoder:
    """Token ids by look-up of pieces; equal to the tokenizer's own ids without special tokens."""

    def __init__(self, tokenizer: Tokenizer, bos: int, eos: int) -> None:
        self.bos, self.eos = bos, eos
        self._tokenizer = tokenizer
        self._ids_of_piece: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in PIECES.findall(text):
            found = self._ids_of_piece.get(piece)
            if found is None:
                found = list(self._tokenizer(piece, add_special_tokens=False)["input_ids"])
                self._ids_of_piece[piece] = found
            ids += found
        return ids


@dataclass(frozen=True, slots=True)
class Needle:
    """One fact. The value never occurs before its key."""

    key: str
    value: str
    key_kind: str
    value_kind: str
    sentence_form: int
    question_form: int

    @property
    def before_value(self) -> str:
        head, _ = SENTENCES[self.sentence_form].split(" {value}")
        return head.format(noun=NOUN_OF_VALUE[self.value_kind], key=self.key)

    @property
    def sentence(self) -> str:
        """What is hidden in the text; it begins with a space and ends with a full stop."""
        return f"{self.before_value} {self.value}."

    @property
    def question(self) -> str:
        """What follows the text. The answer is a space, the value and the end token."""
        return QUESTIONS[self.question_form].format(noun=NOUN_OF_VALUE[self.value_kind], key=self.key)


def score(answer: str, needle: Needle) -> bool:
    """Whether the first line of ``answer`` is the value, all of it and nothing else (a final full stop is allowed)."""
    lines = answer.strip().splitlines()
    return bool(lines) and " ".join(lines[0].split()).removesuffix(".") == needle.value


class NeedleMaker:
    """Draws needles whose keys are distinct."""

    def __init__(self, chance: random.Random, near: float = 0.5) -> None:
        """``near``: chance that a key is a near-duplicate of an earlier one."""
        self._chance, self._near = chance, near
        self._needles: list[Needle] = []
        self._keys: set[str] = set()

    def draw(self, n: int, key_kinds: Sequence[str] = KEY_KINDS) -> list[Needle]:
        """``n`` more needles."""
        return [self._one(key_kinds) for _ in range(n)]

    def rival(self, needle: Needle) -> Needle:
        """A needle of the same form whose key is as near to that of ``needle`` as its kind allows."""
        return self._finish(self._free_key(needle.key_kind, needle.key), needle.key_kind, needle)

    def _one(self, key_kinds: Sequence[str]) -> Needle:
        chance = self._chance
        if self._needles and chance.random() < self._near:
            like = chance.choice(self._needles)
            if like.key_kind in key_kinds:
                return self._finish(self._free_key(like.key_kind, like.key), like.key_kind, None)
        kind = chance.choice(key_kinds)
        return self._finish(self._free_key(kind, None), kind, None)

    def _free_key(self, kind: str, like: str | None) -> str:
        for _ in range(20):
            key = _near_key(self._chance, kind, like) if like else _new_key(self._chance, kind)
            if key not in self._keys:
                return key
            like = None
        return self._free_key("case", None)  # all cities are taken

    def _finish(self, key: str, key_kind: str, like: Needle | None) -> Needle:
        chance = self._chance
        value_kind = like.value_kind if like else chance.choice(VALUE_KINDS)
        value = _new_value(chance, value_kind)
        if self._needles and chance.random() < SHARED_BEGINNING:
            other = like or chance.choice(self._needles)
            if other.value_kind == value_kind:
                value = _same_beginning(chance, value_kind, other.value, value)
        form = like.sentence_form if like else chance.randrange(len(SENTENCES))
        needle = Needle(key, value, key_kind, value_kind, form, chance.randrange(len(QUESTIONS)))
        self._needles.append(needle)
        self._keys.add(key)
        return needle


def _new_key(chance: random.Random, kind: str) -> str:
    if kind == "city":
        return chance.choice(CITIES)
    if kind == "pair":
        return f"{chance.choice(ADJECTIVES)} {chance.choice(NOUNS)}"
    if kind == "person":
        return f"{chance.choice(FIRST_NAMES)} {chance.choice(LAST_NAMES)}"
    if kind == "code":
        return f"{_draw(chance, string.ascii_uppercase, 2)}-{_draw(chance, string.digits, 4)}"
    return f"case {_draw(chance, string.digits, 6)}"


def _near_key(chance: random.Random, kind: str, key: str) -> str:
    """One word or character of ``key`` changed, or two neighbouring characters swapped."""
    if kind == "city":
        return chance.choice(CITIES)
    first, _, second = key.partition(" ")
    if kind == "pair":
        return f"{first} {chance.choice(NOUNS)}" if chance.random() < 0.5 else f"{chance.choice(ADJECTIVES)} {second}"
    if kind == "person":
        other = chance.choice(LAST_NAMES), chance.choice(FIRST_NAMES)
        return f"{first} {other[0]}" if chance.random() < 0.5 else f"{other[1]} {second}"
    letters = list(key)
    begin = len("case ") if kind == "case" else 0
    i = chance.choice([i for i in range(begin, len(letters)) if letters[i] != "-"])
    if chance.random() < 0.3 and i + 1 < len(letters) and letters[i + 1] != "-":
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    else:
        letters[i] = chance.choice(string.digits if letters[i].isdigit() else string.ascii_uppercase)
    return "".join(letters)


def _new_value(chance: random.Random, kind: str) -> str:
    if kind == "number":
        return _draw(chance, string.digits, 7)
    if kind == "code":
        return _draw(chance, string.ascii_uppercase + string.digits, 6)
    return " ".join(chance.choice(ADJECTIVES if chance.random() < 0.5 else NOUNS) for _ in range(3))


def _same_beginning(chance: random.Random, kind: str, other: str, value: str) -> str:
    if kind == "words":
        n = chance.randint(1, 2)
        return " ".join(other.split()[:n] + value.split()[n:])
    n = chance.randint(2, len(value) - 1)
    return other[:n] + value[n:]


def _draw(chance: random.Random, letters: str, n: int) -> str:
    return "".join(chance.choices(letters, k=n))


class Haystack:
    """A text as token ids, endless: after the last token come its stretches again, in another order each time."""

    STRETCH_TOKENS = 2048

    def __init__(self, ids: Ids, is_end: npt.NDArray[np.bool_]) -> None:
        """``is_end`` [vocabulary]: whether a sentence ends with this token."""
        self.ids = ids
        self._is_end = is_end
        ends = np.flatnonzero(is_end[ids]) + 1
        cuts = np.searchsorted(ends, np.arange(0, len(ids), self.STRETCH_TOKENS)[1:])
        self._bounds = np.unique(np.concatenate([[0], ends[cuts[cuts < len(ends)]], [len(ids)]]))
        self._ends = ends

    @classmethod
    def of_text(cls, encoder: Encoder, tokenizer: Any, text: str) -> "Haystack":
        """``tokenizer`` names its tokens: ``convert_ids_to_tokens``."""
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        is_end = np.array([name.rstrip("\"')").endswith((".", "!", "?")) for name in names])
        return cls(np.array(encoder.encode(text), dtype=np.int32), is_end)

    def take(self, n_tokens: int, chance: random.Random) -> Ids:
        """``n_tokens`` tokens from a random sentence on."""
        begin = int(self._ends[chance.randrange(len(self._ends))])
        parts = [self.ids[begin : begin + n_tokens]]
        missing = n_tokens - len(parts[0])
        order = np.random.default_rng(chance.getrandbits(64))
        while missing > 0:
            for i in order.permutation(len(self._bounds) - 1):
                parts.append(self.ids[self._bounds[i] : self._bounds[i + 1]][:missing])
                missing -= len(parts[-1])
                if missing <= 0:
                    break
        return np.concatenate(parts)

    def sentence_ends(self, ids: Ids) -> npt.NDArray[np.int64]:
        """Indices just behind the sentences of ``ids``."""
        ends: npt.NDArray[np.int64] = np.flatnonzero(self._is_end[ids]) + 1
        return ends


@dataclass(frozen=True, slots=True)
class Context:
    """Everything before the question."""

    ids: Ids
    needles: tuple[Needle, ...]
    spans: tuple[tuple[int, int], ...]
    """First token and end of each needle."""
    distractors: tuple[Needle, ...]


def build_context(
    encoder: Encoder,
    haystack: Haystack,
    n_tokens: int,
    depths: Sequence[float],
    n_distractors: int,
    seed: int,
    key_kinds: Sequence[str] = KEY_KINDS,
) -> Context:
    """A context of exactly ``n_tokens`` tokens with one needle per depth (a fraction of the context).

    Every second distractor is a rival of a needle: same form, nearly the same key. They lie at random depths. A
    sentence is planted behind the first sentence of the text that ends at or after its depth.
    """
    chance = random.Random(seed)
    maker = NeedleMaker(chance, near=0.0)
    needles = maker.draw(len(depths), key_kinds)
    distractors = [
        maker.rival(chance.choice(needles)) if i % 2 == 0 and needles else maker.draw(1, key_kinds)[0]
        for i in range(n_distractors)
    ]
    planted = [*zip(depths, needles, strict=True), *((chance.random(), each) for each in distractors)]
    planted.sort(key=lambda pair: pair[0])
    sentences = [encoder.encode(needle.sentence) for _, needle in planted]
    n_text = n_tokens - 1 - sum(map(len, sentences))
    if n_text < 0:
        raise ValueError(f"{len(planted)} needles have {n_tokens - 1 - n_text} tokens, the context only {n_tokens}")
    ids, begins = _plant(
        encoder, haystack, haystack.take(n_text, chance), [d * n_tokens for d, _ in planted], sentences
    )
    where = {id(needle): (b, b + len(s)) for (_, needle), b, s in zip(planted, begins, sentences, strict=True)}
    return Context(ids, tuple(needles), tuple(where[id(needle)] for needle in needles), tuple(distractors))


def _plant(
    encoder: Encoder, haystack: Haystack, text: Ids, targets: Sequence[float], sentences: Sequence[list[int]]
) -> tuple[Ids, list[int]]:
    """``text`` with BOS and the sentences, each at or after its target (an index of the result); and their begins."""
    ends = haystack.sentence_ends(text)
    parts: list[Ids | list[int]] = [[encoder.bos]]
    begins, used, length = [], 0, 1
    for target, sentence in zip(targets, sentences, strict=True):
        wanted = max(used, used + int(target) - length)
        nearest = int(np.searchsorted(ends, wanted))
        end = int(ends[nearest]) if nearest < len(ends) else len(text)
        parts += [text[used:end], sentence]
        begins.append(length + end - used)
        length = begins[-1] + len(sentence)
        used = end
    parts.append(text[used:])
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]), begins


def answer_ids(encoder: Encoder, needle: Needle) -> list[int]:
    """What a perfect model says after the question."""
    return [*encoder.encode(f" {needle.value}"), encoder.eos]


def even_depths(n: int) -> list[float]:
    """The middles of ``n`` equal stretches. In short contexts the last ones lie in kvtier's window."""
    return [(i + 0.5) / n for i in range(n)]


def tries(chance: random.Random, lengths: Sequence[int], n: int) -> Iterator[tuple[int, float, int]]:
    """Length, depth and number of distractors of ``n`` tries that cover ``lengths`` and all depths evenly."""
    golden = (5**0.5 - 1) / 2
    for i in range(n):
        length = lengths[i % len(lengths)]
        yield length, (0.5 + i * golden) % 1, min(chance.choice([0, 10, 50, 200]), length // 48)
