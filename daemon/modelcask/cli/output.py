"""How commands speak: options they share, JSON, tables, sizes, progress, and errors of the disk."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from modelcask.config import default_store
from modelcask.errors import printable
from modelcask.store import Store

F = TypeVar("F", bound=Callable[..., Any])

_PLAIN_INTERVAL = 10.0


def store_option(command: F) -> F:
    """`--store DIR`, handed over as a Path."""
    return click.option(
        "--store",
        "root",
        type=click.Path(path_type=Path),
        envvar="MODELCASK_STORE",
        default=default_store,
        help="The store's folder [MODELCASK_STORE; default ~/.local/share/modelcask].",
    )(command)


def json_option(command: F) -> F:
    """`--json`, handed over as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else.")(command)


def print_json(value: Any) -> None:
    """One JSON document on stdout; what would act on a terminal is escaped, all other letters are readable."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Rows in aligned columns; `right` are the numbers of the columns that align right."""
    click.echo("\n".join(table_lines(header, rows, right=right)))


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """The lines of a table; see `print_table`."""
    table = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def size_text(count: int) -> str:
    """Bytes for people: `12.3 GB`, decimal as disks and model pages count."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def existing_store(root: Path) -> Store:
    """The store for reading; where there is none yet, an empty one, which is said on stderr."""
    if not root.exists():
        click.echo(f"modelcask: no store at {root} yet, `modelcask import FOLDER` makes one", err=True)
    return Store.open(root)


@contextmanager
def progress(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A report(done bytes, total bytes) that shows how far it is: a bar on a terminal, else a line now and then."""
    if quiet:
        yield lambda _done, _total: None
    elif sys.stderr.isatty():
        with _bar(what) as report:
            yield report
    else:
        yield _plain_lines(what)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_lines(what: str) -> Callable[[int, int], None]:
    started = last = time.monotonic()
    lock = threading.Lock()

    def report(done: int, total: int) -> None:
        nonlocal last
        with lock:
            now = time.monotonic()
            if now - last < _PLAIN_INTERVAL:
                return
            last = now
        rate = done / (now - started)
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        click.echo(f"{what}: {size_text(done)} of {size_text(total)}, {size_text(int(rate))}/s{left}", err=True)

    return report
