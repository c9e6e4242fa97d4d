"""What a model is: the facts that `ls` and `show` tell, and how two models differ."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from modelcask.digest import Digest
from modelcask.errors import InvalidManifest, NoImageModel
from modelcask.manifests import HEADER_TYPE, JSON_TYPE, MODEL_INDEX, REPORT_TYPE, TENSOR_TYPE, Layer, StoredManifest
from modelcask.names import ModelName
from modelcask.quantize import eligible
from modelcask.quantize.report import QuantizationReport
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
    """The weights of one component.

    Attributes:
        dtypes: of the source, with the number of tensors of each.
        source_bytes, stored_bytes: the tensors' data as dropped, and their blobs.
        quantized: how many of the tensors are.
        kept: why the others are not, with the number of each reason; empty if the model is not quantized.
        error: root mean square of what quantizing changed over that of the source, all tensors together;
            None if none is quantized.
    """

    name: str
    tensors: int
    dtypes: dict[str, int]
    source_bytes: int
    stored_bytes: int
    quantized: int
    kept: dict[str, int]
    error: float | None


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor.

    Attributes:
        error: relative root mean square error of quantizing it, None if it is stored as it came.
        kept: why it is stored as it came, in a quantized model.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    error: float | None
    kept: str | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Tensors of two models, by their layers' names."""

    equal: tuple[str, ...]
    changed: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def image_model(store: Store, name: str) -> StoredManifest:
    """The image model called `name`.

    Raises:
        InvalidName, ModelNotFound, InvalidManifest: there is none.
        NoImageModel: another program's model has that name in this store.
    """
    stored = store.manifests.read(ModelName.parse(name))
    if not stored.manifest.is_image_model:
        raise NoImageModel(str(stored.name))
    return stored


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
        architecture=_text(index.get("architecture")),
        parameter_count=count if isinstance(count, int) and 0 <= count < 1 << 63 else 0,
        quantization=_text(index.get("quantization")),
        components=tuple(stored.manifest.components),
        size=sum(stored.manifest.blobs().values()),
    )


def tensors(store: Store, stored: StoredManifest) -> dict[str, list[TensorFacts]]:
    """The facts of each tensor by component, read from the shards' headers. Raises as reading those does."""
    report = quantization_report(store, stored)
    return {
        component: [_tensor(component, entry, report) for entry in entries]
        for component, entries in _entries(store, stored).items()
    }


def components(store: Store, stored: StoredManifest) -> list[ComponentFacts]:
    """The facts of each component. Raises as `tensors` does."""
    report = quantization_report(store, stored)
    sizes = {layer.name: layer.size for layer in stored.manifest.of_type(TENSOR_TYPE)}
    return [_component(name, entries, sizes, report) for name, entries in _entries(store, stored).items()]


def quantization_report(store: Store, stored: StoredManifest) -> QuantizationReport | None:
    """What quantizing the model cost, None if it is not quantized."""
    layer = next(stored.manifest.of_type(REPORT_TYPE), None)
    return None if layer is None else QuantizationReport.decode(_read(store, layer), stored.path)


def compare(first: StoredManifest, second: StoredManifest) -> Difference:
    """How the tensors of two models differ; equal ones are stored once."""
    one = {layer.name: layer.digest for layer in first.manifest.of_type(TENSOR_TYPE)}
    two = {layer.name: layer.digest for layer in second.manifest.of_type(TENSOR_TYPE)}
    both = sorted(one.keys() & two.keys())
    return Difference(
        equal=tuple(name for name in both if one[name] == two[name]),
        changed=tuple(name for name in both if one[name] != two[name]),
        only_first=tuple(sorted(one.keys() - two.keys())),
        only_second=tuple(sorted(two.keys() - one.keys())),
    )


def _tensor(component: str, entry: TensorEntry, report: QuantizationReport | None) -> TensorFacts:
    name = f"{component}/{entry.name}"
    if report is None:
        return TensorFacts(name, entry.dtype, entry.shape, None, None)
    if name in report.costs:
        return TensorFacts(name, entry.dtype, entry.shape, report.relative_error([name]), None)
    return TensorFacts(name, entry.dtype, entry.shape, None, _why_kept(component, entry, report))


def _component(
    name: str, entries: list[TensorEntry], sizes: dict[str, int], report: QuantizationReport | None
) -> ComponentFacts:
    names = [f"{name}/{entry.name}" for entry in entries]
    quantized = [] if report is None else [each for each in names if each in report.costs]
    kept: Counter[str] = Counter()
    if report is not None:
        kept.update(_why_kept(name, e, report) for e in entries if f"{name}/{e.name}" not in report.costs)
    return ComponentFacts(
        name=name,
        tensors=len(entries),
        dtypes=dict(Counter(entry.dtype for entry in entries)),
        source_bytes=sum(entry.nbytes for entry in entries),
        stored_bytes=sum(sizes.get(each, 0) for each in names),
        quantized=len(quantized),
        kept=dict(kept.most_common()),
        error=report.relative_error(quantized) if report is not None and quantized else None,
    )


def _why_kept(component: str, entry: TensorEntry, report: QuantizationReport) -> str:
    return eligible(component, entry.name, entry.dtype, entry.shape, report.qtype) or "not quantized"


def _entries(store: Store, stored: StoredManifest) -> dict[str, list[TensorEntry]]:
    """The tensors of each component, as the headers of its shards list them."""
    entries: dict[str, list[TensorEntry]] = defaultdict(list)
    for header in stored.manifest.of_type(HEADER_TYPE):
        entries[header.folder] += parse_header(_read(store, header), store.blobs.path(header.digest)).tensors
    return dict(entries)


def _read(store: Store, layer: Layer) -> bytes:
    return store.blobs.read(layer.digest, layer.size)


def _text(value: object) -> str:
    # A lone surrogate could not be printed.
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def _model_index(store: Store, stored: StoredManifest) -> dict[str, Any]:
    layer = next((layer for layer in stored.manifest.of_type(JSON_TYPE) if layer.name == MODEL_INDEX), None)
    if layer is None:
        raise InvalidManifest(stored.path, "it is no image model's, it has no model_index.json")
    try:
        return strict_json(_read(store, layer))
    except ValueError as error:
        raise InvalidManifest(stored.path, f"its model_index.json cannot be read: {error}") from None
