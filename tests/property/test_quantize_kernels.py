"""Kernels, reference and MLX make the same bits of every input, whatever its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcask.quantize import QUANT_TYPES, QuantType, kernels, reference
from modelcask.quantize.arrays import BIT_DTYPES, Bits, Quantized

DTYPES = ("F32", "F16", "BF16")
EXPONENT_AND_FRACTION_BITS = {"F32": (8, 23), "F16": (5, 10), "BF16": (8, 7)}
KINDS = ("raw", "finite", "one binade", "few binades", "subnormal", "short", "near a power", "constant", "telling")

EACH_TYPE = pytest.mark.parametrize("qtype", QUANT_TYPES.values(), ids=QUANT_TYPES)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def telling_bits(dtype: str) -> list[int]:
    """Both signs of: zero, subnormals, one and its neighbours, the largest, infinity, NaNs quiet and not."""
    exponent, fraction = EXPONENT_AND_FRACTION_BITS[dtype]
    infinity = ((1 << exponent) - 1) << fraction
    one = ((1 << (exponent - 1)) - 1) << fraction
    positive = [0, 1, (1 << fraction) - 1, 1 << fraction, one - 1, one, one + 1, infinity - 1]
    positive += [infinity, infinity + 1, infinity + (1 << (fraction - 1)), infinity + (1 << fraction) - 1]
    sign = 1 << (exponent + fraction)
    return [each | sign * negative for each in positive for negative in (0, 1)]


@st.composite
def drawn_rows(draw: st.DrawFn, dtype: str, group: int) -> Bits:
    """A few groups, element by element, so that a failure shrinks to the elements that matter."""
    width = 32 if dtype == "F32" else 16
    element = st.sampled_from(telling_bits(dtype)) | st.integers(0, 2**width - 1)
    shape = draw(st.sampled_from([(1, group), (1, 2 * group), (3, group), (2, 1, group)]))
    sparse = draw(st.dictionaries(st.integers(0, int(np.prod(shape)) - 1), element, max_size=12))
    bits = np.full(int(np.prod(shape)), draw(element), BIT_DTYPES[dtype])
    for index, value in sparse.items():
        bits[index] = value
    return bits.reshape(shape)


def made_rows(dtype: str, group: int, kind: str, seed: int, groups: int = 400) -> Bits:
    """Many groups of one kind: what random draws would seldom find."""
    exponent_bits, fraction_bits = EXPONENT_AND_FRACTION_BITS[dtype]
    rng = np.random.default_rng(seed)
    shape = (groups, group)
    if kind == "telling":  # each group made of one to three of the telling bits
        palette = rng.choice(telling_bits(dtype), (groups, 3))
        chosen = rng.integers(0, rng.integers(1, 4, (groups, 1)), shape)
        return np.take_along_axis(palette, chosen, axis=1).astype(BIT_DTYPES[dtype])
    sign = rng.integers(0, 2, shape)
    fraction = rng.integers(0, 1 << fraction_bits, shape)
    largest = (1 << exponent_bits) - 2
    base = rng.integers(0, largest + 1, (groups, 1))
    spread = {"one binade": 1, "few binades": 12, "short": 3, "near a power": 2}.get(kind, 1)
    exponent = np.maximum(base - rng.integers(0, spread, shape), 0)
    match kind:
        case "raw":
            exponent = rng.integers(0, largest + 2, shape)
        case "finite":
            exponent = rng.integers(0, largest + 1, shape)
        case "subnormal":
            exponent = rng.integers(0, 2, shape)
        case "short":  # few significant bits: exact ties between steps
            fraction &= 7 << (fraction_bits - 3)
        case "near a power":  # of 448 or 6: the scale is about to change
            fraction = (3 << (fraction_bits - 2)) * rng.integers(0, 2, (groups, 1)) + rng.integers(-3, 4, shape)
            fraction &= (1 << fraction_bits) - 1
        case "constant":
            fraction, exponent, sign = (np.broadcast_to(each[:, :1], shape) for each in (fraction, base, sign))
    bits: Bits = sign << (exponent_bits + fraction_bits) | exponent << fraction_bits | fraction
    return bits.astype(BIT_DTYPES[dtype])


def hostile(qtype: QuantType, dtype: str, seed: int, groups: int = 400) -> Quantized:
    """Packed words and scales that `quantize` never writes, such as NaN scales and NaN codes."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 1 << 32, (groups, qtype.group_size * qtype.bits // 32), dtype=np.uint32)
    if not qtype.has_bias:
        return Quantized(packed, rng.integers(0, 256, (groups, 1), dtype=np.uint8), None)
    scales, biases = (made_rows(dtype, 1, "raw", seed + each, groups) for each in (1, 2))
    return Quantized(packed, scales, biases)


