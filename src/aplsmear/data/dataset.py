"""Reading a data set in the Kaggle layout, and saying all that is wrong with it at once.

A folder with ``wsi.csv``, ``labeled_cells.csv`` and ``wsi/<imgName>`` (see `aplsmear.data.schema`) becomes
two clean tables and a report of what they hold and what was left out. Images are read where they are.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa

from aplsmear.compute.engine import HERE, Engine, Here
from aplsmear.data import labels, schema
from aplsmear.data.csvfile import read_csv
from aplsmear.data.problems import DataSetError, Problem, print_problems, render_problems
from aplsmear.data.pseudonyms import Pseudonyms
from aplsmear.data.schema import CELLS_FILE, IMAGE_FOLDER, LABELS_OF_CELLS, SMEARS_FILE
from aplsmear.data.tasks import ANY, task_items, task_labels
from aplsmear.images import reading as images
from aplsmear.params import Task
from aplsmear.progress import progress
from aplsmear.tables import SEPARATOR

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

_Hide = Callable[[str, str], str]  # kind, name -> what stands for it
_KINDS = {  # column of a file -> whose names it holds
    SMEARS_FILE: {"id": "smear", "imgName": "image", "patient": "patient"},
    CELLS_FILE: {"id": "cell", "wsi": "smear"},
}
_NAMED = 5  # rows in one message, at most
_FEW_IMAGES = 8  # are checked sooner than worker processes start
_UNLABELLED = labels.SmearLabels((), (), "", ())
_SOURCE = {column: (CELLS_FILE, title) for title, (column, _) in LABELS_OF_CELLS.items()}
_SOURCE |= {"diagnosis": (SMEARS_FILE, "label"), "fab": (SMEARS_FILE, "label")}


@dataclass(frozen=True)
class DataSet:
    """A checked data set.

    Attributes:
        smears: one row a smear, columns `SMEAR_COLUMNS`; width and height in px.
        cells: one row a cell, columns `CELL_COLUMNS`; boxes in px, end exclusive, inside the smear.
        report: what it holds, what was left out and why, remarks; ready for JSON.
    """

    smears: pd.DataFrame
    cells: pd.DataFrame
    report: dict[str, Any]


@dataclass
class _Notes:
    """What is gathered on the way."""

    problems: list[Problem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    left_out: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    unknown_labels: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(
        self, file: str, row: object, column: str, value: object = "", *, expected: str, mend: str
    ) -> None:
        """Add a problem; `row` is an integer of any kind, or None."""
        number = None if row is None else int(str(row))
        self.problems.append(Problem(file, number, column, str(value), expected, mend))


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
        root: the folder that holds ``wsi.csv``.
        tasks: each must find positive and negative items.
        min_box: px; a cell whose box, within its image, is smaller on either side is left out and counted.
        skip_bad_images: leave out and list smears whose image is missing or damaged, instead of refusing the
            data set.
        engine: decodes the images; changes no result.
        check_images: decode every image whole; False reads only their heads (sizes).
        labelled: False for new patients: label columns are neither asked for nor looked at, diagnoses are ''.
        pseudonyms: replace the names of patients, smears, cells and pictures, in what is returned and in what
            is raised.

    Returns:
        Tables and report, the same for any order of the rows.

    Raises:
        DataSetError: with every problem found.
    """
    notes = _Notes()
    hide = pseudonyms.of if pseudonyms else _as_it_is
    if not root.is_dir():
        notes.add(str(root), None, "", expected="a folder that holds " + SMEARS_FILE, mend="check the path")
        raise DataSetError(notes.problems)
    raw_smears = _read(root, schema.SMEARS, labelled, hide, notes)
    raw_cells = None
    if (root / CELLS_FILE).exists():
        raw_cells = _read(root, schema.CELLS, labelled, hide, notes)
    else:
        notes.remarks.append(f"no {CELLS_FILE}: only smears take part")
    if raw_smears is None:
        raise DataSetError(notes.problems)

    smears = _smears(raw_smears, labelled, hide, notes)
    cells = _cells(raw_cells, raw_smears, labelled, notes)
    if labelled:
        _check_spelling(cells, tasks, notes)
        if not notes.problems:  # or classes may seem empty because their rows are at fault
            _check_tasks(smears, cells, tasks, notes)
    looks = _looks([root / file for file in smears["file"]], engine, check_images)
    mend = "set dataset.skip_bad_images in params.yaml to leave it out" if labelled else "remove its row"
    smears = _with_images(smears, looks, skip_bad_images, mend, notes)
    smears = _without_copies(smears, _has_patients(raw_smears), notes)
    cells = _with_boxes(cells, smears, min_box, notes)
    if labelled:
        undiagnosed = smears["diagnosis"] == ""
        notes.left_out["smears_without_diagnosis"] = _listed(smears["smear"][undiagnosed])
        smears = smears[~undiagnosed]
    known = cells["smear"].isin(set(smears["smear"]))
    notes.left_out["cells_of_left_out_smears"] = _listed(cells["cell"][~known])
    cells = cells[known].merge(smears[["smear", "patient", "diagnosis", "fab"]], on="smear", how="left")
    if labelled and not notes.problems:  # again: what was left out may have emptied a class
        _check_tasks(smears, cells, tasks, notes)
    if smears.empty and not notes.problems:
        notes.add(SMEARS_FILE, None, "", expected="at least one smear that is not left out", mend="add some")
    if notes.problems:
        raise DataSetError(notes.problems)
    report = _report(smears, cells, tasks, notes)
    return DataSet(_in_order(smears, SMEAR_COLUMNS), _in_order(cells, CELL_COLUMNS), report)


