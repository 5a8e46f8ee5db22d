"""The short form of `make faults`: a few kills of `dvc repro` and of `aplsmear predict`."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from kills import Place, forget, kill, timed

pytestmark = pytest.mark.pipeline

STAGES = {"augment": 2.5, "ensemble_apl_aml": 2.5}  # seconds from the start within which it is killed
REPRO = ("dvc", "repro")
PREDICT = ("aplsmear", "predict", "--ensemble", "ensembles/apl_aml", "--data", "data", "--out")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLite and Optuna
def test_after_a_kill_the_same_command_ends_as_if_nothing_had_happened(small: Path, tmp_path: Path) -> None:
    clone = tmp_path / "aplsmear"  # a copy: a killed DVC leaves its lock, which other tests would meet
    shutil.copytree(small, clone, symlinks=True)
    place = Place(clone, tmp_path / "outside")
    before = place.files()
    random = np.random.Generator(np.random.Philox(7))
    for stage, seconds in STAGES.items():
        forget(place, stage)
        running = False
        while not running:
            running, printed = kill(
                place, REPRO, float(random.uniform(0, seconds)), f"Running stage '{stage}'"
            )
            assert f"Running stage '{stage}'" in printed, printed
            if not running:
                forget(place, stage)
        code, printed = place.code(*REPRO)
        assert not code, printed
        assert place.files() == before, printed
        assert not place.leftovers()
        assert not place.unreadable()
    whole, new = tmp_path / "whole.csv", tmp_path / "new.csv"
    seconds = timed(place, *PREDICT, str(whole))[""]
    assert kill(place, (*PREDICT, str(new)), seconds / 2)[0]
    assert not new.exists()
    place.run(*PREDICT, str(new))
    assert new.read_bytes() == whole.read_bytes()
    assert new.read_text().count("\n") > 10
    assert place.files() == before
