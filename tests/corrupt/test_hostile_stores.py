"""Stores made to hurt, as a pull or a shared folder may bring them: manifests that name what they must not."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folders import files_of, write_model
from modelcask.digest import Digest
from running import CommandLine

FILE = "application/vnd.modelcask.file"
HEADER = "application/vnd.modelcask.safetensors.header"
TENSOR = "application/vnd.ollama.image.tensor"
Change = Callable[[list[dict[str, Any]]], None]


@pytest.fixture
def stored(cask: CommandLine, tmp_path: Path) -> CommandLine:
    cask("import", write_model(tmp_path / "m"))
    return cask


def plant(cask: CommandLine, change: Change, name: str = "hostile") -> None:
    """The sound model's manifest under another name, with its layers changed."""
    library = cask.store / "manifests/registry.ollama.ai/library"
    fields = json.loads((library / "m/latest").read_text())
    change(fields["layers"])
    (library / name).mkdir(exist_ok=True)
    (library / name / "latest").write_text(json.dumps(fields))


def named(media_type: str, name: str) -> Change:
    """One more layer, of a blob that is there."""

    def change(layers: list[dict[str, Any]]) -> None:
        layers.append({**layers[0], "mediaType": media_type, "name": name})

    return change


def with_digest(digest: str) -> Change:
    def change(layers: list[dict[str, Any]]) -> None:
        layers[0]["digest"] = digest

    return change


DIGESTS = (
    "../../etc/passwd",
    "sha256:../../../../etc/passwd",
    "sha256:" + "/" * 64,
    "sha256:" + "A" * 64,
    "sha256:" + "0" * 63 + "\n",
    "sha256:" + "\N{ARABIC-INDIC DIGIT ZERO}" * 64,
    "md5:" + "0" * 64,
    "",
)


def test_a_digest_that_is_none_is_never_a_path(stored: CommandLine, mount: Callable[[], Path]) -> None:
    for number, digest in enumerate(DIGESTS):
        plant(stored, with_digest(digest), f"hostile{number}")
    shown = mount() / "diffusers/library"
    for number in range(len(DIGESTS)):
        with pytest.raises(OSError, match="Input/output error") as caught:
            (shown / f"hostile{number}/latest").stat()
        assert caught.value.errno == errno.EIO
    assert (shown / "m/latest/README.md").read_text() == "# a model\n"
    for command in ("ls", "verify", "gc", "df"):
        done = stored(command, status=1)
        assert "hostile0/latest: unreadable manifest: " in done.out + done.err
        assert (done.out + done.err).replace("\n", "").isprintable()


NAMES = (
    "../../etc/passwd",
    "..",
    "vae/../../x",
    "/etc/passwd",
    "vae/" + "x" * 300 + "/y",
    "a\0b/c",
    "//x",
    ".",
)


@pytest.mark.parametrize("media_type", [FILE, HEADER, TENSOR])
def test_a_layer_s_name_leads_nowhere_else(
    stored: CommandLine, mount: Callable[[], Path], tmp_path: Path, media_type: str
) -> None:
    for number, name in enumerate(NAMES):
        plant(stored, named(media_type, name), f"hostile{number}")
    root = mount()
    refused = 0
    for number in range(len(NAMES)):
        for view in ("diffusers", "tensors"):
            shown = root / view / f"library/hostile{number}/latest"
            try:
                paths = list(shown.rglob("*"))
                assert paths or shown.stat()
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017 - refused as a whole is right, too
                refused += 1
                continue
            for path in paths:
                assert ".." not in path.relative_to(root).parts
                if path.is_symlink():
                    assert path.resolve().parent == stored.store / "blobs"
    assert refused >= 3
    assert files_of(root / "diffusers/library/m/latest") == files_of(tmp_path / "m")
    said = [stored("ls", status=None), *(stored("show", f"hostile{n}", "--tensors", status=None) for n in (0, 3, 5))]
    for done in said:
        assert "this is a bug" not in done.err
        assert (done.out + done.err).replace("\n", "").isprintable()


