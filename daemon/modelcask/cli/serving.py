"""Commands that run or look at what runs: mount, umount, watch, up, status."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from modelcask import config
from modelcask.cli.output import (
    existing_store,
    json_option,
    print_json,
    print_table,
    size_text,
    stopping_on_signals,
    store_option,
)
from modelcask.config import Config
from modelcask.errors import IndexFailed, InvalidConfig
from modelcask.leases import sole_holder
from modelcask.mounts import current_mounts, mounts_of, unmount
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
def watch_command(config_path: Path | None, root: Path | None) -> None:
    """Import what is dropped into the watched directories, in the foreground.

    Without a configuration, ~/imports is watched. A folder is imported when it is complete: `modelcask
    status` tells what is still missing. ctrl-c ends it; an import that was under way goes on at the next
    start.
    """
    import warnings

    from modelcask.service import Service

    # watchdog 7 warns, a dozen lines each, of folders that vanish while it begins to watch them.
    warnings.filterwarnings("ignore", module="watchdog")

    logging.basicConfig(level=logging.INFO, format="modelcask: %(message)s", stream=sys.stderr)
    effective = _configuration(config_path, root)
    with stopping_on_signals() as stop:
        service = Service(Store.create(effective.store), effective.drops, stop)
        watched = ", ".join(str(drop.path) for drop in effective.drops)
        _wake_when_set(stop, service.noticed.set)
        service.run(on_ready=lambda: logging.getLogger("modelcask").info("watching %s", watched))


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


@click.command("status")
@store_option
@json_option
def status_command(root: Path, *, as_json: bool) -> None:
    """Show what is mounted, what is being imported, and what is still missing of a drop."""
    store = existing_store(root)
    pid = sole_holder(store.leases)
    mounts = mounts_of(store.root)
    try:
        index = store.index_for_looking()
        drops = index.drops() if index is not None else []
    except IndexFailed as error:
        click.echo(f"modelcask: {error}", err=True)  # the rest can be told all the same
        drops = []
    if as_json:
        print_json(
            {
                "daemon": {"running": pid is not None, "pid": pid},
                "mounts": [str(mount.mountpoint) for mount in mounts],
                "imports": [
                    {
                        "name": drop.name,
                        "state": drop.state,
                        "done_bytes": drop.done_bytes,
                        "total_bytes": drop.total_bytes,
                        "error": drop.error,
                    }
                    for drop in drops
                ],
            }
        )
        return
    click.echo(f"daemon  {f'watching (process {pid})' if pid else 'not running'}")
    click.echo(f"mounts  {', '.join(str(mount.mountpoint) for mount in mounts) or 'none'}")
    if drops:
        click.echo()
        rows = [
            (drop.name, drop.state, _how_far(drop.done_bytes, drop.total_bytes), drop.error or "") for drop in drops
        ]
        print_table(("NAME", "STATE", "DONE", ""), rows, right=(2,))


def _configuration(path: Path | None, root: Path | None) -> Config:
    effective = config.load(path)
    if any(drop.after == "delete" for drop in effective.drops):
        raise InvalidConfig(path or config.default_path(), 'after = "delete" is not there yet; write "keep"')
    return Config(root or effective.store, effective.mount, effective.drops)


def _make_mountpoint(directory: Path) -> None:
    if not any(mount.mountpoint == directory for mount in current_mounts()):
        directory.mkdir(parents=True, exist_ok=True)


def _wake_when_set(event: Any, wake: Callable[[], None]) -> None:
    """Call `wake` once `event` is set, so that who waits for something else looks at it."""
    import threading

    def wait() -> None:
        event.wait()
        wake()

    threading.Thread(target=wait, name="wake", daemon=True).start()


def _how_far(done: int, total: int) -> str:
    return f"{size_text(done)} of {size_text(total)}" if total else ""
