from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors import deserialize as reference_deserialize

from folders import raw_shard
from modelcask.blobs import BlobStore
from modelcask.digest import Digest
from modelcask.errors import InvalidSafetensors
from modelcask.safetensors_layout import DTYPE_BITS, parse_header
from modelcaskfs.reader import SpanReader
from modelcaskfs.spans import BlobRange, SpanFile


@given(
    parts=st.lists(st.tuples(st.booleans(), st.binary(max_size=40), st.integers(0, 9)), max_size=12),
    offset=st.integers(0, 500),
    length=st.integers(0, 500),
)
@settings(deadline=None)
def test_a_ranged_read_equals_the_slice(parts: list[tuple[bool, bytes, int]], offset: int, length: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        blobs = BlobStore(Path(name))
        spans: list[tuple[bytes | BlobRange, int]] = []
        for literal, data, skip in parts:
            if literal:
                spans.append((data, len(data)))
            else:
                whole = os.urandom(skip) + data
                digest = Digest.of(whole)
                blobs.path(digest).write_bytes(whole)
                spans.append((BlobRange(digest, len(whole), skip), len(data)))
        expected = b"".join(data for _, data, _ in parts)
        file = SpanFile(spans)
        assert file.size == len(expected)
        reader = SpanReader(blobs, max_open=20)
        for read in (reader.read, reader.read_cached):  # the first opens the blobs, which the second does not
            buffer = bytearray(length)
            count = read(file, offset, memoryview(buffer))
            assert count is not None
            assert bytes(buffer[:count]) == expected[offset : offset + length]


_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "X"]),
        "shape": st.lists(st.integers(0, 4), max_size=3),
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2),
    }
)


@given(header=st.dictionaries(st.text(max_size=3), _ENTRY, max_size=3), repair=st.booleans())
@settings(max_examples=500)
def test_a_header_is_accepted_exactly_if_the_reference_implementation_accepts_it(
    header: dict[str, dict[str, object]], repair: bool
) -> None:
    end = 0
    for entry in header.values():
        if repair and entry["dtype"] in DTYPE_BITS:
            bits = DTYPE_BITS[str(entry["dtype"])]
            for size in entry["shape"]:  # type: ignore[attr-defined]
                bits *= size
            entry["data_offsets"] = [end, end + bits // 8]
            end += bits // 8
        else:
            end = max(end, *entry["data_offsets"])  # type: ignore[misc]
    file = raw_shard(json.dumps(header).encode(), bytes(end))
    try:
        layout = parse_header(file[8:-end] if end else file[8:], Path("x"))
        ours = layout.data_size == end
    except InvalidSafetensors:
        ours = False
    try:
        reference_deserialize(file)
        theirs = True
    except SafetensorError:
        theirs = False
    assert ours == theirs


def test_the_comparison_with_the_reference_sees_both_answers() -> None:
    reference_deserialize(raw_shard(b"{}"))
    with pytest.raises(SafetensorError):
        reference_deserialize(raw_shard(b"{"))
