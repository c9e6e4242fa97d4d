"""Importing one drop: what the service does with it once it has settled, and what it says of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from modelcask import importer, settle
from modelcask.digest import Digest
from modelcask.drops import Found
from modelcask.errors import (
    CorruptBlob,
    Interrupted,
    InvalidModelFolder,
    InvalidName,
    InvalidSafetensors,
    ModelcaskError,
    ModelNotFound,
    SourceChanged,
    disk_error,
    memory_error,
    printable,
)
from modelcask.index import Drop
from modelcask.manifests import StoredManifest
from modelcask.names import ModelName
from modelcask.plan import ImportPlan
from modelcask.removal import NotRemoved, remove_drop
from modelcask.store import Store

log = logging.getLogger("modelcask")

Save = Callable[[Drop], None]


@dataclass(eq=False)
class NameTaken(ModelcaskError):
    """A drop whose model would take the place of another folder's."""

    path: Path
    name: str
    other: str

    def message(self) -> str:
        return (
            f"{self.path}: {self.name} is another model already, imported from {self.other}; rename the folder, or "
            f"remove that model (`modelcask rm {self.name}`) and touch the folder"
        )


# Progress is written to the index this often.
_PROGRESS = 0.5


@dataclass(frozen=True, slots=True)
class ImportOutcome:
    """What became of a drop.

    Attributes:
        row: its last row.
        passing_fault: whether it failed by no fault of its own, so that it may succeed unchanged.
    """

    row: Drop
    passing_fault: bool = False


def import_drop(
    store: Store, found: Found, fingerprint: str, plan: ImportPlan, *, save: Save, stop: threading.Event
) -> ImportOutcome:
    """Import a drop, and remove it where its directory says so.

    Args:
        fingerprint: of the drop as it was planned.
        save: told how far it is, now and then, and the outcome.
        stop: when set, it ends soon; the next start goes on.
    """
    work = _Work(store, found, save, stop)

    def run() -> Drop:
        log.info("%s: importing %s", found.name, printable(str(found.path)), extra={"model": found.name})
        results = importer.run_import(store, plan, report=work.report, stop=stop, approve=work.approve)
        for result in results:
            log.info(
                "%s: imported, %d bytes new, %d shared, in %.1f s",
                result.name,
                result.new_bytes,
                result.reused_bytes,
                result.seconds,
                extra={"model": str(result.name), "new_bytes": result.new_bytes, "seconds": round(result.seconds, 3)},
            )
        if found.is_removed_after:
            store.index.begin_removal(found.path, {str(result.name): result.manifest for result in results})
            return work.remove(fingerprint)
        return work.row(fingerprint, "imported")

    return work.outcome(run, fingerprint)


def finish_removal(store: Store, found: Found, *, save: Save, stop: threading.Event) -> ImportOutcome:
    """Go on removing an imported drop where the last watcher was interrupted. Arguments as of `import_drop`."""
    work = _Work(store, found, save, stop)

    def run() -> Drop:
        if not found.is_removed_after:  # the configuration has changed since
            store.index.end_removal(found.path)
            return work.row("", "settling")
        row = work.remove("")
        # What was not removed may be another version by now: it is looked at as if it had just come.
        return work.row("", "settling") if row.error else row

    return work.outcome(run, "")


