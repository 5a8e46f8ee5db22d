"""A few local diagnoses recalibrate an ensemble, or are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from test_bundle import make
from test_recalibration import combination

from aplsmear.ensembles.bundle import read_bundle
from aplsmear.ensembles.combination import Combination
from aplsmear.errors import UserError
from aplsmear.prediction.local import ENOUGH, Local, fit_line, read_labels, recalibrated, write_adapted

WANTED = (0.1, 0.9)


def cohort(n: int, seed: int, slope: float = 1.0, intercept: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of patients and their diagnoses; the true logit is slope * logit + intercept."""
    rng = np.random.default_rng(seed)
    while True:
        logit = rng.normal(scale=2.5, size=n)
        label = (rng.random(n) < expit(slope * logit + intercept)).astype(np.int64)
        if min(label.sum(), (1 - label).sum()) >= 2:
            return logit[:, None], label


def local_of(n: int, seed: int, **true: float) -> Local:
    one: Combination = combination()
    return recalibrated(one, *cohort(n, seed, **true), WANTED)


def test_a_shifted_laboratory_is_put_right_and_the_gain_has_an_interval() -> None:
    found = local_of(50, 1, intercept=-3.0)
    assert found.line.intercept == pytest.approx(-3.0, abs=1.0)
    assert found.log_loss.low < found.log_loss.gain < found.log_loss.high
    assert found.is_gain
    assert found.p < 0.001
    assert found.log_loss.gain == pytest.approx(found.log_loss.before - found.log_loss.after)
    p = found.combination.probability(cohort(4000, 2, intercept=-3.0)[0])
    assert p.mean() == pytest.approx(cohort(4000, 2, intercept=-3.0)[1].mean(), abs=0.07)
    assert found.combination.thresholds["sensitive"] <= found.combination.thresholds["balanced"]
    assert found.combination.alarm.patients == found.positive


@pytest.mark.parametrize(("n", "draws"), [(8, 60), (20, 80)])
def test_where_nothing_is_wrong_a_gain_is_claimed_no_oftener_than_its_level_allows(n, draws) -> None:
    assert np.mean([local_of(n, seed).is_gain for seed in range(draws)]) <= 0.05


def test_twenty_patients_are_mostly_enough_to_put_a_large_shift_right() -> None:
    for intercept in (-2.5, 2.5):
        assert np.mean([local_of(20, seed, intercept=intercept).is_gain for seed in range(20)]) > 0.7


def test_a_slope_needs_enough_patients_of_each_diagnosis() -> None:
    few, many = local_of(12, 1, slope=0.3), local_of(80, 1, slope=0.3)
    assert few.line.slope == 1.0
    assert min(many.positive, many.patients - many.positive) >= ENOUGH
    assert many.line.slope < 0.7


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(5, 24))
def test_no_patient_changes_the_line_that_judges_the_same_patient(seed, n) -> None:
    logit, label = cohort(n, seed)
    whole = recalibrated(combination(), logit, label, WANTED)
    line = fit_line(logit[1:, 0], label[1:], min(label.sum(), (1 - label).sum()) >= ENOUGH)
    first = line.slope * logit[0, 0] + line.intercept
    losses = []
    for place in range(n):
        others = np.arange(n) != place
        each = fit_line(logit[others, 0], label[others], min(label.sum(), (1 - label).sum()) >= ENOUGH)
        margin = (2 * label[place] - 1) * (each.slope * logit[place, 0] + each.intercept)
        losses.append(np.logaddexp(0, -margin))
    assert losses[0] == pytest.approx(np.logaddexp(0, -(2 * label[0] - 1) * first))
    assert whole.log_loss.after == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("label", [[0, 1, 1, 0], [0, 0, 0, 0, 0, 1], [1] * 8])
def test_too_few_patients_are_refused(label) -> None:
    logit = np.linspace(-1, 1, len(label))[:, None]
    with pytest.raises(UserError, match="label more patients"):
        recalibrated(combination(), logit, np.array(label), WANTED)


def test_labels_are_read_and_contradictions_refused(tmp_path) -> None:
    path = tmp_path / "known.csv"
    path.write_text("patient;diagnosis\na;APL\nb;aml\na;APL\n")
    assert read_labels(path) == {"a": "apl", "b": "aml"}
    path.write_text("patient,diagnosis\na,apl\na,aml\n")
    with pytest.raises(UserError, match="two diagnoses of a"):
        read_labels(path)
    path.write_text("patient\na\n")
    with pytest.raises(UserError):
        read_labels(path)


def test_the_recalibrated_bundle_is_whole_and_only_its_model_for_new_patients_has_changed(tmp_path) -> None:
    bundle = read_bundle(make(tmp_path))
    before = bundle.combinations[-1]
    logits = np.random.default_rng(3).normal(size=(30, len(before.members)))
    chance = before.probability(logits)
    label = (chance > np.median(chance)).astype(np.int64)
    local = recalibrated(before, logits, label, WANTED)
    write_adapted(tmp_path / "adapted" / "model", bundle, local)
    after = read_bundle(tmp_path / "adapted")
    expected = expit(local.line.slope * before.logit(logits) + local.line.intercept)
    assert after.combinations[-1].probability(logits) == pytest.approx(expected)
    assert after.combinations[-1].alarm.patients == label.sum()
    assert after.combinations[0].thresholds == bundle.combinations[0].thresholds
    assert after.model.adapted["log_loss"]["gain"] == pytest.approx(local.log_loss.gain)
    assert after.model.cell_curve.models == pytest.approx(local.line.slope * bundle.model.cell_curve.models)
