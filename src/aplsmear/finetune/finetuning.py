"""Finetuning of one task. Inner folds choose the number of epochs, outer folds measure the gain.

`tune` has trained the head on bottleneck features. Epoch 0 of finetuning is this frozen model. In the first
epoch, extra heads can be trained on features (`finetune.head`). They learn subclasses: positive items are
few, and the labels of negative items are a richer signal than "negative". They start from random weights,
because the tuned head already fits its patients. They can be limited to the centre crop of each feature map,
where the cell is. Tuned and extra heads are then averaged, and the average trains together with the uppermost
blocks. Outer fold w (see `aplsmear.evaluation.splits`) and the final model train these models::

    inner    without folds w and j: judged on fold j after every epoch, until its AUROC stops rising
    outer    without fold w, for the number of epochs with the best mean AUROC of its inner models: scores w
    final    on all patients, for the mean number of epochs of the outer models: this model is kept

Epoch 0 competes with the others. If the inner folds gain nothing, an outer fold keeps the frozen model. One
inner fold has few patients; several (`finetune.inner_folds`) choose more reliably.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from aplsmear.errors import UserError
from aplsmear.evaluation.splits import outer_set
from aplsmear.finetune.cache import ViewCache, cache_views
from aplsmear.finetune.inputs import Inputs, Start, check_backbones
from aplsmear.finetune.network import HeadDesign, Network, build_network
from aplsmear.finetune.sampling import Run
from aplsmear.finetune.training import History, Trainer
from aplsmear.heads.head import Head, Job, Recipe, read_heads, write_heads
from aplsmear.heads.search import study_key
from aplsmear.heads.stack import judge_heads, train_heads
from aplsmear.images.view_store import read_views
from aplsmear.runs.imports import code_hash

WITHOUT_EFFECT = {"log_model", "log_images", "pictures"}  # settings that change no model
BATCH = 64  # views of one forward pass of the frozen part


@dataclass(frozen=True)
class Trained:
    """A run, during training and after it."""

    run: Run
    history: History
    weights: list[np.ndarray]  # of the part that trains; empty for inner models

    @property
    def outer_fold(self) -> int | None:
        """The fold that this model scores; None for inner models and the final one."""
        return None if self.run.judged is not None else next(iter(self.run.held_out), None)


def build_trainers(inputs: Inputs, starts: Sequence[Start], folder: Path) -> dict[Recipe, Trainer]:
    """Build a network for the recipe of each start, and cache the views that it reads.

    The folder keeps what was computed, for networks on the same features and after a kill.

    Raises UserError as `cut_network` and `cache_views`, or if features of a start cannot be trained.
    """
    check_backbones(inputs, starts)
    recipes = dict.fromkeys(start.recipe for start in starts)
    return {recipe: _build_trainer(inputs, recipe, folder / recipe.features) for recipe in recipes}


def finetune(
    inputs: Inputs, starts: Sequence[Start], trainers: Mapping[Recipe, Trainer], folder: Path
) -> Iterator[Trained]:
    """Train all models: of each outer fold the inner ones and the outer one, and then the final one.

    The folder keeps the state of each run; an interrupted call continues from it.

    Yields:
        The run that trains, at its start and after every epoch.

    Raises UserError as `Trainer.train`, or if heads cannot be trained.
    """
    *outer_folds, final = starts
    plan = [(start, inner_runs(inputs, start)) for start in outer_folds]
    heads = _start_heads(inputs, plan, final, folder / "heads.npz")

    def train(run: Run, head: Head) -> Generator[Trained, None, History]:
        trainer = trainers[run.recipe]
        for history in trainer.train(run, head, folder / f"{run.name}.npz"):
            yield Trained(run, history, trainer.weights() if run.judged is None else [])
        return history

    epochs = []
    for start, runs in plan:
        histories = []
        for run in runs:
            histories.append((yield from train(run, heads[run.name])))
        epochs.append(best_epoch(histories))
        unseen = outer_set(start.outer_fold, inputs.task_data.folds)
        outer = Run(f"outer_{start.outer_fold}", start.recipe, unseen, None, epochs[-1])
        yield from train(outer, start.head or heads[outer.name])
    mean = int(np.floor(np.mean(epochs) + 0.5))
    last = Run("final", final.recipe, frozenset(), None, mean)
    yield from train(last, final.head or heads[last.name])


def inner_runs(inputs: Inputs, start: Start) -> list[Run]:
    """The runs that choose the epochs of an outer fold, each judged on a fold with both classes."""
    task_data, outer_fold = inputs.task_data, start.outer_fold
    fold = task_data.table["fold"].to_numpy()
    others = [(outer_fold + step) % task_data.folds for step in range(1, task_data.folds)]
    usable = [j for j in others if {0, 1} <= set(task_data.label[fold == j].tolist())]
    return [
        Run(f"inner_{outer_fold}_{j}", start.recipe, frozenset({outer_fold, j}), j, inputs.settings.epochs)
        for j in usable[: inputs.settings.inner_folds]
    ]


def best_epoch(histories: Sequence[History]) -> int:
    """The first epoch with the highest mean AUROC over inner folds; 0 without inner folds.

    A run that stopped earlier keeps its last AUROC.
    """
    longest = max((len(history.auroc) for history in histories), default=1)
    padded = [np.pad(each.auroc, (0, longest - len(each.auroc)), "edge") for each in histories]
    return int(np.argmax(np.mean(padded, axis=0))) if padded else 0


def with_weights(trainers: Mapping[Recipe, Trainer], trained: Trained) -> Trainer:
    """The network of a run, with the weights of this run. A later call may change them."""
    trainer = trainers[trained.run.recipe]
    trainer.set_weights(trained.weights)
    return trainer


def finetune_key(inputs: Inputs, starts: Sequence[Start], threads: int) -> str:
    """A name for stored work: a hash of all inputs, settings, versions and code that it depends on."""
    digest = hashlib.sha256(study_key(inputs.task_data, inputs.tune, inputs.seed).encode())
    backbones = {name: each.model_dump() for name, each in inputs.backbones.items()}
    settings = inputs.settings.model_dump(exclude=WITHOUT_EFFECT)
    code = [code_hash(Path(__file__)), version("tensorflow"), version("keras")]
    used = [settings, backbones, inputs.tune.restarts, inputs.brightness, threads, code]
    digest.update(json.dumps(used, sort_keys=True).encode())
    digest.update(inputs.training_set.subclass.tobytes())
    for start in starts:
        digest.update(repr((start.outer_fold, start.trial, start.recipe, start.epochs)).encode())
        for array in (*start.head.kernels, *start.head.biases) if start.head else ():
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _build_trainer(inputs: Inputs, recipe: Recipe, folder: Path) -> Trainer:
    """See `build_trainers`."""
    settings, head, task_data = inputs.settings, inputs.settings.head, inputs.task_data
    features = task_data.features[recipe.features].values
    # Heads of several restarts are averaged, which is one head with the units of all.
    wide = replace(recipe, width=recipe.width * inputs.tune.restarts, dropout=head.dropout or recipe.dropout)
    extra = (head.members, head.units, head.centre_crop) if head.epochs else ()
    design = HeadDesign(wide, features.shape[1], inputs.training_set.subclasses, *extra)
    backbone = inputs.backbones[recipe.features.split("/")[0]]

    def build() -> Network:
        return build_network(backbone, inputs.level, design, settings.blocks, inputs.seed)

    def cache(network: Network) -> ViewCache:
        batches, wanted = read_views(inputs.views, BATCH), _wanted_views(inputs)
        return cache_views(folder, batches, wanted, network, features, online=settings.online)

    return Trainer(build, cache, inputs.training_set, settings, inputs.brightness)


def _wanted_views(inputs: Inputs) -> np.ndarray:
    """Which views training and scoring read: bool (views of the level,)."""
    task_data, items = inputs.task_data, inputs.training_set.items
    wanted = np.zeros(int((task_data.views + 1).sum()), bool)
    shown = np.minimum(inputs.settings.views * items.copies, items.views)
    scored = np.minimum(inputs.tune.average, task_data.views)
    labelled = task_data.label >= 0
    for rows, counts in ((items.row, shown), (task_data.row[labelled], scored[labelled])):
        for row, count in zip(rows, counts, strict=True):
            wanted[row : row + count + 1] = True
    return wanted


def _start_heads(
    inputs: Inputs, plan: Sequence[tuple[Start, list[Run]]], final: Start, path: Path
) -> dict[str, Head]:
    """The heads that `tune` has not trained, by name of the run that starts from them.

    Those of inner runs train on the features of their own patients, for the number of epochs that is best on
    their judged fold.
    """
    pairs = [(start, run) for start, runs in plan for run in runs]
    names = [run.name for _, run in pairs] + (["final"] if final.head is None else [])
    if not path.is_file():
        material = inputs.task_data.material(inputs.tune, inputs.seed)
        jobs = [Job(start.trial, run.recipe, run.held_out) for start, run in pairs]
        judged = judge_heads(jobs, material, inputs.tune.patience)
        failures = [result.failure for result in judged if result.failure]
        if failures:
            raise UserError("heads cannot be trained:\n  " + "\n  ".join(failures))
        jobs = [
            replace(job, epochs=result.epoch[run.judged])
            for job, (_, run), result in zip(jobs, pairs, judged, strict=True)
            if run.judged is not None
        ]
        if final.head is None:  # a trial picked by hand
            jobs.append(Job(final.trial, final.recipe, frozenset(), final.epochs))
        write_heads(path, train_heads(jobs, material))
    return dict(zip(names, read_heads(path), strict=True))
