"""``kvtier run --session``, ``kvtier inspect`` and ``kvtier completion``, on a tiny random model in a folder."""

import json
import os
import shutil
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
import torch
import zarr
from models import settings, tiny_llama
from test_run import config, context, folder  # noqa: F401  (fixtures)

import kvtier
from kvtier import cli, run
from kvtier.cli import COMMANDS, main
from kvtier.completion import SHELLS
from kvtier.runtime.library import Library

QUESTIONS = ["--question", "w1 w2 ?", "--question", "w7 ?"]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture
def ask(folder, config, capsys):  # noqa: F811
    """Runs ``kvtier run`` and returns exit code, stdout and stderr."""

    def ask(*argv, model=None):
        common = ["--config", config, "--max-new-tokens", "6", "--device", "cpu"]
        code = main(["run", model or str(folder), *argv, *common])
        return code, *capsys.readouterr()

    return ask


@pytest.fixture
def no_model(monkeypatch):
    """What must be refused before a model is loaded."""
    monkeypatch.setattr(run, "load", None)


# -- kvtier run --session ----------------------------------------------------------------------------------------------


def test_the_second_run_opens_what_the_first_has_read(ask, context, store, monkeypatch):  # noqa: F811
    _, plain, _ = ask("--context", context, *QUESTIONS, "--json")
    code, out, err = ask("--context", context, "--session", store, *QUESTIONS, "--json")
    first = json.loads(out)
    assert code == 0
    assert first["answers"] == json.loads(plain)["answers"]
    assert first["session"]["opened"] is False
    assert first["session"]["store"] == store
    id = first["session"]["id"]
    assert f"saved 901 tokens to {store} as {id} in " in err

    monkeypatch.setattr(kvtier.Offload, "prefill", None)
    code, out, err = ask("--context", context, "--session", store, *QUESTIONS, "--json")
    second = json.loads(out)
    assert code == 0
    assert err.startswith(f"opened 901 tokens from {store} in ")
    assert second["session"] == {"store": store, "id": id, "opened": True, "seconds": second["session"]["seconds"]}
    assert second["answers"] == first["answers"]
    assert second["tokens"] == 901
    assert second["stats"]["prefill"]["computed_tokens"] < 100  # the questions

    code, out, err = ask("--session", store, *QUESTIONS, "--json")  # the only one, without the text
    assert code == 0
    assert json.loads(out)["answers"] == first["answers"]
    code, out, err = ask("--session", store, "--id", id, "--question", "w7 ?")
    assert code == 0
    assert first["answers"][1]["answer"] in " ".join(out.split())


def test_other_texts_and_settings_are_read_and_saved_beside(ask, context, store, tmp_path, config):  # noqa: F811
    other = tmp_path / "other.txt"
    other.write_text("w3 w4 w5 " * 90)
    ask("--context", context, "--session", store, "--question", "w1 ?")
    _, _, err = ask("--context", str(other), "--session", store, "--question", "w1 ?")
    assert err.startswith("saved 271 tokens")
    text = (tmp_path / "kvtier.toml").read_text()
    (tmp_path / "kvtier.toml").write_text(text.replace("select = 8", "select = 9"))
    code, _, err = ask("--context", context, "--session", store, "--question", "w1 ?")
    assert code == 0
    assert "has this context, but not as it would be read now:" in err.splitlines()[0]
    assert "it was read with [attention] select = 8, here it is 9" in err.splitlines()[0]
    assert err.splitlines()[1].startswith("saved 901 tokens")
    (tmp_path / "kvtier.toml").write_text(text.replace("block = 64", "block = 32"))
    _, _, err = ask("--context", context, "--session", store, "--question", "w1 ?")
    assert "it was read with [prefill] block = 64, here it is 32" in err
    (tmp_path / "kvtier.toml").write_text(text)
    assert len(Library(store).entries()) == 4
    code, out, err = ask("--session", store, "--question", "w1 ?")
    assert (code, out) == (1, "")
    assert "holds 4 sequences, say which by its id" in err


