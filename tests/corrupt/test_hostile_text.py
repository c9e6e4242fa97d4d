"""Text made to hurt: headers, JSON, TOML and names that are huge, deep, double or not what they seem."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.report import peak_rss_mib
from folders import raw_shard, shard_bytes, tensor, write_model
from modelcask import config
from modelcask.errors import InvalidConfig, InvalidSafetensors, ModelcaskError
from modelcask.safetensors_layout import MAX_HEADER, parse_header, strict_json
from modelcask.store import Store
from running import CommandLine, import_folder

WHERE = Path("x.safetensors")
SHARD = "transformer/diffusion_pytorch_model.safetensors"
_MEMORY_MIB = 1536

ENTRY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def filled(begin: bytes, item: bytes, end: bytes) -> bytes:
    """A header of the largest size that is allowed, full of `item`."""
    return begin + item * ((MAX_HEADER - len(begin) - len(end)) // len(item)) + end


HUGE = {
    "empty lists": lambda: filled(b'{"a":[', b"[],", b"[]]}"),
    "empty objects": lambda: filled(b'{"a":[', b"{},", b"{}]}"),
    "texts": lambda: b'{"a":[' + b",".join(b'"%06x"' % n for n in range(4_900_000)) + b"]}",
    "keys": lambda: b"{" + b",".join(b'"%07x":""' % n for n in range(4_900_000)) + b"}",
    "metadata": lambda: b'{"__metadata__":{' + b",".join(b'"%07x":""' % n for n in range(4_900_000)) + b"}}",
    "one key again and again": lambda: filled(b"{", b'"a":1,', b'"a":1}'),
    "a number": lambda: filled(b'{"a":', b"1", b"}"),
    "a fraction": lambda: filled(b'{"a":0.', b"1", b"}"),
    "nesting": lambda: filled(b'{"a":', b"[", b""),
    "spaces": lambda: filled(b"{", b" ", b"}"),
    "a name of escapes": lambda: filled(b'{"', b"\\u0000", b'":1}'),
    "letters that take four bytes": lambda: filled(b'{"', "\U0001f600".encode(), b'":1}'),
    "a million tensors": lambda: (
        b"{"
        + b",".join(b'"%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (n, n, n + 1) for n in range(1_000_000))
        + b"}"
    ),
    "a shape of a million sizes": lambda: (
        b'{"a":{"dtype":"U8","shape":[' + b"9223372036854775807," * 1_000_000 + b'1],"data_offsets":[0,1]}}'
    ),
}

_PARSE = """
import sys, time
from pathlib import Path
from corrupt.test_hostile_text import HUGE, parse_header, InvalidSafetensors, MAX_HEADER
header = HUGE[sys.argv[1]]()
assert len(header) <= MAX_HEADER
started = time.monotonic()
try:
    parse_header(header, Path("x"))
except InvalidSafetensors as error:
    assert str(error).isprintable() and len(str(error)) < 10_000
