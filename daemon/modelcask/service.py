"""The service: watches the drop directories and imports what has settled there.

One loop looks at the drops whenever something was noticed in them, and keeps looking for as long as one is
settling. A drop whose fingerprint is the one that was imported is not read again; one that failed is tried
again when it changes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelcask import importer, settle, source
from modelcask.config import DropDirectory
from modelcask.errors import Interrupted, InvalidName, InvalidStore, ModelcaskError, SourceChanged
from modelcask.index import Drop
from modelcask.leases import Lease, live
from modelcask.manifests import MODEL_INDEX
from modelcask.names import DEFAULT_NAMESPACE, DEFAULT_TAG, ModelName
from modelcask.plan import ImportPlan
from modelcask.quantize import QUANT_TYPES
from modelcask.store import Store
from modelcask.watch import Watcher

log = logging.getLogger("modelcask")

# Two looks in a row, this far apart, must agree before a drop counts as settled.
_LOOK_AGAIN = 0.5
# Progress is written to the index this often.
_PROGRESS = 0.5

_LEASE_KIND = "watch"


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


def running_pid(store: Store) -> int | None:
    """The process that watches for `store`, None if there is none."""
    for name in live(store.leases):
        kind, _, rest = name.partition("-")
        if kind == _LEASE_KIND:
            return int(rest.partition("-")[0])
    return None


def find_drops(directory: DropDirectory) -> Iterator[Found]:
    """The folders in a drop directory that are, or may become, models.

    `int4/` and the other types are drop directories of their own; a folder that holds model folders gives
    them its name as their namespace.
    """
    for child in _folders(directory.path):
        if child.name in QUANT_TYPES and directory.quantize is None:
            yield from find_drops(replace(directory, path=child, quantize=child.name))
            continue
        models = [] if (child / MODEL_INDEX).exists() else [c for c in _folders(child) if (c / MODEL_INDEX).exists()]
        if models:
            yield from (Found(model, directory, child.name) for model in models)
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

    def run(self, *, on_ready: Callable[[], None]) -> None:
        """Work until `stop` is set. Raises InvalidStore if another process watches for this store."""
        if (pid := running_pid(self.store)) is not None:
            raise InvalidStore(self.store.root, f"process {pid} watches for this store already", "stop that one first")
        for directory in self.directories:
            directory.path.mkdir(parents=True, exist_ok=True)
        with Lease(self.store.leases, _LEASE_KIND):
            self.store.remove_abandoned_files()
            watcher = Watcher([directory.path for directory in self.directories], self.noticed)
            try:
                self._forget_removed_drops()
                on_ready()
                self._work()
            finally:
                watcher.close()

    def _work(self) -> None:
        while not self.stop.is_set():
            self.noticed.clear()
            settling = self._look_at_all()
            # What is settling is looked at again soon, event or not: the last event may already be behind us.
            self.noticed.wait(_LOOK_AGAIN if settling else None)
            if settling or self.noticed.is_set():
                self.stop.wait(_LOOK_AGAIN)

    def _look_at_all(self) -> bool:
        """Look at every drop, import what has settled. Whether something may still become complete."""
        known = {drop.path: drop for drop in self.store.index.drops()}
        settling = False
        for directory in self.directories:
            for found in find_drops(directory):
                if self.stop.is_set():
                    return False
                settling |= self._look_at(found, known.get(found.path))
        return settling

    def _look_at(self, found: Found, known: Drop | None) -> bool:
        """Look at one drop. Whether it is to be looked at again soon."""
        if known is not None and known.state in ("imported", "unchanged", "failed"):
            try:
                fingerprint = settle.fingerprint_of(source.look(found.path))
            except (ModelcaskError, OSError):
                fingerprint = ""
            if fingerprint == known.fingerprint:
                return False
        look = settle.look(found.path, namespace=found.namespace, quantize=found.directory.quantize)
        before, self._looks[found.path] = self._looks.get(found.path), look
        if look.plan is not None and before is not None and before.fingerprint == look.fingerprint:
            self._import(found, look.fingerprint, look.plan)
            del self._looks[found.path]
            return False
        if known is None or (known.state, known.error) != ("settling", look.missing):
            log.info("%s: settling%s", found.name, f": {look.missing}" if look.missing else "")
            self._save(found, "", "settling", error=look.missing)
        # Incomplete and unchanged: its next change will be noticed.
        return look.plan is not None or before is None or before.fingerprint != look.fingerprint

    def _import(self, found: Found, fingerprint: str, plan: ImportPlan) -> None:
        progress = _Progress(lambda done, total: self._save(found, "", "importing", done=done, total=total))
        log.info("%s: importing %s", found.name, found.path)
        try:
            results = importer.run_import(self.store, plan, report=progress, stop=self.stop)
        except Interrupted:
            self._save(found, "", "settling", error="interrupted, goes on at the next start")
        except SourceChanged as error:
            log.info("%s: %s", found.name, error)
            self._save(found, "", "settling", error=str(error))
            self.noticed.set()
        except ModelcaskError as error:
            self._fail(found, fingerprint, str(error))
        except OSError as error:
            self._fail(found, fingerprint, f"{error.filename or found.path}: {error.strerror}")
        else:
            for result in results:
                log.info(
                    "%s: imported, %d bytes new, %d shared",
                    result.name,
                    result.new_bytes,
                    result.reused_bytes,
                )
            total = progress.total
            self._save(found, fingerprint, "imported", done=total, total=total)

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
        self.store.index.save_drop(Drop(found.path, found.name, fingerprint, state, done, total, error))

    def _forget_removed_drops(self) -> None:
        for drop in self.store.index.drops():
            if not drop.path.exists():
                self.store.index.forget_drop(drop.path)
            elif drop.state == "imported":
                self.store.index.save_drop(replace(drop, state="unchanged"))


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


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    except FileNotFoundError:
        return []
