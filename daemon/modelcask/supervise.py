"""Keeping processes running: what `up` does with the watcher and the mount."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from modelcask.errors import ModelcaskError, printable

_STOP_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
# A process that dies this often in a row, each time sooner than it takes to be useful, will not recover by itself.
_QUICK_DEATHS = 3
_QUICK_SECONDS = 5.0


@dataclass(eq=False)
class ChildFailed(ModelcaskError):
    """A supervised process that keeps dying."""

    name: str
    status: int

    def message(self) -> str:
        return (
            f"{self.name}: ended with exit status {self.status} {_QUICK_DEATHS} times in a row; its last line says why"
        )


@dataclass
class Child:
    """A command to keep running.

    Attributes:
        lingers: whether it may end later by itself when it was told to, because others still use it.
    """

    name: str
    command: Sequence[str]
    lingers: bool = False
    quick_deaths: int = 0
    started: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        self.started = time.monotonic()
        # A session of its own: ctrl-c reaches the supervisor alone, which ends its children in order.
        self.process = subprocess.Popen(self.command, start_new_session=True, preexec_fn=_end_with_parent)


def keep_running(children: Sequence[Child], *, stop: threading.Event, say: Callable[[str], None]) -> None:
    """Keep `children` running until `stop` is set, then end them, the last first.

    Raises:
        ChildFailed: one of them dies as soon as it is started, again and again.
    """
    try:
        for child in children:
            child.start()
        while not stop.wait(0.2):
            for child in children:
                assert child.process is not None
                status = child.process.poll()
                if status is not None:
                    _restart(child, status, say)
    finally:
        for child in reversed(children):
            _end(child, say)


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when the supervisor dies, however it does (prctl(2), PR_SET_PDEATHSIG)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _restart(child: Child, status: int, say: Callable[[str], None]) -> None:
    quick = time.monotonic() - child.started < _QUICK_SECONDS
    child.quick_deaths = child.quick_deaths + 1 if quick else 0
    if child.quick_deaths >= _QUICK_DEATHS:
        raise ChildFailed(child.name, status)
    say(f"{printable(child.name)} ended with exit status {status}, starting it again")
    child.start()


def _end(child: Child, say: Callable[[str], None]) -> None:
    if child.process is None or child.process.poll() is not None:
        return
    child.process.terminate()
    try:
        child.process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        if child.lingers:
            say(f"the {child.name} is still in use, it ends with its last user")
            return
        child.process.kill()
        child.process.wait()
