"""The source of an import: a folder on disk, looked at once and read only where it still is what it was.

A folder may hold what its owner did not mean to give away or what would never end: symlinks are followed
only within the folder (and, in a Hugging Face cache snapshot, into the cache's own blobs), anything that is
neither file nor folder is left out, and every file that is opened must be the one that was looked at.

Whoever can write to the folder may put a symlink in the place of a folder or file at any moment, and the import
may run with more rights than he has. So a look goes from folder to folder by descriptors that follow no symlink,
and a file is identified before it is opened for reading: merely opening a device can do something.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modelcask.durable import naming
from modelcask.errors import InvalidModelFolder, SourceChanged, printable

_MAX_DEPTH = 32
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NOT_FOLLOWED = (errno.ELOOP, errno.ENOTDIR)

_PARTIAL_SUFFIXES = (".incomplete", ".part", ".partial", ".crdownload", ".tmp", ".aria2")
# rsync's own, which it renames when they are complete: `.NAME.` and six characters that mkstemp chose. That they are
# all lower-case letters happens once in 200 files; a name like `.settings.backup` is not meant.
_RSYNC_TEMPORARY = re.compile(r"\..+\.(?![a-z]{6})[A-Za-z0-9]{6}")
_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".msgpack", ".h5", ".onnx")
_LEFT_OUT_FOLDERS = {
    ".git": "a repository's own files",
    ".cache": "a downloader's own files",
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A regular file of the folder, as it was when looked at.

    Attributes:
        path: in the folder.
        host: the real file, no symlink among its last part.
        identity: device, inode, size, mtime and ctime in nanoseconds.
    """

    path: PurePosixPath
    host: Path
    identity: tuple[int, int, int, int, int]

    @property
    def size(self) -> int:
        return self.identity[2]

    @property
    def changed_ns(self) -> int:
        """When it came here, or was changed, in nanoseconds since the epoch."""
        return self.identity[4]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something of the folder that is not imported, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """What a look at a folder found.

    Attributes:
        files: what can be imported, sorted by path.
        left_out: what cannot; a folder that is left out ends with `/`.
        beneath: as `look` was told.
    """

    root: Path
    files: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...]
    beneath: Path | None = None

    def by_path(self) -> dict[PurePosixPath, SourceFile]:
        return {file.path: file for file in self.files}


def look(root: Path, *, beneath: Path | None = None) -> SourceFolder:
    """Look at every file of the folder `root`; nothing but folders is opened.

    Args:
        beneath: a folder above `root` that others may write to. From there on down to `root`, symlinks are
            followed only if they belong to root or to who runs this.

    Raises:
        InvalidModelFolder: `root` is no folder, or a symlink in it leads out of it.
        SourceChanged: something was moved away or exchanged meanwhile.
        OSError: a folder cannot be read.
    """
    if not root.is_dir():
        reason = "is not a folder" if root.exists() else "does not exist"
        raise InvalidModelFolder(root, reason, "give the folder that holds model_index.json")
    files: list[SourceFile] = []
    left_out: list[LeftOut] = []
    with ExitStack() as stack:
        fd = open_root(root, beneath)
        stack.callback(os.close, fd)
        _look(fd, root, PurePosixPath(), _roots(fd, stack), files, left_out)
    files.sort(key=lambda file: file.path.parts)
    left_out.sort(key=lambda entry: entry.path)
    return SourceFolder(root, tuple(files), tuple(left_out), beneath)


def repository_name(root: Path) -> str | None:
    """`org/name` if `root` is the snapshot of a Hugging Face cache, whose own name is a commit's hash."""
    snapshots = root.absolute().parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        return snapshots.parent.name.removeprefix("models--").replace("--", "/", 1)
    return None


