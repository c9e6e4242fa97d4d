"""What is fuzzed: each target takes any bytes and must end, with a result or with one of our own errors.

`python tests/fuzz/run.py` runs them under atheris (coverage-guided, `make fuzz`); `test_targets.py` runs a few
thousand deterministic inputs in the ordinary tests. A target also checks what must hold of a result, so that a wrong
answer fails as a crash does.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from modelcask import config, gojson, importer, plan, settle, source, upstream
from modelcask.errors import InvalidName, ModelcaskError, printable
from modelcask.manifests import Manifest, StoredManifest, version_of
from modelcask.names import ModelName, namespace_from_folder_name
from modelcask.quantize.report import QuantizationReport
from modelcask.safetensors_layout import MAX_HEADER, encode_header, parse_header, read_layout, strict_json
from modelcask.source import SourceFile, SourceFolder
from modelcask.store import Store
from modelcaskfs.conventions import CONVENTIONS
from modelcaskfs.model_folder import ModelFolder

Target = Callable[[bytes], None]

SEEDS = Path(__file__).parent / "seeds"
_WHERE = Path("/x")
_MODEL = Path(__file__).parent.parent / "data" / "model"

# What a structured input is put together from: what the readers look for, and what they must not take.
_TEXTS = (
    "", "a", "b", "dtype", "shape", "data_offsets", "__metadata__", "F32", "BF16", "F4", "BOOL", "format", "pt", "..",
    "/", "vae", "vae/config.json", "transformer/x", "text_encoder", "../../etc/passwd", "model_index.json",
    "_class_name", "weight_map", "metadata", "x.safetensors", "mediaType", "schemaVersion", "config", "layers",
    "digest", "size", "name",
    "application/vnd.docker.distribution.manifest.v2+json", "application/vnd.ollama.image.tensor",
    "application/vnd.ollama.image.json", "application/vnd.modelcask.file",
    "application/vnd.modelcask.safetensors.header", "application/vnd.modelcask.quantization",
    "sha256:" + "0" * 64, "int4", "quant_type", "tensors", "\ud800", "\udc80", "\0",
    "\x1b[31m", "\u202e", "<&\u2028", "a\nb",
)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 4, 8, 16, 255, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 1e-7)


class _Structure:
    """Turns bytes into a JSON value, so that a fuzzer that changes a byte changes the structure."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, below: int) -> int:
        if self._at >= len(self._data):
            return 0
        self._at += 1
        return self._data[self._at - 1] % below

    def text(self) -> str:
        choice = self.take(len(_TEXTS) + 8)
        return _TEXTS[choice] if choice < len(_TEXTS) else "".join(chr(self.take(256)) for _ in range(choice % 8))

    def value(self, depth: int = 0) -> Any:
        kind = self.take(8 if depth < 6 else 4)
        if kind < 2:
            return self.text()
        if kind == 2:
            return _NUMBERS[self.take(len(_NUMBERS))]
        if kind == 3:
            return (None, True, False, 7)[self.take(4)]
        if kind < 6:
            return [self.value(depth + 1) for _ in range(self.take(5))]
        return {self.text(): self.value(depth + 1) for _ in range(self.take(6))}

    def header(self) -> dict[str, Any]:
        """A safetensors header that is often right."""
        fields: dict[str, Any] = {}
        end = 0
        for _ in range(self.take(6)):
            dtype = ("F32", "BF16", "U8", "F4", "F64")[self.take(5)]
            shape = [self.take(5) for _ in range(self.take(4))]
            size = math.prod(shape) * {"F32": 32, "BF16": 16, "U8": 8, "F4": 4, "F64": 64}[dtype] // 8
            fields[self.text()] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        self._spoil(fields)
        return fields

    def manifest(self, sound: dict[str, Any]) -> dict[str, Any]:
        """A manifest of a real model with a few things changed."""
        fields: dict[str, Any] = json.loads(json.dumps(sound))
        layers = fields["layers"]
        for _ in range(self.take(4)):
            layer = layers[self.take(len(layers))]
            kind = self.take(6)
            if kind == 0:
                layers.remove(layer)
            elif kind == 1:
                layers.append(dict(layer))
            elif kind == 2:
                layer["name"] = self.text() + "/" + self.text()
            elif kind == 3:
                layer["mediaType"] = layers[self.take(len(layers))].get("mediaType")
            elif kind == 4:
                layer["digest"] = layers[self.take(len(layers))].get("digest")
            else:
                self._spoil(layer)
            if not layers:
                break
        return fields

    def _spoil(self, fields: dict[str, Any]) -> None:
        for _ in range(self.take(3)):
            key = list(fields)[self.take(len(fields))] if fields and self.take(2) else self.text()
            fields[key] = self.value()


