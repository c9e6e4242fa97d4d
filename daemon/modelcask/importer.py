"""The importer: writes the blobs of a plan, then commits its manifests.

Tensors are read with pread into one bounded buffer a worker, hashed and written by as many workers as there
are cores; hashing, reading and writing release the GIL. A tensor that fits the buffer is hashed before
anything is written, so one that is stored already costs no write. A larger one is hashed and written in one
pass, unless the index predicts that it is stored already: then it is hashed only, and sha256 decides.

Nothing is visible of an import before its manifests are committed, and nothing of it is left in `tmp/` if
it fails.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from modelcask import durable, source, upstream
from modelcask.blobs import Ingestion
from modelcask.digest import Digest
from modelcask.errors import IndexFailed, Interrupted, InvalidModelFolder, SourceChanged
from modelcask.manifests import (
    CONFIG_TYPE,
    FILE_TYPE,
    HEADER_TYPE,
    JSON_TYPE,
    MODEL_INDEX,
    TENSOR_TYPE,
    Layer,
    Manifest,
)
from modelcask.names import ModelName
from modelcask.plan import MAX_JSON, ImportPlan, ModelPlan, Shard
from modelcask.safetensors_layout import TensorEntry, blob_header
from modelcask.source import LeftOut, SourceFile
from modelcask.store import Store

log = logging.getLogger("modelcask")

# One a worker. Nearly all tensors of today's models fit, and two of them stay far below the 300 MB an import may take.
_BUFFER = 32 << 20
# Pieces in which larger tensors pass through: what is read should still be in the CPU's cache when hashed.
_PIECE = 1 << 20
_SAMPLE = 64 << 10
assert max(_PIECE, _SAMPLE) <= _BUFFER  # both pass through the buffer

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ImportResult:
    """One manifest that was committed.

    Attributes:
        new_blobs, new_bytes: blobs this import wrote, the manifest's distinct ones.
        reused_blobs, reused_bytes: those that were stored already.
    """

    name: ModelName
    manifest: Digest
    tensors: int
    layers: int
    source_bytes: int
    new_blobs: int
    new_bytes: int
    reused_blobs: int
    reused_bytes: int
    skipped: tuple[LeftOut, ...]
    seconds: float


def run_import(store: Store, plan: ImportPlan, *, report: Report, stop: threading.Event) -> list[ImportResult]:
    """Import all of `plan`'s models; the manifests are durable when it returns.

    Args:
        report: called with the source's bytes done and in total, from any thread, often.
        stop: when set, the import ends soon with `Interrupted`.

    Raises:
        SourceChanged: the folder changed meanwhile.
        Interrupted: `stop` was set.
        OSError: the source cannot be read or the store not be written.
    """
    started = time.monotonic()
    with store.ingestion() as ingestion:
        work = _Work(store, ingestion, plan, report, stop)
        work.store_sources()
        manifests = [(model, work.manifest(model)) for model in plan.models]
        ingestion.flush()
        source.check_unchanged(plan.folder)
        results = []
        for model, manifest in manifests:
            name = store.manifests.stored_name(model.name)
            digest = store.manifests.write(name, manifest, temporary=ingestion.temporary_name())
            results.append(work.result(model, name, manifest, digest, time.monotonic() - started))
    try:
        _record(store, plan, work.predictions, results)
    except IndexFailed as error:
        # The manifests are committed: the import is done, whatever becomes of its history.
        log.warning("%s", error)
    return results


def _record(store: Store, plan: ImportPlan, predictions: dict[bytes, Digest], results: list[ImportResult]) -> None:
    store.index.remember_predictions(predictions)
    for result in results:
        store.index.record_import(
            name=str(result.name),
            manifest=result.manifest,
            source=plan.folder.root,
            seconds=result.seconds,
            new_bytes=result.new_bytes,
            reused_bytes=result.reused_bytes,
        )


@dataclass
class _Work:
    """The state of one import while its workers run."""

    store: Store
    ingestion: Ingestion
    plan: ImportPlan
    report: Report
    stop: threading.Event
    tensors: dict[tuple[PurePosixPath, str], Layer] = field(default_factory=dict)
    files: dict[PurePosixPath, Layer] = field(default_factory=dict)
    new: set[Digest] = field(default_factory=set)
    predictions: dict[bytes, Digest] = field(default_factory=dict)
    done_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    local: threading.local = field(default_factory=threading.local)

    def store_sources(self) -> None:
        """Store the tensors of all shards and all other files, each once."""
        shards = {shard.file.path: shard for model in self.plan.models for shard in model.shards}
        files = {file.path: file for model in self.plan.models for file in model.files}
        self.total_bytes = sum(shard.file.size for shard in shards.values()) + sum(f.size for f in files.values())
        self.report(0, self.total_bytes)
        workers = max(2, min(8, os.cpu_count() or 2))
        with ExitStack() as open_files, ThreadPoolExecutor(workers, "import") as pool:
            jobs: list[Future[None]] = []
            for shard in shards.values():
                fd = open_files.enter_context(source.opened(shard.file))
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                self._advance(shard.layout.data_start)
                jobs.extend(pool.submit(self._store_tensor, fd, shard, tensor) for tensor in shard.layout.tensors)
            jobs.extend(pool.submit(self._store_file, file) for file in files.values())
            try:
                finished, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                for job in finished:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop.set()
                raise

    def manifest(self, model: ModelPlan) -> Manifest:
        """The manifest of `model`, its small layers stored on the way."""
        by_path = {str(file.path): file for file in model.files}
        layers = [
            self.tensors[shard.file.path, tensor.name]
            for shard in model.shards
            for tensor in sorted(shard.layout.tensors, key=lambda tensor: tensor.name)
        ]
        encoder = by_path.get("text_encoder/config.json")
        try:
            index = upstream.normalized_model_index(
                model.model_index,
                parameter_count=_parameter_count(model.shards),
                quantization=upstream.source_dtype(source.read(encoder, limit=MAX_JSON)) if encoder else "",
            )
        except ValueError as error:
            where = self.plan.folder.root / MODEL_INDEX
            raise InvalidModelFolder(where, f"cannot be imported: {error}", "correct it") from None
        layers.append(self._put(JSON_TYPE, MODEL_INDEX, index))
        of_upstream = [path for path in upstream.JSON_PATHS[1:] if path in by_path]
        layers += [self._layer(JSON_TYPE, path) for path in of_upstream]
        layers += [self._layer(FILE_TYPE, path) for path in sorted(by_path.keys() - set(of_upstream))]
        layers += [self._put(HEADER_TYPE, str(shard.file.path), shard.layout.header) for shard in model.shards]
        config = self._put(CONFIG_TYPE, "", upstream.config_blob(model.model_index))
        return Manifest(config, tuple(layers))

    def result(
        self, model: ModelPlan, name: ModelName, manifest: Manifest, digest: Digest, seconds: float
    ) -> ImportResult:
        """What importing `model` came to. A blob that two models share is new in the first only."""
        blobs = manifest.blobs()
        new = {digest: size for digest, size in blobs.items() if digest in self.new}
        self.new -= new.keys()
        return ImportResult(
            name=name,
            manifest=digest,
            tensors=sum(1 for _ in manifest.of_type(TENSOR_TYPE)),
            layers=len(manifest.layers),
            source_bytes=model.source_bytes,
            new_blobs=len(new),
            new_bytes=sum(new.values()),
            reused_blobs=len(blobs) - len(new),
            reused_bytes=sum(blobs.values()) - sum(new.values()),
            skipped=model.left_out,
            seconds=seconds,
        )

    def _store_tensor(self, fd: int, shard: Shard, tensor: TensorEntry) -> None:
        header = blob_header(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes)
        offset = shard.layout.data_start + tensor.begin
        digest = self._store_range(fd, shard.file.host, header, offset, tensor.nbytes)
        layer = Layer(TENSOR_TYPE, digest, len(header) + tensor.nbytes, f"{shard.component}/{tensor.name}")
        self.tensors[shard.file.path, tensor.name] = layer

    def _store_file(self, file: SourceFile) -> None:
        with source.opened(file) as fd:
            digest = self._store_range(fd, file.host, b"", 0, file.size)
        self.files[file.path] = Layer(FILE_TYPE, digest, file.size, str(file.path))

    def _store_range(self, fd: int, where: Path, header: bytes, offset: int, length: int) -> Digest:
        """Store `header` and `length` bytes of the source as one blob."""
        if length > _BUFFER:
            return self._store_large(fd, where, header, offset, length)
        data = self._buffer()[:length]
        self._read(fd, where, data, offset)
        self._advance(length)
        digest = Digest.of(header, data)
        size = len(header) + length
        if not self.ingestion.has(digest, size):
            with _Temporary(self.ingestion) as temporary:
                temporary.write(header)
                temporary.write(data)
                durable.start_writeback(temporary.fd)
            self._stage(temporary.path, digest, size)
        return digest

    def _store_large(self, fd: int, where: Path, header: bytes, offset: int, length: int) -> Digest:
        size = len(header) + length
        sample = self._sample(fd, where, header, offset, length)
        predicted = self.store.index.predicted(sample)
        if predicted is not None and self.ingestion.has(predicted, size):
            digest = self._pass_through(fd, where, header, offset, length, lambda _: None)
            if self.ingestion.has(digest, size):
                self._advance(length)
                return digest
        with _Temporary(self.ingestion) as temporary:
            digest = self._pass_through(fd, where, header, offset, length, temporary.write)
            durable.start_writeback(temporary.fd)
        self._stage(temporary.path, digest, size)
        self._advance(length)
        with self.lock:
            self.predictions[sample] = digest
        return digest

    def _pass_through(
        self,
        fd: int,
        where: Path,
        header: bytes,
        offset: int,
        length: int,
        write: Callable[[memoryview], None],
    ) -> Digest:
        """Hash `header` and a range of the source piece by piece, handing each piece to `write`."""
        sha = hashlib.sha256(header)
        write(memoryview(header))
        for begin in range(0, length, _PIECE):
            piece = self._buffer()[: min(_PIECE, length - begin)]
            self._read(fd, where, piece, offset + begin)
            sha.update(piece)
            write(piece)
        return Digest(sha.hexdigest())

    def _sample(self, fd: int, where: Path, header: bytes, offset: int, length: int) -> bytes:
        """What a large range is recognized by: its blob header and three pieces of its data."""
        hasher = xxhash.xxh3_128(header)
        for begin in (0, (length - _SAMPLE) // 2, length - _SAMPLE):
            piece = self._buffer()[:_SAMPLE]
            self._read(fd, where, piece, offset + begin)
            hasher.update(piece)
        return hasher.digest()

    def _read(self, fd: int, where: Path, target: memoryview, offset: int) -> None:
        while target:
            if self.stop.is_set():
                raise Interrupted(str(self.plan.folder.root))
            try:
                count = os.preadv(fd, [target], offset)
            except OSError as error:
                error.filename = str(where)
                raise
            if count == 0:
                raise SourceChanged(where)
            target, offset = target[count:], offset + count

    def _buffer(self) -> memoryview:
        if not hasattr(self.local, "buffer"):
            self.local.buffer = memoryview(bytearray(_BUFFER))
        buffer: memoryview = self.local.buffer
        return buffer

    def _put(self, media_type: str, name: str, data: bytes) -> Layer:
        digest = Digest.of(data)
        if self.ingestion.put(data, digest):
            self.new.add(digest)
        return Layer(media_type, digest, len(data), name)

    def _stage(self, temporary: Path, digest: Digest, size: int) -> None:
        if self.ingestion.stage(temporary, digest, size):
            with self.lock:
                self.new.add(digest)

    def _layer(self, media_type: str, path: str) -> Layer:
        stored = self.files[PurePosixPath(path)]
        return Layer(media_type, stored.digest, stored.size, path)

    def _advance(self, count: int) -> None:
        with self.lock:
            self.done_bytes += count
            done = self.done_bytes
        self.report(done, self.total_bytes)


class _Temporary:
    """A temporary file being written; removed if the body fails, left for staging if not."""

    def __init__(self, ingestion: Ingestion) -> None:
        self.fd, self.path = ingestion.create_temporary()

    def write(self, data: bytes | memoryview) -> None:
        try:
            durable.write_all(self.fd, data)
        except OSError as error:
            error.filename = str(self.path)
            raise

    def __enter__(self) -> _Temporary:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        os.close(self.fd)
        if kind is not None:
            self.path.unlink()


def _parameter_count(shards: Iterable[Shard]) -> int:
    """Elements of all tensors with at least one dimension."""
    return sum(math.prod(tensor.shape) for shard in shards for tensor in shard.layout.tensors if tensor.shape)
