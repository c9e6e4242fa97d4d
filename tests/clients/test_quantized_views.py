"""Quantized models through the mount: MLX reads `mlx/`, diffusers makes one image of `sdnq/` and `diffusers/`."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .client import Client
from .conftest import Modelcask
from .odd_pipelines import ODD_PIPELINES
from .pipelines import PIPELINES, TinyPipeline
from .shards import Shard, shards

TYPES = ("int4", "int8", "nvfp4", "mxfp8")

pytestmark = [
    pytest.mark.clients,
    pytest.mark.fuse,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
    pytest.mark.parametrize("qtype", TYPES),
]
needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx") is None, reason="MLX is not installed")
needs_sdnq = pytest.mark.skipif(importlib.util.find_spec("sdnq") is None, reason="SDNQ is not installed")

_DATA = Path(__file__).resolve().parents[1] / "data"
_RECORDED: dict[str, dict[str, dict[str, Any]]] = json.loads((_DATA / "mlx.json").read_text())["tensors"]
_QUANTIZED = [PIPELINES["z-image"], PIPELINES["flux-1"], ODD_PIPELINES["z-image-odd"]]
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Mounted:
    """A store with one model as it came (`latest`) and quantized to every type, and another only as it came.

    Attributes:
        folder: what was dropped.
        root: where the store is mounted.
        name: the model's name without the tag.
    """

    folder: Path
    root: Path
    name: str

    def view(self, view: str, tag: str) -> Path:
        return self.root / view / self.name / tag


@contextmanager
def _mounted(folder: Path, name: str, work: Path, modelcask: Modelcask) -> Iterator[Mounted]:
    store, mountpoint = work / "store", work / "mount"
    mountpoint.mkdir()
    modelcask("import", folder, "--name", name, "--store", store)
    modelcask("import", folder, "--name", "plain/model", "--store", store)
    for qtype in TYPES:
        modelcask("import", folder, "--quantize", qtype, "--name", f"{name}:{qtype}", "--store", store)
    modelcask("mount", mountpoint, "--store", store)
    try:
        yield Mounted(folder, mountpoint, name)
    finally:
        modelcask("umount", mountpoint)
        assert not os.path.ismount(mountpoint)


@pytest.fixture(scope="module")
def quantizing_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client whose text encoders may be quantized by SDNQ: diffusers lets transformers know of it."""
    client = Client(tmp_path_factory.mktemp("quantizing"), DIFFUSERS_SDNQ_TRANSFORMERS="1")
    yield client
    client.close()


@pytest.fixture(scope="module", params=_QUANTIZED, ids=[pipeline.name for pipeline in _QUANTIZED])
def pipeline(request: pytest.FixtureRequest) -> TinyPipeline:
    made: TinyPipeline = request.param
    return made


