"""Plain and augmented views of cells and smears.

View 0 of an item is plain; the others are augmented, each drawn from (seed, item, view) alone, so that neither the
order of files nor the number of workers changes a pixel. imgaug lives in this module only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import pandas as pd

from aplsmear.images import encode_jpeg, read_image
from aplsmear.params import Augment, Level
from aplsmear.shards import View
from aplsmear.tasks import SEPARATOR

ROOM = 1.5  # an augmented view is cut from so much more around the item, so that turning it brings in no border

LABEL_COLUMNS = ("cell_type", "special_characteristics", "diagnosis", "fab")


def copies(items: pd.DataFrame, more: dict[str, int]) -> np.ndarray:
    """How many times the usual number of augmented views each item gets: the largest that one of its labels asks for.

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
    """A square of `side` pixels around the middle of `box`, scaled to `size`; beyond the smear its edge is mirrored.

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


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Scale to a square of `size` pixels: by area where it shrinks, linearly where it grows."""
    method = cv2.INTER_AREA if min(image.shape[:2]) > size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (size, size), interpolation=method), dtype=np.uint8)


def view_seed(seed: int, item: str, view: int) -> int:
    """A 31-bit seed that depends on nothing but the three."""
    digest = hashlib.sha256(f"{seed}/{item}/{view}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def make_augmenter(settings: Augment) -> Any:
    """imgaug's augmenter: geometry, stain, lamp, focus and camera, as wide as `settings` say."""
    iaa = _imgaug()
    return iaa.Sequential(
        [
            iaa.Fliplr(0.5),
            iaa.Rot90((0, 3), keep_size=False),
            iaa.Affine(
                rotate=(-settings.rotate, settings.rotate),
                scale=(1 - settings.scale, 1 + settings.scale),
                translate_percent=(-settings.shift / ROOM, settings.shift / ROOM),
                mode="reflect",
            ),
            iaa.AddToHue((-settings.hue, settings.hue)),
            iaa.AddToSaturation((-settings.saturation, settings.saturation)),
            iaa.Multiply((1 - settings.brightness, 1 + settings.brightness)),
            iaa.GaussianBlur((0.0, settings.blur)),
            iaa.AdditiveGaussianNoise(scale=(0.0, settings.noise), per_channel=True),
        ]
    )


def augmented(wide: np.ndarray, size: int, augmenter: Any, seed: int) -> np.ndarray:
    """One augmented view: `wide` (`ROOM` times the view) is changed and its middle kept.

    Args:
        wide: uint8 RGB, shape (room, room, 3).
        size: pixels of the result.
        augmenter: of `make_augmenter`.
        seed: of this view.

    Returns:
        uint8 RGB, shape (size, size, 3).
    """
    augmenter.seed_(seed)
    changed = augmenter.augment_image(wide)
    start = (changed.shape[0] - size) // 2
    return np.ascontiguousarray(changed[start : start + size, start : start + size])


def cell_views(
    image: np.ndarray, box: tuple[int, int, int, int], name: str, count: int, settings: Augment, seed: int
) -> Iterator[View]:
    """The views of one cell: the plain one, then `count` augmented ones."""
    size = settings.size["cell"]
    side = max(box[2] - box[0], box[3] - box[1]) * (1 + settings.margin)
    yield View(name, 0, encode_jpeg(cut(image, box, side, size)))
    if count:
        wide = cut(image, box, side * ROOM, round(size * ROOM))
        yield from _augmented_views(wide, size, name, count, settings, seed)


def smear_views(image: np.ndarray, name: str, count: int, settings: Augment, seed: int) -> Iterator[View]:
    """The views of one whole smear: the plain one, then `count` augmented ones.

    A whole field has no surroundings, so its mirrored edge gives the room that turning needs.
    """
    size = settings.size["smear"]
    plain = resize(image, size)
    yield View(name, 0, encode_jpeg(plain))
    if count:
        border = (round(size * ROOM) - size) // 2
        wide = cv2.copyMakeBorder(plain, border, border, border, border, cv2.BORDER_REFLECT)
        yield from _augmented_views(wide, size, name, count, settings, seed)


def all_views(
    root: Path, smears: pd.DataFrame, cells: pd.DataFrame, settings: Augment, seed: int
) -> Iterator[dict[Level, list[View]]]:
    """The views of every smear and its cells, smear by smear in the order of `smears`; each image is decoded once.

    As many processes work as joblib finds cores (LOKY_MAX_CPU_COUNT may say fewer); their number changes no result.

    Args:
        root: the folder that the `image` column of `smears` starts from.
        smears: ``dataset/smears.csv``.
        cells: ``dataset/cells.csv``.
        settings: of the views.
        seed: of the augmented views.

    Yields:
        For each smear, the views of the smear and those of its cells in the order of `cells`.
    """
    smears = smears.assign(count=settings.views * copies(smears, settings.more))
    cells = cells.assign(count=settings.views * copies(cells, settings.more))
    of_smear = dict(list(cells.groupby("smear", sort=False)))
    jobs = (
        joblib.delayed(_views_of_smear)(root, smear, of_smear.get(smear.smear, cells[:0]), settings, seed)
        for smear in smears.itertuples(index=False)
    )
    parallel = joblib.Parallel(n_jobs=-1, return_as="generator", pre_dispatch="3 * n_jobs")
    yield from parallel(jobs)


def _views_of_smear(
    root: Path, smear: Any, cells: pd.DataFrame, settings: Augment, seed: int
) -> dict[Level, list[View]]:
    cv2.setNumThreads(1)
    image = read_image(root / smear.image)
    return {
        "smear": list(smear_views(image, smear.smear, smear.count, settings, seed)),
        "cell": [
            view
            for row in cells.itertuples(index=False)
            for view in cell_views(
                image, (row.y0, row.x0, row.y1, row.x1), row.cell, row.count, settings, seed
            )
        ],
    }


def _augmented_views(
    wide: np.ndarray, size: int, name: str, count: int, settings: Augment, seed: int
) -> Iterator[View]:
    augmenter = _augmenter(settings.model_dump_json())
    for view in range(1, count + 1):
        image = augmented(wide, size, augmenter, view_seed(seed, name, view))
        yield View(name, view, encode_jpeg(image))


@lru_cache(maxsize=4)
def _augmenter(settings: str) -> Any:
    """Building one costs as much as many views; a worker process keeps it. It is seeded anew for every view."""
    return make_augmenter(Augment.model_validate_json(settings))


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
