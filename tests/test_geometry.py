"""Geometry against the words of DESIGN.md, "Exact definitions", by brute force over tokens, not its formulas;
and the values that follow from the configuration and a model's trained window.
"""

import dataclasses
import re
import warnings
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import assume, example, given, settings

from kvtier.config import Config, resolve_geometry
from kvtier.runtime.errors import ConfigError
from kvtier.runtime.geometry import Geometry

no_deadline = settings(deadline=None)  # CI machines stall


def make(sink: int, local: int, chunk: int, select: int, block: int, queries: int, tail: int) -> Geometry:
    most = sink + select * chunk + local + chunk - 1 + block
    return Geometry(most, sink, local, chunk, select, block, queries, tail)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    block = draw(st.integers(1, 200))
    return make(
        sink=draw(st.integers(0, 40)),
        local=draw(st.integers(1, 60)),
        chunk=draw(st.integers(1, 20)),
        select=draw(st.integers(0, 12)),
        block=block,
        queries=draw(st.integers(1, 24)),
        tail=draw(st.integers(1, block)),
    )


def chunks_that_end_by(g: Geometry, start: int) -> list[range]:
    """Middle chunk i covers [sink + i*chunk, sink + (i+1)*chunk); selectable if its end <= start - local."""
    chunks = (range(g.sink + i * g.chunk, g.sink + (i + 1) * g.chunk) for i in range(start + 1))
    return [chunk for chunk in chunks if chunk.stop <= start - g.local]


@no_deadline
@given(geometries(), st.integers(0, 600))
def test_a_chunk_is_selectable_when_it_ends_local_tokens_before_the_block(g: Geometry, start: int) -> None:
    chunks = chunks_that_end_by(g, start)
    assert g.selectable(start) == len(chunks)
    assert g.window_start(start) == (chunks[-1].stop if chunks else g.sink)


@no_deadline
@given(geometries(), st.integers(0, 600))
def test_sinks_chunks_and_window_hold_every_token_once(g: Geometry, start: int) -> None:
    held = list(range(min(g.sink, start)))
    for chunk in chunks_that_end_by(g, start):
        held += chunk
    held += range(g.window_start(start), start)
    assert held == list(range(start))


@no_deadline
@given(geometries(), st.integers(0, 600))
def test_the_window_before_a_block_has_local_to_local_plus_chunk_minus_1_tokens(g: Geometry, start: int) -> None:
    window = start - g.window_start(start)
    assert window <= g.local + g.chunk - 1
    if g.selectable(start):
        assert window >= g.local


@pytest.mark.parametrize("sink", [0, 1, 32])
def test_the_first_chunk_becomes_selectable_at_the_exact_token(sink: int) -> None:
    g = make(sink=sink, local=5, chunk=4, select=2, block=8, queries=4, tail=2)
    first = sink + 4 + 5
    assert [g.selectable(start) for start in (0, sink, sink + 5, first - 1)] == [0, 0, 0, 0]
    assert [g.selectable(start) for start in (first, first + 3, first + 4)] == [1, 1, 2]


@no_deadline
@given(geometries(), st.integers(1, 700))
@example(make(sink=0, local=1, chunk=1, select=0, block=1, queries=1, tail=1), 1)
def test_the_schedule_is_blocks_then_the_tail_then_the_last_token(g: Geometry, n: int) -> None:
    blocks = g.schedule(n)
    assert [t for begin, end in blocks for t in range(begin, end)] == list(range(n))
    lengths = [end - begin for begin, end in blocks]
    assert lengths[-1] == 1
    assert all(1 <= length <= g.block for length in lengths)
    if n > 1:
        assert lengths[-2] == min(g.tail, n - 1)
        assert all(length == g.block for length in lengths[:-3])


def test_schedules_of_a_few_lengths() -> None:
    g = make(sink=32, local=100, chunk=32, select=4, block=1024, queries=16, tail=64)
    assert g.schedule(1) == [(0, 1)]
    assert g.schedule(2) == [(0, 1), (1, 2)]
    assert g.schedule(65) == [(0, 64), (64, 65)]
    assert g.schedule(66) == [(0, 1), (1, 65), (65, 66)]
    assert g.schedule(1024 + 65) == [(0, 1024), (1024, 1088), (1088, 1089)]
    assert g.schedule(1024 + 66) == [(0, 1024), (1024, 1025), (1025, 1089), (1089, 1090)]


@no_deadline
@given(geometries(), st.integers(1, 64))
def test_every_query_of_a_block_of_up_to_64_chooses(g: Geometry, n: int) -> None:
    assert g.choosing(n) == list(range(n))


@no_deadline
@given(geometries(), st.integers(65, 2000))
def test_choosing_queries_are_the_last_of_evenly_spaced_stretches(g: Geometry, n: int) -> None:
    chosen = g.choosing(n)
    stretches = [b - a for a, b in zip([-1, *chosen], chosen, strict=False)]
    assert len(chosen) == g.queries
    assert chosen[-1] == n - 1
    assert max(stretches) - min(stretches) <= 1
    assert sum(stretches) == n


