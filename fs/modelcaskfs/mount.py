"""Mounting: from a store and a mountpoint to a filesystem that answers, and its end."""

from __future__ import annotations

import errno
import gc
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from modelcask.errors import MountFailed, printable
from modelcask.mounts import clear_dead_mount, device_of, unmount_lazily
from modelcask.store import Store
from modelcaskfs import fuse_binding
from modelcaskfs.mount_options import MountOptions
from modelcaskfs.read_ahead import raise_read_ahead
from modelcaskfs.reader import SpanReader
from modelcaskfs.views import Tree

log = logging.getLogger("modelcaskfs")

# The loop waits at most so long for a thread that computes; Python's own 5 ms would be 40 cached reads.
_SECONDS_BETWEEN_SWITCHES = 0.0005
# Objects made before Python looks for cycles among the new ones, of which there are none here: at its own 700, that
# takes half of the time of opening a shard of 3,000 tensors.
_OBJECTS_BETWEEN_COLLECTIONS = 100_000
# Blobs kept open; half of what most systems let a process open without asking (1,048,576 hard, often 4096).
_MAX_OPEN_BLOBS = 1024


def serve(
    store: Store,
    mountpoint: Path,
    *,
    options: MountOptions,
    libfuse_major: int | None = None,
    on_ready: Callable[[], None],
    on_stopping: Callable[[], None] = lambda: None,
) -> None:
    """Mount `store` at `mountpoint` and answer its requests until it is unmounted or a signal ends it.

    SIGTERM and SIGINT unmount: at once where nobody uses it, else lazily, when the last user is gone. Another SIGINT
    ends the process whoever uses it; another SIGTERM does where unmounting failed. Else it does not: a supervisor that
    ends sends one more, and what is open is served to its end.

    Args:
        libfuse_major: 2 or 3 for that libfuse, None for the one that is there.
        on_ready: called once, when the kernel has begun to ask.
        on_stopping: called once, when it is unmounted, or about to be.

    Raises:
        MountFailed: the mountpoint or the library refused, or the kernel broke the connection off.
    """
    _check_mountpoint(mountpoint)
    fuse_binding.load(libfuse_major)
    from modelcaskfs import libfuse  # here, so that all else works without the library
    from modelcaskfs.ops import Adapter

    sys.setswitchinterval(_SECONDS_BETWEEN_SWITCHES)
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    tree = Tree(store, self_contained=options.self_contained)
    reader = SpanReader(store.blobs, max_open=_raise_open_files(), verify=options.verify)

    def begin() -> None:
        raise_read_ahead(mountpoint)
        on_ready()

    adapter = Adapter(tree, reader, ownership=options.ownership, on_ready=begin)
    # A comma or a backslash in the store's path would end the option.
    name = str(store.root).replace("\\", "\\\\").replace(",", "\\,")
    fixed = [f"fsname={name}", "subtype=modelcaskfs", "ro", "default_permissions"]
    wanted = {signal.SIGTERM, signal.SIGINT}
    # Blocked before any thread starts, so that all threads leave them to sigwait.
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    session = libfuse.Session(mountpoint, adapter.operations(), [*fixed, *options.for_the_mount])

    ended_well = True
    stopping = threading.Event()

    def loop() -> None:
        nonlocal ended_well
        ended_well = session.loop()
        if not stopping.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=loop, name="fuse")
    thread.start()
    signal.sigwait(wanted)
    stopping.set()
    on_stopping()
    if thread.is_alive():
        complaint = unmount_lazily(mountpoint)
        _let_end(signal.SIGINT)
        if device_of(mountpoint) is not None:  # asks the kernel, not the filesystem
            remedy = "`umount -l` it, or another SIGTERM ends its process"
            log.error("%s: could not be unmounted (%s); %s", mountpoint, printable(complaint), remedy)
            _let_end(signal.SIGTERM)
    thread.join()
    adapter.close()
    reader.close()
    session.close()
    if not ended_well:
        raise MountFailed(mountpoint, "the kernel's requests could not be read any more", "mount it again")


def _let_end(number: signal.Signals) -> None:
    """Have the signal end the process from now on."""
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


def _check_mountpoint(mountpoint: Path) -> None:
    clear_dead_mount(mountpoint)
    try:
        entries = os.listdir(mountpoint)  # noqa: PTH208 - iterdir would name no errno of its own
    except FileNotFoundError:
        raise MountFailed(mountpoint, "does not exist", "make the folder first") from None
    except NotADirectoryError:
        raise MountFailed(mountpoint, "is not a folder", "give an empty folder") from None
    except OSError as error:
        if error.errno == errno.EACCES:
            raise MountFailed(mountpoint, "may not be read by you", "give a folder of your own") from None
        raise
    if mountpoint.is_mount():
        raise MountFailed(mountpoint, "has something mounted on it", "unmount that first, or give another folder")
    if entries:
        raise MountFailed(mountpoint, f"is not empty (it holds {entries[0]!r})", "give an empty folder")


def _raise_open_files() -> int:
    """Let this process open as many files as it may; how many of them blobs may take."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(_MAX_OPEN_BLOBS, hard // 2)
