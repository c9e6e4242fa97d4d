"""Jobs that hash much, run on several threads, two side by side on each.

A job is a generator. It does its work itself, but for hashing: it yields a hash with the bytes to be added to
it, and goes on when they are. So a thread can hash for two jobs in one loop (`paired_sha256`), piece by piece
as far as both want something, while each job reads as if it were alone. When one ends, its lane takes the
next from the queue.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

from modelcask.paired_sha256 import Sha256, update_both

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ToHash:
    """A wish: `data`, which stays as it is meanwhile, is to be added to `sha`."""

    sha: Sha256
    data: memoryview

    def rest(self, done: int) -> ToHash | None:
        return ToHash(self.sha, self.data[done:]) if done < len(self.data) else None


Hashing = Generator[ToHash, None, _Result]
"""A job, or a part of one, that hashes on its way to a result."""


def start(jobs: list[Hashing[None]], executor: Executor, threads: int) -> list[Future[None]]:
    """Run all jobs on so many threads of `executor`.

    A job's error ends its thread, whose future has it, and the job beside it, which is closed; the other threads
    go on.
    """
    queue: SimpleQueue[Hashing[None] | None] = SimpleQueue()
    for job in jobs:
        queue.put(job)
    for _ in range(2 * threads):
        queue.put(None)
    return [executor.submit(_run, queue) for _ in range(threads)]


def _run(queue: SimpleQueue[Hashing[None] | None]) -> None:
    with closing(_lane(queue)) as first, closing(_lane(queue)) as second:
        one, other = next(first, None), next(second, None)
        while one and other:
            common = min(len(one.data), len(other.data))
            update_both(one.sha, one.data[:common], other.sha, other.data[:common])
            one = one.rest(common) or next(first, None)
            other = other.rest(common) or next(second, None)
        for wish, lane in ((one, first), (other, second)):
            while wish:
                wish.sha.update(wish.data)
                wish = next(lane, None)


def _lane(queue: SimpleQueue[Hashing[None] | None]) -> Hashing[None]:
    for job in iter(queue.get, None):
        yield from job
