"""Reading and writing the tables of the pipeline, always the same way.

Labels are text: several of one item are joined by ``|``, none is the empty string. The label ``None`` of the
data set is a label, so nothing is ever read as missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from aplsmear.files import whole

INTEGERS = ("y0", "x0", "y1", "x1", "width", "height", "fold", "label", "view", "trial")
FLOATS = ("probability", "low", "high")

_FLOAT = "%.6g"


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file written by `write_table`: text columns as str, `INTEGERS` as int64, `FLOATS` as float64."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column in table.columns:
        if column in INTEGERS:
            table[column] = table[column].astype(np.int64)
        elif column in FLOATS:
            table[column] = table[column].astype(np.float64)
    return table


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV: UTF-8, ``\\n`` line ends, floats with six significant digits."""
    with whole(path) as part:
        table.to_csv(part, index=False, lineterminator="\n", float_format=_FLOAT)


def as_written(value: float) -> float:
    """A number after a trip through a table of `write_table`."""
    return float(_FLOAT % value)


def read_scores(path: Path) -> pd.DataFrame:
    """A table of scores as the stage `tune` leaves it (parquet, every bit of a score kept)."""
    return pd.read_parquet(path)
