"""What a durable store takes, counts and leaves alone: batches, chunks, forks, budgets, damage."""

import shutil

import pytest
import torch
from models import PAD, minimum_budget, prompt
from session_cases import (
    BOOK,
    MORE,
    QUESTION,
    ROOMY,
    Stop,
    assert_continues,
    config,
    continued,
    kept,
    logits_of,
    read,
)

import kvtier
from kvtier.runtime.library import Library

pytestmark = pytest.mark.usefixtures("commits_always")

CHUNK_BYTES = 2 * 8 * 16 * 4
CHUNKS = 25 * 2 * 2
"""Of BOOK once something follows it, in all layers and KV heads."""


def contents_of(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


# -- batches -----------------------------------------------------------------------------------------------------------


def padded(lengths):
    """Texts of these lengths with pads before them, and their mask."""
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, width - n :], mask[row, width - n :] = prompt(n, seed=row)[0], 1
    return ids, mask


def answers(kv, book, mask):
    rows = len(mask)
    question = QUESTION.expand(rows, -1)
    given = torch.cat([mask, torch.ones(rows, question.shape[1], dtype=torch.long)], dim=1)
    fork = book.fork()
    return kv.model.generate(
        question, past_key_values=fork, attention_mask=given, max_new_tokens=6, do_sample=False
    ).tolist()


def test_rows_of_a_batch_are_texts_of_their_own(store, model, stop):
    ids, mask = padded((150, 220, 40))
    with kvtier.offload(model, config()) as kv:
        expected = answers(kv, kv.prefill(ids, attention_mask=mask), mask)
    stop(7 + 4)  # the first row has 7 blocks
    with kvtier.offload(model, kept(store)) as kv, pytest.raises(Stop):
        kv.prefill(ids, attention_mask=mask)
    entries = {entry.tokens: entry for entry in Library(store).entries()}
    assert {tokens: entry.commit.complete for tokens, entry in entries.items()} == {150: True, 128: False}
    stop(None)
    for tokens in ((150 + 128, 92 + 40), (150 + 220 + 40, 0)):
        with kvtier.offload(model, kept(store)) as kv:
            book, *found = read(kv, ids, attention_mask=mask)
            assert tuple(found) == tokens
            assert book.n_rows == 3
            assert book.get_seq_length() == 220
            assert answers(kv, book, mask) == expected
    with kvtier.offload(model, kept(store)) as kv:  # and each of them alone
        for row, n in enumerate((150, 220, 40)):
            assert read(kv, prompt(n, seed=row))[1:] == (n, 0)
    assert len(Library(store).entries()) == 3


def test_equal_rows_are_read_once(store, model):
    with kvtier.offload(model, kept(store)) as kv:
        book, *tokens = read(kv, BOOK.expand(3, -1))
        assert tokens == [440, 220]
        assert [book.row(i).token_ids.tolist() for i in range(3)] == [BOOK[0].tolist()] * 3
    assert len(Library(store).entries()) == 1