def test_a_name_that_is_no_unicode_is_refused(stored: CommandLine, mount: Callable[[], Path]) -> None:
    plant(stored, named(FILE, "\ud800"))
    with pytest.raises(OSError, match="Input/output error"):
        (mount() / "diffusers/library/hostile/latest").stat()
    assert "holds a lone surrogate" in stored("gc", status=1).err


SIZES = (0, 1, 1 << 62, 1 << 63, 10**400, -1, 1.5, True, None, "8")


def test_a_size_that_lies_gives_no_byte(stored: CommandLine, mount: Callable[[], Path]) -> None:
    for number, size in enumerate(SIZES):

        def change(layers: list[dict[str, Any]], size: object = size) -> None:
            for layer in layers:
                if layer["name"] == "README.md":
                    layer["size"] = size

        plant(stored, change, f"hostile{number}")
    root = mount()
    for number, size in enumerate(SIZES):
        path = root / f"diffusers/library/hostile{number}/latest/README.md"
        if size == 0:
            assert path.read_bytes() == b""
        else:
            with pytest.raises(OSError, match="Input/output error"), path.open("rb", buffering=0) as file:
                file.read(100)
    said = stored("verify", status=1).out
    for number in range(len(SIZES)):
        assert f"hostile{number}/latest: unreadable manifest: " in said


def test_a_header_that_lies_about_its_tensors_shows_no_shard(stored: CommandLine, mount: Callable[[], Path]) -> None:
    def change(layers: list[dict[str, Any]]) -> None:
        (layer,) = [each for each in layers if each["name"] == "vae/diffusion_pytorch_model.safetensors"]
        text = (
            b'{"decoder.weight":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,18446744073709551616]}}'
        )
        for header in (text, b"{" * 1000, b'{"a":1}', b'{"absent":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'):
            digest = Digest.of(header)
            (stored.store / "blobs" / digest.blob_name).write_bytes(header)
            layers.append(
                {**layer, "digest": str(digest), "size": len(header), "name": f"vae/{len(header)}.safetensors"}
            )

    plant(stored, change)
    shown = mount() / "diffusers/library/hostile/latest/vae"
    hostile = [path for path in shown.iterdir() if path.name[0].isdigit()]
    assert len(hostile) == 4
    for path in hostile:
        with pytest.raises(OSError, match="Input/output error"):
            path.stat()
    assert (shown / "diffusion_pytorch_model.safetensors").stat().st_size > 100


def test_what_lies_in_the_folders_of_a_store_and_is_nothing_of_ours_is_passed_over(
    stored: CommandLine, mount: Callable[[], Path], tmp_path: Path
) -> None:
    blobs = stored.store / "blobs"
    for name in (
        "sha256-zz",
        "../x".replace("/", "\N{DIVISION SLASH}"),
        "sha256-" + "0" * 63,
        "\x1b[31m",
        "sha256-" + "A" * 64,
    ):
        (blobs / name).write_text("x")
    (blobs / "folder").mkdir()
    os.mkfifo(blobs / ("sha256-" + "1" * 64))
    (stored.store / "tmp" / "import-1-2-abc").symlink_to(tmp_path)
    (tmp_path / "precious").write_text("x")
    stored("gc")
    assert (tmp_path / "precious").exists()
    assert not (blobs / ("sha256-" + "1" * 64)).exists()
    assert (blobs / "sha256-zz").exists()
    stored("verify")
    assert files_of(mount() / "diffusers/library/m/latest") == files_of(tmp_path / "m")


def test_names_of_hosts_and_models_that_are_none_stop_gc_and_reach_no_terminal_raw(
    stored: CommandLine, mount: Callable[[], Path]
) -> None:
    library = stored.store / "manifests/registry.ollama.ai/library"
    (library / "\x1b[31m\u202e").mkdir()
    (library / "\x1b[31m\u202e" / "latest").write_text("{}")
    (library / os.fsdecode(b"\xff")).mkdir()
    assert {path.name for path in (mount() / "diffusers/library").iterdir()} >= {"m"}
    for command, status in (("ls", 0), ("gc", 1), ("verify", 1), ("df", 1), ("status", 0)):
        done = stored(command, status=status)
        assert (done.out + done.err).replace("\n", "").isprintable()
