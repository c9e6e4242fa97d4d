"""What the model folders lack that upstream's importer stored: weights files, and model_index.json.

Upstream keeps each tensor, but neither the shards they came in nor the pipeline's own model_index.json, so both are
made up: one shard for each component, under the name that its library looks for, and the index from the normalized one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from modelcask.errors import InvalidManifest
from modelcask.manifests import HEADER_TYPE, JSON_TYPE, MODEL_INDEX, TENSOR_TYPE, Layer
from modelcaskfs.model_folder import ModelFolder
from modelcaskfs.packed_files import Generated, PackedTensor, json_file, packed_shard, parsed
from modelcaskfs.spans import BlobRange, SpanFile

# By the library that model_index.json names for the component.
_SHARD_NAMES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
_NORMALIZED_ONLY = ("architecture", "parameter_count", "quantization")


def leaves(model: ModelFolder) -> Iterator[tuple[PurePosixPath, Generated]]:
    """The files to be made up; none where the manifest has the dropped folder's own."""
    manifest = model.stored.manifest
    if any(manifest.of_type(HEADER_TYPE)):
        return
    index = next((layer for layer in manifest.of_type(JSON_TYPE) if layer.name == MODEL_INDEX), None)
    if index is not None and PurePosixPath(MODEL_INDEX) not in model.files:
        yield PurePosixPath(MODEL_INDEX), _later(MODEL_INDEX, partial(_model_index, layer=index))
    fields = parsed(model, index) if index is not None else {}
    for component in manifest.components:
        path = model.checked(PurePosixPath(component, _shard_name(component, fields.get(component))))
        if path not in model.files:
            yield path, _later(str(path), partial(_shard, component=component))


def _later(path: str, build: Callable[[ModelFolder], SpanFile]) -> Generated:
    return Generated(lambda model: model.built(f"upstream/{path}", lambda: build(model)))


def _shard_name(component: str, named: Any) -> str:
    library = named[0] if isinstance(named, list) and named else None
    if not isinstance(library, str) or library not in _SHARD_NAMES:
        library = "transformers" if component.startswith("text_encoder") else "diffusers"
    return _SHARD_NAMES[library]


def _model_index(model: ModelFolder, layer: Layer) -> SpanFile:
    fields = parsed(model, layer)
    named = {"_class_name": fields["architecture"]} if "architecture" in fields else {}
    return json_file(
        model, MODEL_INDEX, {**named, **{key: value for key, value in fields.items() if key not in _NORMALIZED_ONLY}}
    )


def _shard(model: ModelFolder, component: str) -> SpanFile:
    layers = [layer for layer in model.stored.manifest.of_type(TENSOR_TYPE) if layer.name.startswith(component + "/")]
    return packed_shard((_tensor(model, layer, component) for layer in layers), file_format="pt")


def _tensor(model: ModelFolder, layer: Layer, component: str) -> PackedTensor:
    """The one tensor of a blob. The blob's own header says what it is: no other record is left of it."""
    layout = model.layout_of(layer)
    if len(layout.tensors) != 1:
        raise InvalidManifest(
            model.stored.path, f"{layer.name} is quantized in a way that only upstream's programs read"
        )
    (entry,) = layout.tensors
    source = BlobRange(layer.digest, layer.size, layout.data_start)
    return PackedTensor(layer.name.removeprefix(component + "/"), entry.dtype, entry.shape, source, entry.nbytes)
