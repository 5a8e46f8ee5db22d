"""What several test files use that is dear to make."""

from pathlib import Path

import pytest

from clones import clone, commit, run
from small import make_small


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `dvc repro` has run to the end; tests that change it put it back.

    Tests that ask for it belong to the xdist group `pipeline`, so that one process makes it once.
    """
    folder = clone(tmp_path_factory.mktemp("small") / "first")
    make_small(folder)
    commit(folder)
    run(folder, "dvc", "repro")
    commit(folder)
    return folder