def test_another_model_reads_for_itself(ask, context, store, folder, tmp_path):  # noqa: F811
    ask("--context", context, "--session", store, "--question", "w1 ?")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tiny_llama(window=256, seed=3).save_pretrained(other)
    code, _, err = ask("--context", context, "--session", store, "--question", "w1 ?", model=str(other))
    assert code == 0
    assert f"made with other weights ({folder}; this model is {other})" in err
    assert "saved 901 tokens" in err
    id = Library(store).entries()[0].id
    code, out, err = ask("--session", store, "--id", id, "--question", "w1 ?", model=str(other))
    assert (code, out) == (1, "")
    assert err.startswith("kvtier: the saved sequence ")
    assert "cannot go on here: it was made with other weights" in err
    assert err.count("\n") == 1


def test_a_damaged_session_is_an_error_and_not_read_again(ask, context, store):  # noqa: F811
    ask("--context", context, "--session", store, "--question", "w1 ?")
    next(Library(store).entry().path.glob("codes/codes/c.*")).unlink()
    code, out, err = ask("--context", context, "--session", store, "--question", "w1 ?")
    assert (code, out) == (1, "")
    assert "is damaged: " in err
    assert "codes/codes/c." in err
    assert err.count("\n") == 1


def test_damaged_chunks_are_an_error_when_they_are_read(ask, context, store):  # noqa: F811
    _, answer, _ = ask("--context", context, "--session", store, "--question", "w1 ?")
    (path,) = Library(store).entry().path.glob("kv/c.*")
    whole, index = path.read_bytes(), 2 * 128 * 2 * 16 + 4
    path.write_bytes(bytes(byte ^ 1 for byte in whole[:-index]) + whole[-index:])
    code, out, err = ask("--context", context, "--session", store, "--question", "w1 ?")
    assert code == 1
    assert answer.strip() not in out
    assert err.startswith("opened 901 tokens from ")
    assert f"kvtier: the saved sequence {Library(store).entry().path} is damaged: {path} or " in err
    assert "Traceback" not in err


def test_a_durable_store_is_resumed(ask, context, store, tmp_path, config):  # noqa: F811
    _, plain, _ = ask("--context", context, *QUESTIONS, "--json")
    with open(config, "a") as file:
        file.write(f'\n[store]\npath = "{store}"\nmode = "durable"\n')
    read = []
    for more in ([], [], ["--session", store]):
        code, out, _ = ask("--context", context, *QUESTIONS, "--json", *more)
        report = json.loads(out)
        assert code == 0
        assert report["answers"] == json.loads(plain)["answers"]
        read.append(report["stats"]["prefill"]["resumed_tokens"])
    assert read == [0, 901, 0]
    assert report["session"]["opened"] is True  # what was read durably is a session like others
    assert len(Library(store).entries()) == 1


