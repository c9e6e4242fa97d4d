"""Disks that are full, fail, are read-only or gone, and processes that may not have what they need."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crash import disks, promises, steps
from folders import files_of, tensor, write_component, write_model
from modelcask import durable
from modelcask.digest import Digest
from modelcask.errors import ModelcaskError, disk_error
from modelcask.store import Store
from running import CommandLine, wait_for

pytestmark = pytest.mark.torture

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE]


@pytest.fixture
def small(memory: Path) -> Path:
    """About the smallest model there is."""
    folder = memory / "small"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "P", "vae": ["diffusers", "AutoencoderKL"]}')
    write_component(folder / "vae", [{"x": tensor("x", 8)}], stem="diffusion_pytorch_model")
    return folder


def check_failed(root: Path, error: BaseException) -> None:
    """An import failed as it should: in one line that says what and where, and with nothing to see of it."""
    assert isinstance(error, (ModelcaskError, OSError)), repr(error)
    line = str(error) if isinstance(error, ModelcaskError) else disk_error(error)
    assert line
    assert "\n" not in line
    if (root / "manifests").exists():
        assert promises.manifests_of(root) == {}
    if (root / "blobs").exists():
        promises.check_blobs(root)


class Space:
    """Space for so many bytes: the write that goes beyond is cut short, those that follow fail."""

    def __init__(self, size: int) -> None:
        self.left = size

    @contextmanager
    def limiting(self) -> Iterator[None]:
        originals = {name: getattr(os, name) for name in ("write", "pwrite")}

        def limited(call: Callable[..., int]) -> Callable[..., int]:
            def write(fd: int, data: Any, *rest: int) -> int:
                view = memoryview(data).cast("B")
                if view and not self.left:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                view = view[: self.left]
                self.left -= len(view)
                return call(fd, view, *rest)

            return write

        for name, call in originals.items():
            setattr(os, name, limited(call))
        try:
            yield
        finally:
            for name, call in originals.items():
                setattr(os, name, call)


def test_a_disk_that_is_full_after_any_byte_fails_the_import_and_leaves_nothing(
    small: Path, memory: Path, torture: bool
) -> None:
    operation = promises.importing(small)
    counting = Space(1 << 30)
    with counting.limiting():
        operation(memory / "whole")
    needed = (1 << 30) - counting.left
    expected = promises.manifests_of(memory / "whole")
    for size in range(0, needed, 1 if torture else 61):
        root = memory / f"store-{size}"
        with Space(size).limiting(), pytest.raises((OSError, ModelcaskError)) as caught:
            operation(root)
        check_failed(root, caught.value)
        promises.check_nothing_left(root)
        operation(root)
        assert promises.manifests_of(root) == expected
        promises.check_sound(root)
    print(f"full after each of {len(range(0, needed, 1 if torture else 61))} byte counts below {needed}")


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_any_step_that_fails_fails_the_import_and_shows_nothing_of_it(
    code: int, small: Path, memory: Path, torture: bool
) -> None:
    operation = promises.importing(small)
    count = steps.count(lambda: operation(memory / "whole"))
    expected = promises.manifests_of(memory / "whole")
    failed = 0
    for number in range(1 + ERRORS.index(code), count + 1, 1 if torture else 5):
        root = memory / f"store-{number}"
        watched = steps.Steps(steps.fail_at(number, code))
        with watched.watching():
            try:
                operation(root)
            except BaseException as error:  # noqa: BLE001 - which it may be is the question
                failed += 1
                if watched.taken[-1].number <= commit_of(watched):
                    check_failed(root, error)
        operation(root)
        assert promises.manifests_of(root) == expected
        promises.check_sound(root)
        promises.check_nothing_left(root)
    assert failed > count / (2 if torture else 10)
    print(f"{errno.errorcode[code]} at {failed} of {count} steps")


def commit_of(watched: steps.Steps) -> int:
    """The number of the step that made the manifest visible."""
    commits = [each.number for each in watched.taken if each.call == "rename" and "manifests" in str(each.where)]
    return commits[-1] if commits else 1 << 30


def test_a_full_filesystem_fails_the_import_in_words_and_more_space_mends_it(
    cask: CommandLine, memory: Path, torture: bool
) -> None:
    disks.need()
    folder = write_model(memory / "m")
    small, page = memory / "full", 4096
    small.mkdir()
    failed = 0
    for pages in range(2, 130, 1 if torture else 7):
        disks.run("mount", "-t", "tmpfs", "-o", f"size={pages * page}", "tmpfs", small)
        try:
            root = small / "store"
            try:
                promises.importing(folder)(root)
            except (OSError, ModelcaskError) as error:
                failed += 1
                check_failed(root, error)
                if failed == 1:
                    said = cask("import", folder, "--store", root, status=1).err
                    assert said.count("\n") == 1
                    assert "no space left on device" in said
                    assert "free some space there" in said
                disks.run("mount", "-o", "remount,size=16m", small)
                promises.importing(folder)(root)
                promises.check_nothing_left(root)
            promises.check_sound(root)
        finally:
            disks.run("umount", small)
    assert failed > 3
    print(f"{failed} of {len(range(2, 130, 1 if torture else 7))} sizes too small")


def test_a_quota_that_is_used_up_fails_the_import_in_words(cask: CommandLine, memory: Path) -> None:
    disks.need("btrfs")
    folder = write_model(memory / "m")
    large = {"large": tensor("large", 1000, 2000)}
    write_component(folder / "vae", [large], stem="diffusion_pytorch_model")
    image = memory / "image"
    disks.make("btrfs", image)
    with disks.image_mounted("btrfs", image, memory / "quota") as mounted:
        disks.run("btrfs", "subvolume", "create", mounted / "limited")
        disks.run("btrfs", "quota", "enable", mounted)
        disks.run("btrfs", "qgroup", "limit", "1m", mounted / "limited")
        root = mounted / "limited" / "store"
        said = cask("import", folder, "--store", root, status=1).err
        assert "quota exceeded; free some space there" in said
        assert said.count("\n") == 1
        assert promises.manifests_of(root) == {}
        promises.check_nothing_left(root)
        disks.run("btrfs", "qgroup", "limit", "none", mounted / "limited")
        cask("import", folder, "--store", root)
        promises.check_sound(root)


def test_a_filesystem_that_turns_read_only_fails_the_import_in_words(cask: CommandLine, memory: Path) -> None:
    disks.need()
    one, two = write_model(memory / "one", transformer="one"), write_model(memory / "two", transformer="two")
    image = memory / "image"
    disks.make("ext4", image)
    with disks.image_mounted("ext4", image, memory / "mnt") as mounted:
        root = mounted / "store"
        cask("import", one, "--store", root)
        before = promises.manifests_of(root)
        disks.run("mount", "-o", "remount,ro", mounted)
        for command in (("import", two), ("import", one), ("rm", "one"), ("gc",)):
            said = cask(*command, "--store", root, status=1).err
            assert "read-only file system; make it writable, or give another --store" in said
            assert said.count("\n") == 1
        cask("verify", "--store", root)
        assert [each["name"] for each in cask("ls", "--json", "--store", root).json] == ["library/one:latest"]
        disks.run("mount", "-o", "remount,rw", mounted)
        assert promises.manifests_of(root) == before
        cask("import", two, "--store", root)
        promises.check_sound(root)


@pytest.mark.fuse
@pytest.mark.usefixtures("fuse")
def test_a_disk_that_fails_while_it_writes_back_fails_the_import(memory: Path) -> None:
    """Errors of write-back come late, and only to who flushes."""
    disks.need()
    folder = write_model(memory / "m")
    work = memory / "work"
    work.mkdir()
    disks.make("ext4", work / "image")
    with disks.RecordedFilesystem("ext4", work) as disk:
        root = disk.folder / "store"
        Store.create(root)
        durable.sync_filesystem(root)
        with disk.broken(), pytest.raises(OSError, match="Input/output error") as caught:
            promises.importing(folder)(root)
        check_failed(root, caught.value)


@pytest.mark.fuse
@pytest.mark.usefixtures("fuse")
def test_an_error_of_write_back_that_another_program_was_told_still_fails_the_import(memory: Path) -> None:
    """The kernel tells an error to everyone who held the filesystem open then, and to one who comes later."""
    disks.need()
    work = memory / "work"
    work.mkdir()
    disks.make("ext4", work / "image")
    with disks.RecordedFilesystem("ext4", work) as disk:
        store = Store.create(disk.folder / "store")
        durable.sync_filesystem(store.root)
        data = b"failing!" * 10_000
        with store.ingestion() as ingestion:
            with disk.broken(data[:8]):  # before the blob is there: its write-back begins by itself
                ingestion.put(data, Digest.of(data))
                with pytest.raises(OSError, match="Input/output error"):
                    write_back(store.root)
            with pytest.raises(OSError, match="Input/output error"):
                ingestion.flush()
            assert promises.blob_names(store.root) == set()


def write_back(root: Path) -> None:
    """What another program's `sync` does: writes all data back, and hears of it."""
    (file,) = (path for path in (root / "tmp").rglob("*") if path.is_file())
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fdatasync(fd)
    finally:
        with contextlib.suppress(OSError):
            durable.sync_filesystem(root)  # hears of the filesystem's error, too
        os.close(fd)


