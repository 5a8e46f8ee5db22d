"""Reads TIFF by tifffile and imagecodecs, which decode what Pillow decodes wrongly or not at all.

One picture is read from a file, or none: of several pages the largest, if the others are marked as smaller
copies, or look like it; or three pages that are the channels red, green and blue. All else is an error.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from aplsmear.images.pixels import (
    SAVE_AS_RGB,
    TURNED,
    ImageError,
    Picture,
    as_rgb,
    check_area,
    on_white,
    scaled,
    upright,
)

_JPEG = 7
_COMPRESSIONS = {1, 2, 3, 4, 5, _JPEG, 8, 32773, 32946, 34925, 50000}  # their decoders stop at a given size
_KINDS = {0: "grey", 1: "grey", 2: "colour", 3: "palette", 5: "CMYK", 6: "YCbCr"}  # PhotometricInterpretation
_MOST_PAGES, _MOST_BYTES = 1000, 2 * 1024**3
_MOST_PARTS = 100_000  # tiles or strips; 150 million px are 36,864 tiles of 64 px, each of 0.05 ms and more
_SIMILAR = 0.9  # correlation of a picture and its smaller copy; two fields of one smear have less than 0.5
_SMALL = 32  # px; both are compared at this size
_CHANNEL = re.compile(r"(?i)\b(red|green|blue|r|g|b)\b")
_PURE = {(255, 0, 0): "red", (0, 255, 0): "green", (0, 0, 255): "blue", (255, 255, 255): ""}
_AXES = {"C": "channels", "Z": "heights of focus", "T": "times"}
_UNNAMED = re.compile(r"(?i)(channel|ch|c)?[\s:_]*\d*")

_LOG = logging.getLogger("tifffile")
_LOG.propagate = False


class _Errors(logging.Handler):
    """Keeps the errors that tifffile writes to its log in this thread, and then ignores."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.thread, self.found = threading.get_ident(), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            self.found.append(re.sub("<[^>]*> ?", "", record.getMessage()))


def size_of(file: IO[bytes]) -> tuple[int, int]:
    """Height and width of the upright picture in px; errors as of `read`."""
    with _opened(file) as tif:
        page = _main(tif)[0].keyframe
        height, width = page.imagelength, page.imagewidth
        return (width, height) if _orientation(page) in TURNED else (height, width)


def read(file: IO[bytes]) -> Picture:
    """Read the picture of a TIFF file, upright.

    Raises:
        ImageError: it is not clear which picture is meant or how its numbers are seen, or it is too large.
        Exception: of tifffile or imagecodecs: the file is damaged.
    """
    with _opened(file) as tif:
        series, notes = _main(tif)
        page = series.keyframe
        axes = "".join(axis for axis in series.axes if axis in "CYXS")
        values = series.asarray(maxworkers=1)
        if "C" in axes:
            order, named = channel_order(tif, series)
            values = np.moveaxis(values, axes.index("C"), -1)[:, :, order]
            notes += () if named else ("3 channels without names were taken as red, green and blue",)
        elif "S" in axes:
            values = np.moveaxis(values, axes.index("S"), -1)
        else:
            values = values[:, :, None]
        picture = _in_rgb(values.astype(values.dtype.newbyteorder("="), copy=False), page, _bits(tif, page))
        rgb = np.require(upright(picture.pixels, _orientation(page)), requirements=["C", "W"])
        return Picture(rgb, notes + picture.notes, picture.levels)


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[Any]:
    """The file in tifffile; formats that would read other files of the folder are switched off."""
    errors = _Errors()
    _LOG.addHandler(errors)
    try:
        with tifffile.TiffFile(
            file, name="picture", _multifile=False, is_mmstack=False, is_ndtiff=False, is_scanimage=False
        ) as tif:
            yield tif
    finally:
        _LOG.removeHandler(errors)
    if errors.found:
        raise ValueError(errors.found[0])


def _orientation(page: Any) -> int:
    return int(page.tags.valueof(274, 1) or 1)


# --- which picture ----------------------------------------------------------------------------------


def _main(tif: Any) -> tuple[Any, tuple[str, ...]]:
    """The series of pages that holds the picture, and notes."""
    if len(tif.pages) > _MOST_PAGES:
        raise ImageError("", f"more than {_MOST_PAGES} pictures in one file", "save each picture as a file")
    others = _pages(tif)
    if "Along" in (tif.ome_metadata or ""):  # tifffile would count as many planes as the text claims
        raise ImageError("", "a stack of pictures (OME)", SAVE_AS_RGB)
    if not tif.series:
        raise ImageError("", "a TIFF without a picture", "copy it again from its source")
    main = max(tif.series, key=lambda one: one.keyframe.imagelength * one.keyframe.imagewidth)
    pages = list(main)
    _check(pages)
    lengths = dict(zip(main.axes, main.shape, strict=True))
    planes = {axis: length for axis, length in lengths.items() if axis not in "YXS" and length > 1}
    if planes and (planes.keys() != {"C"} or planes["C"] != 3 or lengths.get("S", 1) != 1):
        counts = ", ".join(f"{length} {_AXES.get(axis, 'pages')}" for axis, length in planes.items())
        raise _several(math.prod(planes.values()), f"planes of the same size ({counts})")
    own = {page.offset for page in pages}
    others = [page for page in others if page.offset not in own and not (page.is_reduced or page.is_mask)]
    others = [page for page in others if not page.is_subifd or _area(page) >= _area(main.keyframe)]
    if others:
        _check(others)
        shown = _small(main, main.keyframe)
        if not all(_similar(shown, _small(page, page), main.keyframe, page) for page in others):
            raise _several(1 + len(others), "different pictures")
    count = len(tif.pages)
    several = count > 1 and "C" not in planes
    return main, ((f"the largest of {count} pictures in its file",) if several else ())


