"""Dequantizing ahead of readers: in chunks, on all cores, into a bounded cache.

A read costs the groups it lies in, unless it is part of a stream: a large one, as the kernel sends them when it reads
ahead, that begins where a tensor begins or another read ended. Then its chunk is dequantized whole and kept, and the
chunks after it are begun.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from modelcask.digest import Digest
from modelcask.quantize import SOURCE_DTYPES
from modelcaskfs.blob_reader import BlobReader
from modelcaskfs.spans import BlobRange, DequantizedTensor

# Bytes of a chunk: about a millisecond of work; a whole number of groups of every type and dtype.
_CHUNK = 2 << 20
_CACHED_CHUNKS = 48
_AHEAD = 2
# Chunks begun ahead that nobody has read yet; more streams than these serve go without, and evict nobody's chunk.
_UNREAD_CHUNKS = 16
# Smaller reads are random ones: the kernel's read-ahead asks for 128 KiB at a time.
_STREAM = 64 << 10

# Ends of reads that are remembered, for what follows them.
_ENDS = 512

# The dtype, too: a blob may be the same for weights of several, as nvfp4's and mxfp8's are.
_Key = tuple[Digest, str, int]


class Dequantizer:
    """Reads `DequantizedTensor`s. Threads may share it."""

    def __init__(self, blobs: BlobReader) -> None:
        self._blobs = blobs
        self._lock = threading.Lock()
        self._chunks: OrderedDict[_Key, Future[memoryview]] = OrderedDict()
        self._unread: set[_Key] = set()
        self._ends: OrderedDict[_Key, None] = OrderedDict()
        self._pool = ThreadPoolExecutor(os.cpu_count() or 2, "dequantize")

    def read(self, tensor: DequantizedTensor, skip: int, target: memoryview, *, wait: bool) -> bool:
        """Fill `target` from byte `skip` of the tensor on. False if that takes computing and `wait` is not set.

        Raises:
            CorruptBlob: the blob is missing or not as long as it should be.
        """
        if not self._is_streamed(tensor, skip, len(target)):
            return self._read_few(tensor, skip, target, wait=wait)
        end = skip + len(target)
        for number in range(skip // _CHUNK, -(-end // _CHUNK)):
            chunk = self._chunk(tensor, number)
            if not (wait or chunk.done()):
                return False
            data = chunk.result()
            begin = number * _CHUNK
            low, high = max(skip, begin), min(end, begin + len(data))
            target[low - skip : high - skip] = data[low - begin : high - begin]
        return True

    def forget(self, digests: Iterable[Digest]) -> None:
        """Drop the chunks of these blobs."""
        gone = set(digests)
        with self._lock:
            for key in [key for key in self._chunks if key[0] in gone]:
                del self._chunks[key]
                self._unread.discard(key)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _is_streamed(self, tensor: DequantizedTensor, skip: int, length: int) -> bool:
        if length < _STREAM:
            return False
        with self._lock:
            self._ends[_key(tensor, skip + length)] = None
            if len(self._ends) > _ENDS:
                self._ends.popitem(last=False)
            return skip == 0 or length >= _CHUNK or _key(tensor, skip) in self._ends

    def _read_few(self, tensor: DequantizedTensor, skip: int, target: memoryview, *, wait: bool) -> bool:
        number, begin = divmod(skip, _CHUNK)
        with self._lock:
            chunk = self._chunks.get(_key(tensor, number))
        if chunk is not None and chunk.done() and begin + len(target) <= _CHUNK:
            target[:] = chunk.result()[begin : begin + len(target)]
            return True
        if wait:
            group = tensor.layout.qtype.group_size * SOURCE_DTYPES[tensor.dtype]
            first, last = skip // group, -(-(skip + len(target)) // group)
            data = self._dequantized(tensor, first, last)
            target[:] = data[skip - first * group :][: len(target)]
        return wait

    def _chunk(self, tensor: DequantizedTensor, number: int) -> Future[memoryview]:
        """The chunk, begun if it was not; so are those that follow it."""
        size = _tensor_bytes(tensor)
        with self._lock:
            for each in range(number, number + _AHEAD + 1):
                key = _key(tensor, each)
                wanted = each == number or (each * _CHUNK < size and len(self._unread) < _UNREAD_CHUNKS)
                if wanted and key not in self._chunks:
                    self._chunks[key] = self._pool.submit(self._whole_chunk, tensor, each)
                    self._unread.add(key)
            key = _key(tensor, number)
            self._unread.discard(key)
            self._chunks.move_to_end(key)
            chunk = self._chunks[key]
            while len(self._chunks) > _CACHED_CHUNKS:
                evicted, _ = self._chunks.popitem(last=False)
                self._unread.discard(evicted)
        return chunk

    def _whole_chunk(self, tensor: DequantizedTensor, number: int) -> memoryview:
        group = tensor.layout.qtype.group_size * SOURCE_DTYPES[tensor.dtype]
        end = min((number + 1) * _CHUNK, _tensor_bytes(tensor))
        try:
            return self._dequantized(tensor, number * _CHUNK // group, end // group)
        except BaseException:
            with self._lock:  # an error is told to who waits now, and tried again for who comes later
                self._chunks.pop(_key(tensor, number), None)
                self._unread.discard(_key(tensor, number))
            raise

    def _dequantized(self, tensor: DequantizedTensor, first: int, last: int) -> memoryview:
        """The bytes of the groups from `first` to before `last`."""
        # Here, so that a mount without quantized models loads neither numpy nor numba.
        import numpy as np

        from modelcask.quantize.arrays import Quantized
        from modelcask.quantize.kernels import dequantize_groups

        layout = tensor.layout
        groups = layout.parts[0].nbytes * 8 // (layout.qtype.bits * layout.qtype.group_size)
        arrays = []
        for number, part in enumerate(layout.parts):
            width = part.nbytes // groups
            array = np.empty((last - first) * width, np.uint8)
            source = BlobRange(tensor.digest, layout.size, layout.offset(number))
            self._blobs.read(source, first * width, array.data, wait=True)
            arrays.append(array)
        out = np.empty((last - first) * layout.qtype.group_size * SOURCE_DTYPES[tensor.dtype], np.uint8)
        packed, scales, *biases = arrays
        quantized = Quantized(packed.view(np.uint32), scales, biases[0] if biases else None)
        dequantize_groups(layout.qtype, tensor.dtype, quantized, out)
        return out.data


def _key(tensor: DequantizedTensor, number: int) -> _Key:
    return tensor.digest, tensor.dtype, number


def _tensor_bytes(tensor: DequantizedTensor) -> int:
    """The size of the tensor as it was."""
    elements = tensor.layout.parts[0].nbytes * 8 // tensor.layout.qtype.bits
    return elements * SOURCE_DTYPES[tensor.dtype]