def test_choosing_queries_of_a_full_block() -> None:
    g = make(sink=32, local=100, chunk=32, select=4, block=1024, queries=16, tail=64)
    assert g.choosing(1024) == list(range(63, 1024, 64))


@no_deadline
@given(geometries(), st.integers(1, 500), st.integers(0, 900))
def test_no_block_attends_to_more_than_the_bound(g: Geometry, n: int, held: int) -> None:
    """Blocks of an append of n tokens to a sequence of ``held`` tokens."""
    for begin, end in g.schedule(n):
        start = held + begin
        tokens = set(range(min(g.sink, start)))
        for chunk in chunks_that_end_by(g, start)[: g.select]:
            tokens.update(chunk)
        last = chunks_that_end_by(g, start)[-1:]
        tokens.update(range(last[0].stop if last else g.sink, held + end))
        assert len(tokens) <= g.bound == g.max
        assert held + end - g.window_start(start) <= g.window_capacity


@no_deadline
@given(geometries())
def test_the_bound_is_reached(g: Geometry) -> None:
    assume(g.sink + g.select * g.chunk > 0)
    start = g.sink + g.select * g.chunk + g.local + g.chunk - 1
    length = g.sink + g.select * g.chunk + (start - g.window_start(start)) + g.block
    assert g.selectable(start) == g.select
    assert length == g.bound


@no_deadline
@given(geometries(), st.integers(0, 2000))
def test_the_attended_length_of_decode_moves_within_chunk_minus_1_tokens(g: Geometry, steps: int) -> None:
    first = g.sink + g.select * g.chunk + g.local + steps
    assume(g.selectable(first) >= g.select)
    lengths = [start - g.window_start(start) for start in range(first, first + 3 * g.chunk)]
    assert max(lengths) - min(lengths) == g.chunk - 1


def refused(*parts: str) -> Any:
    """``pytest.raises`` for a message that holds the parts, literally and in this order."""
    return pytest.raises(ConfigError, match="(?s)" + ".*".join(map(re.escape, parts)))


def geometry(window: int, **keys: Any) -> Geometry:
    """Resolve attention keys, and prefill's block, queries and tail."""
    prefill = {key: keys.pop(key) for key in ("block", "queries", "tail") if key in keys}
    return resolve_geometry(Config.load({"attention": keys, "prefill": prefill}), window)


