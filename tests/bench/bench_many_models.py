"""A store of many models: mounting it, walking all of it, opening one shard, and asking for files that are not there.

python tests/bench/bench_many_models.py [--models 1000] [--tensors 1000] [--dir DIR]

Targets: mounted and answering in 1 s, at most 250 MiB after `find`, the first open of a shard of 3,000 tensors in
50 ms. The models share their blobs: one is imported, its manifest is written under the other names.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "daemon"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import print_machine

from folders import tensor, write_component, write_model
from modelcask.names import ModelName
from modelcask.store import Store
from running import import_folder, serving

_ROUNDS = 5
_MISSES = 2000
_SHARD = "transformer/diffusion_pytorch_model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        work = Path(name)
        make_models(work, models=options.models, tensors=options.tensors)
        print_machine("manifests and blobs in the page cache; each figure from a new mount")
        print(f"store:   {options.models} models of {options.tensors} tensors, one of 3,000")
        mountpoint = work / "mnt"
        mountpoint.mkdir()
        command = [sys.executable, "-m", "modelcaskfs", str(work / "store"), str(mountpoint)]
        started, opened = [], []
        for _ in range(_ROUNDS):
            started.append(timed(lambda: (subprocess.run(command, check=True), os.listdir(mountpoint / "diffusers"))))  # noqa: PTH208
            opened.append(timed(lambda: os.close(os.open(mountpoint / f"diffusers/library/wide/latest/{_SHARD}", 0))))
            unmount(mountpoint)
        print(f"mounted and answering:             {statistics.median(started) * 1e3:8.0f} ms   (target ≤ 1000)")
        print(f"first open, shard of 3,000 tensors:{statistics.median(opened) * 1e3:8.1f} ms   (target ≤ 50)")
        subprocess.run(command, check=True)
        (server,) = serving(work / "store")
        before = resident_mib(server)
        find = ["find", str(mountpoint / "diffusers")]
        found: list[int] = []
        for which in ("first", "second"):
            seconds = timed(lambda: found.append(subprocess.check_output(find).count(b"\n")))
            print(f"{which + ' find over diffusers/:':35}{seconds:8.2f} s    {found[-1]} names")
        print(f"RSS before and after:              {before:8.0f} MiB, {resident_mib(server):.0f} MiB (target ≤ 250)")
        model = mountpoint / "diffusers/library/wide/latest/vae"
        for what, path in (("file of a model", model), ("model", mountpoint / "diffusers/library")):
            fresh = [missing(path / f"no{number}") for number in range(_MISSES)]
            again = [missing(path / "no0") for number in range(_MISSES)]
            print(
                f"stat of a missing {what + ':':17}{statistics.median(fresh) * 1e6:8.1f} µs (p99 "
                f"{sorted(fresh)[_MISSES * 99 // 100] * 1e6:.1f}); asked again {statistics.median(again) * 1e6:.1f} µs"
            )
        unmount(mountpoint)


def make_models(work: Path, *, models: int, tensors: int) -> None:
    """A store with so many models, and one more whose transformer is one shard of 3,000 tensors."""
    store = Store.create(work / "store")
    for name, count in (("m", tensors), ("wide", 3000)):
        folder = write_model(work / name)
        weights = {f"blocks.{n}.weight": tensor(f"{name}{n}", 16) for n in range(count)}
        write_component(folder / "transformer", [weights], stem="diffusion_pytorch_model")
        import_folder(store, folder)
    manifest = store.manifests.read(ModelName.parse("m")).manifest
    for number in range(1, models):
        temporary = store.root / "tmp" / "manifest"
        store.manifests.write(ModelName.parse(f"org{number % 10}/m{number}"), manifest, temporary=temporary)
    store.index.close()


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def missing(path: Path) -> float:
    """Seconds it takes to learn that `path` is not there."""
    name = os.fspath(path)
    started = time.perf_counter()
    try:
        os.stat(name)  # noqa: PTH116 - building a Path takes longer than asking the kernel
    except FileNotFoundError:
        return time.perf_counter() - started
    raise AssertionError(name)


def resident_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def unmount(mountpoint: Path) -> None:
    """Unmount and wait until the process that served it has ended."""
    processes = serving(mountpoint.parent / "store")
    subprocess.run(["umount", str(mountpoint)], check=True)
    patience = threading.Event()
    while any(Path(f"/proc/{process}").exists() for process in processes):
        patience.wait(0.01)


if __name__ == "__main__":
    main()
