"""What programs expect of a read-only filesystem, in the manner of pjdfstest."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from folders import tensor, write_component, write_model
from running import CommandLine

pytestmark = pytest.mark.fuse

LIBC = ctypes.CDLL(None, use_errno=True)
SHARD = Path("vae/diffusion_pytorch_model.safetensors")


@pytest.fixture
def dropped(tmp_path: Path) -> Path:
    """A model folder whose autoencoder has 300 KB of weights."""
    folder = write_model(tmp_path / "m")
    write_component(folder / "vae", [{"w": tensor("w", 150, 1000)}], stem="diffusion_pytorch_model")
    return folder


@pytest.fixture
def model(cask: CommandLine, fuse: None, dropped: Path, tmp_path: Path) -> Iterator[Path]:
    """The model's folder in a mount."""
    del fuse
    cask("import", dropped)
    with cask.mounted(tmp_path / "mnt") as root:
        yield root / "diffusers/library/m/latest"


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def fallocate(path: Path) -> None:
    with opened(path, os.O_RDWR) as fd:
        os.posix_fallocate(fd, 0, 10)


def rename_exchange(path: Path) -> None:
    at_cwd, exchange = -100, 2
    other = os.fsencode(path.with_name("config.json"))
    if LIBC.renameat2(at_cwd, os.fsencode(path), at_cwd, other, exchange) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


WRITES: dict[str, Callable[[Path], object]] = {
    "open for writing": lambda path: os.open(path, os.O_WRONLY),
    "open for both": lambda path: os.open(path, os.O_RDWR),
    "open and truncate": lambda path: os.open(path, os.O_RDONLY | os.O_TRUNC),
    "create": lambda path: os.open(path.with_name("new"), os.O_RDONLY | os.O_CREAT),
    "create without a name": lambda path: os.open(path.parent, os.O_WRONLY | os.O_TMPFILE),
    "truncate": lambda path: os.truncate(path, 0),
    "fallocate": fallocate,
    "mkdir": lambda path: path.with_name("new").mkdir(),
    "mkfifo": lambda path: os.mkfifo(path.with_name("new")),
    "mknod": lambda path: os.mknod(path.with_name("new")),
    "symlink": lambda path: path.with_name("new").symlink_to("x"),
    "link": lambda path: os.link(path, path.with_name("new")),
    "unlink": lambda path: path.unlink(),
    "rmdir": lambda path: path.parent.rmdir(),
    "rename": lambda path: path.rename(path.with_name("new")),
    "exchange": rename_exchange,
    "chmod": lambda path: path.chmod(0o777),
    "chown": lambda path: os.chown(path, 1, 1),
    "utime": lambda path: os.utime(path, (1, 1)),
    "utime of a folder": lambda path: os.utime(path.parent),
    "setxattr": lambda path: os.setxattr(path, "user.x", b"y"),
    "removexattr": lambda path: os.removexattr(path, "user.modelcask.digest"),
    "setxattr of a folder": lambda path: os.setxattr(path.parent, "user.x", b"y"),
}


def test_every_kind_of_write_is_refused_as_on_a_read_only_filesystem(model: Path) -> None:
    given = {}
    for name, write in WRITES.items():
        with pytest.raises(OSError, match=r".") as caught:
            write(model / SHARD)
        given[name] = errno.errorcode[caught.value.errno or 0]
    assert given == dict.fromkeys(WRITES, "EROFS")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may remount")
def test_nothing_can_be_written_where_somebody_remounted_it_writable(model: Path, dropped: Path) -> None:
    subprocess.run(["mount", "-i", "-o", "remount,rw", model.parents[3]], check=True)
    assert not os.statvfs(model).f_flag & os.ST_RDONLY
    given = {}
    for name, write in WRITES.items():
        with pytest.raises(OSError, match=r".") as caught:
            write(model / SHARD)
        given[name] = errno.errorcode[caught.value.errno or 0]
    # These two are not in every libfuse's protocol; the kernel refuses them itself then.
    assert given.pop("create without a name") in ("ENOTSUP", "EROFS")
    assert given.pop("exchange") in ("EINVAL", "EROFS")
    assert set(given.values()) == {"EROFS"}
    assert (model / SHARD).read_bytes() == (dropped / SHARD).read_bytes()


def test_writing_to_what_is_open_for_reading_is_refused(model: Path) -> None:
    with opened(model / SHARD) as fd:
        for write in (
            lambda: os.write(fd, b"x"),
            lambda: os.ftruncate(fd, 0),
            lambda: os.posix_fallocate(fd, 0, 1),
        ):
            with pytest.raises(OSError, match=r".") as caught:
                write()
            assert caught.value.errno in (errno.EBADF, errno.EINVAL)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        os.fsync(fd)  # nothing to flush is no error


