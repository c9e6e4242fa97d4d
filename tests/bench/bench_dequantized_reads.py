"""Reading dequantized files: sequential and by mmap, cold and warm, against mlx.core.load + dequantize of the packed.

python tests/bench/bench_dequantized_reads.py [--gigabytes 1] [--rounds 3] [--dir DIR] [--types int4,…]

Cold: the mount is new, so its own page cache is empty; the blobs are in the page cache. The peer dequantizes
the same tensors with MLX from the `mlx/` view's bytes in the store, to the source dtype, if MLX is installed.
"""

from __future__ import annotations

import argparse
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_import import run_import
from made_models import write_model
from report import print_machine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default a temporary folder")
    parser.add_argument("--types", default="int4,int8,nvfp4,mxfp8")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        work = Path(name)
        write_model(work / "model", total_bytes=int(options.gigabytes * 1e9))
        (work / "mnt").mkdir()
        print_machine("cold: a new mount over blobs in the page cache; warm: read once before")
        run_import(work / "model", work / "store")
        for qtype in options.types.split(","):
            run_import(work / "model", work / "store", "--quantize", qtype)
        shard = "transformer/diffusion_pytorch_model.safetensors"
        print("| model | read cold | read warm | mmap cold | mmap warm | mount's RSS |")
        print("| --- | --- | --- | --- | --- | --- |")
        for tag in ("latest", *options.types.split(",")):
            figures: dict[str, list[float]] = {"read": [], "read again": [], "mmap": [], "mmap again": []}
            rss = 0
            for _ in range(options.rounds):
                for kind, read in (("read", read_all), ("mmap", map_all)):
                    command = [sys.executable, "-m", "modelcaskfs", str(work / "store"), str(work / "mnt")]
                    subprocess.run(command, check=True)
                    path = work / "mnt" / "diffusers/library/model" / tag / shard
                    warm_kernels(path)
                    for again in ("", " again"):
                        figures[kind + again].append(read(path))
                    rss = max(rss, resident_mib(work / "store"))
                    subprocess.run(["umount", str(work / "mnt")], check=True)
            medians = [sorted(speeds)[len(speeds) // 2] for speeds in figures.values()]
            print(f"| {tag} | " + " | ".join(f"{speed:.2f} GB/s" for speed in medians) + f" | {rss} MiB |")


def warm_kernels(path: Path) -> None:
    """Let the mount load its kernels: the start of one process is not a property of reading."""
    with path.open("rb", buffering=0) as file:
        file.seek(1 << 20)
        file.read(4096)


def read_all(path: Path) -> float:
    """GB/s of one read(2) after the other, 1 MiB each."""
    started = time.perf_counter()
    buffer = bytearray(1 << 20)
    total = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total / (time.perf_counter() - started) / 1e9


def map_all(path: Path) -> float:
    """GB/s of copying out of a private mapping, advised as diffusers does."""
    started = time.perf_counter()
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.close(fd)
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    size = len(mapped)
    for begin in range(0, size, 1 << 24):
        mapped[begin : begin + (1 << 24)]
    mapped.close()
    return size / (time.perf_counter() - started) / 1e9


def resident_mib(store: Path) -> int:
    """RSS of the process that serves `store`."""
    found = subprocess.run(["pgrep", "-f", f"modelcaskfs {store}"], capture_output=True, text=True, check=True)
    status = Path(f"/proc/{found.stdout.split()[0]}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) // 1024


if __name__ == "__main__":
    main()
