"""Folders made to hurt: links and special files in them, files of a terabyte, what is exchanged while it is read.

Who drops a folder may have fewer rights than the import; `tests/e2e/test_other_users.py` is about the users themselves.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.report import peak_rss_mib
from folders import files_of, write_model
from modelcask import source
from modelcask.errors import InvalidModelFolder, ModelcaskError, SourceChanged
from modelcask.settle import look as settled_look
from modelcask.store import Store
from running import CommandLine, import_folder

SHARD = "transformer/diffusion_pytorch_model.safetensors"
SECRET = b"the secret of somebody else"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "drops" / "m")


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder outside of the drop with files named as the drop's are."""
    shutil.copytree(tmp_path / "drops" / "m" / "vae", tmp_path / "secrets")
    for path in (tmp_path / "secrets").iterdir():
        path.write_bytes(SECRET + path.name.encode())
    return tmp_path / "secrets"


def holds_secret(store: Store) -> bool:
    return any(SECRET in path.read_bytes() for path in store.blobs.directory.iterdir())


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
@pytest.mark.parametrize("where", ["vae/more.json", "vae/config.json", SHARD, "model_index.json"])
def test_special_files_are_left_out_and_never_opened(store: Store, folder: Path, kind: str, where: str) -> None:
    path = folder / where
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        parent = os.open(path.parent, os.O_PATH)  # a socket's path has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{parent}/{path.name}")
        os.close(parent)
    else:
        if os.geteuid() != 0:
            pytest.skip("making a device needs root")
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends
    looked = source.look(folder)
    assert str(where) in {entry.path for entry in looked.left_out}
    try:
        import_folder(store, folder)
        assert where == "vae/more.json"
    except InvalidModelFolder:
        assert where != "vae/more.json"


@pytest.mark.parametrize("link_in", ["a file", "a folder", "the middle"])
def test_symlinks_that_lead_out_are_refused(store: Store, folder: Path, secrets: Path, link_in: str) -> None:
    if link_in == "a file":
        (folder / "vae/config.json").unlink()
        (folder / "vae/config.json").symlink_to(secrets / "config.json")
    elif link_in == "a folder":
        shutil.rmtree(folder / "vae")
        (folder / "vae").symlink_to(secrets)
    else:
        (folder / "inner").symlink_to("..")
        (folder / "vae/config.json").unlink()
        (folder / "vae/config.json").symlink_to("../inner/../secrets/config.json")
    with pytest.raises(InvalidModelFolder, match="a symlink"):
        import_folder(store, folder)
    assert not holds_secret(store)


