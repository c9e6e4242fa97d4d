"""What keeps the blobs of an open file from gc: a lease, taken with the first user and given up with the last."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from modelcask.digest import Digest
from modelcask.leases import EVERYTHING, Lease

log = logging.getLogger("modelcaskfs")


class Protection:
    """Protects some blobs as long as somebody uses them. Threads may share it.

    Args:
        leases: the store's folder of leases.
        blobs: gives the digests.
        is_current: whether the blobs are still there to be protected, asked when the lease is held.
    """

    def __init__(
        self, leases: Path, blobs: Callable[[], Collection[Digest]], *, is_current: Callable[[], bool]
    ) -> None:
        self._leases = leases
        self._blobs = blobs
        self._is_current = is_current
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._users = 0

    @property
    def users(self) -> int:
        """How many have acquired it and not released it."""
        return self._users

    @property
    def in_use(self) -> bool:
        """Whether somebody has acquired it."""
        return self._users > 0

    def blobs(self) -> Collection[Digest]:
        """What is protected."""
        return self._blobs()

    def acquire(self) -> bool:
        """Protect the blobs until `release`. False if they were replaced or removed before.

        The first user takes a lease for all; a store that cannot be written is read without one.
        """
        with self._lock:
            if self._users == 0:
                # First the lease, then the look: gc may have run before the lease, but then nothing was there to find.
                self._lease = self._take_lease()
                if not self._is_current():
                    self._drop_lease()
                    return False
            self._users += 1
            return True

    def release(self) -> bool:
        """End one `acquire`. Whether it was the last."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._drop_lease()
            return self._users == 0

    def _take_lease(self) -> Lease | None:
        try:
            return Lease(self._leases, "mount", self._blobs())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return Lease(self._leases, EVERYTHING)  # an empty file needs no space
            # ENOENT: a store that Ollama or a snapshot made has no folder of leases.
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
                raise
            log.warning("%s: read without a lease, gc of another user may remove what is open", self._leases)
            return None

    def _drop_lease(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None
