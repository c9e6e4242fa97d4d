"""The importer: writes the blobs of a plan, then commits its manifests.

As many threads as there are cores store tensors and files, two at a time each (`range_store`, `lanes`); hashing,
quantizing, reading and writing release the GIL. Nothing is visible of an import before its manifests are
committed, and nothing of it is left in `tmp/` if it fails.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from modelcask import lanes, paired_sha256, source, upstream
from modelcask.blobs import Ingestion
from modelcask.digest import Digest
from modelcask.errors import IndexFailed, Interrupted, InvalidModelFolder
from modelcask.lanes import Hashing
from modelcask.manifests import (
    CONFIG_TYPE,
    FILE_TYPE,
    HEADER_TYPE,
    JSON_TYPE,
    MODEL_INDEX,
    REPORT_TYPE,
    TENSOR_TYPE,
    Layer,
    Manifest,
)
from modelcask.names import ModelName
from modelcask.plan import MAX_JSON, ImportPlan, ModelPlan, Shard
from modelcask.quantize import eligible, quantized_layout
from modelcask.quantize.report import QuantizationReport
from modelcask.range_store import RangeStore, SourceRange
from modelcask.room import check_room
from modelcask.safetensors_layout import TensorEntry, blob_header
from modelcask.source import LeftOut, SourceFile
from modelcask.store import Store

log = logging.getLogger("modelcask")

Report = Callable[[int, int], None]

_THREADS = max(2, min(8, os.cpu_count() or 2))


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


def run_import(
    store: Store,
    plan: ImportPlan,
    *,
    report: Report,
    stop: threading.Event,
    approve: Callable[[ModelName, Digest], None] = lambda _name, _manifest: None,
) -> list[ImportResult]:
    """Import all of `plan`'s models; the manifests are durable when it returns.

    Args:
        report: called with the source's bytes done and in total, from any thread, often.
        stop: when set, the import ends soon with `Interrupted`.
        approve: asked before any manifest is written, for each; its error ends the import.

    Raises:
        SourceChanged: the folder changed meanwhile.
        Interrupted: `stop` was set.
        OSError: the source cannot be read or the store not be written.
    """
    started = time.monotonic()
    check_room(store, plan)
    with store.ingestion() as ingestion:
        work = _Work(store, ingestion, plan, report, stop)
        try:
            work.store_sources()
        except Interrupted:
            raise Interrupted(str(plan.folder.root)) from None
        manifests = [(model, work.manifest(model)) for model in plan.models]
        for _, manifest in manifests:
            ingestion.commit(manifest.blobs())
        source.check_unchanged(plan.folder)
        for model, manifest in manifests:
            approve(store.manifests.stored_name(model.name), Digest.of(manifest.encode()))
        results = []
        new = frozenset(work.ranges.new)
        for model, manifest in manifests:
            name = store.manifests.stored_name(model.name)
            healed = not new.isdisjoint(manifest.blobs())
            digest = store.manifests.write(name, manifest, temporary=ingestion.temporary_name(), renew=healed)
            results.append(work.result(model, name, manifest, digest, time.monotonic() - started))
    try:
        _record(store, plan, work.ranges, results)
    except IndexFailed as error:
        # The manifests are committed: the import is done, whatever becomes of its history.
        log.warning("%s", error)
    return results


def _record(store: Store, plan: ImportPlan, ranges: RangeStore, results: list[ImportResult]) -> None:
    store.index.remember(
        predictions=ranges.predictions, quantizations=ranges.quantizations, fingerprints=ranges.fingerprints
    )
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
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)
    files: dict[PurePosixPath, Layer] = field(default_factory=dict)
    done_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.shards = {shard.file.path: shard for model in self.plan.models for shard in model.shards}
        self.sources = {file.path: file for model in self.plan.models for file in model.files}
        self.total_bytes = sum(shard.file.size for shard in self.shards.values())
        self.total_bytes += sum(file.size for file in self.sources.values())
        kernel = paired_sha256.kernel_for(self.total_bytes, threads=_THREADS)
        self.ranges = RangeStore(self.ingestion, self.store, self.stop, self._advance, kernel=kernel)

    def store_sources(self) -> None:
        """Store the tensors of all shards and all other files, each once."""
        self.report(0, self.total_bytes)
        with ExitStack() as open_files, ThreadPoolExecutor(_THREADS, "import") as pool:
            jobs: list[Hashing[None]] = []
            try:
                for shard in self.shards.values():
                    fd = open_files.enter_context(source.opened(shard.file))
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    self._advance(shard.layout.data_start)
                    jobs.extend(self._store_tensor(fd, shard, tensor) for tensor in shard.layout.tensors)
                jobs.extend(self._store_file(file) for file in self.sources.values())
                finished, _ = wait(lanes.start(jobs, pool, _THREADS), return_when=FIRST_EXCEPTION)
                for thread in finished:
                    thread.result()
            except BaseException:
                self.ranges.give_up()
                raise

    def manifest(self, model: ModelPlan) -> Manifest:
        """The manifest of `model`, its small layers stored on the way."""
        by_path = {str(file.path): file for file in model.files}
        layers = [
            self.tensors[shard.file.path, tensor.name]
            for shard in model.shards
            for tensor in sorted(shard.layout.tensors, key=lambda tensor: tensor.name)
        ]
        try:
            index = upstream.normalized_model_index(
                model.model_index,
                parameter_count=_parameter_count(model.shards),
                quantization=self._quantization(by_path.get("text_encoder/config.json")),
            )
        except ValueError as error:
            where = self.plan.folder.root / MODEL_INDEX
            raise InvalidModelFolder(where, f"cannot be imported: {error}", "correct it") from None
        layers.append(self._put(JSON_TYPE, MODEL_INDEX, index))
        of_upstream = [path for path in upstream.JSON_PATHS[1:] if path in by_path]
        layers += [self._layer(JSON_TYPE, path) for path in of_upstream]
        layers += [self._layer(FILE_TYPE, path) for path in sorted(by_path.keys() - set(of_upstream))]
        layers += [self._put(HEADER_TYPE, str(shard.file.path), shard.layout.header) for shard in model.shards]
        if self.plan.quantize is not None:
            report = QuantizationReport(self.plan.quantize, self.costs)
            layers.append(self._put(REPORT_TYPE, self.plan.quantize.name, report.encode()))
        config = self._put(CONFIG_TYPE, "", upstream.config_blob(model.model_index))
        return Manifest(config, tuple(layers))

    def _quantization(self, text_encoder_config: SourceFile | None) -> str:
        if self.plan.quantize is not None:
            return self.plan.quantize.name.upper()
        if text_encoder_config is None:
            return ""
        return upstream.source_dtype(source.read(text_encoder_config, limit=MAX_JSON))

    def result(
        self, model: ModelPlan, name: ModelName, manifest: Manifest, digest: Digest, seconds: float
    ) -> ImportResult:
        """What importing `model` came to. A blob that two models share is new in the first only."""
        blobs = manifest.blobs()
        new = {digest: size for digest, size in blobs.items() if digest in self.ranges.new}
        self.ranges.new -= new.keys()
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

    def _store_tensor(self, fd: int, shard: Shard, tensor: TensorEntry) -> Hashing[None]:
        header = blob_header(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes)
        offset = shard.layout.data_start + tensor.begin
        range_ = SourceRange(fd, shard.file, header, offset, tensor.nbytes)
        name = f"{shard.component}/{tensor.name}"
        key = (shard.file.path, tensor.name)
        qtype = self.plan.quantize
        if qtype is None or eligible(shard.component, tensor.name, tensor.dtype, tensor.shape, qtype) is not None:
            digest = yield from self.ranges.store(range_)
            self.tensors[key] = Layer(TENSOR_TYPE, digest, range_.blob_size, name)
            return
        layout = quantized_layout(tensor.name, tensor.dtype, tensor.shape, qtype)
        done = yield from self.ranges.store_quantized(range_, tensor.dtype, layout)
        self.tensors[key] = Layer(TENSOR_TYPE, done.blob, layout.size, name)
        self.costs[name] = (done.squared_error, done.squared_source)

    def _store_file(self, file: SourceFile) -> Hashing[None]:
        with source.opened(file) as fd:
            digest = yield from self.ranges.store(SourceRange(fd, file, b"", 0, file.size))
        self.files[file.path] = Layer(FILE_TYPE, digest, file.size, str(file.path))

    def _put(self, media_type: str, name: str, data: bytes) -> Layer:
        return Layer(media_type, self.ranges.put(data), len(data), name)

    def _layer(self, media_type: str, path: str) -> Layer:
        stored = self.files[PurePosixPath(path)]
        return Layer(media_type, stored.digest, stored.size, path)

    def _advance(self, count: int) -> None:
        with self.lock:
            self.done_bytes += count
            done = self.done_bytes
        self.report(done, self.total_bytes)


def _parameter_count(shards: Iterable[Shard]) -> int:
    """Elements of all tensors with at least one dimension."""
    return sum(math.prod(tensor.shape) for shard in shards for tensor in shard.layout.tensors if tensor.shape)
