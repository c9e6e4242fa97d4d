"""Power cuts: whatever a disk may hold when the power goes, no model that was reported done is lost.

Every write and every flush of a real filesystem is recorded (`recorded_disk`). A cut leaves what was flushed, and of
what was written since any choice of sectors; the filesystem replays its journal, and the store must hold what its
users were told it holds.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from crash import disks, promises
from crash.promises import Operation
from crash.recorded_disk import FLUSH, MARK, WRITE, Record, read_log
from folders import tensor, write_component, write_model
from modelcask import durable
from modelcask.digest import Digest

pytestmark = [pytest.mark.torture, pytest.mark.fuse, pytest.mark.usefixtures("fuse")]

_SECTOR = 512
_BASE = "registry.ollama.ai/library"


@dataclass(frozen=True)
class Act:
    """Something done to the store, and the manifests, by path and digest or None, that stand when it is reported done."""

    name: str
    operation: Operation
    then: dict[str, str | None]


@dataclass(frozen=True)
class Cut:
    """A disk as a power cut may leave it.

    Attributes:
        before: the log's records until the last flush, all there.
        surviving: of the writes since then those, or parts of those, that are there.
        allowed: by path, the manifests of which one must stand.
    """

    at: int
    before: int
    surviving: tuple[tuple[int, bytes], ...]
    allowed: dict[str, tuple[str | None, ...]]


@pytest.fixture
def acts(memory: Path) -> list[Act]:
    """Imports, a replacing one, a quantized one, rm, gc, and an import of what gc took."""
    one = write_model(memory / "one", transformer="one")
    two = write_model(memory / "two", transformer="two", shards=2)
    for folder in (one, two):
        large = {"large.weight": tensor(folder.name, 200, 500), "other.weight": tensor("other", 100, 300)}
        write_component(folder / "text_encoder", [large], stem="model")
    importing = {
        "import one": promises.importing(one, name="one"),
        "import two": promises.importing(two, name="two"),
        "replace one": promises.importing(two, name="one"),
        "import quantized": promises.importing(two, name="q", quantize="int4"),
        "remove two": promises.removing("two"),
        "gc": promises.collecting,
        "import one again": promises.importing(one, name="one"),
        "gc again": promises.collecting,
    }
    made = []
    reference = memory / "reference"
    for name, operation in importing.items():
        before = digests(reference) if reference.exists() else {}
        operation(reference)
        after = digests(reference)
        changed = {path: after.get(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        made.append(Act(name, operation, changed))
    return made


def digests(root: Path) -> dict[str, str]:
    return {path: str(Digest.of(data)) for path, data in promises.manifests_of(root).items()}


def record(kind: str, acts: Sequence[Act], work: Path) -> tuple[Path, list[Record]]:
    """Do it all on a recorded disk: the disk as it was, and the log."""
    work.mkdir()
    image = work / "image"
    disks.make(kind, image)
    before = work / "before"
    shutil.copyfile(image, before)
    with disks.RecordedFilesystem(kind, work) as recorded:
        for number, act in enumerate(acts):
            recorded.mark(f"begin {number}")
            act.operation(recorded.folder / "store")
            recorded.mark(f"done {number}")
    return before, read_log(work / "log")


def cuts(log: list[Record], acts: Sequence[Act], count: int, chance: random.Random) -> Iterator[Cut]:
    """Cuts at `count` moments from the first act on, the ends of acts among them."""
    marks = [number for number, each in enumerate(log) if each.kind == MARK]
    ends = [number + 1 for number in marks]
    others = chance.sample(range(marks[0] + 1, len(log) + 1), min(count, len(log) - marks[0]))
    for number, at in enumerate(sorted([*ends, *others][:count] if count > len(ends) else others)):
        flushes = [index for index in range(at) if log[index].kind == FLUSH]
        before = flushes[-1] if flushes else 0
        pending = [(each.offset, each.data) for each in log[before:at] if each.kind == WRITE]
        yield Cut(at, before, _survivors(pending, number % 4, chance), _allowed(log[:at], acts))


def _survivors(pending: list[tuple[int, bytes]], way: int, chance: random.Random) -> tuple[tuple[int, bytes], ...]:
    """All of what was not flushed; nothing; some writes; some sectors."""
    if way == 0:
        return tuple(pending)
    if way == 1:
        return ()
    if way == 2:
        return tuple(each for each in pending if chance.random() < 0.5)
    sectors = [
        (offset + begin, data[begin : begin + _SECTOR])
        for offset, data in pending
        for begin in range(0, len(data), _SECTOR)
    ]
    return tuple(each for each in sectors if chance.random() < 0.7)


def _allowed(log: list[Record], acts: Sequence[Act]) -> dict[str, tuple[str | None, ...]]:
    allowed: dict[str, tuple[str | None, ...]] = {path: (None,) for act in acts for path in act.then}
    for each in log:
        if each.kind == MARK:
            kind, _, number = each.data.decode().partition(" ")
            for path, digest in acts[int(number)].then.items():
                allowed[path] = (*allowed[path], digest) if kind == "begin" else (digest,)
    return allowed


def states(before: Path, log: list[Record], wanted: Iterator[Cut], work: Path) -> Iterator[tuple[Cut, Path]]:
    """The disk's image for each cut, in order; each is overwritten by the next."""
    base, image = work / "base", work / "cut"
    shutil.copyfile(before, base)
    done = 0
    for cut in wanted:
        _write(base, ((each.offset, each.data) for each in log[done : cut.before] if each.kind == WRITE))
        done = max(done, cut.before)
        disks.run("cp", "--sparse=always", base, image)
        _write(image, iter(cut.surviving))
        yield cut, image