def _text_or_structure(data: bytes, structured: Callable[[_Structure], Any]) -> bytes:
    """The bytes as they are, or, every second time, what they say is to be put together."""
    if data[:1] < b"\x80":
        return data[1:]
    return json.dumps(structured(_Structure(data[1:]))).encode()


@cache
def _scratch() -> Path:
    """A folder in memory for what is read from files."""
    directory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    return Path(tempfile.mkdtemp(prefix="modelcask-fuzz-", dir=directory))


def _file(name: str, data: bytes) -> SourceFile:
    path = _scratch() / name
    path.write_bytes(data)
    return SourceFile(PurePosixPath("transformer", name), path, source.identity_of(path.stat()))


@cache
def _store() -> tuple[Store, StoredManifest]:
    """A store with a model in it, and its manifest."""
    store = Store.create(_scratch() / "store")
    planned = plan.plan_import(source.look(_MODEL), name="m")
    importer.run_import(store, planned, report=lambda _done, _total: None, stop=threading.Event())
    return store, store.manifests.read(ModelName.parse("m"))


@cache
def _sound_manifest() -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(_store()[1].manifest.encode())
    return fields


def safetensors_header(data: bytes) -> None:
    header = _text_or_structure(data, _Structure.header)
    layout = parse_header(header, _WHERE)
    end = 0
    for tensor in layout.tensors:
        assert tensor.begin == end <= tensor.end
        end = tensor.end
    again = encode_header(layout.tensors)
    assert parse_header(again[8:], _WHERE).tensors == layout.tensors


def safetensors_file(data: bytes) -> None:
    fd = os.memfd_create("shard")
    try:
        os.write(fd, data)
        layout = read_layout(fd, _WHERE)
        assert layout.data_start + layout.data_size == len(data)
        assert len(layout.header) <= MAX_HEADER
    finally:
        os.close(fd)


def model_index(data: bytes) -> None:
    try:
        fields = strict_json(_text_or_structure(data, _Structure.value))
        index = upstream.normalized_model_index(fields, parameter_count=7, quantization="")
    except ValueError:
        return
    assert json.loads(index)["parameter_count"] == 7
    json.loads(upstream.config_blob(fields))
    plan.component_classes(fields)
    plan.check_components(SourceFolder(_WHERE, (), ()), fields, ())


def shard_index(data: bytes) -> None:
    file = _file("x.safetensors.index.json", _text_or_structure(data, _Structure.value))
    plan.check_shard_index(SourceFolder(_WHERE, (file,), ()), file)


def manifest(data: bytes) -> None:
    store, stored = _store()
    text = _text_or_structure(data, lambda structure: structure.manifest(_sound_manifest()))
    decoded = Manifest.decode(text, _WHERE)
    assert Manifest.decode(decoded.encode(), _WHERE) == decoded
    model = ModelFolder(
        StoredManifest(stored.name, stored.path, decoded, stored.digest, stored.version), store.blobs, store.leases
    )
    for convention in CONVENTIONS:
        for path, leaf in convention.leaves(model):
            assert not path.is_absolute()
            assert ".." not in path.parts
            os.fsencode(path)
            if isinstance(leaf, PurePosixPath):
                _check_link(convention.name, stored.name, path, leaf)
    for layer in model.files.values():
        try:
            assert 0 <= model.content(layer).size < 1 << 64
        except ModelcaskError as error:
            assert str(error).isprintable()


def _check_link(view: str, name: ModelName, path: PurePosixPath, target: PurePosixPath) -> None:
    where = os.path.normpath(PurePosixPath("/", view, name.view_path, path.parent, target))
    assert where.startswith("/blobs/sha256-"), where
    assert where.count("/") == 2, where


