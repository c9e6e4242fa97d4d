"""Filesystems of their own on loop devices, over plain images or over a recorded disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from crash import recorded_disk
from running import wait_for

# The smallest each makes, about.
SIZES = {"ext4": 64 << 20, "xfs": 300 << 20, "btrfs": 114 << 20}
_MAKE = {
    # The inode tables are filled now, and not in the background by the kernel: the log is the test's alone.
    "ext4": ("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", "-J", "size=4"),
    "xfs": ("mkfs.xfs", "-q", "-K"),
    "btrfs": ("mkfs.btrfs", "-q", "-K", "-m", "single"),
}
# The copies of a filesystem have its identity.
_OPTIONS = {"ext4": "noatime", "xfs": "noatime,nouuid", "btrfs": "noatime,nodiscard"}


def need(kind: str = "ext4") -> None:
    """Skip where filesystems cannot be made and mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount filesystems of its own")
    if not Path("/dev/loop-control").exists():
        pytest.skip("this machine has no loop devices")
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"mkfs.{kind} is missing: install e2fsprogs, xfsprogs, btrfs-progs")


def make(kind: str, image: Path, *, size: int = 0) -> None:
    """A new filesystem in the file `image`."""
    with image.open("wb") as file:
        file.truncate(size or SIZES[kind])
    run(*_MAKE[kind], image)


@contextmanager
def attached(backing: Path) -> Iterator[Path]:
    """A loop device over the file `backing`."""
    device = Path(run("losetup", "--find", "--show", backing).strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(kind: str, device: Path, folder: Path, *options: str) -> Iterator[Path]:
    """The filesystem on `device` mounted at `folder`, which is made."""
    folder.mkdir(exist_ok=True)
    run("mount", "-t", kind, "-o", ",".join([_OPTIONS[kind], *options]), device, folder)
    try:
        yield folder
    finally:
        run("umount", folder)
        if kind == "btrfs":  # else the kernel takes a copy that comes later for the same filesystem
            wait_for(lambda: _succeeds("btrfs", "device", "scan", "--forget", device))


@contextmanager
def image_mounted(kind: str, image: Path, folder: Path, *options: str) -> Iterator[Path]:
    with attached(image) as device, mounted(kind, device, folder, *options):
        yield folder


class RecordedFilesystem:
    """A filesystem on a recorded disk, mounted at `folder`."""

    def __init__(self, kind: str, work: Path) -> None:
        self.kind = kind
        self.image = work / "image"
        self.log = work / "log"
        self.folder = work / "recorded"
        self._disk = work / "disk"
        self._stack = ExitStack()

    def __enter__(self) -> RecordedFilesystem:
        self._disk.mkdir()
        program = [sys.executable, recorded_disk.__file__, self.image, self.log, self._disk]
        process = subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self._stack.callback(process.wait, 30)
        self._stack.callback(run, "fusermount", "-u", self._disk)
        wait_for((self._disk / "disk").exists)
        device = self._stack.enter_context(attached(self._disk / "disk"))
        self._stack.enter_context(mounted(self.kind, device, self.folder))
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def mark(self, text: str) -> None:
        """Note in the log what the world was told."""
        (self._disk / "mark").write_text(text)

    @contextmanager
    def broken(self, data: bytes = b"") -> Iterator[None]:
        """While the body runs, the disk fails every write that begins with `data`."""
        flag = self.image.with_name(self.image.name + ".broken")
        flag.write_bytes(data)
        try:
            yield
        finally:
            flag.unlink()


def _succeeds(*command: str | Path) -> bool:
    return subprocess.run([*map(str, command)], capture_output=True, check=False, timeout=60).returncode == 0


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout
