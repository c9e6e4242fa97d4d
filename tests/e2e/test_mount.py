"""The filesystem, mounted for real."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from folders import files_of, tensor, write_component, write_model
from modelcask.mounts import current_mounts
from running import CommandLine, blob_files, serving, wait_for

pytestmark = pytest.mark.fuse

Mount = Callable[[], Path]


def test_what_was_dropped_is_what_is_mounted(cask: CommandLine, mount: Mount, vector_model: Path) -> None:
    cask("import", vector_model, "--name", "org/vector")
    shown = mount() / "diffusers/org/vector/latest"
    assert files_of(shown) == files_of(vector_model)
    subprocess.run(["diff", "-r", vector_model, shown], check=True)
    assert cask("path", "org/vector").out.strip() == str(shown)


def test_stat_says_what_a_read_gives(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    cask("import", write_model(tmp_path / "m", shards=2))
    root = mount()
    for path in (root / "diffusers").rglob("*"):
        status = path.stat()
        if path.is_file():
            assert status.st_size == len(path.read_bytes())
            assert status.st_mode & 0o777 == 0o444
        else:
            assert status.st_mode & 0o777 == 0o555
        assert status.st_mtime > 1_700_000_000
        assert path.stat().st_ino == status.st_ino


def test_inodes_are_the_same_in_the_next_mount(cask: CommandLine, fuse: None, tmp_path: Path) -> None:
    del fuse
    cask("import", write_model(tmp_path / "m"))

    def inodes() -> dict[str, int]:
        with cask.mounted(tmp_path / "mnt") as root:
            return {str(path): path.lstat().st_ino for path in root.rglob("*")}

    first = inodes()
    of_their_own = {path: number for path, number in first.items() if "/snapshots/" not in path}
    assert len(set(of_their_own.values())) == len(of_their_own)
    (snapshot,) = {path.partition("/snapshots/")[2][:40] for path in first.keys() - of_their_own.keys()}
    shown = {path: number for path, number in first.items() if f"/{snapshot}/" in path and "." in Path(path).name}
    below = {path: number for path, number in first.items() if "/diffusers/library/m/latest/" in path}
    assert shown  # files of hub/ are those of diffusers/, so that they are cached once
    assert all(number in below.values() for number in shown.values())
    assert inodes() == first


def test_tensors_and_blobs_lead_to_the_stores_own_files(cask: CommandLine, mount: Mount, vector_model: Path) -> None:
    cask("import", vector_model)
    root = mount()
    assert (root / "blobs").readlink() == cask.store / "blobs"
    path = root / "tensors/library/model/latest/vae/decoder.mid.to_q.weight.safetensors"
    assert "/../blobs/sha256-" in str(path.readlink())
    assert path.resolve().parent == cask.store / "blobs"
    assert path.resolve().name == "sha256-" + hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_is_named_and_typed_as_modelcasks_and_is_read_only(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    cask("import", write_model(tmp_path / "m"))
    root = mount()
    (mine,) = [each for each in current_mounts() if each.mountpoint == root]
    assert mine.store == cask.store
    assert os.statvfs(root).f_flag & os.ST_RDONLY
    assert os.statvfs(root).f_blocks == os.statvfs(cask.store).f_blocks
    file = root / "diffusers/library/m/latest/README.md"
    for write in (
        lambda: file.open("a"),
        lambda: (root / "new").touch(),
        lambda: (root / "new").mkdir(),
        file.unlink,
        lambda: file.rename(root / "x"),
        lambda: file.chmod(0o644),
        lambda: os.truncate(file, 0),
        lambda: os.utime(file),
        lambda: (root / "link").symlink_to("x"),
        lambda: os.link(file, root / "hard"),
    ):
        with pytest.raises(OSError, match="Read-only") as caught:
            write()
        assert caught.value.errno == errno.EROFS


def test_reads_at_every_boundary_equal_the_file(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights = {f"w{n}": tensor(f"w{n}", n, 7) for n in range(40)} | {"big": tensor("big", 300, 1000)}
    write_component(folder / "vae", [weights], stem="diffusion_pytorch_model")
    cask("import", folder)
    original = folder / "vae/diffusion_pytorch_model.safetensors"
    data = original.read_bytes()
    fd = os.open(mount() / "diffusers/library/m/latest/vae" / original.name, os.O_RDONLY)
    try:
        size = len(data)
        for offset in (*range(0, 3000, 13), 131_071, 131_072, 131_073, size - 1, size, size + 10):
            for length in (1, 100, 4096, 131_072, 1 << 20):
                assert os.pread(fd, length, offset) == data[offset : offset + length]
        mapped = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        assert mapped[:] == data
        mapped[5000:5003] = b"own"
        assert os.pread(fd, 3, 5000) == data[5000:5003]
        mapped.close()
        shared = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        assert shared[-100:] == data[-100:]
        shared.close()
    finally:
        os.close(fd)


def test_a_model_that_is_imported_replaced_or_removed_appears_so_within_two_seconds(
    cask: CommandLine, mount: Mount, tmp_path: Path
) -> None:
    one, two = write_model(tmp_path / "one", transformer="one"), write_model(tmp_path / "two", transformer="two")
    root = mount()
    model = root / "diffusers/library/x/latest"
    shard = Path("transformer/diffusion_pytorch_model.safetensors")
    assert not model.exists()
    cask("import", one, "--name", "x")
    wait_for(model.exists, seconds=2)
    assert (model / shard).read_bytes() == (one / shard).read_bytes()
    cask("import", two, "--name", "x")
    wait_for(lambda: (model / shard).read_bytes() == (two / shard).read_bytes(), seconds=2)
    cask("rm", "x")
    wait_for(lambda: not model.exists() and os.listdir(root / "diffusers") == [], seconds=2)  # noqa: PTH208


def test_a_folder_that_is_open_shows_news_when_it_is_read_again(
    cask: CommandLine, mount: Mount, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    cask("import", folder, "--name", "a")
    fd = os.open(mount() / "diffusers/library", os.O_RDONLY)
    try:
        assert os.listdir(fd) == ["a"]  # noqa: PTH208 - rewinds it, too
        cask("import", folder, "--name", "b")
        assert sorted(os.listdir(fd)) == ["a", "b"]  # noqa: PTH208
    finally:
        os.close(fd)


def test_the_hub_view_is_a_cache_whose_main_ref_follows_the_model(
    cask: CommandLine, mount: Mount, tmp_path: Path
) -> None:
    one, two = write_model(tmp_path / "one", transformer="one"), write_model(tmp_path / "two", transformer="two")
    root = mount()
    ref = root / "hub/models--library--x/refs/main"
    cask("import", one, "--name", "x")
    wait_for(ref.exists, seconds=2)
    first = ref.read_bytes()
    snapshot = Path(cask("path", "x", "--view", "hub").out.strip())
    assert snapshot == root / "hub/models--library--x/snapshots" / first.decode()
    assert files_of(snapshot) == files_of(one)
    assert (root / "hub/models--x").resolve() == ref.parent.parent
    cask("import", two, "--name", "x")
    wait_for(lambda: ref.read_bytes() != first, seconds=2)
    assert len(ref.read_bytes()) == 40
    assert files_of(ref.parent.parent / "snapshots" / ref.read_text()) == files_of(two)
    wait_for(lambda: not snapshot.exists(), seconds=2)
    cask("rm", "x")
    wait_for(lambda: not ref.parent.exists() and os.listdir(root / "hub") == [], seconds=2)  # noqa: PTH208


def test_an_open_file_and_a_mapping_keep_the_old_content_through_replacing_rm_and_gc(
    cask: CommandLine, mount: Mount, tmp_path: Path
) -> None:
    """Old and new stand under one path; a reader of either must never see the other's pages."""
    shard = Path("transformer/diffusion_pytorch_model.safetensors")
    folders = {}
    for name in ("old", "new"):
        folders[name] = write_model(tmp_path / name, transformer=name)
        weights = {"w": tensor(name, 2000, 1000)}
        write_component(folders[name] / "transformer", [weights], stem="diffusion_pytorch_model")
    old, new = ((folders[name] / shard).read_bytes() for name in ("old", "new"))
    cask("import", folders["old"], "--name", "x")
    path = mount() / "diffusers/library/x/latest" / shard
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    assert mapped[:100] == old[:100]
    cask("import", folders["new"], "--name", "x")
    wait_for(lambda: path.read_bytes() == new, seconds=2)
    cask("rm", "x")
    assert cask("gc", "--json").json["freed_bytes"] > 4_000_000  # the new model's, which nobody has open
    assert mapped[:] == old
    assert os.pread(fd, len(old) + 1, 0) == old
    os.close(fd)
    assert mapped[-100:] == old[-100:]
    assert cask("gc", "--json").json["freed_bytes"] == 0  # a mapping alone keeps the lease
    mapped.close()
    wait_for(lambda: cask("gc", "--json").json["freed_bytes"] > 4_000_000)


