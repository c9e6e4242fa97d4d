"""What the page cache holds of blobs after they were served."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from modelcask.blobs import BlobStore
from modelcask.digest import Digest
from modelcask.errors import CorruptBlob
from modelcaskfs.blob_reader import BlobReader
from modelcaskfs.reader import SpanReader
from modelcaskfs.spans import BlobRange, SpanFile

_READ = 128 << 10


def cached_bytes(path: Path) -> int:
    return int(subprocess.check_output(["fincore", "--bytes", "--noheadings", "--output", "RES", path]))


def serve(directory: Path, *, memory_is_short: bool) -> tuple[Path, int]:
    """Read a file of two blobs as the kernel does; the larger blob, and its size."""
    blobs = BlobStore(directory)
    spans: list[tuple[BlobRange, int]] = []
    for size in (21 << 20, 100_000):
        data = os.urandom(size)
        digest = Digest.of(data)
        path = blobs.path(digest)
        with path.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        spans.append((BlobRange(digest, size, 88), size - 88))
    reader = SpanReader(blobs, max_open=4, memory_is_short=lambda: memory_is_short)
    file = SpanFile(spans)
    buffer = bytearray(_READ)
    for offset in range(0, file.size, _READ):
        reader.read(file, offset, memoryview(buffer))
    return blobs.path(spans[0][0].digest), spans[0][0].blob_size


@pytest.mark.parametrize("is_short", [True, False])
def test_pages_of_a_served_blob_are_let_go_of_where_memory_is_short(tmp_path: Path, is_short: bool) -> None:
    path, size = serve(tmp_path, memory_is_short=is_short)
    if is_short:
        assert cached_bytes(path) < size // 10
    else:
        assert cached_bytes(path) >= size


def test_a_kernel_that_says_0_for_what_must_be_waited_for_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux 5.9 and 5.10 do."""
    blobs, data = BlobStore(tmp_path), os.urandom(10_000)
    digest = Digest.of(data)
    blobs.path(digest).write_bytes(data)
    preadv = os.preadv

    def of_such_a_kernel(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        return 0 if flags & os.RWF_NOWAIT else preadv(fd, buffers, offset, flags)

    reader, buffer = BlobReader(blobs, max_open=1), bytearray(len(data))
    source = BlobRange(digest, len(data), 0)
    assert reader.read(source, 0, memoryview(buffer), wait=True)
    monkeypatch.setattr(os, "preadv", of_such_a_kernel)
    assert not reader.read(source, 0, memoryview(buffer), wait=False)
    assert reader.read(source, 0, memoryview(buffer), wait=True)
    assert buffer == data
    os.truncate(blobs.path(digest), 5000)
    with pytest.raises(CorruptBlob, match="cut short"):
        reader.read(source, 0, memoryview(buffer), wait=True)
