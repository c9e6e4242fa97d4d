"""What every benchmark prints beside its figures: the machine, the command, the cache state."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def print_machine(cache_state: str) -> None:
    """Say where and how the figures below were measured."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    print(f"machine: {model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}")
    print(f"command: python {' '.join(sys.argv)}")
    print(f"cache:   {cache_state}")


_MEASURE = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def peak_rss_mib(command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    """The peak memory of a command, which must succeed.

    A small process stands between: one that is forked from a large one is born with its parent's peak.
    """
    measure = [sys.executable, "-c", _MEASURE, *command]
    return int(subprocess.run(measure, check=True, capture_output=True, env=environment).stdout) / 1024


def touch_memory(gigabytes: int) -> None:
    """Write to so much memory and free it again.

    A virtual machine may give free memory back to its host, and pay for each page when it is used again, up to
    four times what copying takes. Whoever runs first after much was freed would not pay, and win.
    """
    code = f"x = bytearray({gigabytes} << 30)\nfor i in range(0, len(x), 4096): x[i] = 1"
    subprocess.run([sys.executable, "-c", code], check=True)


def alternate(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """The median wall time in seconds of each side, the sides taking turns so that noise hits all alike.

    Args:
        before: brings about the same state before each side, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            before()
            started = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - started)
    for name, taken in times.items():
        print(f"  {name:32} {statistics.median(taken):7.2f} s   ({', '.join(f'{t:.2f}' for t in taken)})")
    return {name: statistics.median(taken) for name, taken in times.items()}
