import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from folders import tensor, write_component, write_model
from modelcask import importer, paired_sha256, plan, range_store, source
from modelcask.errors import Interrupted, SourceChanged
from modelcask.manifests import FILE_TYPE, HEADER_TYPE, TENSOR_TYPE
from modelcask.names import ModelName
from modelcask.store import Store
from running import blob_files, import_folder

UPSTREAM = json.loads((Path(__file__).parent.parent / "data" / "upstream.json").read_text())


def test_every_layer_of_upstream_has_its_digest_size_name_and_place(store: Store, vector_model: Path) -> None:
    (result,) = import_folder(store, vector_model)
    manifest = store.manifests.read(result.name).manifest
    layers = [layer.to_json() for layer in manifest.layers]
    assert layers[: len(UPSTREAM["layers"])] == UPSTREAM["layers"]
    assert manifest.config.to_json() == UPSTREAM["config"]


def test_what_upstream_lost_follows_as_files_and_headers(store: Store, vector_model: Path) -> None:
    (result,) = import_folder(store, vector_model)
    manifest = store.manifests.read(result.name).manifest
    assert [layer.name for layer in manifest.of_type(FILE_TYPE)] == [
        "README.md",
        "model_index.json",
        "tokenizer/merges.txt",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    ]
    for layer in manifest.of_type(HEADER_TYPE):
        shard = (vector_model / layer.name).read_bytes()
        assert store.blobs.read(layer.digest, layer.size) == shard[8 : 8 + layer.size]


def test_every_blob_is_named_by_its_sha256_and_read_only(store: Store, vector_model: Path) -> None:
    old = os.umask(0o077)
    try:
        import_folder(store, vector_model)
    finally:
        os.umask(old)
    paths = list(store.blobs.directory.iterdir())
    assert len(paths) > 30
    for path in paths:
        assert path.name == "sha256-" + hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.stat().st_mode & 0o777 == 0o444


def test_the_manifest_is_compact_json_under_its_name(store: Store, vector_model: Path) -> None:
    (result,) = import_folder(store, vector_model, name="Org/Some.Model:x")
    path = store.root / "manifests/registry.ollama.ai/Org/Some.Model/x"
    data = path.read_bytes()
    assert str(result.manifest) == "sha256:" + hashlib.sha256(data).hexdigest()
    assert data.startswith(
        b'{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{'
    )
    assert result.name == ModelName.parse("Org/Some.Model:x")


