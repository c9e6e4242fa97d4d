"""Removing a drop that was imported, once every byte of it has been read back from the store and compared.

What the store does not give back byte for byte stays: what the import left out, what came later, a folder that is
reached through a symlink. With it stays its folder. A removal that was interrupted can simply be started again: it
compares and removes what is still there.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modelcask import source
from modelcask.digest import Digest
from modelcask.errors import Interrupted, ModelcaskError, ModelNotFound, SourceChanged
from modelcask.leases import Lease
from modelcask.manifests import FILE_TYPE, HEADER_TYPE, JSON_TYPE, MODEL_INDEX, TENSOR_TYPE, Layer, StoredManifest
from modelcask.quantize import QUANT_TYPES, QuantType, stored_layout
from modelcask.safetensors_layout import TensorEntry, parse_header
from modelcask.source import SourceFile
from modelcask.store import Store

_CHUNK = 1 << 20
_ADVICE = "`modelcask verify` tells more"
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(eq=False)
class NotRemoved(ModelcaskError):
    """A drop that stays, because the store would not give it back; nothing of it was removed."""

    path: Path
    reason: str

    def message(self) -> str:
        return f"{self.path}: was imported, and is kept: {self.reason}"


@dataclass(frozen=True, slots=True)
class _Piece:
    """`length` bytes of a file, that stand at `offset` of a blob; quantized in that blob if `offset` is None."""

    layer: Layer
    offset: int | None
    length: int


def remove_drop(
    store: Store,
    root: Path,
    models: Sequence[StoredManifest],
    *,
    beneath: Path,
    before: float,
    report: Callable[[int, int], None],
    stop: threading.Event,
) -> list[PurePosixPath]:
    """Remove from `root` what `models`, imported from it, hold byte for byte.

    All files are compared before the first is removed, and a lease keeps what they are compared with. Quantized tensors
    cannot be compared with what they were: of them the blobs' digests are checked.

    Args:
        beneath: the drop directory, see `source.look`.
        before: seconds since the epoch; files that came or were changed later stay.
        report: called with the bytes compared and in total, often.
        stop: when set, the comparing ends with `Interrupted`.

    Returns:
        The files that stay.

    Raises:
        NotRemoved: the store does not give back what was imported.
        SourceChanged: a file changed meanwhile.
        Interrupted: `stop` was set.
        OSError: the drop or the store cannot be read, or the drop not be changed.
    """
    folder = source.look(root, beneath=beneath)
    contents = {path: (model, layer) for model in models for path, layer in _files(model).items()}
    removable = [file for file in folder.files if file.path in contents and file.changed_ns <= before * 1e9]
    # Whoever looks at the drop meanwhile, or after an interruption, still knows it for one.
    removable.sort(key=lambda file: file.path.name == MODEL_INDEX)
    with Lease(store.leases, "removal", {digest for model in models for digest in model.manifest.blobs()}):
        _check_current(store, root, models)
        comparison = _Comparison(store, stop, report, sum(file.size for file in removable))
        for file in removable:
            model, layer = contents[file.path]
            comparison.compare(file, comparison.pieces(model, layer))
        source.check_unchanged(folder)
        _check_current(store, root, models)
        removed = _remove(root, removable, beneath)
    return [file.path for file in folder.files if file.path not in removed]


def _check_current(store: Store, root: Path, models: Sequence[StoredManifest]) -> None:
    """Raise NotRemoved if a model was removed or replaced since it was read: the drop may be the only copy then."""
    for model in models:
        try:
            current = store.manifests.read(model.name).digest
        except ModelNotFound:
            current = None
        if current != model.digest:
            raise NotRemoved(root, f"{model.name} was replaced or removed meanwhile")


class _Comparison:
    """Compares files of a drop with what the store holds of them."""

    def __init__(self, store: Store, stop: threading.Event, report: Callable[[int, int], None], total: int) -> None:
        self._store = store
        self._stop = stop
        self._report = report
        self._done = 0
        self._total = total
        self._shards: dict[Path, dict[str, list[_Piece]]] = {}

    def pieces(self, model: StoredManifest, layer: Layer) -> list[_Piece]:
        """What the file of `layer` consists of, after the length of its header if it is a shard."""
        if layer.media_type != HEADER_TYPE:
            return [_Piece(layer, 0, layer.size)]
        if model.path not in self._shards:
            self._shards[model.path] = _shards(self._store, model)
        return self._shards[model.path][layer.name]

    def compare(self, file: SourceFile, pieces: Sequence[_Piece]) -> None:
        with source.opened(file) as fd:
            offset = file.size - sum(piece.length for piece in pieces)
            if offset not in (0, 8):
                raise NotRemoved(file.host, "the store holds another length of it")
            if offset and os.pread(fd, 8, 0) != pieces[0].length.to_bytes(8, "little"):
                raise NotRemoved(file.host, "the store holds another header of it")
            for piece in pieces:
                self._compare_piece(file, fd, offset, piece)
                offset += piece.length

    def _compare_piece(self, file: SourceFile, fd: int, offset: int, piece: _Piece) -> None:
        digest = piece.layer.digest
        blob = self._store.blobs.open(digest, piece.layer.size)
        try:
            # What comes back shall come from the disk, not from what was just written to the page cache.
            os.posix_fadvise(blob, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(blob, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            if piece.offset is None:
                self._check_digest(file, blob, digest)
                self._advance(piece.length)
                return
            for begin in range(0, piece.length, _CHUNK):
                if self._stop.is_set():
                    raise Interrupted(str(file.host))
                length = min(_CHUNK, piece.length - begin)
                ours = os.pread(blob, length, piece.offset + begin)
                if len(ours) != length or os.pread(fd, length, offset + begin) != ours:
                    raise NotRemoved(file.host, f"{self._store.blobs.path(digest)} differs from it; {_ADVICE}")
                self._advance(length)
        finally:
            os.close(blob)

    def _check_digest(self, file: SourceFile, blob: int, digest: Digest) -> None:
        sha, position = hashlib.sha256(), 0
        while data := os.pread(blob, _CHUNK, position):
            if self._stop.is_set():
                raise Interrupted(str(file.host))
            sha.update(data)
            position += len(data)
        if sha.hexdigest() != digest.hex:
            raise NotRemoved(file.host, f"{self._store.blobs.path(digest)} is corrupt; {_ADVICE}")

    def _advance(self, count: int) -> None:
        self._done += count
        self._report(self._done, self._total)


def _files(model: StoredManifest) -> dict[PurePosixPath, Layer]:
    """The files of the drop that a model holds byte for byte, each with its layer; a shard with its header's."""
    return {
        PurePosixPath(layer.name): layer
        for layer in model.manifest.layers
        if layer.media_type in (FILE_TYPE, HEADER_TYPE)
        # Upstream's normalized model_index.json is not what was dropped; the original is a file of its own.
        or (layer.media_type == JSON_TYPE and layer.name != MODEL_INDEX)
    }