def test_many_readers_at_once_read_the_same_bytes(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", shards=3)
    cask("import", folder)
    shown = mount() / "diffusers/library/m/latest"
    expected = files_of(folder)
    wrong: list[str] = []

    def read_all() -> None:
        for _ in range(5):
            wrong.extend(path for path, data in expected.items() if (shown / path).read_bytes() != data)

    threads = [threading.Thread(target=read_all) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_damaged_blob_gives_an_error_and_not_wrong_bytes(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    cask("import", write_model(tmp_path / "m"))
    layers = cask("show", "m", "--json").json["layers"]
    digest = next(layer["digest"] for layer in layers if layer["name"] == "transformer/blocks.3.weight")
    victim = cask.store / "blobs" / digest.replace(":", "-")
    victim.chmod(0o644)
    os.truncate(victim, 10)
    shown = mount() / "diffusers/library/m/latest/transformer/diffusion_pytorch_model.safetensors"
    with pytest.raises(OSError, match="Input/output error"):
        shown.read_bytes()
    assert (shown.parent / "config.json").read_text()


def test_space_comes_back_after_gc_of_what_was_read(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    cask("import", write_model(tmp_path / "m"))
    root = mount()
    assert files_of(root / "diffusers/library/m/latest") == files_of(tmp_path / "m")
    cask("rm", "m")
    wait_for(lambda: cask("gc", "--json").json["freed_bytes"] == 0 and blob_files(cask.store) == {})
    (server,) = serving(cask.store)
    held = [os.readlink(fd) for fd in Path(f"/proc/{server}/fd").iterdir()]
    assert not [path for path in held if "/blobs/sha256-" in path]


def is_unreadable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno == errno.EIO
    return False


def test_a_damaged_blob_is_not_read_after_verify_and_is_read_whole_after_healing(
    cask: CommandLine, mount: Mount, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m")
    for name in ("m", "other"):
        cask("import", folder, "--name", name)
    layers = cask("show", "m", "--json").json["layers"]
    digest = next(layer["digest"] for layer in layers if layer["name"] == "transformer/blocks.3.weight")
    victim = cask.store / "blobs" / digest.replace(":", "-")
    victim.chmod(0o644)
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    shard = mount() / "diffusers/library/m/latest/transformer/diffusion_pytorch_model.safetensors"
    whole = (folder / "transformer" / shard.name).read_bytes()
    other = shard.parents[3] / "other/latest" / shard.parent.name / shard.name  # another model of the same blobs
    assert shard.read_bytes() != whole
    assert other.read_bytes() != whole
    assert len(cask("verify", "--json", status=1).json["corrupt"]) == 1
    for path in (shard, other):
        wait_for(lambda path=path: is_unreadable(path), seconds=2)
    cask("import", folder)
    wait_for(lambda: other.read_bytes() == whole, seconds=2)
    cask("verify")
    wait_for(lambda: shard.read_bytes() == whole, seconds=2)


def fill(path: Path) -> None:
    """Write until there is no space left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_store_can_still_be_read(cask: CommandLine, fuse: None, tmp_path: Path) -> None:
    del fuse
    folder = write_model(tmp_path / "m")
    cask.store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(cask.store)], check=True)
    try:
        cask("import", folder)
        with cask.mounted(tmp_path / "mnt") as root:
            fill(cask.store / "filler")
            assert files_of(root / "diffusers/library/m/latest") == files_of(folder)
            assert cask("gc", "--dry-run", "--json").json["removed_blobs"] == 0
            cask("status")
    finally:
        subprocess.run(["umount", str(cask.store)], check=True)


def test_a_store_whose_path_holds_a_comma_can_be_mounted(fuse: None, tmp_path: Path) -> None:
    del fuse
    cask = CommandLine(tmp_path / "a,b c", tmp_path)
    cask("import", write_model(tmp_path / "m"))
    with cask.mounted(tmp_path / "mnt") as root:
        assert cask("path", "m").out.strip() == str(root / "diffusers/library/m/latest")


def test_an_unreadable_manifest_gives_an_error_there_and_nowhere_else(
    cask: CommandLine, mount: Mount, tmp_path: Path
) -> None:
    cask("import", write_model(tmp_path / "m"))
    cask("import", tmp_path / "m", "--name", "bad")
    (cask.store / "manifests/registry.ollama.ai/library/bad/latest").write_text("{")
    root = mount() / "diffusers/library"
    with pytest.raises(OSError, match="Input/output error"):
        os.listdir(root / "bad/latest")  # noqa: PTH208
    assert (root / "m/latest/README.md").exists()
    assert "bad/latest: unreadable manifest" in cask("ls", status=1).err


def test_mounting_where_it_cannot_be_is_told_in_one_line(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    cask("import", write_model(tmp_path / "m"))

    def said(directory: Path) -> str:
        done = cask("mount", directory, status=1)
        assert done.err.count("\n") == 1
        return done.err

    assert "does not exist" in said(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "is not empty (it holds 'file')" in said(tmp_path / "full")
    assert "is not a folder" in said(tmp_path / "full/file")
    assert "has something mounted on it" in said(mount())


def test_unmounting_tells_who_uses_the_mount(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    cask("import", write_model(tmp_path / "m"))
    root = mount()
    with (root / "diffusers/library/m/latest/README.md").open():
        said = cask("umount", root, status=1).err
        assert f"is in use by python (pid {os.getpid()})" in said or f"({os.getpid()})" in said
    cask("umount", root)
    assert "modelcask has nothing mounted here" in cask("umount", root, status=1).err


def test_a_mount_whose_process_was_killed_can_be_mounted_again(cask: CommandLine, fuse: None, tmp_path: Path) -> None:
    del fuse
    cask("import", write_model(tmp_path / "m"))
    directory = tmp_path / "mnt"
    directory.mkdir()
    process = cask.start("mount", directory, "-f")
    wait_for(lambda: (directory / "diffusers").is_dir())
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(child, 9)
    process.communicate(timeout=10)
    with pytest.raises(OSError, match="not connected"):
        os.listdir(directory)  # noqa: PTH208
    with cask.mounted(directory):
        assert (directory / "diffusers/library/m/latest/README.md").exists()


def test_sigterm_unmounts(cask: CommandLine, fuse: None, tmp_path: Path) -> None:
    del fuse
    directory = tmp_path / "mnt"
    directory.mkdir()
    cask("demo", tmp_path / "tiny")
    cask("import", tmp_path / "tiny")
    process = cask.start("mount", directory, "-f")
    wait_for(lambda: (directory / "diffusers").is_dir())
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(child, 15)
    process.communicate(timeout=10)
    assert process.returncode == 0
    assert not directory.is_mount()
