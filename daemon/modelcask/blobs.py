"""Blobs: immutable bytes under their digest, and the ingestion that adds them.

An ingestion stages temporary files and publishes them in batches: one flush of the filesystem, then the
renames, then one flush of `blobs/`. A blob is visible only when its bytes are durable. Aborting leaves no
temporary file; what was already published is unreachable until a manifest names it, and gc's to take.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modelcask import durable
from modelcask.digest import Digest
from modelcask.errors import CorruptBlob, InvalidDigest
from modelcask.leases import Lease

# A batch ends at either bound. Bytes: what a power cut may cost, and how much the last flush has left to
# write. Files: a flush waits for the renames of its batch only.
_BATCH_BYTES = 1 << 30
_BATCH_FILES = 4096
# Files that wait for their write-back to be started; each keeps a descriptor.
_WRITEBACK_FILES = 64


class BlobStore:
    """The folder `blobs/`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, digest: Digest) -> Path:
        return self.directory / digest.blob_name

    def size(self, digest: Digest) -> int | None:
        """Bytes of the blob, None if it is not there."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def open(self, digest: Digest, size: int) -> int:
        """A descriptor for reading the blob, whose size must be `size`. The caller closes it.

        Raises:
            CorruptBlob: it is missing or its size is another.
        """
        path = self.path(digest)
        try:
            # O_NONBLOCK: should a FIFO stand there, nobody waits for its writer.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CorruptBlob(path, "this blob is missing") from None
        actual = os.fstat(fd).st_size
        if actual != size:
            os.close(fd)
            raise CorruptBlob(path, f"this blob is {actual} bytes long, not {size}")
        return fd

    def read(self, digest: Digest, size: int) -> bytes:
        """The bytes of a small blob (configs, headers), checked. Raises CorruptBlob as `open` does."""
        with os.fdopen(self.open(digest, size), "rb") as file:
            data = file.read(size)
        # Headers decide which bytes are shown where, and hashing one takes less than parsing it.
        if Digest.of(data) != digest:
            raise CorruptBlob(self.path(digest), "this blob is not what its digest says")
        return data

    def enumerate(self) -> Iterator[tuple[Digest, int]]:
        """Every blob with its size, in no order; other files in the folder are passed over."""
        try:
            entries = os.scandir(self.directory)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                try:
                    yield Digest.from_blob_name(entry.name), entry.stat(follow_symlinks=False).st_size
                except (InvalidDigest, FileNotFoundError):
                    continue  # not ours, or removed meanwhile


class Ingestion:
    """Adds blobs under one lease. Threads may share it.

    Every digest that is asked for or added is protected by the lease until that is released, which the
    holder does after committing the manifest.
    """

    def __init__(self, blobs: BlobStore, temporary: Path, lease: Lease) -> None:
        """
        Args:
            temporary: an existing folder of this ingestion's own, on the filesystem of the blobs.
        """
        self._blobs = blobs
        self._temporary = temporary
        self._filesystem = durable.Filesystem(temporary)
        self._lease = lease
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._staged: dict[Digest, Path] = {}
        self._staged_bytes = 0
        self._added: set[Digest] = set()
        self._count = 0
        # Starting write-back waits where the disk's queue is full, up to a third of a second; hashing need not.
        self._writeback = ThreadPoolExecutor(1, "writeback")
        self._writeback_queue = threading.BoundedSemaphore(_WRITEBACK_FILES)

    def has(self, digest: Digest, size: int) -> bool:
        """Whether the blob exists or is staged, with the right size. It stays while the lease is held."""
        with self._lease.protecting(digest):
            return digest in self._added or self._blobs.size(digest) == size

    def create_temporary(self) -> tuple[int, Path]:
        """A new file to write a blob's bytes to: its descriptor, for `finish_writing`, and its path."""
        path = self.temporary_name()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o444)
        return fd, path

    def finish_writing(self, fd: int) -> None:
        """Take over a descriptor whose file is complete, or was given up: closes it, soon."""
        self._writeback_queue.acquire()
        self._writeback.submit(self._start_writeback_and_close, fd)

    def _start_writeback_and_close(self, fd: int) -> None:
        try:
            durable.start_writeback(fd)
        finally:
            os.close(fd)
            self._writeback_queue.release()

    def stage(self, temporary: Path, digest: Digest, size: int) -> bool:
        """Hand over a complete temporary file. Whether it is new; if not, the file is removed.

        May flush a batch, this one or an earlier one's rest, before it returns.
        """
        if self.has(digest, size):
            temporary.unlink()
            return False
        with self._lock:
            if digest in self._added:
                temporary.unlink()
                return False
            self._added.add(digest)
            self._staged[digest] = temporary
            self._staged_bytes += size
            full = self._staged_bytes >= _BATCH_BYTES or len(self._staged) >= _BATCH_FILES
        if full:
            self.flush()
        return True

    def put(self, data: bytes, digest: Digest) -> bool:
        """Add the small blob `data`, whose digest is `digest`. Whether it is new."""
        if self.has(digest, len(data)):
            return False
        fd, path = self.create_temporary()
        try:
            with durable.naming(path):
                durable.write_all(fd, data)
        finally:
            self.finish_writing(fd)
        return self.stage(path, digest, len(data))

    def commit(self, blobs: Mapping[Digest, int]) -> None:
        """Make all that is staged, and the names of all that was found, durable; the manifest may follow.

        Args:
            blobs: what the manifest needs, with the sizes.

        Raises:
            CorruptBlob: one of them is gone, taken into quarantine since it was found.
        """
        self.flush()
        # Another import may have renamed what was found here, and not flushed the names yet.
        durable.sync_directory(self._blobs.directory)
        for digest, size in blobs.items():
            if self._blobs.size(digest) != size:
                raise CorruptBlob(self._blobs.path(digest), "this blob went away while it was counted on")

    def flush(self) -> None:
        """Make all that is staged durable and visible. Others go on staging meanwhile."""
        with self._flushing:
            with self._lock:
                batch, self._staged, self._staged_bytes = self._staged, {}, 0
            if batch:
                self._filesystem.flush()
                pairs = [(temporary, self._blobs.path(digest)) for digest, temporary in batch.items()]
                durable.publish_flushed(pairs, self._blobs.directory)

    def temporary_name(self) -> Path:
        """A name for a temporary file that nobody else has."""
        with self._lock:
            self._count += 1
            return self._temporary / str(self._count)

    def close(self) -> None:
        """Remove all that is left in the temporary folder, and the folder.

        What cannot be removed, since the disk fails, whoever writes next removes; why it fails is told already.
        """
        self._writeback.shutdown()
        self._filesystem.close()
        shutil.rmtree(self._temporary, ignore_errors=True)
