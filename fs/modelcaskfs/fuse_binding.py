"""Which FUSE library serves: libfuse 2 through fusepy, or libfuse 3 through mfusepy where only that is installed.

The one module that imports them. A process has one of them, for its whole life.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcask.errors import MountFailed


@dataclass(frozen=True, slots=True)
class Binding:
    """A loaded library.

    Attributes:
        major: of the library's version, 2 or 3.
        structures: the Python module that knows its structures (`c_stat`, `fuse_file_info`, …).
        library: for ctypes.
    """

    major: int
    structures: Any
    library: Any


_loaded: list[Binding] = []


def load(major: int | None = None) -> Binding:
    """The library of this process, loaded at first use.

    Args:
        major: asks for libfuse 2 or 3, at the first call; without it, libfuse 3 is taken where libfuse 2 is missing.

    Raises:
        MountFailed: there is none, or not the one that is asked for.
    """
    if not _loaded:
        _loaded.append(_find(major))
    return _loaded[0]


def _find(major: int | None) -> Binding:
    for binding in _loadable(major):
        return binding
    if major is not None:
        raise MountFailed(
            Path(f"libfuse {major}"), "is missing, or its Python binding is (2: fusepy, 3: mfusepy)", "install both"
        )
    raise MountFailed(
        Path("libfuse"),
        "no library to mount with is installed",
        "apt install fuse libfuse2 (Fedora: fuse-libs), or fuse3 and pip install 'modelcask[fuse3]'",
    )


def _loadable(major: int | None) -> Iterator[Binding]:
    if major != 3 and (module := _imported("fuse")) is not None:
        yield Binding(2, module, module._libfuse)
    if major != 2:
        # mfusepy prefers libfuse 2, and its environment is the only way to tell it otherwise.
        os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
        module = _imported("mfusepy")
        if module is not None and module.fuse_version_major == 3:
            yield Binding(3, module, module._libfuse)


def _imported(name: str) -> Any:
    """The module, None where it or its library is missing."""
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, AttributeError):  # they raise OSError without a library
        return None
    return module if hasattr(module, "_libfuse") else None  # python3-fuse is called fuse, too
