"""The rules of quantization case by case, in numbers small enough to check by hand; for both implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from modelcask.quantize import QUANT_TYPES, QuantType, kernels, reference
from modelcask.quantize.arrays import BIT_DTYPES, Bits, Quantized

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
INF, NAN = np.inf, np.nan

Quantize = Callable[[QuantType, str, Bits], Quantized]


def by_kernels(qtype: QuantType, dtype: str, source: Bits) -> Quantized:
    into = Quantized.empty(qtype, dtype, source.shape)
    kernels.quantize_groups(qtype, dtype, source, into)
    return into


BOTH = pytest.mark.parametrize("quantize", [reference.quantize, by_kernels], ids=["reference", "kernels"])


def group(name: str, dtype: str, *first: float, fill: float = 0.0) -> Bits:
    """One group that starts with `first`."""
    values = np.full((1, QUANT_TYPES[name].group_size), fill, np.float32)
    values[0, : len(first)] = first
    with np.errstate(invalid="ignore"):
        return values.astype(FLOATS[dtype]).view(BIT_DTYPES[dtype])


def codes(name: str, quantized: Quantized, count: int) -> list[int]:
    octets: Any = quantized.packed.view(np.uint8).ravel()
    if QUANT_TYPES[name].bits == 4:
        octets = np.stack((octets & 15, octets >> 4), axis=1).ravel()
    return [int(each) for each in octets[:count]]


@BOTH
@pytest.mark.parametrize(
    ("first", "scale", "bias", "expected"),
    [
        # The edge is the maximum, so steps go down from it, and zero is one of them.
        ((1.5, 0.1), -0.1, 1.5, [0, 14, 15]),
        # The minimum is farther from zero, so steps go up from it.
        ((-1.5, 0.1), 0.1071428582072258, -1.5, [0, 15, 14]),
        # Equally far: the maximum.
        ((0.75, -0.75), -0.09375, 0.75, [0, 15, 8]),
        ((), -1e-7, 0.0, [0, 0, 0]),
        ((4e-8,), -1e-7, 0.0, [0, 0, 0]),
        # A range beyond float32.
        ((3e38, -3e38), -INF, 0.0, [0, 0, 0]),
    ],
)
def test_int4_scale_and_bias_fit_the_edge_farthest_from_zero(
    quantize: Quantize, first: tuple[float, ...], scale: float, bias: float, expected: list[int]
) -> None:
    made = quantize(QUANT_TYPES["int4"], "F32", group("int4", "F32", *first))
    assert made.biases is not None
    assert made.scales.view(np.float32)[0, 0] == np.float32(scale)
    assert made.biases.view(np.float32)[0, 0] == np.float32(bias)
    assert codes("int4", made, 3) == expected


@BOTH
@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize(
    ("values", "fill", "sign", "bias"),
    [
        ((INF, 1.0), 0.0, 1, INF),
        ((-INF, 1.0), 0.0, 1, -INF),
        ((INF, -INF), 0.0, 1, INF),
        ((NAN, -INF), 0.0, 1, -INF),
        ((), INF, 0, INF),
        ((NAN,), -INF, 0, -INF),
        ((), NAN, 1, -INF),
    ],
)
@pytest.mark.parametrize(("dtype", "nans"), [("F32", (0x7FC00000, 0xFFC00000)), ("F16", (0x7D00, 0xFD00))])
def test_affine_groups_with_an_infinity_have_a_nan_scale_and_codes_of_0(
    quantize: Quantize,
    name: str,
    values: tuple[float, ...],
    fill: float,
    sign: int,
    bias: float,
    dtype: str,
    nans: tuple[int, int],
) -> None:
    made = quantize(QUANT_TYPES[name], dtype, group(name, dtype, *values, fill=fill))
    assert made.biases is not None
    assert made.scales[0, 0] == nans[sign]
    assert made.biases.view(FLOATS[dtype])[0, 0] == bias
    assert not made.packed.any()


@BOTH
def test_a_nan_among_finite_numbers_only_gets_code_0(quantize: Quantize) -> None:
    with_nan = quantize(QUANT_TYPES["int4"], "BF16", group("int4", "BF16", 1.5, -1.0, NAN))
    without = quantize(QUANT_TYPES["int4"], "BF16", group("int4", "BF16", 1.5, -1.0, 1.5))
    np.testing.assert_array_equal(with_nan.scales, without.scales)
    np.testing.assert_array_equal(with_nan.packed, without.packed)


@BOTH
def test_nvfp4_ties_go_to_the_smaller_magnitude_and_zero_has_no_sign(quantize: Quantize) -> None:
    ties = (6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -5.0, -0.0)
    made = quantize(QUANT_TYPES["nvfp4"], "F32", group("nvfp4", "F32", *ties))
    assert made.scales[0, 0] == 0x38  # 1.0
    assert codes("nvfp4", made, 12) == [7, 0, 1, 2, 3, 4, 5, 6, 0, 9, 14, 0]


@BOTH
def test_nvfp4_scales_saturate_at_448_and_vanish_below_half_of_the_smallest(quantize: Quantize) -> None:
    large = quantize(QUANT_TYPES["nvfp4"], "F32", group("nvfp4", "F32", 1e6, 3e38, 448.0, INF, NAN))
    assert large.scales[0, 0] == 0x7E
    # 3e38 / 448 is so large that its distances to 0 and to 6 round to the same number: the first one wins.
    assert codes("nvfp4", large, 5) == [7, 0, 2, 0, 0]
    small = quantize(QUANT_TYPES["nvfp4"], "F32", group("nvfp4", "F32", 6 * 2.0**-10, -1e-5))
    assert small.scales[0, 0] == 0
    assert codes("nvfp4", small, 2) == [0, 0]


@BOTH
@pytest.mark.parametrize(
    ("peak", "scale"),
    [(448.0, 127), (448.1, 128), (224.0, 126), (0.0, 127), (448 * 2.0**-127, 0), (448 * 2.0**-128, 255)],
)
def test_mxfp8_scale_is_the_next_power_of_two_that_fits(quantize: Quantize, peak: float, scale: int) -> None:
    """The last one is MLX's wrap-around: 2^-128 has no E8M0 code, and the low eight bits of -1 are 255."""
    made = quantize(QUANT_TYPES["mxfp8"], "F32", group("mxfp8", "F32", peak))
    assert made.scales[0, 0] == scale


