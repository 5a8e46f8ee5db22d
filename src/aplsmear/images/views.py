"""Plain and augmented views of cells and smears.

View 0 of an item is the plain view. Every other view is augmented with random numbers that depend only on
(seed, item, view), so neither the order of files nor the number of workers changes a pixel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd

from aplsmear.compute.engine import HERE, Engine
from aplsmear.errors import UserError
from aplsmear.images.augmentation import Pyramid, draw_change, recoloured, view_matrix
from aplsmear.images.reading import ImageError, encode_jpeg, read_image, resize
from aplsmear.images.stains import StainError, normalised
from aplsmear.images.view_store import View
from aplsmear.params import Augment, Level
from aplsmear.tables import SEPARATOR
from aplsmear.words import misspelt

LABEL_COLUMNS = ("cell_type", "special_characteristics", "object_type", "diagnosis", "fab")
BOX = ("y0", "x0", "y1", "x1")

_SIMILAR = 0.85  # of 1; "Auer rod" is similar to "Auer rods" (0.94), "aml" is not similar to "apl" (0.67)


class ViewError(UserError, ValueError):
    """Views cannot be made with the settings of params.yaml."""


def view_multipliers(items: pd.DataFrame, extra_views: Mapping[str, int]) -> np.ndarray:
    """The multiplier of the number of augmented views of each item: the largest one of its labels, or 1.

    Args:
        items: a table with some of `LABEL_COLUMNS`; labels are joined by ``|``.
        extra_views: label -> multiplier.

    Returns:
        int64, shape (items,).
    """
    factor = np.ones(len(items), dtype=np.int64)
    for column in LABEL_COLUMNS:
        if column in items:
            for text, rows in items.groupby(column, sort=False).indices.items():
                wanted = max((extra_views.get(label, 1) for label in str(text).split(SEPARATOR)), default=1)
                factor[rows] = np.maximum(factor[rows], wanted)
    return factor


def cut(image: np.ndarray, box: tuple[int, int, int, int], side: float, size: int) -> np.ndarray:
    """Cut a square around the centre of a box and scale it; beyond the image its edge is mirrored.

    Args:
        image: uint8 RGB, shape (height, width, 3).
        box: y0, x0, y1, x1 in px, end exclusive.
        side: of the square, in px of `image`.
        size: of the result, in px.

    Returns:
        uint8 RGB, shape (size, size, 3).
    """
    y0, x0, y1, x1 = box
    half = int(np.ceil(side / 2))
    top, left = (y0 + y1) // 2 - half, (x0 + x1) // 2 - half
    bottom, right = top + 2 * half, left + 2 * half
    height, width = image.shape[:2]
    inside = image[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    if inside.shape[:2] != (2 * half, 2 * half):
        inside = cv2.copyMakeBorder(
            inside,
            max(-top, 0),
            max(bottom - height, 0),
            max(-left, 0),
            max(right - width, 0),
            cv2.BORDER_REFLECT,
        )
    return resize(inside, size)


def view_seed(seed: int, item: str, view: int) -> int:
    """A 31-bit seed that depends only on the three arguments."""
    digest = hashlib.sha256(f"{seed}/{item}/{view}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def prepared(image: np.ndarray, settings: Augment, name: str) -> np.ndarray:
    """Normalise the colours of a smear before its views are cut from it.

    Args:
        image: uint8 RGB, shape (height, width, 3).
        settings: of the views; `settings.normalise` is the method.
        name: of the image, for messages.

    Returns:
        uint8 RGB of the same shape.

    Raises:
        ViewError: the colours cannot be normalised.
    """
    try:
        return normalised(image, settings.normalise)
    except StainError as error:
        raise ViewError(
            f"{name}: its colours cannot be normalised ({error}): remove the smear from wsi.csv, or set "
            "augment.normalise in params.yaml to none"
        ) from None


def cell_views(
    smear: Pyramid, box: tuple[int, int, int, int], name: str, count: int, settings: Augment, seed: int
) -> Iterator[View]:
    """Make the views of one cell: the plain view, then the augmented views.

    Args:
        smear: in normalised colours.
        box: y0, x0, y1, x1 in px, end exclusive.
        name: of the cell.
        count: number of augmented views.
        settings: of the views.
        seed: of the augmented views.
    """
    size = settings.size["cell"]
    side = max(box[2] - box[0], box[3] - box[1]) * (1 + settings.margin)
    yield View(name, 0, encode_jpeg(cut(smear.image, box, side, size)))
    centre = np.array([(box[1] + box[3]) // 2, (box[0] + box[2]) // 2], np.float64)
    whole = 2 * math.ceil(side / 2)  # as `cut`
    for view in range(1, count + 1):
        change = draw_change(settings, view_seed(seed, name, view))
        matrix, shift = view_matrix(change, whole / size, whole)
        yield View(name, view, encode_jpeg(recoloured(smear.warped(matrix, centre + shift, size), change)))


def smear_views(smear: Pyramid, name: str, count: int, settings: Augment, seed: int) -> Iterator[View]:
    """Make the views of one whole smear, resized to a square: the plain view, then the augmented views.

    The field is rotated before it is resized, as a slide is rotated under a camera. Beyond the field its edge
    is mirrored.

    Args:
        smear: in normalised colours.
        name: of the smear.
        count: number of augmented views.
        settings: of the views.
        seed: of the augmented views.
    """
    size = settings.size["smear"]
    yield View(name, 0, encode_jpeg(resize(smear.image, size)))
    sides = np.array(smear.image.shape[1::-1], np.float64)
    for view in range(1, count + 1):
        change = draw_change(settings, view_seed(seed, name, view))
        matrix, shift = view_matrix(change, sides / size, sides.max())
        yield View(name, view, encode_jpeg(recoloured(smear.warped(matrix, sides / 2 + shift, size), change)))


def unused_labels(extra_views: Mapping[str, int], tables: Iterable[pd.DataFrame]) -> list[str]:
    """The labels of `extra_views` that no item has.

    Args:
        extra_views: label -> multiplier.
        tables: items, each with some of `LABEL_COLUMNS`.

    Raises:
        ViewError: such a label is similar to a label of the tables, so it is probably misspelt.
    """
    texts = {
        text
        for table in tables
        for column in LABEL_COLUMNS
        if column in table
        for text in table[column].unique()
    }
    carried = {label for text in texts for label in text.split(SEPARATOR) if label}
    unused = [label for label in extra_views if label not in carried]
    near = {label: misspelt(label, carried, _SIMILAR) for label in unused}
    problems = [
        f"augment.extra_views: no item has the label {label!r} (did you mean {found!r}?)"
        for label, found in near.items()
        if found
    ]
    if problems:
        raise ViewError("\n".join(problems))
    return unused


class _Smear(NamedTuple):
    """One partition of the work: a smear and its cells."""

    path: Path
    shown: str  # name of its image in messages
    name: str
    views: int  # number of augmented views
    cells: pd.DataFrame  # cell, the box, and the number of augmented `views`


def all_views(
    root: Path,
    smears: pd.DataFrame,
    cells: pd.DataFrame,
    settings: Augment,
    seed: int,
    engine: Engine = HERE,
    files: Mapping[str, str] | None = None,
) -> Iterator[dict[Level, list[View]]]:
    """Make the views of every smear and its cells, in the order of `smears`; each image is decoded once.

    Args:
        root: folder of the images.
        smears: ``dataset/smears.csv``.
        cells: ``dataset/cells.csv``.
        settings: of the views.
        seed: of the augmented views.
        engine: runs the smears in parallel; the results are the same with each engine.
        files: the path below `root` of each value of the column `image`; None: the value is the path.

    Yields:
        For each smear, the views of the smear and those of its cells in the order of `cells`.
    """
    counts = settings.views * view_multipliers(smears, settings.extra_views)
    cells = cells[["smear", "cell", *BOX]].assign(
        views=settings.views * view_multipliers(cells, settings.extra_views)
    )
    rows = cells.groupby("smear", sort=False).indices
    parts = (
        _Smear(
            root / (files[each.image] if files else each.image),
            each.image,
            each.smear,
            each.views,
            cells.iloc[rows.get(each.smear, [])],
        )
        for each in _rows(smears[["smear", "image"]].assign(views=counts))
    )
    yield from engine.map(partial(_views_of_smear, settings=settings, seed=seed), parts)


def _views_of_smear(smear: _Smear, settings: Augment, seed: int) -> dict[Level, list[View]]:
    """Views of one smear; messages name its image `shown`."""
    cv2.setNumThreads(1)
    try:
        pyramid = Pyramid(prepared(read_image(smear.path), settings, smear.shown))
    except ImageError as error:
        raise ImageError(smear.shown, error.what, error.fix) from None
    return {
        "smear": list(smear_views(pyramid, smear.name, smear.views, settings, seed)),
        "cell": [
            view
            for row in _rows(smear.cells)
            for view in cell_views(
                pyramid, (row.y0, row.x0, row.y1, row.x1), row.cell, row.views, settings, seed
            )
        ],
    }


def _rows(table: pd.DataFrame) -> Iterator[Any]:
    """Rows as named tuples; Any, because type checkers cannot see their fields."""
    return iter(table.itertuples(index=False))
