"""Real service managers for tests: a systemd of its own, with a user's manager below it, seen by nobody else.

`unshare` gives it namespaces in which it is process 1: its own /run, /etc, /tmp, /var, /srv and /home, all in
memory, and a control group of its own. It ends with the test, and every process and mount of it.

It knows no units but those of the test: a distribution's would set up what it takes for its machine, that is,
empty /tmp, set kernel parameters, start what is enabled.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from running import wait_for

USER, UID = "tester", 12345
_SYSTEMD = Path("/lib/systemd/systemd")
_HIDDEN = ("/run", "/tmp", "/var", "/srv", "/home")

_ACCOUNT = f"{USER}:x:{UID}:{UID}::/home/{USER}:/bin/sh"
# The user's manager is a service of the system's, as after a login.
_USER_MANAGER = f"""
[Unit]
DefaultDependencies=no
[Service]
Type=notify
User={USER}
Delegate=yes
Environment=HOME=/home/{USER} XDG_RUNTIME_DIR=/run/user/{UID}
ExecStart={_SYSTEMD} --user --unit=basic.target --log-target=journal
KillMode=mixed
"""
_JOURNAL = """
[Unit]
DefaultDependencies=no
[Service]
Type=notify
ExecStart=/lib/systemd/systemd-journald
StandardOutput=null
"""
_JOURNAL_SETTINGS = "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nRateLimitBurst=0"
# What services of the system depend on without saying so.
_TARGETS = ("sysinit", "basic", "multi-user", "shutdown")


@dataclass
class Done:
    """A finished command."""

    status: int
    out: str


class Manager:
    """A running system manager, and within it that of the user `tester`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self.pid = 0

    @property
    def root(self) -> Path:
        """Where its filesystem is seen from outside."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def home(self) -> Path:
        """The user's home, seen from outside."""
        return self.root / "home" / USER

    @property
    def log(self) -> str:
        """What the managers and their services said."""
        early = self._log.read_text(errors="replace")
        return early + (self.system("journalctl", "--no-pager", "--quiet", status=None).out if self.pid else "")

    def system(self, *command: str | Path, status: int | None = 0) -> Done:
        """Run a command beside the system manager, as root."""
        return self._run([], command, {"HOME": "/root"}, status)

    def user(self, *command: str | Path, status: int | None = 0) -> Done:
        """Run a command in the user's session."""
        become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
        runtime = f"/run/user/{UID}"
        environment = {"HOME": f"/home/{USER}", "XDG_RUNTIME_DIR": runtime, "USER": USER}
        return self._run(become, command, environment, status)

    def _run(
        self, become: Sequence[str], command: Sequence[str | Path], environment: dict[str, str], status: int | None
    ) -> Done:
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--wd=/"]
        done = subprocess.run(
            [*enter, *become, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.environ["PYTHONPATH"],
                "LC_ALL": "C.UTF-8",
                **environment,
            },
            timeout=90,
            check=False,
        )
        assert status is None or done.returncode == status, f"{command}: {done.stdout}"
        return Done(done.returncode, done.stdout)

    def show(self, unit: str, name: str, *, system: bool = False) -> str:
        """A property of a unit."""
        scope = [] if system else ["--user"]
        run = self.system if system else self.user
        return run("systemctl", *scope, "show", unit, "--property", name, "--value").out.strip()


@contextmanager
def booted(python_path: Sequence[Path]) -> Iterator[Manager]:
    """A manager for the body. Skips where there cannot be one."""
    _skip_unless_possible()
    group = _own_control_group() / f"modelcask-test-{os.getpid()}"
    group.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="modelcask-test-") as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["sh", "-c", _enter_namespaces(group, python_path, Path(scratch))],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        manager = Manager(process, log)
        try:
            wait_for(lambda: process.poll() is not None or _children(process.pid), seconds=10)
            assert process.poll() is None, manager.log
            (manager.pid,) = _children(process.pid)
            # While the folders are prepared it is a shell.
            wait_for(lambda: Path(f"/proc/{manager.pid}/comm").read_text() == "systemd\n", seconds=20)
            wait_for(lambda: manager.system("systemctl", "is-system-running", status=None).out == "running\n")
            manager.system("systemctl", "start", "systemd-journald.service", "tester.service")
            yield manager
        finally:
            for pid in _children(process.pid):
                os.kill(pid, signal.SIGKILL)  # process 1 of its namespace: all others end with it
            process.wait(20)
            _remove_control_groups(group)


