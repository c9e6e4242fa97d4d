"""Processes that are killed at every step of what they write, and at any moment."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from crash import promises, steps
from crash.promises import Manifests, Operation
from folders import write_model
from modelcask.names import ModelName
from modelcask.store import Store

pytestmark = pytest.mark.torture

SCENARIOS = ("first import", "re-import", "replacing", "quantized", "variants", "rm", "gc", "verify")


@dataclass(frozen=True)
class Scenario:
    """An operation on a store that lies ready, and what the manifests are before and after.

    Attributes:
        blobs: the blobs there are after the operation and a gc.
        wrong: a blob that is corrupt before, if any.
    """

    operation: Operation
    ready: Path
    before: Manifests
    after: Manifests
    blobs: set[str]
    steps: int
    wrong: frozenset[str] = frozenset()


@pytest.fixture
def folders(memory: Path) -> dict[str, Path]:
    return {
        "one": write_model(memory / "one", transformer="one"),
        "two": write_model(memory / "two", transformer="two", shards=2),
        "variants": write_model(memory / "variants", transformer="two", variants=["fp16"]),
    }


def operation_of(name: str, folders: dict[str, Path]) -> Operation:
    return {
        "first import": promises.importing(folders["two"]),
        "re-import": promises.importing(folders["one"]),
        "replacing": promises.importing(folders["two"], name="one"),
        "quantized": promises.importing(folders["two"], quantize="int4"),
        "variants": promises.importing(folders["variants"]),
        "rm": promises.removing("one"),
        "gc": promises.collecting,
        "verify": promises.verifying,
    }[name]


@pytest.fixture
def scenario(request: pytest.FixtureRequest, memory: Path, folders: dict[str, Path]) -> Scenario:
    ready, wrong = memory / "ready", frozenset[str]()
    if request.param == "gc":
        promises.importing(folders["two"])(ready)
        promises.removing("two")(ready)
    if request.param != "first import":
        promises.importing(folders["one"])(ready)
    if request.param == "verify":
        wrong = frozenset([corrupt(ready, "vae/decoder.weight")])
    operation = operation_of(request.param, folders)
    operation(memory / "warm") if request.param == "quantized" else None  # loads and compiles the kernels
    done = memory / "done"
    if ready.exists():
        promises.copy_store(ready, done)
    taken = steps.count(lambda: operation(done))
    before = promises.manifests_of(ready) if ready.exists() else {}
    after = promises.manifests_of(done)
    promises.collecting(done)
    return Scenario(operation, ready, before, after, promises.blob_names(done), taken, wrong)


def corrupt(root: Path, layer: str) -> str:
    """Flip a bit of a layer's blob; the blob's name."""
    store = Store.open(root)
    manifest = store.manifests.read(ModelName.parse("one")).manifest
    path = next(store.blobs.path(each.digest) for each in manifest.layers if each.name == layer)
    promises.flip_a_bit(path)
    return path.name


def chosen(count: int, *, torture: bool, at_most: int) -> Iterator[int]:
    """Steps from 1 to `count` + 1, which nobody reaches: all of them, or `at_most` spread over them."""
    if torture or count < at_most:
        yield from range(1, count + 2)
    else:
        yield from sorted({1 + round(number * count / (at_most - 1)) for number in range(at_most)})


@pytest.mark.parametrize("scenario", SCENARIOS, indirect=True)
def test_killed_before_any_step_nothing_is_lost_and_the_next_run_finishes(
    scenario: Scenario, memory: Path, torture: bool
) -> None:
    killed = 0
    for number in chosen(scenario.steps, torture=torture, at_most=10):
        for torn in (False, True) if torture else (number % 2 == 0,):
            root = memory / f"store-{number}-{torn}"
            if scenario.ready.exists():
                promises.copy_store(scenario.ready, root)
            killed += steps.run_killed(lambda root=root: scenario.operation(root), steps.kill_at(number, torn=torn))  # type: ignore[misc]
            check_killed(scenario, root)
    assert killed >= min(scenario.steps, 8)
    print(f"{killed} kills in {scenario.steps} steps")


def check_killed(scenario: Scenario, root: Path) -> None:
    wrong = scenario.wrong
    if root.exists():
        Store.open(root)
    if (root / "blobs").exists():
        promises.check_blobs(root, wrong=wrong)
    if (root / "manifests").exists():
        promises.check_manifests(root, scenario.before, scenario.after)
    if not wrong and (root / "blobs").exists():
        promises.check_sound(root)
    scenario.operation(root)
    assert promises.manifests_of(root) == scenario.after
    promises.collecting(root)
    promises.check_nothing_left(root)
    promises.check_blobs(root)
    assert promises.blob_names(root) == scenario.blobs
    assert {path.name for path in (root / "quarantine").iterdir()} == wrong


@pytest.mark.parametrize("scenario", ["first import", "re-import", "replacing", "quantized"], indirect=True)
def test_an_import_cleans_up_what_a_killed_one_left(scenario: Scenario, memory: Path) -> None:
    root = memory / "store"
    if scenario.ready.exists():
        promises.copy_store(scenario.ready, root)
    assert steps.run_killed(lambda: scenario.operation(root), steps.kill_at(scenario.steps // 2))
    assert list((root / "tmp").iterdir()) != []
    scenario.operation(root)
    promises.check_nothing_left(root)


@pytest.mark.parametrize("next_run", ["verify", "import"])
@pytest.mark.parametrize("scenario", ["verify"], indirect=True)
def test_mounts_hear_of_a_quarantined_blob_though_its_verify_was_killed(
    scenario: Scenario, next_run: str, memory: Path, folders: dict[str, Path]
) -> None:
    """Else the kernel shows for ever what it has read of the damaged blob."""
    following = {"verify": scenario.operation, "import": promises.importing(folders["one"])}[next_run]
    (wrong,) = scenario.wrong
    for number in range(1, scenario.steps + 2):
        root = memory / f"store-{number}"
        promises.copy_store(scenario.ready, root)
        name = ModelName.parse("one")
        before = Store.open(root).manifests.read(name).version
        steps.run_killed(lambda root=root: scenario.operation(root), steps.kill_at(number))  # type: ignore[misc]
        is_quarantined = not (root / "blobs" / wrong).exists()
        following(root)
        renewed = Store.open(root).manifests.read(name).version != before
        assert renewed or not (is_quarantined or next_run == "verify"), f"killed before step {number}"
    assert is_quarantined


def test_killed_at_any_moment_under_load_nothing_is_lost(memory: Path, folders: dict[str, Path], torture: bool) -> None:
    root, kills = memory / "store", 500 if torture else 25
    one, two = promises.importing(folders["one"], name="x"), promises.importing(folders["two"], name="x")
    victims = [
        [promises.importing(folders["two"]), promises.removing("two"), promises.collecting],
        [one, two],
        [promises.verifying],
    ]
    load = [
        [promises.importing(folders["variants"]), promises.removing("variants:fp16"), promises.collecting],
        [promises.importing(folders["one"]), two, promises.removing("one")],
    ]
    promises.importing(folders["one"], name="kept")(root)
    kept = promises.manifests_of(root)
    chance = random.Random(1)
    workers = [steps.in_child(lambda operations=operations: repeat(operations, root)) for operations in load]  # type: ignore[misc]
    try:
        for _ in range(kills):
            operations = chance.choice(victims)
            victim = steps.in_child(lambda operations=operations: repeat(operations, root))  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.05))
            os.kill(victim, signal.SIGKILL)
            assert steps.ended(victim) == -signal.SIGKILL
            promises.check_blobs(root)
            assert kept.items() <= promises.manifests_of(root).items()
            promises.check_sound(root)
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
            status = steps.ended(worker)
    assert status == -signal.SIGKILL, "what went on beside the kills failed"
    for operations in victims:
        for operation in operations:
            operation(root)
    promises.collecting(root)
    promises.check_nothing_left(root)
    promises.check_sound(root)


def repeat(operations: list[Operation], root: Path) -> None:
    while True:
        for operation in operations:
            operation(root)
