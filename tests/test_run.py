"""``kvtier run`` on a tiny random model in a folder: what is read, asked, printed and refused."""

import io
import json
import re

import pytest
from models import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvtier.cli import main
from kvtier.run import make_prompt

TEXT = " ".join(f"w{i % 80}" for i in range(900))
TEMPLATE = "{% for m in messages %}<u> {{ m['content'] }} <e>{% endfor %}{% if add_generation_prompt %} <a>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    words = ["<pad>", "<unk>", "<s>", "<u>", "<e>", "<a>", "?", *(f"w{i}" for i in range(80))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(path)
    tiny_llama(window=256).save_pretrained(path)
    return path


@pytest.fixture
def context(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "kvtier.toml"
    path.write_text(
        '[budget]\ngpu = "64MiB"\nhost = "64MiB"\n[attention]\nsink = 4\nlocal = 32\nchunk = 8\nselect = 8\n'
        "[prefill]\nblock = 64\n[summary]\nrank = 8\n"
    )
    return str(path)


def test_questions_are_answered_independently_of_each_other(folder, context, config, capsys):
    def run(*questions):
        asked = [word for question in questions for word in ("--question", question)]
        common = ["--config", config, "--max-new-tokens", "6", "--device", "cpu", "--json"]
        assert main(["run", str(folder), "--context", context, *asked, *common]) == 0
        return json.loads(capsys.readouterr().out)

    both = run("w1 w2 ?", "w7 ?")
    assert [a["question"] for a in both["answers"]] == ["w1 w2 ?", "w7 ?"]
    assert both["tokens"] == 901
    assert both["stats"]["longest_attended"] <= 256
    assert run("w7 ?")["answers"][0]["answer"] == both["answers"][1]["answer"]


def test_answers_are_streamed_and_the_tiers_follow_on_stderr(folder, context, config, capsys):
    argv = ["run", str(folder), "--context", context, "--question", "w3 ?", "--config", config, "--device", "cpu"]
    assert main([*argv, "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("w3 ?\n")
    assert len(out.split()) > 2
    assert "hit rate" in err


def test_answers_are_explained(folder, context, config, capsys):
    argv = ["run", str(folder), "--context", context, "--question", "w3 ?", "--config", config, "--device", "cpu"]
    assert main([*argv, "--max-new-tokens", "4", "--explain"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("w3 ?\n")
    assert "5 blocks, tokens 901 to 908: the chunks attended to hold " in out
    cited = re.search(r"\n   1 +(\d+)-\d+ .*\n +(\S+) ", out)
    assert cited[2] == TEXT.split()[int(cited[1]) - 1], "the template's <u> is the first token"
    assert main([*argv, "--max-new-tokens", "4", "--explain", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["answers"][0]["explanation"]
    assert told["spans"][0]["begin"] == int(cited[1])
    assert main([*argv, "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0].keys() == {"question", "answer"}


def test_without_a_question_it_asks_for_them(folder, context, config, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 ?\n\n"))
    argv = ["run", str(folder), "--context", context, "--config", config, "--max-new-tokens", "4", "--device", "cpu"]
    assert main(argv) == 0
    assert "w3 ?" in capsys.readouterr().out


def test_the_context_can_come_from_stdin_and_several_files(folder, context, config, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6"))
    argv = ["run", str(folder), "--context", context, "-", "--question", "w3 ?", "--config", config, "--json"]
    assert main([*argv, "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 903


def test_a_prompt_without_a_chat_template_is_plain():
    prompt = make_prompt(object(), "a text")
    assert (prompt.before, prompt.after) == ("a text\n\nQuestion: ", "\nAnswer:")


@pytest.mark.parametrize("extra", [["--json"], ["--context", "-"]], ids=["json", "stdin"])
def test_a_question_is_needed_where_none_can_be_typed(folder, context, extra, capsys):
    assert main(["run", str(folder), "--context", context, *extra]) == 2
    assert "give --question" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "/no/such/folder"}, "cannot load the model '/no/such/folder'"),
        ({"context": "/no/such/file"}, "cannot read the context '/no/such/file'"),
        ({"config": "/no/such.toml"}, "/no/such.toml"),
    ],
    ids=["model", "context", "config"],
)
def test_failures_are_one_line_and_exit_1(folder, context, config, change, message, capsys):
    given = {"model": str(folder), "context": context, "config": config} | change
    argv = ["run", given["model"], "--context", given["context"], "--config", given["config"], "--question", "w1 ?"]
    assert main([*argv, "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_an_empty_context_is_refused(folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    assert main(["run", str(folder), "--context", str(tmp_path / "empty.txt"), "--question", "w1 ?"]) == 1
    assert "the context is empty" in capsys.readouterr().err
