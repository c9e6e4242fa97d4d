"""Safetensors files looked at without any library: what the header says, and that it leaves no hole."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        tensors: `dtype`, `shape` and `data_offsets` by name, in the header's order.
        data_start: where the data begins in the file.
    """

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]
    data_start: int

    @classmethod
    def read(cls, path: Path) -> Shard:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            tensors = json.loads(file.read(length))
        return cls(path, tensors.pop("__metadata__", {}), tensors, 8 + length)

    def content(self, name: str) -> bytes:
        """The bytes of a tensor."""
        begin, end = self.tensors[name]["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(self.data_start + begin)
            return file.read(end - begin)

    def gaps(self) -> list[tuple[int, int]]:
        """Where a tensor does not begin at the end of the one before: (end, begin); and so at the file's end."""
        ranges = sorted(tensor["data_offsets"] for tensor in self.tensors.values())
        begins = [begin for begin, _ in ranges] + [self.path.stat().st_size - self.data_start]
        ends = [0] + [end for _, end in ranges]
        return [(end, begin) for end, begin in zip(ends, begins, strict=True) if end != begin]


def shards(folder: Path) -> list[Shard]:
    """Every safetensors file under `folder`."""
    return [Shard.read(path) for path in sorted(folder.rglob("*.safetensors"))]
