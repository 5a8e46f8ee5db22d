"""The committed dvc.lock is that of the committed code, data and parameters, to the byte."""

from pathlib import Path

import pytest

from clones import clone, run, stages_run

pytestmark = pytest.mark.pipeline


def test_a_fresh_clone_leaves_the_committed_lock_as_it_was(tmp_path: Path) -> None:
    folder = clone(tmp_path / "fresh")
    ran = stages_run(run(folder, "dvc", "repro", "tune@auer_rod"))
    assert {"download", "split", "augment", "tune@auer_rod"} <= set(ran)
    assert run(folder, "git", "status", "--porcelain") == "", (
        "dvc.lock is stale: run `dvc repro` and commit it"
    )
