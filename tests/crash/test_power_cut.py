"""Power cuts: whatever a disk may hold when the power goes, no model that was reported done is lost.

Every write and every flush of a real filesystem is recorded (`recorded_disk`). A cut leaves what was flushed, and of
what was written since any choice of sectors; the filesystem replays its journal, and the store must hold what its
users were told it holds.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from crash import disks, promises, steps
from crash.promises import Operation
from crash.recorded_disk import FLUSH, MARK, WRITE, Record, read_log
from folders import tensor, write_component, write_model
from modelcask import durable
from modelcask.digest import Digest

pytestmark = [pytest.mark.torture, pytest.mark.fuse, pytest.mark.usefixtures("fuse")]

# What a disk writes whole or not at all; XFS counts on it for a block of metadata.
_SECTOR = 4096
# What may be there of what was written and not flushed.
WAYS = ("all", "none", "some writes", "some sectors")


@dataclass(frozen=True)
class Act:
    """Something done to the store.

    Attributes:
        then: the manifests it changes, by path, and their digest afterwards, or None.
        is_reported: whether it comes to its end; if not, both what was and what will be may stand.
    """

    operation: Operation
    then: dict[str, str | None]
    is_reported: bool = True


@dataclass(frozen=True)
class Cut:
    """A disk as a power cut may leave it.

    Attributes:
        at, way: after how many records of the log, and what is there of what was not flushed.
        before: the log's records until the last flush, all there.
        surviving: of the writes since then those, or parts of those, that are there.
        allowed: by path, the manifests of which one must stand.
    """

    at: int
    way: str
    before: int
    surviving: tuple[tuple[int, bytes], ...]
    allowed: dict[str, tuple[str | None, ...]]


@pytest.fixture
def acts(memory: Path) -> list[Act]:
    """Imports, a replacing one, a quantized one, rm, gc, imports of what gc took, and one that is killed."""
    one = write_model(memory / "one", transformer="one")
    two = write_model(memory / "two", transformer="two", shards=2)
    for folder in (one, two):
        large = {"large.weight": tensor(folder.name, 200, 500), "other.weight": tensor("other", 100, 300)}
        write_component(folder / "text_encoder", [large], stem="model")
    replace = promises.importing(one, name="two")
    operations = [
        promises.importing(one, name="one"),
        promises.importing(two, name="two"),
        promises.importing(two, name="one"),
        promises.importing(two, name="q", quantize="int4"),
        promises.removing("one"),
        promises.removing("q"),
        promises.collecting,
        promises.importing(one, name="three"),
        promises.removing("three"),
        promises.collecting,
        # gc takes what the replaced manifest alone needed, and an import flushes that, before anyone flushes the new.
        lambda root: steps.run_killed(lambda: replace(root), steps.kill_after_commit()),
        promises.collecting,
        promises.importing(one, name="four"),
    ]
    made = []
    reference = memory / "reference"
    for number, operation in enumerate(operations):
        before = digests(reference) if reference.exists() else {}
        operation(reference)
        after = digests(reference)
        changed = {
            path: after.get(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path)
        }
        made.append(Act(operation, changed, is_reported=number != 10))
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
            if act.is_reported:
                recorded.mark(f"done {number}")
    return before, read_log(work / "log")


def cuts(log: list[Record], acts: Sequence[Act], *, count: int | None) -> Iterator[Cut]:
    """Cuts at every moment from the first act on, in every way; or `count` of them, the ends of acts among these."""
    chance = random.Random(count)
    first = next(number for number, each in enumerate(log) if each.kind == MARK)
    moments: list[tuple[int, str]] = []
    before = {}
    for at in range(len(log) + 1):
        before[at] = at if at and log[at - 1].kind == FLUSH else before.get(at - 1, 0)
        if at > first:
            is_pending = any(each.kind == WRITE for each in log[before[at] : at])
            moments += [(at, way) for way in (WAYS if is_pending else WAYS[:1])]
    if count is not None:
        ends = [moment for moment in moments if log[moment[0] - 1].kind == MARK]
        others = [moment for moment in moments if log[moment[0] - 1].kind != MARK]
        some = min(len(ends), count // 2)
        moments = sorted([*chance.sample(ends, some), *chance.sample(others, min(len(others), count - some))])
    for at, way in moments:
        pending = [(each.offset, each.data) for each in log[before[at] : at] if each.kind == WRITE]
        yield Cut(at, way, before[at], _survivors(pending, way, chance), _allowed(log[:at], acts))


def _survivors(pending: list[tuple[int, bytes]], way: str, chance: random.Random) -> tuple[tuple[int, bytes], ...]:
    if way == "all":
        return tuple(pending)
    if way == "none":
        return ()
    if way == "some writes":
        return tuple(each for each in pending if chance.random() < 0.5)
    sectors = [
        (max(offset, begin), data[max(0, begin - offset) : begin + _SECTOR - offset])
        for offset, data in pending
        for begin in range(offset // _SECTOR * _SECTOR, offset + len(data), _SECTOR)
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
    """The disk's image for each cut, in order; it is gone when the next is asked for."""
    base = work / "base"
    shutil.copyfile(before, base)
    done = 0
    for cut in wanted:
        _write(base, ((each.offset, each.data) for each in log[done : cut.before] if each.kind == WRITE))
        done = max(done, cut.before)
        # A file of its own: a loop device may live on a little when it is detached.
        image = work / f"cut-{cut.at}-{cut.way}"
        disks.run("cp", "--sparse=always", base, image)
        _write(image, iter(cut.surviving))
        yield cut, image
        image.unlink()


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
    wanted = cuts(log, acts, count=None if torture else 20)
    count = 0
    for cut, image in states(before, log, wanted, work):
        assert problems(kind, cut, image, work) == [], (
            f"cut after record {cut.at}, {cut.way} of what was not flushed is there"
        )
        count += 1
    written = sum(len(each.data) for each in log if each.kind == WRITE)
    flushes = sum(each.kind == FLUSH for each in log)
    print(f"{kind}: {count} cuts in {len(log)} records, {written} bytes, {flushes} flushes")
    assert count >= 20


@pytest.mark.parametrize("without", ["any flush", "the flush of blobs"])
def test_a_store_that_does_not_flush_is_caught(
    without: str, acts: list[Act], memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would find, were durable.py wrong."""
    disks.need("ext4")
    monkeypatch.setattr(durable.Filesystem, "flush", lambda _self: None)
    monkeypatch.setattr(durable, "start_writeback", lambda _fd: None)
    if without == "any flush":
        monkeypatch.setattr(os, "fsync", lambda _fd: None)
    work = memory / "work"
    before, log = record("ext4", acts[:3], work)
    wanted = cuts(log, acts[:3], count=16)
    monkeypatch.undo()
    caught = [problems("ext4", cut, image, work) for cut, image in states(before, log, wanted, work)]
    assert any(caught)
