"""Bad input, one fault a test: one line that says what, where and what to do; exit 1; nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from folders import raw_shard, write_model
from running import CommandLine, Done

SHARD = Path("transformer/diffusion_pytorch_model.safetensors")


def fails(cask: CommandLine, *arguments: str | Path) -> Done:
    """Run an import that must fail as all of them must, and return what it said."""
    done = cask("import", *arguments, status=1)
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("modelcask: ")
    assert done.err[:-1].isprintable()
    assert done.out == ""
    if (cask.store / "tmp").exists():
        assert list((cask.store / "tmp").iterdir()) == []
        assert [path for path in (cask.store / "manifests").rglob("*") if path.is_file()] == []
        cask("verify")
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m", shards=1)


def test_a_folder_that_does_not_exist(cask: CommandLine, tmp_path: Path) -> None:
    assert "nowhere: does not exist; give the folder" in fails(cask, tmp_path / "nowhere").err


def test_a_file_in_place_of_a_folder(cask: CommandLine, folder: Path) -> None:
    assert "README.md: is not a folder" in fails(cask, folder / "README.md").err


def test_no_model_index(cask: CommandLine, folder: Path) -> None:
    (folder / "model_index.json").unlink()
    assert f"{folder}: has no model_index.json; give the folder of a diffusers pipeline" in fails(cask, folder).err


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}', '{"a": NaN}', "\xff", ""])
def test_a_model_index_that_is_no_json(cask: CommandLine, folder: Path, text: str) -> None:
    (folder / "model_index.json").write_bytes(text.encode("latin-1"))
    assert "model_index.json: cannot be read: " in fails(cask, folder).err


def test_a_model_index_with_a_number_that_go_cannot_hold(cask: CommandLine, folder: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("false", "1e400"))
    assert "a number in it is too large" in fails(cask, folder).err


def test_a_component_folder_is_missing(cask: CommandLine, folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    said = fails(cask, folder).err
    assert "/m/vae: is missing, model_index.json names it (AutoencoderKL); complete the download" in said


@pytest.mark.parametrize("name", ["../vae", "..", "a/b"])
def test_a_component_whose_name_is_no_folders(cask: CommandLine, folder: Path, name: str) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index[name] = index.pop("vae")
    path.write_text(json.dumps(index))
    assert "which is no folder's name" in fails(cask, folder).err


def test_a_component_without_its_config(cask: CommandLine, folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").rename(folder / "scheduler" / "other.json")
    assert "/m/scheduler: holds no scheduler_config.json" in fails(cask, folder).err


def test_a_component_without_weights(cask: CommandLine, folder: Path) -> None:
    (folder / SHARD).unlink()
    assert "/m/transformer: holds no weights (*.safetensors)" in fails(cask, folder).err


def test_a_component_with_pickled_weights_only(cask: CommandLine, folder: Path) -> None:
    (folder / SHARD).rename((folder / SHARD).with_suffix(".bin"))
    said = fails(cask, folder).err
    assert "has weights in no format but transformer/diffusion_pytorch_model.bin; save the pipeline with" in said


def test_a_shard_is_missing(cask: CommandLine, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "sharded", shards=3)
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    said = fails(cask, folder).err
    assert "diffusion_pytorch_model-00002-of-00003.safetensors: is missing, " in said
    assert said.endswith("; complete the download\n")


def test_a_shard_and_the_index_that_would_tell_are_missing(cask: CommandLine, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "sharded", shards=3)
    (folder / "transformer" / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    said = fails(cask, folder).err
    assert "diffusion_pytorch_model-00003-of-00003.safetensors: is missing, " in said
    assert "is one of 3; complete the download" in said


def test_an_index_that_lists_a_shard_that_is_missing(cask: CommandLine, folder: Path) -> None:
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "other.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    said = fails(cask, folder).err
    assert "other.safetensors: is missing, diffusion_pytorch_model.safetensors.index.json lists it" in said


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}'])
def test_an_index_that_cannot_be_read(cask: CommandLine, tmp_path: Path, text: str) -> None:
    folder = write_model(tmp_path / "sharded", shards=3)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    assert "diffusion_pytorch_model.safetensors.index.json: " in fails(cask, folder).err


def test_a_git_lfs_pointer_in_place_of_weights(cask: CommandLine, folder: Path) -> None:
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert f"{folder / SHARD}: is a Git-LFS pointer, not the weights; run `git lfs pull`" in fails(cask, folder).err


@pytest.mark.parametrize("keep", [0, 4, 20, 3000])
def test_a_truncated_shard(cask: CommandLine, folder: Path, keep: int) -> None:
    os.truncate(folder / SHARD, keep)
    said = fails(cask, folder).err
    assert str(folder / SHARD) in said
    assert said.endswith("; download it again, it is not complete\n")


def test_a_header_that_lies(cask: CommandLine, folder: Path) -> None:
    header = (
        b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}'
    )
    (folder / SHARD).write_bytes(raw_shard(header, bytes(6)))
    assert "has an invalid header: tensor 'y' overlaps the one before" in fails(cask, folder).err


def test_a_tensor_name_with_terminal_escapes_does_not_reach_the_terminal(cask: CommandLine, folder: Path) -> None:
    (folder / SHARD).write_bytes(raw_shard(b'{"\\u001b[31mred":{"dtype":"X"}}'))
    assert "\x1b" not in fails(cask, folder).err


@pytest.mark.parametrize("name", ["../evil", "a/../b", "/abs", "x:..", "a b", ""])
def test_a_model_name_outside_the_rules(cask: CommandLine, folder: Path, name: str) -> None:
    assert "is no model name" in fails(cask, folder, "--name", name).err


def test_a_symlink_out_of_the_folder(cask: CommandLine, folder: Path) -> None:
    (folder / "vae" / "x.json").symlink_to("/etc/passwd")
    assert "x.json: is a symlink that leads out of the folder, to /etc/passwd" in fails(cask, folder).err


def test_a_fifo_does_not_hang_the_import(cask: CommandLine, folder: Path) -> None:
    os.mkfifo(folder / "vae" / "pipe")
    done = cask("import", folder)
    assert "left out vae/pipe: neither a file nor a folder" in done.out


def test_a_store_that_is_something_else(cask: CommandLine, folder: Path) -> None:
    cask.store.mkdir()
    (cask.store / "letter.txt").write_text("dear")
    said = cask("import", folder, status=1).err
    assert (
        said == f"modelcask: {cask.store}: is no store and holds other files; give --store an empty or a new folder\n"
    )


def test_a_store_of_a_newer_version(cask: CommandLine, folder: Path) -> None:
    cask("import", folder)
    (cask.store / "store.json").write_text('{"format": "modelcask", "version": 99}')
    said = cask("ls", status=1).err
    assert "is a store of version 99, this modelcask knows versions up to 1; use a newer modelcask" in said


@pytest.fixture
def small_filesystem(cask: CommandLine) -> Iterator[Callable[[str], None]]:
    """Call it with mount options to put the store on a tmpfs of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    cask.store.mkdir()
    mounted = []

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(cask.store)], check=True)
        mounted.append(options)

    yield mount
    for _ in mounted:
        subprocess.run(["umount", str(cask.store)], check=True)


