"""Quantization: the four types, which tensors they apply to, and the kernels that reproduce MLX bit for bit.

The package root names types and rules only. It imports neither numpy nor numba, because the CLI loads it at
every start; `kernels` (fast) and `reference` (readable) do, and are imported where they are used.
"""

from __future__ import annotations

from modelcask.quantize.blob import QuantizedLayout, quantized_layout, stored_layout
from modelcask.quantize.eligibility import eligible
from modelcask.quantize.types import KERNEL_VERSION, QUANT_TYPES, SOURCE_DTYPES, QuantType

__all__ = [
    "KERNEL_VERSION",
    "QUANT_TYPES",
    "SOURCE_DTYPES",
    "QuantType",
    "QuantizedLayout",
    "eligible",
    "quantized_layout",
    "stored_layout",
]
