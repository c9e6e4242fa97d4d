"""Many processes read from a mount at random while models come and go, and compare every byte.

python tests/torture.py [--seconds 600] [--readers 64] [--dir DIR]; tests/e2e/test_torture.py runs a short one.

Most readers read ranges of 20 files, of plain models and of a quantized one, and now and then make the kernel forget
what it has of them. The others read a model that is replaced and removed all the time: what they find must be one state
of it from beginning to end. Meanwhile models are imported, replaced and removed, and gc runs.
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fs"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "daemon"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

_SHARDS = 4
_MODELS = ("plain0", "plain1", "plain2", "plain3", "packed")
_SHARD_MIB = 8
_LENGTHS = (1, 100, 4096, 65_536, 131_072, 131_073, 1 << 20, 4 << 20)
_PART = 128 << 10
_CHURNING = "churning"
_CHURN_READERS = 4
# Between imports, replacements and removals readers look the model up again.
_PAUSE = 0.3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        worst: seconds of the longest single read, from open to close.
        slowest: which it was.
        changes: imports, replacements, removals and gc runs that were done meanwhile.
        errors: what readers saw that they must not see.
        rss: MiB of the serving process, sampled after each change.
    """

    reads: int
    gigabytes: float
    worst: float
    slowest: str
    changes: Counter[str]
    errors: list[str]
    rss: list[float]

    def __str__(self) -> str:
        half = len(self.rss) // 2
        return (
            f"{self.reads} reads, {self.gigabytes:.1f} GB, all compared; {len(self.errors)} errors\n"
            f"meanwhile {dict(self.changes)}\n"
            f"the longest took {self.worst:.3f} s: {self.slowest}\n"
            f"RSS at most {max(self.rss[:half]):.0f} MiB in the first half, {max(self.rss[half:]):.0f} in the second"
        )


def run(work: Path, *, seconds: float, readers: int) -> Outcome:
    """Torture a new store and mount below `work`."""
    from folders import tensor, write_component, write_model
    from running import CommandLine, serving

    (work / "home").mkdir()
    cask = CommandLine(work / "store", work / "home")
    expected: dict[str, str] = {}
    for name in _MODELS:
        folder = write_model(work / name, shards=_SHARDS, transformer=name)
        rows = _SHARD_MIB << 20 >> 13
        shards = [
            {f"{name}.{number}.{part}.weight": tensor(f"{name}{number}{part}", size, 2048) for part, size in parts}
            for number in range(_SHARDS)
            for parts in [[*((n, 3 + n) for n in range(40)), (40, rows), (41, rows)]]
        ]
        write_component(folder / "transformer", shards, stem="diffusion_pytorch_model")
        (folder / "transformer/diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        cask("import", folder, *(("--quantize", "int4", "--name", f"{name}:latest") if name == "packed" else ()))
    for number in range(2):
        folder = write_model(work / f"state{number}", transformer=f"state{number}")
        weights = {"w.weight": tensor(f"state{number}", 500, 2048)}
        write_component(folder / "transformer", [weights], stem="diffusion_pytorch_model")
    with cask.mounted(work / "mnt") as root:
        shown = root / "diffusers/library"
        for name in _MODELS:
            for shard in sorted((work / name / "transformer").glob("*.safetensors")):
                path = shown / name / "latest/transformer" / shard.name
                if name == "packed":
                    shard = work / "dequantized" / shard.name
                    _write_dequantized(cask.store, path.relative_to(root), shard)
                expected[str(path)] = str(shard)
        churned = "transformer/diffusion_pytorch_model.safetensors"
        states = [str(work / f"state{number}" / churned) for number in range(2)]
        (work / "files.json").write_text(
            json.dumps({"files": expected, "churned": [str(shown / _CHURNING / "latest" / churned), states]})
        )
        # Loading the kernels, once in the life of a mount, takes a second where 64 readers compete for two cores.
        Path(next(path for path in expected if "/packed/" in path)).read_bytes()
        (server,) = serving(cask.store)
        until = time.monotonic() + seconds
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--read", str(work), str(number), str(until)], stdout=subprocess.PIPE
            )
            for number in range(readers)
        ]
        changes: Counter[str] = Counter()
        rss: list[float] = []
        while time.monotonic() < until:
            for what, arguments in _rounds(work):
                cask(*arguments)
                changes[what] += 1
                rss.append(_resident_mib(server))
                time.sleep(_PAUSE)
        errors, reads, size, worst = [], 0, 0, (0.0, "")
        for process in processes:
            out, _ = process.communicate(timeout=60)
            told = json.loads(out) if process.returncode == 0 else {"error": f"a reader ended: {process.returncode}"}
            reads, size = reads + told.get("reads", 0), size + told.get("bytes", 0)
            worst = max(worst, tuple(told.get("worst", worst)))
            errors += [told["error"]] if told.get("error") else []
    return Outcome(reads, size / 1e9, *worst, changes, errors, rss)


