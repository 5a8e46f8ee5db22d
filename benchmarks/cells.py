"""How well `aplsmear cells` finds nucleated cells, on drawn and on real smears.

Usage: python benchmarks/cells.py [--patients N] [--seed S]
       python benchmarks/cells.py --data DIR --size PX [--smears N]

Drawn smears of N patients, each with another stain and camera: a found box is correct if its IoU with a drawn
box is at least 0.5, one to one. The size of a cell is estimated.

With --data, a folder in the Kaggle layout in which each box contains a cell with its surroundings: a cell
counts as found if exactly one found box lies around the centre of its box and hardly extends beyond it. Each
picture is used at half, full and double size, with the size of a cell estimated, and given (PX at full size).
With --smears, only N smears are used, evenly spread.

The results are written to benchmarks/results/cells.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from record import ROOT, commit, machine
from scipy.optimize import linear_sum_assignment

from aplsmear.data.dataset import read_data_set
from aplsmear.files import write_json
from aplsmear.images.reading import read_image
from aplsmear.sources.cell_finder import BOX
from aplsmear.sources.cell_folder import find_all
from aplsmear.sources.drawn import draw_data_set

RESULTS = ROOT / "benchmarks" / "results" / "cells.json"
MIN_BOX = 8  # px; boxes of 1 px, flaws of the drawn table, are no cells
SPILL = 0.1  # how far a found box may extend beyond the annotated one, in sides of that box
NEAR = 0.2  # how far apart their centres may be

Boxes = npt.NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patients", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--size", type=float, default=90.0, help="px of a typical cell of --data")
    parser.add_argument("--smears", type=int, default=10**9, help="of --data, evenly spread")
    asked = parser.parse_args()
    found = real(asked.data, asked.size, asked.smears) if asked.data else drawn(asked.patients, asked.seed)
    found |= {"machine": machine(), "commit": commit()}
    whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    whole["real" if asked.data else "drawn"] = found
    write_json(RESULTS, whole)
    print(json.dumps(found, indent=2))


def drawn(patients: int, seed: int) -> dict[str, Any]:
    """Precision and recall on drawn smears, and the recall of each type of cell."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "smears"
        draw_data_set(root, patients, seed)
        data = read_data_set(root, {}, min_box=MIN_BOX, skip_bad_images=False)
        start = time.perf_counter()
        search = find_all(root, data.smears)
        seconds = time.perf_counter() - start
    true_rows = data.cells.groupby("smear").indices
    found_rows = search.cells.groupby("smear").indices
    hit = np.zeros(len(data.cells), dtype=bool)
    overlaps = []
    worst = 1.0
    for smear in data.smears["smear"]:
        rows = true_rows[smear]
        there = data.cells.iloc[rows][list(BOX)].to_numpy()
        here = search.cells.iloc[found_rows.get(smear, [])][list(BOX)].to_numpy()
        overlap = iou(there, here)
        one, other = linear_sum_assignment(-overlap)
        right = overlap[one, other] >= 0.5
        hit[rows[one[right]]] = True
        overlaps.append(overlap[one, other][right])
        worst = min(worst, 2 * right.sum() / (len(there) + len(here)))
    kinds = data.cells["cell_type"].where(data.cells["cell_type"] != "", data.cells["object_type"])
    kinds = kinds.where(kinds != "", "not typed").str.lower().str.replace(" ", "_")
    return {
        "patients": patients,
        "seed": seed,
        "smears": len(data.smears),
        "cells": len(data.cells),
        "size": search.size,
        "precision": hit.sum() / len(search.cells),
        "recall": hit.mean(),
        "median_iou": np.median(np.concatenate(overlaps)),
        "worst_f1_of_a_smear": worst,
        "seconds_per_smear": seconds / len(data.smears),
        "recall_by_type": {kind: float(hit[kinds == kind].mean()) for kind in sorted(kinds.unique())},
    }


def iou(one: Boxes, other: Boxes) -> npt.NDArray[np.float64]:
    """Intersection over union of every box with every other, shape (one, other)."""
    start = np.maximum(one[:, None, :2], other[None, :, :2])
    end = np.minimum(one[:, None, 2:], other[None, :, 2:])
    common = np.prod(np.clip(end - start, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (one, other)]
    return common / (areas[0][:, None] + areas[1][None] - common)


def real(root: Path, size: float, most: int) -> dict[str, Any]:
    """Share of annotated boxes whose cell is found at three scales, with estimated and with given size."""
    data = read_data_set(root, {}, min_box=MIN_BOX, skip_bad_images=True)
    places = np.linspace(0, len(data.smears) - 1, min(most, len(data.smears))).astype(int)
    smears = data.smears.iloc[places]
    cells = data.cells[data.cells["smear"].isin(set(smears["smear"]))]
    found: dict[str, Any] = {"smears": len(smears), "boxes": len(cells)}
    with tempfile.TemporaryDirectory() as folder:
        for zoom in (0.5, 1.0, 2.0):
            pages = rescaled(root, smears, zoom, Path(folder))
            estimated = find_all(pages, smears)
            fixed = find_all(pages, smears, size * zoom)
            found[f"scale_{zoom:g}"] = {
                "estimated": agreement(cells, estimated.cells, zoom) | {"size": estimated.size},
                "given": agreement(cells, fixed.cells, zoom) | {"size": size * zoom},
            }
    return found


def rescaled(root: Path, smears: pd.DataFrame, zoom: float, folder: Path) -> Path:
    """Write the scaled pictures of a data set into a new folder, which is returned."""
    target = folder / f"{zoom:g}"
    jobs = (joblib.delayed(rescale)(root / image, target / image, zoom) for image in smears["image"])
    joblib.Parallel(n_jobs=-1)(jobs)
    return target


def rescale(source: Path, target: Path, zoom: float) -> None:
    picture = read_image(source)
    if zoom != 1:
        method = cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC
        picture = cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=method)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(target, "PNG", compress_level=1)  # under any name: the content decides


def agreement(cells: pd.DataFrame, found: pd.DataFrame, zoom: float) -> dict[str, float]:
    """How well the found boxes agree with the annotated ones."""
    found_rows = found.groupby("smear").indices
    covered, alone, exact, overlaps = [], [], [], []
    for smear, rows in cells.groupby("smear").indices.items():
        there = cells.iloc[rows][list(BOX)].to_numpy() * zoom
        here = found.iloc[found_rows.get(smear, [])][list(BOX)].to_numpy().astype(float)
        for box in there:
            centre, side = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).max()
            around = here[((here[:, :2] <= centre) & (here[:, 2:] > centre)).all(axis=1)]
            covered.append(len(around) > 0)
            alone.append(len(around) == 1)
            off = np.abs((around[:, :2] + around[:, 2:]) / 2 - centre).max(axis=1)
            spill = np.maximum(box[:2] - around[:, :2], around[:, 2:] - box[2:]).max(axis=1)
            exact.append(len(around) == 1 and bool(off[0] < NEAR * side and spill[0] < SPILL * side))
            if len(around):
                overlaps.append(iou(box[None], around).max())
    return {
        "middle_in_a_box": float(np.mean(covered)),
        "middle_in_one_box": float(np.mean(alone)),
        "one_box_near_the_middle": float(np.mean(exact)),
        "median_iou": float(np.median(overlaps)),
    }


if __name__ == "__main__":
    main()
