"""Digests: the identity of bytes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from modelcask.errors import InvalidDigest

_TEXT = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The sha256 of some bytes.

    Attributes:
        hex: 64 lower-case hex digits. `parse` and `from_blob_name` check them; the constructor trusts its
            caller, for it stands in loops over a model's tensors.
    """

    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """The digest written `sha256:<hex>`. Raises `InvalidDigest` for anything else."""
        if not _TEXT.fullmatch(text):
            raise InvalidDigest(text)
        return cls(text[7:])

    @classmethod
    def from_blob_name(cls, name: str) -> Digest:
        """The digest of a file named `sha256-<hex>`. Raises `InvalidDigest` for anything else."""
        if not name.startswith("sha256-"):
            raise InvalidDigest(name)
        return cls.parse("sha256:" + name[7:])

    @classmethod
    def of(cls, *parts: bytes | bytearray | memoryview) -> Digest:
        """The digest of `parts`, one after the other."""
        sha = hashlib.sha256()
        for part in parts:
            sha.update(part)
        return cls(sha.hexdigest())

    @property
    def blob_name(self) -> str:
        """The file name of the blob: `sha256-<hex>`."""
        return "sha256-" + self.hex

    def __str__(self) -> str:
        return "sha256:" + self.hex
