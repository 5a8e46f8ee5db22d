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
from typing import Any, NamedTuple

import pandas as pd

from aplsmear.compute.engine import HERE, Engine
from aplsmear.data import boxes, labels, schema
from aplsmear.data.copies import same_pictures
from aplsmear.data.csvfile import is_there, read_csv
from aplsmear.data.names import declaration, image_path, look_alikes, name_problems, read_distinct
from aplsmear.data.notes import Notes, listed, sorted_ids
from aplsmear.data.pictures import as_cells, boxes_of, on_disk, with_boxes, with_images, without_copies
from aplsmear.data.problems import DataSetError, Problem, print_problems, render_problems
from aplsmear.data.pseudonyms import Pseudonyms
from aplsmear.data.schema import CELLS_FILE, LABELS_OF_CELLS, SINGLE_CELL, SMEAR, SMEARS_FILE, Shown
from aplsmear.data.tasks import ANY, patient_rows, task_items, task_labels
from aplsmear.params import Task
from aplsmear.tables import BOX, SEPARATOR
from aplsmear.words import misspelt

__all__ = [
    "CELL_COLUMNS", "SMEAR_COLUMNS", "DataSet", "DataSetError", "Problem", "print_problems", "read_data_set",
    "render_problems",
]  # fmt: skip

SMEAR_COLUMNS = ("smear", "image", "patient", "site", "diagnosis", "fab", "labels", "width", "height")
CELL_LABELS = tuple(column for column, _ in LABELS_OF_CELLS.values())
CELL_COLUMNS = ("cell", "smear", "patient", "diagnosis", "fab", *CELL_LABELS, *BOX)
SINGLE_COLUMNS = ("image", "site")  # of cells, only if some have pictures of their own

_Hide = Callable[[str, str], str]  # kind of name, name -> pseudonym
_KINDS = {  # file -> column -> kind of the names in it
    SMEARS_FILE: {"id": "smear", "imgName": "image", "patient": "patient"},
    CELLS_FILE: {"id": "cell", "wsi": "smear", "imgName": "image", "patient": "patient"},
}
_PATH = "correct the path of the folder"
_LEAK = ". A patient can then be in training and test at once, and results look too good"
_UNLABELLED = labels.SmearLabels((), (), "", ())
_SOURCE = {column: (CELLS_FILE, title) for title, (column, _) in LABELS_OF_CELLS.items()}
_SOURCE |= {"diagnosis": (SMEARS_FILE, "label"), "fab": (SMEARS_FILE, "label")}


@dataclass(frozen=True)
class DataSet:
    """A checked data set, with a row for each smear, cell and picture.

    Boxes are in px, end exclusive, inside the smear. If some cells have pictures of their own, `cells` also
    has `SINGLE_COLUMNS`: these cells stand last, sorted by patient, the smear is '', and the box is the whole
    picture.
    """

    smears: pd.DataFrame  # `SMEAR_COLUMNS`; width and height in px
    cells: pd.DataFrame  # `CELL_COLUMNS`
    report: dict[str, Any]  # counts, what was left out and why, remarks; ready for JSON
    pictures: pd.DataFrame  # `image`, `table` that names it, `fingerprint`; empty if they were not decoded

    @property
    def patients(self) -> pd.DataFrame:
        """``patient, site, diagnosis`` of each smear and of each cell without a smear."""
        return patient_rows(self.smears, self.cells)


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
    raw = _raw_tables(root, labelled, hide, notes)
    smears = _pictured(raw.smears, SMEAR, labelled, hide, notes)
    cells = _cells(raw.cells, raw.smears, labelled, notes)
    singles = _pictured(raw.singles, SINGLE_CELL, labelled, hide, notes)
    _check_across(raw, smears, singles, hide, notes)
    if labelled:
        _check_spelling(_joined(cells, singles), tasks, notes)
        if not notes.problems:  # else a class can seem empty because its rows have problems
            _check_tasks(smears, _joined(_with_patients(cells, smears), singles), tasks, notes)
    see = partial(with_images, root, engine, check_images, skip_bad_images, labelled, notes)
    smears = without_copies(see(smears, SMEAR, boxes_of(cells)), SMEAR, _has_patients(raw.smears), notes)
    cells = with_boxes(cells, smears, min_box, notes)
    if len(raw.singles):
        seen = without_copies(see(singles, SINGLE_CELL, {}), SINGLE_CELL, _has_patients(raw.singles), notes)
        singles = as_cells(seen, min_box, notes)
    smears, every = _usable(smears, cells, singles, labelled, notes)
    if labelled and not notes.problems:  # again: a class can be empty after smears and cells are left out
        _check_tasks(smears, every, tasks, notes)
    if smears.empty and every.empty and not notes.problems:
        lacking = SMEAR if raw.singles.empty else SINGLE_CELL
        expected, fix = f"at least one usable {lacking.item}", f"add {lacking.item}s"
        notes.problems.append(Problem(lacking.file, expected=expected, fix=fix))
    if notes.problems:
        raise DataSetError(notes.problems)
    return _data_set(smears, every, tasks, notes)


