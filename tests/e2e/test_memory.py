"""An import's memory does not grow with the model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.made_models import write_model
from bench.report import peak_rss_mib
from running import CommandLine

pytestmark = pytest.mark.large

_LIMIT_MIB = 300


@pytest.mark.parametrize("gigabytes", [3, 12])
def test_an_import_stays_below_300_mib(cask: CommandLine, tmp_path: Path, gigabytes: int) -> None:
    folder = tmp_path / "m"
    write_model(folder, total_bytes=gigabytes * 10**9, sparse=True)
    command = [sys.executable, "-m", "modelcask", "import", str(folder), "--json"]
    peak = peak_rss_mib(command, cask.environment)
    print(f"peak RSS for {gigabytes} GB: {peak:.0f} MiB")  # noqa: T201 - the figure is the point
    assert 20 < peak < _LIMIT_MIB
    assert cask("df", "--json").json["stored_bytes"] > gigabytes * 9 * 10**8
