"""Smears as another laboratory would show them: graded changes of stain, light, focus and camera.

They measure how verdicts hold in another laboratory; no model is trained on these images. Views for training
(`aplsmear.images.views`) are changed one by one, in other colour spaces. Here, a *laboratory* is drawn once
and changes all its smears in the same way. Stain is changed along haematoxylin, eosin and residual (Ruifrok
and Johnston, Anal Quant Cytol Histol 2001;23:291; scikit-image's matrix), focus by a disk.

`recoloured` gives cells the colours of a real laboratory: mean and spread in L*a*b* (Reinhard et al., IEEE
Comput Graph Appl 2001;21(5):34), as they were measured on its published images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from skimage.color import hed_from_rgb, rgb_from_hed

from aplsmear.images.reading import decode, encode_jpeg

KINDS = ("stain", "white_balance", "gamma", "blur", "resolution", "jpeg")
STRENGTHS: Mapping[str, float] = {"mild": 0.5, "medium": 1.0, "strong": 2.0}

# The largest changes by a laboratory at strength 1.
STAIN = 0.2  # relative, either way: amount of each stain
WHITE_BALANCE = 0.1  # relative, either way: gain of red and of blue
GAMMA = 0.2  # of the exponent's logarithm, either way
BLUR = 2.0  # px of the smear: radius of the disk of a point that is out of focus
RESOLUTION = 0.5  # relative: increase of the size of pixels
JPEG = 40  # of 100: loss of quality
_LOWEST_QUALITY = 20
_LEAST_LIGHT = 1 / 255  # replaces 0, whose optical density would be infinite

# Mean and standard deviation of L*, a* and b* over all pixels of published images of two laboratories.
Colours = tuple[tuple[float, float, float], tuple[float, float, float]]
REAL: Mapping[str, Colours] = {
    # 160 cells of healthy donors (Acevedo et al., Data Brief 2020;30:105474; CC BY 4.0)
    "acevedo": ((79.8, 10.7, 8.0), (15.9, 9.2, 14.5)),
    # 100 fields with red and white cells (draaslan/blood-cell-detection-dataset; MIT)
    "draaslan": ((64.6, 11.9, -2.0), (14.5, 21.4, 11.0)),
}


@dataclass(frozen=True)
class Laboratory:
    """All changes by a laboratory, in units of the constants above."""

    stain: tuple[float, float, float]  # haematoxylin, eosin, residual; -1 to 1
    white_balance: tuple[float, float]  # red, blue; -1 to 1
    gamma: float  # -1 to 1
    blur: float  # 0 to 1
    resolution: float  # 0 to 1
    jpeg: float  # 0 to 1


def draw_laboratory(seed: int, number: int) -> Laboratory:
    """A laboratory whose changes are all at least half of the largest, in either direction."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
    far = random.uniform(0.5, 1.0, 9)
    signed = (far * random.choice([-1.0, 1.0], 9)).tolist()
    return Laboratory(
        stain=(signed[0], signed[1], signed[2]),
        white_balance=(signed[3], signed[4]),
        gamma=signed[5],
        blur=float(far[6]),
        resolution=float(far[7]),
        jpeg=float(far[8]),
    )


def shifted(
    image: np.ndarray, laboratory: Laboratory, strength: float, kinds: Sequence[str] = KINDS
) -> np.ndarray:
    """A smear as that laboratory would show it: stain, light, focus, resolution and JPEG, in this order.

    Args:
        image: uint8 RGB, shape (height, width, 3).
        laboratory: of `draw_laboratory`.
        strength: 0 changes nothing; see `STRENGTHS`.
        kinds: the properties that are changed, some of `KINDS`.

    Returns:
        uint8 RGB of the same shape.
    """
    if not strength:
        return image
    out = image
    if {"stain", "white_balance", "gamma"} & set(kinds):
        out = _coloured(out, laboratory, strength, kinds)
    if "blur" in kinds:
        out = np.asarray(cv2.filter2D(out, -1, _disk(strength * laboratory.blur * BLUR)), np.uint8)
    if "resolution" in kinds:
        height, width = out.shape[:2]
        coarser = 1 + strength * laboratory.resolution * RESOLUTION
        small = (max(round(width / coarser), 1), max(round(height / coarser), 1))
        coarse = cv2.resize(out, small, interpolation=cv2.INTER_AREA)
        out = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    if "jpeg" in kinds:
        quality = round(100 - strength * laboratory.jpeg * JPEG)
        out = decode(encode_jpeg(np.ascontiguousarray(out), max(quality, _LOWEST_QUALITY)))
    return out


def colours_of(images: Sequence[np.ndarray]) -> Colours:
    """Mean and standard deviation of L*, a* and b*, each image with equal weight (uint8 RGB)."""
    moments = [cv2.meanStdDev(_lab(image)) for image in images]
    mean = np.mean([first for first, _ in moments], axis=0).ravel()
    square = np.mean([first**2 + second**2 for first, second in moments], axis=0).ravel()
    first, second = mean.tolist(), np.sqrt(square - mean**2).tolist()
    return (first[0], first[1], first[2]), (second[0], second[1], second[2])


def recoloured(image: np.ndarray, home: Colours, there: Colours) -> np.ndarray:
    """An image (uint8 RGB) whose colours have been moved from mean and spread at home to those there."""
    gain = np.array(there[1]) / np.array(home[1])
    moved = ((_lab(image) - np.array(home[0])) * gain + np.array(there[0])).astype(np.float32)
    return _as_image(cv2.cvtColor(moved, cv2.COLOR_LAB2RGB))


def _lab(image: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB))


def _remixed(image: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """Multiply the optical densities of each pixel (R, G, B as a row vector) by a matrix, float64 (3, 3).

    Returns the light of the uint8 RGB image, float32 of its shape; 1 is white, larger values are possible.
    """
    density = -np.log(np.maximum(np.arange(256) / 255, _LEAST_LIGHT)).astype(np.float32)
    mixed = cv2.transform(cv2.LUT(image, density), mix.T.astype(np.float32))
    return np.asarray(np.exp(-mixed))


def _as_image(light: np.ndarray) -> np.ndarray:
    """Light as uint8: 0 to 1 becomes 0 to 255; other values are clipped."""
    return np.asarray(np.rint(255 * np.clip(light, 0, 1)), dtype=np.uint8)


def _disk(radius: float) -> np.ndarray:
    """A disk with a soft rim and the sum 1: float64 (side, side)."""
    side = int(np.ceil(radius))
    y, x = np.mgrid[-side : side + 1, -side : side + 1]
    disk = np.clip(radius + 0.5 - np.hypot(y, x), 0, 1)
    return np.asarray(disk / disk.sum())


def _coloured(image: np.ndarray, laboratory: Laboratory, strength: float, kinds: Sequence[str]) -> np.ndarray:
    """Change stain, white balance and gamma; optical density is linear in the amounts of stain."""
    mix = np.eye(3)
    if "stain" in kinds:
        amounts = 1 + strength * STAIN * np.array(laboratory.stain)
        mix = hed_from_rgb @ np.diag(amounts) @ rgb_from_hed
    gain = np.ones(3)
    if "white_balance" in kinds:
        gain[[0, 2]] += strength * WHITE_BALANCE * np.array(laboratory.white_balance)
    exponent = np.exp(strength * GAMMA * laboratory.gamma) if "gamma" in kinds else 1.0
    light = _remixed(image, mix) * gain.astype(np.float32)
    return _as_image(np.clip(light, 0, 1) ** np.float32(exponent))
