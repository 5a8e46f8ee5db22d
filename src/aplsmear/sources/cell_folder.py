"""Find the cells of all smears of a folder, and write them as rows of ``labeled_cells.csv``."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from skimage.util import montage

from aplsmear.compute.engine import HERE
from aplsmear.data.csvfile import read_csv
from aplsmear.data.dataset import read_data_set
from aplsmear.data.schema import CELLS_FILE, IMAGE_FOLDER, KAGGLE_CELL_COLUMNS, MEASURES, SMEARS_FILE
from aplsmear.errors import UserError
from aplsmear.files import whole
from aplsmear.images.reading import SLIDES, is_picture_name, read_image
from aplsmear.progress import progress
from aplsmear.sources.cell_finder import check_size, find_cells, scaled
from aplsmear.sources.cell_size import Estimate, boxes_at, choose, ladder, lengths
from aplsmear.tables import BOX, write_table

TYPICAL_MICROMETRES = 14.0  # diameter of nucleated marrow cells: lymphocytes 10, promyelocytes 16 to 20
CANDIDATES = "_sizes"  # added to the name of the contact sheet that shows boxes of several sizes

_SAMPLE = 24  # smears on which the size is estimated
_UNLIKE = 1.6  # ratio of sizes that suggests another magnification; smears with more blasts stay below
_FEW = 5  # cells; the median of fewer is not compared
_SHOWN = 24  # smears on the contact sheet
_ACROSS = 4  # of them in a row
_COMPARED = 3  # smears on the sheet of sizes, each at every size
_TILE, _CAPTION, _GAP = 560, 26, 8  # px
_GREEN = (0, 160, 0)  # no stain has this colour

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Search:
    """The cells that were found in a data set."""

    size: float | None  # expected diameter of cells in px; None if no cell was found at any size
    cells: pd.DataFrame  # a row for each: `smear`, `BOX`, `MEASURES`; sorted by smear, then by box
    estimate: Estimate | None  # how the size was found; None if it was given


def find_all(root: Path, smears: pd.DataFrame, size: float | None = None) -> Search:
    """The cells of every smear. Each image is decoded once, or three times if the size is estimated from it.

    `smears`, all at one magnification, have the columns `smear` and `image`, a path below `root`. `size` is
    the diameter of a typical cell in px; None: it is estimated on up to 24 smears, evenly spread.

    Raises:
        UserError: `size` is below `MIN_SIZE`.
        ImageError: an image cannot be read.
    """
    paths = [root / image for image in smears["image"]]

    def each(look: Callable[[npt.NDArray[np.uint8]], Seen], paths: Sequence[Path], title: str) -> list[Seen]:
        return list(progress(HERE.map(partial(_of_file, look=look), paths), title, len(paths)))

    estimate = None
    if size is None:
        some = [paths[place] for place in _spread(len(paths), _SAMPLE)]
        measured = each(lengths, some, "smears measured")
        sizes = ladder(measured)
        estimate = choose(sizes, measured, each(partial(boxes_at, sizes=sizes), some, "sizes tried"))
        size = estimate.size
    if size is None:
        return Search(None, pd.DataFrame(columns=["smear", *BOX, *MEASURES]), estimate)
    found = each(partial(find_cells, size=size), paths, "smears searched")
    tables = [table.assign(smear=smear) for smear, table in zip(smears["smear"], found, strict=True)]
    return Search(size, pd.concat(tables, ignore_index=True)[["smear", *BOX, *MEASURES]], estimate)


def kaggle_rows(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells as rows of ``labeled_cells.csv`` (`KAGGLE_CELL_COLUMNS`); all labels are empty."""
    boxes = map(json.dumps, cells[list(BOX)].to_numpy(dtype=np.int64).tolist())
    rows = cells[["smear", *MEASURES]].rename(columns={"smear": "wsi"})
    rows = rows.assign(id=range(1, len(cells) + 1), segmentationSetId=1, bbox=list(boxes))
    return rows.reindex(columns=list(KAGGLE_CELL_COLUMNS), fill_value="")


