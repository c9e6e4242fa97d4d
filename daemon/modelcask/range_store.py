"""Storing a range of a source file as a blob: as it is, or quantized.

Ranges are read with pread into bounded buffers. What fits one is hashed before anything is written, so what is
stored already costs no write. A larger range would have to be read twice for that; it is hashed and written in
one pass, unless the index predicts, from samples of its bytes, that it is stored already: then it is hashed
only, and sha256 decides. Storing is a job of `lanes`: two ranges are hashed at a time on each thread.

A tensor to be quantized is known by the digest it would have unquantized; one that was quantized before, and
whose blob is still there, is neither quantized nor written again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import xxhash

from modelcask import durable
from modelcask.blobs import Ingestion
from modelcask.digest import Digest
from modelcask.errors import IndexFailed, Interrupted, SourceChanged
from modelcask.index import Index, Quantization, QuantizationKey
from modelcask.lanes import Hashing, ToHash
from modelcask.paired_sha256 import Kernel, Sha256, sha256
from modelcask.quantize import KERNEL_VERSION, QuantizedLayout
from modelcask.source import SourceFile
from modelcask.store import Store

_Answer = TypeVar("_Answer")

# Each of the ranges that are stored at the same time has a buffer: two a thread.
_BUFFER = 8 << 20
# Pieces in which a range passes through: what is read should still be in the CPU's cache when it is hashed and
# quantized. A whole number of groups of every quantization type and dtype.
_PIECE = 512 << 10
_SAMPLE = 64 << 10
# A smaller range is hashed at once: what the lanes cost, about 10 µs, is more than they save.
_WORTH_A_LANE = 64 << 10
assert max(_PIECE, _SAMPLE) <= _BUFFER  # both pass through the buffer


@dataclass(frozen=True, slots=True)
class SourceRange:
    """`length` bytes at `offset` of the open file `fd`; `header` goes before them in the blob.

    Attributes:
        file: what `fd` is, for errors.
    """

    fd: int
    file: SourceFile
    header: bytes
    offset: int
    length: int

    @property
    def blob_size(self) -> int:
        return len(self.header) + self.length


class RangeStore:
    """Stores ranges through one ingestion. Threads may share it.

    Attributes:
        new: the blobs that were not stored before.
        fingerprints, predictions, quantizations: what the index should remember of this work.
    """

    def __init__(
        self,
        ingestion: Ingestion,
        store: Store,
        stop: threading.Event,
        advance: Callable[[int], None],
        *,
        kernel: Kernel | None,
    ) -> None:
        """
        Args:
            store: its index is opened when it is needed first.
            stop: when set, whatever is under way ends soon with `Interrupted`.
            advance: told the source's bytes that are done, in portions.
            kernel: what pairs hashes, if it is worth while.
        """
        self._ingestion = ingestion
        self._store_of_index = store
        self._stop = stop
        self._given_up = False
        self._advance = advance
        self._kernel = kernel
        self._free_buffers: list[memoryview] = []
        self._lock = threading.Lock()
        self.new: set[Digest] = set()
        self.predictions: dict[bytes, Digest] = {}
        self.fingerprints: dict[Digest, int] = {}
        self.quantizations: dict[QuantizationKey, Quantization] = {}

    def store(self, source: SourceRange) -> Hashing[Digest]:
        """Store the range as it is."""
        with self._buffer() as buffer:
            if source.length <= _BUFFER:
                data = buffer[: source.length]
                digest = yield from self._read_whole(source, data)
                if not self._ingestion.has(digest, source.blob_size):
                    with _Temporary(self._ingestion) as temporary:
                        temporary.append(source.header)
                        temporary.append(data)
                    self._stage(temporary, digest, source.blob_size)
                return digest
            sample = self._sample(source, buffer)
            predicted = self._ask(lambda index: index.predicted(sample))
            if predicted is not None and self._ingestion.has(predicted, source.blob_size):
                digest = yield from self._pass_through(source, buffer)
                if self._ingestion.has(digest, source.blob_size):
                    return digest
                self._advance(-source.length)  # a wrong prediction: once more
            with _Temporary(self._ingestion) as temporary:
                temporary.append(source.header)
                digest = yield from self._pass_through(source, buffer, temporary.add)
            self._stage(temporary, digest, source.blob_size)
            self._predict(sample, digest)
            return digest

    def store_quantized(self, source: SourceRange, dtype: str, layout: QuantizedLayout) -> Hashing[Quantization]:
        """Store the range, a tensor of `dtype` whose unquantized blob begins with `source.header`, quantized."""
        with self._buffer() as buffer:
            if source.length <= _BUFFER:
                data = buffer[: source.length]
                key = self._key((yield from self._read_whole(source, data)), layout)
                known = self._known_quantization(key, layout)
                if known is None:
                    with self._quantized_file(dtype, layout) as file:
                        for begin in range(0, source.length, _PIECE):
                            self._check_stop()
                            yield from file.add(data[begin : begin + _PIECE])
                        known = yield from file.finish(buffer)
                    self._remember_quantized(key, known, file, layout)
                return known
            sample = self._sample(source, buffer)
            predicted = self._ask(lambda index: index.predicted(sample))
            if predicted is not None and self._known_quantization(self._key(predicted, layout), layout) is not None:
                key = self._key((yield from self._pass_through(source, buffer)), layout)
                known = self._known_quantization(key, layout)
                if known is not None:
                    return known
                self._advance(-source.length)  # a wrong prediction: once more
            with self._quantized_file(dtype, layout) as file:
                key = self._key((yield from self._pass_through(source, buffer, file.add, whole_groups=True)), layout)
                known = yield from file.finish(buffer)
            self._remember_quantized(key, known, file, layout)
            self._predict(sample, key.source)
            return known

    def put(self, data: bytes) -> Digest:
        """Store a small blob that is no range of a file."""
        digest = Digest.of(data)
        if self._ingestion.put(data, digest):
            self._note_new(digest, xxhash.xxh3_64_intdigest(data))
        return digest

    def _ask(self, question: Callable[[Index], _Answer | None]) -> _Answer | None:
        """The index's answer; None also where it cannot be used, for it only saves work."""
        try:
            return question(self._store_of_index.index)
        except IndexFailed:
            return None  # a full disk, most likely: the import will tell, or succeed without

    def _key(self, source: Digest, layout: QuantizedLayout) -> QuantizationKey:
        return QuantizationKey(source, layout.qtype.name, KERNEL_VERSION)

    def _known_quantization(self, key: QuantizationKey, layout: QuantizedLayout) -> Quantization | None:
        """What the tensor was quantized to, if that is still stored."""
        known = self.quantizations.get(key) or self._ask(lambda index: index.quantization(key))
        return known if known is not None and self._ingestion.has(known.blob, layout.size) else None

    def _remember_quantized(
        self, key: QuantizationKey, done: Quantization, file: _QuantizedFile, layout: QuantizedLayout
    ) -> None:
        self._stage(file, done.blob, layout.size)
        with self._lock:
            self.quantizations[key] = done

    def _predict(self, sample: bytes, digest: Digest) -> None:
        with self._lock:
            self.predictions[sample] = digest

    def _read_whole(self, source: SourceRange, data: memoryview) -> Hashing[Digest]:
        """Read all bytes of a range, which fit `data`, and hash them after the header."""
        if source.length >= _WORTH_A_LANE:
            return (yield from self._pass_through(source, data))
        self._read(source, data, 0)
        self._advance(source.length)
        return Digest.of(source.header, data)

    def _pass_through(
        self,
        source: SourceRange,
        buffer: memoryview,
        consume: Callable[[memoryview], Iterable[ToHash]] = lambda _: (),
        *,
        whole_groups: bool = False,
    ) -> Hashing[Digest]:
        """Hash the header and the range piece by piece, handing the range's pieces on.

        A range that fits the buffer lies there in one afterwards.

        Args:
            whole_groups: cut the range at multiples of a piece; else the blob, header and all, which spares the
                hash and the page cache what straddles two pieces: a sixth of the time that writing takes.
        """
        sha = sha256(self._kernel, source.header)
        skew = 0 if whole_groups else len(source.header)
        begin = 0
        while begin < source.length:
            end = min(source.length, begin + _PIECE - (skew + begin) % _PIECE)
            piece = buffer[begin:end] if source.length <= len(buffer) else buffer[: end - begin]
            self._read(source, piece, begin)
            yield ToHash(sha, piece)
            yield from consume(piece)
            self._advance(len(piece))
            begin = end
        return Digest(sha.hexdigest())

    def _sample(self, source: SourceRange, buffer: memoryview) -> bytes:
        """What a large range is recognized by: its blob header and three pieces of its data."""
        hasher = xxhash.xxh3_128(source.header)
        for begin in (0, (source.length - _SAMPLE) // 2, source.length - _SAMPLE):
            piece = buffer[:_SAMPLE]
            self._read(source, piece, begin)
            hasher.update(piece)
        return hasher.digest()

    def _read(self, source: SourceRange, target: memoryview, skip: int) -> None:
        position = source.offset + skip
        while target:
            self._check_stop()
            with durable.naming(source.file.host):
                count = os.preadv(source.fd, [target], position)
            if count == 0:
                raise SourceChanged(source.file.host)
            target, position = target[count:], position + count

    def give_up(self) -> None:
        """Let whatever is under way end soon; the caller's `stop` stays as it is."""
        self._given_up = True

    def _check_stop(self) -> None:
        if self._given_up or self._stop.is_set():
            raise Interrupted("import")

    @contextmanager
    def _buffer(self) -> Iterator[memoryview]:
        """A buffer for as long as the body runs."""
        try:
            buffer = self._free_buffers.pop()
        except IndexError:
            buffer = memoryview(bytearray(_BUFFER))
        try:
            yield buffer
        finally:
            self._free_buffers.append(buffer)

    def _quantized_file(self, dtype: str, layout: QuantizedLayout) -> _QuantizedFile:
        return _QuantizedFile(self._ingestion, dtype, layout, sha256(self._kernel, layout.header))

    def _stage(self, temporary: _Temporary, digest: Digest, size: int) -> None:
        if self._ingestion.stage(temporary.path, digest, size):
            self._note_new(digest, temporary.fingerprint)

    def _note_new(self, digest: Digest, fingerprint: int) -> None:
        with self._lock:
            self.new.add(digest)
            self.fingerprints[digest] = fingerprint


class _Temporary:
    """A temporary file being written; removed if the body fails, left for staging if not."""

    def __init__(self, ingestion: Ingestion) -> None:
        self._ingestion = ingestion
        self.fd, self.path = ingestion.create_temporary()
        self._xxh3 = xxhash.xxh3_64()

    @property
    def fingerprint(self) -> int:
        """Of all that was written."""
        return self._xxh3.intdigest()

    def append(self, data: bytes | memoryview) -> None:
        """Write at the file's position."""
        self._xxh3.update(data)
        with durable.naming(self.path):
            durable.write_all(self.fd, data)

    def add(self, piece: memoryview) -> Iterable[ToHash]:
        """Take the next piece of the blob's data; what that wants hashed on the way."""
        self.append(piece)
        return ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ingestion.finish_writing(self.fd)
        if kind is not None:
            self.path.unlink()


class _QuantizedFile(_Temporary):
    """A quantized blob being made from the pieces of its tensor, in order."""

    def __init__(self, ingestion: Ingestion, dtype: str, layout: QuantizedLayout, sha: Sha256) -> None:
        """
        Args:
            sha: the blob's hash, which has its header.
        """
        # Here, so that an import that quantizes nothing loads neither numpy nor numba.
        import numpy as np

        from modelcask.quantize import arrays, kernels

        super().__init__(ingestion)
        self._numpy = np
        self._arrays = arrays
        self._dtype = dtype
        self._bits = arrays.BIT_DTYPES[dtype]
        self._layout = layout
        self._kernels = kernels
        self._deviation = kernels.Deviation()
        self._sha = sha
        self._ends = [layout.offset(part) for part in range(len(layout.parts))]

    def __enter__(self) -> Self:
        try:
            self.append(self._layout.header)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def add(self, piece: memoryview) -> Iterable[ToHash]:
        """Quantize the next piece, a whole number of groups, and write its parts to their places."""
        source = self._numpy.frombuffer(piece, self._bits)
        made = self._arrays.Quantized.empty(self._layout.qtype, self._dtype, (source.size,))
        self._deviation += self._kernels.quantize_groups(self._layout.qtype, self._dtype, source, made)
        packed = made.packed.data.cast("B")
        yield ToHash(self._sha, packed)
        self._xxh3.update(packed)
        parts = (made.packed, made.scales, made.biases)
        with durable.naming(self.path):
            for number, part in enumerate(part for part in parts if part is not None):
                self._ends[number] += durable.write_at(self.fd, part.data.cast("B"), self._ends[number])

    def finish(self, buffer: memoryview) -> Hashing[Quantization]:
        """Hash what follows the packed words, read back from the page cache: it may not fit into memory."""
        position, end = self._layout.offset(1), self._layout.size
        while position < end:
            piece = buffer[: min(_PIECE, end - position)]
            piece = piece[: os.preadv(self.fd, [piece], position)]
            yield ToHash(self._sha, piece)
            self._xxh3.update(piece)
            position += len(piece)
        deviation = self._deviation
        return Quantization(Digest(self._sha.hexdigest()), deviation.squared_error, deviation.squared_source)
