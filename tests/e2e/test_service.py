"""`watch` and `up` as real processes: a folder is dropped, and is there."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from folders import files_of, write_model
from modelcask.digest import Digest
from modelcask.store import Store
from running import CommandLine, Watching, serving, wait_for
from trees import dropped_files


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


@pytest.fixture
def configured(cask: CommandLine, tmp_path: Path) -> Iterator[Callable[[str], Watching]]:
    """`watch` with a configuration, its drop directory ~/imports; ended with the test."""
    started: list[Watching] = []
    drops = Path(cask.environment["HOME"]) / "imports"
    drops.mkdir()

    def watch(options: str) -> Watching:
        (tmp_path / "config.toml").write_text(f'[[drop]]\npath = "{drops}"\n{options}\n')
        started.append(Watching(cask, "watch", "--config", tmp_path / "config.toml"))
        return started[-1]

    yield watch
    for watching in started:
        if watching.process.poll() is None:
            watching.end()


def test_a_drop_is_removed_after_its_import_but_for_what_was_left_out(
    cask: CommandLine, configured: Callable[[str], Watching], tmp_path: Path
) -> None:
    watching = configured('after = "delete"')
    folder = write_model(tmp_path / "m", shards=2, variants=["fp16"])
    expected = files_of(folder)
    (folder / "vae" / "old.ckpt").write_text("a pickle")
    folder.rename(watching.drops / "m")
    wait_for(lambda: files_of(watching.drops / "m") == {"vae/old.ckpt": b"a pickle"})
    assert os.listdir(watching.drops / "m") == ["vae"], "emptied folders are gone"  # noqa: PTH208
    wait_for(lambda: watching.states() == {"library/m:latest": "imported"})
    store = Store.open(cask.store)
    assert dropped_files(store, "library/m:latest") | dropped_files(store, "library/m:fp16") == expected
    write_model(tmp_path / "n", transformer="n").rename(watching.drops / "n")
    wait_for(lambda: not (watching.drops / "n").exists() and "library/n:latest" not in watching.states())
    again = write_model(tmp_path / "m")
    shutil.copytree(again, watching.drops / "m", dirs_exist_ok=True)
    wait_for(lambda: files_of(watching.drops / "m") == {"vae/old.ckpt": b"a pickle"})


def test_a_drop_is_kept_if_the_store_does_not_give_it_back(
    cask: CommandLine, configured: Callable[[str], Watching], tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    cask("import", folder)
    damaged = max((cask.store / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    damaged.chmod(0o644)
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)  # of the right size, so that the import trusts it
    expected = files_of(folder)
    watching = configured('after = "delete"')
    folder.rename(watching.drops / "m")
    wait_for(lambda: "differs from it" in watching.error("library/m:latest"))
    assert watching.states() == {"library/m:latest": "imported"}
    assert files_of(watching.drops / "m") == expected


def test_a_quantized_drop_is_removed_only_if_that_is_asked_for(
    configured: Callable[[str], Watching], tmp_path: Path
) -> None:
    watching = configured('after = "delete"\nquantize = "int8"')
    write_model(tmp_path / "m").rename(watching.drops / "m")
    wait_for(lambda: watching.states() == {"library/m:int8": "imported"})
    watching.end()
    assert len(files_of(watching.drops / "m")) > 5
    watching = configured('after = "delete"\nquantize = "int8"\ndelete_quantized = true')
    write_model(tmp_path / "n").rename(watching.drops / "n")
    wait_for(lambda: not (watching.drops / "n").exists())
    assert len(files_of(watching.drops / "m")) > 5, "what was imported before stays as it was said then"


def test_a_removal_that_was_interrupted_goes_on(
    cask: CommandLine, configured: Callable[[str], Watching], tmp_path: Path
) -> None:
    watching = configured('after = "delete"')
    watching.end()
    folder = write_model(tmp_path / "m")
    (result,) = cask("import", folder, "--json").json
    (folder / "model_index.json").unlink()  # as if it had begun
    folder.rename(watching.drops / "m")
    store = Store.open(cask.store)
    store.index.begin_removal(watching.drops / "m", {result["name"]: Digest.parse(result["manifest"])})
    store.index.close()
    watching = configured('after = "delete"')
    wait_for(lambda: not (watching.drops / "m").exists())
    wait_for(lambda: watching.states() == {})


def test_a_drop_does_not_take_the_place_of_one_that_was_removed(
    cask: CommandLine, configured: Callable[[str], Watching], tmp_path: Path
) -> None:
    watching = configured('after = "delete"')
    first = write_model(tmp_path / "one")
    expected = files_of(first)
    write_model(tmp_path / "two", transformer="other").rename(watching.drops / "flux-1")
    first.rename(watching.drops / "flux 1")  # both become library/flux-1
    wait_for(lambda: sorted(watching.states().values()) == ["failed"])
    assert "is another model already, imported from" in watching.error("library/flux-1:latest")
    (kept,) = watching.drops.iterdir()
    kept_files = files_of(kept)
    stored = dropped_files(Store.open(cask.store), "library/flux-1:latest")
    assert kept_files != stored
    assert expected in (kept_files, stored)


def test_a_removal_does_not_go_on_against_the_configuration(
    cask: CommandLine, configured: Callable[[str], Watching], tmp_path: Path
) -> None:
    configured("").end()
    folder = write_model(tmp_path / "m")
    expected = files_of(folder)
    (result,) = cask("import", folder, "--json").json
    drop = Path(cask.environment["HOME"]) / "imports" / "m"
    folder.rename(drop)
    store = Store.open(cask.store)
    store.index.begin_removal(drop, {result["name"]: Digest.parse(result["manifest"])})
    store.index.close()
    watching = configured("")
    wait_for(lambda: watching.states() == {"library/m:latest": "imported"})
    assert files_of(drop) == expected


def test_the_configuration_is_read_again_and_a_faulty_one_refused(
    configured: Callable[[str], Watching], tmp_path: Path
) -> None:
    watching = configured("")
    config = tmp_path / "config.toml"
    other = tmp_path / "other"
    good = config.read_text()
    config.write_text(good + "quantise = 'int4'\n")
    watching.process.send_signal(signal.SIGHUP)
    write_model(tmp_path / "m").rename(watching.drops / "m")
    wait_for(lambda: watching.states() == {"library/m:latest": "imported"})
    config.write_text(f'{good}[[drop]]\npath = "{other}"\nquantize = "int8"\n')
    watching.process.send_signal(signal.SIGHUP)
    wait_for(other.is_dir)
    write_model(tmp_path / "n").rename(other / "n")
    wait_for(lambda: watching.states() == {"library/m:latest": "imported", "library/n:int8": "imported"})
    config.write_text(f'[[drop]]\npath = "{other}"\nquantize = "int8"\n')
    watching.process.send_signal(signal.SIGHUP)
    wait_for(lambda: watching.states() == {"library/n:int8": "imported"})
    said = watching.end()
    line = len(good.splitlines()) + 1
    assert f"{config}, line {line}: drop 1: quantise: no such key" in said
    assert "the configuration stays as it was" in said


def test_the_service_manager_is_told(cask: CommandLine, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        cask.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        process = cask.start("watch")
        told: list[str] = []

        def tells(line: str) -> bool:
            while not any(each.startswith(line) for each in told):
                told.extend(manager.recv(4096).decode().splitlines())
            return True

        assert tells("READY=1")
        assert tells("WATCHDOG=1")
        drops = Path(cask.environment["HOME"]) / "imports"
        folder = write_model(tmp_path / "m")
        (folder / "vae" / "config.json").rename(tmp_path / "held")
        folder.rename(drops / "m")
        assert tells("STATUS=1 settling")
        (tmp_path / "held").rename(drops / "m" / "vae" / "config.json")
        assert tells("STATUS=1 imported")
        process.send_signal(signal.SIGHUP)
        assert tells("RELOADING=1")
        process.terminate()
        assert tells("STOPPING=1")
        process.communicate(timeout=10)


def test_status_can_be_followed(cask: CommandLine, watching: Watching, tmp_path: Path) -> None:
    write_model(tmp_path / "m").rename(watching.drops / "m")
    following = subprocess.Popen(
        [sys.executable, "-u", "-m", "modelcask", "status", "--follow"],
        stdout=subprocess.PIPE,
        text=True,
        env=cask.environment,
    )
    assert following.stdout is not None
    with following.stdout:
        for line in following.stdout:
            if line == "library/m:latest: imported\n":
                break
    following.send_signal(signal.SIGINT)
    assert following.wait(10) == 0


@pytest.mark.fuse
@pytest.mark.usefixtures("fuse")
def test_the_children_of_an_up_that_is_killed_end(cask: CommandLine) -> None:
    up = Watching(cask, "up")
    models = up.home / "models"
    try:
        wait_for((models / "diffusers").is_dir)
        up.process.kill()
        up.process.communicate(timeout=10)
        wait_for(lambda: not up.status()["daemon"]["running"] and not models.is_mount())
    finally:
        subprocess.run(["umount", "-l", models], check=False, capture_output=True)
