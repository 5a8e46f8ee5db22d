"""The stage `tune` itself: the same bytes of all outs, killed or not, alone or with a helper."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from aplsmear.features.store import write_features
from aplsmear.tables import write_table
from studies import FOLDS, ROOT, task_data

pytestmark = pytest.mark.pipeline
LAYERS = ["conv_pw_1_relu", "conv_pw_2_relu"]  # in whose place features stand that are made up


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of one task, small enough to be made up."""
    made = task_data(patients=16, per_patient=6)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["tasks"] = {"blast": params["tasks"]["blast"]}
    params["overrides"] = {"blast": {}}
    params["ensembles"] = {
        "apl_aml": params["ensembles"]["apl_aml"] | {"members": ["blast"], "weigh_by": "blast"}
    }
    params |= {
        "task": "blast",
        "backbones": {"net": params["backbones"]["mobilenet"] | {"layer": LAYERS}},
    }
    params["split"]["folds"] = FOLDS
    params["tune"] |= {"trials": 8}
    params["combine"]["shares"] = ["blast"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    kinds = np.where(made.label == 1, "Myeloblast", "Promyelocyte")
    cells = made.table.drop(columns="fold").rename(columns={"item": "cell"})
    columns = {
        "cell_type": kinds,
        "special_characteristics": "",
        "object_type": "",
        "diagnosis": "apl",
        "fab": "m3",
    }
    write_table(tmp_path / "dataset" / "cells.csv", cells.assign(**columns))
    write_table(tmp_path / "dataset" / "smears.csv", cells.drop_duplicates("patient"))
    write_table(tmp_path / "splits" / "folds.csv", made.table[["patient", "fold"]].drop_duplicates())
    index = next(iter(made.features.values())).index
    values = [each.values for each in made.features.values()]
    write_features(tmp_path / "features" / "cell" / "net", index, LAYERS, [values])
    return tmp_path


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", str(ROOT / "stages" / "tune.py"), "blast", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def outs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "tuned" / "blast").iterdir())}


def finished(folder: Path) -> int:
    return sum(path.read_bytes().count(b"datetime_complete") for path in folder.glob(".studies/*.journal"))


def test_killed_or_helped_the_stage_writes_the_same_bytes(folder: Path) -> None:
    assert start(folder).wait(240) == 0, (folder / "log").read_text()
    peaceful = outs(folder)
    assert {
        "best.yaml",
        "heads.npz",
        "metrics.json",
        "predictions.csv",
        "scores.parquet",
        "trials.csv",
    } <= set(peaceful)
    for path in [*folder.glob("tuned/blast/*"), *folder.glob(".studies/*")]:
        path.unlink()

    killed, helper = start(folder), start(folder, "--worker")
    while finished(folder) < 1:
        assert killed.poll() is None, (folder / "log").read_text()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    assert helper.wait(240) == 0, (folder / "log").read_text()
    assert not outs(folder)
    assert start(folder).wait(240) == 0, (folder / "log").read_text()
    assert outs(folder) == peaceful
