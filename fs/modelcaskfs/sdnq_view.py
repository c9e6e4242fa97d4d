"""The `sdnq/` view: quantized weights as diffusers loads them without unpacking, in SDNQ's convention.

Headers name the blobs' own bytes anew (SDNQ 0.2.8): `x.weight` has SDNQ's dtype and shape, `x.scale` one scale
a group, `x.zero_point` the affine bias; the component's config.json has a `quantization_config`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from modelcask.manifests import Layer
from modelcask.quantize import QuantizedLayout
from modelcaskfs.model_folder import ModelFolder, StoredTensor
from modelcaskfs.packed_files import Generated, PackedTensor, packed_leaves, part_of, stored_as_dropped


@dataclass(frozen=True, slots=True)
class _Form:
    """How SDNQ calls a quantization type.

    Attributes:
        weights_dtype: its name for the type.
        dtype: safetensors dtype of the packed weights.
        flat: whether the packed weights have one dimension; else rows × groups × group size.
        scale_dtype: None for the source's own.
    """

    weights_dtype: str
    dtype: str
    flat: bool
    scale_dtype: str | None


_FORMS = {
    "int4": _Form("uint4", "U8", True, None),
    "int8": _Form("uint8", "U8", False, None),
    "nvfp4": _Form("float4_e2m1fn", "U8", True, "F8_E4M3"),
    "mxfp8": _Form("float8_e4m3fn", "F8_E4M3", False, "F8_E8M0"),
}


# Modules whose weights have two dimensions and are quantized, but which SDNQ does not convert: embeddings, gates of
# experts (no nn.Linear), T5's `wo` (transformers casts activations to the dtype of its weight), and what may be tied
# to the embeddings.
_NOT_CONVERTED = {"shared", "relative_attention_bias", "wte", "wpe", "gate", "router", "wo", "lm_head"}

# What torch.nn.MultiheadAttention has, as SigLIP's pooling head does, is of another class than nn.Linear.
_NOT_LINEAR = ["attention", "out_proj"]


def leaves(model: ModelFolder) -> Iterator[tuple[PurePosixPath, Layer | Generated]]:
    """The files of a quantized model."""
    return packed_leaves(model, "sdnq", _unpack, _configure, file_format="pt")


def _packed_layout(tensor: StoredTensor) -> QuantizedLayout | None:
    """The layout of a tensor that is shown packed; all others are shown as dropped."""
    modules = tensor.entry.name.split(".")[:-1]
    if isinstance(tensor.layout, bytes) or len(tensor.entry.shape) != 2:
        return None
    if _NOT_CONVERTED & set(modules[-1:]) or modules[-2:] == _NOT_LINEAR:
        return None
    return tensor.layout


def _unpack(tensor: StoredTensor) -> Iterator[PackedTensor]:
    layout = _packed_layout(tensor)
    if layout is None:
        yield stored_as_dropped(tensor)
        return
    form, group = _FORMS[layout.qtype.name], layout.qtype.group_size
    rows, columns = tensor.entry.shape
    groups = columns // group
    # Where a row is one group, SDNQ leaves the axis of the groups out.
    grouped, scaled = ((rows, groups, group), (rows, groups, 1)) if groups > 1 else ((rows, columns), (rows, 1))
    stem = tensor.entry.name.removesuffix("weight")
    yield part_of(tensor, 0, stem + "weight", form.dtype, (layout.parts[0].nbytes,) if form.flat else grouped)
    for number, suffix in enumerate(("scale", "zero_point")[: len(layout.parts) - 1], 1):
        yield part_of(tensor, number, stem + suffix, form.scale_dtype or layout.parts[number].dtype, scaled)


def _configure(tensors: list[StoredTensor], fields: Mapping[str, Any]) -> dict[str, Any]:
    packed = {tensor.entry.name: layout.qtype for tensor in tensors if (layout := _packed_layout(tensor))}
    if not packed:
        return {}
    qtype = next(iter(packed.values()))
    kept = {
        tensor.entry.name
        for tensor in tensors
        if tensor.entry.name.endswith(".weight") and "*" not in tensor.entry.name and len(tensor.entry.shape) == 2
    } - packed.keys()
    if "_class_name" not in fields:
        kept |= {module for name in kept for module in _modules_of(name, packed.keys())}
    return {
        "quantization_config": {
            "quant_method": "sdnq",
            "weights_dtype": _FORMS[qtype.name].weights_dtype,
            "group_size": qtype.group_size,
            "use_quantized_matmul": False,
            "dequantize_fp32": True,
            "add_skip_keys": False,
            # lm_head: a module without a tensor of its own where it is tied.
            "modules_to_not_convert": sorted(kept | {"lm_head"}),
        }
    }


def _modules_of(name: str, packed: Set[str]) -> Iterator[str]:
    """What a tensor may be called in the model that transformers loads it into, as names and patterns of SDNQ's.

    transformers puts, leaves out or replaces up to two leading parts: `model.layers.…` becomes `layers.…`, and
    `visual.blocks.…` becomes `model.visual.blocks.…`. SDNQ goes by the model's names, and takes every linear layer
    that is not named for a packed one.
    """
    parts = name.split(".")
    for dropped in range(3):
        rest = ".".join(parts[dropped:])
        if dropped and len(parts) - dropped < 3:
            return
        if not any(other == rest or other.endswith("." + rest) for other in packed):
            yield rest
            yield "*." + rest
