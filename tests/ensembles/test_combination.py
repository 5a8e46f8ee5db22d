"""The verdict on a patient comes only from models that never saw the patient."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from aplsmear.ensembles.combination import (
    MODELS,
    Candidate,
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
from aplsmear.errors import UserError
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


def test_new_patients_get_an_interval_over_refits_and_held_out_folds_get_none() -> None:
    """Also after a trip through JSON, as in a bundle."""
    patients, members = cohort(n=8)
    found = judge(patients, members, RIDGE, 20, 1)
    *held_out, last = (combination_of(json.loads(json.dumps(as_json(each)))) for each in found.combinations)
    low, high = last.interval(found.logits)
    probability = last.probability(found.logits)
    assert len(last.refits) == 20
    assert ((low <= probability) & (probability <= high) & (low < high)).all()
    assert all(np.isnan(each.interval(found.logits)).all() for each in held_out)


def test_few_permutations_give_no_verdict_and_the_number_that_it_takes() -> None:
    """Five permutations of 40 patients: 0.42 is chance, not a leak."""
    few = null_verdict([0.33, 0.47, 0.38, 0.49, 0.43], within_folds=True)
    assert (few.mean, few.leaks) == (pytest.approx(0.42), False)
    assert few.low < 0.35
    assert few.high > 0.49
    assert 45 < few.needed < 60
    many = null_verdict([0.33, 0.47, 0.38, 0.49, 0.43] * 12, within_folds=True)
    assert many.leaks
    assert many.needed <= 60
    # Over all pairs, similar patients push each other the wrong way: no leak.
    assert not null_verdict([0.33, 0.47, 0.38, 0.49, 0.43] * 12, within_folds=False).leaks
    assert null_verdict([0.6, 0.55, 0.58] * 12, within_folds=False).leaks


def test_many_permutations_around_a_half_show_no_leak() -> None:
    found = null_verdict([0.4, 0.6, 0.45, 0.56] * 25, within_folds=True)
    assert not found.leaks
    assert found.needed <= 100


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


# --- order ------------------------------------------------------------------------------------------


def test_the_order_of_rows_changes_nothing() -> None:
    patients, members = cohort()
    mixed = {name: table.sample(frac=1, random_state=3) for name, table in members.items()}
    whole = people(10, 5).sample(frac=1, random_state=4)
    again = patients_of(whole, "apl", "aml")
    pd.testing.assert_frame_equal(patients, again)
    one, other = (judge(p, m, RIDGE, 20, 1) for p, m in ((patients, members), (again, mixed)))
    assert one.table.to_csv() == other.table.to_csv()
    for mine, others in zip(one.combinations, other.combinations, strict=True):
        assert json.dumps(as_json(mine)) == json.dumps(as_json(others))


# --- gaps and small cohorts ----------------------------------------------------------------------------


def test_a_patient_without_a_cell_for_a_member_is_judged_by_the_others() -> None:
    patients, members = cohort(strength=3.0)
    gone = ["apl000", "aml001"]
    members["m0"] = members["m0"][~members["m0"]["patient"].isin(gone)]
    verdicts = judge(patients, members, RIDGE, 20, 1)
    chances = verdicts.table.set_index("patient")["probability"]
    assert np.isfinite(verdicts.table[["probability", "low", "high"]].to_numpy()).all()
    assert chances["apl000"] > chances["aml001"]
    final = verdicts.combinations[-1]
    gap, mean = np.array([[np.nan, 1.0, 2.0]]), np.array([[final.fitted.mean[0], 1.0, 2.0]])
    assert final.probability(gap) == final.probability(mean)


def test_a_member_with_the_same_score_for_every_patient_changes_almost_nothing() -> None:
    patients, members = cohort(strength=2.0)
    before = judge(patients, members, RIDGE[:1], 0, 1).table["probability"]
    constant = members["m0"].assign(**dict.fromkeys(SUMMARIES, 0.3))
    after = judge(patients, members | {"same": constant}, RIDGE[:1], 0, 1).table["probability"]
    np.testing.assert_allclose(before, after, atol=1e-6)


def test_a_patient_positive_at_the_balanced_point_is_positive_at_the_sensitive_point() -> None:
    patients, members = cohort(n=12, strength=20.0)
    rare = patients[(patients["label"] == 0) | (patients.groupby("label").cumcount() < 5)]
    verdicts = judge(rare.reset_index(drop=True), members, RIDGE, 0, 1)
    assert (verdicts.table["sensitive"] >= verdicts.table["verdict"]).all()
    assert all(one.thresholds["sensitive"] <= one.thresholds["balanced"] for one in verdicts.combinations)


def numbers(tree) -> list[float]:
    return [n for value in tree.values() for n in (numbers(value) if isinstance(value, dict) else [value])]


@pytest.mark.parametrize("candidates", [RIDGE, NETWORK, AVERAGE], ids=["ridge", "network", "average"])
@pytest.mark.parametrize("strength", [0.0, 20.0], ids=["random", "separable"])
def test_three_folds_of_two_and_two_patients_give_finite_numbers(tmp_path, candidates, strength) -> None:
    patients, members = cohort(n=6, folds=3, strength=strength)
    verdicts = judge(patients, members, candidates, 20, 1)
    measured = measure(verdicts.table, 100, 1)
    write_json(tmp_path / "metrics.json", measured)
    assert all(math.isfinite(number) for number in numbers(measured))
    for name in ("auroc", "average_precision", "balanced_accuracy", "sensitivity", "specificity", "brier"):
        interval = measured[name]
        assert 0 <= interval["low"] <= interval["value"] <= interval["high"] <= 1
    assert measured["n_patients"] == 12
    table = verdicts.table
    assert ((table["low"] <= table["probability"]) & (table["probability"] <= table["high"])).all()
    assert (table["sensitive"] >= table["verdict"]).all()


# --- choice ------------------------------------------------------------------------------------------


def test_candidates_are_different_and_begin_with_the_simplest_of_each_summary() -> None:
    drawn = draw_candidates(combine(trials=100), 1)
    assert [(one.model, one.summary, one.C) for one in drawn[:2]] == [
        ("logistic", "mean", 0.1),
        ("logistic", "top", 0.1),
    ]
    assert len({(one.complexity, one.summary) for one in drawn}) == len(drawn) == 2 * (2 + 2)
    assert drawn == draw_candidates(combine(trials=100), 1)
    assert draw_candidates(combine(trials=5), 1) == drawn[:5]


def test_the_simplest_within_one_standard_error_is_chosen() -> None:
    strengths = (0.05, 0.1, 10.0)
    candidates = [Candidate(n, "logistic", "mean", C, 0) for n, C in enumerate(strengths)]
    candidates += [Candidate(3, "network", "mean", 1.0, 2)]
    patients, members = cohort(strength=2.0)
    for order in (candidates, candidates[::-1]):
        assert judge(patients, members, order, 0, 1).chosen[-1].number == 0


def test_the_better_of_equally_simple_candidates_is_chosen() -> None:
    patients, members = cohort(n=20, strength=0.7)
    random = np.random.default_rng(0)
    blurred = {
        name: table.assign(upper=table["mean"] + 0.1 * random.normal(size=len(table)))
        for name, table in members.items()
    }
    candidates = [Candidate(n, "logistic", kind, 0.1, 0) for n, kind in enumerate(("upper", "mean"))]
    assert judge(patients, blurred, candidates, 0, 1).chosen[-1].summary == "mean"


def test_params_accept_the_models_and_summaries_that_exist() -> None:
    fields = CombineSpace.model_fields
    assert fields["model"].annotation.__args__[0].__args__ == MODELS
    assert fields["summary"].annotation.__args__[0].__args__ == SUMMARIES


# --- what is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [RIDGE, NETWORK, AVERAGE], ids=["ridge", "network", "average"])
def test_a_combination_in_a_file_gives_the_same_probabilities(tmp_path, candidates) -> None:
    patients, members = cohort()
    verdicts = judge(patients, members, candidates, 0, 1)
    logits = verdicts.logits
    logits[0, 1] = np.nan  # a patient without a cell for m1
    for combination in verdicts.combinations:
        write_json(tmp_path / "combination.json", as_json(combination), digits=12)
        again = combination_of(json.loads((tmp_path / "combination.json").read_text()))
        assert (again.members, again.summary) == (("m0", "m1", "m2"), combination.summary)
        np.testing.assert_allclose(again.probability(logits), combination.probability(logits), atol=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [{"weights": [1.0]}, {"summary": "guess"}, {"thresholds": {}}, {"mean": "x"}, {"members": None}],
    ids=str,
)
def test_an_invalid_combination_is_refused(wrong) -> None:
    patients, members = cohort()
    made = as_json(judge(patients, members, RIDGE, 0, 1).combinations[-1])
    with pytest.raises(UserError, match="no combination"):
        combination_of(made | wrong)


def test_importance_finds_the_member_that_matters() -> None:
    patients, members = cohort(members=2, strength=0.0)
    members["m0"] = cohort(members=1, strength=3.0)[1]["m0"]
    table = importance(judge(patients, members, RIDGE, 0, 1), 20, 1)
    drop = table.set_index("member")["auroc_drop"]
    assert drop["m0"] > 0.3
    assert abs(drop["m1"]) < 0.05
    assert (table["low"] <= table["high"]).all()


def test_a_fold_keeps_its_patients_when_diagnoses_are_permuted(monkeypatch) -> None:
    patients, members = cohort(n=6, folds=3)
    seen = []

    def spy(permuted, *rest):
        seen.append(permuted)
        return judge(permuted, *rest)

    monkeypatch.setattr("aplsmear.ensembles.combination.judge", spy)
    list(null_check(patients, members, AVERAGE, 3, 1))
    assert [each.groupby("fold")["label"].sum().tolist() for each in seen] == [[2, 2, 2]] * 3
    assert any(each["label"].tolist() != patients["label"].tolist() for each in seen)


# --- clear errors ---------------------------------------------------------------------------------------


def test_a_diagnosis_without_patients_is_named() -> None:
    whole = people(3, 3).query("diagnosis != 'apl'")
    with pytest.raises(UserError, match=r"of both, but there are 3 aml, 3 healthy\. Add patients .* apl"):
        patients_of(whole, "apl", "healthy")


def test_a_member_that_scored_no_patient_is_named() -> None:
    patients, members = cohort()
    members["m1"] = members["m1"].assign(patient="somebody else")
    with pytest.raises(UserError, match=r"members m1 have scored none of the 20 patients"):
        judge(patients, members, RIDGE, 0, 1)


def test_members_on_disk_are_those_of_params(tmp_path) -> None:
    scores = scores_of(people(2, 2), 1, strength=1.0)
    for name in ("blast", "old"):
        scores.to_parquet(tmp_path / f"{name}.scores.parquet", index=False)
    with pytest.raises(UserError, match=r"does not name: old.*lacks the members faggot: `dvc pull"):
        read_members(tmp_path, {"blast": "cell", "faggot": "cell"}, {})
    halved = scores.assign(**{name: 0.5 for name in scores if name.startswith("outer_fold")})
    found = read_members(tmp_path, {"blast": "cell", "old": "smear"}, {"cell": halved})
    assert list(found) == ["blast", "old"]
    for name, weights in (("blast", halved), ("old", None)):  # weights of cells do not apply to smears
        whole = summarise_patients(scores, weights)
        write_table(tmp_path / "table.csv", whole)
        written = pd.read_csv(tmp_path / "table.csv", dtype={"patient": str}, keep_default_na=False)
        pd.testing.assert_frame_equal(found[name], written)