def limited(cask: CommandLine, kind: int, limit: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command under a resource limit."""
    command = [sys.executable, "-m", "modelcask", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=cask.environment,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
    )


def test_too_few_open_files_fail_the_import_in_words(cask: CommandLine, memory: Path, torture: bool) -> None:
    folder = write_model(memory / "m", shards=6)
    failed = 0
    for limit in range(6, 40, 1 if torture else 8):
        root = memory / f"store-{limit}"
        done = limited(cask, resource.RLIMIT_NOFILE, limit, "import", folder, "--store", root)
        if done.returncode == 0:
            promises.check_sound(root)
            continue
        failed += 1
        if not root.exists() or "modelcask:" not in done.stderr:
            continue  # Python itself did not start
        assert "Traceback" not in done.stderr
        assert "too many open files; raise the limit of open files" in done.stderr
        assert promises.manifests_of(root) == {}
        cask("import", folder, "--store", root)
        promises.check_sound(root)
        promises.check_nothing_left(root)
    assert failed > 1


def test_too_little_memory_fails_the_import_in_words(cask: CommandLine, memory: Path, torture: bool) -> None:
    folder = write_model(memory / "m")
    large = {f"large{n}": tensor(f"large{n}", 1000, 2000) for n in range(4)}
    write_component(folder / "vae", [large], stem="diffusion_pytorch_model")
    said = []
    for mebibytes in range(40, 260, 4 if torture else 40):
        root = memory / f"store-{mebibytes}"
        done = limited(cask, resource.RLIMIT_AS, mebibytes << 20, "import", folder, "--store", root)
        if done.returncode == 0:
            promises.check_sound(root)
            continue
        if "modelcask:" in done.stderr:
            said.append(done.stderr)
            assert done.stderr.count("\n") == 1, done.stderr
        if root.exists():
            assert promises.manifests_of(root) == {}
            cask("import", folder, "--store", root)
            promises.check_sound(root)
            promises.check_nothing_left(root)
    assert said
    assert all("memory" in each for each in said)


def start_watching(cask: CommandLine) -> subprocess.Popen[bytes]:
    """`modelcask watch`, which tries again after half a second in place of a minute."""
    code = "from modelcask import service; service._TRY_AGAIN = 0.5; from modelcask.cli.main import main; main()"
    with said_by_watcher(cask).open("w") as said:
        process = subprocess.Popen([sys.executable, "-c", code, "watch"], stderr=said, env=cask.environment)
    wait_for(lambda: cask("status", "--json").json["daemon"]["running"])
    return process


def drops_of(cask: CommandLine) -> Path:
    return Path(cask.environment["HOME"]) / "imports"


def said_by_watcher(cask: CommandLine) -> Path:
    return Path(cask.environment["HOME"]) / "said"


def end_watching(cask: CommandLine, process: subprocess.Popen[bytes]) -> None:
    """It must still live, and end as told."""
    alive = process.poll() is None
    process.terminate()
    assert process.wait(20) == 0
    assert alive
    assert "Traceback" not in said_by_watcher(cask).read_text()


def drop_state(cask: CommandLine) -> tuple[str, str]:
    drops = cask("status", "--json").json["imports"]
    return (drops[0]["state"], drops[0]["error"] or "") if drops else ("", "")


def test_the_watcher_outlives_a_full_disk_and_goes_on_when_there_is_space(cask: CommandLine, memory: Path) -> None:
    disks.need()
    folder = write_model(memory / "m")
    large = {"large": tensor("large", 1000, 2000)}
    write_component(folder / "vae", [large], stem="diffusion_pytorch_model")
    cask.store.mkdir()
    disks.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", cask.store)
    try:
        shutil.copytree(folder, drops_of(cask) / "m")
        process = start_watching(cask)
        try:
            said = said_of_failure(cask)
            assert "no space left on device" in said
            assert "free some space there" in said
            disks.run("mount", "-o", "remount,size=100m", cask.store)
            wait_for(lambda: drop_state(cask)[0] == "imported")
            promises.check_sound(cask.store)
        finally:
            end_watching(cask, process)
    finally:
        disks.run("umount", cask.store)


def test_the_watcher_outlives_a_lack_of_memory_and_goes_on_when_there_is_some(
    cask: CommandLine, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    shutil.copytree(folder, drops_of(cask) / "m", ignore=shutil.ignore_patterns("model_index.json"))
    process = start_watching(cask)
    try:
        wait_for(lambda: drop_state(cask)[0] == "settling")
        usual = resource.prlimit(process.pid, resource.RLIMIT_AS)
        size = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(process.pid, resource.RLIMIT_AS, (size + (2 << 20), usual[1]))
        shutil.copy2(folder / "model_index.json", drops_of(cask) / "m")  # now it is complete
        wait_for(lambda: "there is not enough memory; close other programs" in said_by_watcher(cask).read_text())
        resource.prlimit(process.pid, resource.RLIMIT_AS, usual)
        wait_for(lambda: drop_state(cask)[0] == "imported")
        promises.check_sound(cask.store)
    finally:
        end_watching(cask, process)


@pytest.mark.fuse
@pytest.mark.usefixtures("fuse")
def test_watcher_and_mount_outlive_a_store_that_vanishes_and_comes_back(cask: CommandLine, tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "one", transformer="one"), write_model(tmp_path / "two", transformer="two")
    cask("import", one)
    away = tmp_path / "away"
    with cask.mounted(tmp_path / "mnt") as mounted:
        shown = mounted / "diffusers/library/one/latest"
        opened = (shown / "vae/diffusion_pytorch_model.safetensors").open("rb")
        shutil.copytree(two, drops_of(cask) / "two", ignore=shutil.ignore_patterns("model_index.json"))
        process = start_watching(cask)
        try:
            cask.store.rename(away)
            shutil.copy2(two / "model_index.json", drops_of(cask) / "two")  # now it is complete
            wait_for(lambda: not listing(mounted / "diffusers/library"), seconds=10)
            said = said_of_failure(cask)
            assert f"{cask.store}" in said
            assert "no such file or directory" in said
            assert process.poll() is None
            away.rename(cask.store)
            wait_for(lambda: files_of(shown) == files_of(one), seconds=10)
            wait_for(lambda: drop_state(cask)[0] == "imported")
            wait_for(lambda: files_of(mounted / "diffusers/library/two/latest") == files_of(two), seconds=10)
            assert opened.read() == (one / "vae/diffusion_pytorch_model.safetensors").read_bytes()
        finally:
            opened.close()
            end_watching(cask, process)
        promises.check_sound(cask.store)


def listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - asks the filesystem, whatever the kernel remembers
    except FileNotFoundError:
        return []


def said_of_failure(cask: CommandLine) -> str:
    """The lines in which the watcher says that an import failed; waits for the first."""
    said = said_by_watcher(cask)
    return str(wait_for(lambda: "".join(line for line in said.read_text().splitlines() if ": failed: " in line)))
