"""Read a data set in the Kaggle layout, and report all of its problems at once.

A folder with ``wsi.csv``, ``labeled_cells.csv`` and ``wsi/<imgName>`` (see `aplsmear.data.schema`) becomes
two clean tables, and a report of what they contain and what was left out. Images are not copied.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pandera.pandas as pa

from aplsmear.compute.engine import HERE, Engine
from aplsmear.data import boxes, labels, schema
from aplsmear.data.copies import Fingerprint, same_pictures
from aplsmear.data.csvfile import read_csv
from aplsmear.data.names import image_path, name_problems, read_distinct
from aplsmear.data.notes import Notes, listed, sorted_ids
from aplsmear.data.pictures import BOX_COLUMNS, on_disk, with_boxes, with_images, without_copies
from aplsmear.data.problems import DataSetError, Problem, print_problems, render_problems
from aplsmear.data.pseudonyms import Pseudonyms
from aplsmear.data.schema import CELLS_FILE, IMAGE_FOLDER, LABELS_OF_CELLS, SMEARS_FILE
from aplsmear.data.tasks import ANY, task_items, task_labels
from aplsmear.params import Task
from aplsmear.tables import SEPARATOR
from aplsmear.words import misspelt

__all__ = [
    "CELL_COLUMNS",
    "SMEAR_COLUMNS",
    "DataSet",
    "DataSetError",
    "Problem",
    "print_problems",
    "read_data_set",
    "render_problems",
]

SMEAR_COLUMNS = ("smear", "image", "patient", "site", "diagnosis", "fab", "labels", "width", "height")
CELL_LABELS = tuple(column for column, _ in LABELS_OF_CELLS.values())
CELL_COLUMNS = ("cell", "smear", "patient", "diagnosis", "fab", *CELL_LABELS, *BOX_COLUMNS)

_Hide = Callable[[str, str], str]  # kind of name, name -> pseudonym
_KINDS = {  # file -> column -> kind of the names in it
    SMEARS_FILE: {"id": "smear", "imgName": "image", "patient": "patient"},
    CELLS_FILE: {"id": "cell", "wsi": "smear"},
}
_PATH = "correct the path of the folder"
_UNLABELLED = labels.SmearLabels((), (), "", ())
_SOURCE = {column: (CELLS_FILE, title) for title, (column, _) in LABELS_OF_CELLS.items()}
_SOURCE |= {"diagnosis": (SMEARS_FILE, "label"), "fab": (SMEARS_FILE, "label")}


@dataclass(frozen=True)
class DataSet:
    """A checked data set.

    Attributes:
        smears: one row for each smear, columns `SMEAR_COLUMNS`; width and height in px.
        cells: one row for each cell, columns `CELL_COLUMNS`; boxes in px, end exclusive, inside the smear.
        report: counts, what was left out and why, remarks; ready for JSON.
        fingerprints: of the picture of each smear, in the order of `smears`; empty if they were not decoded.
    """

    smears: pd.DataFrame
    cells: pd.DataFrame
    report: dict[str, Any]
    fingerprints: list[Fingerprint]


def read_data_set(
    root: Path,
    tasks: Mapping[str, Task],
    *,
    min_box: int,
    skip_bad_images: bool,
    engine: Engine = HERE,
    check_images: bool = True,
    labelled: bool = True,
    pseudonyms: Pseudonyms | None = None,
) -> DataSet:
    """Read and check a whole data set in the Kaggle layout.

    Args:
        root: the folder that contains ``wsi.csv``.
        tasks: each must have positive and negative items.
        min_box: px; a cell is left out and counted if a side of its box, inside the image, is shorter.
        skip_bad_images: leave out and list smears with a missing or damaged image. False: it is a problem.
        engine: decodes the images; does not change the result.
        check_images: decode every image completely. False: read only its size.
        labelled: False for new patients: label columns are ignored, and all diagnoses are ''.
        pseudonyms: replace the names of patients, smears, cells and pictures, in the result and in problems.

    Returns:
        Tables and report, the same for any order of the rows.

    Raises:
        DataSetError: with all problems.
    """
    notes = Notes()
    hide = pseudonyms.of if pseudonyms else _unhidden
    raw_smears, raw_cells = _raw_tables(root, labelled, hide, notes)
    smears = _smears(raw_smears, labelled, hide, notes)
    cells = _cells(raw_cells, raw_smears, labelled, notes)
    if labelled:
        _check_spelling(cells, tasks, notes)
        if not notes.problems:  # else a class can seem empty because its rows have problems
            _check_tasks(smears, _with_patients(cells, smears), tasks, notes)
    smears = with_images(smears, cells, root, engine, check_images, skip_bad_images, labelled, notes)
    smears = without_copies(smears, _has_patients(raw_smears), notes)
    cells = with_boxes(cells, smears, min_box, notes)
    if labelled:
        undiagnosed = smears["diagnosis"] == ""
        notes.left_out["smears_without_diagnosis"] = listed(smears["smear"][undiagnosed])
        smears = smears[~undiagnosed]
    known = cells["smear"].isin(set(smears["smear"]))
    notes.left_out["cells_of_left_out_smears"] = listed(cells["cell"][~known])
    cells = _with_patients(cells[known], smears)
    if labelled and not notes.problems:  # again: a class can be empty after smears and cells are left out
        _check_tasks(smears, cells, tasks, notes)
    if smears.empty and not notes.problems:
        notes.problems.append(Problem(SMEARS_FILE, expected="at least one usable smear", fix="add smears"))
    if notes.problems:
        raise DataSetError(notes.problems)
    report = _report(smears, cells, tasks, notes)
    ordered = _in_order(smears, SMEAR_COLUMNS)
    prints = [one for one in smears.set_index("smear")["fingerprint"][ordered["smear"]] if one is not None]
    return DataSet(ordered, _in_order(cells, CELL_COLUMNS), report, prints)


def pictures_in_both(data_set: DataSet, other: DataSet) -> list[Problem]:
    """A problem for each smear whose picture is in another data set, too, for instance in the training set.

    Both must have been read with `check_images`. Names of patients are not compared: two hospitals can use
    the same numbers.
    """
    found = {}
    for mine, theirs in same_pictures(data_set.fingerprints, other.fingerprints):
        smear, copy = data_set.smears.iloc[mine], other.smears.iloc[theirs]
        expected = f"a picture that is not in the other data set; there, {copy['image']} shows the same"
        fix = "take it, and all of its patient, out of one of the two data sets"
        found[mine] = Problem(SMEARS_FILE, None, "imgName", smear["image"], expected=expected, fix=fix)
    return list(found.values())


def names_of(root: Path) -> list[tuple[str, str]]:
    """Kind and name of everything that gets a pseudonym in a data set, without repetition, sorted.

    Raises:
        DataSetError: the tables cannot be read.
    """
    notes = Notes()
    found: set[tuple[str, str]] = set()
    for declared in (schema.SMEARS, schema.CELLS):
        name = str(declared.name)
        table = _read(root, declared, False, _unhidden, notes) if (root / name).exists() else None
        if table is None:
            continue
        for column, kind in _KINDS[name].items():
            names = table[column].map(image_path) if column == "imgName" else table.get(column, ())
            found |= {(kind, each) for each in names if each}
    if not found:
        notes.problems.append(Problem(SMEARS_FILE, expected="a table of smears", fix=_PATH))
        raise DataSetError(notes.problems)
    return sorted(found)


# --- tables ---------------------------------------------------------------------------------------


def _raw_tables(
    root: Path, labelled: bool, hide: _Hide, notes: Notes
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """The tables of smears and of cells, as text; no table of cells where there is no such file.

    Raises:
        DataSetError: there is no folder, or its table of smears cannot be read.
    """
    smears = cells = None
    if root.is_dir():
        notes.distinct = read_distinct(root, hide, notes.problems)
        smears = _read(root, schema.SMEARS, labelled, hide, notes)
        if (root / CELLS_FILE).exists():
            cells = _read(root, schema.CELLS, labelled, hide, notes)
        else:
            notes.remarks.append(f"no {CELLS_FILE}: only smears take part")
    else:
        notes.problems.append(Problem(str(root), expected=f"a folder with {SMEARS_FILE}", fix=_PATH))
    if smears is None:
        raise DataSetError(notes.problems)
    return smears, cells


def _read(
    root: Path, declared: pa.DataFrameSchema, labelled: bool, hide: _Hide, notes: Notes
) -> pd.DataFrame | None:
    """The known columns of a CSV file; fields that break a rule are noted and stay in the table.

    Names get their pseudonyms, except those of pictures, which are still needed.
    """
    file = str(declared.name)
    kinds = _KINDS[file]
    wanted = declared if labelled else schema.without_labels(declared)
    required = {name: column.required for name, column in wanted.columns.items()}
    table = read_csv(root / file, required, notes.problems, notes.remarks)
    if table is None:
        return None
    for column in schema.IDS.intersection(table.columns):
        names, kept, shown = (
            _mapped(table[column], labels.tidy),
            set(),
            hide if column in kinds else _unhidden,
        )
        if column in ("patient", "site"):
            notes.problems += name_problems(file, column, names, shown, notes.distinct)
            kept = {name for name in names.unique() if notes.distinct.has(column, shown(column, name))}
        table[column] = names.where(names.isin(kept), _mapped(names, _id))
    for problem in schema.problems_of(table, wanted):
        kind = kinds.get(problem.column)
        value = hide(kind, problem.value) if kind else problem.value
        notes.problems.append(replace(problem, value=value))
    if "imgName" in table:
        table["imgName"] = on_disk(root, table["imgName"], notes)
    for column, kind in kinds.items():
        if column in table and column != "imgName":
            table[column] = _mapped(table[column], partial(hide, kind))
    return table


def _unhidden(kind: str, name: str) -> str:  # noqa: ARG001 (the arguments of `Pseudonyms.of`)
    return name


def _mapped(column: pd.Series, function: Any) -> pd.Series:
    """`function` of each text, called once for each distinct text."""
    return column.map({text: function(text) for text in column.unique()})


def _id(text: str) -> str:
    """An id, tidied; 17.0 becomes 17, because pandas and spreadsheets turn 17 into 17.0."""
    return re.sub(r"(?a)^(\d+)[.,]0+$", r"\1", labels.tidy(text))


def _smears(raw: pd.DataFrame, labelled: bool, hide: _Hide, notes: Notes) -> pd.DataFrame:
    """`SMEAR_COLUMNS` without the sizes, and `file`, the path of the image below the folder of the data set.

    Rows without a usable id or image name are dropped; their problems are noted already.
    """
    cleaned = list(_mapped(raw["label"], _smear_labels)) if labelled else [_UNLABELLED] * len(raw)
    dropped = Counter(label for one in cleaned for label in one.dropped)
    notes.changed["labels_dropped"] = dict(sorted(dropped.items()))
    files = raw["imgName"].map(image_path)
    smears = pd.DataFrame(
        {
            "smear": raw["id"],
            "image": _mapped(files, partial(hide, "image")),
            "file": files,
            "site": raw.get("site", ""),
            "diagnosis": [one.diagnosis for one in cleaned],
            "fab": [SEPARATOR.join(one.fab) for one in cleaned],
            "labels": [SEPARATOR.join(one.labels) for one in cleaned],
        },
        index=raw.index,
        dtype=object,
    )
    smears["patient"] = _patients(raw, smears["diagnosis"], notes)
    smears = smears[(raw["imgName"] != "") & ~raw["imgName"].map(schema.leaves_folder).astype(bool)]
    repeated = smears["image"][smears["image"].duplicated(keep=False)].str.removeprefix(f"{IMAGE_FOLDER}/")
    expected, fix = "a picture that no other row names", "correct the name, or delete one of the rows"
    notes.add(SMEARS_FILE, "imgName", repeated, expected, fix)
    return smears[(smears["smear"] != "") & ~raw["id"].duplicated()[smears.index]]


def _smear_labels(text: str) -> labels.SmearLabels:
    """The corrected labels; none if they cannot be read, which is a noted problem."""
    try:
        return labels.clean_smear_labels(labels.parse_labels(text))
    except labels.LabelError:
        return _UNLABELLED


def _has_patients(raw: pd.DataFrame) -> bool:
    return "patient" in raw and bool((raw["patient"] != "").any())


def _patients(raw: pd.DataFrame, diagnosis: pd.Series, notes: Notes) -> pd.Series:
    if not _has_patients(raw):
        notes.remarks.append("no patient column: each smear counts as a patient")
        return raw["id"]
    given = raw["patient"]
    fix = "enter it, or delete the column: then each smear counts as a patient"
    notes.add(SMEARS_FILE, "patient", given[given == ""], "the patient of every smear, or of none", fix)
    known = (diagnosis != "") & (given != "")
    for _, found in diagnosis[known].groupby(given[known]):
        first = found.sort_index().drop_duplicates()
        if len(first) > 1:
            where = ", ".join(f"{one} in row {row}" for row, one in first.items())
            expected = f"one diagnosis for each patient, not {where}"
            notes.add(
                SMEARS_FILE, "patient", given[found.index], expected, "correct the label or the patient"
            )
    return given


def _cells(raw: pd.DataFrame | None, raw_smears: pd.DataFrame, labelled: bool, notes: Notes) -> pd.DataFrame:
    """cell, smear, bbox (text) and labels; rows without a usable id, smear or box are dropped and noted."""
    if raw is None:
        raw = pd.DataFrame(columns=["id", "wsi", "bbox"], dtype=object)
    known = raw["wsi"].isin(set(raw_smears["id"]))
    expected, fix = f"the id of a smear in {SMEARS_FILE}", "correct it, add the smear, or delete the row"
    notes.add(CELLS_FILE, "wsi", raw["wsi"][~known & (raw["wsi"] != "")], expected, fix)
    cells = pd.DataFrame({"cell": raw["id"], "smear": raw["wsi"], "bbox": raw["bbox"]}, dtype=object)
    for column, (name, _) in LABELS_OF_CELLS.items():
        cells[name] = _mapped(raw[column], _cell_labels) if labelled and column in raw else ""
    numbers = _mapped(raw["bbox"], lambda text: boxes.numbers_of(text) if text else ())
    cells["numbers"], readable = numbers, numbers.notna()
    return cells[known & readable & (raw["id"] != "") & ~raw["id"].duplicated()]


def _cell_labels(text: str) -> str:
    """The joined labels; none if they cannot be read, which is a noted problem."""
    try:
        return SEPARATOR.join(labels.parse_labels(text))
    except labels.LabelError:
        return ""


def _check_spelling(cells: pd.DataFrame, tasks: Mapping[str, Task], notes: Notes) -> None:
    """Note labels of cells that are probably misspelt as problems, and count other unknown labels."""
    conditions = [condition for task in tasks.values() for condition in (task.positive, task.negative)]
    for column, (name, vocabulary) in LABELS_OF_CELLS.items():
        known = {label for condition in conditions for label in condition.get(name, [])} - {ANY}
        known |= set(vocabulary)
        counts = _label_counts(cells[name])
        meant = {label: misspelt(label, known, labels.LIKE) for label in counts if label not in known}
        strange = {label: counts[label] for label, other in meant.items() if other is None}
        if strange:
            notes.unknown_labels[name] = strange
        wrong = {label: other for label, other in meant.items() if other is not None}
        if not wrong:
            continue
        fields_of = cells[name].str.split(SEPARATOR, regex=False).explode()
        found = fields_of[fields_of.isin(wrong)]
        for label, fields in found.groupby(found):
            expected = f"a known label (did you mean {wrong[label]!r}?)"
            notes.add(CELLS_FILE, column, fields, expected, "correct the spelling")


# --- tasks, order, report -------------------------------------------------------------------------


def _with_patients(cells: pd.DataFrame, smears: pd.DataFrame) -> pd.DataFrame:
    """The cells with patient, diagnosis and FAB classes of their smears; '' for cells of dropped smears."""
    of_smear = smears[["smear", "patient", "diagnosis", "fab"]]
    return cells.merge(of_smear, on="smear", how="left").fillna("")


def _check_tasks(smears: pd.DataFrame, cells: pd.DataFrame, tasks: Mapping[str, Task], notes: Notes) -> None:
    """Note each task without a positive or without a negative item, and the labels that it needs."""
    for name, task in tasks.items():
        items = task_items(cells if task.images == "cell" else smears, task.level)
        found = task_labels(items, task)
        item = "patient with cells" if task.level == "patient" else task.level
        for side, value, condition in (("positive", 1, task.positive), ("negative", 0, task.negative)):
            if (found == value).any():
                continue
            for column, wanted in condition.items():
                file, title = _SOURCE[column]
                present = _label_counts(items[column])
                near = {misspelt(label, present, labels.LIKE) for label in wanted} - {None, *wanted}
                hint = f" (did you mean {', '.join(map(repr, sorted(map(str, near))))}?)" if near else ""
                expected = f"at least one {side} {item} for the task {name}{hint}"
                fix = f"label some, or remove {name} from tasks and ensembles.*.members in params.yaml"
                missing = "any label" if ANY in wanted else ", ".join(wanted)
                notes.problems.append(Problem(file, None, title, missing, expected=expected, fix=fix))


def _label_counts(column: pd.Series) -> dict[str, int]:
    """Number of items with each label, sorted by label."""
    counts: Counter[str] = Counter()
    for text, count in column.value_counts().items():
        for label in filter(None, str(text).split(SEPARATOR)):
            counts[label] += int(count)
    return dict(sorted(counts.items()))


def _in_order(table: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    """These columns, rows sorted by smear, then by cell."""
    keys = [column for column in ("smear", "cell") if column in columns]

    def rank(ids: pd.Series) -> pd.Series:
        return ids.map({one: number for number, one in enumerate(sorted_ids(ids.unique()))})

    return table[list(columns)].sort_values(keys, key=rank, ignore_index=True, kind="stable")


def _report(
    smears: pd.DataFrame, cells: pd.DataFrame, tasks: Mapping[str, Task], notes: Notes
) -> dict[str, Any]:
    tables = {"smears": smears, "patients": smears.drop_duplicates("patient"), "cells": cells}
    found = {
        name: task_labels(task_items(cells if task.images == "cell" else smears, task.level), task)
        for name, task in tasks.items()
    }
    sides = {"positive": 1, "negative": 0, "no_part": -1}
    return {name: len(table) for name, table in tables.items()} | {
        "cells_with_type": int((cells["cell_type"] != "").sum()),
        "by_diagnosis": {
            diagnosis: {name: int((table["diagnosis"] == diagnosis).sum()) for name, table in tables.items()}
            for diagnosis in filter(None, smears["diagnosis"].unique())
        },
        "labels": {column: _label_counts(cells[column]) for column in CELL_LABELS},
        "fab": _label_counts(smears["fab"]),
        "tasks": {
            name: {side: int((label == value).sum()) for side, value in sides.items()}
            for name, label in found.items()
        },
        "left_out": notes.left_out,
        "changed": notes.changed,
        "unknown_labels": notes.unknown_labels,
        "remarks": sorted(notes.remarks),
    }
