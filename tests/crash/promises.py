"""What must hold of a store whatever happened to it, as checks; and what is done to stores here."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modelcask import gc
from modelcask.errors import ModelNotFound
from modelcask.names import ModelName
from modelcask.store import Store
from modelcask.verify import Verification, verify
from running import import_folder

Operation = Callable[[Path], None]
# The manifests of a store by their paths below manifests/.
Manifests = Mapping[str, bytes]


def importing(folder: Path, **options: Any) -> Operation:
    def run(root: Path) -> None:
        with_store(root, lambda store: import_folder(store, folder, **options))

    return run


def removing(name: str) -> Operation:
    return lambda root: with_store(root, lambda store: removing_from(store, name))


def removing_from(store: Store, name: str) -> None:
    """As `rm` does; a model that is not there is removed already."""
    with contextlib.suppress(ModelNotFound):
        store.manifests.remove(ModelName.parse(name))


def collecting(root: Path) -> None:
    with_store(root, gc.collect)


def verifying(root: Path) -> None:
    with_store(root, look_through)


def verifying_soundness(root: Path) -> None:
    check_sound(root)


def flip_a_bit(path: Path) -> None:
    """Corrupt a blob, in a file of its own: its readers and its other names keep the sound one."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    path.chmod(0o444)


def with_store(root: Path, use: Callable[[Store], object]) -> None:
    """Use the store at `root` as a command does: opened for it, closed after."""
    store = Store.create(root)
    try:
        use(store)
    finally:
        if "index" in vars(store):
            store.index.close()


def look_through(store: Store) -> Verification:
    """verify every blob of the store."""
    return verify(store, quick=False, report=lambda _done, _total: None, stop=threading.Event())


def manifests_of(root: Path) -> dict[str, bytes]:
    """All manifests; one that is removed meanwhile may be among them or not."""
    base, found = root / "manifests", {}
    for directory, _, names in os.walk(base):
        for path in (Path(directory, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                found[str(path.relative_to(base))] = path.read_bytes()
    return found


def copy_store(source: Path, target: Path) -> None:
    """A store of its own; the blobs, which nobody changes, are shared."""
    shutil.copytree(source, target, copy_function=_link_blob, ignore=shutil.ignore_patterns("*-shm"))


def _link_blob(source: str, target: str) -> None:
    if Path(source).parent.name == "blobs":
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def check_sound(root: Path) -> None:
    """Every model there is verifies, and every blob is what its name says."""
    found = look_through(Store.open(root))
    assert found.is_sound, (found.corrupt, found.missing, found.unreadable)


def check_blobs(root: Path, *, wrong: frozenset[str] = frozenset()) -> None:
    """Every blob is what its name says, but those `wrong`; without the product's own verify."""
    for path in (root / "blobs").iterdir():
        if path.name in wrong:
            continue
        try:
            data, mode = path.read_bytes(), path.stat().st_mode
        except FileNotFoundError:
            continue  # a gc beside this took it
        assert path.name == "sha256-" + hashlib.sha256(data).hexdigest()
        assert mode & 0o777 == 0o444


def check_manifests(root: Path, before: Manifests, after: Manifests) -> None:
    """Each manifest is as it was before or as it will be after, whole; no other is visible."""
    found = manifests_of(root)
    for path in before.keys() | after.keys() | found.keys():
        assert found.get(path) in (before.get(path), after.get(path)), f"{path} is neither old nor new"


def check_nothing_left(root: Path) -> None:
    """No temporary file and no lease of who is gone."""
    assert list((root / "tmp").iterdir()) == []
    assert {path.name for path in (root / "leases").iterdir()} <= {"gate", "watch"}


def blob_names(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs").iterdir()}
