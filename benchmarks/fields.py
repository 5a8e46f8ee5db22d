"""How well `aplsmear cells` finds white cells in real fields of peripheral blood, without a given size.

Usage: python benchmarks/fields.py DIR [--only NAME ...]

DIR holds annotations.csv (image, xmin, ymin, xmax, ymax as shares of the picture, label: rbc or wbc) and
images/. The fields are used as they are, and changed as other magnifications, laboratories and cameras would
show them. Each change is a data set of its own, whose size of a cell is estimated. A box is correct if its
IoU with an annotated white cell is at least 0.5, one to one. Results: benchmarks/results/fields.json.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from laboratories import draw_laboratory, shifted
from PIL import Image
from record import ROOT, commit, machine

from aplsmear.files import write_json
from aplsmear.images.reading import read_image
from aplsmear.sources.cell_finder import BOX
from aplsmear.sources.cell_folder import find_all
from aplsmear.sources.cell_size import matches

RESULTS = ROOT / "benchmarks" / "results" / "fields.json"
SEED = 7
FEW = 4  # pictures of a small data set

Picture = npt.NDArray[np.uint8]
Fields = Mapping[str, tuple[Picture, npt.NDArray[np.float64]]]  # name: picture and boxes (y0, x0, y1, x1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=sorted(CHANGES), default=list(CHANGES), metavar="NAME")
    asked = parser.parse_args()
    fields = read_fields(asked.folder)
    results = {name: judge(CHANGES[name](fields)) for name in asked.only}
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    write_json(RESULTS, old | results | {"machine": machine(), "commit": commit()})
    print(pd.DataFrame(results).T.to_string())


def read_fields(root: Path) -> Fields:
    """The pictures, and the boxes of their white cells in px."""
    table = pd.read_csv(root / "annotations.csv")
    fields = {}
    for name, rows in table.groupby("image"):
        picture = read_image(root / "images" / str(name))
        sides = np.array([*picture.shape[:2], *picture.shape[:2]])
        white = rows.loc[rows["label"] == "wbc", ["ymin", "xmin", "ymax", "xmax"]]
        fields[str(name)] = (picture, white.to_numpy(dtype=float) * sides)
    return fields


def judge(fields: Fields) -> dict[str, Any]:
    """Recall, precision and the estimated size, of a data set with these pictures."""
    with tempfile.TemporaryDirectory() as folder:
        smears = pd.DataFrame({"smear": list(fields), "image": [f"{n}.png" for n in range(len(fields))]})
        for (picture, _), image in zip(fields.values(), smears["image"], strict=True):
            Image.fromarray(picture).save(Path(folder) / image)
        search = find_all(Path(folder), smears)
    rows = search.cells.groupby("smear").indices
    found = {smear: search.cells.iloc[rows.get(smear, [])][list(BOX)].to_numpy() for smear in fields}
    hits = sum(matches(boxes, found[smear]) for smear, (_, boxes) in fields.items())
    there = sum(len(boxes) for _, boxes in fields.values())
    return {
        "cells": there,
        "found": len(search.cells),
        "recall": hits / there if there else 1.0,
        "precision": hits / len(search.cells) if len(search.cells) else 1.0,
        "size": search.size,
        "doubts": len(search.estimate.doubts) if search.estimate else 0,
    }


def changed(change: Callable[[Picture], Picture]) -> Callable[[Fields], Fields]:
    """The same change of each picture that leaves the boxes where they are."""
    return lambda fields: {name: (change(picture), boxes) for name, (picture, boxes) in fields.items()}


def rescaled(factor: float) -> Callable[[Fields], Fields]:
    """Another magnification."""
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return lambda fields: {
        name: (cv2.resize(picture, None, fx=factor, fy=factor, interpolation=method), boxes * factor)
        for name, (picture, boxes) in fields.items()
    }


def laboratory(number: int, strength: float) -> Callable[[Fields], Fields]:
    """Another laboratory: stain, light, focus, resolution and JPEG (laboratories.py)."""
    drawn = draw_laboratory(SEED, number)
    return changed(lambda picture: shifted(picture, drawn, strength))


def transmitted(gains: tuple[float, float, float], density: float = 1.0) -> Callable[[Fields], Fields]:
    """Another camera: gains of red, green and blue; `density` multiplies the optical density."""

    def change(picture: Picture) -> Picture:
        light = np.clip(picture / 255 * np.array(gains), 0, 1) ** density
        return np.asarray(np.rint(255 * light), np.uint8)

    return changed(change)


def some(first: int) -> Callable[[Fields], Fields]:
    """A data set of few pictures."""
    return lambda fields: dict(list(fields.items())[first : first + FEW])


CHANGES: Mapping[str, Callable[[Fields], Fields]] = {
    "as_they_are": rescaled(1.0),
    **{f"scale_{factor:g}": rescaled(factor) for factor in (0.35, 0.5, 1.4, 2.0)},
    **{f"laboratory_{number}": laboratory(number, 1.0) for number in (1, 2, 3)},
    **{f"laboratory_{number}_strong": laboratory(number, 2.0) for number in (1, 2, 3)},
    "white_background": transmitted((1.38, 1.12, 1.29)),
    "dark": transmitted((0.6, 0.6, 0.6)),
    "pale": transmitted((1.0, 1.0, 1.0), 0.5),
    "blurred": changed(lambda picture: np.asarray(cv2.GaussianBlur(picture, (0, 0), 2.5), np.uint8)),
    **{f"four_pictures_{first}": some(first) for first in (0, 25, 50, 75)},
    "no_white_cell": lambda fields: {name: field for name, field in fields.items() if not len(field[1])},
}


if __name__ == "__main__":
    main()
