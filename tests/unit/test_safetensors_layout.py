import math
import os
import struct
from pathlib import Path

import pytest

from folders import raw_shard, shard_bytes, tensor
from modelcask.errors import InvalidSafetensors
from modelcask.safetensors_layout import (
    DTYPE_BITS,
    ShardLayout,
    TensorEntry,
    blob_header,
    encode_header,
    read_layout,
)


def read(path: Path, data: bytes) -> ShardLayout:
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_layout(fd, path)
    finally:
        os.close(fd)


def test_a_valid_file_gives_its_tensors_by_offset(tmp_path: Path) -> None:
    data = shard_bytes({"b": tensor("b", 2, 3), "a": tensor("a", 4, dtype="F32")}, metadata={"format": "pt"})
    layout = read(tmp_path / "x", data)
    assert [(t.name, t.dtype, t.shape, t.begin, t.end) for t in layout.tensors] == [
        ("b", "BF16", (2, 3), 0, 12),
        ("a", "F32", (4,), 12, 28),
    ]
    assert data == struct.pack("<Q", len(layout.header)) + layout.header + data[layout.data_start :]


def test_every_dtype_is_known_with_its_bits(tmp_path: Path) -> None:
    for dtype, bits in DTYPE_BITS.items():
        header = f'{{"x":{{"dtype":"{dtype}","shape":[8],"data_offsets":[0,{bits}]}}}}'
        assert read(tmp_path / dtype, raw_shard(header.encode(), bytes(bits))).data_size == bits


def test_an_empty_file_of_no_tensors_is_valid(tmp_path: Path) -> None:
    assert read(tmp_path / "x", raw_shard(b"{}")).tensors == ()


X = '"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ("[]", b"", "does not begin with '{'"),
        (" {}", b"", "does not begin with '{'"),
        ("{", b"", "not JSON"),
        ('{"x":NaN}', b"", "not JSON"),
        ('{"x":' + "[" * 100_000, b"", "nested too deeply|not JSON"),
        ("{" + X + "," + X + "}", bytes(4), "'x' stands twice"),
        ('{"__metadata__":{"a":1},' + X + "}", bytes(4), "__metadata__"),
        ('{"x":{"dtype":"F7","shape":[4],"data_offsets":[0,4]}}', bytes(4), "unknown dtype 'F7'"),
        ('{"x":{"dtype":"U8","shape":[4]}}', bytes(4), "must have dtype, shape and data_offsets"),
        ('{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"y":0}}', bytes(4), "and nothing else"),
        ('{"x":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}}', bytes(4), "shape is not a list of sizes"),
        ('{"x":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}}', bytes(4), "shape is not a list of sizes"),
        ('{"x":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', bytes(1), "shape is not a list of sizes"),
        ('{"x":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}', bytes(4), "not two offsets in order"),
        ('{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,1e400]}}', bytes(4), "not two offsets in order"),
        ('{"x":{"dtype":"U8","shape":[5],"data_offsets":[0,4]}}', bytes(4), "takes 5 bytes, its data_offsets span 4"),
        ('{"x":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', bytes(1), "do not fill whole bytes"),
        ('{"x":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}', bytes(4), "leaves a hole"),
        ("{" + X + ',"y":{"dtype":"U8","shape":[3],"data_offsets":[3,6]}}', bytes(6), "overlaps"),
        ("{" + X + ',"y":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}}', bytes(6), "leaves a hole"),
        ("{" + X + "}", bytes(3), "is truncated"),
        ("{" + X + "}", bytes(5), "has 1 bytes behind"),
        ('{"x\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4), "lone surrogate"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: str, data: bytes, reason: str) -> None:
    with pytest.raises(InvalidSafetensors, match=reason) as caught:
        read(tmp_path / "x", raw_shard(header.encode(), data))
    assert str(tmp_path / "x") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSafetensors, match="not UTF-8"):
        read(tmp_path / "x", raw_shard(b'{"\xff":{}}'))


def test_a_header_length_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)
    with pytest.raises(InvalidSafetensors, match="more than the 100000000"):
        read_layout_of(path)


def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSafetensors, match="ends within its header"):
        read(tmp_path / "x", struct.pack("<Q", 1000) + b"{}")


@pytest.mark.parametrize("data", [b"", b"1234567"])
def test_a_file_too_short_for_a_header_length_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InvalidSafetensors, match="too short"):
        read(tmp_path / "x", data)


def test_a_git_lfs_pointer_is_told_as_such(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"
    with pytest.raises(InvalidSafetensors, match=r"Git-LFS pointer.*git lfs pull"):
        read(tmp_path / "x", pointer)


def test_a_blob_header_is_padded_to_a_multiple_of_eight() -> None:
    header = blob_header("w<1>", "BF16", (2, 3), 12)
    text = b'{"w\\u003c1\\u003e":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    assert header == struct.pack("<Q", len(header) - 8) + text.ljust(len(header) - 8)
    assert len(header) % 8 == 0
    assert len(header) - 8 - len(text) < 8


@pytest.mark.parametrize("name", ["", "a.b/c d-1", "é", 'say "x"', "w<1>&", "\\", "tab\t", "\u2028", "line\n"])
def test_a_blob_header_is_the_encoded_header_of_its_one_tensor(name: str) -> None:
    for shape in ((), (0,), (3, 4)):
        size = math.prod(shape) * 4
        entry = TensorEntry(name, "F32", shape, 0, size)
        assert blob_header(name, "F32", shape, size) == encode_header([entry])


def read_layout_of(path: Path) -> ShardLayout:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_layout(fd, path)
    finally:
        os.close(fd)