def _several(count: int, what: str) -> ImageError:
    return ImageError(
        "", f"a TIFF of {count} {what}", "save the one that is meant as a file, or each with a row of its own"
    )


def _pages(tif: Any) -> list[Any]:
    """All pages and their SubIFDs, whatever the series of tifffile hold."""
    found = []
    for page in list(tif.pages):
        found.append(page)
        for number, offset in enumerate(page.subifds or ()):
            tif.filehandle.seek(offset)
            found.append(tifffile.TiffPage(tif, (page.index, number)))
    return found


def _area(page: Any) -> int:
    return int(page.imagelength) * int(page.imagewidth)


def _check(pages: Sequence[Any]) -> None:
    """Raise an error unless the pixels of these pages can be decoded, whole and in limited memory."""
    if any(page is None for page in pages):
        raise ImageError("", "a TIFF whose description names pictures that it does not hold", SAVE_AS_RGB)
    page = pages[0].keyframe
    check_area(_area(page))
    if sum(each.keyframe.nbytes for each in pages) > _MOST_BYTES:
        raise ImageError("", "more than 2 GiB of pixels", "save it as 8-bit RGB")
    size = page.parent.filehandle.size
    for each in pages:
        key = each.keyframe
        if key.compression not in _COMPRESSIONS:
            name = getattr(key.compression, "name", key.compression)
            raise ImageError("", f"a TIFF with the compression {name}", "save it as PNG")
        if max(math.prod(key.chunked), len(each.dataoffsets)) > _MOST_PARTS:
            raise ImageError("", f"a TIFF of more than {_MOST_PARTS:,} tiles or strips", "save it as PNG")
        where = list(zip(each.dataoffsets, each.databytecounts, strict=True))
        missing = len(where) < math.prod(key.chunked)
        if key.is_contiguous:  # one piece of data, for a stack of ImageJ with one page only
            where, missing = [(each.dataoffsets[0], each.keyframe.nbytes)], False
        if missing or any(not count or start + count > size for start, count in where):
            raise ImageError("", "truncated or damaged (parts are missing)", "copy it again from its source")
        if key.compression == _JPEG:
            _check_jpegs(each, where)


def _check_jpegs(page: Any, where: Sequence[tuple[int, int]]) -> None:
    """Raise an error if a JPEG in a TIFF is larger than its place, or has many scans."""
    high, wide = page.keyframe.chunks[:2] if len(page.keyframe.chunks) < 3 else page.keyframe.chunks[-3:-1]
    if page.keyframe.planarconfig == 2:
        high, wide = page.keyframe.chunks[-2:]
    for start, count in where:
        page.parent.filehandle.seek(start)
        data = page.parent.filehandle.read(count)
        _, height, width, _ = tifffile.tifffile.jpeg_shape(data)
        if height > high or width > wide or data.count(b"\xff\xda") > 200:
            raise ImageError("", "a JPEG in the TIFF that is larger than its place", "save it as PNG")


def _small(source: Any, page: Any) -> npt.NDArray[np.float32]:
    """The brightness of a page or series, 32 px wide and high."""
    axes = "".join(axis for axis in source.axes if axis in "CYXS")
    values = np.asarray(source.asarray(maxworkers=1))
    if page.photometric == 3:
        raise ImageError("", "a TIFF of several pictures with palettes", SAVE_AS_RGB)
    channel = next((axes.index(axis) for axis in "CS" if axis in axes), None)
    grey = values if channel is None else np.moveaxis(values, channel, -1)[:, :, 1]
    small = cv2.resize(grey.astype(np.float32), (_SMALL, _SMALL), interpolation=cv2.INTER_AREA)
    return np.asarray(-small if page.photometric == 0 else small, np.float32)


def _similar(one: npt.NDArray[Any], other: npt.NDArray[Any], page: Any, copy: Any) -> bool:
    """Whether two pages have the same form and nearly the same brightness everywhere."""
    form = page.imagewidth * copy.imagelength / (page.imagelength * copy.imagewidth)
    if not 0.95 < form < 1.05 or _area(copy) == _area(page) or min(one.std(), other.std()) < 1e-6:
        return False
    return bool(np.corrcoef(one.ravel(), other.ravel())[0, 1] > _SIMILAR)


