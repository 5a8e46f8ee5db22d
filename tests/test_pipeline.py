"""The pipeline itself, through dvc, in fresh clones."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from aplsmear.demo import draw_data_set
from clones import run, stages_run

# One clone serves all tests of this group (`small`, of conftest.py), so they run in one process.
pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]

MEMBERS = {
    "apl_healthy": ["blast", "apl_healthy_cell", "apl_healthy_smear"],
    "apl_aml": ["blast", "apl_aml_smear"],
}
TASKS = sorted({task for members in MEMBERS.values() for task in members})


def make_small(folder: Path) -> None:
    """A tiny data set, one backbone, few short trials; every stage still does all of its work."""
    shutil.rmtree(folder / "demo")
    draw_data_set(folder / "demo", 18, 3, size=(240, 320), cells_per_smear=8)
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    params["split"]["folds"] = 3
    params["augment"] |= {"size": {"cell": 32, "smear": 64}, "views": 1}
    params["backbones"] = {
        "mobilenet": params["backbones"]["mobilenet"] | {"input_size": {"cell": 32, "smear": 64}}
    }
    params["tune"] |= {"trials": 2, "generation": 2}
    params["tune"]["space"]["epochs"] = [2]
    params["tasks"] = {task: params["tasks"][task] for task in TASKS}
    params["overrides"] = {task: {"trials": 2} for task in TASKS}
    params["task"] = "blast"
    for name, members in MEMBERS.items():
        params["ensembles"][name]["members"] = members
    params["combine"] |= {"trials": 3, "resamples": 100, "refits": 20}
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    (folder / "dvc.lock").unlink()


def test_every_patient_gets_one_verdict_with_its_uncertainty(small: Path) -> None:
    folds = pd.read_csv(small / "splits" / "folds.csv", dtype={"patient": str})
    for name, (positive, negative) in {"apl_healthy": ("apl", "healthy"), "apl_aml": ("apl", "aml")}.items():
        table = pd.read_csv(small / "ensembles" / name / "predictions.csv", dtype={"patient": str})
        asked = folds[folds["diagnosis"].isin([positive, negative])]
        assert sorted(table["patient"]) == sorted(asked["patient"])
        assert (table["low"] <= table["probability"]).all()
        assert (table["probability"] <= table["high"]).all()
        metrics = json.loads((small / "ensembles" / name / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["n_patients"] == len(table)
        assert metrics["auroc"]["low"] <= metrics["auroc"]["value"] <= metrics["auroc"]["high"]


def test_a_second_clone_in_another_folder_gives_the_same_lock(small: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "--quiet", str(small), "another name")
    other = tmp_path / "another name"
    printed = run(other, "dvc", "repro", env={"ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell"})
    assert set(stages_run(printed)) == {
        *("download", "split", "augment", "bottleneck@mobilenet"),
        *(f"tune@{task}" for task in TASKS),
        *(f"member_{name}@{task}" for name, members in MEMBERS.items() for task in members),
        *(f"ensemble_{name}" for name in MEMBERS),
        "kaggle",
    } - {"member_apl_aml@blast"}  # the same bytes as member_apl_healthy@blast, so dvc has it in its cache
    assert run(other, "git", "status", "--porcelain") == ""
    assert (other / "dvc.lock").read_bytes() == (small / "dvc.lock").read_bytes()


def test_an_unchanged_pipeline_runs_nothing(small: Path) -> None:
    printed = run(small, "dvc", "repro")
    assert stages_run(printed) == []
    assert "up to date" in printed


def test_one_tasks_tuning_parameter_reruns_that_task_and_its_ensemble_alone(small: Path) -> None:
    params = (small / "params.yaml").read_text(encoding="utf-8")
    changed = yaml.safe_load(params)
    changed["overrides"]["apl_aml_smear"]["trials"] = 3
    (small / "params.yaml").write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
    printed = run(small, "dvc", "repro")
    assert set(stages_run(printed)) == {
        "tune@apl_aml_smear",
        "member_apl_aml@apl_aml_smear",
        "ensemble_apl_aml",
    }
    (small / "params.yaml").write_text(params, encoding="utf-8")
    run(small, "dvc", "repro")
    assert run(small, "git", "status", "--porcelain") == ""


def test_metrics_and_plots_are_there_to_look_at(small: Path) -> None:
    shown = json.loads(run(small, "dvc", "metrics", "show", "--json"))
    assert shown[""]["data"]["ensembles/apl_aml/metrics.json"]["data"]["auroc"]["value"] >= 0
    plots = json.loads(run(small, "dvc", "plots", "show", "--json"))["data"]
    for name in MEMBERS:
        for curve in ("ROC", "precision-recall", "calibration", "confusion"):
            (drawn,) = plots[f"{name} {curve}"]
            assert drawn["content"]["data"]["values"], f"{name} {curve} is empty"
    for task in TASKS:
        assert any(task in key and key.endswith("roc.csv") for key in plots)
