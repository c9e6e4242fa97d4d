"""Letting go of blob pages that were served: what it costs, and what stays in the page cache.

python tests/bench/bench_let_go.py [--gigabytes 1] [--rounds 5] [--dir DIR]

A shard is read through the span reader, 128 KiB at a time as the kernel asks for it, from blobs in the page cache: once
as where memory is short, once as where it is not. The first pass after it, of another model that shares the blobs, say,
or through `tensors/`, then finds them on the disk or in memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "daemon"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "fs"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_import import run_import
from made_models import write_model
from reading import read_all, warm
from report import print_machine

from modelcask.store import Store
from modelcaskfs.reader import SpanReader
from modelcaskfs.views import FileNode, Tree
from trees import find

_READ = 128 << 10
_SHARD = "diffusers/library/model/latest/transformer/diffusion_pytorch_model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1, help="of the shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        work = Path(name)
        write_model(work / "model", total_bytes=int(options.gigabytes * 1.6e9))
        run_import(work / "model", work / "store")
        store = Store.open(work / "store")
        blobs = sorted((work / "store/blobs").iterdir())
        node = find(Tree(store), _SHARD)
        assert isinstance(node, FileNode)
        print_machine("blobs in the page cache before each pass")
        figures: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        left = {}
        for _ in range(options.rounds):
            for is_short in figures:
                warm(blobs)
                reader = SpanReader(store.blobs, max_open=1024, memory_is_short=lambda short=is_short: short)
                first = passed(reader, node)
                left[is_short] = cached(blobs)
                started = time.perf_counter()
                for blob in blobs:
                    read_all(blob)
                figures[is_short].append((first, time.perf_counter() - started))
        size = sum(blob.stat().st_size for blob in blobs)
        for is_short, taken in figures.items():
            first, again = (statistics.median(each) for each in zip(*taken, strict=True))
            print(
                f"{'let go' if is_short else 'kept':7} serving {node.content.size / 1e9 / first:.2f} GB/s; after it "
                f"{left[is_short] / 1e9:.2f} of {size / 1e9:.2f} GB of blobs cached, reading them all {again:.2f} s"
            )


def passed(reader: SpanReader, node: FileNode) -> float:
    """Seconds of one pass over the file."""
    buffer = memoryview(bytearray(_READ))
    started = time.perf_counter()
    for offset in range(0, node.content.size, _READ):
        reader.read(node.content, offset, buffer)
    return time.perf_counter() - started


def cached(blobs: list[Path]) -> int:
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, blobs)]
    return sum(int(line) for line in subprocess.check_output(command).split())


if __name__ == "__main__":
    main()