def assert_same(got: Quantized, expected: Quantized) -> None:
    np.testing.assert_array_equal(got.scales, expected.scales)
    assert (got.biases is None) == (expected.biases is None)
    if got.biases is not None and expected.biases is not None:
        np.testing.assert_array_equal(got.biases, expected.biases)
    np.testing.assert_array_equal(got.packed, expected.packed)


def assert_kernels_equal_reference(qtype: QuantType, dtype: str, source: Bits) -> None:
    expected = reference.quantize(qtype, dtype, source)
    into = Quantized.empty(qtype, dtype, source.shape)
    kernels.quantize_groups(qtype, dtype, source, into)
    assert_same(into, expected)
    assert_dequantized_equal(qtype, dtype, expected)


def assert_dequantized_equal(qtype: QuantType, dtype: str, quantized: Quantized) -> None:
    expected = reference.dequantize(qtype, dtype, quantized)
    out = np.empty_like(expected)
    kernels.dequantize_groups(qtype, dtype, quantized, out)
    np.testing.assert_array_equal(out, expected)


@EACH_TYPE
@EACH_DTYPE
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_kernels_equal_the_reference_on_drawn_bits(qtype: QuantType, dtype: str, data: st.DataObject) -> None:
    assert_kernels_equal_reference(qtype, dtype, data.draw(drawn_rows(dtype, qtype.group_size)))


@EACH_TYPE
@EACH_DTYPE
@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32), groups=st.integers(1, 400))
def test_kernels_equal_the_reference_on_many_groups(
    qtype: QuantType, dtype: str, kind: str, seed: int, groups: int
) -> None:
    assert_kernels_equal_reference(qtype, dtype, made_rows(dtype, qtype.group_size, kind, seed, groups))


@EACH_TYPE
@EACH_DTYPE
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_kernels_dequantize_what_quantize_never_writes(qtype: QuantType, dtype: str, seed: int) -> None:
    assert_dequantized_equal(qtype, dtype, hostile(qtype, dtype, seed))


@EACH_TYPE
@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(["one binade", "few binades", "finite"]), seed=st.integers(0, 2**32))
def test_no_element_moves_farther_than_the_steps_of_its_type_allow(qtype: QuantType, kind: str, seed: int) -> None:
    """Holds the reference itself to something that does not come from MLX."""
    values = made_rows("F32", qtype.group_size, kind, seed).view(np.float32).astype(np.float64)
    values /= np.abs(values).max(axis=1, keepdims=True)
    source = values.astype(np.float32)
    quantized = reference.quantize(qtype, "F32", source.view(np.uint32))
    restored = reference.dequantize(qtype, "F32", quantized).view(np.float32).astype(np.float64)
    if qtype.mode == "affine":
        # Half a step; or a whole one at the end that the scale, fitted to the other end, does not reach.
        # Fitting widens the step by a fifteenth at most.
        allowed = np.ptp(values, axis=1, keepdims=True) / (2**qtype.bits - 1) * (1 + 1 / 15)
    elif qtype.mode == "nvfp4":
        # The widest step is from 4 to 6 of 6, and E4M3 rounds the scale by a sixteenth at most.
        allowed = np.full((len(values), 1), 1 / 6 * (1 + 1 / 16))
    else:
        # Half of an eighth of the element, or half of E4M3's smallest step; the scale is below 2 / 448.
        allowed = np.maximum(np.abs(values) / 16, 2.0**-10 * 2 / 448)
    assert (np.abs(restored - source) <= allowed + 1e-6).all()