def _data_set(smears: pd.DataFrame, cells: pd.DataFrame, tasks: Mapping[str, Task], notes: Notes) -> DataSet:
    """The tables in order, with the report."""
    in_smears, singles = cells[cells["smear"] != ""], cells[cells["smear"] == ""]
    columns = [*CELL_COLUMNS, *(SINGLE_COLUMNS if len(singles) else ())]
    ordered = _in_order(smears, "smear")
    pictured = [
        ordered.assign(table=SMEARS_FILE),
        _in_order(singles, "patient", "cell").assign(table=CELLS_FILE),
    ]
    pictures = _joined(*pictured) if len(singles) else pictured[0]
    every = _joined(_in_order(in_smears, "smear", "cell"), pictured[1])[columns]
    return DataSet(
        ordered[list(SMEAR_COLUMNS)],
        every.fillna(dict.fromkeys(SINGLE_COLUMNS, "")).reset_index(drop=True),
        _report(smears, cells, tasks, notes),
        pictures[["image", "table", "fingerprint"]].dropna().reset_index(drop=True),
    )


def in_both(data_set: DataSet, other: DataSet) -> list[Problem]:
    """A problem for each patient and each picture that is in another data set, too, such as the training set.

    Both must have been read with `check_images`. Without a column `patient` there are no names to compare.
    """
    theirs = _named_patients(other)
    expected = "a patient who is not in the other data set; this name is in both"
    fix = (
        "one patient: take the patient out of one of the two; two patients: change a name, such as dresden-7"
    )
    found = [
        Problem(table, None, "patient", name, expected=expected, fix=fix)
        for name, table in _named_patients(data_set).items()
        if name in theirs
    ]
    prints = [list(each.pictures["fingerprint"]) for each in (data_set, other)]
    copies = dict(same_pictures(*prints))  # one copy of each picture is enough
    for mine, place in copies.items():
        picture, copy = data_set.pictures.iloc[mine], other.pictures.iloc[place]
        expected = f"a picture that is not in the other data set; there, {copy['image']} shows the same"
        fix = "take it, and all of its patient, out of one of the two data sets"
        found.append(Problem(picture["table"], None, "imgName", picture["image"], expected=expected, fix=fix))
    return found


def _named_patients(data_set: DataSet) -> dict[str, str]:
    """The patients by name, with the table that names them; not those who have the id of a smear or cell."""
    singles = data_set.cells[data_set.cells["smear"] == ""]
    found: dict[str, str] = {}
    for table, rows, item in ((CELLS_FILE, singles, "cell"), (SMEARS_FILE, data_set.smears, "smear")):
        found |= dict.fromkeys(rows["patient"][~rows["patient"].isin(set(rows[item]))], table)
    return dict(sorted(found.items()))


def names_of(root: Path) -> list[tuple[str, str]]:
    """Kind and name of everything that gets a pseudonym in a data set, without repetition, sorted.

    Raises:
        DataSetError: the tables cannot be read.
    """
    notes = Notes()
    found: set[tuple[str, str]] = set()
    for shown in (SMEAR, SINGLE_CELL):
        table = _read(root, shown, False, _unhidden, notes) if (root / shown.file).exists() else None
        if table is None:
            continue
        for column, kind in _KINDS[shown.file].items():
            names = table[column][table[column] != ""] if column in table else ()
            found |= {(kind, image_path(each, shown.folder) if kind == "image" else each) for each in names}
    if not found:
        notes.problems.append(Problem(SMEARS_FILE, expected="a table of smears", fix=_PATH))
        raise DataSetError(notes.problems)
    return sorted(found)


# --- tables ---------------------------------------------------------------------------------------


class _Raw(NamedTuple):
    """The tables as text; the index is the number of the row."""

    smears: pd.DataFrame
    cells: pd.DataFrame  # in smears
    singles: pd.DataFrame  # cells with pictures of their own


