"""The FUSE adapter: requests in, nodes of the tree out, errors to errnos.

One loop answers what is in memory: reads whose bytes are in the page cache, names above the models, the opening of
models that are in use. Whatever may wait for a disk (any other read, models and files that are looked up, leases) goes
to threads, which answer it when they can, so a slow disk never holds up other readers. Measured on two cores
(DESIGN.md, "Serving"): reads that are cached are cheaper inline than handed over, for the GIL changes hands twice in a
hand-over.
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
from typing import Any

from modelcask.errors import ModelcaskError, ModelNotFound
from modelcaskfs import libfuse
from modelcaskfs.known_nodes import KnownNodes, number_of
from modelcaskfs.mount_options import Ownership
from modelcaskfs.nodes import Directory, Entry, FileNode, LinkNode, Node
from modelcaskfs.read_ahead import READ_AHEAD
from modelcaskfs.reader import SpanReader
from modelcaskfs.views import Tree

log = logging.getLogger("modelcaskfs")

# What changes must be seen within two seconds; what is lasting can be cached as long as the kernel likes.
_FLEETING_SECONDS = 1.0
_LASTING_SECONDS = 86400.0
# What may wait for a disk at once. Threads are started as they are needed; a reader that is stuck has its read-ahead
# waiting, 16 requests at most.
_WAITING = 64
# Requests of read-ahead at once. Of those beyond the kernel's 12 it forgets pages that it has taken memory for already.
_MAX_BACKGROUND = 128
_MAX_NAME = 255
# Answered by the loop always, and where they need not wait.
_INLINE = ("read", "readdir", "releasedir")
_HANDED_OVER = (
    *("lookup", "getattr", "readlink", "open", "release", "opendir", "statfs"),
    *("getxattr", "listxattr"),
)
# Of those, what a node that is at hand answers from memory.
_OF_THE_NODE = ("getattr", "readlink", "getxattr", "listxattr")


class Adapter:
    """Answers libfuse's low-level requests from a `Tree`."""

    def __init__(self, tree: Tree, reader: SpanReader, *, ownership: Ownership, on_ready: Callable[[], None]) -> None:
        self._tree = tree
        self._reader = reader
        self._on_ready = on_ready
        self._nodes = KnownNodes(tree.root)
        self._handles: dict[int, Any] = {}
        self._last_handle = 0
        self._lock = threading.Lock()
        self._waiting = ThreadPoolExecutor(_WAITING, "wait")
        self._buffers = threading.local()
        self._ownership = ownership

    def operations(self) -> libfuse.Operations:
        """The table of callbacks; it must live as long as the session."""
        answers: dict[str, Callable[..., None]] = {"init": self._init, "forget": self._forget}
        answers |= {name: _answering(getattr(self, f"_{name}")) for name in _INLINE}
        answers |= {name: self._handed_over(name, _answering(getattr(self, f"_{name}"))) for name in _HANDED_OVER}
        # The kernel asks for these only where somebody made the mount writable.
        answers |= dict.fromkeys(libfuse.REFUSED, _refuse)
        kinds = dict(libfuse.Operations._fields_)
        return libfuse.Operations(**{name: kinds[name](answer) for name, answer in answers.items()})

    def _handed_over(self, name: str, answer: Callable[..., None]) -> Callable[..., None]:
        """`answer`, on a thread that may wait where it may have to."""

        def submit(request: int, number: int, *arguments: Any) -> None:
            if self._may_wait(name, number, arguments):
                # The library's structures do not outlive the call.
                self._hand_over(answer, request, number, *map(_owned, arguments))
            else:
                answer(request, number, *arguments)

        return submit

    def _hand_over(self, answer: Callable[..., None], *arguments: Any) -> None:
        try:
            self._waiting.submit(answer, *arguments)
        except RuntimeError as error:  # it waits for the threads that there are, of which `_init` has begun one
            log.warning("%s", error)

    def _may_wait(self, name: str, number: int, arguments: tuple[Any, ...]) -> bool:
        if name == "release":
            opened: FileNode = self._handles[arguments[0].contents.fh][0]
            return opened.protection.users == 1
        node = self._nodes.at_hand(number)
        if name == "lookup":
            return bool(getattr(node, "may_wait", True))
        if name == "open":
            return not (isinstance(node, FileNode) and node.protection.in_use)
        return node is None or name not in _OF_THE_NODE

    def close(self) -> None:
        """End the threads that wait."""
        self._waiting.shutdown()

    def _init(self, _userdata: Any, connection: Any) -> None:
        connection.contents.max_readahead = READ_AHEAD
        connection.contents.max_background = _MAX_BACKGROUND
        connection.contents.congestion_threshold = _MAX_BACKGROUND * 3 // 4
        self._waiting.submit(int)  # begins a thread, while there is memory for one
        self._on_ready()

    def _lookup(self, request: int, parent: int, name: bytes) -> None:
        directory = self._nodes.directory(parent)
        if len(name) > _MAX_NAME:
            raise OSError(errno.ENAMETOOLONG, "name too long")  # the kernel itself lets 1024 bytes of FUSE's through
        try:
            node = directory.lookup(os.fsdecode(name))
        except ModelNotFound:
            node = None
        timeout = _LASTING_SECONDS if directory.lasting else _FLEETING_SECONDS
        answer = libfuse.EntryParam(entry_timeout=timeout)
        if node is not None:
            number = self._nodes.remember(node, parent, os.fsdecode(name))
            lifetime = _LASTING_SECONDS if node.lasting else _FLEETING_SECONDS
            answer.ino, answer.attr_timeout = number, lifetime
            self._fill(answer.attr, number, node)
        libfuse.reply_entry(request, ctypes.byref(answer))

    def _forget(self, request: int, number: int, count: int) -> None:
        self._nodes.forget(number, count)
        libfuse.reply_none(request)

    def _getattr(self, request: int, number: int, _info: Any) -> None:
        node = self._nodes.node(number)
        attributes = libfuse.Stat()
        self._fill(attributes, number, node)
        lifetime = _LASTING_SECONDS if node.lasting else _FLEETING_SECONDS
        libfuse.reply_attr(request, ctypes.byref(attributes), lifetime)

    def _readlink(self, request: int, number: int) -> None:
        node = self._nodes.node(number)
        if not isinstance(node, LinkNode):
            raise OSError(errno.EINVAL, "not a symlink")
        libfuse.reply_readlink(request, os.fsencode(node.target))

    def _open(self, request: int, number: int, info: Any) -> None:
        node = self._nodes.node(number)
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
        info.contents.fh = self._new_handle((node, self._nodes.open(number, node)))
        info.contents.keep_cache = 1
        if libfuse.reply_open(request, info) == -errno.ENOENT:
            self._close_file(info.contents.fh)  # the open was interrupted, no release will follow

    def _read(self, request: int, _number: int, size: int, offset: int, info: Any) -> None:
        node: FileNode = self._handles[info.contents.fh][0]
        buffer = self._buffer(size)
        count = self._reader.read_cached(node.content, offset, _view(buffer, size))
        if count is not None:
            libfuse.reply_buf(request, buffer, count)
        else:
            self._hand_over(_answering(self._read_waiting), request, node, size, offset)

    def _read_waiting(self, request: int, node: FileNode, size: int, offset: int) -> None:
        buffer = self._buffer(size)
        count = self._reader.read(node.content, offset, _view(buffer, size))
        libfuse.reply_buf(request, buffer, count)

    def _release(self, request: int, _number: int, info: Any) -> None:
        self._close_file(info.contents.fh)
        libfuse.reply_err(request, 0)

    def _opendir(self, request: int, number: int, info: Any) -> None:
        directory = self._nodes.directory(number)
        info.contents.fh = self._new_handle(_Listing(directory))
        if libfuse.reply_open(request, info) == -errno.ENOENT:
            del self._handles[info.contents.fh]

    def _readdir(self, request: int, _number: int, size: int, offset: int, info: Any) -> None:
        listing: _Listing = self._handles[info.contents.fh]
        if offset == 0 and listing.begun and not listing.directory.lasting:
            self._hand_over(_answering(self._readdir_anew), request, listing, size)
            return
        listing.begun = True
        self._reply_entries(request, listing.entries, size, offset)

    def _readdir_anew(self, request: int, listing: _Listing, size: int) -> None:
        listing.fill()
        self._reply_entries(request, listing.entries, size, 0)

    def _reply_entries(self, request: int, entries: list[Entry], size: int, offset: int) -> None:
        buffer = self._buffer(size)
        used = 0
        for position in range(offset, len(entries)):
            entry = entries[position]
            attributes = libfuse.Stat(st_ino=number_of(entry.key), st_mode=entry.kind)
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
        value = self._nodes.node(number).xattrs.get(os.fsdecode(name))
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute")
        _reply_sized(request, os.fsencode(value), size)

    def _listxattr(self, request: int, number: int, size: int) -> None:
        names = (os.fsencode(name) + b"\0" for name in self._nodes.node(number).xattrs)
        _reply_sized(request, b"".join(names), size)

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
        node, known = self._handles.pop(handle)
        self._nodes.close(known)
        if node.protection.release():
            self._reader.forget(node.protection.blobs())

    def _buffer(self, size: int) -> Any:
        """A buffer of this thread's, of at least `size` bytes, good until its next request."""
        buffer = getattr(self._buffers, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers.buffer = ctypes.create_string_buffer(max(size, 128 << 10))
        return buffer


class _Listing:
    """An open directory: what it held when it was opened, or last read from its beginning (rewinddir(3))."""

    __slots__ = ("begun", "directory", "entries")

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.begun = False
        self.fill()

    def fill(self) -> None:
        here = Entry(".", stat.S_IFDIR, self.directory.key)
        above = Entry("..", stat.S_IFDIR, "/")
        self.entries = [here, above, *self.directory.entries()]


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


def _owned(argument: Any) -> Any:
    """The argument of a callback, good after its return."""
    if not isinstance(argument, libfuse.FileInfoPointer):
        return argument
    return ctypes.pointer(libfuse.FileInfo.from_buffer_copy(argument.contents)) if argument else None


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
