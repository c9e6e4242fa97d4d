"""What `-o verify` costs: reading a model of a new mount with and without it, first and second time.

python tests/bench/bench_verifying_mount.py [--gigabytes 1] [--rounds 5] [--dir DIR]

The blobs are in the page cache, so that hashing is all there is to see; the peer is the mount without the option, in
turns. `first byte` is the wait for one page of the model's largest tensor.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_dequantized_reads import read_all
from bench_import import run_import
from made_models import write_model
from report import print_machine

_SHARDS = ("text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        work = Path(name)
        write_model(work / "model", total_bytes=int(options.gigabytes * 1e9))
        (work / "mnt").mkdir()
        print_machine("a new mount over blobs in the page cache")
        run_import(work / "model", work / "store")
        figures: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for side, given in (("plain", []), ("verify", ["-o", "verify"])):
                command = [sys.executable, "-m", "modelcaskfs", str(work / "store"), str(work / "mnt"), *given]
                subprocess.run(command, check=True)
                folder = work / "mnt/diffusers/library/model/latest"
                figures.setdefault((side, "first byte"), []).append(first_byte(folder / _SHARDS[1]))
                for kind in ("first read", "second read"):
                    started = time.perf_counter()
                    for shard in _SHARDS:
                        read_all(folder / shard)
                    figures.setdefault((side, kind), []).append(time.perf_counter() - started)
                subprocess.run(["umount", str(work / "mnt")], check=True)
        print("| | plain | verify | verify / plain |")
        print("| --- | --- | --- | --- |")
        for kind in ("first byte", "first read", "second read"):
            plain, verify = (statistics.median(figures[side, kind]) for side in ("plain", "verify"))
            print(f"| {kind} | {plain * 1000:.1f} ms | {verify * 1000:.1f} ms | {verify / plain:.2f} |")


def first_byte(path: Path) -> float:
    """Seconds until a page from the middle of the file is there."""
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        file.seek(path.stat().st_size // 2)
        file.read(4096)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