assert time.monotonic() - started < 30
"""


# These take seconds each to make alone.
_SLOW = ("texts", "keys", "metadata")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.large if kind in _SLOW else ()) for kind in HUGE]
)
def test_a_header_of_100_mb_ends_soon_and_in_bounded_memory(kind: str) -> None:
    paths = [str(Path(__file__).parents[1]), *os.environ["PYTHONPATH"].split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    peak = peak_rss_mib([sys.executable, "-c", _PARSE, kind], environment)
    assert 20 < peak < _MEMORY_MIB


def test_a_header_that_says_it_is_longer_is_not_read(tmp_path: Path) -> None:
    from modelcask.safetensors_layout import read_layout

    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER + 1))
    os.truncate(path, 1 << 40)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(InvalidSafetensors, match="more than the 100000000 the format allows"):
            read_layout(fd, path)
    finally:
        os.close(fd)


def test_a_hundred_thousand_tensors_are_read() -> None:
    header = b"{" + b",".join(
        b'"%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (n, n, n + 1) for n in range(100_000)
    )
    assert len(parse_header(header + b"}", WHERE).tensors) == 100_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a":' * 100_000, "it is nested too deeply"),
        (b'{"a":' + b"[" * 990 + b"]" * 990 + b"}", "it is nested too deeply"),
        (b'{"a":' + b"1" * 5000 + b"}", "a number in it has too many digits"),
        (b'{"a":NaN}', "it is not JSON (NaN)"),
        (b'{"a":-Infinity}', "it is not JSON (-Infinity)"),
        (b'{"a":1,"b":{"c":1,"c":1}}', "the key 'c' stands twice"),
        (b"\xef\xbb\xbf{}", "it is not JSON (Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0))"),
        (b'{"a":"\xff"}', "it is not UTF-8 (byte 6)"),
        (b'{"a":"\x00"}', "it is not JSON (Invalid control character at: line 1 column 7 (char 6))"),
        (b"[]", "it is not a JSON object"),
        (b'{"a":' + b"[" + b"0," * 6_000_000 + b"0]}", "it holds more than 5000000 values"),
    ],
)
def test_what_is_no_strict_json_is_told_in_a_few_words(text: bytes, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared whole
        strict_json(text)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "entry",
    [
        b'{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}',
        b'{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}',
        b'{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}',
        b'{"dtype":"U8","shape":[true],"data_offsets":[0,1]}',
        b'{"dtype":"U8","shape":[1],"data_offsets":[0,1e400]}',
        b'{"dtype":"U8","shape":[1],"data_offsets":[1,0]}',
        b'{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,1]}',
        b'{"dtype":"U8","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}',
        b'{"dtype":"U8","shape":[1],"data_offsets":[0,1],"dtype":"I8"}',
        b'{"dtype":[[[[]]]],"shape":[1],"data_offsets":[0,1]}',
        b'{"dtype":"U8","shape":{"0":1},"data_offsets":[0,1]}',
        b'{"dtype":"U8","shape":[1]}',
        b"null",
        b"[]",
    ],
)
def test_an_entry_that_lies_is_refused(entry: bytes) -> None:
    assert parse_header(b'{"a":' + ENTRY + b"}", WHERE).tensors
    with pytest.raises(InvalidSafetensors):
        parse_header(b'{"a":' + entry + b"}", WHERE)


NASTY = {
    "slash": "a/b",
    "absolute": "/etc/passwd",
    "up": "../../../etc/passwd",
    "dots": "..",
    "nul": "a\0b",
    "newline": "a\nb: removed",
    "escape": "\x1b]0;owned\x07\x1b[2J",
    "csi of eight bits": "\x9b31m",
    "right to left": "\u202egnp.exe",
    "long": "x" * 4000,
    "empty": "",
    "letters": "ünï",
}


@pytest.mark.parametrize("kind", list(NASTY))
def test_a_tensor_of_any_name_is_stored_and_shown_and_reaches_no_terminal_raw(
    cask: CommandLine, mount: Callable[[], Path], tmp_path: Path, kind: str
) -> None:
    folder, name = write_model(tmp_path / "m"), NASTY[kind]
    (folder / SHARD).write_bytes(shard_bytes({name: tensor("a", 16, 32), "plain": tensor("b", 4)}))
    cask("import", folder)
    root = mount()
    assert (root / "diffusers/library/m/latest" / SHARD).read_bytes() == (folder / SHARD).read_bytes()
    shown = root / "tensors/library/m/latest/transformer"
    names = [path.name for path in shown.iterdir()]
    assert len(names) == (1 if len(name) > 255 else 2)
    assert all(path.resolve().parent == cask.store / "blobs" for path in shown.iterdir())
    assert not any(set(each) & {"/", "\0"} or each in (".", "..") for each in names)
    assert {each["name"] for each in cask("show", "m", "--json").json["tensors"]} >= {f"transformer/{name}"}
    (folder / SHARD).write_bytes(shard_bytes({"plain": tensor("b", 4)}))
    cask("import", folder, "--name", "other")
    for command in (("show", "m", "--tensors"), ("show", "m", "--json"), ("diff", "m", "other"), ("ls",), ("verify",)):
        done = cask(*command)
        assert (done.out + done.err).replace("\n", "").isprintable()
    assert "removed" not in [line.strip() for line in cask("diff", "m", "other").out.splitlines()]


def test_names_of_files_and_folders_reach_no_terminal_raw(cask: CommandLine, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m\x1b[31m\u202e")
    (folder / "vae" / "\x1b]0;owned\x07.bin").write_bytes(b"")
    (folder / "vae" / "a\nb.txt").write_text("x")
    os.mkfifo(folder / "vae" / "\x9b31m")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "\x1b[31mPipeline\u202e"
    (folder / "model_index.json").write_text(json.dumps(index))
    said = [cask("import", folder), cask("ls"), cask("show", "m--31m-"), cask("df"), cask("ls", "--json")]
    (folder / "transformer" / "config.json").unlink()
    said.append(cask("import", folder, status=1))
    for done in said:
        assert (done.out + done.err).replace("\n", "").isprintable()


def test_a_lone_surrogate_in_a_name_is_refused() -> None:
    for header in (b'{"\\ud800":' + ENTRY + b"}", b'{"a\\udc80":' + ENTRY + b"}"):
        with pytest.raises(InvalidSafetensors, match="lone surrogate"):
            parse_header(header, WHERE)


def test_nesting_that_only_one_of_two_readers_follows_is_told(store: Store, tmp_path: Path) -> None:
    """json.loads follows 900 levels, writing them again as Go does 300: the import ends in one line, not in a bug."""
    folder = write_model(tmp_path / "m")
    path = folder / "model_index.json"
    for depth in (100, 300, 600, 900, 5000):
        path.write_text('{"_class_name": "P", "x": ' + "[" * depth + "]" * depth + "}")
        try:
            import_folder(store, folder)
        except ModelcaskError as error:
            assert "nested too deeply" in str(error)  # noqa: PT017 - which depth is the last is Python's to say
            assert depth > 100
    assert depth == 5000


def test_99999_shards_are_checked_in_linear_time(tmp_path: Path) -> None:
    from modelcask.plan import check_numbered_shards
    from modelcask.source import PurePosixPath, SourceFile, SourceFolder

    count = 20_000
    files = tuple(
        SourceFile(PurePosixPath(f"t/m-{number:05}-of-{count:05}.safetensors"), tmp_path, (0, number, 0, 0, 0))
        for number in range(1, count + 1)
    )
    index = SourceFile(PurePosixPath("t/m.safetensors.index.json"), tmp_path, (0, 0, 0, 0, 0))
    started = time.monotonic()
    check_numbered_shards(SourceFolder(tmp_path, (*files, index), ()))
    assert time.monotonic() - started < 10


def test_thousands_of_variants_are_refused_at_once(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for number in range(40):
        (folder / f"vae/diffusion_pytorch_model.v{number}.safetensors").write_bytes(raw_shard(b"{}"))
    with pytest.raises(ModelcaskError, match="has 40 variants of weights; choose those to import with --variant"):
        import_folder(store, folder)
    import_folder(store, folder, variant="v7")


def test_headers_count_together(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for number in range(3):
        path = folder / f"vae/more{number}.safetensors"
        path.write_bytes(raw_shard(b"{" + b" " * 40_000_000 + b"}"))
    with pytest.raises(ModelcaskError, match="headers of more than 100000000 bytes together"):
        import_folder(store, folder)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 10_000,
        "x = " + "{a=" * 5_000,
        "store = " + "1" * 5000,
        'store = "/a\\u0000b"',
        'store = "~no\\u0000body/x"',
        'store = "~nobody-here/x"',
        "drop = 1",
        "[[drop]]\npath = 1e400",
        '[[drop]]\npath = "/x"\nnamespace = "../x"',
        '[[drop]]\npath = "/x"\nnamespace = "\\u202e"',
        "[drop]\n" * 3,
        '"\\u001b[31m" = 1',
        "store = nan",
        "a.b.c = 1\na.b = 1",
    ],
)
def test_a_hostile_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        config.load(path)
    assert str(caught.value).isprintable()


def test_a_message_is_never_megabytes(tmp_path: Path) -> None:
    error = InvalidSafetensors(tmp_path, "x" * 10_000_000)
    assert len(str(error)) < 10_000
    assert str(error).endswith("download or save this file again")


def test_a_count_of_parameters_that_is_none_does_not_stop_ls(cask: CommandLine, tmp_path: Path) -> None:
    cask("import", write_model(tmp_path / "m"))
    from modelcask.digest import Digest
    from modelcask.names import ModelName

    store = Store.open(cask.store)
    stored = store.manifests.read(ModelName.parse("m"))
    (layer,) = [
        each for each in stored.manifest.layers if each.name == "model_index.json" and "ollama" in each.media_type
    ]
    for value in (10**400, -1, [], "x", 1.5, True):
        assert not isinstance(value, float) or math.isfinite(value)
        data = json.dumps({"parameter_count": value, "architecture": [[]], "quantization": {"a": 1}}).encode()
        digest = Digest.of(data)
        store.blobs.path(digest).write_bytes(data)
        text = stored.path.read_text().replace(str(layer.digest), str(digest))
        text = text.replace(
            f'"size":{layer.size},"name":"model_index.json"', f'"size":{len(data)},"name":"model_index.json"'
        )
        hostile = store.root / "manifests/registry.ollama.ai/library/hostile/latest"
        hostile.parent.mkdir(exist_ok=True)
        hostile.write_text(text)
        assert "library/hostile:latest" in cask("ls").out
        cask("show", "hostile")
