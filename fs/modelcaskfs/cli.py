"""The command `modelcaskfs STORE DIR [-o OPTIONS]`, which mount(8) runs as `mount.fuse.modelcaskfs`, too."""

from __future__ import annotations

import faulthandler
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from modelcask import config
from modelcask.errors import ModelcaskError, MountFailed, disk_error, printable
from modelcask.store import Store
from modelcaskfs import __version__, mount_options
from modelcaskfs.mount_options import InvalidOption, MountOptions

_READY_FD = "MODELCASKFS_READY_FD"

# For tests: 2 or 3 takes that libfuse, whichever would have been chosen.
_LIBFUSE = "MODELCASKFS_LIBFUSE"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT…]", help="Mount options; see below.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in front and log to stderr.")
@click.version_option(__version__)
def command(store: Path, directory: Path, options: tuple[str, ...], *, foreground: bool) -> None:
    """Show the models of STORE as ordinary folders below DIRECTORY, read-only.

    Returns when the mount answers. `umount DIRECTORY` ends it.

    \b
    Mount options:
      allow_other        other users may look, too, as far as modes allow
      uid=, gid=, umask= whose the files are, and what is taken off their modes
      self_contained     blobs/ is served by the mount, not a link to the store
      verify             each blob is hashed before its first byte is shown
      nosuid, nodev, noexec and what else /etc/fstab may say
    """
    parsed = mount_options.parse(options)
    if foreground:
        _serve(store, directory, parsed)
    else:
        _start(store, directory, options)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "options", multiple=True)
@click.option("-f", "fake", is_flag=True)
@click.option("-s", "sloppy", is_flag=True)
@click.option("-n", "no_mtab", is_flag=True)
@click.option("-v", "verbose", is_flag=True)
@click.option("-t", "kind")
def mount_helper(store: Path, directory: Path, options: tuple[str, ...], *, fake: bool, **_for_others: Any) -> None:
    """What mount(8) runs for `mount -t fuse.modelcaskfs STORE DIRECTORY`; its flags are those mount(8) passes on."""
    mount_options.parse(options)
    if not fake:
        _start(store, directory, options)


def main() -> None:
    """Run the command; errors are one line on stderr."""
    called_by_mount = Path(sys.argv[0]).name.startswith("mount.")
    try:
        (mount_helper if called_by_mount else command)(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(1)
    except click.ClickException as error:
        click.echo(f"modelcaskfs: {printable(error.format_message())} See `modelcaskfs --help`.", err=True)
        sys.exit(error.exit_code)
    except InvalidOption as error:
        click.echo(f"modelcaskfs: {error}", err=True)
        sys.exit(2)
    except ModelcaskError as error:
        click.echo(f"modelcaskfs: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"modelcaskfs: {disk_error(error)}", err=True)
        sys.exit(1)


@dataclass(eq=False)
class MountSaid(ModelcaskError):
    """What the process in the background said before it gave up: an error line already."""

    line: str

    def message(self) -> str:
        return self.line


def _serve(store: Path, directory: Path, options: MountOptions) -> None:
    from modelcaskfs.mount import serve

    faulthandler.enable()  # a crash in a library is told where stderr goes: the log
    logging.basicConfig(level=logging.INFO, format="modelcaskfs: %(message)s", stream=sys.stderr)
    opened, mountpoint = _open(store), Path(os.path.realpath(directory))
    os.chdir("/")  # so that no other filesystem is kept from being unmounted
    manager, _ = config.service_manager()

    def ready() -> None:
        manager.ready(f"{mountpoint} shows {opened.root}")
        _tell_ready()

    wanted = os.environ.get(_LIBFUSE)
    serve(
        opened,
        mountpoint,
        options=options,
        libfuse_major=int(wanted) if wanted else None,
        on_ready=ready,
        on_stopping=lambda: manager.stopping(f"{mountpoint} is unmounted, what is open is served to its end"),
    )


def _open(root: Path) -> Store:
    """The store, made ready for leases where it can be written."""
    try:
        return Store.create(root)
    except (PermissionError, OSError):
        return Store.open(root)


def _tell_ready() -> None:
    """Called when the mount answers: whoever waits for that is told here."""
    ready = os.environ.pop(_READY_FD, None)
    if ready is not None:
        os.write(int(ready), b"ready")
        os.close(int(ready))


def _start(store: Path, directory: Path, options: Sequence[str]) -> None:
    """Serve in a process of its own, and wait until it answers or gives up."""
    ready, child_end = os.pipe()
    arguments = [
        str(store.absolute()),
        str(directory.absolute()),
        "-f",
        *(part for o in options for part in ("-o", o)),
    ]
    with _log_file().open("ab") as log:
        before = log.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "modelcaskfs", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[child_end],
            env={**os.environ, _READY_FD: str(child_end)},
            start_new_session=True,
        )
    os.close(child_end)
    if os.read(ready, 5) == b"ready":
        return
    child.wait()
    with _log_file().open("rb") as log:
        log.seek(before)
        said = log.read().decode(errors="replace").strip().splitlines()
    if said:
        raise MountSaid(said[-1].removeprefix("modelcaskfs: "))
    raise MountFailed(directory, f"ended with exit status {child.returncode}", f"look into {_log_file()}")


def _log_file() -> Path:
    """Where a mount in the background writes what goes wrong."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "modelcask"
    state.mkdir(parents=True, exist_ok=True)
    return state / "mount.log"
