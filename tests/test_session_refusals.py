"""What cannot be opened is refused by name before any work, and what is damaged is never used."""

import json
import shutil

import numpy as np
import pytest
import torch
from models import VOCAB, tiny_llama
from session_cases import (
    BOOK,
    MORE,
    assert_same,
    config,
    contents,
    logits_of,
    used_bytes,
)
from test_families import FAMILIES, tiny

import kvtier
from kvtier import fingerprint, sessions
from kvtier.runtime import saved_sequence
from kvtier.runtime.library import Entry, Library

pytestmark = pytest.mark.usefixtures("quick_store")


# -- damaged files -----------------------------------------------------------------------------------------------------


def read_at_opening(store):
    """Files of the sequence and how many of their first bytes count when it is opened: all that counts but records."""
    entry = Library(store).entry()
    lengths = {"tokens/c.0": 8 * 220, "block_starts/c.0": 8 * entry.commit.blocks, "crc/codes/c.0": 4 * 24}
    for path in sorted(entry.path.rglob("c.*")):
        name = str(path.relative_to(entry.path))
        used = name.startswith(("tokens", "block", "fitted", "codes", "crc/codes", entry.commit.window_name))
        if used and path.is_file():
            yield path, lengths.get(name, 100 if name.startswith("codes") else path.stat().st_size)


def test_a_flipped_bit_in_any_file_is_refused_by_its_name(saved, store):
    shutil.copytree(saved, store)
    files = list(read_at_opening(store))
    names = {str(path.relative_to(Library(store).entry().path)).split("/c.")[0] for path, _ in files}
    window = Library(store).entry().commit.window_name
    assert names == {
        *("tokens", "block_starts", "crc/codes", "codes/codes", "codes/scale", "fitted/0", "fitted/1", "fitted/2"),
        *(f"{window}/sinks", f"{window}/tokens"),
    }
    generator = np.random.default_rng(0)
    with kvtier.offload(tiny_llama(), config()) as kv:
        kv.open(store)
        before = used_bytes(kv)
        for path, length in files:
            whole = path.read_bytes()
            for position in (0, length - 1, int(generator.integers(length))):
                flipped = bytearray(whole)
                flipped[position] ^= 1 << int(generator.integers(8))
                path.write_bytes(flipped)
                with pytest.raises(kvtier.StoreError, match=rf"damaged: .*{path.parent}.*remove that folder"):
                    kv.open(store)
            path.write_bytes(whole)
        assert {tier["chunks"] for tier in kv.stats()["tiers"].values()} == {0}
        assert used_bytes(kv)["device"] == before["device"]
        kv.open(store)


