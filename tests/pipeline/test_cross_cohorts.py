"""`aplsmear cross` runs the pipeline once for each cohort, and leaves the workspace as it was."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from aplsmear.sources.drawn import draw_data_set
from clones import run, stages_run

pytestmark = pytest.mark.pipeline


def test_each_cohort_judges_the_other_and_a_second_call_runs_no_stage(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    shutil.copytree(small, folder, symlinks=True)
    new = tmp_path / "it's new"  # a quote and a blank in its path
    draw_data_set(new, 18, 8, size=(240, 320), cells_per_smear=6)
    shutil.copytree(folder / "data", tmp_path / "demo")
    call = ["aplsmear", "cross", str(tmp_path / "demo"), str(new), "--ensemble", "apl_aml"]
    here = {"PYTHONPATH": str(folder / "src")}
    before = run(folder, "git", "status", "--porcelain")
    ran = stages_run(run(folder, *call, env=here))
    assert "evaluate@it_s_new" in ran
    assert "evaluate@demo" in ran
    table = pd.read_csv(folder / "crossed" / "cross.csv").set_index(["trained_on", "judged_on"])
    names = ["demo", "it_s_new"]
    assert sorted(table.index) == [(one, other) for one in names for other in names]
    own = json.loads((folder / "ensembles" / "apl_aml" / "intervals.json").read_text(encoding="utf-8"))
    for end, column in (("value", "auroc"), ("low", "auroc_low"), ("high", "auroc_high")):
        assert table.loc[("demo", "demo"), column] == own["auroc"][end]
    assert run(folder, "git", "status", "--porcelain") == before
    assert stages_run(run(folder, *call, env=here)) == []
