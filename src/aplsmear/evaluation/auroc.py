"""AUROC and average precision; DeLong's intervals and tests, also for cells of the same patients."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats
from sklearn import metrics

from aplsmear.evaluation.columns import Array, Interval, Z, check_columns, codes_of, interval_around


class Comparison(NamedTuple):
    """First score minus second: the difference in AUROC, its two-sided p value and its interval."""

    difference: float
    p: float
    interval: Interval


def auroc(label: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order; a tie counts 1/2.

    Args:
        label: 0 or 1, shape (n,); both classes are needed.
        score: any finite numbers, shape (n,).
    """
    y, s = check_columns(label, score)
    return float(metrics.roc_auc_score(y, s))


def average_precision(label: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """Area under the precision-recall curve as a step function, without interpolation (scikit-learn's)."""
    y, s = check_columns(label, score)
    return float(metrics.average_precision_score(y, s))


def _influence(y: Array, s: Array, fold: npt.NDArray[np.intp] | None = None) -> tuple[float, Array, Array]:
    """AUROC over the pairs within folds; each item's influence on the number of pairs in order; its pairs.

    For one fold, the influences are DeLong's structural components, centred and multiplied by the size of the
    other class. They come from three sets of mid-ranks (Sun & Xu 2014) in O(n log n).
    """
    concordant, pairs = np.zeros(len(y)), np.zeros(len(y))
    for f in range(1 if fold is None else int(fold.max()) + 1):
        here = np.arange(len(y)) if fold is None else np.flatnonzero(fold == f)
        positive, negative = here[y[here] == 1], here[y[here] == 0]
        if len(positive) == 0 or len(negative) == 0:
            continue
        rank = stats.rankdata(s[np.concatenate([positive, negative])])
        m, n = len(positive), len(negative)
        concordant[positive] = rank[:m] - stats.rankdata(s[positive])
        concordant[negative] = m - (rank[m:] - stats.rankdata(s[negative]))
        pairs[positive], pairs[negative] = n, m
    total = pairs[y == 1].sum()
    if total == 0:
        return math.nan, concordant, pairs
    value = float(concordant[y == 1].sum() / total)
    return value, concordant - value * pairs, pairs


def _variance(y: Array, influence: Array, pairs: Array, groups: npt.NDArray[np.intp] | None) -> float:
    """Variance of an AUROC, or of a difference, from influences: DeLong's; with `groups`, Obuchowski's."""
    unit = np.arange(len(y)) if groups is None else groups
    used = pairs > 0
    size = int(unit.max()) + 1
    sums, counts = [], []
    for c in (1, 0):
        mine = used & (y == c)
        sums.append(np.bincount(unit[mine], influence[mine], size))
        counts.append(len(np.unique(unit[mine])))
    if min(counts) < 2:
        raise ValueError(
            f"{counts[0]} positive and {counts[1]} negative patients or items: "
            "the spread of an AUROC needs at least two of each"
        )
    total = len(np.unique(unit[used]))
    square = sum(float(t @ t) * k / (k - 1) for t, k in zip(sums, counts, strict=True))
    cross = 2 * float(sums[0] @ sums[1]) * total / (total - 1)
    return max(0.0, square + cross) / float(pairs[y == 1].sum()) ** 2


def _newcombe_interval(value: float, m: int, n: int) -> tuple[float, float]:
    """Newcombe's score interval of an AUROC of `m` positives and `n` negatives."""
    mean = (m + n) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + mean * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (value - theta) ** 2 - Z**2 * theta * (1 - theta) / (m * n) * spread

    edge = 1e-12
    low = 0.0 if value <= edge else optimize.brentq(excess, 0.0, min(value, 1 - edge))
    high = 1.0 if value >= 1 - edge else optimize.brentq(excess, max(value, edge), 1.0)
    return float(low), float(high)


def delong_interval(
    label: npt.ArrayLike, score: npt.ArrayLike, *, groups: npt.ArrayLike | None = None
) -> Interval:
    """AUROC with DeLong's interval, computed on the logit scale so that it stays within [0, 1].

    Where the estimated variance is zero (AUROC exactly 0 or 1, or all scores equal), DeLong's method gives no
    interval, and the result is the score interval of Newcombe (2006, method 5). At AUROC 1 that interval ends
    at 1, and it starts lower the fewer patients there are.

    Args:
        label: 0 or 1, shape (n,).
        score: any finite numbers, shape (n,).
        groups: the patient of each cell, shape (n,): the variance then takes into account that the cells of
            one patient resemble each other (Obuchowski 1997). None: the items are independent.

    Raises:
        ValueError: fewer than two items (with `groups`: patients) of a class.

    References:
        DeLong, DeLong & Clarke-Pearson, Biometrics 1988;44:837. Sun & Xu, IEEE Signal Process Lett
        2014;21:1389. Obuchowski, Biometrics 1997;53:567. Newcombe, Stat Med 2006;25:559.
    """
    y, s = check_columns(label, score)
    unit = codes_of("groups", groups, len(y))
    value, influence, pairs = _influence(y, s)
    variance = _variance(y, influence, pairs, unit)
    if math.sqrt(variance) < 1e-9:
        patients = np.arange(len(y)) if unit is None else unit
        m, n = (len(np.unique(patients[y == c])) for c in (1, 0))
        low, high = _newcombe_interval(value, m, n)
    else:
        half = Z * math.sqrt(variance) / (value * (1 - value))
        low, high = (float(special.expit(special.logit(value) + side * half)) for side in (-1, 1))
    return interval_around(value, low, high)


def delong_test(
    label: npt.ArrayLike,
    score_a: npt.ArrayLike,
    score_b: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
) -> Comparison:
    """Compare the AUROC of two scores of the same items (DeLong et al. 1988).

    The interval of the difference is Wald's, cut at -1 and 1. Where the variance of the difference is zero
    but the difference is not (say, one score is perfect and the other constant), interval and p value come
    from the intervals of the two scores, taken as independent (Zou & Donner, Stat Med 2008;27:1693): they are
    finite and cautious. For two scores with the same order of items, the difference is 0 and p is 1.

    Args:
        label: 0 or 1, shape (n,).
        score_a: any finite numbers, shape (n,).
        score_b: likewise; its AUROC is subtracted.
        groups: as in `delong_interval`.

    Raises:
        ValueError: fewer than two items (with `groups`: patients) of a class.
    """
    y, a, b = check_columns(label, score_a, score_b)
    unit = codes_of("groups", groups, len(y))
    value_a, influence_a, pairs = _influence(y, a)
    value_b, influence_b, _ = _influence(y, b)
    difference = value_a - value_b
    error = math.sqrt(_variance(y, influence_a - influence_b, pairs, unit))
    if error >= 1e-9:
        low, high = max(-1.0, difference - Z * error), min(1.0, difference + Z * error)
    elif abs(difference) < 1e-12:
        return Comparison(0.0, 1.0, Interval(0.0, 0.0, 0.0))
    else:
        of_a, of_b = (delong_interval(y, score, groups=unit) for score in (a, b))
        low = difference - math.hypot(value_a - of_a.low, of_b.high - value_b)
        high = difference + math.hypot(of_a.high - value_a, value_b - of_b.low)
        error = (difference - low if difference > 0 else high - difference) / Z
    p = float(2 * stats.norm.sf(abs(difference) / error))
    return Comparison(difference, p, interval_around(difference, max(-1.0, low), min(1.0, high)))


def auroc_within_folds(label: npt.ArrayLike, score: npt.ArrayLike, fold: npt.ArrayLike) -> float:
    """AUROC over the (positive, negative) pairs of the same fold; each such pair has the same weight.

    Scores of different folds come from different models, which may have different scales, so pairs of
    different folds are left out. NaN if no fold has both classes.
    """
    y, s = check_columns(label, score, both=False)
    return _influence(y, s, codes_of("fold", fold, len(y)))[0]


def auroc_standard_error(
    label: npt.ArrayLike,
    score: npt.ArrayLike,
    *,
    fold: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
) -> float:
    """DeLong's standard error of `auroc` or, with `fold`, of `auroc_within_folds`; 0 if all are in order.

    Args:
        label: 0 or 1, shape (n,).
        score: any finite numbers, shape (n,).
        fold: of each item, shape (n,). None: all are of one fold.
        groups: as in `delong_interval`.

    Raises:
        ValueError: fewer than two items (with `groups`: patients) of a class have a partner.
    """
    y, s = check_columns(label, score)
    _, influence, pairs = _influence(y, s, codes_of("fold", fold, len(y)))
    return math.sqrt(_variance(y, influence, pairs, codes_of("groups", groups, len(y))))
