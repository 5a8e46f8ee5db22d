"""Read a data set in the Kaggle layout, and report all of its problems at once.

A folder with ``wsi.csv``, ``labeled_cells.csv`` and ``wsi/<imgName>`` (see `aplsmear.data.schema`) becomes
two clean tables, and a report of what they contain and what was left out. Images are not copied.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa

from aplsmear.compute.engine import HERE, Engine, Here
from aplsmear.data import labels, schema
from aplsmear.data.copies import Fingerprint, fingerprint, groups, same_boxes, same_pictures
from aplsmear.data.csvfile import read_csv
from aplsmear.data.names import Distinct, declaration, image_path, name_problems, read_distinct
from aplsmear.data.problems import DataSetError, Problem, print_problems, render_problems
from aplsmear.data.pseudonyms import Pseudonyms
from aplsmear.data.schema import CELLS_FILE, IMAGE_FOLDER, LABELS_OF_CELLS, SMEARS_FILE
from aplsmear.data.tasks import ANY, task_items, task_labels
from aplsmear.images import reading as images
from aplsmear.params import Task
from aplsmear.progress import progress
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
BOX_COLUMNS = ("y0", "x0", "y1", "x1")
CELL_LABELS = tuple(column for column, _ in LABELS_OF_CELLS.values())
CELL_COLUMNS = ("cell", "smear", "patient", "diagnosis", "fab", *CELL_LABELS, *BOX_COLUMNS)

_Hide = Callable[[str, str], str]  # kind of name, name -> pseudonym
_KINDS = {  # file -> column -> kind of the names in it
    SMEARS_FILE: {"id": "smear", "imgName": "image", "patient": "patient"},
    CELLS_FILE: {"id": "cell", "wsi": "smear"},
}
_NAMED = 5  # most rows named in one message
_PATH = "correct the path of the folder"
_FEW_IMAGES = 8  # checked faster in this process than by new ones
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
    """

    smears: pd.DataFrame
    cells: pd.DataFrame
    report: dict[str, Any]


