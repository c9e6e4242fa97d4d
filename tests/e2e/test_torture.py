"""The short size of `tests/torture.py`; the ten minutes are run by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

import torture

pytestmark = [pytest.mark.fuse, pytest.mark.large]


@pytest.mark.usefixtures("fuse")
def test_64_readers_are_right_and_never_wait_while_models_come_and_go(tmp_path: Path) -> None:
    outcome = torture.run(tmp_path, seconds=25, readers=64)
    print(outcome)  # noqa: T201 - the figures are the point
    assert outcome.errors == []
    assert outcome.reads > 1000
    assert outcome.worst < 3  # 0.7 on a quiet machine; others may compute beside it
    assert {"imported", "replaced", "removed", "gc"} <= outcome.changes.keys()
    half = len(outcome.rss) // 2
    assert max(outcome.rss[half:]) < max(outcome.rss[:half]) * 1.2
