"""Experiments as a new user tries them: run, compare, keep; and their runs in MLflow.

docs/finetune.md walks through the queue.
"""

import json
import shutil
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
import yaml

from clones import output_until, run, stages_run, start

pytestmark = pytest.mark.pipeline


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    """A copy of the finished pipeline, without earlier runs in MLflow and studies."""
    copy = tmp_path / "copy"
    shutil.copytree(small, copy, symlinks=True, ignore=shutil.ignore_patterns("mlflow.db*", ".studies"))
    return copy


def mlflow_runs(folder: Path, experiment: str) -> dict[str, str]:
    """The runs in MLflow with the tag of a DVC experiment: name -> status."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        found = database.execute(
            "select name, status from runs join tags using (run_uuid) "
            "where key = 'DVC_EXP_NAME' and value = ?",
            (experiment,),
        )
        return dict(found.fetchall())


def finetuned(folder: Path) -> dict:
    return json.loads((folder / "finetuned" / "metrics.json").read_text(encoding="utf-8"))


def test_experiments_are_run_compared_and_kept(folder: Path) -> None:
    before = run(folder, "git", "status", "--porcelain")

    # One experiment in the workspace while another runs in a folder of its own.
    deepen = ("dvc", "exp", "run", "-S", "task=apl_healthy_cell")
    aside = start(folder, *deepen, "--temp", "--name", "aside", "-S", "finetune.rate=0.001")
    beside = output_until(aside, "Running stage")  # holds DVC's lock until then
    printed = run(folder, *deepen, "--name", "deeper")
    assert stages_run(printed) == ["finetune"]
    assert is_finetuned_for(folder, "apl_healthy_cell")
    beside += aside.communicate()[0]
    assert aside.returncode == 0, beside
    assert stages_run(beside) == ["kaggle", "finetune"], (
        beside
    )  # the out of `kaggle` is not cached, so the stage runs

    # Which is better? A table in 80 columns.
    shown = run(folder, "aplsmear", "experiments", env={"COLUMNS": "80", "PYTHONPATH": str(folder / "src")})
    assert max(map(len, shown.splitlines())) <= 80
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "task=apl_heal" in lines["deeper"]
    assert f"{finetuned(folder)['difference']['value']:+.3f}" in shown
    assert "finetune.rate=0.001" in shown.replace("\n", "")
    every = run(folder, "dvc", "exp", "show", "--csv")
    assert "apl_healthy_cell" in next(line for line in every.splitlines() if "deeper" in line)
    diff = run(folder, "dvc", "exp", "diff", "HEAD", "deeper")
    assert "apl_healthy_cell" in next(line for line in diff.splitlines() if line.split()[1:2] == ["task"])
    assert "finetuned/metrics.json" in diff
    assert max(map(len, diff.splitlines())) < 120, diff  # metrics hold no lists
    params = run(folder, "dvc", "params", "diff", "aside", "deeper")
    assert [line.split()[1] for line in params.splitlines()[1:]] == ["finetune.rate"]

    # MLflow has the runs of each experiment, also of one whose folder is gone.
    names = {line.split("[")[0] for line in run(folder, "dvc", "exp", "list", "--name-only").split()}
    assert names == {"aside", "deeper"}
    for name in names:
        assert set(mlflow_runs(folder, name).values()) == {"FINISHED"}, name
    assert not list(folder.glob(".dvc/tmp/exps/*/*/mlflow.db"))

    # Take over one experiment, and go on from it.
    run(folder, "dvc", "exp", "apply", "aside")
    assert yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))["finetune"]["rate"] == 0.001
    run(folder, "dvc", "exp", "branch", "aside", "a-better-rate")
    assert "a-better-rate" in run(folder, "git", "branch")
    run(folder, "git", "checkout", "--quiet", "--force", "main")
    run(folder, "dvc", "checkout", "--quiet", "--force")
    assert run(folder, "git", "status", "--porcelain") == before
    run(folder, "git", "checkout", "--quiet", "a-better-rate")
    run(folder, "dvc", "checkout", "--quiet")
    assert "up to date" in run(folder, "dvc", "status")


def is_finetuned_for(folder: Path, task: str) -> bool:
    """Whether the scores, numbers and pictures of `finetuned` are those of a task."""
    predictions = pd.read_csv(folder / "finetuned" / "predictions.csv")
    tuned = pd.read_csv(folder / "tuned" / task / "predictions.csv")
    plots = json.loads(run(folder, "dvc", "plots", "show", "--json"))["data"]
    return (
        finetuned(folder)["task"] == task
        and set(predictions["item"]) == set(tuned.loc[tuned["fold"] == 0, "item"])
        and any("explanations" in name for name in plots)
    )