def names_of(root: Path) -> list[tuple[str, str]]:
    """Kind and name of all that `aplsmear.data.pseudonyms` replaces in a data set, each once, in order.

    Raises:
        DataSetError: the tables cannot be read.
    """
    notes = _Notes()
    found: set[tuple[str, str]] = set()
    for declared in (schema.SMEARS, schema.CELLS):
        name = str(declared.name)
        table = _read(root, declared, False, _as_it_is, notes) if (root / name).exists() else None
        if table is None:
            continue
        for column, kind in _KINDS[name].items():
            names = _image(table[column]) if column == "imgName" else table.get(column, ())
            found |= {(kind, each) for each in names if each}
    if not found:
        notes.add(SMEARS_FILE, None, "", expected="a table of smears", mend="check the path")
        raise DataSetError(notes.problems)
    return sorted(found)


# --- tables ---------------------------------------------------------------------------------------


def _read(
    root: Path, declared: pa.DataFrameSchema, labelled: bool, hide: _Hide, notes: _Notes
) -> pd.DataFrame | None:
    """The known columns of a CSV file; whatever breaks the schema is noted and still there.

    Names are hidden, but those of pictures, which are needed.
    """
    wanted = declared if labelled else schema.without_labels(declared)
    needed = {name: column.required for name, column in wanted.columns.items()}
    table = read_csv(root / str(declared.name), needed, notes.problems, notes.remarks)
    if table is None:
        return None
    for column in schema.IDS.intersection(table.columns):
        table[column] = _mapped(table[column], _id)
    kinds = _KINDS[str(declared.name)]
    for fault in schema.faults(table, wanted):
        kind = kinds.get(fault.column)
        value = hide(kind, fault.value) if kind else fault.value
        notes.add(
            str(declared.name), fault.row, fault.column, value, expected=fault.expected, mend=fault.mend
        )
    for column, kind in kinds.items():
        if column in table and column != "imgName":
            table[column] = _mapped(table[column], partial(hide, kind))
    return table


def _as_it_is(kind: str, name: str) -> str:  # noqa: ARG001 (as `Pseudonyms.of`)
    return name


def _mapped(column: pd.Series, function: Any) -> pd.Series:
    """`function` of each text, computed once for each distinct one."""
    return column.map({text: function(text) for text in column.unique()})


def _id(text: str) -> str:
    """An id as people mean it: tidy, and 17.0 (what pandas and spreadsheets make of 17) is 17."""
    return re.sub(r"(?a)^(\d+)\.0+$", r"\1", labels.tidy(text))


