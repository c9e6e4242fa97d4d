"""Making bytes durable: the one module that flushes and renames.

The order it keeps (see DESIGN.md, "Order of writes"): bytes are on disk before they get their final name,
and a name is on disk before anything is told that it exists.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Filesystem:
    """The filesystem of a folder, to be flushed; close it after.

    Open it before what it is to flush is written: the kernel tells an error of write-back to those who have the
    filesystem open then. Who comes later hears of it only if nobody, such as another program's `sync`, has before.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def flush(self) -> None:
        """Flush all that was written to it, as one operation. May be called again.

        One syncfs(2) in place of an fsync a file: a model has thousands of blobs, and an fsync each costs a
        journal commit each. Linux reports write-back errors through it since 5.8.
        """
        if _libc.syncfs(self._fd):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self._directory))

    def close(self) -> None:
        os.close(self._fd)


def sync_filesystem(directory: Path) -> None:
    """Flush the filesystem of `directory`, for the order of what others wrote; of their errors it may not hear."""
    filesystem = Filesystem(directory)
    try:
        filesystem.flush()
    finally:
        filesystem.close()


def start_writeback(fd: int) -> None:
    """Ask the kernel to begin writing the dirty pages of `fd` now, so that the flush to come finds less.

    A hint: filesystems without it are left to write when they will.
    """
    _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def sync_directory(directory: Path) -> None:
    """Flush the names in `directory`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(directory: Path) -> None:
    """Create `directory` and its missing parents durably, whatever the umask.

    It has mode 0755; 2775 in a directory that a group shares (`is_shared`), so that the group shares this one, too.
    """
    if directory.is_dir():
        return
    make_directory(directory.parent)
    try:
        directory.mkdir()
    except FileExistsError:
        return
    directory.chmod(0o2775 if is_shared(directory.parent) else 0o755)
    sync_directory(directory.parent)


def is_shared(directory: Path) -> bool:
    """Whether a group shares the directory: it may write, and what is made in it is the group's (setgid)."""
    shared = stat.S_ISGID | stat.S_IWGRP
    return directory.stat().st_mode & shared == shared


def open_for_all(path: Path) -> int:
    """A descriptor of a file that all writers of its directory write to: locks and the like. Made if it is missing.

    Everyone may read it whatever the umask, and lock it so; the group may write to it if it shares the directory.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    while True:
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            pass
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue  # made meanwhile
        os.fchmod(fd, 0o664 if is_shared(path.parent) else 0o644)
        return fd


def publish_flushed(pairs: Iterable[tuple[Path, Path]], directory: Path) -> None:
    """Give files whose bytes are already durable their final names in `directory`, and flush those.

    Args:
        pairs: temporary path and final path of each.
    """
    for temporary, final in pairs:
        temporary.rename(final)
    sync_directory(directory)


def write_file(final: Path, data: bytes, *, temporary: Path, mode: int) -> None:
    """Put `data` under `final`, replacing what is there: after a crash the old or the new is found, whole.

    Args:
        temporary: a name on the same filesystem that nobody else uses; gone afterwards, also on failure.
    """
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            with naming(final):
                os.fchmod(fd, mode)
                write_all(fd, data)
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(final.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of calls on a descriptor the name of its file."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data` at the file's position."""
    view = memoryview(data)
    while view:
        written = os.write(fd, view)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[written:]


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write all of `data` at `offset`; how many bytes that were."""
    position = offset
    while data:
        written = os.pwrite(fd, data, position)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, position = data[written:], position + written
    return position - offset


def remove_file(path: Path) -> None:
    """Remove `path` durably. Raises FileNotFoundError if it is not there."""
    path.unlink()
    for directory in path.parents:
        try:
            sync_directory(directory)
            break
        except FileNotFoundError:
            continue  # somebody found it empty and removed it: its own name is gone, then


def move(source: Path, final: Path) -> None:
    """Move a file durably within the filesystem."""
    source.rename(final)
    sync_directory(final.parent)
    sync_directory(source.parent)


def unique_suffix() -> str:
    """Text that no other writer on this machine has, for temporary names."""
    return f"{os.getpid()}-{threading.get_ident()}-{os.urandom(4).hex()}"
