"""Opens the slide of a scanner: its levels, its resolution, and the pixels of a region at any scale.

OpenSlide (Goode et al., J Pathol Inform 2013;4:27) reads the formats of most scanners, pylibCZIrw those of
Zeiss (also with JPEG XR, which OpenSlide does not decode), and tifffile OME-TIFF, of which OpenSlide sees the
largest level only. The packages of the extra `slides` are imported only for such files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from aplsmear.errors import UserError, brief
from aplsmear.images.pixels import Rgb
from aplsmear.images.tiff import channel_order

EXTRA = "pip install 'aplsmear[slides]'"
_CONVERT = (
    "Export it as OME-TIFF, with the scanner's own program, with QuPath (File, Export images) or with "
    "`bfconvert` of Bio-Formats"
)
_CLOSED = {  # ending of the name -> format that no library here reads
    ".vsi": "VSI of Olympus or Evident",
    ".kfb": "KFB of KFBIO",
    ".sdpc": "SDPC of Sqray",
    ".tmap": "TMAP of Unic",
    ".mdsx": "MDSX of Motic",
    ".isyntax": "iSyntax of Philips",
    ".lif": "LIF of Leica",
    ".nd2": "ND2 of Nikon",
    ".zvi": "ZVI of Zeiss",
}
_MPP = (0.02, 10.0)  # micrometres per pixel; 72 dpi, which programs write without meaning it, are 353
_TILES = 64  # decoded tiles of each level that are kept: 50 MB if they have 512 px
_AT_ONCE = 2**26  # px that are read at once: 450 MB
_UNITS = {"": 1.0, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}


class SlideError(UserError, ValueError):
    """A slide cannot be read; the message names its format and a way round."""


@dataclass(frozen=True)
class Slide:
    """An open slide. A level is the slide at a lower resolution; level 0 is the full one."""

    path: Path
    kind: str  # name of its format
    origin: tuple[int, int]  # column and row of the first scanned pixel, in px of level 0
    size: tuple[int, int]  # width and height of what was scanned, in px of level 0
    scales: tuple[float, ...]  # px of level 0 that one px of each level has, ascending from 1
    mpp: float  # micrometres per pixel of level 0; NaN: the file does not name it
    profile: bytes | None  # ICC profile of the scanner; None: the file has none
    pixels: Callable[[int, int, int, int, int], Rgb]  # of level, column, row, width, height (px of the level)

    def region(self, x: int, y: int, width: int, height: int, shape: tuple[int, int]) -> tuple[Rgb, int]:
        """A part of the slide, from the coarsest level that has enough pixels; SlideError if it is damaged.

        `x` and `y` (from `origin`), `width` and `height` are in px of level 0. Returns uint8 RGB of the
        `shape` (height, width), which is not larger than the part, and the level that it was read from.
        """
        wanted = min(width / shape[1], height / shape[0]) * 1.01
        level = max(number for number, scale in enumerate(self.scales) if scale <= max(wanted, 1))
        scale = self.scales[level]
        if width * height > _AT_ONCE * scale**2 and shape[0] > 1:  # a slide without coarse levels
            upper = shape[0] // 2
            cut = round(height * upper / shape[0])
            first, _ = self.region(x, y, width, cut, (upper, shape[1]))
            second, _ = self.region(x, y + cut, width, height - cut, (shape[0] - upper, shape[1]))
            return np.concatenate([first, second]), level
        left, top = ((start + first) / scale for start, first in zip((x, y), self.origin, strict=True))
        across, down = (max(round(length / scale), 1) for length in (width, height))
        try:
            rgb = self.pixels(level, round(left), round(top), across, down)
        except Exception as error:  # a decoder may raise nearly any on damaged bytes
            where = f"near column {x}, row {y}"
            raise SlideError(
                f"{self.path}: its pixels {where} are damaged ({brief(error)[:120]}). "
                "Copy it again from the scanner."
            ) from error
        if rgb.shape[:2] != tuple(shape):
            rgb = np.asarray(cv2.resize(rgb, shape[::-1], interpolation=cv2.INTER_AREA), np.uint8)
        return rgb, level


@contextmanager
def open_slide(path: Path, mpp: float | None = None) -> Iterator[Slide]:
    """An open slide, until the end of the block. Of several files (.mrxs, .vms), name the main one.

    `mpp` is in micrometres per pixel, for a file that names none or a wrong one.

    Raises:
        SlideError: the file is missing, has a format that cannot be read, is damaged, or its resolution is
            unknown; or the extra `slides` is not installed.
    """
    if not path.is_file():
        raise SlideError(f"{path}: no such file. Name the file of a slide.")
    if path.suffix.lower() in _CLOSED:
        raise SlideError(f"{path}: no library here reads {_CLOSED[path.suffix.lower()]}. {_CONVERT}.")
    with ExitStack() as files:
        slide = _read(path, files)
        slide = replace(slide, mpp=mpp) if mpp else slide
        if not _MPP[0] <= slide.mpp <= _MPP[1]:
            named = "no resolution" if math.isnan(slide.mpp) else f"{slide.mpp:.4g} micrometres per pixel"
            raise SlideError(
                f"{path}: this {slide.kind} names {named}. Give its micrometres per pixel with --slide-mpp: "
                "often 0.25 with a 40x objective and 0.5 with 20x; the scanner's program shows it."
            )
        yield slide


@contextmanager
def opened(paths: Sequence[Path], mpp: float | None = None) -> Iterator[list[Slide]]:
    """Open several slides, as `open_slide` does, and close them at the end of the block.

    Raises:
        SlideError: with what is wrong with each of them.
    """
    with ExitStack() as files:
        slides, wrong = [], []
        for path in paths:
            try:
                slides.append(files.enter_context(open_slide(path, mpp)))
            except SlideError as error:
                wrong.append(str(error))
        if wrong:
            raise SlideError("\n".join(wrong))
        yield slides


def _read(path: Path, files: ExitStack) -> Slide:
    """The description of a slide; what is opened is closed with `files`."""
    kind, opener = "slide", _openslide
    if path.name.lower().endswith((".ome.tif", ".ome.tiff", ".ome.btf")):
        kind, opener = "OME-TIFF", _ome
    elif path.suffix.lower() == ".czi":
        kind, opener = "CZI of Zeiss", _czi
    try:
        return opener(path, files)
    except SlideError:
        raise
    except ImportError as error:
        raise SlideError(
            f"{path}: slides need one more package ({error.name}). Install it: {EXTRA}"
        ) from error
    except Exception as error:  # on damaged bytes, a decoder may raise nearly any
        raise SlideError(
            f"{path}: this {kind} cannot be read ({brief(error)[:160]}). Copy it again from the scanner. "
            f"If it opens there: {_CONVERT}."
        ) from error


# --- OpenSlide ----------------------------------------------------------------------------------------


def _openslide(path: Path, files: ExitStack) -> Slide:
    import openslide

    try:
        file = files.enter_context(openslide.OpenSlide(path))
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(
            f"{path}: OpenSlide knows no scanner that writes such a file (its name ends with "
            f"{path.suffix or 'nothing'}), or it is cut off. Copy it again from the scanner. If it opens "
            f"there: {_CONVERT}. Put a picture of one field into the folder wsi of a data set instead."
        ) from error
    facts = {name.removeprefix("openslide."): value for name, value in file.properties.items()}
    back = np.frombuffer(bytes.fromhex(facts.get("background-color", "FFFFFF")), np.uint8)
    mpp = [float(facts[f"mpp-{axis}"]) for axis in "xy" if facts.get(f"mpp-{axis}")]
    origin = int(facts.get("bounds-x", 0)), int(facts.get("bounds-y", 0))
    width, height = file.dimensions
    size = int(facts.get("bounds-width", width)), int(facts.get("bounds-height", height))
    scales = tuple(float(scale) for scale in file.level_downsamples)

    def pixels(level: int, x: int, y: int, across: int, down: int) -> Rgb:
        place = round(x * scales[level]), round(y * scales[level])
        rgba = np.asarray(file.read_region(place, level, (across, down)))
        rgb, alpha = np.ascontiguousarray(rgba[:, :, :3]), rgba[:, :, 3:]
        if alpha.min(initial=255) < 255:
            cover = alpha.astype(np.uint16)
            rgb = ((rgb * cover + back.astype(np.uint16) * (255 - cover) + 127) // 255).astype(np.uint8)
        return rgb

    profile = file.color_profile.tobytes() if file.color_profile else None
    kind = f"slide ({facts['vendor']})"
    mean = math.prod(mpp) ** 0.5 if len(mpp) == 2 else math.nan
    return Slide(path, kind, origin, size, scales, mean, profile, pixels)


# --- CZI ----------------------------------------------------------------------------------------------


def _czi(path: Path, files: ExitStack) -> Slide:
    from pylibCZIrw import czi

    file = files.enter_context(czi.open_czi(str(path)))
    lengths = {axis: length for axis, (_, length) in file.total_bounding_box.items() if axis not in "XY"}
    several = ", ".join(f"{length} {axis}" for axis, length in lengths.items() if length > 1)
    types = set(file.pixel_types.values())
    if several or types != {"Bgr24"}:
        what = f"planes ({several})" if several else f"pixels of the type {', '.join(sorted(types))}"
        raise SlideError(
            f"{path}: a CZI of Zeiss with {what}, not one picture in 8-bit colour. In ZEN, export it so."
        )
    box = file.total_bounding_rectangle
    scales = [2.0**power for power in range(8) if 2**power <= max(1, min(box.w, box.h) // 256)]
    items = file.metadata["ImageDocument"]["Metadata"].get("Scaling", {}).get("Items") or {}
    distances = items.get("Distance", [])
    metres = [float(one["Value"]) for one in distances if one["@Id"] in "XY" and float(one.get("Value") or 0)]

    def pixels(level: int, x: int, y: int, across: int, down: int) -> Rgb:
        scale = int(scales[level])
        roi = (x * scale, y * scale, across * scale, down * scale)
        bgr = file.read(roi=roi, zoom=1 / scale, plane={"C": 0}, background_pixel=(1, 1, 1))
        return np.ascontiguousarray(bgr[:, :, ::-1])

    mpp = math.prod(metres) ** 0.5 * 1e6 if len(metres) == 2 else math.nan
    origin, size = (box.x, box.y), (box.w, box.h)
    return Slide(path, "CZI of Zeiss", origin, size, tuple(scales), mpp, None, pixels)


# --- OME-TIFF -----------------------------------------------------------------------------------------


def _ome(path: Path, files: ExitStack) -> Slide:
    file = files.enter_context(tifffile.TiffFile(path, _multifile=False))
    series = max(file.series, key=lambda one: one.keyframe.imagelength * one.keyframe.imagewidth)
    key, lengths = series.keyframe, dict(zip(series.axes, series.shape, strict=True))
    stacked = [f"{n} {axis}" for axis, n in lengths.items() if axis not in "YXSC" and n > 1]
    if stacked or lengths.get("S", 1) * lengths.get("C", 1) != 3 or key.dtype != np.uint8:
        shown = ", ".join(f"{n} {axis}" for axis, n in lengths.items())
        raise SlideError(
            f"{path}: an OME-TIFF of {shown} ({key.dtype}), not one picture in 8-bit colour. Export "
            "it as 8-bit RGB."
        )
    if not all(level.keyframe.is_tiled for level in series.levels):
        raise SlideError(
            f"{path}: an OME-TIFF without tiles, which would fill the memory. Write tiles and levels: "
            f"vips tiffsave {path.name} tiled.tif --tile --pyramid --bigtiff"
        )
    # The places of red, green and blue among pages that hold one channel each.
    order = channel_order(file, series)[0] if "C" in series.axes else [0, 1, 2]
    levels = [_TiledLevel(list(level), order) for level in series.levels]
    scales = tuple(key.imagelength / level.keyframe.imagelength for level in series.levels)
    return Slide(
        path, "OME-TIFF", (0, 0), (key.imagewidth, key.imagelength), scales, _ome_mpp(file), key.iccprofile,
        lambda level, *part: levels[level].read(*part),
    )  # fmt: skip


class _TiledLevel:
    """A level of a TIFF: one page with three channels (interleaved or as planes), or a page for each."""

    def __init__(self, pages: Sequence[Any], order: Sequence[int]) -> None:
        self.pages = pages if len(pages) == 1 else [pages[place] for place in order]
        self.key = pages[0].keyframe
        self.tile = lru_cache(_TILES)(self._tile)

    def read(self, x: int, y: int, across: int, down: int) -> Rgb:
        """A part of the level in px, uint8 RGB; white outside of it, and where a tile is left out."""
        found = np.full((down, across, 3), 255, np.uint8)
        height, width = self.key.imagelength, self.key.imagewidth
        high, wide = self.key.tilelength, self.key.tilewidth
        rows, columns = math.ceil(height / high), math.ceil(width / wide)
        as_planes = len(self.pages) == 1 and self.key.planarconfig == 2
        for row in range(max(y, 0) // high, min(math.ceil((y + down) / high), rows)):
            for column in range(max(x, 0) // wide, min(math.ceil((x + across) / wide), columns)):
                number = row * columns + column
                places = [(0, number + plane * rows * columns) for plane in range(3)]
                if not as_planes:
                    places = [(page, number) for page in range(len(self.pages))]
                tiles = [self.tile(*place) for place in places]
                if any(tile is None for tile in tiles):
                    continue
                top, left = row * high - y, column * wide - x  # of the tile, in the part
                end, right = min(top + high, height - y, down), min(left + wide, width - x, across)
                into = np.s_[max(top, 0) : end, max(left, 0) : right]
                outof = np.s_[max(-top, 0) : end - top, max(-left, 0) : right - left]
                found[into] = np.concatenate([tile[outof] for tile in tiles if tile is not None], axis=2)
        return found

    def _tile(self, page: int, number: int) -> npt.NDArray[np.uint8] | None:
        """Decoded tile, shape (height, width, channels); None if the file leaves it out."""
        source = self.pages[page]
        count = source.databytecounts[number]
        if not count:
            return None
        source.parent.filehandle.seek(source.dataoffsets[number])
        data = source.parent.filehandle.read(count)
        return np.asarray(self.key.decode(data, number, jpegtables=source.jpegtables)[0][0], np.uint8)


def _ome_mpp(file: Any) -> float:
    """Micrometres per pixel by the description (PhysicalSizeX and Y); NaN if they are not there."""
    sizes = []
    for axis in "XY":
        value = re.search(rf'PhysicalSize{axis}="([0-9.eE+-]+)"', file.ome_metadata or "")
        unit = re.search(rf'PhysicalSize{axis}Unit="([^"]*)"', file.ome_metadata or "")
        if value and (name := unit.group(1) if unit else "") in _UNITS:
            sizes.append(float(value.group(1)) * _UNITS[name])
    return math.prod(sizes) ** 0.5 if len(sizes) == 2 else math.nan
