"""What the views make of models that upstream's importer stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import deserialize

from folders import write_model
from modelcask.digest import Digest
from modelcask.errors import InvalidManifest
from modelcask.manifests import MODEL_INDEX, TENSOR_TYPE, Manifest
from modelcask.names import ModelName
from modelcask.safetensors_layout import TensorEntry, encode_header
from modelcask.store import Store
from modelcaskfs.views import Tree
from running import import_folder
from trees import content, find, names, walk
from upstream_models import keep_what_upstream_writes

NAME = ModelName.parse("m")


def shard(store: Store, path: str) -> dict[str, dict[str, object]]:
    node = find(Tree(store), f"diffusers/library/m/latest/{path}")
    assert node is not None
    return dict(deserialize(content(store, node)))


def test_the_manifest_is_upstreams(store: Store, vector_model: Path) -> None:
    import_folder(store, vector_model, name="m")
    keep_what_upstream_writes(store, NAME)
    recorded = json.loads((vector_model.parent / "upstream.json").read_text())["layers"]
    layers = [layer.to_json() for layer in store.manifests.read(NAME).manifest.layers]
    assert layers == recorded


def test_each_component_has_one_shard_under_the_name_its_library_looks_for(store: Store, vector_model: Path) -> None:
    import_folder(store, vector_model, name="m")
    whole = {
        component: {
            name: tensor
            for path in sorted((vector_model / component).glob("*.safetensors"))
            for name, tensor in deserialize(path.read_bytes())
        }
        for component in ("text_encoder", "transformer", "vae")
    }
    keep_what_upstream_writes(store, NAME)
    assert shard(store, "text_encoder/model.safetensors") == whole["text_encoder"]
    for component in ("transformer", "vae"):
        assert shard(store, f"{component}/diffusion_pytorch_model.safetensors") == whole[component]
    node = find(Tree(store), "diffusers/library/m/latest/vae/diffusion_pytorch_model.safetensors")
    assert node is not None
    data = content(store, node)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    assert (8 + int.from_bytes(data[:8], "little")) % 4096 == 0


def test_the_index_names_the_pipeline_again(store: Store, vector_model: Path) -> None:
    import_folder(store, vector_model, name="m")
    keep_what_upstream_writes(store, NAME)
    node = find(Tree(store), "diffusers/library/m/latest/model_index.json")
    assert node is not None
    dropped = json.loads((vector_model / "model_index.json").read_text())
    dropped.pop("_diffusers_version")
    assert json.loads(content(store, node)) == dropped


def test_a_model_of_ours_gets_nothing_made_up(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", shards=2)
    import_folder(store, folder)
    shown = walk(find(Tree(store), "diffusers/library/m/latest"))  # type: ignore[arg-type]
    assert {str(path) for path in shown} == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_blob_that_holds_several_tensors_is_told_and_not_shown_as_another(store: Store, tmp_path: Path) -> None:
    import_folder(store, write_model(tmp_path / "m"))
    keep_what_upstream_writes(store, NAME)
    manifest = store.manifests.read(NAME).manifest
    entries = [
        TensorEntry(name, "U8", (4,), 4 * number, 4 * number + 4) for number, name in enumerate(("w", "w.scale"))
    ]
    blob = encode_header(entries) + bytes(8)
    digest = Digest.of(blob)
    with store.ingestion() as ingestion:
        ingestion.put(blob, digest)
        ingestion.flush()
    layers = [
        replace(layer, digest=digest, size=len(blob))
        if layer.media_type == TENSOR_TYPE and layer.name.startswith("vae/")
        else layer
        for layer in manifest.layers
    ]
    store.manifests.write(NAME, Manifest(manifest.config, tuple(layers)), temporary=store.root / "tmp" / "x")
    tree = Tree(store)
    assert "vae" in names(tree, "diffusers/library/m/latest")
    with pytest.raises(InvalidManifest, match="only upstream's programs read"):
        find(tree, "diffusers/library/m/latest/vae/diffusion_pytorch_model.safetensors")
    assert find(tree, "diffusers/library/m/latest/transformer/diffusion_pytorch_model.safetensors") is not None


def test_a_component_that_is_no_name_in_a_folder_is_refused(store: Store, tmp_path: Path) -> None:
    import_folder(store, write_model(tmp_path / "m"))
    keep_what_upstream_writes(store, NAME)
    manifest = store.manifests.read(NAME).manifest
    layers = [
        replace(layer, name=layer.name.replace("vae/", "../")) if layer.media_type == TENSOR_TYPE else layer
        for layer in manifest.layers
    ]
    store.manifests.write(NAME, Manifest(manifest.config, tuple(layers)), temporary=store.root / "tmp" / "x")
    with pytest.raises(InvalidManifest, match="no path in a folder"):
        find(Tree(store), "diffusers/library/m/latest")


def test_an_index_that_names_no_library_gets_the_usual_ones(store: Store, tmp_path: Path) -> None:
    import_folder(store, write_model(tmp_path / "m"))
    keep_what_upstream_writes(store, NAME)
    manifest = store.manifests.read(NAME).manifest
    index = json.dumps({"vae": [["diffusers"], "X"], "text_encoder": [{}, "X"]}).encode()
    digest = Digest.of(index)
    with store.ingestion() as ingestion:
        ingestion.put(index, digest)
        ingestion.flush()
    layers = [
        replace(layer, digest=digest, size=len(index)) if layer.name == MODEL_INDEX else layer
        for layer in manifest.layers
    ]
    store.manifests.write(NAME, Manifest(manifest.config, tuple(layers)), temporary=store.root / "tmp" / "x")
    tree = Tree(store)
    assert "diffusion_pytorch_model.safetensors" in names(tree, "diffusers/library/m/latest/vae")
    assert "model.safetensors" in names(tree, "diffusers/library/m/latest/text_encoder")
