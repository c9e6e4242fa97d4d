"""What the tree of the mount is: views at the top, models by name below them, their files inside.

No FUSE here: nodes are looked up and listed by name, and tests need no mount. Two kinds of directories are
told apart. Above a model, they follow the store and are `fleeting`: whoever caches them must look again
within a second. A model's own directory and all below it show one state of one manifest and are `lasting`:
a replaced model appears under other node keys, so whatever was cached or opened of the old one stays true.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator

from modelcask.errors import InvalidManifest, ModelNotFound
from modelcask.manifests import MODEL_INDEX, REPORT_TYPE, Manifest, ManifestStore, version_of
from modelcask.names import DEFAULT_HOST, ModelName
from modelcask.store import Store
from modelcaskfs.blob_folder import BlobFolder
from modelcaskfs.conventions import CONVENTIONS, Convention
from modelcaskfs.hub_view import HubCache
from modelcaskfs.model_folder import ModelFolder
from modelcaskfs.nodes import NO_XATTRS, Directory, Entry, LinkNode, Node, model_directory, versioned

log = logging.getLogger("modelcaskfs")


class Tree:
    """The whole tree of a store. Threads may share it.

    Args:
        self_contained: whether the tree holds the blobs itself, instead of a link to the store's.
        cached_models: how many parsed manifests are kept for models that nobody has open.
    """

    def __init__(self, store: Store, *, self_contained: bool = False, cached_models: int = 32) -> None:
        self._store = store
        self.self_contained = self_contained
        self._models: OrderedDict[tuple[ModelName, tuple[int, int, int]], ModelFolder] = OrderedDict()
        self._cached_models = cached_models
        self._lock = threading.Lock()
        self._quantized: dict[tuple[str, ...], tuple[tuple[int, int, int], bool]] = {}
        self._other_kinds: dict[tuple[str, ...], tuple[tuple[int, int, int], bool]] = {}
        self.root = _Root(self)

    @property
    def store(self) -> Store:
        return self._store

    def holds_quantized(self, parts: tuple[str, ...]) -> bool:
        """Whether the manifest at `parts` below `manifests/` is a quantized model's, or any below that directory.

        Reads a manifest once as long as it does not change, and does not parse it.
        """
        manifests = self._store.manifests
        if len(parts) < 4:
            return any(self.holds_quantized((*parts, child)) for child in manifests.children(*parts))
        status = manifests.stat(*parts)
        if status is None or not stat.S_ISREG(status.st_mode):
            return False
        version = version_of(status)
        known = self._quantized.get(parts)
        if known is None or known[0] != version:
            known = self._quantized[parts] = (version, manifests.mentions(REPORT_TYPE, *parts))
        return known[1]

    def holds_another_kind(self, parts: tuple[str, ...], version: tuple[int, int, int]) -> bool:
        """Whether the manifest at `parts`, of this version, is sound and no image model's: a language model's, say.

        Reads a manifest once as long as it does not change, and parses it only if its text names no index.
        """
        known = self._other_kinds.get(parts)
        if known is None or known[0] != version:
            known = self._other_kinds[parts] = (version, self._is_another_kind(parts))
        return known[1]

    def _is_another_kind(self, parts: tuple[str, ...]) -> bool:
        path = self._store.root.joinpath("manifests", *parts)
        try:
            text = path.read_bytes()
            return f'"{MODEL_INDEX}"'.encode() not in text and not Manifest.decode(text, path).is_image_model
        except (OSError, InvalidManifest):
            return False  # looking the model up will tell

    def model(self, name: ModelName) -> ModelFolder:
        """The folder of the model `name` as it is now.

        Raises:
            ModelNotFound: there is none. InvalidManifest: it cannot be read.
        """
        stat_now = self._store.manifests.stat(*name.path.parts)
        if stat_now is None or not stat.S_ISREG(stat_now.st_mode):  # reading a FIFO would never end
            raise ModelNotFound(str(name), self._store.root)
        key = (name, version_of(stat_now))
        with self._lock:
            if key in self._models:
                self._models.move_to_end(key)
                return self._models[key]
        stored = self._store.manifests.read_path(self._store.root / "manifests" / name.path)
        with self._lock:  # of threads that read it at once, the first one's stays
            folder = self._models.setdefault(key, ModelFolder(stored, self._store.blobs, self._store.leases))
            if len(self._models) > self._cached_models:
                self._models.popitem(last=False)
        return folder


class _Root:
    """The top: a directory for each view, and the blobs."""

    key = "/"
    lasting = False
    may_wait = False
    xattrs = NO_XATTRS

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._named = {convention.name: _Names(tree, convention, ()) for convention in CONVENTIONS}
        self._views: dict[str, Directory] = {**self._named, "hub": HubCache(tree)}
        if tree.self_contained:
            self._views["blobs"] = BlobFolder(tree.store)

    @property
    def mtime_ns(self) -> int:
        return max(view.mtime_ns for view in self._named.values())

    def lookup(self, name: str) -> Node | None:
        if name == "blobs" and not self._tree.self_contained:
            return LinkNode("/blobs", self.mtime_ns, str(self._tree.store.blobs.directory))
        return self._views.get(name)

    def entries(self) -> Iterator[Entry]:
        if not self._tree.self_contained:
            yield Entry("blobs", stat.S_IFLNK, "/blobs")
        for name, view in self._views.items():
            yield Entry(name, stat.S_IFDIR, view.key)


class _Names:
    """A level of names above the models of a view: `[host/]namespace/name/` holds the tags.

    The default host is left out, so one path can mean a namespace of the default host and another host at
    once; both are shown, the default host's first.
    """

    lasting = False
    xattrs = NO_XATTRS

    def __init__(self, tree: Tree, convention: Convention, parts: tuple[str, ...]) -> None:
        self._tree = tree
        self._convention = convention
        self._parts = parts
        self.key = "/" + "/".join((convention.name, *parts))

    @property
    def may_wait(self) -> bool:
        # The names may be tags, whose manifests are read; where quantized models alone are shown, those of all below.
        return self._convention.quantized_only or len(self._parts) >= 2

    @property
    def mtime_ns(self) -> int:
        stats = (self._manifests.stat(*place) for place in self._places())
        return max((status.st_mtime_ns for status in stats if status), default=0)

    def lookup(self, name: str) -> Node | None:
        for place in self._places():
            if self._find((*place, name)) is None:
                continue
            if len(place) < 3:
                return _Names(self._tree, self._convention, (*self._parts, name))
            host, namespace, model_name = place
            if (model := self._model(ModelName(host, namespace, model_name, name))) is not None:
                return model
        return None

    def entries(self) -> Iterator[Entry]:
        seen: set[str] = set()
        for place in self._places():
            for name in self._manifests.children(*place):
                try:
                    found = self._find((*place, name))
                except OSError as error:  # a loop of links, say: its siblings must be found all the same
                    log.error("%s", error)
                    continue
                if found is None or name in seen:
                    continue
                # Looking it up would find nothing.
                if len(place) == 3 and self._tree.holds_another_kind((*place, name), version_of(found)):
                    continue
                seen.add(name)
                key = f"{self.key}/{name}"
                yield Entry(name, stat.S_IFDIR, key if len(place) < 3 else versioned(key, version_of(found)))

    @property
    def _manifests(self) -> ManifestStore:
        return self._tree.store.manifests

    def _places(self) -> Iterator[tuple[str, ...]]:
        """The directories below `manifests/` that this level shows."""
        if len(self._parts) <= 2:
            yield (DEFAULT_HOST, *self._parts)
        if self._parts[:1] != (DEFAULT_HOST,):
            yield self._parts

    def _find(self, parts: tuple[str, ...]) -> os.stat_result | None:
        """The stat of what this level may show: directories down to a name, below it the manifests."""
        status = self._manifests.stat(*parts)
        has_kind = stat.S_ISREG if len(parts) == 4 else stat.S_ISDIR
        if status is None or not has_kind(status.st_mode) or parts == (DEFAULT_HOST,):
            return None
        if self._convention.quantized_only and not self._tree.holds_quantized(parts):
            return None
        return status

    def _model(self, name: ModelName) -> Node | None:
        try:
            model = self._tree.model(name)
        except ModelNotFound:
            return None
        if not model.stored.manifest.is_image_model:
            return None
        return model_directory(f"{self.key}/{name.tag}", model, self._convention)
