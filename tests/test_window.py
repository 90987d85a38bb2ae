"""The window ring against a plain list of tokens, and windows parked on the host."""

import pytest
import torch
from engines import CPU, make_geometry
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.runtime.budget import Budget
from kvtier.runtime.errors import BudgetError
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.model import ModelShape
from kvtier.runtime.window import WindowRing, Windows

LAYERS, HEADS, DIM = 2, 3, 2


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    sizes = {name: draw(st.integers(1, 6)) for name in ("local", "chunk", "block")}
    return make_geometry(sink=draw(st.integers(0, 4)), select=1, queries=1, tail=1, **sizes)


def a_ring(geometry: Geometry) -> WindowRing:
    return WindowRing(geometry.sink, geometry.window_capacity, LAYERS, HEADS, DIM, torch.float32, CPU)


def tokens(begin: int, end: int, name: int = 0) -> torch.Tensor:
    """[2, L, N, n, D]: every number names its sequence, token, layer, head, dimension and K or V."""
    shape = (2, LAYERS, HEADS, DIM)
    place = torch.arange(torch.Size(shape).numel()).reshape(2, LAYERS, HEADS, 1, DIM)
    return (1000 * torch.arange(begin, end)[:, None] + 100_000 * name + place).float()


def write(ring: WindowRing, begin: int, end: int, name: int = 0) -> None:
    for layer, (k, v) in enumerate(tokens(begin, end, name).transpose(0, 1)):
        ring.write(layer, begin, k, v)


def assert_holds(ring: WindowRing, begin: int, end: int, name: int = 0) -> None:
    for layer, expected in enumerate(tokens(begin, end, name).transpose(0, 1)):
        out = torch.full((2, HEADS, end - begin, DIM), torch.nan)
        ring.read(layer, begin, end, out[0], out[1])
        assert torch.equal(out, expected)
        if end > begin:
            assert torch.equal(ring.tokens(layer, begin, end), expected)


def fill(ring: WindowRing, geometry: Geometry, sizes: list[int], name: int = 0) -> int:
    """Write blocks of these sizes, at most ``block``; returns the length."""
    length = 0
    for size in sizes:
        size = min(size, geometry.block)
        write(ring, length, length + size, name)
        length += size
    return length


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(geometries(), SIZES)
def test_sinks_and_the_newest_tokens_are_held(g: Geometry, sizes: list[int]) -> None:
    ring = a_ring(g)
    length = fill(ring, g, sizes)
    oldest = max(0, length - g.window_capacity)
    assert_holds(ring, 0, min(g.sink, length))
    for begin in range(max(oldest, min(g.sink, length)), length + 1):
        assert_holds(ring, begin, length)
    if length <= g.sink + g.window_capacity:
        assert_holds(ring, 0, length)


@settings(max_examples=60, deadline=None)
@given(geometries(), SIZES, st.integers(1, 6))
def test_a_block_needs_no_token_that_it_overwrites(g: Geometry, sizes: list[int], size: int) -> None:
    """What the window of a block holds before it is still there behind it."""
    ring = a_ring(g)
    length = fill(ring, g, sizes)
    end = length + min(size, g.block)
    write(ring, length, end)
    begin = min(g.window_start(length), end)
    assert_holds(ring, begin, end)


@settings(max_examples=60, deadline=None)
@given(geometries(), SIZES, SIZES)
def test_a_parked_ring_comes_back_after_another_sequence(g: Geometry, sizes: list[int], others: list[int]) -> None:
    ring = a_ring(g)
    length = fill(ring, g, sizes)
    begin = max(min(g.sink, length), length - g.window_capacity)
    parked = ring.park(begin, length)
    assert ring.parked_bytes(begin, length) == parked.nbytes == parked.sinks.nbytes + parked.tokens.nbytes
    fill(ring, g, others, name=1)
    for _ in range(2):  # immutable: forks load it again
        ring.load(parked)
        assert_holds(ring, 0, min(g.sink, length))
        assert_holds(ring, begin, length)
        write(ring, length, length + g.block, name=2)


def a_shape(n_layers: int, sliding: set[int], window: int | None) -> ModelShape:
    return ModelShape(n_layers, 2 * HEADS, HEADS, DIM, torch.float32, CPU, frozenset(sliding), window)


@pytest.mark.parametrize(("n_layers", "sliding"), [(2, set()), (3, {0}), (5, {0, 2, 3}), (2, {0, 1})])
def test_layers_have_places_in_the_ring_of_their_kind(n_layers: int, sliding: set[int]) -> None:
    g = make_geometry()
    shape = a_shape(n_layers, sliding, 5 if sliding else None)
    windows = Windows(shape, g)
    rings = [windows.sliding if layer in sliding else windows.full for layer in range(n_layers)]
    taken = list(zip(map(id, rings), windows.place, strict=True))
    assert len(set(taken)) == n_layers
    assert windows.full._data.shape[1] == n_layers - len(sliding)
    assert windows.sliding._data.shape[1] == len(sliding)
    assert Windows.bytes_needed(shape, g) == windows.full._data.nbytes + windows.sliding._data.nbytes


@pytest.mark.parametrize("length", [3, 9, 40])
@pytest.mark.parametrize("window", [1, 5, 30])
def test_parked_windows_hold_what_the_next_block_needs_and_one_token_more(length: int, window: int) -> None:
    g = make_geometry()
    shape = a_shape(2 * LAYERS, set(range(LAYERS)), window)
    windows, host = Windows(shape, g), Budget("host", 2**20)
    for begin in range(0, length, g.block):
        for ring in (windows.full, windows.sliding):
            write(ring, begin, min(begin + g.block, length))
    begin = min(g.window_start(length), length)
    parked = windows.park(begin, length, host)
    assert host.used_bytes == windows.parked_bytes(begin, length) == parked.full.nbytes + parked.sliding.nbytes
    assert host.used_bytes <= Windows.bytes_needed(shape, g)
    other = Windows(shape, g)
    other.load(parked)
    assert_holds(other.full, begin, length)
    oldest = max(0, length - window)  # the last token may be forgotten and fed again
    assert oldest <= shape.sliding_begin(max(0, length - 1))
    assert_holds(other.sliding, oldest, length)
    del parked
    assert host.used_bytes == 0


def test_the_smallest_budget_that_parks() -> None:
    g = make_geometry()
    windows = Windows(a_shape(LAYERS, set(), None), g)
    length = fill(windows.full, g, [8, 8, 8])
    needed = windows.parked_bytes(10, length)
    with pytest.raises(BudgetError, match=r"\[budget\] host .* window of a cache"):
        windows.park(10, length, Budget("host", needed - 1))
    host = Budget("host", needed)
    parked = windows.park(10, length, host)
    assert host.free_bytes == 0
    del parked
    assert host.free_bytes == needed


def test_more_tokens_than_the_ring_holds_is_a_bug_of_the_caller() -> None:
    g = make_geometry()
    with pytest.raises(AssertionError, match="more tokens"):
        a_ring(g).tokens(0, g.sink, g.sink + g.window_capacity + 1)
