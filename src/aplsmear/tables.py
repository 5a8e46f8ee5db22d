"""Reads and writes the tables of the pipeline.

Labels are text: several labels of one item are joined by ``|``; the empty string is no label. The data set
has a label ``None``, so no text is read as a missing value.

A text that a spreadsheet would run as a formula is written with a ``'`` in front, which `read_table` removes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from aplsmear.files import whole

BOX = ("y0", "x0", "y1", "x1")  # in px, end exclusive
INTEGERS = (*BOX, "width", "height", "fold", "label", "view", "trial")
FLOATS = ("probability", "low", "high")

SEPARATOR = "|"  # joins several labels of one item
_FLOAT = "%.6g"
_SIGNS = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"  # the last four are wide = + - @
_FORMULA = re.compile(f"'*[{re.escape(_SIGNS)}]")
_ROWS = 8192  # read at once: the parser needs several times the memory of the rows


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file of `write_table`: text columns as str, `INTEGERS` as int64, `FLOATS` as float64."""
    parts = pd.read_csv(path, dtype=str, keep_default_na=False, chunksize=_ROWS)
    return pd.concat(map(_typed, parts), ignore_index=True)


def guarded(text: str) -> str:
    """A text with a ``'`` in front if a spreadsheet would take it for a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def unguarded(text: str) -> str:
    """The text before `guarded`."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV: UTF-8, ``\\n`` line ends, floats with six significant digits, no formula."""
    texts = table.select_dtypes(exclude="number")
    safe = table.assign(**{str(column): _mapped(texts[column], guarded) for column in texts})
    with whole(path) as part:
        safe.to_csv(part, index=False, lineterminator="\n", float_format=_FLOAT)


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    kinds = dict.fromkeys(INTEGERS, np.int64) | dict.fromkeys(FLOATS, np.float64)
    for name in table.columns:
        column = table[name]
        table[name] = column.astype(kinds[name]) if name in kinds else _mapped(column, unguarded)
    return table


def _mapped(column: pd.Series, change: Callable[[str], str]) -> pd.Series:
    """A column with each text replaced by `change` (`guarded` or `unguarded`) of it."""
    if isinstance(column.dtype, pd.StringDtype) and not column.str.startswith(("'", *_SIGNS)).any():
        return column
    changed = {text: change(text) for text in column.unique() if isinstance(text, str)}
    return column.map(lambda each: changed.get(each, each))


def as_written(value: float) -> float:
    """A number as it is read back from a table of `write_table`."""
    return float(_FLOAT % value)
