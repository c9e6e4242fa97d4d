"""Model names: `[host/][namespace/]name[:tag]`, by Ollama's rules.

A name is checked before it touches a path: each part is one safe path component. Names that differ only in
case are the same model; which spelling is on disk is `manifests.ManifestStore`'s to know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from modelcask.errors import InvalidName

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"
MAX_PART = 80

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_.-]")


@dataclass(frozen=True, slots=True, order=True)
class ModelName:
    """A name with all its parts. Build it with `parse` or `from_folder_name`, which check the parts."""

    host: str
    namespace: str
    name: str
    tag: str

    @classmethod
    def parse(cls, text: str, *, default_tag: str = DEFAULT_TAG) -> ModelName:
        """The name written as `[host/][namespace/]name[:tag]`.

        Raises:
            InvalidName: anything the rules forbid, `..` and absolute paths among it.
        """
        path, colon, tag = text.rpartition(":")
        if not colon or "/" in tag:
            path, tag, colon = text, default_tag, ""
        parts = path.split("/")
        if len(parts) > 3:
            raise InvalidName(text, "it has more than three parts")
        host, namespace, name = [DEFAULT_HOST, DEFAULT_NAMESPACE, ""][: 3 - len(parts)] + parts
        for kind, part in (("host", host), ("namespace", namespace), ("name", name), ("tag", tag)):
            _check_part(text, kind, part)
        if "." in namespace:
            raise InvalidName(text, f"the namespace {namespace!r} holds a '.'")
        return cls(host, namespace, name, tag)

    @classmethod
    def from_folder_name(cls, folder: str, *, namespace: str = DEFAULT_NAMESPACE, tag: str = DEFAULT_TAG) -> ModelName:
        """The name of a model that was given none: its folder's, with `-` for what the rules forbid."""
        name = _FORBIDDEN.sub("-", folder).lstrip(".-")[:MAX_PART]
        if not name:
            raise InvalidName(folder, "nothing of the folder's name can be kept, give one with --name")
        return cls.parse(f"{namespace}/{name}:{tag}")

    @property
    def path(self) -> PurePosixPath:
        """Where the manifest lies below `manifests/`."""
        return PurePosixPath(self.host, self.namespace, self.name, self.tag)

    @property
    def view_path(self) -> PurePosixPath:
        """Where the model stands below a view of the mount: the default host is left out."""
        return self.path.relative_to(DEFAULT_HOST) if self.host == DEFAULT_HOST else self.path

    def with_tag(self, tag: str) -> ModelName:
        """The same model under another tag. Raises `InvalidName` if that is none."""
        _check_part(str(self), "tag", tag)
        return replace(self, tag=tag)

    def __str__(self) -> str:
        host = "" if self.host == DEFAULT_HOST else self.host + "/"
        return f"{host}{self.namespace}/{self.name}:{self.tag}"


def namespace_from_folder_name(folder: str) -> str:
    """The namespace of the models in a folder: its name, with `-` for what the rules forbid."""
    return _FORBIDDEN.sub("-", folder).replace(".", "-").lstrip("-")[:MAX_PART] or DEFAULT_NAMESPACE


def _check_part(text: str, kind: str, part: str) -> None:
    if not part:
        raise InvalidName(text, f"the {kind} is empty")
    if len(part) > MAX_PART:
        raise InvalidName(text[:200], f"the {kind} is longer than {MAX_PART} characters")
    if part[0] in ".-":
        raise InvalidName(text, f"the {kind} {part!r} begins with {part[0]!r}")
    if not _PART.fullmatch(part):
        raise InvalidName(text, f"the {kind} {part!r} holds a character that is not allowed")
