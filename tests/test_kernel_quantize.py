"""kernels/quantize.py: records of chunks, in torch and in Triton, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import quantize
from kvtier.kernels.backend import INTERPRETED
from kvtier.kernels.quantize import (
    GROUP,
    dequantize_chunks,
    dequantize_chunks_triton,
    quantize_chunks,
    quantize_chunks_triton,
    record_bytes,
    record_words,
)

CUDA = torch.cuda.is_available()
if INTERPRETED:
    from interpreter import repair

    repair()

BITS = [4, 8]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(32, 64), (8, 80), (16, 96), (5, 6), (1, 33)]
BIG = [(32, 128), (64, 128), (32, 256)]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def some_chunks(n, chunk, dim, dtype=torch.float32, seed=0):
    """Channels of unequal size and offset, one of them constant."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, chunk, dim, generator=random) * torch.randn(dim, generator=random).exp()
    x += torch.randn(dim, generator=random)
    x[0, 0, :, dim // 2] = 5.3
    return x.to(dtype)


# -- torch -------------------------------------------------------------------------------------------------------------


def test_a_record_takes_five_bits_a_value_of_the_usual_shapes():
    assert record_bytes(32, 64, 4) == 2 * 32 * 64 * 5 // 8
    assert record_bytes(32, 128, 4) == 2 * 32 * 128 * 5 // 8
    assert record_bytes(32, 128, 8) == 2 * 32 * 128 * 9 // 8


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("chunk", "dim"), SHAPES)
def test_a_record_is_within_half_a_step(bits, chunk, dim):
    x = some_chunks(3, chunk, dim)
    back = dequantize_chunks(quantize_chunks(x, bits), bits, chunk, dim, torch.float32)
    top = (1 << bits) - 1
    reach = torch.empty_like(x)
    reach[:, 0] = (x[:, 0].amax(1, keepdim=True) - x[:, 0].amin(1, keepdim=True)).expand(-1, chunk, -1)
    for begin in range(0, dim, GROUP):
        group = x[:, 1, :, begin : begin + GROUP]
        reach[:, 1, :, begin : begin + GROUP] = group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)
    # half a step; step and zero are rounded to 8 bits, which can leave the largest codes short
    allowed = reach / top / 2 + (reach + x.abs()) / 256
    assert ((back - x).abs() <= allowed).all()


def test_the_layout_of_a_record():
    chunk, dim = 2, 4
    x = torch.zeros(1, 2, chunk, dim)
    x[0, 0, :, 1] = torch.tensor([1.0, 16.0])  # step 1, zero 1
    x[0, 1, 0] = torch.tensor([-8.0, 7.0, 0.0, 0.0])  # step 1, zero -8
    record = quantize_chunks(x, 4)[0]
    assert record.shape == (16 + 4 * (dim + chunk) + 8,)
    assert record[:8].tolist() == [0 * 16 + 0, 15 * 16 + 0, 8 * 16, 8 * 16, 0, 15, 0, 0]
    assert record[8:16].tolist() == [0] * 8
    pairs = record[16:40].view(torch.bfloat16).view(-1, 2)
    assert pairs[1].tolist() == [1.0, 1.0]
    assert pairs[4].tolist() == [1.0, -8.0]
    assert pairs[[0, 2, 3, 5]].abs().sum() == 0
    assert record[40:].tolist() == [0] * 8


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_and_empty_chunks(bits, dtype):
    for value in (0.0, -0.0, 1.5, -3.0):
        x = torch.full((2, 2, 8, 40), value, dtype=dtype)
        assert torch.equal(dequantize_chunks(quantize_chunks(x, bits), bits, 8, 40, dtype), x)
    none = quantize_chunks(torch.empty(0, 2, 8, 40, dtype=dtype), bits)
    assert dequantize_chunks(none, bits, 8, 40, dtype).shape == (0, 2, 8, 40)


NUMPY_WARNS = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in the interpreter
NOT_FINITE = [torch.nan, torch.inf, -torch.inf]


