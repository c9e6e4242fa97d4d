"""`watch` and `up` as real processes: a folder is dropped, and is there."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from folders import files_of, write_model
from running import CommandLine, Watching, serving, wait_for


def test_a_folder_that_is_dropped_is_imported(watching: Watching, tmp_path: Path) -> None:
    shutil.copytree(write_model(tmp_path / "m", variants=["fp16"]), watching.drops / "m")
    wait_for(lambda: watching.states() == {"library/m:latest": "imported"})
    names = [each["name"] for each in watching.cask("ls", "--json").json]
    assert names == ["library/m:fp16", "library/m:latest"]
    said = watching.end()
    assert "Traceback" not in said
    assert watching.process.returncode == 0


def test_a_folder_that_is_moved_into_place_and_one_in_a_namespace_are_imported(
    watching: Watching, tmp_path: Path
) -> None:
    write_model(tmp_path / "one", transformer="one").rename(watching.drops / "one")
    (watching.drops / "org").mkdir()
    write_model(tmp_path / "two", transformer="two").rename(watching.drops / "org" / "two")
    wait_for(lambda: watching.states() == {"library/one:latest": "imported", "org/two:latest": "imported"})


def test_an_incomplete_drop_settles_and_says_what_is_missing(watching: Watching, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    held_back = folder / "vae" / "diffusion_pytorch_model.safetensors"
    held_back.rename(tmp_path / "held")
    folder.rename(watching.drops / "m")
    held_back = watching.drops / "m" / "vae" / held_back.name

    def missing() -> str:
        drops = watching.cask("status", "--json").json["imports"]
        return "".join(str(drop["error"] or "") for drop in drops if drop["state"] == "settling")

    wait_for(lambda: "vae: holds no weights" in missing())
    whole = (tmp_path / "held").read_bytes()
    held_back.write_bytes(whole[:-1])
    wait_for(lambda: "is truncated" in missing())
    assert watching.cask("ls", "--json").json == []
    with held_back.open("ab") as file:
        file.write(whole[-1:])
    wait_for(lambda: watching.states() == {"library/m:latest": "imported"})


def test_a_drop_that_changes_is_imported_again_and_one_that_does_not_is_left_alone(
    cask: CommandLine, watching: Watching, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    folder.rename(watching.drops / "m")
    wait_for(lambda: watching.states() == {"library/m:latest": "imported"})
    before = cask("ls", "--json").json[0]["manifest"]
    (watching.drops / "m" / "NOTES.md").write_text("new")
    wait_for(lambda: cask("ls", "--json").json[0]["manifest"] != before)
    watching.end()
    again = Watching(cask, "watch")
    wait_for(lambda: again.states() == {"library/m:latest": "unchanged"})
    assert "importing" not in again.end()


def test_a_drop_that_fails_does_not_end_the_watcher(watching: Watching, tmp_path: Path) -> None:
    broken = write_model(tmp_path / "broken")
    index = broken / "model_index.json"
    index.write_text(index.read_text().replace("false", "1e400"))
    broken.rename(watching.drops / "broken")
    wait_for(lambda: watching.states() == {"library/broken:latest": "failed"})
    (watching.drops / os.fsdecode(b"bad\xff")).mkdir()
    write_model(tmp_path / "good").rename(watching.drops / "good")
    wait_for(lambda: watching.states().get("library/good:latest") == "imported")
    assert watching.process.poll() is None


def test_a_folder_in_the_drop_directory_of_a_type_is_quantized(watching: Watching, tmp_path: Path) -> None:
    (watching.drops / "int4").mkdir()
    write_model(tmp_path / "m").rename(watching.drops / "int4" / "m")
    wait_for(lambda: watching.states() == {"library/m:int4": "imported"})
    assert [each["quantization"] for each in watching.cask("ls", "--json").json] == ["INT4"]


def test_a_drop_that_is_removed_is_forgotten(watching: Watching, tmp_path: Path) -> None:
    write_model(tmp_path / "m").rename(watching.drops / "m")
    wait_for(lambda: watching.states() == {"library/m:latest": "imported"})
    shutil.rmtree(watching.drops / "m")
    wait_for(lambda: watching.states() == {})
    assert len(watching.cask("ls", "--json").json) == 1


def test_a_second_watcher_of_the_same_store_is_refused(cask: CommandLine, watching: Watching) -> None:
    said = cask("watch", status=1).err
    assert f"process {watching.process.pid} watches for this store already" in said


@pytest.mark.fuse
@pytest.mark.usefixtures("fuse")
def test_up_imports_what_is_dropped_and_shows_it(cask: CommandLine, tmp_path: Path) -> None:
    up = Watching(cask, "up")
    try:
        folder = write_model(tmp_path / "m")
        expected = files_of(folder)
        folder.rename(up.drops / "m")
        shown = up.home / "models/diffusers/library/m/latest"
        wait_for(lambda: shown.is_dir() and files_of(shown) == expected)
        assert cask("status", "--json").json["mounts"] == [str(up.home / "models")]
    finally:
        said = up.end()
    assert up.process.returncode == 0, said
    assert not (up.home / "models").is_mount()
    assert "Traceback" not in said


@pytest.mark.fuse
@pytest.mark.usefixtures("fuse")
def test_up_starts_what_dies_again(cask: CommandLine) -> None:
    up = Watching(cask, "up")
    models = up.home / "models"
    try:
        wait_for((models / "diffusers").is_dir)
        (killed,) = serving(cask.store)
        os.kill(killed, signal.SIGKILL)

        def answers() -> bool:
            try:
                return os.listdir(models) != []  # noqa: PTH208 - a stat may be answered from the kernel's cache
            except OSError:
                return False

        wait_for(lambda: serving(cask.store) not in ([], [killed]) and answers())
    finally:
        said = up.end()
    assert "mount ended with exit status -9, starting it again" in said


def test_up_gives_up_where_a_child_cannot_run(cask: CommandLine) -> None:
    models = Path(cask.environment["HOME"]) / "models"
    models.mkdir()
    (models / "file").touch()
    said = cask("up", status=1).err
    assert "is not empty" in said
    assert "ended with exit status 1 3 times in a row" in said.splitlines()[-1]
