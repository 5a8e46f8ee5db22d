"""The whole pipeline on a data set in which each cell is a picture of its own."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from clones import clone, commit, run, stages_run
from crops import cut_out
from small import make_small

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the small pipeline on the cells of its smears, under pseudonyms, without tasks of smears."""
    folder = clone(tmp_path_factory.mktemp("crops") / "clone")
    make_small(folder)
    cut_out(folder / "demo", folder / "crops")
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    params["dataset"] |= {"root": "crops", "pseudonymise": True}
    (folder / ".pseudonym-key").write_text("a key for this test", encoding="utf-8")
    for name in [name for name, task in params["tasks"].items() if task["level"] == "smear"]:
        del params["tasks"][name], params["overrides"][name]
        for ensemble in params["ensembles"].values():
            ensemble["members"] = [member for member in ensemble["members"] if member != name]
    params["external"] = {"again": {"ensemble": "apl_healthy", "root": "others"}}
    (folder / "others").mkdir()
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    commit(folder)
    return folder


def test_it_runs_whole_and_judges_its_own_patients_as_before(place: Path) -> None:
    shutil.copytree(place / "demo", place / "drawn")
    run(place, "aplsmear", "demo-data", "drawn_others", "--patients", "6", "--seed", "9")
    shutil.rmtree(place / "others")
    cut_out(place / "drawn_others", place / "others")
    printed = run(place, "dvc", "repro", "ensemble_apl_healthy", "evaluate@again", "finetune")
    assert {"download", "split", "augment", "ensemble_apl_healthy", "evaluate@again", "finetune"} <= set(
        stages_run(printed)
    )
    assert len(pd.read_csv(place / "dataset" / "smears.csv")) == 0
    assert len(pd.read_csv(place / "features" / "smear" / "mobilenet" / "index.csv")) == 0
    card = (place / "ensembles" / "apl_healthy" / "model_card.md").read_text(encoding="utf-8")
    assert "P001" not in card
    judged = pd.read_csv(place / "ensembles" / "apl_healthy" / "predictions.csv").set_index("patient")
    out = place / "again.csv"
    options = ["--ensemble", "ensembles/apl_healthy", "--data", "crops", "--fold", "0"]
    run(place, "aplsmear", "predict", *options, "--out", str(out), "--report", "again.html")
    again = pd.read_csv(out)
    held_out = judged[judged["fold"] == 0]["probability"].to_numpy()
    apart = np.abs(held_out[:, None] - again["probability"].to_numpy())  # names differ: pseudonyms
    assert (apart.min(axis=1) < 1e-5).all()
    assert (again["smears"] == 0).all()
    assert (again["distance"] > 0).all()
    evaluated = pd.read_csv(place / "evaluated" / "again" / "predictions.csv")
    assert len(evaluated) == 4
