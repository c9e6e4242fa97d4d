"""Spans: a virtual file as byte ranges of blobs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from modelcask.digest import Digest
from modelcask.quantize import QuantizedLayout


@dataclass(frozen=True, slots=True)
class BlobRange:
    """Bytes `offset` and on of the blob `digest`, which as a whole is `blob_size` bytes long."""

    digest: Digest
    blob_size: int
    offset: int


@dataclass(frozen=True, slots=True)
class DequantizedTensor:
    """A tensor as it was before it was quantized.

    Attributes:
        layout: of the blob `digest`.
        dtype: the original one, which the bytes have.
    """

    digest: Digest
    layout: QuantizedLayout
    dtype: str


Source = bytes | BlobRange | DequantizedTensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one read: `length` bytes at `skip` into `source`."""

    source: Source
    skip: int
    length: int


class SpanFile:
    """A file laid out from spans, in order, without hole or overlap.

    A span comes from literal bytes, from a blob, or from dequantizing one; it is found by bisection, whatever
    their number.
    """

    __slots__ = ("_ends", "_sources", "size")

    def __init__(self, spans: Iterable[tuple[Source, int]]) -> None:
        """`spans`: each span's source and length in bytes; empty ones are dropped."""
        self._ends: list[int] = []
        self._sources: list[Source] = []
        end = 0
        for source, length in spans:
            if length:
                end += length
                self._ends.append(end)
                self._sources.append(source)
        self.size = end

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """What bytes `offset` to `offset + length` consist of, in order; nothing beyond the end."""
        stop = min(offset + length, self.size)
        number = bisect_right(self._ends, offset)
        while offset < stop:
            start = self._ends[number - 1] if number else 0
            until = min(stop, self._ends[number])
            yield Piece(self._sources[number], offset - start, until - offset)
            offset = until
            number += 1