def _smears(raw: pd.DataFrame, labelled: bool, hide: _Hide, notes: _Notes) -> pd.DataFrame:
    """`SMEAR_COLUMNS` but for the sizes, and `file`, the path of the image below the data set's folder.

    Rows without a usable id or image name are gone (they are noted).
    """
    cleaned = [_UNLABELLED] * len(raw)
    if labelled:
        cleaned = list(_mapped(raw["label"], _smear_labels))
    dropped = Counter(label for one in cleaned for label in one.dropped)
    notes.changed["labels_dropped"] = dict(sorted(dropped.items()))
    files = _image(raw["imgName"])
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
    for row, image in smears["image"][smears["image"].duplicated(keep=False)].items():
        notes.add(
            SMEARS_FILE, row, "imgName", image.removeprefix(f"{IMAGE_FOLDER}/"),
            expected="a picture that no other row names", mend="correct the name, or remove one of the rows",
        )  # fmt: skip
    return smears


def _image(names: pd.Series) -> pd.Series:
    """The paths of pictures below the data set's folder."""
    return names.map(lambda name: str(PurePosixPath(IMAGE_FOLDER, name.replace("\\", "/"))))


def _smear_labels(text: str) -> labels.SmearLabels:
    """The cleaned labels; none where they are unusable, which the schema has noted."""
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
    for row in given.index[given == ""]:
        notes.add(
            SMEARS_FILE, row, "patient", expected="the patient of every smear, or of none",
            mend="fill it in, or remove the column: then each smear counts as a patient",
        )  # fmt: skip
    known = (diagnosis != "") & (given != "")
    for patient, found in diagnosis[known].groupby(given[known]):
        if len(set(found)) > 1:
            first = found.sort_index().drop_duplicates()
            where = ", ".join(f"{one} in row {row}" for row, one in first.items())
            for row in found.index:
                notes.add(
                    SMEARS_FILE, row, "patient", patient, expected=f"one diagnosis a patient, not {where}",
                    mend="correct the label or the patient",
                )  # fmt: skip
    return given


def _cells(raw: pd.DataFrame | None, raw_smears: pd.DataFrame, labelled: bool, notes: _Notes) -> pd.DataFrame:
    """cell, smear, bbox (text) and labels; rows without a usable id, smear or box text are gone and noted."""
    if raw is None:
        raw = pd.DataFrame(columns=["id", "wsi", "bbox"], dtype=object)
    known = raw["wsi"].isin(set(raw_smears["id"]))
    for row, smear in raw["wsi"][~known & (raw["wsi"] != "")].items():
        notes.add(
            CELLS_FILE, row, "wsi", smear, expected=f"the id of a smear in {SMEARS_FILE}",
            mend="correct it, add the smear, or remove its cells",
        )  # fmt: skip
    cells = pd.DataFrame({"cell": raw["id"], "smear": raw["wsi"], "bbox": raw["bbox"]}, dtype=object)
    for column, (name, _) in LABELS_OF_CELLS.items():
        cells[name] = _mapped(raw[column], _cell_labels) if labelled and column in raw else ""
    readable = _mapped(raw["bbox"], schema.is_box).astype(bool)
    return cells[known & readable & (raw["id"] != "") & ~raw["id"].duplicated()]


def _cell_labels(text: str) -> str:
    """Joined labels; none where they are unusable, which the schema has noted."""
    try:
        return SEPARATOR.join(labels.parse_labels(text))
    except labels.LabelError:
        return ""


def _check_spelling(cells: pd.DataFrame, tasks: Mapping[str, Task], notes: _Notes) -> None:
    """Of the labels of cells that nobody knows, a probable misspelling is a problem; others are counted."""
    conditions = [condition for task in tasks.values() for condition in (task.positive, task.negative)]
    for column, (name, vocabulary) in LABELS_OF_CELLS.items():
        known = {label for condition in conditions for label in condition.get(name, [])} - {ANY}
        known |= set(vocabulary)
        counts = _label_counts(cells[name])
        meant = {label: labels.misspelt(label, known) for label in counts if label not in known}
        strange = {label: counts[label] for label, other in meant.items() if other is None}
        if strange:
            notes.unknown_labels[name] = strange
        wrong = {label: other for label, other in meant.items() if other is not None}
        for row, text in cells[name].items() if wrong else ():
            for label in (label for label in text.split(SEPARATOR) if label in wrong):
                notes.add(
                    CELLS_FILE, row, column, label,
                    expected=f"a known label (did you mean {wrong[label]!r}?)", mend="correct the spelling",
                )  # fmt: skip


