"""A cohort with shifted logits is corrected by its own scores; a calibrated cohort hardly changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn import metrics

from aplsmear.ensembles.combination import Combination, Weights
from aplsmear.ensembles.promise import Alarm
from aplsmear.prediction.recalibration import adapted, shift_of

SHARE = 0.3


def cohort(patients: int, seed: int, share: float = SHARE) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and logits that are calibrated for a share of positives of 0.3 (normal, AUROC 0.92)."""
    random = np.random.Generator(np.random.Philox(seed))
    label = (random.random(patients) < share).astype(int)
    apart = 4.0
    logit = np.log(SHARE / (1 - SHARE)) + apart * (label - 0.5) + apart**0.5 * random.normal(size=patients)
    return label, logit


def combination() -> Combination:
    """One member whose logit is used unchanged."""
    weights = Weights(np.zeros(1), np.ones(1), np.zeros((1, 0)), np.zeros(0), np.ones(1), 0.0)
    return Combination(
        ("a",),
        "mean",
        weights,
        1.0,
        0.0,
        {"balanced": SHARE, "sensitive": 0.1},
        Alarm(0.1, 0.1, 0.9, 0.1, 22),
    )


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
            accuracy = metrics.balanced_accuracy_score(label, probability >= SHARE)
            found[name].append((accuracy, metrics.brier_score_loss(label, probability)))
    return {name: tuple(np.mean(values, axis=0)) for name, values in found.items()}


@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_a_cohort_with_shifted_logits_is_corrected(shift):
    found = simulated(shift, 40)
    right = simulated(0.0, 40)["before"]
    assert found["before"][0] < right[0] - 0.05
    assert found["after"][0] > right[0] - 0.03
    assert found["after"][1] < right[1] + 0.015 < found["before"][1]


@pytest.mark.parametrize("patients", [12, 40])
def test_a_calibrated_cohort_hardly_changes(patients):
    found = simulated(0.0, patients)
    assert found["after"][0] > found["before"][0] - 0.01
    assert found["after"][1] < found["before"][1] + 0.005


def test_another_share_of_positives_gives_a_wrong_shift_unless_the_share_is_given():
    few = 0.05
    _, logit = cohort(400, 1, share=few)
    right = logit + np.log(few / (1 - few)) - np.log(SHARE / (1 - SHARE))  # calibrated for so few
    assert shift_of(right, SHARE) > 1
    assert abs(shift_of(right, few)) < 0.3


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 999), st.floats(-8, 8), st.floats(0.05, 0.95))
def test_the_shift_goes_towards_the_share_and_never_beyond(patients, seed, shift, share):
    _, logit = cohort(patients, seed)
    logit = logit + shift
    delta = shift_of(logit, share)
    before, after = (expit(each).mean() for each in (logit, logit + delta))
    assert min(before, share) - 1e-9 <= after <= max(before, share) + 1e-9
    if before != share:
        assert np.sign(delta) == np.sign(share - before)


def test_more_patients_give_a_larger_shift():
    _, logit = cohort(5, 1)
    few, many = shift_of(logit + 2, SHARE), shift_of(np.repeat(logit, 20) + 2, SHARE)
    assert many < few < 0


def test_a_cohort_whose_probabilities_are_all_near_1_is_shifted_back():
    """A strong change of colours gave 16 patients a mean probability of 1.00; they were shifted by -0.2."""
    _, logit = cohort(16, 1)
    shifts = [shift_of(logit + far, SHARE) for far in (8.0, 9.0, 10.0, 11.0)]
    assert np.all(np.diff(shifts) < 0), "a cohort that is further away is shifted further"
    assert shifts[-1] < -8


def test_the_order_of_patients_and_the_operating_points_do_not_change():
    _, logit = cohort(20, 3)
    before, after = combination(), adapted(combination(), logit[:, None] - 1.5)
    assert after.thresholds == before.thresholds
    assert (np.argsort(after.probability(logit[:, None])) == np.argsort(logit)).all()
