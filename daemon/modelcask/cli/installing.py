"""Commands that make modelcask a service of the machine: install-service, uninstall-service."""

from __future__ import annotations

import grp
import os
import pwd
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from modelcask import config, units
from modelcask.cli.serving import config_option, optional_store_option
from modelcask.errors import ModelcaskError
from modelcask.mounts import clear_dead_mount, current_mounts

_SYSUSERS = Path("/etc/sysusers.d/modelcask.conf")


@dataclass(eq=False)
class CannotInstall(ModelcaskError):
    """The machine, or this user's rights on it, does not allow the service."""

    reason: str
    remedy: str

    def message(self) -> str:
        return f"{self.reason}; {self.remedy}"


@click.command("install-service")
@click.option("--system", is_flag=True, help="For the machine, as a user of its own; takes root.")
@click.option("--dry-run", is_flag=True, help="Only show what would be written.")
@config_option
@optional_store_option
def install_service_command(config_path: Path | None, root: Path | None, *, system: bool, dry_run: bool) -> None:
    """Make modelcask a service of systemd, for yourself or for the machine.

    Writes the units for the store, drops and mount of the configuration, and says how to start them. Run it again
    when these have changed, or modelcask has moved.

    \b
      modelcask install-service            in ~/.config/systemd/user
      modelcask install-service --system   in /etc/systemd/system: user modelcask, store /var/lib/modelcask,
                                           drops in /srv/imports, models in /srv/models
    """
    if system and config_path is None:
        config_path = units.SYSTEM_CONFIG
    installer = _Installer(system=system, dry_run=dry_run)
    if system:
        installer.prepare_machine(config_path == units.SYSTEM_CONFIG)
    if dry_run and config_path == units.SYSTEM_CONFIG and not config_path.exists():
        effective = config.parse(units.system_config(), config_path, store=root)
    else:
        effective = config.load(config_path, store=root)
    installation = units.Installation(
        folder=installer.folder,
        python=Path(sys.executable),
        code=(Path(sys.prefix), Path(sys.base_prefix), Path(units.__file__).parent),
        system=system,
        config_path=config_path.absolute() if config_path else None,
        store=root.absolute() if root else None,
        effective=effective,
        namespaces=system or dry_run or installer.has_namespaces(),
    )
    wanted = installation.files()
    changed = [installer.write(path, text) for path, text in wanted.items()]
    for path in units.installed(installer.folder):
        if path not in wanted:
            installer.remove(path)
    installer.make_folders(effective)
    if not dry_run:
        installer.reload()
        _say_what_next(installer, restart=any(changed))


@click.command("uninstall-service")
@click.option("--system", is_flag=True, help="The machine's; takes root.")
@optional_store_option
def uninstall_service_command(root: Path | None, *, system: bool) -> None:
    """Stop the service and take its units away. Store, configuration and drops stay."""
    del root
    installer = _Installer(system=system, dry_run=False)
    if system:
        installer.require_root()
    found = units.installed(installer.folder)
    if not found:
        click.echo(f"nothing is installed in {installer.folder}")
        return
    # `disable` of a unit that somebody took away already fails; what is left is removed all the same.
    installer.systemctl("disable", "--now", *units.UNITS)
    for path in [*found, *([_SYSUSERS] if system and _SYSUSERS.exists() else [])]:
        installer.remove(path)
    installer.reload()
    installer.systemctl("reset-failed", *units.UNITS)
    kept = "the store, the configuration and the drops"
    if system:
        kept += f", and the user {units.ACCOUNT}"
    click.echo(f"{kept} stay as they are")


