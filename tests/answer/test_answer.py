"""One answer: three probabilities that add to 1, and that no patient's own diagnosis has a part in."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aplsmear.answer.coupling import (
    DIAGNOSES,
    Fitted,
    calls,
    check_manifests,
    coupled,
    fit,
    judge_all,
    probabilities,
    read_answers,
    shifted,
    write_answers,
)
from aplsmear.answer.measures import UNSURE, measure_diagnoses, predictive_values
from aplsmear.answer.report import results_of, write_results
from aplsmear.errors import UserError

PAIRS = {"apl_healthy": ("apl", "healthy"), "apl_aml": ("apl", "aml"), "aml_healthy": ("aml", "healthy")}
FOLDS = 4


def tables(n: int = 12, strength: float = 2.0, seed: int = 1) -> dict[str, pd.DataFrame]:
    """The logits of three ensembles for `n` patients of each diagnosis, in each outer fold."""
    rng = np.random.default_rng(seed)
    patients = pd.DataFrame(
        [
            {"patient": f"{diagnosis}{i:02}", "diagnosis": diagnosis, "fold": i % FOLDS}
            for diagnosis in DIAGNOSES
            for i in range(n)
        ]
    )
    found = {}
    for name, (positive, negative) in PAIRS.items():
        sign = (patients["diagnosis"] == positive) * 1.0 - (patients["diagnosis"] == negative)
        own = strength * sign + rng.normal(size=len(patients))
        noise = 0.3 * rng.normal(size=(len(patients), FOLDS + 1))
        columns = {f"outer_{w}": own + noise[:, w] for w in range(FOLDS + 1)}
        found[name] = pd.concat([patients, pd.DataFrame(columns)], axis=1)
    return found


def chances_of(found: dict[str, pd.DataFrame]) -> np.ndarray:
    return judge_all(found, PAIRS)[0].probability


# --- no leak ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", range(FOLDS))
def test_diagnoses_of_held_out_patients_do_not_change_their_answers(fold: int) -> None:
    found = tables()
    there = (found["apl_aml"]["fold"] == fold).to_numpy()
    turned = {"healthy": "aml", "aml": "apl", "apl": "healthy"}
    swapped = {
        name: table.assign(diagnosis=table["diagnosis"].where(~there, table["diagnosis"].map(turned)))
        for name, table in found.items()
    }
    before, after = chances_of(found), chances_of(swapped)
    np.testing.assert_array_equal(before[there], after[there])
    assert not np.allclose(before[~there], after[~there])  # they change those of the others


def test_an_outer_fold_uses_no_logits_of_another() -> None:
    found = tables()
    spoiled = {name: table.assign(outer_1=0.0) for name, table in found.items()}
    elsewhere = (found["apl_aml"]["fold"] != 1).to_numpy()
    np.testing.assert_array_equal(chances_of(found)[elsewhere], chances_of(spoiled)[elsewhere])


def test_logits_without_a_difference_are_not_better_than_chance() -> None:
    losses = []
    for seed in range(5):
        found = tables(20, 0.0, seed)
        label = found["apl_aml"]["diagnosis"].map(DIAGNOSES.index).to_numpy()
        losses.append(-np.log(chances_of(found)[np.arange(len(label)), label]).mean())
    assert np.mean(losses) > math.log(3) - 0.01


# --- probabilities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_probabilities_add_to_one_and_the_prevalence_of_training_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet([2, 2, 2])
    fitted = Fitted(slope=rng.normal(), offsets=[0.0, *rng.normal(size=2)], shares=shares.tolist())
    names = list(PAIRS)[: 2 + seed % 2]
    logits, pairs = 20 * rng.normal(size=(50, len(names))), [PAIRS[name] for name in names]
    plain = probabilities(fitted, logits, pairs)
    new = rng.dirichlet([1, 1, 1])
    for chances in (plain, probabilities(fitted, logits, pairs, new)):
        np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-12)
        assert ((chances >= 0) & (chances <= 1)).all()
    np.testing.assert_allclose(probabilities(fitted, logits, pairs, shares), plain, atol=1e-12)
    there_and_back = shifted(shifted(plain, shares, new), new, shares)
    np.testing.assert_allclose(there_and_back, plain, atol=1e-6)


def test_a_rarer_diagnosis_is_less_probable_by_its_odds() -> None:
    moved = shifted(np.array([[0.2, 0.3, 0.5]]), [1 / 3] * 3, [0.8, 0.15, 0.05])[0]
    odds = 0.5 / 0.2 * (0.05 / 0.8)
    assert moved[2] / moved[0] == pytest.approx(odds)


def test_consistent_logits_are_the_differences_of_the_scores() -> None:
    scores = np.array([[0.0, 1.5, -2.0], [3.0, 0.0, 0.5]])
    place = {name: DIAGNOSES.index(name) for name in DIAGNOSES}
    for names in (list(PAIRS), list(PAIRS)[:2]):
        pairs = [PAIRS[name] for name in names]
        logits = np.stack([scores[:, place[a]] - scores[:, place[b]] for a, b in pairs], axis=1)
        found = coupled(logits, pairs)
        np.testing.assert_allclose(found - found[:, :1], scores - scores[:, :1], atol=1e-12)


def test_a_healthy_patient_whom_one_ensemble_takes_for_apl_is_healthy_in_the_one_answer() -> None:
    """The ensemble of APL and other AML was never shown a healthy patient."""
    found = tables()
    healthy = (found["apl_aml"]["diagnosis"] == "healthy").to_numpy()
    outer = [f"outer_{w}" for w in range(FOLDS + 1)]
    found["apl_aml"].loc[healthy, outer] = 3.0
    assert (chances_of(found)[healthy].argmax(axis=1) == DIAGNOSES.index("healthy")).mean() > 0.9


def test_the_fit_does_not_depend_on_the_order_of_the_patients_or_of_the_ensembles() -> None:
    found = tables()
    label = found["apl_aml"]["diagnosis"].map(DIAGNOSES.index).to_numpy()
    logits = np.stack([table["outer_0"].to_numpy() for table in found.values()], axis=1)
    pairs, order = list(PAIRS.values()), np.random.default_rng(0).permutation(len(label))
    one = fit(logits, pairs, label)
    other = fit(logits[order][:, ::-1], pairs[::-1], label[order])
    assert one.slope == pytest.approx(other.slope, abs=1e-8)
    assert one.offsets == pytest.approx(other.offsets, abs=1e-8)


@pytest.mark.parametrize("strength", [0.0, 50.0], ids=["random", "separable"])
def test_few_patients_give_finite_numbers(tmp_path: Path, strength: float) -> None:
    found = tables(FOLDS, strength)
    judged = judge_all(found, PAIRS)
    assert all(math.isfinite(each.slope) and abs(each.slope) < 100 for each in judged[0].folds)
    write_results(tmp_path, results_of(found["apl_aml"], judged, PAIRS, 0.7, 100, 1))
    measured = json.loads((tmp_path / "intervals.json").read_text(encoding="utf-8"))
    for name in ("accuracy", "balanced_accuracy", "unsure"):
        assert 0 <= measured[name]["low"] <= measured[name]["value"] <= measured[name]["high"] <= 1
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{measured['accuracy']['value']:.3f}" in page
    assert sum(len(each) for each in pd.read_csv(tmp_path / "predictions.csv")["patient"]) > 0


# --- calls ------------------------------------------------------------------------------------------


def test_a_diagnosis_is_called_only_where_it_is_probable_enough() -> None:
    chances = np.array([[0.1, 0.2, 0.7], [0.4, 0.3, 0.3]])
    assert calls(chances, 0.7).tolist() == [2, UNSURE]


def test_predictive_values_follow_bayes_rule_and_have_a_width_without_errors() -> None:
    label = np.repeat([0, 1, 2], 20)
    called = label.copy()
    called[:4] = 2  # 4 of 20 healthy are called APL
    called[40:45] = UNSURE  # 5 of 20 with APL are not called
    table = predictive_values(label, called, [0.8, 0.15, 0.05], DIAGNOSES, 1).set_index("diagnosis")
    assert table.loc["apl", "ppv"] == pytest.approx(0.05 * 0.75 / (0.05 * 0.75 + 0.8 * 0.2))
    assert table.loc["apl", "npv"] == pytest.approx(1 - 0.05 * 0.25 / (0.05 * 0.25 + 0.8 * 0.8 + 0.15))
    assert table.loc["aml", "ppv"] == 1
    assert table.loc["aml", "ppv_low"] < 0.99
    none = predictive_values(label, np.full(60, UNSURE), [1 / 3] * 3, DIAGNOSES, 1)
    assert none["ppv"].isna().all()


def test_measures_are_those_of_the_most_probable_diagnosis() -> None:
    label = np.repeat([0, 1, 2], 10)
    chances = np.full((30, 3), 0.1)
    chances[np.arange(30), np.r_[label[:28], 0, 0]] = 0.8
    found = measure_diagnoses(label, chances, calls(chances, 0.7), DIAGNOSES, 100, 1)
    assert found["accuracy"]["value"] == pytest.approx(28 / 30)
    assert found["of"]["apl"]["sensitivity"]["value"] == pytest.approx(0.8)
    assert found["of"]["healthy"]["specificity"]["value"] == pytest.approx(0.9)
    assert found["brier"]["low"] <= found["brier"]["value"] <= found["brier"]["high"]
    assert found["unsure"]["value"] == 0


# --- what is written --------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    manifests = {name: tmp_path / "ensembles" / name / "model" / "manifest.json" for name in PAIRS}
    for name, path in manifests.items():
        path.parent.mkdir(parents=True)
        path.write_text(name, encoding="utf-8")
    found = tables()
    judged = judge_all(found, PAIRS)
    diagnoses = found["apl_aml"]["diagnosis"].tolist()
    write_answers(tmp_path / "answer.json", judged, PAIRS, manifests, diagnoses, 0.7)
    return tmp_path


def test_a_file_gives_the_answer_of_each_set_of_ensembles(written: Path) -> None:
    answers = read_answers(written / "answer.json")
    assert len(answers.answers) == 4  # all three, and each two of them
    found = tables()
    logits = np.stack([table["outer_4"].to_numpy() for table in found.values()], axis=1)
    judged = judge_all(found, PAIRS)[0].folds[-1]
    again = answers.of(["apl_aml", "aml_healthy", "apl_healthy"])
    pairs = [answers.pairs[name] for name in again.ensembles]
    np.testing.assert_allclose(
        probabilities(again.folds[-1], logits, pairs), probabilities(judged, logits, pairs), atol=1e-9
    )
    assert "apl00" not in (written / "answer.json").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="apl_healthy and apl_aml"):
        answers.of(["apl_healthy", "other"])


def test_a_changed_file_or_another_ensemble_is_refused(written: Path) -> None:
    answers = read_answers(written / "answer.json")
    manifests = {name: written / "ensembles" / name / "model" / "manifest.json" for name in PAIRS}
    check_manifests(answers, manifests)
    manifests["apl_aml"].write_text("another", encoding="utf-8")
    with pytest.raises(UserError, match="not the ensemble apl_aml"):
        check_manifests(answers, manifests)
    text = (written / "answer.json").read_text(encoding="utf-8")
    for wrong, why in ((text.replace('"sure": 0.7', '"sure": 0.6'), "changed"), ("{}", "version"), ("[", "")):
        (written / "answer.json").write_text(wrong, encoding="utf-8")
        with pytest.raises(UserError, match=f"cannot be used.*{why}"):
            read_answers(written / "answer.json")
    with pytest.raises(UserError, match="dvc repro answer"):
        read_answers(written / "nothing.json")


def test_a_diagnosis_without_patients_is_named() -> None:
    found = {name: table[table["diagnosis"] != "healthy"] for name, table in tables().items()}
    with pytest.raises(UserError, match=r"no one answer.* no patients with healthy"):
        judge_all(found, PAIRS)


def test_ensembles_that_do_not_compare_all_three_diagnoses_are_refused() -> None:
    found = {name: table for name, table in tables().items() if name == "apl_aml"}
    with pytest.raises(UserError, match="do not compare"):
        judge_all(found, {"apl_aml": PAIRS["apl_aml"]})
