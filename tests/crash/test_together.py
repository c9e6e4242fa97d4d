"""All that can be done to a store, in any order, and by many processes at once."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from crash import promises, steps
from crash.promises import Operation
from folders import files_of, write_model
from modelcask import gc
from modelcask.digest import Digest
from modelcask.leases import Lease
from modelcask.manifests import Manifest
from modelcask.names import ModelName
from modelcask.store import Store
from running import CommandLine, import_folder

pytestmark = pytest.mark.torture

FOLDERS = ("one", "two")
KINDS = [(folder, quantize) for folder in FOLDERS for quantize in (None, "int4")]
NAMES = ("a", "b", "org/a", "a:tag")


class StoreMachine(RuleBasedStateMachine):
    """A store beside a dict of what must be in it."""

    folders: dict[str, Path]
    expected: dict[tuple[str, str | None], Manifest]
    opened = Bundle("opened")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=next(iter(self.folders.values())).parent))
        self.store = Store.create(self.root)
        self.models: dict[str, Manifest] = {}
        self.blobs: dict[Digest, int] = {}
        self.leases: list[tuple[Lease, set[Digest]]] = []

    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(KINDS))
    def import_model(self, name: str, kind: tuple[str, str | None]) -> None:
        (result,) = import_folder(self.store, self.folders[kind[0]], name=name, quantize=kind[1])
        manifest = self.expected[kind]
        assert result.manifest == Digest.of(manifest.encode())
        assert result.new_bytes == sum(size for blob, size in manifest.blobs().items() if blob not in self.blobs)
        self.models[name] = manifest
        self.blobs |= manifest.blobs()

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        promises.removing_from(self.store, name)
        self.models.pop(name, None)

    @rule()
    def collect(self) -> None:
        kept = self.reached().union(*(protected for _, protected in self.leases))
        garbage = {digest: size for digest, size in self.blobs.items() if digest not in kept}
        assert gc.find_garbage(self.store).blobs == garbage
        assert gc.collect(self.store).blobs == garbage
        self.blobs = {digest: size for digest, size in self.blobs.items() if digest in kept}

    @rule()
    def verify(self) -> None:
        found = promises.look_through(self.store)
        assert found.corrupt == ()
        assert {damage.digest for damage in found.missing} == self.reached() - self.blobs.keys()

    @rule(choice=st.randoms(use_true_random=False))
    def corrupt_and_verify(self, choice: random.Random) -> None:
        if not self.blobs:
            return
        victim = choice.choice(sorted(self.blobs))
        promises.flip_a_bit(self.store.blobs.path(victim))
        found = promises.look_through(self.store)
        assert [damage.digest for damage in found.corrupt] == [victim]
        del self.blobs[victim]

    @rule(kind=st.sampled_from(KINDS))
    def take_lease(self, kind: tuple[str, str | None]) -> None:
        protected = set(self.expected[kind].blobs())
        self.leases.append((Lease(self.store.leases, "test", protected), protected))

    @rule()
    def release_lease(self) -> None:
        if self.leases:
            self.leases.pop(0)[0].release()

    @rule(target=opened, choice=st.randoms(use_true_random=False))
    def open_blob(self, choice: random.Random) -> tuple[int, Digest] | None:
        if not self.blobs:
            return None
        digest = choice.choice(sorted(self.blobs))
        return self.store.blobs.open(digest, self.blobs[digest]), digest

    @rule(file=consumes(opened))
    def read_what_was_opened(self, file: tuple[int, Digest] | None) -> None:
        """Whatever became of the blob since."""
        if file is not None:
            with os.fdopen(file[0], "rb") as opened:
                assert Digest.of(opened.read()) == file[1]

    @rule()
    def open_the_store_again(self) -> None:
        if "index" in vars(self.store):
            self.store.index.close()
        self.store = Store.create(self.root)

    def reached(self) -> set[Digest]:
        return set().union(*(manifest.blobs() for manifest in self.models.values()))

    @invariant()
    def the_store_holds_what_the_dict_does(self) -> None:
        assert dict(self.store.blobs.enumerate()) == self.blobs
        stored = {str(name): self.store.manifests.read(name).manifest for name in self.store.manifests.names()}
        assert stored == {str(ModelName.parse(name)): manifest for name, manifest in self.models.items()}
        assert list((self.root / "tmp").iterdir()) == []

    def teardown(self) -> None:
        for lease, _ in self.leases:
            lease.release()
        if "index" in vars(self.store):
            self.store.index.close()
        shutil.rmtree(self.root)


def test_a_store_does_what_a_dict_would(memory: Path, torture: bool) -> None:
    folders = {name: write_model(memory / name, transformer=name) for name in FOLDERS}
    reference = Store.create(memory / "reference")
    expected = {}
    for folder, quantize in KINDS:
        (result,) = import_folder(reference, folders[folder], quantize=quantize)
        expected[folder, quantize] = reference.manifests.read(result.name).manifest
    reference.index.close()
    machine = type("Machine", (StoreMachine,), {"folders": folders, "expected": expected})
    size = settings(
        max_examples=400 if torture else 10,
        stateful_step_count=50 if torture else 25,
        deadline=None,
        derandomize=not torture,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=size)  # type: ignore[no-untyped-call]


def removed_directory(path: str) -> Callable[[steps.Step], None]:
    """As a concurrent `rm` does, remove the empty directory that is about to be used; once."""
    done = False

    def act(step: steps.Step) -> None:
        nonlocal done
        if not done and str(step.where).endswith(path):
            done = True
            Path(str(step.where)).parent.rmdir() if step.call == "mkdir" else Path(str(step.where)).rmdir()

    return act


def test_an_import_outlives_an_rm_that_removes_its_directory(memory: Path) -> None:
    root = memory / "store"
    with steps.Steps(removed_directory("library/m")).watching():
        promises.importing(write_model(memory / "m"))(root)
    promises.check_sound(root)
    assert list(promises.manifests_of(root)) == ["registry.ollama.ai/library/m/latest"]


def test_two_rms_of_the_last_two_tags_both_succeed(memory: Path) -> None:
    """The second removes the directory that the first is about to flush."""
    root = memory / "store"
    promises.importing(write_model(memory / "m"))(root)
    store = Store.open(root)
    with steps.Steps(removed_directory("library/m")).watching() as watched:
        store.manifests.remove(ModelName.parse("m"))
    assert promises.manifests_of(root) == {}
    assert [step.call for step in watched.taken if step.call in ("unlink", "fsync")] == ["unlink", "fsync"]


@pytest.mark.fuse
@pytest.mark.usefixtures("fuse")
def test_many_processes_at_once_disturb_nobody(cask: CommandLine, memory: Path, torture: bool) -> None:
    """Imports of the same and of others, rm, gc, verify and readers of the mount, each again and again."""
    folders = {name: write_model(memory / name, transformer=name) for name in ("kept", "one", "two")}
    contents = {name: files_of(folder) for name, folder in folders.items()}
    root = cask.store
    promises.importing(folders["kept"])(root)
    writers: list[list[Operation]] = [
        [promises.importing(folders["one"], name="x"), promises.importing(folders["two"], name="x")],
        [promises.importing(folders["one"], name="x"), promises.removing("x")],
        [promises.importing(folders["two"], quantize="int4"), promises.removing("two:int4")],
        [promises.importing(folders["kept"])],
        [promises.collecting],
        [promises.verifying_soundness],
    ]
    promises.importing(folders["two"], quantize="int4")(memory / "warm")
    deadline = time.monotonic() + (120 if torture else 2)
    with cask.mounted(memory / "mnt") as mounted:
        models = mounted / "diffusers/library"
        readers = [
            lambda _root: check_read(models / "kept/latest", [contents["kept"]], may_vanish=False),
            lambda _root: check_read(models / "x/latest", [contents["one"], contents["two"]], may_vanish=True),
        ]
        children = [
            steps.in_child(lambda each=each: counted(each, root, deadline, memory))  # type: ignore[misc]
            for each in [*writers, *([reader] for reader in readers)]
        ]
        statuses = [steps.ended(child) for child in children]
        assert statuses == [0] * len(children)
        assert files_of(models / "kept/latest") == contents["kept"]
    promises.check_sound(root)
    promises.check_nothing_left(root)
    promises.collecting(root)
    promises.check_sound(root)
    done = sum(path.stat().st_size for path in memory.glob("count-*"))
    print(f"{done} operations of {len(children)} processes")
    assert done > 50


def counted(operations: list[Operation], root: Path, deadline: float, memory: Path) -> None:
    signal.alarm(int(deadline - time.monotonic()) + 60)  # a deadlock fails
    with (memory / f"count-{os.getpid()}").open("wb", buffering=0) as count:
        while time.monotonic() < deadline:
            for operation in operations:
                operation(root)
                count.write(b".")


def check_read(shown: Path, contents: list[dict[str, bytes]], *, may_vanish: bool) -> None:
    for path in contents[0]:
        try:
            data = (shown / path).read_bytes()
        except OSError as error:
            if may_vanish and error.errno in (errno.ENOENT, errno.ESTALE):
                continue
            raise
        assert data in [content[path] for content in contents], f"{path} is neither model's"
