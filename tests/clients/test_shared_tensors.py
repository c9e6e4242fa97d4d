"""Two models with the same text encoder and autoencoder, in other shards, share those tensors."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Modelcask
from .pipelines import PAIR, TinyPipeline
from .stored_tensors import tensor_blobs, tensor_count

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]

TENSOR = "application/vnd.ollama.image.tensor"


class Pair:
    """The two models in one store, and what the store says after each import."""

    def __init__(self, folders: list[Path], store: Path, modelcask: Modelcask) -> None:
        self.folders = folders
        self.store = store
        self.entries: list[dict[str, Any]] = []
        self.usage: list[dict[str, Any]] = []
        for pipeline, folder in zip(PAIR, folders, strict=True):
            report = modelcask("import", folder, "--name", f"org/{pipeline.name}", "--store", store, "--json")
            (entry,) = json.loads(report)
            self.entries.append(entry)
            self.usage.append(json.loads(modelcask("df", "--store", store, "--json")))

    def tensors(self, which: int) -> dict[str, int]:
        return tensor_blobs(self.folders[which].rglob("*.safetensors"))

    def others(self, which: int) -> dict[str, int]:
        """The blobs of a model that are not tensors, as its manifest names them."""
        path = self.store / "manifests" / "registry.ollama.ai" / "org" / PAIR[which].name / "latest"
        manifest = json.loads(path.read_bytes())
        layers = [*manifest["layers"], manifest["config"]]
        return {
            layer["digest"].removeprefix("sha256:"): layer["size"] for layer in layers if layer["mediaType"] != TENSOR
        }

    def blobs(self, which: int) -> dict[str, int]:
        return self.tensors(which) | self.others(which)


@pytest.fixture(scope="module")
def pair(
    dropped: Callable[[TinyPipeline], Path], modelcask: Modelcask, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    folders = [dropped(pipeline) for pipeline in PAIR]
    return Pair(folders, tmp_path_factory.mktemp("pair") / "store", modelcask)


def test_the_pair_shares_two_components_in_other_shards(dropped: Callable[[TinyPipeline], Path]) -> None:
    first, second = (dropped(pipeline) for pipeline in PAIR)
    for component in ("text_encoder", "vae"):
        shards = [sorted((folder / component).glob("*.safetensors")) for folder in (first, second)]
        assert len(shards[0]) != len(shards[1])
        assert tensor_blobs(shards[0]) == tensor_blobs(shards[1])
    transformers = [tensor_blobs((folder / "transformer").glob("*.safetensors")) for folder in (first, second)]
    assert not transformers[0].keys() & transformers[1].keys()


def test_each_distinct_tensor_is_one_blob_under_its_digest(pair: Pair) -> None:
    tensors = pair.tensors(0) | pair.tensors(1)
    stored = {path.name.removeprefix("sha256-"): path.stat().st_size for path in blob_files(pair.store)}
    assert tensors.items() <= stored.items()
    assert stored == pair.blobs(0) | pair.blobs(1)


def test_manifest_names_every_tensor(pair: Pair) -> None:
    for folder, entry in zip(pair.folders, pair.entries, strict=True):
        assert entry["tensors"] == tensor_count(folder.rglob("*.safetensors"))


def test_stored_bytes_count_what_is_shared_once(pair: Pair) -> None:
    expected = sum((pair.blobs(0) | pair.blobs(1)).values())
    assert pair.usage[1]["stored_bytes"] == expected
    assert sum(path.stat().st_size for path in blob_files(pair.store)) == expected
    assert pair.usage[1]["reclaimable_bytes"] == 0


def test_second_import_writes_only_what_the_first_did_not(pair: Pair) -> None:
    new = pair.blobs(1).keys() - pair.blobs(0).keys()
    assert pair.entries[1]["new_blobs"] == len(new)
    assert pair.entries[1]["new_bytes"] == sum(pair.blobs(1)[digest] for digest in new)
    growth = pair.usage[1]["stored_bytes"] - pair.usage[0]["stored_bytes"]
    assert pair.entries[1]["new_bytes"] == growth


def test_df_splits_each_model_into_its_own_and_shared_bytes(pair: Pair) -> None:
    common = pair.blobs(0).keys() & pair.blobs(1).keys()
    models = {model["name"]: model for model in pair.usage[1]["models"]}
    for which, pipeline in enumerate(PAIR):
        blobs = pair.blobs(which)
        model = models[f"org/{pipeline.name}:latest"]
        assert model["bytes"] == sum(blobs.values())
        assert model["shared_bytes"] == sum(blobs[digest] for digest in common)
        assert model["unique_bytes"] == model["bytes"] - model["shared_bytes"]
    assert pair.usage[1]["logical_bytes"] == sum(model["bytes"] for model in models.values())


def blob_files(store: Path) -> list[Path]:
    return list((store / "blobs").iterdir())