def test_a_folder_named_as_a_snapshot_gets_no_blobs_folder_of_its_choice(store: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_bytes(SECRET)
    for drop in (tmp_path / "drops/snapshots/x", tmp_path / "drops/models--a--b/snapshots/x"):
        write_model(drop)
        (drop.parent.parent / "blobs").symlink_to("/")
        (drop / "vae/more.json").symlink_to(secret)
        with pytest.raises(InvalidModelFolder, match="leads out of the folder"):
            import_folder(store, drop)
    assert not holds_secret(store)


def test_a_hard_link_is_a_file_like_any_other(store: Store, folder: Path, tmp_path: Path) -> None:
    """Nothing tells where else it is linked; fs.protected_hardlinks keeps users from linking what is not theirs."""
    (tmp_path / "elsewhere").write_text("mine")
    os.link(tmp_path / "elsewhere", folder / "vae" / "more.txt")
    looked = source.look(folder)
    (tmp_path / "elsewhere").write_text("changed through its other name")
    with pytest.raises(SourceChanged):
        source.check_unchanged(looked)
    import_folder(store, folder)


@contextmanager
def swapping(path: Path, other: Callable[[], None]) -> Iterator[None]:
    """Exchange what stands at `path` and what `other` makes there, again and again, while the body runs."""
    stop = threading.Event()
    aside = path.parent.parent / "aside"

    def swap() -> None:
        while not stop.is_set():
            path.rename(aside)
            other()
            path.unlink()
            aside.rename(path)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_folder_swapped_for_a_symlink_while_it_is_looked_at_gives_nothing_away(
    store: Store, folder: Path, secrets: Path
) -> None:
    """A race: a look that goes by paths loses it within some hundred looks."""
    forbidden = {(status.st_dev, status.st_ino) for status in (path.stat() for path in secrets.iterdir())}
    outcomes = {"seen": 0, "refused": 0, "imported": 0}
    until = time.monotonic() + 2
    with swapping(folder / "vae", lambda: (folder / "vae").symlink_to(secrets)):
        while time.monotonic() < until:
            try:
                looked = source.look(folder)
                outcomes["seen"] += 1
            except (ModelcaskError, FileNotFoundError):
                outcomes["refused"] += 1
                continue
            assert not {file.identity[:2] for file in looked.files} & forbidden
            for file in looked.files:
                try:
                    with source.opened(file) as fd:
                        assert SECRET not in os.pread(fd, 100, 0)
                except SourceChanged:
                    pass
    assert outcomes["seen"] > 20, outcomes
    assert outcomes["refused"] > 20, outcomes
    assert not holds_secret(store)


def test_an_import_during_swaps_stores_no_secret(store: Store, folder: Path, secrets: Path) -> None:
    until = time.monotonic() + 2
    with swapping(folder / "vae", lambda: (folder / "vae").symlink_to(secrets)):
        while time.monotonic() < until:
            try:
                import_folder(store, folder)
            except (ModelcaskError, FileNotFoundError):
                continue
    import_folder(store, folder)
    assert not holds_secret(store)


@pytest.mark.parametrize("kind", ["symlink", "FIFO", "device", "folder", "other file", "gone", "folder above"])
def test_a_file_exchanged_after_the_look_is_not_opened(folder: Path, secrets: Path, kind: str) -> None:
    looked = source.look(folder)
    file = looked.by_path()[source.PurePosixPath("vae/config.json")]
    path = folder / "vae" / "config.json"
    path.rename(path.with_suffix(".old"))
    if kind == "symlink":
        path.symlink_to("config.old")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        if os.geteuid() != 0:
            pytest.skip("making a device needs root")
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    elif kind == "folder":
        path.mkdir()
    elif kind == "other file":
        path.write_bytes(path.with_suffix(".old").read_bytes())
    elif kind == "folder above":
        (folder / "vae").rename(folder / "was")
        (folder / "vae").symlink_to(secrets)
    with pytest.raises(SourceChanged), source.opened(file) as fd:
        os.read(fd, 1)


def test_a_shard_that_is_truncated_while_it_is_imported_starts_over(cask: CommandLine, tmp_path: Path) -> None:
    """Nothing maps a source, so no SIGBUS; the import says what changed, in a line, and leaves nothing."""
    folder = write_model(tmp_path / "m")
    data = bytearray((folder / SHARD).read_bytes())
    size = 400_000_000
    header = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    data = len(header).to_bytes(8, "little") + header
    (folder / SHARD).write_bytes(data)
    os.truncate(folder / SHARD, len(data) + size)
    process = cask.start("import", folder)
    tmp = cask.store / "tmp"
    while process.poll() is None and not (tmp.exists() and any(path.stat().st_size for path in tmp.glob("*/*"))):
        time.sleep(0.001)
    os.truncate(folder / SHARD, 100_000)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "diffusion_pytorch_model.safetensors: changed while it was imported" in said
    assert list(tmp.iterdir()) == []
    assert cask("ls", "--json").json == []


@pytest.mark.parametrize("what", ["a shard", "a file", "a config", "the index", "a header"])
def test_a_sparse_terabyte_is_found_out_without_being_read(cask: CommandLine, folder: Path, what: str) -> None:
    size = 1 << 40
    path = folder / {"a shard": SHARD, "a file": "vae/notes.txt", "a config": "vae/config.json"}.get(
        what, "model_index.json" if what == "the index" else SHARD
    )
    head = b""
    if what == "a shard":
        text = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
        head = len(text).to_bytes(8, "little") + text
    elif what == "a header":
        head = (90_000_000).to_bytes(8, "little")
    path.write_bytes(head)
    os.truncate(path, len(head) + size)
    cask.store.mkdir()
    if os.statvfs(cask.store).f_bfree * os.statvfs(cask.store).f_frsize > size:
        pytest.skip("this disk has room for a terabyte")
    started = time.monotonic()
    said = cask("import", folder, status=1).err
    assert time.monotonic() - started < 10
    assert said.count("\n") == 1
    if what in ("a shard", "a file", "a config"):
        assert "no space left on device for 1,099,5" in said
    assert settled_look(folder, namespace=None).fingerprint
    assert time.monotonic() - started < 20


def test_what_does_not_fit_by_little_is_told_before_it_is_read(store: Store, folder: Path) -> None:
    status = os.statvfs(store.root)
    free = status.f_bfree * status.f_frsize
    sparse = folder / "vae" / "notes.txt"
    sparse.touch()
    os.truncate(sparse, free + (1 << 30))
    with pytest.raises(OSError, match="no space left on device for") as caught:
        import_folder(store, folder)
    assert caught.value.filename == str(store.root)


def test_what_is_stored_already_needs_no_room(cask: CommandLine, folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    cask.store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(cask.store)], check=True)
    try:
        (folder / "vae" / "notes.txt").write_bytes(os.urandom(5 << 20))
        cask("import", folder)
        cask("import", folder, "--name", "again")
        (folder / "vae" / "more.txt").write_bytes(os.urandom(6 << 20))
        assert "no space left on device for 6 MB at least, " in cask("import", folder, status=1).err
    finally:
        subprocess.run(["umount", str(cask.store)], check=True)