@pytest.fixture(scope="module")
def mounted(
    pipeline: TinyPipeline,
    dropped: Callable[[TinyPipeline], Path],
    modelcask: Modelcask,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mounted]:
    """Each pipeline in turn, in a store of its own."""
    work = tmp_path_factory.mktemp(pipeline.name)
    with _mounted(dropped(pipeline), f"org/{pipeline.name}", work, modelcask) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def vector_model(modelcask: Modelcask, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    with _mounted(_DATA / "model", "org/vector", tmp_path_factory.mktemp("vector"), modelcask) as mounted:
        yield mounted


@needs_mlx
def test_mlx_loads_and_dequantizes_the_recorded_arrays(
    vector_model: Mounted, quantizing_client: Client, qtype: str
) -> None:
    recorded = _RECORDED[qtype]
    seen = {}
    for shard in shards(vector_model.view("mlx", qtype)):
        component = shard.path.parent.name
        config = json.loads(shard.path.with_name("config.json").read_text())
        dtypes = {name: recorded[f"{component}/{name}"]["dtype"] for name in weights_with(shard, "scales")}
        found = quantizing_client.mlx_digests(shard.path, config.get("quantization"), dtypes)
        seen |= {f"{component}/{name}": digests for name, digests in found.items()}
    expected = {
        name: {part: tensor[part] for part in ("weight", "scale", "bias", "dequantized") if part in tensor}
        for name, tensor in recorded.items()
    }
    assert seen == expected


def test_mlx_shows_what_is_not_quantized_as_it_was_dropped(vector_model: Mounted, qtype: str) -> None:
    kept = 0
    for original in shards(vector_model.folder):
        shard = Shard.read(vector_model.view("mlx", qtype) / original.path.relative_to(vector_model.folder))
        packed = weights_with(shard, "scales")
        for name in original.tensors.keys() - packed:
            kept += 1
            assert shard.content(name) == original.content(name), name
            for field in ("dtype", "shape"):
                assert shard.tensors[name][field] == original.tensors[name][field], name
    assert kept == 25 - len(_RECORDED[qtype])


@needs_sdnq
def test_packed_weights_make_the_image_that_dequantized_ones_make(
    mounted: Mounted, pipeline: TinyPipeline, quantizing_client: Client, qtype: str
) -> None:
    import torch

    image = quantizing_client.run(pipeline.name, mounted.view("sdnq", qtype))
    dequantized = quantizing_client.run(pipeline.name, mounted.view("diffusers", qtype))
    original = quantizing_client.run(pipeline.name, mounted.view("diffusers", "latest"))
    assert torch.isfinite(dequantized).all()
    assert dequantized.std() > 0.05, "an image of one colour would hide a difference"
    assert not torch.equal(dequantized, original), "quantization leaves a trace"
    difference = (image.float() - dequantized.float()).abs().max().item()
    assert difference == 0
    assert image.dtype == dequantized.dtype


def test_every_component_but_the_autoencoder_is_packed(mounted: Mounted, qtype: str) -> None:
    for view, scale, field in (("sdnq", "scale", "quantization_config"), ("mlx", "scales", "quantization")):
        folder = mounted.view(view, qtype)
        packed = {shard.path.parent.name for shard in shards(folder) if weights_with(shard, scale)}
        assert packed == {shard.path.parent.name for shard in shards(mounted.folder)} - {"vae"}
        configs = [path for path in folder.glob("*/config.json") if field in json.loads(path.read_text())]
        assert {path.parent.name for path in configs} == packed


def test_both_packed_views_hold_the_same_bytes(mounted: Mounted, qtype: str) -> None:
    names = (("weight", "weight"), ("scale", "scales"), ("zero_point", "biases"))
    for sdnq in shards(mounted.view("sdnq", qtype)):
        mlx = Shard.read(mounted.view("mlx", qtype) / sdnq.path.relative_to(mounted.view("sdnq", qtype)))
        for weight in weights_with(sdnq, "scale"):
            stem = weight.removesuffix("weight")
            assert (stem + "zero_point" in sdnq.tensors) == qtype.startswith("int")
            for ours, theirs in names:
                if stem + ours in sdnq.tensors:
                    assert sdnq.content(stem + ours) == mlx.content(stem + theirs), stem + ours


@pytest.mark.parametrize("view", ["diffusers", "mlx", "sdnq"])
def test_safetensors_reads_every_shard(mounted: Mounted, quantizing_client: Client, view: str, qtype: str) -> None:
    folder = mounted.view(view, qtype)
    files = {shard.path.relative_to(folder) for shard in shards(folder)}
    assert files == {shard.path.relative_to(mounted.folder) for shard in shards(mounted.folder)}
    for shard in shards(folder):
        shapes = {name: tensor["shape"] for name, tensor in shard.tensors.items()}
        assert quantizing_client.shapes(shard.path) == shapes
        assert shard.gaps() == []
        if view == "diffusers":
            assert shard.data_start == Shard.read(mounted.folder / shard.path.relative_to(folder)).data_start
        else:
            assert shard.metadata == {"format": "mlx" if view == "mlx" else "pt"}
            assert shard.data_start % _PAGE == 0


@pytest.mark.parametrize("view", ["diffusers", "mlx", "sdnq"])
def test_indexes_name_the_shard_of_every_tensor(mounted: Mounted, view: str, qtype: str) -> None:
    indexes = list(mounted.view(view, qtype).glob("*/*.safetensors.index.json"))
    assert indexes
    for index in indexes:
        held = {name: shard.path.name for shard in shards(index.parent) for name in shard.tensors}
        assert json.loads(index.read_text())["weight_map"] == held


def test_packed_views_list_quantized_models_only(mounted: Mounted, qtype: str) -> None:
    for view in ("mlx", "sdnq"):
        assert sorted(path.name for path in (mounted.root / view / mounted.name).iterdir()) == sorted(TYPES)
        assert mounted.view(view, qtype).is_dir()
        assert [path.name for path in (mounted.root / view).iterdir()] == ["org"]
        assert not mounted.view(view, "latest").exists()
        assert not (mounted.root / view / "plain" / "model" / "latest").exists()
    assert (mounted.root / "diffusers" / "plain" / "model" / "latest" / "model_index.json").is_file()


def weights_with(shard: Shard, sibling: str) -> set[str]:
    """The weights that have scales beside them, called `sibling`."""
    stems = {name.removesuffix(sibling) for name in shard.tensors if name.endswith("." + sibling)}
    return {stem + "weight" for stem in stems if stem + "weight" in shard.tensors}
