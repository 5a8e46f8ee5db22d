"""AUROC and average precision; DeLong's intervals and tests."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats
from sklearn import metrics

from aplsmear.evaluation.columns import Array, Interval, Z, check_columns, interval_around


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
    return float(metrics.roc_auc_score(*check_columns(label, score)))


def average_precision(label: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """Area under the precision-recall curve as a step function, without interpolation (scikit-learn's)."""
    return float(metrics.average_precision_score(*check_columns(label, score)))


def delong_interval(label: npt.ArrayLike, score: npt.ArrayLike) -> Interval:
    """AUROC with DeLong's interval, computed on the logit scale so that it stays within [0, 1].

    Where the estimated variance is zero (AUROC exactly 0 or 1, or all scores equal), the result is the score
    interval of Newcombe (Stat Med 2006;25:559, method 5). At AUROC 1 it ends at 1, and it starts lower the
    fewer patients there are. The arguments are as for `auroc`, with at least two items of each class (else
    ValueError). DeLong, DeLong & Clarke-Pearson, Biometrics 1988;44:837; Sun & Xu, IEEE Signal Process Lett
    2014;21:1389.
    """
    y, s = check_columns(label, score)
    value, influence, pairs = _influence(y, s)
    error = _standard_error(y, influence, pairs)
    if error < 1e-9:
        low, high = _newcombe_interval(value, int(y.sum()), int((1 - y).sum()))
    else:
        half = Z * error / (value * (1 - value))
        low, high = (float(special.expit(special.logit(value) + side * half)) for side in (-1, 1))
    return interval_around(value, low, high)


def delong_test(label: npt.ArrayLike, score_a: npt.ArrayLike, score_b: npt.ArrayLike) -> Comparison:
    """Compare the AUROC of two scores of the same items (DeLong et al. 1988): the first minus the second.

    The interval of the difference is Wald's, cut at -1 and 1. Where the variance of the difference is zero
    but the difference is not (one score is perfect and the other constant), interval and p value come from
    the intervals of the two scores, taken as independent (Zou & Donner, Stat Med 2008;27:1693): they are
    finite and cautious. For two scores with the same order of items, the difference is 0 and p is 1. Each
    class needs two items (else ValueError).
    """
    y, a, b = check_columns(label, score_a, score_b)
    value_a, influence_a, pairs = _influence(y, a)
    value_b, influence_b, _ = _influence(y, b)
    difference = value_a - value_b
    error = _standard_error(y, influence_a - influence_b, pairs)
    if error >= 1e-9:
        low, high = difference - Z * error, difference + Z * error
    elif abs(difference) < 1e-12:
        return Comparison(0.0, 1.0, Interval(0.0, 0.0, 0.0))
    else:
        of_a, of_b = (delong_interval(y, score) for score in (a, b))
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
    return _influence(y, s, np.asarray(fold))[0]


def auroc_standard_error(
    label: npt.ArrayLike, score: npt.ArrayLike, *, fold: npt.ArrayLike | None = None
) -> float:
    """DeLong's standard error of `auroc` or, with `fold`, of `auroc_within_folds`; 0 if all are in order.

    Raises ValueError if fewer than two items of a class have a partner of the other class.
    """
    y, s = check_columns(label, score)
    _, influence, pairs = _influence(y, s, None if fold is None else np.asarray(fold))
    return _standard_error(y, influence, pairs)


def _influence(y: Array, s: Array, fold: np.ndarray | None = None) -> tuple[float, Array, Array]:
    """AUROC over the pairs within folds; each item's influence on the number of pairs in order; its pairs.

    For one fold, the influences are DeLong's structural components, centred and multiplied by the size of the
    other class. They come from three sets of mid-ranks (Sun & Xu 2014) in O(n log n).
    """
    fold = np.zeros(len(y)) if fold is None else fold
    concordant, pairs = np.zeros(len(y)), np.zeros(len(y))
    for each in np.unique(fold):
        positive, negative = (np.flatnonzero((fold == each) & (y == c)) for c in (1, 0))
        m, n = len(positive), len(negative)
        if m and n:
            rank = stats.rankdata(s[np.concatenate([positive, negative])])
            concordant[positive] = rank[:m] - stats.rankdata(s[positive])
            concordant[negative] = m - (rank[m:] - stats.rankdata(s[negative]))
            pairs[positive], pairs[negative] = n, m
    total = pairs[y == 1].sum()
    value = float(concordant[y == 1].sum() / total) if total else math.nan
    return value, concordant - value * pairs, pairs


def _standard_error(y: Array, influence: Array, pairs: Array) -> float:
    """DeLong's standard error of an AUROC, or of a difference, from influences."""
    square = 0.0
    for c in (1, 0):
        mine = influence[(pairs > 0) & (y == c)]
        if len(mine) < 2:
            raise ValueError(
                f"{len(mine)} {'positive' if c else 'negative'} patients or items: "
                "the spread of an AUROC needs at least two of each"
            )
        square += float(mine @ mine) * len(mine) / (len(mine) - 1)
    return math.sqrt(square) / float(pairs[y == 1].sum())


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
