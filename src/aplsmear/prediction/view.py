"""One page of one patient: the smears with a box around each cell, and the cells sorted by their evidence.

The page opens offline: the pictures, the numbers and the script are in the file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from aplsmear.ensembles.evidence import ATTENTION, EVIDENCE, PLACE, SCORE
from aplsmear.errors import UserError
from aplsmear.images.reading import read_image
from aplsmear.images.views import cut
from aplsmear.progress import progress
from aplsmear.reports import pages
from aplsmear.tables import BOX, read_table
from aplsmear.words import nearest

_NUMBERS = (EVIDENCE, SCORE, ATTENTION)
_BUDGET = 30_000_000  # bytes of all pictures; in base64 they take a third more
_FIELD_SIDES = (1600, 1280, 1024, 800, 640, 480, 320)  # px of the longer side of a smear, the first that fits
_FIELD_BYTES = 400_000  # of a smear, if there are few
_CELL_SIDES = ((2500, 96), (5000, 64), (12_000, 48))  # up to so many cells: px of a cell
_LEAST_SIDE = 32
_QUALITY = 78  # of JPEG


def read_cells(path: Path) -> pd.DataFrame:
    """The table of cells that `predict --cells` or an ensemble's stage writes; else UserError."""
    table = pd.read_parquet(path) if path.suffix == ".parquet" else read_table(path)
    missing = [name for name in PLACE if name not in table]
    if missing or not _starting(table, EVIDENCE):
        raise UserError(
            f"{path} has no column {(missing or [f'{EVIDENCE}ENSEMBLE'])[0]}: `aplsmear predict --cells` "
            "writes such a table."
        )
    return table.assign(**{name: pd.to_numeric(table[name]) for name in _starting(table, *_NUMBERS)})


def _starting(table: pd.DataFrame, *starts: str) -> list[str]:
    """The columns with these starts of their names."""
    return [name for name in map(str, table) if name.startswith(starts)]


def cells_of(table: pd.DataFrame, patient: str) -> pd.DataFrame:
    """The rows of one patient; UserError if there are none."""
    mine = table[table["patient"] == patient]
    if mine.empty:
        known = table["patient"].unique().tolist()
        raise UserError(
            f"there is no patient {patient}{nearest(patient, known)}. The table of cells has {len(known)} "
            f"patients, such as {', '.join(known[:3])}."
        )
    return mine.reset_index(drop=True)


def view_page(cells: pd.DataFrame, root: Path, ensemble: str, positive: str) -> str:
    """The page of a patient, with the cells of `cells_of` and pictures below the folder `root`.

    The evidence of `ensemble`, for its diagnosis `positive`, colours the boxes. Raises UserError if the
    table has none of this ensemble, ImageError if a picture cannot be read.
    """
    if (evidence := EVIDENCE + ensemble) not in cells:
        there = [name.removeprefix(EVIDENCE) for name in _starting(cells, EVIDENCE)]
        raise UserError(f"there is no evidence of the ensemble {ensemble}, but of {', '.join(there)}.")
    columns = [evidence, *(name for name in _starting(cells, *_NUMBERS) if name != evidence)]
    data: dict[str, Any] = {
        "columns": [f"evidence {ensemble}", *(each.replace("_", " ", 1) for each in columns[1:])]
    }
    data |= _pictures(cells, columns, root)
    script = resources.files("aplsmear.prediction").joinpath("view.js").read_text(encoding="utf-8")
    return pages.render(
        "prediction/view.html.j2",
        patient=cells["patient"].iloc[0],
        ensemble=ensemble,
        positive=pages.diagnosis(positive),
        cells=len(cells),
        fields=len(data["fields"]),
        total=float(cells[evidence].sum()),
        data=json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _pictures(cells: pd.DataFrame, columns: list[str], root: Path) -> dict[str, Any]:
    """Smears and cells with their pictures; cells that no member reads are left out."""
    cells = cells[cells[columns[0]].notna()]
    side = next((side for most, side in _CELL_SIDES if len(cells) <= most), _LEAST_SIDE)
    of_cells = len(cells) * side * side // 2  # bytes; a JPEG has fewer
    images = cells.groupby("image", sort=False)
    smears = max(1, cells["smear"].replace("", np.nan).nunique())
    each_bytes = min(_FIELD_BYTES, max(_BUDGET - of_cells, 0) // smears)
    fields: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for name, mine in progress(iter(images), "pictures", images.ngroups):
        image = read_image(root / str(name))
        in_smear = bool(mine["smear"].iloc[0])
        for row, values in zip(mine.to_dict("records"), _values(mine[columns]), strict=True):
            box = tuple(int(row[end]) for end in BOX)
            y0, x0, y1, x1 = box
            picture = cut(image, (y0, x0, y1, x1), max(y1 - y0, x1 - x0), side)
            shown.append({
                "name": row["cell"], "field": len(fields) if in_smear else -1, "box": box, "values": values,
                "src": pages.data_uri(_jpeg(picture)),
            })  # fmt: skip
        if in_smear:
            height, width = image.shape[:2]
            fields.append({
                "name": str(name).removeprefix("wsi/"), "width": width, "height": height,
                "evidence": float(mine[columns[0]].sum()),
                "src": pages.data_uri(_reduced(image, each_bytes)),
            })  # fmt: skip
    return {"fields": fields, "cells": shown}


def _values(numbers: pd.DataFrame) -> Iterator[list[float | None]]:
    """The numbers of each row; NaN becomes None."""
    for row in numbers.to_numpy(np.float64):
        yield [None if np.isnan(each) else float(f"{each:.4g}") for each in row]


def _reduced(image: np.ndarray, most: int) -> bytes:
    """A smear as JPEG of at most so many bytes, if the smallest side allows it."""
    encoded = b""
    for side in _FIELD_SIDES:
        factor = min(1.0, side / max(image.shape[:2]))
        size = [max(1, round(factor * each)) for each in image.shape[1::-1]]
        encoded = _jpeg(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
        if len(encoded) <= most:
            break
    return encoded


def _jpeg(image: np.ndarray) -> bytes:
    """Colours at half the resolution: half the bytes of a view for the networks."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_QUALITY, optimize=True)
    return file.getvalue()