@dataclass
class _Notes:
    """Problems and parts of the report, gathered while the data set is read."""

    problems: list[Problem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    left_out: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    unknown_labels: dict[str, dict[str, int]] = field(default_factory=dict)
    distinct: Distinct = field(default_factory=Distinct)

    def add(self, file: str, column: str, values: pd.Series, expected: str, fix: str) -> None:
        """Add a problem for each of `values`, which has the row numbers as its index."""
        self.problems += [
            Problem(file, row, column, value, expected=expected, fix=fix)
            for row, value in zip(values.index.tolist(), values.tolist(), strict=True)
        ]


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
    notes = _Notes()
    hide = pseudonyms.of if pseudonyms else _unhidden
    raw_smears, raw_cells = _raw_tables(root, labelled, hide, notes)
    smears = _smears(raw_smears, labelled, hide, notes)
    cells = _cells(raw_cells, raw_smears, labelled, notes)
    if labelled:
        _check_spelling(cells, tasks, notes)
        if not notes.problems:  # else a class can seem empty because its rows have problems
            _check_tasks(smears, _with_patients(cells, smears), tasks, notes)
    smears = _with_images(smears, root, engine, check_images, skip_bad_images, labelled, notes)
    smears = _without_copies(smears, _has_patients(raw_smears), notes)
    cells = _with_boxes(cells, smears, min_box, notes)
    if labelled:
        undiagnosed = smears["diagnosis"] == ""
        notes.left_out["smears_without_diagnosis"] = _listed(smears["smear"][undiagnosed])
        smears = smears[~undiagnosed]
    known = cells["smear"].isin(set(smears["smear"]))
    notes.left_out["cells_of_left_out_smears"] = _listed(cells["cell"][~known])
    cells = _with_patients(cells[known], smears)
    if labelled and not notes.problems:  # again: a class can be empty after smears and cells are left out
        _check_tasks(smears, cells, tasks, notes)
    if smears.empty and not notes.problems:
        notes.problems.append(Problem(SMEARS_FILE, expected="at least one usable smear", fix="add smears"))
    if notes.problems:
        raise DataSetError(notes.problems)
    report = _report(smears, cells, tasks, notes)
    return DataSet(_in_order(smears, SMEAR_COLUMNS), _in_order(cells, CELL_COLUMNS), report)


def names_of(root: Path) -> list[tuple[str, str]]:
    """Kind and name of everything that gets a pseudonym in a data set, without repetition, sorted.

    Raises:
        DataSetError: the tables cannot be read.
    """
    notes = _Notes()
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
    root: Path, labelled: bool, hide: _Hide, notes: _Notes
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
    root: Path, declared: pa.DataFrameSchema, labelled: bool, hide: _Hide, notes: _Notes
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


def _smears(raw: pd.DataFrame, labelled: bool, hide: _Hide, notes: _Notes) -> pd.DataFrame:
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
    usable = (raw["id"] != "") & ~raw["id"].duplicated() & (raw["imgName"] != "")
    smears = smears[usable & ~raw["imgName"].map(schema.leaves_folder).astype(bool)]
    repeated = smears["image"][smears["image"].duplicated(keep=False)].str.removeprefix(f"{IMAGE_FOLDER}/")
    expected, fix = "a picture that no other row names", "correct the name, or delete one of the rows"
    notes.add(SMEARS_FILE, "imgName", repeated, expected, fix)
    return smears


def _smear_labels(text: str) -> labels.SmearLabels:
    """The corrected labels; none if they cannot be read, which is a noted problem."""
    try:
        return labels.clean_smear_labels(labels.parse_labels(text))
    except labels.LabelError:
        return _UNLABELLED


def _has_patients(raw: pd.DataFrame) -> bool:
    return "patient" in raw and bool((raw["patient"] != "").any())


def _patients(raw: pd.DataFrame, diagnosis: pd.Series, notes: _Notes) -> pd.Series:
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


def _cells(raw: pd.DataFrame | None, raw_smears: pd.DataFrame, labelled: bool, notes: _Notes) -> pd.DataFrame:
    """cell, smear, bbox (text) and labels; rows without a usable id, smear or box are dropped and noted."""
    if raw is None:
        raw = pd.DataFrame(columns=["id", "wsi", "bbox"], dtype=object)
    known = raw["wsi"].isin(set(raw_smears["id"]))
    expected, fix = f"the id of a smear in {SMEARS_FILE}", "correct it, add the smear, or delete the row"
    notes.add(CELLS_FILE, "wsi", raw["wsi"][~known & (raw["wsi"] != "")], expected, fix)
    cells = pd.DataFrame({"cell": raw["id"], "smear": raw["wsi"], "bbox": raw["bbox"]}, dtype=object)
    for column, (name, _) in LABELS_OF_CELLS.items():
        cells[name] = _mapped(raw[column], _cell_labels) if labelled and column in raw else ""
    readable = _mapped(raw["bbox"], schema.is_box).astype(bool)
    return cells[known & readable & (raw["id"] != "") & ~raw["id"].duplicated()]


def _cell_labels(text: str) -> str:
    """The joined labels; none if they cannot be read, which is a noted problem."""
    try:
        return SEPARATOR.join(labels.parse_labels(text))
    except labels.LabelError:
        return ""


def _check_spelling(cells: pd.DataFrame, tasks: Mapping[str, Task], notes: _Notes) -> None:
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


# --- images and boxes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """Size in px, SHA-256 and fingerprint of one image; `wrong` and `fix` if it cannot be read."""

    height: int = 0
    width: int = 0
    content: str = ""
    fingerprint: Fingerprint | None = None
    wrong: str = ""
    fix: str = ""


def _look(path: Path, whole: bool) -> _Look:
    try:
        data = images.image_bytes(path)
        if not whole:
            return _Look(*images.image_size(path), hashlib.sha256(data).hexdigest())
        rgb = images.decode(data)
        found = fingerprint(rgb)
        return _Look(rgb.shape[0], rgb.shape[1], found.pixels, found)
    except images.ImageError as error:
        return _Look(wrong=error.what, fix=error.fix)


def _with_images(
    smears: pd.DataFrame,
    root: Path,
    engine: Engine,
    whole: bool,
    skip_bad: bool,
    labelled: bool,
    notes: _Notes,
) -> pd.DataFrame:
    """Add width, height and content; a smear with a bad image is a problem, or left out and listed."""
    paths = [root / file for file in smears["file"]]
    engine = engine if whole and len(paths) >= _FEW_IMAGES else Here(1)
    looks = list(progress(engine.map(partial(_look, whole=whole), paths), "images", len(paths)))
    otherwise = "set dataset.skip_bad_images in params.yaml to leave it out" if labelled else "delete its row"
    bad = {}
    for row, smear, image, look in zip(smears.index, smears["smear"], smears["image"], looks, strict=True):
        if look.wrong and skip_bad:
            bad[smear] = f"{image}: {look.wrong}"
        elif look.wrong:
            expected, fix = f"a whole picture: {look.wrong}", f"{look.fix}, or {otherwise}"
            notes.problems.append(Problem(SMEARS_FILE, row, "imgName", image, expected=expected, fix=fix))
    notes.left_out["smears_with_bad_image"] = {"count": len(bad), "images": bad}
    seen = smears.assign(
        height=[look.height for look in looks],
        width=[look.width for look in looks],
        content=[look.content for look in looks],
        fingerprint=pd.Series([look.fingerprint for look in looks], index=smears.index, dtype=object),
    )
    return seen[seen["content"] != ""]


def _without_copies(smears: pd.DataFrame, has_patients: bool, notes: _Notes) -> pd.DataFrame:
    """Count smears with the same picture as one patient, or note them if they contradict each other."""
    smears = smears.sort_values("content")
    images = smears["image"].tolist()
    alike = same_pictures([one for one in smears["fingerprint"] if one is not None])
    for places in smears.reset_index().groupby("content").groups.values():
        alike += [*pairwise(places), *((places[0], place) for place in places[2:])]
    alike = [pair for pair in alike if not notes.distinct.declares("image", *(images[one] for one in pair))]
    for _, found in smears.groupby(groups(len(smears), alike)):
        if len(found) == 1:
            continue
        group = found.sort_index()
        ids = _sorted_ids(group["smear"])
        if not has_patients:
            smears.loc[group.index, "patient"] = ids[0]
        if len(set(group["patient"] if has_patients else group["diagnosis"]) - {""}) > 1:
            for row, image in zip(group.index.tolist(), group["image"].tolist(), strict=True):
                others = group["image"].drop(row).iloc[:_NAMED]
                named = ", ".join(map(str, others.index))
                expected = f"a picture of its own; row {named} has the same with another patient or label"
                fix = "delete the wrong row, or give both rows the same patient and label, or, "
                names = (one.removeprefix(f"{IMAGE_FOLDER}/") for one in (image, others.iloc[0]))
                fix += declaration("image", *names)
                notes.problems.append(Problem(SMEARS_FILE, row, "imgName", image, expected=expected, fix=fix))
        else:
            notes.remarks.append(f"the same picture, counted as one patient: smears {', '.join(ids)}")
    return smears.sort_index()


def _with_boxes(cells: pd.DataFrame, smears: pd.DataFrame, min_box: int, notes: _Notes) -> pd.DataFrame:
    """Boxes as numbers, clipped to their image; cells without a box or with a small one are left out."""
    empty = cells["bbox"] == ""
    notes.left_out["cells_without_box"] = _listed(cells["cell"][empty])
    cells = cells[~empty]
    found = [match.groups() for match in map(schema.BOX.fullmatch, cells["bbox"]) if match]
    box = np.array(found, dtype=np.int64).reshape(-1, 4)
    start, end = box[:, :2], box[:, 2:]
    sizes = smears.set_index("smear")[["height", "width"]].reindex(cells["smear"])
    seen = sizes["height"].notna().to_numpy()
    size = sizes.fillna(np.iinfo(np.int32).max).to_numpy(dtype=np.int64)

    swapped = np.any(end < start, axis=1)
    outside = ((start >= size) | (end <= 0)).any(axis=1) & (end > start).all(axis=1) & seen
    rows, texts = cells.index.tolist(), cells["bbox"].tolist()
    for place in np.flatnonzero(swapped | outside).tolist():
        height, width = size[place].tolist()
        expected = f"a box inside its image of {height} px height and {width} px width"
        fix = "correct the box (y comes first) or the smear, or leave the box empty"
        if swapped[place]:
            expected = "y0 before y1 and x0 before x1 in [y0, x0, y1, x1]"
            fix = "put the numbers in order, or leave the box empty"
        problem = Problem(CELLS_FILE, rows[place], "bbox", texts[place], expected=expected, fix=fix)
        notes.problems.append(problem)

    inside = np.concatenate([np.clip(start, 0, size), np.clip(end, 0, size)], axis=1)
    small = (inside[:, 2:] - inside[:, :2] < min_box).any(axis=1)
    fine = ~swapped & ~outside
    notes.left_out["cells_with_box_under_min_box"] = _listed(cells["cell"][small & fine])
    notes.changed["boxes_clipped"] = _listed(cells["cell"][(inside != box).any(axis=1) & fine & ~small])
    numbers = pd.DataFrame(inside, index=cells.index, columns=list(BOX_COLUMNS))
    cells = pd.concat([cells, numbers], axis=1).iloc[np.flatnonzero(fine & ~small)]
    _check_same_cells(cells, notes)
    return cells


def _check_same_cells(cells: pd.DataFrame, notes: _Notes) -> None:
    """Note cells with nearly the same box: a problem if their types differ, else a remark."""
    rows, types, ids = cells.index.tolist(), cells["cell_type"].tolist(), cells["cell"].tolist()
    same = same_boxes(cells[list(BOX_COLUMNS)].to_numpy(), cells["smear"].tolist())
    for first, second in same:
        if "" != types[first] != types[second] != "":
            expected = f"one type for one cell; row {rows[first]} has the box {cells['bbox'].iloc[first]}"
            fix = "correct the type or the box, or delete one of the rows"
            title = "cellType"
            notes.problems.append(
                Problem(CELLS_FILE, rows[second], title, types[second], expected=expected, fix=fix)
            )
    if same:
        notes.remarks.append(
            f"{len(same)} pairs of cells have nearly the same box and count twice, such as "
            + " and ".join(_sorted_ids(ids[place] for place in same[0]))
        )


# --- tasks, order, report -------------------------------------------------------------------------


def _with_patients(cells: pd.DataFrame, smears: pd.DataFrame) -> pd.DataFrame:
    """The cells with patient, diagnosis and FAB classes of their smears; '' for cells of dropped smears."""
    of_smear = smears[["smear", "patient", "diagnosis", "fab"]]
    return cells.merge(of_smear, on="smear", how="left").fillna("")


def _check_tasks(smears: pd.DataFrame, cells: pd.DataFrame, tasks: Mapping[str, Task], notes: _Notes) -> None:
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


def _listed(ids: Iterable[str]) -> dict[str, Any]:
    listed = _sorted_ids(ids)
    return {"count": len(listed), "ids": listed}


def _sorted_ids(ids: Iterable[str]) -> list[str]:
    """Ids sorted by number if all are whole numbers, else as text."""
    listed = list(ids)
    if all(re.fullmatch(r"[0-9]{1,18}", one) for one in listed):
        return sorted(listed, key=lambda one: (int(one), one))
    return sorted(listed)


def _in_order(table: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    """These columns, rows sorted by smear, then by cell."""
    keys = [column for column in ("smear", "cell") if column in columns]

    def rank(ids: pd.Series) -> pd.Series:
        return ids.map({one: number for number, one in enumerate(_sorted_ids(ids.unique()))})

    return table[list(columns)].sort_values(keys, key=rank, ignore_index=True)


def _report(
    smears: pd.DataFrame, cells: pd.DataFrame, tasks: Mapping[str, Task], notes: _Notes
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
