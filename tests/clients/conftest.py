"""The client processes, the command line, and one mounted store for each tiny pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .client import Client
from .pipelines import PIPELINES, TinyPipeline

_ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 60

Modelcask = Callable[..., str]


@dataclass(frozen=True, slots=True)
class Shown:
    """A tiny pipeline, dropped, imported and mounted.

    Attributes:
        pipeline: how it was made.
        folder: what was dropped.
        entries: what the import reported, by tag.
        models: the mounted directory whose sub-directories are the tags.
    """

    pipeline: TinyPipeline
    folder: Path
    entries: dict[str, dict[str, Any]]
    models: Path


@pytest.fixture(scope="session")
def modelcask(tmp_path_factory: pytest.TempPathFactory) -> Modelcask:
    """Runs the command line as a subprocess, with a deadline; returns what it wrote to stdout."""
    home = tmp_path_factory.mktemp("home")
    path = os.pathsep.join([str(_ROOT / "daemon"), str(_ROOT / "fs"), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": path.rstrip(os.pathsep),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_STATE_HOME": str(home / "state"),
    }

    def run(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "modelcask", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False)
        assert done.returncode == 0, f"{command} exited with {done.returncode}: {done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client with diffusers' defaults."""
    client = Client(tmp_path_factory.mktemp("client"), HF_ENABLE_PARALLEL_LOADING="")
    yield client
    client.close()


@pytest.fixture(scope="session")
def parallel_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client that reads the shards of a component from several threads."""
    client = Client(tmp_path_factory.mktemp("parallel_client"), HF_ENABLE_PARALLEL_LOADING="YES")
    assert client.loads_in_parallel
    yield client
    client.close()


@pytest.fixture(scope="session")
def dropped(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyPipeline], Path]:
    """Gives the folder of a tiny pipeline, built when first asked for. Nobody may write to it."""
    drops = tmp_path_factory.mktemp("drops")

    def folder_of(pipeline: TinyPipeline) -> Path:
        folder = drops / pipeline.name
        if not folder.exists():
            client.build(pipeline.name, folder)
        return folder

    return folder_of


@pytest.fixture(scope="module", params=PIPELINES.values(), ids=list(PIPELINES))
def shown(
    request: pytest.FixtureRequest,
    dropped: Callable[[TinyPipeline], Path],
    modelcask: Modelcask,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Shown]:
    """Each tiny pipeline in turn, alone in a store of its own, mounted."""
    pipeline: TinyPipeline = request.param
    folder = dropped(pipeline)
    work = tmp_path_factory.mktemp(pipeline.name)
    store, mountpoint = work / "store", work / "mount"
    mountpoint.mkdir()
    report = modelcask("import", folder, "--name", f"org/{pipeline.name}", "--store", store, "--json")
    entries = {entry["name"].rpartition(":")[2]: entry for entry in json.loads(report)}
    modelcask("mount", mountpoint, "--store", store)
    try:
        yield Shown(pipeline, folder, entries, mountpoint / "diffusers" / "org" / pipeline.name)
    finally:
        modelcask("umount", mountpoint)
        assert not os.path.ismount(mountpoint)
