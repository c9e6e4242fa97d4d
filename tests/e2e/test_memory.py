"""An import's memory does not grow with the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.made_models import write_model
from running import CommandLine

pytestmark = pytest.mark.large

_LIMIT_MIB = 300


@pytest.mark.parametrize("gigabytes", [3, 12])
def test_an_import_stays_below_300_mib(cask: CommandLine, tmp_path: Path, gigabytes: int) -> None:
    folder = tmp_path / "m"
    write_model(folder, total_bytes=gigabytes * 10**9, sparse=True)
    command = [sys.executable, "-m", "modelcask", "import", str(folder), "--json"]
    process = subprocess.Popen(command, env=cask.environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    assert process.returncode == 0
    print(f"peak RSS for {gigabytes} GB: {usage.ru_maxrss / 1024:.0f} MiB")  # noqa: T201 - the figure is the point
    assert usage.ru_maxrss < _LIMIT_MIB * 1024
    assert cask("df", "--json").json["stored_bytes"] > gigabytes * 9 * 10**8