class _Work:
    """The work on one drop, and its progress."""

    def __init__(self, store: Store, found: Found, save: Save, stop: threading.Event) -> None:
        self._store = store
        self._found = found
        self._save = save
        self._stop = stop
        self._lock = threading.Lock()
        self._saved = 0.0
        self._total = 0

    def report(self, done: int, total: int) -> None:
        """Save how far it is, not too often."""
        with self._lock:
            self._total = total
            now = time.monotonic()
            if now - self._saved < _PROGRESS:
                return
            self._saved = now
        self._save(Drop(self._found.path, self._found.name, "", "importing", done, total))

    def row(self, fingerprint: str, state: str, error: str | None = None) -> Drop:
        total = self._total if state == "imported" else 0
        return Drop(self._found.path, self._found.name, fingerprint, state, total, total, error)

    def outcome(self, run: Callable[[], Drop], fingerprint: str) -> ImportOutcome:
        """What `run` came to; its errors are the drop's."""
        outcome = self._outcome(run, fingerprint)
        row = outcome.row
        if row.state == "failed":
            log.error("%s: failed: %s", row.name, row.error, extra={"model": row.name})
        elif row.error:
            log.warning("%s: %s", row.name, row.error, extra={"model": row.name})
        self._save(row)
        return outcome

    def _outcome(self, run: Callable[[], Drop], fingerprint: str) -> ImportOutcome:
        try:
            return ImportOutcome(run())
        except Interrupted:
            return ImportOutcome(self.row("", "settling", "interrupted, goes on at the next start"))
        except (SourceChanged, CorruptBlob) as error:
            # It changed while it was read, or a blob it counts on was quarantined: start over.
            return ImportOutcome(self.row("", "settling", str(error)))
        except (InvalidModelFolder, InvalidSafetensors, InvalidName, NameTaken) as error:
            return ImportOutcome(self.row(fingerprint, "failed", str(error)))
        except ModelcaskError as error:
            return ImportOutcome(self.row("", "failed", str(error)), passing_fault=True)
        except OSError as error:
            return ImportOutcome(self.row("", "failed", disk_error(error)), passing_fault=True)
        except Exception as error:  # a bug that one drop meets must not keep the others from being imported
            if lack := memory_error(error):
                return ImportOutcome(self.row("", "failed", lack), passing_fault=True)
            log.exception("%s: this is a bug", self._found.name, extra={"model": self._found.name})
            what = f"{type(error).__name__}: {error}"
            return ImportOutcome(self.row(fingerprint, "failed", f"this is a bug: {what}; report the log's traceback"))

    def remove(self, fingerprint: str) -> Drop:
        """Remove the drop, as far as the store holds it. The last row of what stays."""
        path = self._found.path
        manifests, begun = self._store.index.removal(path)
        try:
            models = [self._stored(name, manifest) for name, manifest in manifests.items()]
            stays = remove_drop(
                self._store,
                path,
                models,
                beneath=self._found.beneath,
                before=begun,
                report=self.report,
                stop=self._stop,
            )
        except Interrupted:
            raise
        except (SourceChanged, CorruptBlob):
            self._store.index.end_removal(path)
            raise
        except ModelcaskError as error:
            self._store.index.end_removal(path)
            return self.row(fingerprint, "imported", f"not removed: {error}")
        except OSError as error:
            self._store.index.end_removal(path)
            return self.row(self._fingerprint(), "imported", f"not removed: {disk_error(error)}")
        self._store.index.end_removal(path)
        stayed = f", {_few(stays)} stayed" if stays else ""
        log.info("%s: removed the drop%s", self._found.name, stayed, extra={"model": self._found.name})
        return self.row(self._fingerprint(), "imported")

    def approve(self, name: ModelName, manifest: Digest) -> None:
        """Refuse to replace a model that came from another folder, if the store may hold its only copy.

        Raises NameTaken.
        """
        last = self._store.index.last_import(str(name))
        if last is None or last[0] == manifest or last[1] == printable(str(self._found.path)):
            return
        try:
            there = self._store.manifests.read(name).digest == last[0]
        except ModelNotFound:
            return
        if there and (self._found.is_removed_after or not Path(last[1]).exists()):
            raise NameTaken(self._found.path, str(name), last[1])

    def _fingerprint(self) -> str:
        return settle.fingerprint(self._found.path, beneath=self._found.beneath)

    def _stored(self, name: str, manifest: Digest) -> StoredManifest:
        stored = self._store.manifests.read(ModelName.parse(name))
        if stored.digest != manifest:
            raise NotRemoved(self._found.path, f"{name} was replaced meanwhile")
        return stored


def _few(paths: Iterable[object]) -> str:
    names = [printable(str(path)) for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
