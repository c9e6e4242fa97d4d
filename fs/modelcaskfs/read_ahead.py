"""The kernel's read-ahead on a mount: how much of a file it asks for before the reader does.

A filesystem in userspace gets 128 KiB of it, however much it wants (Linux 6.18, fs/fuse/inode.c takes the smaller of
the two); only root can allow more, and only after mounting, in /sys/class/bdi. What that gives stands in DESIGN.md,
"Serving".
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from modelcask.mounts import device_of

READ_AHEAD = 1 << 20


def raise_read_ahead(mountpoint: Path) -> None:
    """Let the kernel read so far ahead in files below `mountpoint`; without the right to, it stays as it is.

    It asks the filesystem nothing, so the thread that serves it may call this.
    """
    device = device_of(mountpoint)
    setting = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    with contextlib.suppress(OSError):
        if device is not None and int(setting.read_text()) < READ_AHEAD >> 10:
            setting.write_text(str(READ_AHEAD >> 10))