@BOTH
@pytest.mark.parametrize(
    ("dtype", "scale", "expected"),
    [
        ("F32", 0x80, [0x7E, 0xFE, 0xFE, 0xFE, 0x7E, 0xFE]),
        ("F16", 0x00, [0x7E, 0xFE, 0xFE, 0xFE, 0x7E, 0xFE]),
        ("BF16", 0x00, [0x7E, 0xFE, 0x7E, 0x7E, 0x7E, 0x7E]),
    ],
)
def test_mxfp8_groups_with_an_infinity_are_all_448(
    quantize: Quantize, dtype: str, scale: int, expected: list[int]
) -> None:
    source = group("mxfp8", dtype, INF, -1.0, 0.0, -0.0, NAN, -NAN)
    made = quantize(QUANT_TYPES["mxfp8"], dtype, source)
    assert made.scales[0, 0] == scale
    assert codes("mxfp8", made, 6) == expected


def test_dequantized_numbers_are_rounded_once() -> None:
    """130.0078 + 0.496 is 131 in BF16; with the product rounded to BF16 first it would be 130."""
    qtype = QUANT_TYPES["int8"]
    scale, bias = (np.array([[value]], ml_dtypes.bfloat16).view(np.uint16) for value in (1.0078125, 0.49609375))
    quantized = Quantized(np.full((1, 16), 0x81818181, np.uint32), scale, bias)
    out = np.empty((1, 64), np.uint16)
    kernels.dequantize_groups(qtype, "BF16", quantized, out)
    assert (out.view(ml_dtypes.bfloat16) == 131).all()
    np.testing.assert_array_equal(reference.dequantize(qtype, "BF16", quantized), out)
