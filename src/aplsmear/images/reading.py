"""Reads pictures of smears as 8-bit RGB, and encodes views as JPEG.

Pillow decodes JPEG and PNG: it supports rare modes (palette, alpha, CMYK), reports truncated files, and its
libjpeg-turbo gives the same pixels on every x86-64 machine. Of a PNG with 16 bits it keeps the upper eight,
so that imagecodecs decodes it. TIFF is decoded by tifffile (see tiff.py). Both are imported only for such
files.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from aplsmear.images.pixels import (
    CUT,
    TURNED,
    ImageError,
    Picture,
    Rgb,
    as_rgb,
    check_area,
    managed,
    on_white,
    scaled,
    upright,
)

__all__ = ["ImageError", "Picture", "Rgb", "decode", "decode_jpeg", "encode_jpeg", "fitting", "image_bytes"]
__all__ += ["image_size", "is_picture_name", "read_image", "read_picture", "resize", "scaling"]

FORMATS = ("JPEG", "PNG")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".svslide", ".czi")  # of scanners
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
_SCREEN_GAMMA = 1 / 2.2
_APPLE_DOUBLE = b"\0\x05\x16\x07"
_SEE_THROUGH = {"LA", "La", "PA", "RGBA", "RGBa"}
MAX_BYTES = 2 * 1024**3  # of a file; MAX_PIXELS with four channels of 16 bits are 1.2e9 bytes
_MAX_SCANS = 200  # of a JPEG; a progressive JPEG has about ten, and each scan is a pass over all pixels
_FULL_COLOUR = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
_SCAN = b"\xff\xda"


def is_picture_name(name: str) -> bool:
    """Whether a file in a folder of pictures is one by its name: not ``._a.jpg``, .DS_Store or Thumbs.db."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def read_image(path: Path) -> Rgb:
    """Read a whole PNG, JPEG or TIFF picture, upright.

    Grey, palette, CMYK, floats and pictures of up to 16 bits are converted to 8-bit RGB (`pixels.scaled` says
    how). Transparent pixels become white. The EXIF orientation, a colour profile and the gamma of a PNG are
    applied. If a file holds several pictures, the largest is read if the others are smaller copies of it.

    Returns:
        uint8, shape (height, width, 3), RGB.

    Raises:
        ImageError: the file is missing, is no picture, is truncated or damaged, holds several pictures or
            colours that cannot be converted to RGB without a guess (Lab, raw data of a camera), or has more
            than 150 million pixels.
    """
    with _open_file(path) as file:
        return _decode(file, path).pixels


def image_bytes(path: Path) -> bytes:
    """The content of a picture file; ImageError if it is missing, cannot be opened or has more than 2 GiB."""
    with _open_file(path) as file:
        return file.read()


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright picture in px; only the header of the file is decoded.

    Raises:
        ImageError: the file is missing, is no picture, or has more than 150 million pixels.
    """
    with _open_file(path) as file, _decoding(path):
        if _is_tiff(file):
            from aplsmear.images import tiff

            return tiff.size_of(file)
        with _open_picture(file) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ExifTags.Base.Orientation) in TURNED
            return (width, height) if turned else (height, width)


def decode(data: bytes) -> Rgb:
    """As `read_image`, of the content of a file; the path of an ImageError is then empty."""
    return read_picture(data).pixels


def read_picture(data: bytes) -> Picture:
    """As `decode`, with notes on what was decided while the picture was decoded."""
    return _decode(io.BytesIO(data), "")


def decode_jpeg(data: bytes) -> Rgb:
    """Decode a JPEG of `encode_jpeg`: as `decode`, four times as fast; ImageError if it is damaged."""
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise ImageError("", "truncated or damaged", "make the views again")
    return np.asarray(picture, dtype=np.uint8)


def encode_jpeg(rgb: Rgb, quality: int = 95) -> bytes:
    """Encode a view as JPEG with full colour resolution (4:4:4): granules and Auer rods differ in colour.

    `rgb` is uint8 (height, width, 3), else a ValueError; `quality` is that of libjpeg, 1 to 100. The same
    pixels give the same bytes on every machine.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"expected uint8 (height, width, 3), not {rgb.dtype} {rgb.shape}")
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _FULL_COLOUR]
    _, data = cv2.imencode(".jpg", cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2BGR), settings)
    return data.tobytes()


