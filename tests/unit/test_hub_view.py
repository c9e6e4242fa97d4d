"""The `hub/` view, without a mount; huggingface_hub itself reads it in tests/clients."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from folders import files_of, write_model
from modelcask.hub_names import main_tag, revision
from modelcask.names import ModelName
from modelcask.store import Store
from modelcaskfs.nodes import FileNode, LinkNode
from modelcaskfs.views import Tree
from running import import_folder
from trees import content, find, names, walk


def ref(store: Store, tree: Tree, repository: str, name: str) -> str:
    node = find(tree, f"hub/{repository}/refs/{name}")
    assert node is not None
    return content(store, node).decode()


def test_a_repository_has_refs_snapshots_and_trees(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", shards=2)
    (result,) = import_folder(store, folder, name="org/name")
    tree, repository = Tree(store), "hub/models--org--name"
    digest = store.manifests.read(result.name).digest
    assert names(tree, "hub") == ["models--org--name"]
    assert names(tree, repository) == ["refs", "snapshots", "trees"]
    assert names(tree, f"{repository}/refs") == ["latest", "main"]
    assert ref(store, tree, "models--org--name", "main") == digest.hex[:40]
    assert names(tree, f"{repository}/snapshots") == [digest.hex[:40]]
    snapshot = find(tree, f"{repository}/snapshots/{digest.hex[:40]}")
    shown = {str(path): node for path, node in walk(snapshot).items()}  # type: ignore[arg-type]
    assert {path: content(store, node) for path, node in shown.items()} == files_of(folder)
    assert names(tree, f"{repository}/trees") == [digest.hex[:40] + ".json"]
    listing = find(tree, f"{repository}/trees/{digest.hex[:40]}.json")
    assert listing is not None
    listed = json.loads(content(store, listing))
    assert listed["format_version"] == 1
    assert {path: each["size"] for path, each in listed["files"].items()} == {
        path: len(data) for path, data in files_of(folder).items()
    }
    identities = [each["blob_id"] for each in listed["files"].values()]
    assert all(len(identity) == 40 for identity in identities)


def test_equal_files_have_equal_identities_in_trees_and_other_shards_others(store: Store, tmp_path: Path) -> None:
    trees = []
    for name in ("a", "b"):
        (result,) = import_folder(store, write_model(tmp_path / name, transformer=name))
        commit = revision(store.manifests.read(result.name).digest)
        node = find(Tree(store), f"hub/models--library--{name}/trees/{commit}.json")
        assert node is not None
        trees.append(json.loads(content(store, node))["files"])
    differ = {path for path in trees[0] if trees[0][path]["blob_id"] != trees[1][path]["blob_id"]}
    assert differ == {"transformer/diffusion_pytorch_model.safetensors"}


def test_files_are_the_nodes_of_the_diffusers_view_and_folders_are_not(store: Store, tmp_path: Path) -> None:
    (result,) = import_folder(store, write_model(tmp_path / "m"))
    tree = Tree(store)
    commit = revision(store.manifests.read(result.name).digest)
    for path, same in (("vae/config.json", True), ("vae", False)):
        here = find(tree, f"hub/models--library--m/snapshots/{commit}/{path}")
        there = find(tree, f"diffusers/library/m/latest/{path}")
        assert here is not None
        assert there is not None
        assert (here.key == there.key) is same


def test_each_tag_is_a_ref_and_equal_tags_share_a_snapshot(store: Store, tmp_path: Path) -> None:
    for name, seed in (("x:one", "one"), ("x:two", "two"), ("x:same", "one")):
        folder = tmp_path / seed
        import_folder(store, folder if folder.exists() else write_model(folder, transformer=seed), name=name)
    tree, repository = Tree(store), "models--library--x"
    assert names(tree, f"hub/{repository}/refs") == ["one", "same", "two"]  # which is main, nobody can know
    assert find(tree, f"hub/{repository}/refs/main") is None
    assert ref(store, tree, repository, "one") == ref(store, tree, repository, "same")
    assert len(names(tree, f"hub/{repository}/snapshots")) == 2
    store.manifests.remove(ModelName.parse("x:two"))
    store.manifests.remove(ModelName.parse("x:same"))
    assert ref(store, tree, repository, "main") == ref(store, tree, repository, "one")


@pytest.mark.parametrize(
    ("tags", "main"),
    [
        (("int4", "latest"), "latest"),
        (("latest", "main"), "main"),
        (("int4",), "int4"),
        (("int4", "int8"), None),
        (("Latest", "a"), "Latest"),
        ((), None),
    ],
)
def test_main_is_the_latest_or_the_only_tag(tags: tuple[str, ...], main: str | None) -> None:
    assert main_tag(tags) == main


def test_a_model_of_the_default_namespace_is_found_by_its_bare_name_too(store: Store, tmp_path: Path) -> None:
    import_folder(store, write_model(tmp_path / "flux"))
    tree = Tree(store)
    link = find(tree, "hub/models--flux")
    assert isinstance(link, LinkNode)
    assert link.target == "models--library--flux"
    assert names(tree, "hub") == ["models--library--flux"]


def test_names_with_two_hyphens_and_other_hosts_are_found_and_listed_once(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for name in ("org/a--b", "hub.example/org/c", "hub.example/x/y--z"):
        import_folder(store, folder, name=name)
    tree = Tree(store)
    expected = ["models--hub.example--org--c", "models--hub.example--x--y--z", "models--org--a--b"]
    assert names(tree, "hub") == expected
    for name in expected:
        assert ref(store, tree, name, "main")


@pytest.mark.parametrize(
    "name",
    ["models--..--x", "models--org--..", "models--", "models--org--", "org--m", "models--org--m--x", "models--m"],
)
def test_what_is_no_repository_is_not_found(store: Store, tmp_path: Path, name: str) -> None:
    import_folder(store, write_model(tmp_path / "m"), name="org/m")
    assert find(Tree(store), f"hub/{name}") is None


def test_looking_at_one_repository_reads_no_manifest_of_another(store: Store, tmp_path: Path) -> None:
    import_folder(store, write_model(tmp_path / "m"))
    bad = store.root / "manifests/registry.ollama.ai/library/bad/latest"
    bad.parent.mkdir()
    bad.write_text("{")
    tree = Tree(store)
    assert names(tree, "hub") == ["models--library--bad", "models--library--m"]
    assert names(tree, "hub/models--library--bad") == ["refs", "snapshots", "trees"]
    assert names(tree, "hub/models--library--bad/refs") == []
    bad.chmod(0)
    bad.unlink()
    bad.mkdir()  # whoever opens it fails
    assert ref(store, tree, "models--library--m", "main")


def test_an_absence_is_told_of_what_a_snapshot_lacks_and_of_nothing_else(store: Store, tmp_path: Path) -> None:
    (result,) = import_folder(store, write_model(tmp_path / "m"))
    tree = Tree(store)
    absences = f"hub/models--library--m/.no_exist/{revision(store.manifests.read(result.name).digest)}"
    for path in ("vae/nothing.json", "nothing.json", "nowhere/config.json"):
        node = find(tree, f"{absences}/{path}")
        assert isinstance(node, FileNode)
        assert node.content.size == 0
    for path in ("vae/config.json", "model_index.json"):
        assert find(tree, f"{absences}/{path}") is None
    assert find(tree, "hub/models--library--m/.no_exist/0123") is None
    assert names(tree, absences) == []


def test_what_is_no_readable_manifest_hides_no_other_tag(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (result,) = import_folder(store, write_model(tmp_path / "m"))
    tags = store.manifests.path(result.name).parent
    (tags / "loop").symlink_to("loop")
    (tags / "dangling").symlink_to("nowhere")
    (tags / "folder").mkdir()
    os.mkfifo(tags / "fifo")
    tree, repository = Tree(store), "hub/models--library--m"
    assert names(tree, f"{repository}/refs") == ["latest", "main"]
    assert len(names(tree, f"{repository}/snapshots")) == 1
    assert find(tree, f"{repository}/refs/main") is not None
    assert "loop" in caplog.text
    for tag in ("dangling", "folder", "fifo"):
        assert find(tree, f"{repository}/refs/{tag}") is None
