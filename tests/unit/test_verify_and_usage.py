import threading
from pathlib import Path

import pytest

from folders import write_model
from modelcask import gc
from modelcask import verify as verify_module
from modelcask.errors import ModelNotFound
from modelcask.names import ModelName
from modelcask.store import Store
from modelcask.usage import measure
from modelcask.verify import Verification, verify
from running import blob_files, import_folder


def check(store: Store, *names: str, quick: bool = False) -> Verification:
    parsed = [ModelName.parse(name) for name in names]
    return verify(store, parsed, quick=quick, report=lambda _d, _t: None, stop=threading.Event())


@pytest.fixture
def two_models(store: Store, tmp_path: Path) -> Store:
    import_folder(store, write_model(tmp_path / "one", transformer="one"))
    import_folder(store, write_model(tmp_path / "two", transformer="two", shards=2))
    return store


def blob_of(store: Store, model: str, layer: str) -> Path:
    manifest = store.manifests.read(ModelName.parse(model)).manifest
    return next(store.blobs.path(each.digest) for each in manifest.layers if each.name == layer)


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_sound_store_is_sound(two_models: Store) -> None:
    found = check(two_models)
    files = blob_files(two_models.root)
    assert found.is_sound
    assert (found.checked, found.read_bytes) == (len(files), sum(files.values()))


def test_a_flipped_bit_is_found_quarantined_and_its_models_named(two_models: Store) -> None:
    blob = blob_of(two_models, "one", "text_encoder/layer.weight")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    overwrite(blob, data)
    (damage,) = check(two_models).corrupt
    assert damage.used_by == ("library/one:latest", "library/two:latest")
    assert damage.path == two_models.quarantine / blob.name
    assert damage.path.read_bytes() == data
    assert not blob.exists()
    assert [each.digest for each in check(two_models).missing] == [damage.digest]


def test_importing_again_heals(two_models: Store, tmp_path: Path) -> None:
    overwrite(blob_of(two_models, "one", "transformer/blocks.0.weight"), b"wrong")
    assert not check(two_models).is_sound
    import_folder(two_models, tmp_path / "one")
    assert check(two_models).is_sound


@pytest.mark.parametrize("fingerprints", ["known", "lost", "wrong"])
def test_quick_finds_what_is_wrong_whatever_the_fingerprints_say(two_models: Store, fingerprints: str) -> None:
    database = two_models.index._db
    assert database.execute("SELECT count(*) FROM fingerprints").fetchone() == (len(blob_files(two_models.root)),)
    if fingerprints == "lost":
        database.execute("DELETE FROM fingerprints")
    elif fingerprints == "wrong":
        database.execute("UPDATE fingerprints SET xxh3 = zeroblob(8)")
    assert check(two_models, quick=True).is_sound
    flipped, short = (blob_of(two_models, "two", f"vae/decoder.{name}") for name in ("weight", "bias"))
    overwrite(flipped, flipped.read_bytes()[:-1] + b"x")
    overwrite(short, b"short")
    found = check(two_models, quick=True)
    assert {damage.path.name for damage in found.corrupt} == {flipped.name, short.name}


def test_a_missing_blob_is_found(two_models: Store) -> None:
    blob = blob_of(two_models, "two", "transformer/blocks.1.weight")
    blob.unlink()
    (damage,) = check(two_models, "two").missing
    assert (damage.path, damage.used_by) == (blob, ("library/two:latest",))
    assert check(two_models, "one").is_sound


def test_what_a_model_needed_that_was_removed_meanwhile_is_not_missing(
    two_models: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = verify_module._all_manifests
    name = ModelName.parse("two")

    def read_then_remove(store: Store) -> object:
        found = read(store)
        if store.manifests.path(name).exists():
            store.manifests.remove(name)
            gc.collect(store)
        return found

    monkeypatch.setattr(verify_module, "_all_manifests", read_then_remove)
    assert check(two_models).is_sound


def test_a_damaged_manifest_is_found(two_models: Store) -> None:
    path = two_models.manifests.path(ModelName.parse("one"))
    path.write_bytes(path.read_bytes()[:-10])
    assert [error.path for error in check(two_models).unreadable] == [path]


def test_a_model_that_is_not_there_is_told(store: Store) -> None:
    with pytest.raises(ModelNotFound, match="library/none:latest: no such model"):
        check(store, "none")


def test_usage_adds_up_to_the_byte(two_models: Store) -> None:
    usage = measure(two_models)
    files = blob_files(two_models.root)
    one, two = usage.models
    assert usage.stored_bytes == sum(files.values())
    assert usage.logical_bytes == one.size + two.size
    assert one.shared_bytes == two.shared_bytes
    assert usage.stored_bytes == one.unique_bytes + two.unique_bytes + one.shared_bytes
    assert usage.reclaimable_bytes == 0
    two_models.manifests.remove(two.name)
    after = measure(two_models)
    assert after.reclaimable_bytes == two.unique_bytes
    assert after.stored_bytes == usage.stored_bytes
