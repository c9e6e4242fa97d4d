"""The units of the service manager: which text goes where. Pure; nothing is written here.

The units themselves are shipped as they are used, `systemd/` at the top of the repository, and can be read,
verified and packaged so. What differs from one installation to the next, paths above all, goes into a drop-in
beside each (systemd.unit(5)); a user's own drop-ins come after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from modelcask.config import Config

TARGET = "modelcask.target"
SERVICE = "modelcask.service"
MOUNT = "modelcask-mount.service"
UNITS = (TARGET, SERVICE, MOUNT)

ACCOUNT = "modelcask"
SYSTEM_CONFIG = Path("/etc/modelcask/config.toml")

_PATHS = "10-paths.conf"
_NO_NAMESPACES = "20-no-namespaces.conf"

# What PrivateTmp puts the service's own in the place of.
_TEMPORARY = ("/tmp", "/var/tmp")

# What takes a namespace, or a capability inside of one, and how a unit does without it.
_WITHOUT_NAMESPACES = """\
# This machine allows users no namespaces, which these settings are made of.
[Service]
PrivateUsers=no
ProtectSystem=no
ProtectHome=no
PrivateTmp=no
PrivateDevices=no
PrivateNetwork=no
PrivateIPC=no
PrivateMounts=no
ProtectKernelTunables=no
ProtectKernelModules=no
ProtectKernelLogs=no
ProtectControlGroups=no
ProtectClock=no
ProtectHostname=no
ProtectProc=default
ProcSubset=all
ReadWritePaths=
CapabilityBoundingSet=~
"""


@dataclass(frozen=True, slots=True)
class Installation:
    """What the units are made for.

    Attributes:
        folder: where units go.
        python: the interpreter that has modelcask.
        code: the folders that it needs to run it.
        system: whether they are the system manager's, else a user's.
        config_path: the configuration to name, None for the usual one.
        store: to be named, None for the configuration's.
        effective: the configuration.
        namespaces: whether the manager can make them.
    """

    folder: Path
    python: Path
    code: tuple[Path, ...]
    system: bool
    config_path: Path | None
    store: Path | None
    effective: Config
    namespaces: bool = True

    def files(self) -> dict[Path, str]:
        """Every file to write, and its text."""
        shipped = _shipped() / ("system" if self.system else "user")
        found = {self.folder / unit: (shipped / unit).read_text() for unit in UNITS}
        found[_drop_in(self.folder, SERVICE, _PATHS)] = self._service_paths()
        found[_drop_in(self.folder, MOUNT, _PATHS)] = self._mount_paths()
        if not self.namespaces:
            found[_drop_in(self.folder, SERVICE, _NO_NAMESPACES)] = _WITHOUT_NAMESPACES
        return found

    def _service_paths(self) -> str:
        store = self.effective.store
        command: list[str | Path] = [self.python, "-P", "-m", "modelcask", "watch"]
        command += ["--config", self.config_path] if self.config_path else []
        command += ["--store", self.store] if self.store else []
        drops = [drop.path for drop in self.effective.drops]
        # One that is not there yet is not waited for; what is mounted later below one can be written all the same.
        writable = " ".join([_word(store), *(_word(f"-{drop}") for drop in drops)])
        hidden = [path for path in (*self.code, store, *drops) if any(path.is_relative_to(tmp) for tmp in _TEMPORARY)]
        text = f"ExecStart=\nExecStart={_command(command)}\nReadWritePaths=\nReadWritePaths={writable}\n"
        text += f"# {_word(hidden[0])} would be out of sight.\nPrivateTmp=no\n" if hidden else ""
        return self._drop_in_text(text)

    def _mount_paths(self) -> str:
        command: list[str | Path] = [self.python, "-P", "-m", "modelcaskfs", self.effective.store, self.effective.mount]
        command += ["-f", *(["-o", "allow_other"] if self.system else [])]
        return self._drop_in_text(f"ExecStart=\nExecStart={_command(command)}\n")

    def _drop_in_text(self, service: str) -> str:
        again = "modelcask install-service" + (" --system" if self.system else "")
        return (
            f"# Written by `{again}`; run it again when store, mount or drops have changed in the configuration.\n"
            f"[Unit]\nRequiresMountsFor={_word(self.effective.store)}\n\n[Service]\n{service}"
        )


def installed(folder: Path) -> list[Path]:
    """The files in `folder` that an installation wrote."""
    own = [folder / unit for unit in UNITS]
    own += [_drop_in(folder, unit, name) for unit in (SERVICE, MOUNT) for name in (_PATHS, _NO_NAMESPACES)]
    return [path for path in own if path.exists()]


def sysusers() -> str:
    """What makes the service's account: sysusers.d(5)."""
    return (_shipped() / "sysusers.d" / "modelcask.conf").read_text()


def system_config() -> str:
    """The configuration of a system service that has none yet."""
    return (_shipped() / "config.toml").read_text()


def _drop_in(folder: Path, unit: str, name: str) -> Path:
    return folder / f"{unit}.d" / name


def _shipped() -> Path:
    """`systemd/`: within the package where it was installed from a wheel, else at the top of the repository."""
    with resources.as_file(resources.files("modelcask")) as package:
        inside = package / "systemd"
        return inside if inside.is_dir() else package.parent.parent / "systemd"


def _command(words: Iterable[str | Path]) -> str:
    # In commands, a dollar sign stands for a variable besides.
    return " ".join(_word(word).replace("$", "$$") for word in words)


def _word(word: str | Path) -> str:
    """`word` as one word of a unit file, which knows quotes, escapes and %-specifiers: systemd.syntax(7)."""
    text = str(word).replace("%", "%%")
    if re.fullmatch(r"[\w/.%@:+,=$-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