def _rounds(work: Path) -> list[tuple[str, list[str | Path]]]:
    """What happens to a model again and again."""
    first, second = (["import", work / f"state{number}", "--name", _CHURNING] for number in range(2))
    return [
        ("imported", first),
        ("replaced", second),
        ("gc", ["gc"]),
        ("replaced", first),
        ("removed", ["rm", _CHURNING]),
        ("gc", ["gc"]),
    ]


def _write_dequantized(store: Path, path: Path, target: Path) -> None:
    """What the file at `path` of the tree must hold, without the mount."""
    from modelcask.store import Store
    from modelcaskfs.views import Tree
    from trees import content, find

    opened = Store.open(store)
    node = find(Tree(opened), str(path))
    assert node is not None
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(content(opened, node))


def _resident_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


class _Reader:
    """One process that reads until its time is over."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.told: dict[str, Any] = {"reads": 0, "bytes": 0, "worst": (0.0, "")}

    def read_ranges(self, files: dict[str, str], until: float) -> None:
        """Ranges of all files, by pread, by mmap, and after the kernel was made to forget them."""
        expected = {path: Path(own).open("rb", buffering=0) for path, own in files.items()}  # noqa: SIM115
        paths = list(files)
        while time.monotonic() < until:
            path = self._random.choice(paths)
            own = expected[path].fileno()
            size = os.fstat(own).st_size
            offset, length = self._random.randrange(size + 1000), self._random.choice(_LENGTHS)
            started = time.monotonic()
            fd = os.open(path, os.O_RDONLY)
            if self._random.random() < 0.1:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            is_mapped = offset < size and self._random.random() < 0.3
            if is_mapped:
                data = b""
                with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
                    # Each part is a read of its own: it is one request to the mount, and a walk has many.
                    for begin in range(offset, min(offset + length, size), _PART):
                        data += mapped[begin : min(begin + _PART, offset + length)]
                        self._note(started, 0, f"a part of a mapping of {path}")
                        started = time.monotonic()
            else:
                data = os.pread(fd, length, offset)
            os.close(fd)
            self._note(started, len(data), f"{'mmap' if is_mapped else 'pread'} of {length} bytes of {path}")
            if data != os.pread(own, length, offset):
                self.told["error"] = f"{path}: wrong bytes at {offset}, {length} long"
                return

    def read_whole(self, path: str, states: list[str], until: float) -> None:
        """A file that comes and goes: either state of it, whole."""
        known = {Path(state).read_bytes() for state in states}
        while time.monotonic() < until:
            started = time.monotonic()
            try:
                fd = os.open(path, os.O_RDONLY)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                time.sleep(0.01)
                continue
            with os.fdopen(fd, "rb") as file:
                data = file.read()
            self._note(started, len(data), f"reading {path} whole")
            if data not in known:
                self.told["error"] = f"{path}: a mix of states"
                return

    def _note(self, started: float, size: int, what: str) -> None:
        self.told["reads"] += size > 0
        self.told["bytes"] += size
        self.told["worst"] = max(self.told["worst"], (time.monotonic() - started, what))


def _read(work: Path, number: int, until: float) -> None:
    plan = json.loads((work / "files.json").read_text())
    reader = _Reader(number)
    try:
        if number < _CHURN_READERS:
            reader.read_whole(*plan["churned"], until)
        else:
            reader.read_ranges(plan["files"], until)
    except OSError as error:
        reader.told["error"] = str(error)
    print(json.dumps(reader.told))  # noqa: T201 - the parent reads it


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        _read(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--readers", type=int, default=64)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; default a temporary folder")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        outcome = run(Path(name), seconds=options.seconds, readers=options.readers)
        print(outcome)  # noqa: T201 - a command
        for error in outcome.errors:
            print(error)  # noqa: T201
    sys.exit(bool(outcome.errors) or outcome.worst > 1)


if __name__ == "__main__":
    main()
