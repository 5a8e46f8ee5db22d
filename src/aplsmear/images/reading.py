"""Reads pictures of smears as 8-bit RGB, and encodes views as JPEG.

Pillow decodes the pictures: it supports rare modes (palette, alpha, CMYK, 16 bits), reports truncated files,
and its libjpeg-turbo gives the same pixels on every x86-64 machine.
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from aplsmear.errors import UserError

Rgb = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "TIFF")
MAX_PIXELS = 150_000_000  # 30 fields of 2560x1920 px; below Pillow's own limit against decompression bombs
_BACKGROUND = (255, 255, 255, 255)  # replaces transparent pixels: an empty bright field is white
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_PLAIN = {"1", "L", "P", "RGB", "CMYK", "YCbCr"}
_SEE_THROUGH = {"LA", "La", "PA", "RGBA", "RGBa"}
MAX_BYTES = 2 * 1024**3  # of a file; MAX_PIXELS with four channels of 16 bits are 1.2e9 bytes
_MAX_SCANS = 200  # of a JPEG; a progressive JPEG has about ten, and each scan is a pass over all pixels
_FULL_COLOUR = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
_SCAN = b"\xff\xda"
_DARK = 16  # of 256; a 16-bit picture whose upper bytes are all smaller holds 12 bits or fewer


class ImageError(UserError, ValueError):
    """A picture cannot be read.

    Attributes:
        path: the file as the caller named it ('' for bytes).
        what: what is wrong with it.
        fix: what the user can do.
    """

    def __init__(self, path: str | Path, what: str, fix: str) -> None:
        """Store the parts, so that a table of problems can show them in columns."""
        super().__init__(str(path), what, fix)
        self.path, self.what, self.fix = path, what, fix

    def __str__(self) -> str:
        """One line: file, what is wrong, what to do."""
        return f"{self.path}: {self.what}; {self.fix}" if str(self.path) else f"{self.what}; {self.fix}"


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Rgb:
    """Read a whole PNG, JPEG or TIFF picture, upright.

    Grey, palette, CMYK and 16-bit pictures are converted to RGB (of 16 bits the upper eight are kept).
    Transparent pixels become white. The EXIF orientation is applied. If a file holds several pictures (levels
    of a pyramid, a preview), the first one is read.

    Args:
        path: the file.
        max_pixels: a larger picture is an error.

    Returns:
        uint8, shape (height, width, 3), RGB.

    Raises:
        ImageError: the file is missing, is no picture, is truncated or damaged, has a mode that cannot be
            converted to 8-bit RGB without a guess (float, 32-bit, Lab, 12 bits stored as 16), or has more
            than `max_pixels` pixels.
    """
    with _open_file(path) as file:
        return _decode(file, path, max_pixels)


def image_bytes(path: Path) -> bytes:
    """The content of a picture file.

    Raises:
        ImageError: the file is missing, cannot be opened or has more than 2 GiB.
    """
    with _open_file(path) as file:
        return file.read()


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of the upright picture in px; only the header of the file is decoded.

    Args:
        path: the file.
        max_pixels: a larger picture is an error.

    Raises:
        ImageError: the file is missing, is no picture, or has more than `max_pixels` pixels.
    """
    with _open_file(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _open_picture(file, path, max_pixels) as picture:
                turned = picture.getexif().get(ExifTags.Base.Orientation) in _TURNED
                turned &= picture.format != "TIFF"  # whose size Pillow gives upright
                width, height = picture.size
        except ImageError:
            raise
        except Exception as error:
            raise _damaged(path, error) from error
    return (width, height) if turned else (height, width)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Rgb:
    """Decode the bytes of a picture file; see `read_image`.

    Args:
        data: content of a PNG, JPEG or TIFF file.
        max_pixels: a larger picture is an error.

    Returns:
        uint8, shape (height, width, 3), RGB.

    Raises:
        ImageError: as `read_image`; its path is empty.
    """
    return _decode(io.BytesIO(data), "", max_pixels)


def decode_jpeg(data: bytes) -> Rgb:
    """Decode a JPEG of `encode_jpeg`: the same pixels as `decode`, four times as fast.

    Returns:
        uint8, shape (height, width, 3), RGB.

    Raises:
        ImageError: the JPEG is damaged.
    """
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise ImageError("", "truncated or damaged", "make the views again")
    return np.asarray(picture, dtype=np.uint8)


def encode_jpeg(rgb: Rgb, quality: int = 95) -> bytes:
    """Encode a view as JPEG with full colour resolution (4:4:4): granules and Auer rods differ in colour.

    Args:
        rgb: uint8, shape (height, width, 3).
        quality: of libjpeg, 1 to 100.

    Returns:
        The JPEG; the same bytes for the same pixels on every machine.

    Raises:
        ValueError: `rgb` has another type or shape.
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
        if not path.is_file():
            raise ImageError(path, "not a file", "put a picture there or remove its row")
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(path, "a file of more than 2 GiB", "save only its picture, as PNG")
        return path.open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(
            path, f"cannot be opened ({reason})", "check the name and the permissions of the file"
        ) from error


def _open_picture(file: IO[bytes], path: str | Path, max_pixels: int) -> ImageFile.ImageFile:
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        what = (
            "empty file"
            if file.seek(0, io.SEEK_END) == 0
            else "not a PNG, JPEG or TIFF picture, or its header is damaged"
        )
        raise ImageError(path, what, "copy it again from its source, or save it as PNG") from None
    except Image.DecompressionBombError:
        raise _too_large(path, max_pixels) from None
    if math.prod(picture.size) > max_pixels:
        raise _too_large(path, max_pixels)
    if picture.format == "JPEG" and _scans(file) > _MAX_SCANS:
        raise ImageError(path, f"a JPEG of more than {_MAX_SCANS} scans", "save it as PNG")
    return picture


def _scans(file: IO[bytes]) -> int:
    """Upper limit of the number of scans in a JPEG file; the read position stays where it was."""
    position = file.tell()
    file.seek(0)
    count = sum(block.count(_SCAN) for block in iter(lambda: file.read(1 << 20), b""))
    file.seek(position)
    return count


def _too_large(path: str | Path, max_pixels: int) -> ImageError:
    return ImageError(path, f"more than {max_pixels // 10**6} million pixels", "cut the picture into fields")


def _damaged(path: str | Path, error: Exception) -> ImageError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return ImageError(path, f"truncated or damaged ({reason})", "copy it again from its source")


def _decode(file: IO[bytes], path: str | Path, max_pixels: int) -> Rgb:
    # A decoder may raise nearly any exception on damaged bytes: each of them means "damaged". Warnings are
    # about broken EXIF data and large pictures, not about pixels.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _open_picture(file, path, max_pixels) as picture:
                deep = _bits_are_deep(picture)
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
                return _to_rgb(picture, path, deep)
        except ImageError:
            raise
        except MemoryError:
            raise ImageError(path, "does not fit into memory", "cut the picture into fields") from None
        except Exception as error:
            raise _damaged(path, error) from error


def _bits_are_deep(picture: ImageFile.ImageFile) -> bool:
    """Whether the file stores 16 bits per channel (Pillow keeps the upper eight bits of colours)."""
    raw = picture.tile[0].args if picture.tile else ""
    mode = raw[0] if isinstance(raw, tuple) and raw else raw
    return ";16" in str(mode)


def _to_rgb(picture: Image.Image, path: str | Path, deep: bool) -> Rgb:
    mode = picture.mode
    if mode.startswith("I;16"):
        grey = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
        rgb = np.repeat(grey[:, :, None], 3, axis=2)
    elif mode in _SEE_THROUGH or "transparency" in picture.info:
        whole = picture.convert("RGBA")
        rgb = np.asarray(
            Image.alpha_composite(Image.new("RGBA", whole.size, _BACKGROUND), whole).convert("RGB")
        )
    elif mode in _PLAIN:
        rgb = np.asarray(picture if mode == "RGB" else picture.convert("RGB"))
    else:
        raise ImageError(
            path, f"pixels of mode {mode}, expected 8 or 16 bits a channel", "save it as 8-bit RGB"
        )
    if deep and rgb.size and int(rgb.max()) < _DARK:
        raise ImageError(
            path, "a 16-bit picture that uses 12 bits or fewer: it would be read as black",
            "save it as 8-bit RGB, as bright as on the screen",
        )  # fmt: skip
    return np.array(rgb, dtype=np.uint8, order="C", copy=not rgb.flags.writeable)


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
