"""Telling the service manager how it goes: the protocol of sd_notify(3).

A message is one datagram of `KEY=value` lines to the socket that the manager named. Nothing comes back, and the work
never depends on it: where no manager listens, or it has gone, or is too busy to take a message, nothing happens.
"""

from __future__ import annotations

import contextlib
import socket
import time

from modelcask.errors import printable


class Notifier:
    """Tells the manager at `address`, a path or, with a leading `@`, an abstract name; without one it does nothing.

    Any thread may call it. No call blocks or raises.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address.replace("@", "\0", 1) if address and address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    def ready(self, status: str) -> None:
        """The start, or a reload, is done."""
        self._tell("READY=1", _status(status))

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows."""
        self._tell(_status(text))

    def reloading(self, status: str) -> None:
        """A reload begins; `ready` ends it."""
        # The time lets the manager tell this answer from that to an earlier request (systemd ≥ 253, notify-reload).
        self._tell(
            "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}", _status(status)
        )

    def stopping(self, status: str) -> None:
        """The end begins."""
        self._tell("STOPPING=1", _status(status))

    def alive(self) -> None:
        """The loop still works. To be called from that loop, more often than the watchdog's interval."""
        self._tell("WATCHDOG=1")

    def close(self) -> None:
        """Tell nothing any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, *lines: str) -> None:
        if self._socket is None or self._address is None:
            return
        # The manager is gone, or its queue is full: a later message will tell as much.
        with contextlib.suppress(OSError):
            self._socket.sendto("\n".join(lines).encode(errors="replace"), self._address)


def _status(text: str) -> str:
    return f"STATUS={printable(text)}"
