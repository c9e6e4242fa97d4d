"""What the service manager hears, on a real datagram socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelcask import config
from modelcask.notify import Notifier


class Manager:
    """The manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self.socket.settimeout(5)

    def heard(self) -> list[str]:
        return self.socket.recv(65536).decode().split("\n")


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify") if request.param == "path" else f"@modelcask-test-{os.getpid()}")
    yield made
    made.socket.close()


def test_every_message_arrives_as_the_protocol_has_it(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    notifier.ready("watching /a")
    assert manager.heard() == ["READY=1", "STATUS=watching /a"]
    notifier.status("importing m")
    assert manager.heard() == ["STATUS=importing m"]
    notifier.stopping("")
    assert manager.heard() == ["STOPPING=1", "STATUS="]
    notifier.alive()
    assert manager.heard() == ["WATCHDOG=1"]
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading("reading")
    word, at, status = manager.heard()
    assert (word, status) == ("RELOADING=1", "STATUS=reading")
    assert before <= int(at.removeprefix("MONOTONIC_USEC=")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.close()
    notifier.alive()


def test_a_status_cannot_hold_another_message(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    notifier.status("a drop named x\nREADY=1\nMAINPID=1")
    assert manager.heard() == [r"STATUS=a drop named x\nREADY=1\nMAINPID=1"]
    notifier.close()


def test_without_a_manager_nothing_happens(tmp_path: Path) -> None:
    for address in (None, "", str(tmp_path / "nobody"), "@modelcask-test-nobody", "/" + "x" * 200):
        notifier = Notifier(address)
        notifier.ready("x")
        notifier.alive()
        notifier.close()


def test_a_manager_that_has_gone_or_does_not_listen_holds_nothing_up(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(manager.address)
    began = time.monotonic()
    for _ in range(5000):  # more than its queue takes
        notifier.alive()
    manager.socket.close()
    notifier.alive()
    assert time.monotonic() - began < 5
    notifier.close()


def test_the_environment_says_where_and_how_often_and_children_do_not_see_it(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier, watchdog = config.service_manager()
    notifier.ready("x")
    assert manager.heard() == ["READY=1", "STATUS=x"]
    assert watchdog == 30.0
    seen = "import os; print([key for key in os.environ if key.startswith(('NOTIFY_', 'WATCHDOG_'))])"
    assert subprocess.run([sys.executable, "-c", seen], capture_output=True, check=True).stdout == b"[]\n"
    notifier.close()


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [
        (None, None, None),
        ("2000000", None, 2.0),
        ("2000000", "1", None),
        ("0", None, None),
        ("nonsense", None, None),
    ],
)
def test_a_watchdog_that_is_not_meant_for_this_process_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, interval: float | None
) -> None:
    for key, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid), ("NOTIFY_SOCKET", None)):
        if value is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, value)
    assert config.service_manager()[1] == interval
