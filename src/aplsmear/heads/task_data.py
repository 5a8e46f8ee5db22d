"""The data of one task: its items, their labels and folds, and the features that heads read.

An item is what gets a label and a score: a cell, a smear or a patient. A cell or a smear is one image; a
patient is a bag of cells, one image each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from scipy.special import expit

from aplsmear.data.tasks import task_items, task_labels
from aplsmear.errors import UserError
from aplsmear.features.store import Features, read_features
from aplsmear.files import rows_of
from aplsmear.heads.bags import attend, attention_and_logits, gates_and_logits
from aplsmear.heads.head import Head, Recipe, TrainingItems, mean_over_views, parameters, score
from aplsmear.heads.stack import Material
from aplsmear.params import Task, Tune, of_backbones
from aplsmear.tables import as_written, read_table

_ATTENTION = {"cell": "str", "patient": "str", "fold": "int64", "attention": "float64", "score": "float64"}


@dataclass(frozen=True)
class TaskData:
    """All items of a task's level, and what is known of them."""

    table: pd.DataFrame  # item, patient, fold: one row an item, in the order of their features
    label: np.ndarray  # int8 (items,): 1, 0, or -1 for items that take no part in the task
    row: np.ndarray  # int64 (images,): the row of the image's plain view in the features
    views: np.ndarray  # int64 (images,): number of augmented views, in the rows after the plain one
    features: Mapping[str, Features]
    folds: int
    bags: ClassVar = False  # whether an item has many images

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
        joint = (name for name in settings.space.features if len(of_backbones(name)) > 1)
        values = {name: self.features[name].values for name in [*self.features, *joint]}
        items = self.training_items(settings.items_per_patient, seed)
        bag = settings.cells_per_step if self.bags else 1
        return Material(values, items, seed, settings.memory, bag, settings.restarts)

    def parameters(self, recipe: Recipe) -> int:
        """The number of weights of a head."""
        return parameters(recipe, self.features[recipe.features].values.shape[1], bags=self.bags)

    def score(self, head: Head, places: np.ndarray, average: int) -> np.ndarray:
        """Probabilities of the items in these rows of the table: float32 (places,).

        The scores of `average` augmented views are averaged with that of the plain view.
        """
        values = self.features[head.features].values
        row, views = self.row[places], self.views[places]
        return mean_over_views(lambda rows: score(head, values, rows), row, views, average)

    def attention(self, _heads: Sequence[Head], _average: int, /) -> pd.DataFrame:
        """``cell, patient, fold, attention, score`` of each cell; no rows if items are not patients.

        The head of the patient's fold never saw the patient; `_average` augmented views are averaged with the
        plain view. The attention adds up to 1 over the cells of a patient. The score is the probability of
        the cell alone. Both have the digits of a table.
        """
        return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in _ATTENTION.items()})


@dataclass(frozen=True)
class PatientTaskData(TaskData):
    """Items are patients; their images are cells. The cells of a patient stand together, sorted by name."""

    bags: ClassVar = True
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

    def score(self, head: Head, places: np.ndarray, average: int) -> np.ndarray:
        """Probabilities of the patients in these rows of the table, float32 (places,)."""
        values = self.features[head.features].values

        def probability(rows: np.ndarray) -> np.float32:
            return np.float32(attend(head, rows_of(values, rows))[0])

        ends = np.cumsum(self.size)
        images = [slice(ends[place] - self.size[place], ends[place]) for place in places]
        each = [mean_over_views(probability, self.row[i], self.views[i], average) for i in images]
        return np.array(each, np.float32)

    def attention(self, heads: Sequence[Head], average: int, /) -> pd.DataFrame:
        """As for `TaskData`."""
        found = np.zeros((2, len(self.cell)))
        ends = np.cumsum(self.size)
        for fold, end, size in zip(self.table["fold"], ends, self.size, strict=True):
            head, images = heads[fold], slice(end - size, end)
            values, row, views = self.features[head.features].values, self.row[images], self.views[images]
            rows = [row + np.minimum(view, views) for view in range(average + 1)]
            seen = [gates_and_logits(head, rows_of(values, each)) for each in rows]
            attention, logits = attention_and_logits(seen)
            found[:, images] = attention.mean(axis=(0, 2)), expit(logits.mean(axis=2)).mean(axis=0)
        numbers = [[as_written(value) for value in each] for each in found]
        patient, fold = (np.repeat(self.table[name].to_numpy(), self.size) for name in ("patient", "fold"))
        columns = [self.cell, patient, fold, *numbers]
        return pd.DataFrame(dict(zip(_ATTENTION, columns, strict=True))).astype(_ATTENTION)


