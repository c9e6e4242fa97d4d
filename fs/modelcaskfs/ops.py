"""The FUSE adapter: requests in, nodes of the tree out, errors to errnos.

One loop answers everything that needs no waiting. A read whose bytes are not in the page cache goes to a
few threads, which answer it when the disk has them, so a slow disk never holds up other readers. Measured
on two cores (DESIGN.md, "Serving"): reads that are cached are cheaper inline than handed over, for the GIL
changes hands twice in a hand-over.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import xxhash

from modelcask.errors import ModelcaskError, ModelNotFound
from modelcaskfs import libfuse
from modelcaskfs.mount_options import Ownership
from modelcaskfs.nodes import Directory, Entry, FileNode, LinkNode, Node
from modelcaskfs.reader import SpanReader
from modelcaskfs.views import Tree

log = logging.getLogger("modelcaskfs")

# What changes must be seen within two seconds; what is lasting can be cached as long as the kernel likes.
_FLEETING_SECONDS = 1.0
_LASTING_SECONDS = 86400.0
_WAITING_READERS = 8
_MAX_READ = 1 << 20
_MAX_NAME = 255


@dataclass
class _Known:
    """A node the kernel knows, and how often it was told of it."""

    node: Node
    lookups: int


class Adapter:
    """Answers libfuse's low-level requests from a `Tree`."""

    def __init__(self, tree: Tree, reader: SpanReader, *, ownership: Ownership, on_ready: Callable[[], None]) -> None:
        self._tree = tree
        self._reader = reader
        self._on_ready = on_ready
        self._known: dict[int, _Known] = {libfuse.ROOT_NODE: _Known(tree.root, 1)}
        self._handles: dict[int, Any] = {}
        self._last_handle = 0
        self._lock = threading.Lock()
        self._waiting = ThreadPoolExecutor(_WAITING_READERS, "read")
        self._buffers = threading.local()
        self._ownership = ownership

    def operations(self) -> libfuse.Operations:
        """The table of callbacks; it must live as long as the session."""
        table = libfuse.Operations()
        for name in (
            "lookup",
            "getattr",
            "readlink",
            "open",
            "read",
            "release",
            "opendir",
            "readdir",
            "releasedir",
            "statfs",
            "getxattr",
            "listxattr",
        ):
            kind = dict(libfuse.Operations._fields_)[name]
            setattr(table, name, kind(_answering(getattr(self, f"_{name}"))))
        for name in libfuse.REFUSED:  # the kernel asks only where somebody made the mount writable
            setattr(table, name, dict(libfuse.Operations._fields_)[name](_refuse))
        table.init = dict(libfuse.Operations._fields_)["init"](self._init)
        table.forget = dict(libfuse.Operations._fields_)["forget"](self._forget)
        return table

    def close(self) -> None:
        """End the readers that wait."""
        self._waiting.shutdown()

    def _init(self, _userdata: Any, connection: Any) -> None:
        connection.contents.max_readahead = _MAX_READ
        self._on_ready()

    def _lookup(self, request: int, parent: int, name: bytes) -> None:
        directory = self._directory(parent)
        if len(name) > _MAX_NAME:
            raise OSError(errno.ENAMETOOLONG, "name too long")  # the kernel itself lets 1024 bytes of FUSE's through
        try:
            node = directory.lookup(os.fsdecode(name))
        except ModelNotFound:
            node = None
        timeout = _LASTING_SECONDS if directory.lasting else _FLEETING_SECONDS
        answer = libfuse.EntryParam(entry_timeout=timeout)
        if node is not None:
            number = self._remember(node)
            lifetime = _LASTING_SECONDS if node.lasting else _FLEETING_SECONDS
            answer.ino, answer.attr_timeout = number, lifetime
            self._fill(answer.attr, number, node)
        libfuse.reply_entry(request, ctypes.byref(answer))

    def _forget(self, request: int, number: int, count: int) -> None:
        known = self._known.get(number)
        if known is not None and number != libfuse.ROOT_NODE:
            known.lookups -= count
            if known.lookups <= 0:
                del self._known[number]
        libfuse.reply_none(request)

    def _getattr(self, request: int, number: int, _info: Any) -> None:
        node = self._node(number)
        attributes = libfuse.Stat()
        self._fill(attributes, number, node)
        lifetime = _LASTING_SECONDS if node.lasting else _FLEETING_SECONDS
        libfuse.reply_attr(request, ctypes.byref(attributes), lifetime)

    def _readlink(self, request: int, number: int) -> None:
        node = self._node(number)
        if not isinstance(node, LinkNode):
            raise OSError(errno.EINVAL, "not a symlink")
        libfuse.reply_readlink(request, os.fsencode(node.target))

    def _open(self, request: int, number: int, info: Any) -> None:
        node = self._node(number)
        if not isinstance(node, FileNode):
            raise OSError(errno.EISDIR, "not a file")
        if info.contents.flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY:
            raise OSError(errno.EROFS, "read-only filesystem")
        if not node.protection.in_use:
            # What is open of its blobs for other models may have been quarantined and stored anew since.
            self._reader.forget(node.protection.blobs())
        if not node.protection.acquire():
            # The name now means another model; ESTALE makes the kernel look it up again.
            raise OSError(errno.ESTALE, "the model was replaced")
        info.contents.fh = self._new_handle(node)
        info.contents.keep_cache = 1
        if libfuse.reply_open(request, info) == -errno.ENOENT:
            self._close_file(info.contents.fh)  # the open was interrupted, no release will follow

    def _read(self, request: int, _number: int, size: int, offset: int, info: Any) -> None:
        node: FileNode = self._handles[info.contents.fh]
        buffer = self._buffer(size)
        count = self._reader.read_cached(node.content, offset, _view(buffer, size))
        if count is not None:
            libfuse.reply_buf(request, buffer, count)
        else:
            self._waiting.submit(_answering(self._read_waiting), request, node, size, offset)

    def _read_waiting(self, request: int, node: FileNode, size: int, offset: int) -> None:
        buffer = self._buffer(size)
        count = self._reader.read(node.content, offset, _view(buffer, size))
        libfuse.reply_buf(request, buffer, count)

    def _release(self, request: int, _number: int, info: Any) -> None:
        self._close_file(info.contents.fh)
        libfuse.reply_err(request, 0)

    def _opendir(self, request: int, number: int, info: Any) -> None:
        directory = self._directory(number)
        here = Entry(".", stat.S_IFDIR, directory.key)
        above = Entry("..", stat.S_IFDIR, "/")
        info.contents.fh = self._new_handle([here, above, *directory.entries()])
        if libfuse.reply_open(request, info) == -errno.ENOENT:
            del self._handles[info.contents.fh]

    def _readdir(self, request: int, _number: int, size: int, offset: int, info: Any) -> None:
        entries: list[Entry] = self._handles[info.contents.fh]
        buffer = self._buffer(size)
        used = 0
        for position in range(offset, len(entries)):
            entry = entries[position]
            attributes = libfuse.Stat(st_ino=_inode(entry.key), st_mode=entry.kind)
            place = ctypes.byref(buffer, used)
            name = os.fsencode(entry.name)
            length = libfuse.add_direntry(request, place, size - used, name, ctypes.byref(attributes), position + 1)
            if length > size - used:
                break
            used += length
        libfuse.reply_buf(request, buffer, used)

    def _releasedir(self, request: int, _number: int, info: Any) -> None:
        del self._handles[info.contents.fh]
        libfuse.reply_err(request, 0)

    def _statfs(self, request: int, _number: int) -> None:
        store = os.statvfs(self._tree.store.root)
        fields = (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
        )
        answer = libfuse.Statvfs(**{name: getattr(store, name) for name in fields})
        answer.f_namemax = _MAX_NAME
        libfuse.reply_statfs(request, ctypes.byref(answer))

    def _getxattr(self, request: int, number: int, name: bytes, size: int) -> None:
        value = self._node(number).xattrs.get(os.fsdecode(name))
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute")
        _reply_sized(request, os.fsencode(value), size)

    def _listxattr(self, request: int, number: int, size: int) -> None:
        names = (os.fsencode(name) + b"\0" for name in self._node(number).xattrs)
        _reply_sized(request, b"".join(names), size)

    def _node(self, number: int) -> Node:
        known = self._known.get(number)
        if known is None:
            raise OSError(errno.ESTALE, "forgotten node")
        return known.node

    def _directory(self, number: int) -> Directory:
        node = self._node(number)
        if not hasattr(node, "entries"):
            raise OSError(errno.ENOTDIR, "not a directory")
        return node  # type: ignore[return-value]

    def _remember(self, node: Node) -> int:
        """The node's number, counting one more lookup. Nodes of equal keys have equal numbers."""
        number = _inode(node.key)
        known = self._known.setdefault(number, _Known(node, 0))
        if known.node.key != node.key:
            raise OSError(errno.EIO, f"{node.key} and {known.node.key} have one inode number")
        known.lookups += 1
        return number

    def _fill(self, attributes: Any, number: int, node: Node) -> None:
        attributes.st_ino = number
        attributes.st_uid, attributes.st_gid = self._ownership.uid, self._ownership.gid
        for field in (attributes.st_atimespec, attributes.st_mtimespec, attributes.st_ctimespec):
            field.tv_sec, field.tv_nsec = divmod(node.mtime_ns, 1_000_000_000)
        attributes.st_blksize = 4096
        attributes.st_nlink = 1
        if isinstance(node, FileNode):
            attributes.st_mode = stat.S_IFREG | (0o444 & ~self._ownership.umask)
            attributes.st_size = node.content.size
            attributes.st_blocks = -(-node.content.size // 512)
        elif isinstance(node, LinkNode):
            attributes.st_mode = stat.S_IFLNK | 0o777
            attributes.st_size = len(os.fsencode(node.target))
        else:
            attributes.st_mode = stat.S_IFDIR | (0o555 & ~self._ownership.umask)
            attributes.st_nlink = 2

    def _new_handle(self, target: Any) -> int:
        with self._lock:
            self._last_handle += 1
            self._handles[self._last_handle] = target
            return self._last_handle

    def _close_file(self, handle: int) -> None:
        node: FileNode = self._handles.pop(handle)
        if node.protection.release():
            self._reader.forget(node.protection.blobs())

    def _buffer(self, size: int) -> Any:
        """A buffer of this thread's, of at least `size` bytes, good until its next request."""
        buffer = getattr(self._buffers, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers.buffer = ctypes.create_string_buffer(max(size, 128 << 10))
        return buffer


def _reply_sized(request: int, data: bytes, size: int) -> None:
    """Answer a question for extended attributes: with `size` 0 it is for their length alone (getxattr(2))."""
    if size == 0:
        libfuse.reply_xattr(request, len(data))
    elif len(data) > size:
        raise OSError(errno.ERANGE, "the buffer is too small")
    else:
        libfuse.reply_buf(request, data, len(data))


def _refuse(request: int) -> None:
    libfuse.reply_err(request, errno.EROFS)


def _view(buffer: Any, size: int) -> memoryview:
    return memoryview(buffer).cast("B")[:size]


def _inode(key: str) -> int:
    """The number of a node, the same in every mount; 0 and 1 mean other things to FUSE."""
    if key == "/":
        return libfuse.ROOT_NODE
    return (xxhash.xxh3_64_intdigest(os.fsencode(key)) >> 1) | 2


def _answering(method: Callable[..., None]) -> Callable[..., None]:
    """`method(request, …)`, with what it raises turned into the answer."""

    def answer(request: int, *arguments: Any) -> None:
        try:
            method(request, *arguments)
        except OSError as error:
            libfuse.reply_err(request, error.errno or errno.EIO)
        except ModelcaskError as error:
            log.error("%s", error)
            libfuse.reply_err(request, errno.EIO)
        except BaseException:  # an exception must not reach C, and the request must be answered
            log.exception("unexpected error, answered EIO")
            libfuse.reply_err(request, errno.EIO)

    return answer