def test_importing_again_stores_nothing_and_says_so(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (first,) = import_folder(store, folder)
    manifest = store.manifests.path(first.name)
    before = (blob_files(store.root), manifest.stat().st_mtime_ns)
    (again,) = import_folder(store, folder)
    assert (blob_files(store.root), manifest.stat().st_mtime_ns) == before
    assert (again.new_blobs, again.new_bytes) == (0, 0)
    assert (again.reused_blobs, again.reused_bytes) == (first.new_blobs, first.new_bytes)
    assert first.new_bytes == sum(blob_files(store.root).values())


def test_shared_tensors_are_stored_once_however_they_are_sharded(store: Store, tmp_path: Path) -> None:
    import_folder(store, write_model(tmp_path / "one", transformer="one"))
    before = blob_files(store.root)
    (second,) = import_folder(store, write_model(tmp_path / "two", transformer="two", shards=3, encoder_shards=2))
    added = {name: size for name, size in blob_files(store.root).items() if name not in before}
    manifest = store.manifests.read(second.name).manifest
    tensors = {layer.digest.blob_name for layer in manifest.of_type(TENSOR_TYPE)}
    new_tensors = {layer.name for layer in manifest.of_type(TENSOR_TYPE) if layer.digest.blob_name in added}
    assert new_tensors == {f"transformer/blocks.{n}.weight" for n in range(6)}
    assert sum(added.values()) == second.new_bytes
    assert tensors & before.keys()


def test_a_variant_becomes_a_tag_that_shares_all_else(store: Store, tmp_path: Path) -> None:
    default, half = import_folder(store, write_model(tmp_path / "m", shards=2, variants=["fp16"]), name="org/m")
    assert (str(default.name), str(half.name)) == ("org/m:latest", "org/m:fp16")
    files = {
        str(result.name): {
            layer.name
            for layer in store.manifests.read(result.name).manifest.layers
            if layer.media_type in (FILE_TYPE, HEADER_TYPE)
        }
        for result in (default, half)
    }
    stem = "transformer/diffusion_pytorch_model"
    assert files["org/m:latest"] - files["org/m:fp16"] == {
        f"{stem}-00001-of-00002.safetensors",
        f"{stem}-00002-of-00002.safetensors",
        f"{stem}.safetensors.index.json",
    }
    assert files["org/m:fp16"] - files["org/m:latest"] == {
        f"{stem}.fp16-00001-of-00002.safetensors",
        f"{stem}.fp16-00002-of-00002.safetensors",
        f"{stem}.safetensors.index.fp16.json",
    }
    assert half.new_blobs == 6 + 1  # tensors and index; the shards have the same headers, all else is shared
    assert default.skipped == half.skipped == ()


def test_a_tensor_larger_than_the_buffer_is_recognized_and_not_written_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _treat_as_large(monkeypatch)
    folder = write_model(tmp_path / "m")
    large = {"large.weight": tensor("large", 100, 100)}
    write_component(folder / "vae", [large], stem="diffusion_pytorch_model")
    (first,) = import_folder(store, folder)
    layer = next(
        layer for layer in store.manifests.read(first.name).manifest.layers if layer.name == "vae/large.weight"
    )
    assert store.blobs.read(layer.digest, layer.size)[-20_000:] == large["large.weight"].data

    monkeypatch.setattr(range_store, "_Temporary", None)  # whatever would be written fails
    (again,) = import_folder(store, folder)
    assert again.new_blobs == 0
    monkeypatch.undo()

    # A wrong prediction costs a second look, never a wrong blob.
    _treat_as_large(monkeypatch)
    wrong = dict.fromkeys(_samples(store), first.manifest)
    store.index.remember(predictions=wrong)
    (third,) = import_folder(store, folder)
    assert third.manifest == first.manifest


@pytest.mark.parametrize("piece", [512, 3000, 1 << 20])
def test_hashing_in_pairs_changes_no_blob(
    store: Store, vector_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    (expected,) = import_folder(store, vector_model)
    monkeypatch.setattr(paired_sha256, "_PAYS", 0)
    monkeypatch.setattr(range_store, "_WORTH_A_LANE", 0)
    monkeypatch.setattr(range_store, "_PIECE", piece)
    paired = Store.create(tmp_path / "paired")
    (result,) = import_folder(paired, vector_model)
    assert result.manifest == expected.manifest
    assert blob_files(paired.root) == blob_files(store.root)
    paired.index.close()


def _treat_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_store, "_BUFFER", 4096)
    monkeypatch.setattr(range_store, "_SAMPLE", 1000)
    monkeypatch.setattr(range_store, "_PIECE", 3000)


def _samples(store: Store) -> list[bytes]:
    return [row[0] for row in store.index._db.execute("SELECT sample FROM predictions")]


def test_a_wrong_sized_blob_is_repaired(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    import_folder(store, folder)
    victim = max(store.blobs.directory.iterdir(), key=lambda path: path.stat().st_size)
    whole = victim.read_bytes()
    victim.chmod(0o644)
    victim.write_bytes(whole[:-1])
    (result,) = import_folder(store, folder)
    assert victim.read_bytes() == whole
    assert (result.new_blobs, result.new_bytes) == (1, len(whole))


def test_two_imports_of_the_same_folder_at_once_both_succeed(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.extend(import_folder(store, folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert list((store.root / "tmp").iterdir()) == []


def test_a_name_in_another_case_replaces_the_same_model(store: Store, tmp_path: Path) -> None:
    import_folder(store, write_model(tmp_path / "a", transformer="a"), name="Org/Flux")
    (result,) = import_folder(store, write_model(tmp_path / "b", transformer="b"), name="org/flux")
    assert [str(name) for name in store.manifests.names()] == ["Org/Flux:latest"]
    assert str(result.name) == "Org/Flux:latest"


def test_a_folder_that_changes_meanwhile_is_not_imported(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    planned = plan.plan_import(source.look(folder))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"other")
    with pytest.raises(SourceChanged, match="vae"):
        importer.run_import(store, planned, report=lambda _d, _t: None, stop=threading.Event())
    assert list(store.manifests.names()) == []
    assert list((store.root / "tmp").iterdir()) == []


def test_a_file_that_appears_meanwhile_is_noticed(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    planned = plan.plan_import(source.look(folder))
    (folder / "vae" / "late.txt").write_text("late")
    with pytest.raises(SourceChanged, match=r"late\.txt"):
        importer.run_import(store, planned, report=lambda _d, _t: None, stop=threading.Event())
    assert list(store.manifests.names()) == []


def test_an_import_that_is_stopped_leaves_nothing_in_tmp(store: Store, tmp_path: Path) -> None:
    planned = plan.plan_import(source.look(write_model(tmp_path / "m")))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        importer.run_import(store, planned, report=lambda _d, _t: None, stop=stop)
    assert list((store.root / "tmp").iterdir()) == []
    assert list((store.root / "leases").iterdir()) == [store.root / "leases" / "gate"]


def test_a_hugging_face_snapshot_is_followed_into_its_cache_and_named_after_its_repository(
    store: Store, tmp_path: Path
) -> None:
    cache = tmp_path / "models--org--some-model"
    snapshot = cache / "snapshots" / ("a" * 40)
    plain = write_model(tmp_path / "plain")
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(plain.rglob("*"))):
        place = snapshot / path.relative_to(plain)
        if path.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            blob = cache / "blobs" / f"{number:064x}"
            blob.write_bytes(path.read_bytes())
            place.symlink_to(os.path.relpath(blob, place.parent))
    (result,) = import_folder(store, snapshot)
    (other,) = import_folder(store, plain)
    assert str(result.name) == "org/some-model:latest"
    assert result.manifest == other.manifest
