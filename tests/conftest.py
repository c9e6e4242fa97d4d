"""What tests share: a store, the command line as a process, a real mount."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelcask.store import Store
from running import CommandLine, Watching

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"

# Processes that tests start must find the packages also where nothing is installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "daemon"), str(ROOT / "fs")])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="run the tests marked torture at their full size")


@pytest.fixture(scope="session")
def torture(request: pytest.FixtureRequest) -> bool:
    """Whether tests marked `torture` run at their full size, minutes each, and not as a sample of it."""
    return bool(request.config.getoption("--torture"))


@pytest.fixture
def vector_model() -> Path:
    """A folder of awkward cases, with what upstream's importer made of it in `upstream.json`."""
    return DATA / "model"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.create(tmp_path / "store")
    yield made
    made.index.close()


@pytest.fixture
def cask(tmp_path: Path) -> CommandLine:
    home = tmp_path / "home"
    home.mkdir()
    return CommandLine(tmp_path / "store", home)


@pytest.fixture
def watching(cask: CommandLine) -> Iterator[Watching]:
    watching = Watching(cask, "watch")
    yield watching
    if watching.process.poll() is None:
        watching.end()


@pytest.fixture
def mount(cask: CommandLine, tmp_path: Path, fuse: None) -> Iterator[Callable[[], Path]]:
    """Call it to mount the store of `cask`; unmounted when the test ends."""
    del fuse
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()

    def mount_now() -> Path:
        cask("mount", mountpoint)
        return mountpoint

    yield mount_now
    if mountpoint.is_mount():
        cask("umount", mountpoint)


@pytest.fixture(scope="session")
def fuse() -> None:
    """Mounts must work; a machine that has no FUSE says so with MODELCASK_NO_FUSE=1."""
    if os.environ.get("MODELCASK_NO_FUSE") == "1":
        pytest.skip("MODELCASK_NO_FUSE=1: this machine has no FUSE")
    if not Path("/dev/fuse").exists():
        pytest.fail("/dev/fuse is missing: load the fuse module, or set MODELCASK_NO_FUSE=1 to skip the mount tests")
