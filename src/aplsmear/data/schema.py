"""What a data set in the Kaggle layout holds: declared once, checked with pandera, described for people.

Every column's description and example, and every check's expectation and mend, is written for the person who
keeps the spreadsheet.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

import pandas as pd
import pandera.pandas as pa
from pandera.errors import SchemaError, SchemaErrors

from aplsmear.data import labels

SMEARS_FILE, CELLS_FILE, IMAGE_FOLDER = "wsi.csv", "labeled_cells.csv", "wsi"

_NUMBER = r"(-?\d{1,9})(?:\.0*)?"
BOX = re.compile(rf"\s*[\[(]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*[\])]\s*")

LABELS_OF_CELLS = {  # column of the CSV -> column of dataset/cells.csv, known labels
    "cellType": ("cell_type", labels.CELL_TYPES),
    "specialCharacteristics": ("special_characteristics", labels.CHARACTERISTICS),
    "objectType": ("object_type", labels.OBJECT_TYPES),
    "segmentationQuality": ("quality", labels.QUALITIES),
}
LABEL_COLUMNS = ("label", *LABELS_OF_CELLS)
IDS = frozenset({"id", "wsi", "patient", "site"})


@dataclass(frozen=True)
class Fault:
    """A field of a table that breaks a rule; `row` is its index, `expected` and `mend` are for people."""

    row: int
    column: str
    value: str
    expected: str
    mend: str


def is_box(text: str) -> bool:
    """Whether the text is a box, ``[y0, x0, y1, x1]``, or nothing."""
    return not text or BOX.fullmatch(text) is not None


def leaves_folder(name: str) -> bool:
    """Whether a file name is absolute (on any system) or climbs out of its folder."""
    windows = PureWindowsPath(name)
    return bool(windows.drive or windows.root or ".." in windows.parts or PurePosixPath(name).is_absolute())


def _each(test: Callable[[str], bool]) -> Callable[[pd.Series], pd.Series]:
    """A test of one text as a test of a column that looks at each distinct text once."""
    return lambda column: column.map({text: test(text) for text in column.unique()}).astype(bool)


def _parses(text: str, clean: bool = False) -> bool:
    return not _why_no_labels(text, clean)


def _why_no_labels(text: str, clean: bool) -> str:
    try:
        parsed = labels.parse_labels(text)
        if clean:
            labels.clean_smear_labels(parsed)
    except labels.LabelError as error:
        return str(error)
    return ""


_FILLED = pa.Check(
    lambda column: column != "", name="filled", error="a value", description="fill it in, or remove the row"
)
_PRINTABLE = pa.Check(
    _each(str.isprintable),
    name="printable",
    error="printable characters",
    description="type it anew; it holds an invisible character",
)
_SHOWABLE = pa.Check(
    _each(lambda name: not any(unicodedata.category(one).startswith("C") for one in name)),
    name="showable",
    error="a file name without control characters",
    description="rename the file; its name holds a character that a terminal or a page would obey",
)
_INSIDE = pa.Check(
    _each(lambda name: not leaves_folder(name)),
    name="inside",
    error=f"a file name inside the folder {IMAGE_FOLDER}",
    description=f"put the picture into {IMAGE_FOLDER} and write its name alone",
)
_SMEAR_LABELS = pa.Check(
    _each(lambda text: _parses(text, clean=True)),
    name="smear labels",
    error="healthy, or aml with a FAB class",
    description="correct the label, such as {'healthy'}, {'aml', 'm2'} or {'aml', 'm3'} for APL",
)
_CELL_LABELS = pa.Check(
    _each(_parses),
    name="cell labels",
    error="a set of labels",
    description="write such as {'Promyelocyte'} or {'Auer rods', 'Faggot cell'}, or leave it empty",
)
_BOX = pa.Check(
    _each(is_box),
    name="box",
    error="[y0, x0, y1, x1], four whole numbers in px",
    description="correct the box, or leave it empty: the cell is then left out",
)
_UNIQUE_MEND = "give each row an id of its own, or remove the repetition"


def _column(
    description: str, example: str, *checks: pa.Check, required: bool = False, unique: bool = False
) -> pa.Column:
    return pa.Column(
        checks=list(checks),
        required=required,
        unique=unique,
        description=description,
        metadata={"example": example},
    )


SMEARS = pa.DataFrameSchema(
    {
        "id": _column("name or number of the smear", "17", _FILLED, _PRINTABLE, required=True, unique=True),
        "imgName": _column(
            f"file of the smear in the folder `{IMAGE_FOLDER}`: PNG, JPEG or TIFF",
            "17.png",
            _FILLED, _INSIDE, _SHOWABLE,
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
            "the same for all smears of one patient, who is never in training and test at once; without this "
            "column every smear counts as a patient",
            "P012",
            _PRINTABLE,
        ),
        "site": _column("hospital or cohort; `split.by: site` holds out whole ones", "Dresden", _PRINTABLE),
    },
    name=SMEARS_FILE,
    description="one row a smear",
)  # fmt: skip

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
        "cellType": _column("type of the cell, if known", "{'Promyelocyte'}", _CELL_LABELS),
        "specialCharacteristics": _column(
            "what else is seen in it; `None` is a label: one looked and saw nothing. Empty: nobody looked",
            "{'Auer rods', 'Faggot cell'}",
            _CELL_LABELS,
        ),
        "objectType": _column("what kind of thing it is", "{'Cell'}", _CELL_LABELS),
        "segmentationQuality": _column("how well the box fits", "{'Good'}", _CELL_LABELS),
    },
    name=CELLS_FILE,
    description="one row a cell; the whole file may be absent, then only smears take part",
)  # fmt: skip


def without_labels(schema: pa.DataFrameSchema) -> pa.DataFrameSchema:
    """The same schema for new patients: no label column is asked for or looked at."""
    return schema.remove_columns([column for column in LABEL_COLUMNS if column in schema.columns])


def faults(table: pd.DataFrame, schema: pa.DataFrameSchema) -> list[Fault]:
    """Everything in `table` (all text) that breaks `schema`, missing columns excepted.

    Returns:
        Faults, ordered by row, then by column.
    """
    present = schema.remove_columns([column for column in schema.columns if column not in table])
    try:
        present.validate(table, lazy=True)
    except SchemaErrors as errors:
        found = [fault for error in errors.schema_errors for fault in _faults_of(error)]
        return sorted(found, key=lambda fault: (fault.row, table.columns.get_loc(fault.column)))
    return []


def _faults_of(error: SchemaError) -> Iterator[Fault]:
    column = str(error.schema.name)
    cases: pd.DataFrame = error.failure_cases
    for row, raw in zip(cases["index"], cases["failure_case"], strict=True):
        value = str(raw)
        check = error.check
        if not isinstance(check, pa.Check):
            if value:  # an empty id is reported as not filled
                yield Fault(int(row), column, value, "an id that no other row has", _UNIQUE_MEND)
        elif check.name in (_SMEAR_LABELS.name, _CELL_LABELS.name):
            expected = _why_no_labels(value, clean=check.name == _SMEAR_LABELS.name)
            yield Fault(int(row), column, value, expected, str(check.description))
        else:
            yield Fault(int(row), column, value, str(check.error), str(check.description))


def describe() -> str:
    """The layout as Markdown: one table of columns a file, for a README."""
    parts = []
    for schema in (SMEARS, CELLS):
        lines = [
            f"`{schema.name}`: {schema.description}.",
            "",
            "| column | needed | what it holds | example |",
            "|---|---|---|---|",
        ]
        for name, column in schema.columns.items():
            needed = "yes" if column.required else "no"
            lines.append(f"| `{name}` | {needed} | {column.description} | `{column.metadata['example']}` |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
