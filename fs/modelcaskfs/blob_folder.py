"""`blobs/` served by the mount itself: the store's blobs by their digests, for `-o self_contained`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from modelcask.digest import Digest
from modelcask.errors import InvalidDigest
from modelcask.manifests import version_of
from modelcask.store import Store
from modelcaskfs.nodes import NO_XATTRS, XATTR_PREFIX, Entry, FileNode, versioned
from modelcaskfs.protection import Protection
from modelcaskfs.spans import BlobRange, SpanFile


class BlobFolder:
    """All blobs. What else lies in the store's folder does not show."""

    key = "/blobs"
    lasting = False
    may_wait = True
    xattrs = NO_XATTRS

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def mtime_ns(self) -> int:
        status = self._stat("")
        return status.st_mtime_ns if status else 0

    def lookup(self, name: str) -> FileNode | None:
        try:
            digest = Digest.from_blob_name(name)
        except InvalidDigest:
            return None
        status = self._stat(name)
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        version = version_of(status)

        def is_current() -> bool:
            now = self._stat(name)
            return now is not None and version_of(now) == version

        return FileNode(
            # Of this file, not of the digest alone: a damaged blob that was stored anew is another node.
            versioned(f"{self.key}/{name}", version),
            status.st_mtime_ns,
            SpanFile([(BlobRange(digest, status.st_size, 0), status.st_size)]),
            Protection(self._store.leases, lambda: (digest,), is_current=is_current),
            {XATTR_PREFIX + "digest": str(digest)},
        )

    def entries(self) -> Iterator[Entry]:
        try:
            names = sorted(os.listdir(self._store.blobs.directory))  # noqa: PTH208 - names are all that is wanted
        except FileNotFoundError:
            return
        for name in names:
            if (node := self.lookup(name)) is not None:
                yield Entry(name, stat.S_IFREG, node.key)

    def _stat(self, name: str) -> os.stat_result | None:
        try:
            return (self._store.blobs.directory / name).lstat()
        except FileNotFoundError:
            return None
