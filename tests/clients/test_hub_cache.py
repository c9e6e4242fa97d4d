"""Hugging Face's own libraries find models by name in `hub/`, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modelcask.names import ModelName
from modelcask.store import Store
from upstream_models import keep_what_upstream_writes

from .client import Client
from .conftest import Modelcask
from .pipelines import PIPELINES, TinyPipeline

pytestmark = [
    pytest.mark.clients,
    pytest.mark.fuse,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]

PIPELINE = PIPELINES["z-image"]


@dataclass(frozen=True, slots=True)
class Hub:
    """A store with z-image as `org/z-image`, tags latest and int8, and as `library/alone:int8`, mounted."""

    folder: Path
    mountpoint: Path
    snapshot: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_HUB_CACHE": str(self.mountpoint / "hub"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def hub(
    dropped: Callable[[TinyPipeline], Path], modelcask: Modelcask, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hub]:
    work = tmp_path_factory.mktemp("hub")
    store, mountpoint, folder = work / "store", work / "mount", dropped(PIPELINE)
    mountpoint.mkdir()
    for arguments in (
        ("--name", "org/z-image"),
        ("--name", "org/z-image:int8", "--quantize", "int8"),
        ("--name", "alone:int8", "--quantize", "int8"),
    ):
        modelcask("import", folder, *arguments, "--store", store)
    modelcask("mount", mountpoint, "--store", store)
    try:
        snapshot = modelcask("path", "org/z-image", "--view", "hub", "--store", store).strip()
        yield Hub(folder, mountpoint, Path(snapshot))
    finally:
        modelcask("umount", mountpoint)


@pytest.fixture(scope="module")
def hub_client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(tmp_path_factory.mktemp("hub_client"), **hub.environment)
    yield client
    client.close()


def evaluated(hub: Hub, code: str) -> Any:
    """What `code` prints, as JSON, in a process of its own that looks into the mounted cache."""
    environment = {**os.environ, **hub.environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_diffusers_loads_a_model_by_its_name(hub: Hub, hub_client: Client) -> None:
    import torch

    by_name = hub_client.run(PIPELINE.name, "org/z-image")
    assert torch.isfinite(by_name).all()
    assert torch.equal(by_name, hub_client.run(PIPELINE.name, hub.folder))


def test_diffusers_loads_a_quantized_model_by_its_tag_and_one_that_is_alone_without(
    hub: Hub, hub_client: Client
) -> None:
    import torch

    expected = hub_client.run(PIPELINE.name, hub.mountpoint / "diffusers/org/z-image/int8")
    assert torch.equal(hub_client.run(PIPELINE.name, "org/z-image", revision="int8"), expected)
    for name in ("library/alone", "alone"):
        assert torch.equal(hub_client.run(PIPELINE.name, name), expected)
    assert not torch.equal(hub_client.run(PIPELINE.name, "org/z-image"), expected)


def test_transformers_loads_components_by_name(hub: Hub) -> None:
    code = """
import json
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("org/z-image", subfolder="tokenizer")
model = AutoModel.from_pretrained("org/z-image", subfolder="text_encoder", revision="int8")
print(json.dumps([len(tokenizer("a cat").input_ids) > 0, sum(p.numel() for p in model.parameters()) > 0]))
"""
    assert evaluated(hub, code) == [True, True]


def test_huggingface_hub_finds_whole_snapshots(hub: Hub) -> None:
    code = """
import json
from huggingface_hub import _CACHED_NO_EXIST, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub import try_to_load_from_cache
whole = snapshot_download("org/z-image", local_files_only=True)
print(json.dumps({
    "whole": whole,
    "int8": snapshot_download("org/z-image", revision="int8", local_files_only=True),
    "by commit": snapshot_download("org/z-image", revision=whole.rpartition("/")[2], local_files_only=True),
    "file": hf_hub_download("org/z-image", "vae/config.json"),
    "missing": try_to_load_from_cache("org/z-image", "vae/nothing.json") is _CACHED_NO_EXIST,
    "tree": {file.path: file.size for file in get_cached_repo_tree("org/z-image", revision="main")},
}))
"""
    found = evaluated(hub, code)
    assert found["whole"] == found["by commit"] == str(hub.snapshot)
    assert found["int8"] != found["whole"]
    assert found["file"] == str(hub.snapshot / "vae/config.json")
    assert found["missing"] is True
    shown = hub.mountpoint / "diffusers/org/z-image/latest"
    assert found["tree"] == {
        str(path.relative_to(shown)): path.stat().st_size for path in shown.rglob("*") if path.is_file()
    }


def test_scanning_the_cache_finds_every_model_once_and_nothing_wrong(hub: Hub) -> None:
    code = """
import json
from huggingface_hub import scan_cache_dir
info = scan_cache_dir()
repositories = {
    repo.repo_id: sorted(sorted(revision.refs) for revision in repo.revisions) for repo in info.repos
}
print(json.dumps({"repositories": repositories, "warnings": list(map(str, info.warnings))}))
"""
    assert evaluated(hub, code) == {
        "repositories": {"org/z-image": [["int8"], ["latest", "main"]], "library/alone": [["int8", "main"]]},
        "warnings": [],
    }


def test_diffusers_loads_what_upstreams_importer_stored(
    hub: Hub, hub_client: Client, modelcask: Modelcask, tmp_path: Path
) -> None:
    import torch

    store, folder = Store.create(tmp_path / "store"), tmp_path / "m"
    shutil.copytree(hub.folder, folder)
    # Where repositories have it; upstream takes this file, and none for the template alone.
    config = json.loads((folder / "tokenizer/tokenizer_config.json").read_text())
    config["chat_template"] = (folder / "tokenizer/chat_template.jinja").read_text()
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    modelcask("import", folder, "--name", "m", "--store", store.root)
    keep_what_upstream_writes(store, ModelName.parse("m"))
    (tmp_path / "mount").mkdir()
    modelcask("mount", tmp_path / "mount", "--store", store.root)
    try:
        shown = tmp_path / "mount/diffusers/library/m/latest"
        assert not (shown / "README.md").exists()
        image = hub_client.run(PIPELINE.name, shown)
        assert torch.equal(image, hub_client.run(PIPELINE.name, hub.folder))
    finally:
        modelcask("umount", tmp_path / "mount")
