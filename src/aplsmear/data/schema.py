"""The tables of a data set in the Kaggle layout: columns and rules, declared once and checked with pandera.

The description of each column, and the error (what is expected) and description (what to do) of each check,
are written for the person who keeps the spreadsheet.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import pandas as pd
import pandera.pandas as pa
from pandera.errors import SchemaError, SchemaErrors

from aplsmear.data import boxes, labels
from aplsmear.data.problems import Problem, problems_in
from aplsmear.params import Level

SMEARS_FILE, CELLS_FILE, IMAGE_FOLDER, CELL_FOLDER = "wsi.csv", "labeled_cells.csv", "wsi", "cells"


class Shown(NamedTuple):
    """What a picture shows: a smear, or a single cell; and where the data set names it."""

    item: Level
    file: str  # the table
    folder: str  # of the pictures
    diagnosis: str  # the column with the diagnosis


SMEAR = Shown("smear", SMEARS_FILE, IMAGE_FOLDER, "label")
SINGLE_CELL = Shown("cell", CELLS_FILE, CELL_FOLDER, "diagnosis")


@dataclass
class Facts:
    """What is known of a picture: patient, diagnosis (a set literal), site, id of the smear; '' if not."""

    patient: str = ""
    diagnosis: str = ""
    site: str = ""
    name: str = ""


LABELS_OF_CELLS = {  # column of the CSV -> column of dataset/cells.csv, known labels
    "cellType": ("cell_type", labels.CELL_TYPES),
    "specialCharacteristics": ("special_characteristics", labels.CHARACTERISTICS),
    "objectType": ("object_type", labels.OBJECT_TYPES),
    "segmentationQuality": ("quality", labels.QUALITIES),
}
LABEL_COLUMNS = (SMEAR.diagnosis, SINGLE_CELL.diagnosis, *LABELS_OF_CELLS)
MEASURES = (  # of a cell, in px of its smear (meanIntensity: 0 to 1); Kaggle's columns, not read here
    "convexArea", "eccentricity", "equivalentDiameter", "perimeter", "meanIntensity", "eulerNumber", "extent",
)  # fmt: skip
KAGGLE_CELL_COLUMNS = (
    "id", "segmentationSetId", "wsi", "cellType", "segmentationQuality", "specialCharacteristics",
    "objectType", "bbox", *MEASURES,
)  # fmt: skip
IDS = frozenset({"id", "wsi", "patient", "site"})


def leaves_folder(name: str) -> bool:
    """Whether a file name is absolute (on any operating system) or leads out of its folder by ``..``."""
    windows = PureWindowsPath(name)
    return bool(windows.drive or windows.root or ".." in windows.parts or PurePosixPath(name).is_absolute())


def _each(test: Callable[[str], bool]) -> Callable[[pd.Series], pd.Series]:
    """A test of a column from a test of one text, which is called once for each distinct text."""
    return lambda column: column.map({text: test(text) for text in column.unique()}).astype(bool)


def _expected_labels(text: str, clean: bool = False) -> str:
    """What is expected instead of this text; '' if its labels can be read (`clean`: as labels of a smear)."""
    try:
        parsed = labels.parse_labels(text)
        if clean:
            labels.clean_smear_labels(parsed)
    except labels.LabelError as error:
        return str(error)
    return ""


_FILLED = pa.Check(
    lambda column: column != "", name="filled", error="a value", description="enter it, or delete the row"
)
_PRINTABLE = pa.Check(
    _each(str.isprintable),
    name="printable",
    error="printable characters",
    description="delete the text and type it again: it contains an invisible character",
)
_SHOWABLE = pa.Check(
    _each(lambda name: not any(unicodedata.category(one).startswith("C") for one in name)),
    name="showable",
    error="a file name without control characters",
    description="rename the file: its name contains an invisible control character",
)
_INSIDE = {
    folder: pa.Check(
        _each(lambda name: not leaves_folder(name)),
        name="inside",
        error=f"a file name inside the folder {folder}",
        description=f"move the picture into the folder {folder} and enter only its name",
    )
    for folder in (IMAGE_FOLDER, CELL_FOLDER)
}
_SMEAR_LABELS = pa.Check(
    _each(lambda text: not _expected_labels(text, clean=True)),
    name="smear labels",
    error="healthy, or aml with a FAB class",
    description="correct the label; examples: {'healthy'}, {'aml', 'm2'}, and {'aml', 'm3'} for APL",
)
_CELL_LABELS = pa.Check(
    _each(lambda text: not _expected_labels(text)),
    name="cell labels",
    error="a set of labels",
    description="correct it (examples: {'Promyelocyte'}, {'Auer rods', 'Faggot cell'}), or leave it empty",
)
_BOX = pa.Check(
    _each(boxes.is_whole),
    name="box",
    error="[y0, x0, y1, x1], four whole numbers in px",
    description="correct the box (round fractions), or leave it empty: then the cell is left out",
)
_UNIQUE_FIX = "give each row an id of its own, or delete the repeated row"


def _column(
    description: str, example: str, *checks: pa.Check, required: bool = False, unique: bool = False
) -> pa.Column:
    details: dict[str, Any] = {"description": description, "metadata": {"example": example}}
    return pa.Column(checks=list(checks), required=required, unique=unique, **details)


SMEARS = pa.DataFrameSchema(
    {
        "id": _column("name or number of the smear", "17", _FILLED, _PRINTABLE, required=True, unique=True),
        "imgName": _column(
            f"file of the smear in the folder `{IMAGE_FOLDER}`: PNG, JPEG or TIFF",
            "17.png",
            _FILLED, _INSIDE[IMAGE_FOLDER], _SHOWABLE,
            required=True,
        ),
        "label": _column(
            "`healthy`, or `aml` with its FAB class (`m0` ... `m7`, `not_classified`); `m3` is APL. A smear "
            "without a label is left out and counted",
            "{'aml', 'm3'}",
            _SMEAR_LABELS,
            required=True,
        ),
        "patient": _column(
            "the same for all smears of one patient. A patient is never in training and test at once. "
            "Without this column each smear counts as a patient",
            "P012",
            _PRINTABLE,
        ),
        "site": _column("hospital or cohort; `split.by: site` holds out whole sites", "Dresden", _PRINTABLE),
    },
    name=SMEARS_FILE,
    description="one row for each smear",
)  # fmt: skip

_LABELS = {
    "cellType": _column("type of the cell, if known", "{'Promyelocyte'}", _CELL_LABELS),
    "specialCharacteristics": _column(
        "special features of the cell. `None` is a label: examined, nothing special found. Empty: not "
        "examined",
        "{'Auer rods', 'Faggot cell'}",
        _CELL_LABELS,
    ),
    "objectType": _column("kind of object", "{'Cell'}", _CELL_LABELS),
    "segmentationQuality": _column("quality of the box", "{'Good'}", _CELL_LABELS),
}
CELLS = pa.DataFrameSchema(
    {
        "id": _column("name or number of the cell", "4711", _FILLED, _PRINTABLE, required=True, unique=True),
        "wsi": _column(f"`id` of its smear in {SMEARS_FILE}", "17", _FILLED, required=True),
        "bbox": _column(
            "the cell's box in px, from the upper left of the smear, end exclusive: y0, x0, y1, x1. A cell "
            "without a box is left out and counted",
            "[342, 1319, 475, 1440]",
            _BOX,
            required=True,
        ),
        **_LABELS,
    },
    name=CELLS_FILE,
    description="one row for each cell. Without this file, only whole smears are used",
)  # fmt: skip

SINGLE_CELLS = pa.DataFrameSchema(
    {
        "id": CELLS.columns["id"],
        "imgName": _column(
            f"file of the cell's picture in the folder `{CELL_FOLDER}`: PNG, JPEG or TIFF; subfolders are "
            "allowed",
            "PMO/PMO_0001.tiff",
            _INSIDE[CELL_FOLDER], _SHOWABLE,
            required=True,
        ),
        "patient": _column(
            f"the same for all cells and smears of one patient, also in {SMEARS_FILE}. Without this column "
            "each picture counts as a patient: the cells of a patient can then be in training and test at "
            "once, and results look too good",
            "P012",
            _PRINTABLE,
        ),
        "diagnosis": _column(
            f"of the patient, written as `label` in {SMEARS_FILE}. A cell without one is left out and "
            "counted, unless no cell and no smear has one: then only tasks on labels of cells can run",
            "{'aml', 'm3'}",
            _SMEAR_LABELS,
        ),
        "site": SMEARS.columns["site"],
        **_LABELS,
    },
    name=CELLS_FILE,
    description="a cell with a picture of its own",
)  # fmt: skip


PLACE = ("wsi", "bbox")  # of a cell in a smear
OF_SINGLES = [name for name in SINGLE_CELLS.columns if name not in CELLS.columns]


def without_labels(schema: pa.DataFrameSchema) -> pa.DataFrameSchema:
    """The same schema for new patients: without label columns."""
    return schema.remove_columns([column for column in LABEL_COLUMNS if column in schema.columns])


def problems_of(table: pd.DataFrame, schema: pa.DataFrameSchema) -> list[Problem]:
    """All fields of `table` (only text, the index is the row number) that break a rule of `schema`.

    Missing columns are no problem here; `aplsmear.data.csvfile` reports them.

    Returns:
        Problems, ordered by row, then by column.
    """
    present = schema.remove_columns([column for column in schema.columns if column not in table])
    try:
        present.validate(table, lazy=True)
    except SchemaErrors as errors:
        found = [each for error in errors.schema_errors for each in _problems_of(error, str(schema.name))]
        return sorted(found, key=lambda each: (each.row or 0, table.columns.get_loc(each.column)))
    return []


def problems_of_cells(
    table: pd.DataFrame, in_smears: pa.DataFrameSchema, single: pa.DataFrameSchema
) -> list[Problem]:
    """As `problems_of`, for a table in which some cells have pictures of their own (column `imgName`).

    The others follow the rules of `in_smears`. `PLACE` is added to the table if it is not there.
    """
    for column in PLACE:
        if column not in table:
            table[column] = ""
    pictured, placed = table["imgName"] != "", (table[list(PLACE)] != "").any(axis=1)
    found = problems_of(table[pictured], single) + problems_of(table[~pictured & placed], in_smears)
    expected, fix = "a picture (imgName), or a smear and a box (wsi, bbox)", "enter it, or delete the row"
    found += problems_in(CELLS_FILE, "imgName", table["imgName"][~pictured & ~placed], expected, fix)
    of_singles = [column for column in OF_SINGLES if column in table and column != "imgName"]
    for columns, rows, what in (
        (PLACE, pictured, "a picture of its own"),
        (of_singles, ~pictured, "a smear"),
    ):
        for column in columns:
            values = table[column][rows]
            expected = f"an empty field, because this cell has {what}"
            found += problems_in(CELLS_FILE, column, values[values != ""], expected, "empty the field")
    twice = table["id"][table["id"].duplicated() & (table["id"] != "")]
    twice = twice[~twice.index.isin([one.row for one in found if one.column == "id"])]
    found += problems_in(CELLS_FILE, "id", twice, "an id that no other row has", _UNIQUE_FIX)
    return sorted(found, key=lambda each: (each.row or 0, table.columns.get_loc(each.column)))


def _problems_of(error: SchemaError, file: str) -> Iterator[Problem]:
    column, check = str(error.schema.name), error.check
    cases: pd.DataFrame = error.failure_cases
    for row, value in zip(cases["index"].astype(int), cases["failure_case"].astype(str), strict=True):
        if isinstance(check, pa.Check):
            expected, fix = str(check.error), str(check.description)
            if check.name in (_SMEAR_LABELS.name, _CELL_LABELS.name):
                expected = _expected_labels(value, clean=check.name == _SMEAR_LABELS.name)
            yield Problem(file, row, column, value, expected=expected, fix=fix)
        elif value:  # the rule of unique ids; an empty id is reported as not filled
            yield Problem(file, row, column, value, expected="an id that no other row has", fix=_UNIQUE_FIX)
