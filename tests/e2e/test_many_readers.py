"""Readers that get in one another's way, at the boundaries of spans, and a disk that does not answer."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from folders import Tensor, tensor, write_component, write_model
from modelcask.mounts import device_of
from modelcask.names import ModelName
from modelcask.store import Store
from running import CommandLine, serving, wait_for
from upstream_models import keep_what_upstream_writes

pytestmark = pytest.mark.fuse

Mount = Callable[[], Path]
_SHARD = "transformer/diffusion_pytorch_model.safetensors"
_DEADLINE = 60

# Eight threads take page faults with the GIL held, each among other pages, and hand it on after every fault.
_FAULTS = """
import mmap, os, sys, threading
path, original = sys.argv[1:]
sys.setswitchinterval(1e-6)
fd = os.open(path, os.O_RDONLY)
mapped = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
data = open(original, "rb").read()
wrong = []
def fault(first):
    for page in range(first, len(data) // 4096, 8):
        if mapped[page * 4096] != data[page * 4096]:
            wrong.append(page)
threads = [threading.Thread(target=fault, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(len(wrong))
"""

_READ_A_LITTLE = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.pread(fd, 4096, 0)
print("begun", flush=True)
while True:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.pread(fd, 1 << 22, 0)
"""


def imported(cask: CommandLine, tmp_path: Path, weights: dict[str, Tensor], name: str = "m") -> Path:
    """A model whose transformer has these weights; the shard it was imported from."""
    folder = write_model(tmp_path / name)
    write_component(folder / "transformer", [weights], stem="diffusion_pytorch_model")
    cask("import", folder)
    return folder / _SHARD


def test_parallel_page_faults_of_one_process_come_to_an_end(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    shard = imported(cask, tmp_path, {f"w{n}": tensor(f"w{n}", 300 + n, 1000) for n in range(40)})
    path = mount() / "diffusers/library/m/latest" / _SHARD
    done = subprocess.run([sys.executable, "-c", _FAULTS, path, shard], timeout=_DEADLINE, check=False)
    assert done.returncode == 0


def test_a_reader_that_stops_in_the_middle_holds_up_nobody(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    shard = imported(cask, tmp_path, {"w": tensor("w", 3000, 1000)})
    path = mount() / "diffusers/library/m/latest" / _SHARD
    stopped = [subprocess.Popen([sys.executable, "-c", _READ_A_LITTLE, path], stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for process in stopped:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
        reading = subprocess.run(["cmp", path, shard], timeout=_DEADLINE, check=False)
        assert reading.returncode == 0
    finally:
        for process in stopped:
            process.kill()
            process.communicate()


def test_reads_of_one_byte_and_of_64_mib_are_right_at_every_boundary_between_spans(
    cask: CommandLine, mount: Mount, tmp_path: Path
) -> None:
    weights = {f"w{n}": tensor(f"w{n}", 1 + n * 37 % 50, 11) for n in range(60)}
    weights |= {"long": tensor("long", 35_000, 1000), "behind": tensor("behind", 3)}
    shard = imported(cask, tmp_path, weights)
    data = shard.read_bytes()
    assert len(data) > 64 << 20
    boundaries, end = [0, 8], len(data) - sum(len(each.data) for each in weights.values())
    for each in weights.values():
        boundaries.append(end)
        end += len(each.data)
    boundaries.append(end)
    assert end == len(data)
    fd = os.open(mount() / "diffusers/library/m/latest" / _SHARD, os.O_RDONLY)
    try:
        for offset in {max(0, boundary + step) for boundary in boundaries for step in (-1, 0, 1)}:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, 1, offset) == data[offset : offset + 1]
        for offset in boundaries[:3] + boundaries[30:33] + boundaries[-4:]:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, 64 << 20, offset) == data[offset : offset + (64 << 20)]
        for offset in (len(data), len(data) + 1, len(data) + (1 << 30), 1 << 50):
            assert os.pread(fd, 64 << 20, offset) == b""
    finally:
        os.close(fd)


@contextmanager
def on_another_disk(cask: CommandLine, tmp_path: Path, model: str, layer: str) -> Iterator[int]:
    """Has the blob of a layer on a second mount, of another store. The process that serves it can be stopped."""
    layers = cask("show", model, "--json").json["layers"]
    digest = next(each["digest"] for each in layers if each["name"] == layer)
    blob = cask.store / "blobs" / digest.replace(":", "-")
    disk = CommandLine(tmp_path / "disk", tmp_path / "home")
    carrier = write_model(tmp_path / "carrier")
    (carrier / "blob.txt").write_bytes(blob.read_bytes())
    disk("import", carrier)
    with disk.mounted(tmp_path / "disk mount") as lower:
        blob.unlink()
        blob.symlink_to(lower / "diffusers/library/carrier/latest/blob.txt")
        (server,) = serving(disk.store)
        yield server
        cask("umount", tmp_path / "mnt")


def holds_up_nobody_else(server: int, stuck: list[list[str | Path]], free: list[list[str | Path]]) -> None:
    """The commands `stuck` end when `server` goes on, those of `free` before."""
    os.kill(server, signal.SIGSTOP)
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in stuck]
    try:
        time.sleep(0.5)  # for the requests to get stuck; were they not yet, the test would only be weaker
        for command in free:
            subprocess.run(command, timeout=_DEADLINE, check=True, stdout=subprocess.DEVNULL)
        assert [process.poll() for process in processes] == [None] * len(stuck)
    finally:
        os.kill(server, signal.SIGCONT)
        assert [process.wait(_DEADLINE) for process in processes] == [0] * len(stuck)


def test_a_blob_on_a_disk_that_does_not_answer_holds_up_nobody_else(
    cask: CommandLine, mount: Mount, tmp_path: Path
) -> None:
    data = {name: tensor(name, 3000, 1000) for name in ("stuck", "free")}
    shards = {name: imported(cask, tmp_path, {"w": data[name]}, name) for name in data}
    with on_another_disk(cask, tmp_path, "stuck", "transformer/w") as server:
        shown = mount() / "diffusers/library"
        assert (shown / "stuck/latest" / _SHARD).stat().st_size == shards["stuck"].stat().st_size
        compare: dict[str, list[str | Path]] = {
            name: ["cmp", shown / name / "latest" / _SHARD, shards[name]] for name in shards
        }
        holds_up_nobody_else(server, [compare["stuck"]] * 3, [compare["free"], ["ls", "-lR", shown / "free"]])


@pytest.mark.parametrize("view", ["diffusers/library/stuck", "hub/models--library--stuck/snapshots"])
def test_a_model_whose_folder_needs_a_disk_that_does_not_answer_holds_up_nobody_else(
    cask: CommandLine, mount: Mount, tmp_path: Path, view: str
) -> None:
    """Of a model of upstream's, the files' names follow from the blob of its index."""
    shard = imported(cask, tmp_path, {"w": tensor("w", 300, 1000)}, "free")
    cask("import", write_model(tmp_path / "stuck", transformer="other"))
    keep_what_upstream_writes(Store.open(cask.store), ModelName.parse("stuck"))
    with on_another_disk(cask, tmp_path, "stuck", "model_index.json") as server:
        root = mount()
        compare: list[str | Path] = ["cmp", root / "diffusers/library/free/latest" / _SHARD, shard]
        holds_up_nobody_else(server, [["ls", "-R", root / view]] * 3, [compare])


def test_reads_are_answered_when_no_more_threads_are_to_be_had(cask: CommandLine, mount: Mount, tmp_path: Path) -> None:
    shard = imported(cask, tmp_path, {f"w{n}": tensor(f"w{n}", 100, 1000) for n in range(40)})
    path = mount() / "diffusers/library/m/latest" / _SHARD
    (server,) = serving(cask.store)
    size = int(Path(f"/proc/{server}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    # Less than a thread's stack takes, more than the buffers of those that there are.
    resource.prlimit(server, resource.RLIMIT_AS, (size + (6 << 20),) * 2)
    reading = [subprocess.Popen(["cmp", path, shard]) for _ in range(16)]
    try:
        assert [process.wait(_DEADLINE) for process in reading] == [0] * len(reading)
    finally:
        for process in reading:
            process.kill()
            process.wait()


def test_directories_that_were_let_go_of_are_found_again_until_their_model_is_replaced(
    cask: CommandLine, mount: Mount, tmp_path: Path
) -> None:
    """The kernel remembers more than the mount keeps."""
    folder = write_model(tmp_path / "m")
    for name in ("kept", "replaced"):
        cask("import", folder, "--name", name)
    manifests = cask.store / "manifests/registry.ollama.ai/library"
    for number in range(100):
        (manifests / f"other{number}").mkdir()
        (manifests / f"other{number}/latest").write_bytes((manifests / "kept/latest").read_bytes())
    shown = mount() / "diffusers/library"
    vaes = {name: os.open(shown / name / "latest/vae", os.O_PATH) for name in ("kept", "replaced")}
    file = (shown / "replaced/latest" / _SHARD).open("rb")
    try:
        cask("import", write_model(tmp_path / "new", transformer="new"), "--name", "replaced")
        subprocess.run(["ls", "-lR", shown], check=True, stdout=subprocess.DEVNULL)
        fd = os.open("config.json", os.O_RDONLY, dir_fd=vaes["kept"])
        assert os.read(fd, 1 << 20) == (folder / "vae/config.json").read_bytes()
        os.close(fd)
        with pytest.raises(OSError, match="Stale"):
            os.open("config.json", os.O_RDONLY, dir_fd=vaes["replaced"])
        assert file.read() == (folder / _SHARD).read_bytes()
        assert os.fstat(file.fileno()).st_size == (folder / _SHARD).stat().st_size
    finally:
        file.close()
        for each in vaes.values():
            os.close(each)


def test_root_mounts_read_ahead_a_mebibyte(cask: CommandLine, mount: Mount) -> None:
    del cask
    device = device_of(mount())
    if os.geteuid() != 0:
        pytest.skip("only root may raise a mount's read-ahead")
    assert wait_for(lambda: Path(f"/sys/class/bdi/{device}/read_ahead_kb").read_text()) == "1024\n"