@pytest.fixture(scope="session")
def mx() -> Any:
    core = pytest.importorskip("mlx.core", reason="compares with MLX itself: pip install mlx[cpu]")
    core.set_default_device(core.cpu)
    return core


def mlx_settings(qtype: QuantType) -> dict[str, Any]:
    return {"group_size": qtype.group_size, "bits": qtype.bits, "mode": qtype.mode}


def mlx_dtype(mx: Any, dtype: str) -> Any:
    return {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[dtype]


def mlx_bits(mx: Any, array: Any) -> Bits:
    if array.dtype == mx.float32:
        array = array.view(mx.uint32)
    elif array.dtype in (mx.float16, mx.bfloat16):
        array = array.view(mx.uint16)
    return np.array(array)


def mlx_quantize(mx: Any, qtype: QuantType, dtype: str, source: Bits) -> Quantized:
    made = mx.quantize(mx.array(source).view(mlx_dtype(mx, dtype)), **mlx_settings(qtype))
    packed, scales, *biases = (mlx_bits(mx, each) for each in made)
    return Quantized(packed, scales, biases[0] if biases else None)


def mlx_dequantize(mx: Any, qtype: QuantType, dtype: str, quantized: Quantized) -> Bits:
    """As the contract defines it: scales and biases to float32 first, the result cast to `dtype`."""
    parts = [quantized.scales] if quantized.biases is None else [quantized.scales, quantized.biases]
    wide = [mx.array(each) for each in parts]
    if qtype.has_bias:
        wide = [each.view(mlx_dtype(mx, dtype)).astype(mx.float32) for each in wide]
    restored = mx.dequantize(mx.array(quantized.packed), *wide, **mlx_settings(qtype), dtype=mx.float32)
    return mlx_bits(mx, restored.astype(mlx_dtype(mx, dtype)))


def row_for_mlx(qtype: QuantType) -> int:
    """MLX refuses an nvfp4 tensor that does not divide by 32 elements; ours has no such need."""
    return max(qtype.group_size, 32)


def assert_all_equal_mlx(mx: Any, qtype: QuantType, dtype: str, source: Bits) -> None:
    expected = mlx_quantize(mx, qtype, dtype, source)
    assert_same(reference.quantize(qtype, dtype, source), expected)
    into = Quantized.empty(qtype, dtype, source.shape)
    kernels.quantize_groups(qtype, dtype, source, into)
    assert_same(into, expected)
    assert_dequantized_equals_mlx(mx, qtype, dtype, expected)


def assert_dequantized_equals_mlx(mx: Any, qtype: QuantType, dtype: str, quantized: Quantized) -> None:
    expected = mlx_dequantize(mx, qtype, dtype, quantized)
    np.testing.assert_array_equal(reference.dequantize(qtype, dtype, quantized), expected)
    out = np.empty_like(expected)
    kernels.dequantize_groups(qtype, dtype, quantized, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.clients
@EACH_TYPE
@EACH_DTYPE
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_drawn_bits_are_quantized_as_mlx_does(mx: Any, qtype: QuantType, dtype: str, data: st.DataObject) -> None:
    assert_all_equal_mlx(mx, qtype, dtype, data.draw(drawn_rows(dtype, row_for_mlx(qtype))))


@pytest.mark.clients
@EACH_TYPE
@EACH_DTYPE
@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32), groups=st.integers(1, 400))
def test_many_groups_are_quantized_as_mlx_does(
    mx: Any, qtype: QuantType, dtype: str, kind: str, seed: int, groups: int
) -> None:
    assert_all_equal_mlx(mx, qtype, dtype, made_rows(dtype, row_for_mlx(qtype), kind, seed, groups))


@pytest.mark.clients
@EACH_TYPE
@EACH_DTYPE
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_what_quantize_never_writes_is_dequantized_as_mlx_does(
    mx: Any, qtype: QuantType, dtype: str, seed: int
) -> None:
    assert_dequantized_equals_mlx(mx, qtype, dtype, hostile(qtype, dtype, seed))
