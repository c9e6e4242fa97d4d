"""The configuration: where the store is, where it is mounted, and what is watched.

Read from `$XDG_CONFIG_HOME/modelcask/config.toml`; without one, `~/imports` is watched and `~/models` is the
mountpoint.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelcask.errors import InvalidConfig, InvalidName
from modelcask.names import ModelName
from modelcask.quantize import QUANT_TYPES

After = Literal["keep", "delete"]


@dataclass(frozen=True, slots=True)
class DropDirectory:
    """A directory whose folders are imported.

    Attributes:
        quantize: the type all its models are quantized to, None for none.
        namespace: of the models' names, None for the default.
        after: what happens to a drop that was imported.
    """

    path: Path
    quantize: str | None = None
    namespace: str | None = None
    after: After = "keep"


@dataclass(frozen=True, slots=True)
class Config:
    """The effective configuration."""

    store: Path
    mount: Path
    drops: tuple[DropDirectory, ...]


def default_path() -> Path:
    """Where the configuration is looked for."""
    return _xdg("XDG_CONFIG_HOME", ".config") / "modelcask" / "config.toml"


def default_store() -> Path:
    """The store that commands use without --store: the configured one, or the usual place."""
    return load().store


def load(path: Path | None = None) -> Config:
    """The configuration in the file `path`, or in the usual one, which may be missing.

    Raises:
        InvalidConfig: names the key and what is allowed.
    """
    where = path or default_path()
    try:
        fields = tomllib.loads(where.read_text())
    except FileNotFoundError:
        if path is not None:
            raise InvalidConfig(where, "there is no such file; leave --config out to do without one") from None
        fields = {}
    except ValueError as error:  # no UTF-8, no TOML, or a number of more digits than Python reads
        raise InvalidConfig(where, f"is no TOML: {error}") from None
    except RecursionError:
        raise InvalidConfig(where, "is nested too deeply") from None
    reader = _Reader(where)
    reader.only(fields, {"store", "mount", "drop"}, "")
    drops = fields.get("drop", [{"path": "~/imports"}])
    if not isinstance(drops, list) or not all(isinstance(drop, dict) for drop in drops):
        raise InvalidConfig(where, "drop: write [[drop]] tables")
    return Config(
        store=reader.path(fields, "store") or _xdg("XDG_DATA_HOME", ".local/share") / "modelcask",
        mount=reader.path(fields, "mount") or Path.home() / "models",
        drops=tuple(reader.drop(drop, number) for number, drop in enumerate(drops, 1)),
    )


class _Reader:
    """Takes fields out of the parsed file, or says what is wrong with them."""

    def __init__(self, where: Path) -> None:
        self._where = where

    def only(self, fields: dict[str, Any], allowed: set[str], prefix: str) -> None:
        for key in fields.keys() - allowed:
            raise InvalidConfig(self._where, f"{prefix}{key}: no such key; allowed are {', '.join(sorted(allowed))}")

    def path(self, fields: dict[str, Any], key: str, prefix: str = "") -> Path | None:
        value = fields.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value or "\0" in value:
            raise InvalidConfig(self._where, f"{prefix}{key}: write a path in quotes")
        try:
            path = Path(value).expanduser()
        except RuntimeError as error:
            raise InvalidConfig(self._where, f"{prefix}{key}: {error}") from None
        if not path.is_absolute():
            raise InvalidConfig(
                self._where, f"{prefix}{key}: {value!r} is relative; write an absolute path, or one with ~"
            )
        return path

    def drop(self, fields: dict[str, Any], number: int) -> DropDirectory:
        prefix = f"drop {number}: "
        self.only(fields, {"path", "quantize", "namespace", "after"}, prefix)
        path = self.path(fields, "path", prefix)
        if path is None:
            raise InvalidConfig(self._where, f"{prefix}path is missing")
        quantize, namespace = fields.get("quantize"), fields.get("namespace")
        after = fields.get("after", "keep")
        if quantize is not None and not (isinstance(quantize, str) and quantize in QUANT_TYPES):
            raise InvalidConfig(self._where, f"{prefix}quantize: {quantize!r} is none of {', '.join(QUANT_TYPES)}")
        if after not in ("keep", "delete"):
            raise InvalidConfig(self._where, f'{prefix}after: {after!r} is neither "keep" nor "delete"')
        if namespace is not None:
            if not isinstance(namespace, str) or "/" in namespace:
                raise InvalidConfig(self._where, f"{prefix}namespace: write one name in quotes, without a '/'")
            try:
                ModelName.parse(f"{namespace}/name")
            except InvalidName as error:
                raise InvalidConfig(self._where, f"{prefix}namespace: {error}") from None
        return DropDirectory(path, quantize, namespace, after)


def _xdg(variable: str, default: str) -> Path:
    value = os.environ.get(variable, "")
    return Path(value) if Path(value).is_absolute() else Path.home() / default
