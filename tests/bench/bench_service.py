"""The service with a thousand drops that it has imported: from its start until it is idle, and at rest.

python tests/bench/bench_service.py [--drops 1000] [--rest 60]

The peer of the start is `find` printing every file's inode, size and times, which is what a look at a drop needs. Ready
is when it says so to the service manager: by then every drop was looked at.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from report import alternate, print_machine

from folders import write_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--drops", type=int, default=1000)
    parser.add_argument("--rest", type=int, default=60, help="seconds at rest")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print_machine("files in the page cache")
        home = Path(name)
        made = write_model(home / "made")
        for number in range(arguments.drops):
            shutil.copytree(made, home / "imports" / f"m{number:05}")
        files = sum(1 for _ in (home / "imports").rglob("*"))
        print(f"{arguments.drops} drops, {files} files and folders")
        _Watch(home).wait_until_imported(arguments.drops).end()
        find = ["find", home / "imports", "-printf", "%i %s %T@ %C@"]
        medians = alternate(
            {
                "find": lambda: subprocess.run(find, check=True, stdout=subprocess.DEVNULL),
                "watch, until all are looked at": lambda: _Watch(home).wait_until_ready().end(),
            },
            rounds=5,
        )
        print(f"watch / find: {medians['watch, until all are looked at'] / medians['find']:.1f}")
        watch = _Watch(home).wait_until_ready()
        time.sleep(3)
        before = watch.cpu_seconds
        time.sleep(arguments.rest)
        used = watch.cpu_seconds - before
        print(f"at rest: {used:.2f} s of CPU in {arguments.rest} s, {watch.rss_mib:.0f} MiB resident")
        watch.end()


class _Watch:
    """A running `modelcask watch`."""

    def __init__(self, home: Path) -> None:
        self._home = home
        address = home / "notify"
        address.unlink(missing_ok=True)
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(address))
        self._manager.settimeout(600)
        environment = {**os.environ, "HOME": str(home), "NOTIFY_SOCKET": str(address)}
        command = [sys.executable, "-m", "modelcask", "watch"]
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    def wait_until_ready(self) -> _Watch:
        return self._wait_for("READY=1")

    def wait_until_imported(self, count: int) -> _Watch:
        return self._wait_for(f"STATUS={count} imported")

    def _wait_for(self, line: str) -> _Watch:
        while line not in self._manager.recv(4096).decode().splitlines():
            pass
        return self

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def rss_mib(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(20)
        self._manager.close()


if __name__ == "__main__":
    main()