def channel_order(tif: Any, series: Any) -> tuple[list[int], bool]:
    """The places of red, green and blue among three channels, and whether the file names them."""
    names, colours = _channels(tif, series)
    for texts in (names, colours):
        found = [match.group(1)[0].lower() if (match := _CHANNEL.search(text)) else "" for text in texts]
        if sorted(found) == ["b", "g", "r"]:
            return [found.index(each) for each in "rgb"], True
    if any(not _UNNAMED.fullmatch(name.strip()) for name in names) or any(colours):
        # ImageJ puts names of files there.
        shown = f" ({', '.join(names)})"[:80] if series.kind == "ome" else ""
        raise ImageError("", f"three channels that are not red, green and blue{shown}", SAVE_AS_RGB)
    return [0, 1, 2], False


def _channels(tif: Any, series: Any) -> tuple[list[str], list[str]]:
    """Names of the channels, and the names of their colours; '' where they have none."""
    if series.kind == "ome":
        found = re.findall(r"<(?:\w+:)?Channel\b[^>]*>", tif.ome_metadata)[:3]
        numbers = [re.search(r'\bColor="(-?\d+)"', each) for each in found]
        colours = [int(each.group(1)) >> 8 & 0xFFFFFF if each else 0xFFFFFF for each in numbers]  # RGBA
        brightest = [(each >> 16, each >> 8 & 255, each & 255) for each in colours]
        matches = [re.search(r'\bName="([^"]*)"', each) for each in found]
        names = [each.group(1) if each else "" for each in matches]
    else:
        meta = tif.imagej_metadata or {}
        names = [str(each) for each in meta.get("Labels", ())[:3]]
        brightest = [tuple(np.asarray(table)[:, -1].tolist()) for table in meta.get("LUTs", ())[:3]]
    return names, [_PURE.get(each, "other") for each in brightest]


# --- what its numbers are ---------------------------------------------------------------------------


def _bits(tif: Any, page: Any) -> int | None:
    """The number of significant bits, where the file names fewer than it stores; None where it does not."""
    stored = page.dtype.itemsize * 8 if page.dtype is not None else 0
    named = [page.bitspersample]
    if match := re.search(r'SignificantBits="(\d{1,2})"', tif.ome_metadata or ""):
        named.append(int(match.group(1)))
    top = page.tags.valueof(281)  # MaxSampleValue
    if stored == 16 and top is not None:
        named.append(max(8, int(np.max(top)).bit_length()))
    fewer = [each for each in named if isinstance(each, int) and 0 < each < stored]
    return min(fewer) if fewer else None


def _in_rgb(values: npt.NDArray[Any], page: Any, bits: int | None) -> Picture:
    """Channels of a page as RGB."""
    photometric, channels = int(page.photometric), values.shape[2]
    if photometric not in _KINDS or (photometric == 5 and page.tags.valueof(332, 1) != 1):  # other inks
        name = getattr(page.photometric, "name", photometric)
        raise ImageError("", f"a TIFF with colours of the kind {name}", SAVE_AS_RGB)
    if photometric == 3:
        return _by_palette(values, page)
    colours = {0: 1, 1: 1, 5: 4}.get(photometric, 3)
    extra = tuple(int(each) for each in page.extrasamples)
    notes: tuple[str, ...] = ()
    if colours == 1 and channels == 3 and not any(extra):
        colours, extra = 3, ()
        notes = ("3 channels without names were taken as red, green and blue",) if len(page.shape) > 2 else ()
    if channels < colours or (colours == 1 and channels > 2):
        raise ImageError("", f"a TIFF of {channels} channels ({_KINDS[photometric]})", SAVE_AS_RGB)
    if channels > colours + (extra[:1] in ((1,), (2,))):
        notes += ("a channel that is neither a colour nor opacity was left aside",)
    alpha = channels > colours and extra[:1] in ((1,), (2,))
    shown = scaled(values[:, :, : colours + alpha], bits, colours)
    eight = shown.pixels[:, :, :colours]
    if photometric == 0:
        eight = 255 - eight
        notes += ("a negative by its tags: its brightness was turned round",)
    if photometric == 6 and page.compression != _JPEG:
        eight = cv2.cvtColor(np.ascontiguousarray(eight[:, :, [0, 2, 1]]), cv2.COLOR_YCrCb2RGB)
    rgb, of_profile = as_rgb(np.ascontiguousarray(eight), page.iccprofile)
    if alpha:
        rgb = on_white(rgb, shown.pixels[:, :, colours], extra[0] == 1)
    return Picture(rgb, notes + shown.notes + of_profile, shown.levels)


def _by_palette(values: npt.NDArray[Any], page: Any) -> Picture:
    """Numbers of colours as RGB; the colours have 16 bits, or 8 if none is above 255."""
    table = page.colormap
    if table is None or values.shape[2] != 1 or table.shape[1] <= int(values.max(initial=0)):
        raise ImageError("", "a palette that does not fit its pixels", SAVE_AS_RGB)
    colours = (table if table.max() < 256 else table >> 8).astype(np.uint8).T
    return Picture(np.ascontiguousarray(colours[values[:, :, 0]]))
