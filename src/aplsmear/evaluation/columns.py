"""Columns of labels and scores as checked arrays, and what an interval is.

Every function of this room takes arrays with one entry per item: a patient, or a cell (``groups`` then holds
its patient). ``label`` is 0 or 1. ``score`` and ``probability`` are higher for items that are more likely
positive. Bad input (NaN, a label that is not 0 or 1, a missing class, a probability outside [0, 1]) raises a
``ValueError`` that lists all problems. The order of the rows changes no result. Intervals are 95 % intervals.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]

LEVEL = 0.95
Z = float(stats.norm.isf((1 - LEVEL) / 2))
"""Half the width of a two-sided normal interval in standard errors: 1.96."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval, ``low <= value <= high``."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """``{"value": ..., "low": ..., "high": ...}``, as in intervals.json."""
        return asdict(self)


def interval_around(value: float, low: float, high: float) -> Interval:
    """An interval, widened where needed to contain its value."""
    return Interval(value, min(low, value), max(high, value))


def describe_rows(bad: npt.NDArray[np.bool_], values: npt.NDArray[Any]) -> str:
    """The first five bad rows with their values, for a message; ``bad`` and ``values`` have shape (n,)."""
    where = np.flatnonzero(bad)
    shown = ", ".join(f"row {i}: {values[i]!s}" for i in where[:5])
    return shown + (f" and {len(where) - 5} more" if len(where) > 5 else "")


def check_columns(
    label: npt.ArrayLike, *scores: npt.ArrayLike, probability: bool = False, both: bool = True
) -> tuple[Array, ...]:
    """Label and scores as float64 arrays of one length, each of shape (n,).

    Args:
        label: 0 or 1.
        scores: one or more columns of finite numbers.
        probability: whether the scores must lie in [0, 1].
        both: whether both classes are needed.

    Raises:
        ValueError: the columns are not so; the message lists all problems.
    """
    problems: list[str] = []
    name = "probability" if probability else "score"
    y = _as_floats("label", label, problems)
    columns = [_as_floats(name, score, problems) for score in scores]
    if not problems:
        if any(len(column) != len(y) for column in columns):
            lengths = ", ".join(str(len(column)) for column in columns)
            problems.append(f"{name} has {lengths} rows where label has {len(y)}: give one of each per item")
        binary = (y == 0) | (y == 1)
        if not binary.all():
            problems.append(f"label must be 0 or 1 ({describe_rows(~binary, y)})")
        elif both and y.min() == y.max():
            missing = "positive (label 1)" if y[0] == 0 else "negative (label 0)"
            problems.append(f"label has no {missing} item among {len(y)}: both classes are needed")
        for column in columns if probability else ():
            outside = (column < 0) | (column > 1)
            if outside.any():
                problems.append(f"probability must lie in [0, 1] ({describe_rows(outside, column)})")
    if problems:
        raise ValueError("; ".join(problems))
    return y, *columns


def check_call(label: npt.ArrayLike, call: npt.ArrayLike) -> Array:
    """Calls as float64 (n,), each 0 or 1, one per label.

    Raises:
        ValueError: some are not; the message names the rows.
    """
    _, c = check_columns(label, call, both=False)
    binary = np.isin(c, (0, 1))
    if not binary.all():
        raise ValueError(
            f"call must be 0 or 1 ({describe_rows(~binary, c)}); compare probabilities with a threshold first"
        )
    return c


def codes_of(name: str, values: npt.ArrayLike | None, n: int) -> npt.NDArray[np.intp] | None:
    """Whole numbers 0, 1, ... for the distinct values (patients, folds) in their sorted order, shape (n,).

    Args:
        name: of the column, for messages.
        values: text or numbers, shape (n,). None: there is no such column, and the result is None, too.
        n: number of items.

    Raises:
        ValueError: there are more or fewer values than items, or some are missing.
    """
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (n,):
        raise ValueError(
            f"{name} has shape {array.shape} where label has {n} rows: give one of each per item"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} must not be missing ({describe_rows(~np.isfinite(array), array)})")
    if array.dtype.kind == "O":
        missing = np.array([not isinstance(value, str | int | np.integer) for value in array])
        if missing.any():
            raise ValueError(f"{name} must be text or whole numbers ({describe_rows(missing, array)})")
    return np.unique(array, return_inverse=True)[1]


def _as_floats(name: str, values: npt.ArrayLike, problems: list[str]) -> Array:
    """A column as float64 (n,); its problems are appended to `problems`."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        problems.append(f"{name} must be numbers, not {np.asarray(values).dtype}")
        return np.zeros(0)
    if array.ndim != 1 or array.size == 0:
        problems.append(f"{name} must be a non-empty list of numbers, not an array of shape {array.shape}")
    elif not np.isfinite(array).all():
        problems.append(f"{name} must be finite ({describe_rows(~np.isfinite(array), array)})")
    return array
