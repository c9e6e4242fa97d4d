"""What models take, alone and together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from modelcask.digest import Digest
from modelcask.gc import find_garbage
from modelcask.manifests import StoredManifest
from modelcask.names import ModelName
from modelcask.store import Store


@dataclass(frozen=True, slots=True)
class ModelUsage:
    """Bytes of a model's distinct blobs; `unique_bytes` are those no other model reaches."""

    name: ModelName
    size: int
    unique_bytes: int

    @property
    def shared_bytes(self) -> int:
        return self.size - self.unique_bytes


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of a store.

    Attributes:
        logical_bytes: what the models would take if each were stored alone.
        stored_bytes: sizes of all blobs.
        reclaimable_bytes: what gc would free.
    """

    logical_bytes: int
    stored_bytes: int
    reclaimable_bytes: int
    models: tuple[ModelUsage, ...]


def measure(store: Store) -> Usage:
    """The usage of `store` now. Raises InvalidManifest where a manifest cannot be read."""
    manifests = []
    for path in store.manifests.files():
        try:
            manifests.append(store.manifests.read_path(path))
        except FileNotFoundError:
            continue  # removed meanwhile
    users = Counter(digest for stored in manifests for digest in stored.manifest.blobs())
    models = tuple(_usage(stored, users) for stored in manifests if stored.manifest.is_image_model)
    stored_bytes = sum(size for _, size in store.blobs.enumerate())
    return Usage(sum(model.size for model in models), stored_bytes, find_garbage(store).size, models)


def _usage(stored: StoredManifest, users: Counter[Digest]) -> ModelUsage:
    blobs = stored.manifest.blobs()
    return ModelUsage(
        stored.name, sum(blobs.values()), sum(size for digest, size in blobs.items() if users[digest] == 1)
    )
