"""The command line as a user meets it: help, wrong usage, JSON, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from folders import write_model
from running import CommandLine

COMMANDS = (
    "import",
    "demo",
    "ls",
    "show",
    "path",
    "diff",
    "df",
    "rm",
    "gc",
    "verify",
    "mount",
    "umount",
    "watch",
    "up",
    "status",
    "config",
    "install-service",
    "uninstall-service",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_takes_a_store(cask: CommandLine, command: str) -> None:
    said = cask(command, "--help").out
    assert said.startswith(f"Usage: modelcask {command} ")
    assert "--store" in said
    assert f"  {command} " in cask("--help").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'."),
        (["import"], "Missing argument 'DIR'."),
        (["import", "x", "--quantize", "int5"], "'int5' is not one of 'int4', 'int8', 'nvfp4', 'mxfp8'."),
        (["ls", "--nonsense"], "No such option"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(cask: CommandLine, arguments: list[str], said: str) -> None:
    done = cask(*arguments, status=2)
    assert done.err.count("\n") == 1
    assert said in done.err
    assert done.err.endswith("--help`.\n")


def test_an_empty_store_is_told_and_is_no_error(cask: CommandLine) -> None:
    assert cask("ls", "--json").json == []
    assert "no store at" in cask("ls").err
    assert cask("df", "--json").json["stored_bytes"] == 0
    assert cask("status", "--json").json == {"daemon": {"running": False, "pid": None}, "mounts": [], "imports": []}
    assert not cask.store.exists()


def test_json_has_the_fields_that_are_promised(cask: CommandLine, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", variants=["fp16"])
    imported = cask("import", folder, "--name", "org/m", "--json").json
    assert [set(entry) for entry in imported] == [
        {
            "name",
            "manifest",
            "tensors",
            "layers",
            "source_bytes",
            "new_blobs",
            "new_bytes",
            "reused_blobs",
            "reused_bytes",
            "skipped",
            "seconds",
        }
    ] * 2
    assert [entry["name"] for entry in imported] == ["org/m:latest", "org/m:fp16"]
    (half, default) = cask("ls", "--json").json
    assert set(default) == {
        "name",
        "manifest",
        "architecture",
        "parameter_count",
        "quantization",
        "components",
        "size",
    }
    assert default["manifest"] == imported[0]["manifest"]
    assert default["components"] == ["text_encoder", "transformer", "vae"]
    shown = cask("show", "org/m:fp16", "--json").json
    assert {key: shown[key] for key in half} == half
    assert len(shown["layers"]) == imported[1]["layers"]
    assert shown["component_facts"]["vae"]["tensors"] == 2
    difference = cask("diff", "org/m", "org/m:fp16", "--json").json
    assert len(difference["changed"]) == 6
    assert len(difference["equal"]) == 5
    usage = cask("df", "--json").json
    assert usage["logical_bytes"] == sum(model["bytes"] for model in usage["models"])
    assert set(usage["models"][0]) == {"name", "bytes", "unique_bytes", "shared_bytes"}
    verified = cask("verify", "--json").json
    assert (verified["corrupt"], verified["missing"]) == ([], [])
    assert verified["bytes"] == usage["stored_bytes"]
    assert cask("rm", "org/m", "org/m", "--json").json == {"removed": ["org/m:latest"]}
    assert cask("gc", "--dry-run", "--json").json["freed_bytes"] == cask("df", "--json").json["reclaimable_bytes"] > 0
    assert cask("gc", "--json").json["removed_blobs"] > 0
    assert cask("gc", "--json").json["removed_blobs"] == 0


def test_a_model_of_another_program_is_left_alone(cask: CommandLine, tmp_path: Path) -> None:
    cask("import", write_model(tmp_path / "m"))
    path = cask.store / "manifests/registry.ollama.ai/library/llama/latest"
    path.parent.mkdir()
    config = {"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": 2}
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    path.write_text(json.dumps({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": []}))
    assert [each["name"] for each in cask("ls", "--json").json] == ["library/m:latest"]
    for command in ("rm", "show"):
        assert "library/llama:latest: is no image model" in cask(command, "llama", status=1).err
    assert path.exists()


def test_a_reader_that_goes_away_is_no_error_worth_a_traceback(cask: CommandLine, tmp_path: Path) -> None:
    cask("import", write_model(tmp_path / "m"))
    process = cask.start("show", "m", "--json", stdout_closed=True)
    _, said = process.communicate(timeout=20)
    assert "Traceback" not in said


def test_config_tells_where_each_value_comes_from(cask: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "home/.config/modelcask/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text('mount = "/m"\n\n[[drop]]\npath = "/a"\n')
    found = cask("config", "--json").json
    assert (found["file"], found["exists"]) == (str(file), True)
    settings = {each["key"]: (each["value"], each["from"]) for each in found["settings"]}
    assert settings["store"] == (str(cask.store), "MODELCASK_STORE")
    assert settings["mount"] == ("/m", f"{file}:1")
    assert settings["drop 1: path"] == ("/a", f"{file}:4")
    assert settings["drop 1: after"] == ("keep", "default")
    assert {each["key"]: each["from"] for each in cask("config", "--store", "/s", "--json").json["settings"]}[
        "store"
    ] == "--store"
    assert f"{file}:4" in cask("config").out


def test_config_tells_the_line_of_what_is_not_allowed(cask: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('store = "/s"\n[watch]\nparallel = 99\n')
    said = cask("config", "--config", file, status=1).err
    assert said == f"modelcask: {file}, line 3: watch.parallel: 99 is not a number from 1 to 16\n"


def test_a_dry_run_of_install_service_writes_nothing(cask: CommandLine, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = cask("install-service", "--dry-run").out
    assert f"# {tmp_path}/home/.config/systemd/user/modelcask.service.d/10-paths.conf" in said
    assert f"ReadWritePaths={cask.store} -{tmp_path}/home/imports" in said
    said = cask("install-service", "--system", "--dry-run").out
    assert "# /etc/modelcask/config.toml" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_demo_can_be_read_by_others(cask: CommandLine, tmp_path: Path) -> None:
    cask("demo", tmp_path / "tiny")
    assert {oct(path.stat().st_mode & 0o044) for path in (tmp_path / "tiny").rglob("*")} == {"0o44"}
