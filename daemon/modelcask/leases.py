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
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from modelcask import durable
from modelcask.digest import Digest
from modelcask.errors import InvalidDigest, ModelcaskError

_GATE = "gate"
_SOLE = "watch"
_SOLE_TRIES, _SOLE_WAIT = 10, 0.05
# The kind of a lease that protects every blob: for a holder that cannot write down which it needs.
EVERYTHING = "everything"


class Lease:
    """Protects digests from gc until it is released. Threads may share one."""

    def __init__(self, directory: Path, kind: str, protected: Iterable[Digest] = ()) -> None:
        """Take a lease of `kind` (a word that shows in the file's name).

        With `protected`, those are covered before the lease can be seen.
        """
        self._directory = directory
        self._path = directory / f"{kind}-{durable.unique_suffix()}"
        self._lock = threading.Lock()
        self._gate = durable.open_for_all(directory / _GATE)
        self._fd = -1
        try:
            with shared_gate(directory):
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
                os.fchmod(self._fd, 0o644)  # whatever the umask: other users' gc must be able to read it
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                with durable.naming(self._path):
                    durable.write_all(self._fd, _lines(protected))
        except BaseException:
            if self._fd >= 0:
                with suppress(OSError):
                    self._path.unlink()
                os.close(self._fd)
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
                with durable.naming(self._path):
                    durable.write_all(self._fd, _lines((digest,)))
                yield
            finally:
                fcntl.flock(self._gate, fcntl.LOCK_UN)

    def release(self) -> None:
        """Give the lease up. What a manifest does not reach by now, gc may take."""
        with suppress(OSError):  # a disk that fails now: closed, the lease is dead, and whoever writes next removes it
            self._path.unlink()
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


def protected(directory: Path) -> Container[Digest]:
    """All that the live leases protect; see `live`."""
    leases = live(directory)
    if any(name.partition("-")[0] == EVERYTHING for name in leases):
        return _Everything()
    return set().union(*leases.values())


def remove_dead(directory: Path) -> None:
    """Remove the leases of holders that died. Call it under the exclusive gate: one being taken looks dead."""
    for path in _lease_files(directory):
        try:
            with path.open("rb") as file:
                if not _is_held(file.fileno()):
                    path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # released meanwhile


class SoleLease:
    """A lease that one process at a time can hold: who watches for the store. Protects nothing."""

    def __init__(self, directory: Path) -> None:
        """Raises `LeaseTaken`, with the other's process id, if another process holds it."""
        self._fd = durable.open_for_all(directory / _SOLE)
        for patience in range(_SOLE_TRIES, -1, -1):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Who only looks whether it is held, holds it for an instant.
                if patience:
                    time.sleep(_SOLE_WAIT)
                    continue
                holder = _read_pid(self._fd)
                os.close(self._fd)
                raise LeaseTaken(directory / _SOLE, holder) from None
        os.pwrite(self._fd, f"{os.getpid():<20}".encode(), 0)

    def __enter__(self) -> SoleLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def sole_holder(directory: Path) -> int | None:
    """The process that holds the sole lease, None if none does."""
    try:
        with (directory / _SOLE).open("rb") as file:
            return _read_pid(file.fileno()) if _is_held(file.fileno()) else None
    except FileNotFoundError:
        return None


@dataclass(eq=False)
class LeaseTaken(ModelcaskError):
    """Another process holds the sole lease."""

    path: Path
    pid: int

    def message(self) -> str:
        return f"{self.path}: process {self.pid} watches for this store already; stop that one first"


class _Everything:
    """Contains every digest."""

    def __contains__(self, _digest: object) -> bool:
        return True


def _read_pid(fd: int) -> int:
    return int(os.pread(fd, 20, 0) or b"0")


@contextmanager
def _gate(directory: Path, operation: int) -> Iterator[None]:
    fd = durable.open_for_all(directory / _GATE)
    try:
        fcntl.flock(fd, operation)
        yield
    finally:
        os.close(fd)


def _lease_files(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.name not in (_GATE, _SOLE)]
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
