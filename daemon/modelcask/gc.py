"""gc: removes the blobs that nothing reaches. Plan first, then delete.

A blob is reached by a manifest or by a live lease. A manifest that cannot be read, or has rotted, stops gc
before it deletes anything: what it would have protected is not known.

The plan is made without keeping anyone waiting. Deleting goes in small portions under the exclusive gate,
and for each portion the leases, then the manifests that are new since, are looked at again: whoever began
to use a blob meanwhile has done so under the gate, and is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from modelcask import durable, leases
from modelcask.digest import Digest
from modelcask.errors import InvalidStore
from modelcask.manifests import version_of
from modelcask.store import Store

# A few milliseconds of unlinking, for which a reader that opens a file may have to wait.
_PORTION = 512


@dataclass(frozen=True, slots=True)
class Garbage:
    """What gc removed, or would."""

    blobs: dict[Digest, int]

    @property
    def size(self) -> int:
        return sum(self.blobs.values())


class _Reached:
    """The blobs that manifests reach, each manifest read once as long as its file does not change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._versions: dict[Path, tuple[int, int, int]] = {}
        self.blobs: set[Digest] = set()

    def update(self) -> None:
        """Read what is new; what was reached once stays so. Raises InvalidManifest."""
        new = []
        for path in self._store.manifests.files():
            try:
                if self._versions.get(path) != version_of(path.stat()):
                    new.append(self._store.manifests.read_path(path))
            except FileNotFoundError:
                continue  # removed meanwhile
        if new and (damaged := self._store.check_as_imported(new)):
            raise damaged[0]
        for stored in new:
            self.blobs.update(stored.manifest.blobs())
            self._versions[stored.path] = stored.version


def find_garbage(store: Store) -> Garbage:
    """The plan: what gc would remove now.

    Raises:
        InvalidManifest: a manifest cannot be read; names it. InvalidStore: the manifests are not there.
    """
    return _plan(store, _Reached(store))


def collect(store: Store) -> Garbage:
    """Remove what nothing reaches, and what dead writers left in `tmp/`.

    Raises:
        InvalidManifest: a manifest cannot be read; nothing more was removed.
    """
    store.remove_abandoned_files()
    reached = _Reached(store)
    plan = _plan(store, reached)
    if plan.blobs:
        # A manifest may be replaced or removed and that not be flushed yet, its writer killed. Were blobs gone before,
        # a power cut could bring the old manifest back without them; btrfs does.
        durable.sync_filesystem(store.root)
    removed: dict[Digest, int] = {}
    planned = iter(plan.blobs.items())
    while portion := list(islice(planned, _PORTION)):
        with leases.exclusive_gate(store.leases):
            leased = leases.protected(store.leases)
            reached.update()
            for digest, size in portion:
                if digest not in leased and digest not in reached.blobs:
                    store.blobs.path(digest).unlink(missing_ok=True)
                    removed[digest] = size
    return Garbage(removed)


def _plan(store: Store, reached: _Reached) -> Garbage:
    # Blobs first: one that appears later cannot be in the plan.
    present = dict(store.blobs.enumerate())
    if present and not store.manifests.exist:
        raise InvalidStore(
            store.root / "manifests",
            "is not there, so what the models need is not known",
            "restore it, or make an empty folder if all models are to go",
        )
    leased = leases.protected(store.leases)
    reached.update()
    return Garbage({d: size for d, size in sorted(present.items()) if d not in leased and d not in reached.blobs})
