"""Scratch that is not what was written there: every answer is the right one or a refusal, also of what comes later."""

import contextlib
import random
import re

import numpy as np
import pytest
from fault_child import answer, config
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import minimum_budget, prompt, tiny_llama

import kvtier
from kvtier.runtime import direct_io
from kvtier.runtime.errors import StoreError
from kvtier.runtime.library import Library

N = 250
"""Tokens: 28 chunks in 2 layers of 2 KV heads."""
DTYPES = ["auto", "int8", "int4"]


@pytest.fixture(autouse=True, scope="module")
def quick():
    """The plain engine of ``RecordIO``: an AIO context takes 30 ms to close."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_io, "_engine_of", lambda folder, nbytes: (direct_io.BUFFERED, []))
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


class Spilled:
    """A block with a text most of whose chunks are in scratch, and the device pool as small as it can be."""

    def __init__(self, kv, folder):
        self.kv = kv
        self.book = kv.prefill(prompt(N))
        store = kv._runtime.engine.residency.store
        [self.file] = folder.rglob("kv/c/*/0")
        slots = store._map.slots_of(store._map.ids())
        self.item_bytes, self.places = store.item_bytes, 4096 * np.sort(slots)
        self.right = answer(kv, self.book)

    @contextlib.contextmanager
    def damaged(self, places, change):
        """So long as this lasts, the bytes at ``places`` of the file are what ``change`` makes of them, [n] uint8."""
        data = np.fromfile(self.file, np.uint8)
        other = data.copy()
        other[places] = change(data[places])
        assert (other != data).any()
        try:
            self._write(other)
            yield
        finally:
            self._write(data)

    def _write(self, data):
        with self.file.open("r+b") as file:
            file.write(data)

    def answers_or_refuses(self):
        """The answer, or None: refused with the file's name."""
        try:
            return answer(self.kv, self.book)
        except StoreError as error:
            if re.search(rf"{self.file} holds other data at byte \d+ than were written", str(error)):
                return None
            raise


@pytest.fixture(scope="module", params=DTYPES)
def spilled(request, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    made = config(folder, mode="spill", dtype=request.param)
    made["budget"] |= {name: f"{minimum_budget(model, made, name)}B" for name in ("gpu", "host")}
    made["budget"]["gpu"] = f"{int(made['budget']['gpu'][:-1]) + 120_000}B"  # and the summaries
    with kvtier.offload(model, made) as kv:
        yield Spilled(kv, folder)


def test_damaged_chunks_are_refused_until_they_are_whole_again(spilled):
    """Also by a second cache; nothing of a read that failed is attended to later, and other caches go on."""
    kv, forked, other = spilled.kv, spilled.book.fork(), spilled.kv.prefill(prompt(40, seed=3))
    answer_of_other = answer(kv, other)
    refused = rf"{spilled.file} holds other data .*Caches that need them cannot go on, all others can"
    with spilled.damaged(spilled.places + spilled.item_bytes // 2, lambda byte: byte ^ 0x40):
        for book in (spilled.book, forked, spilled.book):
            with pytest.raises(StoreError, match=refused):
                answer(kv, book)
            assert answer(kv, other) == answer_of_other
    assert answer(kv, forked) == answer(kv, spilled.book) == spilled.right


def test_a_save_refuses_damaged_chunks_and_leaves_no_sequence(spilled, tmp_path):
    place = int(spilled.places[-1])
    refused = pytest.raises(StoreError, match=rf"{spilled.file} holds other data at byte {place} ")
    with spilled.damaged(slice(place, place + spilled.item_bytes), np.zeros_like), refused:
        spilled.book.save(tmp_path / "store")
    assert Library(tmp_path / "store").entries() == []
    spilled.book.save(tmp_path / "store")
    with kvtier.offload(tiny_llama(), spilled.kv.config) as kv:
        assert answer(kv, kv.open(tmp_path / "store")) == spilled.right


def flip_and_ask(spilled, bit_of_item, which):
    place = spilled.places[which % len(spilled.places)] + bit_of_item // 8 % spilled.item_bytes
    with spilled.damaged(place, lambda byte: byte ^ (1 << bit_of_item % 8)):
        found = spilled.answers_or_refuses()
    assert found in (None, spilled.right)
    return found


FLIPS = {"bit_of_item": st.integers(0, 8 * 4096 - 1), "which": st.integers(0, 999)}
FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@given(**FLIPS)
@hypothesis_settings(max_examples=8, **FUZZ)
def test_any_flipped_bit_is_refused_or_without_effect(spilled, bit_of_item, which):
    flip_and_ask(spilled, bit_of_item, which)


@pytest.mark.slow
def test_many_flipped_bits(spilled):
    """Some of them are in chunks that are chosen."""
    generator = random.Random(11)
    found = [flip_and_ask(spilled, generator.randrange(8 * 4096), generator.randrange(999)) for _ in range(300)]
    assert 30 < found.count(None) < 300
