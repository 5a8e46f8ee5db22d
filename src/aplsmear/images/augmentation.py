"""Augmentation of views: random changes, described by imgaug and computed in fewer steps.

`make_augmenter` describes the changes, their order and their ranges as an imgaug augmenter. The pipeline uses
`Pyramid.warped` and `recoloured`, which make the same changes: one warp out of the smear, one table of
colours, one blur and one field of noise. They take a tenth of the time of imgaug, and a view is sharper,
because its pixels are interpolated once. Tests compare both. Only this module imports imgaug.

A view is the same bytes on every x86-64 processor: OpenCV computes with integers here, or with kernels that
`aplsmear.cpu` pins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np

from aplsmear.params import Augment

_BYTES = np.arange(256)
# A random byte -> a normally distributed number.
_NORMAL = np.array([round(NormalDist().inv_cdf((byte + 0.5) / 256), 4) for byte in range(256)])


@dataclass(frozen=True)
class Change:
    """The random numbers of one augmented view."""

    flip: bool  # left and right are exchanged
    turns: int  # quarter turns, clockwise
    rotate: float  # degrees, clockwise
    scale: float  # factor of the size of the item
    shift: tuple[float, float]  # of x and y, as a share of the side of the view
    hue: int  # change, of 255 for the full circle
    saturation: int  # change, of 255
    brightness: float  # factor
    blur: float  # standard deviation in px
    noise: float  # standard deviation, of 255
    seed: int  # of the noise


def draw_change(settings: Augment, seed: int) -> Change:
    """Draw the random numbers of a view with this seed; each setting changes its own number only."""
    rng = np.random.Generator(np.random.SFC64(seed))
    flip, turns, *shares, hue, saturation, blur, noise = rng.random(11).tolist()
    rotate, scale, shift_x, shift_y, brightness = (2 * share - 1 for share in shares)
    return Change(
        flip=flip < 0.5,
        turns=int(4 * turns),
        rotate=rotate * settings.rotate,
        scale=1 + scale * settings.scale,
        shift=(shift_x * settings.shift, shift_y * settings.shift),
        hue=int((2 * settings.hue + 1) * hue) - settings.hue,
        saturation=int((2 * settings.saturation + 1) * saturation) - settings.saturation,
        brightness=1 + brightness * settings.brightness,
        blur=blur * settings.blur,
        noise=noise * settings.noise,
        seed=seed,
    )


def source_factor(settings: Augment) -> float:
    """Width of the source of an augmented view, relative to the view.

    A source of this width contains every rotated, shifted and scaled view.
    """
    angle = math.radians(min(settings.rotate, 45.0))
    turn = math.cos(angle) + math.sin(angle)  # side of the square around a rotated square of side 1
    return (1 + 2 * settings.shift) * turn / (1 - settings.scale)


class Pyramid:
    """A smear in its own size and in a half, a quarter, ... of it; each level is made when it is first used.

    A view smaller than its part of the smear is warped out of the level that is less than twice as large as
    needed, so that linear interpolation uses every pixel.
    """

    def __init__(self, image: np.ndarray) -> None:
        """Start with the smear: uint8 RGB, shape (height, width, 3)."""
        self.levels = [image]

    @property
    def image(self) -> np.ndarray:
        """The smear."""
        return self.levels[0]

    def warped(self, matrix: np.ndarray, offset: np.ndarray, size: int) -> np.ndarray:
        """Warp a view, uint8 RGB (size, size, 3), out of the smear; beyond the smear its edge is mirrored.

        The `matrix`, float64 (2, 2), turns (x, y) in the view, from its centre, into (x, y) in the smear. The
        `offset`, float64 (2,), is (x, y) of the view's centre in the smear, from the smear's corner.
        """
        shrink = math.sqrt(abs(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]))
        level = max(0, math.floor(math.log2(shrink) + 1e-9))
        while len(self.levels) <= level and min(self.levels[-1].shape[:2]) > 1:
            height, width = (side // 2 for side in self.levels[-1].shape[:2])
            even = self.levels[-1][: 2 * height, : 2 * width]
            self.levels.append(np.asarray(cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA)))
        level = min(level, len(self.levels) - 1)
        matrix, offset = matrix / 2**level, offset / 2**level
        source, corner = _window(self.levels[level], matrix, offset, size)
        # OpenCV measures from the centre of the first pixel.
        first = matrix @ np.full(2, 0.5 - size / 2) + offset - 0.5 - corner
        warp = np.hstack([matrix, first[:, None]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        view = cv2.warpAffine(source, warp, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT)
        return np.asarray(view, np.uint8)


def _window(
    image: np.ndarray, matrix: np.ndarray, offset: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The part of an image that a view needs, and (x, y) of its corner.

    OpenCV cannot warp out of an image of more than 32,767 px.
    """
    reach = np.abs(matrix).sum(axis=1) * size / 2 + 2
    sides = np.array(image.shape[1::-1])
    low, high = np.floor(offset - reach), np.ceil(offset + reach)
    # Beyond an edge the view needs as many px mirrored.
    low, high = np.minimum(low, 2 * sides - high), np.maximum(high, -low)
    (left, top), (right, bottom) = np.clip(low, 0, sides).astype(int), np.clip(high, 0, sides).astype(int)
    return image[top:bottom, left:right], np.array([left, top])


