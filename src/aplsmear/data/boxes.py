"""In which order and unit the boxes of a table are, told by what all of them have in common.

A table whose boxes are x0, y0, x1, y1 often passes every check of single boxes, above all with square
pictures, and each cell is then cut out at a wrong place. So all boxes together are read in every usual
way. In the right one they lie inside their pictures and on nuclei.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from aplsmear.images.reading import Rgb

Numbers = npt.NDArray[np.float64]

_NUMBER = r"([+-]?\d{1,9}(?:\.\d*)?(?:[eE][+-]?\d{1,2})?)"
_BOX = re.compile(rf"(?a)\s*[\[(]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*[\])]\s*")
_LARGEST = 1e9

ORDERS = {  # what the numbers mean -> place of y0, x0 and of y1, x1, or of the height and width
    "y0, x0, y1, x1": ((0, 1), (2, 3)),
    "x0, y0, x1, y1": ((1, 0), (3, 2)),
    "y1, x1, y0, x0": ((2, 3), (0, 1)),
    "x1, y1, x0, y0": ((3, 2), (1, 0)),
    "y0, y1, x0, x1": ((0, 2), (1, 3)),
    "x0, x1, y0, y1": ((2, 0), (3, 1)),
    "y0, x0, height, width": ((0, 1), (2, 3)),
    "x0, y0, width, height": ((1, 0), (3, 2)),
    "y centre, x centre, height, width": ((0, 1), (2, 3)),
    "x centre, y centre, width, height": ((1, 0), (3, 2)),
}
UNITS = {
    "px": 0,
    "shares of the picture": 1,
    "percent of the picture": 100,
    "thousandths of the picture": 1000,
}
READINGS = [(order, unit) for unit in UNITS for order in ORDERS]  # the first is the right one

_FEWEST = 8  # boxes; fewer can fit a wrong reading by chance
_MANY = 20
_PILE = 5  # boxes at an edge
_FITS = 0.98  # share of boxes that must lie inside their pictures
_MOSTLY = 0.8
_THINNEST = 6.0  # ratio of the sides
_RED = 256  # px, shorter side of the red channel in which nuclei are looked for
_DARKER = 5.0  # of 255; least difference between two readings
_SURE, _LIKELY = 5.0, 3.0  # standard errors


@dataclass(frozen=True)
class Darkness:
    """How much darker boxes are inside than around, in each of `READINGS`: sums over the boxes that fit."""

    sums: Numbers  # number, sum and sum of squares, shape (40, 3)

    def __add__(self, other: Darkness) -> Darkness:
        """The sums of two pictures."""
        return Darkness(self.sums + other.sums)

    def better(self, one: int, other: int, errors: float) -> bool:
        """Whether boxes are darker in one reading than in another, by so many standard errors."""
        error = float(np.hypot(self.error(one), self.error(other)))
        return self.mean(one) - self.mean(other) > max(_DARKER, errors * error)

    def error(self, reading: int) -> float:
        """The standard error of the mean difference in one reading."""
        count = max(self.sums[reading, 0], 1)
        return float(np.sqrt(max(self.sums[reading, 2] / count - self.mean(reading) ** 2, 0) / count))

    def mean(self, reading: int) -> float:
        """The mean difference in one reading, of 255."""
        return float(self.sums[reading, 1] / max(self.sums[reading, 0], 1))


def numbers_of(text: str) -> tuple[float, float, float, float] | None:
    """The four numbers of a box; None if the text is none. ``[1.2E+02, 0, 1.5e2, 30.0]`` is one."""
    match = _BOX.fullmatch(text)
    if match is None:
        return None
    a, b, c, d = (float(number) for number in match.groups())
    return (a, b, c, d) if max(map(abs, (a, b, c, d))) < _LARGEST else None


def is_whole(text: str) -> bool:
    """Whether a text is a box of four whole numbers, or empty."""
    numbers = numbers_of(text) if text else ()
    return numbers is not None and all(number.is_integer() for number in numbers)


def as_read(numbers: Numbers, sizes: Numbers, order: str, unit: str) -> Numbers:
    """Boxes y0, x0, y1, x1 in px from numbers (n, 4) of another order (`ORDERS`) and unit (`UNITS`).

    `sizes` has the height and width of the picture of each box, shape (n, 2).
    """
    first, second = ORDERS[order]
    scale = sizes / UNITS[unit] if UNITS[unit] else 1.0
    start, end = numbers[:, first] * scale, numbers[:, second] * scale
    if "centre" in order:
        start, end = start - end / 2, start + end / 2
    elif "width" in order:
        end = start + end
    return np.hstack([start, end])


def overlaps(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> Numbers:
    """Intersection over union of boxes y0, x0, y1, x1, which are the last axis of both arrays."""
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    shared = np.maximum(sides, 0).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (one, other)]
    return np.asarray(shared / np.maximum(areas[0] + areas[1] - shared, 1e-9))


def _fits(boxes: Numbers, sizes: Numbers) -> npt.NDArray[np.bool_]:
    """Which boxes have a usual shape, and most of them inside their picture."""
    sides = boxes[:, 2:] - boxes[:, :2]
    inside = np.minimum(boxes[:, 2:], sizes) - np.maximum(boxes[:, :2], 0)
    shape = (sides.min(axis=1) >= 1) & (sides.max(axis=1) <= _THINNEST * np.maximum(sides.min(axis=1), 1))
    return np.asarray(shape & (inside > 0.5 * sides).all(axis=1) & (sides <= 0.9 * sizes).any(axis=1))


def darkness(rgb: Rgb, numbers: Numbers) -> Darkness:
    """How much darker the boxes of one picture are in their inner half than in a frame around them.

    Nuclei absorb red light, red cells and plasma do not: only the red channel of `rgb` is used. `numbers` are
    those of the boxes, shape (n, 4).
    """
    scale = min(1.0, _RED / min(rgb.shape[:2]))
    red = cv2.resize(rgb[:, :, 0], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    total = cv2.integral(red)
    true = np.array([rgb.shape[:2]], dtype=np.float64)
    shown = np.array(red.shape, dtype=np.float64)
    sizes = np.broadcast_to(true, (len(numbers), 2))

    def sums(boxes: Numbers) -> tuple[Numbers, Numbers]:
        corners = np.clip(np.rint(boxes * np.tile(shown / true[0], 2)), 0, np.tile(shown, 2)).astype(np.int64)
        y0, x0, y1, x1 = corners.T
        return total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0], (y1 - y0) * (x1 - x0)

    rows = []
    for order, unit in READINGS:
        boxes = as_read(numbers, sizes, order, unit)
        boxes = boxes[_fits(boxes, sizes)]
        grown = 0.25 * np.tile(boxes[:, 2:] - boxes[:, :2], 2) * [-1, -1, 1, 1]
        (inner, pixels), (whole, all_pixels), (wide, more) = map(sums, (boxes - grown, boxes, boxes + grown))
        seen = (pixels > 0) & (more > all_pixels)
        frame = (wide - whole)[seen] / (more - all_pixels)[seen]
        darker = frame - inner[seen] / pixels[seen]
        rows.append([len(darker), darker.sum(), (darker**2).sum()])
    return Darkness(np.array(rows))


def other_readings(numbers: Numbers, sizes: Numbers, dark: Darkness | None) -> list[tuple[str, str]]:
    """The readings that fit a table better than y0, x0, y1, x1 in px; empty if this one may be right.

    A reading must fit nearly all boxes. If most boxes fit as y0, x0, y1, x1, too, only the right reading may
    show boxes that are darker than what is around them. `numbers` and `sizes` are as of `as_read`; `dark` is
    the sum over all pictures. If they were not decoded, it is None, and nothing is told.
    """
    if len(numbers) < _FEWEST or dark is None:
        return []
    share = [float(_fits(as_read(numbers, sizes, *reading), sizes).mean()) for reading in READINGS]
    rivals = []
    for place, (_, unit) in enumerate(READINGS[1:], start=1):
        on_nuclei = dark.better(place, 0, _SURE) and dark.mean(place) > 2 * dark.mean(0)
        beside = share[0] >= 0.5 and dark.better(0, place, _LIKELY)
        inside = share[0] < (_MOSTLY if len(numbers) >= _MANY else 0.5) and UNITS[unit] <= 1 and not beside
        if share[place] >= _FITS and (on_nuclei or inside):
            rivals.append(place)
    best = max(rivals, key=dark.mean, default=0)
    return [READINGS[place] for place in rivals if not dark.better(best, place, _LIKELY)]


def from_one(numbers: Numbers) -> str:
    """A remark if boxes count pixels from 1: cut at the edge, they start at 1 and never at 0; else ''."""
    starts = numbers[:, :2].ravel()
    ones, near = int((starts == 1).sum()), int(((starts > 1) & (starts <= 11)).sum())
    if (starts < 1).any() or ones < _PILE or ones < near:
        return ""
    return (
        f"{ones} boxes start at pixel 1 and none at 0: they may count pixels from 1. "
        "If so, subtract 1 from y0 and x0, and from y1 and x1 if the end is exclusive"
    )


def off_nuclei(dark: Darkness | None) -> str:
    """A remark if many boxes are no darker than what is around them; else ''."""
    if dark is None or dark.sums[0, 0] < _MANY or dark.mean(0) > max(1, _LIKELY * dark.error(0)):
        return ""
    return "the boxes are not darker than what is around them: look whether they lie on cells"
