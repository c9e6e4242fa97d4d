"""The store: one folder that holds blobs, manifests, leases and the index.

It is a valid `OLLAMA_MODELS` folder; one that Ollama made can be used as it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from modelcask import durable, leases
from modelcask.blobs import BlobStore, Ingestion
from modelcask.errors import IndexFailed, InvalidManifest, InvalidStore
from modelcask.index import Index
from modelcask.leases import Lease
from modelcask.manifests import ManifestStore, StoredManifest
from modelcask.safetensors_layout import strict_json

FORMAT_VERSION = 1

_FOLDERS = ("blobs", "manifests", "tmp", "quarantine", "leases")


class Store:
    """A store's folder. Build it with `open` or `create`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = BlobStore(root / "blobs")
        self.manifests = ManifestStore(root / "manifests")
        self.leases = root / "leases"
        self.quarantine = root / "quarantine"

    @classmethod
    def open(cls, root: Path) -> Store:
        """The store at `root` for reading; a folder that is not there is an empty store.

        Raises:
            InvalidStore: something else lies at `root`, or a store of a newer version.
        """
        root = Path(os.path.realpath(root))
        if root.exists():
            _check(root)
        return cls(root)

    @classmethod
    def create(cls, root: Path) -> Store:
        """The store at `root` for writing; what is missing of it is made.

        Raises:
            InvalidStore: something else lies at `root`, or a store of a newer version.
            OSError: `root` cannot be written.
        """
        store = cls.open(root)
        for name in _FOLDERS:
            durable.make_directory(store.root / name)
        version = store.root / "store.json"
        if not version.exists():
            data = json.dumps({"format": "modelcask", "version": FORMAT_VERSION}).encode() + b"\n"
            temporary = store.root / "tmp" / f"store.json-{durable.unique_suffix()}"
            durable.write_file(version, data, temporary=temporary, mode=0o644)
        return store

    @cached_property
    def index(self) -> Index:
        """The index, opened at first use; the store must exist."""
        return Index(self.root / "index.sqlite")

    def index_for_looking(self) -> Index | None:
        """The index, opened without the wish to write; None where there is none."""
        return Index(self.root / "index.sqlite", read_only=True) if self.has_index else None

    @property
    def has_index(self) -> bool:
        return (self.root / "index.sqlite").exists()

    def check_as_imported(self, manifests: Iterable[StoredManifest]) -> list[InvalidManifest]:
        """Which of `manifests` are damaged although they can be read: their bytes are not those that were imported.

        A file that was written since its last import may be another program's work, or a pull; only one that was
        not and differs all the same has rotted. What the index has lost is not known.
        """
        try:
            index = self.index_for_looking()
            if index is None:
                return []
            try:
                imported = index.imported()
            finally:
                index.close()
        except IndexFailed:
            return []
        damaged = []
        for stored in manifests:
            known = imported.get(str(stored.name), {})
            if stored.digest not in known and any(stored.mtime_ns <= when * 1e9 for when in known.values()):
                damaged.append(InvalidManifest(stored.path, "its bytes are not those that were imported"))
        return damaged

    @contextmanager
    def ingestion(self) -> Iterator[Ingestion]:
        """An ingestion under a lease of its own; both end with the body.

        Temporary files of the body, and those that dead processes left, are gone afterwards.
        """
        with Lease(self.leases, "import") as lease:
            self.remove_abandoned_files()
            temporary = self.root / "tmp" / lease.name
            temporary.mkdir()
            temporary.chmod(0o700)
            ingestion = Ingestion(self.blobs, temporary, lease)
            try:
                yield ingestion
            finally:
                ingestion.close()

    def remove_abandoned_files(self) -> None:
        """Remove temporary files whose writer no longer lives."""
        with leases.exclusive_gate(self.leases):
            leases.remove_dead(self.leases)
            living = leases.live(self.leases)
            abandoned = [path for path in (self.root / "tmp").iterdir() if path.name not in living]
        # Outside the gate: it may be gigabytes, and no writer will ever have one of these names again.
        for path in abandoned:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _check(root: Path) -> None:
    if not root.is_dir():
        raise InvalidStore(root, "is not a folder", "give another --store")
    try:
        fields = strict_json((root / "store.json").read_bytes())
        version = fields.get("version")
    except FileNotFoundError:
        if any(root.iterdir()) and not (root / "blobs").is_dir() and not (root / "manifests").is_dir():
            raise InvalidStore(
                root, "is no store and holds other files", "give --store an empty or a new folder"
            ) from None
        return
    except ValueError as error:
        raise InvalidStore(
            root / "store.json", f"cannot be read: {error}", "restore it, or remove it if it is torn"
        ) from None
    if fields.get("format") != "modelcask":
        raise InvalidStore(root / "store.json", f"is of the format {fields.get('format')}", "give another --store")
    if type(version) is not int or version < 1:
        raise InvalidStore(
            root / "store.json", f"is of version {version}, which no modelcask made", "restore it, or remove it"
        )
    if version > FORMAT_VERSION:
        raise InvalidStore(
            root,
            f"is a store of version {version}, this modelcask knows versions up to {FORMAT_VERSION}",
            "use a newer modelcask",
        )
