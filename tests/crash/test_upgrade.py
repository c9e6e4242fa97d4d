"""Stores that other releases made. `tests/data/store-v1.tar.gz` was made by modelcask 0.1 and is never made anew.

It holds two models, one with a variant, the other also quantized to int4 and nvfp4; `store-v1.json` has the sha256 of
every file that release showed of them below `diffusers/`.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
from pathlib import Path

import pytest

from crash import promises
from folders import files_of, write_model
from modelcask.errors import InvalidStore
from modelcask.names import ModelName
from modelcask.store import Store
from modelcask.verify import verify
from modelcaskfs.nodes import FileNode
from modelcaskfs.views import Tree
from running import CommandLine, import_folder
from trees import content, walk

DATA = Path(__file__).parent.parent / "data"
SHOWN: dict[str, str] = json.loads((DATA / "store-v1.json").read_text())
NAMES = ["library/one:fp16", "library/one:latest", "org/two:int4", "org/two:latest", "org/two:nvfp4"]


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    with tarfile.open(DATA / "store-v1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="fully_trusted")
    return tmp_path / "store"


@pytest.mark.parametrize("quick", [False, True])
def test_an_older_store_opens_and_verifies(old_store: Path, *, quick: bool) -> None:
    before = promises.manifests_of(old_store)
    store = Store.create(old_store)
    found = verify(store, quick=quick, report=lambda _done, _total: None, stop=threading.Event())
    store.index.close()
    assert found.is_sound
    assert found.checked == 54
    assert [str(name) for name in store.manifests.names()] == NAMES
    assert promises.manifests_of(old_store) == before


def test_an_older_store_shows_every_file_as_it_did(old_store: Path) -> None:
    store = Store.open(old_store)
    assert shown_by(store) == SHOWN


def shown_by(store: Store) -> dict[str, str]:
    files = {str(path): node for path, node in walk(Tree(store).root).items() if isinstance(node, FileNode)}
    return {
        path: hashlib.sha256(content(store, node)).hexdigest()
        for path, node in files.items()
        if path.startswith("diffusers/")
    }


def test_an_older_store_is_imported_into_and_shares_what_it_has(old_store: Path, tmp_path: Path) -> None:
    store = Store.create(old_store)
    folder = write_model(tmp_path / "two", transformer="two", shards=2)
    (again,) = import_folder(store, folder, name="org/two")
    (quantized,) = import_folder(store, folder, name="new", quantize="int4")
    assert again.new_blobs == quantized.new_blobs == 0
    assert quantized.manifest == store.manifests.read(ModelName.parse("org/two:int4")).digest
    store.index.close()
    promises.collecting(old_store)
    promises.check_sound(old_store)
    assert len(promises.blob_names(old_store)) == 54


@pytest.mark.fuse
@pytest.mark.usefixtures("fuse")
def test_an_older_store_mounts(old_store: Path, tmp_path: Path) -> None:
    cask = CommandLine(old_store, tmp_path)
    with cask.mounted(tmp_path / "mnt") as mounted:
        files = files_of(mounted / "diffusers")
    assert {f"diffusers/{path}": hashlib.sha256(data).hexdigest() for path, data in files.items()} == SHOWN


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": "modelcask", "version": 2}', "version 2, this modelcask knows versions up to 1; use a newer"),
        ('{"format": "modelcask", "version": 0}', "version 0, which no modelcask made; restore"),
        ('{"format": "modelcask", "version": true}', "version True, which no modelcask made; restore"),
        ('{"format": "modelcask"}', "version None, which no modelcask made; restore"),
        ('{"format": "other", "version": 1}', "is of the format other; give another --store"),
        ("", "cannot be read"),
    ],
)
def test_a_store_of_another_kind_is_refused_in_words_and_left_as_it_is(old_store: Path, text: str, said: str) -> None:
    (old_store / "store.json").write_text(text)
    before = files_of(old_store)
    for open_it in (Store.open, Store.create):
        with pytest.raises(InvalidStore, match=said):
            open_it(old_store)
    assert files_of(old_store) == before
