"""Files of views that show quantized tensors packed: shards with rewritten headers over the blobs' own bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from modelcask.errors import InvalidManifest
from modelcask.manifests import HEADER_TYPE, Layer
from modelcask.safetensors_layout import TensorEntry, check_size, encode_header
from modelcaskfs.model_folder import ModelFolder, StoredTensor
from modelcaskfs.spans import BlobRange, Source, SpanFile

# Data that begins on a page boundary can be mapped without moving it.
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Generated:
    """A file that is not stored but made when it is first looked at.

    Attributes:
        content: makes it of its model. The model keeps this, so this must not lead back to the model: one that nobody
            has would stay until cycles are sought.
    """

    content: Callable[[ModelFolder], SpanFile]


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor of a rewritten shard: `nbytes` of `source` under another header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source
    nbytes: int


Unpack = Callable[[StoredTensor], Iterable[PackedTensor]]
Configure = Callable[[list[StoredTensor], Mapping[str, Any]], Mapping[str, Any]]


def packed_leaves(
    model: ModelFolder, view: str, unpack: Unpack, configure: Configure, *, file_format: str
) -> Iterator[tuple[PurePosixPath, Layer | Generated]]:
    """The model folder with its quantized components packed; all other files are as dropped.

    Args:
        unpack: the tensors that stand for one stored tensor.
        configure: what a quantized component's config.json says in addition to what it says.
        file_format: `format` in the headers' metadata.
    """
    components = set(model.stored.manifest.components)
    for path, layer in model.files.items():
        key = f"{view}/{layer.name}"

        def later(build: Callable[[ModelFolder, Layer], SpanFile], key: str = key, layer: Layer = layer) -> Generated:
            return Generated(lambda model: model.built(key, lambda: build(model, layer)))

        if layer.media_type == HEADER_TYPE:
            yield path, later(lambda model, layer: _shard(model, layer, unpack, file_format))
        elif layer.folder in components and path.name == "config.json":
            yield path, later(lambda model, layer: _config(model, layer, configure))
        elif layer.folder in components and path.name.endswith(".index.json") and ".safetensors." in path.name:
            yield path, later(lambda model, layer: _shard_index(model, layer, unpack))
        else:
            yield path, layer


def stored_as_dropped(tensor: StoredTensor) -> PackedTensor:
    """A tensor as the model folder had it; one that is quantized is dequantized on read."""
    entry = tensor.entry
    return PackedTensor(entry.name, entry.dtype, entry.shape, tensor.as_dropped, entry.nbytes)


def part_of(tensor: StoredTensor, number: int, name: str, dtype: str, shape: tuple[int, ...]) -> PackedTensor:
    """A part of a quantized blob (0 packed words, 1 scales, 2 biases) under another name, dtype and shape."""
    assert not isinstance(tensor.layout, bytes)
    source = BlobRange(tensor.layer.digest, tensor.layer.size, tensor.layout.offset(number))
    return PackedTensor(name, dtype, shape, source, tensor.layout.parts[number].nbytes)


def component_tensors(model: ModelFolder, component: str) -> list[StoredTensor]:
    """The tensors of all shards of a component."""
    return [
        tensor
        for header in model.stored.manifest.of_type(HEADER_TYPE)
        if header.folder == component
        for tensor in model.stored_tensors(header)
    ]


def _unpacked(model: ModelFolder, header: Layer, unpack: Unpack) -> Iterator[PackedTensor]:
    """The tensors of a rewritten shard. One whose parts' names other tensors have already stays as dropped."""
    for tensor in model.stored_tensors(header):
        parts = list(unpack(tensor))
        added = (part.name for part in parts if part.name != tensor.entry.name)
        if any(f"{header.folder}/{name}" in model.tensors for name in added):
            parts = [stored_as_dropped(tensor)]
        yield from parts


def _shard(model: ModelFolder, header: Layer, unpack: Unpack, file_format: str) -> SpanFile:
    return packed_shard(_unpacked(model, header, unpack), file_format=file_format)


def packed_shard(tensors: Iterable[PackedTensor], *, file_format: str) -> SpanFile:
    """A shard of these tensors, in this order, under a header made for it."""
    entries, spans, end = [], [], 0
    for tensor in tensors:
        entries.append(TensorEntry(tensor.name, tensor.dtype, tensor.shape, end, end + tensor.nbytes))
        spans.append((tensor.source, tensor.nbytes))
        end += tensor.nbytes
    head = encode_header(entries, metadata={"format": file_format}, alignment=_PAGE)
    return SpanFile([(head, len(head)), *spans])


def _config(model: ModelFolder, layer: Layer, configure: Configure) -> SpanFile:
    tensors = component_tensors(model, layer.folder)
    if all(isinstance(tensor.layout, bytes) for tensor in tensors):
        return model.content(layer)  # nothing of it is quantized
    fields = parsed(model, layer)
    added = configure(tensors, fields)
    return json_file(model, layer.name, {**fields, **added}) if added else model.content(layer)


def _shard_index(model: ModelFolder, layer: Layer, unpack: Unpack) -> SpanFile:
    fields = parsed(model, layer)
    weight_map, total = {}, 0
    named = fields.get("weight_map")
    listed = list(named.values()) if isinstance(named, dict) else []
    for header in model.stored.manifest.of_type(HEADER_TYPE):
        path = PurePosixPath(header.name)
        if header.folder == layer.folder and path.name in listed:
            for packed in _unpacked(model, header, unpack):
                weight_map[packed.name] = path.name
                total += packed.nbytes
    fields |= {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json_file(model, layer.name, fields)


def parsed(model: ModelFolder, layer: Layer) -> dict[str, Any]:
    """The JSON object of a file, for a client that reads it leniently."""
    text = model.read(layer)
    try:
        check_size(text)
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidManifest(model.stored.path, f"{layer.name} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidManifest(model.stored.path, f"{layer.name} is no JSON object")
    return fields


def json_file(model: ModelFolder, name: str, fields: Mapping[str, Any]) -> SpanFile:
    """A JSON file that the mount makes up. Raises InvalidManifest if it is nested too deeply."""
    try:
        text = json.dumps(fields, indent=2).encode() + b"\n"
    except RecursionError:
        raise InvalidManifest(model.stored.path, f"{name} is nested too deeply") from None
    return SpanFile([(text, len(text))])
