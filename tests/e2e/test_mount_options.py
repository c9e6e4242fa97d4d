"""Mounting as mount(8) and /etc/fstab do it, and what the options change."""

from __future__ import annotations

import errno
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from folders import write_model
from modelcask.mounts import FILESYSTEM_TYPE, current_mounts
from running import CommandLine, blob_files

pytestmark = pytest.mark.fuse

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount with mount(8), and be somebody else")


@pytest.fixture
def model(cask: CommandLine, fuse: None, tmp_path: Path) -> Path:
    """A model `m` in the store; its path below a mount."""
    del fuse
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)  # others must get as far as the mount
    cask("import", write_model(tmp_path / "m"))
    return Path("diffusers/library/m/latest")


def said_while_mounted_by_mount(
    cask: CommandLine, directory: Path, options: str, *commands: str, fstab: bool
) -> list[str]:
    """What each of `commands` prints while mount(8) has mounted the store; with `fstab` from a line in a table.

    mount(8) looks for helpers in the system's folders alone. One of them is covered in a mount namespace of its own.
    """
    programs, table = directory.parent / "programs", directory.parent / "fstab"
    programs.mkdir()
    script = programs / "modelcaskfs"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m modelcaskfs "$@"\n')
    script.chmod(0o755)
    directory.mkdir(exist_ok=True)
    table.write_text(f"{cask.store} {directory} {FILESYSTEM_TYPE} {options} 0 0\n")
    mount = ["-T", str(table), str(directory)]
    if not fstab:
        mount = ["-t", FILESYSTEM_TYPE, str(cask.store), str(directory), "-o", options]
    lines = ["set -e", f"mount --bind {programs} /usr/local/sbin", shlex.join(["mount", *mount])]
    for command in commands:
        lines += [command, r"printf '\0'"]
    lines += [f"umount {directory}"]
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "slave", "sh", "-c", "\n".join(lines)],
        env=cask.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def as_nobody(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, check=False
    )


@needs_root
@pytest.mark.parametrize("fstab", [False, True])
def test_mount_mounts_a_store_with_all_that_stands_in_fstab(
    cask: CommandLine, model: Path, tmp_path: Path, *, fstab: bool
) -> None:
    options = "ro,nosuid,nodev,noexec,noauto,nofail,_netdev,noatime,x-systemd.automount,x-systemd.idle-timeout=60"
    readme = tmp_path / "mnt" / model / "README.md"
    read, found, df, by_nobody, path = said_while_mounted_by_mount(
        cask,
        tmp_path / "mnt",
        f"{options},allow_other,default_permissions",
        f"cat {readme}",
        f"findmnt -n -o SOURCE,FSTYPE,OPTIONS {tmp_path}/mnt",
        f"df --output=source,fstype,size {tmp_path}/mnt",
        f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups cat {readme}",
        f"{sys.executable} -m modelcask path m",
        fstab=fstab,
    )
    assert read == by_nobody == "# a model\n"
    source, kind, shown = found.split()
    assert (source, kind) == (str(cask.store), FILESYSTEM_TYPE)
    assert {"ro", "nosuid", "nodev", "noexec", "allow_other", "default_permissions"} <= set(shown.split(","))
    store_size = os.statvfs(cask.store).f_blocks * os.statvfs(cask.store).f_frsize // 1024
    assert df.splitlines()[1].split() == [str(cask.store), FILESYSTEM_TYPE, str(store_size)]
    assert path.strip() == str(readme.parent)


@needs_root
def test_the_helper_that_mount_runs_takes_the_flags_that_mount_passes(
    cask: CommandLine, model: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    (tmp_path / "mount.fuse.modelcaskfs").write_text("from modelcaskfs.cli import main\nmain()\n")
    command = [sys.executable, tmp_path / "mount.fuse.modelcaskfs", cask.store, directory]
    subprocess.run([*command, "-sfn", "-o", "rw"], env=cask.environment, check=True)  # -f: only as if
    assert not directory.is_mount()
    subprocess.run([*command, "-v", "-t", FILESYSTEM_TYPE, "-o", "rw,dev,suid"], env=cask.environment, check=True)
    try:
        assert (directory / model).is_dir()
    finally:
        cask("umount", directory)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("nonsense", "there is no such mount option; there are allow_other"),
        ("allow_other,fsname=x", "-o fsname=x: there is no such"),
        ("uid=nobody-of-that-name", "nobody of that name"),
        ("umask=9", "octal"),
        ("self_contained=1", "there is no such"),
    ],
)
def test_an_unknown_option_is_refused_in_one_line(
    cask: CommandLine, model: Path, tmp_path: Path, option: str, said: str
) -> None:
    del model
    (tmp_path / "mnt").mkdir()
    done = cask("mount", tmp_path / "mnt", "-o", option, status=2)
    assert done.err.count("\n") == 1
    assert said in done.err
    assert not (tmp_path / "mnt").is_mount()


