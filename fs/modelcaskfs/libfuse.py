"""libfuse's low-level interface: the one module that imports fuse.

fusepy finds and loads the library and knows its structures; its own class, though, speaks the high-level
interface, where a path is a node. A replaced model would then share its node, and so its page cache, with
the mappings of the old one, and readers of either would see a mix. The low-level interface lets us number
the nodes ourselves: other content is another node. It also lets a request be answered later and from
another thread. Source: libfuse 2.9, include/fuse_lowlevel.h and fuse_common.h.
"""

from __future__ import annotations

import ctypes
import platform
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_char_p,
    c_double,
    c_int,
    c_size_t,
    c_uint,
    c_ulong,
    c_void_p,
)
from pathlib import Path
from typing import Any

from modelcask.errors import MountFailed

try:
    import fuse
except OSError as error:  # fusepy raises EnvironmentError where it finds no library
    raise MountFailed(
        Path("libfuse.so.2"),
        f"cannot be loaded ({error})",
        "install it: apt install fuse libfuse2 (Debian), fuse-libs (Fedora)",
    ) from None

_lib = fuse._libfuse

# glibc's struct stat ends with reserved words that fusepy leaves out, which matters where it is embedded.
_STAT_SIZE = {"x86_64": 144, "aarch64": 128}


class Stat(fuse.c_stat):  # type: ignore[misc]
    _fields_ = (
        (
            "reserved",
            ctypes.c_char * max(0, _STAT_SIZE.get(platform.machine(), 0) - ctypes.sizeof(fuse.c_stat)),
        ),
    )


Statvfs = fuse.c_statvfs
FileInfo = fuse.fuse_file_info

ROOT_NODE = 1


class Args(ctypes.Structure):
    _fields_ = (("argc", c_int), ("argv", POINTER(c_char_p)), ("allocated", c_int))


class EntryParam(ctypes.Structure):
    """The answer to a lookup; `ino` 0 says for `entry_timeout` seconds that there is nothing."""

    _fields_ = (
        ("ino", c_ulong),
        ("generation", c_ulong),
        ("attr", Stat),
        ("attr_timeout", c_double),
        ("entry_timeout", c_double),
    )


class ConnectionInfo(ctypes.Structure):
    _fields_ = (
        ("proto_major", c_uint),
        ("proto_minor", c_uint),
        ("async_read", c_uint),
        ("max_write", c_uint),
        ("max_readahead", c_uint),
        ("capable", c_uint),
        ("want", c_uint),
        ("max_background", c_uint),
        ("congestion_threshold", c_uint),
        ("reserved", c_uint * 23),
    )


FileInfoPointer = _FileInfoP = POINTER(FileInfo)
_Request = c_void_p
_Unused = c_void_p


def _operation(*arguments: Any) -> Any:
    return CFUNCTYPE(None, *arguments)


class Operations(ctypes.Structure):
    """struct fuse_lowlevel_ops; an operation left null is answered ENOSYS by the library."""

    _fields_ = (
        ("init", _operation(c_void_p, POINTER(ConnectionInfo))),
        ("destroy", _operation(c_void_p)),
        ("lookup", _operation(_Request, c_ulong, c_char_p)),
        ("forget", _operation(_Request, c_ulong, c_ulong)),
        ("getattr", _operation(_Request, c_ulong, _FileInfoP)),
        ("setattr", _Unused),
        ("readlink", _operation(_Request, c_ulong)),
        ("mknod", _Unused),
        ("mkdir", _Unused),
        ("unlink", _Unused),
        ("rmdir", _Unused),
        ("symlink", _Unused),
        ("rename", _Unused),
        ("link", _Unused),
        ("open", _operation(_Request, c_ulong, _FileInfoP)),
        ("read", _operation(_Request, c_ulong, c_size_t, ctypes.c_int64, _FileInfoP)),
        ("write", _Unused),
        ("flush", _Unused),
        ("release", _operation(_Request, c_ulong, _FileInfoP)),
        ("fsync", _Unused),
        ("opendir", _operation(_Request, c_ulong, _FileInfoP)),
        ("readdir", _operation(_Request, c_ulong, c_size_t, ctypes.c_int64, _FileInfoP)),
        ("releasedir", _operation(_Request, c_ulong, _FileInfoP)),
        ("fsyncdir", _Unused),
        ("statfs", _operation(_Request, c_ulong)),
        ("setxattr", _Unused),
        ("getxattr", _Unused),
        ("listxattr", _Unused),
        ("removexattr", _Unused),
        ("access", _Unused),
        ("create", _Unused),
        ("getlk", _Unused),
        ("setlk", _Unused),
        ("bmap", _Unused),
        ("ioctl", _Unused),
        ("poll", _Unused),
        ("write_buf", _Unused),
        ("retrieve_reply", _Unused),
        ("forget_multi", _Unused),
        ("flock", _Unused),
        ("fallocate", _Unused),
    )


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_lib, name)
    function.restype, function.argtypes = result, arguments
    return function


