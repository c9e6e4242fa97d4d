"""How a mount starts, ends and fails, and which library serves it."""

from __future__ import annotations

import mmap
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from folders import tensor, write_component, write_model
from modelcask.mounts import clear_dead_mount
from running import CommandLine, serving, wait_for

pytestmark = pytest.mark.fuse

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may hide files in a mount namespace")
WHICH = 'from modelcaskfs import fuse_binding; print("libfuse", fuse_binding.load().major)'
SERVE = "from modelcaskfs.cli import main; main()"


def has_libfuse3() -> bool:
    environment = {**os.environ, "FUSE_LIBRARY_NAME": "fuse3"}
    command = [sys.executable, "-c", "import mfusepy; assert mfusepy.fuse_version_major == 3"]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


needs_libfuse3 = pytest.mark.skipif(not has_libfuse3(), reason="libfuse 3 or mfusepy is not installed")


def without(hidden: list[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a mount namespace where the libraries whose names begin like `hidden` cannot be loaded."""
    names = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    libraries = next(Path(name).parent for name in names if Path(name).name.startswith("libc.so"))
    found = [path for path in libraries.iterdir() if path.name.startswith(tuple(hidden)) and not path.is_symlink()]
    hide = [f"mount --bind /dev/null {path}" for path in found]
    lines = ["set -e", *hide, shlex.join([sys.executable, "-c", code, *arguments])]
    return subprocess.run(
        ["unshare", "-m", "--propagation", "slave", "sh", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "MODELCASKFS_LIBFUSE": ""},
    )


@needs_root
def test_libfuse_2_serves_where_it_is_and_libfuse_3_where_it_alone_is(fuse: None) -> None:
    del fuse
    assert without([], WHICH).stdout == "libfuse 2\n"
    if has_libfuse3():
        assert without(["libfuse.so.2"], WHICH).stdout == "libfuse 3\n"


@needs_root
def test_without_any_libfuse_one_line_says_what_to_install(cask: CommandLine, fuse: None, tmp_path: Path) -> None:
    del fuse
    cask("import", write_model(tmp_path / "m"))
    (tmp_path / "mnt").mkdir()
    done = without(["libfuse.so.2", "libfuse3.so"], SERVE, str(cask.store), str(tmp_path / "mnt"), "-f")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no library to mount with is installed; apt install fuse libfuse2" in done.stderr


@needs_root
def test_what_the_library_complains_of_is_told_in_the_one_line(cask: CommandLine, fuse: None, tmp_path: Path) -> None:
    del fuse
    cask("import", write_model(tmp_path / "m"))
    (tmp_path / "mnt").mkdir()
    command = shlex.join([sys.executable, "-m", "modelcaskfs", str(cask.store), str(tmp_path / "mnt"), "-f"])
    script = f"mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec {command}"
    hidden = ["unshare", "-m", "--propagation", "slave", "sh", "-c", script]
    done = subprocess.run(hidden, env=cask.environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "device not found" in done.stderr


@needs_libfuse3
def test_libfuse_3_shows_what_libfuse_2_shows(cask: CommandLine, fuse: None, tmp_path: Path) -> None:
    """The mount tests run on libfuse 3 as a whole with MODELCASKFS_LIBFUSE=3; this one sees that both agree."""
    del fuse
    cask("import", write_model(tmp_path / "m"))
    cask("import", tmp_path / "m", "--quantize", "int8")
    shown = []
    for major in ("2", "3"):
        cask.environment["MODELCASKFS_LIBFUSE"] = major
        with cask.mounted(tmp_path / "mnt") as root:
            (server,) = serving(cask.store)
            library = {"2": "libfuse.so.2", "3": "libfuse3.so"}[major]
            assert library in Path(f"/proc/{server}/maps").read_text()
            facts = {}
            for path in root.rglob("*"):
                status = path.lstat()
                data = path.read_bytes() if path.is_file() else b""
                facts[path] = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, data)
            shown.append(facts)
    assert shown[0] == shown[1]


def test_sigterm_unmounts_at_once_and_lets_what_is_mapped_live(cask: CommandLine, fuse: None, tmp_path: Path) -> None:
    del fuse
    folder, shard = write_model(tmp_path / "m"), Path("vae/diffusion_pytorch_model.safetensors")
    write_component(folder / "vae", [{"w": tensor("w", 2000, 1000)}], stem="diffusion_pytorch_model")
    cask("import", folder)
    directory = tmp_path / "mnt"
    directory.mkdir()
    cask("mount", directory)
    (server,) = serving(cask.store)
    with (directory / "diffusers/library/m/latest" / shard).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.kill(server, signal.SIGTERM)
    wait_for(lambda: not directory.is_mount(), seconds=5)
    cask("rm", "m")
    cask("gc")
    assert mapped[:] == (folder / shard).read_bytes()
    assert serving(cask.store) == [server]
    with cask.mounted(directory):  # the place is free again
        assert (directory / "diffusers").is_dir()
    mapped.close()
    wait_for(lambda: serving(cask.store) == [])
    assert cask("gc", "--json").json["freed_bytes"] > 4_000_000


def test_a_second_sigint_ends_it_whoever_uses_it(cask: CommandLine, fuse: None, tmp_path: Path) -> None:
    del fuse
    cask("import", write_model(tmp_path / "m"))
    directory = tmp_path / "mnt"
    directory.mkdir()
    cask("mount", directory)
    (server,) = serving(cask.store)
    with (directory / "diffusers/library/m/latest/README.md").open():
        os.kill(server, signal.SIGTERM)
        wait_for(lambda: not directory.is_mount(), seconds=5)
        os.kill(server, signal.SIGTERM)  # as the kernel does when a supervisor ends
        assert serving(cask.store) == [server]
        os.kill(server, signal.SIGINT)
        wait_for(lambda: serving(cask.store) == [], seconds=5)


def test_a_mount_that_cannot_be_unmounted_says_so_and_ends_with_a_second_sigterm(
    cask: CommandLine, fuse: None, tmp_path: Path
) -> None:
    del fuse
    programs, directory = tmp_path / "bin", tmp_path / "mnt"
    programs.mkdir()
    directory.mkdir()
    for name in ("umount", "fusermount", "fusermount3"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o755)
    path = cask.environment["PATH"]
    cask.environment["PATH"] = f"{programs}:{path}"
    cask("mount", directory)
    cask.environment["PATH"] = path
    (server,) = serving(cask.store)
    log = Path(cask.environment["HOME"]) / ".local/state/modelcask/mount.log"
    try:
        os.kill(server, signal.SIGTERM)
        wait_for(lambda: f"{directory}: could not be unmounted" in log.read_text(), seconds=5)
        assert (directory / "diffusers").is_dir()
        os.kill(server, signal.SIGTERM)
        wait_for(lambda: serving(cask.store) == [], seconds=5)
    finally:
        clear_dead_mount(directory)
    assert not directory.is_mount()


def test_a_crash_is_logged_with_its_reason_and_the_next_mount_clears_up(
    cask: CommandLine, fuse: None, tmp_path: Path
) -> None:
    del fuse
    cask("import", write_model(tmp_path / "m"))
    directory = tmp_path / "mnt"
    directory.mkdir()
    cask("mount", directory)
    (server,) = serving(cask.store)
    os.kill(server, signal.SIGSEGV)
    wait_for(lambda: serving(cask.store) == [])
    log = Path(cask.environment["HOME"]) / ".local/state/modelcask/mount.log"
    assert "Segmentation fault" in log.read_text()
    assert "session.py" in log.read_text() or "libfuse.py" in log.read_text()
    cask("mount", directory)
    assert (directory / "diffusers/library/m/latest/README.md").exists()
    cask("umount", directory)


def test_mount_returns_when_the_mount_answers(cask: CommandLine, fuse: None, tmp_path: Path) -> None:
    del fuse
    cask("import", write_model(tmp_path / "m"))
    directory = tmp_path / "mnt"
    directory.mkdir()
    for _ in range(3):
        cask("mount", directory)
        assert (directory / "diffusers/library/m/latest/README.md").read_text() == "# a model\n"
        cask("umount", directory)
        assert list(directory.iterdir()) == []
