"""The committed dvc.lock is that of the committed code, data and parameters, to the byte."""

import re
from pathlib import Path

import pytest

from clones import clone, run, stages_run

pytestmark = pytest.mark.pipeline


def test_a_fresh_clone_leaves_the_committed_lock_as_it_was(tmp_path: Path) -> None:
    folder = clone(tmp_path / "fresh")
    ran = stages_run(run(folder, "dvc", "repro", "bottleneck@mobilenet"))
    assert {"download", "augment", "bottleneck@mobilenet"} <= set(ran)
    stale = "dvc.lock is stale: run `dvc repro` and commit it"
    assert run(folder, "git", "status", "--porcelain") == "", stale
    # Of later stages, what they depend on; only one backbone's features are there.
    changed = set(re.findall(r"(?:modified|new): +(\S+)", run(folder, "dvc", "status")))
    assert {path for path in changed if not path.startswith(("features", "backbones"))} == set(), stale
