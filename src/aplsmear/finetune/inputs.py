"""What finetuning starts from: the data of the task, its settings, and the tuned head of each outer fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from pydantic import TypeAdapter

from aplsmear.errors import UserError
from aplsmear.finetune.sampling import TrainingSet
from aplsmear.heads.head import Head, Recipe, read_heads
from aplsmear.heads.task_data import TaskData, read_task_data
from aplsmear.params import Backbone, Finetune, Level, Task, Tune, of_backbones
from aplsmear.tables import read_table


@dataclass(frozen=True)
class Inputs:
    """The data and settings of a finetuning."""

    task_data: TaskData
    settings: Finetune
    tune: Tune  # how the heads were trained
    backbones: Mapping[str, Backbone]
    level: Level
    views: Path  # file with the views of the level
    brightness: float  # largest relative change of the brightness in online augmentation
    seed: int
    subclass: np.ndarray | None = None  # str (items of the task data,): label within the class; None: none

    @cached_property
    def training_set(self) -> TrainingSet:
        """The items that train. Each label within a class is a subclass."""
        most, task_data = self.tune.items_per_patient, self.task_data
        kept = task_data.training_places(most, self.seed)
        names = np.full(len(kept), "") if self.subclass is None else self.subclass[kept].astype(str)
        pairs = pd.MultiIndex.from_arrays([task_data.label[kept].astype(np.int64), names])
        found = pairs.unique().sort_values()
        positive = int((found.get_level_values(0) == 1).sum())
        return TrainingSet(
            items=task_data.training_items(most, self.seed),
            subclass=found.get_indexer(pairs).astype(np.int64),
            subclasses=(len(found) - positive, positive),
            patient=pd.factorize(task_data.table["patient"].iloc[kept])[0].astype(np.int64),
            seed=self.seed,
        )


@dataclass(frozen=True)
class Start:
    """Where an outer fold starts: the trial that `tune` chose, and its head."""

    outer_fold: int  # the number of folds: the final model
    trial: int
    recipe: Recipe
    epochs: int  # that the head was trained for
    head: Head | None  # None: `tune` has not trained it


def read_inputs(
    task: Task,
    settings: Finetune,
    tune: Tune,
    backbones: Mapping[str, Backbone],
    brightness: float,
    seed: int,
) -> Inputs:
    """Read the data of a task from the working folder. Arguments as in `Inputs`.

    Raises UserError if the items of the task are patients, and as `aplsmear.heads.task_data.make_task_data`.
    """
    if task.level == "patient":
        raise UserError(
            "finetuning needs one image for each item, and the items of this task are patients: set `task` "
            "in params.yaml to a task of cells or smears"
        )
    data, column = read_task_data(task, backbones), settings.head.subclasses
    subclass = read_table(Path(f"dataset/{task.level}s.csv"))[column].to_numpy() if column else None
    views = Path(f"augmented/{task.level}/views.parquet")
    return Inputs(data, settings, tune, backbones, task.level, views, brightness, seed, subclass)


def read_starts(tuned: Path, settings: Finetune) -> list[Start]:
    """The starts of `finetune.folds` outer folds and of the final model, from the folder of `tune`.

    A trial picked by hand serves the final model alone. Outer folds keep the trial that was chosen without
    their held-out patients, because the hand may have been guided by the scores of all patients.

    Raises UserError: there is no such trial, or it failed.
    """
    best = yaml.safe_load((tuned / "best.yaml").read_text(encoding="utf-8"))
    trials = read_table(tuned / "trials.csv").to_dict("records")
    rows = {row["trial"]: row for row in trials if not row["failure"]}
    *of_folds, tuned_head = read_heads(tuned / "heads.npz")
    last = int(best["trial"] if settings.trial == "tuned" else settings.trial)
    if last not in rows:
        known = ", ".join(map(str, rows))
        raise UserError(f"finetune.trial: there is no trial {last} with scores; there are: {known}")
    numbers = [*(int(best["chosen_without_fold"][fold]) for fold in range(len(of_folds))), last]
    recipes = [TypeAdapter(Recipe).validate_python(rows[trial]) for trial in numbers]
    epochs = [int(rows[trial]["trained_epochs"]) for trial in numbers]
    heads = [*of_folds, tuned_head if last == int(best["trial"]) else None]
    *outer_folds, final = map(Start, range(len(numbers)), numbers, recipes, epochs, heads)
    return [*outer_folds[: settings.folds or None], final]


def check_backbones(inputs: Inputs, starts: Sequence[Start]) -> None:
    """Raise a UserError unless the features of each start are of one backbone that can be trained."""
    trainable = [name for name, each in inputs.backbones.items() if each.source != "onnx"]
    for features in sorted({start.recipe.features for start in starts}):
        names = [part.split("/")[0] for part in of_backbones(features)]
        if len(names) > 1 or names[0] not in trainable:
            why = "several backbones" if len(names) > 1 else "an ONNX file, which is frozen"
            raise UserError(
                f"the chosen trial has the features {features}, of {why}: they cannot be trained. "
                f"These backbones can: {', '.join(trainable) or 'none in params.yaml'}. Name layers of one "
                "of them in the row of the task in `overrides` (`space: {features: [...]}`), then `dvc repro`"
            )
