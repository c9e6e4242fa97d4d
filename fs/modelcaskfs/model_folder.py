"""A stored model as the folder it was: which files it has and what each consists of.

Everything here follows from one manifest, which never changes, so nothing here does.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from modelcask.blobs import BlobStore
from modelcask.errors import InvalidManifest
from modelcask.manifests import (
    FILE_TYPE,
    HEADER_TYPE,
    JSON_TYPE,
    MODEL_INDEX,
    TENSOR_TYPE,
    Layer,
    StoredManifest,
)
from modelcask.quantize import QUANT_TYPES, QuantizedLayout, QuantType, stored_layout
from modelcask.safetensors_layout import ShardLayout, TensorEntry, parse_header, read_layout
from modelcaskfs.protection import Protection
from modelcaskfs.spans import BlobRange, DequantizedTensor, Source, SpanFile

MAX_FILE_NAME = 255
"""Bytes of a name in a directory: no filesystem takes more, and the kernel would refuse the whole listing."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a shard and where it lies.

    Attributes:
        entry: of the source's header.
        layout: the quantized blob's layout, or the header of the blob of a tensor stored as it came.
    """

    entry: TensorEntry
    layer: Layer
    layout: QuantizedLayout | bytes

    @property
    def as_dropped(self) -> Source:
        """The source of its bytes as they were dropped, or as near as quantizing left them."""
        if isinstance(self.layout, bytes):
            return BlobRange(self.layer.digest, self.layer.size, len(self.layout))
        return DequantizedTensor(self.layer.digest, self.layout, self.entry.dtype)


class ModelFolder:
    """The files of one manifest. Threads may share it.

    Headers are read and parsed when a shard is first looked at, not before.
    """

    def __init__(self, stored: StoredManifest, blobs: BlobStore, leases: Path) -> None:
        self.stored = stored
        self._blobs = blobs
        self.children: dict[str, Any] = {}  # by view, kept for it
        self._building = threading.RLock()
        self._built: dict[str, SpanFile] = {}
        # Of the manifest alone: were it to lead back here, a model that nobody has would stay until cycles are sought.
        self.protection = Protection(leases, lambda: stored.manifest.blobs().keys(), is_current=stored.is_unchanged)

    @cached_property
    def files(self) -> dict[PurePosixPath, Layer]:
        """The files of the model folder; a shard stands with its header's layer."""
        files = {}
        for layer in self.stored.manifest.layers:
            # Upstream's normalized model_index.json is not what was dropped; the original is a file of its own.
            dropped = layer.media_type in (FILE_TYPE, HEADER_TYPE)
            if dropped or (layer.media_type == JSON_TYPE and layer.name != MODEL_INDEX):
                files[self.checked(PurePosixPath(layer.name))] = layer
        return files

    def checked(self, path: PurePosixPath) -> PurePosixPath:
        """`path`, made of a layer's name. Raises InvalidManifest unless it is one that a folder can hold."""
        if (
            path.is_absolute()
            or ".." in path.parts
            or not path.parts
            or "\0" in str(path)
            or any(len(part.encode()) > MAX_FILE_NAME for part in path.parts)
        ):
            raise InvalidManifest(self.stored.path, f"the layer name {str(path)!r} is no path in a folder")
        return path

    @cached_property
    def tensors(self) -> dict[str, list[Layer]]:
        """The tensor layers by name; more than one where shards of a component hold a tensor of the same name."""
        tensors = defaultdict(list)
        for layer in self.stored.manifest.of_type(TENSOR_TYPE):
            tensors[layer.name].append(layer)
        return dict(tensors)

    def split(self, layer_name: str) -> tuple[PurePosixPath, str]:
        """The component and the tensor of a tensor layer's name; either may hold a `/`."""
        for component in self._components:
            if layer_name.startswith(component + "/"):
                return PurePosixPath(component), layer_name[len(component) + 1 :]
        component, _, tensor = layer_name.partition("/")
        return PurePosixPath(component), tensor

    @cached_property
    def _components(self) -> list[str]:
        """The longest first, so that `a/b` is found before `a`."""
        return sorted(self.stored.manifest.components, key=len, reverse=True)

    def content(self, layer: Layer) -> SpanFile:
        """What the file of `layer`, one of `files`, consists of: as it was dropped.

        Raises:
            InvalidManifest: the header and the tensor layers do not fit together.
            CorruptBlob, InvalidSafetensors: the header's blob is missing or damaged.
        """
        if layer.media_type != HEADER_TYPE:
            return SpanFile([(BlobRange(layer.digest, layer.size, 0), layer.size)])
        return self.built(f"diffusers/{layer.name}", lambda: self._shard(layer))

    def built(self, key: str, build: Callable[[], SpanFile]) -> SpanFile:
        """What `build` makes, made once for each `key`."""
        with self._building:
            if key not in self._built:
                self._built[key] = build()
            return self._built[key]

    def stored_tensors(self, header: Layer) -> list[StoredTensor]:
        """The tensors of a shard, by offset, with the blobs they lie in. Raises as `content` does."""
        stored = []
        for entry in self._layout(header).tensors:
            name = f"{header.folder}/{entry.name}"
            layers = self.tensors.get(name, [])
            number = self._numbers[header.name, name] if len(layers) > 1 else 0
            if number >= len(layers):
                raise InvalidManifest(self.stored.path, f"{header.name}: no layer for its tensor {entry.name!r}")
            layout = stored_layout(header.folder, entry, layers[number].size, self.qtype)
            if layout is None:
                raise InvalidManifest(self.stored.path, f"{header.name}: the layer of {entry.name!r} does not fit it")
            stored.append(StoredTensor(entry, layers[number], layout))
        return stored

    def layout_of(self, tensor: Layer) -> ShardLayout:
        """What the header of a tensor's own blob says. Raises CorruptBlob, InvalidSafetensors."""
        fd = self._blobs.open(tensor.digest, tensor.size)
        try:
            return read_layout(fd, self._blobs.path(tensor.digest))
        finally:
            os.close(fd)

    def read(self, layer: Layer) -> bytes:
        """The bytes of a small layer. Raises CorruptBlob."""
        return self._blobs.read(layer.digest, layer.size)

    @cached_property
    def qtype(self) -> QuantType | None:
        """What the model is quantized to, None if it is not. Raises InvalidManifest for an unknown type."""
        name = self.stored.manifest.quantization
        if name is not None and name not in QUANT_TYPES:
            raise InvalidManifest(self.stored.path, f"it is quantized to {name!r}, which this version does not know")
        return None if name is None else QUANT_TYPES[name]

    def _shard(self, header: Layer) -> SpanFile:
        spans: list[tuple[Source, int]] = [
            (struct.pack("<Q", header.size), 8),
            (BlobRange(header.digest, header.size, 0), header.size),
        ]
        spans += [(tensor.as_dropped, tensor.entry.nbytes) for tensor in self.stored_tensors(header)]
        return SpanFile(spans)

    @cached_property
    def _numbers(self) -> dict[tuple[str, str], int]:
        """Of tensors whose name stands in several shards of a component: by shard and name, which layer is theirs."""
        several = {name for name, layers in self.tensors.items() if len(layers) > 1}
        numbers: dict[tuple[str, str], int] = {}
        seen: Counter[str] = Counter()
        for header in self.stored.manifest.of_type(HEADER_TYPE):
            for name in several & {f"{header.folder}/{entry.name}" for entry in self._layout(header).tensors}:
                numbers[header.name, name] = seen[name]
                seen[name] += 1
        return numbers

    def _layout(self, header: Layer) -> ShardLayout:
        return parse_header(self._blobs.read(header.digest, header.size), self._blobs.path(header.digest))
