"""A cohort that another laboratory has moved is put right by its own scores; one that is right stays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from test_shift_bench import head

from aplsmear.ensembles.combination import Combination, Weights
from aplsmear.ensembles.familiarity import describe_rows
from aplsmear.evaluation.calibration import brier
from aplsmear.evaluation.operating_points import balanced_accuracy
from aplsmear.heads.bags import attend
from aplsmear.heads.head import Head
from aplsmear.prediction.recalibration import adapted, moved, standardising, taking

SHARE = 0.3


def cohort(patients: int, seed: int, share: float = SHARE) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and logits that are calibrated for a share of positives of 0.3 (normal, AUROC 0.92)."""
    random = np.random.Generator(np.random.Philox(seed))
    label = (random.random(patients) < share).astype(int)
    apart = 4.0
    logit = np.log(SHARE / (1 - SHARE)) + apart * (label - 0.5) + apart**0.5 * random.normal(size=patients)
    return label, logit


def combination() -> Combination:
    """Of one member whose logit is taken as it is."""
    weights = Weights(np.zeros(1), np.ones(1), np.zeros((1, 0)), np.zeros(0), np.ones(1), 0.0)
    return Combination(("a",), "mean", weights, 1.0, 0.0, {"balanced": SHARE, "sensitive": 0.1})


def simulated(shift: float, patients: int, share: float = SHARE) -> dict[str, tuple[float, float]]:
    """Mean balanced accuracy and Brier score over many cohorts: as they come, and adapted."""
    found = {"before": [], "after": []}
    for seed in range(60):
        label, logit = cohort(patients, seed, share)
        for name, used in (
            ("before", combination()),
            ("after", adapted(combination(), logit[:, None] + shift)),
        ):
            probability = used.probability(logit[:, None] + shift)
            found[name].append((balanced_accuracy(label, probability, SHARE), brier(label, probability)))
    return {name: tuple(np.mean(values, axis=0)) for name, values in found.items()}


@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_a_moved_cohort_is_put_right(shift):
    found = simulated(shift, 40)
    right = simulated(0.0, 40)["before"]
    assert found["before"][0] < right[0] - 0.05
    assert found["after"][0] > right[0] - 0.03
    assert found["after"][1] < right[1] + 0.015 < found["before"][1]


@pytest.mark.parametrize("patients", [12, 40])
def test_a_cohort_that_is_right_is_not_harmed(patients):
    found = simulated(0.0, patients)
    assert found["after"][0] > found["before"][0] - 0.01
    assert found["after"][1] < found["before"][1] + 0.005


def test_another_share_of_positives_misleads_it_unless_the_share_is_said():
    """What it assumes, and the way out where that is known to be wrong."""
    few = 0.05
    _, logit = cohort(400, 1, share=few)
    right = logit + np.log(few / (1 - few)) - np.log(SHARE / (1 - SHARE))  # calibrated for so few
    assert moved(right, SHARE) > 1
    assert abs(moved(right, few)) < 0.3


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 999), st.floats(-8, 8), st.floats(0.05, 0.95))
def test_it_moves_towards_the_share_and_never_beyond(patients, seed, shift, share):
    _, logit = cohort(patients, seed)
    logit = logit + shift
    delta = moved(logit, share)
    before, after = (expit(each).mean() for each in (logit, logit + delta))
    assert min(before, share) - 1e-9 <= after <= max(before, share) + 1e-9
    if before != share:
        assert np.sign(delta) == np.sign(share - before)


def test_the_more_patients_the_further():
    _, logit = cohort(5, 1)
    few, many = moved(logit + 2, SHARE), moved(np.repeat(logit, 20) + 2, SHARE)
    assert many < few < 0


def test_the_order_of_patients_and_the_operating_points_stay():
    _, logit = cohort(20, 3)
    before, after = combination(), adapted(combination(), logit[:, None] - 1.5)
    assert after.thresholds == before.thresholds
    assert (np.argsort(after.probability(logit[:, None])) == np.argsort(logit)).all()


# --- features -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.floats(0.5, 2), st.floats(-5, 5))
def test_features_that_another_laboratory_has_distorted_come_back(seed, gain, shift):
    random = np.random.Generator(np.random.Philox(seed))
    usual = random.normal(size=(50, 6)) * random.uniform(0.8, 1.25, 6) + random.normal(size=6)
    seen = usual * gain ** random.uniform(-1, 1, 6) + shift * random.normal(size=6)
    scale, offset = standardising(describe_rows(seen), describe_rows(usual), 1.0)
    back = seen * scale + offset
    assert back.mean(0) == pytest.approx(usual.mean(0))
    assert back.std(0) == pytest.approx(usual.std(0), rel=0.08)
    scale, offset = standardising(describe_rows(seen), describe_rows(usual), 0.5)
    halfway = seen * scale + offset
    assert halfway.mean(0) == pytest.approx((seen.mean(0) + usual.mean(0)) / 2)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999))
def test_features_stay_as_they_are_at_a_share_of_0_or_where_they_are_as_usual(seed):
    random = np.random.Generator(np.random.Philox(seed))
    own, usual = (describe_rows(random.normal(size=(9, 4))) for _ in range(2))
    for scale, offset in (standardising(own, usual, 0.0), standardising(usual, usual, 1.0)):
        assert scale == pytest.approx(np.ones(4), abs=1e-12)
        assert offset == pytest.approx(np.zeros(4), abs=1e-12)


def test_a_channel_in_which_a_cohort_is_all_the_same_is_not_blown_up():
    cohort, usual = np.array([[0.5, 1.0], [0.5, 3.0]]), np.array([[0.0, 1.0], [2.0, 3.0]])
    scale, offset = standardising(describe_rows(cohort), describe_rows(usual), 1.0)
    assert scale[0] < 25
    assert scale[1] == pytest.approx(1)
    assert cohort * scale + offset == pytest.approx(np.array([[1.0, 1.0], [1.0, 3.0]]))


@pytest.mark.parametrize("hidden", [True, False])
def test_a_head_takes_features_as_if_they_had_been_moved(hidden):
    random = np.random.Generator(np.random.Philox(3))
    one = head(1) if hidden else Head("net/layer", (np.ones((5, 1), np.float32),), (np.ones(1, np.float32),))
    seen, scale, offset = random.normal(size=(7, 5)), random.uniform(0.5, 2, 5), random.normal(size=5)
    said, looked = attend(taking(one, scale, offset), seen)
    expected = attend(one, seen * scale + offset)
    assert said == pytest.approx(expected[0], rel=1e-5)
    assert looked == pytest.approx(expected[1], rel=1e-5)
    assert said != pytest.approx(attend(one, seen)[0], rel=1e-3)
