"""`-o verify`: what is not what its digest says is never given out."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from folders import files_of, shard_bytes, tensor, write_model
from modelcask.store import Store
from modelcaskfs.reader import SpanReader
from modelcaskfs.spans import BlobRange, SpanFile
from running import CommandLine

pytestmark = pytest.mark.fuse

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "m")
    (folder / WEIGHTS).write_bytes(
        shard_bytes({"a": tensor("a", 300, 1000), "b": tensor("b", 16), "c": tensor("c", 100_000)})
    )
    return folder


def flip_last_bit_of_largest(store: Path) -> None:
    blob = max((store / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    before = blob.stat()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_sound_model_is_shown_as_without(cask: CommandLine, fuse: None, folder: Path, tmp_path: Path) -> None:
    del fuse
    cask("import", folder)
    with cask.mounted(tmp_path / "mnt", "-o", "verify") as root:
        for _ in range(2):
            assert files_of(root / "diffusers/library/m/latest") == files_of(folder)


def test_a_flipped_bit_is_never_shown(cask: CommandLine, fuse: None, folder: Path, tmp_path: Path) -> None:
    del fuse
    cask("import", folder)
    flip_last_bit_of_largest(cask.store)
    expected = (folder / WEIGHTS).read_bytes()
    with cask.mounted(tmp_path / "plain") as root:
        assert (root / "diffusers/library/m/latest" / WEIGHTS).read_bytes() != expected
    with cask.mounted(tmp_path / "mnt", "-o", "verify") as root:
        shown = root / "diffusers/library/m/latest"
        for _ in range(2):
            # The bit is the tensor's last; not even its first byte is given out.
            with shown.joinpath(WEIGHTS).open("rb") as file, pytest.raises(OSError, match="Input/output") as caught:
                file.read()
            assert caught.value.errno == errno.EIO
        for name, data in files_of(folder).items():
            if name != WEIGHTS:
                assert (shown / name).read_bytes() == data
        cask("verify", status=1)
        cask("import", folder)
        assert (shown / WEIGHTS).read_bytes() == expected


def test_a_header_that_rotted_is_never_believed(cask: CommandLine, fuse: None, folder: Path, tmp_path: Path) -> None:
    del fuse
    cask("import", folder)
    (header,) = [path for path in (cask.store / "blobs").iterdir() if path.read_bytes().startswith(b'{"a": {"dtype"')]
    header.chmod(0o644)
    header.write_bytes(header.read_bytes().replace(b"BF16", b"F16 "))
    with cask.mounted(tmp_path / "mnt") as root, pytest.raises(OSError, match="Input/output error"):
        (root / "diffusers/library/m/latest" / WEIGHTS).stat()


def test_a_blob_is_hashed_once_by_one_thread_and_not_without_waiting(store: Store) -> None:
    data = os.urandom(3 << 20)
    with store.ingestion() as ingestion:
        from modelcask.digest import Digest

        digest = Digest.of(data)
        ingestion.put(data, digest)
        ingestion.flush()
    file = SpanFile([(BlobRange(digest, len(data), 0), len(data))])
    reader = SpanReader(store.blobs, max_open=4, verify=True)
    buffer = bytearray(len(data))
    assert reader.read_cached(file, 0, memoryview(buffer)) is None
    threads = [threading.Thread(target=reader.read, args=(file, 0, memoryview(bytearray(100)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reader.read_cached(file, 0, memoryview(buffer)) == len(data)
    assert buffer == data
    # Checked for good: as long as it is the same file, not even its bytes are asked again.
    path = store.blobs.path(digest)
    before = path.stat()
    reader.forget([digest])
    path.chmod(0o644)
    path.write_bytes(bytes(len(data)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert reader.read(file, 0, memoryview(buffer)) == len(data)
    assert buffer == bytes(len(data))
    reader.close()
