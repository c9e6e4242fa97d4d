"""Reading the spans of a file into a caller's buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from modelcask.blobs import BlobStore
from modelcask.digest import Digest
from modelcaskfs.blob_reader import BlobReader, memory_is_short
from modelcaskfs.dequantizer import Dequantizer
from modelcaskfs.spans import DequantizedTensor, SpanFile


class SpanReader:
    """Reads `SpanFile`s. Threads may share it."""

    def __init__(
        self,
        blobs: BlobStore,
        *,
        max_open: int,
        verify: bool = False,
        memory_is_short: Callable[[], bool] = memory_is_short,
    ) -> None:
        self._blobs = BlobReader(blobs, max_open=max_open, verify=verify, memory_is_short=memory_is_short)
        self._dequantizer = Dequantizer(self._blobs)

    def read_cached(self, file: SpanFile, offset: int, target: memoryview) -> int | None:
        """Fill `target` from `offset` on without waiting for a disk or for much computing; the bytes read, None
        if that cannot be.

        Less than `target` holds is returned only at the file's end.

        Raises:
            CorruptBlob: a blob is missing or not as long as it should be.
        """
        return self._read(file, offset, target, wait=False)

    def read(self, file: SpanFile, offset: int, target: memoryview) -> int:
        """As `read_cached`, but waits."""
        count = self._read(file, offset, target, wait=True)
        assert count is not None
        return count

    def _read(self, file: SpanFile, offset: int, target: memoryview, *, wait: bool) -> int | None:
        done = 0
        for piece in file.pieces(offset, len(target)):
            part = target[done : done + piece.length]
            if isinstance(piece.source, bytes):
                part[:] = piece.source[piece.skip : piece.skip + piece.length]
            elif isinstance(piece.source, DequantizedTensor):
                if not self._dequantizer.read(piece.source, piece.skip, part, wait=wait):
                    return None
            elif self._blobs.read(piece.source, piece.skip, part, wait=wait):
                self._blobs.let_go(piece.source, piece.skip, piece.length)
            else:
                return None
            done += piece.length
        return done

    def forget(self, digests: Iterable[Digest]) -> None:
        """Let go of blobs that nobody has open."""
        self._blobs.forget(digests)
        self._dequantizer.forget(digests)

    def close(self) -> None:
        """End the threads that dequantize."""
        self._dequantizer.close()
