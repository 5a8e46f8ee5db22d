"""Turns pixels of any depth and colour model into 8-bit RGB.

Nothing is guessed without a word: each step that a person may want to check adds a note to the picture.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from aplsmear.errors import UserError

Rgb = npt.NDArray[np.uint8]

SAVE_AS_RGB = "save it as 8-bit RGB (PNG), as bright as on the screen"
CUT = "cut the picture into fields; of a slide: aplsmear fields SLIDE --to DIR"
MAX_PIXELS = 150_000_000  # 30 fields of 2560x1920 px; below Pillow's own limit against decompression bombs
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_DEPTHS = (8, 10, 12, 14)  # bits that cameras use of 16
_BURNT_IN = 0.02  # of the pixels may be brighter than the levels of the camera: scale bars, names, hot pixels
_SAMPLE = 4_000_000  # pixels of the histogram
_WHITE = 65535
_FLOAT_RANGES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)
_ROWS = 256  # converted at once, so that large pictures need little memory
_SAME_COLOUR = 2  # levels of 256


class ImageError(UserError, ValueError):
    """A picture cannot be read."""

    def __init__(self, path: str | Path, what: str, fix: str) -> None:
        """Store the file as the caller named it ('' for bytes), what is wrong, and what the user can do."""
        super().__init__(str(path), what, fix)
        self.path, self.what, self.fix = path, what, fix

    def __str__(self) -> str:
        """One line: file, what is wrong, what to do."""
        return f"{self.path}: {self.what}; {self.fix}" if str(self.path) else f"{self.what}; {self.fix}"


def check_area(pixels: float) -> None:
    """Raise ImageError if a picture has no pixels or more than `MAX_PIXELS`."""
    if pixels < 1:
        raise ImageError("", "a picture without pixels: a side of 0 px", "copy it again from its source")
    if pixels > MAX_PIXELS:
        raise ImageError("", f"more than {MAX_PIXELS // 10**6} million pixels", CUT)


class Picture(NamedTuple):
    """A decoded picture."""

    pixels: Rgb  # uint8, shape (height, width, 3), RGB; of `scaled`: as many channels as there were
    notes: tuple[str, ...] = ()  # what was decided while it was decoded, for the report of a data set
    levels: str = ""  # the range of brightness, if it was taken from the pixels and not from the file


def scaled(
    values: npt.NDArray[Any], bits: int | None = None, colours: int = 3, gamma: float = 1.0
) -> Picture:
    """Scale channels of any number type to 8 bits.

    Whole numbers of at most 16 bits keep their upper eight bits. Which bits a 16-bit picture uses is taken
    from `bits`, else from the histogram: the fewest bits of 8, 10, 12, 14 and 16 that at most 2 % of the
    pixels exceed. Numbers with a decimal point have the range 0 to 1, 255, 1023, 4095, 16383 or 65535, by the
    same rule.

    Args:
        values: shape (height, width, channels).
        bits: significant bits that the file names; None: it names none.
        colours: number of channels that count for the histogram; others (opacity) keep the full range.
        gamma: exponent of the light, 1 for no change.

    Raises:
        ImageError: the numbers are negative, not finite, complex or above 65535, or contradict `bits`.
    """
    if values.dtype == bool or (values.dtype == np.uint8 and (bits or 8) == 8 and gamma == 1.0):
        return Picture(values.astype(np.uint8) * 255 if values.dtype == bool else values)
    if values.dtype == np.uint8:
        return Picture(_by_table(values, bits or 8, gamma))
    if values.dtype.kind not in "uif" or values.dtype == np.int8:
        raise ImageError("", f"pixels of the type {values.dtype}", SAVE_AS_RGB)
    sample = _sample(values[:, :, :colours])
    if not np.isfinite(sample).all() or (sample.size and float(sample.min()) < 0):
        raise ImageError("", "pixels that are negative or no numbers", SAVE_AS_RGB)
    if values.dtype.kind == "f":
        return _of_floats(values, sample, gamma)
    if values.dtype != np.uint16:
        if int(values.min(initial=0)) < 0 or np.mean(sample > _WHITE) > _BURNT_IN:
            raise ImageError("", "whole numbers that are negative or above 65535", SAVE_AS_RGB)
        top = min(_WHITE, np.iinfo(values.dtype).max)
        if values.dtype == np.int16 and _bits_of(sample) == 16:
            bits = 15
        return scaled(np.minimum(values, top).astype(np.uint16), bits, colours, gamma)
    guessed = _bits_of(sample)
    if bits is not None and bits < min(guessed, 15):
        raise ImageError("", f"its tags name {bits} bits, but its pixels need {guessed}", SAVE_AS_RGB)
    used = bits or guessed
    found = _by_table(values[:, :, :colours], used, gamma)
    if values.shape[2] > colours:
        rest = values[:, :, colours:]
        full = used if int(rest.max(initial=0)) < 2**used else 16
        found = np.concatenate([found, _by_table(rest, full, 1.0)], axis=2)
    if bits is not None:
        return Picture(found, (f"levels of {bits} bits, by its tags",) if bits < 16 else ())
    levels = f"{used} of 16 bits"
    return Picture(found, (f"levels of {levels}, by its histogram",) if used < 16 else (), levels)


def _sample(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The brightest channel of evenly spaced pixels."""
    step = max(1, math.isqrt(values.shape[0] * values.shape[1] // _SAMPLE))
    return np.asarray(values[::step, ::step].max(axis=2))


def _bits_of(sample: npt.NDArray[Any]) -> int:
    """The number of bits that 16-bit pixels use. White that covers less than half can be burnt in."""
    counts = np.bincount(sample.ravel(), minlength=_WHITE + 1)
    if 2 * counts[_WHITE] < counts.sum():
        counts[_WHITE] = 0
    allowed = _BURNT_IN * counts.sum()
    return next((bits for bits in _DEPTHS if counts[2**bits :].sum() <= allowed), 16)


def _by_table(values: npt.NDArray[Any], bits: int, gamma: float) -> npt.NDArray[np.uint8]:
    """Whole numbers of up to 16 bits as 8 bits: the upper eight of `bits`; more than `bits` is white."""
    number = np.minimum(np.arange(np.iinfo(values.dtype).max + 1), 2**bits - 1)
    shown = number >> (bits - 8) if bits > 8 else np.rint(number * (255 / (2**bits - 1)))
    if gamma != 1.0:
        shown = np.rint(255 * (number / (2**bits - 1)) ** gamma)
    table, found = shown.astype(np.uint8), np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):
        found[start : start + _ROWS] = table[values[start : start + _ROWS]]
    return found


def _of_floats(values: npt.NDArray[Any], sample: npt.NDArray[Any], gamma: float) -> Picture:
    top = next((each for each in _FLOAT_RANGES if np.mean(sample > each) <= _BURNT_IN), None)
    if top is None:
        raise ImageError("", "numbers with a decimal point above 65535", SAVE_AS_RGB)
    found = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):
        rows = values[start : start + _ROWS].astype(np.float64)
        if not np.isfinite(rows).all() or rows.min(initial=0) < 0:
            raise ImageError("", "pixels that are negative or no numbers", SAVE_AS_RGB)
        found[start : start + _ROWS] = np.rint(255 * np.minimum(rows / top, 1) ** gamma)
    levels = f"{values.dtype} from 0 to {top:g}"
    return Picture(found, (f"levels of {levels}, by its histogram",), levels)


