"""Thresholds, the calls that they make, and how often the calls are right."""

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from aplsmear.evaluation.columns import LEVEL, Interval, check_columns, interval_around

MIN_SENSITIVITY = 0.95


def sensitivity(label: npt.ArrayLike, probability: npt.ArrayLike, threshold: float = 0.5) -> float:
    """Share of the positives with ``probability >= threshold``; calls 0/1 can stand for probabilities."""
    y, p = check_columns(label, probability)
    return float((p >= threshold)[y == 1].mean())


def specificity(label: npt.ArrayLike, probability: npt.ArrayLike, threshold: float = 0.5) -> float:
    """Share of the negatives with ``probability < threshold``; calls 0/1 can stand for probabilities."""
    y, p = check_columns(label, probability)
    return float(1 - (p >= threshold)[y == 0].mean())


def balanced_accuracy(label: npt.ArrayLike, probability: npt.ArrayLike, threshold: float = 0.5) -> float:
    """Mean of sensitivity and specificity."""
    return (sensitivity(label, probability, threshold) + specificity(label, probability, threshold)) / 2


def wilson_interval(successes: int, total: int) -> Interval:
    """A proportion with Wilson's score interval (JASA 1927;22:209), which has a width at 0 and 1, too.

    Raises:
        ValueError: this is not a proportion.
    """
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} of {total} is not a proportion")
    ends = stats.binomtest(int(successes), int(total)).proportion_ci(LEVEL, method="wilson")
    return interval_around(successes / total, float(ends.low), float(ends.high))


def mean_interval(a: Interval, b: Interval) -> Interval:
    """The mean of two independent estimates, such as sensitivity and specificity.

    The interval follows from the two intervals (Zou & Donner, Stat Med 2008;27:1693).
    """
    value = (a.value + b.value) / 2
    low = value - math.hypot(a.value - a.low, b.value - b.low) / 2
    high = value + math.hypot(a.high - a.value, b.high - b.value) / 2
    return interval_around(value, low, high)


def operating_points(label: npt.ArrayLike, probability: npt.ArrayLike) -> dict[str, float]:
    """Two thresholds, chosen on the items given. Never give held-out items.

    - ``balanced`` has the highest Youden's J (sensitivity + specificity - 1). Among equals it takes the
    widest
      gap between neighbouring probabilities, then the lowest: a missed APL is worse than a false alarm.
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
