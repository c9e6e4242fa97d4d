"""Manifests: a model's layers, and the files that hold them under their names.

The JSON is the Docker v2 schema as upstream writes it; see DESIGN.md, "Manifest".
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcask import durable, gojson
from modelcask.digest import Digest
from modelcask.errors import InvalidDigest, InvalidManifest, InvalidName, ModelNotFound
from modelcask.names import ModelName
from modelcask.safetensors_layout import strict_json

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
TENSOR_TYPE = "application/vnd.ollama.image.tensor"
JSON_TYPE = "application/vnd.ollama.image.json"
FILE_TYPE = "application/vnd.modelcask.file"
HEADER_TYPE = "application/vnd.modelcask.safetensors.header"
# What quantizing cost; stands last, named by the type, in quantized models only, and shows in no view.
REPORT_TYPE = "application/vnd.modelcask.quantization"

MODEL_INDEX = "model_index.json"

_TRIES = 10
_SURROGATE = re.compile("[\ud800-\udfff]")

log = logging.getLogger("modelcask")


@dataclass(frozen=True, slots=True)
class Layer:
    """A descriptor: what the blob `digest` of `size` bytes is to the model.

    Attributes:
        name: by media type `component/tensor.name` or a path in the model folder; empty where there is none.
    """

    media_type: str
    digest: Digest
    size: int
    name: str = ""

    @property
    def folder(self) -> str:
        """The folder that the path `name` lies in: of a shard, its component."""
        return self.name.rpartition("/")[0]

    def to_json(self) -> dict[str, Any]:
        fields = {"mediaType": self.media_type, "digest": str(self.digest), "size": self.size}
        return {**fields, "name": self.name} if self.name else fields


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model: its config and its layers, in the order of design (tensors, JSON, files, headers)."""

    config: Layer
    layers: tuple[Layer, ...]

    def encode(self) -> bytes:
        """The manifest's bytes; their sha256 is the manifest's digest."""
        return (
            gojson.compact(
                {
                    "schemaVersion": 2,
                    "mediaType": MANIFEST_TYPE,
                    "config": self.config.to_json(),
                    "layers": [layer.to_json() for layer in self.layers],
                }
            )
            + b"\n"
        )

    @classmethod
    def decode(cls, data: bytes, where: Path) -> Manifest:
        """The manifest in `data`. Other models' manifests of a shared store (language models) decode as well.

        Raises:
            InvalidManifest: not JSON, another schema, or a field that is missing or of the wrong kind.
        """
        try:
            fields = strict_json(data)
            if fields.get("mediaType") != MANIFEST_TYPE or fields.get("schemaVersion") != 2:
                raise ValueError("it is no Docker v2 manifest")
            layers = fields["layers"]
            if not isinstance(layers, list):
                raise ValueError("layers is not a list")
            return cls(_layer(fields["config"]), tuple(map(_layer, layers)))
        except InvalidDigest as error:
            raise InvalidManifest(where, str(error)) from None
        except KeyError as error:
            raise InvalidManifest(where, f"{error} is missing") from None
        except ValueError as error:
            raise InvalidManifest(where, str(error)) from None

    def blobs(self) -> dict[Digest, int]:
        """The distinct blobs the model needs, with their sizes."""
        return {layer.digest: layer.size for layer in (self.config, *self.layers)}

    def of_type(self, media_type: str) -> Iterator[Layer]:
        """The layers of one media type, in order."""
        return (layer for layer in self.layers if layer.media_type == media_type)

    @property
    def quantization(self) -> str | None:
        """The name of the type the model is quantized to, None if it is not."""
        return next((layer.name for layer in self.of_type(REPORT_TYPE)), None)

    @property
    def is_image_model(self) -> bool:
        """Whether it was written by this importer or upstream's, and not for another kind of model."""
        return any(layer.name == MODEL_INDEX for layer in self.of_type(JSON_TYPE))

    @property
    def components(self) -> list[str]:
        """The components that have weights, in the order of the layers."""
        if headers := list(self.of_type(HEADER_TYPE)):
            return list(dict.fromkeys(header.folder for header in headers))
        return list(dict.fromkeys(layer.name.partition("/")[0] for layer in self.of_type(TENSOR_TYPE)))


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest as it lies in the store.

    Attributes:
        version: identifies this state of the file (inode, mtime, size); another version means another read.
    """

    name: ModelName
    path: Path
    manifest: Manifest
    digest: Digest
    version: tuple[int, int, int]

    def is_unchanged(self) -> bool:
        """Whether the manifest's file has been there, in this state, ever since it was read."""
        try:
            return version_of(self.path.stat()) == self.version
        except (FileNotFoundError, NotADirectoryError):
            return False

    @property
    def mtime_ns(self) -> int:
        return self.version[1]


