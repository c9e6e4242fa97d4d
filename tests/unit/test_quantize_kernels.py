"""What callers of the kernels may count on besides the bits themselves."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from modelcask.quantize import QUANT_TYPES, QuantType, compiled, kernels, reference
from modelcask.quantize.arrays import BIT_DTYPES, Bits, Quantized

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
EACH_TYPE = pytest.mark.parametrize("qtype", QUANT_TYPES.values(), ids=QUANT_TYPES)
EACH_DTYPE = pytest.mark.parametrize("dtype", FLOATS)


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


def weights(dtype: str, *shape: int) -> Bits:
    values = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    return values.astype(FLOATS[dtype]).view(BIT_DTYPES[dtype])


def as_float(dtype: str, bits: Bits) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    floats: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = bits.view(FLOATS[dtype]).astype(np.float64)
    return floats


def arrays(quantized: Quantized) -> list[Bits]:
    return [each for each in (quantized.packed, quantized.scales, quantized.biases) if each is not None]


def part(quantized: Quantized, qtype: QuantType, first: int, last: int) -> Quantized:
    """Groups `first` to `last`, as views."""
    words = qtype.group_size * qtype.bits // 32
    return Quantized(
        quantized.packed.reshape(-1)[first * words : last * words],
        quantized.scales.reshape(-1)[first:last],
        None if quantized.biases is None else quantized.biases.reshape(-1)[first:last],
    )


@EACH_TYPE
@EACH_DTYPE
def test_parallel_work_equals_serial_work(qtype: QuantType, dtype: str, executor: ThreadPoolExecutor) -> None:
    source = weights(dtype, 3, kernels.PIECE // 2 + qtype.group_size)
    serial, parallel = (Quantized.empty(qtype, dtype, source.shape) for _ in range(2))
    one = kernels.quantize_groups(qtype, dtype, source, serial)
    other = kernels.quantize_parallel(executor, qtype, dtype, source, parallel)
    assert one == other
    for expected, got in zip(arrays(serial), arrays(parallel), strict=True):
        np.testing.assert_array_equal(got, expected)
    if dtype == "BF16":  # once is enough to see that pieces are cut at the right places
        for expected, got in zip(arrays(reference.quantize(qtype, dtype, source)), arrays(serial), strict=True):
            np.testing.assert_array_equal(got, expected)

    first, second = np.empty_like(source), np.empty_like(source)
    kernels.dequantize_groups(qtype, dtype, serial, first)
    kernels.dequantize_parallel(executor, qtype, dtype, serial, second)
    np.testing.assert_array_equal(second, first)


@EACH_TYPE
def test_a_tensor_can_be_streamed_in_ranges_of_groups(qtype: QuantType) -> None:
    source = weights("BF16", 6, 1024)
    expected = reference.quantize(qtype, "BF16", source)
    restored = reference.dequantize(qtype, "BF16", expected).reshape(-1)
    into = Quantized.empty(qtype, "BF16", source.shape)
    out = np.empty(source.size, np.uint16)
    groups = source.size // qtype.group_size
    cuts = [0, 1, 2, 33, 34, groups - 1, groups]
    for first, last in itertools.pairwise(cuts):
        here = slice(first * qtype.group_size, last * qtype.group_size)
        range_of_groups = part(into, qtype, first, last)
        kernels.quantize_groups(qtype, "BF16", source.reshape(-1)[here], range_of_groups)
        kernels.dequantize_groups(qtype, "BF16", range_of_groups, out[here])
    for want, got in zip(arrays(expected), arrays(into), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(out, restored)


@EACH_TYPE
@EACH_DTYPE
def test_the_deviation_is_that_of_the_dequantized_tensor(qtype: QuantType, dtype: str) -> None:
    source = weights(dtype, 5, 4 * qtype.group_size)
    into = Quantized.empty(qtype, dtype, source.shape)
    deviation = kernels.quantize_groups(qtype, dtype, source, into)
    before = as_float(dtype, source)
    after = as_float(dtype, reference.dequantize(qtype, dtype, into))
    assert deviation.squared_error == pytest.approx(float(((after - before) ** 2).sum()), rel=1e-12)
    assert deviation.squared_source == pytest.approx(float((before**2).sum()), rel=1e-12)
    assert 0 < deviation.relative < 0.15


@EACH_TYPE
@EACH_DTYPE
def test_elements_that_are_not_finite_do_not_enter_the_deviation(qtype: QuantType, dtype: str) -> None:
    values = np.random.default_rng(7).standard_normal((4, 2 * qtype.group_size)).astype(np.float32)
    values[0, 0], values[1, 3], values[2, -1] = np.nan, np.inf, -np.inf
    source = values.astype(FLOATS[dtype]).view(BIT_DTYPES[dtype])
    into = Quantized.empty(qtype, dtype, source.shape)
    deviation = kernels.quantize_groups(qtype, dtype, source, into)
    before = as_float(dtype, source)
    after = as_float(dtype, reference.dequantize(qtype, dtype, into))
    with np.errstate(invalid="ignore"):
        errors = after - before
    counted = np.isfinite(errors)
    assert 0 < counted.sum() < counted.size
    assert deviation.squared_error == pytest.approx(float((errors[counted] ** 2).sum()), rel=1e-12)
    assert deviation.squared_source == pytest.approx(float((before[counted] ** 2).sum()), rel=1e-12)


def test_without_measuring_the_deviation_is_zero() -> None:
    qtype, source = QUANT_TYPES["int8"], weights("F16", 2, 64)
    into = Quantized.empty(qtype, "F16", source.shape)
    assert kernels.quantize_groups(qtype, "F16", source, into, measure=False) == kernels.Deviation(0, 0)


def test_deviations_add_up() -> None:
    total = kernels.Deviation(1, 9) + kernels.Deviation(3, 7)
    assert total == kernels.Deviation(4, 16)
    assert total.relative == 0.5
    assert kernels.Deviation().relative == 0
    assert kernels.Deviation(1, 0).relative == math.inf


@EACH_TYPE
def test_source_and_packed_words_may_lie_unaligned_and_read_only_in_a_file(qtype: QuantType) -> None:
    source = weights("F32", 4, 256)
    expected = reference.quantize(qtype, "F32", source)
    restored = reference.dequantize(qtype, "F32", expected)

    def shifted(array: Bits) -> Bits:
        return np.frombuffer(b"." + array.tobytes(), array.dtype, offset=1).reshape(array.shape)

    unaligned = shifted(source)
    assert not unaligned.flags.aligned
    assert not unaligned.flags.writeable
    into = Quantized.empty(qtype, "F32", source.shape)
    kernels.quantize_groups(qtype, "F32", unaligned, into)
    for want, got in zip(arrays(expected), arrays(into), strict=True):
        np.testing.assert_array_equal(got, want)
    out = np.empty_like(source)
    stored = Quantized(
        shifted(into.packed), shifted(into.scales), None if into.biases is None else shifted(into.biases)
    )
    kernels.dequantize_groups(qtype, "F32", stored, out)
    np.testing.assert_array_equal(out, restored)


@EACH_TYPE
def test_an_empty_tensor_packs_to_nothing(qtype: QuantType) -> None:
    source = np.empty((0, 64), np.uint16)
    into = Quantized.empty(qtype, "BF16", source.shape)
    assert kernels.quantize_groups(qtype, "BF16", source, into) == kernels.Deviation()
    kernels.dequantize_groups(qtype, "BF16", into, source)
    assert reference.quantize(qtype, "BF16", source).packed.shape == qtype.packed_shape(source.shape)


@EACH_TYPE
def test_one_compiled_function_serves_all_dtypes_and_callers(qtype: QuantType) -> None:
    for dtype in FLOATS:
        source = weights(dtype, 2, 64)
        into = Quantized.empty(qtype, dtype, source.shape)
        for view in (source, np.frombuffer(source.tobytes(), source.dtype)):
            kernels.quantize_groups(qtype, dtype, view, into)
            kernels.dequantize_groups(qtype, dtype, into, np.empty_like(source))
    assert len(getattr(compiled, f"quantize_{qtype.name}").signatures) == 1
    assert len(getattr(compiled, f"dequantize_{qtype.name}").signatures) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": np.empty(3, np.uint32)}, "packed has 12 bytes, but 4 int4 groups of BF16 take 64"),
        ({"scales": np.empty(4, np.uint32)}, "scales has 16 bytes, but 4 int4 groups of BF16 take 8"),
        ({"biases": None}, "biases has 0 bytes, but 4 int4 groups of BF16 take 8"),
        ({"packed": np.empty((16, 2), np.uint32)[:, 0]}, "packed is not contiguous"),
        ({"scales": np.frombuffer(bytes(8), np.uint16)}, "scales is read-only"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Bits | None], message: str) -> None:
    qtype, source = QUANT_TYPES["int4"], weights("BF16", 2, 64)
    into = dataclasses.replace(Quantized.empty(qtype, "BF16", source.shape), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        kernels.quantize_groups(qtype, "BF16", source, into)


def test_part_of_a_group_is_refused() -> None:
    qtype = QUANT_TYPES["int8"]
    with pytest.raises(ValueError, match="64 bytes of BF16 are no whole number of int8 groups"):
        kernels.quantize_groups(qtype, "BF16", weights("BF16", 1, 32), Quantized.empty(qtype, "BF16", (1, 64)))


def test_other_dtypes_are_refused() -> None:
    qtype = QUANT_TYPES["int8"]
    with pytest.raises(ValueError, match="dtype I64 cannot be quantized, only F32, F16, BF16"):
        kernels.quantize_groups(qtype, "I64", np.zeros(64, np.int64), Quantized.empty(qtype, "BF16", (1, 64)))


def test_kernels_compile_where_numba_finds_no_directory_for_its_cache() -> None:
    namespace: dict[str, Any] = {"entry": compiled._entry}
    # Code without a file has no place in numba's cache, which is what a read-only system looks like to it.
    exec("@entry\ndef double(x):\n    return 2 * x\n", namespace)
    assert namespace["double"](4) == 8