def on_white(colours: npt.NDArray[np.uint8], alpha: npt.NDArray[np.uint8], ready: bool) -> Rgb:
    """Put RGB (height, width, 3) with an opacity `alpha` (height, width) on white; all uint8.

    `ready`: the colours are multiplied by the opacity already. An ImageError if nothing is opaque.
    """
    if not alpha.any():
        what, fix = (
            "transparent everywhere, so that nothing of it is seen",
            "save it without transparency, as RGB",
        )
        raise ImageError("", what, fix)
    found = np.empty(colours.shape, np.uint8)
    for start in range(0, len(colours), _ROWS):
        cover = alpha[start : start + _ROWS, :, None].astype(np.uint16)
        light = colours[start : start + _ROWS].astype(np.uint16)
        light = light if ready else (light * cover + 127) // 255
        found[start : start + _ROWS] = np.minimum(light + 255 - cover, 255)
    return found


def managed(picture: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """A picture of mode L, RGB or CMYK, by its ICC profile, in sRGB; a note if that changed it."""
    if profile is None:
        plain = ("CMYK was converted to RGB without a colour profile",)
        return picture, plain if picture.mode == "CMYK" else ()
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != {"L": "GRAY"}.get(picture.mode, picture.mode):
            return picture, ()  # common, and ignored by all viewers: a profile for other channels
        # PERCEPTUAL is the intent that profiles of cameras and printers have tables for.
        change = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), picture.mode, "RGB", ImageCms.Intent.PERCEPTUAL
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return picture, ("a colour profile that cannot be read was left aside",)
    if picture.mode != "CMYK" and _changes_little(change, picture.mode):
        return picture, ()
    found = ImageCms.applyTransform(picture, change)
    if found is None:
        raise ImageError("", "its colour profile cannot be applied", "save it as sRGB")
    return found, ("its colour profile was converted to sRGB",)


def _changes_little(change: Any, mode: str) -> bool:
    """Whether a transform leaves an even grid of colours as it is."""
    from PIL import ImageCms

    steps = np.arange(0, 256, 15, dtype=np.uint8)
    grid = steps[:, None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), axis=-1)
    probe = Image.fromarray(grid.reshape(grid.shape[0], -1, *([] if mode == "L" else [3])))
    found = ImageCms.applyTransform(probe, change)
    one, other = (np.asarray(each, dtype=int) for each in (found, probe.convert("RGB")))
    return bool(np.abs(one - other).max() <= _SAME_COLOUR)


def as_rgb(pixels: npt.NDArray[np.uint8], profile: bytes | None = None) -> tuple[Rgb, tuple[str, ...]]:
    """8-bit grey, RGB or CMYK (by the number of channels: 1, 3 or 4) as RGB, with a note on its profile."""
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[pixels.shape[2]]
    if profile is None and mode != "CMYK":
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))), ()
    flat = np.ascontiguousarray(pixels[:, :, 0] if mode == "L" else pixels)
    size = (pixels.shape[1], pixels.shape[0])
    picture, notes = managed(Image.frombytes(mode, size, flat.tobytes()), profile)
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"), np.uint8), notes


def upright(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Turn pixels as the EXIF or TIFF tag Orientation (1 to 8) demands."""
    if orientation in TURNED:
        pixels = pixels.swapaxes(0, 1)
    flips: dict[int, tuple[int, ...]] = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}
    return np.flip(pixels, flips[orientation]) if orientation in flips else pixels
