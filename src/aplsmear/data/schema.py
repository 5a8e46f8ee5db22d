"""The tables of a data set in the Kaggle layout: columns and rules, declared once and checked with pandera.

The columns are in columns.csv beside this file. Their descriptions, and the error (what is expected) and the
description (what to do) of each check, are written for the person who keeps the spreadsheet.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

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


def _expected_labels(text: str, clean: bool = False) -> str:
    """What is expected instead of this text; '' if its labels can be read (`clean`: as labels of a smear)."""
    try:
        parsed = labels.parse_labels(text)
        if clean:
            labels.clean_smear_labels(parsed)
    except labels.LabelError as error:
        return str(error)
    return ""


def _rule(name: str, test: Callable[[str], bool], expected: str, fix: str) -> pa.Check:
    """A rule for one text; a column is tested once for each distinct text."""

    def tested(column: pd.Series) -> pd.Series:
        return column.map({text: test(text) for text in column.unique()}).astype(bool)

    return pa.Check(tested, name=name, error=expected, description=fix)


_SMEAR_LABELS, _CELL_LABELS = "smear labels", "cell labels"
_RULES = {
    str(rule.name): rule
    for rule in (
        _rule("filled", bool, "a value", "enter it, or delete the row"),
        _rule(
            "printable",
            str.isprintable,
            "printable characters",
            "delete the text and type it again: it contains an invisible character",
        ),
        _rule(
            "showable",
            lambda name: not any(unicodedata.category(one).startswith("C") for one in name),
            "a file name without control characters",
            "rename the file: its name contains an invisible control character",
        ),
        *(
            _rule(
                f"inside {folder}",
                lambda name: not leaves_folder(name),
                f"a file name inside the folder {folder}",
                f"move the picture into the folder {folder} and enter only its name",
            )
            for folder in (IMAGE_FOLDER, CELL_FOLDER)
        ),
        _rule(
            _SMEAR_LABELS,
            lambda text: not _expected_labels(text, clean=True),
            "healthy, or aml with a FAB class",
            "correct the label; examples: {'healthy'}, {'aml', 'm2'}, and {'aml', 'm3'} for APL",
        ),
        _rule(
            _CELL_LABELS,
            lambda text: not _expected_labels(text),
            "a set of labels",
            "correct it (examples: {'Promyelocyte'}, {'Auer rods', 'Faggot cell'}), or leave it empty",
        ),
        _rule(
            "box",
            boxes.is_whole,
            "[y0, x0, y1, x1], four whole numbers in px",
            "correct the box (round fractions), or leave it empty: then the cell is left out",
        ),
    )
}
_UNIQUE_FIX = "give each row an id of its own, or delete the repeated row"
_COLUMNS = pd.read_csv(Path(__file__).with_name("columns.csv"), dtype=str, keep_default_na=False)


def _schema(table: str, file: str, description: str) -> pa.DataFrameSchema:
    """The columns of a table, as columns.csv beside this file describes them."""
    columns = {
        row["column"]: pa.Column(
            checks=[_RULES[name] for name in row["rules"].split("; ")],
            required=row["required"] == "yes",
            unique=row["unique"] == "yes",
            description=row["description"],
            metadata={"example": row["example"]},
        )
        for row in _COLUMNS.to_dict("records")
        if table in row["tables"].split("; ")
    }
    return pa.DataFrameSchema(columns, name=file, description=description)


SMEARS = _schema("smears", SMEARS_FILE, "one row for each smear")
CELLS = _schema("cells", CELLS_FILE, "one row for each cell. Without this file, only whole smears are used")
SINGLE_CELLS = _schema("single cells", CELLS_FILE, "a cell with a picture of its own")

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
            if check.name in (_SMEAR_LABELS, _CELL_LABELS):
                expected = _expected_labels(value, clean=check.name == _SMEAR_LABELS)
            yield Problem(file, row, column, value, expected=expected, fix=fix)
        elif value:  # the rule of unique ids; an empty id is reported as not filled
            yield Problem(file, row, column, value, expected="an id that no other row has", fix=_UNIQUE_FIX)
