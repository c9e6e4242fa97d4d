"""Ways to read a whole file that the benchmarks of the mount compare, each into memory that is there already."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

_READ = 1 << 20
_COPY = 16 << 20


def read_all(path: Path) -> float:
    """GB/s of one read(2) of 1 MiB after the other."""
    buffer = bytearray(_READ)
    total = 0
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total / (time.perf_counter() - started) / 1e9


def map_all(path: Path) -> float:
    """GB/s of copying out of a private mapping, advised as diffusers does."""
    # glibc's memmove copies backwards where both ends lie at the same place of a page; no read-ahead follows that.
    buffer = memoryview(bytearray(_COPY + 2048))[2048:]
    started = time.perf_counter()
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.close(fd)
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    size = len(mapped)
    with memoryview(mapped) as data:
        for begin in range(0, size, _COPY):
            part = data[begin : begin + _COPY]
            buffer[: len(part)] = part
            part.release()
    mapped.close()
    return size / (time.perf_counter() - started) / 1e9


def drop(paths: Iterable[Path]) -> None:
    """Drop the page cache of these files, and of nothing below a filesystem in userspace that serves them."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(paths: Iterable[Path]) -> None:
    """Read these files into the page cache."""
    for path in paths:
        read_all(path)
