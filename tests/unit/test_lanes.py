"""Jobs side by side: all of them end, with the right digests, and an error ends what it should."""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from modelcask import lanes, paired_sha256
from modelcask.lanes import Hashing, ToHash
from modelcask.paired_sha256 import Kernel


def _hash(data: bytearray, piece: int, kernel: Kernel | None, into: list[str]) -> Hashing[None]:
    sha = paired_sha256.sha256(kernel, b"")
    for begin in range(0, len(data), piece):
        yield ToHash(sha, memoryview(data)[begin : begin + piece])
    into.append(sha.hexdigest())


def _run(jobs: list[Hashing[None]], threads: int) -> list[BaseException | None]:
    with ThreadPoolExecutor(threads) as pool:
        return [future.exception() for future in lanes.start(jobs, pool, threads)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("jobs", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("paired", [True, False])
def test_jobs_of_any_number_and_length_give_hashlibs_digests(jobs: int, threads: int, paired: bool) -> None:
    generator = random.Random(jobs)
    kernel = paired_sha256.kernel() if paired else None
    contents = [bytearray(generator.randbytes(generator.choice([0, 1, 100, 5000, 70_000]))) for _ in range(jobs)]
    digests: list[str] = []
    errors = _run([_hash(data, generator.choice([64, 1000, 4096]), kernel, digests) for data in contents], threads)
    assert errors == [None] * threads
    assert sorted(digests) == sorted(hashlib.sha256(data).hexdigest() for data in contents)


def test_short_jobs_run_one_after_the_other_beside_a_long_one() -> None:
    ended: list[str] = []

    def job(name: str, length: int) -> Hashing[None]:
        yield from _hash(bytearray(length), 1000, paired_sha256.kernel(), [])
        ended.append(name)

    assert _run([job("long", 100_000), *(job("short", 3000) for _ in range(20))], 1) == [None]
    assert ended == ["short"] * 20 + ["long"]


def test_an_error_ends_its_thread_and_closes_the_job_beside_it_while_others_go_on() -> None:
    closed: list[str] = []

    def failing() -> Hashing[None]:
        yield ToHash(hashlib.sha256(), memoryview(b"some"))
        raise ValueError("broken")

    def beside() -> Hashing[None]:
        try:
            yield ToHash(hashlib.sha256(), memoryview(bytes(1000)))
            yield ToHash(hashlib.sha256(), memoryview(bytes(1000)))
        finally:
            closed.append("beside")

    digests: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        (first,) = lanes.start([beside(), failing()], pool, 1)
        (second,) = lanes.start([_hash(bytearray(9), 4, None, digests)], pool, 1)
        assert str(first.exception()) == "broken"
        assert closed == ["beside"]
        second.result()
    assert digests == [hashlib.sha256(bytes(9)).hexdigest()]
