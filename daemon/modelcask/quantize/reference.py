"""What quantization means, written to be read: numpy, whole arrays, no attention to speed.

Equal bit for bit to `mlx.core.quantize` and to `mlx.core.dequantize` with float32 scales on an x86-64 CPU,
for every input. `kernels` must equal this module; the tests hold both against MLX and against recorded
digests. Taken from MLX 0.32.4: `mlx/backend/cpu/quantized.cpp` for affine, and for nvfp4 and mxfp8 the graph
of primitives that `quantize` builds on the CPU (`mlx.core.export_to_dot`), with `unary_ops.h` for E4M3.

Numbers are computed in float32. "In the source dtype" below means: in float32, then rounded once to F16 or
BF16, as MLX's CPU does each step of an nvfp4 or mxfp8 graph. Subnormals are never flushed.

What is not finite:
- affine: NaN elements are ignored by minimum and maximum, and get code 0. With an infinite element, or with
  NaN only, the scale is NaN, the bias the infinity (+inf if both signs occur, -inf for NaN only), all codes
  are 0. The scale also becomes ±inf, bias and codes 0, when maximum - minimum overflows float32.
- nvfp4: with a NaN or an infinity the scale is 448, and those elements get code 0, the others their own.
- mxfp8: with a NaN or an infinity the scale byte is 0x80 (F32) or 0 (F16, BF16), and every code is ±448.
- No payload of a NaN survives: BF16 NaNs are written as 7fc0, F16 NaNs as 7d00 or fd00, F32 NaNs as 7fc00000
  or ffc00000. The sign is the one x86 gives, and so positive only where a rule below says so.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from modelcask.quantize.arrays import BIT_DTYPES, Bits, Quantized
from modelcask.quantize.types import QuantType

Floats = npt.NDArray[np.float32]

_DTYPES: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_X86_NAN = np.uint32(0xFFC00000)  # what an invalid operation returns on x86: negative, quiet, no payload
_FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_MAX = np.float32(6)
_FP8_MAX = np.float32(448)
_FP8_MAX_CODE = 0x7E
_SMALLEST_SCALE = np.float32(1e-7)  # of the affine types, before it is fitted to the edge


def quantize(qtype: QuantType, dtype: str, source: Bits) -> Quantized:
    """Quantize a tensor given as its bits.

    Args:
        qtype: the type to make.
        dtype: F32, F16 or BF16, the meaning of `source`.
        source: `(…, columns)` uint32 or uint16; columns divide by the group size.
    """
    groups = _to_float32(dtype, source).reshape(-1, qtype.group_size)
    biases = None
    with np.errstate(all="ignore"):
        if qtype.mode == "affine":
            codes, scales, biases = _quantize_affine(groups, top=2**qtype.bits - 1)
            scales, biases = _round_to(dtype, scales), _round_to(dtype, biases)
        elif qtype.mode == "nvfp4":
            codes, scales = _quantize_nvfp4(groups, dtype)
        else:
            codes, scales = _quantize_mxfp8(groups, dtype)
    per_word = 32 // qtype.bits
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(qtype.bits)
    words = (codes.astype(np.uint32).reshape(-1, per_word) << shifts).sum(axis=1, dtype=np.uint32)
    return Quantized(
        packed=words.reshape(qtype.packed_shape(source.shape)),
        scales=scales.reshape(qtype.scale_shape(source.shape)),
        biases=None if biases is None else biases.reshape(qtype.scale_shape(source.shape)),
    )


def dequantize(qtype: QuantType, dtype: str, quantized: Quantized) -> Bits:
    """The bits of the dequantized tensor: float32 multiplied and added, then rounded once to `dtype`.

    A NaN can come only from a scale or bias that is not finite, or from E4M3's NaN codes (which `quantize`
    never writes). In F32 it keeps the payload of the code, scale or bias it came from, in that order, and is
    ffc00000 if it came from infinities; F16 keeps its sign only, BF16 neither.

    Returns:
        `(…, columns)` uint32 or uint16.
    """
    packed = quantized.packed
    per_word = 32 // qtype.bits
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(qtype.bits)
    codes = (packed.reshape(-1, 1) >> shifts) & np.uint32(2**qtype.bits - 1)
    codes = codes.reshape(-1, qtype.group_size).astype(np.uint8)
    with np.errstate(all="ignore"):
        if qtype.mode == "affine":
            assert quantized.biases is not None
            scales = _to_float32(dtype, quantized.scales).reshape(-1, 1)
            biases = _to_float32(dtype, quantized.biases).reshape(-1, 1)
            values = codes.astype(np.float32) * scales + biases
            values[np.isnan(values) & ~np.isnan(scales) & ~np.isnan(biases)] = _X86_NAN.view(np.float32)
        elif qtype.mode == "nvfp4":
            magnitudes = _FP4_VALUES[codes & 7]
            values = np.where(codes & 8, -magnitudes, magnitudes)
            values = values * _from_e4m3(quantized.scales).reshape(-1, 1)
        else:
            elements = _from_e4m3(codes)
            values = elements * _from_e8m0(quantized.scales).reshape(-1, 1)
            values[np.isnan(values) & ~np.isnan(elements)] = _X86_NAN.view(np.float32)
        bits = _round_to(dtype, values)
    return bits.reshape(*packed.shape[:-1], packed.shape[-1] * per_word)


def _quantize_affine(groups: Floats, top: int) -> tuple[Bits, Floats, Floats]:
    """`groups: (n, group_size) float32 → codes: (n, group_size), scales: (n, 1), biases: (n, 1)`.

    Codes use the float32 scale; the one that is stored is rounded afterwards.
    """
    low = np.fmin.reduce(groups, axis=1, keepdims=True, initial=np.float32(np.inf))
    high = np.fmax.reduce(groups, axis=1, keepdims=True, initial=np.float32(-np.inf))
    low_is_edge = np.abs(low) > np.abs(high)
    scales = np.maximum((high - low) / np.float32(top), _SMALLEST_SCALE)
    scales = np.where(low_is_edge, scales, -scales)
    edges = np.where(low_is_edge, low, high)
    # The element farthest from zero is made exact: it becomes the bias, and the scale is changed so that
    # zero lies on a step.
    steps = np.rint(edges / scales)
    fitted = steps != 0
    scales = np.where(fitted, edges / steps, scales)
    biases = np.where(fitted, edges, np.float32(0))
    codes = np.clip(np.rint((groups - biases) / scales), 0, top)
    all_one_infinity = (low == high) & np.isinf(high)
    canonical = np.where(all_one_infinity, ~np.uint32(1 << 31) & _X86_NAN, _X86_NAN).view(np.float32)
    scales = np.where(np.isnan(scales), canonical, scales)
    return np.where(np.isnan(codes), 0, codes).astype(np.uint8), scales, biases


def _quantize_nvfp4(groups: Floats, dtype: str) -> tuple[Bits, Bits]:
    """`groups: (n, 16) float32 → codes: (n, 16), scales: (n, 1) E4M3`."""
    peaks = np.abs(groups).max(axis=1, keepdims=True)  # NaN if any element is
    scales = _to_e4m3(_through(dtype, peaks / _FP4_MAX)) & np.uint8(0x7F)
    ratios = _through(dtype, groups / _from_e4m3(scales))
    # MLX takes the first of all sixteen values at the least distance, computed in float32. So ties go to the
    # smaller magnitude, what rounds to zero gets +0, and so does what is NaN or infinite (a scale of zero
    # divides to that), or so large that every distance rounds to the same number.
    values = np.concatenate((_FP4_VALUES, -_FP4_VALUES))
    distances = np.abs(ratios[..., np.newaxis] - values)
    distances[np.isnan(distances)] = np.inf
    return distances.argmin(axis=-1).astype(np.uint8), scales


def _quantize_mxfp8(groups: Floats, dtype: str) -> tuple[Bits, Bits]:
    """`groups: (n, 32) float32 → codes: (n, 32) E4M3, scales: (n, 1) E8M0`.

    The scale is the smallest power of two that brings the peak to at most 448. MLX keeps the low eight bits
    of exponent + 127, so a peak under 448 · 2^-127 gets a wrapped, useless scale; so does it here.
    """
    peaks = np.abs(groups).max(axis=1, keepdims=True)
    targets = _through(dtype, peaks / _FP8_MAX)
    fractions, exponents = np.frexp(targets)
    exponents = np.where(fractions == 0.5, exponents - 1, exponents)
    exponents = np.where(targets == 0, 0, exponents)
    codes = _to_e4m3(np.ldexp(groups.astype(np.float64), -exponents).astype(np.float32))
    scales = (exponents + 127).astype(np.uint8)

    # MLX divides by zero in groups that hold a NaN or an infinity: every code is the largest, with the sign
    # of the quotient. 0/0 and NaN give a NaN, whose sign BF16 drops and whose magnitude E4M3 replaces.
    broken = ~np.isfinite(targets)
    if dtype == "BF16":
        negative = np.signbit(groups) & ~np.isnan(groups) & (groups != 0)
    else:
        negative = np.signbit(groups) | (groups == 0)
    codes = np.where(broken, np.where(negative, 0x80 | _FP8_MAX_CODE, _FP8_MAX_CODE), codes)
    scales = np.where(broken, 0x80 if dtype == "F32" else 0, scales)
    return codes.astype(np.uint8), scales.astype(np.uint8)


def _to_float32(dtype: str, bits: Bits) -> Floats:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return bits.view(_DTYPES[dtype]).astype(np.float32)


def _round_to(dtype: str, values: Floats) -> Bits:
    """Nearest-even; NaNs as MLX writes them."""
    if dtype == "F32":
        return values.view(np.uint32)
    bits = values.astype(_DTYPES[dtype]).view(BIT_DTYPES[dtype])
    nan = np.where(np.signbit(values), 0xFD00, 0x7D00) if dtype == "F16" else 0x7FC0
    return np.where(np.isnan(values), nan, bits).astype(np.uint16)


def _through(dtype: str, values: Floats) -> Floats:
    """`values` rounded to the source dtype."""
    return _to_float32(dtype, _round_to(dtype, values))


def _to_e4m3(values: Floats) -> Bits:
    """Nearest-even, saturating at ±448; NaN becomes ±448, by its sign."""
    limited = np.where(np.isnan(values), np.copysign(_FP8_MAX, values), np.clip(values, -_FP8_MAX, _FP8_MAX))
    return limited.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _from_e4m3(codes: Bits) -> Floats:
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    # MLX decodes by way of F16, which leaves more bits in the payload than a cast of the NaN would.
    payload = np.where(codes & 0x80, np.uint32(0xFFF00000), np.uint32(0x7FF00000)).view(np.float32)
    return np.where(codes & 0x7F == 0x7F, payload, values)


def _from_e8m0(scales: Bits) -> Floats:
    """2^(scale - 127); 255 is infinity to MLX, not the NaN of the OCP specification."""
    return np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
