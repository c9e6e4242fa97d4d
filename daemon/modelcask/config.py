"""The configuration: where the store is, where it is mounted, and what is watched.

Read from `$XDG_CONFIG_HOME/modelcask/config.toml`; without one, `~/imports` is watched and `~/models` is the
mountpoint.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from modelcask.errors import InvalidConfig, InvalidName
from modelcask.names import ModelName
from modelcask.notify import Notifier
from modelcask.quantize import QUANT_TYPES

After = Literal["keep", "delete"]


@dataclass(frozen=True, slots=True)
class DropDirectory:
    """A directory whose folders are imported.

    Attributes:
        quantize: the type all its models are quantized to, None for none.
        namespace: of the models' names, None for the default.
        after: what happens to a drop that was imported.
        delete_quantized: whether `after = "delete"` holds for quantized imports, too, which lose something.
        polling: whether it is looked at now and then instead of waiting for events; None: by its filesystem's type.
    """

    path: Path
    quantize: str | None = None
    namespace: str | None = None
    after: After = "keep"
    delete_quantized: bool = False
    polling: bool | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """The effective configuration.

    Attributes:
        parallel: how many imports at once, None: as many as serve the disk.
        stuck_after: seconds without progress after which a settling drop counts as stuck.
    """

    store: Path
    mount: Path
    drops: tuple[DropDirectory, ...]
    parallel: int | None = None
    stuck_after: float = 600.0


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of the effective configuration, and where it comes from.

    Attributes:
        line: of the configuration file, None for what is not written there.
    """

    key: str
    value: str | float | bool | None
    line: int | None


def default_path() -> Path:
    """Where the configuration is looked for."""
    return _xdg("XDG_CONFIG_HOME", ".config") / "modelcask" / "config.toml"


def default_store() -> Path:
    """The store that commands use without --store: the configured one, or the usual place."""
    return load().store


def load(path: Path | None = None, *, store: Path | None = None) -> Config:
    """The configuration in the file `path`, or in the usual one, which may be missing.

    Args:
        store: is used instead of the configured one.

    Raises:
        InvalidConfig: names the file, the line, the key and what is allowed.
    """
    return _Reader(path or default_path(), _text_of(path)).config(store)


def parse(text: str, where: Path, *, store: Path | None = None) -> Config:
    """The configuration in `text`, as `load` would have it from the file `where`."""
    return _Reader(where, text).config(store)


def settings(path: Path | None = None, *, store: Path | None = None) -> list[Setting]:
    """Every value of `load(path, store=store)`, in the order of the documentation. Raises as it does."""
    reader = _Reader(path or default_path(), _text_of(path))
    effective = reader.config(store)
    found = [
        Setting("store", str(effective.store), None if store else reader.line("", "store")),
        Setting("mount", str(effective.mount), reader.line("", "mount")),
        Setting("watch.parallel", effective.parallel, reader.line("watch", "parallel")),
        Setting("watch.stuck_after", effective.stuck_after, reader.line("watch", "stuck_after")),
    ]
    for number, drop in enumerate(effective.drops, 1):
        for field in fields(drop):
            value = getattr(drop, field.name)
            found.append(
                Setting(
                    f"drop {number}: {field.name}",
                    str(value) if isinstance(value, Path) else value,
                    reader.line(f"drop {number}", field.name),
                )
            )
    return found


def service_manager() -> tuple[Notifier, float | None]:
    """How to tell the service manager that started this process, and its watchdog's interval in seconds.

    Takes both out of the environment: they are not for the processes that this one starts.
    """
    address = os.environ.pop("NOTIFY_SOCKET", None)
    microseconds, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", None)
    meant = pid is None or pid == str(os.getpid())
    interval = int(microseconds) / 1e6 if meant and microseconds.isdecimal() else 0.0
    return Notifier(address), interval or None


