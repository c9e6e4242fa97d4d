"""diffusers loads tiny pipelines of every family from the mount as from the folder that was dropped."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .client import Client
from .conftest import Shown
from .pipelines import PIPELINES, TinyPipeline

pytestmark = [
    pytest.mark.clients,
    pytest.mark.fuse,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]

LOADS: dict[str, dict[str, Any]] = {"mapped": {}, "read": {"disable_mmap": True}}


def tags(pipeline: TinyPipeline) -> list[str]:
    return ["latest", *pipeline.variants]


def variant_argument(tag: str) -> dict[str, str]:
    return {} if tag == "latest" else {"variant": tag}


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def files_of_tag(pipeline: TinyPipeline, folder: Path, tag: str) -> set[str]:
    """What a tag should show of a dropped folder, judged by file names only."""
    shown = set()
    for path in files_in(folder) - pipeline.strays.keys():
        variant = weights_variant(path)
        component = path.partition("/")[0]
        if variant is None or variant == tag_of_component(pipeline, component, tag):
            shown.add(path)
    return shown


def weights_variant(path: str) -> str | None:
    """`latest` or the variant, for weights and their indexes; None for every other file."""
    weights = re.search(r"/[a-z_]+(\.(?P<a>\w+))?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.(?P<b>\w+))?\.json)?$", path)
    return None if weights is None else weights["a"] or weights["b"] or "latest"


def tag_of_component(pipeline: TinyPipeline, component: str, tag: str) -> str:
    """Whose weights a tag shows in a component: its own, or the default ones where the variant has none."""
    if tag != "latest" and pipeline.variants[tag].only not in (None, component):
        return "latest"
    return tag


@pytest.fixture(scope="session")
def original(client: Client, dropped: Callable[[TinyPipeline], Path]) -> Callable[[TinyPipeline, str], Any]:
    """The image made by loading the dropped folder itself, once for each tag."""
    images: dict[tuple[str, str], Any] = {}

    def image(pipeline: TinyPipeline, tag: str) -> Any:
        key = (pipeline.name, tag)
        if key not in images:
            images[key] = client.run(pipeline.name, dropped(pipeline), **variant_argument(tag))
        return images[key]

    return image


def test_import_makes_a_tag_for_the_default_weights_and_one_for_each_variant(shown: Shown) -> None:
    assert sorted(shown.entries) == sorted(tags(shown.pipeline))
    assert sorted(path.name for path in shown.models.iterdir()) == sorted(tags(shown.pipeline))


def test_import_reports_every_file_it_left_out_with_a_reason(shown: Shown) -> None:
    for tag, entry in shown.entries.items():
        reasons = {skipped["path"]: skipped["reason"] for skipped in entry["skipped"]}
        assert shown.pipeline.strays.keys() <= reasons.keys()
        assert all(reasons.values())
        # Beyond the strays, only weights of another tag may be named.
        assert not reasons.keys() & files_of_tag(shown.pipeline, shown.folder, tag)


def test_every_mounted_file_equals_the_dropped_one(shown: Shown) -> None:
    for tag in tags(shown.pipeline):
        mounted = shown.models / tag
        assert files_in(mounted) == files_of_tag(shown.pipeline, shown.folder, tag)
        for path in files_in(mounted):
            assert (mounted / path).read_bytes() == (shown.folder / path).read_bytes(), f"{tag}: {path}"


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_image_from_the_mount_equals_the_original(
    shown: Shown,
    client: Client,
    original: Callable[[TinyPipeline, str], Any],
    load: dict[str, Any],
) -> None:
    for tag in tags(shown.pipeline):
        arguments = {**variant_argument(tag), **load}
        image = client.run(shown.pipeline.name, shown.models / tag, **arguments)
        assert_equal(image, original(shown.pipeline, tag))


def test_image_from_the_mount_with_parallel_loading_equals_the_original(
    shown: Shown, parallel_client: Client, original: Callable[[TinyPipeline, str], Any]
) -> None:
    for tag in tags(shown.pipeline):
        image = parallel_client.run(shown.pipeline.name, shown.models / tag, **variant_argument(tag))
        assert_equal(image, original(shown.pipeline, tag))


@pytest.mark.parametrize(
    ("pipeline", "tag"),
    [(pipeline, tag) for pipeline in PIPELINES.values() for tag in pipeline.variants],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_variant_makes_another_image_than_the_default_weights(
    pipeline: TinyPipeline, tag: str, original: Callable[[TinyPipeline, str], Any]
) -> None:
    import torch

    assert not torch.equal(original(pipeline, tag), original(pipeline, "latest"))


def assert_equal(image: Any, expected: Any) -> None:
    import torch

    assert image.dtype == expected.dtype
    assert torch.isfinite(expected).all()
    assert expected.std() > 0.05, "an image of one colour would hide a difference"
    assert torch.equal(image, expected)