def _shards(store: Store, model: StoredManifest) -> dict[str, list[_Piece]]:
    """The pieces of each shard: its header, its tensors by offset."""
    tensors: dict[str, deque[Layer]] = defaultdict(deque)
    for layer in model.manifest.of_type(TENSOR_TYPE):
        tensors[layer.name].append(layer)
    qtype = QUANT_TYPES[model.manifest.quantization] if model.manifest.quantization else None
    shards = {}
    for header in model.manifest.of_type(HEADER_TYPE):
        layout = parse_header(store.blobs.read(header.digest, header.size), store.blobs.path(header.digest))
        # Of tensors with one name, the layers stand in the order of the shards.
        layers = [(entry, tensors[f"{header.folder}/{entry.name}"].popleft()) for entry in layout.tensors]
        shards[header.name] = [
            _Piece(header, 0, header.size),
            *(_Piece(layer, _offset(header.folder, entry, layer, qtype), entry.nbytes) for entry, layer in layers),
        ]
    return shards


def _offset(component: str, entry: TensorEntry, layer: Layer, qtype: QuantType | None) -> int | None:
    layout = stored_layout(component, entry, layer.size, qtype)
    return len(layout) if isinstance(layout, bytes) else None


def _remove(root: Path, files: Sequence[SourceFile], beneath: Path) -> set[PurePosixPath]:
    """Remove `files`, and the folders that this leaves empty. A folder that became a symlink is not followed.

    Returns:
        What was removed, or was gone already.
    """
    removed = set()
    top = source.open_root(root, beneath)
    try:
        for file in files:
            try:
                with _opened_folder(top, file.path.parent.parts) as folder:
                    status = os.stat(file.path.name, dir_fd=folder, follow_symlinks=False)
                    # A symlink within the folder holds nothing; what it leads to is a file of its own. The ctime of a
                    # hard link is another as soon as the first of them is removed.
                    if not stat.S_ISLNK(status.st_mode) and source.identity_of(status)[:4] != file.identity[:4]:
                        raise SourceChanged(file.host)
                    os.unlink(file.path.name, dir_fd=folder)
            except FileNotFoundError:
                pass  # gone already
            except NotADirectoryError:
                continue  # reached through a symlink: it stays
            removed.add(file.path)
        # Only those that were emptied here: a `.git` has empty folders of its own, and needs them.
        emptied = {parent for path in removed for parent in path.parents if parent.parts}
        for path in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError), _opened_folder(top, path.parent.parts) as folder:
                os.rmdir(path.name, dir_fd=folder)
    finally:
        os.close(top)
    for above in (root, *root.parents):
        if above == beneath or above.name in QUANT_TYPES:
            break
        with suppress(OSError):  # not empty
            above.rmdir()
    return removed


@contextmanager
def _opened_folder(top: int, parts: Sequence[str]) -> Iterator[int]:
    folder = os.dup(top)
    try:
        for part in parts:
            below = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
            os.close(folder)
            folder = below
        yield folder
    finally:
        os.close(folder)
