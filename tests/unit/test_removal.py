"""Removing a drop: never what the store does not hold, whatever happens meanwhile."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from folders import files_of, write_model
from modelcask import gc
from modelcask.errors import SourceChanged
from modelcask.manifests import StoredManifest
from modelcask.names import ModelName
from modelcask.removal import NotRemoved, remove_drop
from modelcask.store import Store
from running import import_folder


def remove(
    store: Store, drop: Path, *, meanwhile: Callable[[], object] = lambda: None, before: float | None = None
) -> list[PurePosixPath]:
    """Import `drop`, then remove it; `meanwhile` happens while it is compared."""
    models: list[StoredManifest] = []
    for result in import_folder(store, drop):
        models.append(store.manifests.read(result.name))
    happened = False

    def report(_done: int, _total: int) -> None:
        nonlocal happened
        if not happened:
            happened = True
            meanwhile()

    return remove_drop(
        store,
        drop,
        models,
        beneath=drop.parent,
        before=time.time() if before is None else before,
        report=report,
        stop=threading.Event(),
    )


def test_a_drop_whose_model_is_replaced_while_it_is_compared_stays(store: Store, tmp_path: Path) -> None:
    drop = write_model(tmp_path / "in" / "m")
    expected = files_of(drop)
    other = write_model(tmp_path / "other" / "m", transformer="other")
    with pytest.raises(NotRemoved, match="replaced or removed meanwhile"):
        remove(store, drop, meanwhile=lambda: (import_folder(store, other), gc.collect(store)))
    assert files_of(drop) == expected


def test_a_drop_whose_model_is_removed_while_it_is_compared_stays(store: Store, tmp_path: Path) -> None:
    drop = write_model(tmp_path / "in" / "m")
    expected = files_of(drop)
    name = ModelName.parse("library/m:latest")
    with pytest.raises(NotRemoved, match="replaced or removed meanwhile"):
        remove(store, drop, meanwhile=lambda: (store.manifests.remove(name), gc.collect(store)))
    assert files_of(drop) == expected


def test_a_file_that_comes_while_it_is_compared_keeps_the_drop(store: Store, tmp_path: Path) -> None:
    drop = write_model(tmp_path / "in" / "m")
    with pytest.raises(SourceChanged):
        remove(store, drop, meanwhile=lambda: (drop / "NEW.md").write_text("new"))
    assert (drop / "model_index.json").exists()


def test_what_came_after_the_removal_was_begun_stays(store: Store, tmp_path: Path) -> None:
    drop = write_model(tmp_path / "in" / "m")
    begun = time.time()
    time.sleep(0.02)
    (drop / "README.md").write_bytes((drop / "README.md").read_bytes())
    assert remove(store, drop, before=begun) == [PurePosixPath("README.md")]
    assert list(files_of(drop)) == ["README.md"]


def test_folders_that_were_empty_before_stay(store: Store, tmp_path: Path) -> None:
    drop = write_model(tmp_path / "in" / "m")
    (drop / ".git" / "refs" / "heads").mkdir(parents=True)
    remove(store, drop)
    assert [path.name for path in drop.rglob("*")] == [".git", "refs", "heads"]


def test_hard_links_within_a_drop_are_removed_both(store: Store, tmp_path: Path) -> None:
    drop = write_model(tmp_path / "in" / "m")
    os.link(drop / "README.md", drop / "COPY.md")
    assert remove(store, drop) == []
    assert not drop.exists()
    assert (tmp_path / "in").exists()


def test_the_folder_of_the_namespace_goes_with_its_last_model(store: Store, tmp_path: Path) -> None:
    drop = write_model(tmp_path / "in" / "org" / "m")
    models = [store.manifests.read(result.name) for result in import_folder(store, drop, namespace="org")]
    remove_drop(
        store,
        drop,
        models,
        beneath=tmp_path / "in",
        before=time.time(),
        report=lambda _done, _total: None,
        stop=threading.Event(),
    )
    assert list((tmp_path / "in").iterdir()) == []


def test_a_drop_that_is_a_symlink_stays(store: Store, tmp_path: Path) -> None:
    real = write_model(tmp_path / "real")
    (tmp_path / "in").mkdir()
    shutil.copytree(real, tmp_path / "in" / "m" / "copy")
    link = tmp_path / "in" / "m" / "link"
    link.symlink_to("copy")
    (tmp_path / "in" / "m" / "copy" / "linked").symlink_to("vae")
    expected = files_of(real)
    stays = remove(store, tmp_path / "in" / "m" / "copy")
    assert {path.parts[0] for path in stays} <= {"linked"}
    assert files_of(real) == expected
