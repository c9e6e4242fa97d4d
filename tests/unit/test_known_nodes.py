"""Nodes that the kernel knows are found again, without a mount."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from folders import write_model
from modelcask.hub_names import revision
from modelcask.store import Store
from modelcaskfs.known_nodes import ROOT_NODE, KnownNodes, number_of
from modelcaskfs.nodes import LinkNode
from modelcaskfs.views import Tree
from running import import_folder

_FILE = "vae/config.json"
# More than are kept.
_MANY = 200


class Kernel:
    """Looks paths up as the kernel does, part by part."""

    def __init__(self, tree: Tree) -> None:
        self.known = KnownNodes(tree.root)

    def walk(self, path: str) -> list[int]:
        """The numbers of all that `path` leads through."""
        numbers = [ROOT_NODE]
        for name in path.split("/"):
            node = self.known.directory(numbers[-1]).lookup(name)
            assert node is not None
            numbers.append(self.known.remember(node, numbers[-1], name))
        return numbers[1:]

    def displace(self) -> None:
        """Have others take the place of all that is kept."""
        for number in range(_MANY):
            self.known.remember(LinkNode(f"/other{number}", 0, "."), ROOT_NODE, f"other{number}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m")


@pytest.fixture
def two_places(store: Store, folder: Path) -> list[str]:
    """Where the hub view and the other show one file."""
    (result,) = import_folder(store, folder)
    commit = revision(store.manifests.read(result.name).digest)
    return [f"hub/models--library--m/snapshots/{commit}/{_FILE}", f"diffusers/library/m/latest/{_FILE}"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_of_two_views_is_found_again_when_either_is_forgotten(
    store: Store, two_places: list[str], order: int
) -> None:
    for forgotten in range(2):
        kernel = Kernel(Tree(store))
        walks = [kernel.walk(path) for path in two_places[::order]]
        number = walks[0][-1]
        assert walks[1][-1] == number
        key = kernel.known.node(number).key
        for each in reversed(walks[forgotten]):
            kernel.known.forget(each, 1)
        kernel.displace()
        assert kernel.known.at_hand(number) is None
        assert kernel.known.node(number).key == key


def test_nodes_of_every_kind_are_found_again(store: Store, two_places: list[str]) -> None:
    kernel = Kernel(Tree(store, self_contained=True))
    name = next(path.name for path in (store.root / "blobs").iterdir())
    hub, plain = two_places
    repository = hub.split("/snapshots")[0]
    paths = [hub, plain, f"blobs/{name}", f"{repository}/refs/main", f"{hub.replace('snapshots', '.no_exist')}.txt"]
    paths += [f"{repository}/trees/{hub.split('/')[3]}.json", "hub/models--m"]
    for path in paths:
        numbers = kernel.walk(path)
        keys = [kernel.known.node(number).key for number in numbers]
        kernel.displace()
        assert [kernel.known.node(number).key for number in numbers] == keys
        assert [number_of(key) for key in keys] == numbers


def test_what_was_replaced_is_stale_unless_it_is_open(store: Store, two_places: list[str]) -> None:
    for path in two_places:
        kernel = Kernel(Tree(store))
        number = kernel.walk(path)[-1]
        opened = kernel.known.open(number, kernel.known.node(number))
        key = opened.key
        (store.root / "manifests/registry.ollama.ai/library/m/latest").touch()
        kernel.displace()
        assert kernel.known.node(number).key == key
        kernel.known.close(opened)
        with pytest.raises(OSError, match=f"Errno {errno.ESTALE}.*replaced"):
            kernel.known.node(number)


def test_what_the_kernel_has_forgotten_is_stale(store: Store, two_places: list[str]) -> None:
    kernel = Kernel(Tree(store))
    number = kernel.walk(two_places[0])[-1]
    kernel.walk(two_places[0])
    kernel.known.forget(number, 1)
    assert kernel.known.node(number)
    with pytest.raises(OSError, match=f"Errno {errno.ENOTDIR}"):
        kernel.known.directory(number)
    kernel.known.forget(number, 1)
    with pytest.raises(OSError, match=f"Errno {errno.ESTALE}.*forgotten"):
        kernel.known.node(number)
