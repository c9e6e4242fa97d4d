"""The quantization types and the shapes of what they make.

Mode names, group sizes and bit widths are MLX's (`mlx.core.quantize`, 0.32).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

KERNEL_VERSION = 1
"""Names the output of the kernels: raised whenever any bit of a quantized or dequantized tensor changes.

Quantizations cached under another version are not reused.
"""

SOURCE_DTYPES: Mapping[str, int] = MappingProxyType({"F32": 4, "F16": 2, "BF16": 2})
"""The safetensors dtypes that can be quantized, and the bytes of one element."""


@dataclass(frozen=True, slots=True)
class QuantType:
    """How tensors of one quantization type are packed.

    Attributes:
        name: what users write, also `quant_type` in a blob's metadata.
        group_size: consecutive elements of a row that share a scale.
        bits: of one packed element; elements fill a U32 word from its lowest bits up.
        mode: MLX's name of the arithmetic.
        has_bias: whether each group also stores a bias, of the same dtype as its scale.
        scale_rule: `source` if scales have the dtype of the source tensor; `E4M3` or `E8M0` if they are
            that 8-bit format, stored as U8.
    """

    name: str
    group_size: int
    bits: int
    mode: Literal["affine", "nvfp4", "mxfp8"]
    has_bias: bool
    scale_rule: Literal["source", "E4M3", "E8M0"]

    def scale_dtype(self, source_dtype: str) -> str:
        """The safetensors dtype of the scales (and biases) of a tensor of `source_dtype`."""
        return source_dtype if self.scale_rule == "source" else "U8"

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """`(…, columns)` elements → `(…, columns · bits / 32)` U32 words."""
        return (*shape[:-1], shape[-1] * self.bits // 32)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """`(…, columns)` elements → `(…, columns / group_size)` scales; biases have the same shape."""
        return (*shape[:-1], shape[-1] // self.group_size)

    def quantized_size(self, shape: Sequence[int], source_dtype: str) -> int:
        """Bytes of the packed words, scales and biases of one tensor together, without any header."""
        scale_size = SOURCE_DTYPES[source_dtype] if self.scale_rule == "source" else 1
        groups = math.prod(self.scale_shape(shape))
        return math.prod(self.packed_shape(shape)) * 4 + groups * scale_size * (2 if self.has_bias else 1)


QUANT_TYPES: Mapping[str, QuantType] = MappingProxyType(
    {
        each.name: each
        for each in (
            QuantType("int4", group_size=32, bits=4, mode="affine", has_bias=True, scale_rule="source"),
            QuantType("int8", group_size=64, bits=8, mode="affine", has_bias=True, scale_rule="source"),
            QuantType("nvfp4", group_size=16, bits=4, mode="nvfp4", has_bias=False, scale_rule="E4M3"),
            QuantType("mxfp8", group_size=32, bits=8, mode="mxfp8", has_bias=False, scale_rule="E8M0"),
        )
    }
)
"""Every quantization type, by name."""
