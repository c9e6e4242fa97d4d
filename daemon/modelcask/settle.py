"""When a drop is complete: by its structure, not by a timer.

A drop has settled when its plan can be made (model_index.json parses, every component and shard is there,
every safetensors file is exactly as long as its header says), what clients parse is whole, no download is
under way in it, and two looks in a row found the same files.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash

from modelcask import source
from modelcask.errors import ModelcaskError, SourceChanged, disk_error, printable
from modelcask.plan import MAX_JSON, ImportPlan, plan_import
from modelcask.safetensors_layout import check_size
from modelcask.source import SourceFile, SourceFolder

# Where huggingface_hub keeps what it is downloading into a --local-dir.
_HUB_DOWNLOADS = PurePosixPath(".cache/huggingface/download")
# git holds it while it writes the files of a clone.
_GIT_LOCK = PurePosixPath(".git/index.lock")

# A safetensors file tells its length and an index its shards; of these only the syntax tells the end.
_PARSED_BY_CLIENTS = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "scheduler_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a drop found.

    Attributes:
        fingerprint: of all files' paths and identities; equal fingerprints mean that nothing changed.
        plan: the import's plan if the drop is complete.
        missing: in one line what is not there yet, if it is not.
    """

    fingerprint: str
    plan: ImportPlan | None
    missing: str | None


def look(path: Path, *, namespace: str | None, quantize: str | None = None, beneath: Path | None = None) -> Look:
    """Look at the drop `path`, to be imported with these options. Files are opened to read their headers only.

    Whatever cannot be read is told as missing. `beneath` is the drop directory, see `source.look`.
    """
    try:
        folder = source.look(path, beneath=beneath)
        fingerprint = fingerprint_of(folder)
    except ModelcaskError as error:
        return Look("", None, str(error))
    except OSError as error:
        return Look("", None, disk_error(error))
    try:
        if download := _download_under_way(path, folder):
            return Look(fingerprint, None, printable(f"{download}: a download is under way"))
        plan = plan_import(folder, namespace=namespace, quantize=quantize)
        if half := _half_written_json(folder):
            return Look(fingerprint, None, printable(f"{half.host}: is no JSON yet"))
        if open_file := _being_written(folder):
            return Look(fingerprint, None, printable(f"{open_file.host}: a process has it open for writing"))
        return Look(fingerprint, plan, None)
    except SourceChanged as error:
        return Look(fingerprint, None, printable(f"{error.path}: is still being written"))
    except ModelcaskError as error:
        return Look(fingerprint, None, str(error))
    except OSError as error:
        return Look(fingerprint, None, disk_error(error))


def fingerprint(path: Path, *, beneath: Path | None = None) -> str:
    """The fingerprint of the drop as it is now; empty if it cannot be looked at."""
    try:
        return fingerprint_of(source.look(path, beneath=beneath))
    except (ModelcaskError, OSError):
        return ""


def fingerprint_of(folder: SourceFolder) -> str:
    """The fingerprint of what a look found."""
    hasher = xxhash.xxh3_128()
    for file in folder.files:
        hasher.update(repr((str(file.path), file.identity)).encode())
    for entry in folder.left_out:
        hasher.update(entry.path.encode(errors="surrogateescape"))
    return hasher.hexdigest()


def _half_written_json(folder: SourceFolder) -> SourceFile | None:
    """The first file that clients parse and that is not, or not yet, JSON."""
    for file in folder.files:
        if file.path.name in _PARSED_BY_CLIENTS:
            try:
                text = source.read(file, limit=MAX_JSON)
                check_size(text)
                json.loads(text)
            except (ValueError, RecursionError):
                return file
    return None


def _being_written(folder: SourceFolder) -> SourceFile | None:
    """The first file that a process has open for writing, where the kernel tells.

    It tells whoever asks for a read lease on a file of his own (fcntl(2), F_SETLEASE: "EAGAIN" while anyone has it
    open for writing); of others' files and on network filesystems, structure must do.
    """
    for file in folder.files:
        with source.opened(file) as fd:
            try:
                # Should somebody open it just now, the kernel sends a signal: one that is ignored by default.
                fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            except BlockingIOError:
                return file
            except OSError:
                continue  # not ours, or a filesystem without leases: it cannot be told
    return None


def _download_under_way(root: Path, folder: SourceFolder) -> Path | None:
    for entry in folder.left_out:
        if source.is_partial(PurePosixPath(entry.path).name):
            return root / entry.path
    if (root / _GIT_LOCK).exists():
        return root / _GIT_LOCK
    downloads = root / _HUB_DOWNLOADS
    if any((root / part).is_symlink() for part in (_HUB_DOWNLOADS, *_HUB_DOWNLOADS.parents)[:-1]):
        return None  # no downloader's; who knows where it leads
    for directory, _, names in os.walk(downloads):
        for name in sorted(names):
            path = Path(directory, name)
            if path.suffix == ".incomplete" or (path.suffix == ".lock" and _is_locked(path)):
                return path
    return None


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock file: huggingface_hub leaves it behind when the download is done."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False  # opening a device can do something
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
