"""``[store] mode = "durable"``: what was read once is never read again, whatever ended the reading."""

import shutil

import pytest
import torch
from models import prompt, tiny_llama
from session_cases import (
    BOOK,
    KINDS,
    MORE,
    Stop,
    assert_continues,
    assert_same,
    config,
    contents,
    continued,
    kept,
    logits_of,
    read,
    says_it_is_short,
)

import kvtier
from kvtier import durable
from kvtier.runtime.library import Library

pytestmark = pytest.mark.usefixtures("commits_always")

BLOCKS = [32, 64, 96, 128, 160, 192, 211, 219, 220]
"""Ends of the blocks in which BOOK is read."""
KEPT = {name: KINDS[name] for name in ("sketch", "exact bfloat16", "gemma3", "sketch bfloat16 int4")}
KEPT |= {"int8": (tiny_llama, {"store": {"dtype": "int8"}}), "int4": (tiny_llama, {"store": {"dtype": "int4"}})}


def everything(kv, book):
    """All that can be seen of a book."""
    return contents(kv, book), continued(kv, book)


def assert_everything(found, expected):
    assert_same(found[0], expected[0])
    assert_continues(found[1], expected[1])


@pytest.fixture(scope="module")
def right():
    """What a reading gives in a block without a store, by kind."""
    made = {}

    def get(name):
        if name not in made:
            make, own = KEPT[name]
            with kvtier.offload(make(), config(**own)) as kv:
                made[name] = everything(kv, kv.prefill(BOOK))
        return made[name]

    return get