def test_a_flipped_bit_anywhere_in_its_attributes_is_refused(saved, store):
    shutil.copytree(saved, store)
    path = Library(store).entry().path / "zarr.json"
    whole = path.read_bytes()
    end = whole.index(b'"zarr_format"')  # what follows says nothing of the sequence
    for position in range(0, end, max(1, end // 400)):
        if chr(whole[position]).isspace():
            continue
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(kvtier.StoreError, match=r"is damaged: .*zarr\.json|has layout version"):
            Library(store).entry().check()


@pytest.mark.parametrize("damage", ["lost", "shortened", "emptied", "exchanged"])
def test_lost_shortened_and_exchanged_files_are_refused(damage, saved, store):
    with kvtier.offload(tiny_llama(), config()) as kv:
        for name in ("tokens", "fitted/1", "codes/codes", "crc/codes"):
            shutil.rmtree(store, ignore_errors=True)
            shutil.copytree(saved, store)
            (first,) = (Library(store).entry().path / name).glob("c.*")
            if damage == "lost":
                first.unlink()
            elif damage == "exchanged":  # of the right length
                data = first.read_bytes()
                first.write_bytes(data[len(data) // 2 :] + data[: len(data) // 2])
            else:
                first.write_bytes(first.read_bytes()[: 50 if damage == "shortened" else 0])
            with pytest.raises(kvtier.StoreError, match=rf"is damaged: .*{name}.*Nothing damaged was used;"):
                kv.open(store)


def test_saving_again_replaces_a_damaged_sequence(saved, store):
    shutil.copytree(saved, store)
    next(store.glob("sequences/*/tokens/c.0")).write_bytes(b"1234")
    with kvtier.offload(tiny_llama(), config()) as kv:
        book = kv.prefill(BOOK)
        with pytest.raises(kvtier.StoreError, match="damaged"):
            kv.open(store)
        assert book.save(store) == Library(saved).entry().id
        assert_same(contents(kv, kv.open(store)), contents(kv, book))
    assert {path.name for path in store.iterdir()} == {"zarr.json", "sequences"}
    assert len(Library(store).entries()) == 1


# -- refused by name ---------------------------------------------------------------------------------------------------


def other_weights():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data *= 1.001
    return model


OTHERS = {
    "class": (lambda: tiny(*FAMILIES["qwen2"][:1]), {}, "made by a LlamaForCausalLM, this model is a Qwen2ForCausalLM"),
    "vocabulary": (lambda: tiny_llama(vocab_size=VOCAB + 1), {}, "has config.vocab_size = 97, this one 98"),
    "depth": (lambda: tiny_llama(layers=3), {}, "has config.num_hidden_layers = 2, this one 3"),
    "rope": (lambda: tiny_llama(rope="llama3"), {}, "has config.rope_parameters = .*default.*, this one .*llama3"),
    "weights": (other_weights, {}, "made with other weights"),
    "seed": (lambda: tiny_llama(seed=1), {}, "made with other weights"),
    "dtype": (lambda: tiny_llama(dtype=torch.bfloat16), {}, "dtype = float32, here it is bfloat16"),
    "chunk": (tiny_llama, {"chunk": 4}, r"\[attention\] chunk = 8, here it is 4"),
    "sink": (tiny_llama, {"sink": 5}, r"\[attention\] sink = 4, here it is 5"),
    "local": (tiny_llama, {"local": 24}, r"\[attention\] local = 16, here it is 24"),
    "kind": (tiny_llama, {"kind": "mean"}, r"\[summary\] kind = sketch, here it is mean"),
    "rank": (tiny_llama, {"rank": 4}, r"\[summary\] rank = 8, here it is 4"),
    "bits": (tiny_llama, {"summary": {"bits": 2}}, r"\[summary\] bits = 4, here it is 2"),
    "int8": (tiny_llama, {"store": {"dtype": "int8"}}, r"\[store\] dtype = auto, here it is int8"),
    "int4": (tiny_llama, {"store": {"dtype": "int4"}}, r"\[store\] dtype = auto, here it is int4"),
    "select": (tiny_llama, {"select": 2}, r"attends to 3 chunks per KV head, here \[attention\] select = 2"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_or_setting_is_refused_before_any_work(name, saved, monkeypatch):
    make, own, message = OTHERS[name]
    monkeypatch.setattr(sessions, "SavedSequence", None)  # nothing may be read
    monkeypatch.setattr(saved_sequence, "SequenceFiles", None)
    with kvtier.offload(make(), config(**own)) as kv, pytest.raises(kvtier.StoreError, match=message):
        kv.open(saved)


def test_rank_and_bits_do_not_matter_to_summaries_that_ignore_them(store):
    with kvtier.offload(tiny_llama(), config(kind="mean", rank=8)) as kv:
        kv.prefill(BOOK).save(store)
    with kvtier.offload(tiny_llama(), config(kind="mean", rank=4)) as kv:
        kv.open(store)


def test_a_window_longer_than_the_ring_is_refused(store):
    """A cache whose last block was long, because it was interrupted, in a block whose blocks are shorter."""
    model = tiny_llama()

    def stop(done):
        raise KeyboardInterrupt

    with kvtier.offload(model, config()) as kv:
        cache = kv.new_cache()
        with pytest.raises(KeyboardInterrupt):
            kv.feed(cache, BOOK, torch.ones(1, 220, dtype=torch.bool), logits_to_keep=1, on_block=stop)
        cache.save(store)
        expected = logits_of(model, MORE, cache)
        assert torch.equal(logits_of(model, MORE, kv.open(store)), expected)
    with (
        kvtier.offload(model, config(block=8, sink=4, local=1)) as kv,
        pytest.raises(kvtier.StoreError, match="local = 16, here it is 1"),
    ):
        kv.open(store)
    with (
        kvtier.offload(model, config(block=2)) as kv,
        pytest.raises(
            kvtier.StoreError, match=r"its window holds 28 tokens, here at most 25 fit: raise \[prefill\] block by 3"
        ),
    ):
        kv.open(store)


def test_names_of_what_is_there(saved, store, tmp_path):
    id = Library(saved).entry().id
    with kvtier.offload(tiny_llama(), config()) as kv:
        with pytest.raises(kvtier.StoreError, match=rf"holds no sequence 'abc'; it holds {id} \(220 tokens\)"):
            kv.open(saved, "abc")
        with pytest.raises(kvtier.StoreError, match=r"holds no sequence '\.\./sequences'"):
            kv.open(saved, "../sequences")
        kv.prefill(BOOK).save(store)
        kv.prefill(MORE).save(store)
        with pytest.raises(kvtier.StoreError, match=r"holds 2 sequences, say which by its id: .*220 tokens.*61 tokens"):
            kv.open(store)
        shutil.rmtree(store / "sequences")
        with pytest.raises(kvtier.StoreError, match="holds no saved sequence"):
            kv.open(store)
        with pytest.raises(kvtier.StoreError, match=r"no such folder; expected a folder that cache\.save"):
            kv.open(tmp_path / "nothing")
        (tmp_path / "text").write_text("a text")
        with pytest.raises(kvtier.StoreError, match="is not a kvtier store: there is no such folder"):
            kv.open(tmp_path / "text")
        with pytest.raises(kvtier.StoreError, match=r"is not a kvtier store: it has no zarr\.json"):
            kv.open(tmp_path)


# -- the fingerprint ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_quick_and_the_same_for_a_model_from_a_folder(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert fingerprint.weights_digest(loaded) == fingerprint.weights_digest(model)
    facts = fingerprint.model_facts(model), fingerprint.model_facts(loaded)
    assert facts[0]["config"] == facts[1]["config"]
    assert facts[1]["name"] == str(tmp_path)
    json.dumps(facts)


def test_the_fingerprint_does_not_depend_on_being_inside_a_block(saved):
    model = tiny_llama()
    outside = fingerprint.model_facts(model)
    with kvtier.offload(model, config()):
        assert fingerprint.model_facts(model) == outside
    entry = Library(saved).entry()
    assert isinstance(entry, Entry)
    assert entry.attributes["model"]["config"] == outside["config"]
