"""verify: reads blobs again and tells which are not what their digest stands for.

A corrupt blob is moved to `quarantine/`: nothing reads wrong bytes from it any more, and importing the
model again stores it anew.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from modelcask import durable
from modelcask.digest import Digest
from modelcask.errors import InvalidManifest
from modelcask.manifests import StoredManifest
from modelcask.names import ModelName
from modelcask.store import Store

_PIECE = 1 << 20

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Damage:
    """A blob that is not what it should be.

    Attributes:
        path: where it lies: quarantined if it was corrupt, where it should be if it is missing.
    """

    digest: Digest
    path: Path
    used_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """What a run found.

    Attributes:
        checked, read_bytes: blobs looked at, bytes read of them.
        unreadable: manifests that cannot be read, so that nothing is known of what they need.
    """

    checked: int
    read_bytes: int
    corrupt: tuple[Damage, ...]
    missing: tuple[Damage, ...]
    unreadable: tuple[InvalidManifest, ...]

    @property
    def is_sound(self) -> bool:
        return not (self.corrupt or self.missing or self.unreadable)


def verify(
    store: Store, names: Iterable[ModelName] = (), *, quick: bool, report: Report, stop: threading.Event
) -> Verification:
    """Check the blobs of the models `names`, or every blob of the store if there are none.

    Args:
        quick: compare sizes only; reads no blob.
        report: called with bytes done and in total.
        stop: when set, ends soon with what was found so far.

    Raises:
        ModelNotFound: one of `names` is not there.
    """
    chosen = [store.manifests.read(name) for name in names]
    manifests, unreadable = _all_manifests(store)
    users: dict[Digest, list[str]] = defaultdict(list)
    for stored in manifests:
        for digest in stored.manifest.blobs():
            users[digest].append(str(stored.name))
    expected = _expected_sizes(chosen or manifests)
    present = {digest: size for digest in expected if (size := store.blobs.size(digest)) is not None}
    if not chosen:
        present.update(store.blobs.enumerate())

    def damage(digest: Digest, path: Path) -> Damage:
        return Damage(digest, path, tuple(users.get(digest, ())))

    missing = [damage(digest, store.blobs.path(digest)) for digest in sorted(expected.keys() - present.keys())]
    wrong = {digest for digest, size in present.items() if digest in expected and size not in expected[digest]}
    read_bytes = 0
    if not quick:
        reading = _Reading(store, report, stop, sum(present.values()))
        wrong |= reading.corrupt_among(sorted(present.keys() - wrong))
        read_bytes = reading.done
    corrupt = [damage(digest, _quarantine(store, digest)) for digest in sorted(wrong)]
    return Verification(
        len(present) + len(missing), read_bytes, tuple(corrupt), tuple(missing), () if chosen else unreadable
    )


def _all_manifests(store: Store) -> tuple[list[StoredManifest], tuple[InvalidManifest, ...]]:
    manifests, unreadable = [], []
    for path in store.manifests.files():
        try:
            manifests.append(store.manifests.read_path(path))
        except InvalidManifest as error:
            unreadable.append(error)
        except FileNotFoundError:
            continue  # removed meanwhile
    return manifests, tuple(unreadable)


def _expected_sizes(manifests: Iterable[StoredManifest]) -> dict[Digest, set[int]]:
    sizes: dict[Digest, set[int]] = defaultdict(set)
    for stored in manifests:
        for digest, size in stored.manifest.blobs().items():
            sizes[digest].add(size)
    return sizes


class _Reading:
    """Hashes blobs on all cores."""

    def __init__(self, store: Store, report: Report, stop: threading.Event, total: int) -> None:
        self._store = store
        self._report = report
        self._stop = stop
        self._total = total
        self._lock = threading.Lock()
        self.done = 0

    def corrupt_among(self, digests: list[Digest]) -> set[Digest]:
        with ThreadPoolExecutor(os.cpu_count() or 2, "verify") as pool:
            return {
                digest for digest, sound in zip(digests, pool.map(self._is_sound, digests), strict=True) if not sound
            }

    def _is_sound(self, digest: Digest) -> bool:
        sha = hashlib.sha256()
        try:
            with self._store.blobs.path(digest).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while (piece := file.read(_PIECE)) and not self._stop.is_set():
                    sha.update(piece)
                    self._advance(len(piece))
        except FileNotFoundError:
            return True  # gc took it meanwhile
        return self._stop.is_set() or sha.hexdigest() == digest.hex

    def _advance(self, count: int) -> None:
        with self._lock:
            self.done += count
            done = self.done
        self._report(done, self._total)


def _quarantine(store: Store, digest: Digest) -> Path:
    final = store.quarantine / digest.blob_name
    durable.make_directory(store.quarantine)
    durable.move(store.blobs.path(digest), final)
    return final
