"""The service: watches the drop directories and imports what has settled there.

One loop looks at the drops whenever something was noticed in them, and keeps looking for as long as one is
settling. A drop whose fingerprint is the one that was imported is not read again; one that failed is tried
again when it changes, or after a minute if the fault was not its own.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelcask import importer, settle, source
from modelcask.config import DropDirectory
from modelcask.errors import (
    CorruptBlob,
    IndexFailed,
    Interrupted,
    InvalidName,
    ModelcaskError,
    SourceChanged,
    disk_error,
    memory_error,
    printable,
)
from modelcask.index import Drop
from modelcask.leases import SoleLease
from modelcask.manifests import MODEL_INDEX
from modelcask.names import DEFAULT_NAMESPACE, DEFAULT_TAG, ModelName, namespace_from_folder_name
from modelcask.plan import ImportPlan
from modelcask.quantize import QUANT_TYPES
from modelcask.store import Store
from modelcask.watch import Watcher

log = logging.getLogger("modelcask")

# Two looks in a row, this far apart, must agree before a drop counts as settled.
_LOOK_AGAIN = 0.5
# What still lacks something is looked at this often, should its last event be missed.
_LOOK_NOW_AND_THEN = 5.0
# What failed through no fault of its own is tried again after this time.
_TRY_AGAIN = 60.0
# Progress is written to the index this often.
_PROGRESS = 0.5


@dataclass(frozen=True, slots=True)
class Found:
    """A folder in a drop directory that may be a model."""

    path: Path
    directory: DropDirectory
    namespace: str | None

    @property
    def name(self) -> str:
        try:
            return str(
                ModelName.from_folder_name(
                    self.path.name,
                    namespace=self.namespace or DEFAULT_NAMESPACE,
                    tag=self.directory.quantize or DEFAULT_TAG,
                )
            )
        except InvalidName:
            return self.path.name


def find_drops(directory: DropDirectory) -> Iterator[Found]:
    """The folders in a drop directory that are, or may become, models.

    `int4/` and the other types are drop directories of their own; a folder that holds model folders gives
    them its name as their namespace. What cannot be read is passed over.
    """
    for child in _folders(directory.path):
        if child.name in QUANT_TYPES and directory.quantize is None:
            yield from find_drops(replace(directory, path=child, quantize=child.name))
            continue
        models = [] if _is_model(child) else [below for below in _folders(child) if _is_model(below)]
        if models:
            namespace = namespace_from_folder_name(child.name)
            yield from (Found(model, directory, namespace) for model in models)
        else:
            yield Found(child, directory, directory.namespace)


@dataclass
class Service:
    """Watches `directories` and imports into `store` until `stop` is set."""

    store: Store
    directories: tuple[DropDirectory, ...]
    stop: threading.Event
    noticed: threading.Event = field(default_factory=threading.Event)
    _looks: dict[Path, settle.Look] = field(default_factory=dict)
    _try_again: dict[Path, float] = field(default_factory=dict)

    def run(self, *, on_ready: Callable[[], None]) -> None:
        """Work until `stop` is set. Raises LeaseTaken if another process watches for this store."""
        for directory in self.directories:
            directory.path.mkdir(parents=True, exist_ok=True)
        with SoleLease(self.store.leases):
            self.store.remove_abandoned_files()
            watcher = Watcher([directory.path for directory in self.directories], self.noticed)
            try:
                self._mark_unchanged()
                on_ready()
                self._work()
            finally:
                watcher.close()

    def _work(self) -> None:
        while not self.stop.is_set():
            self.noticed.clear()
            try:
                seconds = self._look_at_all()
            except (MemoryError, RuntimeError, ImportError) as error:
                if (lack := memory_error(error)) is None:
                    raise
                log.error("%s", lack)
                seconds = _TRY_AGAIN
            self.noticed.wait(None if math.isinf(seconds) else seconds)
            # What is noticed comes in bursts; one look serves for all of half a second.
            self.stop.wait(_LOOK_AGAIN)

    def _look_at_all(self) -> float:
        """Look at every drop, import what has settled. In how many seconds to look again, noticed or not."""
        known = self._known()
        found_now: set[Path] = set()
        seconds = math.inf
        for directory in self.directories:
            for found in find_drops(directory):
                if self.stop.is_set():
                    return 0
                found_now.add(found.path)
                seconds = min(seconds, self._look_at(found, known.get(found.path)))
        for path in known.keys() - found_now:
            self._forget(path)
        return seconds

    def _look_at(self, found: Found, known: Drop | None) -> float:
        """Look at one drop. In how many seconds to look at it again, noticed or not."""
        if known is not None and known.state in ("imported", "unchanged", "failed"):
            wait = self._try_again.get(found.path, 0) - time.monotonic()
            if known.state == "failed" and wait > 0:
                return wait
            if known.fingerprint and known.fingerprint == _fingerprint(found.path):
                return math.inf
        look = settle.look(found.path, namespace=found.namespace, quantize=found.directory.quantize)
        before, self._looks[found.path] = self._looks.get(found.path), look
        changed = before is None or before.fingerprint != look.fingerprint
        if look.plan is not None and not changed:
            del self._looks[found.path]
            return self._import(found, look.fingerprint, look.plan)
        if known is None or (known.state, known.error) != ("settling", look.missing):
            log.info("%s: settling%s", found.name, f": {look.missing}" if look.missing else "")
            self._save(found, "", "settling", error=look.missing)
        # An event may be missed; what lacks something is looked at now and then all the same.
        return _LOOK_AGAIN if changed or look.plan is not None else _LOOK_NOW_AND_THEN

    def _import(self, found: Found, fingerprint: str, plan: ImportPlan) -> float:
        """Import a drop. In how many seconds to look at it again."""
        progress = _Progress(lambda done, total: self._save(found, "", "importing", done=done, total=total))
        log.info("%s: importing %s", found.name, printable(str(found.path)))
        try:
            results = importer.run_import(self.store, plan, report=progress, stop=self.stop)
        except Interrupted:
            self._save(found, "", "settling", error="interrupted, goes on at the next start")
            return 0
        except (SourceChanged, CorruptBlob) as error:
            # It changed while it was read, or a blob it counts on was quarantined: start over.
            log.info("%s: %s", found.name, error)
            self._save(found, "", "settling", error=str(error))
            return _LOOK_AGAIN
        except ModelcaskError as error:
            self._fail(found, fingerprint, str(error))
            return math.inf
        except OSError as error:
            # A fault of the store or of the machine: it may pass without the drop changing.
            return self._fail_for_now(found, disk_error(error))
        except (MemoryError, RuntimeError, ImportError) as error:
            if (lack := memory_error(error)) is None:
                raise
            return self._fail_for_now(found, lack)
        for result in results:
            log.info("%s: imported, %d bytes new, %d shared", result.name, result.new_bytes, result.reused_bytes)
        self._save(found, fingerprint, "imported", done=progress.total, total=progress.total)
        return math.inf

    def _fail_for_now(self, found: Found, error: str) -> float:
        self._fail(found, "", error)
        self._try_again[found.path] = time.monotonic() + _TRY_AGAIN
        return _TRY_AGAIN

    def _fail(self, found: Found, fingerprint: str, error: str) -> None:
        log.error("%s: failed: %s", found.name, error)
        self._save(found, fingerprint, "failed", error=error)

    def _save(
        self,
        found: Found,
        fingerprint: str,
        state: str,
        *,
        done: int = 0,
        total: int = 0,
        error: str | None = None,
    ) -> None:
        try:
            self.store.index.save_drop(Drop(found.path, found.name, fingerprint, state, done, total, error))
        except IndexFailed as failure:
            log.warning("%s", failure)  # `status` is behind; the work goes on

    def _known(self) -> dict[Path, Drop]:
        try:
            return {drop.path: drop for drop in self.store.index.drops()}
        except IndexFailed as failure:
            log.warning("%s", failure)
            return {}

    def _forget(self, path: Path) -> None:
        self._looks.pop(path, None)
        self._try_again.pop(path, None)
        try:
            self.store.index.forget_drop(path)
        except IndexFailed as failure:
            log.warning("%s", failure)

    def _mark_unchanged(self) -> None:
        """What was imported before this start shows as unchanged; a look tells whether it is."""
        try:
            for drop in self.store.index.drops():
                if drop.state == "imported":
                    self.store.index.save_drop(replace(drop, state="unchanged"))
        except IndexFailed as failure:
            log.warning("%s", failure)


class _Progress:
    """Passes reports on, not too often."""

    def __init__(self, save: Callable[[int, int], None]) -> None:
        self._save = save
        self._last = 0.0
        self._lock = threading.Lock()
        self.total = 0

    def __call__(self, done: int, total: int) -> None:
        with self._lock:
            self.total = total
            now = time.monotonic()
            if now - self._last < _PROGRESS:
                return
            self._last = now
        self._save(done, total)


def _fingerprint(path: Path) -> str:
    try:
        return settle.fingerprint_of(source.look(path))
    except (ModelcaskError, OSError):
        return ""


def _is_model(folder: Path) -> bool:
    try:
        return (folder / MODEL_INDEX).exists()
    except OSError:
        return False


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(child for child in path.iterdir() if _is_shown_folder(child))
    except OSError:
        return []  # gone, or not ours to read: `lost+found`


def _is_shown_folder(path: Path) -> bool:
    try:
        path.name.encode()
        return path.is_dir() and not path.name.startswith(".")
    except UnicodeEncodeError:
        log.warning("%s: its name is not UTF-8, rename it to have it imported", printable(str(path)))
    except OSError:
        pass  # not ours to look at
    return False
