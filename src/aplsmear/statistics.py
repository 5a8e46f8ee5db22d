"""What a set of scores is worth: discrimination, calibration and operating points, each with its interval.

Every function takes plain arrays with one entry per item (a patient, or a cell where ``groups`` names the
patients), ``label`` 0 or 1 and ``score`` or ``probability`` where higher means more likely positive, and
returns plain Python numbers. Results do not depend on the order of the rows, and a bootstrap's on nothing
else but its ``seed``. Bad input (NaN, a label that is not 0 or 1, a missing class, a probability outside [0,
1]) raises ``ValueError`` with all that is wrong.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats
from sklearn import metrics

from aplsmear.files import whole

Array = npt.NDArray[np.float64]
Statistic = Callable[[Array, Array], float]

MIN_SENSITIVITY = 0.95
PROBABILITY_CLIP = 1e-6
"""Probabilities are kept this far from 0 and 1 before their logit is taken."""
_CHUNK = 1_000_000
"""Entries of a weight matrix held at once, so that memory does not grow with the data set."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval, ``low <= value <= high``."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """``{"value": ..., "low": ..., "high": ...}``, as intervals.json holds it."""
        return asdict(self)


class Comparison(NamedTuple):
    """First score minus second: the difference in AUROC, its two-sided p value and its interval."""

    difference: float
    p: float
    interval: Interval


class Calibration(NamedTuple):
    """Cox's recalibration line ``logit P(label = 1) = intercept + slope * logit(probability)``."""

    slope: float
    intercept: float


# --- input ------------------------------------------------------------------------------------


def _rows(bad: npt.NDArray[np.bool_], values: npt.NDArray[Any]) -> str:
    where = np.flatnonzero(bad)
    shown = ", ".join(f"row {i}: {values[i]!s}" for i in where[:5])
    return shown + (f" and {len(where) - 5} more" if len(where) > 5 else "")


def _floats(name: str, values: npt.ArrayLike, problems: list[str]) -> Array:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        problems.append(f"{name} must be numbers, not {np.asarray(values).dtype}")
        return np.zeros(0)
    if array.ndim != 1 or array.size == 0:
        problems.append(f"{name} must be a non-empty list of numbers, not an array of shape {array.shape}")
    elif not np.isfinite(array).all():
        problems.append(f"{name} must be finite ({_rows(~np.isfinite(array), array)})")
    return array


def check_columns(
    label: npt.ArrayLike, *scores: npt.ArrayLike, probability: bool = False, both: bool = True
) -> tuple[Array, ...]:
    """Label and scores as float64 arrays of one length (n,), or a ``ValueError`` with all that is wrong.

    ``probability`` asks for values within [0, 1], ``both`` for at least one item of either class.
    """
    problems: list[str] = []
    name = "probability" if probability else "score"
    y = _floats("label", label, problems)
    columns = [_floats(name, score, problems) for score in scores]
    if not problems:
        if any(len(column) != len(y) for column in columns):
            lengths = ", ".join(str(len(column)) for column in columns)
            problems.append(f"{name} has {lengths} rows where label has {len(y)}: give one of each per item")
        binary = (y == 0) | (y == 1)
        if not binary.all():
            problems.append(f"label must be 0 or 1 ({_rows(~binary, y)})")
        elif both and y.min() == y.max():
            missing = "positive (label 1)" if y[0] == 0 else "negative (label 0)"
            problems.append(f"label has no {missing} item among {len(y)}: both classes are needed")
        for column in columns if probability else ():
            outside = (column < 0) | (column > 1)
            if outside.any():
                problems.append(f"probability must lie in [0, 1] ({_rows(outside, column)})")
    if problems:
        raise ValueError("; ".join(problems))
    return y, *columns


