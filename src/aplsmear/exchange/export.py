"""Writes the boxes and types of a data set, and scores, for other programs.

`aplsmear.exchange.readers` reads what is written here. Beside box and class, an export holds the columns
`ATTRIBUTES` of labeled_cells.csv where the form has room for them (not YOLO).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_OID, uuid5

import yaml

from aplsmear.data.boxes import numbers_of
from aplsmear.data.csvfile import read_all
from aplsmear.data.labels import LabelError, parse_labels
from aplsmear.data.names import image_path
from aplsmear.data.schema import CELLS_FILE, IMAGE_FOLDER, SMEARS_FILE, leaves_folder
from aplsmear.exchange.found import CELL_LABELS, ExchangeError, exported_class, size_of
from aplsmear.files import refuse_taken, write_json
from aplsmear.tables import SEPARATOR
from aplsmear.words import named

_IDS = ("cell", "item", "id")  # columns of scores that can hold the id of a cell


@dataclass(frozen=True)
class Shown:
    """One cell."""

    box: tuple[float, float, float, float]  # y0, x0, y1, x1 in px
    label: str  # its class
    attributes: dict[str, str]  # the columns `ATTRIBUTES`, labels joined by `|`
    score: float | None
    measurements: Mapping[str, float] = field(default_factory=dict)  # by name, for QuPath
    color: list[int] | None = None  # red, green, blue of the box in QuPath; None: that of its class


@dataclass
class Shot:
    """One picture: its path below the folder ``wsi``, the file, its size in px, its cells."""

    name: str
    path: Path
    height: int
    width: int
    cells: list[Shown] = field(default_factory=list)


def scores_of(path: Path, column: str) -> dict[str, float]:
    """The id of a cell -> its score, from a table of `aplsmear predict` or of the stage tune.

    Raises:
        ExchangeError: the table lacks the column, or a score is no number.
        DataSetError: it cannot be read.
    """
    table = read_all(path)
    name = next((one for one in _IDS if one in table), None)
    if name is None or column not in table:
        raise ExchangeError(f"{path} needs the columns {_IDS[0]} (or {_IDS[1]}) and {column}.")
    try:
        scores = {cell: float(text) for cell, text in zip(table[name], table[column], strict=True) if text}
    except ValueError as error:
        raise ExchangeError(f"{path}, column {column}: {error}.") from error
    if wrong := [cell for cell, score in scores.items() if not math.isfinite(score)]:
        raise ExchangeError(f"{path}, column {column}: no number for {named(wrong)}.")
    return scores


def shots_of(folder: Path, scores: Mapping[str, float], column: str) -> list[Shot]:
    """The pictures and cells of a data set; cells without a box are left out.

    `scores` are by the id of a cell; their name for QuPath is `column`.

    Raises:
        ExchangeError: a table lacks a column, or holds something that is no box or no set of labels.
        DataSetError: a table cannot be read.
    """
    tables = []
    for name, needed in ((SMEARS_FILE, ["id", "imgName"]), (CELLS_FILE, ["id", "wsi", "bbox"])):
        tables.append(read_all(folder / name))
        if missing := [title for title in needed if title not in tables[-1]]:
            raise ExchangeError(f"{folder / name} has no column {missing[0]}: there are no boxes to export.")
    smears, cells = tables
    shots = {}
    for smear, name in zip(smears["id"], smears["imgName"], strict=True):
        path = folder / image_path(name)
        if leaves_folder(name):
            raise ExchangeError(f"{name} is outside the folder of pictures: see `aplsmear check {folder}`.")
        shots[smear] = Shot(name.replace("\\", "/"), path, *size_of(path, name))
    cells = cells.reindex(columns=["id", "wsi", "bbox", *CELL_LABELS], fill_value="")
    for row in cells.to_dict("records"):
        if not row["bbox"]:
            continue
        box = numbers_of(row["bbox"])
        try:
            kinds = {column: SEPARATOR.join(parse_labels(row[column])) for column in CELL_LABELS}
        except LabelError:
            box = None
        if box is None or row["wsi"] not in shots:
            raise ExchangeError(f"{folder / CELLS_FILE}, cell {row['id']}: see `aplsmear check {folder}`.")
        score = scores.get(row["id"])
        measured = {} if score is None else {column: score}
        shown = Shown(box, exported_class(kinds), {"id": row["id"]} | kinds, score, measured)
        shots[row["wsi"]].cells.append(shown)
    return list(shots.values())


def geojson(shots: list[Shot], to: Path) -> None:
    """Write a file for each picture into a folder, for QuPath: drop it on the open picture."""
    for shot in shots:
        features = [_feature(shot, cell) for cell in shot.cells]
        write_json(to / f"{shot.name}.geojson", {"type": "FeatureCollection", "features": features})


def _feature(shot: Shot, cell: Shown) -> dict[str, Any]:
    y0, x0, y1, x1 = cell.box
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    properties: dict[str, Any] = {"objectType": "annotation", "metadata": cell.attributes}
    properties["classification"] = {"name": cell.label, "color": [200, 0, 0]}
    if cell.color:
        properties["color"] = cell.color
    if cell.measurements:
        properties["measurements"] = dict(cell.measurements)
    return {
        "type": "Feature",
        "id": _name_of(shot, cell),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties,
    }


def _name_of(shot: Shot, cell: Shown) -> str:
    """The same UUID for the same cell of the same picture."""
    return str(uuid5(NAMESPACE_OID, f"{shot.name}/{cell.attributes['id']}"))


def coco(shots: list[Shot], to: Path) -> None:
    """Write a JSON file for all pictures, for CVAT, FiftyOne and others."""
    labels = _labels(shots)
    images = [
        {"id": number, "file_name": shot.name, "width": shot.width, "height": shot.height}
        for number, shot in enumerate(shots, start=1)
    ]
    annotations: list[dict[str, Any]] = []
    for image, shot in zip(images, shots, strict=True):
        for cell in shot.cells:
            y0, x0, y1, x1 = cell.box
            annotation = {
                "id": len(annotations) + 1, "image_id": image["id"], "attributes": cell.attributes,
                "category_id": labels.index(cell.label) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0), "iscrowd": 0,
            }  # fmt: skip
            annotations.append(annotation | ({} if cell.score is None else {"score": cell.score}))
    categories = [{"id": number, "name": label} for number, label in enumerate(labels, start=1)]
    write_json(to, {"images": images, "annotations": annotations, "categories": categories})


def label_studio(shots: list[Shot], to: Path) -> None:
    """Write a JSON file for all pictures, which Label Studio shows from its local storage."""
    write_json(to, [task_of(shot) for shot in shots], digits=12)


def task_of(shot: Shot) -> dict[str, Any]:
    """A task of Label Studio; cells with a score are predictions, too."""
    results, predicted = [], []
    for cell in shot.cells:
        y0, x0, y1, x1 = cell.box
        value = {
            "x": 100 * x0 / shot.width, "y": 100 * y0 / shot.height, "width": 100 * (x1 - x0) / shot.width,
            "height": 100 * (y1 - y0) / shot.height, "rotation": 0, "rectanglelabels": [cell.label],
        }  # fmt: skip
        result = {
            "id": _name_of(shot, cell), "type": "rectanglelabels", "from_name": "label", "to_name": "image",
            "original_width": shot.width, "original_height": shot.height, "image_rotation": 0,
            "value": value, "meta": cell.attributes,
        }  # fmt: skip
        results.append(result)
        if cell.score is not None:
            predicted.append(result | {"score": cell.score})
    # Label Studio shows files below its document root only if they are in a folder of it that it was told.
    data = {"image": f"/data/local-files/?d={IMAGE_FOLDER}/{quote(shot.name)}"}
    predictions = {"predictions": [{"model_version": "aplsmear", "result": predicted}]} if predicted else {}
    return {"data": data, "annotations": [{"result": results}], **predictions}


def yolo(shots: list[Shot], to: Path) -> None:
    """Write a folder: links to pictures, a text file for each, data.yaml; a score is a sixth number."""
    labels = _labels(shots)
    for shot in shots:
        lines = []
        for cell in shot.cells:
            y0, x0, y1, x1 = cell.box
            numbers = [(x0 + x1) / 2 / shot.width, (y0 + y1) / 2 / shot.height]
            numbers += [(x1 - x0) / shot.width, (y1 - y0) / shot.height]
            numbers += [] if cell.score is None else [cell.score]
            lines.append(" ".join([str(labels.index(cell.label)), *(f"{number:.10g}" for number in numbers)]))
        image, text = to / "images" / shot.name, to / "labels" / PurePosixPath(shot.name).with_suffix(".txt")
        for path in (image, text):
            path.parent.mkdir(parents=True, exist_ok=True)
        if text.exists():
            raise ExchangeError(f"{shot.name}: two pictures differ only in their ending.")
        image.symlink_to(os.path.relpath(shot.path.resolve(), image.parent.resolve()))
        text.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    names = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(labels))}
    text_of_names = yaml.safe_dump(names, sort_keys=False, allow_unicode=True)
    (to / "data.yaml").write_text(text_of_names, encoding="utf-8")


def _labels(shots: list[Shot]) -> list[str]:
    return sorted({cell.label for shot in shots for cell in shot.cells})


WRITERS: dict[str, Callable[[list[Shot], Path], None]] = {
    "geojson": geojson, "coco": coco, "label-studio": label_studio, "yolo": yolo,
}  # fmt: skip


def export(
    folder: Path, kind: str, to: Path, scores: Mapping[str, float] | None = None, column: str = "probability"
) -> list[Shot]:
    """Write the boxes of a data set, the `folder`; returns the pictures and cells that were written.

    The `kind` is a key of `WRITERS`. `to` becomes a file for coco and label-studio, a folder for geojson and
    yolo. `scores` are by the id of a cell; `column` says what they are.

    Raises:
        ExchangeError: the data set has no boxes, or no cell has one of the scores.
        UserError: something is at `to`.
        DataSetError: a table cannot be read.
    """
    refuse_taken(to)
    shots = shots_of(folder, scores or {}, column)
    if scores and all(cell.score is None for shot in shots for cell in shot.cells):
        raise ExchangeError(f"No cell of {folder} has a score: the scores have the ids of other cells.")
    WRITERS[kind](shots, to)
    return shots
