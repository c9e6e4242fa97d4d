"""Drop directories: which folders in them are drops, and how a directory itself is doing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from modelcask.config import DropDirectory
from modelcask.errors import InvalidName, printable
from modelcask.manifests import MODEL_INDEX
from modelcask.names import DEFAULT_NAMESPACE, DEFAULT_TAG, ModelName, namespace_from_folder_name
from modelcask.quantize import QUANT_TYPES

log = logging.getLogger("modelcask")


@dataclass(frozen=True, slots=True)
class Found:
    """A folder in a drop directory that is, or may become, a model.

    Attributes:
        beneath: the configured drop directory, which others may write to.
    """

    path: Path
    directory: DropDirectory
    namespace: str | None
    beneath: Path

    @property
    def is_removed_after(self) -> bool:
        """Whether it is to be removed when it was imported."""
        directory = self.directory
        return directory.after == "delete" and (directory.quantize is None or directory.delete_quantized)

    @property
    def name(self) -> str:
        """The model's name in full; the folder's own where that can be none."""
        try:
            return str(
                ModelName.from_folder_name(
                    self.path.name,
                    namespace=self.namespace or DEFAULT_NAMESPACE,
                    tag=self.directory.quantize or DEFAULT_TAG,
                )
            )
        except InvalidName:
            return printable(self.path.name)


def find_drops(directory: DropDirectory, *, beneath: Path | None = None) -> Iterator[Found]:
    """The drops in a directory.

    `int4/` and the other types are drop directories of their own; a folder that holds model folders gives
    them its name as their namespace. What cannot be read inside is passed over.

    Raises:
        OSError: the directory itself is not there or cannot be read.
    """
    top = beneath or directory.path
    for child in _folders(directory.path):
        if child.name in QUANT_TYPES and directory.quantize is None:
            try:
                yield from find_drops(replace(directory, path=child, quantize=child.name), beneath=top)
            except OSError:
                continue
            continue
        models = [] if _is_model(child) else [below for below in _folders_or_none(child) if _is_model(below)]
        if models:
            namespace = namespace_from_folder_name(child.name)
            yield from (Found(model, directory, namespace, top) for model in models)
        else:
            yield Found(child, directory, directory.namespace, top)


def _is_model(folder: Path) -> bool:
    try:
        return (folder / MODEL_INDEX).exists()
    except OSError:
        return False


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if _is_shown_folder(child))


def _folders_or_none(path: Path) -> list[Path]:
    try:
        return _folders(path)
    except OSError:
        return []  # gone, or not ours to read: `lost+found`


def _is_shown_folder(path: Path) -> bool:
    try:
        path.name.encode()
        return not path.name.startswith(".") and path.is_dir()
    except UnicodeEncodeError:
        log.warning("%s: its name is not UTF-8, rename it to have it imported", printable(str(path)))
    except OSError:
        pass  # not ours to look at
    return False
