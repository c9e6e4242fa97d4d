"""Noticing: tells where something was written, never what is complete.

The one module that imports watchdog. Events come from inotify, or, where the kernel does not see what others write (a
network filesystem, one in user space), from looking at the files now and then. A directory may be missing, come later,
be removed, or be covered by a mount: `refresh`, called often, follows.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirModifiedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.observers.polling import PollingObserver

from modelcask.errors import printable
from modelcask.mounts import filesystem_type

log = logging.getLogger("modelcask")

# Reading a drop opens and closes its files; only what a writer does counts.
_WRITERS_EVENTS: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirDeletedEvent,
    DirModifiedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]
# What another machine, or a process in user space, writes to these raises no event here (inotify(7), "Limitations").
_WITHOUT_EVENTS = ("nfs", "cifs", "smb", "9p", "fuse", "virtiofs", "ceph", "glusterfs", "lustre", "afs", "vboxsf")
_POLL_SECONDS = 2.0
_NO_WATCHES_LEFT = (errno.ENOSPC, errno.EMFILE)
_LIMIT_REACHED = (
    "%s: the kernel's limit of inotify watches is reached, looking every %g s instead; raise "
    "fs.inotify.max_user_watches (sysctl) and start again"
)


# After an overflow watchdog sets all watches anew, which raises an event for each: with more watches than the queue has
# places that overflows again, and so on. So many lines of its log in one round, and events are given up.
_OVERFLOWS_BORNE = 8
_OVERFLOWS = (
    "%s: events come faster than they can be taken, looking every %g s instead; raise fs.inotify.max_queued_events"
)


class _Note(Protocol):
    def __call__(self, paths: Iterable[Path], *, grown: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Changes:
    """What was noticed since the last time.

    Attributes:
        everything: whether events were lost, so that anything may have changed.
        paths: where something was written.
    """

    everything: bool
    paths: frozenset[Path]


class Watcher:
    """Watches directories until it is closed; `noticed` is called, from any thread, when there is something to take."""

    def __init__(self, noticed: Callable[[], None]) -> None:
        self._noticed = noticed
        self._lock = threading.Lock()
        self._paths: set[Path] = set()
        self._everything = True
        self._grown = False
        self._overflowed = 0
        self._followed: dict[Path, _Followed] = {}
        self._overflows = _OverflowLog(self._overflow)
        logging.getLogger("watchdog").addHandler(self._overflows)
        logging.getLogger("watchdog").propagate = False

    def refresh(self, directories: Mapping[Path, bool | None]) -> dict[Path, str]:
        """Watch exactly these directories, those that are there now. Cheap where nothing has changed.

        Args:
            directories: with each, whether to look now and then instead of waiting for events; None: as its
                filesystem needs it.

        Returns:
            The directories that cannot be watched, each with the reason.
        """
        failed = {}
        for path in self._followed.keys() - directories.keys():
            self._followed.pop(path).close()
        for path, polling in directories.items():
            followed = self._followed.get(path)
            try:
                status = path.stat()
                identity = (status.st_dev, status.st_ino, polling)
                if followed is None or followed.identity != identity:
                    self._follow(path, identity)
            except OSError as error:
                if followed is not None:
                    self._followed.pop(path).close()
                    self._lose_track()
                failed[path] = (error.strerror or str(error)).lower()
        with self._lock:
            grown, self._grown = self._grown, False
            overflows, self._overflowed = self._overflowed, 0
        if overflows > _OVERFLOWS_BORNE:
            for path in [path for path, followed in self._followed.items() if followed.on_events]:
                self._turn_to_polling(path, _OVERFLOWS)
        elif grown:
            with suppress(OSError):  # a directory that goes this very moment: the next round tells
                self._check_limits()
        return failed

    def take(self) -> Changes:
        """What was noticed since the last call; at the first, everything."""
        with self._lock:
            changes = Changes(self._everything, frozenset(self._paths))
            self._everything = False
            self._paths.clear()
        return changes

    def close(self) -> None:
        for followed in self._followed.values():
            followed.close()
        self._followed.clear()
        logging.getLogger("watchdog").removeHandler(self._overflows)

    def _follow(self, path: Path, identity: tuple[int, int, bool | None]) -> None:
        if path in self._followed:
            self._followed.pop(path).close()
        polling = identity[2]
        if polling is None:
            kind = filesystem_type(path)
            polling = kind.startswith(_WITHOUT_EVENTS)
            if polling:
                log.info("%s: lies on %s, where events do not arrive; looking every %g s", path, kind, _POLL_SECONDS)
        observer = None if polling else self._inotify(path)
        self._followed[path] = _Followed(identity, observer or self._polling(path), on_events=observer is not None)
        self._lose_track()

    def _inotify(self, path: Path) -> BaseObserver | None:
        """An observer by events; None where the kernel has no watches left for it."""
        observer = Observer()
        try:
            self._start(observer, path)
            _probe(observer)
        except OSError as error:
            observer.stop()
            if error.errno not in _NO_WATCHES_LEFT:
                raise
            log.warning(_LIMIT_REACHED, printable(str(path)), _POLL_SECONDS)
            return None
        return observer

    def _polling(self, path: Path) -> BaseObserver:
        observer = PollingObserver(timeout=_POLL_SECONDS)
        self._start(observer, path)
        return observer

    def _check_limits(self) -> None:
        """Turn to polling what has grown beyond the kernel's watches."""
        for path, followed in list(self._followed.items()):
            try:
                if followed.on_events:
                    _probe(followed.observer)
            except OSError as error:
                if error.errno not in _NO_WATCHES_LEFT:
                    raise
                self._turn_to_polling(path, _LIMIT_REACHED)

    def _turn_to_polling(self, path: Path, why: str) -> None:
        log.warning(why, printable(str(path)), _POLL_SECONDS)
        followed = self._followed.pop(path)
        followed.close()
        self._followed[path] = _Followed(followed.identity, self._polling(path), on_events=False)
        self._lose_track()

    def _start(self, observer: BaseObserver, path: Path) -> None:
        observer.start()
        observer.schedule(_Handler(self._note), str(path), recursive=True, event_filter=_WRITERS_EVENTS)

    def _note(self, paths: Iterable[Path], *, grown: bool) -> None:
        with self._lock:
            self._paths.update(paths)
            self._grown |= grown
        self._noticed()

    def _overflow(self) -> None:
        with self._lock:
            self._overflowed += 1
        self._lose_track()

    def _lose_track(self) -> None:
        with self._lock:
            self._everything = True
        self._noticed()


