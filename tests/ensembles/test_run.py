"""An ensemble from its inputs to the tables that it writes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_combination import cohort, combine, people

from aplsmear.ensembles.pooling import summarise_patients
from aplsmear.ensembles.run import Inputs, Results, judge_and_compare, write_results
from aplsmear.params import Ensemble


def results_of(levels: dict[str, str]) -> Results:
    """Without single cells, of members m0 (the diagnosis is clear), m1 and m2 (random), without features."""
    patients, members = cohort(members=3, strength=0.0)
    members["m0"] = cohort(members=1, strength=4.0)[1]["m0"]
    place = ["item", "patient", "smear", "image", "y0", "x0", "y1", "x1"]
    nothing = pd.DataFrame(columns=place, dtype=str)
    scores = {task: pd.DataFrame(columns=["item", "outer_0"]) for task in members}
    inputs = Inputs(
        name="apl_aml",
        ensemble=Ensemble(positive="apl", negative="aml", members=list(members), weigh_by="m1"),
        levels=levels,
        everyone=people(10, 5),
        patients=patients,
        members=members,
        weighing=members["m1"],
        items={"cell": nothing, "smear": nothing[["item", "patient", "image"]]},
        features={"cell": {}, "smear": {}},
        heads={},
        scores=scores,
        left_out={},
        md5={"splits/folds.csv": "0123"},
    )
    return judge_and_compare(inputs, combine(shares=["m0"]), 1)


def test_the_tables_and_measures_are_those_of_the_results(tmp_path: Path) -> None:
    results = results_of({"m0": "cell", "m1": "cell", "m2": "smear"})
    write_results(tmp_path, results)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    intervals = json.loads((tmp_path / "intervals.json").read_text())
    assert metrics["auroc"]["value"] == pytest.approx(results.measured["auroc"]["value"], abs=1e-4)
    assert set(intervals["auroc_drop_without"]) == {"m0", "m1", "m2"}
    assert (
        len(pd.read_csv(tmp_path / "predictions.csv")) == len(pd.read_csv(tmp_path / "confusion.csv")) == 20
    )
    against = pd.read_csv(tmp_path / "comparison.csv")["against"].tolist()
    assert against == [
        *("the ensemble", "m0 alone", "m1 alone", "m2 alone", "share of m0 cells", "plain average")
    ]
    assert results.inputs.md5 == {"splits/folds.csv": "0123"}


def test_evidence_of_the_cells_adds_up_to_the_held_out_logit() -> None:
    """In ensembles/NAME/evidence.parquet, by the models that never saw the patient."""
    inputs, random = results_of({"m0": "cell", "m1": "cell", "m2": "smear"}).inputs, np.random.default_rng(2)
    people = inputs.patients.loc[inputs.patients.index.repeat(4)].reset_index(drop=True)
    cells = pd.DataFrame({"item": [f"c{n}" for n in range(len(people))], "patient": people["patient"]})
    cells = cells.assign(smear="1", image="", y0=0, x0=0, y1=9, x1=9)
    outer_folds = [f"outer_{n}" for n in range(int(people["fold"].max()) + 2)]
    scores = {}
    for task in ("m0", "m1"):
        drawn = random.uniform(0.01, 0.99, (len(cells), len(outer_folds)))
        scores[task] = cells[["item", "patient"]].assign(
            fold=people["fold"], **dict(zip(outer_folds, drawn.T, strict=True))
        )
    members = {task: summarise_patients(table, scores["m1"]) for task, table in scores.items()}
    inputs = replace(
        inputs,
        ensemble=inputs.ensemble.model_copy(update={"members": ["m0", "m1"]}),
        members=members,
        items={"cell": cells, "smear": inputs.items["smear"]},
        scores=scores,
    )
    results = judge_and_compare(inputs, combine(shares=[]), 1)
    table, verdicts = results.evidence, results.verdicts
    assert table["cell"].tolist() == cells["item"].tolist()
    assert list(table)[-3:] == ["score_m0", "score_m1", "evidence_apl_aml"]
    of_patient = table.groupby("patient")["evidence_apl_aml"].sum()
    for row, logits in zip(verdicts.table.itertuples(), verdicts.logits, strict=True):
        combination = verdicts.combinations[row.fold]
        patient, mean = combination.logit(np.stack([logits, combination.fitted.mean]))
        assert of_patient[row.patient] == pytest.approx(patient - mean, abs=1e-4)
