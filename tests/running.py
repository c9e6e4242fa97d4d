"""Running modelcask in tests: imports by the function, the command line as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modelcask import importer, plan, source
from modelcask.importer import ImportResult
from modelcask.store import Store


def import_folder(store: Store, folder: Path, **options: Any) -> list[ImportResult]:
    """Import as the command does."""
    planned = plan.plan_import(source.look(folder), **options)
    return importer.run_import(store, planned, report=lambda _done, _total: None, stop=threading.Event())


@dataclass(frozen=True)
class Done:
    """A finished command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class CommandLine:
    """`modelcask …` as a process of its own, on one store."""

    def __init__(self, store: Path, home: Path) -> None:
        self.store = store
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("MODELCASK_", "XDG_"))},
            "HOME": str(home),
            "MODELCASK_STORE": str(store),
        }

    def __call__(self, *arguments: str | Path, status: int | None = 0) -> Done:
        """Run the command; its exit status must be `status`, unless that is None."""
        command = [sys.executable, "-m", "modelcask", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=120, check=False)
        assert status is None or done.returncode == status, done.stderr + done.stdout
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str | Path, stdout_closed: bool = False) -> subprocess.Popen[str]:
        """Start a command that stays; its stderr can be read."""
        command = [sys.executable, "-m", "modelcask", *map(str, arguments)]
        reading, writing = os.pipe()
        os.close(reading)
        try:
            stdout = writing if stdout_closed else None
            return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=self.environment)
        finally:
            os.close(writing)

    @contextmanager
    def mounted(self, directory: Path, *options: str) -> Iterator[Path]:
        """The store mounted at `directory` for the body."""
        directory.mkdir(exist_ok=True)
        self("mount", directory, *options)
        try:
            yield directory
        finally:
            self("umount", directory)


class Watching:
    """A running `watch` or `up`, and its drop directory."""

    def __init__(self, cask: CommandLine, *command: str | Path) -> None:
        self.cask = cask
        self.home = Path(cask.environment["HOME"])
        self.drops = self.home / "imports"
        self.process: subprocess.Popen[str] = cask.start(*command)
        wait_for(lambda: self.status()["daemon"]["running"] or self.process.poll() is not None)
        if "--config" not in command:
            wait_for(self.drops.is_dir)

    def status(self) -> Any:
        return self.cask("status", "--json").json

    def states(self) -> dict[str, Any]:
        return {each["name"]: each["state"] for each in self.status()["imports"]}

    def error(self, name: str) -> str:
        """What `status` says of a drop."""
        return next((str(each["error"] or "") for each in self.status()["imports"] if each["name"] == name), "")

    def end(self, number: int = signal.SIGINT) -> str:
        """End it as ctrl-c does; what it said."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=10)
        return said


def blob_files(store: Path) -> dict[str, int]:
    """Names and sizes of all files in `blobs/`."""
    return {path.name: path.stat().st_size for path in (store / "blobs").iterdir()}


def serving(store: Path) -> list[int]:
    """The processes that serve the store."""
    found = subprocess.run(["pgrep", "-f", f"modelcaskfs {store}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def wait_for(condition: Callable[[], Any], *, seconds: float = 30.0) -> Any:
    """Wait until `condition()` is true; its value. Fails after `seconds`."""
    patience = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if value := condition():
            return value
        patience.wait(0.05)
    pytest.fail(f"did not become true within {seconds} s")
