"""Fixtures of the tests of saved sequences; and Triton's interpreter, where there is no GPU.

That Triton interprets has to be said before it is imported. What fixtures need is imported late: most tests do without.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def store(tmp_path):
    """Where a store can be made."""
    return tmp_path / "store"


@pytest.fixture
def quick_store(monkeypatch):
    from session_cases import quicken

    quicken(monkeypatch)


@pytest.fixture
def commits_always(quick_store, monkeypatch):
    """A commit after every block."""
    from session_cases import commit_always

    commit_always(monkeypatch)


@pytest.fixture
def stop(monkeypatch):
    from session_cases import stopper

    return stopper(monkeypatch)


@pytest.fixture(scope="module")
def model():
    from models import tiny_llama

    return tiny_llama()


@pytest.fixture(scope="module")
def right(model):
    """What comes of BOOK."""
    from session_cases import BOOK, config, continued

    import kvtier

    with kvtier.offload(model, config()) as kv:
        return continued(kv, kv.prefill(BOOK))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A store with one saved sequence."""
    from session_cases import BOOK, config, quicken

    import kvtier

    path = tmp_path_factory.mktemp("saved") / "store"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        with kvtier.offload(model, config()) as kv:
            kv.prefill(BOOK).save(path)
    return path