def _codes(name: str, values: npt.ArrayLike | None, n: int) -> npt.NDArray[np.intp] | None:
    """Whole numbers 0, 1, ... for the distinct values (patients, folds) in their sorted order."""
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (n,):
        raise ValueError(
            f"{name} has shape {array.shape} where label has {n} rows: give one of each per item"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} must not be missing ({_rows(~np.isfinite(array), array)})")
    if array.dtype.kind == "O":
        missing = np.array([not isinstance(value, str | int | np.integer) for value in array])
        if missing.any():
            raise ValueError(f"{name} must be text or whole numbers ({_rows(missing, array)})")
    return np.unique(array, return_inverse=True)[1]


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    return float(stats.norm.isf((1 - level) / 2))


# --- discrimination ---------------------------------------------------------------------------


def auroc(label: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties count 1/2.

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
    """AUROC over pairs within folds, each item's influence on the concordance count, and its number of pairs.

    For one fold the influences are DeLong's structural components, centred and times the other class's size;
    they come from three sets of mid-ranks (Sun & Xu 2014) in O(n log n).
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
    """Variance of an AUROC (or of a difference) from influences: DeLong's, with ``groups`` Obuchowski's."""
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


def _newcombe_interval(value: float, m: int, n: int, z: float) -> tuple[float, float]:
    mean = (m + n) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + mean * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (value - theta) ** 2 - z**2 * theta * (1 - theta) / (m * n) * spread

    edge = 1e-12
    low = 0.0 if value <= edge else optimize.brentq(excess, 0.0, min(value, 1 - edge))
    high = 1.0 if value >= 1 - edge else optimize.brentq(excess, max(value, edge), 1.0)
    return float(low), float(high)


def delong_interval(
    label: npt.ArrayLike, score: npt.ArrayLike, level: float = 0.95, *, groups: npt.ArrayLike | None = None
) -> Interval:
    """AUROC with DeLong's interval, taken on the logit scale so that it stays within [0, 1].

    With ``groups`` (the patient of each cell, shape (n,)) the variance allows for cells of one patient being
    alike (Obuchowski 1997). Where the estimated variance is zero (AUROC exactly 0 or 1, or all scores alike)
    DeLong's method says nothing, and the score interval of Newcombe (2006, method 5) is given: at AUROC 1 it
    ends at 1 and begins the further below the fewer patients there are.

    Raises:
        ValueError: fewer than two items (with ``groups``: patients) of a class.

    References:
        DeLong, DeLong & Clarke-Pearson, Biometrics 1988;44:837. Sun & Xu, IEEE Signal Process Lett
        2014;21:1389. Obuchowski, Biometrics 1997;53:567. Newcombe, Stat Med 2006;25:559.
    """
    y, s = check_columns(label, score)
    z = _z(level)
    unit = _codes("groups", groups, len(y))
    value, influence, pairs = _influence(y, s)
    variance = _variance(y, influence, pairs, unit)
    if math.sqrt(variance) < 1e-9:
        patients = np.arange(len(y)) if unit is None else unit
        m, n = (len(np.unique(patients[y == c])) for c in (1, 0))
        low, high = _newcombe_interval(value, m, n, z)
    else:
        half = z * math.sqrt(variance) / (value * (1 - value))
        low, high = (float(special.expit(special.logit(value) + side * half)) for side in (-1, 1))
    return _holding(value, low, high)


def delong_test(
    label: npt.ArrayLike,
    score_a: npt.ArrayLike,
    score_b: npt.ArrayLike,
    level: float = 0.95,
    *,
    groups: npt.ArrayLike | None = None,
) -> Comparison:
    """Compare the AUROC of two scores of the same items (DeLong et al. 1988; see `delong_interval`).

    The interval of the difference (a minus b) is Wald's, cut at -1 and 1. Where the variance of the
    difference is zero and the difference is not (say, one score perfect, the other constant), interval and p
    value come from the two scores' own intervals, taken as independent (Zou & Donner, Stat Med 2008;27:1693):
    finite and cautious. Two scores that order the items alike differ by 0 with p = 1.
    """
    y, a, b = check_columns(label, score_a, score_b)
    z = _z(level)
    unit = _codes("groups", groups, len(y))
    value_a, influence_a, pairs = _influence(y, a)
    value_b, influence_b, _ = _influence(y, b)
    difference = value_a - value_b
    error = math.sqrt(_variance(y, influence_a - influence_b, pairs, unit))
    if error >= 1e-9:
        low, high = max(-1.0, difference - z * error), min(1.0, difference + z * error)
    elif abs(difference) < 1e-12:
        return Comparison(0.0, 1.0, Interval(0.0, 0.0, 0.0))
    else:
        of_a, of_b = (delong_interval(y, score, level, groups=unit) for score in (a, b))
        low = difference - math.hypot(value_a - of_a.low, of_b.high - value_b)
        high = difference + math.hypot(of_a.high - value_a, value_b - of_b.low)
        error = (difference - low if difference > 0 else high - difference) / z
    p = float(2 * stats.norm.sf(abs(difference) / error))
    return Comparison(difference, p, _holding(difference, max(-1.0, low), min(1.0, high)))


def auroc_within_folds(label: npt.ArrayLike, score: npt.ArrayLike, fold: npt.ArrayLike) -> float:
    """AUROC over the (positive, negative) pairs that share a fold, each such pair counting the same.

    Scores of different folds come from different models and need not share a scale, so pairs across folds are
    left out. NaN where no fold has both classes.
    """
    y, s = check_columns(label, score, both=False)
    return _influence(y, s, _codes("fold", fold, len(y)))[0]


def auroc_standard_error(
    label: npt.ArrayLike,
    score: npt.ArrayLike,
    *,
    fold: npt.ArrayLike | None = None,
    groups: npt.ArrayLike | None = None,
) -> float:
    """DeLong's standard error of `auroc`, or with ``fold`` of `auroc_within_folds`.

    It is 0 where every pair is in order.
    With ``groups`` (the patient of each cell) the error allows for cells of one patient being alike.

    Raises:
        ValueError: fewer than two items (with ``groups``: patients) of a class have a partner.
    """
    y, s = check_columns(label, score)
    _, influence, pairs = _influence(y, s, _codes("fold", fold, len(y)))
    return math.sqrt(_variance(y, influence, pairs, _codes("groups", groups, len(y))))


def standard_error_of_folds(values: Sequence[float]) -> float:
    """Standard error of the mean of one value per fold; NaN (a fold with one class only) is left out."""
    known = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    if len(known) < 2:
        raise ValueError(
            f"{len(known)} of {len(values)} folds have a value: a standard error needs at least two"
        )
    return float(known.std(ddof=1) / math.sqrt(len(known)))


# --- calls ------------------------------------------------------------------------------------


def call_at(probability: npt.ArrayLike, threshold: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """1 where ``probability >= threshold`` (one threshold, or one per item), else 0; shape (n,), int64."""
    problems: list[str] = []
    p = _floats("probability", probability, problems)
    t = _floats("threshold", np.atleast_1d(np.asarray(threshold)), problems)
    if not problems and len(t) not in (1, len(p)):
        problems.append(f"threshold has {len(t)} rows where probability has {len(p)}")
    if problems:
        raise ValueError("; ".join(problems))
    return (p >= t).astype(np.int64)


def sensitivity(label: npt.ArrayLike, probability: npt.ArrayLike, threshold: npt.ArrayLike = 0.5) -> float:
    """Share of the positives with ``probability >= threshold``; calls 0/1 serve as probability too."""
    y, p = check_columns(label, probability)
    return float(call_at(p, threshold)[y == 1].mean())


def specificity(label: npt.ArrayLike, probability: npt.ArrayLike, threshold: npt.ArrayLike = 0.5) -> float:
    """Share of the negatives with ``probability < threshold``; calls 0/1 serve as probability too."""
    y, p = check_columns(label, probability)
    return float(1 - call_at(p, threshold)[y == 0].mean())


def balanced_accuracy(
    label: npt.ArrayLike, probability: npt.ArrayLike, threshold: npt.ArrayLike = 0.5
) -> float:
    """Mean of sensitivity and specificity."""
    return (sensitivity(label, probability, threshold) + specificity(label, probability, threshold)) / 2


def wilson_interval(successes: int, total: int, level: float = 0.95) -> Interval:
    """A proportion with Wilson's score interval (JASA 1927;22:209), which has a width at 0 and 1 too."""
    _z(level)
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} of {total} is not a proportion")
    ends = stats.binomtest(int(successes), int(total)).proportion_ci(level, method="wilson")
    return _holding(successes / total, float(ends.low), float(ends.high))