def view_matrix(change: Change, scale: float | np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray]:
    """The matrix of a view for `Pyramid.warped`, and the shift of its centre in px of the smear.

    `scale` is px of the smear per px of the view; (x, y) if they differ, as the view is resized at the end.
    `side` is the px of the smear that correspond to a shift of 1.
    """
    angle = math.radians(change.rotate)
    cos, sin = math.cos(angle), math.sin(angle)
    back = np.array([[cos, sin], [-sin, cos]]) / change.scale
    for _ in range(change.turns):
        back = np.array([[0.0, 1.0], [-1.0, 0.0]]) @ back
    if change.flip:
        back = np.array([[-1.0, 0.0], [0.0, 1.0]]) @ back
    return back @ np.diag(np.broadcast_to(scale, 2)), -side * back @ np.array(change.shift)


def recoloured(view: np.ndarray, change: Change) -> np.ndarray:
    """A view with its colours, focus and noise changed: uint8 RGB, (size, size, 3)."""
    if change.hue or change.saturation:
        hue = int(change.hue / 255 * 180)  # OpenCV's hue has 180 steps
        saturation = np.clip(_BYTES + change.saturation, 0, 255)
        table = np.stack([(_BYTES + hue) % 180, saturation, _BYTES], axis=-1).astype(np.uint8)
        shifted = cv2.LUT(cv2.cvtColor(view, cv2.COLOR_RGB2HSV), table[None])
        view = np.asarray(cv2.cvtColor(shifted, cv2.COLOR_HSV2RGB))
    if change.brightness != 1:
        view = np.asarray(cv2.LUT(view, np.clip(_BYTES * change.brightness, 0, 255).astype(np.uint8)))
    if change.blur > 1e-3:  # this limit and the window are those of imgaug
        reach = 3.3 if change.blur < 3 else 2.9 if change.blur < 5 else 2.6
        window = max(5, int(reach * change.blur)) | 1
        border = cv2.BORDER_REFLECT_101
        view = np.asarray(cv2.GaussianBlur(view, (window, window), change.blur, borderType=border))
    if change.noise > 0:
        drawn = np.random.SFC64([change.seed, 1]).random_raw(-(-view.size // 8)).view(np.uint8)
        noise = cv2.LUT(
            drawn[: view.size].reshape(view.shape), np.rint(change.noise * _NORMAL).astype(np.int16)
        )
        view = np.asarray(cv2.add(view, noise, dtype=cv2.CV_8U))
    return view


def make_augmenter(
    settings: Augment, size: int, field: tuple[int, int] | None = None, change: Change | None = None
) -> Any:
    """The augmentations as an imgaug augmenter: geometry, centre crop, stain, lamp, focus and camera.

    It takes the square around an item that is `source_factor` times as wide as a view of `size` px. The
    numbers in `change` replace the ranges of `settings`. The centre crop has the size of a view, or
    `field` (height, width) px and is then resized.
    """
    height, width = field or (size, size)
    iaa = _imgaug()
    reach = 1 / source_factor(settings)  # side of a view in sides of its source
    flip, turns = (0.5, (0, 3)) if change is None else (float(change.flip), change.turns)

    def wide(name: str, around: float) -> Any:
        """The range of a setting, or its number in `change`."""
        setting = getattr(settings, name)
        return (around - setting, around + setting) if change is None else getattr(change, name)

    shift = (-settings.shift * reach, settings.shift * reach)
    shifts = (shift, shift) if change is None else tuple(reach * each for each in change.shift)
    return iaa.Sequential(
        [
            iaa.Fliplr(flip),
            iaa.Rot90(turns, keep_size=False),
            iaa.Affine(
                rotate=wide("rotate", 0),
                scale=wide("scale", 1),
                translate_percent=dict(zip("xy", shifts, strict=True)),
                mode="reflect",
            ),
            iaa.CenterCropToFixedSize(width, height),
            iaa.Resize(size, interpolation="area") if field else iaa.Identity(),
            iaa.AddToHue(wide("hue", 0)),
            iaa.AddToSaturation(wide("saturation", 0)),
            iaa.Multiply(wide("brightness", 1)),
            iaa.GaussianBlur((0.0, settings.blur) if change is None else change.blur),
            iaa.AdditiveGaussianNoise(
                scale=(0.0, settings.noise) if change is None else change.noise, per_channel=True
            ),
        ]
    )


def _imgaug() -> Any:
    """Import imgaug 0.4, which needs `numpy.sctypes`; NumPy 2 has removed it, so it is defined here."""
    if not hasattr(np, "sctypes"):
        vars(np)["sctypes"] = {
            "int": [np.int8, np.int16, np.int32, np.int64],
            "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
            "float": [np.float16, np.float32, np.float64],
            "complex": [np.complex64, np.complex128],
            "others": [bool, object, bytes, str, np.void],
        }
    import imgaug.augmenters as iaa

    return iaa