def test_wrong_usage_is_told_in_one_line(cask: CommandLine) -> None:
    command = [sys.executable, "-m", "modelcaskfs", "only-a-store"]
    done = subprocess.run(command, env=cask.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@needs_root
def test_others_get_nothing_without_allow_other(cask: CommandLine, model: Path, tmp_path: Path) -> None:
    with cask.mounted(tmp_path / "mnt") as root:
        for path in (root, root / model / "README.md"):
            assert "Permission denied" in as_nobody("ls", path).stderr


@needs_root
def test_owner_and_modes_are_as_asked_for_and_are_kept_to(cask: CommandLine, model: Path, tmp_path: Path) -> None:
    options = f"allow_other,uid=nobody,gid={NOBODY},umask=027"
    with cask.mounted(tmp_path / "mnt", "-o", options) as root:
        file = (root / model / "README.md").stat()
        assert (file.st_uid, file.st_gid, stat.S_IMODE(file.st_mode)) == (NOBODY, NOBODY, 0o440)
        assert stat.S_IMODE((root / model).stat().st_mode) == 0o550
        assert as_nobody("cat", root / model / "README.md").stdout == "# a model\n"
    with cask.mounted(tmp_path / "mnt", "-o", "allow_other,umask=077") as root:
        assert "Permission denied" in as_nobody("cat", root / model / "README.md").stderr


def test_self_contained_serves_the_blobs_itself(cask: CommandLine, model: Path, tmp_path: Path) -> None:
    del model
    with cask.mounted(tmp_path / "mnt", "-o", "self_contained") as root:
        device = root.stat().st_dev
        assert not (root / "blobs").is_symlink()
        assert {path.name: path.stat().st_size for path in (root / "blobs").iterdir()} == blob_files(cask.store)
        for path in (root / "blobs").iterdir():
            assert path.read_bytes() == (cask.store / "blobs" / path.name).read_bytes()
            assert path.stat().st_dev == device
        links = [path for path in (root / "tensors").rglob("*") if path.is_symlink()]
        assert links
        for link in links:
            assert not link.readlink().is_absolute()
            assert link.resolve().parent == root / "blobs"
            assert os.getxattr(link.resolve(), "user.modelcask.digest").decode() == link.resolve().name.replace(
                "-", ":"
            )
        assert not (root / "blobs/sha256-x").exists()
        victim = next((root / "blobs").iterdir())
        with victim.open("rb") as file:  # what is open is kept from gc
            cask("rm", "m")
            cask("gc")
            assert len(file.read()) == os.fstat(file.fileno()).st_size
            assert [*blob_files(cask.store)] == [victim.name]


def test_extended_attributes_tell_digest_media_type_and_quantization(
    cask: CommandLine, model: Path, tmp_path: Path
) -> None:
    cask("import", tmp_path / "m", "--quantize", "int8")
    layers = {layer["name"]: layer for layer in cask("show", "m", "--json").json["layers"]}
    with cask.mounted(tmp_path / "mnt") as root:
        folder = root / model
        for name in ("README.md", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
            assert os.listxattr(folder / name) == ["user.modelcask.digest", "user.modelcask.media_type"]
            assert os.getxattr(folder / name, "user.modelcask.digest").decode() == layers[name]["digest"]
            assert os.getxattr(folder / name, "user.modelcask.media_type").decode() == layers[name]["mediaType"]
        manifest = subprocess.run(
            ["sha256sum", cask.store / "manifests/registry.ollama.ai/library/m/latest"], capture_output=True, check=True
        )
        assert os.getxattr(folder, "user.modelcask.digest") == b"sha256:" + manifest.stdout[:64]
        assert os.getxattr(folder.with_name("int8"), "user.modelcask.quantization") == b"int8"
        shard = folder.with_name("int8") / "vae/diffusion_pytorch_model.safetensors"
        assert os.getxattr(shard, "user.modelcask.quantization") == b"int8"
        assert os.listxattr(root / "mlx/library/m/int8/text_encoder/model.safetensors") == [
            "user.modelcask.quantization"
        ]
        for path, name in ((folder / "README.md", "user.modelcask.quantization"), (root, "user.modelcask.digest")):
            with pytest.raises(OSError, match="No data") as caught:
                os.getxattr(path, name)
            assert caught.value.errno == errno.ENODATA
        assert os.listxattr(root) == []


def test_a_buffer_too_small_for_an_attribute_gets_an_error(cask: CommandLine, model: Path, tmp_path: Path) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with cask.mounted(tmp_path / "mnt") as root:
        path, buffer = os.fsencode(root / model / "README.md"), ctypes.create_string_buffer(100)
        name = b"user.modelcask.digest"
        assert libc.getxattr(path, name, None, 0) == 71
        assert libc.getxattr(path, name, buffer, 71) == 71
        assert libc.getxattr(path, name, buffer, 70) == -1
        assert ctypes.get_errno() == errno.ERANGE
        length = libc.listxattr(path, None, 0)
        assert libc.listxattr(path, buffer, length) == length
        assert libc.listxattr(path, buffer, length - 1) == -1
        assert ctypes.get_errno() == errno.ERANGE


def test_current_mounts_sees_a_mount_whatever_its_options(cask: CommandLine, model: Path, tmp_path: Path) -> None:
    del model
    with cask.mounted(tmp_path / "mnt", "-o", "self_contained,umask=022") as root:
        assert [each.store for each in current_mounts() if each.mountpoint == root] == [cask.store]
