"""Single-cell pictures beside the same cells in smears: time and memory of the stages up to the features.

Usage: python benchmarks/crops.py [--cells 18000] [--repeats 1] [--work DIR]

Draws some cells, turns them and puts them under a random light until there are `--cells` different pictures
of 400x400 px. They are written twice: as pictures of single cells, and as fields of 4x6 cells with boxes
(JPEG of the same quality). Both go stage by stage through `dvc repro --single-item` in a clone of this
commit: one backbone, one augmented view. Each stage runs for the fields and for the pictures in turn,
`--repeats` times. The least CPU time counts, because a machine may do other work, too.
Results go to benchmarks/results/crops.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import yaml
from record import ROOT, commit, machine
from scale import BACKBONE, Form, prepare, read_csv, watched

from aplsmear.files import write_json
from aplsmear.images.reading import read_image
from aplsmear.sources.drawn import draw_data_set

RESULTS = ROOT / "benchmarks" / "results" / "crops.json"
SIDE, ROWS, COLUMNS = 400, 4, 6  # px of a cell's picture; cells of a field
PATIENTS, SEED = 60, 8
LABELS = ("{'healthy'}", "{'aml', 'm2'}", "{'aml', 'm3'}")
QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 92]
KINDS = ("fields", "crops")
STAGES = ("prepare", "download", "split", "augment", f"bottleneck@{BACKBONE}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=18_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, help="where data sets and clones stay; otherwise a folder that goes"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = (asked.work or Path(folder)).resolve()
        write_sets(work, asked.cells)
        found: dict[str, Any] = {"machine": machine(), "commit": commit(), "cells": asked.cells}
        found |= {"repeats": asked.repeats, "fields": {}, "crops": {}}
        for kind in KINDS:
            pipeline(work, kind)
        for stage in STAGES:
            for kind in KINDS * asked.repeats:
                took = asdict(
                    watched(["dvc", "repro", "--force", "--single-item", stage], work / f"pipeline-{kind}")
                )
                print(f"{stage}, {kind}: {json.dumps(took)}", file=sys.stderr, flush=True)
                least = min(took, found[kind].get(stage, took), key=lambda one: float(one["cpu_seconds"]))
                found[kind][stage] = least
    seconds = {kind: sum(stage["cpu_seconds"] for stage in found[kind].values()) for kind in KINDS}
    found["crops_over_fields"] = seconds["crops"] / seconds["fields"]
    whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    write_json(RESULTS, whole | {str(asked.cells): found})
    print(f"CPU seconds: {seconds}; crops over fields: {found['crops_over_fields']:.2f}")


def pipeline(work: Path, kind: str) -> None:
    """A clone that reads the cells of one kind; nothing has run in it."""
    folder = work / f"pipeline-{kind}"
    prepare(folder, work / "fields", Form(size=160))
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    params["dataset"]["root"] = str(work / kind)
    params["augment"]["margin"] = 0.0
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def write_sets(work: Path, count: int) -> None:
    """The same cells as crops and as fields; what is there already stays."""
    fields, crops = work / "fields", work / "crops"
    if (fields / "wsi.csv").is_file() and len(read_csv(crops / "labeled_cells.csv")) == count:
        return
    (fields / "wsi").mkdir(parents=True)
    (crops / "cells").mkdir(parents=True)
    smears, boxes, cells = [], [], []
    page = np.zeros((ROWS * SIDE, COLUMNS * SIDE, 3), np.uint8)
    for number, picture in enumerate(pictures(work / "drawn", count)):
        field, place = divmod(number, ROWS * COLUMNS)
        patient = field % PATIENTS
        if place == 0:
            smears.append([field, f"{field}.jpg", LABELS[patient % 3], f"P{patient:02d}"])
        cv2.imwrite(str(crops / "cells" / f"{number}.jpg"), picture, QUALITY)
        cells.append([number, f"{number}.jpg", f"P{patient:02d}", LABELS[patient % 3], "{'Myeloblast'}"])
        y0, x0 = SIDE * (place // COLUMNS), SIDE * (place % COLUMNS)
        page[y0 : y0 + SIDE, x0 : x0 + SIDE] = picture
        boxes.append([number, field, f"[{y0}, {x0}, {y0 + SIDE}, {x0 + SIDE}]", "{'Myeloblast'}"])
        if place == ROWS * COLUMNS - 1 or number == count - 1:
            cv2.imwrite(str(fields / "wsi" / f"{field}.jpg"), page, QUALITY)
    save(crops / "labeled_cells.csv", cells, "id imgName patient diagnosis cellType")
    save(fields / "labeled_cells.csv", boxes, "id wsi bbox cellType")
    save(fields / "wsi.csv", smears, "id imgName label patient")


def save(path: Path, rows: list[list[Any]], columns: str) -> None:
    pd.DataFrame(rows, columns=columns.split()).to_csv(path, index=False)


def pictures(drawn: Path, count: int) -> Iterator[np.ndarray]:
    """Different pictures of cells, BGR: drawn ones, turned and under a spotted light: none is a copy."""
    if not (drawn / "wsi.csv").is_file():
        draw_data_set(drawn, 12, SEED, size=(960, 1280), cells_per_smear=24, cell_size=240)
    smears = read_csv(drawn / "wsi.csv").set_index("id")["imgName"]
    found = []
    for smear, cells in read_csv(drawn / "labeled_cells.csv").groupby("wsi"):
        field = cv2.cvtColor(read_image(drawn / "wsi" / smears[smear]), cv2.COLOR_RGB2BGR)
        found += [(field, json.loads(box)) for box in cells["bbox"] if box]
    rng = np.random.default_rng(SEED)
    for number in range(count):
        field, (y0, x0, y1, x1) = found[number % len(found)]
        warp = cv2.getRotationMatrix2D(
            ((x0 + x1) / 2, (y0 + y1) / 2), rng.uniform(10, 80), rng.uniform(0.9, 1.3)
        )
        warp[:, 2] += SIDE / 2 - np.array([x0 + x1, y0 + y1]) / 2
        turned = cv2.warpAffine(field, warp, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT)
        light = cv2.GaussianBlur(rng.normal(0, 150, (64, 64)), (0, 0), 1.2)
        yield np.clip(turned + cv2.resize(light, (SIDE, SIDE))[:, :, None], 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
