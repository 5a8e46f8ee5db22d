"""Chooses fields of a slide in which cells lie in one layer and are sharp, and writes them as smears.

A slide is divided into squares. Its overview (1 micrometre per px) is enough to leave out most of them:

1. Empty glass: too little of the square is darker than the glass.
2. Several layers: too much of the square is farther from the next gap than the radius of a cell. In one
   layer there is glass around nearly every cell. Where cells overlap or lie in clumps, the gaps are closed.

Each square is judged by the worst of its nine parts, so that all of it is good.

The rest is ordered by the number of separate nuclei. Nuclei that touch form one large part, which counts as
none, so overlap lowers the rank of a square.

The first squares of this order are then read at the wanted resolution, which alone shows the focus. Sharpness
is the share of contrast at edges that one more blur takes away (after Crété-Roffet et al., SPIE 2007;6492).
It is compared with the sharpest squares of the same slide, because stain and camera change its value. It is
measured at the strongest edges only, because the noise of empty glass looks sharp.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from aplsmear.data.schema import IMAGE_FOLDER, SMEARS_FILE, Facts
from aplsmear.files import whole_folder
from aplsmear.images.pixels import Rgb, as_rgb
from aplsmear.progress import progress
from aplsmear.sources.cell_finder import nucleated_parts
from aplsmear.sources.slide import Slide, SlideError
from aplsmear.tables import write_table

FIELDS_FILE = "fields.csv"  # where each field was taken

_MPP = 1.0  # micrometres per px of the overview; a red cell has 7 to 8 px
_SEEN = 0.25  # optical density (sum of three channels) of what lies on the glass
_UNEVEN = 0.35  # the glass of a square may be darker than that of the slide by this density
_PARTS = 3  # parts of a square, down and across
_COVER = 0.1  # least share of a part that is covered; one layer has 0.45 and more, few cells have less
_DEEP = 10  # micrometres from a gap: the radius of the largest cells
_CLUMPED = 0.2  # most of a part that is deeper: one layer rarely has more, clumps of three layers 0.25 to 0.9
_NUCLEUS = (4.0, 20.0)  # micrometres, diameters of separate nuclei with their cytoplasm
_SAMPLE = 400  # squares in which the glass is measured
_JUDGED = 500  # squares of which the focus is measured; ten times as many as wanted, if that is more
_BLUR = 9  # px of the blur that shows the sharpness
_EDGES = 90  # percentile of gradients: stronger ones are edges of cells
_SHARP = 0.8  # least sharpness, of that of the sharpest squares of the slide
_THUMBNAIL = 1600  # px of its longer side
_GREEN = (0, 160, 0)
_COLUMNS = ("imgName", "slide", "x", "y", "side", "level", "mpp", "cover", "clumped", "nuclei", "sharpness")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """The fields of a slide, a row for each, best first.

    They have `x` and `y` of the corner and `side`, in px of level 0; `level` it was read from; `mpp`; the
    scores `cover`, `clumped`, `nuclei` (separate, per mm²) and `sharpness`.
    """

    fields: pd.DataFrame
    left_out: dict[str, int]  # reason -> number of squares that were not taken for it
    thumbnail: Image.Image  # the slide with the fields drawn on it


def choose_fields(slide: Slide, count: int, mpp: float, size: int) -> Choice:
    """The best squares of a slide; fewer than `count` if fewer are good.

    The side of a field is `size` px of `mpp` micrometres, which are not finer than those of the slide.

    Raises:
        SlideError: the slide is smaller than a field, or its pixels are damaged.
    """
    side = round(size * mpp / slide.mpp)
    columns, rows = (length // side for length in slide.size)
    if not rows * columns:
        raise SlideError(
            f"{slide.path}: the slide has {slide.size[0]:,} x {slide.size[1]:,} px and is smaller than one "
            f"field of {side:,} px. Take smaller fields: --size PX"
        )
    glass = _glass(slide, side, rows, columns)
    small = max(_THUMBNAIL // max(rows, columns), 1)
    view = np.empty((rows * small, columns * small, 3), np.uint8)
    found: list[dict[str, float]] = []
    left_out = Counter[str]()
    for row, column in progress(list(np.ndindex(rows, columns)), "squares", rows * columns):
        rgb = _overview(slide, column * side, row * side, side)
        place = np.s_[row * small : (row + 1) * small, column * small : (column + 1) * small]
        view[place] = cv2.resize(rgb, (small, small), interpolation=cv2.INTER_AREA)
        scores = _layer(rgb, glass, side * slide.mpp)
        if reason := _reason(scores):
            left_out[reason] += 1
        else:
            found.append({"x": column * side, "y": row * side, "side": side, "mpp": mpp, **scores})
    table = pd.DataFrame(found, columns=["x", "y", "side", "mpp", "cover", "clumped", "nuclei"])
    table = table.sort_values(["nuclei", "y", "x"], ascending=[False, True, True], ignore_index=True)
    table = _sharp(slide, table, max(_JUDGED, 10 * count), size, left_out)
    left_out["good, but not needed"] = max(len(table) - count, 0)
    fields = table.head(count).reset_index(drop=True)
    return Choice(fields, dict(left_out), _drawn(view, fields, small / side))


def resolution(slides: Sequence[Slide], wanted: float | None) -> float:
    """Micrometres per px of the fields of all slides: as wanted, else that of the coarsest slide.

    Raises:
        SlideError: a slide is coarser than wanted.
    """
    if wanted is None:
        return max(slide.mpp for slide in slides)
    if coarse := [slide for slide in slides if slide.mpp > 1.01 * wanted]:
        named = "; ".join(f"{slide.path} has {slide.mpp:.4g}" for slide in coarse)
        raise SlideError(
            f"No slide can show more than was scanned. Wanted are {wanted:g} micrometres per pixel, but "
            f"{named}. Leave --mpp out, or give a larger number."
        )
    return wanted


def write_fields(
    slides: Sequence[Slide], folder: Path, facts: Sequence[Facts], *, count: int, mpp: float, size: int
) -> list[Choice]:
    """Make a data set of the best fields of slides: whole, or not at all.

    The new or empty folder gets ``wsi.csv``, the pictures (``wsi/*.png``), `FIELDS_FILE` (where each was
    taken) and a picture of each slide with its fields. The other arguments are as of `choose_fields`; `facts`
    has the diagnosis and patient of each slide, and the name of its pictures.

    Raises:
        UserError: the folder holds something, no slide has a good field, or pixels are damaged.
    """
    with whole_folder(folder) as part:
        choices = [choose_fields(slide, count, mpp, size) for slide in slides]
        if not any(len(choice.fields) for choice in choices):
            why = sum((Counter(choice.left_out) for choice in choices), Counter[str]())
            raise SlideError(f"No field of one sharp layer was found. Squares by reason: {reasons(why)}.")
        (part / IMAGE_FOLDER).mkdir(parents=True)
        tables = [
            _write_slide(slide, choice, part, fact, size)
            for slide, choice, fact in zip(slides, choices, facts, strict=True)
        ]
        table = pd.concat(tables, ignore_index=True)
        write_table(part / SMEARS_FILE, table[["id", "imgName", "label", "patient"]])
        write_table(part / FIELDS_FILE, table[list(_COLUMNS)])
    return choices


def _write_slide(slide: Slide, choice: Choice, folder: Path, facts: Facts, size: int) -> pd.DataFrame:
    """Write the pictures of one slide; its rows of both tables."""
    ids = [f"{facts.name}_{number:03d}" for number in range(1, len(choice.fields) + 1)]
    places = choice.fields[["x", "y", "side"]].itertuples(index=False)
    for name, (x, y, side) in progress(list(zip(ids, places, strict=True)), "fields written", len(ids)):
        rgb, _ = slide.region(x, y, side, side, (size, size))
        Image.fromarray(as_rgb(rgb, slide.profile)[0]).save(folder / IMAGE_FOLDER / f"{name}.png", "PNG")
    choice.thumbnail.save(folder / f"{facts.name}.png", "PNG")
    names = {"id": ids, "imgName": [f"{name}.png" for name in ids], "slide": slide.path.name}
    return choice.fields.assign(**names, label=facts.diagnosis, patient=facts.patient)


def reasons(counts: Mapping[str, int]) -> str:
    """Reasons and their numbers as text, such as ``empty 30, out of focus 4``."""
    return ", ".join(f"{reason} {number:,}" for reason, number in counts.items() if number)


# --- one layer ----------------------------------------------------------------------------------------


def _overview(slide: Slide, x: int, y: int, side: int) -> Rgb:
    size = max(min(round(side * slide.mpp / _MPP), side), 1)
    return slide.region(x, y, side, side, (size, size))[0]


def _glass(slide: Slide, side: int, rows: int, columns: int) -> Floats:
    """The colour of the empty glass, float64 (3,): the brightest px of squares spread over the slide.

    Most squares may be full of cells; the upper quarter of all is taken. White that no camera has taken (255)
    does not count.
    """
    places = np.unique(np.linspace(0, rows * columns - 1, _SAMPLE).astype(int)).tolist()
    found = []
    for place in places:
        pixels = _overview(slide, place % columns * side, place // columns * side, side).reshape(-1, 3)
        seen = pixels[(pixels < 255).any(axis=1)]
        if len(seen) * 2 > len(pixels):
            found.append(np.percentile(seen, 97, axis=0))
    return np.percentile(found, 75, axis=0) if found else np.full(3, 255.0)


def _layer(rgb: Rgb, glass: Floats, micrometres: float) -> dict[str, float]:
    """Scores of a square of the overview: `cover`, `clumped`, and `nuclei` per mm² (0 if not counted)."""
    scale = len(rgb) / micrometres  # px per micrometre
    own = np.percentile(rgb[::2, ::2].reshape(-1, 3), 97, axis=0)
    darker = np.log((glass + 1) / (own + 1)).sum()
    light = own if abs(darker) < _UNEVEN else glass
    table = np.maximum(np.log((light + 1) / (np.arange(256)[:, None] + 1)), 0).astype(np.float32)
    density = sum(table[:, channel][rgb[..., channel]] for channel in range(3))
    covered = np.asarray(density > _SEEN, np.uint8)
    deep = cv2.distanceTransform(covered, cv2.DIST_L2, 5) > _DEEP * scale
    scores = {
        "cover": min(float(part.mean()) for part in _parts(covered)),
        "clumped": max(float(part.mean()) for part in _parts(deep)),
        "nuclei": 0.0,
    }
    if not _reason(scores | {"nuclei": 1.0}):
        labels, _ = ndimage.label(nucleated_parts(rgb)[0])
        areas = np.bincount(labels.ravel())[1:]
        least, most = (math.pi / 4 * (length * scale) ** 2 for length in _NUCLEUS)
        scores["nuclei"] = float(((areas >= least) & (areas <= most)).sum()) / micrometres**2 * 1e6
    return {name: round(value, 4) for name, value in scores.items()}


def _parts(square: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    return [part for rows in np.array_split(square, _PARTS) for part in np.array_split(rows, _PARTS, axis=1)]


def _reason(scores: dict[str, float]) -> str:
    """Why a square is not taken; '' for a good one."""
    if scores["cover"] < _COVER:
        return "empty"
    if scores["clumped"] > _CLUMPED:
        return "several layers"
    return "" if scores["nuclei"] else "no nuclei"


# --- focus --------------------------------------------------------------------------------------------


def _sharp(slide: Slide, table: pd.DataFrame, most: int, size: int, left_out: Counter[str]) -> pd.DataFrame:
    """The sharp ones of the first `most` squares, in the same order."""
    left_out["fewer nuclei, focus not measured"] = max(len(table) - most, 0)
    table = table.head(most)
    values, levels = [], []
    places = list(table[["x", "y", "side"]].itertuples(index=False))
    for x, y, side in progress(places, "squares in focus?", len(places)):
        rgb, level = slide.region(x, y, side, side, (size, size))
        values.append(round(min(map(sharpness, _parts(rgb))), 4))
        levels.append(level)
    table = table.assign(sharpness=values, level=levels)
    if table.empty:
        return table
    sharp = table["sharpness"] >= _SHARP * np.percentile(values, 95)
    left_out["out of focus"] = int((~sharp).sum())
    return table[sharp]


def sharpness(rgb: Rgb) -> float:
    """The share of contrast at the edges of cells that one more blur takes away, 0 (blurred) to 1."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)
    shares = []
    for axis in (0, 1):
        blurred = cv2.blur(grey, (_BLUR, 1) if axis else (1, _BLUR))
        before, after = (np.abs(np.diff(one, axis=axis)) for one in (grey, blurred))
        edges = after >= np.percentile(after, _EDGES)
        total = float(before[edges].sum())
        lost = float(np.maximum(before - after, 0)[edges].sum())
        shares.append(lost / total if total else 0.0)
    return min(shares)


# --- the slide with its fields --------------------------------------------------------------------------


def _drawn(view: Rgb, fields: pd.DataFrame, scale: float) -> Image.Image:
    picture = Image.fromarray(view)
    pen = ImageDraw.Draw(picture)
    for number, (x, y, side) in enumerate(fields[["x", "y", "side"]].itertuples(index=False), 1):
        left, top, right, bottom = (round(one * scale) for one in (x, y, x + side, y + side))
        pen.rectangle((left, top, right - 1, bottom - 1), outline=_GREEN, width=3)
        pen.text((left + 5, top + 3), str(number), fill="black", font=ImageFont.load_default(24))
    return picture
