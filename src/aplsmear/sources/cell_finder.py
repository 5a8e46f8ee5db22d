"""Find the nucleated cells of smears without boxes, and write them as rows of ``labeled_cells.csv``.

This is classical image analysis. Nothing is learned, so nothing depends on the stain or the camera of one
laboratory. A picture is scaled until a typical cell has a diameter of `_TYPICAL` px; all other lengths are in
these px. The steps are:

1. Optical density relative to the empty field (Beer-Lambert), whose brightness is a quadratic surface.
2. Colour deconvolution (Ruifrok and Johnston, Anal Quant Cytol Histol 2001;23:291) subtracts the red cells.
   Their colour is measured in the picture: red cells absorb more blue, for their red and green, than
   nucleated cells. What remains is the basophilic signal: strong in nuclei, absent in red cells.
3. Otsu's threshold gives the signal of nuclei in this picture. A cell has a signal above 15 % of it.
4. The watershed of the distance to the edge separates cells that touch (Beucher and Lantuéjoul 1979). A part
   that is too large for one cell is separated again if it contains several nuclei.
5. Parts that are too small (platelets) or have no nucleus are dropped.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.measure import regionprops
from skimage.morphology import h_maxima, remove_small_holes
from skimage.segmentation import watershed
from skimage.util import montage

from aplsmear.compute.engine import Here
from aplsmear.data.csvfile import read_csv
from aplsmear.data.dataset import read_data_set
from aplsmear.data.schema import CELLS_FILE, IMAGE_FOLDER, KAGGLE_CELL_COLUMNS, MEASURES, SMEARS_FILE
from aplsmear.errors import UserError
from aplsmear.files import whole
from aplsmear.images.reading import is_picture_name, read_image, scaling
from aplsmear.progress import progress
from aplsmear.tables import write_table

TYPICAL_MICROMETRES = 14.0  # diameter of nucleated marrow cells: lymphocytes 10, promyelocytes 16 to 20
MIN_SIZE = 10.0  # px of a typical cell; in smaller ones nuclei cannot be distinguished

BOX = ("y0", "x0", "y1", "x1")

# Lengths in px of the scaled picture.
_TYPICAL = 40  # diameter of a typical cell; then a nucleus has at least 15 px
_FIELD = 40  # side of the squares in which the empty field is measured: wider than a cell
_SQUARES = 12  # least number of such squares, twice the number of coefficients
_SMOOTH = 2.0  # standard deviation of the blur over chromatin and granules
_OPEN = 3  # radius up to which strands and specks are removed
_HOLE = 99  # px², holes up to this are vacuoles; larger ones are gaps between cells
_BUMP = 2.0  # least depth of the waist between two cells
_LEAST = 16.8  # diameter of the smallest cell; platelets have less than half of it
_LARGE = 1.6 * math.pi / 4 * _TYPICAL**2  # px², a larger part may be several cells
_NUCLEUS = 32  # px², least area of the nucleus of a cell
_APART = 16  # least distance between the centres of two nuclei; lobes of one nucleus are nearer
_DEEP = 5.2  # least distance from the centre of such a nucleus to its edge
_WINDOW = 2048  # side of the part that is analysed at a time, so that memory does not grow with the picture
_MARGIN = 80  # around it, twice a typical cell: a cell with its centre in the window is complete

# Optical densities (natural logarithm).
_SEEN = 0.25  # sum of the three channels; above it, there is something on the glass
_FAINT = 0.15  # least basophilic signal of a part of a cell
_STRONG = 0.5  # nuclei of the palest stain (at least 0.65 in the pictures examined; platelets up to 0.42)
_BODY = 0.15  # share of the signal of nuclei: cytoplasm and more
_CORE = 0.45  # share of the signal of nuclei: nucleus
_RED = 0.29  # blue over red and green: nuclei 0.15 to 0.25, red cells 0.37 to 0.9
_MEAN_RED = 0.4  # of red cells, for a picture without any

_OVERVIEW = 1024  # px of the longer side, for the first estimate of the size
_ROUNDS = 5
_SAMPLE = 24  # smears on which the size is estimated
_UNLIKE = 1.6  # ratio of sizes that suggests another magnification; smears with more blasts stay below
_FEW = 5  # cells; fewer are not enough to estimate the size
_SHOWN = 24  # smears on the contact sheet
_ACROSS = 4  # of them in a row
_TILE, _CAPTION, _GAP = 560, 26, 8  # px
_GREEN = (0, 160, 0)  # no stain has this colour

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int32]


class CellsError(UserError, ValueError):
    """The search for cells cannot be done; the message says what to change."""


# --- one picture -------------------------------------------------------------------------------------


def find_cells(image: npt.NDArray[np.uint8], size: float) -> pd.DataFrame:
    """The nucleated cells of one picture, from top to bottom; none in a grey or empty picture.

    Args:
        image: uint8 RGB, shape (height, width, 3).
        size: diameter of a typical nucleated cell in px, at least `MIN_SIZE`. A little too large is better
            than too small.

    Returns:
        One row for each cell: `BOX` in px, int64, end exclusive, around nucleus and cytoplasm, cut at the
        edge of the picture, no box twice; and `MEASURES` in px of the picture (`meanIntensity`: 0 to 1).

    Raises:
        CellsError: `size` is below `MIN_SIZE`.
    """
    _check_size(size)
    rows = [[*one.box, *_measures(one)] for one in _cells(image, size)]
    found = pd.DataFrame(rows, columns=[*BOX, *MEASURES]).astype(dict.fromkeys(BOX, np.int64))
    return found.drop_duplicates(list(BOX)).sort_values(list(BOX)).reset_index(drop=True)


def _check_size(size: float) -> None:
    if not MIN_SIZE <= size < math.inf:
        raise CellsError(
            f"cells of {size:g} px cannot be told from platelets. They need at least {MIN_SIZE:g} px: take "
            "the pictures at a higher magnification, or correct the size"
        )


def estimate_size(image: npt.NDArray[np.uint8]) -> float | None:
    """Diameter in px of the typical (median) nucleated cell of a picture.

    The first estimate is twice the distance from the centre of basophilic parts to their edge. Cells of this
    size are searched and measured, and searched again with the measured size until both agree. The result is
    compared with the red cells, because no nucleated cell is smaller than they are.

    Args:
        image: uint8 RGB, shape (height, width, 3).

    Returns:
        px; None if fewer than five cells are found, or if they are smaller than the red cells, as platelets
        are.
    """
    guess, least = _first_guess(image)
    for _ in range(_ROUNDS):
        if guess < max(least, MIN_SIZE):
            return None
        boxes = np.array([one.box for one in _cells(image, guess)]).reshape(-1, 4)
        if len(boxes) < _FEW:
            return None
        last, guess = guess, float(np.median(np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))))
        if abs(guess - last) < 0.03 * last:
            break
    return guess if guess >= max(least, MIN_SIZE) else None


def _first_guess(image: npt.NDArray[np.uint8]) -> tuple[float, float]:
    """Estimated diameters in px of a nucleated cell (0 if there is none) and of a large red cell."""
    small, (scale, _) = _scaled(image, min(1.0, _OVERVIEW / max(image.shape[:2])))
    field = _over_empty_field(small, max(max(small.shape[:2]) // 12, 8))
    signal = cv2.GaussianBlur(_basophilic(field), (0, 0), 1.0)
    strength = _strength(signal)
    if strength < _STRONG:
        return 0.0, 0.0
    cells = signal > _BODY * strength
    radius = np.sort(_radii(cells))
    if not len(radius):
        return 0.0, 0.0
    weight = np.cumsum(radius**2)  # by area, because specks are many and small
    guess = float(radius[np.searchsorted(weight, weight[-1] / 2)])
    others = ndimage.binary_fill_holes(field.sum(axis=2) > _SEEN)
    others &= ~ndimage.binary_dilation(cells, iterations=2)
    red = _radii(others)
    large = float(np.quantile(red, 0.75)) if len(red) >= _FEW else 0.0
    return 2 * guess * scale, 2 * large * scale


def _radii(mask: Mask) -> Floats:
    """Distance from the centre of each round part of a mask to its edge, if at least 2 px."""
    far = ndimage.distance_transform_edt(mask).astype(np.float32)
    spots = peak_local_max(far, min_distance=3, threshold_abs=2.0)
    return np.asarray(far[tuple(spots.T)], np.float32)


def _scaled(image: npt.NDArray[np.uint8], factor: float) -> tuple[npt.NDArray[np.uint8], tuple[float, float]]:
    """The picture scaled by about `factor`, and how many of its px one new px has, down and across."""
    height, width = image.shape[:2]
    new = max(round(height * factor), 1), max(round(width * factor), 1)
    small = np.asarray(cv2.resize(image, new[::-1], interpolation=scaling(factor)), np.uint8)
    return small, (height / new[0], width / new[1])


@dataclass(frozen=True)
class _Cell:
    """A region of skimage in a scaled window, its box in px of the picture, and px of the picture per px."""

    region: Any
    box: tuple[int, int, int, int]
    scale: float


def _cells(image: npt.NDArray[np.uint8], size: float) -> Iterator[_Cell]:
    """The cells of a picture of any size, by windows; a cell belongs to the window that has its centre."""
    factor = _TYPICAL / size
    side, margin = math.ceil(_WINDOW / factor), math.ceil(_MARGIN / factor)
    height, width = image.shape[:2]
    for top in range(0, height, side):
        for left in range(0, width, side):
            y, x = max(top - margin, 0), max(left - margin, 0)
            window = image[y : top + side + margin, x : left + side + margin]
            small, (down, across) = _scaled(window, factor)
            for region in _regions(small):
                y0, y1 = (y + round(edge * down) for edge in region.bbox[::2])
                x0, x1 = (x + round(edge * across) for edge in region.bbox[1::2])
                if top <= (y0 + y1) // 2 < top + side and left <= (x0 + x1) // 2 < left + side:
                    yield _Cell(region, (y0, x0, y1, x1), math.sqrt(down * across))


def _regions(small: npt.NDArray[np.uint8]) -> list[Any]:
    """The cells of a scaled picture."""
    signal = _basophilic(_over_empty_field(small, _FIELD))
    signal = cv2.GaussianBlur(signal, (0, 0), _SMOOTH)
    strength = _strength(signal)
    if strength < _STRONG:
        return []
    body = remove_small_holes(signal > _BODY * strength, max_size=_HOLE)
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * _OPEN + 1,) * 2)
    opened = cv2.morphologyEx(body.view(np.uint8), cv2.MORPH_OPEN, brush, borderType=cv2.BORDER_REPLICATE)
    parts = _split_large(_split(opened.view(np.bool_)), signal)
    core = signal > _CORE * strength
    regions = regionprops(parts, intensity_image=np.dstack([small.mean(axis=2) / 255, core]))
    return [region for region in regions if _is_cell(region, parts.shape)]


def _is_cell(region: Any, shape: Sequence[int]) -> bool:
    y0, x0, y1, x1 = region.bbox
    cut = y0 == 0 or x0 == 0 or y1 == shape[0] or x1 == shape[1]
    least = math.pi / 4 * _LEAST**2 * (0.45 if cut else 1.0)
    nucleus = region.image_intensity[..., 1][region.image].sum()
    return bool(max(y1 - y0, x1 - x0) >= _LEAST and region.area >= least and nucleus >= _NUCLEUS)


def _measures(cell: _Cell) -> list[float]:
    """Values of `MEASURES`, rounded because the last bits differ between computers."""
    region, scale = cell.region, cell.scale
    values = (
        region.area_convex * scale**2,
        region.eccentricity,
        region.equivalent_diameter_area * scale,
        region.perimeter * scale,
        region.intensity_mean[0],
        region.euler_number,
        region.extent,
    )
    return [round(float(value), 4) for value in values]


# --- a data set ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """The cells that were found in a data set.

    Attributes:
        size: expected diameter of cells in px; None if no smear had enough cells to estimate it.
        cells: one row for each cell: `smear`, `BOX`, `MEASURES`; sorted by smear, then by box.
    """

    size: float | None
    cells: pd.DataFrame


def find_all(root: Path, smears: pd.DataFrame, size: float | None = None, workers: int = -1) -> Search:
    """The cells of every smear. Each image is decoded once, or twice if the size is estimated from it.

    Args:
        root: the column `image` of `smears` has paths below this folder.
        smears: with `smear` and `image`; all at one magnification.
        size: diameter of a typical cell in px; None: the median estimate from up to 24 smears, evenly spread.
        workers: number of processes, -1: one for each core; does not change the result.

    Raises:
        CellsError: `size` is below `MIN_SIZE`.
        ImageError: an image cannot be read.
    """
    paths = [root / image for image in smears["image"]]
    engine = Here(workers)
    if size is None:
        some = [paths[place] for place in _spread(len(paths), _SAMPLE)]
        estimates = progress(engine.map(_size_of_file, some), "smears measured", len(some))
        sizes = [one for one in estimates if one is not None]
        size = round(float(np.median(sizes)), 1) if sizes else None
    if size is None:
        return Search(None, pd.DataFrame(columns=["smear", *BOX, *MEASURES]))
    found = engine.map(partial(_cells_of_file, size=size), paths)
    tables = [
        table.assign(smear=smear)
        for smear, table in zip(smears["smear"], progress(found, "smears searched", len(paths)), strict=True)
    ]
    return Search(size, pd.concat(tables, ignore_index=True)[["smear", *BOX, *MEASURES]])


def kaggle_rows(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells as rows of ``labeled_cells.csv`` (`KAGGLE_CELL_COLUMNS`); all labels are empty."""
    boxes = cells[list(BOX)].to_numpy(dtype=np.int64).tolist()
    rows = cells[["smear", *MEASURES]].rename(columns={"smear": "wsi"})
    rows = rows.assign(
        id=range(1, len(cells) + 1), segmentationSetId=1, bbox=[json.dumps(box) for box in boxes]
    )
    return rows.reindex(columns=list(KAGGLE_CELL_COLUMNS), fill_value="")


