"""The tree of the mount, without a mount."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path, PurePosixPath

import pytest

from folders import files_of, raw_shard, shard_bytes, tensor, write_model
from modelcask.errors import CorruptBlob, InvalidManifest
from modelcask.manifests import FILE_TYPE, MODEL_INDEX, Layer, Manifest
from modelcask.names import ModelName
from modelcask.safetensors_layout import ShardLayout
from modelcask.store import Store
from modelcaskfs import model_folder
from modelcaskfs.nodes import FileNode, LinkNode
from modelcaskfs.views import Tree
from running import import_folder
from trees import content, find, names, walk
from upstream_models import keep_what_upstream_writes


def test_the_diffusers_view_holds_the_dropped_files_byte_for_byte(store: Store, vector_model: Path) -> None:
    import_folder(store, vector_model, name="org/vector:v1")
    folder = find(Tree(store), "diffusers/org/vector/v1")
    shown = {str(path): content(store, node) for path, node in walk(folder).items()}  # type: ignore[arg-type]
    assert shown == files_of(vector_model)


def test_the_tensors_view_links_to_the_blobs(store: Store, vector_model: Path) -> None:
    import_folder(store, vector_model)
    folder = find(Tree(store), "tensors/library/model/latest")
    links = {str(path): node for path, node in walk(folder).items()}  # type: ignore[arg-type]
    node = links["transformer/blocks.0.ff.w<1>&é.weight.safetensors"]
    assert isinstance(node, LinkNode)
    assert node.target.startswith("../../../../../blobs/sha256-")
    assert len(links) == 25
    assert all(store.blobs.directory.joinpath(PurePosixPath(n.target).name).exists() for n in links.values())  # type: ignore[attr-defined]


def test_other_hosts_stand_beside_the_namespaces_of_the_default_host(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for name in ("flux", "org/flux:x", "hub.example/org/flux", "hub.example/org/other"):
        import_folder(store, folder, name=name)
    tree = Tree(store)
    assert names(tree, "diffusers") == ["hub.example", "library", "org"]
    assert names(tree, "diffusers/hub.example/org") == ["flux", "other"]
    assert names(tree, "diffusers/hub.example/org/flux") == ["latest"]
    assert names(tree, "diffusers/org/flux/x/vae") == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert find(tree, "diffusers/hub.example/org/flux/latest/README.md") is not None
    assert find(tree, "diffusers/registry.ollama.ai") is None


def test_a_host_and_a_namespace_of_one_name_are_both_shown(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    import_folder(store, folder, name="same/one")
    import_folder(store, folder, name="same/org/two:t")
    tree = Tree(store)
    assert names(tree, "diffusers/same") == ["one", "org"]
    assert find(tree, "diffusers/same/one/latest/README.md") is not None
    assert find(tree, "diffusers/same/org/two/t/README.md") is not None


@pytest.mark.parametrize(
    "path", ["nothing", "diffusers/x", "diffusers/library/m/x", "diffusers/library/m/latest/vae/x"]
)
def test_what_is_not_there_is_not_found(store: Store, tmp_path: Path, path: str) -> None:
    import_folder(store, write_model(tmp_path / "m"))
    assert find(Tree(store), path) is None


def test_a_replaced_model_has_other_keys_and_an_unchanged_one_the_same(store: Store, tmp_path: Path) -> None:
    tree = Tree(store)
    path = "diffusers/library/x/latest/transformer/diffusion_pytorch_model.safetensors"
    import_folder(store, write_model(tmp_path / "a", transformer="a"), name="x")
    first = find(tree, path)
    import_folder(store, tmp_path / "a", name="x")
    again = find(Tree(store), path)
    import_folder(store, write_model(tmp_path / "b", transformer="b"), name="x")
    replaced = find(tree, path)
    assert first is not None
    assert again is not None
    assert replaced is not None
    assert first.key == again.key != replaced.key
    assert content(store, first) != content(store, replaced)


def test_a_model_that_is_open_keeps_its_blobs_through_rm_and_gc(store: Store, tmp_path: Path) -> None:
    from modelcask import gc

    folder = write_model(tmp_path / "m")
    (result,) = import_folder(store, folder)
    node = find(Tree(store), "diffusers/library/m/latest/vae/diffusion_pytorch_model.safetensors")
    assert isinstance(node, FileNode)
    assert node.protection.acquire()
    store.manifests.remove(result.name)
    assert gc.collect(store).blobs == {}
    assert content(store, node) == (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    node.protection.release()
    assert gc.collect(store).size == result.new_bytes


def test_a_model_that_was_removed_before_it_is_opened_cannot_be_acquired(store: Store, tmp_path: Path) -> None:
    (result,) = import_folder(store, write_model(tmp_path / "m"))
    node = find(Tree(store), "diffusers/library/m/latest/README.md")
    assert isinstance(node, FileNode)
    store.manifests.remove(result.name)
    assert not node.protection.acquire()
    assert [path.name for path in store.leases.iterdir()] == ["gate"]


def test_a_store_without_a_folder_of_leases_is_read_without_one(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model(tmp_path / "m")
    (result,) = import_folder(store, folder)
    shutil.rmtree(store.leases)
    node = find(Tree(store), "diffusers/library/m/latest/README.md")
    assert isinstance(node, FileNode)
    assert node.protection.acquire()
    assert "read without a lease" in caplog.text
    assert content(store, node) == (folder / "README.md").read_bytes()
    node.protection.release()
    store.manifests.remove(result.name)
    assert not node.protection.acquire()


def test_tensors_of_the_same_name_in_two_shards_keep_their_own_bytes(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for name, byte in (("a.safetensors", b"a"), ("b.safetensors", b"b")):
        header = b'{"same":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
        (folder / "vae" / name).write_bytes(raw_shard(header, byte * 4))
    import_folder(store, folder)
    tree = Tree(store)
    for name in ("a.safetensors", "b.safetensors"):
        node = find(tree, f"diffusers/library/m/latest/vae/{name}")
        assert node is not None
        assert content(store, node) == (folder / "vae" / name).read_bytes()


def test_many_tensors_of_the_same_names_in_two_shards_cost_no_more_than_others(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "m")
    for name in ("a.safetensors", "b.safetensors"):
        (folder / "vae" / name).write_bytes(shard_bytes({f"w{n}": tensor(name, 1) for n in range(200)}))
    import_folder(store, folder)
    parsed: list[str] = []
    parse = model_folder.parse_header

    def counting(header: bytes, where: Path) -> ShardLayout:
        parsed.append(where.name)
        return parse(header, where)

    monkeypatch.setattr(model_folder, "parse_header", counting)
    node = find(Tree(store), "diffusers/library/m/latest/vae/b.safetensors")
    assert node is not None
    assert content(store, node) == (folder / "vae" / "b.safetensors").read_bytes()
    assert len(parsed) <= 10


def test_a_manifest_that_names_paths_outside_its_folder_is_refused(store: Store, tmp_path: Path) -> None:
    (result,) = import_folder(store, write_model(tmp_path / "m"))
    manifest = store.manifests.read(result.name).manifest
    for name in ("../../evil", "/etc/passwd"):
        layers = (*manifest.layers, Layer(FILE_TYPE, manifest.config.digest, manifest.config.size, name))
        evil = ModelName.parse("evil")
        store.manifests.write(evil, Manifest(manifest.config, layers), temporary=store.root / "tmp" / "x")
        with pytest.raises(InvalidManifest, match="no path in a folder"):
            find(Tree(store), "diffusers/library/evil/latest")


def test_a_blob_of_another_size_is_not_read(store: Store, tmp_path: Path) -> None:
    (result,) = import_folder(store, write_model(tmp_path / "m"))
    layer = next(
        each for each in store.manifests.read(result.name).manifest.layers if each.name == "vae/decoder.weight"
    )
    blob = store.blobs.path(layer.digest)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes() + b"x")
    node = find(Tree(store), "diffusers/library/m/latest/vae/diffusion_pytorch_model.safetensors")
    assert node is not None
    with pytest.raises(CorruptBlob, match="bytes long, not"):
        content(store, node)


def test_a_link_that_leads_nowhere_hides_nothing_else(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (result,) = import_folder(store, write_model(tmp_path / "m"))
    (store.manifests.path(result.name).parent / "loop").symlink_to("loop")
    (store.manifests.path(result.name).parent.parent / "round").symlink_to("round")
    tree = Tree(store)
    for view in ("diffusers", "tensors"):
        assert names(tree, f"{view}/library") == ["m"]
        assert names(tree, f"{view}/library/m") == ["latest"]
    assert "round" in caplog.text


def test_other_kinds_of_models_are_not_listed(store: Store, tmp_path: Path) -> None:
    (result,) = import_folder(store, write_model(tmp_path / "m"))
    manifest = store.manifests.read(result.name).manifest
    tags = store.manifests.path(result.name).parent
    language = [layer for layer in manifest.layers if layer.name != MODEL_INDEX]
    tag = tags / "language"
    tag.write_bytes(Manifest(manifest.config, tuple(language)).encode())
    (tags / "spaced").write_text(json.dumps(json.loads((tags / "latest").read_bytes()), indent=1))
    (tags / "damaged").write_text("{")
    tree = Tree(store)
    shown = ["damaged", "latest", "spaced"]  # a damaged one's error is told where it is opened
    for view in ("diffusers", "tensors"):
        assert names(tree, f"{view}/library/m") == shown
        assert find(tree, f"{view}/library/m/language") is None
    tag.write_bytes(manifest.encode())
    assert names(tree, "diffusers/library/m") == sorted([*shown, "language"])
    assert find(tree, "diffusers/library/m/language") is not None


@pytest.mark.parametrize(
    ("view", "by_upstream"),
    [("diffusers", False), ("tensors", False), ("mlx", False), ("sdnq", False), ("diffusers", True)],
)
def test_a_model_that_nobody_has_any_more_is_let_go_of_at_once(
    store: Store, tmp_path: Path, view: str, by_upstream: bool
) -> None:
    """A mount seldom looks for cycles."""
    quantize = "int4" if view in ("mlx", "sdnq") else None
    (first,), (second,) = (import_folder(store, write_model(tmp_path / name), quantize=quantize) for name in ("a", "b"))
    if by_upstream:
        keep_what_upstream_writes(store, first.name)
    tree = Tree(store, cached_models=1)
    gc.disable()
    try:
        walk(find(tree, f"{view}/{first.name.view_path}"))  # type: ignore[arg-type]
        model = weakref.ref(tree.model(first.name))
        assert model() is not None
        tree.model(second.name)
        assert model() is None
    finally:
        gc.enable()