def _skip_unless_possible() -> None:
    if os.geteuid() != 0:
        pytest.skip("a service manager of its own takes root")
    for program in (str(_SYSTEMD), "/lib/systemd/systemd-journald", "systemctl", "unshare", "nsenter", "setpriv"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (apt install systemd util-linux)")
    if subprocess.run(["unshare", "--mount", "--pid", "--cgroup", "--fork", "true"], check=False).returncode:
        pytest.skip("this machine allows no namespaces")
    if not _own_control_group().is_dir() or not os.access(_own_control_group(), os.W_OK):
        pytest.skip("control groups cannot be written here")


def _own_control_group() -> Path:
    """The folder of this process's group in the unified hierarchy."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            mountpoint = Path(line.split(" ")[4])
            own = next(g for g in Path("/proc/self/cgroup").read_text().splitlines() if g.startswith("0::"))
            return mountpoint / own.removeprefix("0::/")
    return Path("/nonexistent")


def _enter_namespaces(group: Path, python_path: Sequence[Path], scratch: Path) -> str:
    (scratch / "boot").write_text(_boot(python_path))
    # What begins here ends with the test's process, however that ends.
    return f"""
        echo $$ >{shlex.quote(str(group))}/cgroup.procs || exit 1
        exec setpriv --pdeathsig KILL unshare --fork --kill-child --mount --pid --cgroup --ipc --uts \\
            --propagation private sh -e {scratch}/boot
    """


def _boot(python_path: Sequence[Path]) -> str:
    """Makes the folders, then becomes the manager."""
    needed = sorted({Path(sys.prefix), Path(sys.base_prefix), *python_path})
    hidden = [Path(name) for name in _HIDDEN]
    # The user and the service's account must reach the interpreter, wherever that is.
    hidden += sorted({closed for path in needed if (closed := _closed_to_others(path)) is not None})
    quoted = [shlex.quote(str(path)) for path in needed]
    hold = [f"mkdir -p /mnt/{n}; mount --bind {path} /mnt/{n}" for n, path in enumerate(quoted)]
    hide = [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(path))}" for path in hidden]
    back = [f"mkdir -p {path}; mount --move /mnt/{n} {path}" for n, path in enumerate(quoted)]
    path = os.environ["PYTHONPATH"]
    return "\n".join(
        [
            "mount -t proc proc /proc",
            "mount -t tmpfs tmpfs /mnt",
            "cp -a /etc /mnt/etc; mount --bind /mnt/etc /etc",
            *hold,
            *hide,
            *back,
            "mount -t tmpfs tmpfs /etc/systemd",
            "mkdir -p /etc/systemd/system /run/systemd/unit-root /var/cache /var/lib /var/tmp",
            f"echo '{_ACCOUNT}' >>/etc/passwd; echo '{USER}:x:{UID}:' >>/etc/group",
            "sed -i '/^modelcask:/d' /etc/passwd /etc/group",
            f"mkdir -p /home/{USER} /run/user/{UID}; chmod 700 /home/{USER} /run/user/{UID}; chmod 1777 /tmp /var/tmp",
            f"chown {UID}:{UID} /home/{USER} /run/user/{UID}",
            f"cat >/etc/systemd/system/tester.service <<'END'\n{_USER_MANAGER}END",
            *(f"echo '[Unit]' >/etc/systemd/system/{target}.target" for target in _TARGETS),
            f"cat >/etc/systemd/system/systemd-journald.service <<'END'\n{_JOURNAL}END",
            f"printf '{_JOURNAL_SETTINGS}\n' >/etc/systemd/journald.conf".replace("\n", "\\n"),
            f"printf '[Manager]\\nDefaultEnvironment=PYTHONPATH={path}\\n' >/etc/systemd/system.conf",
            "cp /etc/systemd/system.conf /etc/systemd/user.conf",
            "umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup",
            "mount --bind -o ro /proc/sys /proc/sys",
            "mknod -m 666 /mnt/fuse c 10 229; mount --bind /mnt/fuse /dev/fuse",  # as udev would have it
            "mount --make-rshared /",
            "exec env -i container=test PATH=/usr/bin:/bin:/usr/sbin"
            " SYSTEMD_UNIT_PATH=/etc/systemd/system SYSTEMD_GENERATOR_PATH=/nonexistent"
            f" {_SYSTEMD} --unit=multi-user.target --log-target=journal --show-status=no",
        ]
    )


def _closed_to_others(path: Path) -> Path | None:
    """The outermost folder on the way to `path` that others than its owner may not enter."""
    return next((above for above in reversed(path.parents) if not above.stat().st_mode & 0o001), None)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _remove_control_groups(group: Path) -> None:
    def remove() -> bool:
        try:
            for folder in sorted(group.rglob("*/"), reverse=True):
                folder.rmdir()
            group.rmdir()
        except OSError:
            return not group.exists()  # the kernel still counts a process that was killed
        return True

    wait_for(remove, seconds=10)
