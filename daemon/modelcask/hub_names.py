"""How a Hugging Face cache names what is stored: repositories, their revisions and refs.

Source: huggingface_hub 2.4, `repo_folder_name` and `try_to_load_from_cache` in file_download.py.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath

from modelcask.digest import Digest
from modelcask.manifests import StoredManifest
from modelcask.names import DEFAULT_TAG, ModelName

PREFIX = "models--"
# What clients look for when they are given no revision.
MAIN = "main"

_REVISION_DIGITS = 40


def repository_folder(name: ModelName) -> str:
    """The folder of a model's repository, all its tags: `models--org--name`."""
    return PREFIX + "--".join(name.view_path.parent.parts)


def revision(manifest: Digest) -> str:
    """What stands for a commit: 40 hex digits."""
    return manifest.hex[:_REVISION_DIGITS]


def snapshot_path(stored: StoredManifest) -> PurePosixPath:
    """Where the model's folder stands in the cache."""
    return PurePosixPath(repository_folder(stored.name), "snapshots", revision(stored.digest))


def main_tag(tags: Collection[str]) -> str | None:
    """Which tag is meant where none is named: one called main, else latest, else the only one."""
    for wanted in (MAIN, DEFAULT_TAG):
        for tag in sorted(tags):
            if tag.casefold() == wanted:
                return tag
    return next(iter(tags)) if len(tags) == 1 else None
