"""What can go wrong in modelcask's own terms.

Each error carries its fields first and builds its one line from them: what, where, what to do. A domain
error is never an `OSError`; errors of the disk pass through with their errno.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

_WHAT_TO_DO = {
    errno.ENOSPC: "free some space there (`modelcask gc` removes what no model needs), then try again",
    errno.EDQUOT: "free some space there (`modelcask gc` removes what no model needs), then try again",
    errno.EROFS: "make it writable, or give another --store",
    errno.EACCES: "change the permissions, or run as a user who has them",
    errno.EPERM: "change the permissions, or run as a user who has them",
    errno.EIO: "the disk failed; look at `dmesg`",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


# Of one message: a path has at most 4,096 bytes, what stands in a file can be megabytes.
_LONGEST = 6000


def printable(text: str) -> str:
    r"""`text` on one line and safe for a terminal: control and format characters become `\x1b`-like escapes.

    Names come from other people's folders; an escape sequence in one must not reach the reader's terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 500]} … {text[-500:]}"


def disk_error(error: OSError) -> str:
    """One line for an error of the disk: what, where, what to do."""
    where = printable(str(error.filename)) + ": " if error.filename else ""
    what = error.strerror or str(error)
    what = what[:1].lower() + what[1:]
    advice = _WHAT_TO_DO.get(error.errno or 0)
    return f"{where}{what}" + (f"; {advice}" if advice else "")


def memory_error(error: BaseException) -> str | None:
    """One line if the error comes from too little memory: what, what to do; None if it does not."""
    # The second and third are how Python says that mmap(2) failed, for a stack and for a library.
    if isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("can't start new thread", "failed to map segment from shared object")
    ):
        return "there is not enough memory; close other programs, or raise the limit (ulimit -v)"
    return None


class ModelcaskError(Exception):
    """The root of all domain errors; `str()` is one printable line."""

    def message(self) -> str:
        """What, where, what to do; each kind of error says its own."""
        return super().__str__()

    def __str__(self) -> str:
        return printable(_cut(self.message()))


@dataclass(eq=False)
class InvalidName(ModelcaskError):
    """A model name outside the rules; nothing was looked up with it."""

    name: str
    reason: str

    def message(self) -> str:
        return (
            f"{self.name!r} is no model name: {self.reason}; use [host/][namespace/]name[:tag] "
            "with letters, digits, '-', '_' and '.'"
        )


@dataclass(eq=False)
class InvalidDigest(ModelcaskError):
    """Text that should be `sha256:<64 hex>` and is not."""

    text: str

    def message(self) -> str:
        return f"{self.text[:100]!r} is no digest: sha256: and 64 lower-case hex digits were expected"


@dataclass(eq=False)
class InvalidSafetensors(ModelcaskError):
    """A safetensors file that breaks a rule of the format; nothing of it was stored."""

    path: Path
    reason: str
    remedy: str = "download or save this file again"

    def message(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


@dataclass(eq=False)
class InvalidModelFolder(ModelcaskError):
    """A folder that is no complete diffusers model; nothing of it was stored."""

    path: Path
    reason: str
    remedy: str

    def message(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


@dataclass(eq=False)
class SourceChanged(ModelcaskError):
    """A file of the source changed while it was read; the import can simply be started again."""

    path: Path

    def message(self) -> str:
        return f"{self.path}: changed while it was imported; import again when nothing writes to it"


@dataclass(eq=False)
class ModelNotFound(ModelcaskError):
    """No manifest under this name."""

    name: str
    store: Path

    def message(self) -> str:
        return f"{self.name}: no such model in {self.store}; `modelcask ls` lists the models"


@dataclass(eq=False)
class NoImageModel(ModelcaskError):
    """A model of another kind in a store that is shared with Ollama."""

    name: str

    def message(self) -> str:
        return f"{self.name}: is no image model; look after it with the program that stored it (ollama)"


@dataclass(eq=False)
class InvalidManifest(ModelcaskError):
    """A manifest file that cannot be understood."""

    path: Path
    reason: str

    def message(self) -> str:
        return (
            f"{self.path}: unreadable manifest: {self.reason}; import the model again, "
            "or move this file out of the store to set it aside"
        )


@dataclass(eq=False)
class CorruptBlob(ModelcaskError):
    """A blob that is missing, or whose size or bytes are not what its digest stands for."""

    path: Path
    reason: str

    def message(self) -> str:
        return f"{self.path}: {self.reason}; `modelcask verify` tells whose it is, importing that model again heals it"


@dataclass(eq=False)
class InvalidStore(ModelcaskError):
    """A folder that is no store this version can open."""

    path: Path
    reason: str
    remedy: str

    def message(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


@dataclass(eq=False)
class IndexFailed(ModelcaskError):
    """The index could not be read or written; the models are not concerned."""

    path: Path
    reason: str

    def message(self) -> str:
        return f"{self.path}: {self.reason}; free some space, or remove this file: all but the history is rebuilt"


@dataclass(eq=False)
class InvalidConfig(ModelcaskError):
    """A configuration file with something in it that is not allowed.

    Attributes:
        line: of the file, None where it is not known; TOML's own errors tell it in `reason`.
    """

    path: Path
    reason: str
    line: int | None = None

    def message(self) -> str:
        where = f"{self.path}, line {self.line}" if self.line else str(self.path)
        return f"{where}: {self.reason}"


@dataclass(eq=False)
class MountFailed(ModelcaskError):
    """A mount or unmount that did not happen."""

    path: Path
    reason: str
    remedy: str

    def message(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


@dataclass(eq=False)
class Interrupted(ModelcaskError):
    """The work was asked to stop; what was written so far is kept for the next try."""

    what: str

    def message(self) -> str:
        return f"{self.what}: interrupted; run it again to go on, what was stored is not stored twice"
