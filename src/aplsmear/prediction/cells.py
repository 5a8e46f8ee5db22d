"""The cells that decide, as boxes for QuPath."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from aplsmear.data.dataset import DataSet
from aplsmear.data.schema import IMAGE_FOLDER
from aplsmear.ensembles.evidence import EVIDENCE, PLACE
from aplsmear.errors import UserError
from aplsmear.exchange.export import Shot, Shown, geojson
from aplsmear.exchange.found import NO_TYPE

_FOR, _AGAINST = [168, 50, 107], [43, 111, 148]  # the colours of the pages, as QuPath reads them


def check_boxes(found: DataSet) -> None:
    """Check that there are boxes for QuPath; UserError: all cells have a picture each."""
    if found.smears.empty:
        raise UserError(
            "These cells have a picture each, so there are no boxes in smears for --geojson. Use --cells: "
            "its table names the picture of each cell."
        )


def write_boxes(folder: Path, found: DataSet, table: pd.DataFrame) -> None:
    """Write a GeoJSON file for each smear, ``PICTURE.geojson``, into a folder, for QuPath.

    Scores, attention and evidence (`aplsmear.ensembles.evidence.evidence_table`) are measurements. The colour
    of a box says to which side the evidence of the first ensemble points.
    """
    numbers = list(table.columns[len(PLACE) :])
    evidence = next((column for column in numbers if column.startswith(EVIDENCE)), None)
    shots = []
    of_smear = {smear: rows.to_dict("records") for smear, rows in table.groupby("smear")}
    smears = found.smears[["smear", "image", "height", "width"]]
    for smear, image, height, width in smears.itertuples(index=False, name=None):
        cells = of_smear.get(smear, [])
        shown = [
            Shown(
                box=(row["y0"], row["x0"], row["y1"], row["x1"]),
                label=NO_TYPE,
                attributes={"id": row["cell"]},
                score=None,
                measurements={name: row[name] for name in numbers if row[name] == row[name]},
                color=(_FOR if row[evidence] > 0 else _AGAINST) if evidence else None,
            )
            for row in cells
        ]
        shots.append(Shot(image.removeprefix(f"{IMAGE_FOLDER}/"), folder / image, height, width, shown))
    geojson(shots, folder)
