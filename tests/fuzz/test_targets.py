"""A small deterministic run of the fuzz targets: real files and mutations of them. `make fuzz` is the large one."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator

import pytest

from fuzz import targets

_INPUTS = 300


@pytest.fixture(scope="module", autouse=True)
def scratch() -> Iterator[None]:
    yield
    shutil.rmtree(targets._scratch())
    targets._scratch.cache_clear()
    targets._store.cache_clear()


@pytest.mark.parametrize("name", list(targets.TARGETS))
def test_any_input_ends_with_a_result_or_one_of_our_errors(name: str) -> None:
    target = targets.TARGETS[name]
    dice = random.Random(name)
    seeds = targets.seeds(name)
    for seed in seeds:
        targets.run(target, seed)
    for _ in range(_INPUTS):
        targets.run(target, _mutated(dice.choice(seeds), dice))
        targets.run(target, b"\x80" + dice.randbytes(60))


def test_a_run_sees_a_crash() -> None:
    def crashes(data: bytes) -> None:
        data[1000]

    with pytest.raises(IndexError):
        targets.run(crashes, b"")


def test_most_structures_get_beyond_the_syntax() -> None:
    """Else the fuzzer would only ever test the JSON parser."""
    dice, accepted = random.Random(1), 0
    for _ in range(200):
        try:
            targets.safetensors_header(b"\x80" + dice.randbytes(60))
            accepted += 1
        except targets.ModelcaskError:
            pass
    assert accepted > 20


def _mutated(seed: bytes, dice: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(data) + 1)
        kind = dice.randrange(4)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del data[at : at + dice.randrange(1, 20)]
        elif kind == 2:
            data[at:at] = dice.choice((b'"', b"[", b"{", b"}", b"\0", b"..", b"9" * 30, b"1e400", b"\\ud800", b"NaN"))
        else:
            data[at:at] = data[at : at + dice.randrange(1, 50)]
    return bytes(data)