def _open_file(path: Path) -> IO[bytes]:
    try:
        if not path.exists():
            raise ImageError(path, "no such file", "put the picture there or remove its row")
        if path.suffix.lower() in SLIDES:
            raise ImageError(path, "a slide of a scanner, not a picture of one field", CUT)
        if not path.is_file():
            raise ImageError(path, "not a file", "put a picture there or remove its row")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(path, "a file of more than 2 GiB", CUT)
        return path.open("rb") if size else io.BytesIO()  # reading a file of /proc may never end
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        fix = "check the name and the permissions of the file"
        raise ImageError(path, f"cannot be opened ({reason})", fix) from error


@contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    """Turn any exception of a decoder into an `ImageError`; its warnings are not about pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ImageError as error:
            raise ImageError(path, error.what, error.fix) from None
        except MemoryError:
            raise ImageError(path, "does not fit into memory", CUT) from None
        except Exception as error:  # on damaged bytes, a decoder may raise nearly any
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            what = f"truncated or damaged ({reason})"
            raise ImageError(path, what, "copy it again from its source") from error


def _decode(file: IO[bytes], path: str | Path) -> Picture:
    with _decoding(path):
        if _is_tiff(file):
            from aplsmear.images import tiff

            return tiff.read(file)
        with _open_picture(file) as picture:
            notes = _check_frames(picture)
            found = _deep(picture, file) if _bits_are_deep(picture) else _shallow(picture)
            return found._replace(notes=notes + found.notes)


def _is_tiff(file: IO[bytes]) -> bool:
    start = file.read(4)
    file.seek(0)
    return start in _TIFF


def _open_picture(file: IO[bytes]) -> ImageFile.ImageFile:
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise _no_picture(file) from None
    except Image.DecompressionBombError:
        check_area(math.inf)
        raise
    check_area(math.prod(picture.size))
    if picture.format != "PNG" and _scans(file) > _MAX_SCANS:
        raise ImageError("", f"a JPEG of more than {_MAX_SCANS} scans", "save it as PNG")
    return picture


def _no_picture(file: IO[bytes]) -> ImageError:
    """What a file is that Pillow takes for no picture."""
    file.seek(0)
    start = file.read(1 << 16)
    if not start:
        return ImageError("", "empty file", "copy it again from its source, or save it as PNG")
    if start.startswith(_APPLE_DOUBLE):
        return ImageError("", "no picture, but what macOS keeps beside one (._ file)", "delete its row")
    bits = _jpeg_bits(start)
    if bits not in (0, 8):
        return ImageError("", f"a JPEG of {bits} bits", "save it as JPEG of 8 bits, or as PNG")
    what = "not a PNG, JPEG or TIFF picture, or its header is damaged"
    return ImageError("", what, "copy it again from its source, or save it as PNG")


def _jpeg_bits(start: bytes) -> int:
    """Bits per channel of a JPEG; 0 for any other file."""
    place = 2 if start.startswith(b"\xff\xd8") else len(start)
    while place + 4 < len(start) and start[place] == 0xFF:
        if start[place + 1] in (0xC0, 0xC1, 0xC2, 0xC3):
            return start[place + 4]
        place += 2 + int.from_bytes(start[place + 2 : place + 4], "big")
    return 0


def _scans(file: IO[bytes]) -> int:
    """Upper limit of the number of scans in a JPEG file; the read position stays where it was."""
    position = file.tell()
    file.seek(0)
    count = sum(block.count(_SCAN) for block in iter(lambda: file.read(1 << 20), b""))
    file.seek(position)
    return count


def _check_frames(picture: ImageFile.ImageFile) -> tuple[str, ...]:
    """A note if a JPEG holds smaller pictures, too (previews, maps of brightness); others are an error."""
    count = getattr(picture, "n_frames", 1)
    if count == 1:
        return ()
    sizes = []
    for number in range(1, count if picture.format == "MPO" else 1):
        picture.seek(number)
        sizes.append(math.prod(picture.size))
    picture.seek(0)
    if not sizes or max(sizes) >= math.prod(picture.size):
        what = f"{count} pictures in one file ({picture.format})"
        raise ImageError("", what, "save the one that is meant as PNG")
    return (f"the largest of {count} pictures in its file",)


def _bits_are_deep(picture: ImageFile.ImageFile) -> bool:
    """Whether the file stores 16 bits per channel."""
    raw: Any = picture.tile[0].args if picture.tile else ""
    mode = raw[0] if isinstance(raw, tuple) and raw else raw
    return ";16" in str(mode)


def _deep(picture: ImageFile.ImageFile, file: IO[bytes]) -> Picture:
    """Decode a PNG of 16 bits."""
    import imagecodecs

    orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    file.seek(0)
    values = imagecodecs.png_decode(file.read())
    values = values[:, :, None] if values.ndim == 2 else values
    colours = 1 if values.shape[2] < 3 else 3
    power, of_gamma = _gamma(picture)
    found = scaled(values, None, colours, power)
    rgb, notes = as_rgb(found.pixels[:, :, :colours], picture.info.get("icc_profile"))
    if values.shape[2] > colours:
        rgb = on_white(rgb, found.pixels[:, :, colours], False)
    rgb = np.require(upright(rgb, orientation), requirements=["C", "W"])
    return Picture(rgb, found.notes + notes + of_gamma, found.levels)


def _shallow(picture: ImageFile.ImageFile) -> Picture:
    """Decode a picture of 8 bits or fewer."""
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    alpha = None
    if picture.mode in _SEE_THROUGH or "transparency" in picture.info:
        *colours, opacity = picture.convert("RGBA").split()
        alpha, plain = np.asarray(opacity), Image.merge("RGB", colours)
    else:
        plain = picture if picture.mode in ("L", "CMYK", "RGB") else picture.convert("RGB")
    plain, notes = managed(plain, picture.info.get("icc_profile"))
    rgb = np.asarray(plain if plain.mode == "RGB" else plain.convert("RGB"))
    power, of_gamma = _gamma(picture)
    rgb = scaled(rgb, gamma=power).pixels
    if alpha is not None:
        rgb = on_white(rgb, alpha, False)
    return Picture(np.require(rgb, requirements=["C", "W"]), notes + of_gamma)


def _gamma(picture: ImageFile.ImageFile) -> tuple[float, tuple[str, ...]]:
    """The exponent that brings the light of a PNG (chunk gAMA) to that of screens, and a note if not 1."""
    gamma = picture.info.get("gamma", _SCREEN_GAMMA)
    better = {"srgb", "icc_profile"} & picture.info.keys()  # the standard of PNG prefers these
    if better or not 0.2 <= gamma <= 5 or abs(gamma / _SCREEN_GAMMA - 1) < 0.05:
        return 1.0, ()
    return _SCREEN_GAMMA / gamma, ("brightness was converted by its gamma",)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Scale to a square of `size` px: means of areas if it shrinks, linear interpolation if it grows."""
    method = scaling(size / min(image.shape[:2]))
    return np.asarray(cv2.resize(image, (size, size), interpolation=method), dtype=np.uint8)


def scaling(factor: float) -> int:
    """OpenCV's interpolation method for a scale factor: area below 1, otherwise linear."""
    return cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR


def fitting(image: np.ndarray, size: int) -> np.ndarray:
    """A square image of another size is scaled: uint8 (size, size, 3)."""
    return image if image.shape[0] == size else resize(image, size)
