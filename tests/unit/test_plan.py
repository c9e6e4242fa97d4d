import json
import os
from pathlib import Path

import pytest

from folders import tensor, write_component, write_model
from modelcask import source
from modelcask.errors import InvalidModelFolder
from modelcask.plan import ImportPlan, component_classes, plan_import


def planned(folder: Path, **options: str) -> ImportPlan:
    return plan_import(source.look(folder), **options)


def left_out(plan: ImportPlan) -> dict[str, str]:
    return {entry.path: entry.reason for entry in plan.models[0].left_out}


def test_what_is_left_out_is_listed_with_its_reason(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for name in (
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.onnx",
        "vae/x.safetensors.part",
        "big.safetensors",
    ):
        (folder / name).write_bytes(b"x")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    (folder / ".cache/huggingface").mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    reasons = left_out(planned(folder))
    assert sorted(reasons) == [
        ".cache/",
        ".git/",
        "big.safetensors",
        "pipe",
        "text_encoder/model.onnx",
        "vae/diffusion_pytorch_model.bin",
        "vae/x.safetensors.part",
    ]
    assert reasons["vae/diffusion_pytorch_model.bin"] == "weights in another format than safetensors (.bin)"


def test_components_come_in_upstreams_order_then_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for component in ("unet", "controlnet_1", "text_encoder_2"):
        write_component(folder / component, [{"w": tensor(component, 4)}], stem="model")
    plan = planned(folder)
    components = list(dict.fromkeys(shard.component for shard in plan.models[0].shards))
    assert components == ["text_encoder", "transformer", "vae", "controlnet_1", "text_encoder_2", "unet"]


@pytest.mark.parametrize("style", ["new", "old"])
def test_both_ways_of_naming_sharded_variants_are_known(tmp_path: Path, style: str) -> None:
    folder = write_model(tmp_path / "m", shards=2, variants=["fp16"])
    transformer = folder / "transformer"
    if style == "old":
        for path in list(transformer.glob("*.fp16-*")):
            part = path.name.removesuffix(".safetensors").rpartition(".fp16")[2]
            path.rename(transformer / f"diffusion_pytorch_model{part}.fp16.safetensors")
        index = transformer / "diffusion_pytorch_model.safetensors.index.fp16.json"
        weights = json.loads(index.read_text())
        weights["weight_map"] = {
            tensor: name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
            for tensor, name in weights["weight_map"].items()
        }
        index.unlink()
        (transformer / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(json.dumps(weights))
    plan = planned(folder)
    assert [model.name.tag for model in plan.models] == ["latest", "fp16"]
    half = {file.path.name for file in plan.models[1].files if file.path.parts[0] == "transformer"}
    assert half == {"config.json", *(p.name for p in transformer.glob("*fp16*.json"))}
    assert all("fp16" not in file.path.name for file in plan.models[0].files)


def test_a_folder_of_one_variant_only_becomes_that_tag(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for component in ("text_encoder", "transformer", "vae"):
        for path in (folder / component).glob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))
    assert [model.name.tag for model in planned(folder).models] == ["fp16"]


def test_default_weights_that_cannot_be_complete_are_left_out(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", variants=["fp16"])
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_suffix(".fp16.safetensors"))
    plan = planned(folder)
    assert [model.name.tag for model in plan.models] == ["fp16"]
    assert list(left_out(plan)) == ["transformer/diffusion_pytorch_model.safetensors"]


def test_a_chosen_variant_is_imported_alone(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", variants=["fp16", "ema"])
    plan = planned(folder, variant="ema", name="org/m")
    assert [str(model.name) for model in plan.models] == ["org/m:ema"]
    assert sorted(left_out(plan)) == [
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    ]


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", variants=["fp16"])
    with pytest.raises(InvalidModelFolder, match="'bf16'; it has fp16"):
        planned(folder, variant="bf16")


def test_a_tag_that_is_given_goes_before_the_variants(tmp_path: Path) -> None:
    plan = planned(write_model(tmp_path / "m", variants=["fp16"]), name="m:v2")
    assert [model.name.tag for model in plan.models] == ["v2", "v2-fp16"]


def test_null_components_options_and_notes_are_no_components() -> None:
    index = {
        "_class_name": "X",
        "safety_checker": [None, None],
        "requires_safety_checker": True,
        "note": "x",
        "_x": ["a", "b"],
        "controlnet": [["diffusers", "ControlNetModel"], ["diffusers", "ControlNetModel"]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    assert component_classes(index) == {"controlnet": "ControlNetModel", "vae": "AutoencoderKL"}


def test_a_symlink_that_leads_out_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (folder / "vae" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidModelFolder, match=r"notes\.txt: is a symlink that leads out"):
        planned(folder)


def test_a_symlink_to_blobs_beside_a_folder_that_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a" / "b" / "m")
    (tmp_path / "a" / "blobs").mkdir()
    (tmp_path / "a" / "blobs" / "x").write_text("x")
    (folder / "x").symlink_to("../../blobs/x")
    with pytest.raises(InvalidModelFolder, match="leads out"):
        planned(folder)


def test_a_symlink_within_the_folder_is_followed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "LICENSE").symlink_to("README.md")
    (folder / "text_encoder_2").symlink_to("text_encoder")
    plan = planned(folder)
    assert "LICENSE" in {str(file.path) for file in plan.models[0].files}
    assert "text_encoder_2" in {shard.component for shard in plan.models[0].shards}


def test_a_loop_of_symlinks_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "loop").symlink_to(".")
    with pytest.raises(InvalidModelFolder, match="loop"):
        planned(folder)
