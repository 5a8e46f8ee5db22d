"""A fixture that takes minutes to make and that several test files use, and the order of tests."""

import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from aplsmear.compute.runtime import start_tensorflow
from aplsmear.files import hold
from clones import clone, commit, run
from small import make_small


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `dvc repro` has completed. A test that changes it must restore it.

    Whichever process of the suite asks first makes it, and each has a copy.
    """
    mine = tmp_path_factory.mktemp("small")
    made = (mine.parents[1] if "PYTEST_XDIST_WORKER" in os.environ else mine) / "made"
    with hold(made.with_suffix(".lock")):
        if not made.exists():
            folder = clone(mine / "making")
            make_small(folder)
            commit(folder)
            printed = run(folder, "dvc", "repro")
            (folder / ".dvc" / "tmp" / "printed").write_text(printed, encoding="utf-8")
            commit(folder)
            folder.rename(made)
    return Path(shutil.copytree(made, mine / "first", symlinks=True))


@pytest.fixture(scope="module")
def keras() -> ModuleType:
    """Keras, on a TensorFlow that has been started as the stages start it."""
    start_tensorflow()
    import keras

    return keras


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that no process runs one alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("pipeline") is None)