def expected_size(size: float | None, micrometres_per_pixel: float | None) -> float | None:
    """Diameter of a typical cell in px, given as such or by the resolution; None if neither is known.

    Raises:
        CellsError: both are given, or cells would be too small.
    """
    if size is not None and micrometres_per_pixel is not None:
        raise CellsError("--size and --micrometres-per-pixel exclude each other: give only one of them")
    if micrometres_per_pixel is not None:
        size = TYPICAL_MICROMETRES / micrometres_per_pixel if micrometres_per_pixel > 0 else 0
    if size is not None:
        _check_size(size)
    return size


def refuse_single_cells(root: Path) -> None:
    """Refuse a data set in which cells have pictures of their own.

    Raises:
        CellsError: the table of cells has a column ``imgName``.
    """
    table = root / CELLS_FILE
    if table.exists() and read_csv(table, {"imgName": True}, [], []) is not None:
        raise CellsError(
            f"{table} names a picture for each cell (column imgName): these cells need no boxes, so there "
            f"is nothing to find. Check the data set: aplsmear check {root}"
        )


def read_smears(root: Path) -> tuple[pd.DataFrame, Path | None]:
    """The smears of a data set, with or without labels; every image is decoded once as a check.

    Returns:
        A table with `smear` and `image`. If there was no ``wsi.csv``: the one that is now written, with a row
        for each picture in the folder ``wsi`` and empty labels; otherwise None.

    Raises:
        DataSetError: with all problems of tables and images.
        CellsError: there is neither a ``wsi.csv`` nor a picture.
    """
    table, written = root / SMEARS_FILE, None
    if not table.exists() and (root / IMAGE_FOLDER).is_dir():
        names = sorted(path.name for path in (root / IMAGE_FOLDER).iterdir() if is_picture_name(path.name))
        if not names:
            raise CellsError(
                f"{root / IMAGE_FOLDER} contains no PNG, JPEG or TIFF: put the pictures of the smears there"
            )
        stems = [Path(name).stem for name in names]
        ids = stems if len(set(stems)) == len(stems) else names
        write_table(table, pd.DataFrame({"id": ids, "imgName": names, "label": ""}))
        written = table
    smears = read_data_set(root, {}, min_box=1, skip_bad_images=False, labelled=False).smears
    return smears[["smear", "image"]], written


