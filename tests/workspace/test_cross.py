"""Trained there, judged here: what runs, what is refused, and the table of all pairs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aplsmear.data.dataset import DataSet, DataSetError
from aplsmear.errors import UserError
from aplsmear.params import Params, read_params
from aplsmear.sources.drawn import draw_data_set
from aplsmear.workspace.cross import (
    Judged,
    Training,
    cohorts_of,
    plan,
    read_cohorts,
    sites_judged,
    table_of,
    write_cross,
)

PARAMS = read_params(Path(__file__).parents[2] / "profiles" / "demo.yaml")
NO_TASKS: Params = PARAMS.model_copy(update={"tasks": {}})


def cohort(sites: list[str], diagnoses: tuple[str, ...] = ("apl", "aml", "healthy")) -> DataSet:
    """A cohort with a patient of each diagnosis at each site."""
    smears = pd.DataFrame([{"site": site, "diagnosis": each} for site in sites for each in diagnoses])
    cells = pd.DataFrame(columns=["smear", "patient", "site", "diagnosis"], dtype=object)
    return DataSet(smears.assign(patient="P"), cells, {}, pd.DataFrame())


def planned(*names: str) -> list[Training]:
    folders = {name: Path("/data") / name for name in names}
    return plan(folders, {name: cohort([""]) for name in names}, "apl_aml", PARAMS)


def test_each_cohort_is_trained_once_and_judges_all_others() -> None:
    trainings = planned("dresden", "leipzig", "mainz")
    assert [each.trained_on for each in trainings] == ["dresden", "leipzig", "mainz"]
    assert trainings[1].targets == ["evaluate@dresden", "evaluate@mainz"]
    assert trainings[1].results == {
        "leipzig": "ensembles/apl_aml",
        "dresden": "evaluated/dresden",
        "mainz": "evaluated/mainz",
    }


def test_no_cohort_is_judged_by_an_ensemble_that_was_trained_on_it() -> None:
    for each in planned("dresden", "leipzig"):
        judged = {value for key, value in each.settings.items() if key.endswith(".root")}
        assert len(judged) == 2  # the cohort of training, and the other
        assert each.settings[f"external.{'leipzig' if each.trained_on == 'dresden' else 'dresden'}.root"]
        assert f"external.{each.trained_on}.root" not in each.settings


def test_of_a_single_cohort_each_site_is_a_fold() -> None:
    read = {"dresden": cohort(["a", "b", "c", "d"])}
    (training,) = plan({"dresden": Path("/data/dresden")}, read, "apl_aml", PARAMS)
    assert training.settings["split.by"] == "site"
    assert training.settings["split.folds"] == 4
    assert training.targets == ["ensemble_apl_aml"]


@pytest.mark.parametrize("sites", [[""], ["a", "b"]])
def test_a_single_cohort_needs_three_sites(sites: list[str]) -> None:
    with pytest.raises(UserError, match="leaving one out needs 3"):
        plan({"dresden": Path("/data/dresden")}, {"dresden": cohort(sites)}, "apl_aml", PARAMS)


def test_a_cohort_without_a_diagnosis_of_the_ensemble_is_refused_before_any_training() -> None:
    read = {"dresden": cohort([""]), "leipzig": cohort([""], ("healthy", "aml"))}
    with pytest.raises(UserError, match="leipzig has no patient with apl"):
        plan({name: Path("/data") / name for name in read}, read, "apl_aml", PARAMS)


def test_two_folders_of_one_name_are_refused() -> None:
    assert list(cohorts_of([Path("/data/Our Smears"), Path("/data/2024")])) == ["our_smears", "cohort_2024"]
    with pytest.raises(UserError, match="the same name, export"):
        cohorts_of([Path("/dresden/export"), Path("/leipzig/export")])


def test_shared_pictures_and_all_other_problems_are_named_at_once(tmp_path: Path) -> None:
    for name, seed in (("dresden", 1), ("leipzig", 2), ("mainz", 3)):
        draw_data_set(tmp_path / name, 3, seed, size=(240, 320), cells_per_smear=4)
    cohorts = cohorts_of([tmp_path / name for name in ("dresden", "leipzig", "mainz")])
    assert read_cohorts(cohorts, NO_TASKS).keys() == cohorts.keys()
    shutil.copy(tmp_path / "dresden/wsi/smear_0002.jpg", tmp_path / "leipzig/wsi/smear_0003.jpg")
    (tmp_path / "mainz" / "wsi.csv").unlink()
    with pytest.raises(DataSetError) as error:
        read_cohorts(cohorts, NO_TASKS)
    shared, missing = sorted(error.value.problems, key=lambda each: each.file)
    assert shared.file == str(tmp_path / "dresden" / "wsi.csv")
    assert "smear_0002.jpg" in shared.value
    assert "smear_0003.jpg" in shared.expected
    assert missing.file.startswith(str(tmp_path / "mainz"))


def test_each_site_is_measured_on_its_own_patients() -> None:
    names = [f"p{place}" for place in range(8)]
    label = np.array([0, 1] * 4)
    right = np.where(label == 1, 0.9, 0.1)
    table = pd.DataFrame({"patient": names, "label": label, "probability": right})
    table.loc[4:, "probability"] = 1 - right[4:]  # site b: all wrong
    table = table.assign(verdict=(table["probability"] > 0.5).astype(int).astype(str), sensitive="1")
    smears = pd.DataFrame({"patient": names, "site": ["a"] * 4 + ["b"] * 4})
    smears.loc[3, "site"] = "c"  # one patient
    found = {each.judged_on: each.measured for each in sites_judged(table, smears, 100, 1, "report.html")}
    assert list(found) == ["a", "b", "c", "all sites"]
    assert found["b"]["auroc"]["value"] == 0
    assert found["b"]["sensitivity"]["value"] == 0
    assert found["a"] == found["c"] == {}  # fewer than two patients of a diagnosis
    assert found["all sites"]["n_patients"] == 8


def measured(value: float) -> dict:
    each = {"value": value, "low": value - 0.1, "high": value + 0.1}
    rates = {"sensitivity": each, "specificity": each, "balanced_accuracy": each}
    numbers = {"n_patients": 20, "n_positive": 8, "auroc": each, "calibration_slope": each}
    return numbers | rates | {"at_sensitive": rates, "unfamiliar": {"warned": 1}}


def test_the_page_and_the_table_have_every_pair_with_its_interval(tmp_path: Path) -> None:
    judged = [
        Judged("dresden", "dresden", measured(0.9), "dresden/dresden/report.html"),
        Judged("dresden", "leipzig", measured(0.625), "dresden/leipzig/report.html"),
        Judged("leipzig", "leipzig", {}, "leipzig/leipzig/report.html"),
    ]
    write_cross(tmp_path, judged, PARAMS, "apl_aml")
    table = pd.read_csv(tmp_path / "cross.csv")
    assert table[["trained_on", "judged_on"]].to_numpy().tolist()[1] == ["dresden", "leipzig"]
    assert table.loc[1, ["auroc", "auroc_low", "auroc_high"]].tolist() == [0.625, 0.525, 0.725]
    assert table.loc[1, "at_sensitive_sensitivity"] == 0.625
    assert np.isnan(table.loc[2, "auroc"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'href="dresden/leipzig/report.html">0.625</a><small>0.525 to 0.725</small>' in page
    assert "too few" in page
    assert table_of(judged).shape == table.shape