class _Installer:
    """Writes and says what it writes; with `dry_run` it only says."""

    def __init__(self, *, system: bool, dry_run: bool) -> None:
        self.system = system
        self.dry_run = dry_run
        configured = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        self.folder = Path("/etc/systemd/system") if system else configured / "systemd" / "user"

    def require_root(self) -> None:
        if os.geteuid() != 0:
            raise CannotInstall("--system takes root", f"run `sudo {shlex.join([sys.executable, '-m', *_command()])}`")

    def prepare_machine(self, with_config: bool) -> None:
        """The service's account and configuration."""
        if not self.dry_run:
            self.require_root()
        self.write(_SYSUSERS, units.sysusers())
        if not self.dry_run and not _account_exists():
            if shutil.which("systemd-sysusers"):
                _run("systemd-sysusers", str(_SYSUSERS))
            else:
                _run(
                    "useradd",
                    "--system",
                    "--home-dir",
                    "/var/lib/modelcask",
                    "--shell",
                    "/usr/sbin/nologin",
                    units.ACCOUNT,
                )
            click.echo(f"made the user {units.ACCOUNT}")
        if with_config and not units.SYSTEM_CONFIG.exists():
            self.write(units.SYSTEM_CONFIG, units.system_config())
        if not self.dry_run:
            self._check_reachable()

    def _check_reachable(self) -> None:
        """The service's account must be able to run this modelcask."""
        command = [sys.executable, "-P", "-c", "import modelcask, modelcaskfs"]
        try:
            subprocess.run(
                command,
                user=units.ACCOUNT,
                group=units.ACCOUNT,
                extra_groups=(),
                cwd="/",
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.SubprocessError):
            raise CannotInstall(
                f"{sys.executable}: the user {units.ACCOUNT} cannot run modelcask from there",
                "install it where all users may read it: `python3 -m venv /opt/modelcask`, for example",
            ) from None

    def has_namespaces(self) -> bool:
        """Whether this user's manager can make namespaces; it is tried, for many things can forbid it."""
        if not shutil.which("systemd-run"):
            return True
        run = ["systemd-run", "--user", "--quiet", "--wait", "--collect"]
        properties = ("PrivateUsers=yes", "ProtectSystem=strict", "PrivateNetwork=yes", "PrivateTmp=yes")
        plain = subprocess.run([*run, "true"], check=False, capture_output=True)
        if plain.returncode:
            return True  # no manager to ask
        tried = subprocess.run([*run, *(f"-p{each}" for each in properties), "true"], check=False, capture_output=True)
        if tried.returncode:
            click.echo("this machine allows users no namespaces: the service runs without those, less confined")
        return tried.returncode == 0

    def write(self, path: Path, text: str) -> bool:
        """Write a file unless it says so already; whether it did not."""
        if self.dry_run:
            click.echo(f"# {path}\n{text}")
            return False
        try:
            if path.read_text() == text:
                click.echo(f"unchanged  {path}")
                return False
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)
        click.echo(f"wrote      {path}")
        return True

    def remove(self, path: Path) -> None:
        if self.dry_run:
            return
        path.unlink()
        click.echo(f"removed    {path}")
        if path.parent.suffix == ".d" and path.parent.parent == self.folder and not any(path.parent.iterdir()):
            path.parent.rmdir()

    def make_folders(self, effective: config.Config) -> None:
        """The store, the drops and the mountpoint, each with the mode it needs."""
        owner = units.ACCOUNT if self.system else None
        self._make_folder(effective.store, owner, 0o755)
        for drop in effective.drops:
            # Members of the group may drop; what they make belongs to the group, too.
            self._make_folder(drop.path, owner, 0o2775 if self.system else 0o755)
        if not any(mount.mountpoint == effective.mount for mount in current_mounts()):
            clear_dead_mount(effective.mount)
            self._make_folder(effective.mount, owner, 0o755)

    def _make_folder(self, path: Path, owner: str | None, mode: int) -> None:
        if path.is_dir():
            return
        if self.dry_run:
            click.echo(f"# {path}/")
            return
        path.mkdir(parents=True)
        path.chmod(mode)
        if owner:
            shutil.chown(path, owner, owner)
        click.echo(f"made       {path}")

    def systemctl(self, *arguments: str) -> bool:
        """Whether systemctl did it."""
        if not shutil.which("systemctl"):
            return False
        scope = [] if self.system else ["--user"]
        return subprocess.run(["systemctl", *scope, *arguments], check=False, capture_output=True).returncode == 0

    def reload(self) -> None:
        if not self.systemctl("daemon-reload"):
            whose = "systemd" if self.system else "your systemd"
            click.echo(f"{whose} could not be told of it (is it running?); it reads the units when it starts", err=True)


def _say_what_next(installer: _Installer, *, restart: bool) -> None:
    ctl = "sudo systemctl" if installer.system else "systemctl --user"
    if restart and installer.systemctl("is-active", "--quiet", units.TARGET):
        click.echo(f"\nIt is running with the old units: {ctl} restart {units.TARGET}")
        return
    click.echo(f"\nNext:\n  {ctl} enable --now {units.TARGET}")
    if installer.system:
        click.echo(f"  sudo usermod -aG {units.ACCOUNT} YOU        who may drop models, from the next login on")
    else:
        click.echo("  loginctl enable-linger                        to have it run while you are not logged in, too")


def _account_exists() -> bool:
    try:
        pwd.getpwnam(units.ACCOUNT)
        grp.getgrnam(units.ACCOUNT)
    except KeyError:
        return False
    return True


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CannotInstall(f"{command[0]}: {said}", "mend that and run this again")


def _command() -> Sequence[str]:
    return ["modelcask", *sys.argv[1:]]
