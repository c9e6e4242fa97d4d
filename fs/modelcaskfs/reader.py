"""Reading spans into a caller's buffer, from blobs that are kept open in a bounded cache."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict

from modelcask.blobs import BlobStore
from modelcask.digest import Digest
from modelcask.errors import CorruptBlob
from modelcaskfs.spans import BlobRange, SpanFile

# A miss in the page cache starts this much of the blob's own read-ahead, so that the requests to follow hit.
_READ_AHEAD = 4 << 20


class _OpenBlob:
    """A descriptor that closes with its last user: eviction from the cache never closes it under a read."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class SpanReader:
    """Reads `SpanFile`s. Threads may share it."""

    def __init__(self, blobs: BlobStore, *, max_open: int) -> None:
        self._blobs = blobs
        self._max_open = max_open
        self._open: OrderedDict[Digest, _OpenBlob] = OrderedDict()
        self._lock = threading.Lock()

    def read_cached(self, file: SpanFile, offset: int, target: memoryview) -> int | None:
        """Fill `target` from `offset` on without waiting for a disk; the bytes read, None if that cannot be.

        Less than `target` holds is returned only at the file's end.

        Raises:
            CorruptBlob: a blob is missing or not as long as it should be.
        """
        return self._read(file, offset, target, os.RWF_NOWAIT)

    def read(self, file: SpanFile, offset: int, target: memoryview) -> int:
        """As `read_cached`, but waits for the disk."""
        count = self._read(file, offset, target, 0)
        assert count is not None
        return count

    def _read(self, file: SpanFile, offset: int, target: memoryview, flags: int) -> int | None:
        done = 0
        for piece in file.pieces(offset, len(target)):
            part = target[done : done + piece.length]
            if isinstance(piece.source, bytes):
                part[:] = piece.source[piece.skip : piece.skip + piece.length]
            elif not self._read_blob(piece.source, piece.skip, part, flags):
                return None
            done += piece.length
        return done

    def _read_blob(self, source: BlobRange, skip: int, part: memoryview, flags: int) -> bool:
        blob = self._opened(source)
        position = source.offset + skip
        if not flags:
            os.posix_fadvise(blob.fd, position, _READ_AHEAD, os.POSIX_FADV_WILLNEED)
        while part:
            try:
                count = os.preadv(blob.fd, [part], position, flags)
            except BlockingIOError:
                return False
            except OSError as error:
                if flags and error.errno == errno.EOPNOTSUPP:
                    return False  # this filesystem cannot tell; the waiting way is the only one
                raise
            if count == 0:
                raise CorruptBlob(self._blobs.path(source.digest), "this blob was cut short")
            part, position = part[count:], position + count
        return True

    def _opened(self, source: BlobRange) -> _OpenBlob:
        with self._lock:
            blob = self._open.get(source.digest)
            if blob is not None:
                self._open.move_to_end(source.digest)
                return blob
        blob = _OpenBlob(self._blobs.open(source.digest, source.blob_size))
        with self._lock:
            self._open[source.digest] = blob
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return blob
