"""A disk that writes down what is written to it, in order, and can be made to fail.

A FUSE filesystem with a file `disk`, to be the backing of a loop device. The kernel sends it every write of the
device and every flush; each goes to a log, of which every prefix is a state the disk may be in when the power
goes, and what was written after the last flush may be there or not, in any choice. A text written to the file
`mark` goes to the log as well: what the world outside was told by then.

Run as a process: `python recorded_disk.py IMAGE LOG FOLDER`. While a file IMAGE.broken exists, writes to the disk
that begin with what it holds fail with EIO.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuse

_HEAD = struct.Struct("<cQI")
WRITE, FLUSH, MARK = b"W", b"F", b"M"


@dataclass(frozen=True)
class Record:
    """One thing that happened to the disk: a write of `data` at `offset`, a flush, or a mark with `data` as text."""

    kind: bytes
    offset: int
    data: bytes


def read_log(path: Path) -> list[Record]:
    """Everything that happened, in order."""
    return list(_records(path.read_bytes()))


def _records(log: bytes) -> Iterator[Record]:
    position = 0
    while position < len(log):
        kind, offset, length = _HEAD.unpack_from(log, position)
        position += _HEAD.size
        yield Record(kind, offset, log[position : position + length])
        position += length


class RecordedDisk(fuse.Operations):  # type: ignore[misc]
    """The filesystem. It answers one request at a time, so the log's order is the order of what happened."""

    def __init__(self, image: Path, log: Path) -> None:
        self._image = os.open(image, os.O_RDWR)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._broken = image.with_name(image.name + ".broken")

    def getattr(self, path: str, fh: Any = None) -> dict[str, int]:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if path not in ("/disk", "/mark"):
            raise fuse.FuseOSError(errno.ENOENT)
        size = os.fstat(self._image).st_size if path == "/disk" else 0
        return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": size}

    def open(self, path: str, flags: int) -> int:
        return 0

    def truncate(self, path: str, length: int, fh: Any = None) -> None:
        if path != "/mark":
            raise fuse.FuseOSError(errno.EPERM)

    def read(self, path: str, size: int, offset: int, fh: Any) -> bytes:
        return os.pread(self._image, size, offset) if path == "/disk" else b""

    def write(self, path: str, data: bytes, offset: int, fh: Any) -> int:
        if path == "/mark":
            self._record(MARK, 0, data)
            return len(data)
        if self._broken.exists() and data.startswith(self._broken.read_bytes()):
            raise fuse.FuseOSError(errno.EIO)
        os.pwrite(self._image, data, offset)
        self._record(WRITE, offset, data)
        return len(data)

    def fsync(self, path: str, datasync: int, fh: Any) -> None:
        if path == "/disk":
            self._record(FLUSH, 0, b"")

    def _record(self, kind: bytes, offset: int, data: bytes) -> None:
        os.write(self._log, _HEAD.pack(kind, offset, len(data)) + data)


if __name__ == "__main__":
    fuse.FUSE(
        RecordedDisk(Path(sys.argv[1]), Path(sys.argv[2])),
        sys.argv[3],
        foreground=True,
        nothreads=True,
        big_writes=True,
        attr_timeout=3600,
    )
