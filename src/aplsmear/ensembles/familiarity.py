"""How far a patient is from the training patients: by features, and by stain.

A patient is described by the mean and the standard deviation of each number over the patient's cells. The
distance is Mahalanobis' (1936) in a small principal subspace, plus the squared residual outside of it, each
divided by its expectation: with far more numbers than patients, the full covariance cannot be estimated. 1 is
the distance that 99 % of the training patients do not exceed, each measured from the patients of the other
folds; above 1, a patient is farther out than they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aplsmear.features.store import Features
from aplsmear.files import rows_of
from aplsmear.images.reading import decode
from aplsmear.images.view_store import View

COMMON = 0.99  # share of the training patients with a distance up to 1 (and with at least `min_items` cells)
_AXES = 10  # of the principal subspace, at most; and at most a quarter of the patients
_MIN_SHARE = 0.05  # of the median scale: a number that hardly varied in training must not decide alone
_MIN_SCALE = 1e-6
_ROWS = 4096  # of features read at once
_WHITE = 256.0  # light behind a smear, as pixel values plus 1


@dataclass(frozen=True)
class Cloud:
    """Where the training patients are."""

    centre: np.ndarray  # float32 (numbers,)
    scale: np.ndarray  # float32 (numbers,): standard deviations
    axes: np.ndarray  # float32 (axes, numbers): principal axes of the standardised numbers
    spread: np.ndarray  # float32 (axes,): standard deviations along them
    rest: float  # mean squared length of the residual outside of the axes; 0: there is none
    limit: float  # the length that becomes a distance of 1

    def distance(self, numbers: np.ndarray) -> float:
        """How far away a patient with these numbers, float (numbers,), is; 1: the limit."""
        standard = (np.asarray(numbers, np.float64) - self.centre) / self.scale
        along = self.axes @ standard
        residual = standard - along @ self.axes
        squared = float(np.mean((along / self.spread) ** 2))
        if self.rest > 0:
            squared += float(residual @ residual) / self.rest
        return float(np.sqrt(squared)) / self.limit


class Mean:
    """Mean of rows that are added part by part."""

    def __init__(self) -> None:
        """Start without rows."""
        self.count = 0
        self._sum: np.ndarray | float = 0.0

    def add(self, rows: np.ndarray) -> None:
        """Add rows, of shape (rows, numbers)."""
        self.count += len(rows)
        self._sum = self._sum + rows.astype(np.float64).sum(0)

    def mean(self) -> np.ndarray:
        """Float64 (numbers,); there must be at least one row."""
        return np.asarray(self._sum / self.count)


class Moments(Mean):
    """Mean and standard deviation of rows that are added part by part."""

    _squares: np.ndarray | float = 0.0

    def add(self, rows: np.ndarray) -> None:
        """Add rows, of shape (rows, numbers)."""
        super().add(rows)
        self._squares = self._squares + (rows.astype(np.float64) ** 2).sum(0)

    def describe(self) -> np.ndarray:
        """Means, then standard deviations: float64 (2 numbers,)."""
        variance = self._squares / self.count - self.mean() ** 2
        return np.concatenate([self.mean(), np.sqrt(np.maximum(variance, 0))])


def make_cloud(patients: np.ndarray, fold: np.ndarray) -> Cloud:
    """The cloud of all patients, float (patients, numbers); its limit comes from held-out patients."""
    distance = np.zeros(len(patients))
    for held_out in np.unique(fold):
        there = fold == held_out
        others = _cloud(patients[~there])
        distance[there] = [others.distance(each) for each in patients[there]]
    return _cloud(patients, limit=max(float(np.quantile(distance, COMMON)), _MIN_SCALE))


def stain_of(view: View) -> np.ndarray:
    """Means and standard deviations of the optical densities of red, green and blue: float64 (6,)."""
    density = -np.log10((np.arange(256) + 1) / _WHITE)
    pixels = density[decode(view.image).reshape(-1, 3)]
    return np.concatenate([pixels.mean(0), pixels.std(0)])


def describe_features(features: Features, owner: Mapping[str, str]) -> dict[str, np.ndarray]:
    """`Moments.describe` of the plain views of each patient, by patient, sorted.

    `owner` has the patient of each item; other items are left out.
    """
    rows = pd.DataFrame({"patient": features.index["item"].map(owner), "view": features.index["view"]})
    plain = rows[(rows["view"] == 0) & rows["patient"].notna()]
    found = {}
    for patient, places in sorted(plain.groupby("patient").indices.items()):
        moments, mine = Moments(), plain.index.to_numpy()[places]
        for start in range(0, len(mine), _ROWS):
            moments.add(rows_of(features.values, mine[start : start + _ROWS]))
        found[str(patient)] = moments.describe()
    return found


def describe_stain(batches: Iterable[list[View]], owner: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The mean of `stain_of` over plain views, as in `describe_features`."""
    moments: dict[str, Moments] = {}
    for batch in batches:
        for view in batch:
            if view.view == 0 and view.item in owner:
                moments.setdefault(owner[view.item], Moments()).add(stain_of(view)[None])
    return {patient: each.mean() for patient, each in sorted(moments.items())}


def how_stained(cloud: Cloud, numbers: np.ndarray) -> str:
    """How a stain (of `stain_of`) differs from the centre of a cloud, in words, such as ``darker, bluer``."""
    red, green, blue = ((np.asarray(numbers) - cloud.centre) / cloud.scale)[:3]
    words = []
    level = (red + green + blue) / 3
    if abs(level) > 1:
        words.append("darker" if level > 0 else "paler")
    if abs(red - blue) > 1:
        words.append("bluer" if red > blue else "redder or yellower")
    return ", ".join(words)


def _cloud(patients: np.ndarray, limit: float = 1.0) -> Cloud:
    """The cloud of these patients, float (patients, numbers), with a given limit."""
    centre, scale = patients.mean(0), patients.std(0)
    scale = np.maximum(scale, max(_MIN_SHARE * float(np.median(scale)), _MIN_SCALE))
    standard = (patients - centre) / scale
    _, lengths, axes = np.linalg.svd(standard, full_matrices=False)
    shown = max(1, min(_AXES, len(patients) // 4, len(lengths)))
    variances = lengths**2 / max(len(patients) - 1, 1)
    return Cloud(
        centre=centre.astype(np.float32),
        scale=scale.astype(np.float32),
        axes=axes[:shown].astype(np.float32),
        spread=np.sqrt(np.maximum(variances[:shown], _MIN_SCALE)).astype(np.float32),
        rest=float(variances[shown:].sum()),
        limit=limit,
    )
