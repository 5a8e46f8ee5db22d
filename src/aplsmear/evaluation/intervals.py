"""95 % intervals over patients by the bootstrap, and all measures of one set of probabilities.

A result depends on the rows and the ``seed``, never on the order of the rows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from aplsmear.evaluation.auroc import auroc, average_precision, delong_interval
from aplsmear.evaluation.calibration import calibration_replicates, calibration_slope_intercept
from aplsmear.evaluation.columns import ENDS, Array, Interval, check_columns, interval_around

_CHUNK = 1_000_000  # entries of a weight matrix in memory: it does not grow with the data set

Statistic = Callable[[Array, Array], float]


def bootstrap_interval(
    statistic: Statistic,
    label: npt.ArrayLike,
    score: npt.ArrayLike,
    minus: npt.ArrayLike | None = None,
    *,
    groups: npt.ArrayLike | None = None,
    resamples: int = 2000,
    seed: int,
) -> Interval:
    """Percentile bootstrap interval of ``statistic(label, score)``, stratified by class (Efron 1979).

    All resamples are computed at once (2,000 resamples of 1,300 patients in 0.2 s). Resamples of patients
    that lack a class are left out. A statistic at the end of its scale (no error at all) has no spread to
    resample: its interval has no width. Use `delong_interval` there.

    Args:
        statistic: `auroc` or `average_precision`.
        label: 0 or 1, shape (n,).
        score: any finite numbers, shape (n,).
        minus: a second score of the same items: the interval is that of the difference between the two.
        groups: the patient of each cell, shape (n,): whole patients are then drawn, stratified by whether
            they have a positive cell. None: the items are drawn.
        resamples: how many.
        seed: of the draws.

    Raises ValueError: fewer than two patients of a class, or more than half of the resamples lack a class.
    """
    y, *scores = check_columns(label, score, *([] if minus is None else [minus]))
    unit = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    order = np.lexsort([*scores, y] if unit is None else [*scores, y, unit])
    y, scores = y[order], [each[order] for each in scores]
    unit = None if unit is None else unit[order]
    values = [float(statistic(y, each)) for each in scores]
    drawn = []
    for weight in _resamples(y, unit, resamples, seed):
        first, *second = (_REPLICATES[statistic](y, each, weight) for each in scores)
        drawn.append(first - second[0] if second else first)
    return _percentiles(values[0] - sum(values[1:]), drawn)


def roc_band_table(
    label: npt.ArrayLike, score: npt.ArrayLike, resamples: int, seed: int, points: int = 101
) -> pd.DataFrame:
    """Pointwise percentile band of the ROC curve over stratified bootstrap resamples: ``fpr, low, high``.

    The arguments are as for `bootstrap_interval`; `points` are evenly spaced places of 1 - specificity.
    """
    y, s = check_columns(label, score)
    fpr = np.linspace(0, 1, points)
    order = np.lexsort([s, y])
    y, s = y[order], s[order]
    drawn = []
    for weight in _resamples(y, None, resamples, seed):
        for positive, negative in zip(*_curve(y, s, weight), strict=True):
            tpr, alarms = positive.cumsum() / positive.sum(), negative.cumsum() / negative.sum()
            # The highest sensitivity among the thresholds with as few false alarms.
            place = np.searchsorted(alarms, fpr + 1e-12, side="right") - 1
            drawn.append(np.where(place >= 0, tpr[place], 0.0))
    low, high = np.quantile(drawn, ENDS, axis=0)
    return pd.DataFrame({"fpr": fpr, "low": low, "high": high})


def summary(
    label: npt.ArrayLike, probability: npt.ArrayLike, *, resamples: int = 2000, seed: int
) -> dict[str, Any]:
    """The measures of held-out, calibrated probabilities, for intervals.json.

    These are ``n_patients``, ``n_positive``, and ``{value, low, high}`` of ``auroc`` (DeLong),
    ``average_precision``, ``brier`` (mean squared difference of probability and label, 0 is best; Brier
    1950), ``calibration_slope`` and ``calibration_intercept`` (bootstrap over patients, two or more of each
    class). The interval of ``auroc`` has a width even where no error was seen; a bootstrap would give none.
    """
    y, p = check_columns(label, probability, probability=True)
    order = np.lexsort([p, y])
    y, p = y[order], p[order]
    slope, intercept = calibration_slope_intercept(y, p)
    error = (p - y) ** 2
    drawn: dict[str, list[Array]] = defaultdict(list)
    for weight in _resamples(y, None, resamples, seed):
        drawn["average_precision"].append(_average_precision_replicates(y, p, weight))
        drawn["brier"].append(weight @ error / weight.sum(axis=1))
        slopes, intercepts = calibration_replicates(y, p, weight)
        drawn["calibration_slope"].append(slopes)
        drawn["calibration_intercept"].append(intercepts)
    values = (average_precision(y, p), float(error.mean()), slope, intercept)
    found = {name: _percentiles(value, drawn[name]) for name, value in zip(drawn, values, strict=True)}
    found["auroc"] = delong_interval(y, p)
    counts = {"n_patients": len(y), "n_positive": int(y.sum())}
    return {name: interval._asdict() for name, interval in found.items()} | counts


def headline(measures: Mapping[str, Any]) -> dict[str, Any]:
    """The measures that fit into a table of runs: of ``auroc`` value, low and high, of all others the value.

    Groups of further measures, such as those of a second operating point, are left out.
    """
    short = {}
    for name, item in measures.items():
        if not isinstance(item, Mapping) or name == "auroc":
            short[name] = item
        elif "value" in item:
            short[name] = item["value"]
    return short


def _resamples(y: Array, groups: npt.NDArray[np.intp] | None, resamples: int, seed: int) -> Iterator[Array]:
    """How often each item is drawn: arrays (b, n), `resamples` rows in all.

    Items (with `groups`: whole patients) are drawn with replacement in two strata, with and without a
    positive. With counts instead of drawn rows, all measures share the draws and can be computed for many
    resamples at once.
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


