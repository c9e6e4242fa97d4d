"""Walking the tree of the mount without a mount."""

from __future__ import annotations

import stat
from pathlib import PurePosixPath

from modelcask.store import Store
from modelcaskfs.nodes import Directory, FileNode, Node
from modelcaskfs.reader import SpanReader
from modelcaskfs.views import Tree


def find(tree: Tree, path: str) -> Node | None:
    node: Node | None = tree.root
    for part in PurePosixPath(path).parts:
        assert node is not None
        node = node.lookup(part)  # type: ignore[attr-defined]
        if node is None:
            return None
    return node


def names(tree: Tree, path: str) -> list[str]:
    node = find(tree, path)
    return sorted(entry.name for entry in node.entries())  # type: ignore[union-attr]


ROOT = PurePosixPath()


def walk(directory: Directory, path: PurePosixPath = ROOT) -> dict[PurePosixPath, Node]:
    found: dict[PurePosixPath, Node] = {}
    for entry in directory.entries():
        node = directory.lookup(entry.name)
        assert node is not None
        assert node.key == entry.key
        if entry.kind == stat.S_IFDIR:
            found |= walk(node, path / entry.name)  # type: ignore[arg-type]
        else:
            found[path / entry.name] = node
    return found


def content(store: Store, node: Node) -> bytes:
    assert isinstance(node, FileNode)
    buffer = bytearray(node.content.size)
    reader = SpanReader(store.blobs, max_open=2)
    assert reader.read(node.content, 0, memoryview(buffer)) == len(buffer)
    return bytes(buffer)


def dropped_files(store: Store, name: str) -> dict[str, bytes]:
    """The files of a stored model as `diffusers/` shows them; none if it is not there."""
    folder = find(Tree(store), f"diffusers/{name.replace(':', '/')}")
    if folder is None:
        return {}
    return {str(path): content(store, node) for path, node in walk(folder).items()}  # type: ignore[arg-type]
