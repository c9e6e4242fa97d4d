"""Leases: what protects blobs that are in use but not (or no longer) reached by a manifest.

A lease is a file in `leases/`, locked with flock for as long as its holder lives; the kernel drops the lock
with the process, so a lease outlives nobody. Its lines are digests.

The gate orders leases and gc: a holder that adds digests to a lease and then looks whether the blobs exist
does so under the shared gate; gc deletes under the exclusive gate, in small portions, and reads leases anew
for each portion. So a blob that was seen to exist under a lease stays. Both hold the gate for milliseconds.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from modelcask import durable
from modelcask.digest import Digest
from modelcask.errors import InvalidDigest

_GATE = "gate"


class Lease:
    """Protects digests from gc until it is released. Threads may share one."""

    def __init__(self, directory: Path, kind: str, protected: Iterable[Digest] = ()) -> None:
        """Take a lease of `kind` (a word that shows in the file's name).

        With `protected`, those are covered before the lease can be seen.
        """
        self._directory = directory
        self._path = directory / f"{kind}-{durable.unique_suffix()}"
        self._lock = threading.Lock()
        self._gate = os.open(directory / _GATE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with shared_gate(directory):
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                durable.write_all(self._fd, _lines(protected))
        except BaseException:
            os.close(self._gate)
            raise

    @property
    def name(self) -> str:
        """Unique among live leases; also names the holder's folder in `tmp/`."""
        return self._path.name

    @contextmanager
    def protecting(self, digest: Digest) -> Iterator[None]:
        """Cover `digest`; what the body finds out about its blob stays true while the lease is held."""
        # The lock is needed: flock belongs to the open file, two threads would undo each other's.
        with self._lock:
            fcntl.flock(self._gate, fcntl.LOCK_SH)
            try:
                durable.write_all(self._fd, _lines((digest,)))
                yield
            finally:
                fcntl.flock(self._gate, fcntl.LOCK_UN)

    def release(self) -> None:
        """Give the lease up. What a manifest does not reach by now, gc may take."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
        os.close(self._gate)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextmanager
def shared_gate(directory: Path) -> Iterator[None]:
    """Keep gc from deleting while the body runs; keep it short."""
    with _gate(directory, fcntl.LOCK_SH):
        yield


@contextmanager
def exclusive_gate(directory: Path) -> Iterator[None]:
    """Keep everyone from taking or widening a lease while the body runs; keep it short."""
    with _gate(directory, fcntl.LOCK_EX):
        yield


def live(directory: Path) -> dict[str, set[Digest]]:
    """The live leases by name, each with what it protects; none where the directory is missing.

    A lease that is just being taken may be passed over, unless the caller holds the exclusive gate.
    """
    leases: dict[str, set[Digest]] = {}
    for path in _lease_files(directory):
        try:
            with path.open("rb") as file:
                if _is_held(file.fileno()):
                    leases[path.name] = set(_digests(file.read()))
        except FileNotFoundError:
            continue  # released meanwhile
    return leases


def protected(directory: Path) -> set[Digest]:
    """All that the live leases protect; see `live`."""
    return set().union(*live(directory).values())


def remove_dead(directory: Path) -> None:
    """Remove the leases of holders that died. Call it under the exclusive gate: one being taken looks dead."""
    for path in _lease_files(directory):
        with path.open("rb") as file:
            if not _is_held(file.fileno()):
                path.unlink(missing_ok=True)


@contextmanager
def _gate(directory: Path, operation: int) -> Iterator[None]:
    fd = os.open(directory / _GATE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, operation)
        yield
    finally:
        os.close(fd)


def _lease_files(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.name != _GATE]
    except FileNotFoundError:
        return []


def _is_held(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _lines(digests: Iterable[Digest]) -> bytes:
    return b"".join(f"{digest}\n".encode() for digest in digests)


def _digests(text: bytes) -> Iterator[Digest]:
    # A last line that was not written to its end is no digest yet and protects nothing.
    for line in text.decode(errors="replace").splitlines():
        try:
            yield Digest.parse(line)
        except InvalidDigest:
            continue
