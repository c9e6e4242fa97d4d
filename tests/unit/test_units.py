"""The units that are written for an installation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modelcask import units
from modelcask.config import Config, DropDirectory
from modelcask.units import Installation

CONFIG = Config(Path("/s"), Path("/m"), (DropDirectory(Path("/a")), DropDirectory(Path("/b c"))))


def installation(*, system: bool = False) -> Installation:
    return Installation(Path("/units"), Path("/v/bin/python"), (Path("/v"),), system, None, None, CONFIG)


def paths_of(made: Installation, unit: str) -> list[str]:
    return made.files()[Path(f"/units/{unit}.d/10-paths.conf")].splitlines()


def test_the_units_are_those_that_are_shipped() -> None:
    files = installation().files()
    assert sorted(path.name for path in files if path.parent == Path("/units")) == sorted(units.UNITS)
    assert "NoNewPrivileges=yes" in files[Path("/units/modelcask.service")]


def test_the_drop_ins_have_the_paths() -> None:
    service = paths_of(installation(), units.SERVICE)
    assert "ExecStart=/v/bin/python -P -m modelcask watch" in service
    assert 'ReadWritePaths=/s -/a "-/b c"' in service
    assert "RequiresMountsFor=/s" in service
    assert "ExecStart=/v/bin/python -P -m modelcaskfs /s /m -f" in paths_of(installation(), units.MOUNT)


def test_the_systems_mount_is_for_all() -> None:
    mount = paths_of(installation(system=True), units.MOUNT)
    assert "ExecStart=/v/bin/python -P -m modelcaskfs /s /m -f -o allow_other" in mount


def test_what_is_given_is_named() -> None:
    made = replace(installation(), config_path=Path("/c.toml"), store=Path("/s"))
    assert "ExecStart=/v/bin/python -P -m modelcask watch --config /c.toml --store /s" in paths_of(made, units.SERVICE)


@pytest.mark.parametrize(
    ("path", "in_command", "in_list"),
    [
        ("/100%", "/100%%", "/100%%"),
        ("/a$b", "/a$$b", "/a$b"),
        ('/say "x"', r'"/say \"x\""', r'"/say \"x\""'),
        ("/back\\slash", r'"/back\\slash"', r'"/back\\slash"'),
        ("/a;b", '"/a;b"', '"/a;b"'),
        ("/模型", "/模型", "/模型"),
    ],
)
def test_what_units_read_as_something_else_is_escaped(path: str, in_command: str, in_list: str) -> None:
    made = replace(installation(), effective=Config(Path(path), Path("/m"), ()))
    assert f"ExecStart=/v/bin/python -P -m modelcaskfs {in_command} /m -f" in paths_of(made, units.MOUNT)
    assert f"ReadWritePaths={in_list}" in paths_of(made, units.SERVICE)


def test_a_machine_without_namespaces_gets_one_drop_in_more() -> None:
    files = replace(installation(), namespaces=False).files()
    assert "PrivateUsers=no" in files[Path("/units/modelcask.service.d/20-no-namespaces.conf")]


@pytest.mark.parametrize(
    "made",
    [
        replace(installation(), code=(Path("/v"), Path("/var/tmp/clone"))),
        replace(installation(), effective=replace(CONFIG, store=Path("/tmp/s"))),
        replace(installation(), effective=replace(CONFIG, drops=(DropDirectory(Path("/tmp")),))),
    ],
)
def test_a_temporary_folder_that_is_needed_stays_in_sight(made: Installation) -> None:
    assert "PrivateTmp=no" in paths_of(made, units.SERVICE)
    assert "PrivateTmp=no" not in paths_of(installation(), units.SERVICE)
