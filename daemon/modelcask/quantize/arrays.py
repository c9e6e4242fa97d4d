"""The arrays that a quantized tensor is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from modelcask.quantize.types import QuantType

Bits = npt.NDArray[Any]
"""Numbers given as their bits: uint32 for F32, uint16 for F16 and BF16, uint8 for E4M3 and E8M0."""

BIT_DTYPES: dict[str, type[np.unsignedinteger[Any]]] = {
    "F32": np.uint32,
    "F16": np.uint16,
    "BF16": np.uint16,
    "U8": np.uint8,
}


@dataclass(frozen=True, slots=True)
class Quantized:
    """One quantized tensor, or a range of its groups.

    Attributes:
        packed: `(…, columns · bits / 32)` uint32.
        scales: `(…, columns / group_size)` bits of the source dtype, or of E4M3 or E8M0.
        biases: like `scales`; None for types without.
    """

    packed: npt.NDArray[np.uint32]
    scales: Bits
    biases: Bits | None

    @classmethod
    def empty(cls, qtype: QuantType, dtype: str, shape: Sequence[int]) -> Quantized:
        """Uninitialized arrays for a tensor of `dtype` and `shape`."""
        scale_dtype = BIT_DTYPES[qtype.scale_dtype(dtype)]
        scale_shape = qtype.scale_shape(shape)
        return cls(
            packed=np.empty(qtype.packed_shape(shape), np.uint32),
            scales=np.empty(scale_shape, scale_dtype),
            biases=np.empty(scale_shape, scale_dtype) if qtype.has_bias else None,
        )
