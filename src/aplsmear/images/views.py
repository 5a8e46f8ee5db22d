"""Plain and augmented views of cells and smears.

View 0 of an item is plain; the others are augmented, each drawn from (seed, item, view) alone, so that
neither the order of files nor the number of workers changes a pixel. imgaug lives in this module only.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd

from aplsmear.compute.engine import HERE, Engine
from aplsmear.errors import UserError
from aplsmear.images.reading import ImageError, encode_jpeg, read_image, resize, scaling
from aplsmear.images.stains import StainError, normalised
from aplsmear.images.view_store import View
from aplsmear.params import Augment, Level
from aplsmear.tables import SEPARATOR

LABEL_COLUMNS = ("cell_type", "special_characteristics", "object_type", "diagnosis", "fab")
BOX = ("y0", "x0", "y1", "x1")

_LIKE = 0.85  # of 1; "Auer rod" is like "Auer rods" (0.94), "aml" is not like "apl" (0.67)


class ViewError(UserError, ValueError):
    """Views cannot be made as params.yaml asks."""


def copies(items: pd.DataFrame, more: Mapping[str, int]) -> np.ndarray:
    """How many times the usual number of augmented views each item gets: the most any label of it asks for.

    Args:
        items: a table with some of `LABEL_COLUMNS`, labels joined by ``|``.
        more: label -> factor.

    Returns:
        int64, shape (items,).
    """
    factor = np.ones(len(items), dtype=np.int64)
    for column in LABEL_COLUMNS:
        if column in items:
            for text, rows in items.groupby(column, sort=False).indices.items():
                wanted = max((more.get(label, 1) for label in str(text).split(SEPARATOR)), default=1)
                factor[rows] = np.maximum(factor[rows], wanted)
    return factor


def cut(image: np.ndarray, box: tuple[int, int, int, int], side: float, size: int) -> np.ndarray:
    """A square of `side` pixels around the middle of `box`, scaled to `size`; a smear's edge is mirrored.

    Args:
        image: uint8 RGB, shape (height, width, 3).
        box: y0, x0, y1, x1 in pixels, end exclusive.
        side: pixels of `image`.
        size: pixels of the result.

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
    """A 31-bit seed that depends on nothing but the three."""
    digest = hashlib.sha256(f"{seed}/{item}/{view}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def room(settings: Augment) -> float:
    """How many times wider than a view its source must be for no turn, shift or scale to leave it."""
    angle = math.radians(min(settings.rotate, 45.0))
    turn = math.cos(angle) + math.sin(angle)  # side of the square around a turned square of side 1
    return (1 + 2 * settings.shift) * turn / (1 - settings.scale)


def prepared(image: np.ndarray, settings: Augment, name: str) -> np.ndarray:
    """A smear as its views are cut from it: in the colours that `settings.normalise` asks for.

    Args:
        image: uint8 RGB, shape (height, width, 3).
        settings: of the views.
        name: of the image, for messages.

    Raises:
        ViewError: it cannot be normalised.
    """
    try:
        return normalised(image, settings.normalise)
    except StainError as error:
        raise ViewError(
            f"{name}: cannot be brought to common colours ({error}): take the smear out of wsi.csv, or set "
            "augment.normalise in params.yaml to none"
        ) from None


def make_augmenter(settings: Augment, size: int, field: tuple[int, int] | None = None) -> Any:
    """imgaug's augmenter: geometry, the middle, stain, lamp, focus and camera, as wide as `settings` say.

    A knob at 0 leaves its place empty, so that it changes neither pixels nor what the others draw.

    Args:
        settings: of the views.
        size: pixels of a view.
        field: height and width in pixels of what is kept of the middle and then squeezed into a view; None:
            as large as a view.
    """
    height, width = field or (size, size)
    iaa = _imgaug()
    knobs = settings
    reach = knobs.shift / room(knobs)

    def unless_0(knob: float, augmenter: Any) -> Any:
        return augmenter if knob else iaa.Identity()

    return iaa.Sequential(
        [
            iaa.Fliplr(0.5),
            iaa.Rot90((0, 3), keep_size=False),
            unless_0(
                knobs.rotate + knobs.scale + knobs.shift,
                iaa.Affine(
                    rotate=(-knobs.rotate, knobs.rotate),
                    scale=(1 - knobs.scale, 1 + knobs.scale),
                    translate_percent={"x": (-reach, reach), "y": (-reach, reach)},
                    mode="reflect",
                ),
            ),
            iaa.CenterCropToFixedSize(width, height),
            unless_0(field is not None, iaa.Resize(size, interpolation="area")),
            unless_0(knobs.hue, iaa.AddToHue((-knobs.hue, knobs.hue))),
            unless_0(knobs.saturation, iaa.AddToSaturation((-knobs.saturation, knobs.saturation))),
            unless_0(knobs.brightness, iaa.Multiply((1 - knobs.brightness, 1 + knobs.brightness))),
            unless_0(knobs.blur, iaa.GaussianBlur((0.0, knobs.blur))),
            unless_0(knobs.noise, iaa.AdditiveGaussianNoise(scale=(0.0, knobs.noise), per_channel=True)),
        ]
    )


def augmented(wide: np.ndarray, augmenter: Any, seed: int) -> np.ndarray:
    """One augmented view: pixel for pixel what imgaug gives once ``augmenter.seed_(seed)`` was said.

    imgaug itself takes longer over seeds, hooks and copies than over pixels. Here each augmenter gets the
    generator that `seed_` would derive for it, and is called at its core.

    Args:
        wide: uint8 RGB, shape (width, width, 3): the item and its surroundings, `room` times as wide.
        augmenter: of `make_augmenter`; it is seeded anew here, for every view.
        seed: of this view.

    Returns:
        uint8 RGB, shape (size, size, 3), with the size that the augmenter was made for.
    """
    from imgaug import random
    from imgaug.augmentables.batches import _BatchInAugmentation

    # Of each pair of numbers imgaug takes the second for a seed.
    drawn = random.RNG(seed).generator.integers(
        random.SEED_MIN_VALUE, random.SEED_MAX_VALUE, size=(len(augmenter), 2), dtype=np.int32
    )
    batch = _BatchInAugmentation(images=[wide.copy()])
    for each, own in zip(augmenter, drawn[:, 1].tolist(), strict=True):
        if not isinstance(each, _imgaug().Identity):
            source = np.random.SeedSequence(own, spawn_key=(0,))  # the first that one of `own` spawns
            batch = each._augment_batch_(batch, random.RNG(source), [], None)
    return np.ascontiguousarray(batch.images[0])


def cell_views(
    image: np.ndarray, box: tuple[int, int, int, int], name: str, count: int, settings: Augment, seed: int
) -> Iterator[View]:
    """The views of one cell: the plain one, then `count` augmented ones.

    Args:
        image: uint8 RGB, shape (height, width, 3): the smear.
        box: y0, x0, y1, x1 in pixels, end exclusive.
        name: of the cell.
        count: of augmented views.
        settings: of the views.
        seed: of the augmented views.
    """
    size = settings.size["cell"]
    side = max(box[2] - box[0], box[3] - box[1]) * (1 + settings.margin)
    yield View(name, 0, encode_jpeg(cut(image, box, side, size)))
    if count:
        wide = cut(image, box, side * room(settings), round(size * room(settings)))
        yield from _augmented_views(wide, size, name, count, settings, seed)


def smear_views(image: np.ndarray, name: str, count: int, settings: Augment, seed: int) -> Iterator[View]:
    """The views of one whole smear, squeezed into a square: the plain one, then `count` augmented ones.

    A field is turned before it is squeezed, as a slide is turned under a camera. It has no surroundings, so
    its mirrored edge gives the room that turning needs.

    Args:
        image: uint8 RGB, shape (height, width, 3).
        name: of the smear.
        count: of augmented views.
        settings: of the views.
        seed: of the augmented views.
    """
    size = settings.size["smear"]
    yield View(name, 0, encode_jpeg(resize(image, size)))
    if count:
        shrink = size / min(image.shape[:2])
        height, width = (round(side * shrink) for side in image.shape[:2])
        field = np.asarray(cv2.resize(image, (width, height), interpolation=scaling(shrink)), dtype=np.uint8)
        side = math.ceil(max(height, width) * room(settings))
        above, left = (side - height) // 2, (side - width) // 2
        below, right = side - height - above, side - width - left
        wide = np.asarray(cv2.copyMakeBorder(field, above, below, left, right, cv2.BORDER_REFLECT), np.uint8)
        squeezed = (height, width) if height != width else None
        yield from _augmented_views(wide, size, name, count, settings, seed, squeezed)


def idle_labels(more: Mapping[str, int], tables: Iterable[pd.DataFrame]) -> list[str]:
    """The labels of `more` that no item carries.

    Args:
        more: label -> factor.
        tables: items, each with some of `LABEL_COLUMNS`.

    Raises:
        ViewError: one of them is probably misspelt: it is nearly that of some items.
    """
    texts = {
        text
        for table in tables
        for column in LABEL_COLUMNS
        if column in table
        for text in table[column].unique()
    }
    carried = {label.casefold(): label for text in texts for label in text.split(SEPARATOR) if label}
    idle = [label for label in more if label not in carried.values()]
    near = {label: difflib.get_close_matches(label.casefold(), carried, n=1, cutoff=_LIKE) for label in idle}
    problems = [
        f"augment.extra_views: nothing carries {label!r} (did you mean {carried[found[0]]!r}?)"
        for label, found in near.items()
        if found
    ]
    if problems:
        raise ViewError("\n".join(problems))
    return idle


class _Smear(NamedTuple):
    """A partition of the work: one smear with its cells."""

    path: Path
    shown: str  # of its image, in messages
    name: str
    wanted: int  # augmented views
    cells: pd.DataFrame


def all_views(
    root: Path,
    smears: pd.DataFrame,
    cells: pd.DataFrame,
    settings: Augment,
    seed: int,
    engine: Engine = HERE,
    files: Mapping[str, str] | None = None,
) -> Iterator[dict[Level, list[View]]]:
    """The views of every smear and its cells, smear by smear as in `smears`; each image is decoded once.

    Args:
        root: the folder that the `image` column of `smears` starts from.
        smears: ``dataset/smears.csv``.
        cells: ``dataset/cells.csv``.
        settings: of the views.
        seed: of the augmented views.
        engine: does the smears; changes no result.
        files: the path below `root` of each image, where `image` is no path but stands for one.

    Yields:
        For each smear, the views of the smear and those of its cells in the order of `cells`.
    """
    counts = settings.views * copies(smears, settings.extra_views)
    cells = cells[["smear", "cell", *BOX]].assign(wanted=settings.views * copies(cells, settings.extra_views))
    rows = cells.groupby("smear", sort=False).indices
    parts = (
        _Smear(
            root / (files[each.image] if files else each.image),
            each.image,
            each.smear,
            each.wanted,
            cells.iloc[rows.get(each.smear, [])],
        )
        for each in _rows(smears[["smear", "image"]].assign(wanted=counts))
    )
    yield from engine.map(partial(_views_of_smear, settings=settings, seed=seed), parts)


def _views_of_smear(smear: _Smear, settings: Augment, seed: int) -> dict[Level, list[View]]:
    """Views of one smear; errors speak of its image as `shown`."""
    cv2.setNumThreads(1)
    try:
        image = prepared(read_image(smear.path), settings, smear.shown)
    except ImageError as error:
        raise ImageError(smear.shown, error.what, error.mend) from None
    return {
        "smear": list(smear_views(image, smear.name, smear.wanted, settings, seed)),
        "cell": [
            view
            for row in _rows(smear.cells)
            for view in cell_views(
                image, (row.y0, row.x0, row.y1, row.x1), row.cell, row.wanted, settings, seed
            )
        ],
    }


def _rows(table: pd.DataFrame) -> Iterator[Any]:
    """Rows as named tuples, whose fields type checkers cannot know."""
    return iter(table.itertuples(index=False))


def _augmented_views(
    wide: np.ndarray,
    size: int,
    name: str,
    count: int,
    settings: Augment,
    seed: int,
    field: tuple[int, int] | None = None,
) -> Iterator[View]:
    augmenter = _augmenter(settings.model_dump_json(), size, field)
    for view in range(1, count + 1):
        yield View(name, view, encode_jpeg(augmented(wide, augmenter, view_seed(seed, name, view))))


@lru_cache(maxsize=4)
def _augmenter(settings: str, size: int, field: tuple[int, int] | None) -> Any:
    """Building one costs as much as many views; a worker process keeps it."""
    return make_augmenter(Augment.model_validate_json(settings), size, field)


def _imgaug() -> Any:
    """imgaug 0.4 asks NumPy for `sctypes`, which NumPy 2 took away; given back, what we use of it works."""
    if not hasattr(np, "sctypes"):
        kinds = {
            "int": [np.int8, np.int16, np.int32, np.int64],
            "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
            "float": [np.float16, np.float32, np.float64],
            "complex": [np.complex64, np.complex128],
            "others": [bool, object, bytes, str, np.void],
        }
        vars(np)["sctypes"] = kinds
    import imgaug.augmenters as iaa

    return iaa