def _raw_tables(root: Path, labelled: bool, hide: _Hide, notes: Notes) -> _Raw:
    """The rows of the tables. Without a table of cells, or of smears if all cells have pictures: no rows.

    Raises:
        DataSetError: there is no folder, or a table that is needed cannot be read.
    """
    if not root.is_dir():
        raise DataSetError([Problem(str(root), expected=f"a folder with {SMEARS_FILE}", fix=_PATH)])
    notes.distinct = read_distinct(root, hide, notes.problems)
    smears: pd.DataFrame | None = None
    there = is_there(root / SMEARS_FILE, notes.problems)
    if there:
        smears = _read(root, SMEAR, labelled, hide, notes)
    cells = pd.DataFrame(columns=["id", "wsi", "bbox", "imgName"], dtype=object)
    if is_there(root / CELLS_FILE, notes.problems):
        read = _read(root, SINGLE_CELL, labelled, hide, notes)
        cells = cells if read is None else read.assign(imgName=read.get("imgName", ""))
    else:
        notes.remarks.append(f"no {CELLS_FILE}: only smears take part")
    single = cells["imgName"] != ""
    if not there:
        only_singles = len(cells) > 0 and single.all()
        empty = pd.DataFrame(columns=["id", "imgName", "label"], dtype=object)
        smears = empty if only_singles else _read(root, SMEAR, labelled, hide, notes)
    if smears is None:
        raise DataSetError(notes.problems)
    return _Raw(smears, cells[~single], cells[single])


def _read(root: Path, shown: Shown, labelled: bool, hide: _Hide, notes: Notes) -> pd.DataFrame | None:
    """The known columns of a CSV file; fields that break a rule are noted and stay in the table.

    Names get their pseudonyms, except those of pictures, which are still needed.
    """
    file, kinds = shown.file, _KINDS[shown.file]
    both = (schema.CELLS, schema.SINGLE_CELLS) if shown is SINGLE_CELL else (schema.SMEARS,)
    declared, *others = both if labelled else map(schema.without_labels, both)
    wanted: dict[str, bool | str] = {name: each.required for name, each in declared.columns.items()}
    for single in others:
        wanted |= dict.fromkeys(schema.PLACE, "imgName")
        wanted |= dict.fromkeys(single.columns.keys() - wanted, False)
    table = read_csv(root / file, wanted, notes.problems, notes.remarks)
    if table is None:
        return None
    if others and "imgName" not in table:
        table, others = table.drop(columns=schema.OF_SINGLES, errors="ignore"), []
    for column in schema.IDS.intersection(table.columns):
        names, kept = _mapped(table[column], labels.tidy), set()
        if column in ("patient", "site"):
            shows = hide if column in kinds else _unhidden
            notes.problems += name_problems(file, column, names, shows, notes.distinct)
            kept = {name for name in names.unique() if notes.distinct.has(column, shows(column, name))}
        table[column] = names.where(names.isin(kept), _mapped(names, _id))
    rules = schema.problems_of_cells if others else schema.problems_of  # with and without pictures of cells
    for problem in rules(table, declared, *others):
        kind = kinds.get(problem.column)
        value = hide(kind, problem.value) if kind else problem.value
        notes.problems.append(replace(problem, value=value))
    if "imgName" in table:
        table["imgName"] = on_disk(root, table["imgName"], shown, notes)
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


def _pictured(raw: pd.DataFrame, shown: Shown, labelled: bool, hide: _Hide, notes: Notes) -> pd.DataFrame:
    """Smears, or single cells: `SMEAR_COLUMNS`, or those of cells; without sizes and boxes.

    `file` is the path of the image below the folder of the data set. Rows without a usable id or image name
    are dropped; their problems are noted already.
    """
    given = labelled and shown.diagnosis in raw
    cleaned = list(_mapped(raw[shown.diagnosis], _smear_labels)) if given else [_UNLABELLED] * len(raw)
    files = raw["imgName"].map(partial(image_path, folder=shown.folder))
    items = pd.DataFrame(
        {
            shown.item: raw["id"],
            "image": _mapped(files, partial(hide, "image")),
            "file": files,
            "site": raw.get("site", ""),
            "diagnosis": [one.diagnosis for one in cleaned],
            "fab": [SEPARATOR.join(one.fab) for one in cleaned],
        },
        index=raw.index,
        dtype=object,
    )
    if shown is SMEAR:
        dropped = Counter(label for one in cleaned for label in one.dropped)
        notes.changed["labels_dropped"] = dict(sorted(dropped.items()))
        items["labels"] = [SEPARATOR.join(one.labels) for one in cleaned]
    else:
        items = items.assign(smear="", **_labels_of_cells(raw, labelled))
    items["patient"] = _patients(raw, items["diagnosis"], shown, notes) if len(raw) else raw["id"]
    items = items[(raw["imgName"] != "") & ~raw["imgName"].map(schema.leaves_folder).astype(bool)]
    repeated = items["image"][items["image"].duplicated(keep=False)].str.removeprefix(f"{shown.folder}/")
    expected, fix = "a picture that no other row names", "correct the name, or delete one of the rows"
    notes.add(shown.file, "imgName", repeated, expected, fix)
    return items[(items[shown.item] != "") & ~raw["id"].duplicated()[items.index]]