reply_err = _function("fuse_reply_err", c_int, _Request, c_int)
reply_none = _function("fuse_reply_none", None, _Request)
reply_entry = _function("fuse_reply_entry", c_int, _Request, POINTER(EntryParam))
reply_attr = _function("fuse_reply_attr", c_int, _Request, POINTER(Stat), c_double)
reply_readlink = _function("fuse_reply_readlink", c_int, _Request, c_char_p)
reply_open = _function("fuse_reply_open", c_int, _Request, _FileInfoP)
reply_buf = _function("fuse_reply_buf", c_int, _Request, c_void_p, c_size_t)
reply_statfs = _function("fuse_reply_statfs", c_int, _Request, POINTER(Statvfs))

# Bytes the entry takes; it is written only if they fit.
add_direntry = _function(
    "fuse_add_direntry", c_size_t, _Request, c_void_p, c_size_t, c_char_p, POINTER(Stat), ctypes.c_int64
)

_mount = _function("fuse_mount", c_void_p, c_char_p, POINTER(Args))
_unmount = _function("fuse_unmount", None, c_char_p, c_void_p)
_lowlevel_new = _function("fuse_lowlevel_new", c_void_p, POINTER(Args), POINTER(Operations), c_size_t, c_void_p)
_add_channel = _function("fuse_session_add_chan", None, c_void_p, c_void_p)
_remove_channel = _function("fuse_session_remove_chan", None, c_void_p)
_loop = _function("fuse_session_loop", c_int, c_void_p)
_destroy = _function("fuse_session_destroy", None, c_void_p)


class Session:
    """A mounted filesystem and the loop that answers its requests."""

    def __init__(self, mountpoint: Path, operations: Operations, options: list[str]) -> None:
        """Mount at `mountpoint`; the kernel's requests wait until `loop` runs.

        Raises:
            MountFailed: the library refused; it has said why on stderr.
        """
        self._operations = operations  # the library keeps a pointer into it
        self._mountpoint = bytes(mountpoint)
        arguments = [b"modelcaskfs", *(part for option in options for part in (b"-o", option.encode()))]
        args = Args(len(arguments), (c_char_p * (len(arguments) + 1))(*arguments, None), 0)
        self._channel = _mount(self._mountpoint, ctypes.byref(args))
        if not self._channel:
            raise MountFailed(mountpoint, "could not be mounted (see above)", "is /dev/fuse there, and may you use it?")
        self._session = _lowlevel_new(ctypes.byref(args), ctypes.byref(operations), ctypes.sizeof(operations), None)
        if not self._session:
            _unmount(self._mountpoint, self._channel)
            raise MountFailed(mountpoint, "libfuse did not take the mount options (see above)", "check -o")
        _add_channel(self._session, self._channel)

    def loop(self) -> None:
        """Answer requests on this thread until the filesystem is unmounted."""
        _loop(self._session)

    def close(self) -> None:
        """Unmount, if that has not happened, and free what the library holds."""
        _remove_channel(self._channel)
        _unmount(self._mountpoint, self._channel)
        _destroy(self._session)
