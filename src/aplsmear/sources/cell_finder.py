"""Find the nucleated cells of a picture whose cells have no boxes.

This is classical image analysis. Nothing is learned, so nothing depends on the stain or the camera of one
laboratory. A picture is scaled until a typical cell has a diameter of `_TYPICAL` px; all other lengths are in
these px. The steps are:

1. Optical density relative to the empty field (Beer-Lambert), whose brightness is a quadratic surface.
2. Colour deconvolution (Ruifrok and Johnston, Anal Quant Cytol Histol 2001;23:291) subtracts the red cells.
   Their colour is measured in the picture: red cells absorb more blue, for their red and green, than
   nucleated cells. What remains is the basophilic signal: strong in nuclei, absent in red cells.
3. Otsu's threshold gives the signal of nuclei in this picture. A cell has a signal above 15 % of it.
4. The watershed of the distance to the edge separates cells that touch (Beucher and Lantuéjoul 1979). A part
   that is too large for one cell is separated again if it contains several nuclei.
5. Parts that are too small (platelets) or have no nucleus are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.measure import regionprops
from skimage.morphology import h_maxima, remove_small_holes
from skimage.segmentation import watershed

from aplsmear.data.schema import MEASURES
from aplsmear.errors import UserError
from aplsmear.images.reading import scaling
from aplsmear.tables import BOX

MIN_SIZE = 10.0  # px of a typical cell; in smaller ones nuclei cannot be distinguished

# Lengths in px of the scaled picture.
_TYPICAL = 40  # diameter of a typical cell; then a nucleus has at least 15 px
_FIELD = 40  # side of the squares in which the empty field is measured: wider than a cell
_SQUARES = 12  # least number of such squares, twice the number of coefficients
_SMOOTH = 2.0  # standard deviation of the blur over chromatin and granules
_OPEN = 3  # radius up to which strands and specks are removed
_HOLE = 99  # px², holes up to this are vacuoles; larger ones are gaps between cells
_BUMP = 2.0  # least depth of the waist between two cells
_LEAST = 16.8  # diameter of the smallest cell; platelets have less than half of it
_LARGE = 1.6 * math.pi / 4 * _TYPICAL**2  # px², a larger part may be several cells
_NUCLEUS = 32  # px², least area of the nucleus of a cell
_APART = 16  # least distance between the centres of two nuclei; lobes of one nucleus are nearer
_DEEP = 5.2  # least distance from the centre of such a nucleus to its edge
_WINDOW = 2048  # side of the part that is analysed at a time, so that memory does not grow with the picture
_MARGIN = 80  # around it, twice a typical cell: a cell with its centre in the window is complete

# Optical densities (natural logarithm).
_SEEN = 0.25  # sum of the three channels; above it, there is something on the glass
_FAINT = 0.15  # least basophilic signal of a part of a cell
_STRONG = 0.4  # nuclei of the palest stain (at least 0.65 in the pictures examined; platelets up to 0.42)
_BODY = 0.15  # share of the signal of nuclei: cytoplasm and more
_CORE = 0.45  # share of the signal of nuclei: nucleus
_RED = 0.29  # blue over red and green: nuclei 0.15 to 0.25, red cells 0.37 to 0.9
_RED_DENSITY = 0.6  # sum of the three channels, of red cells of usual stain
_MOST_GAIN = 3.0  # of a pale picture
_MEAN_RED = 0.4  # of red cells, for a picture without any

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int32]


# --- one picture -------------------------------------------------------------------------------------


def find_cells(image: npt.NDArray[np.uint8], size: float) -> pd.DataFrame:
    """The nucleated cells of one picture, from top to bottom; none in a grey or empty picture.

    Args:
        image: uint8 RGB, shape (height, width, 3).
        size: diameter of a typical nucleated cell in px, at least `MIN_SIZE`, else a UserError. A little too
            large is better than too small.

    Returns:
        One row for each cell: `BOX` in px, int64, end exclusive, around nucleus and cytoplasm, cut at the
        edge of the picture, no box twice; and `MEASURES` in px of the picture (`meanIntensity`: 0 to 1).
    """
    check_size(size)
    found = pd.DataFrame(_rows(image, size), columns=[*BOX, *MEASURES]).astype(dict.fromkeys(BOX, np.int64))
    return found.drop_duplicates(list(BOX)).sort_values(list(BOX)).reset_index(drop=True)


def check_size(size: float) -> None:
    """Raise UserError if cells of this diameter (px) are too small to be found."""
    if not MIN_SIZE <= size < math.inf:
        raise UserError(
            f"cells of {size:g} px cannot be told from platelets. They need at least {MIN_SIZE:g} px: take "
            "the pictures at a higher magnification, or correct the size"
        )


def nucleated_parts(image: npt.NDArray[np.uint8]) -> tuple[Mask, Mask]:
    """What is basophilic in a picture, and its red cells, with holes filled.

    Nothing is assumed of the size of the cells: use it on a small picture.
    """
    field = _over_empty_field(image, max(max(image.shape[:2]) // 12, 8))
    signal = cv2.GaussianBlur(_basophilic(field), (0, 0), 1.0)
    strength = _strength(signal)
    nucleated = signal > (_BODY * strength if strength >= _STRONG else math.inf)
    soft = cv2.GaussianBlur(field, (0, 0), 1.0)
    red = (soft.sum(axis=2) > _SEEN) & (soft[..., 2] > _RED * soft[..., :2].sum(axis=2))
    return nucleated, ndimage.binary_fill_holes(red) & ~ndimage.binary_dilation(nucleated, iterations=2)


def scaled(image: npt.NDArray[np.uint8], factor: float) -> tuple[npt.NDArray[np.uint8], tuple[float, float]]:
    """The picture scaled by about `factor`, and how many of its px one new px has, down and across."""
    height, width = image.shape[:2]
    new = max(round(height * factor), 1), max(round(width * factor), 1)
    small = np.asarray(cv2.resize(image, new[::-1], interpolation=scaling(factor)), np.uint8)
    return small, (height / new[0], width / new[1])


def _rows(image: npt.NDArray[np.uint8], size: float) -> Iterator[list[float]]:
    """The cells of a picture of any size, by windows; a cell belongs to the window that has its centre."""
    factor = _TYPICAL / size
    side, margin = math.ceil(_WINDOW / factor), math.ceil(_MARGIN / factor)
    height, width = image.shape[:2]
    for top in range(0, height, side):
        for left in range(0, width, side):
            y, x = max(top - margin, 0), max(left - margin, 0)
            window = image[y : top + side + margin, x : left + side + margin]
            small, (down, across) = scaled(window, factor)
            for region in _regions(small):
                y0, y1 = (y + round(edge * down) for edge in region.bbox[::2])
                x0, x1 = (x + round(edge * across) for edge in region.bbox[1::2])
                if top <= (y0 + y1) // 2 < top + side and left <= (x0 + x1) // 2 < left + side:
                    yield [y0, x0, y1, x1, *_measures(region, math.sqrt(down * across))]


def _regions(small: npt.NDArray[np.uint8]) -> list[Any]:
    """The cells of a scaled picture."""
    signal = _basophilic(_over_empty_field(small, _FIELD))
    signal = cv2.GaussianBlur(signal, (0, 0), _SMOOTH)
    strength = _strength(signal)
    if strength < _STRONG:
        return []
    body = remove_small_holes(signal > _BODY * strength, max_size=_HOLE)
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * _OPEN + 1,) * 2)
    opened = cv2.morphologyEx(body.view(np.uint8), cv2.MORPH_OPEN, brush, borderType=cv2.BORDER_REPLICATE)
    parts = _split_large(_split(opened.view(np.bool_)), signal)
    core = signal > _CORE * strength
    regions = regionprops(parts, intensity_image=np.dstack([small.mean(axis=2) / 255, core]))
    return [region for region in regions if _is_cell(region, parts.shape)]


def _is_cell(region: Any, shape: Sequence[int]) -> bool:
    y0, x0, y1, x1 = region.bbox
    cut = y0 == 0 or x0 == 0 or y1 == shape[0] or x1 == shape[1]
    least = math.pi / 4 * _LEAST**2 * (0.45 if cut else 1.0)
    nucleus = region.image_intensity[..., 1][region.image].sum()
    return bool(max(y1 - y0, x1 - x0) >= _LEAST and region.area >= least and nucleus >= _NUCLEUS)


def _measures(region: Any, scale: float) -> list[float]:
    """Values of `MEASURES` in px, of which `scale` make one of the region of skimage.

    They are rounded because the last bits differ between computers.
    """
    values = (
        region.area_convex * scale**2,
        region.eccentricity,
        region.equivalent_diameter_area * scale,
        region.perimeter * scale,
        region.intensity_mean[0],
        region.euler_number,
        region.extent,
    )
    return [round(float(value), 4) for value in values]


# --- light --------------------------------------------------------------------------------------------


def _over_empty_field(image: npt.NDArray[np.uint8], side: int) -> Floats:
    """Optical density minus that of the empty field, shape (height, width, 3).

    The field is a quadratic surface through the palest tenth of each square of `side` px. Squares full of
    cells do not count. If too few squares remain, one value is used for the whole picture.
    """
    density = np.asarray(-np.log((np.arange(256) + 1) / 256), np.float32)[image]
    height, width = image.shape[:2]
    places, values = [], []
    for y in range(0, height, side):
        for x in range(0, width, side):
            square = density[y : y + side, x : x + side].reshape(-1, 3)
            first = np.argsort(square.sum(axis=1), kind="stable")[: len(square) // 10 + 1]
            values.append(np.median(square[first], axis=0))
            places.append(((y + side / 2) / height - 0.5, (x + side / 2) / width - 0.5))
    value = np.array(values)
    terms = np.stack(_quadratic_terms(*np.array(places, np.float32).T), axis=1)
    dark = value.sum(axis=1)
    kept = dark < np.percentile(dark, 20) + 0.35
    for _ in range(3):
        if kept.sum() < _SQUARES:
            palest = np.percentile(density.reshape(-1, 3), 3, axis=0).astype(np.float32)
            return np.asarray(np.maximum(density - palest, 0), np.float32)
        surface, *_ = np.linalg.lstsq(terms[kept], value[kept], rcond=None)
        surface = surface.round(5)  # the last bits differ between CPUs
        kept &= (value - terms @ surface).sum(axis=1) < 0.1
    rows = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5)[:, None]
    columns = ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5)[None, :]
    for channel, factors in enumerate(surface.T.astype(np.float32)):
        for factor, term in zip(factors, _quadratic_terms(rows, columns), strict=True):
            density[..., channel] -= factor * term
    return np.maximum(density, 0, out=density)


def _quadratic_terms(y: Floats, x: Floats) -> tuple[Floats, ...]:
    return np.ones_like(y), y, x, y * y, x * x, x * y


def _basophilic(density: Floats) -> Floats:
    """Red and green density minus the part that belongs to red cells, from the blue density.

    In a pale picture the signal is amplified until its red cells are as dense as usual.
    """
    warm = density[..., :2].sum(axis=2)
    total = warm + density[..., 2]
    seen = total > _SEEN
    ratio = (density[..., 2] / np.maximum(warm, 1e-3))[seen]
    red = ratio > _RED
    of_red_cells, gain = _MEAN_RED, 1.0
    if red.sum() > 100:
        threshold = threshold_otsu(np.minimum(ratio, 1.5))
        red &= ratio >= min(threshold, np.median(ratio[red]))
        of_red_cells = float(np.median(ratio[red]))
        gain = min(max(_RED_DENSITY / float(np.median(total[seen][red])), 1.0), _MOST_GAIN)
    blue = density[..., 2] / np.float32(np.clip(of_red_cells, 0.3, 1.0))
    return np.asarray((warm - blue) * np.float32(gain), np.float32)


def _strength(signal: Floats) -> float:
    """Typical signal of the nuclei of a picture; 0 if there is hardly any signal."""
    some = signal[signal > _FAINT]
    if some.size < 50:
        return 0.0
    return float(np.median(some[some >= threshold_otsu(some)]))


# --- shape --------------------------------------------------------------------------------------------


def _depth(mask: Mask) -> Floats:
    """Distance to the edge of a mask, smoothed; a cell at the edge of the picture continues beyond it."""
    wide = np.pad(mask, _TYPICAL, mode="edge")
    far = ndimage.distance_transform_edt(wide).astype(np.float32)[_TYPICAL:-_TYPICAL, _TYPICAL:-_TYPICAL]
    return np.asarray(cv2.GaussianBlur(far, (0, 0), 2.4), np.float32)


def _split(body: Mask) -> Labels:
    """Separate cells that touch: 0 outside, a number for each cell."""
    depth = _depth(body)
    centres, _ = ndimage.label((h_maxima(depth, _BUMP) > 0) & body, np.ones((3, 3)))
    return np.asarray(watershed(-depth, centres, mask=body), np.int32)


def _split_large(parts: Labels, signal: Floats) -> Labels:
    """Separate parts that are too large for a cell by their nuclei, until nothing changes."""
    parts, last = parts.copy(), int(parts.max())
    waiting = [(number, place) for number, place in enumerate(ndimage.find_objects(parts), 1) if place]
    while waiting:
        number, place = waiting.pop()
        mask = parts[place] == number
        if mask.sum() < _LARGE:
            continue
        _, *others = _by_nuclei(mask, signal[place])
        for piece in others:
            last += 1
            parts[place][piece] = last
            waiting.append((last, place))
        if others:
            waiting.append((number, place))
    return parts


def _by_nuclei(mask: Mask, signal: Floats) -> list[Mask]:
    """The pieces of a part, one for each nucleus; the part itself if no threshold shows several nuclei."""
    inside = signal[mask]
    otsu = threshold_otsu(inside)
    for threshold in (otsu, *np.quantile(inside[inside >= otsu], (0.2, 0.4))):
        nuclei = remove_small_holes((signal > threshold) & mask, max_size=_HOLE) & mask
        depth = np.where(mask, _depth(nuclei), 0)
        bumps = h_maxima(depth, 0.8 * _BUMP)
        spots = peak_local_max(
            depth, min_distance=_APART, threshold_abs=_DEEP, labels=mask.astype(int), exclude_border=False
        )
        spots = [spot for spot in map(tuple, spots) if bumps[spot]]
        if len(spots) < 2:
            continue
        centres = np.zeros(mask.shape, np.int32)
        for number, spot in enumerate(spots, 1):
            centres[spot] = number
        pieces = watershed(-depth, centres, mask=mask)
        if np.bincount(pieces.ravel())[1:].min() > math.pi / 4 * _LEAST**2:
            return [pieces == number for number in range(1, len(spots) + 1)]
    return [mask]
