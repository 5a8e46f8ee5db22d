"""Columns of labels and scores as checked arrays, and what an interval is.

Every function of this room takes arrays with one entry per item, a patient or a cell. ``label`` is 0 or 1.
``score`` and ``probability`` are higher for items that are more likely positive. Bad input (NaN, a label that
is not 0 or 1, a missing class, a probability outside [0, 1]) raises a ``ValueError`` that lists all problems.
The order of the rows changes no result. Intervals are 95 % intervals.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]

LEVEL = 0.95
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)  # quantiles at the ends of an interval
Z = float(stats.norm.isf((1 - LEVEL) / 2))  # half the width of a normal interval, in standard errors: 1.96


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval, ``low <= value <= high``."""

    value: float
    low: float
    high: float


def interval_around(value: float, low: float, high: float) -> Interval:
    """An interval, widened where needed to contain its value."""
    return Interval(value, min(low, value), max(high, value))


def check_columns(
    label: npt.ArrayLike, *scores: npt.ArrayLike, probability: bool = False, both: bool = True
) -> tuple[Array, ...]:
    """Label and scores as float64 arrays of one length, each of shape (n,).

    Scores must be finite numbers, probabilities lie in [0, 1]; `both`: both classes are needed. Otherwise a
    ValueError lists all problems.
    """
    name = "probability" if probability else "score"
    y, *columns = (np.asarray(column, dtype=np.float64) for column in (label, *scores))
    rules = [("label must be 0 or 1", y, np.isin(y, (0, 1)))]
    problems = []
    for column in columns:
        if column.shape != y.shape:
            problems.append(f"{name} has {len(column)} rows where label has {len(y)}")
        rules.append((f"{name} must be finite", column, np.isfinite(column)))
        if probability:
            rules.append((f"{name} must lie in [0, 1]", column, (column >= 0) & (column <= 1)))
    problems += [f"{rule} ({_rows(~good, values)})" for rule, values, good in rules if not good.all()]
    if both and not problems and len(np.unique(y)) < 2:
        missing = "negative (label 0)" if 1 in y else "positive (label 1)"
        problems.append(f"label has no {missing} item among {len(y)}: both classes are needed")
    if problems:
        raise ValueError("; ".join(problems))
    return y, *columns


def check_call(label: npt.ArrayLike, call: npt.ArrayLike) -> tuple[Array, Array]:
    """Labels and calls as float64 (n,), each 0 or 1; else ValueError."""
    y, c = check_columns(label, call, both=False)
    if not np.isin(c, (0, 1)).all():
        raise ValueError("call must be 0 or 1: compare probabilities with a threshold first")
    return y, c


def _rows(bad: npt.NDArray[np.bool_], values: Array) -> str:
    """The first five bad rows with their values, for a message."""
    where = np.flatnonzero(bad)
    shown = ", ".join(f"row {i}: {values[i]!s}" for i in where[:5])
    return shown + (f" and {len(where) - 5} more" if len(where) > 5 else "")