# -- the same text again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT)
def test_a_complete_text_is_not_read_again(name, store, right):
    make, own = KEPT[name]
    with kvtier.offload(make(), kept(store, own)) as kv:
        book, *tokens = read(kv)
        assert tokens == [0, 220]
        assert_everything(everything(kv, book), right(name))
        again, *tokens = read(kv)  # in the same block
        assert tokens == [220, 0]
        assert_everything(everything(kv, again), right(name))
    before = {path: path.stat().st_mtime_ns for path in store.rglob("c.*") if path.is_file()}
    with kvtier.offload(make(), kept(store, own)) as kv:
        book, *tokens = read(kv)
        assert tokens == [220, 0]
        assert kv.stats()["tiers"]["host"]["chunks"] == 0
        assert_continues(continued(kv, book), right(name)[1])
        assert_same(contents(kv, book), right(name)[0])
        assert book.save(store) == Library(store).entry().id
    assert {path: path.stat().st_mtime_ns for path in store.rglob("c.*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("sketch", (1, 2, 3, 7, 8, 9)), ("int8", (3, 7)), ("int4", (8,)), ("gemma3", (1, 8)), ("exact bfloat16", (5,))],
)
def test_an_interrupted_reading_goes_on(name, blocks, tmp_path, stop, right):
    """After every block that it can be interrupted after; in another block of code, or in the same one."""
    make, own = KEPT[name]
    model = make()
    for k in blocks:
        store = tmp_path / str(k)
        stop(k)
        with kvtier.offload(model, kept(store, own)) as kv:
            with pytest.raises(Stop):
                kv.prefill(BOOK)
            assert kv.stats()["tiers"]["host"]["chunks"] == 0  # nothing of it is left in memory
            if k % 3 == 0:
                stop(None)
                book, *tokens = read(kv)
                assert_everything(everything(kv, book), right(name))
        entry = Library(store).entry()
        if k % 3:
            assert (entry.tokens, entry.commit.complete) == (BLOCKS[k - 1], False)
            stop(None)
            with kvtier.offload(model, kept(store, own)) as kv:
                book, *tokens = read(kv)
                assert_everything(everything(kv, book), right(name))
        assert tokens == [BLOCKS[k - 1], 220 - BLOCKS[k - 1]]
        entry = Library(store).entry()  # still the only one
        assert (entry.tokens, entry.commit.complete, entry.attributes["parts"]) == (220, True, [])


def test_interrupted_again_and_again(store, stop, model, right):
    expected = 0
    for k in (2, 1, 3, 1, 1):
        stop(k)
        with kvtier.offload(model, kept(store)) as kv, pytest.raises(Stop):
            kv.prefill(BOOK)
        expected += k
        assert Library(store).entry().tokens == BLOCKS[expected - 1]
    stop(None)
    with kvtier.offload(model, kept(store)) as kv:
        book, *tokens = read(kv)
        assert tokens == [219, 1]
        assert_everything(everything(kv, book), right("sketch"))


def test_an_interrupted_reading_can_be_opened_as_it_is(store, stop, model):
    stop(5)
    with kvtier.offload(model, kept(store)) as kv, pytest.raises(Stop):
        kv.prefill(BOOK)

    def at(done):
        if done == 160:
            raise Stop

    with kvtier.offload(model, config()) as kv:
        cache = kv.new_cache()
        with pytest.raises(Stop):
            kv.feed(cache, BOOK, torch.ones(1, 220, dtype=torch.bool), logits_to_keep=1, on_block=at)
        with says_it_is_short(160):
            book = kv.open(store)
        assert_everything(everything(kv, book), everything(kv, cache))


def test_what_was_not_committed_is_computed_again(store, stop, model, right, monkeypatch):
    """A commit after the first block alone, and chunks of later blocks that are in the files beyond it."""
    monkeypatch.setattr(durable, "COMMIT_SHARE", 1e-9)
    stop(7)
    with kvtier.offload(model, kept(store)) as kv, pytest.raises(Stop):
        kv.prefill(BOOK)
    assert Library(store).entry().tokens == 32
    stop(None)
    with kvtier.offload(model, kept(store)) as kv:
        book, *tokens = read(kv)
        assert tokens == [32, 188]
        assert_everything(everything(kv, book), right("sketch"))


def test_interrupted_before_the_first_commit(store, stop, model, right, monkeypatch):
    monkeypatch.setattr(durable, "FIRST_COMMIT_SECONDS", 1e9)
    stop(7)
    with kvtier.offload(model, kept(store)) as kv:
        with pytest.raises(Stop):
            kv.prefill(BOOK)
        assert Library(store).entries() == []
        stop(None)
        book, *tokens = read(kv)
        assert tokens == [0, 220]
        assert_everything(everything(kv, book), right("sketch"))


@pytest.mark.parametrize("ids", [[3], [1, 2, 3], BOOK[0, :20].tolist(), BOOK[0, :45].tolist()], ids=len)
def test_short_texts(ids, store, model):
    with kvtier.offload(model, config()) as kv:
        expected = logits_of(model, MORE, kv.prefill(ids))
    for tokens in ([0, len(ids)], [len(ids), 0]):
        with kvtier.offload(model, kept(store)) as kv:
            book, *found = read(kv, ids)
            assert found == tokens
            assert torch.equal(logits_of(model, MORE, book), expected)


# -- texts that are alike ----------------------------------------------------------------------------------------------


def test_a_longer_text_goes_on_from_a_stored_one(store, model):
    longer = torch.cat([BOOK, MORE], dim=1)
    longest = torch.cat([longer, prompt(90, seed=4)], dim=1)
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        logits_of(model, MORE, book)
        expected = [everything(kv, book)]
        logits_of(model, longest[:, 281:], book)
        expected.append(everything(kv, book))
    with kvtier.offload(model, kept(store)) as kv:
        read(kv)
        book, *tokens = read(kv, longer)
        assert tokens == [220, 61]
        assert_everything(everything(kv, book), expected[0])
    with kvtier.offload(model, kept(store)) as kv:
        book, *tokens = read(kv, longest)
        assert tokens == [281, 90]
        assert_everything(everything(kv, book), expected[1])
    entries = {entry.tokens: entry for entry in Library(store).entries()}
    assert sorted(entries) == [220, 281, 371]
    ids, ends = zip(*entries[371].attributes["parts"], strict=True)
    assert ids == (entries[220].id, entries[281].id)
    assert ends == (entries[220].commit.chunks, entries[281].commit.chunks)
    with kvtier.offload(model, kept(store)) as kv:
        for ids, held in ((longest, expected[1]), (longer, expected[0])):
            book, *tokens = read(kv, ids)
            assert tokens == [ids.shape[1], 0]
            assert_everything(everything(kv, book), held)


def test_a_longer_text_is_interrupted_too(store, stop, model):
    longer = torch.cat([BOOK, MORE], dim=1)
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(BOOK)
        logits_of(model, MORE, book)
        expected = everything(kv, book)
    with kvtier.offload(model, kept(store)) as kv:
        kv.prefill(BOOK)
        stop(1)
        with pytest.raises(Stop):
            kv.prefill(longer)
    stop(None)
    with kvtier.offload(model, kept(store)) as kv:
        book, *tokens = read(kv, longer)
        assert tokens == [252, 29]
        assert_everything(everything(kv, book), expected)
    assert sorted(entry.tokens for entry in Library(store).entries()) == [220, 281]


SHARED = {
    "a shorter text": (BOOK[:, :150], 128),
    "a much shorter text": (BOOK[:, :70], 32),
    "one that is too short": (BOOK[:, :40], 0),
    "another end": (torch.cat([BOOK[:, :180], prompt(70, seed=9)], dim=1), 160),
    "another last token": (torch.cat([BOOK[:, :-1], BOOK[:, -1:] % 96 + 1], dim=1), 192),
    "another beginning": (torch.cat([BOOK[:, :1] % 96 + 1, BOOK[:, 1:]], dim=1), 0),
}


@pytest.mark.parametrize("name", SHARED)
def test_texts_that_begin_alike_share_whole_blocks(name, store, model):
    """The same to the last bit as if the other text was not there."""
    ids, shared = SHARED[name]
    with kvtier.offload(model, config()) as kv:
        expected = everything(kv, kv.prefill(ids))
    with kvtier.offload(model, kept(store)) as kv:
        kv.prefill(BOOK)
        book, *tokens = read(kv, ids)
        assert tokens == [shared, ids.shape[1] - shared]
        assert_everything(everything(kv, book), expected)
    with kvtier.offload(model, kept(store)) as kv:
        book, *tokens = read(kv, ids)
        assert tokens == [ids.shape[1], 0]
        assert_everything(everything(kv, book), expected)
        first = next(entry.id for entry in Library(store).entries() if entry.attributes["parts"] == [])
    if shared:
        shutil.rmtree(store / "sequences" / first)
        with kvtier.offload(model, kept(store)) as kv:  # without what it refers to it is read again
            with pytest.warns(
                UserWarning, match=rf"goes on from .*{first}: it is not there.* {ids.shape[1]} tokens are read"
            ):
                book, *tokens = read(kv, ids)
            assert tokens == [0, ids.shape[1]]
            assert_everything(everything(kv, book), expected)


@pytest.mark.parametrize("name", ["int8", "gemma3"])
def test_what_has_no_exact_beginning_is_read_anew(name, store):
    make, own = KEPT[name]
    with kvtier.offload(make(), kept(store, own)) as kv:
        kv.prefill(BOOK)
        assert read(kv, BOOK[:, :150])[1:] == (0, 150)


# -- what is read anew -------------------------------------------------------------------------------------------------

OTHERS = {
    "another block": (tiny_llama, {"block": 16}),
    "another tail": (tiny_llama, {"prefill": {"tail": 4}}),
    "fewer queries": (tiny_llama, {"prefill": {"queries": 4}}),
    "another chunk": (tiny_llama, {"chunk": 4}),
    "another local": (tiny_llama, {"local": 24}),
    "another dtype": (tiny_llama, {"store": {"dtype": "int8"}}),
    "another summary": (tiny_llama, {"kind": "mean"}),
    "other weights": (lambda: tiny_llama(seed=1), {}),
    "another depth": (lambda: tiny_llama(layers=3), {}),
    "fewer chunks": (tiny_llama, {"select": 2}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_was_read_otherwise_is_read_anew(name, store, model):
    make, own = OTHERS[name]
    with kvtier.offload(model, kept(store)) as kv:
        kv.prefill(BOOK)
    other = make()
    with kvtier.offload(other, config(**own)) as kv:
        expected = continued(kv, kv.prefill(BOOK))
    for tokens in ([0, 220], [220, 0]):
        with kvtier.offload(other, kept(store, own)) as kv:
            book, *found = read(kv)
            assert found == tokens
            assert_continues(continued(kv, book), expected)
    assert len(Library(store).entries()) == 2
    with kvtier.offload(model, kept(store)) as kv:
        assert read(kv)[1:] == (220, 0)


def test_another_select_of_one_call_is_read_anew(store, model):
    with kvtier.offload(model, kept(store)) as kv:
        kv.prefill(BOOK)
        for tokens in ((0, 220), (220, 0)):
            book, *found = read(kv, select=1)
            assert tuple(found) == tokens
            assert book._lane.sequences[0].select == 1