def test_names_that_are_too_long_or_wrong_get_their_own_errors(model: Path) -> None:
    for path, expected in (
        (model / ("x" * 256), errno.ENAMETOOLONG),
        (model / ("x" * 255), errno.ENOENT),
        (model / "/".join(["x"] * 3000), errno.ENAMETOOLONG),
        (model / "model_index.json" / "x", errno.ENOTDIR),
        (model / "vae" / ".." / "nothing", errno.ENOENT),
    ):
        with pytest.raises(OSError, match=r".") as caught:
            os.stat(path)  # noqa: PTH116 - Path.stat would do as well
        assert caught.value.errno == expected
    with pytest.raises(NotADirectoryError):
        os.open(model / SHARD, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(IsADirectoryError):
        (model / "vae").read_bytes()


def test_dot_and_dot_dot_are_the_folder_and_the_one_above_it(model: Path) -> None:
    mountpoint = model.parents[3]
    for path in (model / "vae", model, model.parent, mountpoint / "diffusers"):
        assert (path / "..").stat().st_ino == path.parent.stat().st_ino
        assert (path / ".").stat().st_ino == path.stat().st_ino
    assert (mountpoint / "..").stat().st_dev == mountpoint.parent.stat().st_dev
    with opened(model / "vae") as fd:
        above = os.open("..", os.O_RDONLY, dir_fd=fd)
        assert os.fstat(above).st_ino == model.stat().st_ino
        os.close(above)


def test_inodes_stay_when_the_kernel_forgets_them(model: Path) -> None:
    before = {path: path.stat().st_ino for path in model.rglob("*")}
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("2")
    assert {path: path.stat().st_ino for path in model.rglob("*")} == before
    listed = {entry.name: entry.inode() for entry in os.scandir(model)}
    assert listed == {path.name: number for path, number in before.items() if path.parent == model}


def test_a_folder_can_be_read_from_any_place_in_it(model: Path) -> None:
    LIBC.opendir.restype = LIBC.readdir.restype = ctypes.c_void_p
    LIBC.telldir.restype = ctypes.c_long
    LIBC.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)
    for function in (LIBC.readdir, LIBC.telldir, LIBC.closedir, LIBC.rewinddir):
        function.argtypes = (ctypes.c_void_p,)
    name_offset = 19  # of d_name in struct dirent: two words, a length and a type before it
    folder = LIBC.opendir(os.fsencode(model))
    read: list[tuple[int, bytes]] = []
    place = LIBC.telldir(folder)
    while entry := LIBC.readdir(folder):
        read.append((place, ctypes.string_at(entry + name_offset)))
        place = LIBC.telldir(folder)
    names = [name for _, name in read]
    assert sorted(names) == sorted([b".", b"..", *map(os.fsencode, os.listdir(model))])  # noqa: PTH208
    for place, name in reversed(read):
        LIBC.seekdir(folder, place)
        assert ctypes.string_at(LIBC.readdir(folder) + name_offset) == name
    LIBC.rewinddir(folder)
    assert ctypes.string_at(LIBC.readdir(folder) + name_offset) == names[0]
    LIBC.closedir(folder)


def test_direct_reads_get_the_same_bytes(model: Path, dropped: Path) -> None:
    data = (dropped / SHARD).read_bytes()
    with opened(model / SHARD, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 1 << 20) as buffer:
        for offset in (0, 4096, 65536, len(data) - len(data) % 4096):
            count = os.preadv(fd, [buffer], offset)
            assert buffer[:count] == data[offset:]
        assert os.preadv(fd, [buffer], len(data) + 4096) == 0


def test_a_file_is_all_data_and_its_hole_begins_at_its_end(model: Path) -> None:
    with opened(model / SHARD) as fd:
        size = os.fstat(fd).st_size
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 1000, os.SEEK_DATA) == 1000
        assert os.lseek(fd, 0, os.SEEK_HOLE) == size
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with pytest.raises(OSError, match=r".") as caught:
                os.lseek(fd, size, whence)
            assert caught.value.errno == errno.ENXIO
        assert os.lseek(fd, -10, os.SEEK_END) == size - 10


def test_a_private_mapping_can_be_written_and_the_file_stays(model: Path, dropped: Path) -> None:
    data = (dropped / SHARD).read_bytes()
    with opened(model / SHARD) as fd:
        mapped = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        mapped[:] = bytes(len(data))
        other = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        assert other[:] == data
        assert mapped[:] == bytes(len(data))
        other.close()
        mapped.close()


def test_copies_made_by_the_kernel_are_whole(model: Path, dropped: Path, tmp_path: Path) -> None:
    size = (dropped / SHARD).stat().st_size
    with opened(model / SHARD) as fd, (tmp_path / "sent").open("w+b") as sent:
        offset = 0
        while offset < size:
            offset += os.sendfile(sent.fileno(), fd, offset, size)
    subprocess.run(["cp", "--sparse=always", "--preserve=all", model / SHARD, tmp_path / "copy"], check=True)
    for name in ("copy", "sent"):
        assert (tmp_path / name).read_bytes() == (dropped / SHARD).read_bytes()


def test_locks_for_reading_can_be_taken(model: Path) -> None:
    with opened(model / SHARD) as one, opened(model / SHARD) as two:
        for fd in (one, two):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_watch_on_the_mount_is_told_of_what_is_opened_and_does_not_hang(model: Path) -> None:
    watch_open = 0x20
    watcher = LIBC.inotify_init()
    try:
        assert LIBC.inotify_add_watch(watcher, os.fsencode(model), watch_open) > 0
        (model / "README.md").read_bytes()
        assert select.select([watcher], [], [], 10)[0]
        assert b"README.md" in os.read(watcher, 4096)
    finally:
        os.close(watcher)