def kept_name(table: Path, overwrite: bool) -> Path | None:
    """The name that an existing table gets before `table` is written; None if there is no table.

    Raises:
        CellsError: the table exists and `overwrite` is False, or the name does not end with ``.csv``.
    """
    if table.suffix.lower() != ".csv":
        raise CellsError(f"{table} is not the name of a table: give a name such as {CELLS_FILE}")
    if not table.exists():
        return None
    if not overwrite:
        raise CellsError(
            f"{table} exists already: nothing was done. Use --overwrite to replace it (the old table is kept "
            "under another name), or --out FILE to write another file"
        )
    names = (table.with_name(f"{table.stem}.{number}{table.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def write_search(table: Path, kept: Path | None, root: Path, smears: pd.DataFrame, found: Search) -> Path:
    """Write the results of `find_all`: the table (CSV), if there are cells, and the contact sheet beside it.

    An existing table first gets the name `kept`.

    Returns:
        The contact sheet, a PNG.
    """
    sheet = table.with_suffix(".png")
    with whole(sheet) as part:
        contact_sheet(root, smears, found.cells).save(part, "PNG")
    if len(found.cells):
        if kept:
            shutil.copyfile(table, kept)
        write_table(table, kaggle_rows(found.cells))
    return sheet


def summary(found: Search, smears: Iterable[str]) -> list[str]:
    """Lines of text about the result of `find_all` on these smears."""
    names = list(smears)
    if found.size is None:
        return [f"no nucleated cell in {len(names):,} smears, or too few to estimate the size of a cell"]
    areas = (found.cells["y1"] - found.cells["y0"]) * (found.cells["x1"] - found.cells["x0"])
    counts = found.cells.groupby("smear", sort=False).size().reindex(names, fill_value=0)
    lines = [
        f"{len(found.cells):,} cells in {len(names):,} smears, expected size {found.size:g} px",
        f"cells per smear: median {counts.median():g}, {counts.min():,} to {counts.max():,}",
    ]
    none = counts.index[counts == 0].tolist()
    if none:
        lines.append(f"smears without a cell ({len(none):,}): {', '.join(none)}")
    typical = np.sqrt(areas).groupby(found.cells["smear"], sort=False).median()
    other = [
        f"{smear} ({typical[smear]:.0f} px)"
        for smear in names
        if counts[smear] >= _FEW and not 1 / _UNLIKE < typical[smear] / found.size < _UNLIKE
    ]
    if other:
        lines.append(
            f"cells of another size ({len(other):,} smears): {', '.join(other)}. If these smears have "
            "another magnification, put them into a folder of their own"
        )
    return lines


def contact_sheet(root: Path, smears: pd.DataFrame, cells: pd.DataFrame) -> Image.Image:
    """A picture of smears with their boxes and the number of their cells, for a check by eye.

    Of many smears it shows those with the fewest and the most cells, and others evenly spread between them.
    The arguments are those of `find_all`, and the cells of its result.
    """
    rows = cells.groupby("smear", sort=False).indices
    counts = [len(rows.get(smear, ())) for smear in smears["smear"]]
    ranked = np.argsort(counts, kind="stable")
    tiles = []
    for place in _spread(len(ranked), _SHOWN):
        smear = smears.iloc[ranked[place]]
        boxes = cells.iloc[rows.get(smear["smear"], [])][list(BOX)].to_numpy(dtype=np.int64)
        caption = f"{smear['smear']}: number of cells {len(boxes):,}"
        tiles.append(_tile(read_image(root / smear["image"]), boxes, caption))
    tall, across = max(map(len, tiles)), min(_ACROSS, len(tiles))
    tiles = [np.pad(tile, ((0, tall - len(tile)), (0, 0), (0, 0)), constant_values=255) for tile in tiles]
    grid = (math.ceil(len(tiles) / across), across)
    return Image.fromarray(montage(tiles, (255, 255, 255), False, grid, _GAP, channel_axis=-1))


def _tile(image: npt.NDArray[np.uint8], boxes: npt.NDArray[np.int64], caption: str) -> npt.NDArray[np.uint8]:
    scale = _TILE / max(image.shape)
    small, _ = _scaled(image, scale)
    tile = Image.new("RGB", (_TILE, small.shape[0] + _CAPTION), "white")
    tile.paste(Image.fromarray(small), (0, _CAPTION))
    pen = ImageDraw.Draw(tile)
    pen.text((2, 1), caption, fill="black", font=ImageFont.load_default(_CAPTION - 8))
    for y0, x0, y1, x1 in np.rint(boxes * scale).astype(int).tolist():
        corners = (x0, y0 + _CAPTION, max(x1 - 1, x0), max(y1 - 1, y0) + _CAPTION)
        pen.rectangle(corners, outline=_GREEN, width=2)
    return np.asarray(tile)


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` positions, evenly spread, with the first and the last."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, most))}) if count else []


def _size_of_file(path: Path) -> float | None:
    cv2.setNumThreads(1)
    return estimate_size(read_image(path))


def _cells_of_file(path: Path, size: float) -> pd.DataFrame:
    cv2.setNumThreads(1)
    return find_cells(read_image(path), size)


# --- light --------------------------------------------------------------------------------------------


def _over_empty_field(image: npt.NDArray[np.uint8], side: int) -> Floats:
    """Optical density minus that of the empty field, shape (height, width, 3).

    The field is a quadratic surface through the palest tenth of each square of `side` px. Squares full of
    cells do not count. If too few squares remain, one value is used for the whole picture.
    """
    density = np.asarray(-np.log((np.arange(256) + 1) / 256), np.float32)[image]
    height, width = image.shape[:2]
    places, values = [], []
    for y in range(0, height, side):
        for x in range(0, width, side):
            square = density[y : y + side, x : x + side].reshape(-1, 3)
            first = np.argsort(square.sum(axis=1), kind="stable")[: len(square) // 10 + 1]
            values.append(np.median(square[first], axis=0))
            places.append(((y + side / 2) / height - 0.5, (x + side / 2) / width - 0.5))
    value = np.array(values)
    terms = np.stack(_quadratic_terms(*np.array(places, np.float32).T), axis=1)
    dark = value.sum(axis=1)
    kept = dark < np.percentile(dark, 20) + 0.35
    for _ in range(3):
        if kept.sum() < _SQUARES:
            palest = np.percentile(density.reshape(-1, 3), 3, axis=0).astype(np.float32)
            return np.asarray(np.maximum(density - palest, 0), np.float32)
        surface, *_ = np.linalg.lstsq(terms[kept], value[kept], rcond=None)
        surface = surface.round(5)  # the last bits differ between CPUs
        kept &= (value - terms @ surface).sum(axis=1) < 0.1
    rows = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5)[:, None]
    columns = ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5)[None, :]
    for channel, factors in enumerate(surface.T.astype(np.float32)):
        for factor, term in zip(factors, _quadratic_terms(rows, columns), strict=True):
            density[..., channel] -= factor * term
    return np.maximum(density, 0, out=density)


def _quadratic_terms(y: Floats, x: Floats) -> tuple[Floats, ...]:
    return np.ones_like(y), y, x, y * y, x * x, x * y


def _basophilic(density: Floats) -> Floats:
    """Red and green density minus the part that belongs to red cells, from the blue density."""
    warm = density[..., :2].sum(axis=2)
    seen = warm + density[..., 2] > _SEEN
    ratio = (density[..., 2] / np.maximum(warm, 1e-3))[seen]
    red = ratio[ratio > _RED]
    of_red_cells = _MEAN_RED
    if red.size > 100:
        threshold = threshold_otsu(np.minimum(ratio, 1.5))
        of_red_cells = float(np.median(red[red >= min(threshold, np.median(red))]))
    return np.asarray(warm - density[..., 2] / np.float32(np.clip(of_red_cells, 0.3, 1.0)), np.float32)


def _strength(signal: Floats) -> float:
    """Typical signal of the nuclei of a picture; 0 if there is hardly any signal."""
    some = signal[signal > _FAINT]
    if some.size < 50:
        return 0.0
    return float(np.median(some[some >= threshold_otsu(some)]))


# --- shape --------------------------------------------------------------------------------------------


def _depth(mask: Mask) -> Floats:
    """Distance to the edge of a mask, smoothed; a cell at the edge of the picture continues beyond it."""
    wide = np.pad(mask, _TYPICAL, mode="edge")
    far = ndimage.distance_transform_edt(wide).astype(np.float32)[_TYPICAL:-_TYPICAL, _TYPICAL:-_TYPICAL]
    return np.asarray(cv2.GaussianBlur(far, (0, 0), 2.4), np.float32)


def _split(body: Mask) -> Labels:
    """Separate cells that touch: 0 outside, a number for each cell."""
    depth = _depth(body)
    centres, _ = ndimage.label((h_maxima(depth, _BUMP) > 0) & body, np.ones((3, 3)))
    return np.asarray(watershed(-depth, centres, mask=body), np.int32)


def _split_large(parts: Labels, signal: Floats) -> Labels:
    """Separate parts that are too large for a cell by their nuclei, until nothing changes."""
    parts, last = parts.copy(), int(parts.max())
    waiting = [(number, place) for number, place in enumerate(ndimage.find_objects(parts), 1) if place]
    while waiting:
        number, place = waiting.pop()
        mask = parts[place] == number
        if mask.sum() < _LARGE:
            continue
        _, *others = _by_nuclei(mask, signal[place])
        for piece in others:
            last += 1
            parts[place][piece] = last
            waiting.append((last, place))
        if others:
            waiting.append((number, place))
    return parts


def _by_nuclei(mask: Mask, signal: Floats) -> list[Mask]:
    """The pieces of a part, one for each nucleus; the part itself if no threshold shows several nuclei."""
    inside = signal[mask]
    otsu = threshold_otsu(inside)
    for threshold in (otsu, *np.quantile(inside[inside >= otsu], (0.2, 0.4))):
        nuclei = remove_small_holes((signal > threshold) & mask, max_size=_HOLE) & mask
        depth = np.where(mask, _depth(nuclei), 0)
        bumps = h_maxima(depth, 0.8 * _BUMP)
        spots = peak_local_max(
            depth, min_distance=_APART, threshold_abs=_DEEP, labels=mask.astype(int), exclude_border=False
        )
        spots = [spot for spot in map(tuple, spots) if bumps[spot]]
        if len(spots) < 2:
            continue
        centres = np.zeros(mask.shape, np.int32)
        for number, spot in enumerate(spots, 1):
            centres[spot] = number
        pieces = watershed(-depth, centres, mask=mask)
        if np.bincount(pieces.ravel())[1:].min() > math.pi / 4 * _LEAST**2:
            return [pieces == number for number in range(1, len(spots) + 1)]
    return [mask]
