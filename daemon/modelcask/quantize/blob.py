"""How one tensor lies in its blob: as it came, or quantized.

A quantized blob is `header | packed words | scales | biases`, the biases for affine types only; the header names
them `<name>`, `<name>.scale` and `<name>.bias` and has `quant_type` and `group_size` as metadata.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from modelcask.quantize.eligibility import eligible
from modelcask.quantize.types import SOURCE_DTYPES, QuantType
from modelcask.safetensors_layout import TensorEntry, blob_header, encode_header


@dataclass(frozen=True, slots=True)
class QuantizedLayout:
    """Where the parts of a quantized tensor lie in its blob.

    Attributes:
        header: the blob's first bytes, the eight length bytes included.
        parts: packed words, scales and, for affine types, biases; offsets count from the header's end.
    """

    qtype: QuantType
    header: bytes
    parts: tuple[TensorEntry, ...]

    @property
    def size(self) -> int:
        """Bytes of the blob."""
        return len(self.header) + self.parts[-1].end

    def offset(self, part: int) -> int:
        """Where a part begins in the blob."""
        return len(self.header) + self.parts[part].begin


def quantized_layout(name: str, dtype: str, shape: tuple[int, ...], qtype: QuantType) -> QuantizedLayout:
    """The layout of a tensor of `dtype` and `shape`, which must be eligible for `qtype`."""
    scale_dtype, scale_shape = qtype.scale_dtype(dtype), qtype.scale_shape(shape)
    packed = math.prod(qtype.packed_shape(shape)) * 4
    scales = math.prod(scale_shape) * (SOURCE_DTYPES[dtype] if qtype.scale_rule == "source" else 1)
    parts = [
        TensorEntry(name, "U32", qtype.packed_shape(shape), 0, packed),
        TensorEntry(name + ".scale", scale_dtype, scale_shape, packed, packed + scales),
    ]
    if qtype.has_bias:
        parts.append(TensorEntry(name + ".bias", scale_dtype, scale_shape, packed + scales, packed + 2 * scales))
    metadata = {"quant_type": qtype.name, "group_size": str(qtype.group_size)}
    return QuantizedLayout(qtype, encode_header(parts, metadata=metadata), tuple(parts))


def stored_layout(
    component: str, tensor: TensorEntry, size: int, qtype: QuantType | None
) -> QuantizedLayout | bytes | None:
    """How a blob of `size` bytes holds `tensor`, the entry of the source's header.

    Args:
        qtype: what its model is quantized to, None if it is not.

    Returns:
        the quantized layout, or the header of the blob of a tensor that is stored as it came, or None if the
        size fits neither.
    """
    if qtype is not None and eligible(component, tensor.name, tensor.dtype, tensor.shape, qtype) is None:
        layout = quantized_layout(tensor.name, tensor.dtype, tensor.shape, qtype)
        if layout.size == size:
            return layout
    header = blob_header(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes)
    return header if len(header) + tensor.nbytes == size else None
