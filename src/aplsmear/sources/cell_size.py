"""Estimate the diameter of a typical nucleated cell in px, from pictures of which nothing is known.

Two sources are combined:

1. A red cell is a ruler: it has 7 to 8 micrometres on every smear, and a nucleated cell about twice as much.
2. At the right size, a search finds the same boxes as at a slightly smaller or larger size. If the size is
   too small, each lobe of a nucleus becomes a cell. If it is too large, neighbours become one cell.

The cells are searched at a ladder of sizes. The size is taken whose boxes agree best with those of its
neighbours, that fits the red cells, and that fits the boxes themselves. If these do not decide,
`Estimate.doubts` says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from skimage.feature import peak_local_max

from aplsmear.data.boxes import overlaps
from aplsmear.sources.cell_finder import MIN_SIZE, find_cells, nucleated_parts, scaled
from aplsmear.tables import BOX

_OVERVIEW = 1024  # px of the longer side on which the first lengths are measured
_STEP = 1.2  # ratio of two sizes that follow each other on the ladder
_PER_RED = 2.0  # diameter of a typical nucleated cell over that of a red cell
_RED_RANGE = (1.6, 4.2)  # sizes that are tried, in diameters of a red cell; below, platelets are large enough
_RANGE = (0.6, 4.5)  # the same, in diameters of the basophilic parts, if there is no ruler
_FEW_RED = 8  # parts; fewer are no ruler
_RED_SPREAD = 0.35  # standard deviation of the logarithm of size over red cell
_FILL = 0.9  # side of the median box over the size, where the size is right
_FILL_SPREAD = 0.5  # standard deviation of its logarithm
_ACROSS = 12  # sizes; the side of the central part of a large picture that is searched
_SAME = 0.5  # intersection over union of two boxes of the same cell
_FEW = 5  # cells; a size that rests on fewer is doubtful
_WEIGHT = 8  # exponent of the agreement: near 1, small differences matter
_NO_CELL = 0.4  # agreement below which the boxes of all sizes are platelets and dirt
_LEAST = 0.9  # side of the median box over the diameter of a red cell; below, the boxes hold platelets
_AGREE = 0.8  # agreement below which a size is doubtful
_UNLIKE = 1.5  # times smaller or larger than the red cells suggest: doubtful
_RIVAL = 1.5  # ratio of another size that agrees as well, above which the size is doubtful

Boxes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Lengths:
    """Diameters in px of the round parts of one picture; `shape` is (height, width) of the picture."""

    nuclei: Floats
    red: Floats
    shape: tuple[int, int]


@dataclass(frozen=True)
class Estimate:
    """The estimated size of a cell.

    `candidates` has a row for each size that was tried: `size`, `cells`, `side` (of the median box, px) and
    `agreement` (F1 of its boxes with those of the neighbouring sizes, 0 to 1).
    """

    size: float | None  # px; None if there is no cell: no two sizes find the same
    red: float | None  # diameter of a red cell in px; None if too few were found
    candidates: pd.DataFrame
    doubts: tuple[str, ...]  # why the size may be wrong, in words


def lengths(image: npt.NDArray[np.uint8]) -> Lengths:
    """Diameters of the round parts of a picture (uint8 RGB), measured without a size.

    The diameter of a part is twice the distance from its centre to its edge.
    """
    small, (scale, _) = scaled(image, min(1.0, _OVERVIEW / max(image.shape[:2])))
    nuclei, others = nucleated_parts(small)
    return Lengths(_diameters(nuclei) * scale, _diameters(others) * scale, image.shape[:2])


def _diameters(mask: npt.NDArray[np.bool_]) -> Floats:
    far = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1].astype(np.float32)
    spots = peak_local_max(far, min_distance=3, threshold_abs=2.0)
    return np.asarray(2 * far[tuple(spots.T)], np.float32)


def ladder(measured: Sequence[Lengths]) -> list[float]:
    """The sizes in px at which cells are searched, in ascending order; none if nothing is stained."""
    nuclei = _typical([one.nuclei for one in measured])
    if nuclei is None:
        return []
    red = ruler(measured)
    low, high = (red * x for x in _RED_RANGE) if red else (nuclei * x for x in _RANGE)
    low, high = max(low, MIN_SIZE), min(high, 2.0 * max(max(one.shape) for one in measured))
    steps = math.ceil(math.log(max(high / low, 1.0)) / math.log(_STEP)) + 1
    return [round(low * _STEP**step, 1) for step in range(steps)]


def ruler(measured: Sequence[Lengths]) -> float | None:
    """Diameter in px of a typical red cell; None if there are too few."""
    red = [one.red for one in measured]
    return _typical(red) if sum(map(len, red)) >= _FEW_RED else None


def _typical(diameters: Sequence[Floats]) -> float | None:
    """The median by area, because specks are many and small; None if there are none."""
    ordered = np.sort(np.concatenate([np.zeros(0, np.float32), *diameters]))
    if not len(ordered):
        return None
    weight = np.cumsum(ordered**2)
    return float(ordered[np.searchsorted(weight, weight[-1] / 2)])


def boxes_at(image: npt.NDArray[np.uint8], sizes: Sequence[float]) -> list[Boxes]:
    """The boxes in px of the cells in the central part of a picture, at each size."""
    if not sizes:
        return []
    side = math.ceil(_ACROSS * sizes[len(sizes) // 2])
    top, left = (max((length - side) // 2, 0) for length in image.shape[:2])
    part = image[top : top + side, left : left + side]
    shift = np.array([top, left, top, left])
    return [find_cells(part, size)[list(BOX)].to_numpy(dtype=np.int64) + shift for size in sizes]


def choose(sizes: Sequence[float], measured: Sequence[Lengths], found: Sequence[Sequence[Boxes]]) -> Estimate:
    """The size of the `ladder` that fits best, by `lengths` and `boxes_at` of each picture."""
    red = ruler(measured)
    counts = np.array([sum(len(boxes[k]) for boxes in found) for k in range(len(sizes))], int)
    pairs = [_agreement([boxes[k : k + 2] for boxes in found]) for k in range(len(sizes) - 1)]
    both = [np.mean(pairs[max(k - 1, 0) : k + 1]) for k in range(len(sizes))]
    sides = [_median_side([boxes[k] for boxes in found]) for k in range(len(sizes))]
    table = pd.DataFrame({"size": sizes, "cells": counts, "side": sides, "agreement": both}, dtype=float)
    table = table.astype({"cells": int}).round(3)
    seen = table["agreement"] > _NO_CELL
    if red:
        seen &= table["side"] > _LEAST * red
    if not seen.any():
        return Estimate(None, red, table, ())
    fit = table["agreement"] ** _WEIGHT * seen * _near(table["side"] / table["size"], _FILL, _FILL_SPREAD)
    if red:
        fit = fit * _near(table["size"] / red, _PER_RED, _RED_SPREAD)
    place = int(fit.round(6).argmax())
    near = slice(max(place - 1, 0), place + 2)  # the best size lies between those of the ladder
    size = float(np.exp(np.average(np.log(table["size"][near]), weights=fit[near] ** 4)))
    return Estimate(round(size, 1), red, table, tuple(_doubts(table.iloc[place], table, red)))


def _near(ratio: pd.Series, expected: float, spread: float) -> pd.Series:
    """1 where a ratio is as expected, less where its logarithm is further away; a normal curve."""
    logs = np.log(ratio.clip(lower=1e-6) / expected)
    return pd.Series(np.exp(-0.5 * (logs / spread) ** 2), ratio.index)


def _agreement(pairs: Sequence[Sequence[Boxes]]) -> float:
    """F1 of the boxes of two sizes, over all pictures; 0 if there are none."""
    total = sum(len(one) + len(other) for one, other in pairs)
    return 2 * sum(matches(one, other) for one, other in pairs) / total if total else 0.0


def matches(one: Boxes, other: Boxes) -> int:
    """Number of boxes that agree, one to one, with an intersection over union of at least 0.5."""
    overlap = overlaps(one[:, None], other[None])
    rows, columns = linear_sum_assignment(-overlap)
    return int((overlap[rows, columns] >= _SAME).sum())


def _median_side(boxes: Sequence[Boxes]) -> float:
    every = np.concatenate([*boxes, np.zeros((0, 4), np.int64)])
    return float(np.median(np.sqrt(np.prod(every[:, 2:] - every[:, :2], axis=1)))) if len(every) else 0.0


def _doubts(best: pd.Series, table: pd.DataFrame, red: float | None) -> list[str]:
    doubts = []
    if best["agreement"] < _AGREE:
        doubts.append(f"a slightly different size gives other boxes (agreement {best['agreement']:.2f})")
    if red and not 1 / _UNLIKE < best["size"] / red / _PER_RED < _UNLIKE:
        doubts.append(f"a red cell has {red:.0f} px, so nucleated cells should have about {2 * red:.0f} px")
    if red is None:
        doubts.append("there are too few red cells to compare with")
        if best["cells"] < _FEW:
            doubts.append(f"cells found: only {best['cells']:.0f}")
        ratio = table["size"] / best["size"]
        far = table[(ratio > _RIVAL) | (ratio < 1 / _RIVAL)]
        if len(far) and far["agreement"].max() >= best["agreement"]:
            doubts.append(f"{far.loc[far['agreement'].idxmax(), 'size']:g} px fits as well")
    return doubts
