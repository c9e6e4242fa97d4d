"""Noticing: tells that something happened in a directory, never what is complete.

The one module that imports watchdog.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

# Reading a drop opens and closes its files; only what a writer does counts.
_WRITERS_EVENTS = ("created", "modified", "moved", "deleted", "closed")


class Watcher:
    """Sets `noticed` whenever something is written below one of the directories, until it is closed."""

    def __init__(self, directories: Iterable[Path], noticed: threading.Event) -> None:
        self._observer = Observer()
        handler = _Handler(noticed)
        for directory in directories:
            self._observer.schedule(handler, str(directory), recursive=True)
        self._observer.start()

    def close(self) -> None:
        self._observer.stop()
        self._observer.join()


class _Handler(FileSystemEventHandler):
    def __init__(self, noticed: threading.Event) -> None:
        self._noticed = noticed

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type in _WRITERS_EVENTS:
            self._noticed.set()