# --- images and boxes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What was seen of one image; `content` is a hash of the file."""

    height: int = 0
    width: int = 0
    content: str = ""
    what: str = ""
    mend: str = ""


def _look(path: Path, whole: bool) -> _Look:
    try:
        data = images.image_bytes(path)
        height, width = images.decode(data).shape[:2] if whole else images.image_size(path)
        return _Look(height, width, hashlib.sha256(data).hexdigest())
    except images.ImageError as error:
        return _Look(what=error.what, mend=error.mend)


def _looks(paths: list[Path], engine: Engine, whole: bool) -> list[_Look]:
    engine = engine if whole and len(paths) >= _FEW_IMAGES else Here(1)
    return list(progress(engine.map(partial(_look, whole=whole), paths), "images", len(paths)))


def _with_images(
    smears: pd.DataFrame, looks: list[_Look], skip_bad: bool, mend: str, notes: _Notes
) -> pd.DataFrame:
    """Add width, height and content; a smear with a bad image is noted, or left out and listed."""
    bad = {}
    for row, smear, image, look in zip(smears.index, smears["smear"], smears["image"], looks, strict=True):
        if look.what and skip_bad:
            bad[smear] = f"{image}: {look.what}"
        elif look.what:
            notes.add(
                SMEARS_FILE, row, "imgName", image, expected=f"a whole picture: {look.what}",
                mend=f"{look.mend}, or {mend}",
            )  # fmt: skip
    notes.left_out["smears_with_bad_image"] = {"count": len(bad), "images": bad}
    seen = smears.assign(
        height=[look.height for look in looks],
        width=[look.width for look in looks],
        content=[look.content for look in looks],
    )
    return seen.iloc[[place for place, look in enumerate(looks) if not look.what]]


def _without_copies(smears: pd.DataFrame, has_patients: bool, notes: _Notes) -> pd.DataFrame:
    """See to it that one and the same image file never counts as two patients."""
    smears = smears.copy()
    copies = smears[smears["content"].duplicated(keep=False)]
    for _, group in copies.groupby("content"):
        ids = _sorted_ids(group["smear"])
        if not has_patients:
            smears.loc[group.index, "patient"] = ids[0]
        if len(set(group["patient"] if has_patients else group["diagnosis"]) - {""}) > 1:
            few = group.index[: _NAMED + 1]
            for row in group.index:
                others = ", ".join(map(str, [other for other in few if other != row][:_NAMED]))
                notes.add(
                    SMEARS_FILE, row, "imgName", group["image"][row],
                    expected=f"a picture of its own; row {others} has the same with another patient or label",
                    mend="remove the wrong row, or give both rows the same patient and label",
                )  # fmt: skip
        else:
            notes.remarks.append(f"the same picture, counted as one patient: smears {', '.join(ids)}")
    return smears


def _with_boxes(cells: pd.DataFrame, smears: pd.DataFrame, min_box: int, notes: _Notes) -> pd.DataFrame:
    """Boxes as numbers, clipped to their image; cells without a box or with too small a one are left out."""
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
    for place in np.flatnonzero(swapped | outside).tolist():
        height, width = size[place].tolist()
        expected = f"a box inside its image of {height} px height and {width} px width"
        mend = "correct the box (y comes first) or the smear, or leave the box empty"
        if swapped[place]:
            expected = "y0 before y1 and x0 before x1 in [y0, x0, y1, x1]"
            mend = "put the numbers in order, or leave the box empty"
        row, text = cells.index[place], cells["bbox"].iloc[place]
        notes.add(CELLS_FILE, row, "bbox", text, expected=expected, mend=mend)

    inside = np.concatenate([np.clip(start, 0, size), np.clip(end, 0, size)], axis=1)
    small = (inside[:, 2:] - inside[:, :2] < min_box).any(axis=1)
    fine = ~swapped & ~outside
    notes.left_out["cells_with_box_under_min_box"] = _listed(cells["cell"][small & fine])
    notes.changed["boxes_clipped"] = _listed(cells["cell"][(inside != box).any(axis=1) & fine & ~small])
    numbers = pd.DataFrame(inside, index=cells.index, columns=list(BOX_COLUMNS))
    cells = pd.concat([cells, numbers], axis=1)
    return cells.iloc[np.flatnonzero(fine & ~small)]