def names(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    for make in (ModelName.parse, ModelName.from_folder_name, _named_for_a_folder):
        try:
            name = make(text)
        except InvalidName as error:
            assert str(error).isprintable()
            continue
        assert len(name.path.parts) == 4
        for part in name.path.parts:
            assert part.isascii()
            assert part not in (".", "..", "")
            assert not {"/", "\0", "\n", " "} & set(part)
        assert ModelName.parse(str(name)) == name


def _named_for_a_folder(text: str) -> ModelName:
    return ModelName.parse(f"{namespace_from_folder_name(text)}/x")


def configuration(data: bytes) -> None:
    path = _scratch() / "config.toml"
    path.write_bytes(data)
    loaded = config.load(path)
    assert loaded.store.is_absolute()
    assert loaded.mount.is_absolute()
    for drop in loaded.drops:
        drop.path.exists()


def go_json(data: bytes) -> None:
    try:
        value = strict_json(_text_or_structure(data, _Structure.value))
        text = gojson.indented(value)
    except ValueError:
        return
    # Compared as values: Python reads `-0` as an integer without a sign.
    assert strict_json(gojson.indented(strict_json(text))) == strict_json(text)
    for escaped in (b"<", b">", b"&", "\u2028".encode(), "\u2029".encode()):
        assert escaped not in text


def report(data: bytes) -> None:
    decoded = QuantizationReport.decode(_text_or_structure(data, _Structure.value), _WHERE)
    decoded.relative_error(decoded.costs)
    decoded.encode()


def settings_of_clients(data: bytes) -> None:
    """config.json as the import and the settling read it."""
    upstream.source_dtype(data)
    file = _file("config.json", data)
    settle._half_written_json(SourceFolder(_WHERE, (file,), ()))


def store_version(data: bytes) -> None:
    folder = _scratch() / "versioned"
    folder.mkdir(exist_ok=True)
    (folder / "store.json").write_bytes(data)
    Store.open(folder)


def text_for_terminals(data: bytes) -> None:
    said = printable(data.decode(errors="surrogateescape"))
    assert said.isprintable()
    said.encode()


def manifest_file(data: bytes) -> None:
    """A manifest as the store reads it from a file whose name is anything, too."""
    store, _ = _store()
    path = store.root / "manifests" / "registry.ollama.ai" / "library" / "n" / "latest"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    try:
        assert store.manifests.read(ModelName.parse("n")).version == version_of(path.stat())
    finally:
        path.unlink()


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        safetensors_header,
        safetensors_file,
        model_index,
        shard_index,
        manifest,
        manifest_file,
        names,
        configuration,
        go_json,
        report,
        settings_of_clients,
        store_version,
        text_for_terminals,
    )
}


def run(target: Target, data: bytes) -> None:
    """Run a target on one input. Our own errors are answers, if they are one line that a terminal may see."""
    try:
        target(data)
    except ModelcaskError as error:
        assert str(error).isprintable()
        str(error).encode()


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with: the small files in `seeds/` named for the target, and what a real model has."""
    found = [path.read_bytes() for path in sorted(SEEDS.glob(f"{target}*"))]
    structures = [bytes([0x80, *range(start, start + 40)]) for start in range(0, 200, 25)]
    store, stored = _store()
    real: dict[str, list[bytes]] = {
        "safetensors_file": [path.read_bytes() for path in sorted(_MODEL.rglob("*.safetensors"))],
        "model_index": [b"\0" + (_MODEL / "model_index.json").read_bytes()],
        "go_json": [b"\0" + (_MODEL / "model_index.json").read_bytes()],
        "shard_index": [b"\0" + path.read_bytes() for path in sorted(_MODEL.rglob("*.index.json"))],
        "manifest": [b"\0" + stored.manifest.encode()],
        "manifest_file": [stored.manifest.encode()],
        "safetensors_header": [
            b"\0" + store.blobs.read(layer.digest, layer.size)
            for layer in stored.manifest.layers
            if "header" in layer.media_type
        ],
        "settings_of_clients": [path.read_bytes() for path in sorted(_MODEL.rglob("*config.json"))],
    }
    return [*found, *structures, *real.get(target, [])]
