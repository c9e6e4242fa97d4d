"""Reading a shard through the mount, against squashfuse and the model folder itself: by read(2) and by mmap.

python tests/bench/bench_mount_reads.py [--gigabytes 1] [--rounds 5] [--read-ahead KIB] [--borg] [--dir DIR]

First: the filesystem is mounted anew, so its own page cache is empty; what it reads from (blobs, squashfs image) is in
the page cache. Again: the same file right after that. The squashfs is not compressed. Every round reads with each side
once; figures are medians, ratios medians over the rounds' ratios. `--read-ahead` sets the kernel's for all mounts.

Targets: first ≥ 0.90 of squashfuse, again ≥ 0.95 of native by mmap, `tensors/` and `blobs/` ≥ 0.98 of native.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_import import run_import
from made_models import write_model
from reading import drop, map_all, read_all, warm
from report import print_machine, touch_memory

_KINDS: dict[str, Callable[[Path], float]] = {"read": read_all, "mmap": map_all}
_BORG = {"BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes", "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}

Figures = dict[tuple[str, str, str], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1, help="of the shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--read-ahead", type=int, default=None, metavar="KIB")
    parser.add_argument("--borg", action="store_true", help="borg mount, too")
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        work = Path(name)
        write_model(work / "model", total_bytes=int(options.gigabytes * 1.6e9))
        native = max((work / "model").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
        run_import(work / "model", work / "store")
        for folder in ("mnt", "squash", "borg"):
            (work / folder).mkdir()
        quietly("mksquashfs", work / "model", work / "image", "-noI", "-noD", "-noF", "-noX")
        backing = [native, work / "image", *(work / "store/blobs").iterdir()]
        if options.borg:
            quietly("borg", "init", "-e", "none", work / "repository")
            quietly("borg", "create", "-C", "none", f"{work}/repository::a", "model", cwd=work)
            backing += [path for path in (work / "repository").rglob("*") if path.is_file()]
        print_machine("first: new mount over files in the page cache; again: right after it")
        print(f"shard:   {native.stat().st_size / 1e9:.2f} GB; read-ahead {options.read_ahead or 'as mounted'} KiB")
        figures = measure(work, native, backing, options.rounds, options.read_ahead, borg=options.borg)
        print_table(figures)
        own_blobs(work, options.rounds)


def measure(
    work: Path, native: Path, backing: list[Path], rounds: int, read_ahead: int | None, *, borg: bool
) -> Figures:
    inside = native.relative_to(work / "model")
    ours = [sys.executable, "-m", "modelcaskfs", work / "store", work / "mnt"]
    sides: dict[str, tuple[list[str | Path], Path, Path]] = {
        "modelcask": (ours, work / "mnt", work / "mnt/diffusers/library/model/latest" / inside),
        "squashfuse": (["squashfuse", work / "image", work / "squash"], work / "squash", work / "squash" / inside),
    }
    if borg:
        command = ["borg", "mount", f"{work}/repository::a", work / "borg"]
        sides["borg mount"] = (command, work / "borg", work / "borg/model" / inside)
    figures: Figures = defaultdict(list)
    for _ in range(rounds):
        for kind, read in _KINDS.items():
            for side, (command, mountpoint, path) in sides.items():
                warm(backing)
                touch_memory(2)
                with mounted(command, mountpoint, read_ahead):
                    path.stat()
                    for when in ("first", "again"):
                        figures[side, kind, when].append(read(path))
            # Its pages, too, have just been filled: those of a virtual machine are slower at first.
            drop([native])
            touch_memory(2)
            warm([native])
            figures["native", kind, "again"].append(read(native))
    return figures


def print_table(figures: Figures) -> None:
    print("| side | read first | mmap first | read again | mmap again |")
    print("| --- | --- | --- | --- | --- |")
    for side in dict.fromkeys(side for side, _, _ in figures):
        cells = [figures.get((side, kind, when)) for when in ("first", "again") for kind in _KINDS]
        print(f"| {side} | " + " | ".join(f"{statistics.median(c):.2f} GB/s" if c else "–" for c in cells) + " |")
    for peer in ("squashfuse", "native"):
        cells = [
            ratio(figures["modelcask", kind, when], figures.get((peer, kind, when)))
            for when in ("first", "again")
            for kind in _KINDS
        ]
        print(f"| modelcask / {peer} | " + " | ".join(cells) + " |")


def ratio(ours: list[float], theirs: list[float] | None) -> str:
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}" if theirs else "–"


def own_blobs(work: Path, rounds: int) -> None:
    """`tensors/` and `blobs/` are links to the store's own files: all of the transformer's tensors, and all blobs."""
    view = work / "mnt/tensors/library/model/latest/transformer"
    with mounted([sys.executable, "-m", "modelcaskfs", work / "store", work / "mnt"], work / "mnt", None):
        tensors = sorted(view.iterdir())
        sides = {
            "tensors/": (tensors, [path.resolve() for path in tensors]),
            "blobs/": (sorted((work / "mnt/blobs").iterdir()), sorted((work / "store/blobs").iterdir())),
        }
        print("| files of the store | cold (disk) | warm, read | warm, mmap |")
        print("| --- | --- | --- | --- |")
        for side, (linked, direct) in sides.items():
            cells = []
            for is_cold, read in ((True, read_all), (False, read_all), (False, map_all)):
                taken: dict[str, list[float]] = {"linked": [], "direct": []}
                for number in range(rounds * 2):
                    pair = [("linked", linked), ("direct", direct)]
                    for which, paths in pair if number % 2 else pair[::-1]:
                        (drop if is_cold else warm)(direct)
                        taken[which].append(speed(paths, read))
                cells.append(f"{statistics.median(taken['linked']):.2f} GB/s, {ratio(*taken.values())}")
            print(f"| {side} ({len(linked)}) | " + " | ".join(cells) + " |")


def speed(paths: Iterable[Path], read: Callable[[Path], float]) -> float:
    """GB/s over all files, from opening the first to closing the last; each file's own speed tells its time."""
    size, seconds = 0, 0.0
    for path in paths:
        each = path.stat().st_size
        size, seconds = size + each, seconds + each / read(path) / 1e9
    return size / seconds / 1e9


@contextmanager
def mounted(command: list[str | Path], mountpoint: Path, read_ahead: int | None) -> Iterator[None]:
    quietly(*command, environment=_BORG)
    try:
        if read_ahead is not None:
            device = mountpoint.stat().st_dev
            setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
            setting.write_text(str(read_ahead))
        yield
    finally:
        patience = threading.Event()
        while subprocess.run(["umount", mountpoint], check=False, stderr=subprocess.DEVNULL).returncode:
            patience.wait(0.05)


def quietly(*command: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=cwd, env={**os.environ, **(environment or {})})


if __name__ == "__main__":
    main()