def operating_points(label: npt.ArrayLike, probability: npt.ArrayLike) -> dict[str, float]:
    """Two thresholds, for ``call_at``, chosen on the items given - never give it held-out ones.

    - ``balanced`` maximises Youden's J (sensitivity + specificity - 1). Among equals it takes the widest gap
      between neighbouring probabilities, then the lowest: a missed APL weighs more than a false alarm.
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


# --- calibration ------------------------------------------------------------------------------


def brier(label: npt.ArrayLike, probability: npt.ArrayLike) -> float:
    """Mean squared distance of the probability from the label, 0 (best) to 1 (Brier 1950)."""
    y, p = check_columns(label, probability, probability=True, both=False)
    return float(np.mean((p - y) ** 2))


def calibration_slope_intercept(label: npt.ArrayLike, probability: npt.ArrayLike) -> Calibration:
    """Cox's calibration slope and intercept: the logistic regression of the label on logit(probability).

    Ideal are slope 1 and intercept 0; a slope below 1 means overconfident probabilities. The regression
    carries Firth's penalty, which takes away the small-sample bias of maximum likelihood and keeps both
    numbers finite under perfect separation: a slope far above 1 then says that the probabilities are more
    cautious than these items warrant. Probabilities are clipped to [1e-6, 1 - 1e-6]. Where all probabilities
    are alike no slope exists; it is given as 0, with the log odds of the label (half an item added to each
    class) as intercept.

    References:
        Cox, Biometrika 1958;45:562. Firth, Biometrika 1993;80:27. Heinze & Schemper, Stat Med 2002;21:2409.
    """
    y, p = check_columns(label, probability, probability=True)
    slope, intercept = _calibration_replicates(y, p, np.ones((1, len(y))))
    return Calibration(float(slope[0]), float(intercept[0]))


def _calibration_replicates(y: Array, p: Array, weight: Array) -> tuple[Array, Array]:
    """Slope and intercept for each row of frequency weights (b, n): Newton's method on all rows at once.

    With power sums S, T, Q of z over the weights times v = chance (1 - chance) and its first two derivatives,
    the penalty is half the logarithm of S0 S2 - S1^2, and so are its gradient and Hessian in closed form.
    """
    x = special.logit(np.clip(p, PROBABILITY_CLIP, 1 - PROBABILITY_CLIP))
    centre, scale = x.mean(), x.std()
    z = (x - centre) / scale if scale > 1e-9 else np.zeros_like(x)
    power = np.stack([z**k for k in range(5)], axis=1)
    total = weight.sum(axis=1)
    sums = weight @ power[:, :3]
    varied = sums[:, 2] / total - (sums[:, 1] / total) ** 2 > 1e-9
    positive = weight @ y
    coefficient = np.stack([special.logit((positive + 0.5) / (total + 1)), np.zeros(len(weight))], axis=1)
    active = np.flatnonzero(varied)
    k = np.arange(2)
    pair = k[:, None] + k
    for _ in range(5000):  # a score of them, but where the likelihood is almost flat
        if not len(active):
            break
        w = weight[active]
        chance = special.expit(coefficient[active, :1] + coefficient[active, 1:] * z)
        v = chance * (1 - chance)
        weighted = w * v
        s = weighted @ power[:, :3]
        t = (weighted * (1 - 2 * chance)) @ power[:, :4]
        q = (weighted * (1 - 6 * v)) @ power
        score = (w * (y - chance)) @ power[:, :2]

        s0, s1, s2 = (s[:, i, None] for i in range(3))
        determinant = s0 * s2 - s1**2
        first = (t[:, k] * s2 + s0 * t[:, k + 2] - 2 * s1 * t[:, k + 1]) / determinant
        second = (
            q[:, pair] * s2[..., None] + s0[..., None] * q[:, pair + 2] - 2 * s1[..., None] * q[:, pair + 1]
        )
        mixed = t[:, k, None] * t[:, None, k + 2]
        second += mixed + mixed.transpose(0, 2, 1) - 2 * t[:, k + 1, None] * t[:, None, k + 1]
        fisher = s[:, pair]
        curvature = fisher - second / (2 * determinant[..., None]) + first[:, :, None] * first[:, None] / 2
        convex = (curvature[:, 0, 0] > 0) & (np.linalg.det(curvature) > 1e-9 * determinant[:, 0])
        curvature = np.where(convex[:, None, None], curvature, fisher)
        step = np.linalg.solve(curvature, (score + first / 2)[..., None])[..., 0]
        size = np.abs(step).max(axis=1)
        step /= np.maximum(size / 8, 1)[:, None]
        # Full steps go in circles for one resample in 10,000: each is halved until it does not lead down.
        start = _penalised_likelihood(coefficient[active], z, y, w)
        down = np.arange(len(active))
        for _ in range(40):
            there = _penalised_likelihood(coefficient[active[down]] + step[down], z, y, w[down])
            down = down[there < start[down] - 1e-9]
            if not len(down):
                break
            step[down] /= 2
        coefficient[active] += step
        active = active[size > 1e-8]
    else:
        raise ArithmeticError(f"the calibration line of {len(active)} resamples did not settle in 5000 steps")
    slope = coefficient[:, 1] / (scale if scale > 1e-9 else 1.0)
    return slope, coefficient[:, 0] - slope * centre


def _penalised_likelihood(coefficient: Array, z: Array, y: Array, weight: Array) -> Array:
    """Log-likelihood of each row's line (b, 2) plus Firth's penalty, shape (b,)."""
    line = coefficient[:, :1] + coefficient[:, 1:] * z
    chance = special.expit(line)
    v = weight * chance * (1 - chance)
    determinant = v.sum(axis=1) * (v @ z**2) - (v @ z) ** 2
    likelihood = (weight * (y * line - np.logaddexp(0, line))).sum(axis=1)
    return np.asarray(likelihood + 0.5 * np.log(np.maximum(determinant, 1e-300)))


# --- bootstrap --------------------------------------------------------------------------------


def _ratio(above: Array, below: Array) -> Array:
    quotient = np.full(above.shape, np.nan)
    np.divide(above, below, out=quotient, where=below > 0)
    return quotient


def _curve(y: Array, s: Array, weight: Array) -> tuple[Array, Array]:
    """Weight of the positives and the negatives at each distinct score, the highest first; both (b, k)."""
    order = np.argsort(-s, kind="stable")
    start = np.flatnonzero(np.diff(s[order], prepend=np.inf))
    w = weight[:, order]
    positive = w * y[order]
    return np.add.reduceat(positive, start, axis=1), np.add.reduceat(w - positive, start, axis=1)


def _auroc_replicates(y: Array, s: Array, weight: Array) -> Array:
    positive, negative = _curve(y, s, weight)
    above = positive.cumsum(axis=1) - positive / 2
    total = positive.sum(axis=1) * negative.sum(axis=1)
    return _ratio((above * negative).sum(axis=1), total)


def _average_precision_replicates(y: Array, s: Array, weight: Array) -> Array:
    positive, negative = _curve(y, s, weight)
    caught = positive.cumsum(axis=1)
    precision = np.nan_to_num(_ratio(caught, caught + negative.cumsum(axis=1)))
    return _ratio((positive * precision).sum(axis=1), positive.sum(axis=1))


def _brier_replicates(y: Array, p: Array, weight: Array) -> Array:
    return _ratio(weight @ (p - y) ** 2, weight.sum(axis=1))


def _sensitivity_replicates(y: Array, p: Array, weight: Array) -> Array:
    return _ratio(weight @ (y * (p >= 0.5)), weight @ y)


def _specificity_replicates(y: Array, p: Array, weight: Array) -> Array:
    return _ratio(weight @ ((1 - y) * (p < 0.5)), weight @ (1 - y))


def _balanced_accuracy_replicates(y: Array, p: Array, weight: Array) -> Array:
    return (_sensitivity_replicates(y, p, weight) + _specificity_replicates(y, p, weight)) / 2


_FAST: dict[Statistic, Callable[[Array, Array, Array], Array]] = {
    auroc: _auroc_replicates,
    average_precision: _average_precision_replicates,
    brier: _brier_replicates,
    sensitivity: _sensitivity_replicates,
    specificity: _specificity_replicates,
    balanced_accuracy: _balanced_accuracy_replicates,
}


def _replicates(statistic: Statistic, y: Array, s: Array, weight: Array) -> Array:
    """The statistic of each resample, NaN where one lacks a class."""
    if statistic in _FAST:
        return _FAST[statistic](y, s, weight)
    values = np.full(len(weight), np.nan)
    for i, count in enumerate(weight.astype(np.intp)):
        rows = np.repeat(np.arange(len(y)), count)
        if 0 < y[rows].sum() < len(rows):
            values[i] = statistic(y[rows], s[rows])
    return values


def _resamples(y: Array, groups: npt.NDArray[np.intp] | None, resamples: int, seed: int) -> Iterator[Array]:
    """How often each item is drawn: arrays (b, n), ``resamples`` rows in all.

    Items (with ``groups``: whole patients) are drawn with replacement within two strata, with and without a
    positive. Counts instead of drawn rows let every metric share the draws, and be computed for many at once.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, not {resamples}")
    unit = np.arange(len(y)) if groups is None else groups
    has_positive = np.bincount(unit, y) > 0
    has_negative = np.bincount(unit, 1 - y) > 0
    if min(has_positive.sum(), has_negative.sum()) < 2:
        raise ValueError(
            f"{has_positive.sum()} patients or items with a positive and {has_negative.sum()} with a "
            "negative: a bootstrap needs at least two of each"
        )
    strata = [np.flatnonzero(has_positive == flag) for flag in (True, False)]
    rng = np.random.Generator(np.random.Philox(seed))
    chunk = max(1, _CHUNK // len(y))
    for begin in range(0, resamples, chunk):
        b = min(chunk, resamples - begin)
        counts = np.zeros((b, len(has_positive)))
        for members in strata:
            k = len(members)
            if k:
                drawn = rng.integers(0, k, (b, k)) + k * np.arange(b)[:, None]
                counts[:, members] = np.bincount(drawn.ravel(), minlength=b * k).reshape(b, k)
        yield counts if groups is None else counts[:, unit]


def _holding(value: float, low: float, high: float) -> Interval:
    return Interval(value, min(low, value), max(high, value))


def _percentiles(value: float, replicates: Sequence[Array], level: float) -> Interval:
    _z(level)
    drawn = np.concatenate(replicates)
    known = drawn[~np.isnan(drawn)]
    if 2 * len(known) < len(drawn):
        raise ValueError(
            f"{len(drawn) - len(known)} of {len(drawn)} resamples lack a class: "
            "too few patients for a bootstrap"
        )
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return _holding(value, float(low), float(high))


def bootstrap_interval(
    statistic: Statistic,
    label: npt.ArrayLike,
    score: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int,
) -> Interval:
    """Percentile bootstrap interval of ``statistic(label, score)``, stratified by class (Efron 1979).

    With ``groups`` (the patient of each cell, shape (n,)) whole patients are drawn, stratified by whether
    they have a positive; without, every item stands for itself. The metrics of this module run vectorised
    (2,000 resamples of 1,300 patients in 0.2 s), any other callable once a resample. Resamples of patients
    that lack a class are left out; more than half of them is an error. The interval is widened to hold the
    value, should the bootstrap's bias put it outside.

    A statistic at the end of its scale (no error at all) has no spread to resample, and its interval no
    width: use `delong_interval` and `wilson_interval` where they apply.
    """
    y, s = check_columns(label, score)
    return _bootstrap(statistic, y, [s], groups, resamples=resamples, level=level, seed=seed)


def roc_band(
    label: npt.ArrayLike,
    score: npt.ArrayLike,
    fpr: npt.ArrayLike,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int,
) -> tuple[Array, Array]:
    """Pointwise percentile band of the ROC curve over stratified bootstrap resamples.

    Args:
        label: 0 or 1, shape (n,).
        score: any finite numbers, shape (n,).
        fpr: where on the axis 1 - specificity, shape (k,).
        resamples, level, seed: as in `bootstrap_interval`.

    Returns:
        The ends of the band of the sensitivity, each of shape (k,).
    """
    y, s = check_columns(label, score)
    z = np.asarray(fpr, dtype=np.float64)
    order = np.lexsort([s, y])
    y, s = y[order], s[order]
    drawn = []
    for weight in _resamples(y, None, resamples, seed):
        for positive, negative in zip(*_curve(y, s, weight), strict=True):
            tpr, alarms = positive.cumsum() / positive.sum(), negative.cumsum() / negative.sum()
            # The highest sensitivity among thresholds with as few alarms.
            place = np.searchsorted(alarms, z + 1e-12, side="right") - 1
            drawn.append(np.where(place >= 0, tpr[place], 0.0))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def paired_bootstrap_difference(
    statistic: Statistic,
    label: npt.ArrayLike,
    score_a: npt.ArrayLike,
    score_b: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int,
) -> Interval:
    """``statistic(label, score_a) - statistic(label, score_b)``, both taken on the same resamples.

    Otherwise as `bootstrap_interval`.
    """
    y, a, b = check_columns(label, score_a, score_b)
    return _bootstrap(statistic, y, [a, b], groups, resamples=resamples, level=level, seed=seed)


def _bootstrap(
    statistic: Statistic,
    y: Array,
    scores: list[Array],
    groups: npt.ArrayLike | None,
    *,
    resamples: int,
    level: float,
    seed: int,
) -> Interval:
    unit = _codes("groups", groups, len(y))
    order = np.lexsort([*scores, y] if unit is None else [*scores, y, unit])
    y, scores = y[order], [score[order] for score in scores]
    unit = None if unit is None else unit[order]
    values = [float(statistic(y, score)) for score in scores]
    drawn = []
    for weight in _resamples(y, unit, resamples, seed):
        each = [_replicates(statistic, y, score, weight) for score in scores]
        drawn.append(each[0] if len(each) == 1 else each[0] - each[1])
    return _percentiles(values[0] if len(values) == 1 else values[0] - values[1], drawn, level)


# --- the record -------------------------------------------------------------------------------


def summary(
    label: npt.ArrayLike,
    probability: npt.ArrayLike,
    call: npt.ArrayLike,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int,
) -> dict[str, Any]:
    """Everything that intervals.json says about held-out patients, as nested dicts of plain numbers.

    Args:
        label: 0 or 1, shape (n,); at least two patients of each class.
        probability: calibrated, in [0, 1], shape (n,).
        call: 0 or 1 for each patient, shape (n,) (each outer fold has its own threshold, see `call_at`), or
            one threshold for all.
        resamples, level, seed: of the bootstrap, see `bootstrap_interval`.

    Returns:
        ``n_patients``, ``n_positive``, and ``{value, low, high}`` for ``auroc`` (DeLong), ``sensitivity`` and
        ``specificity`` (Wilson), ``balanced_accuracy`` (from these two: Zou & Donner, Stat Med 2008;27:1693),
        ``average_precision``, ``brier``, ``calibration_slope`` and ``calibration_intercept`` (bootstrap over
        patients). The first four keep an honest width where no error was seen; a bootstrap would have none.
    """
    y, p = check_columns(label, probability, probability=True)
    if np.ndim(call) == 0:
        c = call_at(p, call).astype(np.float64)
    else:
        _, c = check_columns(y, call)
        if not np.isin(c, (0, 1)).all():
            raise ValueError(
                f"call must be 0 or 1 for each patient ({_rows(~np.isin(c, (0, 1)), c)}); "
                "turn thresholds into calls with call_at"
            )
    order = np.lexsort([c, p, y])
    y, p, c = y[order], p[order], c[order]

    discrimination = delong_interval(y, p, level)
    positives = int(y.sum())
    negatives = len(y) - positives
    found = wilson_interval(int(c[y == 1].sum()), positives, level)
    spared = wilson_interval(int((1 - c[y == 0]).sum()), negatives, level)
    balanced = (found.value + spared.value) / 2
    slope, intercept = calibration_slope_intercept(y, p)

    draws: dict[str, list[Array]] = {
        "average_precision": [],
        "brier": [],
        "calibration_slope": [],
        "calibration_intercept": [],
    }
    for weight in _resamples(y, None, resamples, seed):
        draws["average_precision"].append(_average_precision_replicates(y, p, weight))
        draws["brier"].append(_brier_replicates(y, p, weight))
        slopes, intercepts = _calibration_replicates(y, p, weight)
        draws["calibration_slope"].append(slopes)
        draws["calibration_intercept"].append(intercepts)
    values = {
        "average_precision": average_precision(y, p),
        "brier": brier(y, p),
        "calibration_slope": slope,
        "calibration_intercept": intercept,
    }
    intervals = {name: _percentiles(values[name], draws[name], level) for name in draws}
    intervals |= {
        "auroc": discrimination,
        "sensitivity": found,
        "specificity": spared,
        "balanced_accuracy": _holding(
            balanced,
            balanced - math.hypot(found.value - found.low, spared.value - spared.low) / 2,
            balanced + math.hypot(found.high - found.value, spared.high - spared.value) / 2,
        ),
    }
    record: dict[str, Any] = {name: interval.as_dict() for name, interval in intervals.items()}
    return record | {"n_patients": len(y), "n_positive": positives}


def headline(record: Mapping[str, Any]) -> dict[str, Any]:
    """What fits a table of runs: of each ``{value, low, high}`` the value, of ``auroc`` all three.

    Groups of further numbers, such as those of a second operating point, are left out.
    """
    short = {name: item for name, item in record.items() if not isinstance(item, Mapping) or "value" in item}
    return {
        name: item["value"] if isinstance(item, Mapping) and name != "auroc" else item
        for name, item in short.items()
    }


def round_floats(obj: Any, digits: int = 6) -> Any:
    """A copy of nested dicts and lists as JSON can hold them, floats rounded to ``digits`` decimals.

    NumPy numbers and arrays become plain ones and tuples lists, so that equal results give equal bytes.

    Raises:
        ValueError: NaN or infinite numbers, each named by its key (``auroc.low``).
        TypeError: a value JSON has no form for, or a key that is not text.
    """
    infinite: list[str] = []

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            value = value.tolist()
        if isinstance(value, Mapping):
            for name in value:
                if not isinstance(name, str):
                    raise TypeError(f"the key {name!r} under {key or 'the top'} must be text")
            return {name: plain(item, f"{key}.{name}" if key else name) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, float):
            if not math.isfinite(value):
                infinite.append(f"{key or 'the value'} is {value}")
            return round(value, digits) + 0.0  # no negative zero
        if value is None or isinstance(value, bool | int | str):
            return value
        raise TypeError(f"{key or 'the value'} is a {type(value).__name__}, which JSON cannot hold")

    result = plain(obj, "")
    if infinite:
        raise ValueError("numbers must be finite: " + "; ".join(infinite))
    return result


def write_json(path: Path, obj: Any, digits: int = 6) -> None:
    """Write `round_floats` of ``obj`` with sorted keys; a reader finds the old file or the new one, whole."""
    text = json.dumps(
        round_floats(obj, digits), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False
    )
    with whole(path) as part:
        part.write_text(text + "\n", encoding="utf-8", newline="\n")
