"""`status`: what is mounted, what is being imported, and what a drop still lacks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelcask.cli.output import (
    existing_store,
    json_option,
    print_json,
    size_text,
    store_option,
    table_lines,
)
from modelcask.cli.signals import stopping_on_signals
from modelcask.errors import IndexFailed, printable
from modelcask.index import Drop
from modelcask.leases import sole_holder
from modelcask.mounts import Mount, mounts_of
from modelcask.store import Store

if TYPE_CHECKING:
    from rich.console import RenderableType

_INTERVAL = 0.5
# What is under way, or needs somebody, stands first.
_ORDER = {"importing": 0, "failed": 1, "settling": 2, "imported": 3, "unchanged": 4}
# Without --all, of those that are done only so many are shown.
_SHOWN_DONE = 20


@dataclass(frozen=True, slots=True)
class _State:
    """What there is to tell, at one moment."""

    pid: int | None
    mounts: Sequence[Mount]
    drops: Sequence[Drop]
    fault: str | None

    @classmethod
    def of(cls, store: Store) -> _State:
        fault = None
        drops: list[Drop] = []
        try:
            index = store.index_for_looking()
            if index is not None:
                drops = index.drops()
                index.close()
        except IndexFailed as error:
            fault = str(error)  # the rest can be told all the same
        drops.sort(key=lambda drop: _ORDER.get(drop.state, -1))  # stable: what changed last stays first
        return cls(sole_holder(store.leases), mounts_of(store.root), drops, fault)

    def as_json(self) -> dict[str, Any]:
        return {
            "daemon": {"running": self.pid is not None, "pid": self.pid},
            "mounts": [str(mount.mountpoint) for mount in self.mounts],
            "imports": [
                {
                    "name": drop.name,
                    "state": drop.state,
                    "done_bytes": drop.done_bytes,
                    "total_bytes": drop.total_bytes,
                    "error": drop.error,
                }
                for drop in self.drops
            ],
        }

    def header(self) -> list[str]:
        mounts = ", ".join(printable(str(mount.mountpoint)) for mount in self.mounts)
        return [
            f"daemon  {f'watching (process {self.pid})' if self.pid else 'not running'}",
            f"mounts  {mounts or 'none'}",
        ]

    def lines(self, *, all_drops: bool) -> list[str]:
        lines = self.header()
        if self.drops:
            shown, hidden = _shown(self.drops, all_drops=all_drops)
            rows = [(drop.name, drop.state, _how_far(drop), drop.error or "") for drop in shown]
            lines += ["", *table_lines(("NAME", "STATE", "DONE", ""), rows, right=(2,))]
            if hidden:
                lines.append(f"… and {hidden} more that are imported; --all shows them")
        return lines


@click.command("status")
@store_option
@json_option
@click.option("-f", "--follow", is_flag=True, help="Stay and show how it goes; ctrl-c ends.")
@click.option("--all", "all_drops", is_flag=True, help=f"Show all drops, not just {_SHOWN_DONE} that are done.")
def status_command(root: Path, *, as_json: bool, follow: bool, all_drops: bool) -> None:
    """Show what is mounted, what is being imported, and what is still missing of a drop."""
    if as_json and follow:
        raise click.UsageError("--json prints one document; it does not go with --follow")
    store = existing_store(root)
    if follow:
        with stopping_on_signals() as stop:
            (_follow_on_terminal if sys.stdout.isatty() else _follow_in_lines)(store, stop, all_drops=all_drops)
        return
    state = _State.of(store)
    if state.fault:
        click.echo(f"modelcask: {state.fault}", err=True)
    if as_json:
        print_json(state.as_json())
    else:
        click.echo("\n".join(state.lines(all_drops=all_drops)))


def _follow_on_terminal(store: Store, stop: threading.Event, *, all_drops: bool) -> None:
    from rich.live import Live

    with Live(auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            live.update(_picture(_State.of(store), all_drops=all_drops), refresh=True)
            if stop.wait(_INTERVAL):
                return


def _follow_in_lines(store: Store, stop: threading.Event, *, all_drops: bool) -> None:
    """A line for each drop whenever its state, or what it lacks, has changed."""
    told: dict[Path, tuple[str, str | None]] = {}
    while True:
        for drop in _shown(_State.of(store).drops, all_drops=all_drops)[0]:
            news = (drop.state, drop.error)
            if told.get(drop.path) != news:
                told[drop.path] = news
                click.echo(printable(f"{drop.name}: {drop.state}{f': {drop.error}' if drop.error else ''}"))
        if stop.wait(_INTERVAL):
            return


def _picture(state: _State, *, all_drops: bool) -> RenderableType:
    """The state as a table with bars."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NAME", "STATE", "", "DONE", ""):
        table.add_column(column, justify="right" if column == "DONE" else "left")
    shown, hidden = _shown(state.drops, all_drops=all_drops)
    for drop in shown:
        bar = ProgressBar(total=drop.total_bytes or 1, completed=drop.done_bytes, width=20)
        table.add_row(
            Text(printable(drop.name)),
            drop.state,
            bar if drop.state == "importing" else "",
            _how_far(drop),
            Text(printable(drop.error or "")),
        )
    lines = [Text(line) for line in state.header()]
    below = [Text(f"… and {hidden} more that are imported")] if hidden else []
    return Group(*lines, Text(), table, *below)


def _shown(drops: Sequence[Drop], *, all_drops: bool) -> tuple[list[Drop], int]:
    """The drops to show, and how many that are done are not."""
    done = [drop for drop in drops if drop.state in ("imported", "unchanged") and not drop.error]
    hidden = set() if all_drops else {drop.path for drop in done[_SHOWN_DONE:]}
    return [drop for drop in drops if drop.path not in hidden], len(hidden)


def _how_far(drop: Drop) -> str:
    if not drop.total_bytes:
        return ""
    if drop.state == "importing":
        return f"{size_text(drop.done_bytes)} of {size_text(drop.total_bytes)}"
    return size_text(drop.total_bytes)
