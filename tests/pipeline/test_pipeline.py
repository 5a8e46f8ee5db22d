"""The pipeline, run by dvc in fresh clones."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from aplsmear.sources.drawn import draw_data_set
from clones import run, stages_run
from small import MEMBERS, TASKS

pytestmark = pytest.mark.pipeline

TRIPOD_AI = (  # items, each with the letters of its parts
    *("1", "2", "3abc", "4", "5ab", "6abc", "7", "8abc", "9abc", "10", "11", "12abcdefg", "13", "14", "15"),
    *("16", "17", "18abcdef", "19", "20abc", "21", "22", "23ab", "24", "25", "26", "27abc"),
)


def test_every_patient_gets_one_probability_with_its_interval(small: Path) -> None:
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
        *(f"ensemble_{name}" for name in MEMBERS),
        "answer",
        "finetune",
        "kaggle",
    }  # members are copies of outs of `tune`: dvc has them in its cache and runs no stage for them
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
        "answer",
    }
    (small / "params.yaml").write_text(params, encoding="utf-8")
    run(small, "dvc", "repro")
    assert run(small, "git", "status", "--porcelain") == ""


def test_predict_gives_held_out_patients_the_probabilities_of_the_run(small: Path, tmp_path: Path) -> None:
    """It needs the bundle alone, in an empty folder."""
    bundle = shutil.copytree(small / "ensembles" / "apl_aml" / "model", tmp_path / "bundle")
    asked = ["--data", str(small / "data"), "--out", "new.csv", "--fold", "1"]
    here = {"PYTHONPATH": str(small / "src")}
    run(tmp_path, "aplsmear", "predict", "--ensemble", str(bundle), *asked, env=here)
    columns = ["patient", "probability", "verdict", "sensitive"]
    said = pd.read_csv(small / "ensembles" / "apl_aml" / "predictions.csv", dtype=str)
    new = pd.read_csv(tmp_path / "new.csv", dtype=str)
    mine = said[said["fold"] == "1"][columns].sort_values("patient", ignore_index=True)
    assert new[new["patient"].isin(mine["patient"])][columns].reset_index(drop=True).equals(mine)


def test_predict_gives_held_out_patients_the_one_answer_of_the_run(small: Path, tmp_path: Path) -> None:
    """Also those whose diagnosis an ensemble was not trained on."""
    asked = ["--data", "data", "--out", str(tmp_path / "new.csv"), "--fold", "1"]
    printed = run(small, "aplsmear", "predict", *asked)
    assert "Where 33.3 % are healthy" in printed
    columns = ["patient", "answer", "healthy", "aml", "apl"]
    said, new = (
        pd.read_csv(path, dtype=str) for path in (small / "answer" / "predictions.csv", tmp_path / "new.csv")
    )
    mine = said[said["fold"] == "1"][columns].sort_values("patient", ignore_index=True)
    assert len(mine) == 6
    assert new[new["patient"].isin(mine["patient"])][columns].reset_index(drop=True).equals(mine)
    chances = new[columns[2:]].astype(float)
    assert chances.sum(axis=1).sub(1).abs().max() < 1e-5


@pytest.fixture(scope="module")
def judged(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A clone with a row of `external`, a cohort of two sites; and what `dvc repro` printed."""
    folder = tmp_path_factory.mktemp("judged") / "clone"
    root = folder.parent / "dresden"
    shutil.copytree(small, folder, symlinks=True)
    draw_data_set(root, 12, 8, size=(240, 320), cells_per_smear=6)
    smears = pd.read_csv(root / "wsi.csv", dtype=str, keep_default_na=False)
    site = ["north" if patient <= "P8-006" else "south" for patient in smears["patient"]]
    smears.assign(site=site).to_csv(root / "wsi.csv", index=False)
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["external"] = {"dresden": {"ensemble": "apl_aml", "root": str(root)}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    return folder, run(folder, "dvc", "repro")


def test_a_row_of_external_becomes_a_stage_and_reruns_no_other(judged: tuple[Path, str]) -> None:
    folder, printed = judged
    assert stages_run(printed) == ["evaluate@dresden"]
    shown = json.loads(run(folder, "dvc", "metrics", "show", "--json"))[""]["data"]
    numbers = shown["evaluated/dresden/metrics.json"]["data"]
    assert numbers["n_patients"] == 8  # four are healthy
    assert 0 <= numbers["auroc"]["value"] <= 1
    plots = json.loads(run(folder, "dvc", "plots", "show", "--json"))["data"]
    drawn = [plots[key] for key in plots if "evaluated/dresden" in key]
    assert len(drawn) == 5
    assert all(each["content"]["data"]["values"] for (each,) in drawn)
    diff = json.loads(run(folder, "dvc", "metrics", "diff", "--json"))
    assert diff["evaluated/dresden/metrics.json"]["auroc.value"]["new"] == numbers["auroc"]["value"]
    run(folder, "aplsmear", "compare", "HEAD", "workspace", env={"PYTHONPATH": str(folder / "src")})
    assert "evaluated/dresden" in (folder / "compare.html").read_text(encoding="utf-8")
    assert stages_run(run(folder, "dvc", "repro")) == []


def test_every_place_that_the_page_on_tripod_ai_names_is_there_after_a_run(judged: tuple[Path, str]) -> None:
    folder, _ = judged
    pages = {
        "report": folder / "ensembles" / "apl_aml" / "report.html",
        "card": folder / "ensembles" / "apl_aml" / "model_card.md",
        "cohort": folder / "evaluated" / "dresden" / "report.html",
    }
    text = (folder / "docs" / "tripod-ai.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    parts = [re.match(r"(\d+)(\w*)", each).groups() for each in TRIPOD_AI]
    assert [row[0] for row in rows] == [
        number + each for number, letters in parts for each in letters or [""]
    ]
    places = {place for _, _, answer in rows for place in re.sub(r" \([^)]*\)", "", answer).split("; ")}
    missing = []
    for place in sorted(places - {"you"}):
        name, _, heading = place.partition(": ")
        path = pages.get(name, folder / name.strip("`"))
        keys = heading.split(", ") if path.suffix == ".yaml" else [heading] if heading else []
        shown = path.read_text(encoding="utf-8") if path.is_file() else ""
        found = (re.search(rf"^(##? |<h2>)?{re.escape(key)}(:|</h2>|$)", shown, re.MULTILINE) for key in keys)
        if name != "you" and not (path.exists() and all(found)):
            missing.append(place)
    assert missing == []


def test_dvc_shows_metrics_and_plots(small: Path) -> None:
    shown = json.loads(run(small, "dvc", "metrics", "show", "--json"))
    assert shown[""]["data"]["ensembles/apl_aml/metrics.json"]["data"]["auroc"]["value"] >= 0
    plots = json.loads(run(small, "dvc", "plots", "show", "--json"))["data"]
    for name in ("apl_healthy", "apl_aml"):  # a third one would make the page too long
        for curve in ("ROC", "precision-recall", "calibration", "confusion"):
            (drawn,) = plots[f"{name} {curve}"]
            assert drawn["content"]["data"]["values"], f"{name} {curve} is empty"
    for task in TASKS:
        assert any(task in key and key.endswith("roc.csv") for key in plots)


def test_finetune_killed_in_training_continues_and_writes_the_same_bytes(small: Path) -> None:
    wanted = {path: path.read_bytes() for path in (small / "finetuned").rglob("*") if path.is_file()}
    command = [sys.executable, "-P", "stages/finetune.py"]
    environment = os.environ | {
        "PYTHONPATH": str(small / "src"),
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
    }
    killed = subprocess.Popen(
        command, cwd=small, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not list(small.glob(".finetuning/*/inner_*.npz")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    for path in wanted:
        path.unlink()
    run(small, *command, env=environment)
    assert {path: path.read_bytes() for path in (small / "finetuned").rglob("*") if path.is_file()} == wanted
    assert not list(small.glob(".finetuning/*/"))