def _smear_labels(text: str) -> labels.SmearLabels:
    """The corrected labels; none if they cannot be read, which is a noted problem."""
    try:
        return labels.clean_smear_labels(labels.parse_labels(text))
    except labels.LabelError:
        return _UNLABELLED


def _has_patients(raw: pd.DataFrame) -> bool:
    return "patient" in raw and bool((raw["patient"] != "").any())


def _patients(raw: pd.DataFrame, diagnosis: pd.Series, shown: Shown, notes: Notes) -> pd.Series:
    alone = f"each {shown.item} counts as a patient"
    if not _has_patients(raw):
        others = ", ".join(map(repr, raw.attrs.get("unread", ())))
        unread = f". Columns that are not read: {others}" if others else ""
        notes.remarks.append(f"no patient column: {alone}{'' if shown is SMEAR else _LEAK}{unread}")
        return raw["id"]
    given = raw["patient"]
    expected = f"the patient of every {shown.item}, or of none"
    fix = f"enter it, or delete the column: then {alone}"
    notes.add(shown.file, "patient", given[given == ""], expected, fix)
    known = (diagnosis != "") & (given != "")
    for _, found in diagnosis[known].groupby(given[known]):
        first = found.sort_index().drop_duplicates()
        if len(first) > 1:
            where = ", ".join(f"{one} in row {row}" for row, one in first.items())
            expected = f"one diagnosis for each patient, not {where}"
            fix = f"correct the {shown.diagnosis} or the patient"
            notes.add(shown.file, "patient", given[found.index], expected, fix)
    return given


def _check_across(raw: _Raw, smears: pd.DataFrame, singles: pd.DataFrame, hide: _Hide, notes: Notes) -> None:
    """Note patients whose smears and single cells contradict each other, or have names that look alike."""
    if smears.empty or singles.empty:
        return
    if not (_has_patients(raw.smears) and _has_patients(raw.singles)):
        expected, fix = f"the patient in {SMEARS_FILE} and in {CELLS_FILE}", "add the column to both tables"
        notes.problems.append(Problem(CELLS_FILE, None, "patient", expected=expected, fix=fix))
        return
    there = dict(zip(smears["patient"], smears["diagnosis"], strict=True))
    other = singles["patient"].map(lambda patient: there.get(patient, ""))
    wrong = (other != "") & (singles["diagnosis"] != "") & (other != singles["diagnosis"])
    expected, fix = f"the diagnosis of this patient in {SMEARS_FILE}", "correct the diagnosis or the patient"
    notes.add(CELLS_FILE, "patient", singles["patient"][wrong], expected, fix)
    if hide is _unhidden:
        ours = set(singles["patient"])
        for pair in look_alikes([*ours, *there], partial(notes.distinct.declares, "patient")):
            if len(ours.intersection(pair)) == 1:
                both = " and ".join(pair)
                expected = f"one name for one patient; {SMEARS_FILE} and {CELLS_FILE} have {both}"
                fix = f"write both in the same way, or, {declaration('patient', *pair)}"
                notes.problems.append(Problem(CELLS_FILE, None, "patient", expected=expected, fix=fix))


