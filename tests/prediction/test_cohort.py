"""The measures of a labelled cohort, by hand."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from aplsmear.cli.ensembles import _trained_on
from aplsmear.ensembles.baselines import compare
from aplsmear.ensembles.promise import Alarm
from aplsmear.evaluation.curves import curve_tables, decision_table
from aplsmear.prediction.cohort import Evaluation, labelled_table, measure_cohort, page, seen_by_backbones
from aplsmear.reports.pages import study_content
from aplsmear.runs.checksums import md5


def verdicts(probability: list[float], **more) -> pd.DataFrame:
    """Of patients a, b, ..., half of them with APL."""
    n = len(probability)
    label = np.arange(n) % 2
    table = pd.DataFrame(
        {
            "patient": list("abcdefghijklmnop"[:n]),
            "label": label,
            "probability": probability,
            "low": probability,
            "high": probability,
        }
    )
    call = (table["probability"] >= 0.5).astype(int)
    table = table.assign(verdict=call, sensitive=1, adapted=probability, adapted_verdict=call)
    table = table.assign(
        adapted_sensitive=1, alarm="look again", site="", warning="", distance=1.0, stain=1.0
    )
    return table.assign(**more)


def test_a_patient_gets_the_diagnosis_and_the_site_of_the_smears() -> None:
    smears = pd.DataFrame(
        {"patient": ["b", "b", "a"], "site": ["x", "x", "y"], "diagnosis": ["apl", "apl", "aml"]}
    )
    judged = pd.DataFrame({"patient": ["a", "b"], "probability": [0.1, 0.9], "verdict": 0, "sensitive": 1})
    shifted = judged.assign(probability=[0.2, 0.95], verdict=1)
    found = labelled_table(judged, shifted, smears, "apl")
    assert found[["patient", "site", "diagnosis", "label"]].to_numpy().tolist() == [
        ["a", "y", "aml", 0],
        ["b", "x", "apl", 1],
    ]
    assert found["adapted"].tolist() == [0.2, 0.95]
    assert found["adapted_verdict"].tolist() == [1, 1]
    assert found["verdict"].tolist() == [0, 0]


def test_errors_that_grow_with_the_distance_are_reported() -> None:
    probability = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.6, 0.4]  # the last two are wrong
    distance = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    warning = ["", "few cells", *[""] * 5, "unlike the training patients"]
    found = measure_cohort(verdicts(probability, distance=distance, warning=warning), 100, 1)["unfamiliar"]
    assert {name: found[name] for name in ("warned", "wrong", "wrong_and_warned")} == {
        "warned": 2,
        "wrong": 2,
        "wrong_and_warned": 1,
    }
    correlation = found["error_by_distance"]
    assert 0.9 < correlation["value"] < 1
    assert -1 < correlation["low"] < correlation["value"] < correlation["high"] < 1
    assert "error_by_stain" not in found  # all have the same


def test_each_site_is_measured_if_it_has_two_patients_of_each_diagnosis() -> None:
    probability = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.6, 0.4]
    table = verdicts(probability, site=["Dresden"] * 5 + ["Leipzig"] * 3)
    sites = measure_cohort(table, 100, 1)["sites"]
    assert list(sites) == ["Dresden"]
    assert sites["Dresden"]["n_patients"] == 5
    assert sites["Dresden"]["auroc"]["value"] == pytest.approx(1.0)
    assert measure_cohort(verdicts(probability), 100, 1)["sites"] == {}


def test_the_page_shows_the_numbers_of_training_beside_those_of_the_cohort() -> None:
    table = verdicts([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.6, 0.4])
    measured = measure_cohort(table, 100, 1)
    held_out = measured | {"auroc": {"value": 0.987, "low": 0.9, "high": 0.999}}
    model = SimpleNamespace(name="apl_aml", positive="apl", negative="aml", held_out=held_out, inputs={})
    label, probability = table["label"], table["probability"]
    alarm = Alarm(threshold=0.2, wanted=0.1, confidence=0.9, miss_rate=0.13, patients=16)
    fitted = SimpleNamespace(thresholds={"balanced": 0.5, "sensitive": 0.4}, alarm=alarm)
    found = Evaluation(
        bundle=SimpleNamespace(model=model, combinations=[fitted]),
        table=table,
        measured=measured,
        comparison=compare(table, probability.to_numpy(), {}),
        curves=curve_tables(label, probability, 100, 1) | {"decision": decision_table(label, probability)},
        left_out={},
        study=study_content(table["patient"], table, table, {}, np.full((8, 1), np.nan)),
    )
    row = re.search(r"<tr><th scope=\"row\">AUROC<.*</tr>", page(found)).group()
    assert re.findall(r"<td>([\d.]+)", row) == ["0.987", "0.938", "0.938"]
    assert "8 patients without a score of some member" in page(found)
    assert "at most 13.0 % of those with APL get no alarm" in page(found)
    missed = re.search(r"<tr><th scope=\"row\">APL patients without an alarm<.*</tr>", page(found)).group()
    assert f"<td>{measured['alarm']['missed']['value']:.3f}</td>" in missed
    model.held_out = {}  # a bundle that has none
    row = re.search(r"<tr><th scope=\"row\">AUROC<.*</tr>", page(found)).group()
    assert re.findall(r"<td>([\d.]+)", row) == ["0.938", "0.938"]


def test_the_training_data_set_of_a_clone_is_compared_without_being_named(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "cells.csv").write_text("cell\n")
    shutil.copy(Path(__file__).parents[2] / "profiles" / "demo.yaml", "params.yaml")
    bundle = SimpleNamespace(
        model=SimpleNamespace(inputs={"dataset/cells.csv": md5(Path("dataset/cells.csv"))})
    )
    assert _trained_on(bundle) == Path("data")
    (tmp_path / "dataset" / "cells.csv").write_text(
        "cell\n1\n"
    )  # the ensemble was made from another data set
    assert _trained_on(bundle) is None
    monkeypatch.chdir(tmp_path / "dataset")  # outside of a clone
    assert _trained_on(bundle) is None


@pytest.mark.parametrize(("folder", "warned"), [("Raabin-WBC", 1), ("dresden", 0), ("AML_LMU_2019", 1)])
def test_a_cohort_that_trained_a_backbone_is_not_called_held_out(folder, warned, tmp_path) -> None:
    rows = {"dinobloom": {"trained_on": ["raabin", "aml_lmu"]}, "mobilenet": {}}
    found = seen_by_backbones(rows, tmp_path / folder)
    assert len(found) == warned
    assert all("dinobloom" in each and "not held out" in each for each in found)
