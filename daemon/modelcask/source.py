"""The source of an import: a folder on disk, looked at once and read only where it still is what it was.

A folder may hold what its owner did not mean to give away or what would never end: symlinks are followed
only within the folder (and, in a Hugging Face cache snapshot, into the cache's own blobs), anything that is
neither file nor folder is left out, and every file that is opened must be the one that was looked at.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modelcask.errors import InvalidModelFolder, SourceChanged, printable

_MAX_DEPTH = 32

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
    """

    root: Path
    files: tuple[SourceFile, ...]
    left_out: tuple[LeftOut, ...]

    def by_path(self) -> dict[PurePosixPath, SourceFile]:
        return {file.path: file for file in self.files}


def look(root: Path) -> SourceFolder:
    """Look at every file of the folder `root`; nothing is opened.

    Raises:
        InvalidModelFolder: `root` is no folder, or a symlink in it leads out of it.
        OSError: a folder cannot be read.
    """
    if not root.is_dir():
        reason = "is not a folder" if root.exists() else "does not exist"
        raise InvalidModelFolder(root, reason, "give the folder that holds model_index.json")
    files: list[SourceFile] = []
    left_out: list[LeftOut] = []
    _look(root, PurePosixPath(), _roots(root), files, left_out)
    files.sort(key=lambda file: file.path.parts)
    left_out.sort(key=lambda entry: entry.path)
    return SourceFolder(root, tuple(files), tuple(left_out))


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
        # O_NONBLOCK: should a FIFO stand there now, open must not wait for its writer.
        fd = os.open(file.host, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SourceChanged(file.host) from None
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
    now = look(folder.root)
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


def _roots(root: Path) -> tuple[Path, ...]:
    """The real folders that symlinks in `root` may lead into."""
    real = root.resolve()
    # huggingface_hub's cache: models--org--name/{blobs,refs,snapshots/<commit>/…}
    if real.parent.name == "snapshots" and (blobs := real.parent.parent / "blobs").is_dir():
        return (real, blobs.resolve())
    return (real,)


def _look(
    folder: Path,
    path: PurePosixPath,
    roots: tuple[Path, ...],
    files: list[SourceFile],
    left_out: list[LeftOut],
) -> None:
    if len(path.parts) > _MAX_DEPTH:
        raise InvalidModelFolder(folder, f"lies more than {_MAX_DEPTH} folders deep", "is there a loop of symlinks?")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        where = path / entry.name
        host = Path(entry.path)
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            left_out.append(LeftOut(printable(str(where)), "its name is not UTF-8"))
            continue
        if entry.is_symlink():
            host = _follow(host, roots)
        try:
            status = host.stat(follow_symlinks=False)
        except FileNotFoundError:
            raise SourceChanged(host) from None
        if stat.S_ISDIR(status.st_mode):
            if reason := _LEFT_OUT_FOLDERS.get(entry.name):
                left_out.append(LeftOut(f"{where}/", reason))
            else:
                _look(host, where, roots, files, left_out)
        elif not stat.S_ISREG(status.st_mode):
            left_out.append(LeftOut(str(where), "neither a file nor a folder"))
        elif reason := _why_left_out(where):
            left_out.append(LeftOut(str(where), reason))
        else:
            files.append(SourceFile(where, host, identity_of(status)))


def _follow(link: Path, roots: tuple[Path, ...]) -> Path:
    try:
        target = link.resolve(strict=True)
    except FileNotFoundError:
        raise InvalidModelFolder(
            link, "is a symlink to something that is not there", "complete the download, or remove the link"
        ) from None
    except (OSError, RuntimeError):
        raise InvalidModelFolder(link, "is a symlink in a loop", "remove it") from None
    if not any(target.is_relative_to(root) for root in roots):
        raise InvalidModelFolder(
            link,
            f"is a symlink that leads out of the folder, to {target}",
            "put a copy of the file in its place",
        )
    return target


def _why_left_out(path: PurePosixPath) -> str | None:
    name = path.name.lower()
    if is_partial(path.name):
        return "a partial download"
    if name.endswith(_OTHER_WEIGHTS):
        return f"weights in another format than safetensors ({path.suffix})"
    if len(path.parts) == 1 and name.endswith((".safetensors", ".safetensors.index.json")):
        return "a single-file checkpoint beside the components"
    return None
