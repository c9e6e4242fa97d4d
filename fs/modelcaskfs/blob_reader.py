"""Reading ranges of blobs, which are kept open in a bounded cache, and checked before their first byte is given out
where that is asked for."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from modelcask.blobs import BlobStore
from modelcask.digest import Digest
from modelcask.errors import CorruptBlob
from modelcaskfs.spans import BlobRange

# A miss in the page cache starts this much of the blob's own read-ahead, so that the requests to follow hit.
_READ_AHEAD = 4 << 20
# What was served is let go of in pieces of this size: half a millisecond each, once in some sixty reads.
_PIECE = 8 << 20
# Memory is short where less than this part of it is free, that is, holds not even a file's pages.
_SHORT = 8
_HASHED_AT_ONCE = 1 << 20

# A blob that is quarantined and stored anew is another file under the same digest.
_File = tuple[Digest, int, int]


class _OpenBlob:
    """A descriptor that closes with its last user: eviction from the cache never closes it under a read."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def memory_is_short() -> bool:
    """Whether what is cached displaces something."""
    return os.sysconf("SC_AVPHYS_PAGES") * _SHORT < os.sysconf("SC_PHYS_PAGES")


class BlobReader:
    """Reads ranges of blobs. Threads may share it."""

    def __init__(
        self,
        blobs: BlobStore,
        *,
        max_open: int,
        verify: bool = False,
        memory_is_short: Callable[[], bool] = memory_is_short,
    ) -> None:
        """
        Args:
            verify: hash each blob once, before anything of it is read.
        """
        self._blobs = blobs
        self._verify = verify
        self._sound: dict[_File, Future[bool]] = {}
        self._max_open = max_open
        self._memory_is_short = memory_is_short
        self._open: OrderedDict[Digest, _OpenBlob] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, source: BlobRange, skip: int, target: memoryview, *, wait: bool) -> bool:
        """Fill `target` from `skip` bytes into `source` on. False if the disk must be waited for and `wait` is not set.

        Raises:
            CorruptBlob: the blob is missing, not as long as it should be, or was checked and is not what it should be.
        """
        blob = self._opened(source, wait=wait)
        if blob is None or (self._verify and not self._is_checked(source.digest, blob, wait=wait)):
            return False
        position, flags = source.offset + skip, os.RWF_NOWAIT
        while target:
            try:
                count = os.preadv(blob.fd, [target], position, flags)
            except OSError as error:
                # EOPNOTSUPP: this filesystem cannot tell; the waiting way is the only one.
                if not flags or error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                    raise
                count = 0
            if count == 0 and flags:
                # Linux 5.9 and 5.10 say so for EAGAIN (preadv2(2), BUGS); the end of a file shows without the flag.
                if not wait:
                    return False
                os.posix_fadvise(blob.fd, position, _READ_AHEAD, os.POSIX_FADV_WILLNEED)
                flags = 0
                continue
            if count == 0:
                raise CorruptBlob(self._blobs.path(source.digest), "this blob was cut short")
            target, position = target[count:], position + count
        return True

    def let_go(self, source: BlobRange, skip: int, length: int) -> None:
        """Tell that these bytes are in the page cache of a file of the mount: the blob's pages hold them a second time.

        Where memory is short, they are dropped piece by piece, as readers come to each piece's end. Where it is not,
        they stay: other models that share the blob have pages of their own, and find these.
        """
        begin = source.offset + skip
        end = begin + length
        last = end if end == source.blob_size else end // _PIECE * _PIECE
        if begin < last and self._memory_is_short():
            blob = self._opened(source, wait=False)
            if blob is not None:
                first = begin // _PIECE * _PIECE
                os.posix_fadvise(blob.fd, first, last - first, os.POSIX_FADV_DONTNEED)

    def forget(self, digests: Iterable[Digest]) -> None:
        """Close these blobs once nobody reads them: gc can free their space, and what replaces them is seen."""
        with self._lock:
            for digest in digests:
                self._open.pop(digest, None)

    def _is_checked(self, digest: Digest, blob: _OpenBlob, *, wait: bool) -> bool:
        """Whether the blob is known to be sound. Finds it out if `wait` is set; threads wait for the one that does.

        Raises CorruptBlob.
        """
        status = os.fstat(blob.fd)
        file = (digest, status.st_ino, status.st_mtime_ns)
        with self._lock:
            found = self._sound.get(file)
            to_do = found is None and wait
            if to_do:
                found = self._sound[file] = Future()
        if found is None or not (wait or found.done()):
            return False
        if to_do:
            try:
                found.set_result(_hash(blob.fd) == digest.hex)
            except BaseException as error:
                with self._lock:  # told to who waits now, and tried again for who comes later
                    del self._sound[file]
                found.set_exception(error)
                raise
        if not found.result():
            raise CorruptBlob(self._blobs.path(digest), "this blob is not what its digest says")
        return True

    def _opened(self, source: BlobRange, *, wait: bool) -> _OpenBlob | None:
        """The open blob; None if it must be opened first, for which a disk may be needed, and `wait` is not set."""
        with self._lock:
            blob = self._open.get(source.digest)
            if blob is not None:
                self._open.move_to_end(source.digest)
                return blob
        if not wait:
            return None
        blob = _OpenBlob(self._blobs.open(source.digest, source.blob_size))
        with self._lock:
            self._open[source.digest] = blob
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return blob


def _hash(fd: int) -> str:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    sha, buffer, position = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE)), 0
    while count := os.preadv(fd, [buffer], position):
        sha.update(buffer[:count])
        position += count
    # Readers ask for what they need; this descriptor is theirs from here on.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
    return sha.hexdigest()
