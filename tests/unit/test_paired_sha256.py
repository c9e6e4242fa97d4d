"""The paired sha256 equals hashlib's, however two hashes are fed."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcask import paired_sha256
from modelcask.paired_sha256 import Kernel, PairedSha256

# Longest that fits one final block, shortest that needs two, whole blocks, and their neighbours.
_BOUNDARIES = [0, 1, 54, 55, 56, 57, 63, 64, 65, 111, 118, 119, 120, 127, 128, 129, 4096, 4097]
_BYTES = random.Random(0).randbytes(1 << 16)


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found = paired_sha256.kernel()
    if found is None:
        pytest.skip("this CPU has no sha256 instructions")
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("length", _BOUNDARIES)
def test_every_length_around_the_padding_gives_hashlibs_digest(kernel: Kernel, length: int) -> None:
    for other in _BOUNDARIES:
        first, second = PairedSha256(kernel), PairedSha256(kernel)
        data, beside = bytearray(_BYTES[:length]), bytearray(_BYTES[-other:] if other else b"")
        first.update_with(memoryview(data), second, memoryview(beside))
        assert (first.hexdigest(), second.hexdigest()) == (_digest(data), _digest(beside))


_SPLITS = st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700), st.booleans()), max_size=20)


@given(headers=st.tuples(st.binary(max_size=200), st.binary(max_size=200)), steps=_SPLITS)
@settings(max_examples=300, deadline=None)
def test_any_mixture_of_single_and_paired_updates_gives_hashlibs_digests(
    kernel: Kernel, headers: tuple[bytes, bytes], steps: list[tuple[int, int, bool]]
) -> None:
    hashes = [PairedSha256(kernel, header) for header in headers]
    fed = [bytearray(header) for header in headers]
    for number, (length, other, paired) in enumerate(steps):
        pieces = [bytearray(_BYTES[number : number + length]), bytearray(_BYTES[-1 - number - other : -1 - number])]
        if paired:
            paired_sha256.update_both(hashes[0], memoryview(pieces[0]), hashes[1], memoryview(pieces[1]))
        else:
            for sha, piece in zip(hashes, pieces, strict=True):
                sha.update(memoryview(piece))
        for each, piece in zip(fed, pieces, strict=True):
            each += piece
        # A digest may be asked for on the way.
        assert [sha.hexdigest() for sha in hashes] == [_digest(each) for each in fed]


def test_hashes_of_hashlib_are_updated_beside_each_other_too(kernel: Kernel) -> None:
    plain, paired = paired_sha256.sha256(None, b"a"), paired_sha256.sha256(kernel, b"b")
    paired_sha256.update_both(plain, memoryview(b"some"), paired, memoryview(b"others"))
    assert (plain.hexdigest(), paired.hexdigest()) == (_digest(b"asome"), _digest(b"bothers"))
