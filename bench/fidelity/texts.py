"""Contexts of an exact number of tokens, with questions about them: prose, code, key-value lists, one after another."""

import functools
import random
import string
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier.needle import CITIES, SYSTEM, shipped_text

KINDS = ("prose", "code", "pairs", "mixed")
CHAT_START = "<|im_start|>"


@dataclass(frozen=True, slots=True)
class Ask:
    """What follows a context: a question, or just more text."""

    ids: list[int]
    answer: str = ""
    """How the greedy continuation must begin; "" where nothing is asked."""
    span: tuple[int, int] = (0, 0)
    """First token and end of the place in the context that has the answer."""
    depth: float = 0.0
    """Where that is, as a fraction of the context."""


@dataclass(frozen=True, slots=True)
class Text:
    """A context and what may follow it; each ask follows the context, not the other asks."""

    kind: str
    ids: list[int]
    asks: tuple[Ask, ...]


def make_text(kind: str, tokenizer: Any, n_tokens: int, n_asks: int, seed: int = 0) -> Text:
    """A context of exactly ``n_tokens`` tokens of ``kind`` with ``n_asks`` asks at evenly spread depths."""
    make: Callable[[Any, int, int, int], Text] = {
        "prose": _prose,
        "code": _code,
        "pairs": _pairs,
        "mixed": _mixed,
    }[kind]
    return make(tokenizer, n_tokens, n_asks, seed)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` without special tokens of the tokenizer's own making."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def depths(n: int) -> list[float]:
    """``n`` depths, evenly spread: the middles of n equal parts."""
    return [(i + 0.5) / n for i in range(n)]


# -- the frame around a question ---------------------------------------------------------------------------------------


def _head(tokenizer: Any, chat: str) -> list[int]:
    """Begin a prompt: the chat head where the tokenizer knows this chat format, else the first token it wants."""
    if _is_chat(tokenizer):
        return encode(tokenizer, chat)
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []


def _question(tokenizer: Any, question: str, answer_begun: str) -> list[int]:
    if _is_chat(tokenizer):
        return encode(tokenizer, f"\n\n{question}<|im_end|>\n<|im_start|>assistant\n{answer_begun}")
    return encode(tokenizer, f"\n\nQuestion: {question}\nAnswer: {answer_begun}")


def _is_chat(tokenizer: Any) -> bool:
    return CHAT_START in tokenizer.get_vocab()


CHAT_HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"


# -- prose: a novel with planted facts (the demo's) --------------------------------------------------------------------


def _prose(tokenizer: Any, n_tokens: int, n_asks: int, seed: int) -> Text:
    chance = random.Random(seed)
    facts = [(city, str(chance.randint(100_000, 999_999))) for city in _cities(n_asks, chance)]
    planted = [encode(tokenizer, f" One of the special magic numbers for {c} is: {_code_of(c)}-{n}.") for c, n in facts]
    head = _head(tokenizer, CHAT_HEAD)
    words = _prose_ids(tokenizer, n_tokens)[: n_tokens - len(head) - sum(map(len, planted))]
    ids, used, asks = list(head), 0, []
    for depth, (city, number), sentence in zip(depths(n_asks), facts, planted, strict=True):
        end = max(used, min(len(words), int(depth * n_tokens) - len(ids) + used))
        while end < len(words) and not tokenizer.decode(words[end - 1 : end]).endswith("."):
            end += 1
        ids += words[used:end]
        used = end
        subject = f"special magic number for {city}"
        question = f"What is the {subject} mentioned in the text above?"
        begun = f"The {subject} mentioned in the text is: {_code_of(city)}-"
        span = (len(ids), len(ids) + len(sentence))
        asks.append(Ask(_question(tokenizer, question, begun), number, span, depth))
        ids += sentence
    ids += words[used:]
    if len(ids) != n_tokens:
        raise ValueError(f"the shipped text has only {len(words)} tokens, {n_tokens} were asked for")
    return Text("prose", ids, tuple(asks))


def _cities(n: int, chance: random.Random) -> list[str]:
    """``n`` distinct names: the demo's cities, then made-up ones."""
    names = sorted(CITIES)
    while len(names) < n:
        names.append("New " + chance.choice(string.ascii_uppercase) + "".join(chance.choices("aeiouln", k=5)))
        names = list(dict.fromkeys(names))
    return chance.sample(names, n)


def _code_of(city: str) -> str:
    return CITIES.get(city) or "".join(c for c in city if c.isalpha())[-2:].upper()


@functools.lru_cache(maxsize=2)
def _prose_ids(tokenizer: Any, n_tokens: int) -> list[int]:
    return encode(tokenizer, shipped_text()[: 8 * n_tokens])


# -- code: Python's own library ----------------------------------------------------------------------------------------


def _code(tokenizer: Any, n_tokens: int, n_asks: int, seed: int) -> Text:
    """Source files; an ask is only the next 64 tokens of one more file."""
    head = [tokenizer.bos_token_id] if not _is_chat(tokenizer) and tokenizer.bos_token_id is not None else []
    ids, wanted, files = list(head), n_tokens + 64 * n_asks, _source_files(seed)
    while len(ids) < wanted:
        ids += encode(tokenizer, next(files))
    rests = [ids[n_tokens + 64 * i : n_tokens + 64 * (i + 1)] for i in range(n_asks)]
    return Text("code", ids[:n_tokens], tuple(Ask(rest) for rest in rests))


def _source_files(seed: int) -> Iterator[str]:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for path in random.Random(seed).sample(paths, len(paths)):
        yield f"# {path.name}\n{path.read_text(encoding='utf-8', errors='replace')}\n"


# -- pairs: a list of keys and values ----------------------------------------------------------------------------------

WORDS = """
amber anchor apple arrow basil beacon birch bottle bridge bronze butter candle canyon carbon castle cedar cherry
cobalt copper coral cotton crystal desert dragon eagle ember falcon feather forest garden ginger glacier granite
hammer harbor hazel island ivory jasmine kettle ladder lantern lemon linen lizard maple marble meadow mirror
nickel ocean olive orchid otter paper pepper pigeon planet plum pocket quartz rabbit raven ribbon river rocket
saddle salmon silver spider spruce stone summer temple thunder tiger timber tulip tunnel velvet violet walnut
willow window winter yellow zebra
""".split()  # noqa: SIM905  # a hundred lines otherwise


def _pairs(tokenizer: Any, n_tokens: int, n_asks: int, seed: int) -> Text:
    """Lines such as "the code of amber falcon is 483920." with distinct keys; an ask is one of the keys."""
    chance = random.Random(seed)
    ids, lines = _head(tokenizer, CHAT_HEAD), []
    used: set[str] = set()
    while len(ids) < n_tokens:
        key = " ".join(chance.sample(WORDS, 2 if len(used) < 3000 else 3))
        if key not in used:
            used.add(key)
            value = str(chance.randint(100_000, 999_999))
            line = encode(tokenizer, f"The code of {key} is {value}.\n")
            lines.append((key, value, len(ids), len(ids) + len(line)))
            ids += line
    asks = []
    for depth in depths(n_asks):
        key, value, begin, end = next(line for line in lines if line[2] >= depth * n_tokens)
        question = _question(tokenizer, f"What is the code of {key}?", f"The code of {key} is")
        asks.append(Ask(question, value, (begin, end), depth))
    return Text("pairs", ids[:n_tokens], tuple(asks))


# -- mixed: what a summary was fitted to is not what it meets later ----------------------------------------------------


def _mixed(tokenizer: Any, n_tokens: int, n_asks: int, seed: int) -> Text:
    """A third of prose, which a summary is fitted to, then code, then pairs; half of the asks are of the pairs."""
    third = n_tokens // 3
    prose = _prose(tokenizer, third, n_asks - n_asks // 2, seed)
    code = _code(tokenizer, third, 0, seed)
    pairs = _pairs(tokenizer, n_tokens - 2 * third, n_asks // 2, seed)
    asks = [_moved(ask, 0, n_tokens) for ask in prose.asks] + [_moved(ask, 2 * third, n_tokens) for ask in pairs.asks]
    return Text("mixed", prose.ids + code.ids + pairs.ids, tuple(asks))


def _moved(ask: Ask, by: int, n_tokens: int) -> Ask:
    """``ask`` about a part that begins ``by`` tokens into a context of ``n_tokens``."""
    begin, end = ask.span
    return Ask(ask.ids, ask.answer, (begin + by, end + by), (begin + by) / n_tokens)