# --- tasks, order, report -------------------------------------------------------------------------


def _check_tasks(smears: pd.DataFrame, cells: pd.DataFrame, tasks: Mapping[str, Task], notes: _Notes) -> None:
    """Note each task that has no positive or no negative item, and the labels that it looks for."""
    if "diagnosis" not in cells:
        cells = cells.merge(smears[["smear", "patient", "diagnosis", "fab"]], on="smear", how="left").fillna(
            ""
        )
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
                near = {labels.misspelt(label, present) for label in wanted} - {None, *wanted}
                hint = f" (did you mean {', '.join(map(repr, sorted(map(str, near))))}?)" if near else ""
                notes.add(
                    file, None, title, "any label" if ANY in wanted else ", ".join(wanted),
                    expected=f"at least one {side} {item} for the task {name}{hint}",
                    mend=f"label some, or remove {name} from tasks and ensembles.*.members in params.yaml",
                )  # fmt: skip


def _label_counts(column: pd.Series) -> dict[str, int]:
    """How often each single label occurs, sorted by label."""
    counts: Counter[str] = Counter()
    for text, count in column.value_counts().items():
        for label in filter(None, str(text).split(SEPARATOR)):
            counts[label] += int(count)
    return dict(sorted(counts.items()))


def _listed(ids: Iterable[str]) -> dict[str, Any]:
    listed = _sorted_ids(ids)
    return {"count": len(listed), "ids": listed}


def _sorted_ids(ids: Iterable[str]) -> list[str]:
    """Ids by number where all are whole numbers, else by text."""
    listed = list(ids)
    if all(re.fullmatch(r"[0-9]{1,18}", one) for one in listed):
        return sorted(listed, key=lambda one: (int(one), one))
    return sorted(listed)


def _in_order(table: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    """These columns, rows by smear, then by cell."""
    ranks = []
    for column in ("cell", "smear"):  # np.lexsort: the last key comes first
        if column in columns:
            place = {one: number for number, one in enumerate(_sorted_ids(table[column].unique()))}
            ranks.append([place[one] for one in table[column]])
    return table[list(columns)].iloc[np.lexsort(ranks)].reset_index(drop=True)


def _report(
    smears: pd.DataFrame, cells: pd.DataFrame, tasks: Mapping[str, Task], notes: _Notes
) -> dict[str, Any]:
    patients = smears.drop_duplicates("patient")
    report: dict[str, Any] = {
        "smears": len(smears),
        "patients": len(patients),
        "cells": len(cells),
        "cells_with_type": int((cells["cell_type"] != "").sum()),
        "by_diagnosis": {
            diagnosis: {
                "smears": int((smears["diagnosis"] == diagnosis).sum()),
                "patients": int((patients["diagnosis"] == diagnosis).sum()),
                "cells": int((cells["diagnosis"] == diagnosis).sum()),
            }
            for diagnosis in filter(None, smears["diagnosis"].unique())
        },
        "labels": {column: _label_counts(cells[column]) for column in CELL_LABELS},
        "fab": _label_counts(smears["fab"]),
        "tasks": {},
        "left_out": notes.left_out,
        "changed": notes.changed,
        "unknown_labels": notes.unknown_labels,
        "remarks": sorted(notes.remarks),
    }
    for name, task in tasks.items():
        found = task_labels(task_items(cells if task.images == "cell" else smears, task.level), task)
        report["tasks"][name] = {
            "positive": int((found == 1).sum()),
            "negative": int((found == 0).sum()),
            "no_part": int((found == -1).sum()),
        }
    return report
