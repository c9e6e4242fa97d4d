"""The nodes that the tree of the mount is made of, without FUSE: directories, files and links.

A node has a key. Two kinds are told apart: what is `lasting` never changes under its key, what is `fleeting`
follows the store, and whoever caches it must look again within a second.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Protocol

from modelcask.manifests import MANIFEST_TYPE, Layer
from modelcaskfs.conventions import Children, Convention
from modelcaskfs.model_folder import ModelFolder
from modelcaskfs.protection import Protection
from modelcaskfs.spans import SpanFile

XATTR_PREFIX = "user.modelcask."
NO_XATTRS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory.

    Attributes:
        kind: S_IFDIR, S_IFREG or S_IFLNK.
        key: the key of the node that looking the name up gives.
    """

    name: str
    kind: int
    key: str


class Node(Protocol):
    """Something in the tree.

    Attributes:
        key: names this node for ever; equal keys show equal content, if the node is lasting.
        lasting: whether it never changes under its key.
        xattrs: its extended attributes by name.
    """

    @property
    def key(self) -> str: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def lasting(self) -> bool: ...
    @property
    def xattrs(self) -> Mapping[str, str]: ...


class Directory(Node, Protocol):
    """A node that has others below it.

    Attributes:
        may_wait: whether looking up a name in it reads more of the disk than names, so that it can take its time.
    """

    @property
    def may_wait(self) -> bool: ...

    def lookup(self, name: str) -> Node | None:
        """The node called `name`, None if there is none."""
        ...

    def entries(self) -> Iterator[Entry]:
        """All names, each once."""
        ...


@dataclass(frozen=True, slots=True)
class FileNode:
    """A regular file.

    Attributes:
        protection: of the blobs its content lies in, to be acquired while it is open.
    """

    key: str
    mtime_ns: int
    content: SpanFile
    protection: Protection
    xattrs: Mapping[str, str] = field(default_factory=dict)
    lasting: bool = True


@dataclass(frozen=True, slots=True)
class LinkNode:
    """A symlink."""

    key: str
    mtime_ns: int
    target: str
    xattrs: Mapping[str, str] = field(default_factory=dict)
    lasting: bool = True


class ModelDirectory:
    """A directory within a model; its names are known from the manifest alone.

    Args:
        files: what the keys of the files begin with; where several directories show the same files under the same
            keys, the kernel keeps their content once.
    """

    lasting = True
    may_wait = True

    def __init__(
        self,
        key: str,
        model: ModelFolder,
        children: Children,
        *,
        files: str | None = None,
        xattrs: Mapping[str, str] = NO_XATTRS,
    ) -> None:
        self.key = key
        self.xattrs = xattrs
        self._files = files or key
        self._model = model
        self._children = children

    @property
    def mtime_ns(self) -> int:
        return self._model.stored.mtime_ns

    def lookup(self, name: str) -> Node | None:
        child = self._children.get(name)
        if child is None:
            return None
        key = f"{self._files}/{name}"
        if isinstance(child, PurePosixPath):
            return LinkNode(key, self.mtime_ns, str(child))
        if isinstance(child, dict):
            return ModelDirectory(f"{self.key}/{name}", self._model, child, files=key)
        content = self._model.content(child) if isinstance(child, Layer) else child.content(self._model)
        layer = child if isinstance(child, Layer) else None
        return FileNode(key, self.mtime_ns, content, self._model.protection, _file_xattrs(self._model, layer))

    def entries(self) -> Iterator[Entry]:
        for name, child in self._children.items():
            if isinstance(child, dict):
                yield Entry(name, stat.S_IFDIR, f"{self.key}/{name}")
            else:
                kind = stat.S_IFLNK if isinstance(child, PurePosixPath) else stat.S_IFREG
                yield Entry(name, kind, f"{self._files}/{name}")


def model_directory(
    key: str, model: ModelFolder, convention: Convention, *, files: str | None = None
) -> ModelDirectory:
    """The directory of a model as `convention` shows it. Its keys are of this state of its manifest."""
    version = model.stored.version
    return ModelDirectory(
        versioned(key, version),
        model,
        convention.children(model),
        files=versioned(files or key, version),
        xattrs=_model_xattrs(model),
    )


def versioned(key: str, version: tuple[int, int, int]) -> str:
    """The key of what `key` names as long as the file behind it has `version`."""
    return f"{key}@{'.'.join(map(str, version))}"


def _model_xattrs(model: ModelFolder) -> Mapping[str, str]:
    return _named(
        digest=str(model.stored.digest), media_type=MANIFEST_TYPE, quantization=model.stored.manifest.quantization
    )


def _file_xattrs(model: ModelFolder, layer: Layer | None) -> Mapping[str, str]:
    """Those of the layer that holds the file; a file that the mount itself made up has none."""
    quantization = model.stored.manifest.quantization
    if layer is None:
        return _named(quantization=quantization)
    return _named(digest=str(layer.digest), media_type=layer.media_type, quantization=quantization)


def _named(**values: str | None) -> Mapping[str, str]:
    return {XATTR_PREFIX + name: value for name, value in values.items() if value is not None}