def test_a_folder_of_many_files_and_of_many_folders_is_looked_at_in_bounded_memory(folder: Path) -> None:
    for number in range(20_000):
        (folder / "vae" / f"{number}.txt").touch()
    deep = folder / "deep"
    for _ in range(30):
        deep = deep / "d"
    deep.mkdir(parents=True)
    code = "import sys; from pathlib import Path; from modelcask import source; source.look(Path(sys.argv[1]))"
    assert peak_rss_mib([sys.executable, "-c", code, str(folder)]) < 150
    (deep / "d" / "d").mkdir(parents=True)
    (deep / "d" / "d" / "d").symlink_to(folder)
    with pytest.raises(InvalidModelFolder, match="more than 32 folders deep"):
        source.look(folder)


def test_names_of_255_bytes_and_of_any_letters_come_back(store: Store, folder: Path) -> None:
    for name in ("x" * 255, "a\nb", "\u202egnp.exe", "\x1b[31m", " ", "ünï", "-rf", "*", "a\\b", "%2F"):
        (folder / "vae" / name).write_text(name)
    (folder / "vae").joinpath(os.fsdecode(b"not\xffutf8")).write_text("x")
    result = import_folder(store, folder)[0]
    assert [entry.path for entry in result.skipped] == ["vae/not\\udcffutf8"]
    names = {layer.name for layer in store.manifests.read(result.name).manifest.layers}
    assert {f"vae/{name}" for name in os.listdir(folder / "vae") if name.isascii()} <= names  # noqa: PTH208
    assert files_of(folder)


def test_downloads_that_are_links_are_not_looked_into(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "huge" / "huggingface" / "download").mkdir(parents=True)
    (tmp_path / "huge" / "huggingface" / "download" / "secret.incomplete").touch()
    assert settled_look(folder, namespace=None).plan is not None
    (folder / ".cache").symlink_to(tmp_path / "huge")
    assert "secret" not in str(settled_look(folder, namespace=None).missing)
    (folder / ".cache").unlink()
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    os.mkfifo(folder / ".cache/huggingface/download/a.lock")
    (folder / ".cache/huggingface/download/b.lock").symlink_to("/dev/zero")
    assert settled_look(folder, namespace=None).plan is not None
