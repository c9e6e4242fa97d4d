"""The `hub/` view: a Hugging Face cache that holds the `diffusers/` tree.

`models--org--name/` is a repository with a ref for each tag, and a snapshot for each state of a tag, under 40 hex
digits of its manifest's digest. `trees/` lists a snapshot's files, so that huggingface_hub knows it for complete.
A repository of another host is `models--host--org--name`; one of the default namespace is found under its bare name,
too, by a link that is not listed. The files are the nodes of `diffusers/`: the kernel caches their content once.
"""

from __future__ import annotations

import json
import logging
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Protocol

from modelcask.digest import Digest
from modelcask.errors import ModelcaskError, ModelNotFound
from modelcask.hub_names import MAIN, PREFIX, main_tag, revision
from modelcask.manifests import HEADER_TYPE, TENSOR_TYPE, Layer
from modelcask.names import DEFAULT_HOST, DEFAULT_NAMESPACE, ModelName
from modelcask.store import Store
from modelcaskfs.conventions import DIFFUSERS, Children, Leaf
from modelcaskfs.model_folder import ModelFolder
from modelcaskfs.nodes import NO_XATTRS, Entry, FileNode, LinkNode, Node, model_directory, versioned
from modelcaskfs.spans import SpanFile

log = logging.getLogger("modelcaskfs")

# Host, namespace and name: where the tags of a repository lie below `manifests/`.
Place = tuple[str, str, str]


class Models(Protocol):
    """Where the models come from: the tree."""

    @property
    def store(self) -> Store: ...
    def model(self, name: ModelName) -> ModelFolder: ...


class HubCache:
    """The top of the view: a folder for each repository."""

    key = "/hub"
    lasting = False
    may_wait = False
    xattrs = NO_XATTRS

    def __init__(self, models: Models) -> None:
        self._models = models
        self._manifests = models.store.manifests

    @property
    def mtime_ns(self) -> int:
        places: list[tuple[str, ...]] = [()]
        for host in self._manifests.children():
            places += [(host,), *((host, namespace) for namespace in self._manifests.children(host))]
        return max(_mtime(self._models, *place) for place in places)

    def lookup(self, name: str) -> Node | None:
        parts = name.removeprefix(PREFIX).split("--")
        if not name.startswith(PREFIX):
            return None
        if any(part in ("", ".", "..") for part in parts):
            return None
        for place in _readings(parts):
            if self._is_repository(place):
                return _Repository(self._models, f"{self.key}/{name}", place)
        if len(parts) == 1 and self._is_repository((DEFAULT_HOST, DEFAULT_NAMESPACE, *parts)):
            return LinkNode(f"{self.key}/{name}", self.mtime_ns, f"{PREFIX}{DEFAULT_NAMESPACE}--{parts[0]}")
        return None

    def entries(self) -> Iterator[Entry]:
        hosts = self._manifests.children()
        seen = set()
        for host in hosts:
            for namespace in self._manifests.children(host):
                for name in self._manifests.children(host, namespace):
                    above = () if host == DEFAULT_HOST else (host,)
                    folder = PREFIX + "--".join((*above, namespace, name))
                    if folder not in seen and self._is_repository((host, namespace, name)):
                        seen.add(folder)
                        yield Entry(folder, stat.S_IFDIR, f"{self.key}/{folder}")

    def _is_repository(self, place: tuple[str, ...]) -> bool:
        status = self._manifests.stat(*place)
        return status is not None and stat.S_ISDIR(status.st_mode)


class _Repository:
    """One repository: what clients call refs, snapshots and trees."""

    lasting = False
    may_wait = False
    xattrs = NO_XATTRS

    def __init__(self, models: Models, key: str, place: Place) -> None:
        self.key = key
        self._models = models
        self._place = place
        self._levels: dict[str, _Level] = {
            "refs": _Refs(f"{key}/refs", self),
            "snapshots": _Snapshots(f"{key}/snapshots", self),
            "trees": _Trees(f"{key}/trees", self),
        }

    @property
    def mtime_ns(self) -> int:
        return _mtime(self._models, *self._place)

    def lookup(self, name: str) -> Node | None:
        if name == ".no_exist":
            return _Absences(f"{self.key}/{name}", self)
        return self._levels.get(name)

    def entries(self) -> Iterator[Entry]:
        for name, level in self._levels.items():
            yield Entry(name, stat.S_IFDIR, level.key)

    def model(self, tag: str) -> ModelFolder | None:
        """The model of a tag, None if there is none. Raises InvalidManifest, OSError."""
        try:
            model = self._models.model(ModelName(*self._place, tag))
        except (ModelNotFound, FileNotFoundError, IsADirectoryError):
            return None
        return model if model.stored.manifest.is_image_model else None

    def models(self) -> dict[str, ModelFolder]:
        """All models by tag. One that cannot be read is passed over: its siblings must be found all the same."""
        models = {}
        for tag in self._models.store.manifests.children(*self._place):
            try:
                if (model := self.model(tag)) is not None:
                    models[tag] = model
            except (ModelcaskError, OSError) as error:
                log.error("%s", error)
        return models

    def by_revision(self) -> dict[str, ModelFolder]:
        """The models by what stands for their commits; of equal ones the first tag's."""
        models: dict[str, ModelFolder] = {}
        for model in self.models().values():
            models.setdefault(revision(model.stored.digest), model)
        return models


