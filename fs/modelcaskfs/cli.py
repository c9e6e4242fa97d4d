"""The command `modelcaskfs STORE DIR [-o OPTIONS]`, which mount(8) runs as `mount.fuse.modelcaskfs`, too."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from modelcask import config
from modelcask.errors import ModelcaskError, MountFailed, disk_error
from modelcask.store import Store
from modelcaskfs import __version__

_READY_FD = "MODELCASKFS_READY_FD"

# mount(8) passes on what stands in /etc/fstab for others to read.
_FOR_OTHERS = ("auto", "noauto", "user", "nouser", "users", "nofail", "_netdev", "defaults", "rw", "ro")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT…]", help="Mount options: verify, allow_other, …")
@click.option("-f", "--foreground", is_flag=True, help="Stay in front and log to stderr.")
@click.version_option(__version__)
def command(store: Path, directory: Path, options: tuple[str, ...], *, foreground: bool) -> None:
    """Show the models of STORE as ordinary folders below DIRECTORY, read-only.

    Returns when the mount answers. `umount DIRECTORY` ends it.
    """
    wanted = [option for text in options for option in text.split(",") if option]
    wanted = [option for option in wanted if option not in _FOR_OTHERS and not option.startswith("x-")]
    if foreground:
        _serve(store, directory, wanted)
    else:
        _start(store, directory, wanted)


def main() -> None:
    """Run the command; errors are one line on stderr."""
    try:
        command(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (ModelcaskError, OSError) as error:
        click.echo(f"modelcaskfs: {disk_error(error) if isinstance(error, OSError) else error}", err=True)
        sys.exit(1)


@dataclass(eq=False)
class MountSaid(ModelcaskError):
    """What the process in the background said before it gave up: an error line already."""

    line: str

    def message(self) -> str:
        return self.line


def _serve(store: Path, directory: Path, options: list[str]) -> None:
    from modelcaskfs.mount import serve

    logging.basicConfig(level=logging.INFO, format="modelcaskfs: %(message)s", stream=sys.stderr)
    opened, mountpoint = _open(store), Path(os.path.realpath(directory))
    os.chdir("/")  # so that no other filesystem is kept from being unmounted
    manager, _ = config.service_manager()

    def ready() -> None:
        manager.ready(f"{mountpoint} shows {opened.root}")
        _tell_ready()

    serve(
        opened,
        mountpoint,
        options=options,
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
    ready = os.environ.pop(_READY_FD, None)
    if ready is not None:
        os.write(int(ready), b"ready")
        os.close(int(ready))


def _start(store: Path, directory: Path, options: list[str]) -> None:
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