def _usable(
    smears: pd.DataFrame, cells: pd.DataFrame, singles: pd.DataFrame, labelled: bool, notes: Notes
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The smears, and cells of both kinds, that have a diagnosis, if the data set must have them.

    If no item has one, single cells stay: their types are known.
    """
    kept = [(items["diagnosis"] != "") | (not labelled) for items in (smears, singles)]
    if labelled:
        notes.left_out["smears_without_diagnosis"] = listed(smears["smear"][~kept[0]])
    if len(singles) and labelled and (kept[0].any() or kept[1].any()):
        notes.left_out["cells_without_diagnosis"] = listed(singles["cell"][~kept[1]])
        singles = singles[kept[1]]
    smears = smears[kept[0]]
    known = cells["smear"].isin(set(smears["smear"]))
    notes.left_out["cells_of_left_out_smears"] = listed(cells["cell"][~known])
    return smears, _joined(_with_patients(cells[known], smears), singles)


def _cells(raw: pd.DataFrame, raw_smears: pd.DataFrame, labelled: bool, notes: Notes) -> pd.DataFrame:
    """cell, smear, bbox (text) and labels; rows without a usable id, smear or box are dropped and noted."""
    known = raw["wsi"].isin(set(raw_smears["id"]))
    expected, fix = f"the id of a smear in {SMEARS_FILE}", "correct it, add the smear, or delete the row"
    notes.add(CELLS_FILE, "wsi", raw["wsi"][~known & (raw["wsi"] != "")], expected, fix)
    cells = pd.DataFrame({"cell": raw["id"], "smear": raw["wsi"], "bbox": raw["bbox"]}, dtype=object)
    cells = cells.assign(**_labels_of_cells(raw, labelled))
    numbers = _mapped(raw["bbox"], lambda text: boxes.numbers_of(text) if text else ())
    cells["numbers"], readable = numbers, numbers.notna()
    return cells[known & readable & (raw["id"] != "") & ~raw["id"].duplicated()]


def _labels_of_cells(raw: pd.DataFrame, labelled: bool) -> dict[str, Any]:
    """The label columns of cells, joined; '' where there are none."""
    return {
        name: _mapped(raw[column], _cell_labels) if labelled and column in raw else ""
        for column, (name, _) in LABELS_OF_CELLS.items()
    }


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
    of_smears = [name for name, task in tasks.items() if task.images == "smear"] if smears.empty else []
    if of_smears:
        named = ", ".join(of_smears)
        expected = f"smears for the tasks {named}; this data set has only pictures of single cells"
        fix = (
            f"take {named} out of `tasks`, `overrides` and `ensembles.*.members` in params.yaml, or begin "
            "with `aplsmear profile crops`"
        )
        notes.problems.append(Problem(SMEARS_FILE, expected=expected, fix=fix))
    for name in [name for name in tasks if name not in of_smears]:
        task = tasks[name]
        items = task_items(cells if task.images == "cell" else smears, task.level)
        found = task_labels(items, task)
        item = "patient with cells" if task.level == "patient" else task.level
        for side, value, condition in (("positive", 1, task.positive), ("negative", 0, task.negative)):
            if (found == value).any():
                continue
            for column, wanted in condition.items():
                file, title = _SOURCE[column]
                if smears.empty and file == SMEARS_FILE:
                    file, title = CELLS_FILE, SINGLE_CELL.diagnosis
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


def _joined(cells: pd.DataFrame, singles: pd.DataFrame) -> pd.DataFrame:
    """The rows of both tables."""
    return pd.concat([cells, singles]) if len(cells) and len(singles) else singles if len(singles) else cells


def _in_order(table: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """Rows sorted by names in these columns."""

    def rank(ids: pd.Series) -> pd.Series:
        return ids.map({one: number for number, one in enumerate(sorted_ids(ids.unique()))})

    return table.sort_values(list(keys), key=rank, ignore_index=True, kind="stable")


def _report(
    smears: pd.DataFrame, cells: pd.DataFrame, tasks: Mapping[str, Task], notes: Notes
) -> dict[str, Any]:
    patients = patient_rows(smears, cells).drop_duplicates("patient")
    tables = {"smears": smears, "patients": patients, "cells": cells}
    found = {
        name: task_labels(task_items(cells if task.images == "cell" else smears, task.level), task)
        for name, task in tasks.items()
    }
    sides = {"positive": 1, "negative": 0, "no_part": -1}
    return {name: len(table) for name, table in tables.items()} | {
        "cells_with_type": int((cells["cell_type"] != "").sum()),
        "by_diagnosis": {
            diagnosis: {name: int((table["diagnosis"] == diagnosis).sum()) for name, table in tables.items()}
            for diagnosis in filter(None, patients["diagnosis"].unique())
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
