"""Finds pictures in which nothing of a smear may be seen: empty, saturated, a label, out of focus.

None of 1,776 pictures is beyond a limit: the demo, DeepAPL (pages and single cells), two public sets of other
cameras and magnifications. A doubt is a remark; the picture is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from aplsmear.images.reading import Rgb

_SIDE = 640  # px of the longer side when a picture is measured
_CLIPPED = 0.9  # of the pixels
_FLAT = 20  # levels of 256
_STAINED, _PURPLE = 0.001, 20  # of the pixels; levels by which red and blue are above green
_DARK = 80  # of 255
_BLURRED, _BLURRED_BESIDE = 0.003, 1 / 8  # absolute; of the median of the set
_FEW = 5  # pictures are too few for a median
_ROUNDING = 20 / 12  # variance of the Laplacian of rounding to whole levels


class Quality(NamedTuple):
    """What one picture shows, measured when its longer side is reduced to 640 px."""

    bright: int  # level of 255 that a quarter of the pixels exceed: the empty field is bright
    contrast: int  # levels between the darkest and the brightest, without 1 pixel in 1,000 at each end
    clipped: float  # share of the pixels that are white or black in all channels
    stained: float  # share of the pixels that are purple or pink
    sharpness: float  # variance of the Laplacian (Pech-Pacheco et al., ICPR 2000) over that of brightness


def measured(rgb: Rgb) -> Quality:
    """Measure a picture: uint8 RGB, shape (height, width, 3)."""
    height, width = rgb.shape[:2]
    shrink = _SIDE / max(height, width)
    if shrink < 1:
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        rgb = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
    red, green, blue = cv2.split(rgb)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    shares = cv2.calcHist([grey], [0], None, [256], [0, 256])[:, 0].astype(np.float64) / grey.size
    darkest, bright, brightest = np.searchsorted(np.cumsum(shares), (0.001, 0.75, 0.999)).tolist()
    levels = np.arange(256)
    variance = float(shares @ (levels - shares @ levels) ** 2)
    red_or_blue = cv2.min(red, blue)
    darkest_channel, brightest_channel = cv2.min(red_or_blue, green), cv2.max(cv2.max(red, green), blue)
    clipped = np.count_nonzero(darkest_channel >= 254) + np.count_nonzero(brightest_channel <= 1)
    stained = np.count_nonzero(cv2.subtract(red_or_blue, green) > _PURPLE)
    edges = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1].item() ** 2 - _ROUNDING
    sharpness = max(edges, 0.0) / max(variance, 1.0)
    return Quality(bright, brightest - darkest, clipped / grey.size, stained / grey.size, sharpness)


def doubts(qualities: Sequence[Quality]) -> list[tuple[str, str]]:
    """For each picture of a set, why nothing of a smear may be seen in it, and the figure; '' if it may."""
    sharp = [one.sharpness for one in qualities]
    beside = _BLURRED_BESIDE * float(np.median(sharp)) if len(sharp) >= _FEW else 0.0
    return [_doubt(one, max(_BLURRED, beside)) for one in qualities]


def _doubt(one: Quality, sharp: float) -> tuple[str, str]:
    if one.clipped > _CLIPPED:
        return "white or black nearly everywhere", f"{one.clipped:.0%} of its pixels"
    if one.contrast < _FLAT:
        return "nearly one colour", f"contrast {one.contrast} of 255 levels"
    if one.bright < _DARK:
        return "dark: negatives, or of another scale", f"three quarters below {one.bright + 1} of 255"
    if one.stained < _STAINED:
        return "with nothing stained: labels, or grey", f"{one.stained:.2%} of its pixels purple or pink"
    if one.sharpness < sharp:
        return "out of focus", f"sharpness {one.sharpness:.2g}, below {sharp:.2g}"
    return "", ""
