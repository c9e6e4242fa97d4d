"""The nodes that the kernel knows, by the numbers it knows them by.

The kernel remembers as many nodes as it likes, and each may hold a model's whole manifest, half a KiB for each of its
tensors. So only where a node was found is remembered; the last few and those that are open are kept, the others found
again in their directory.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass

import xxhash

from modelcask.errors import ModelNotFound
from modelcaskfs.nodes import Directory, Node

ROOT_NODE = 1
"""FUSE's number for the root."""

_KEPT_NODES = 64


@dataclass(slots=True)
class Known:
    """A node the kernel knows: where it was found, how often the kernel was told of it, how often it is open.

    Attributes:
        places: directory and name. Files of the hub view are those of `diffusers/`, so one node can have several, and
            the kernel may forget the directory of one of them while it keeps the node for another's sake.
    """

    key: str
    places: tuple[tuple[int, str], ...]
    lookups: int = 0
    opened: Node | None = None
    openings: int = 0


class KnownNodes:
    """What the kernel knows of a tree. Threads may share it."""

    def __init__(self, root: Node) -> None:
        self._known = {ROOT_NODE: Known(root.key, (), 1, opened=root)}
        self._kept: OrderedDict[int, Node] = OrderedDict()
        self._lock = threading.Lock()

    def at_hand(self, number: int) -> Node | None:
        """The node if it need not be looked for."""
        with self._lock:
            known = self._known.get(number)
            return known.opened or self._kept.get(number) if known else None

    def node(self, number: int) -> Node:
        """The node, found again if it is not kept.

        Raises:
            OSError: ESTALE, it was forgotten, or its name means another node now.
        """
        with self._lock:
            known = self._known.get(number)
            if known is None:
                raise OSError(errno.ESTALE, "forgotten node")
            if known.opened is not None:
                return known.opened
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            places = [(parent, name) for parent, name in known.places if parent in self._known]
        for parent, name in places:
            node = self._found(parent, name)
            if node is not None and node.key == known.key:
                with self._lock:
                    self._keep(number, node)
                return node
        raise OSError(errno.ESTALE, "the model was replaced")

    def directory(self, number: int) -> Directory:
        """As `node`. Raises OSError, ENOTDIR, for what is no directory, too."""
        node = self.node(number)
        if not hasattr(node, "entries"):
            raise OSError(errno.ENOTDIR, "not a directory")
        return node  # type: ignore[return-value]

    def remember(self, node: Node, parent: int, name: str) -> int:
        """The node's number, counting one more lookup. Nodes of equal keys have equal numbers."""
        number, place = number_of(node.key), (parent, name)
        with self._lock:
            known = self._known.setdefault(number, Known(node.key, (place,)))
            if known.key != node.key:
                raise OSError(errno.EIO, f"{node.key} and {known.key} have one inode number")
            if place not in known.places:
                known.places = (place, *(each for each in known.places if each[0] in self._known))
            known.lookups += 1
            self._keep(number, node)
        return number

    def forget(self, number: int, lookups: int) -> None:
        """The kernel gives back so many lookups; with the last it has forgotten the node."""
        with self._lock:
            known = self._known.get(number)
            if known is not None and number != ROOT_NODE:
                known.lookups -= lookups
                if known.lookups <= 0:
                    del self._known[number]
                    self._kept.pop(number, None)

    def open(self, number: int, node: Node) -> Known:
        """Keep the node until as many `close`, which take what this returns: a number may be forgotten before."""
        with self._lock:
            known = self._known[number]
            known.opened, known.openings = node, known.openings + 1
            return known

    def close(self, known: Known) -> None:
        """End one `open`."""
        with self._lock:
            known.openings -= 1
            if not known.openings:
                known.opened = None

    def _found(self, parent: int, name: str) -> Node | None:
        try:
            return self.directory(parent).lookup(name)
        except ModelNotFound:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return None

    def _keep(self, number: int, node: Node) -> None:
        """Under the lock: keep the node, and let go of the one that was longest of no use."""
        self._kept[number] = node
        self._kept.move_to_end(number)
        if len(self._kept) > _KEPT_NODES:
            self._kept.popitem(last=False)


def number_of(key: str) -> int:
    """The number of a node, the same in every mount; 0 and 1 mean other things to FUSE."""
    if key == "/":
        return ROOT_NODE
    return (xxhash.xxh3_64_intdigest(os.fsencode(key)) >> 1) | 2
