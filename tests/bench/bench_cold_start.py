"""Cold start of `modelcask ls` against an empty Python, and what it imports.

python tests/bench/bench_cold_start.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from report import alternate, print_machine


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        print_machine("files in the page cache")
        ls = [sys.executable, "-m", "modelcask", "ls", "--store", name]
        medians = alternate(
            {
                "python -c pass": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
                "modelcask ls": lambda: subprocess.run(ls, check=True, capture_output=True),
            },
            rounds=11,
        )
        print(f"modelcask ls / python -c pass: {medians['modelcask ls'] / medians['python -c pass']:.1f}")
        imported = subprocess.run(
            [sys.executable, "-X", "importtime", *ls[1:]], check=True, capture_output=True, text=True
        )
        heavy = {"numpy", "numba", "rich", "watchdog", "fuse"}
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in imported.stderr.splitlines()}
        print(f"heavy packages imported: {sorted(heavy & loaded) or 'none'}")


if __name__ == "__main__":
    main()
