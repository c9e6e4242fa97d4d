"""The service: follows the drop directories and imports what has settled there.

One loop, on one thread, knows the drops: it looks at those where something was written, at those that are still
settling, and at all of them where events were lost. What it finds complete goes to a queue; as many imports run at once
as the configuration says. A drop whose fingerprint is the one that was imported is not read again; one that failed is
tried again when it changes, or after a while if the fault was not its own.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelcask import settle
from modelcask.config import Config
from modelcask.drop_import import ImportOutcome, finish_removal, import_drop
from modelcask.drops import Found, find_drops
from modelcask.errors import IndexFailed, ModelcaskError, disk_error, memory_error, printable
from modelcask.index import Drop
from modelcask.leases import SoleLease
from modelcask.notify import Notifier
from modelcask.plan import ImportPlan
from modelcask.store import Store
from modelcask.watch import Watcher

log = logging.getLogger("modelcask")

# Two looks in a row, this far apart, must agree before a drop counts as settled.
_LOOK_AGAIN = 0.5
# The loop comes round this often even if nothing happens: a directory may have come, gone or been covered by a mount,
# and the service manager wants to know that it works.
_ROUND = 2.0
# What lacks something is looked at this often, should its last event be missed; what is stuck, less often.
_LOOK_NOW_AND_THEN = 5.0
_LOOK_AT_STUCK = 60.0
# Everything is looked at this often, should an event be missed.
_LOOK_AT_ALL = 900.0
# What failed through no fault of its own is tried again after this time, then after twice as long, up to a limit.
_TRY_AGAIN, _TRY_AGAIN_AT_MOST = 60.0, 3600.0
# Imports at once: one keeps both cores and the disk busy, a second fills the gaps where the first waits for a flush,
# and lets a small model pass a large one.
_PARALLEL = 2


@dataclass(slots=True)
class _Tracked:
    """What the loop knows of one drop.

    Times are monotonic seconds.

    Attributes:
        row: what the index, and so `status`, was last told; None before the first time.
        fingerprint: of the last look.
        due: when it is looked at again, noticed or not.
        planned: when a look last went deeper than the fingerprint.
        progressed: when the fingerprint last changed.
        failures, retry: how often in a row its import failed by no fault of its own, and when to try again.
        job: its import, queued or under way.
        names: of the models that it becomes, as they are compared.
    """

    found: Found
    row: Drop | None
    fingerprint: str = ""
    due: float = 0.0
    planned: float = -math.inf
    progressed: float = field(default_factory=time.monotonic)
    failures: int = 0
    retry: float = 0.0
    job: Future[ImportOutcome] | None = None
    names: frozenset[str] = frozenset()


class Service:
    """Imports into `store` what is dropped, until `stop` is set."""

    def __init__(
        self,
        store: Store,
        config: Config,
        stop: threading.Event,
        *,
        notifier: Notifier,
        reload: Callable[[], Config],
    ) -> None:
        """
        Args:
            notifier: tells the service manager.
            reload: the configuration as it is now; raises InvalidConfig.
        """
        self._store = store
        self._config = config
        self._stop = stop
        self._notifier = notifier
        self._load_config = reload
        self._reload_wanted = threading.Event()
        self._noticed = threading.Event()
        self._drops: dict[Path, _Tracked] = {}
        self._remembered: dict[Path, Drop] = {}
        self._removals: set[Path] = set()
        self._unavailable: dict[Path, str] = {}
        self._old_pools: list[ThreadPoolExecutor] = []
        self._all_due = 0.0
        self._last_status = ""

    def wake(self) -> None:
        """Let the loop come round now: `stop` was set, or something happened."""
        self._noticed.set()

    def reload(self) -> None:
        """Read the configuration again, soon. A signal handler may call it."""
        self._reload_wanted.set()
        self._noticed.set()

    def run(self) -> None:
        """Work until `stop` is set. Raises LeaseTaken if another process watches for this store."""
        with SoleLease(self._store.leases):
            self._store.remove_abandoned_files()
            self._watcher = Watcher(self.wake)
            self._pool = self._new_pool()
            try:
                self._remember()
                self._look_around()
                self._notifier.ready(self._status())
                log.info("watching %s", ", ".join(printable(str(drop.path)) for drop in self._config.drops))
                self._work()
            finally:
                self._notifier.stopping("stopping")
                self._watcher.close()
                for pool in (*self._old_pools, self._pool):
                    pool.shutdown(wait=True, cancel_futures=True)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._notifier.alive()
            if self._reload_wanted.is_set():
                self._reload_wanted.clear()
                self._reload()
            try:
                self._look_around()
            except (MemoryError, RuntimeError, ImportError) as error:
                if (lack := memory_error(error)) is None:
                    raise
                log.error("%s", lack)
                self._all_due = 0.0  # what this round did not come to is for the next
                self._stop.wait(_ROUND)
            self._tell_status()
            # Never longer than a round: what cannot raise an event is found by coming round.
            waiting = (drop for drop in self._drops.values() if drop.job is None and not self._is_away(drop.found.path))
            due = min((drop.due for drop in waiting), default=math.inf)
            if self._noticed.wait(min(_ROUND, max(0.0, due - time.monotonic()))):
                self._noticed.clear()
                # What is noticed comes in bursts; one look serves for all of half a second.
                self._stop.wait(_LOOK_AGAIN)

    def _look_around(self) -> None:
        """Look at the drops where something was written, at those whose time has come, at all if events were lost."""
        self._watch_directories()
        ended = self._finish_jobs()
        changes = self._watcher.take()
        everything = changes.everything or time.monotonic() >= self._all_due
        if everything:
            self._all_due = time.monotonic() + _LOOK_AT_ALL
        if everything or ended or changes.paths:
            self._find()
        for path in changes.paths:
            for parent in (path, *path.parents):
                if (drop := self._drops.get(parent)) is not None:
                    drop.due = 0.0
                    drop.progressed = time.monotonic()  # a download grows in files that are no part of the drop
                    break
        for drop in self._drops.values():
            if self._stop.is_set():
                return
            if drop.job is None and (everything or drop.due <= time.monotonic()) and not self._is_away(drop.found.path):
                self._look_at(drop)
                self._notifier.alive()  # of a thousand complete drops, each look reads headers and JSON

    def _watch_directories(self) -> None:
        """Follow the drop directories; make those that are missing and can be made, tell of the others."""
        for directory in self._config.drops:
            # Only the last part: a missing parent may be a mount that has not come yet.
            try:
                if not directory.path.exists() and directory.path.parent.is_dir():
                    directory.path.mkdir()
            except OSError as error:
                log.debug("%s", disk_error(error))  # `refresh` tells why it cannot be watched
        unavailable = self._watcher.refresh({drop.path: drop.polling for drop in self._config.drops})
        for path in self._unavailable.keys() - unavailable.keys():
            log.info("%s: is there now", printable(str(path)))
            self._forget(path)
        for path, reason in unavailable.items():
            if self._unavailable.get(path) != reason:
                log.warning("%s: cannot be watched yet: %s", printable(str(path)), reason)
                self._save(Drop(path, str(path), "", "settling", error=f"a drop directory, not there yet: {reason}"))
        self._unavailable = unavailable

    def _find(self) -> None:
        """Find the drops that came and forget those that went. What a directory that is away held is kept."""
        found_now: dict[Path, Found] = {}
        for directory in self._config.drops:
            try:
                found_now |= {found.path: found for found in find_drops(directory)}
            except OSError as error:
                # Gone since it was last watched; the next round tells.
                self._unavailable.setdefault(directory.path, disk_error(error))
        for path, found in found_now.items():
            drop = self._drops.get(path)
            if drop is None:
                row = self._remembered.pop(path, None)
                self._drops[path] = _Tracked(found, row if row is not None and row.name == found.name else None)
            elif drop.job is None and drop.found != found:
                if drop.found.name != found.name:
                    self._drops[path] = _Tracked(found, None)  # of another type or namespace now
                else:
                    drop.found = found
        gone = (self._drops.keys() | self._remembered.keys()) - found_now.keys()
        for path in gone:
            held = path in self._drops and self._drops[path].job is not None
            if not held and not self._is_away(path):
                self._drops.pop(path, None)
                self._remembered.pop(path, None)
                self._removals.discard(path)
                self._forget(path)

    def _is_away(self, path: Path) -> bool:
        """Whether a drop lies in a directory that is not there now."""
        return any(path.is_relative_to(directory) for directory in self._unavailable)

    def _look_at(self, drop: _Tracked) -> None:
        """Look at one drop, and queue its import if it has settled."""
        now = time.monotonic()
        path = drop.found.path
        if path in self._removals:
            self._submit(drop, lambda: finish_removal(self._store, drop.found, save=self._save, stop=self._stop))
            self._removals.discard(path)
            return
        fingerprint = settle.fingerprint(path, beneath=drop.found.beneath)
        row = drop.row
        if (
            row is not None
            and row.fingerprint
            and row.fingerprint == fingerprint
            and row.state in ("imported", "unchanged", "failed")
        ):
            drop.due = math.inf
            return
        moved = fingerprint != drop.fingerprint
        drop.fingerprint = fingerprint
        if moved:
            drop.progressed, drop.failures, drop.retry = now, 0, 0.0
        if drop.retry > now:
            drop.due = drop.retry
            return
        if moved and now - drop.planned < _LOOK_NOW_AND_THEN:
            drop.due = now + _LOOK_AGAIN  # headers and JSON are not read again at every move
            return
        quantize = drop.found.directory.quantize
        look = settle.look(path, namespace=drop.found.namespace, quantize=quantize, beneath=drop.found.beneath)
        drop.planned = now
        if look.plan is not None and not moved and look.fingerprint == fingerprint:
            self._queue(drop, look.plan)
            return
        stuck = now - drop.progressed >= self._config.stuck_after
        missing = look.missing
        if missing is not None and stuck:
            since = time.strftime("%F %H:%M", time.localtime(time.time() - (now - drop.progressed)))
            missing = f"stuck, nothing has come since {since}: {missing}"
        self._tell(drop, "settling", error=missing)
        again = _LOOK_AGAIN if moved or look.plan is not None else _LOOK_AT_STUCK if stuck else _LOOK_NOW_AND_THEN
        drop.due = now + again

    def _queue(self, drop: _Tracked, plan: ImportPlan) -> None:
        drop.names = frozenset(str(model.name).casefold() for model in plan.models)
        if any(other.job is not None and other.names & drop.names for other in self._drops.values()):
            # Of two drops of one name the second is refused, if the first is to be found when its turn comes.
            self._tell(drop, "settling", error="complete, waits for another drop of the same name")
            drop.due = time.monotonic() + _LOOK_NOW_AND_THEN
            return
        ahead = sum(1 for other in self._drops.values() if other.job is not None)
        if ahead >= self._parallel:
            self._tell(drop, "settling", error="complete, waits for other imports to end")
        fingerprint = drop.fingerprint
        self._submit(
            drop, lambda: import_drop(self._store, drop.found, fingerprint, plan, save=self._save, stop=self._stop)
        )

    def _submit(self, drop: _Tracked, work: Callable[[], ImportOutcome]) -> None:
        drop.job = self._pool.submit(work)
        drop.job.add_done_callback(lambda _job: self.wake())

    def _finish_jobs(self) -> bool:
        """Take what became of imports that ended. Whether any did."""
        ended = [drop for drop in self._drops.values() if drop.job is not None and drop.job.done()]
        for drop in ended:
            assert drop.job is not None
            outcome = drop.job.result()
            drop.job, drop.row, drop.planned = None, outcome.row, -math.inf
            # It may have changed since; what changes while it is read is not read again without a pause.
            drop.due = 0.0 if outcome.row.state != "settling" else time.monotonic() + _LOOK_NOW_AND_THEN
            if outcome.passing_fault:
                drop.retry = time.monotonic() + min(_TRY_AGAIN * 2**drop.failures, _TRY_AGAIN_AT_MOST)
                drop.failures += 1
        return bool(ended)

    def _reload(self) -> None:
        self._notifier.reloading("reading the configuration")
        try:
            config = self._load_config()
        except (ModelcaskError, OSError) as error:
            what = str(error) if isinstance(error, ModelcaskError) else disk_error(error)
            log.error("%s; the configuration stays as it was", what)
            self._notifier.ready(f"configuration refused: {what}")
            return
        for key in ("store", "mount"):
            if getattr(config, key) != getattr(self._config, key):
                log.warning("%s: takes effect at the next start", key)
        if config.parallel != self._config.parallel:
            self._old_pools.append(self._pool)
            self._pool.shutdown(wait=False)  # what is queued there is still done
        previous, self._config = self._config, replace(config, store=self._config.store, mount=self._config.mount)
        if config.parallel != previous.parallel:
            self._pool = self._new_pool()
        self._watch_directories()
        self._find()
        log.info("configuration read again")
        self._last_status = ""
        self._notifier.ready(self._status())

    @property
    def _parallel(self) -> int:
        return self._config.parallel or _PARALLEL

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._parallel, "drop")

    def _tell_status(self) -> None:
        status = self._status()
        if status != self._last_status:
            self._notifier.status(status)
            self._last_status = status

    def _status(self) -> str:
        """How it goes, in one line."""
        jobs = [drop for drop in self._drops.values() if drop.job is not None and drop.job.running()]
        parts = [f"importing {printable(drop.found.name)}{_percent(drop.row)}" for drop in jobs]
        rows = [drop.row for drop in self._drops.values() if drop.row is not None]
        for state, word in (("settling", "settling"), ("failed", "failed")):
            if count := sum(1 for row in rows if row.state == state):
                parts.append(f"{count} {word}")
        done = sum(1 for row in rows if row.state in ("imported", "unchanged"))
        parts.append(f"{done} imported")
        parts += [f"{printable(str(path))}: {reason}" for path, reason in self._unavailable.items()]
        return ", ".join(parts)

    def _tell(self, drop: _Tracked, state: str, *, error: str | None) -> None:
        row = drop.row
        if row is not None and (row.state, row.error) == (state, error):
            return
        log.info("%s: %s%s", drop.found.name, state, f": {error}" if error else "", extra={"model": drop.found.name})
        drop.row = Drop(drop.found.path, drop.found.name, "", state, error=error)
        self._save(drop.row)

    def _save(self, row: Drop) -> None:
        """Tell the index, and so `status`. Import threads call it, too."""
        if (drop := self._drops.get(row.path)) is not None:
            drop.row = row
        try:
            self._store.index.save_drop(row)
        except IndexFailed as failure:
            log.warning("%s", failure)  # `status` is behind; the work goes on

    def _forget(self, path: Path) -> None:
        try:
            self._store.index.forget_drop(path)
        except IndexFailed as failure:
            log.warning("%s", failure)

    def _remember(self) -> None:
        """Take from the index what was known at the last end: what was imported shows as unchanged until a look."""
        try:
            self._store.index.begin_watch()
            self._remembered = {row.path: row for row in self._store.index.drops()}
            self._removals = set(self._store.index.removals())
        except IndexFailed as failure:
            log.warning("%s", failure)


def _percent(row: Drop | None) -> str:
    return f" {100 * row.done_bytes // row.total_bytes} %" if row is not None and row.total_bytes else ""
