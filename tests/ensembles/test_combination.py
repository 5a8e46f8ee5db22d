"""The verdict on a patient comes only from models that never saw the patient."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from aplsmear.ensembles.combination import (
    MODELS,
    Candidate,
    EnsembleError,
    as_json,
    combination_of,
    draw_candidates,
    importance,
    judge,
    logits_of_all,
    measure,
    null_check,
    null_verdict,
    patients_of,
    read_members,
)
from aplsmear.ensembles.pooling import SUMMARIES, summarise_patients
from aplsmear.evaluation.auroc import auroc
from aplsmear.files import write_json
from aplsmear.params import Combine, CombineSpace
from aplsmear.tables import write_table

RIDGE = [Candidate(0, "logistic", "mean", 0.1, 0), Candidate(1, "logistic", "top", 1.0, 0)]
NETWORK = [Candidate(0, "network", "mean", 1.0, 2)]
AVERAGE = [Candidate(0, "average", "mean", 0.0, 0)]


def people(n: int, folds: int) -> pd.DataFrame:
    """`n` patients of each diagnosis, distributed to the folds in turn."""
    rows = [
        {"patient": f"{diagnosis}{i:03}", "diagnosis": diagnosis, "fold": i % folds}
        for diagnosis in ("aml", "apl", "healthy")
        for i in range(n)
    ]
    return pd.DataFrame(rows)


def scores_of(patients: pd.DataFrame, seed: int, strength: float = 1.0, cells: int = 6) -> pd.DataFrame:
    """The scores of a member, as in `tuned/<task>/scores.parquet`."""
    random = np.random.default_rng(seed)
    outer_folds = int(patients["fold"].max()) + 2
    of = patients.loc[patients.index.repeat(cells)].reset_index(drop=True)
    shift = strength * (of["diagnosis"] == "apl").to_numpy()
    own = dict(zip(patients["patient"], random.normal(size=len(patients)), strict=True))
    level = of["patient"].map(own).to_numpy() + shift
    noise = random.normal(size=(len(of), outer_folds)) * 0.5
    values = 1 / (1 + np.exp(-(level[:, None] + noise)))
    table = of[["patient", "fold"]].assign(item=[f"cell{n}" for n in range(len(of))])
    return table.assign(**{f"outer_{w}": values[:, w].astype(np.float32) for w in range(outer_folds)})


def cohort(n: int = 10, folds: int = 5, members: int = 3, strength: float = 1.0, seed: int = 0):
    whole = people(n, folds)
    tables = {f"m{k}": summarise_patients(scores_of(whole, 100 * seed + k, strength)) for k in range(members)}
    return patients_of(whole, "apl", "aml"), tables


def combine(**knobs) -> Combine:
    space = CombineSpace(model=["logistic", "network"], summary=["mean", "top"], C=[1.0, 0.1], units=[2])
    settings = {"trials": 6, "resamples": 100, "refits": 20, "shuffles": 5}
    return Combine(**({"space": space} | settings | knobs))


# --- no leak --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "fold"),
    [(RIDGE, 0), (RIDGE, 3), (NETWORK, 3), (AVERAGE, 0)],
    ids=["ridge 0", "ridge 3", "network", "average"],
)
def test_labels_of_held_out_patients_do_not_change_their_verdicts(candidates, fold) -> None:
    patients, members = cohort()
    there = (patients["fold"] == fold).to_numpy()
    swapped = patients.assign(label=np.where(there, 1 - patients["label"], patients["label"]))
    columns = ["probability", "low", "high", "verdict", "sensitive"]
    before = judge(patients, members, candidates, 5, 1).table[columns]
    after = judge(swapped, members, candidates, 5, 1).table[columns]
    pd.testing.assert_frame_equal(before[there], after[there])
    assert not np.allclose(
        before["probability"][~there], after["probability"][~there]
    )  # they change those of the others


def test_scores_of_held_out_patients_do_not_change_the_models_that_judge_them() -> None:
    patients, members = cohort()
    outer_fold = 2
    moved = {
        name: table.assign(
            **{
                kind: np.where(
                    (table["fold"] == outer_fold) & (table["outer_fold"] == outer_fold),
                    -3 * table[kind] + 1,
                    table[kind],
                )
                for kind in SUMMARIES
            }
        )
        for name, table in members.items()
    }
    before = judge(patients, members, RIDGE, 0, 1)
    after = judge(patients, moved, RIDGE, 0, 1)
    one, other = before.combinations[outer_fold], after.combinations[outer_fold]
    assert before.chosen[outer_fold] == after.chosen[outer_fold]
    np.testing.assert_array_equal(one.fitted.weights, other.fitted.weights)
    assert (one.slope, one.offset, one.thresholds) == (other.slope, other.offset, other.thresholds)
    there = (patients["fold"] == outer_fold).to_numpy()
    assert not np.allclose(before.table["probability"][there], after.table["probability"][there])


def test_an_outer_fold_uses_no_scores_of_another() -> None:
    patients, members = cohort()
    spoiled = {
        name: table.assign(
            **{kind: np.where(table["outer_fold"] == 1, 0.0, table[kind]) for kind in SUMMARIES}
        )
        for name, table in members.items()
    }
    before = judge(patients, members, RIDGE, 0, 1).table
    after = judge(patients, spoiled, RIDGE, 0, 1).table
    elsewhere = (patients["fold"] != 1).to_numpy()
    pd.testing.assert_frame_equal(before[elsewhere], after[elsewhere])


def test_scores_that_could_be_memorised_do_not_raise_the_auroc_on_random_labels() -> None:
    # Each of 12 members gives each patient another score, the same in every outer fold: almost all of the 40
    # patients can be memorised, and a combination that had seen its patients would have an AUROC near 1.
    random = np.random.default_rng(5)
    found = []
    for seed in range(4):
        patients = patients_of(people(20, 5), "apl", "aml")
        marks = random.normal(size=(12, len(patients)))
        members = {
            f"m{k}": pd.concat(
                [
                    patients[["patient", "fold"]].assign(
                        outer_fold=outer_fold, items=1, **dict.fromkeys(SUMMARIES, mark)
                    )
                    for outer_fold in range(6)
                ]
            )
            for k, mark in enumerate(marks)
        }
        table = judge(patients, members, [Candidate(0, "logistic", "mean", 10.0, 0)], 0, seed).table
        found.append(auroc(table["label"], table["probability"]))
    assert 0.35 < np.mean(found) < 0.6


def test_permuted_diagnoses_give_an_auroc_of_a_half() -> None:
    patients, members = cohort(n=12, strength=2.0)
    within_folds = [within for _, within in null_check(patients, members, RIDGE, 6, 1)]
    assert np.mean(within_folds) == pytest.approx(0.5, abs=0.1)
    assert measure(judge(patients, members, RIDGE, 0, 1).table, 100, 1)["auroc"]["value"] > 0.85


@pytest.mark.parametrize("candidates", [RIDGE[:1], NETWORK], ids=["ridge", "network"])
def test_logits_of_all_patients_come_from_models_that_never_saw_them(candidates) -> None:
    """Those of patients with a third diagnosis, too, who take no part in any fit."""
    patients, members = cohort()
    verdicts = judge(patients, members, candidates, 0, 1)
    found = logits_of_all(verdicts, people(10, 5), members, 1)
    own = pd.Series([row[f"outer_{row['fold']}"] for row in found.to_dict("records")], found["patient"])
    chances = 1 / (1 + np.exp(-own.loc[patients["patient"]]))
    np.testing.assert_allclose(chances, verdicts.table["probability"])
    assert len(found) == 30
    # In outer fold 0, the diagnoses of folds 0 and 2 change the logits of fold 2 by the calibration alone.
    there = patients["fold"].isin([0, 2]).to_numpy()
    swapped = patients.assign(label=np.where(there, 1 - patients["label"], patients["label"]))
    again = logits_of_all(judge(swapped, members, candidates, 0, 1), people(10, 5), members, 1)
    before, after = (each.loc[each["fold"] == 2, "outer_0"] for each in (found, again))
    np.testing.assert_allclose(np.polyval(np.polyfit(before, after, 1), before), after, atol=1e-6)
    before, after = (each.loc[each["fold"] == 2, "outer_1"] for each in (found, again))
    assert not np.allclose(np.polyval(np.polyfit(before, after, 1), before), after, atol=1e-3)
