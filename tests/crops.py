"""Data sets in which each cell is a picture of its own, cut out of smears."""

import csv
from pathlib import Path

from PIL import Image

from aplsmear.data.dataset import DataSet, read_data_set
from aplsmear.images.reading import read_image

HEADER = ["id", "imgName", "patient", "diagnosis", "site", "cellType", "specialCharacteristics"]
LABELS = {"healthy": "{'healthy'}", "aml": "{'aml', 'm2'}", "apl": "{'aml', 'm3'}"}


def cut_out(smears: Path, folder: Path) -> DataSet:
    """Write each cell of a data set of smears as a picture (PNG) of exactly its box.

    Returns:
        The data set of smears.
    """
    found = read_data_set(smears, {}, min_box=8, skip_bad_images=False)
    (folder / "cells").mkdir(parents=True)
    images = found.smears.set_index("smear")["image"]
    rows = []
    for smear, cells in found.cells.groupby("smear"):
        rgb = read_image(smears / images[smear])
        for cell in cells.itertuples():
            picture = rgb[cell.y0 : cell.y1, cell.x0 : cell.x1]
            Image.fromarray(picture).save(folder / "cells" / f"{cell.cell}.png")
            types, special = (
                "{" + ", ".join(f"'{one}'" for one in text.split("|")) + "}" if text else ""
                for text in (cell.cell_type, cell.special_characteristics)
            )
            diagnosis = LABELS[cell.diagnosis]
            rows.append([cell.cell, f"{cell.cell}.png", cell.patient, diagnosis, "Ulm", types, special])
    write_rows(folder, rows)
    return found


def write_rows(folder: Path, rows: list[list[str]], header: list[str] = HEADER) -> None:
    """Write the table of cells."""
    with (folder / "labeled_cells.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def read_rows(folder: Path) -> list[list[str]]:
    """The rows of the table of cells, without its header."""
    with (folder / "labeled_cells.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]
