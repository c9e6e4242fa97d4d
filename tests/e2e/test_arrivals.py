"""Each way in which a folder arrives in a drop directory: imported when it is complete, byte for byte, never before."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from folders import files_of, write_model
from modelcask.store import Store
from running import CommandLine, Watching, wait_for
from trees import dropped_files

_IMPORTED = {"library/m:latest": "imported"}


def imported_files(cask: CommandLine, name: str = "library/m:latest") -> dict[str, bytes]:
    return dropped_files(Store.open(cask.store), name)


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def hard_link(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)


def rename(source: Path, target: Path) -> None:
    source.rename(target)


def unzip(source: Path, target: Path) -> None:
    archive = source.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as written:
        for path in sorted(source.rglob("*")):
            written.write(path, path.relative_to(source))
    subprocess.run(["unzip", "-q", archive, "-d", target], check=True)


def rsync(source: Path, target: Path) -> None:
    subprocess.run(["rsync", "-r", f"{source}/", target], check=True)


def rsync_in_place(source: Path, target: Path) -> None:
    subprocess.run(["rsync", "-r", "--inplace", f"{source}/", target], check=True)


@pytest.mark.parametrize("arrive", [copy, hard_link, rename, unzip, rsync, rsync_in_place])
def test_however_a_folder_arrives_it_is_imported_as_it_was(
    watching: Watching, tmp_path: Path, arrive: Callable[[Path, Path], None]
) -> None:
    tool = arrive.__name__.partition("_")[0]
    if tool in ("unzip", "rsync") and shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    folder = write_model(tmp_path / "m", shards=2)
    expected = files_of(folder)
    arrive(folder, watching.drops / "m")
    wait_for(lambda: watching.states() == _IMPORTED)
    wait_for(lambda: imported_files(watching.cask) == expected)


class SlowWriter(threading.Thread):
    """Writes a folder file by file, in a random order, through random names, with pauses at every kind of boundary.

    What the structure does not ask for comes first, so that the folder is complete when the last file is.

    Attributes:
        completed: when the last byte had its last name, in seconds since the epoch.
    """

    _NOT_ASKED_FOR = ("README.md", "merges.txt", "tokenizer_config.json")

    def __init__(self, source: Path, target: Path, seed: int) -> None:
        super().__init__()
        self._source, self._target = source, target
        self._random = random.Random(seed)
        self._pauses = 6
        self.completed = 0.0

    def run(self) -> None:
        paths = [path.relative_to(self._source) for path in self._source.rglob("*") if path.is_file()]
        self._random.shuffle(paths)
        paths.sort(key=lambda path: path.name not in self._NOT_ASKED_FOR)
        for path in paths:
            (self._target / path).parent.mkdir(parents=True, exist_ok=True)
            self._pause()
            way = self._random.choice([self._in_place, self._rsync, self._partial, self._hub])
            way(path, (self._source / path).read_bytes())
        self.completed = time.time()

    def _in_place(self, path: Path, data: bytes) -> None:
        self._write(self._target / path, data)

    def _rsync(self, path: Path, data: bytes) -> None:
        temporary = self._target / path.with_name(f".{path.name}.aZ3k9Q")
        self._write(temporary, data)
        self._pause()
        temporary.rename(self._target / path)

    def _partial(self, path: Path, data: bytes) -> None:
        temporary = self._target / f"{path}.part"
        self._write(temporary, data)
        self._pause()
        temporary.rename(self._target / path)

    def _hub(self, path: Path, data: bytes) -> None:
        temporary = self._target / ".cache/huggingface/download" / f"{path}.0f3c.incomplete"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        self._write(temporary, data)
        self._pause()
        temporary.rename(self._target / path)

    def _write(self, path: Path, data: bytes) -> None:
        cuts = sorted({0, len(data), *(self._random.randrange(len(data) + 1) for _ in range(2))})
        with path.open("wb") as file:
            self._pause()
            for begin, end in itertools.pairwise(cuts):
                file.write(data[begin:end])
                file.flush()
                self._pause()

    def _pause(self) -> None:
        """Sometimes longer than two looks are apart, but not too often: there are hundreds of boundaries."""
        if self._pauses and self._random.random() < 0.08:
            self._pauses -= 1
            time.sleep(self._random.uniform(0.6, 1.6))


def test_an_import_never_begins_before_the_drop_is_complete(cask: CommandLine, tmp_path: Path) -> None:
    folders = [write_model(tmp_path / "made" / f"m{n}", transformer=f"m{n}", shards=1 + n % 3) for n in range(50)]
    watching = Watching(cask, "watch", "--log-format", "json")
    lines: list[str] = []
    assert watching.process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(watching.process.stderr or ()))
    reader.start()
    writers = [SlowWriter(each, watching.drops / each.name, seed) for seed, each in enumerate(folders)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    wait_for(lambda: list(watching.states().values()) == ["imported"] * len(folders), seconds=60)
    watching.process.terminate()
    reader.join(10)
    assert watching.process.wait(10) == 0
    watching.process.stderr.close()
    begun: dict[str, list[float]] = {}
    for line in map(json.loads, lines):
        if ": importing " in line["message"]:
            begun.setdefault(line["model"], []).append(datetime.fromisoformat(line["time"]).timestamp())
    delays = []
    for writer, folder in zip(writers, folders, strict=True):
        first, *again = begun[f"library/{folder.name}:latest"]
        assert not again, f"{folder.name} was imported before it was complete, and then once more"
        delays.append(first - writer.completed)
        assert imported_files(cask, f"library/{folder.name}:latest") == files_of(folder)
    assert min(delays) > -0.001  # the log's times are cut to milliseconds
    assert sorted(delays)[25] < 2, sorted(delays)


def test_two_drops_at_once_are_imported_both(watching: Watching, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_model(tmp_path / name, transformer=name)
    threads = [threading.Thread(target=copy, args=(tmp_path / n, watching.drops / n)) for n in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: watching.states() == {"library/one:latest": "imported", "library/two:latest": "imported"})


def test_a_folder_that_is_replaced_is_imported_anew(watching: Watching, tmp_path: Path) -> None:
    write_model(tmp_path / "m").rename(watching.drops / "m")
    wait_for(lambda: watching.states() == _IMPORTED)
    other = write_model(tmp_path / "other" / "m", transformer="other")
    expected = files_of(other)
    (watching.drops / "m").rename(tmp_path / "old")
    other.rename(watching.drops / "m")
    wait_for(lambda: imported_files(watching.cask) == expected)


def test_a_file_open_for_writing_keeps_a_drop_settling(watching: Watching, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    with (folder / "tokenizer" / "merges.txt").open("a") as held:
        folder.rename(watching.drops / "m")
        wait_for(lambda: "a process has it open for writing" in watching.error("library/m:latest"))
        held.write("a b\n")
    wait_for(lambda: watching.states() == _IMPORTED)
    assert imported_files(watching.cask)["tokenizer/merges.txt"].endswith(b"a b\n")


def test_what_is_stuck_says_so_and_why(cask: CommandLine, tmp_path: Path) -> None:
    configuration = tmp_path / "config.toml"
    configuration.write_text("[watch]\nstuck_after = 1\n")
    watching = Watching(cask, "watch", "--config", configuration)
    try:
        folder = write_model(tmp_path / "m")
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        folder.rename(watching.drops / "m")
        wait_for(lambda: watching.error("library/m:latest").startswith("stuck, nothing has come since"))
        assert "vae: holds no weights" in watching.error("library/m:latest")
        assert watching.states() == {"library/m:latest": "settling"}
    finally:
        watching.end()


@pytest.fixture
def elsewhere(cask: CommandLine, tmp_path: Path) -> Iterator[Callable[[Path, str], Watching]]:
    """Watches another directory than ~/imports; ended with the test."""
    started: list[Watching] = []

    def watch(directory: Path, options: str = "") -> Watching:
        configuration = tmp_path / "config.toml"
        configuration.write_text(f'[[drop]]\npath = "{directory}"\n{options}\n')
        watching = Watching(cask, "watch", "--config", configuration)
        watching.drops = directory
        started.append(watching)
        return watching

    yield watch
    for watching in started:
        if watching.process.poll() is None:
            watching.end()


def test_a_drop_directory_may_come_late_and_go_and_come_again(
    elsewhere: Callable[..., Watching], tmp_path: Path
) -> None:
    directory = tmp_path / "disk" / "imports"
    watching = elsewhere(directory)
    assert watching.status()["imports"][0]["name"] == str(directory)
    assert "not there yet: no such file or directory" in watching.error(str(directory))
    directory.parent.mkdir()
    wait_for(directory.is_dir)  # its parent is there: it is made
    write_model(tmp_path / "m").rename(directory / "m")
    wait_for(lambda: watching.states() == _IMPORTED)
    directory.parent.rename(tmp_path / "away")
    wait_for(lambda: "not there yet" in watching.error(str(directory)))
    assert watching.states()["library/m:latest"] == "imported", "what a directory that is away held is not forgotten"
    directory.mkdir(parents=True)
    write_model(tmp_path / "n").rename(directory / "n")
    wait_for(lambda: watching.states() == {"library/n:latest": "imported"})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_drop_directory_may_be_a_mountpoint_that_comes_late(
    elsewhere: Callable[..., Watching], tmp_path: Path
) -> None:
    directory = tmp_path / "imports"
    directory.mkdir()
    watching = elsewhere(directory)
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    try:
        shutil.copytree(write_model(tmp_path / "m"), directory / "m")
        wait_for(lambda: watching.states() == _IMPORTED)
        time.sleep(2.5)  # the watch follows within a round of the loop; then an event must do
        shutil.copytree(write_model(tmp_path / "n"), directory / "n")
        wait_for(lambda: watching.states() == {**_IMPORTED, "library/n:latest": "imported"})
    finally:
        watching.end()
        subprocess.run(["umount", directory], check=True)


def test_where_events_do_not_arrive_the_directory_is_polled(elsewhere: Callable[..., Watching], tmp_path: Path) -> None:
    watching = elsewhere(tmp_path / "polled", "polling = true")
    folder = write_model(tmp_path / "m")
    expected = files_of(folder)
    copy(folder, watching.drops / "m")
    wait_for(lambda: watching.states() == _IMPORTED)
    assert imported_files(watching.cask) == expected
    (watching.drops / "m" / "NOTES.md").write_text("later")
    wait_for(lambda: "NOTES.md" in imported_files(watching.cask))


@pytest.mark.torture
@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("max_queued_events", 32, None),
        ("max_queued_events", 4, "events come faster than they can be taken"),
        ("max_user_watches", 3, "limit of inotify watches is reached"),
    ],
)
def test_what_the_kernel_does_not_tell_is_found_all_the_same(
    cask: CommandLine, tmp_path: Path, limit: str, value: int, said: str | None, *, torture: bool
) -> None:
    if not torture or os.geteuid() != 0:
        pytest.skip("lowers a limit of the kernel for the whole machine: `make torture`, as root, does it")
    setting = Path("/proc/sys/fs/inotify") / limit
    before = setting.read_text()
    folder = write_model(tmp_path / "m", shards=4)
    setting.write_text(str(value))
    watching = Watching(cask, "watch")
    try:
        copy(folder, watching.drops / "flooded")
        copy(folder, watching.drops / "m")
        wait_for(lambda: list(watching.states().values()) == ["imported", "imported"])
        time.sleep(1.5)  # until it is idle, and only an event can wake it
        os.kill(watching.process.pid, signal.SIGSTOP)
        for number in range(40):
            (watching.drops / "flooded" / f"{number}.txt").write_text("more than the queue takes")
        later = watching.drops / "m" / "tokenizer" / "later"
        later.mkdir()
        (later / "more.txt").write_text("later")
        os.kill(watching.process.pid, signal.SIGCONT)
        wait_for(lambda: "tokenizer/later/more.txt" in imported_files(cask))
        (later / "last.txt").write_text("later")
        wait_for(lambda: "tokenizer/later/last.txt" in imported_files(cask))
    finally:
        setting.write_text(before)
        what_it_said = watching.end()
    assert (said or "") in what_it_said
