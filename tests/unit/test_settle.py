import fcntl
import os
import shutil
from pathlib import Path

import pytest

from folders import write_model
from modelcask import settle


def missing(folder: Path) -> str | None:
    return settle.look(folder, namespace=None).missing


def test_a_complete_drop_has_a_plan_and_lacks_nothing(tmp_path: Path) -> None:
    look = settle.look(write_model(tmp_path / "m", shards=2), namespace="org")
    assert look.missing is None
    assert look.plan is not None
    assert str(look.plan.models[0].name) == "org/m:latest"


def test_a_copy_is_complete_at_its_last_byte_and_not_before(tmp_path: Path) -> None:
    """Every state a `cp -r` in any order passes through, in portions, is told as incomplete."""
    source = write_model(tmp_path / "source", shards=3)
    for order in (1, -1):
        target = tmp_path / f"target{order}"
        target.mkdir()
        paths = sorted((path for path in source.rglob("*") if path.is_file()), reverse=order < 0)
        needed = {p for p in paths if p.name not in ("README.md", "merges.txt")}
        for path in paths:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            for end in (0, len(data) // 2, len(data)):
                place.write_bytes(data[:end])
                arrived = {source / p.relative_to(target) for p in target.rglob("*") if p.is_file()}
                whole = all(
                    (target / p.relative_to(source)).stat().st_size == p.stat().st_size for p in needed & arrived
                )
                if not (needed <= arrived and whole):
                    assert missing(target) is not None, (order, place, end)
        assert missing(target) is None


@pytest.mark.parametrize("name", ["x.incomplete", "vae/y.part", "z.crdownload", "t.tmp", "a.aria2", "p.partial"])
def test_a_partial_download_is_waited_for(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "m")
    (folder / name).touch()
    assert missing(folder) == f"{folder / name}: a download is under way"


@pytest.mark.parametrize("name", ["vae.lock", "abc.incomplete"])
def test_a_hub_download_under_way_is_waited_for(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "m")
    downloads = folder / ".cache/huggingface/download"
    downloads.mkdir(parents=True)
    (downloads / "model_index.json.metadata").touch()
    assert missing(folder) is None
    with (downloads / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert missing(folder) == f"{downloads / name}: a download is under way"
    # The hub's client leaves its lock files behind; what it did not complete is another matter.
    assert (missing(folder) is None) == name.endswith(".lock")


def test_odd_things_among_the_hubs_locks_neither_fail_nor_hang(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    downloads = folder / ".cache/huggingface/download"
    (downloads / "x.lock").mkdir(parents=True)
    os.mkfifo(downloads / "y.lock")
    assert missing(folder) is None


def test_the_fingerprint_changes_with_any_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    fingerprints = {settle.look(folder, namespace=None).fingerprint}
    assert fingerprints == {settle.look(folder, namespace=None).fingerprint}
    readme = folder / "README.md"
    for change in (
        lambda: readme.write_text("other"),
        lambda: os.utime(readme, ns=(1, 1)),
        lambda: readme.rename(folder / "READYOU.md"),
        lambda: shutil.copy(folder / "model_index.json", folder / "copy.json"),
        lambda: (folder / "x.bin").touch(),
    ):
        change()
        fingerprints.add(settle.look(folder, namespace=None).fingerprint)
    assert len(fingerprints) == 6
