"""Summaries of the scores of a patient's cells."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from aplsmear.ensembles.pooling import (
    PLAIN,
    SUMMARIES,
    same_logits,
    summarise,
    summarise_patients,
    summary_logits,
)


def test_summaries_of_four_cells_by_hand() -> None:
    found = summarise(np.array([0.2, 0.9, 0.6, 0.1]), top=2)
    assert found == pytest.approx(
        {
            "mean": 0.45,
            "logits": 1 / (1 + (4 * 1 / 9 * 2 / 3 * 9) ** 0.25),  # the odds against it
            "upper": 0.9,  # which stands for all above 0.875
            "top": 0.75,
            "share": 2.5 / 5,
            "noisy_or": 1 - 0.99 * 0.955 * 0.97 * 0.995,
        }
    )


def test_one_rare_finding_raises_the_summaries_made_for_it() -> None:
    quiet = np.full(100, 0.05)
    found = np.append(quiet[1:], 0.99)
    before, after = summarise(quiet), summarise(found)
    assert after["top"] > before["top"] + 0.15
    assert after["noisy_or"] > before["noisy_or"] + 0.01
    assert after["upper"] == before["upper"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.randoms())
def test_summaries_are_probabilities_that_no_order_of_the_cells_changes(scores, random) -> None:
    mixed = random.sample(scores, len(scores))
    found = summarise(np.array(scores, dtype=np.float32))
    assert set(found) == {*PLAIN, "logits"}
    assert all(0 <= value <= 1 for value in found.values())
    assert found == summarise(np.array(mixed, dtype=np.float32))


def test_patients_by_hand() -> None:
    scores = pd.DataFrame(
        {
            "item": ["c1", "c2", "c3"],
            "patient": ["p2", "p1", "p2"],
            "fold": [1, 0, 1],
            "outer_0": np.float32([0.25, 0.0, 0.75]),
            "outer_1": np.float32([0.5, 1.0, 0.5]),
        }
    )
    table = summarise_patients(scores)
    assert list(table.columns) == ["patient", "fold", "outer_fold", "items", *SUMMARIES]
    assert table[["patient", "fold", "outer_fold", "items"]].to_numpy().tolist() == [
        ["p1", 0, 0, 1],
        ["p1", 0, 1, 1],
        ["p2", 1, 0, 2],
        ["p2", 1, 1, 2],
    ]
    assert expit(table["mean"]).tolist() == pytest.approx([1e-4, 1 - 1e-4, 0.5, 0.5])
    assert table["top"][2] == pytest.approx(0.0)  # a logit
    assert all(math.isfinite(value) for value in table[list(SUMMARIES)].to_numpy().ravel())


def test_a_score_of_a_patient_is_not_summarised() -> None:
    """Where each patient is one item, every summary is the logit of its score."""
    scores = pd.DataFrame({"item": ["p2", "p1"], "patient": ["p2", "p1"], "fold": [1, 0]})
    scores = scores.assign(outer_0=np.float32([0.25, 0.0]), outer_1=np.float32([0.5, 0.9]))
    table = summarise_patients(scores)
    for name in SUMMARIES:
        assert expit(table[name]).tolist() == pytest.approx([1e-4, 0.9, 0.25, 0.5])


def test_the_order_of_the_cells_does_not_matter() -> None:
    random = np.random.default_rng(0)
    scores = pd.DataFrame(
        {"item": [f"c{n}" for n in range(60)], "patient": [f"p{n % 7}" for n in range(60)]}
        | {"fold": [n % 7 % 3 for n in range(60)]}
        | {f"outer_{outer_fold}": random.random(60).astype(np.float32) for outer_fold in range(4)}
    )
    mixed = scores.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(summarise_patients(scores), summarise_patients(mixed))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 1))
def test_equal_weights_change_no_summary(scores, weight) -> None:
    score = np.array(scores, dtype=np.float32)
    plain, weighted = summarise(score), summarise(score, np.full(len(score), weight), top=5 * weight)
    for name in ("mean", "logits", "upper", "top"):
        assert weighted[name] == pytest.approx(plain[name])
    assert plain["upper"] == pytest.approx(np.quantile(score, 0.9, method="hazen"))


def test_a_cell_without_weight_changes_no_summary() -> None:
    immature, lymphocytes = np.array([0.9, 0.7]), np.array([0.1, 0.2, 0.1])
    alone = summarise(immature)
    among = summarise(np.append(immature, lymphocytes), np.array([1, 1, 1e-6, 1e-6, 1e-6]))
    for name in PLAIN:
        assert among[name] == pytest.approx(alone[name], abs=1e-4)


def test_the_weights_of_an_outer_fold_are_the_scores_of_the_other_task_there() -> None:
    scores = pd.DataFrame(
        {
            "item": ["c1", "c2"],
            "patient": ["p", "p"],
            "fold": [0, 0],
            "outer_0": np.float32([0.9, 0.1]),
            "outer_1": np.float32([0.9, 0.1]),
        }
    )
    weights = scores.assign(outer_0=np.float32([1, 0.0001]), outer_1=np.float32([0.0001, 1])).iloc[::-1]
    table = summarise_patients(scores, weights)
    assert expit(table["weighted_mean"]).tolist() == pytest.approx([0.9, 0.1], abs=1e-3)
    assert expit(table["mean"]).tolist() == pytest.approx([0.5, 0.5])


def test_a_blend_is_the_mean_of_the_plain_and_the_weighted_mean_of_scores_and_of_logits() -> None:
    score, weight = np.array([0.9, 0.2, 0.4]), np.array([1.0, 0.1, 0.5])
    four = [
        each[name] for each in (summarise(score), summarise(score, weight)) for name in ("mean", "logits")
    ]
    assert len(set(four)) == 4
    assert summary_logits(score, weight)["blend"] == pytest.approx(np.mean(logit(four)))


def test_the_logit_of_a_single_score_does_not_depend_on_how_it_is_stored() -> None:
    score = np.float32(0.7522866129875183)  # in float32 its logit would be rounded to another sixth digit
    assert same_logits(score) == same_logits(float(score))
