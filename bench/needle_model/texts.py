"""The public-domain text that the needle model learns from, and its tokenizer."""

import gzip
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bench.needle_model.task import PIECES, NeedleMaker

SHIPPED = Path(__file__).parents[2] / "kvtier" / "data" / "emma.txt.gz"

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

AUSTEN = "Debian r-cran-janeaustenr 1.0.0-1, steps as in kvtier/data/SOURCE.md"
SOURCES = {
    "emma": ("Jane Austen, Emma (1815)", "kvtier/data/emma.txt.gz"),
    "mansfieldpark": ("Jane Austen, Mansfield Park (1814)", AUSTEN),
    "northangerabbey": ("Jane Austen, Northanger Abbey (1817)", AUSTEN),
    "persuasion": ("Jane Austen, Persuasion (1817)", AUSTEN),
    "prideprejudice": ("Jane Austen, Pride and Prejudice (1813)", AUSTEN),
    "sensesensibility": ("Jane Austen, Sense and Sensibility (1811)", AUSTEN),
    "kingjames": (
        "The King James Bible (1611)",
        "Debian bible-kjv and bible-kjv-text 4.38: `bible -f gen1:1-rev22:21`, verse numbers and brackets dropped,"
        " a chapter a paragraph",
    ),
}
"""Work and where the text was taken from. All are in the public domain: their authors died before 1818."""


@dataclass(frozen=True, slots=True)
class Text:
    name: str
    text: str

    @property
    def record(self) -> dict[str, Any]:
        """What the model's card says of it."""
        work, taken_from = SOURCES.get(self.name, (self.name, "not recorded"))
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        return {"work": work, "taken_from": taken_from, "characters": len(self.text), "sha256": digest}


def read_texts(folder: Path | None) -> list[Text]:
    """The novel that ships with kvtier, and every ``*.txt.gz`` of ``folder``."""
    paths = [SHIPPED, *(sorted(folder.glob("*.txt.gz")) if folder else [])]
    return [Text(p.name.removesuffix(".txt.gz"), gzip.decompress(p.read_bytes()).decode()) for p in paths]


class PlainTokenizer:
    """A tokenizer of ``tokenizers`` called as those of transformers are; worker processes need no more."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner = tokenizer

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.inner.encode(text, add_special_tokens=add_special_tokens).ids}

    def __len__(self) -> int:
        return int(self.inner.get_vocab_size())

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(self.inner.id_to_token(i)) for i in ids]


def train_tokenizer(texts: list[Text], vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE on pieces (see PIECES); needles are in its training text, so that their words are short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_lines(texts, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def _training_lines(texts: list[Text], seed: int) -> Iterator[str]:
    for text in texts:
        yield from text.text.split("\n\n")
    chance = random.Random(seed)
    for _ in range(100):
        for needle in NeedleMaker(chance).draw(100):
            yield needle.sentence + needle.question


def for_transformers(tokenizer: Tokenizer, window: int) -> Any:
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=window,
        clean_up_tokenization_spaces=False,
    )