class _Reader:
    """Takes fields out of the file, or says what is wrong with them.

    A table is named by its place: "" for the top, `watch`, `drop 1` for the first `[[drop]]`.
    """

    def __init__(self, where: Path, text: str) -> None:
        self._where, self._text = where, text
        try:
            self._fields: dict[str, Any] = tomllib.loads(text)
        except ValueError as error:  # no TOML, or a number of more digits than Python reads
            raise InvalidConfig(where, f"is no TOML: {error}") from None
        except RecursionError:
            raise InvalidConfig(where, "is nested too deeply") from None

    def config(self, store: Path | None) -> Config:
        self._only(self._fields, {"store", "mount", "drop", "watch"}, "")
        watch = self._fields.get("watch", {})
        if not isinstance(watch, dict):
            raise self._wrong("", "watch", "write a [watch] table")
        self._only(watch, {"parallel", "stuck_after"}, "watch")
        drops = self._fields.get("drop", [{"path": "~/imports"}])
        if not isinstance(drops, list) or not all(isinstance(drop, dict) for drop in drops):
            raise self._wrong("", "drop", "write [[drop]] tables")
        effective = Config(
            store=store or self._path(self._fields, "store", "") or _xdg("XDG_DATA_HOME", ".local/share") / "modelcask",
            mount=self._path(self._fields, "mount", "") or Path.home() / "models",
            drops=tuple(self._drop(drop, f"drop {number}") for number, drop in enumerate(drops, 1)),
            parallel=self._parallel(watch),
            stuck_after=self._stuck_after(watch),
        )
        self._check_apart(effective)
        return effective

    def line(self, table: str, key: str) -> int | None:
        """The number of the line that says `key`, None if none does, or not in the usual way of writing."""
        here, drops = "", 0
        for number, line in enumerate(self._text.splitlines(), 1):
            text = line.strip()
            if text.replace(" ", "").startswith("[[drop]]"):
                drops += 1
                here = f"drop {drops}"
            elif text.startswith("["):
                here = text.partition("#")[0].strip("[] \t")
            elif here == table and text.partition("=")[0].strip(" \t\"'") == key and "=" in text:
                return number
        return None

    def _wrong(self, table: str, key: str, reason: str) -> InvalidConfig:
        prefix = {"": "", "watch": "watch."}.get(table, f"{table}: ")
        return InvalidConfig(self._where, f"{prefix}{key}: {reason}", self.line(table, key))

    def _only(self, found: dict[str, Any], allowed: set[str], table: str) -> None:
        for key in sorted(found.keys() - allowed):
            raise self._wrong(table, key, f"no such key; allowed are {', '.join(sorted(allowed))}")

    def _path(self, found: dict[str, Any], key: str, table: str) -> Path | None:
        value = found.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value:
            raise self._wrong(table, key, "write a path in quotes")
        if not value.isprintable():
            raise self._wrong(table, key, f"{value!r} holds a control character")
        try:
            path = Path(value).expanduser()
        except RuntimeError as error:
            raise self._wrong(table, key, str(error)) from None
        if not path.is_absolute():
            raise self._wrong(table, key, f"{value!r} is relative; write an absolute path, or one with ~")
        return path

    def _parallel(self, found: dict[str, Any]) -> int | None:
        value = found.get("parallel")
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 16:
            raise self._wrong("watch", "parallel", f"{value!r} is not a number from 1 to 16")
        return value

    def _stuck_after(self, found: dict[str, Any]) -> float:
        value = found.get("stuck_after", 600.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self._wrong("watch", "stuck_after", f"{value!r} is no number of seconds above 0")
        return float(value)

    def _flag(self, found: dict[str, Any], key: str, table: str) -> bool | None:
        value = found.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(table, key, f"{value!r} is neither true nor false")
        return value

    def _drop(self, found: dict[str, Any], table: str) -> DropDirectory:
        self._only(found, {field.name for field in fields(DropDirectory)}, table)
        path = self._path(found, "path", table)
        if path is None:
            raise InvalidConfig(self._where, f"{table}: path is missing")
        quantize, namespace = found.get("quantize"), found.get("namespace")
        after = found.get("after", "keep")
        if quantize is not None and not (isinstance(quantize, str) and quantize in QUANT_TYPES):
            raise self._wrong(table, "quantize", f"{quantize!r} is none of {', '.join(QUANT_TYPES)}")
        if after not in ("keep", "delete"):
            raise self._wrong(table, "after", f'{after!r} is neither "keep" nor "delete"')
        if namespace is not None:
            if not isinstance(namespace, str) or "/" in namespace:
                raise self._wrong(table, "namespace", "write one name in quotes, without a '/'")
            try:
                ModelName.parse(f"{namespace}/name")
            except InvalidName as error:
                raise self._wrong(table, "namespace", str(error)) from None
        delete_quantized = self._flag(found, "delete_quantized", table) or False
        if delete_quantized and after != "delete":
            raise self._wrong(table, "delete_quantized", 'says nothing without after = "delete"')
        return DropDirectory(path, quantize, namespace, after, delete_quantized, self._flag(found, "polling", table))

    def _check_apart(self, effective: Config) -> None:
        """No folder may lie in another: the service would import its own store, or what the mount shows."""
        places = [("", "store", effective.store), ("", "mount", effective.mount)]
        places += [(f"drop {number}", "path", drop.path) for number, drop in enumerate(effective.drops, 1)]
        # The key that is written in the file is the one to tell of, and of two the later one.
        for (table, key, path), (table2, key2, path2) in combinations(sorted(places, key=self._written), 2):
            one, two = Path(os.path.realpath(path)), Path(os.path.realpath(path2))
            what = table or f"the {key}"
            if one == two:
                reason = f"{path2} is {what} already"
            elif two.is_relative_to(one):
                reason = f"{path2} lies in {what}, {path}"
            elif one.is_relative_to(two):
                reason = f"{path2} holds {what}, {path}"
            else:
                continue
            raise self._wrong(table2, key2, f"{reason}; give each a folder of its own")

    def _written(self, place: tuple[str, str, Path]) -> int:
        return self.line(place[0], place[1]) or 0


def _text_of(path: Path | None) -> str:
    """What stands in the file `path`, or in the usual one; nothing where that is missing."""
    where = path or default_path()
    try:
        return where.read_text()
    except FileNotFoundError:
        if path is not None:
            raise InvalidConfig(where, "there is no such file; leave --config out to do without one") from None
        return ""
    except UnicodeDecodeError as error:
        raise InvalidConfig(where, f"is no TOML: {error}") from None


def _xdg(variable: str, default: str) -> Path:
    value = os.environ.get(variable, "")
    return Path(value) if Path(value).is_absolute() else Path.home() / default
