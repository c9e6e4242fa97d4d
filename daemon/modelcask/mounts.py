"""What the kernel says about modelcask's mounts, and taking them down."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modelcask.errors import MountFailed

FILESYSTEM_TYPE = "fuse.modelcaskfs"


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted view of a store.

    Attributes:
        user: who mounted it.
    """

    mountpoint: Path
    store: Path
    user: int


def current_mounts() -> list[Mount]:
    """All mounts of modelcask that this process can see."""
    ours = (entry for entry in _mountinfo() if entry.kind == FILESYSTEM_TYPE)
    return [Mount(entry.mountpoint, Path(entry.source), entry.user) for entry in ours]


def device_of(mountpoint: Path) -> str | None:
    """The device of what is mounted at `mountpoint`, as `major:minor`; the filesystem is not asked for it."""
    device = None
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if _unescaped(fields[4]) == str(mountpoint):
            device = fields[2]  # the last one lies on top
    return device


def mounts_of(store: Path) -> list[Mount]:
    """The mounts that show `store`, by us or by root: others can give theirs any name, and show what they like."""
    return [mount for mount in current_mounts() if mount.store == store and mount.user in (0, os.geteuid())]


def filesystem_type(path: Path) -> str:
    """The type of the filesystem that `path` lies on, as the kernel names it: `ext4`, `nfs4`, `fuse.sshfs`."""
    real = Path(os.path.realpath(path))
    found = ""
    longest = -1
    for entry in _mountinfo():
        # Of two mounts at one place, the later covers the earlier.
        if real.is_relative_to(entry.mountpoint) and len(entry.mountpoint.parts) >= longest:
            found, longest = entry.kind, len(entry.mountpoint.parts)
    return found


def clear_dead_mount(mountpoint: Path) -> None:
    """Unmount what a filesystem process that died left at `mountpoint`; anything else is left alone."""
    try:
        os.scandir(mountpoint).close()  # a stat may still be answered from the kernel's cache
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            _run_unmount(mountpoint, lazy=True)


def unmount(mountpoint: Path) -> None:
    """Unmount a view.

    Raises:
        MountFailed: nothing of modelcask's is mounted there, or somebody uses it; says who.
    """
    mountpoint = Path(os.path.realpath(mountpoint))
    if mountpoint not in {mount.mountpoint for mount in current_mounts()}:
        raise MountFailed(mountpoint, "modelcask has nothing mounted here", "`modelcask status` lists the mounts")
    complaint = _run_unmount(mountpoint, lazy=False)
    if complaint:
        users = ", ".join(f"{name} ({pid})" for pid, name in users_of(mountpoint))
        if users:
            raise MountFailed(mountpoint, f"is in use by {users}", "end them, or leave their folder, and try again")
        raise MountFailed(mountpoint, f"could not be unmounted: {complaint}", "try again")


def unmount_lazily(mountpoint: Path) -> str:
    """Take a mount out of the tree of files; it ends when its last user does. What was complained of, if anything."""
    return _run_unmount(mountpoint, lazy=True)


def users_of(mountpoint: Path) -> Iterator[tuple[int, str]]:
    """Processes that have a file below `mountpoint` open or mapped, or work in it: id and name."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            links = [os.readlink(process / "cwd")]
            links += [os.readlink(fd) for fd in (process / "fd").iterdir()]
            links += re.findall(r" (/.*)$", (process / "maps").read_text(errors="surrogateescape"), re.MULTILINE)
            name = (process / "comm").read_text().strip()
        except OSError:
            continue  # gone meanwhile, or another user's
        if any(Path(link).is_relative_to(mountpoint) for link in links):
            yield int(process.name), name


def _run_unmount(mountpoint: Path, *, lazy: bool) -> str:
    """What the unmounting program complained of; empty if it did its work."""
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else [])]
    else:
        program = shutil.which("fusermount") or shutil.which("fusermount3") or "fusermount"
        command = [program, "-u", *(["-z"] if lazy else [])]
    done = subprocess.run([*command, str(mountpoint)], check=False, capture_output=True, text=True)
    return done.stderr.strip() or "failed" if done.returncode else ""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of /proc/self/mountinfo (proc(5))."""

    mountpoint: Path
    kind: str
    source: str
    user: int


def _mountinfo() -> Iterator[_Entry]:
    """All mounts, in the order in which they were made."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        kind, source, *options = after.split(" ")
        user = re.search(r"\buser_id=(\d+)", " ".join(options))
        yield _Entry(Path(_unescaped(before.split(" ")[4])), kind, _unescaped(source), int(user[1]) if user else 0)


def _unescaped(text: str) -> str:
    """The kernel writes space, tab, newline and backslash as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