def test_a_read_only_store(cask: CommandLine, folder: Path, small_filesystem: Callable[[str], None]) -> None:
    small_filesystem("ro")
    said = cask("import", folder, status=1).err
    assert said == f"modelcask: {cask.store}/blobs: read-only file system; make it writable, or give another --store\n"


def test_a_full_store(cask: CommandLine, folder: Path, small_filesystem: Callable[[str], None]) -> None:
    small_filesystem("size=64k")
    said = fails(cask, folder).err
    assert "no space left on device; free some space there" in said
    subprocess.run(["mount", "-o", "remount,size=64m", str(cask.store)], check=True)
    cask("import", folder)
    cask("verify")
    cask.store.joinpath("index.sqlite-wal").unlink(missing_ok=True)


@pytest.mark.parametrize("kilobytes", range(60, 200, 12))
def test_a_store_that_fills_up_on_the_way(
    cask: CommandLine, folder: Path, small_filesystem: Callable[[str], None], kilobytes: int
) -> None:
    small_filesystem(f"size={kilobytes}k")
    done = cask("import", folder, status=None)
    if done.status == 0:
        assert cask("ls", "--json").json[0]["name"] == "library/m:latest"
    else:
        assert done.err.count("\n") == 1, done.err
        assert not any(path.is_file() for path in cask.store.glob("manifests/**/*"))
        assert list(cask.store.glob("tmp/*")) == []
