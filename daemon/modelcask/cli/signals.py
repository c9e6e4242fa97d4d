"""Signals, handed to a thread.

A Python signal handler runs on the main thread, between any two of its instructions: one that sets an Event while that
thread is just about to wait for it takes a lock that its own thread holds, and hangs for good. So the handlers do
nothing; the interpreter writes the signal's number to a pipe, and a thread that reads it acts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def acting_on_signals(actions: Mapping[signal.Signals, Callable[[], object]]) -> Iterator[None]:
    """Call a signal's action, on a thread, whenever it comes while the body runs. For the main thread.

    A second SIGINT kills as usual.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=_act, args=(reading, actions), name="signals", daemon=True)
    thread.start()
    previous_fd = signal.set_wakeup_fd(writing)
    previous = {number: signal.signal(number, _ignore) for number in actions}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(writing)
        thread.join()
        os.close(reading)


@contextmanager
def stopping_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP set while the body runs; a second SIGINT kills as usual."""
    stop = threading.Event()
    with acting_on_signals(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), stop.set)):
        yield stop


def _ignore(number: int, _frame: Any) -> None:
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _act(reading: int, actions: Mapping[signal.Signals, Callable[[], object]]) -> None:
    while numbers := os.read(reading, 64):
        for number in numbers:
            # Others' signals (SIGCHLD, …) come through the same pipe.
            with contextlib.suppress(KeyError, ValueError):
                actions[signal.Signals(number)]()
