"""The `mlx/` view: MLX's convention for quantized weights.

`x.weight` is packed, `x.scales` and `x.biases` stand beside it, and the component's config.json has
`quantization {group_size, bits, mode}` (as mlx-lm writes it). The bytes are the blobs' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from modelcask.manifests import Layer
from modelcaskfs.model_folder import ModelFolder, StoredTensor
from modelcaskfs.packed_files import Generated, PackedTensor, packed_leaves, part_of, stored_as_dropped

_SUFFIXES = ("scales", "biases")


def leaves(model: ModelFolder) -> Iterator[tuple[PurePosixPath, Layer | Generated]]:
    """The files of a quantized model."""
    return packed_leaves(model, "mlx", _unpack, _configure, file_format="mlx")


def _unpack(tensor: StoredTensor) -> Iterator[PackedTensor]:
    if isinstance(tensor.layout, bytes):
        yield stored_as_dropped(tensor)
        return
    packed, *rest = tensor.layout.parts
    name = tensor.entry.name
    yield part_of(tensor, 0, name, packed.dtype, packed.shape)
    stem = name.removesuffix("weight")
    for number, part in enumerate(rest, 1):
        yield part_of(tensor, number, stem + _SUFFIXES[number - 1], part.dtype, part.shape)


def _configure(tensors: list[StoredTensor], _fields: Mapping[str, Any]) -> dict[str, Any]:
    qtype = next(tensor.layout.qtype for tensor in tensors if not isinstance(tensor.layout, bytes))
    return {"quantization": {"group_size": qtype.group_size, "bits": qtype.bits, "mode": qtype.mode}}
