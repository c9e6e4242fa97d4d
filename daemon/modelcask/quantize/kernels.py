"""Fast quantization and dequantization, equal to `reference` bit for bit, on arrays of the caller.

Every call works on whole groups that follow each other: a whole tensor, or any range of its groups, since a
group never crosses a row. It runs on the calling thread without holding the GIL, allocates a few tens of
kilobytes and shares nothing, so threads may work on disjoint ranges at once; `quantize_parallel` and
`dequantize_parallel` do that for one large tensor.

Arrays are bits (see `arrays.Bits`) in the machine's order, little-endian; contiguous, of any shape, and need
not be aligned: views into a mapped file will do.

The first call for a type and direction compiles for one to five seconds, and later processes load the result
from numba's cache (`NUMBA_CACHE_DIR`, else `__pycache__` beside the module, else the user's cache directory;
without any of these every process compiles anew). Importing this module compiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelcask.quantize import compiled
from modelcask.quantize.arrays import Bits, Quantized
from modelcask.quantize.types import SOURCE_DTYPES, QuantType

PIECE = 1 << 19
"""Elements that one thread takes at a time, about half a millisecond of work."""

_FORMS = {"F32": compiled.F32, "F16": compiled.F16, "BF16": compiled.BF16}
_QUANTIZE: dict[str, Callable[..., None]] = {
    "int4": compiled.quantize_int4,
    "int8": compiled.quantize_int8,
    "nvfp4": compiled.quantize_nvfp4,
    "mxfp8": compiled.quantize_mxfp8,
}
_DEQUANTIZE: dict[str, Callable[..., None]] = {
    "int4": compiled.dequantize_int4,
    "int8": compiled.dequantize_int8,
    "nvfp4": compiled.dequantize_nvfp4,
    "mxfp8": compiled.dequantize_mxfp8,
}

assert PIECE % compiled.TILE == 0


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far a tensor is from what it dequantizes to.

    Elements that are not finite, before or after, are left out of both sums. The sums of one call do not
    depend on the number of threads or the CPU; added up over several calls they may differ in the last
    bits from those of one call.

    Attributes:
        squared_error: sum of (dequantized - source)².
        squared_source: sum of source².
    """

    squared_error: float = 0.0
    squared_source: float = 0.0

    def __add__(self, other: Deviation) -> Deviation:
        return Deviation(self.squared_error + other.squared_error, self.squared_source + other.squared_source)

    @property
    def relative(self) -> float:
        """Root mean square of the error over that of the source; 0 if there is no error."""
        if self.squared_error == 0:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_source) if self.squared_source else math.inf


def quantize_groups(qtype: QuantType, dtype: str, source: Bits, into: Quantized, *, measure: bool = True) -> Deviation:
    """Quantize the groups of `source` into the arrays of `into`.

    Args:
        qtype: the type to make.
        dtype: F32, F16 or BF16, the meaning of `source`.
        source: a whole number of groups.
        into: arrays of exactly the sizes that they take; overwritten.
        measure: without it the deviation is zero, and the work takes half to two thirds of the time.

    Raises:
        ValueError: dtype or sizes do not fit each other, or an array is not contiguous or not writable.
    """
    pieces = list(_quantize_pieces(qtype, dtype, source, into))
    return _total(_quantize_piece(qtype, dtype, piece, measure) for piece in pieces)


def quantize_parallel(
    executor: Executor, qtype: QuantType, dtype: str, source: Bits, into: Quantized, *, measure: bool = True
) -> Deviation:
    """`quantize_groups` on the threads of `executor`; waits for all of them.

    Must not be called from a thread of the same executor.
    """
    pieces = list(_quantize_pieces(qtype, dtype, source, into))
    return _total(executor.map(lambda piece: _quantize_piece(qtype, dtype, piece, measure), pieces))


def dequantize_groups(qtype: QuantType, dtype: str, quantized: Quantized, out: Bits) -> None:
    """Dequantize whole groups into `out`, as bits of `dtype`.

    Args:
        qtype: the type of `quantized`.
        dtype: F32, F16 or BF16: of the tensor before it was quantized, of `out`, and for affine types of
            the scales and biases.
        quantized: the groups to be dequantized. Nothing is believed about their bits: NaNs and infinities
            come out as `reference.dequantize` says.
        out: exactly as many elements as `quantized` holds; overwritten.

    Raises:
        ValueError: as for `quantize_groups`.
    """
    for piece in list(_dequantize_pieces(qtype, dtype, quantized, out)):
        _dequantize_piece(qtype, dtype, piece)