@dataclass(frozen=True, slots=True)
class _Followed:
    """A directory that is watched.

    Attributes:
        identity: its device and inode, so that one that comes in its place is told from it, and how it is watched.
        on_events: whether by inotify.
    """

    identity: tuple[int, int, bool | None]
    observer: BaseObserver
    on_events: bool

    def close(self) -> None:
        self.observer.stop()
        self.observer.join()


class _Handler(FileSystemEventHandler):
    def __init__(self, note: _Note) -> None:
        self._note = note

    def on_any_event(self, event: FileSystemEvent) -> None:
        paths = [Path(os.fsdecode(path)) for path in (event.src_path, event.dest_path) if path]
        self._note(paths, grown=isinstance(event, DirCreatedEvent | DirMovedEvent))


def _probe(observer: BaseObserver) -> None:
    """Raise OSError if the kernel has no watch left. watchdog passes folders over silently for which it has none."""
    observer.unschedule(observer.schedule(FileSystemEventHandler(), os.sep, event_filter=[DirDeletedEvent]))


class _OverflowLog(logging.Handler):
    """Takes what watchdog logs: that events were lost it tells in no other way (7.1)."""

    def __init__(self, lost: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self._lost = lost

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.WARNING:
            log.log(record.levelno, "%s", record.getMessage())
        self._lost()