def _write(image: Path, writes: Iterator[tuple[int, bytes]]) -> None:
    fd = os.open(image, os.O_WRONLY)
    try:
        for offset, data in writes:
            os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def problems(kind: str, cut: Cut, image: Path, work: Path) -> list[str]:
    """What is wrong with the store after the cut."""
    with disks.image_mounted(kind, image, work / "after") as folder:
        root = folder / "store"
        found = digests(root) if root.exists() else {}
        wrong = [
            f"{path} is {found.get(path)}, not one of {allowed}"
            for path, allowed in cut.allowed.items()
            if found.get(path) not in allowed
        ]
        wrong += [f"{path} is visible" for path in found.keys() - cut.allowed.keys()]
        try:
            if root.exists():
                promises.check_blobs(root) if (root / "blobs").exists() else None
                promises.check_sound(root)
                promises.with_store(root, lambda store: (store.remove_abandoned_files(), store.index.drops()))
                promises.check_nothing_left(root)
        except AssertionError as error:
            wrong.append(repr(error))
        return wrong


@pytest.mark.parametrize("kind", list(disks.SIZES))
def test_after_a_power_cut_every_model_reported_done_is_there_and_nothing_half(
    kind: str, acts: list[Act], memory: Path, torture: bool
) -> None:
    disks.need(kind)
    work = memory / "work"
    before, log = record(kind, acts, work)
    wanted = cuts(log, acts, 400 if torture else 20, random.Random(kind))
    count = 0
    for cut, image in states(before, log, wanted, work):
        assert problems(kind, cut, image, work) == [], f"cut after record {cut.at}"
        count += 1
    written = sum(len(each.data) for each in log if each.kind == WRITE)
    flushes = sum(each.kind == FLUSH for each in log)
    print(f"{kind}: {count} cuts in {len(log)} records, {written} bytes, {flushes} flushes")  # noqa: T201
    assert count >= 20


@pytest.mark.parametrize("without", ["any flush", "the flush of blobs"])
def test_a_store_that_does_not_flush_is_caught(
    without: str, acts: list[Act], memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would find, were durable.py wrong."""
    disks.need("ext4")
    monkeypatch.setattr(durable, "sync_filesystem", lambda *_: None)
    monkeypatch.setattr(durable, "start_writeback", lambda _fd: None)
    if without == "any flush":
        monkeypatch.setattr(os, "fsync", lambda _fd: None)
    work = memory / "work"
    before, log = record("ext4", acts[:3], work)
    wanted = cuts(log, acts[:3], 30, random.Random(1))
    monkeypatch.undo()
    caught = [problems("ext4", cut, image, work) for cut, image in states(before, log, wanted, work)]
    assert any(caught)
