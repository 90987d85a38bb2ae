"""``kvtier run``: read text files once, answer questions about them, stream the answers."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvtier.cache import TieredCache
from kvtier.config import Config
from kvtier.offload import Offload, offload
from kvtier.runtime.errors import KvtierError
from kvtier.sessions import Session

MARK = "\u2063kvtier\u2063"
"""Stands for the question while a chat template is rendered; nobody writes it in a text."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat prompt cut where the question goes: ``before`` is read once, ``after`` follows each question."""

    before: str
    after: str


def load(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model of a hub name, a folder or a GGUF file. Raises KvtierError in one line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(model)
    where: tuple[Any, dict[str, Any]] = (model, {})
    if path.suffix == ".gguf":
        where = (path.parent, {"gguf_file": path.name})
    try:
        tokenizer = AutoTokenizer.from_pretrained(where[0], **where[1])
        loaded: Any = AutoModelForCausalLM.from_pretrained(where[0], dtype=dtype, **where[1])
    except (OSError, ValueError, ImportError) as error:
        raise KvtierError(f"cannot load the model {model!r}: {' '.join(str(error).split())[:300]}") from error
    return tokenizer, loaded.to(device).eval()


def read_context(files: Iterable[str]) -> str:
    """The texts of ``files`` ("-" is stdin), one after the other."""
    texts = []
    for name in files:
        try:
            texts.append(sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise KvtierError(f"cannot read the context {name!r}: {error}") from error
    text = "\n\n".join(texts)
    if not text.strip():
        raise KvtierError("the context is empty: nothing to read")
    return text


def make_prompt(tokenizer: Any, context: str) -> Prompt:
    """The model's chat template around the context, or a plain question and answer for models without one."""
    if not getattr(tokenizer, "chat_template", None):
        return Prompt(f"{context}\n\nQuestion: ", "\nAnswer:")
    message = [{"role": "user", "content": f"{context}\n\n{MARK}"}]
    before, after = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).split(MARK)
    return Prompt(before, after)


class Reader:
    """A context that has been read, ready for questions.

    Parameters
    ----------
    context : the text; None: what the session has
    session : where what was read is kept; None: nowhere
    """

    def __init__(
        self, kv: Offload, tokenizer: Any, context: str | None, max_new_tokens: int, session: Session | None
    ) -> None:
        self._kv = kv
        self.tokenizer = tokenizer
        self._prompt = make_prompt(tokenizer, context or "")
        self._max_new_tokens = max_new_tokens
        bos = getattr(tokenizer, "chat_template", None) is None  # a chat template writes its own
        ids: list[int] = []
        if context is not None:
            ids = tokenizer(self._prompt.before, add_special_tokens=bos, verbose=False)["input_ids"]
        self._book: TieredCache = kv.prefill(ids) if session is None else session.book(kv, ids or None)
        self.ids: list[int] = self._book.token_ids.tolist()

    def ask(self, question: str, streamer: Any = None) -> str:
        """The answer to one question, asked of a fork: questions do not see each other."""
        text = question + self._prompt.after
        ids = torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]], device=self._kv.model.device)
        out = self._kv.model.generate(
            ids,
            past_key_values=self._book.fork(),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            streamer=streamer,
        )
        answer: str = self.tokenizer.decode(
            out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return answer.strip()


@contextmanager
def reading(
    tokenizer: Any, model: Any, config: Config, context: str | None, max_new_tokens: int, session: Session | None = None
) -> Iterator[tuple[Offload, Reader]]:
    """An offload block in which ``context`` has been read, or what ``session`` has of it been opened."""
    with offload(model, config) as kv:
        yield kv, Reader(kv, tokenizer, context, max_new_tokens, session)


def questions(given: list[str], say: Callable[[str], None]) -> Iterator[str]:
    """The questions given, or those typed until an empty line or the end of the input."""
    if given:
        yield from given
        return
    say("ask, one question a line; an empty line ends")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question
