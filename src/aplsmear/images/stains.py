"""Colour normalisation: maps the colours of one smear to those of a fixed reference.

The references are constants, so nothing is learnt from patients. Macenko: the reference stains and
concentrations of the original implementation (as in torchstain). Reinhard: purple cells on a pale pink field.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

from aplsmear.errors import UserError

Method = Literal["none", "reinhard", "macenko"]

REINHARD_MEAN = (70.0, 15.0, 0.0)  # of L*, a*, b*
REINHARD_SPREAD = (20.0, 12.0, 18.0)
_SAMPLE = 200_000  # pixels from which the stains are estimated
_LEAST_LIGHT = 1 / 255  # replaces 0, whose optical density would be infinite
_LEAST_STAINED = 1000  # stained pixels that the sample needs


class StainError(UserError, ValueError):
    """The stains of a smear cannot be estimated."""


def normalised(image: np.ndarray, method: Method) -> np.ndarray:
    """Map the colours of a smear to those of the reference.

    ``reinhard`` matches mean and standard deviation in L*a*b* (Reinhard et al., IEEE Comput Graph Appl
    2001;21(5):34). ``macenko`` matches direction and concentration of the two main stains in optical density
    (Macenko et al., ISBI 2009).

    `image` is the whole smear, uint8 RGB (height, width, 3), as is the result. A StainError if hardly
    anything in it is stained.
    """
    if method == "none":
        return image
    return _reinhard(image) if method == "reinhard" else _macenko(image)


def remixed(image: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """Multiply the optical densities of each pixel (R, G, B as a row vector) by a matrix, float64 (3, 3).

    Returns the light of the uint8 RGB picture, float32 of its shape; 1 is white, larger values are possible.
    """
    density = -np.log(np.maximum(np.arange(256) / 255, _LEAST_LIGHT)).astype(np.float32)
    mixed = cv2.transform(cv2.LUT(image, density), mix.T.astype(np.float32))
    return np.asarray(np.exp(-mixed))


def as_image(light: np.ndarray) -> np.ndarray:
    """Light as uint8: 0 to 1 becomes 0 to 255; other values are clipped."""
    return np.asarray(np.rint(255 * np.clip(light, 0, 1)), dtype=np.uint8)


def _reinhard(image: np.ndarray) -> np.ndarray:
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    mean, spread = lab.mean(axis=(0, 1), dtype=np.float64), lab.std(axis=(0, 1), dtype=np.float64)
    if spread[0] < 1:
        raise StainError("hardly anything in it is stained")
    gain = np.array(REINHARD_SPREAD) / np.maximum(spread, 1)
    moved = ((lab - mean) * gain + np.array(REINHARD_MEAN)).astype(np.float32)
    return as_image(cv2.cvtColor(moved, cv2.COLOR_LAB2RGB))


def _macenko(image: np.ndarray) -> np.ndarray:
    from torchstain.numpy.normalizers import NumpyMacenkoNormalizer

    pixels = image.reshape(-1, 3)
    sample = pixels[:: max(len(pixels) // _SAMPLE, 1)]
    if (sample < 200).all(axis=1).sum() < _LEAST_STAINED:
        raise StainError("hardly anything in it is stained")
    reference, own = NumpyMacenkoNormalizer(), NumpyMacenkoNormalizer()
    own.fit(sample[None])
    scale = np.diag(reference.maxCRef / own.maxCRef)
    return as_image(remixed(image, (reference.HERef @ scale @ np.linalg.pinv(own.HERef)).T))
