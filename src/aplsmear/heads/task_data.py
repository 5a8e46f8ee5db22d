"""The data of one task: its items, their labels and folds, and the features that heads read.

An item is what gets a label and a score: a cell, a smear or a patient. A cell or a smear is one image; a
patient is a bag of cells, one image each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aplsmear.data.tasks import task_items, task_labels
from aplsmear.errors import UserError
from aplsmear.features.store import Features, read_features
from aplsmear.files import rows_of
from aplsmear.heads.bags import attend
from aplsmear.heads.head import Head, Recipe, TrainingItems, mean_over_views, parameters, score
from aplsmear.heads.stack import Material
from aplsmear.params import Task, Tune
from aplsmear.tables import read_table


class TuneError(UserError, ValueError):
    """The parameters or data do not allow this search."""


@dataclass(frozen=True)
class TaskData:
    """All items of a task's level, and what is known of them."""

    table: pd.DataFrame  # item, patient, fold: one row an item, in the order of their features
    label: np.ndarray  # int8 (items,): 1, 0, or -1 for items that take no part in the task
    row: np.ndarray  # int64 (images,): the row of the image's plain view in the features
    views: np.ndarray  # int64 (images,): number of augmented views, in the rows after the plain one
    features: Mapping[str, Features]
    folds: int

    def training_places(self, per_patient: int, seed: int) -> np.ndarray:
        """The rows of the table to train on: labelled items, at most `per_patient` of each patient and class.

        A hash of seed and name chooses among more. int64, ascending.
        """
        classes = pd.DataFrame({"patient": self.table["patient"], "label": self.label})
        rank = _random_rank(self.table["item"], classes, seed)
        return np.flatnonzero((self.label >= 0) & (rank < per_patient))

    def training_items(self, per_patient: int, seed: int) -> TrainingItems:
        """The items of `training_places`. An item with more views than others is shown more often."""
        kept = self.training_places(per_patient, seed)
        fewest = max(int(self.views.min()), 1)
        return TrainingItems(
            row=self.row[kept],
            views=self.views[kept],
            copies=np.maximum(self.views[kept] // fewest, 1),
            label=self.label[kept],
            fold=self.table["fold"].to_numpy()[kept],
        )

    def material(self, settings: Tune, seed: int) -> Material:
        """The features and items that heads train on."""
        values = {name: each.values for name, each in self.features.items()}
        items = self.training_items(settings.items_per_patient, seed)
        return Material(values, items, seed, settings.memory, restarts=settings.restarts)

    def parameters(self, recipe: Recipe) -> int:
        """The number of weights of a head."""
        return parameters(recipe, self.features[recipe.features].values.shape[1])

    def score(self, head: Head, places: np.ndarray, average: int) -> np.ndarray:
        """Probabilities of the items in these rows of the table, float32 (places,).

        Args:
            head: trained.
            places: int64 (places,).
            average: number of augmented views whose scores are averaged with that of the plain view.
        """
        values = self.features[head.features].values
        return mean_over_views(
            lambda rows: score([head], values, rows)[0], self.row[places], self.views[places], average
        )


@dataclass(frozen=True)
class PatientTaskData(TaskData):
    """Items are patients; their images are cells. The cells of a patient stand together, sorted by name."""

    cell: np.ndarray  # str (images,): names
    size: np.ndarray  # int64 (items,): number of cells of each patient, at least one

    def training_items(self, per_patient: int, seed: int) -> TrainingItems:
        """The labelled patients, each with at most `per_patient` cells, chosen by a hash of their names."""
        owner = np.repeat(np.arange(len(self.size)), self.size)
        rank = _random_rank(self.cell, pd.DataFrame({"patient": owner}), seed)
        images = np.flatnonzero((self.label[owner] >= 0) & (rank < per_patient))
        kept = np.flatnonzero(self.label >= 0)
        return TrainingItems(
            row=self.row[images],
            views=self.views[images],
            copies=np.ones(len(kept), np.int64),
            label=self.label[kept],
            fold=self.table["fold"].to_numpy()[kept],
            size=np.minimum(self.size[kept], per_patient),
        )

    def material(self, settings: Tune, seed: int) -> Material:
        """The features and items that heads train on."""
        return replace(super().material(settings, seed), bag=settings.cells_per_step)

    def parameters(self, recipe: Recipe) -> int:
        """The number of weights of a head."""
        return parameters(recipe, self.features[recipe.features].values.shape[1], bags=True)

    def score(self, head: Head, places: np.ndarray, average: int) -> np.ndarray:
        """Probabilities of the patients in these rows of the table, float32 (places,)."""
        values = self.features[head.features].values

        def probability(rows: np.ndarray) -> np.float32:
            return np.float32(attend(head, rows_of(values, rows))[0])

        images = [self._images(place) for place in places]
        each = [mean_over_views(probability, self.row[i], self.views[i], average) for i in images]
        return np.array(each, np.float32)

    def _images(self, place: int) -> slice:
        start = int(self.size[:place].sum())
        return slice(start, start + int(self.size[place]))


def read_task_data(task: Task, backbones: Mapping[str, Any]) -> TaskData:
    """Read the data of a task from the outs of `download`, `split` and `bottleneck` in the working folder.

    Args:
        task: a value of `tasks` in params.yaml.
        backbones: of params.yaml.

    Raises:
        FeaturesError: features are missing.
        TuneError: of `make_task_data`.
    """
    images = task_items(read_table(Path(f"dataset/{task.images}s.csv")), task.images)
    items = task_items(images, task.level)
    label = task_labels(items, task)
    folds = read_table(Path("splits/folds.csv"))
    features = read_features(Path(f"features/{task.images}"), backbones)
    if task.level == "patient":
        return make_patient_task_data(images, items, label, folds, features)
    return make_task_data(items, label, folds, features)


def make_task_data(
    items: pd.DataFrame, label: np.ndarray, folds: pd.DataFrame, features: Mapping[str, Features]
) -> TaskData:
    """Bring together cells or smears, their labels, folds and features.

    Args:
        items: ``item, patient`` of every cell or smear.
        label: int8 (items,), of `aplsmear.data.tasks.task_labels`.
        folds: ``splits/folds.csv``.
        features: of `aplsmear.features.store.read_features`.

    Raises:
        TuneError: features are missing or belong to other items, or too few folds have both classes.
    """
    rows = _rows(items, features)
    task_data = TaskData(
        table=_with_folds(items, folds),
        label=label,
        row=rows["row"].to_numpy(),
        views=rows["views"].to_numpy(),
        features=features,
        folds=int(folds["fold"].max()) + 1,
    )
    _check_classes(task_data)
    return task_data


def make_patient_task_data(
    cells: pd.DataFrame,
    patients: pd.DataFrame,
    label: np.ndarray,
    folds: pd.DataFrame,
    features: Mapping[str, Features],
) -> PatientTaskData:
    """Bring together patients, their labels and folds, their cells and the features of these.

    Args:
        cells: ``item, patient`` of every cell.
        patients: ``item, patient`` (both the patient's name) of every patient who has cells.
        label: int8 (patients,), of `aplsmear.data.tasks.task_labels`.
        folds: ``splits/folds.csv``.
        features: of the cells, of `aplsmear.features.store.read_features`.

    Raises:
        TuneError: as by `make_task_data`.
    """
    rows = _rows(cells, features).reset_index(drop=True)
    rows = rows.assign(item=cells["item"].astype(str).to_numpy(), patient=cells["patient"].to_numpy())
    rows = rows.sort_values(["patient", "item"], ignore_index=True)
    order = np.argsort(patients["patient"].to_numpy(), kind="stable")
    task_data = PatientTaskData(
        table=_with_folds(patients.iloc[order], folds),
        label=label[order],
        row=rows["row"].to_numpy(),
        views=rows["views"].to_numpy(),
        features=features,
        folds=int(folds["fold"].max()) + 1,
        cell=rows["item"].to_numpy(),
        size=rows.groupby("patient").size().to_numpy(),
    )
    _check_classes(task_data)
    return task_data


def _rows(items: pd.DataFrame, features: Mapping[str, Features]) -> pd.DataFrame:
    """Of each item: ``row`` of its plain view in the features, and ``views``, the augmented ones after it."""
    if not features:
        raise TuneError("there are no features; `dvc repro bottleneck` makes them")
    index = next(iter(features.values())).index
    for other in features.values():
        if not other.index.equals(index):
            raise TuneError(f"the features {other.name} are of other views; run `dvc repro bottleneck` again")
    plain = np.flatnonzero(index["view"] == 0)
    found = {"row": plain, "views": np.diff(plain, append=len(index)) - 1}
    rows = pd.DataFrame(found, index=index["item"].iloc[plain])
    if not rows.index.equals(pd.Index(items["item"])):
        raise TuneError("the features are not those of this data set; run `dvc repro bottleneck` again")
    return rows


def _with_folds(items: pd.DataFrame, folds: pd.DataFrame) -> pd.DataFrame:
    """``item, patient, fold``."""
    fold = items["patient"].map(folds.set_index("patient")["fold"])
    return items[["item", "patient"]].assign(fold=fold.astype(np.int64)).reset_index(drop=True)


def _random_rank(names: Iterable[str], groups: pd.DataFrame, seed: int) -> np.ndarray:
    """The rank of each name within its group (equal rows of `groups`), in random order: int64, from 0."""
    lot = np.fromiter((hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names), "S32")
    order = groups.iloc[np.argsort(lot, kind="stable")]
    return np.asarray(order.groupby(list(groups.columns)).cumcount().sort_index())


def _check_classes(task_data: TaskData) -> None:
    """Each head needs both classes to train on, and each outer fold an inner fold with both classes.

    Raises:
        TuneError: some would not have them.
    """
    fold, label = task_data.table["fold"].to_numpy(), task_data.label
    counts = {
        name: np.bincount(fold[label == value], minlength=task_data.folds)
        for name, value in (("positive", 1), ("negative", 0))
    }
    has = np.array(list(counts.values())) > 0
    if has.all(axis=0).sum() >= 2 and (has.sum(axis=1) >= 3).all():
        return
    listed = {name: ", ".join(f"fold {f}: {n}" for f, n in enumerate(each)) for name, each in counts.items()}
    raise TuneError(
        "at least three folds must have positive items, three negative ones, and two both. Positive items, "
        f"{listed['positive']}; negative items, {listed['negative']}. "
        "Add labelled items, lower split.folds, or remove the task from `tasks` and `ensembles`."
    )
