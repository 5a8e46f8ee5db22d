"""Columns of labels and scores: checked, turned into arrays; what an interval is.

Every function of this room takes plain arrays with one entry per item (a patient, or a cell where ``groups``
names the patients), ``label`` 0 or 1 and ``score`` or ``probability`` where higher means more likely
positive. Bad input (NaN, a label that is not 0 or 1, a missing class, a probability outside [0, 1]) raises
``ValueError`` with all that is wrong. Results do not depend on the order of the rows.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]


Statistic = Callable[[Array, Array], float]


PROBABILITY_CLIP = 1e-6
"""Probabilities are kept this far from 0 and 1 before their logit is taken."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval, ``low <= value <= high``."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """``{"value": ..., "low": ..., "high": ...}``, as intervals.json holds it."""
        return asdict(self)


def describe_rows(bad: npt.NDArray[np.bool_], values: npt.NDArray[Any]) -> str:
    """The first five bad rows with their values, as a message shows them; ``bad`` and ``values`` (n,)."""
    where = np.flatnonzero(bad)
    shown = ", ".join(f"row {i}: {values[i]!s}" for i in where[:5])
    return shown + (f" and {len(where) - 5} more" if len(where) > 5 else "")


def as_floats(name: str, values: npt.ArrayLike, problems: list[str]) -> Array:
    """A column as float64 (n,); what is wrong with it is appended to ``problems``."""
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


def check_columns(
    label: npt.ArrayLike, *scores: npt.ArrayLike, probability: bool = False, both: bool = True
) -> tuple[Array, ...]:
    """Label and scores as float64 arrays of one length (n,), or a ``ValueError`` with all that is wrong.

    ``probability`` asks for values within [0, 1], ``both`` for at least one item of either class.
    """
    problems: list[str] = []
    name = "probability" if probability else "score"
    y = as_floats("label", label, problems)
    columns = [as_floats(name, score, problems) for score in scores]
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


def codes_of(name: str, values: npt.ArrayLike | None, n: int) -> npt.NDArray[np.intp] | None:
    """Whole numbers 0, 1, ... for the distinct values (patients, folds) in their sorted order."""
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


def normal_quantile(level: float) -> float:
    """Half the width of a two-sided normal interval in standard errors, 1.96 for a level of 0.95."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    return float(stats.norm.isf((1 - level) / 2))


def interval_around(value: float, low: float, high: float) -> Interval:
    """An interval, widened where needed to hold its value."""
    return Interval(value, min(low, value), max(high, value))
