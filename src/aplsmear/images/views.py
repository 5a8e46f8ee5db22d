"""Plain and augmented views of cells and smears.

View 0 of an item is the plain view. Every other view is augmented with random numbers that depend only on
(seed, item, view), so neither the order of files nor the number of workers changes a pixel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd

from aplsmear.compute.engine import HERE, Engine
from aplsmear.errors import UserError
from aplsmear.images.augmentation import Pyramid, draw_change, recoloured, view_matrix
from aplsmear.images.reading import ImageError, encode_jpeg, read_image, resize
from aplsmear.images.view_store import View
from aplsmear.params import LEVELS, Augment, Level
from aplsmear.progress import progress
from aplsmear.tables import BOX, SEPARATOR
from aplsmear.words import misspelt

LABEL_COLUMNS = ("cell_type", "special_characteristics", "object_type", "diagnosis", "fab")

_TOGETHER = 64  # single cells of one part: one group of rows in the view store
_SIMILAR = 0.85  # of 1; "Auer rod" is similar to "Auer rods" (0.94), "aml" is not similar to "apl" (0.67)


def view_multipliers(items: pd.DataFrame, extra_views: Mapping[str, int]) -> np.ndarray:
    """The multiplier of the number of augmented views of each item: the largest one of its labels, or 1.

    `items` has some of `LABEL_COLUMNS`, and `extra_views` the multipliers by label. Returns int64 (items,).
    """
    factor = np.ones(len(items), dtype=np.int64)
    for column in LABEL_COLUMNS:
        if column in items:
            for text, rows in items.groupby(column, sort=False).indices.items():
                wanted = max((extra_views.get(label, 1) for label in str(text).split(SEPARATOR)), default=1)
                factor[rows] = np.maximum(factor[rows], wanted)
    return factor


def cut(image: np.ndarray, box: tuple[int, int, int, int], side: float, size: int) -> np.ndarray:
    """Cut a square of `side` px around the centre of a box, and scale it: uint8 RGB (size, size, 3).

    The box is y0, x0, y1, x1 in px, end exclusive. Beyond the image its edge is mirrored.
    """
    y0, x0, y1, x1 = box
    half = int(np.ceil(side / 2))
    top, left = (y0 + y1) // 2 - half, (x0 + x1) // 2 - half
    bottom, right = top + 2 * half, left + 2 * half
    height, width = image.shape[:2]
    inside = image[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    if inside.shape[:2] != (2 * half, 2 * half):
        beyond = (max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0))
        inside = cv2.copyMakeBorder(inside, *beyond, cv2.BORDER_REFLECT)
    return resize(inside, size)


def view_seed(seed: int, item: str, view: int) -> int:
    """A 31-bit seed that depends only on the three arguments."""
    digest = hashlib.sha256(f"{seed}/{item}/{view}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def cell_views(
    smear: Pyramid, box: tuple[int, int, int, int], name: str, count: int, settings: Augment, seed: int
) -> Iterator[View]:
    """Make the views of one cell: the plain view, then `count` augmented views.

    `box` is y0, x0, y1, x1 in px, end exclusive.
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
    """Make the views of one whole smear, resized to a square: the plain view, then `count` augmented views.

    The field is rotated before it is resized, as a slide is rotated under a camera. Beyond the field its edge
    is mirrored.
    """
    size = settings.size["smear"]
    yield View(name, 0, encode_jpeg(resize(smear.image, size)))
    sides = np.array(smear.image.shape[1::-1], np.float64)
    for view in range(1, count + 1):
        change = draw_change(settings, view_seed(seed, name, view))
        matrix, shift = view_matrix(change, sides / size, sides.max())
        yield View(name, view, encode_jpeg(recoloured(smear.warped(matrix, sides / 2 + shift, size), change)))


def unused_labels(extra_views: Mapping[str, int], tables: Iterable[pd.DataFrame]) -> list[str]:
    """The labels of `extra_views` that no item in `tables` has.

    Raises:
        UserError: such a label is similar to a label of the tables, so it is probably misspelt.
    """
    columns = [table[column] for table in tables for column in LABEL_COLUMNS if column in table]
    texts = {text for column in columns for text in column.unique()}
    carried = {label for text in texts for label in text.split(SEPARATOR) if label}
    unused = [label for label in extra_views if label not in carried]
    problems = [
        f"augment.extra_views: no item has the label {label!r} (did you mean {found!r}?)"
        for label in unused
        if (found := misspelt(label, carried, _SIMILAR))
    ]
    if problems:
        raise UserError("\n".join(problems))
    return unused