# -- what is written, and what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["roomy", "tiny"])
def test_each_chunk_is_written_once(host, store, model, right, stop):
    """Also when the host holds a few of them: what is in the store needs no scratch."""
    host_bytes = "16MiB" if host == "roomy" else minimum_budget(model, config(), "host") + 2 * CHUNK_BYTES
    settings = kept(store, budget=ROOMY | {"host": host_bytes, "disk": "64MiB"})
    with kvtier.offload(model, settings) as kv:
        book = kv.prefill(BOOK)
        n = sum(layer.ids.size for layer in book._lane.sequences[0].layers)
        tiers = kv.stats()["tiers"]
        assert tiers["disk"]["bytes_written"] == n * CHUNK_BYTES
        assert tiers["disk"]["chunks"] == n == CHUNKS - 4
        assert (tiers["host"]["chunks"] < n) == (host == "tiny")
        scratch = kv._runtime._residency.store
        assert scratch.counters.bytes_written == len(scratch) == 0
        kv.prefill(BOOK)
        assert kv.stats()["tiers"]["disk"]["bytes_written"] == n * CHUNK_BYTES
        assert_continues(continued(kv, book), right)
    stop(4)
    with kvtier.offload(model, settings) as kv, pytest.raises(Stop):
        kv.prefill(prompt(220, seed=8))
    stop(None)
    with kvtier.offload(model, settings) as kv:  # those that were committed are not written again
        kv.prefill(prompt(220, seed=8))
        there = 2 * 2 * ((96 - 16 - 4) // 8)
        assert kv.stats()["tiers"]["disk"]["bytes_written"] == (n - there) * CHUNK_BYTES


def test_what_follows_on_the_book_and_its_forks_is_not_kept(store, model):
    with kvtier.offload(model, kept(store)) as kv:
        book = kv.prefill(BOOK)
        before = contents_of(store / "sequences")
        fork = book.fork()
        expected = continued(kv, fork)
        logits_of(model, MORE, fork)
        assert fork.get_seq_length() > 280
        model.generate(QUESTION, past_key_values=book, max_new_tokens=40, do_sample=False)
        model.generate(prompt(100, seed=3), max_new_tokens=4, do_sample=False)  # without a cache of ours
        logits_of(model, BOOK, kv.new_cache())
        assert contents_of(store / "sequences") == before
        assert len(Library(store).entries()) == 1
        again, *tokens = read(kv)  # the stored one, not what the book has become
        assert tokens == [220, 0]
        assert_continues(continued(kv, again), expected)
        id = book.save(store)  # unless it is saved: then as what follows on the text
        assert len(Library(store).entries()) == 2
        assert Library(store).entry(id).attributes["parts"] == [[again.save(store), 24]]
    with kvtier.offload(model, kept(store)) as kv:
        text = torch.cat([kv.open(store, id).token_ids, MORE[0]])
        assert read(kv, text)[1:] == (len(text) - 61, 61)  # a conversation is a text, too


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_the_disk_budget_counts_what_is_stored(store, model, right):
    with kvtier.offload(model, kept(store)) as kv:
        empty = kv.stats()["tiers"]["disk"]["bytes"]
        kv.prefill(BOOK)
        took = kv.stats()["tiers"]["disk"]["bytes"] - empty
    there = Library(store).entry().nbytes
    records = (CHUNKS - 4) * 4096
    assert records < took
    with kvtier.offload(model, kept(store)) as kv:
        assert kv.stats()["tiers"]["disk"]["bytes"] == empty + there
        kv.prefill(BOOK)
        assert kv.stats()["tiers"]["disk"]["bytes"] == empty + there  # nothing new
    full = kept(store, budget=ROOMY | {"disk": there + empty + records // 2})
    with kvtier.offload(model, full) as kv:
        with pytest.raises(kvtier.BudgetError, match=r"\[budget\] disk = .* is too small: .* Raise \[budget\] disk"):
            kv.prefill(prompt(220, seed=6))
        assert_continues(continued(kv, kv.prefill(BOOK)), right)  # what is stored serves
        assert kv.stats()["tiers"]["disk"]["bytes"] <= there + empty + records // 2
    partial = next(entry for entry in Library(store).entries() if not entry.commit.complete)
    assert 0 < partial.tokens < 220
    with kvtier.offload(model, kept(store)) as kv:  # with a larger budget it goes on
        assert read(kv, prompt(220, seed=6))[1:] == (partial.tokens, 220 - partial.tokens)
    less = kept(store, budget=ROOMY | {"disk": there})
    with (
        pytest.raises(kvtier.BudgetError, match=rf"\[budget\] disk = .* needed for what is saved in {store} already"),
        kvtier.offload(model, less),
    ):
        pass
    with Library(store).writing():  # and the lock has been let go
        pass


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokens/c.0", "zarr.json"])
def test_what_cannot_be_recognised_is_read_anew_and_replaced(name, store, model, right):
    with kvtier.offload(model, kept(store)) as kv:
        kv.prefill(BOOK)
    file = Library(store).entry().path / name
    file.write_bytes(b"1" + file.read_bytes()[1:])
    where = f"{file.parent} is not what was saved" if name != "zarr.json" else f"{file.parent} is damaged: .* zarr.json"
    said = (
        rf"{where}.* It is of this text; it is kept until the text has been read and saved again\. 220 tokens are read"
    )
    with kvtier.offload(model, kept(store)) as kv:
        with pytest.warns(UserWarning, match=said) as warned:
            book, *tokens = read(kv)
        assert (len(warned), tokens) == (1, [0, 220])
        assert_continues(continued(kv, book), right)
    with kvtier.offload(model, kept(store)) as kv:
        book, *tokens = read(kv)
        assert tokens == [220, 0]
        assert_continues(continued(kv, book), right)
    assert len(Library(store).entries()) == 1
    assert [path.name for path in (store / "sequences").glob("*.*/")] == []  # nor is it kept twice


@pytest.mark.parametrize("name", ["block_starts/c.0", "codes/codes/c.0.0.0.0.0", "fitted/0/c.0.0.0"])
def test_what_is_damaged_is_refused_by_name(name, store, model):
    """Not read anew behind the user's back: what the text took to read may be had from a copy."""
    with kvtier.offload(model, kept(store)) as kv:
        kv.prefill(BOOK)
    entry = Library(store).entry()
    file = entry.path / name
    file.write_bytes(b"1" + file.read_bytes()[1:])
    with kvtier.offload(model, kept(store)) as kv:
        with pytest.raises(kvtier.StoreError, match=f"{entry.path} is damaged: .*{file.parent}.*; remove that folder"):
            kv.prefill(BOOK)
        shutil.rmtree(entry.path)
        assert read(kv)[1:] == (0, 220)


DAMAGES = {
    "tokens": lambda folder: (folder / "tokens" / "c.0").write_bytes(b""),
    "attributes": lambda folder: (folder / "zarr.json").write_text("{"),
    "commits": lambda folder: [slot.unlink() for slot in (folder / "commit").glob("c.*")],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_read_anew_is_kept_until_that_is_complete(damage, store, model, right, stop, monkeypatch):
    with kvtier.offload(model, kept(store)) as kv:
        kv.prefill(BOOK)
    folder = Library(store).entry().path
    DAMAGES[damage](folder)
    before = contents_of(folder)

    def old():
        return {
            folder / file.relative_to(path): data for path in [kept_at()] for file, data in contents_of(path).items()
        }

    def kept_at():
        [path] = Library(store).replaced(folder.name)
        return path

    said = f"the saved sequence {folder} is damaged: .* It is of this text; it is kept until"
    with monkeypatch.context() as patch:  # a reading that ends before its first commit: as if it had not begun
        patch.setattr("kvtier.durable.FIRST_COMMIT_SECONDS", 1e9)
        stop(3)
        with kvtier.offload(model, kept(store)) as kv:
            with pytest.warns(UserWarning, match=said), pytest.raises(Stop):
                kv.prefill(BOOK)
            assert contents_of(folder) == before
        assert contents_of(folder) == before
    stop(5)
    with kvtier.offload(model, kept(store)) as kv, pytest.warns(UserWarning, match=said), pytest.raises(Stop):
        kv.prefill(BOOK)
    assert (Library(store).entry().tokens, old()) == (160, before)
    stop(2)
    with kvtier.offload(model, kept(store)) as kv, pytest.raises(Stop):
        kv.prefill(BOOK)  # nothing to say: this is the new one
    assert (Library(store).entry().tokens, old()) == (211, before)
    stop(None)
    with kvtier.offload(model, kept(store)) as kv:
        book, *tokens = read(kv)
        assert tokens == [211, 9]
        assert Library(store).replaced(folder.name) == []
        assert_continues(continued(kv, book), right)


def test_damage_that_may_be_this_text_is_named_when_it_goes_on_from_another_one(store, model):
    """The damaged one has another id than what is made now; and what is found whole is not commented on."""
    longer = torch.cat([BOOK, MORE], dim=1)
    with kvtier.offload(model, kept(store)) as kv:
        kv.prefill(longer)
        damaged = Library(store).entry().path
        (damaged / "tokens" / "c.0").write_bytes(b"")
        with pytest.warns(
            UserWarning, match=rf"{damaged}.* Whether it holds this text cannot be told\. 220 tokens are read"
        ):
            kv.prefill(BOOK)
        with pytest.warns(
            UserWarning, match=rf"{damaged}.* Whether it holds this text cannot be told\. 61 tokens are read"
        ):
            kv.prefill(longer)
        before = contents_of(damaged)
        assert read(kv)[1:] == (220, 0)
        assert read(kv, longer)[1:] == (281, 0)
        assert contents_of(damaged) == before
    assert len(Library(store).entries()) == 3