class TestDefaultGeometry:
    @pytest.mark.parametrize(
        ("window", "expected"),
        [
            (8192, Geometry(8192, 32, 3553, 32, 111, 1024, 16, 64)),
            (131072, Geometry(8192, 32, 3553, 32, 111, 1024, 16, 64)),
            (4096, Geometry(4096, 32, 1761, 32, 55, 512, 16, 64)),
            (2048, Geometry(2048, 32, 865, 32, 27, 256, 16, 64)),
            (256, Geometry(256, 32, 97, 32, 2, 32, 16, 32)),
        ],
    )
    def test_values(self, window: int, expected: Geometry) -> None:
        assert resolve_geometry(Config(), window) == expected
        assert expected.bound == expected.max

    def test_a_given_max_moves_the_others(self) -> None:
        assert geometry(8192, max=2048) == resolve_geometry(Config(), 2048)

    def test_local_alone_leaves_the_rest_to_select(self) -> None:
        g = geometry(8192, local=1000)
        assert (g.local, g.select, g.bound) == (1000, (7105 - 1000) // 32, 8192 - (7105 - 1000) % 32)

    def test_select_alone_leaves_the_rest_to_local(self) -> None:
        g = geometry(8192, select=200)
        assert (g.local, g.select, g.bound) == (7105 - 6400, 200, 8192)

    def test_no_selection_on_purpose_is_silent(self) -> None:
        g = geometry(2048, select=0)
        assert (g.select, g.local) == (0, 2048 - 32 - 31 - 256)

    def test_no_sink_and_chunks_of_one_token(self) -> None:
        g = geometry(16, sink=0, chunk=1)
        assert g == Geometry(16, 0, 7, 1, 7, 2, 16, 2)

    def test_tail_follows_a_small_block(self) -> None:
        assert geometry(8192, block=10).tail == 10
        assert geometry(8192, block=10, tail=3).tail == 3

    @pytest.mark.parametrize("keys", [{}, {"local": 40}])
    def test_nothing_left_to_select_warns_once(self, keys: dict[str, int]) -> None:
        message = r"no chunk can be selected, sinks and window alone remain, with .attention. max 128, .*: raise"
        with pytest.warns(UserWarning, match=message) as caught:
            g = geometry(128, **keys)
        assert g.select == 0
        assert len(caught) == 1
        assert g.local == keys.get("local", 128 - 32 - 31 - 16)


class TestRefusedGeometry:
    def test_max_above_the_window(self) -> None:
        with refused("[attention] max = 8192 exceeds the model's trained window of 2048: lower it to 2048 or less"):
            geometry(2048, max=8192)

    def test_the_arithmetic(self) -> None:
        with refused(
            "sink 32 + select 111 x chunk 32 + local 5000 + chunk - 1 + block 1024 = 9639 > [attention] max "
            "8192; lower local to 3553 or select to 65"
        ):
            geometry(8192, select=111, local=5000)
        assert geometry(8192, select=111, local=3553).bound <= 8192
        assert geometry(8192, select=65, local=5000).bound <= 8192

    def test_max_can_be_raised_where_the_window_allows(self) -> None:
        with refused(
            "= 9639 > [attention] max 8192; lower local to 3553 or select to 65, ",
            "or raise max to 9639 with [prefill] block 1024",
        ):
            geometry(16384, select=111, local=5000)
        assert geometry(16384, select=111, local=5000, max=9639).bound == 9639

    def test_select_that_leaves_nothing_to_local(self) -> None:
        with refused(
            "sink 32 + select 300 x chunk 32 + local 1 + chunk - 1 + block 1024 = 10688 > [attention] max "
            "8192; lower select to 222"
        ):
            geometry(8192, select=300)
        assert geometry(8192, select=222).local == 1

    def test_local_that_leaves_nothing_to_select(self) -> None:
        with refused("select 0 x chunk 32 + local 8000 + chunk - 1 + block 1024 = 9087 > ", "lower local to 7105"):
            geometry(8192, local=8000)

    def test_a_window_that_sinks_and_a_chunk_fill(self) -> None:
        with refused(
            "sink 32 + select 0 x chunk 32 + local 1 + chunk - 1 + block 8 = 72 > [attention] max 64; "
            "lower sink, chunk or [prefill] block"
        ):
            geometry(64)

    def test_block_above_max(self) -> None:
        with refused("block 9000 = 9064 > [attention] max 8192; lower sink, chunk or [prefill] block"):
            geometry(8192, block=9000)

    def test_tail_above_block(self) -> None:
        with refused("[prefill] tail = 65 is longer than a block of 64 tokens: lower tail to 64 or less, or raise"):
            geometry(8192, block=64, tail=65)

    def test_the_local_window_of_reattention_holds_the_block(self) -> None:
        with refused(
            '[attention] method = "reattention" needs local >= [prefill] block (its local window contains the '
            "block), but local is 1000 and block is 1024: "
            "raise local to 1024, or lower block to 1000"
        ):
            geometry(8192, method="reattention", local=1000)
        assert geometry(8192, method="reattention", local=1024).local == 1024
        assert geometry(8192, method="reattention", local=1000, block=1000).block == 1000


class TestGeometryProperties:
    @no_deadline
    @given(
        window=st.integers(1, 20000),
        keys=st.fixed_dictionaries(
            {},
            optional={
                "max": st.integers(1, 20000),
                "sink": st.integers(0, 300),
                "local": st.integers(1, 9000),
                "chunk": st.integers(1, 300),
                "select": st.integers(0, 300),
                "block": st.integers(1, 3000),
                "tail": st.integers(1, 100),
            },
        ),
    )
    def test_what_is_not_refused_fits_and_is_reproduced_by_its_own_values(
        self, window: int, keys: dict[str, int]
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing left to select is tested above
            try:
                g = geometry(window, **keys)
            except ConfigError:
                assume(False)
        values = dataclasses.asdict(g)
        assert values.items() >= keys.items()
        assert g.sink + g.select * g.chunk + g.local + g.chunk - 1 + g.block <= g.max <= window
        assert g.local >= 1
        assert 1 <= g.tail <= g.block
        assert geometry(window, **values) == g

    @no_deadline
    @given(st.integers(256, 20000))
    def test_half_of_the_rest_is_selected_and_nothing_is_wasted(self, window: int) -> None:
        g = resolve_geometry(Config(), window)
        rest = g.max - 32 - 31 - g.block
        assert g.bound == g.max == min(window, 8192)
        assert rest / 2 - 32 < g.select * 32 <= rest / 2
        assert g.local == rest - g.select * 32

    @no_deadline
    @given(window=st.integers(64, 20000), select=st.integers(0, 400), local=st.integers(1, 9000))
    def test_the_advice_of_a_refusal_is_accepted(self, window: int, select: int, local: int) -> None:
        try:
            geometry(window, select=select, local=local)
        except ConfigError as error:
            block = max(1, min(window, 8192) // 8)
            for key, value in re.findall(r"(local|select|max) to (\d+)", str(error)):
                geometry(window, **{"select": select, "local": local, "block": block, key: int(value)})