class ManifestStore:
    """The manifests of a store: `manifests/<host>/<namespace>/<name>/<tag>`.

    Reading is safe beside writers of other processes: a manifest is replaced whole.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, name: ModelName) -> Path:
        """Where `name` lies or would lie: parts that exist in another case are used as they are spelled."""
        path = self._root
        for part in name.path.parts:
            path = _existing_spelling(path, part)
        return path

    def stored_name(self, name: ModelName) -> ModelName:
        """`name` as it is spelled in the store, or as given where it is new."""
        return ModelName(*self.path(name).relative_to(self._root).parts)

    def read(self, name: ModelName) -> StoredManifest:
        """The manifest of `name`.

        Raises:
            ModelNotFound: there is none.
            InvalidManifest: the file is there but is no manifest.
        """
        path = self.path(name)
        try:
            return self.read_path(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ModelNotFound(str(name), self._root.parent) from None

    def read_path(self, path: Path) -> StoredManifest:
        """The manifest in the file `path`; missing files raise FileNotFoundError."""
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            data = file.read()
        try:
            name = ModelName(*path.relative_to(self._root).parts)
        except TypeError:
            raise InvalidManifest(path, "it does not lie at <host>/<namespace>/<name>/<tag>") from None
        return StoredManifest(name, path, Manifest.decode(data, path), Digest.of(data), version_of(stat))

    def write(self, name: ModelName, manifest: Manifest, *, temporary: Path, renew: bool = False) -> Digest:
        """Commit `manifest` under `name`, replacing what is there; durable when it returns.

        All its blobs must be durable before. A file that holds these bytes already is left as it is, but if it is
        to `renew`: a blob of it was stored anew, and mounts may have read what was there before.
        """
        data = manifest.encode()
        path = self.path(name)
        try:
            unchanged = path.read_bytes() == data
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            self._write(path, data, temporary)
        else:
            durable.sync_directory(path.parent)  # whoever wrote it may not have come to that
        if unchanged and renew:
            self._renew(path)
        return Digest.of(data)

    def _write(self, path: Path, data: bytes, temporary: Path) -> None:
        for _ in range(_TRIES):
            if not self._root.is_dir():  # the store is gone; what is made in its place would hinder its return
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._root))
            try:
                durable.make_directory(path.parent)
            except FileNotFoundError:
                continue  # who removed the last other tag removed the directory, too
            try:
                durable.write_file(path, data, temporary=temporary, mode=0o644)
                return
            except FileNotFoundError:
                if path.parent.exists():
                    raise
        raise InvalidManifest(path, "its directory vanishes again and again")

    def renew(self, stored: StoredManifest) -> None:
        """Give the manifest's file another version, its bytes unchanged: mounts show the model anew."""
        self._renew(stored.path)

    def _renew(self, path: Path) -> None:
        try:
            before = path.stat().st_mtime_ns
            # As little later as can be: a file that is older than its import and not what was imported has rotted.
            os.utime(path, ns=(before + 1, before + 1))
            if path.stat().st_mtime_ns == before:
                os.utime(path)  # a filesystem that counts in coarser steps
        except FileNotFoundError:
            pass  # removed meanwhile
        except OSError as error:
            log.warning("%s: cannot be touched (%s), mounts may show it as it was", path, error.strerror)

    def remove(self, name: ModelName) -> None:
        """Remove the manifest of `name`, durably, and the directories this leaves empty.

        Raises:
            ModelNotFound: there is none.
        """
        path = self.path(name)
        try:
            durable.remove_file(path)
        except (FileNotFoundError, NotADirectoryError):
            raise ModelNotFound(str(name), self._root.parent) from None
        for parent in path.relative_to(self._root).parents[:-1]:
            try:
                (self._root / parent).rmdir()
            except OSError:
                break  # not empty: another model lives there

    def files(self) -> Iterator[Path]:
        """Every file below `manifests/`, whether it is a manifest or not.

        Folders that are symlinks are followed, as looking a model up follows them.

        Raises:
            InvalidManifest: a symlink leads nowhere: the disk with what it stands for may not be mounted.
        """
        return _files(self._root, ())

    @property
    def exist(self) -> bool:
        """Whether there is a folder for them."""
        return self._root.is_dir()

    def names(self) -> Iterator[ModelName]:
        """The names that have a manifest, sorted; files elsewhere or with names outside the rules are passed over."""
        for path in self.files():
            parts = path.relative_to(self._root).parts
            if len(parts) != 4:
                continue
            host, namespace, name, tag = parts
            try:
                yield ModelName.parse(f"{host}/{namespace}/{name}:{tag}")
            except InvalidName:
                continue

    def children(self, *parts: str) -> list[str]:
        """The names in the directory `parts` below `manifests/`; none where it is missing."""
        try:
            return sorted(entry.name for entry in os.scandir(self._root.joinpath(*parts)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def mentions(self, media_type: str, *parts: str) -> bool:
        """Whether the manifest at `parts` has a layer of `media_type`; found in its text, which is not parsed."""
        try:
            return f'"mediaType":"{media_type}"'.encode() in self._root.joinpath(*parts).read_bytes()
        except OSError:
            return False  # gone, or not ours to read: looking the model up will tell

    def stat(self, *parts: str) -> os.stat_result | None:
        """The stat of a file or directory below `manifests/`, None where it is missing."""
        try:
            return self._root.joinpath(*parts).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None


def version_of(stat: os.stat_result) -> tuple[int, int, int]:
    """What tells one state of a manifest file from another."""
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size)


def _layer(fields: Any) -> Layer:
    if not isinstance(fields, dict):
        raise ValueError("a layer is not an object")
    media_type, digest, size, name = (
        fields["mediaType"],
        fields["digest"],
        fields["size"],
        fields.get("name", ""),
    )
    if not isinstance(media_type, str) or not isinstance(digest, str) or not isinstance(name, str):
        raise ValueError("a layer's field is not text")
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise ValueError("a layer's size is not a size")
    if _SURROGATE.search(name) or _SURROGATE.search(media_type):
        raise ValueError("a layer's field holds a lone surrogate")
    return Layer(media_type, Digest.parse(digest), size, name)


def _files(directory: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """The files below `directory`; `above` are the real paths of the folders it was reached through."""
    here = (*above, os.path.realpath(directory))
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except FileNotFoundError:
        return  # removed meanwhile
    for entry in entries:
        path = directory / entry.name
        if entry.is_dir():
            if not (entry.is_symlink() and os.path.realpath(path) in here):  # else it would go round and round
                yield from _files(path, here)
        elif entry.is_symlink() and not path.exists():
            raise InvalidManifest(path, "is a symlink to something that is not there")
        else:
            yield path


def _existing_spelling(directory: Path, part: str) -> Path:
    exact = directory / part
    if exact.exists():
        return exact
    folded = part.casefold()
    try:
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if entry.name.casefold() == folded:
                return directory / entry.name
    except (FileNotFoundError, NotADirectoryError):
        pass  # nothing there yet: the spelling is the caller's
    return exact
