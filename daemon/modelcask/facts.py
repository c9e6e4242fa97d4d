"""What a model is: the facts that `ls` and `show` tell, and how two models differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from modelcask.digest import Digest
from modelcask.errors import InvalidManifest
from modelcask.manifests import HEADER_TYPE, JSON_TYPE, MODEL_INDEX, TENSOR_TYPE, Manifest, StoredManifest
from modelcask.safetensors_layout import TensorEntry, parse_header, strict_json
from modelcask.store import Store


@dataclass(frozen=True, slots=True)
class Summary:
    """A line of `ls`.

    Attributes:
        size: bytes of the model's distinct blobs.
        quantization: the type, or the dtype of the source; empty if neither is known.
    """

    name: str
    manifest: Digest
    architecture: str
    parameter_count: int
    quantization: str
    components: tuple[str, ...]
    size: int


@dataclass(frozen=True, slots=True)
class ComponentFacts:
    """The weights of one component: how many tensors, of which dtypes, how many bytes of data."""

    name: str
    tensors: int
    dtypes: dict[str, int]
    data_bytes: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Tensors of two models, by their layers' names."""

    equal: tuple[str, ...]
    changed: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def summarize(store: Store, stored: StoredManifest) -> Summary:
    """The facts of one model.

    Raises:
        InvalidManifest: it is no image model's.
        CorruptBlob: its model_index.json is missing or damaged.
    """
    index = _model_index(store, stored)
    count = index.get("parameter_count")
    return Summary(
        name=str(stored.name),
        manifest=stored.digest,
        architecture=str(index.get("architecture") or ""),
        parameter_count=count if isinstance(count, int) else 0,
        quantization=str(index.get("quantization") or ""),
        components=tuple(stored.manifest.components),
        size=sum(stored.manifest.blobs().values()),
    )


def components(store: Store, manifest: Manifest) -> list[ComponentFacts]:
    """The facts of each component, read from its shards' headers. Raises as reading those does."""
    tensors: dict[str, list[TensorEntry]] = {}
    for layer in manifest.of_type(HEADER_TYPE):
        layout = parse_header(store.blobs.read(layer.digest, layer.size), store.blobs.path(layer.digest))
        tensors.setdefault(layer.name.rpartition("/")[0], []).extend(layout.tensors)
    return [
        ComponentFacts(
            name,
            len(entries),
            dict(Counter(entry.dtype for entry in entries)),
            sum(entry.nbytes for entry in entries),
        )
        for name, entries in tensors.items()
    ]


def compare(first: Manifest, second: Manifest) -> Difference:
    """How the tensors of two models differ; equal ones are stored once."""
    one = {layer.name: layer.digest for layer in first.of_type(TENSOR_TYPE)}
    two = {layer.name: layer.digest for layer in second.of_type(TENSOR_TYPE)}
    both = sorted(one.keys() & two.keys())
    return Difference(
        equal=tuple(name for name in both if one[name] == two[name]),
        changed=tuple(name for name in both if one[name] != two[name]),
        only_first=tuple(sorted(one.keys() - two.keys())),
        only_second=tuple(sorted(two.keys() - one.keys())),
    )


def _model_index(store: Store, stored: StoredManifest) -> dict[str, Any]:
    layer = next((layer for layer in stored.manifest.of_type(JSON_TYPE) if layer.name == MODEL_INDEX), None)
    if layer is None:
        raise InvalidManifest(stored.path, "it is no image model's, it has no model_index.json")
    try:
        return strict_json(store.blobs.read(layer.digest, layer.size))
    except ValueError as error:
        raise InvalidManifest(stored.path, f"its model_index.json cannot be read: {error}") from None