class Item(NamedTuple):
    """A smear or a cell of which views are made."""

    name: str
    patient: str
    image: str  # name of its picture in messages; '': the picture of the smear
    path: Path  # of its picture
    box: tuple[int, int, int, int]  # y0, x0, y1, x1 in px, end exclusive; of a smear: all 0
    views: int  # number of augmented views


class Part(NamedTuple):
    """What is processed together: a smear with its cells, or cells with pictures of their own (no smear)."""

    smear: Item | None
    cells: list[Item]


def parts_of(
    root: Path,
    smears: pd.DataFrame,
    cells: pd.DataFrame,
    settings: Augment,
    files: Mapping[str, str] | None = None,
    *,
    by_patient: bool = False,
) -> Iterator[Part]:
    """Divide a data set into parts: each smear with its cells, then the cells that have no smear.

    Args:
        root: folder of the images.
        smears: ``dataset/smears.csv``.
        cells: ``dataset/cells.csv``.
        settings: of the views.
        files: the path below `root` of each value of the column `image`; None: the value is the path.
        by_patient: sort everything by patient, so that all parts of a patient follow one another.
    """
    smears = smears.assign(views=settings.views * view_multipliers(smears, settings.extra_views))
    cells = cells.assign(views=settings.views * view_multipliers(cells, settings.extra_views))
    rows = cells.groupby("smear", sort=False).indices
    items = partial(_items, root=root, files=files)
    alone = [*items(smears, "smear"), *items(cells.iloc[rows.get("", [])], "cell")]
    is_smear = [True] * len(smears) + [False] * (len(alone) - len(smears))
    order = list(range(len(alone)))
    if by_patient:
        order.sort(key=lambda place: alone[place].patient)
    for smear, places in groupby(order, key=lambda place: is_smear[place]):
        for place in places:
            if smear:
                mine = cells.iloc[rows.get(alone[place].name, [])]
                yield Part(alone[place], list(items(mine, "cell")))
            else:
                yield Part(None, [alone[each] for each in (place, *islice(places, _TOGETHER - 1))])


def _items(table: pd.DataFrame, level: Level, root: Path, files: Mapping[str, str] | None) -> Iterator[Item]:
    """The rows of a table as items."""
    images = table["image"] if "image" in table else [""] * len(table)
    boxes = table[list(BOX)].to_numpy().tolist() if level == "cell" else [(0, 0, 0, 0)] * len(table)
    columns = (table[level], table["patient"], images, boxes, table["views"])
    for name, patient, image, box, views in zip(*columns, strict=True):
        path = root / (files[image] if files and image else image)
        yield Item(name, patient, image, path, tuple(box), views)


def views_of_parts(
    parts: Iterable[Part],
    settings: Augment,
    seed: int,
    engine: Engine = HERE,
    levels: Collection[Level] = LEVELS,
) -> Iterator[dict[Level, list[View]]]:
    """For each part, the views of its smear and of its cells, if they are of one of the `levels`.

    Each image is decoded once. The results are the same with each engine. A bar shows the progress.
    """
    parts = list(parts)
    making = partial(_views_of_part, settings=settings, seed=seed, levels=levels)
    unit = "smears" if all(part.smear for part in parts) else "pictures"
    pictures = [1 if part.smear else len(part.cells) for part in parts]
    yield from progress(engine.map(making, parts), unit, sum(pictures), counts=pictures)


def _views_of_part(
    part: Part, settings: Augment, seed: int, levels: Collection[Level]
) -> dict[Level, list[View]]:
    cv2.setNumThreads(1)
    found: dict[Level, list[View]] = {"smear": [], "cell": []}
    cells = part.cells if "cell" in levels else []
    whole = part.smear if part.smear and ("smear" in levels or cells) else None
    pyramid = _pyramid(whole) if whole else None
    if pyramid and part.smear and "smear" in levels:
        found["smear"] += smear_views(pyramid, part.smear.name, part.smear.views, settings, seed)
    for cell in cells:
        shown = pyramid or _pyramid(cell)
        found["cell"] += cell_views(shown, cell.box, cell.name, cell.views, settings, seed)
    return found


def _pyramid(item: Item) -> Pyramid:
    """The picture of an item; messages name it as the data set does."""
    try:
        return Pyramid(read_image(item.path))
    except ImageError as error:
        raise ImageError(item.image, error.what, error.fix) from None
