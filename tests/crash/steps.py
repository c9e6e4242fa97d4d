"""The steps of a write, numbered: every call that changes a filesystem, at which a test may kill or fail it.

A step is a call of `os` that creates, writes, renames, removes, touches or flushes, or opens a folder to flush it,
or durable's syncfs; the product makes no other changes but SQLite's. What happens between two steps changes nothing
on disk, so that dying before each step, and after the last, is dying at every moment that differs. A write can also
be torn: half of it is done.

Nothing of this is in the product: the calls are replaced in a process of the test's own.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from modelcask import durable

_CALLS = ("open", "write", "pwrite", "fsync", "rename", "unlink", "mkdir", "rmdir", "chmod", "fchmod", "utime")
_WRITES = ("write", "pwrite")

Act = Callable[["Step"], None]


@dataclass(frozen=True)
class Step:
    """A step that is about to be taken.

    Attributes:
        where: the path or descriptor, of a rename the new name.
        half: takes half of it, of a write.
    """

    number: int
    call: str
    where: object
    half: Callable[[], object] = lambda: None


@dataclass
class Steps:
    """Numbers the steps of a body from 1 on, on all threads, and tells `before` of each."""

    before: Act
    taken: list[Step] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def watching(self) -> Iterator[Steps]:
        """While the body runs, `before` is told of every step in this process before it is taken."""
        originals: list[tuple[Any, str, Any]] = [(os, name, getattr(os, name)) for name in _CALLS]
        originals.append((durable._libc, "syncfs", durable._libc.syncfs))
        for owner, name, call in originals:
            setattr(owner, name, self._watched(name, call))
        try:
            yield self
        finally:
            for owner, name, call in originals:
                setattr(owner, name, call)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not (len(arguments) > 1 and arguments[1] & (os.O_CREAT | os.O_DIRECTORY)):
                return call(*arguments, **options)
            half = (lambda: _half(call, arguments)) if name in _WRITES else (lambda: None)
            with self._lock:
                where = arguments[1] if name == "rename" else arguments[0]
                step = Step(len(self.taken) + 1, name, where, half)
                self.taken.append(step)
            self.before(step)
            return call(*arguments, **options)

        return watched


def _half(call: Callable[..., Any], arguments: tuple[Any, ...]) -> object:
    fd, data, *rest = arguments
    view = memoryview(data).cast("B")
    return call(fd, view[: len(view) // 2], *rest)


def kill_at(number: int, *, torn: bool = False) -> Act:
    """Kill this process before the step `number`; a write's half is done first if it is to be `torn`."""

    def act(step: Step) -> None:
        if step.number == number:
            if torn:
                step.half()
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def kill_after_commit() -> Act:
    """Kill this process when it has renamed a manifest into its place, before it flushes that."""
    committed = False

    def act(step: Step) -> None:
        nonlocal committed
        if committed:
            os.kill(os.getpid(), signal.SIGKILL)
        committed = step.call == "rename" and "manifests" in Path(str(step.where)).parts

    return act


def fail_at(number: int, code: int) -> Act:
    """Let the step `number` fail with the errno `code`, and all steps after it that need the same resource."""

    def act(step: Step) -> None:
        if step.number == number:
            where = step.where if isinstance(step.where, str) else None
            raise OSError(code, os.strerror(code), where)

    return act


def count(operation: Callable[[], object]) -> int:
    """How many steps the operation takes."""
    with Steps(lambda _step: None).watching() as steps:
        operation()
    return len(steps.taken)


def in_child(operation: Callable[[], object]) -> int:
    """Begin the operation in a forked process, which has all modules loaded; its process id."""
    pid = os.fork()
    if pid == 0:
        _run_and_exit(operation)
    return pid


def ended(pid: int) -> int:
    """Wait for a child; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_killed(operation: Callable[[], object], act: Act) -> bool:
    """Run the operation in a process that `act` may kill. Whether it did."""

    def dying() -> None:
        with Steps(act).watching():
            operation()

    status = ended(in_child(dying))
    assert status in (0, -signal.SIGKILL), "the operation failed before it was killed"
    return status != 0


def _run_and_exit(operation: Callable[[], object]) -> NoReturn:
    try:
        operation()
    except BaseException:  # noqa: BLE001 - whatever it is, the parent fails
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