def expected_size(size: float | None, micrometres_per_pixel: float | None) -> float | None:
    """Diameter of a typical cell in px, given as such or by the resolution; None if neither is known.

    A UserError if both are given, or cells would be too small.
    """
    if size is not None and micrometres_per_pixel is not None:
        raise UserError("--size and --micrometres-per-pixel exclude each other: give only one of them")
    if micrometres_per_pixel is not None:
        size = TYPICAL_MICROMETRES / micrometres_per_pixel if micrometres_per_pixel > 0 else 0
    if size is not None:
        check_size(size)
    return size


def refuse_single_cells(root: Path) -> None:
    """Raise UserError if cells of a data set have pictures of their own."""
    table = root / CELLS_FILE
    if table.exists() and read_csv(table, {"imgName": True}, [], []) is not None:
        raise UserError(
            f"{table} names a picture for each cell (column imgName): these cells need no boxes, so there "
            f"is nothing to find. Check the data set: aplsmear check {root}"
        )


def read_smears(root: Path) -> tuple[pd.DataFrame, Path | None]:
    """The `smear` and `image` of each smear, with or without labels; every image is decoded once as a check.

    If there is no ``wsi.csv``, one is written, with a row for each picture in the folder ``wsi`` and empty
    labels, and its path is returned.

    Raises:
        DataSetError: with all problems of tables and images.
        UserError: there is neither a ``wsi.csv`` nor a picture.
    """
    table, written = root / SMEARS_FILE, None
    if not table.exists() and (root / IMAGE_FOLDER).is_dir():
        files = sorted((root / IMAGE_FOLDER).iterdir())
        if slides := [path for path in files if path.suffix.lower() in SLIDES]:
            raise UserError(f"{slides[0]} is a slide of a scanner. Take fields of it: aplsmear fields --help")
        names = [path.name for path in files if is_picture_name(path.name)]
        if not names:
            raise UserError(
                f"{root / IMAGE_FOLDER} contains no PNG, JPEG or TIFF: put the pictures of the smears there"
            )
        stems = [Path(name).stem for name in names]
        ids = stems if len(set(stems)) == len(stems) else names
        write_table(table, pd.DataFrame({"id": ids, "imgName": names, "label": ""}))
        written = table
    smears = read_data_set(root, {}, min_box=1, skip_bad_images=False, labelled=False).smears
    return smears[["smear", "image"]], written


def next_steps(root: Path) -> list[str]:
    """What the user of a data set with boxes can do, by the labels that its ``wsi.csv`` has."""
    table = read_csv(root / SMEARS_FILE, {"label": False}, [], [])
    labels = table["label"] if table is not None and "label" in table else pd.Series([""])
    unlabelled = int((labels == "").sum())
    predict = f"aplsmear predict --data {root} --out predictions.csv"
    if unlabelled == len(labels):
        return [
            f"To judge these patients (no labels are needed): {predict}",
            f"To train on them: fill in the labels in {root / SMEARS_FILE}, then: aplsmear check {root}",
        ]
    if unlabelled:
        missing = f"{unlabelled:,} of {len(labels):,} smears have no label in {root / SMEARS_FILE}"
        return [f"{missing}. Fill them in, then: aplsmear check {root}"]
    return [f"Then: aplsmear check {root}"]