def _percentiles(value: float, replicates: Sequence[Array]) -> Interval:
    """The interval of a value from its replicates, widened where needed to contain the value."""
    drawn = np.concatenate(replicates)
    known = drawn[~np.isnan(drawn)]
    if 2 * len(known) < len(drawn):
        raise ValueError(
            f"{len(drawn) - len(known)} of {len(drawn)} resamples lack a class: "
            "too few patients for a bootstrap"
        )
    low, high = np.quantile(known, ENDS)
    return interval_around(value, float(low), float(high))


def _auroc_replicates(y: Array, s: Array, weight: Array) -> Array:
    """AUROC of each resample, shape (b,); NaN where one lacks a class."""
    positive, negative = _curve(y, s, weight)
    above = positive.cumsum(axis=1) - positive / 2
    total = positive.sum(axis=1) * negative.sum(axis=1)
    return _ratio((above * negative).sum(axis=1), total)


def _average_precision_replicates(y: Array, s: Array, weight: Array) -> Array:
    """Average precision of each resample, shape (b,); NaN where one lacks positives."""
    positive, negative = _curve(y, s, weight)
    caught = positive.cumsum(axis=1)
    precision = np.nan_to_num(_ratio(caught, caught + negative.cumsum(axis=1)))
    return _ratio((positive * precision).sum(axis=1), positive.sum(axis=1))


def _curve(y: Array, s: Array, weight: Array) -> tuple[Array, Array]:
    """Weight of the positives and of the negatives at each distinct score, the highest first; both (b, k)."""
    order = np.argsort(-s, kind="stable")
    start = np.flatnonzero(np.diff(s[order], prepend=np.inf))
    w = weight[:, order]
    positive = w * y[order]
    return np.add.reduceat(positive, start, axis=1), np.add.reduceat(w - positive, start, axis=1)


def _ratio(above: Array, below: Array) -> Array:
    """The quotient; NaN where the denominator is 0."""
    quotient = np.full(above.shape, np.nan)
    np.divide(above, below, out=quotient, where=below > 0)
    return quotient


_REPLICATES: dict[Statistic, Callable[[Array, Array, Array], Array]] = {
    auroc: _auroc_replicates,
    average_precision: _average_precision_replicates,
}
