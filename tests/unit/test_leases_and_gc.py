import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from folders import write_model
from modelcask import gc, leases
from modelcask.digest import Digest
from modelcask.errors import InvalidManifest
from modelcask.leases import Lease, LeaseTaken, SoleLease
from modelcask.names import ModelName
from modelcask.store import Store
from running import blob_files, import_folder

A, B = Digest.of(b"a"), Digest.of(b"b")


def put(store: Store, data: bytes) -> Digest:
    """A blob that no manifest reaches."""
    digest = Digest.of(data)
    with store.ingestion() as ingestion:
        ingestion.put(data, digest)
        ingestion.flush()
    return digest


def test_a_lease_protects_until_it_is_released(store: Store) -> None:
    with Lease(store.leases, "test", [A]) as lease, lease.protecting(B):
        assert leases.protected(store.leases) == {A, B}
    assert leases.protected(store.leases) == set()
    assert [path.name for path in store.leases.iterdir()] == ["gate"]


def test_a_lease_dies_with_its_process(store: Store) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from modelcask.leases import Lease; from modelcask.digest import Digest\n"
        "lease = Lease(Path(sys.argv[1]), 'test', [Digest.of(b'a')]); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.leases)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    assert leases.protected(store.leases) == {A}
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert leases.protected(store.leases) == set()
    gc.collect(store)
    assert [path.name for path in store.leases.iterdir()] == ["gate"]


def test_a_line_that_was_not_written_to_its_end_protects_nothing(store: Store) -> None:
    with Lease(store.leases, "test", [A]) as lease:
        with (store.leases / lease.name).open("ab") as file:
            file.write(str(B).encode()[:40])
        assert leases.protected(store.leases) == {A}


def test_gc_removes_what_only_a_removed_model_needed(store: Store, tmp_path: Path) -> None:
    (one,) = import_folder(store, write_model(tmp_path / "one", transformer="one"))
    before = blob_files(store.root)
    (two,) = import_folder(store, write_model(tmp_path / "two", transformer="two", shards=2))
    store.manifests.remove(two.name)
    plan = gc.find_garbage(store)
    assert plan.size == two.new_bytes
    removed = gc.collect(store)
    assert removed == plan
    assert blob_files(store.root) == before
    assert [str(name) for name in store.manifests.names()] == [str(one.name)]


def test_gc_spares_what_a_lease_protects(store: Store) -> None:
    kept, lost = put(store, b"kept"), put(store, b"lost")
    with Lease(store.leases, "test", [kept]):
        assert set(gc.collect(store).blobs) == {lost}
    assert set(gc.collect(store).blobs) == {kept}


def test_gc_spares_what_is_protected_after_its_plan(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = put(store, b"late")
    plan = gc._plan
    held: list[Lease] = []

    def plan_then_protect(*arguments: object) -> gc.Garbage:
        garbage = plan(*arguments)  # type: ignore[arg-type]
        held.append(Lease(store.leases, "test", [digest]))
        return garbage

    monkeypatch.setattr(gc, "_plan", plan_then_protect)
    assert gc.collect(store).blobs == {}
    held[0].release()


def test_gc_spares_what_a_manifest_reaches_that_is_new_since_its_plan(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (result,) = import_folder(store, write_model(tmp_path / "m"))
    manifest = store.manifests.read(result.name).manifest
    store.manifests.remove(result.name)
    plan = gc._plan

    def plan_then_commit(*arguments: object) -> gc.Garbage:
        garbage = plan(*arguments)  # type: ignore[arg-type]
        store.manifests.write(ModelName.parse("other"), manifest, temporary=store.root / "tmp" / "x")
        return garbage

    monkeypatch.setattr(gc, "_plan", plan_then_commit)
    assert gc.collect(store).blobs == {}


def test_gc_refuses_where_a_manifest_cannot_be_read(store: Store) -> None:
    digest = put(store, b"x")
    bad = store.root / "manifests/registry.ollama.ai/library/bad/latest"
    bad.parent.mkdir(parents=True)
    bad.write_text("{")
    with pytest.raises(InvalidManifest, match=r"library/bad/latest: unreadable manifest.*set it aside"):
        gc.collect(store)
    assert store.blobs.size(digest) == 1


def test_gc_spares_the_blobs_of_other_kinds_of_models(store: Store) -> None:
    weights = put(store, b"a language model")
    config = put(store, b"{}")
    path = store.root / "manifests/registry.ollama.ai/library/llama/latest"
    path.parent.mkdir(parents=True)
    path.write_text(
        '{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json",'
        f'"config":{{"mediaType":"x","digest":"{config}","size":2}},'
        f'"layers":[{{"mediaType":"application/vnd.ollama.image.model","digest":"{weights}","size":16}}]}}'
    )
    assert gc.collect(store).blobs == {}


def test_the_gate_keeps_gc_from_taking_a_blob_that_was_just_found(store: Store) -> None:
    digest = put(store, b"found")
    done = threading.Event()
    removed: list[gc.Garbage] = []

    def collect() -> None:
        removed.append(gc.collect(store))
        done.set()

    with Lease(store.leases, "test") as lease:
        with lease.protecting(digest):
            assert store.blobs.size(digest) == 5
            thread = threading.Thread(target=collect)
            thread.start()
            assert not done.wait(0.3)
        thread.join(10)
        assert removed[0].blobs == {}
        assert store.blobs.size(digest) == 5


def test_a_lease_that_cannot_say_what_it_needs_protects_everything(store: Store) -> None:
    put(store, b"x")
    with Lease(store.leases, leases.EVERYTHING):
        assert gc.collect(store).blobs == {}
    assert len(gc.collect(store).blobs) == 1


def test_leases_that_end_while_others_are_looked_at_disturb_nobody(store: Store) -> None:
    stop = threading.Event()

    def take_and_release() -> None:
        while not stop.is_set():
            Lease(store.leases, "test", [A]).release()

    threads = [threading.Thread(target=take_and_release) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            store.remove_abandoned_files()
            leases.protected(store.leases)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_the_sole_lease_is_held_by_one(store: Store) -> None:
    assert leases.sole_holder(store.leases) is None
    with SoleLease(store.leases):
        assert leases.sole_holder(store.leases) == os.getpid()
        with pytest.raises(LeaseTaken, match=f"process {os.getpid()} watches"):
            SoleLease(store.leases)
    assert leases.sole_holder(store.leases) is None
    with SoleLease(store.leases):
        pass


def test_what_dead_writers_left_is_removed_and_what_living_ones_have_is_not(store: Store) -> None:
    (store.root / "tmp" / "import-1-2-dead").mkdir()
    (store.root / "tmp" / "import-1-2-dead" / "1").write_bytes(b"x")
    (store.root / "tmp" / "loose").write_bytes(b"x")
    with store.ingestion() as ingestion:
        fd, path = ingestion.create_temporary()
        ingestion.finish_writing(fd)
        store.remove_abandoned_files()
        assert [entry.name for entry in (store.root / "tmp").iterdir()] == [path.parent.name]
        assert path.exists()