def dequantize_parallel(executor: Executor, qtype: QuantType, dtype: str, quantized: Quantized, out: Bits) -> None:
    """`dequantize_groups` on the threads of `executor`; waits for all of them.

    Must not be called from a thread of the same executor.
    """
    pieces = list(_dequantize_pieces(qtype, dtype, quantized, out))
    for _ in executor.map(lambda piece: _dequantize_piece(qtype, dtype, piece), pieces):
        pass


@dataclass(frozen=True, slots=True)
class _Piece:
    """A range of groups, all arrays as bytes."""

    elements: npt.NDArray[np.uint8]
    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.uint8]
    biases: npt.NDArray[np.uint8]


def _quantize_pieces(qtype: QuantType, dtype: str, source: Bits, into: Quantized) -> Iterator[_Piece]:
    biases = _empty() if into.biases is None else _writable("biases", into.biases)
    whole = _Piece(
        _readable("source", source),
        _writable("packed", into.packed),
        _writable("scales", into.scales),
        biases,
    )
    return _cut(qtype, dtype, whole)


def _dequantize_pieces(qtype: QuantType, dtype: str, quantized: Quantized, out: Bits) -> Iterator[_Piece]:
    biases = _empty() if quantized.biases is None else quantized.biases
    whole = _Piece(
        _writable("out", out),
        _readable("packed", quantized.packed),
        _readable("scales", quantized.scales),
        _readable("biases", biases),
    )
    return _cut(qtype, dtype, whole)


def _cut(qtype: QuantType, dtype: str, whole: _Piece) -> Iterator[_Piece]:
    if dtype not in SOURCE_DTYPES:
        raise ValueError(f"dtype {dtype} cannot be quantized, only {', '.join(SOURCE_DTYPES)}")
    width = SOURCE_DTYPES[dtype]
    groups, rest = divmod(whole.elements.size, qtype.group_size * width)
    if rest:
        raise ValueError(f"{whole.elements.size} bytes of {dtype} are no whole number of {qtype.name} groups")
    scale_width = width if qtype.scale_rule == "source" else 1
    packed_width = qtype.group_size * qtype.bits // 8
    bias_width = scale_width if qtype.has_bias else 0
    for name, array, group_width in (
        ("packed", whole.packed, packed_width),
        ("scales", whole.scales, scale_width),
        ("biases", whole.biases, bias_width),
    ):
        if array.size != groups * group_width:
            raise ValueError(
                f"{name} has {array.size} bytes, but {groups} {qtype.name} groups of {dtype} take "
                f"{groups * group_width}"
            )
    step = PIECE // qtype.group_size
    for first in range(0, groups, step):
        last = min(first + step, groups)
        yield _Piece(
            whole.elements[first * qtype.group_size * width : last * qtype.group_size * width],
            whole.packed[first * packed_width : last * packed_width],
            whole.scales[first * scale_width : last * scale_width],
            whole.biases[first * bias_width : last * bias_width],
        )


def _quantize_piece(qtype: QuantType, dtype: str, piece: _Piece, measure: bool) -> Deviation:
    sums = np.zeros((2, compiled.LANES))
    _QUANTIZE[qtype.name](_FORMS[dtype], piece.elements, piece.packed, piece.scales, piece.biases, measure, sums)
    return Deviation(math.fsum(sums[0]), math.fsum(sums[1]))


def _dequantize_piece(qtype: QuantType, dtype: str, piece: _Piece) -> None:
    _DEQUANTIZE[qtype.name](_FORMS[dtype], piece.packed, piece.scales, piece.biases, piece.elements)


def _total(parts: Iterable[Deviation]) -> Deviation:
    deviations = list(parts)
    return Deviation(
        math.fsum(each.squared_error for each in deviations),
        math.fsum(each.squared_source for each in deviations),
    )


def _readable(name: str, array: Bits) -> npt.NDArray[np.uint8]:
    """A view as bytes. Always read-only, as numba compiles read-only and writable arguments separately."""
    view = _as_bytes(name, array)
    view.flags.writeable = False
    return view


def _writable(name: str, array: Bits) -> npt.NDArray[np.uint8]:
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only")
    return _as_bytes(name, array)


def _as_bytes(name: str, array: Bits) -> npt.NDArray[np.uint8]:
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous")
    return array.reshape(-1).view(np.uint8)


def _empty() -> npt.NDArray[np.uint8]:
    return np.empty(0, np.uint8)