def test_questions_are_typed_on_a_session(ask, context, store, monkeypatch):  # noqa: F811
    import io

    ask("--context", context, "--session", store, "--question", "w1 ?")
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 ?\n\n"))
    code, out, err = ask("--session", store)
    assert code == 0
    assert "w3 ?" in out
    assert "ask, one question a line" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--question", "w1 ?"], "give --context FILE (what to read), or --session STORE"),
        (["--context", "book.txt", "--question", "w1 ?", "--id", "abc"], "--id says what to open with --session"),
        (["--context", "f", "--session", "s", "--id", "abc"], "--id says what to open with --session"),
        (["--session", "s", "--json"], "give --question with --json"),
    ],
)
def test_wrong_use_exits_2_before_anything_is_loaded(argv, message, no_model, capsys):
    assert main(["run", "no-model", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kvtier: {message}")
    assert err.count("\n") == 1


def test_what_can_be_refused_is_refused_before_the_model_is_loaded(ask, context, store, config, tmp_path, no_model):  # noqa: F811
    zarr.create_group(tmp_path / "foreign", zarr_format=3)
    cases = [
        (["--session", store], "is not a kvtier store: there is no such folder"),
        (["--session", str(tmp_path)], "is not a kvtier store: it has no zarr.json"),
        (["--session", str(tmp_path / "foreign")], "holds zarr data that kvtier did not write"),
        (["--session", str(tmp_path / "foreign"), "--context", context], "holds zarr data that kvtier did not write"),
        (["--session", context, "--context", context], "book.txt cannot be used as a store"),
    ]
    for argv, message in cases:
        code, out, err = ask(*argv, "--question", "w1 ?")
        assert (code, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1
    with open(config, "a") as file:
        file.write('\n[store]\npath = "unused"\n')
    text = (tmp_path / "kvtier.toml").read_text().replace("sink = 4", 'sink = 4\nmethod = "reattention"')
    (tmp_path / "kvtier.toml").write_text(text)
    code, _, err = ask("--session", store, "--context", context, "--question", "w1 ?")
    assert code == 1
    assert '[attention] method = "reattention" is not supported with saved sequences: use method = "chunks"' in err
    assert not os.path.exists(store)


# -- kvtier inspect ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    path = tmp_path_factory.mktemp("filled") / "store"
    with kvtier.offload(tiny_llama(dtype=torch.bfloat16), settings(select=3, budget={"gpu": "8MiB"})) as kv:
        for n in (1500, 60):
            kv.prefill([1 + i % 90 for i in range(n)]).save(path)
    return path


def test_inspect_prints_one_object(filled, capsys):
    assert main(["inspect", str(filled), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["store"] == str(filled)
    sequences = sorted(report["sequences"], key=lambda sequence: -sequence["tokens"])
    assert [sequence["tokens"] for sequence in sequences] == [1500, 60]
    big = sequences[0]
    assert set(big) == {
        *("id", "tokens", "complete", "parts", "bytes", "model", "model_class", "created", "dtype", "select"),
        *("settings", "problem", "text_tokens", "replaced"),
    }
    files = [path for path in (filled / "sequences" / big["id"]).rglob("*") if path.is_file()]
    assert big["bytes"] == sum(path.stat().st_blocks * 512 for path in files)  # files have holes
    assert big["bytes"] > 1500 * 2 * 2 * 2 * 16 * 2  # K and V of all tokens
    assert (big["model"], big["model_class"], big["dtype"]) == ("llama", "LlamaForCausalLM", "bfloat16")
    assert (big["problem"], big["complete"], big["parts"], big["replaced"]) == (None, True, [], [])
    assert big["settings"]["[attention] chunk"] == 8
    age = datetime.now(UTC) - datetime.fromisoformat(big["created"])
    assert timedelta(0) <= age < timedelta(minutes=30)


def test_inspect_prints_a_table(filled, capsys):
    assert main(["inspect", str(filled)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["id", "tokens", "bytes", "created", "(UTC)", "model"]
    assert len(lines) == 2
    assert {line.split()[1] for line in lines} == {"1,500", "60"}
    assert all(line.split()[-1] == "llama" for line in lines)


def test_inspect_shows_what_is_damaged_and_what_is_empty(filled, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(filled, copy)
    record = next((copy / "sequences").glob("*/zarr.json"))
    record.write_text(record.read_text().replace('"chunk": 8', '"chunk": 9'))
    assert main(["inspect", str(copy), "--json"]) == 0
    sequences = json.loads(capsys.readouterr().out)["sequences"]
    assert [sequence["problem"] is None for sequence in sequences] == [True, False]
    assert sequences[1]["id"] == record.parent.name
    assert sequences[1]["tokens"] is sequences[1]["bytes"] is None
    assert main(["inspect", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "damaged: the checksum of its zarr.json is wrong" in out
    assert out.splitlines()[-1].startswith("what is damaged is kept: put back a copy of its folder, or read and save")
    shutil.rmtree(copy / "sequences")
    assert main(["inspect", str(copy)]) == 0
    assert capsys.readouterr().out == f"{copy} holds no saved sequence\n"


def test_inspect_refuses_what_is_no_store(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvtier: ")
    assert "is not a kvtier store: there is no such folder" in err
    assert err.count("\n") == 1


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "demo", "run", "inspect", "completion"])
def test_every_help_ends_with_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    examples = [line for line in text.splitlines() if line.startswith(("  kvtier", '  eval "$(kvtier'))]
    assert examples
    for line in examples:
        words = line.split("kvtier", 1)[1].split("    ")[0].split(">")[0].replace(')"', "")
        words = [word.strip('"') for word in words.split()]
        if "--help" not in words:
            question = words.index("--question") + 2 if "--question" in words else len(words)
            cli.make_parser().parse_args(words[:question])


# -- completion --------------------------------------------------------------------------------------------------------


def completion(shell, capsys):
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def completed(script, line, cwd):
    """What bash offers for ``line``, the cursor at its end; files as readline would, where the script offers none."""
    words = line.split(" ")
    code = f"""
{script}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
COMP_CWORD={len(words) - 1}
_kvtier
[[ ${{#COMPREPLY[@]}} -gt 0 ]] || COMPREPLY=($(compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}"))
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True, cwd=cwd)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_commands_options_and_files(tmp_path, capsys):
    script = completion("bash", capsys)
    (tmp_path / "book.txt").write_text("")
    (tmp_path / "books").mkdir()
    for line, expected in {
        "kvtier ": {*COMMANDS, "--help", "--version"},
        "kvtier in": {"inspect"},
        "kvtier --v": {"--version"},
        "kvtier run --co": {"--context", "--config"},
        "kvtier run model --context book.txt --se": {"--session"},
        "kvtier run model --context b": {"book.txt", "books"},
        "kvtier run model --context book.txt b": {"book.txt", "books"},
        "kvtier run model --session b": {"books"},
        "kvtier run --session books --question x --j": {"--json"},
        "kvtier inspect b": {"books"},
        "kvtier inspect --": {"--help", "--json"},
        "kvtier demo --t": {"--tokens"},
        "kvtier completion ": set(SHELLS),
        "kvtier completion f": {"fish"},
    }.items():
        assert completed(script, line, tmp_path) == expected, line


def test_every_option_of_every_command_is_completed(tmp_path, capsys):
    script = completion("bash", capsys)
    for name, command in cli.make_parser()._subparsers._group_actions[0].choices.items():
        options = {option for action in command._actions for option in action.option_strings if option.startswith("--")}
        assert completed(script, f"kvtier {name} --", tmp_path) == options


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_parse(shell, tmp_path, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    path = tmp_path / "script"
    path.write_text(completion(shell, capsys))
    subprocess.run([shell, "-n", str(path)], check=True)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_completes(tmp_path, capsys):
    (tmp_path / "script.fish").write_text(completion("fish", capsys))
    (tmp_path / "books").mkdir()
    (tmp_path / "book.txt").write_text("")
    for line, expected in {
        "kvtier ": set(COMMANDS),
        "kvtier run --co": {"--context", "--config"},
        "kvtier run model --session b": {"books/"},
        "kvtier run model --context b": {"books/", "book.txt"},
        "kvtier completion f": {"fish"},
        "kvtier inspect b": {"books/"},
    }.items():
        code = f"source script.fish; complete -C '{line}'"
        done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert {offer.split("\t")[0] for offer in done.stdout.splitlines()} == expected, line


def test_an_unknown_shell_is_wrong_use(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["completion", "csh"])
    assert caught.value.code == 2
    assert "choose from" in capsys.readouterr().err
