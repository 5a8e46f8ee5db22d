"""The colours of a smear brought to those of a fixed reference, from the smear's own colours alone.

The references are constants, so that nothing is learnt from any patient: for Macenko the stains and amounts
of his own implementation (torchstain's), for Reinhard purple cells on a pale pink field.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

from aplsmear.errors import UserError

Method = Literal["none", "reinhard", "macenko"]

REINHARD_MEAN = (70.0, 15.0, 0.0)  # of L*, a*, b*
REINHARD_SPREAD = (20.0, 12.0, 18.0)
_SAMPLE = 200_000  # pixels that stains are estimated from
_LEAST_LIGHT = 1 / 255  # of a black pixel, so that its optical density is a number
_LEAST_STAINED = 1000  # pixels of the sample


class StainError(UserError, ValueError):
    """A smear whose stains cannot be told."""


def normalised(image: np.ndarray, method: Method) -> np.ndarray:
    """A smear in the colours of the reference.

    ``reinhard``: mean and spread of L*a*b* (Reinhard et al., IEEE Comput Graph Appl 2001;21(5):34).
    ``macenko``: direction and amount of the two main stains in optical density (Macenko et al., ISBI 2009).

    Args:
        image: uint8 RGB, shape (height, width, 3): the whole smear.
        method: ``none`` gives the image back.

    Returns:
        uint8 RGB of the same shape.

    Raises:
        StainError: nearly nothing in the smear is stained.
    """
    if method == "none":
        return image
    return _reinhard(image) if method == "reinhard" else _macenko(image)


def remixed(image: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """The light of each pixel after its optical densities (R, G, B as a row) are multiplied by a matrix.

    Args:
        image: uint8 RGB, shape (height, width, 3).
        mix: float64 (3, 3).

    Returns:
        float32 of the same shape; 1 is white, and more is possible.
    """
    density = -np.log(np.maximum(np.arange(256) / 255, _LEAST_LIGHT)).astype(np.float32)
    mixed = cv2.transform(cv2.LUT(image, density), mix.T.astype(np.float32))
    return np.asarray(np.exp(-mixed))


def as_image(light: np.ndarray) -> np.ndarray:
    """Light of 0 to 1, and what lies beyond, as uint8."""
    return np.asarray(np.rint(255 * np.clip(light, 0, 1)), dtype=np.uint8)


def _reinhard(image: np.ndarray) -> np.ndarray:
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    mean, spread = lab.mean(axis=(0, 1), dtype=np.float64), lab.std(axis=(0, 1), dtype=np.float64)
    if spread[0] < 1:
        raise StainError("nearly nothing in it is stained")
    gain = np.array(REINHARD_SPREAD) / np.maximum(spread, 1)
    moved = ((lab - mean) * gain + np.array(REINHARD_MEAN)).astype(np.float32)
    return as_image(cv2.cvtColor(moved, cv2.COLOR_LAB2RGB))


def _macenko(image: np.ndarray) -> np.ndarray:
    from torchstain.numpy.normalizers import NumpyMacenkoNormalizer

    pixels = image.reshape(-1, 3)
    sample = pixels[:: max(len(pixels) // _SAMPLE, 1)]
    if (sample < 200).all(axis=1).sum() < _LEAST_STAINED:
        raise StainError("nearly nothing in it is stained")
    reference, own = NumpyMacenkoNormalizer(), NumpyMacenkoNormalizer()
    own.fit(sample[None])
    scale = np.diag(reference.maxCRef / own.maxCRef)
    return as_image(remixed(image, (reference.HERef @ scale @ np.linalg.pinv(own.HERef)).T))
