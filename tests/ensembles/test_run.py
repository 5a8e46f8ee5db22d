"""An ensemble from its inputs to the tables that it writes."""

import json
from pathlib import Path

import pandas as pd
import pytest
from test_combination import cohort, combine, people

from aplsmear.ensembles.run import Inputs, Results, judge_and_compare, write_results
from aplsmear.params import Ensemble


def results_of(levels: dict[str, str]) -> Results:
    """Without single cells, of members m0 (the diagnosis is clear), m1 and m2 (random), without features."""
    patients, members = cohort(members=3, strength=0.0)
    members["m0"] = cohort(members=1, strength=4.0)[1]["m0"]
    nothing = pd.DataFrame(columns=["item", "patient"])
    scores = {task: pd.DataFrame(columns=["item", "outer_0"]) for task in members}
    inputs = Inputs(
        name="apl_aml",
        ensemble=Ensemble(positive="apl", negative="aml", members=list(members), weigh_by="m1"),
        levels=levels,
        everyone=people(10, 5),
        patients=patients,
        members=members,
        items={"cell": nothing, "smear": nothing},
        features={"cell": {}, "smear": {}},
        heads={},
        scores=scores,
        left_out={},
        md5={"splits/folds.csv": "0123"},
    )
    return judge_and_compare(inputs, combine(shares=["m0"]), 1)


@pytest.mark.parametrize(
    ("levels", "pictured_by"),
    [
        ({"m0": "cell", "m1": "cell", "m2": "smear"}, "m0"),
        ({"m0": "smear", "m1": "cell", "m2": "smear"}, "m1"),
        ({"m0": "smear", "m1": "smear", "m2": "smear"}, ""),
    ],
)
def test_the_most_important_member_that_scores_cells_chooses_the_pictures(levels, pictured_by) -> None:
    assert results_of(levels).pictured_by == pictured_by


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