def kept_name(table: Path, overwrite: bool) -> Path | None:
    """The name that an existing table gets before `table` is written; None if there is no table.

    A UserError if it exists and `overwrite` is False, or if the name does not end with ``.csv``.
    """
    if table.suffix.lower() != ".csv":
        raise UserError(f"{table} is not the name of a table: give a name such as {CELLS_FILE}")
    if not table.exists():
        return None
    if not overwrite:
        raise UserError(
            f"{table} exists already: nothing was done. Use --overwrite to replace it (the old table is kept "
            "under another name), or --out FILE to write another file"
        )
    names = (table.with_name(f"{table.stem}.{number}{table.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def write_search(table: Path, kept: Path | None, root: Path, smears: pd.DataFrame, found: Search) -> Path:
    """Write the results of `find_all`: the table (CSV), if there are cells, and the contact sheet beside it.

    An existing table first gets the name `kept`. If the size is doubtful, a second sheet (its name ends with
    `CANDIDATES`) shows some smears with the boxes of each size that was tried. Returns the contact sheet.
    """
    sheet = table.with_suffix(".png")
    with whole(sheet) as part:
        contact_sheet(root, smears, found.cells).save(part, "PNG")
    if found.estimate and found.estimate.doubts:
        with whole(sheet_of_sizes(table)) as part:
            compare_sizes(root, smears, found.cells, found.estimate).save(part, "PNG")
    if len(found.cells):
        if kept:
            shutil.copyfile(table, kept)
        write_table(table, kaggle_rows(found.cells))
    return sheet


def sheet_of_sizes(table: Path) -> Path:
    """The PNG that `write_search` writes beside a table if the size of a cell is doubtful."""
    return table.with_name(f"{table.stem}{CANDIDATES}.png")


def summary(found: Search, smears: Iterable[str], table: Path) -> list[str]:
    """Lines of text about the result of `find_all` on these smears; `table` is that of `write_search`."""
    names = list(smears)
    if found.size is None:
        return [f"no nucleated cell in {len(names):,} smears"]
    areas = (found.cells["y1"] - found.cells["y0"]) * (found.cells["x1"] - found.cells["x0"])
    counts = found.cells.groupby("smear", sort=False).size().reindex(names, fill_value=0)
    origin = f"expected size {found.size:g} px"
    if found.estimate:
        red = f"; a red cell has {found.estimate.red:.0f} px" if found.estimate.red else ""
        origin = f"estimated size {found.size:g} px (typical nucleated cell{red})"
    lines = [
        f"{len(found.cells):,} cells in {len(names):,} smears, {origin}",
        f"cells per smear: median {counts.median():g}, {counts.min():,} to {counts.max():,}",
    ]
    if none := counts.index[counts == 0].tolist():
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
    if found.estimate and found.estimate.doubts:
        lines += [
            f"The size of a cell is uncertain: {'; '.join(found.estimate.doubts)}.",
            f"{sheet_of_sizes(table)} shows the boxes of each size that was tried. Choose the size",
            "whose boxes hold one cell each, and run the command again with --overwrite --size PX",
        ]
    return lines


def contact_sheet(root: Path, smears: pd.DataFrame, cells: pd.DataFrame) -> Image.Image:
    """A picture of smears with their boxes and the number of their cells, for a check by eye.

    Of many smears it shows those with the fewest and the most cells, and others evenly spread between them.
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
    return _montage(tiles)


def compare_sizes(root: Path, smears: pd.DataFrame, cells: pd.DataFrame, estimate: Estimate) -> Image.Image:
    """A picture of the smears with most cells, each with the boxes of every candidate size."""
    table = estimate.candidates[estimate.candidates["cells"] > 0]
    counts = cells["smear"].value_counts().reindex(smears["smear"], fill_value=0)
    some = smears.iloc[np.argsort(-counts.to_numpy(), kind="stable")[:_COMPARED]]
    tiles = []
    for smear, path in zip(some["smear"], some["image"], strict=True):
        image = read_image(root / path)
        for size, agreement in zip(table["size"], table["agreement"], strict=True):
            boxes = find_cells(image, size)[list(BOX)].to_numpy(dtype=np.int64)
            caption = f"{smear}, --size {size:g}: {len(boxes):,} cells (agreement {agreement:.2f})"
            tiles.append(_tile(image, boxes, caption))
    return _montage(tiles)


def _montage(tiles: list[npt.NDArray[np.uint8]]) -> Image.Image:
    tall, across = max(map(len, tiles)), min(_ACROSS, len(tiles))
    tiles = [np.pad(tile, ((0, tall - len(tile)), (0, 0), (0, 0)), constant_values=255) for tile in tiles]
    grid = (math.ceil(len(tiles) / across), across)
    return Image.fromarray(montage(tiles, (255, 255, 255), False, grid, _GAP, channel_axis=-1))


def _tile(image: npt.NDArray[np.uint8], boxes: npt.NDArray[np.int64], caption: str) -> npt.NDArray[np.uint8]:
    scale = _TILE / max(image.shape)
    small, _ = scaled(image, scale)
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


def _of_file(path: Path, look: Callable[[npt.NDArray[np.uint8]], Seen]) -> Seen:
    cv2.setNumThreads(1)
    return look(read_image(path))
