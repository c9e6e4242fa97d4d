import json
from pathlib import Path
from typing import Any

import pytest

from folders import write_model
from modelcask.digest import Digest
from modelcask.errors import InvalidDigest, InvalidManifest, ModelNotFound
from modelcask.manifests import Layer, Manifest
from modelcask.names import ModelName
from modelcask.store import Store
from running import import_folder

DIGEST = "sha256:" + "0" * 64
LAYER = {"mediaType": "t", "digest": DIGEST, "size": 1, "name": "n"}
GOOD = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
    "config": {"mediaType": "c", "digest": DIGEST, "size": 2},
    "layers": [LAYER],
}


def test_a_manifest_survives_encoding() -> None:
    manifest = Manifest(Layer("c", Digest.parse(DIGEST), 2), (Layer("t", Digest.parse(DIGEST), 1, "a<b>&é"),))
    data = manifest.encode()
    assert Manifest.decode(data, Path("x")) == manifest
    assert b'"name":"a\\u003cb\\u003e\\u0026\xc3\xa9"' in data
    assert data.endswith(b"}]}\n")


@pytest.mark.parametrize(
    "change",
    [
        {"schemaVersion": 1},
        {"mediaType": "application/vnd.ollama.manifest.list.v2+json"},
        {"config": None},
        {"layers": {}},
        {"layers": [3]},
        {"layers": [{**LAYER, "digest": "sha256:../../etc/passwd"}]},
        {"layers": [{**LAYER, "digest": "md5:" + "0" * 64}]},
        {"layers": [{**LAYER, "size": -1}]},
        {"layers": [{**LAYER, "size": True}]},
        {"layers": [{**LAYER, "size": 1.5}]},
        {"layers": [{**LAYER, "name": 1}]},
        {"layers": [{"digest": DIGEST, "size": 1}]},
    ],
)
def test_a_manifest_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidManifest, match="unreadable manifest"):
        Manifest.decode(json.dumps({**GOOD, **change}).encode(), Path("x"))
    assert Manifest.decode(json.dumps(GOOD).encode(), Path("x")).layers[0].name == "n"


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:" + "A" * 64, "sha256:" + "0" * 63, "sha512:" + "0" * 64])
def test_text_that_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(InvalidDigest):
        Digest.parse(text)


def test_removing_a_model_leaves_no_empty_directories(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for name in ("org/a:x", "org/a:y", "org/b"):
        import_folder(store, folder, name=name)
    for name, left in (("org/a:x", ["a", "b"]), ("org/a:y", ["b"]), ("org/b", None)):
        store.manifests.remove(ModelName.parse(name))
        directory = store.root / "manifests/registry.ollama.ai/org"
        assert (sorted(path.name for path in directory.iterdir()) if directory.exists() else None) == left
    with pytest.raises(ModelNotFound, match="org/b:latest: no such model"):
        store.manifests.remove(ModelName.parse("org/b"))


def test_a_model_is_found_in_another_case_than_it_was_stored(store: Store, tmp_path: Path) -> None:
    import_folder(store, write_model(tmp_path / "m"), name="Org/Flux:FP16")
    assert str(store.manifests.read(ModelName.parse("org/flux:fp16")).name) == "Org/Flux:FP16"


def test_a_dangling_symlink_in_place_of_a_models_directory_is_an_error(store: Store, tmp_path: Path) -> None:
    library = store.root / "manifests/registry.ollama.ai/library"
    library.mkdir(parents=True)
    (library / "m").symlink_to("nowhere/at/all")
    with pytest.raises((InvalidManifest, OSError)):
        import_folder(store, write_model(tmp_path / "m"))
    assert list((store.root / "tmp").iterdir()) == []


def test_a_path_through_a_manifest_is_no_model(store: Store, tmp_path: Path) -> None:
    import_folder(store, write_model(tmp_path / "m"))
    (store.root / "manifests/registry.ollama.ai/library/m/folder").mkdir()
    with pytest.raises(ModelNotFound):
        store.manifests.read(ModelName.parse("m:folder"))
