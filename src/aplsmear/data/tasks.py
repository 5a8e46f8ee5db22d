"""Tasks: which items are positive, which negative, and which take no part."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from aplsmear.params import LEVELS, Condition, Task, TaskLevel
from aplsmear.tables import SEPARATOR

ANY = "*"


def task_items(images: pd.DataFrame, level: TaskLevel) -> pd.DataFrame:
    """The items of a task of this level: cells or smears with the column ``item`` (their names).

    Patients are made from the table of cells: ``item, patient, diagnosis`` of each patient with cells.
    """
    if level != "patient":
        return images.assign(item=images[level])
    patients = images[["patient", "diagnosis"]].drop_duplicates("patient")
    return patients.assign(item=patients["patient"]).sort_values("patient", ignore_index=True)


def levels_of(tasks: Mapping[str, Task]) -> pd.DataFrame:
    """``level``: the levels of the images that tasks ask for. Of others no views are made."""
    used = {task.images for task in tasks.values()}
    return pd.DataFrame({"level": [level for level in LEVELS if level in used]})


def patient_rows(smears: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """``patient, site, diagnosis`` of each smear, and of each cell that has no smear."""
    columns = ["patient", "site", "diagnosis"]
    alone = cells[cells["smear"] == ""]
    return pd.concat([smears[columns], alone[columns]]) if len(alone) else smears[columns]


def meets(items: pd.DataFrame, condition: Condition) -> np.ndarray:
    """Which items have one of the wanted labels in every column of `condition` (``*``: any): bool (items,).

    Labels in `items` are joined by ``|``.
    """
    met = np.ones(len(items), dtype=bool)
    for column, wanted in condition.items():
        for text, rows in items.groupby(column, sort=False).indices.items():
            labels = set(filter(None, str(text).split(SEPARATOR)))
            met[rows] &= bool((labels and ANY in wanted) or labels.intersection(wanted))
    return met


def task_labels(items: pd.DataFrame, task: Task) -> np.ndarray:
    """1 for positive items, 0 for negative ones, -1 for items that take no part in the task: int8 (items,).

    `items` are those of `task_items`. An item that meets both conditions is positive.
    """
    positive = meets(items, task.positive)
    negative = meets(items, task.negative) & ~positive
    return np.where(positive, 1, np.where(negative, 0, -1)).astype(np.int8)
