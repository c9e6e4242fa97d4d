"""Models as upstream's importer leaves them in a store: its media types, and nothing of ours."""

from __future__ import annotations

from modelcask.manifests import JSON_TYPE, TENSOR_TYPE, Manifest
from modelcask.names import ModelName
from modelcask.store import Store

FIRST_COMPONENTS = ("text_encoder", "transformer", "vae")


def keep_what_upstream_writes(store: Store, name: ModelName) -> None:
    """Take from a manifest what upstream's importer does not write. `tests/data/upstream.json` is the proof."""
    manifest = store.manifests.read(name).manifest
    layers = tuple(
        layer
        for layer in manifest.layers
        if layer.media_type == JSON_TYPE
        or (layer.media_type == TENSOR_TYPE and layer.name.partition("/")[0] in FIRST_COMPONENTS)
    )
    store.manifests.write(name, Manifest(manifest.config, layers), temporary=store.root / "tmp" / "upstream")
