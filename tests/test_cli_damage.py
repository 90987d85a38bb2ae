"""What ``kvtier run --session`` says of what is not whole in a store."""

import json

import pytest
from session_cases import Stop, commit_always, stopper
from test_cli_sessions import QUESTIONS, ask, no_fsync, store  # noqa: F401  (fixtures)
from test_run import config, context, folder  # noqa: F401  (fixtures)

from kvtier.runtime.library import Library


def test_a_session_that_holds_a_beginning_says_so(ask, context, store, config, monkeypatch):  # noqa: F811
    commit_always(monkeypatch)
    stop = stopper(monkeypatch)
    stop(5)
    with open(config, "a") as file:
        file.write(f'\n[store]\npath = "{store}"\nmode = "durable"\n')
    with pytest.raises(Stop):
        ask("--context", context, *QUESTIONS)
    tokens = Library(store).entry().tokens
    assert 0 < tokens < 901
    stop(None)
    code, out, err = ask("--session", store, *QUESTIONS, "--json")
    assert (code, json.loads(out)["tokens"]) == (0, tokens)
    said, opened = err.splitlines()[:2]
    assert (
        f"is not complete: its reading was interrupted, or goes on. It is opened with the first {tokens} of the 901"
        in said
    )
    assert f'read that text with [store] path = "{store}" and mode = "durable": it goes on there' in said
    assert opened.startswith(f"opened {tokens} tokens from {store}")


@pytest.mark.parametrize("file", ["tokens/c.0", "zarr.json", "commit/c.*"])
def test_a_damaged_session_that_is_read_again_is_named(file, ask, context, store):  # noqa: F811
    """Where it cannot be told that it is this text."""
    ask("--context", context, "--session", store, "--question", "w1 ?")
    damaged = Library(store).entry().path
    for path in damaged.glob(file):
        path.write_bytes(b"")
    code, _, err = ask("--context", context, "--session", store, "--question", "w1 ?")
    damage, saved = err.splitlines()[:2]
    assert code == 0
    assert damage.startswith(f"the saved sequence {damaged} is damaged: ")
    assert damage.endswith("Whether it holds this context cannot be told: it is read")
    assert saved.startswith("saved 901 tokens to ")
    code, _, err = ask("--context", context, "--session", store, "--question", "w1 ?")
    assert err.startswith("opened 901 tokens from ")
