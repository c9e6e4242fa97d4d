"""verify: reads blobs again and tells which are not what their digest stands for.

A corrupt blob is moved to `quarantine/`: nothing reads wrong bytes from it any more, and importing the
model again stores it anew.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import xxhash

from modelcask import durable, lanes, leases, paired_sha256
from modelcask.digest import Digest
from modelcask.errors import IndexFailed, InvalidManifest
from modelcask.lanes import Hashing, ToHash
from modelcask.manifests import StoredManifest
from modelcask.names import ModelName
from modelcask.store import Store

log = logging.getLogger("modelcask")

_PIECE = 512 << 10
_THREADS = os.cpu_count() or 2

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
        unreadable: manifests that cannot be read or have rotted, so that what they need is not known.
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
        quick: compare fingerprints where they are known, which is as fast as the disk; sha256 decides where
            one differs, and where none is known.
        report: called with bytes done and in total.
        stop: when set, ends soon with what was found so far.

    Raises:
        ModelNotFound: one of `names` is not there.
    """
    chosen = [store.manifests.read(name) for name in names]
    manifests, unreadable = _all_manifests(store)
    users: dict[Digest, list[StoredManifest]] = defaultdict(list)
    for stored in manifests:
        for digest in stored.manifest.blobs():
            users[digest].append(stored)
    expected = {digest for stored in chosen or manifests for digest in stored.manifest.blobs()}
    present = {digest: size for digest in expected if (size := store.blobs.size(digest)) is not None}
    if not chosen:
        present.update(store.blobs.enumerate())

    def damage(digest: Digest, path: Path) -> Damage:
        return Damage(digest, path, tuple(str(stored.name) for stored in users.get(digest, ())))

    # What is not there may belong to a model that was removed since its manifest was read, and gc took it.
    missing = [
        damage(digest, store.blobs.path(digest))
        for digest in sorted(expected - present.keys())
        if any(stored.is_unchanged() for stored in users[digest])
    ]
    fingerprints = _fingerprints(store) if quick else {}
    reading = _Reading(store, fingerprints, report, stop, sum(present.values()))
    corrupt = reading.corrupt_among(sorted(present))
    set_aside = tuple(damage(digest, _quarantine(store, digest, found)) for digest, found in sorted(corrupt.items()))
    # A missing one may be what a verify that was killed has quarantined.
    damaged = corrupt.keys() | {each.digest for each in missing}
    for stored in _all_manifests(store)[0]:
        # What a mount or the kernel has read of the damaged bytes must not be shown again.
        if not damaged.isdisjoint(stored.manifest.blobs()):
            store.manifests.renew(stored)
    looked_at = chosen or manifests
    wrong_sizes = [error for stored in looked_at for error in _wrong_sizes(stored, present, corrupt)]
    return Verification(
        reading.checked + len(missing),
        reading.done,
        set_aside,
        tuple(missing),
        (*(() if chosen else unreadable), *store.check_as_imported(looked_at), *wrong_sizes),
    )


def _fingerprints(store: Store) -> Mapping[Digest, int]:
    try:
        return store.index.fingerprints() if store.has_index else {}
    except IndexFailed as error:
        log.warning("%s", error)
        return {}  # sha256 needs none


def _wrong_sizes(
    stored: StoredManifest, present: Mapping[Digest, int], corrupt: Container[Digest]
) -> Iterator[InvalidManifest]:
    """Where a manifest gives a sound blob another size, and so is itself what is damaged."""
    for layer in (stored.manifest.config, *stored.manifest.layers):
        size = present.get(layer.digest, layer.size)
        if size != layer.size and layer.digest not in corrupt:
            yield InvalidManifest(stored.path, f"says that {layer.digest} has {layer.size} bytes, it has {size}")
            return


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


class _Reading:
    """Reads blobs again, on all cores, two at a time on each (`lanes`)."""

    def __init__(
        self, store: Store, fingerprints: Mapping[Digest, int], report: Report, stop: threading.Event, total: int
    ) -> None:
        self._store = store
        self._fingerprints = fingerprints
        self._report = report
        self._stop = stop
        self._total = total
        # Where fingerprints are known, little is left for sha256.
        self._kernel = None if fingerprints else paired_sha256.kernel_for(total, threads=_THREADS)
        self._lock = threading.Lock()
        self.done = 0
        self.checked = 0

    def corrupt_among(self, digests: list[Digest]) -> dict[Digest, os.stat_result]:
        """The corrupt ones, as they were when they were read."""
        found: dict[Digest, os.stat_result] = {}

        def check(digest: Digest) -> Hashing[None]:
            status = yield from self._damaged(digest)
            if status is not None:
                found[digest] = status

        with ThreadPoolExecutor(_THREADS, "verify") as pool:
            for thread in lanes.start([check(digest) for digest in digests], pool, _THREADS):
                thread.result()
        return found

    def _damaged(self, digest: Digest) -> Hashing[os.stat_result | None]:
        """The blob's stat if it is corrupt. One that cannot be read is."""
        path = self._store.blobs.path(digest)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return status
            with path.open("rb", buffering=0) as file:
                known = self._fingerprints.get(digest)
                # A fingerprint that differs may itself be wrong; sha256 decides.
                if known is not None and self._fingerprint(file) == known:
                    return None
                file.seek(0)
                sound = (yield from self._sha256(file)) == digest.hex or self._stop.is_set()
                return None if sound else status
        except FileNotFoundError:
            return None  # gc took it meanwhile
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            log.warning("%s: cannot be read: %s", path, error.strerror)
            return status
        finally:
            with self._lock:
                self.checked += not self._stop.is_set()

    def _fingerprint(self, file: FileIO) -> int:
        hasher = xxhash.xxh3_64()
        for piece in self._pieces(file):
            hasher.update(piece)
        fingerprint: int = hasher.intdigest()
        return fingerprint

    def _sha256(self, file: FileIO) -> Hashing[str]:
        sha = paired_sha256.sha256(self._kernel, b"")
        for piece in self._pieces(file):
            yield ToHash(sha, piece)
        return sha.hexdigest()

    def _pieces(self, file: FileIO) -> Iterator[memoryview]:
        """The file's bytes up to its end, or to `stop`; each piece is good until the next."""
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        buffer = memoryview(bytearray(min(_PIECE, os.fstat(file.fileno()).st_size + 1)))
        while (count := file.readinto(buffer)) and not self._stop.is_set():
            yield buffer[:count]
            self._advance(count)

    def _advance(self, count: int) -> None:
        with self._lock:
            self.done += count
            done = self.done
        self._report(done, max(done, self._total))


def _quarantine(store: Store, digest: Digest, found: os.stat_result | None) -> Path:
    """Set a corrupt blob aside, unless it was replaced since it was looked at; where it lies now."""
    path, final = store.blobs.path(digest), store.quarantine / digest.blob_name
    try:
        durable.make_directory(store.quarantine)
        with leases.exclusive_gate(store.leases):  # nobody who finds a blob under the gate loses it
            now = path.stat()
            if found is not None and (now.st_ino, now.st_mtime_ns) == (found.st_ino, found.st_mtime_ns):
                durable.move(path, final)
                return final
    except FileNotFoundError:
        return path  # gc took it meanwhile
    except OSError as error:
        log.warning("%s: could not be quarantined: %s", path, error.strerror)
    return path