class _Level(ABC):
    """A directory of a repository."""

    lasting = False
    may_wait = True
    xattrs = NO_XATTRS

    def __init__(self, key: str, repository: _Repository) -> None:
        self.key = key
        self._repository = repository

    @property
    def mtime_ns(self) -> int:
        return self._repository.mtime_ns

    @abstractmethod
    def lookup(self, name: str) -> Node | None:
        """The node of this name, None if there is none."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """What a listing shows."""

    def _file(self, model: ModelFolder, name: str, build: Callable[[], bytes]) -> FileNode:
        """A file of this directory that follows from one state of a model."""
        key = self._file_key(model, name)

        def content() -> SpanFile:
            data = build()
            return SpanFile([(data, len(data))])

        return FileNode(key, model.stored.mtime_ns, model.built(key, content), model.protection)

    def _file_key(self, model: ModelFolder, name: str) -> str:
        return versioned(f"{self.key}/{name}", model.stored.version)


class _Refs(_Level):
    """A file for each tag that says which snapshot it means; `main` is what clients look for by default."""

    def lookup(self, name: str) -> Node | None:
        model = self._repository.model(name)
        if model is None and name == MAIN:
            models = self._repository.models()
            tag = main_tag(models)
            model = None if tag is None else models[tag]
        if model is None:
            return None
        stored = model.stored
        return self._file(
            model, name, lambda: revision(stored.digest).encode()
        )  # a newline would be read as part of it

    def entries(self) -> Iterator[Entry]:
        models = self._repository.models()
        tag = main_tag(models)
        refs = models if tag is None else {MAIN: models[tag], **models}
        for name, model in refs.items():
            yield Entry(name, stat.S_IFREG, self._file_key(model, name))


class _Snapshots(_Level):
    """A model folder for each state that a tag is in now."""

    def lookup(self, name: str) -> Node | None:
        model = self._repository.by_revision().get(name)
        if model is None:
            return None
        files = f"/{DIFFUSERS.name}/{model.stored.name.view_path}"
        return model_directory(f"{self.key}/{name}", model, DIFFUSERS, files=files)

    def entries(self) -> Iterator[Entry]:
        for name, model in self._repository.by_revision().items():
            yield Entry(name, stat.S_IFDIR, self._file_key(model, name))


class _Trees(_Level):
    """What each snapshot holds, as huggingface_hub writes it down."""

    def lookup(self, name: str) -> Node | None:
        model = self._repository.by_revision().get(name.removesuffix(".json"))
        if model is None or not name.endswith(".json"):
            return None
        return self._file(model, name, lambda: _tree(model))

    def entries(self) -> Iterator[Entry]:
        for name, model in self._repository.by_revision().items():
            yield Entry(f"{name}.json", stat.S_IFREG, self._file_key(model, f"{name}.json"))


class _Absences(_Level):
    """What a snapshot does not hold: transformers, offline, takes a missing file for one that may exist elsewhere,
    and gives up, unless an empty file stands for it here. Found by name, not listed.
    """

    def lookup(self, name: str) -> Node | None:
        model = self._repository.by_revision().get(name)
        return None if model is None else _Absent(self._file_key(model, name), model, DIFFUSERS.children(model))

    def entries(self) -> Iterator[Entry]:
        return iter(())


class _Absent:
    """The complement of one directory: every name that it lacks; with a dot it is a file, without a directory."""

    lasting = True
    may_wait = False
    xattrs = NO_XATTRS

    def __init__(self, key: str, model: ModelFolder, present: Children) -> None:
        self.key = key
        self._model = model
        self._present = present

    @property
    def mtime_ns(self) -> int:
        return self._model.stored.mtime_ns

    def lookup(self, name: str) -> Node | None:
        key = f"{self.key}/{name}"
        found = self._present.get(name)
        if isinstance(found, dict):
            return _Absent(key, self._model, found)
        if found is not None:
            return None
        if "." in name:
            return FileNode(key, self.mtime_ns, SpanFile([]), self._model.protection)
        return _Absent(key, self._model, {})

    def entries(self) -> Iterator[Entry]:
        return iter(())


def _tree(model: ModelFolder) -> bytes:
    files = {
        str(path): {"size": _size(model, leaf), "blob_id": _identity(model, path, leaf)}
        for path, leaf in sorted(DIFFUSERS.leaves(model), key=lambda file: file[0])
    }
    return json.dumps({"format_version": 1, "files": files}, indent=1).encode()


def _size(model: ModelFolder, leaf: Leaf) -> int:
    assert not isinstance(leaf, PurePosixPath)
    return (model.content(leaf) if isinstance(leaf, Layer) else leaf.content(model)).size


def _identity(model: ModelFolder, path: PurePosixPath, leaf: Leaf) -> str:
    """40 hex digits that differ where the file's bytes do: of its digest, or of the digests it is made of."""
    if isinstance(leaf, Layer) and leaf.media_type != HEADER_TYPE:
        return revision(leaf.digest)
    header = str(leaf.digest) if isinstance(leaf, Layer) else str(path)
    below = f"{path.parent}/"
    tensors = (str(layer) for layer in model.stored.manifest.of_type(TENSOR_TYPE) if layer.name.startswith(below))
    return revision(Digest.of("\n".join([header, *tensors]).encode()))


def _readings(parts: list[str]) -> Iterator[Place]:
    """What the parts of a folder's name can mean: a `--` may stand in a name, too."""
    for first in range(1, len(parts)):
        yield DEFAULT_HOST, "--".join(parts[:first]), "--".join(parts[first:])
    for first in range(1, len(parts)):
        host = "--".join(parts[:first])
        for second in range(first + 1, len(parts) if host != DEFAULT_HOST else 0):
            yield host, "--".join(parts[first:second]), "--".join(parts[second:])


def _mtime(models: Models, *place: str) -> int:
    status = models.store.manifests.stat(*place)
    return status.st_mtime_ns if status else 0
