"""Rot: verify finds every damage and names the models, the same folder heals it, gc never takes more for it."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from folders import files_of, write_model
from modelcask.errors import InvalidManifest, InvalidStore, ModelcaskError
from modelcask.gc import collect, find_garbage
from modelcask.names import ModelName
from modelcask.store import Store
from modelcask.verify import Verification, verify
from running import CommandLine, blob_files, import_folder

Damage = Callable[[Path], None]


def check(store: Store, *, quick: bool = False) -> Verification:
    return verify(store, quick=quick, report=lambda _done, _total: None, stop=threading.Event())


def rot(path: Path, data: bytes) -> None:
    """Change a file's bytes as a failing disk does: nothing of its metadata tells."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    rot(path, bytes(data))


def replaced_by(make: Callable[[Path], None]) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


BLOB_DAMAGES: dict[str, Damage] = {
    "its first bit flipped": lambda path: flip(path, 0),
    "a bit in the middle flipped": lambda path: flip(path, path.stat().st_size // 2),
    "its last bit flipped": lambda path: flip(path, -1),
    "zeroed": lambda path: rot(path, bytes(path.stat().st_size)),
    "truncated": lambda path: rot(path, path.read_bytes()[:-1]),
    "empty": lambda path: rot(path, b""),
    "too long": lambda path: rot(path, path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "a folder": replaced_by(lambda path: path.mkdir()),
    "a FIFO": replaced_by(lambda path: os.mkfifo(path)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "one")


@pytest.fixture
def stored(store: Store, folder: Path, tmp_path: Path) -> Store:
    import_folder(store, folder)
    import_folder(store, write_model(tmp_path / "two", transformer="other"))
    return store


def blob_of(store: Store, layer: str) -> Path:
    manifest = store.manifests.read(ModelName.parse("one")).manifest
    return next(store.blobs.path(each.digest) for each in manifest.layers if each.name == layer)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("damage", list(BLOB_DAMAGES))
def test_verify_finds_a_blob_that_is(stored: Store, folder: Path, damage: str, quick: bool) -> None:
    shared, own = blob_of(stored, "text_encoder/layer.weight"), blob_of(stored, "transformer/blocks.0.weight")
    before = find_garbage(stored)
    for path in (shared, own):
        BLOB_DAMAGES[damage](path)
    found = check(stored, quick=quick)
    damages = found.missing if damage == "missing" else found.corrupt
    assert {each.digest.blob_name: each.used_by for each in damages} == {
        shared.name: ("library/one:latest", "library/two:latest"),
        own.name: ("library/one:latest",),
    }
    assert not shared.exists()
    if damage != "missing":
        assert {path.name for path in stored.quarantine.iterdir()} == {shared.name, own.name}
    assert find_garbage(stored) == before
    import_folder(stored, folder)
    assert check(stored, quick=quick).is_sound


def test_every_blob_of_a_store_can_rot_and_is_found(stored: Store, folder: Path, tmp_path: Path) -> None:
    names = sorted(blob_files(stored.root))
    for number, name in enumerate(names):
        path = stored.blobs.directory / name
        flip(path, number % path.stat().st_size)
    found = check(stored)
    assert sorted(each.digest.blob_name for each in found.corrupt) == names
    assert all(each.used_by for each in found.corrupt)
    import_folder(stored, folder)
    import_folder(stored, tmp_path / "two")
    assert check(stored).is_sound


def manifest_path(store: Store) -> Path:
    return store.manifests.path(ModelName.parse("one"))


def test_a_flipped_bit_anywhere_in_a_manifest_is_found_and_stops_gc(stored: Store) -> None:
    path = manifest_path(stored)
    sound, blobs = path.read_bytes(), blob_files(stored.root)
    for position in range(0, len(sound), 7):
        flip(path, position)
        found = check(stored)
        assert path in {error.path for error in found.unreadable}, sound[position - 20 : position + 20]
        with pytest.raises(InvalidManifest) as caught:
            collect(stored)
        assert caught.value.path == path
        assert blob_files(stored.root) == blobs
        rot(path, sound)
    assert check(stored).is_sound


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: rot(path, b""),
        lambda path: rot(path, bytes(path.stat().st_size)),
        lambda path: rot(path, path.read_bytes()[:-100]),
        lambda path: rot(path, path.read_bytes() * 2),
        lambda path: path.write_bytes(b"{}"),
        lambda path: path.write_bytes(b"\xff" * 100),
        replaced_by(lambda path: path.symlink_to("/nowhere")),
    ],
)
def test_a_damaged_manifest_is_told_stops_gc_and_is_healed_by_its_folder(
    stored: Store, folder: Path, damage: Damage
) -> None:
    path, blobs = manifest_path(stored), blob_files(stored.root)
    damage(path)
    with pytest.raises(InvalidManifest) as caught:
        collect(stored)
    assert caught.value.path == path
    assert blob_files(stored.root) == blobs
    try:
        assert [error.path for error in check(stored).unreadable] == [path]
    except InvalidManifest as error:
        assert error.path == path  # noqa: PT017 - a link that leads nowhere stops the walk
    import_folder(stored, folder)
    assert check(stored).is_sound
    assert collect(stored).blobs == {}


def test_a_manifest_that_another_program_wrote_later_is_no_damage(stored: Store) -> None:
    path = manifest_path(stored)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert check(stored).is_sound
    assert collect(stored).blobs == {}


def test_gc_reaches_manifests_through_symlinked_folders(stored: Store, tmp_path: Path) -> None:
    library = stored.root / "manifests" / "registry.ollama.ai" / "library"
    library.rename(tmp_path / "elsewhere")
    library.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(library.parent)
    assert collect(stored).blobs == {}
    assert {str(name) for name in stored.manifests.names()} == {"library/one:latest", "library/two:latest"}
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    with pytest.raises(InvalidManifest, match="a symlink to something that is not there"):
        collect(stored)


def test_gc_takes_nothing_where_the_manifests_are_gone(stored: Store, tmp_path: Path) -> None:
    blobs = blob_files(stored.root)
    (stored.root / "manifests").rename(tmp_path / "manifests")
    with pytest.raises(InvalidStore, match="what the models need is not known"):
        collect(stored)
    (stored.root / "manifests").symlink_to("/nowhere")
    with pytest.raises(ModelcaskError):
        collect(stored)
    assert blob_files(stored.root) == blobs


def _garbage_rows(path: Path) -> None:
    database = sqlite3.connect(path)
    for table, column in (("fingerprints", "digest"), ("predictions", "digest"), ("imports", "manifest")):
        database.execute(f"UPDATE {table} SET {column} = 'x' || rowid" if table == "imports" else
                         f"UPDATE {table} SET {column} = 'sha256:' || hex(randomblob(9))")  # fmt: skip
    database.execute("INSERT INTO drops VALUES (7, 'x', '', 'failed', 0, 0, NULL, 0)")
    database.execute("INSERT INTO drops VALUES (x'ff00', 'x', '', 'failed', 0, 0, NULL, 0)")
    database.commit()
    database.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"no database"),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: rot(path, path.read_bytes()[:100] + b"\xaa" * (path.stat().st_size - 100)),
        _garbage_rows,
        replaced_by(lambda path: path.mkdir()),
    ],
)
def test_a_damaged_index_costs_no_model_and_stops_no_command(
    cask: CommandLine, folder: Path, tmp_path: Path, damage: Damage
) -> None:
    cask("import", folder)
    with sqlite3.connect(cask.store / "index.sqlite") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    blobs = blob_files(cask.store)
    damage(cask.store / "index.sqlite")
    for command in (("ls",), ("show", "one"), ("verify",), ("verify", "--quick"), ("gc",), ("df",), ("status",)):
        done = cask(*command)
        assert "Traceback" not in done.err
        assert done.err.count("\n") <= 1, done.err
    assert blob_files(cask.store) == blobs
    cask("import", write_model(tmp_path / "two", transformer="other"))
    cask("verify")


@pytest.mark.fuse
@pytest.mark.parametrize("damage", ["a bit in the middle flipped", "truncated", "zeroed", "missing"])
def test_after_verify_the_mount_shows_no_wrong_byte_and_the_folder_heals_it(
    cask: CommandLine, mount: Callable[[], Path], folder: Path, damage: str
) -> None:
    cask("import", folder)
    blob = blob_of(Store.open(cask.store), "transformer/blocks.3.weight")
    shown, expected = mount() / "diffusers/library/one/latest", files_of(folder)
    assert files_of(shown) == expected  # it is in every cache now
    BLOB_DAMAGES[damage](blob)
    (found,) = cask("verify", "--json", status=1).json["missing" if damage == "missing" else "corrupt"]
    assert found["used_by"] == ["library/one:latest"]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    try:
        data = (shown / weights).read_bytes()
    except OSError as error:
        assert error.errno == errno.EIO  # noqa: PT017 - the other answer is allowed, too
    else:
        assert damage == "missing"  # the kernel may have it still: nothing of it was wrong
        assert data == expected[weights]
    for name, data in expected.items():
        if not name.startswith("transformer/diffusion"):
            assert (shown / name).read_bytes() == data
    cask("import", folder)
    assert files_of(shown) == expected
