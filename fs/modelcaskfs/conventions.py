"""What each view shows of one model: a client convention as names and what lies behind them.

A view is a function from a model to its children: a nested mapping of names with a `Layer` (a file of the
model folder), a `Generated` file or a `PurePosixPath` (a symlink's target) at the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeAlias

from modelcask.manifests import Layer
from modelcaskfs import mlx_view, sdnq_view, upstream_folder
from modelcaskfs.model_folder import MAX_FILE_NAME, ModelFolder
from modelcaskfs.packed_files import Generated

Leaf: TypeAlias = Layer | Generated | PurePosixPath
Children: TypeAlias = "dict[str, Children | Leaf]"


@dataclass(frozen=True, slots=True)
class Convention:
    """A view.

    Attributes:
        leaves: the files and links of a model, by their path in it.
        quantized_only: whether only quantized models are shown.
    """

    name: str
    leaves: Callable[[ModelFolder], Iterable[tuple[PurePosixPath, Leaf]]]
    quantized_only: bool = False

    def children(self, model: ModelFolder) -> Children:
        """What the model's directory holds; found out once for each model."""
        if self.name not in model.children:
            model.children[self.name] = self._children(model)
        found: Children = model.children[self.name]
        return found

    def _children(self, model: ModelFolder) -> Children:
        root: Children = {}
        for path, leaf in self.leaves(model):
            directory = root
            for part in path.parts[:-1]:
                below = directory.setdefault(part, {})
                if not isinstance(below, dict):
                    break  # a manifest that has a file where it has a folder, too: the first stands
                directory = below
            else:
                directory.setdefault(path.name, leaf)
        return root


def _diffusers(model: ModelFolder) -> Iterable[tuple[PurePosixPath, Leaf]]:
    """The dropped folder, or what can be made of one that upstream's importer stored."""
    yield from model.files.items()
    yield from upstream_folder.leaves(model)


def _tensors(model: ModelFolder) -> Iterable[tuple[PurePosixPath, Leaf]]:
    """`component/tensor.name.safetensors` as relative links to the blobs.

    What no file name can hold is written `%2F` and `%00`; a tensor whose name is too long for one is left out.
    """
    above = len(PurePosixPath("tensors", model.stored.name.view_path).parts)
    for layer_name, layers in model.tensors.items():
        component, tensor = model.split(layer_name)
        file_name = tensor.replace("/", "%2F").replace("\0", "%00") + ".safetensors"
        if len(file_name.encode()) <= MAX_FILE_NAME:
            up = PurePosixPath(*[".."] * (above + len(component.parts)))
            yield model.checked(component / file_name), up / "blobs" / layers[0].digest.blob_name


DIFFUSERS = Convention("diffusers", _diffusers)

CONVENTIONS = (
    DIFFUSERS,
    Convention("tensors", _tensors),
    Convention("mlx", mlx_view.leaves, quantized_only=True),
    Convention("sdnq", sdnq_view.leaves, quantized_only=True),
)