def spoiled(x, place, value):
    """``x`` with ``value`` at ``place`` (K or V, token, channel) of its first chunk; what shares a pair with it."""
    x, mask = x.clone(), torch.zeros_like(x, dtype=torch.bool)
    what, token, channel = place
    x[0, what, token, channel] = value
    group = channel // GROUP * GROUP
    mask[(0, 0, slice(None), channel) if what == 0 else (0, 1, token, slice(group, group + GROUP))] = True
    return x, mask


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("place", [(0, 0, 0), (0, 7, 39), (1, 3, 0), (1, 0, 31), (1, 7, 39)])
def test_what_is_not_finite_does_not_become_finite(bits, dtype, value, place):
    """Nor does it spoil more than its own pair."""
    whole = some_chunks(2, 8, 40, dtype)
    x, mask = spoiled(whole, place, value)
    back = dequantize_chunks(quantize_chunks(x, bits), bits, 8, 40, dtype)
    assert not back[mask].isfinite().any()
    expected = dequantize_chunks(quantize_chunks(whole, bits), bits, 8, 40, dtype)
    assert torch.equal(back[~mask], expected[~mask])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_chunks_of_nothing_finite(bits, value):
    x = torch.full((1, 2, 8, 40), value)
    assert not dequantize_chunks(quantize_chunks(x, bits), bits, 8, 40, x.dtype).isfinite().any()


# -- Triton ------------------------------------------------------------------------------------------------------------


def check_both_ways(x, bits, device):
    _, _, chunk, dim = x.shape
    records = quantize_chunks(x, bits)
    out = torch.full_like(records, 0xA5, device=device)
    quantize_chunks_triton(x.to(device), bits, out)
    assert torch.equal(one_nan(out.cpu(), chunk, dim, bits), one_nan(records, chunk, dim, bits))
    back = torch.full_like(x, 77.0, device=device)
    dequantize_chunks_triton(out, bits, back)
    expected = dequantize_chunks(records, bits, chunk, dim, x.dtype)
    torch.testing.assert_close(back.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def one_nan(records, chunk, dim, bits):
    """Records with the same bits for every NaN among their words."""
    records, words = records.clone(), record_words(chunk, dim, bits)
    values = records[:, words].contiguous().view(torch.bfloat16)
    records[:, words] = torch.where(values.isnan(), torch.nan, values).view(torch.uint8)
    return records


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("chunk", "dim"), SHAPES)
def test_triton_agrees_bit_for_bit(device, bits, chunk, dim, dtype):
    check_both_ways(some_chunks(2, chunk, dim, dtype), bits, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", NOT_FINITE)
@NUMPY_WARNS
def test_triton_agrees_on_what_is_not_finite(device, bits, value, dtype):
    x = some_chunks(1, 8, 40, dtype)
    for place in [(0, 0, 0), (0, 7, 39), (1, 3, 0), (1, 0, 31), (1, 7, 39)]:
        x, _ = spoiled(x, place, value)
    check_both_ways(torch.cat([x, torch.full_like(x, value)]), bits, device)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pattern", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000])
@NUMPY_WARNS
def test_triton_agrees_on_every_nan(device, bits, pattern):
    """The hardware makes 0x7fffffff; rounded like a number it would be zero."""
    x = some_chunks(2, 8, 40)
    x.view(torch.int32)[0, 0, 3, 5] = x.view(torch.int32)[1, 1, 3, 5] = pattern
    check_both_ways(x, bits, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("chunk", "dim"), BIG)
def test_triton_agrees_on_big_chunks(device, bits, chunk, dim, dtype):
    check_both_ways(some_chunks(2, chunk, dim, dtype), bits, device)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_agrees_on_many_chunks(bits, dtype):
    for chunk, dim in (*SHAPES, *BIG, (128, 128)):
        check_both_ways(some_chunks(300, chunk, dim, dtype), bits, "cuda")
    check_both_ways(some_chunks(300, 32, 128, dtype) * 1e-3, bits, "cuda")


@settings(max_examples=20, deadline=None)
@given(
    chunk=st.integers(1, 9),
    dim=st.integers(1, 70),
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_triton_agrees_on_any_shape(chunk, dim, bits, dtype, scale, seed):
    check_both_ways((some_chunks(1, chunk, dim, torch.float32, seed) * scale).to(dtype), bits, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_one_compiled_variant_for_any_number_of_chunks():
    before = None
    for n in range(1, 21):
        check_both_ways(some_chunks(n, 16, 64), 4, "cuda")
        variants = [len(k.device_caches[0][0]) for k in (quantize.quantize_kernel, quantize.dequantize_kernel)]
        before = before or variants
        assert variants == before