@contextmanager
def opened(file: SourceFile) -> Iterator[int]:
    """A descriptor for reading `file`, closed with the body.

    Raises:
        SourceChanged: the file is no longer the one that was looked at, before the body or after it.
    """
    try:
        place = os.open(file.host, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceChanged(file.host) from None
    try:
        _check_unchanged(file, place)
        with naming(file.host):
            fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(place)
    try:
        _check_unchanged(file, fd)
        yield fd
        _check_unchanged(file, fd)
    finally:
        os.close(fd)


def read(file: SourceFile, *, limit: int) -> bytes:
    """All bytes of a small file. Raises InvalidModelFolder if it is larger than `limit` bytes."""
    if file.size > limit:
        raise InvalidModelFolder(file.host, f"is larger than {limit} bytes", "is this the right file?")
    with opened(file) as fd:
        data = os.pread(fd, limit, 0)
    if len(data) != file.size:
        raise SourceChanged(file.host)
    return data


def check_unchanged(folder: SourceFolder) -> None:
    """Raise SourceChanged if a look at the folder now finds other files or others' content."""
    now = look(folder.root, beneath=folder.beneath)
    if now.files != folder.files:
        then, found = folder.by_path(), now.by_path()
        path = next(path for path in sorted(then.keys() | found.keys()) if then.get(path) != found.get(path))
        raise SourceChanged(folder.root / path)


def is_partial(name: str) -> bool:
    """Whether a file of this name is being downloaded or copied."""
    return name.lower().endswith(_PARTIAL_SUFFIXES) or _RSYNC_TEMPORARY.fullmatch(name) is not None


def identity_of(status: os.stat_result) -> tuple[int, int, int, int, int]:
    """What tells one state of a file from another without reading it."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _check_unchanged(file: SourceFile, fd: int) -> None:
    if identity_of(os.fstat(fd)) != file.identity:
        raise SourceChanged(file.host)


def open_root(root: Path, beneath: Path | None) -> int:
    """A descriptor of the folder `root`, reached as `look` does. The caller closes it."""
    if beneath is None:
        return os.open(root, _FOLDER)
    fd = os.open(beneath, _FOLDER)
    for part in root.relative_to(beneath).parts:
        try:
            below = _enter(fd, part, root)
        finally:
            os.close(fd)
        fd = below
    return fd


def _enter(fd: int, name: str, root: Path) -> int:
    """The folder `name` in `fd`, also through a symlink if that is ours."""
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
    except OSError as error:
        if error.errno not in _NOT_FOLLOWED:
            error.filename = str(root)
            raise
    place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    try:
        status = os.fstat(place)
        if not stat.S_ISLNK(status.st_mode):
            raise SourceChanged(root)
        if status.st_uid in (0, os.geteuid()):
            # What this very link says, whatever stands there by now.
            with naming(root):
                return os.open(os.readlink("", dir_fd=place), _FOLDER, dir_fd=fd)
    finally:
        os.close(place)
    raise InvalidModelFolder(
        root, "is reached through another user's symlink, which is not followed", "put the folder itself here"
    )


def _roots(fd: int, stack: ExitStack) -> dict[Path, int]:
    """The real folders that symlinks in the folder `fd` may lead into, with descriptors, which `stack` closes."""
    real = _real_path(fd)
    roots = {real: fd}
    # huggingface_hub's cache: models--org--name/{blobs,refs,snapshots/<commit>/…}
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        try:
            blobs = os.open("../../blobs", _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
        except OSError:
            return roots  # not there, not a folder, or not ours to read: links into it will lead out
        stack.callback(os.close, blobs)
        roots[_real_path(blobs)] = blobs
    return roots


def _real_path(fd: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{fd}"))


def _look(
    fd: int,
    folder: Path,
    path: PurePosixPath,
    roots: dict[Path, int],
    files: list[SourceFile],
    left_out: list[LeftOut],
) -> None:
    if len(path.parts) > _MAX_DEPTH:
        raise InvalidModelFolder(folder, f"lies more than {_MAX_DEPTH} folders deep", "is there a loop of symlinks?")
    for name in sorted(os.listdir(fd)):
        where, host = path / name, folder / name
        try:
            name.encode()
        except UnicodeEncodeError:
            left_out.append(LeftOut(printable(str(where)), "its name is not UTF-8"))
            continue
        place = _open_place(fd, name, host)
        try:
            status = os.fstat(place)
            if stat.S_ISLNK(status.st_mode):
                os.close(place)
                place = -1
                host, place = _follow(host, roots)
                status = os.fstat(place)
            if stat.S_ISDIR(status.st_mode):
                if reason := _LEFT_OUT_FOLDERS.get(name):
                    left_out.append(LeftOut(f"{where}/", reason))
                else:
                    with naming(host):
                        below = os.open(".", _FOLDER, dir_fd=place)
                    try:
                        _look(below, host, where, roots, files, left_out)
                    finally:
                        os.close(below)
            elif not stat.S_ISREG(status.st_mode):
                left_out.append(LeftOut(str(where), "neither a file nor a folder"))
            elif reason := _why_left_out(where):
                left_out.append(LeftOut(str(where), reason))
            else:
                files.append(SourceFile(where, host, identity_of(status)))
        finally:
            if place >= 0:
                os.close(place)


def _open_place(fd: int, name: str, host: Path) -> int:
    """A descriptor of what stands at `name` in the folder `fd`, a symlink itself included; opens nothing."""
    try:
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceChanged(host) from None
    except OSError as error:
        error.filename = str(host)
        raise


def _follow(link: Path, roots: dict[Path, int]) -> tuple[Path, int]:
    """Where a symlink leads, with a descriptor of what stands there."""
    try:
        target = link.resolve(strict=True)
    except FileNotFoundError:
        raise InvalidModelFolder(
            link, "is a symlink to something that is not there", "complete the download, or remove the link"
        ) from None
    except (OSError, RuntimeError):
        raise InvalidModelFolder(link, "is a symlink in a loop", "remove it") from None
    root = next((root for root in roots if target.is_relative_to(root)), None)
    if root is None:
        raise InvalidModelFolder(
            link,
            f"is a symlink that leads out of the folder, to {target}",
            "put a copy of the file in its place",
        )
    return target, _open_below(roots[root], target.relative_to(root).parts, target)


def _open_below(fd: int, parts: tuple[str, ...], host: Path) -> int:
    """A descriptor of what stands at `parts` below the folder `fd`; a resolved path has no symlink on its way."""
    place = os.dup(fd)
    for part in parts:
        try:
            below = _open_place(place, part, host)
        finally:
            os.close(place)
        place = below
        if stat.S_ISLNK(os.fstat(place).st_mode):
            os.close(place)
            raise SourceChanged(host)
    return place


def _why_left_out(path: PurePosixPath) -> str | None:
    name = path.name.lower()
    if is_partial(path.name):
        return "a partial download"
    if name.endswith(_OTHER_WEIGHTS):
        return f"weights in another format than safetensors ({path.suffix})"
    if len(path.parts) == 1 and name.endswith((".safetensors", ".safetensors.index.json")):
        return "a single-file checkpoint beside the components"
    return None