def read_task_data(task: Task, backbones: Mapping[str, Any]) -> TaskData:
    """Read the data of a task from the outs of `download`, `split` and `bottleneck` in the working folder.

    Raises UserError if features are missing, and as `make_task_data`.
    """
    images = task_items(read_table(Path(f"dataset/{task.images}s.csv")), task.images)
    items = task_items(images, task.level)
    label = task_labels(items, task)
    folds = read_table(Path("splits/folds.csv"))
    features = read_features(Path(f"features/{task.images}"), backbones)
    return make_task_data(items, label, folds, features, images if task.level == "patient" else None)


def make_task_data(
    items: pd.DataFrame,
    label: np.ndarray,
    folds: pd.DataFrame,
    features: Mapping[str, Features],
    cells: pd.DataFrame | None = None,
) -> TaskData:
    """Bring together items, their labels (int8) of `task_labels`, ``splits/folds.csv`` and features.

    `items` are ``item, patient`` of every cell, smear or patient (with the same name in both columns);
    `cells` the same of every cell, if the items are patients.

    Raises UserError: features are missing or belong to other items, or too few folds have both classes.
    """
    images = _images(items if cells is None else cells, features)
    bags: dict[str, Any] = {}
    if cells is not None:
        images = images.sort_values(["patient", "item"])
        bags = {"cell": images["item"].to_numpy(), "size": images.groupby("patient").size().to_numpy()}
        order = np.argsort(items["patient"].to_numpy(), kind="stable")
        items, label = items.iloc[order], label[order]
    fold = items["patient"].map(folds.set_index("patient")["fold"]).astype(np.int64)
    task_data = (PatientTaskData if bags else TaskData)(
        table=items[["item", "patient"]].assign(fold=fold).reset_index(drop=True),
        label=label,
        row=images["row"].to_numpy(),
        views=images["views"].to_numpy(),
        features=features,
        folds=int(folds["fold"].max()) + 1,
        **bags,
    )
    _check_classes(task_data)
    return task_data


def _images(items: pd.DataFrame, features: Mapping[str, Features]) -> pd.DataFrame:
    """``item, patient``, ``row`` of the plain view in the features, and number of ``views`` after it."""
    if not features:
        raise UserError("there are no features; `dvc repro bottleneck` makes them")
    index = next(iter(features.values())).index
    for other in features.values():
        if not other.index.equals(index):
            raise UserError(f"the features {other.name} are of other views; run `dvc repro bottleneck` again")
    plain = np.flatnonzero(index["view"] == 0)
    if index["item"].iloc[plain].tolist() != items["item"].tolist():
        raise UserError("the features are not those of this data set; run `dvc repro bottleneck` again")
    views = np.diff(plain, append=len(index)) - 1
    return items[["item", "patient"]].assign(row=plain, views=views)


def _random_rank(names: Iterable[str], groups: pd.DataFrame, seed: int) -> np.ndarray:
    """The rank of each name within its group (equal rows of `groups`), in random order: int64, from 0."""
    lot = np.fromiter((hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names), "S32")
    order = groups.iloc[np.argsort(lot, kind="stable")]
    return np.asarray(order.groupby(list(groups.columns)).cumcount().sort_index())


def _check_classes(task_data: TaskData) -> None:
    """Each head needs both classes to train on, and each outer fold an inner fold with both classes."""
    fold, label = task_data.table["fold"].to_numpy(), task_data.label
    counts = [np.bincount(fold[label == value], minlength=task_data.folds) for value in (1, 0)]
    has = np.array(counts) > 0
    if has.all(axis=0).sum() >= 2 and (has.sum(axis=1) >= 3).all():
        return
    positive, negative = (", ".join(f"fold {f}: {n}" for f, n in enumerate(each)) for each in counts)
    raise UserError(
        "Positive items must be in at least three folds, negative items in at least three, and both together "
        f"in at least two. Positive items: {positive}. Negative items: {negative}. "
        "Add labelled items, lower split.folds, or remove the task from `tasks` and `ensembles`."
    )
