"""The promise of an alarm: how often it is kept, and when it is not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from aplsmear.ensembles.promise import alarm, smallest_miss_rate

DRAWS = 2000
POSITIVE = stats.norm(1.0, 1.5)  # logits of positive patients


def kept(patients: int, miss_rate: float, confidence: float, shift: float = 0.0) -> tuple[float, float]:
    """How often new positive patients, shifted by so many logits, are missed no oftener than promised; SE."""
    rng = np.random.default_rng(1)
    promises = [alarm(POSITIVE.rvs(patients, rng), miss_rate, confidence) for _ in range(DRAWS)]
    missed = POSITIVE.cdf([each.threshold - shift for each in promises])
    share = float(np.mean(missed <= [each.miss_rate for each in promises]))
    return share, (confidence * (1 - confidence) / DRAWS) ** 0.5


@pytest.mark.parametrize(
    ("patients", "miss_rate", "confidence"),
    [(22, 0.1, 0.9), (60, 0.1, 0.9), (200, 0.05, 0.95), (20, 0.1, 0.9), (5, 0.1, 0.8)],
    ids=["just enough", "enough", "many", "too few", "five"],
)
def test_on_exchangeable_patients_the_promise_is_kept_as_often_as_promised(
    patients, miss_rate, confidence
) -> None:
    share, error = kept(patients, miss_rate, confidence)
    assert share == pytest.approx(confidence, abs=3.5 * error)


def test_in_another_laboratory_whose_scores_are_lower_the_promise_fails() -> None:
    share, error = kept(60, 0.1, 0.9, shift=-1.0)
    assert share < 0.5 < 0.9 - 3.5 * error


@pytest.mark.parametrize(("patients", "allowed"), [(22, True), (21, False), (20, False), (5, False)])
def test_too_few_patients_get_the_smallest_miss_rate_that_they_allow(patients, allowed) -> None:
    found = alarm(np.linspace(0.2, 0.9, patients), 0.1, 0.9)
    assert (found.miss_rate <= 0.1) == allowed
    assert found.needed == 22
    assert found.threshold == 0.2
    assert found.miss_rate == pytest.approx(smallest_miss_rate(patients, 0.9))
    assert (1 - found.miss_rate) ** patients == pytest.approx(0.1)


PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=80)
RATE = st.floats(0.01, 0.6)
CONFIDENCE = st.floats(0.5, 0.99)


@given(PROBABILITIES, RATE, CONFIDENCE, st.randoms())
def test_the_threshold_is_the_highest_that_keeps_the_promise(values, rate, confidence, random) -> None:
    p = np.array(values)
    found = alarm(p, rate, confidence)
    assert found == alarm(np.array(random.sample(values, len(values))), rate, confidence)
    below = int((p < found.threshold).sum())
    assert stats.binom.cdf(below, len(p), found.miss_rate) <= 1 - confidence + 1e-9
    assert found.miss_rate <= rate + 1e-9 or (below == 0 and len(p) < found.needed)
    one_more = int((p <= found.threshold).sum())  # misses of any higher threshold
    if found.miss_rate <= rate and one_more < len(p):
        assert stats.binom.cdf(one_more, len(p), rate) > 1 - confidence - 1e-9


@given(st.integers(1, 500), CONFIDENCE)
def test_more_patients_allow_a_smaller_miss_rate(patients, confidence) -> None:
    assert smallest_miss_rate(patients + 1, confidence) < smallest_miss_rate(patients, confidence)
