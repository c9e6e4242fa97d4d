"""Commands that run something: mount, umount, watch, up."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from modelcask import config
from modelcask.cli.logs import LogFormat, log_to_stderr
from modelcask.cli.output import existing_store, store_option
from modelcask.cli.signals import acting_on_signals, stopping_on_signals
from modelcask.config import Config
from modelcask.mounts import current_mounts, unmount
from modelcask.store import Store

F = TypeVar("F", bound=Callable[..., Any])

_MOUNT_COMMAND = (sys.executable, "-m", "modelcaskfs")


def config_option(command: F) -> F:
    """`--config FILE`, handed over as the Path or None."""
    return click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        envvar="MODELCASK_CONFIG",
        help="The configuration [MODELCASK_CONFIG; default ~/.config/modelcask/config.toml].",
    )(command)


def optional_store_option(command: F) -> F:
    """`--store DIR` where the configuration has a say, handed over as a Path or None."""
    return click.option(
        "--store",
        "root",
        type=click.Path(path_type=Path),
        envvar="MODELCASK_STORE",
        help="The store's folder [MODELCASK_STORE; default: the configuration's].",
    )(command)


@click.command("mount")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("-f", "--foreground", is_flag=True, help="Stay in front and log to stderr.")
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT…]", help="Mount options, such as allow_other.")
@store_option
def mount_command(directory: Path, options: tuple[str, ...], root: Path, *, foreground: bool) -> None:
    """Show the models as ordinary folders below DIR, read-only.

    Returns when the mount answers. Models that are imported later appear by themselves.

    \b
      DIR/diffusers/library/flux/latest/   the folder as it was dropped
      DIR/tensors/library/flux/latest/     a file for each tensor
      DIR/hub/                             a Hugging Face cache (HF_HUB_CACHE=DIR/hub HF_HUB_OFFLINE=1)
      DIR/blobs/                           the store's blobs
    """
    existing_store(root)
    arguments = [
        str(root),
        str(directory),
        *(["-f"] if foreground else []),
        *(part for o in options for part in ("-o", o)),
    ]
    sys.exit(subprocess.run([*_MOUNT_COMMAND, *arguments], check=False).returncode)


@click.command("umount")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@store_option
def umount_command(directory: Path, root: Path) -> None:
    """Unmount the models from DIR, whatever store they are of."""
    del root
    unmount(directory)


@click.command("watch")
@config_option
@optional_store_option
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", help="How the log on stderr is written."
)
def watch_command(config_path: Path | None, root: Path | None, log_format: LogFormat) -> None:
    """Import what is dropped into the watched directories, in the foreground.

    Without a configuration, ~/imports is watched. A folder is imported when it is complete: `modelcask
    status` tells what is still missing. ctrl-c ends it; an import that was under way goes on at the next
    start. SIGHUP makes it read the configuration again.
    """
    from modelcask.service import Service

    # watchdog 7 warns, a dozen lines each, of folders that vanish or move while it begins to watch them.
    warnings.filterwarnings("ignore", module="watchdog")
    log_to_stderr(log_format)
    notifier, _ = config.service_manager()
    effective = _configuration(config_path, root)
    stop = threading.Event()
    store = Store.create(effective.store)
    service = Service(store, effective, stop, notifier=notifier, reload=lambda: _configuration(config_path, root))

    def end() -> None:
        stop.set()
        service.wake()

    # From a terminal that is closed, SIGHUP means the end, as for other programs.
    hang_up = end if sys.stdin.isatty() else service.reload
    with acting_on_signals({signal.SIGINT: end, signal.SIGTERM: end, signal.SIGHUP: hang_up}):
        service.run()


@click.command("up")
@config_option
@optional_store_option
def up_command(config_path: Path | None, root: Path | None) -> None:
    """Watch and mount together, in the foreground.

    Imports what is dropped into ~/imports and shows it below ~/models, or wherever the configuration says.
    ctrl-c ends both.
    """
    from modelcask.supervise import Child, keep_running

    effective = _configuration(config_path, root)
    Store.create(effective.store)
    _make_mountpoint(effective.mount)
    watch = [sys.executable, "-m", "modelcask", "watch", "--store", str(effective.store)]
    watch += ["--config", str(config_path)] if config_path else []
    mount = [*_MOUNT_COMMAND, str(effective.store), str(effective.mount), "-f"]
    click.echo(f"store   {effective.store}", err=True)
    click.echo(f"models  {effective.mount}/diffusers", err=True)
    click.echo(
        f"drop model folders into {', '.join(str(drop.path) for drop in effective.drops)}; ctrl-c ends",
        err=True,
    )
    with stopping_on_signals() as stop:
        children = [Child("mount", mount, lingers=True), Child("watch", watch)]
        keep_running(children, stop=stop, say=lambda text: click.echo(f"modelcask: {text}", err=True))


def _configuration(path: Path | None, root: Path | None) -> Config:
    return config.load(path, store=root.absolute() if root is not None else None)


def _make_mountpoint(directory: Path) -> None:
    if not any(mount.mountpoint == directory for mount in current_mounts()):
        directory.mkdir(parents=True, exist_ok=True)
