"""Reading through libfuse 3 against libfuse 2: what requests of 1 MiB instead of 128 KiB are worth.

python tests/bench/bench_libfuse.py [--gigabytes 1] [--rounds 3] [--dir DIR]

The mount is new for each read, so its own page cache is empty; the blobs are in the page cache. Root can raise the
mount's read-ahead (/sys/class/bdi/…/read_ahead_kb): without that the kernel reads 128 KiB ahead, whatever is asked for.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_dequantized_reads import map_all, read_all
from bench_import import run_import
from made_models import write_model
from report import print_machine

READS = {"read(2)": read_all, "mmap": map_all}
READ_AHEAD_KB = (128, 1024)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        work = Path(name)
        write_model(work / "model", total_bytes=int(options.gigabytes * 1e9))
        (work / "mnt").mkdir()
        print_machine("a new mount over blobs in the page cache")
        run_import(work / "model", work / "store")
        path = work / "mnt/diffusers/library/model/latest/transformer/diffusion_pytorch_model.safetensors"
        print("| read | read-ahead | libfuse 2 | libfuse 3 | ratio |")
        print("| --- | --- | --- | --- | --- |")
        kinds = [(kind, read, kb) for kind, read in READS.items() for kb in READ_AHEAD_KB]
        for kind, read, kb in (*kinds, ("O_DIRECT", read_directly, 0)):
            speeds: dict[str, list[float]] = {"2": [], "3": []}
            for _ in range(options.rounds):
                for major, taken in speeds.items():
                    command = [sys.executable, "-m", "modelcaskfs", str(work / "store"), str(work / "mnt")]
                    subprocess.run(command, check=True, env={**os.environ, "MODELCASKFS_LIBFUSE": major})
                    if kb:
                        set_read_ahead(work / "mnt", kb)
                    taken.append(read(path))
                    subprocess.run(["umount", str(work / "mnt")], check=True)
            two, three = (statistics.median(taken) for taken in speeds.values())
            shown = f"{kb} KiB" if kb else "none"
            print(f"| {kind} | {shown} | {two:.2f} GB/s | {three:.2f} GB/s | {three / two:.2f}× |", flush=True)


def set_read_ahead(mountpoint: Path, kilobytes: int) -> None:
    """Let the kernel read ahead so far in this mount; only root may."""
    device = mountpoint.stat().st_dev
    (Path("/sys/class/bdi") / f"{os.major(device)}:{os.minor(device)}" / "read_ahead_kb").write_text(str(kilobytes))


def read_directly(path: Path) -> float:
    """GB/s of reads of 1 MiB past the page cache."""
    started = time.perf_counter()
    total = 0
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 1 << 20) as buffer:
        while count := os.preadv(fd, [buffer], total):
            total += count
    os.close(fd)
    return total / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    main()
