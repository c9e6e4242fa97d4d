"""libfuse's low-level interface, that of version 2 or 3, whichever `fuse_binding` has loaded.

The bindings know the library's structures; their own classes, though, speak the high-level interface, where a
path is a node. A replaced model would then share its node, and so its page cache, with the mappings of the old
one, and readers of either would see a mix. The low-level interface lets us number the nodes ourselves: other
content is another node. It also lets a request be answered later and from another thread. Both versions have the
same requests and replies; they differ in how a session is made, and in two structures. Sources: libfuse 2.9 and
3.14, include/fuse_lowlevel.h and fuse_common.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
from modelcaskfs import fuse_binding

_binding = fuse_binding.load()
_lib = _binding.library
_c_stat: Any = _binding.structures.c_stat

# glibc's struct stat ends with reserved words that the bindings leave out, which matters where it is embedded.
_STAT_SIZE = {"x86_64": 144, "aarch64": 128}


class Stat(_c_stat):  # type: ignore[misc]
    _fields_ = (
        (
            "reserved",
            ctypes.c_char * max(0, _STAT_SIZE.get(platform.machine(), 0) - ctypes.sizeof(_c_stat)),
        ),
    )


Statvfs = _binding.structures.c_statvfs
FileInfo = _binding.structures.fuse_file_info


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


class _ConnectionInfo2(ctypes.Structure):
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


ConnectionInfo: Any = _ConnectionInfo2 if _binding.major == 2 else _binding.structures.fuse_conn_info

FileInfoPointer = _FileInfoP = POINTER(FileInfo)
_Request = c_void_p
_Unused = c_void_p


def _operation(*arguments: Any) -> Any:
    return CFUNCTYPE(None, *arguments)


# Whatever else an operation that writes is told, the request is all it needs to be refused.
_Refused = _operation(_Request)
# What writes.
REFUSED = (
    *("setattr", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "write", "setxattr"),
    *("removexattr", "create", "fallocate"),
)


class Operations(ctypes.Structure):
    """struct fuse_lowlevel_ops as far as both versions have it; one left null is answered ENOSYS by the library."""

    _fields_ = (
        ("init", _operation(c_void_p, POINTER(ConnectionInfo))),
        ("destroy", _operation(c_void_p)),
        ("lookup", _operation(_Request, c_ulong, c_char_p)),
        ("forget", _operation(_Request, c_ulong, c_ulong)),
        ("getattr", _operation(_Request, c_ulong, _FileInfoP)),
        ("setattr", _Refused),
        ("readlink", _operation(_Request, c_ulong)),
        ("mknod", _Refused),
        ("mkdir", _Refused),
        ("unlink", _Refused),
        ("rmdir", _Refused),
        ("symlink", _Refused),
        ("rename", _Refused),
        ("link", _Refused),
        ("open", _operation(_Request, c_ulong, _FileInfoP)),
        ("read", _operation(_Request, c_ulong, c_size_t, ctypes.c_int64, _FileInfoP)),
        ("write", _Refused),
        ("flush", _Unused),
        ("release", _operation(_Request, c_ulong, _FileInfoP)),
        ("fsync", _Unused),
        ("opendir", _operation(_Request, c_ulong, _FileInfoP)),
        ("readdir", _operation(_Request, c_ulong, c_size_t, ctypes.c_int64, _FileInfoP)),
        ("releasedir", _operation(_Request, c_ulong, _FileInfoP)),
        ("fsyncdir", _Unused),
        ("statfs", _operation(_Request, c_ulong)),
        ("setxattr", _Refused),
        ("getxattr", _operation(_Request, c_ulong, c_char_p, c_size_t)),
        ("listxattr", _operation(_Request, c_ulong, c_size_t)),
        ("removexattr", _Refused),
        ("access", _Unused),
        ("create", _Refused),
        ("getlk", _Unused),
        ("setlk", _Unused),
        ("bmap", _Unused),
        ("ioctl", _Unused),
        ("poll", _Unused),
        ("write_buf", _Unused),
        ("retrieve_reply", _Unused),
        ("forget_multi", _Unused),
        ("flock", _Unused),
        ("fallocate", _Refused),
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

reply_xattr = _function("fuse_reply_xattr", c_int, _Request, c_size_t)

_loop = _function("fuse_session_loop", c_int, c_void_p)
_destroy = _function("fuse_session_destroy", None, c_void_p)


class _Session2:
    """A mount and its session in libfuse 2: the channel between them is ours to keep."""

    def __init__(self, mountpoint: bytes, operations: Operations, args: Args) -> None:
        new = _function("fuse_lowlevel_new", c_void_p, POINTER(Args), POINTER(Operations), c_size_t, c_void_p)
        self._unmount = _function("fuse_unmount", None, c_char_p, c_void_p)
        self._mountpoint = mountpoint
        self._channel = _function("fuse_mount", c_void_p, c_char_p, POINTER(Args))(mountpoint, ctypes.byref(args))
        if not self._channel:
            raise OSError
        self.pointer = new(ctypes.byref(args), ctypes.byref(operations), ctypes.sizeof(operations), None)
        if not self.pointer:
            self._unmount(mountpoint, self._channel)
            raise OSError
        _function("fuse_session_add_chan", None, c_void_p, c_void_p)(self.pointer, self._channel)

    def unmount(self) -> None:
        _function("fuse_session_remove_chan", None, c_void_p)(self._channel)
        self._unmount(self._mountpoint, self._channel)


class _Session3:
    """A session in libfuse 3, which mounts and unmounts by itself."""

    def __init__(self, mountpoint: bytes, operations: Operations, args: Args) -> None:
        new = _function("fuse_session_new", c_void_p, POINTER(Args), POINTER(Operations), c_size_t, c_void_p)
        self._unmount = _function("fuse_session_unmount", None, c_void_p)
        self.pointer = new(ctypes.byref(args), ctypes.byref(operations), ctypes.sizeof(operations), None)
        if not self.pointer:
            raise OSError
        if _function("fuse_session_mount", c_int, c_void_p, c_char_p)(self.pointer, mountpoint) != 0:
            _destroy(self.pointer)
            raise OSError

    def unmount(self) -> None:
        self._unmount(self.pointer)


class Session:
    """A mounted filesystem and the loop that answers its requests."""

    def __init__(self, mountpoint: Path, operations: Operations, options: list[str]) -> None:
        """Mount at `mountpoint`; the kernel's requests wait until `loop` runs.

        Raises:
            MountFailed: the library refused; says what it said.
        """
        # The library keeps pointers into all of these.
        self._operations = operations
        self._arguments = [b"modelcaskfs", *(part for option in options for part in (b"-o", os.fsencode(option)))]
        self._args = Args(len(self._arguments), (c_char_p * (len(self._arguments) + 1))(*self._arguments, None), 0)
        make = _Session2 if _binding.major == 2 else _Session3
        with tempfile.TemporaryFile() as said, _stderr_into(said.fileno()):
            try:
                self._session = make(bytes(mountpoint), operations, self._args)
            except OSError:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                reason = lines[0].removeprefix("fuse: ") if lines else f"libfuse {_binding.major} did not say why"
                raise MountFailed(
                    mountpoint, f"could not be mounted ({reason})", "is /dev/fuse there, and may you use it?"
                ) from None

    def loop(self) -> bool:
        """Answer requests on this thread until the filesystem is unmounted. Whether that is how it ended."""
        ended: int = _loop(self._session.pointer)
        return ended == 0

    def close(self) -> None:
        """Unmount, if that has not happened, and free what the library holds."""
        self._session.unmount()
        _destroy(self._session.pointer)


@contextmanager
def _stderr_into(fd: int) -> Iterator[None]:
    """Lead what C code, and programs it starts, write to stderr elsewhere for the body."""
    kept = os.dup(2)
    os.dup2(fd, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
