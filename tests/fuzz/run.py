"""The large run of the fuzz targets under atheris, each in a process of its own.

python tests/fuzz/run.py [--executions N] [TARGET…]

A crash (anything but our own errors), an input that takes longer than 10 s, or more than 2 GiB of memory ends the run
with exit 1 and leaves the input in a file, which libFuzzer names. Prints the executions of each target.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
_MEMORY_MIB = 2048
_SECONDS_AN_INPUT = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=100_000, help="of each target [100000]")
    parser.add_argument("targets", nargs="*")
    given = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parents[1] / "daemon"), str(HERE.parents[1] / "fs")]
    import targets

    total, failed = 0, []
    for name in given.targets or targets.TARGETS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as corpus:
            for number, seed in enumerate(targets.seeds(name)):
                Path(corpus, str(number)).write_bytes(seed)
            done = subprocess.run(
                [
                    sys.executable,
                    str(HERE / "fuzz_one.py"),
                    name,
                    f"-runs={given.executions}",
                    f"-rss_limit_mb={_MEMORY_MIB}",
                    f"-timeout={_SECONDS_AN_INPUT}",
                    "-max_len=8192",
                    "-print_final_stats=1",
                    f"-dict={HERE / 'words.dict'}",
                    f"-artifact_prefix={tempfile.gettempdir()}/modelcask-{name}-",
                    corpus,
                ],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        count = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
        memory = re.search(r"peak_rss_mb:\s*(\d+)", done.stderr)
        executions = int(count[1]) if count else 0
        total += executions
        print(
            f"{name:24} {executions:>9,} executions  {time.monotonic() - started:6.0f} s  "
            f"{memory[1] if memory else '?':>5} MiB  {'ok' if done.returncode == 0 else 'FAILED'}",
            flush=True,
        )
        if done.returncode != 0:
            failed.append(name)
            print(done.stderr[-4000:])
    print(f"{'in all':24} {total:>9,} executions")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
