"""Thresholds, and how often the calls that they make are right."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from aplsmear.evaluation.columns import LEVEL, Interval, check_call, check_columns, interval_around

MIN_SENSITIVITY = 0.95


def rates(label: npt.ArrayLike, call: npt.ArrayLike) -> dict[str, dict[str, float]]:
    """``{value, low, high}`` of ``sensitivity``, ``specificity`` (Wilson) and ``balanced_accuracy``, their
    mean.

    Labels (both classes) and calls are 0 or 1, shape (n,). Intervals have a width even where no error was
    seen.
    """
    y, c = check_call(label, call)
    a = wilson_interval(int(c[y == 1].sum()), int(y.sum()))
    b = wilson_interval(int((1 - c)[y == 0].sum()), int((1 - y).sum()))
    found = {"sensitivity": a, "specificity": b, "balanced_accuracy": mean_proportion([a, b])}
    return {name: interval._asdict() for name, interval in found.items()}


def wilson_interval(successes: int, total: int) -> Interval:
    """A proportion with Wilson's score interval (JASA 1927;22:209), which has a width at 0 and 1, too."""
    ends = stats.binomtest(successes, total).proportion_ci(LEVEL, method="wilson")
    return interval_around(successes / total, float(ends.low), float(ends.high))


def mean_proportion(each: Sequence[Interval]) -> Interval:
    """The mean of independent proportions with its interval (Zou & Donner, Stat Med 2008;27:1693)."""
    value = float(np.mean([one.value for one in each]))
    low = value - math.hypot(*(one.value - one.low for one in each)) / len(each)
    high = value + math.hypot(*(one.high - one.value for one in each)) / len(each)
    return interval_around(value, low, high)


def operating_points(label: npt.ArrayLike, probability: npt.ArrayLike) -> dict[str, float]:
    """Two thresholds, chosen on the items given. Never give held-out items.

    - ``balanced`` has the highest Youden's J (sensitivity + specificity - 1). Among equals it takes the
      widest gap between neighbouring probabilities, then the lowest: a missed APL is worse than a false
      alarm.
    - ``sensitive`` has the highest specificity with a sensitivity of at least 0.95, and among equals the
      highest sensitivity.

    Each threshold lies in the middle of its gap (below the lowest probability: between it and 0), so that a
    small shift of the scores changes no call.
    """
    y, p = check_columns(label, probability, probability=True)
    edge, index = np.unique(p, return_inverse=True)
    # Entry i: calls of threshold edge[i], in whole numbers so that equals are equal.
    caught = np.bincount(index, y)[::-1].cumsum()[::-1].astype(np.int64)
    alarms = np.bincount(index, 1 - y)[::-1].cumsum()[::-1].astype(np.int64)
    positives, negatives = int(caught[0]), int(alarms[0])
    below = np.concatenate([[0.0], edge[:-1]])
    middle = (below + edge) / 2
    middle = np.where(middle > below, middle, edge)  # neighbours one bit apart have no middle

    youden = caught * negatives - alarms * positives
    best = np.flatnonzero(youden == youden.max())
    balanced = best[np.argmax((edge - below)[best])]
    enough = np.flatnonzero(caught >= MIN_SENSITIVITY * positives)
    sensitive = enough[np.argmin(alarms[enough])]
    return {"balanced": float(middle[balanced]), "sensitive": float(middle[sensitive])}
