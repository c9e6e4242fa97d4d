"""The compiled loops behind `kernels`. `reference` says what they compute; here is only how, and why so.

All of it is one module on purpose: numba notices a change of the file that holds the function it has cached,
not of files that function calls into.

Work goes tile by tile: 2048 elements, whose scratch copies stay in the L1 and L2 caches. The source is
widened to float32, so the source dtype is a runtime argument, branched on once a tile, and each quantization
type needs one compiled function in each direction. Arrays come in as bytes for the same reason.

Within a tile every loop is flat and as long as the tile allows, because LLVM unrolls loops over a group of
16 or 32 before it looks for vectors, and is left with scalar code (measured on an EPYC 9004: 1.1 ns an
element instead of 0.1). So peaks are folded pairwise over the whole tile, and what belongs to a group is
spread over its elements before it is used. Without fastmath LLVM may not reorder float comparisons, so
minima and maxima are taken of integers that order like the floats. Choices are written as selects, and
32-bit integers are cast back after each operation, as numba widens them to 64.

A group with anything that is not finite, or so extreme that a short cut fails, is done again, plainly, after
the tile's flat loops; they must only not trap on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from numba import types as nbtypes
from numba.extending import intrinsic

_Function = TypeVar("_Function", bound=Callable[..., Any])

if TYPE_CHECKING:

    def _inner(function: _Function) -> _Function: ...

    def _entry(function: _Function) -> _Function: ...

    def _bits(value: np.float32) -> np.uint32: ...

    def _float(bits: np.uint32) -> np.float32: ...

    def _repeat_16(value: np.float32, out: Floats, start: int) -> None: ...

else:
    from llvmlite import ir

    # error_model numpy: division by zero gives what IEEE 754 says, without a branch.
    _inner = numba.njit(nogil=True, error_model="numpy")

    def _entry(function):
        """Cached on disk, with all that it calls."""
        try:
            return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
        except RuntimeError:  # there is no directory for numba's cache that this user may write to
            return _inner(function)

    @intrinsic
    def _bits(_typing, _value):
        """A float32 as its bits, uint32."""

        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

        return nbtypes.uint32(nbtypes.float32), generate

    @intrinsic
    def _float(_typing, _bits):
        """The float32 that has these bits."""

        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

        return nbtypes.float32(nbtypes.uint32), generate

    @intrinsic
    def _repeat_16(_typing, _value, out, _start):
        """Store a float32 sixteen times, into `out` from `start` on.

        As one vector, because LLVM makes sixteen scalar stores of a loop (0.3 ns an element; so, 0.04).
        """

        def generate(context, builder, signature, arguments):
            value, array, start = arguments
            data = context.make_array(signature.args[1])(context, builder, array).data
            vector = ir.VectorType(ir.FloatType(), 16)
            lane = ir.Constant(ir.IntType(32), 0)
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, lane)
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16)
            repeated = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)
            pointer = builder.bitcast(builder.gep(data, [start]), vector.as_pointer())
            builder.store(repeated, pointer, align=4)
            return context.get_dummy_value()

        return nbtypes.void(nbtypes.float32, out, nbtypes.intp), generate


Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]
Keys = npt.NDArray[np.int32]

TILE = 2048
"""Elements worked on at a time; a multiple of every group size."""

F32, F16, BF16 = 0, 1, 2

_u8, _u16, _u32, _i32, _f32, _f64 = np.uint8, np.uint16, np.uint32, np.int32, np.float32, np.float64

_ABS = _u32(0x7FFFFFFF)
_INF = _u32(0x7F800000)
_NEGATIVE_NAN = _u32(0xFFC00000)  # what an invalid operation gives on x86
_POSITIVE_NAN = _u32(0x7FC00000)
_MAX_FINITE_KEY = _i32(0x7F7FFFFF)
_SMALLEST_SCALE = _f32(1e-7)
# Added to a number from -0.5 to 2^21, rounds it to nearest-even and leaves the integer in the low bits.
_ROUNDER = _f32(1.5 * 2**23)
# The bits of 2^28: ratios below 2^28 / 448 have exact distances to the E2M1 values, in each source dtype.
_MAX_PLAIN_PEAK = _u32((127 + 28) << 23)

LANES = 32
"""Partial sums of errors, kept apart so that they are added as vectors, in the same order on every CPU."""


@_inner
def _f16_to_f32(half: np.uint16) -> np.float32:
    magnitude = _u32(_u32(_u32(half) & _u32(0x7FFF)) << _u32(13))
    # F16's exponent read as float32's is 112 too small; the product also normalizes subnormals.
    scaled = _bits(_float(magnitude) * _f32(2.0**112))
    bits = _u32(magnitude | _INF) if magnitude >= _u32(0x0F800000) else scaled
    return _float(_u32(bits | _u32(_u32(_u32(half) & _u32(0x8000)) << _u32(16))))


@_inner
def _f32_to_f16(value: np.float32) -> np.uint16:
    bits = _bits(value)
    sign = _u32(_u32(bits >> _u32(16)) & _u32(0x8000))
    magnitude = _u32(bits & _ABS)
    odd = _u32(_u32(magnitude >> _u32(13)) & _u32(1))
    normal = _u32(_u32(_u32(magnitude + _u32(0xFFF)) + odd) - _u32(112 << 23)) >> _u32(13)
    # 0.5 has the step of F16's subnormals, 2^-24: the addition rounds to it.
    subnormal = _u32(_bits(_float(magnitude) + _f32(0.5)) - _u32(0x3F000000))
    half = subnormal if magnitude < _u32(0x38800000) else _u32(normal)
    half = _u32(0x7C00) if magnitude >= _u32(0x47800000) else half
    half = _u32(0x7D00) if magnitude > _INF else half
    return _u16(half | sign)


@_inner
def _bf16_to_f32(half: np.uint16) -> np.float32:
    return _float(_u32(_u32(half) << _u32(16)))


@_inner
def _f32_to_bf16(value: np.float32) -> np.uint16:
    bits = _bits(value)
    odd = _u32(_u32(bits >> _u32(16)) & _u32(1))
    rounded = _u32(_u32(_u32(bits + _u32(0x7FFF)) + odd) >> _u32(16))
    return _u16(_u32(0x7FC0) if _u32(bits & _ABS) > _INF else rounded)


@_inner
def _e4m3_to_f32(code: np.uint8) -> np.float32:
    low = _u32(_u32(code) & _u32(0x7F))
    # E4M3's exponent read as float32's is 120 too small; the product also normalizes subnormals.
    magnitude = _bits(_float(_u32(low << _u32(20))) * _f32(2.0**120))
    magnitude = _u32(0x7FF00000) if low == _u32(0x7F) else magnitude
    return _float(_u32(magnitude | _u32(_u32(_u32(code) & _u32(0x80)) << _u32(24))))


@_inner
def _f32_to_e4m3(value: np.float32) -> np.uint8:
    """Nearest-even, saturating; a NaN becomes ±448."""
    bits = _bits(value)
    magnitude = _u32(bits & _ABS)
    odd = _u32(_u32(magnitude >> _u32(20)) & _u32(1))
    normal = _u32(_u32(_u32(_u32(magnitude + _u32(0x7FFFF)) + odd) - _u32(120 << 23)) >> _u32(20))
    # 2^14 has the step of E4M3's subnormals, 2^-9: the addition rounds to it.
    subnormal = _u32(_bits(_float(magnitude) + _f32(2.0**14)) - _u32(141 << 23))
    code = subnormal if magnitude < _u32(121 << 23) else normal
    code = _u32(0x7E) if magnitude >= _u32(0x43E00000) else code
    return _u8(code | _u32(_u32(bits >> _u32(24)) & _u32(0x80)))


@_inner
def _e2m1_to_f32(code: np.uint8) -> np.float32:
    # As with E4M3: the three bits of exponent and fraction, in float32's places, are 126 too small.
    magnitude = _float(_u32(_u32(_u32(code) & _u32(7)) << _u32(22))) * _f32(2.0**126)
    return _float(_u32(_bits(magnitude) | _u32(_u32(_u32(code) & _u32(8)) << _u32(28))))


@_inner
def _e8m0_to_f32(scale: np.uint8) -> np.float32:
    # 255 shifts into float32's infinity, as MLX has it; 0 is the subnormal 2^-127.
    return _float(_u32(0x00400000) if scale == _u8(0) else _u32(_u32(scale) << _u32(23)))


@_inner
def _rounded(form: int, value: np.float32) -> np.float32:
    """`value` through the source dtype and back."""
    if form == BF16:
        return _bf16_to_f32(_f32_to_bf16(value))
    if form == F16:
        return _f16_to_f32(_f32_to_f16(value))
    return value


@_inner
def _load(form: int, source: Bytes, start: int, count: int, tile: Floats) -> None:
    """Widen elements `start … start + count` of `source` to float32."""
    if form == F32:
        wide = source.view(_f32)[start : start + count]
        for i in range(count):
            tile[i] = wide[i]
    elif form == F16:
        narrow = source.view(_u16)[start : start + count]
        for i in range(count):
            tile[i] = _f16_to_f32(narrow[i])
    else:
        narrow = source.view(_u16)[start : start + count]
        for i in range(count):
            tile[i] = _bf16_to_f32(narrow[i])


@_inner
def _store(form: int, tile: Floats, start: int, count: int, out: Bytes) -> None:
    """Round `count` elements of `tile` to the source dtype, into `out` from element `start` on."""
    if form == F32:
        wide = out.view(_f32)[start : start + count]
        for i in range(count):
            wide[i] = tile[i]
    elif form == F16:
        narrow = out.view(_u16)[start : start + count]
        for i in range(count):
            narrow[i] = _f32_to_f16(tile[i])
    else:
        narrow = out.view(_u16)[start : start + count]
        for i in range(count):
            narrow[i] = _f32_to_bf16(tile[i])


@_inner
def _round_tile(form: int, tile: Floats, count: int) -> None:
    """Round in place to the source dtype."""
    if form == F16:
        for i in range(count):
            tile[i] = _f16_to_f32(_f32_to_f16(tile[i]))
    elif form == BF16:
        for i in range(count):
            tile[i] = _bf16_to_f32(_f32_to_bf16(tile[i]))


@_inner
def _add_errors(form: int, source: Floats, restored: Floats, count: int, lanes: Doubles) -> None:
    """Add the squares of source - restored to `lanes[0]`, and of the source to `lanes[1]`.

    `restored` is rounded to the source dtype first. An element that is not finite in either is left out.
    """
    _round_tile(form, restored, count)
    errors, norms = lanes[0], lanes[1]
    for i in range(count // LANES):
        for lane in range(LANES):
            value = _f64(source[i * LANES + lane])
            error = _f64(restored[i * LANES + lane]) - value
            finite = error - error == _f64(0)
            errors[lane] += error * error if finite else _f64(0)
            norms[lane] += value * value if finite else _f64(0)
    for i in range(count - count % LANES, count):
        value = _f64(source[i])
        error = _f64(restored[i]) - value
        if error - error == _f64(0):
            errors[0] += error * error
            norms[0] += value * value


@_inner
def _pack_nibbles(codes: Bytes, count: int, packed: Bytes, start: int) -> None:
    """Two codes in a byte, the first one low."""
    pairs = codes.view(_u16)
    octets = packed[start : start + count // 2]
    for i in range(count // 2):
        pair = _u32(pairs[i])
        octets[i] = _u8(pair | _u32(pair >> _u32(4)))


@_inner
def _unpack_nibbles(packed: Bytes, start: int, count: int, codes: Bytes) -> None:
    pairs = codes.view(_u16)
    octets = packed[start : start + count // 2]
    for i in range(count // 2):
        pair = _u32(octets[i])
        pairs[i] = _u16(_u32(pair & _u32(0x0F)) | _u32(_u32(pair & _u32(0xF0)) << _u32(4)))


@_inner
def _spread(values: Floats, groups: int, group: int, out: Floats) -> None:
    """Repeat each of `values[:groups]` `group` times (a multiple of 16) into `out`."""
    for g in range(groups):
        for start in range(g * group, (g + 1) * group, 16):
            _repeat_16(values[g], out, start)


@_inner
def _ordered(bits: np.uint32) -> np.int32:
    """A signed integer that orders as the float does, NaNs outside the infinities. Its own inverse."""
    signed = _i32(bits)
    return _i32(signed ^ _i32(_i32(signed >> _i32(31)) & _i32(0x7FFFFFFF)))


@_inner
def _extremes(tile: Floats, count: int, group: int, lows: Keys, highs: Keys) -> None:
    """The minimum and maximum of each group, as `_ordered` keys, in the first elements of `lows`, `highs`."""
    count //= 2
    group //= 2
    for i in range(count):
        first, second = _ordered(_bits(tile[2 * i])), _ordered(_bits(tile[2 * i + 1]))
        lows[i] = first if first < second else second
        highs[i] = first if first > second else second
    while group > 1:
        count //= 2
        group //= 2
        for i in range(count):
            first, second = lows[2 * i], lows[2 * i + 1]
            lows[i] = first if first < second else second
        for i in range(count):
            first, second = highs[2 * i], highs[2 * i + 1]
            highs[i] = first if first > second else second


@_inner
def _affine_scale(low: np.float32, high: np.float32, top: np.float32) -> tuple[np.float32, np.float32]:
    """Scale and bias of a group with finite minimum and maximum."""
    low_is_edge = abs(low) > abs(high)
    scale = _f32(high - low) / top
    scale = _SMALLEST_SCALE if scale < _SMALLEST_SCALE else scale
    scale = scale if low_is_edge else -scale
    edge = low if low_is_edge else high
    steps = _f32(np.rint(edge / scale))
    fitted = steps != _f32(0)
    return edge / steps if fitted else scale, edge if fitted else _f32(0)


@_inner
def _affine_group_with_nonfinite(values: Floats, top: np.float32, codes: Bytes) -> tuple[np.float32, np.float32]:
    low, high = _f32(np.inf), _f32(-np.inf)
    for value in values:
        high = value if high < value else high
        low = value if value < low else low
    if low - low != _f32(0) or high - high != _f32(0):
        codes[:] = 0
        # Written out: the arithmetic would give the same, but only on x86, as CPUs differ in the sign of NaN.
        scale = _float(_POSITIVE_NAN) if low == high else _float(_NEGATIVE_NAN)
        return scale, low if abs(low) > abs(high) else high
    scale, bias = _affine_scale(low, high, top)
    for i in range(values.size):
        step = _f32(np.rint((values[i] - bias) / scale))
        codes[i] = _u8(min(max(step, _f32(0)), top)) if step == step else _u8(0)
    return scale, bias


def _affine_quantizer(group: int, bits: int) -> Callable[..., None]:
    top = _f32(2**bits - 1)

    @_entry
    def quantize(
        form: int, source: Bytes, packed: Bytes, scales: Bytes, biases: Bytes, measure: bool, lanes: Doubles
    ) -> None:
        tile, scratch = np.empty(TILE, _f32), np.empty(TILE, _f32)
        spread_scale, spread_bias = np.empty(TILE, _f32), np.empty(TILE, _f32)
        lows, highs = np.empty(TILE // 2, _i32), np.empty(TILE // 2, _i32)
        group_scale, group_bias = np.empty(TILE // group, _f32), np.empty(TILE // group, _f32)
        nibbles = np.empty(TILE, _u8)
        elements = source.size // (4 if form == F32 else 2)
        for start in range(0, elements, TILE):
            count = min(TILE, elements - start)
            groups = count // group
            first_group = start // group
            codes = nibbles if bits == 4 else packed[start : start + count]
            _load(form, source, start, count, tile)
            _extremes(tile, count, group, lows, highs)
            unusual = False
            for g in range(groups):
                unusual |= (highs[g] > _MAX_FINITE_KEY) | (lows[g] < ~_MAX_FINITE_KEY)
                low, high = _float(_u32(_ordered(_u32(lows[g])))), _float(_u32(_ordered(_u32(highs[g]))))
                group_scale[g], group_bias[g] = _affine_scale(low, high, top)
            _spread(group_scale, groups, group, spread_scale)
            _spread(group_bias, groups, group, spread_bias)
            for i in range(count):
                # At least -0.5, so only the top needs a limit: the edge is the minimum if the scale is
                # positive and the maximum if it is negative, or the bias is 0 and no step is farther off.
                step = (tile[i] - spread_bias[i]) / spread_scale[i]
                step = top if step > top else step
                codes[i] = _u8(_bits(step + _ROUNDER))
            if unusual:
                for g in range(groups):
                    if highs[g] > _MAX_FINITE_KEY or lows[g] < ~_MAX_FINITE_KEY:
                        here = slice(g * group, (g + 1) * group)
                        group_scale[g], group_bias[g] = _affine_group_with_nonfinite(tile[here], top, codes[here])
            if bits == 4:
                _pack_nibbles(codes, count, packed, start // 2)
            _store(form, group_scale, first_group, groups, scales)
            _store(form, group_bias, first_group, groups, biases)
            if measure:
                _load(form, scales, first_group, groups, group_scale)
                _load(form, biases, first_group, groups, group_bias)
                _spread(group_scale, groups, group, spread_scale)
                _spread(group_bias, groups, group, spread_bias)
                _restore_affine(codes, spread_scale, spread_bias, count, scratch)
                _add_errors(form, tile, scratch, count, lanes)

    return quantize


@_inner
def _restore_affine(codes: Bytes, scales: Floats, biases: Floats, count: int, tile: Floats) -> None:
    for i in range(count):
        # Two roundings: LLVM contracts a product and a sum into one only under fastmath.
        tile[i] = _f32(codes[i]) * scales[i] + biases[i]


def _affine_dequantizer(group: int, bits: int) -> Callable[..., None]:
    @_entry
    def dequantize(form: int, packed: Bytes, scales: Bytes, biases: Bytes, out: Bytes) -> None:
        tile = np.empty(TILE, _f32)
        spread_scale, spread_bias = np.empty(TILE, _f32), np.empty(TILE, _f32)
        group_scale, group_bias = np.empty(TILE // group, _f32), np.empty(TILE // group, _f32)
        nibbles = np.empty(TILE, _u8)
        elements = out.size // (4 if form == F32 else 2)
        for start in range(0, elements, TILE):
            count = min(TILE, elements - start)
            groups = count // group
            if bits == 4:
                _unpack_nibbles(packed, start // 2, count, nibbles)
            codes = nibbles if bits == 4 else packed[start : start + count]
            _load(form, scales, start // group, groups, group_scale)
            _load(form, biases, start // group, groups, group_bias)
            _spread(group_scale, groups, group, spread_scale)
            _spread(group_bias, groups, group, spread_bias)
            _restore_affine(codes, spread_scale, spread_bias, count, tile)
            _store(form, tile, start, count, out)

    return dequantize


quantize_int4 = _affine_quantizer(32, 4)
quantize_int8 = _affine_quantizer(64, 8)
dequantize_int4 = _affine_dequantizer(32, 4)
dequantize_int8 = _affine_dequantizer(64, 8)


@_inner
def _peaks(tile: Floats, count: int, group: int, peaks: Words) -> None:
    """The largest magnitude of each group as bits, in the first elements; above `_INF` if it holds a NaN."""
    count //= 2
    group //= 2
    for i in range(count):
        first, second = _u32(_bits(tile[2 * i]) & _ABS), _u32(_bits(tile[2 * i + 1]) & _ABS)
        peaks[i] = first if first > second else second
    while group > 1:
        count //= 2
        group //= 2
        for i in range(count):
            first, second = peaks[2 * i], peaks[2 * i + 1]
            peaks[i] = first if first > second else second


@_inner
def _nearest_e2m1(ratio: np.float32) -> np.uint8:
    """The first of the sixteen values at the least distance in float32, as MLX searches for it."""
    nearest, least = _u8(0), abs(ratio)
    for code in range(1, 16):
        distance = abs(ratio - _e2m1_to_f32(_u8(code)))
        if distance < least:
            nearest, least = _u8(code), distance
    return nearest


@_entry
def quantize_nvfp4(
    form: int, source: Bytes, packed: Bytes, scales: Bytes, _biases: Bytes, measure: bool, lanes: Doubles
) -> None:
    group = 16
    tile, scratch, spread_scale = np.empty(TILE, _f32), np.empty(TILE, _f32), np.empty(TILE, _f32)
    group_scale = np.empty(TILE // group, _f32)
    peaks = np.empty(TILE // 2, _u32)
    codes = np.empty(TILE, _u8)
    elements = source.size // (4 if form == F32 else 2)
    for start in range(0, elements, TILE):
        count = min(TILE, elements - start)
        groups = count // group
        scale_codes = scales[start // group : start // group + groups]
        _load(form, source, start, count, tile)
        _peaks(tile, count, group, peaks)
        for g in range(groups):
            scratch[g] = _float(peaks[g]) / _f32(6)
        _round_tile(form, scratch, groups)
        unusual = False
        for g in range(groups):
            unusual |= peaks[g] > _MAX_PLAIN_PEAK
            # The sign of a NaN is not taken over.
            scale_codes[g] = _u8(_f32_to_e4m3(scratch[g]) & _u8(0x7F))
            scale = _e4m3_to_f32(scale_codes[g])
            # All codes of a group with scale 0 are 0, as MLX finds every value equally far from x / 0.
            group_scale[g] = _f32(np.inf) if scale == _f32(0) else scale
        _spread(group_scale, groups, group, spread_scale)
        for i in range(count):
            bits = _bits(tile[i] / spread_scale[i])
            ratio = _float(_u32(bits & _ABS))
            # Ties go to the smaller magnitude, and what that makes zero has no sign. MLX rounds the ratio to
            # the source dtype first. That changes no code: a midpoint times the scale has at most 7 bits, so
            # it is a number of each source dtype, and the next one above it has a ratio that is more than
            # half a step of the dtype above the midpoint, which rounding cannot bring down to it.
            code = _u32(1) if ratio > _f32(0.25) else _u32(0)
            code = _u32(2) if ratio > _f32(0.75) else code
            code = _u32(3) if ratio > _f32(1.25) else code
            code = _u32(4) if ratio > _f32(1.75) else code
            code = _u32(5) if ratio > _f32(2.5) else code
            code = _u32(6) if ratio > _f32(3.5) else code
            code = _u32(7) if ratio > _f32(5) else code
            sign = _u32(_u32(bits >> _u32(28)) & _u32(8)) if ratio > _f32(0.25) else _u32(0)
            codes[i] = _u8(code | sign)
        if unusual:
            for g in range(groups):
                if peaks[g] > _MAX_PLAIN_PEAK:
                    for i in range(g * group, (g + 1) * group):
                        codes[i] = _nearest_e2m1(_rounded(form, tile[i] / group_scale[g]))
        _pack_nibbles(codes, count, packed, start // 2)
        if measure:
            _restore_nvfp4(codes, scale_codes, count, group_scale, spread_scale)
            # Not rounded: a product of E2M1 and E4M3 has six bits and is exact in F16 and BF16.
            _add_errors(F32, tile, spread_scale, count, lanes)


@_inner
def _restore_nvfp4(codes: Bytes, scale_codes: Bytes, count: int, group_scale: Floats, tile: Floats) -> None:
    for g in range(count // 16):
        group_scale[g] = _e4m3_to_f32(scale_codes[g])
    _spread(group_scale, count // 16, 16, tile)
    for i in range(count):
        tile[i] = _e2m1_to_f32(codes[i]) * tile[i]


@_entry
def dequantize_nvfp4(form: int, packed: Bytes, scales: Bytes, _biases: Bytes, out: Bytes) -> None:
    tile, group_scale = np.empty(TILE, _f32), np.empty(TILE // 16, _f32)
    codes = np.empty(TILE, _u8)
    elements = out.size // (4 if form == F32 else 2)
    for start in range(0, elements, TILE):
        count = min(TILE, elements - start)
        _unpack_nibbles(packed, start // 2, count, codes)
        scale_codes = scales[start // 16 : (start + count) // 16]
        _restore_nvfp4(codes, scale_codes, count, group_scale, tile)
        _store(form, tile, start, count, out)


@_inner
def _scale_exponent(target: np.float32) -> np.int32:
    """The smallest n with 2^n >= `target`; 0 for 0. Any number for what is not finite."""
    subnormal = target < _f32(2.0**-126)
    bits = _bits(target * _f32(2.0**64) if subnormal else target)
    exponent = _i32(_u32(bits >> _u32(23))) - (_i32(127 + 64) if subnormal else _i32(127))
    above = _i32(1) if _u32(bits & _u32(0x007FFFFF)) != _u32(0) else _i32(0)
    return _i32(0) if target == _f32(0) else _i32(exponent + above)


@_inner
def _mxfp8_group_with_nonfinite(form: int, values: Floats, codes: Bytes) -> np.uint8:
    """MLX divides by zero here: all codes are ±448 by the sign of the quotient. Returns the scale."""
    for i in range(values.size):
        value = values[i]
        negative = _u32(_bits(value) >> _u32(31)) != _u32(0)
        if value == _f32(0):
            negative = form != BF16  # 0 / 0 is x86's negative NaN; BF16 drops the sign of NaNs
        elif value != value and form == BF16:
            negative = False
        codes[i] = _u8(0xFE) if negative else _u8(0x7E)
    return _u8(0x80) if form == F32 else _u8(0)


@_entry
def quantize_mxfp8(
    form: int, source: Bytes, packed: Bytes, scales: Bytes, _biases: Bytes, measure: bool, lanes: Doubles
) -> None:
    group = 32
    tile, scratch, spread = np.empty(TILE, _f32), np.empty(TILE, _f32), np.empty(TILE, _f32)
    group_factor = np.empty(TILE // group, _f32)
    exponents = np.empty(TILE // group, _i32)
    peaks = np.empty(TILE // 2, _u32)
    elements = source.size // (4 if form == F32 else 2)
    for start in range(0, elements, TILE):
        count = min(TILE, elements - start)
        groups = count // group
        codes = packed[start : start + count]
        scale_codes = scales[start // group : start // group + groups]
        _load(form, source, start, count, tile)
        _peaks(tile, count, group, peaks)
        for g in range(groups):
            scratch[g] = _float(peaks[g]) / _f32(448)
        _round_tile(form, scratch, groups)
        unusual = False
        for g in range(groups):
            exponent = _scale_exponent(scratch[g])
            exponents[g] = exponent
            unusual |= (peaks[g] >= _INF) | (exponent < _i32(-127))
            scale_codes[g] = _u8(_i32(exponent + _i32(127)))
            # 2^-exponent: multiplying by it is exact, or the code is 0 either way.
            group_factor[g] = _float(_u32(_u32(_i32(_i32(127) - exponent)) << _u32(23)))
        _spread(group_factor, groups, group, spread)
        for i in range(count):
            codes[i] = _f32_to_e4m3(tile[i] * spread[i])
        if unusual:
            for g in range(groups):
                here = slice(g * group, (g + 1) * group)
                if peaks[g] >= _INF:
                    scale_codes[g] = _mxfp8_group_with_nonfinite(form, tile[here], codes[here])
                elif exponents[g] < -127:
                    # 2^-exponent is more than float32 holds.
                    rest = _float(_u32(_u32(-int(exponents[g])) << _u32(23)))
                    for i in range(g * group, (g + 1) * group):
                        codes[i] = _f32_to_e4m3(tile[i] * _f32(2.0**127) * rest)
        if measure:
            _restore_mxfp8(codes, scale_codes, count, group_factor, spread)
            _add_errors(form, tile, spread, count, lanes)


@_inner
def _restore_mxfp8(codes: Bytes, scale_codes: Bytes, count: int, group_scale: Floats, tile: Floats) -> None:
    for g in range(count // 32):
        group_scale[g] = _e8m0_to_f32(scale_codes[g])
    _spread(group_scale, count // 32, 32, tile)
    for i in range(count):
        tile[i] = _e4m3_to_f32(codes[i]) * tile[i]


@_entry
def dequantize_mxfp8(form: int, packed: Bytes, scales: Bytes, _biases: Bytes, out: Bytes) -> None:
    tile, group_scale = np.empty(TILE, _f32), np.empty(TILE // 32, _f32)
    elements = out.size // (4 if form == F32 else 2)
    for start in range(0, elements, TILE):
        count = min(TILE, elements - start)
        codes = packed[start : start + count]
        scale_codes = scales[start // 32 : (start + count) // 32]
        _restore_mxfp8(codes, scale_codes, count, group_scale, tile)
        _store(form, tile, start, count, out)
