"""What each view shows of one model: a client convention as names and what lies behind them.

A view is a function from a model to its children: a nested mapping of names, with a `Layer` (a file of the
model folder) or a `PurePosixPath` (a symlink's target) at the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import TypeAlias

from modelcask.manifests import Layer
from modelcaskfs.model_folder import ModelFolder

Children: TypeAlias = "dict[str, Children | Layer | PurePosixPath]"
Convention = Callable[[ModelFolder], Children]

_MAX_FILE_NAME = 255


def diffusers(model: ModelFolder) -> Children:
    """The dropped folder."""
    return _nested(model.files.items())


def tensors(model: ModelFolder) -> Children:
    """`component/tensor.name.safetensors` as relative links to the blobs.

    What no file name can hold is written `%2F` and `%00`; a tensor whose name is too long for one is left out.
    """
    above = len(PurePosixPath("tensors", model.stored.name.view_path).parts)
    links = []
    for layer_name, layers in model.tensors.items():
        component, tensor = model.split(layer_name)
        file_name = tensor.replace("/", "%2F").replace("\0", "%00") + ".safetensors"
        if len(file_name.encode()) <= _MAX_FILE_NAME:
            up = PurePosixPath(*[".."] * (above + len(component.parts)))
            links.append((component / file_name, up / "blobs" / layers[0].digest.blob_name))
    return _nested(links)


CONVENTIONS: Mapping[str, Convention] = {"diffusers": diffusers, "tensors": tensors}


def _nested(leaves: Iterable[tuple[PurePosixPath, Layer | PurePosixPath]]) -> Children:
    root: Children = {}
    for path, leaf in leaves:
        directory = root
        for part in path.parts[:-1]:
            below = directory.setdefault(part, {})
            if not isinstance(below, dict):
                break  # a manifest that has a file where it has a folder, too: the first stands
            directory = below
        else:
            directory.setdefault(path.name, leaf)
    return root
