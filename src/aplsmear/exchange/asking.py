"""Which cells to ask about: cells without a label, whose labels help a task most; and the files to ask with.

They are the cells that the heads are least sure of, with few cells of each patient. On real cells this was
the best of eleven ways of asking (`benchmarks/asking.py`). Cells about which heads disagree were worse.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from aplsmear.data.schema import LABELS_OF_CELLS
from aplsmear.data.tasks import ANY, meets, task_items, task_labels
from aplsmear.exchange.export import geojson, shots_of, task_of
from aplsmear.exchange.found import NO_TYPE, ExchangeError
from aplsmear.files import refuse_taken, write_json
from aplsmear.params import Task
from aplsmear.tables import SEPARATOR, read_table, write_table

PER_PATIENT = 2  # cells of a patient, before more of each are taken
NO_CELL = ("Smudge", "Artefact")  # answers about what is not a cell
_CLIP = 1e-6  # probabilities stay this far from 0 and 1
_OF_CELLS = {column for column, _ in LABELS_OF_CELLS.values()}
_NOTHING = {"None": "Nothing special"}  # how a label is shown that is no word of its own


def least_sure(distance: np.ndarray, patient: np.ndarray, count: int) -> np.ndarray:
    """The `count` cells nearest to the boundary between the classes (Lewis & Gale 1994), of many patients.

    `distance` is in logits from the boundary, float (cells,). Returns int64 (count,): at most `PER_PATIENT`
    cells of each patient; if these are too few, the next `PER_PATIENT` of each follow.
    """
    order = np.argsort(np.abs(distance), kind="stable")
    turn = pd.Series(order).groupby(patient[order]).cumcount().to_numpy() // PER_PATIENT
    return np.asarray(order[np.argsort(turn, kind="stable")][:count])


def open_cells(cells: pd.DataFrame, task: Task) -> np.ndarray:
    """Which cells in smears have no label in the columns of a task, and could get one: bool (cells,)."""
    columns = asked_columns(task)
    blank = (cells[columns] == "").all(axis=1) & (cells["smear"] != "")
    blank &= cells["object_type"].isin(["", NO_TYPE])
    others = [
        meets(cells, {column: wanted for column, wanted in condition.items() if column not in columns})
        for condition in (task.positive, task.negative)
    ]
    return np.asarray(blank & (others[0] | others[1]))


def asked_columns(task: Task) -> list[str]:
    """The label columns of cells that a task uses."""
    return sorted((task.positive.keys() | task.negative.keys()) & _OF_CELLS)


def chosen_cells(name: str, task: Task, count: int) -> pd.DataFrame:
    """The `count` cells to ask about, from the outs of `download` and `tune` in the working folder.

    Returns:
        ``cell, smear, patient, probability``, the nearest to the boundary first.

    Raises:
        ExchangeError: the task does not use labels of cells, has no heads, or no cell is left to ask about.
    """
    if task.level != "cell" or not asked_columns(task):
        raise ExchangeError(
            f"The task {name} does not use labels of cells, so there is nothing to ask about cells."
        )
    path = Path("tuned") / name / "scores.parquet"
    if not path.exists():
        raise ExchangeError(
            f"There is no {path}: `dvc repro tune@{name}` trains the heads that choose cells."
        )
    cells = read_table(Path("dataset/cells.csv"))
    items, scores = task_items(cells, task.level), pd.read_parquet(path)
    if items["item"].tolist() != scores["item"].tolist():
        raise ExchangeError(
            f"{path} is of other cells than dataset/cells.csv: `dvc repro tune@{name}` renews it."
        )
    places = np.flatnonzero(open_cells(cells, task))
    if not len(places):
        raise ExchangeError(
            f"Each cell in a smear has a label for the task {name}: there is nothing to ask about."
        )
    each = scores.filter(regex=r"^outer_\d+$").to_numpy(np.float64)
    logits = logit(np.clip(each, _CLIP, 1 - _CLIP))
    own = logits[np.arange(len(each)), scores["fold"]]
    label = task_labels(items, task)
    boundary = (own[label == 1].mean() + own[label == 0].mean()) / 2
    mean = logits.mean(axis=1)
    found = places[least_sure(mean[places] - boundary, cells["patient"].to_numpy()[places], count)]
    table: pd.DataFrame = cells.iloc[found][["cell", "smear", "patient"]].reset_index(drop=True)
    return table.assign(probability=expit(mean[found]))


def answers_to(cells: pd.DataFrame, task: Task) -> list[str]:
    """The classes that can be an answer: labels of the task and of the data set, and what is not a cell."""
    labels = set()
    for column in asked_columns(task):
        labels |= {label for text in cells[column].unique() for label in text.split(SEPARATOR)}
        for condition in (task.positive, task.negative):
            labels |= set(condition.get(column, ()))
    return sorted({_NOTHING.get(label, label) for label in labels - {"", ANY}}) + list(NO_CELL)


def write_questions(folder: Path, to: Path, chosen: pd.DataFrame, answers: Collection[str]) -> int:
    """Write a project of Label Studio (tasks.json, config.xml), a folder for QuPath, and the table of cells.

    `to` is a new or empty folder; returns the number of pictures of the data set in `folder`.

    Raises:
        ExchangeError: a cell is not in the data set.
        UserError: something is in the folder.
        DataSetError: a table of the data set cannot be read.
    """
    refuse_taken(to)
    scores: Mapping[str, float] = dict(zip(chosen["cell"], chosen["probability"], strict=True))
    shots = []
    for shot in shots_of(folder, scores, "probability"):
        if cells := [cell for cell in shot.cells if cell.score is not None]:
            shots.append(replace(shot, cells=cells))
    if sum(len(shot.cells) for shot in shots) < len(chosen):
        raise ExchangeError(f"{folder} lacks cells of dataset/cells.csv: run `dvc repro` first.")
    tasks = [{key: part for key, part in task_of(shot).items() if key != "annotations"} for shot in shots]
    write_json(to / "tasks.json", tasks, digits=12)
    geojson(shots, to / "qupath")
    (to / "config.xml").write_text(_config(answers), encoding="utf-8")
    write_table(to / "cells.csv", chosen)
    return len(shots)


def _config(answers: Collection[str]) -> str:
    """The labelling interface of Label Studio; the first class is that of cells without an answer."""
    labels = "".join(f"    <Label value={quoteattr(each)}/>\n" for each in (NO_TYPE, *answers))
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true" zoomControl="true"/>\n'
        f'  <RectangleLabels name="label" toName="image">\n{labels}  </RectangleLabels>\n</View>\n'
    )
