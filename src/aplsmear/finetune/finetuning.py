"""Finetuning one task: how long to train is decided by inner folds, what comes of it is told by outer ones.

The head was trained first, on bottleneck features, by `tune`. It starts here as it is, so that epoch 0 is the
frozen model. In the first epoch others may join it (`finetune.head`): trained on features too, from first
weights of their own, but to tell more kinds of items apart than the task asks for. Few items are sought, and
what the others are teaches more than that they are not. (A head that goes on from the tuned one learns less
of that: it fits its patients already.) They may see the middle of each feature map alone, where the cell is
(`finetune.head.centre_crop`), while the tuned one sees all of it. The mean of all is the head from here on.
Then it and the uppermost blocks train together. In each outer fold of `aplsmear.evaluation.splits`::

    inner    without folds w and j, judged on j after every epoch, until j gains nothing for some epochs
    outer    without fold w, for as many epochs as do best on the mean of its inner folds: scores fold w
    final    on everybody, for the mean of the outer models' epochs: this one is kept

Epoch 0 is a candidate like any other: where the inner folds gain nothing, an outer fold stays with the frozen
model by this rule, and the record says so. One inner fold is a dozen patients, and hardly a judge: with
several (`finetune.inner_folds`) fewer outer folds go wrong by chance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from aplsmear.evaluation.auroc import auroc, average_precision
from aplsmear.evaluation.intervals import bootstrap_interval
from aplsmear.evaluation.operating_points import operating_points
from aplsmear.evaluation.splits import HeldOut, outer_set
from aplsmear.features import backbones
from aplsmear.finetune import network as unfreezing
from aplsmear.finetune import training
from aplsmear.finetune.explain import draw, grad_cam, occlusion
from aplsmear.finetune.network import divide
from aplsmear.finetune.training import (
    Course,
    FinetuneError,
    Kinds,
    Run,
    Store,
    Trainer,
    make_store,
    middles_of,
)
from aplsmear.heads.head import Head, Job, Recipe, read_heads, write_heads
from aplsmear.heads.search import study_key
from aplsmear.heads.stack import judge_heads, train_heads
from aplsmear.heads.task_data import TaskData
from aplsmear.images.reading import decode, fitting
from aplsmear.images.view_store import read_views
from aplsmear.params import Backbone, Finetune, Level, Tune

TUNED = "tuned"  # in place of a trial
WITHOUT_EFFECT = {"log_model", "log_images", "pictures"}  # settings that change no model
BATCH = 64  # views of one forward pass of the frozen part


@dataclass(frozen=True)
class Start:
    """Where an outer fold starts: the trial that `tune` chose, and the head that scores its patients."""

    outer_fold: int  # the outer fold; as many as there are folds: the final model
    trial: int
    recipe: Recipe
    epochs: int  # that the head has trained
    head: Head | None  # None: not trained yet


@dataclass(frozen=True)
class Deepened:
    """What an outer fold came to."""

    start: Start
    epochs: int  # 0: the frozen model
    courses: Mapping[str, Course]  # of its inner models, by name
    weights: list[np.ndarray]  # of the part of its network that trains


def starts(
    best: Mapping[str, Any], trials: pd.DataFrame, trained: Sequence[Head], picked: int | str
) -> list[Start]:
    """What each outer fold starts from, the final one last.

    Args:
        best: ``tuned/<task>/best.yaml``.
        trials: ``tuned/<task>/trials.csv``.
        trained: ``tuned/<task>/heads.npz``: the head of each outer fold.
        picked: ``tuned``, or a trial chosen by hand for the final model; held-out patients keep theirs, since
            a hand that has looked at all patients must not choose for them.

    Raises:
        FinetuneError: there is no such trial with scores.
    """
    rows = {row["trial"]: row for row in trials.to_dict("records")}
    sound = [number for number, row in rows.items() if not row["failure"]]
    final = len(trained) - 1
    number = {outer_fold: int(best["chosen_without_fold"][outer_fold]) for outer_fold in range(final)}
    number[final] = int(best["trial"] if picked == TUNED else picked)
    if number[final] not in sound:
        raise FinetuneError(
            f"finetune.trial: there is no trial {picked} with scores; there are: {', '.join(map(str, sound))}"
        )
    as_tuned = number[final] == int(best["trial"])
    return [
        Start(
            outer_fold,
            trial,
            _recipe(rows[trial]),
            int(rows[trial]["trained_epochs"]),
            trained[outer_fold] if outer_fold < final or as_tuned else None,
        )
        for outer_fold, trial in number.items()
    ]


class FinetuneContext:
    """Builds what training needs, each once: networks by shape of head, stores by features."""

    def __init__(
        self,
        task_data: TaskData,
        settings: Finetune,
        tune: Tune,
        networks: Mapping[str, Backbone],
        level: Level,
        views: Path,
        light: float,
        seed: int,
        kind: np.ndarray | None = None,
        strategy: Any = None,
    ) -> None:
        """Keep the parts.

        Args:
            task_data: items and features of the task.
            settings: of the training.
            tune: how the heads were trained.
            networks: the backbones by name.
            level: of the task.
            views: file of the level's views.
            light: see `Trainer`.
            seed: of all that is random.
            kind: str (items of the board,): what the head learns to tell apart within either class; None: no
                more than the classes.
            strategy: see `Trainer`.
        """
        self.task_data, self.settings, self.tune, self.level = task_data, settings, tune, level
        self.folder, self.seed = Path(), seed  # `folder` gets what must survive a kill
        self.items = task_data.training_items(tune.items_per_patient, seed)
        self.kinds = _kinds(task_data, task_data.training_places(tune.items_per_patient, seed), kind)
        self.networks, self._views, self._light, self._strategy = networks, views, light, strategy
        self._tuners: dict[tuple[Any, ...], Trainer] = {}
        self._stores: dict[str, Store] = {}

    def trainer(self, recipe: Recipe) -> Trainer:
        """The network for heads of this recipe."""
        head = self.settings.head
        width = recipe.width * self.tune.restarts  # of a mean of heads
        recipe = replace(recipe, width=width, dropout=head.dropout or recipe.dropout)
        key = (
            recipe.features,
            recipe.depth,
            recipe.depth and recipe.width,
            recipe.activation,
            recipe.dropout,
        )
        if key not in self._tuners:
            name, layer = recipe.features.split("/")
            channels = self.task_data.features[recipe.features].values.shape[1]
            self._tuners[key] = Trainer(
                lambda: divide(
                    self.networks[name],
                    self.level,
                    layer,
                    recipe,
                    channels,
                    self.settings.blocks,
                    self.seed,
                    self.kinds.count,
                    (head.members, head.units) if head.epochs else (0, 0),
                    head.centre_crop if head.epochs else 1.0,
                ),
                self.settings,
                self._light,
                self._strategy,
            )
        return self._tuners[key]

    def store(self, recipe: Recipe) -> Store:
        """What the networks of this recipe's features read."""
        if recipe.features not in self._stores:
            network, folder = self.trainer(recipe).network, self.folder / recipe.features
            store = make_store(
                folder,
                read_views(self._views, BATCH),
                self._wanted(),
                network,
                self.size(recipe),
                self.settings.online,
            )
            if network.middles is None:
                values, row = self.task_data.features[recipe.features].values, np.arange(len(store.place))
            else:
                values, row = middles_of(folder / "middles.npy", store, network), store.place
            self._stores[recipe.features] = replace(store, features=lambda views: values[row[views]])
        return self._stores[recipe.features]

    def size(self, recipe: Recipe) -> int:
        """Pixels of the images that the networks of this recipe take."""
        return self.networks[recipe.features.split("/")[0]].input_size[self.level]

    def begin(self, recipe: Recipe, head: Head, held_out: HeldOut) -> Trainer:
        """The network of this recipe as the frozen model, standardised by whom the head has seen."""
        trainer, store = self.trainer(recipe), self.store(recipe)
        shown = np.sort(self.items.row[~np.isin(self.items.fold, sorted(held_out))])
        seen = [self.task_data.features[recipe.features].values[shown]]
        if trainer.network.middles is not None and store.features is not None:
            seen.append(store.features(shown))
        mean = np.concatenate([values.mean(axis=0, dtype=np.float64) for values in seen])
        deviations = [values.std(axis=0, dtype=np.float64) for values in seen]
        # A channel that hardly moves is not blown up to the size of the others.
        scale = np.concatenate([each + 0.05 * each.mean() + 1e-6 for each in deviations])
        trainer.start(head, mean.astype(np.float32), scale.astype(np.float32))
        return trainer

    def views_of(self, items: np.ndarray) -> list[np.ndarray]:
        """The views over which the scores of some items are averaged."""
        task_data = self.task_data
        return [
            task_data.row[items] + np.minimum(v, task_data.views[items]) for v in range(self.tune.average + 1)
        ]

    def _wanted(self) -> np.ndarray:
        """Which views are read at all: bool (views,)."""
        task_data, items = self.task_data, self.items
        wanted = np.zeros(int((task_data.views + 1).sum()), bool)
        last = np.minimum(self.settings.views * items.copies, items.views)
        for row, count in zip(items.row, last, strict=True):
            wanted[row : row + count + 1] = True
        for views in self.views_of(np.flatnonzero(task_data.label >= 0)):
            wanted[views] = True
        return wanted


def inner_folds(outer_fold: int, task_data: TaskData, count: int) -> list[int]:
    """The inner folds that decide for a world: the next ones that have both classes, at most so many."""
    fold = task_data.table["fold"].to_numpy()
    others = [(outer_fold + step) % task_data.folds for step in range(1, task_data.folds)]
    both = [j for j in others if {0, 1} <= set(task_data.label[fold == j].tolist())]
    return both[:count]


def deepen(
    context: FinetuneContext, found: Sequence[Start], done: list[Deepened]
) -> Iterator[tuple[Run, Course]]:
    """Train every model: the inner ones of each outer fold, its outer one, at last the final one.

    Args:
        context: what they are trained with.
        found: of `starts`.
        done: gets the outer folds that were asked for (`finetune.folds`), and the final model.

    Yields:
        Every run and its course so far, after every epoch and at least once.
    """
    *outer_folds, final = found
    outer_folds = outer_folds[: context.settings.folds or len(outer_folds)]
    runs = _inner_runs(outer_folds, context)
    heads = _heads(context, runs, final)
    for start in outer_folds:
        courses = {}
        for (of, run), head in zip(runs, heads, strict=False):
            if of.outer_fold == start.outer_fold:
                for course in _train(context, run, head):
                    courses[run.name] = course
                    yield run, course
        epochs = best_epoch(list(courses.values()))
        unseen = outer_set(start.outer_fold, context.task_data.folds)
        outer = Run(f"outer_{start.outer_fold}", start.recipe, unseen, None, epochs)
        for course in _train(context, outer, start.head or heads[-1]):
            yield outer, course
        done.append(Deepened(start, epochs, courses, context.trainer(start.recipe).weights()))
    epochs = _mean([each.epochs for each in done])
    last = Run("final", final.recipe, frozenset(), None, epochs)
    for course in _train(context, last, final.head or heads[-1]):
        yield last, course
    done.append(Deepened(final, epochs, {}, context.trainer(final.recipe).weights()))


def best_epoch(courses: Sequence[Course]) -> int:
    """After how many epochs the mean AUROC over inner folds is highest, the first of the best; a run that has
    stopped counts as it stopped."""
    longest = max((len(course.auroc) for course in courses), default=1)
    padded = [np.pad(course.auroc, (0, longest - len(course.auroc)), "edge") for course in courses]
    return int(np.argmax(np.mean(padded, axis=0))) if padded else 0


def with_weights(context: FinetuneContext, outer_fold: Deepened) -> Trainer:
    """The network of an outer fold, trained."""
    trainer = context.trainer(outer_fold.start.recipe)
    trainer.set_weights(outer_fold.weights)
    return trainer


def predict_held_out(context: FinetuneContext, done: Sequence[Deepened]) -> pd.DataFrame:
    """``item, patient, fold, label, probability`` of the labelled items of the outer folds, each by the model
    that never saw its fold."""
    task_data = context.task_data
    fold = task_data.table["fold"].to_numpy()
    probability = np.full(len(fold), np.nan)
    for outer_fold in done[:-1]:
        here = np.flatnonzero((task_data.label >= 0) & (fold == outer_fold.start.outer_fold))
        trainer, store = with_weights(context, outer_fold), context.store(outer_fold.start.recipe)
        each = [expit(trainer.logits(views, store).astype(np.float64)) for views in context.views_of(here)]
        probability[here] = np.mean(each, axis=0)
    scored = np.flatnonzero(~np.isnan(probability))
    columns = {"label": task_data.label[scored].astype(np.int64), "probability": probability[scored]}
    return task_data.table.iloc[scored].reset_index(drop=True).assign(**columns)


def compare(predictions: pd.DataFrame, frozen: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    """What metrics.json says: AUROC, that of the frozen model on the same items, and the difference.

    Args:
        predictions: of `predict_held_out`.
        frozen: ``tuned/<task>/predictions.csv``; may have further items.
        resamples: of patients, behind the intervals; the difference is taken within each resample.
        seed: of the resamples.
    """
    paired = predictions.merge(frozen[["item", "probability"]], on="item", suffixes=("", "_frozen"))
    if len(paired) != len(predictions):
        raise FinetuneError("tuned/ holds no scores of some items; run `dvc repro` on the stage `tune` again")
    label, patient = paired["label"], paired["patient"]
    scores, before = paired["probability"], paired["probability_frozen"]
    value = bootstrap_interval(auroc, label, scores, groups=patient, resamples=resamples, seed=seed)
    gain = bootstrap_interval(auroc, label, scores, before, groups=patient, resamples=resamples, seed=seed)
    return {
        "auroc": value.as_dict(),
        "frozen": {"auroc": auroc(label, before)},
        "difference": gain.as_dict(),
        "average_precision": average_precision(label, scores),
        "n_items": len(paired),
        "n_patients": int(patient.nunique()),
        "n_positive": int(label.sum()),
    }


def courses_table(done: Sequence[Deepened]) -> pd.DataFrame:
    """``run, epoch, loss, auroc`` of every inner model; the loss of epoch 0 is empty, nothing has trained."""
    rows = [
        {"run": name, "epoch": epoch, "loss": loss, "auroc": value}
        for outer_fold in done
        for name, course in outer_fold.courses.items()
        for epoch, (loss, value) in enumerate(zip([np.nan, *course.loss], course.auroc, strict=True))
    ]
    return pd.DataFrame(rows, columns=["run", "epoch", "loss", "auroc"])


def history_table(courses: pd.DataFrame) -> pd.DataFrame:
    """``epoch, auroc, loss``: the mean over the inner models; one that has stopped counts as it stopped."""
    wide = courses.pivot_table(index="epoch", columns="run", values=["auroc", "loss"], dropna=False).ffill()
    means: pd.DataFrame = wide.T.groupby(level=0).mean().T.reset_index()
    return means


def examples(predictions: pd.DataFrame, count: int) -> pd.DataFrame:
    """The clearest held-out hits and misses: rows of `predictions`, with their ``kind``.

    What counts as called positive in a fold is said by the other folds: their balanced operating point.

    Args:
        predictions: of `predict_held_out`.
        count: of each kind: true and false positives and negatives; fewer where there are not so many.
    """
    threshold = {}
    for fold in predictions["fold"].unique():
        others = predictions[predictions["fold"] != fold]
        if others["label"].nunique() < 2:  # one outer fold was asked for
            others = predictions
        points = operating_points(others["label"], others["probability"])
        threshold[fold] = points["balanced"]
    called = predictions["probability"] >= predictions["fold"].map(threshold)
    chosen = []
    for kind, label, positive in (
        ("true_positive", 1, True),
        ("false_positive", 0, True),
        ("false_negative", 1, False),
        ("true_negative", 0, False),
    ):
        mine = predictions[(predictions["label"] == label) & (called == positive)]
        order = mine.sort_values(["probability", "item"], ascending=[not positive, True])
        chosen.append(order.head(count).assign(kind=kind))
    return pd.concat(chosen, ignore_index=True)


def write_explanations(
    context: FinetuneContext,
    done: Sequence[Deepened],
    chosen: pd.DataFrame,
    pictures: Mapping[str, bytes],
    folder: Path,
) -> None:
    """Draw what the model of each item's fold looks at: ``<kind>_<number>.png``.

    Args:
        context: of `deepen`.
        done: of `deepen`.
        chosen: of `examples`.
        pictures: the encoded plain view of each item.
        folder: is emptied first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    models = {outer_fold.start.outer_fold: outer_fold for outer_fold in done}
    number = chosen.groupby("kind").cumcount() + 1
    for row, place in zip(chosen.to_dict("records"), number, strict=True):
        model = models[int(row["fold"])]
        image = fitting(decode(pictures[row["item"]]), context.size(model.start.recipe))
        kind = row["kind"].replace("_", " ")
        title = f"{kind}: {row['item']}, held-out probability {row['probability']:.3f}"
        draw(
            folder / f"{row['kind']}_{place}.png", image, *explain(with_weights(context, model), image), title
        )


def explain(trainer: Trainer, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Occlusion (patches of a sixth of the side, half over one another) and Grad-CAM of a network.

    Args:
        trainer: with the weights to explain.
        image: uint8 (size, size, 3).

    Returns:
        Of `aplsmear.finetune.explain.occlusion` and `aplsmear.finetune.explain.grad_cam`.
    """
    network = trainer.network
    patch = max(image.shape[0] // 6, 2)

    def maps(images: Any) -> Any:
        return network.maps(network.trunk(images, training=False), training=False)

    occluded = occlusion(trainer.probabilities, image, patch, patch // 2)
    return occluded, grad_cam(maps, network.judge, image)


def final_model(context: FinetuneContext, final: Deepened) -> Any:
    """keras.Model: uint8 (batch, size, size, 3) -> probability (batch, 1)."""
    return with_weights(context, final).network.whole


def finetune_key(context: FinetuneContext, found: Sequence[Start], threads: int) -> str:
    """A name for the work by all that it depends on: other inputs or code, another name."""
    digest = hashlib.sha256(study_key(context.task_data, context.tune, context.seed).encode())
    networks = {name: each.model_dump() for name, each in context.networks.items()}
    versions = [version(package) for package in ("tensorflow", "keras")]
    told = [context.settings.model_dump(exclude=WITHOUT_EFFECT), networks, versions, threads]
    digest.update(json.dumps(told, sort_keys=True).encode())
    for module in (backbones, training, unfreezing):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(context.kinds.of.tobytes() + context.kinds.patient.tobytes())
    for start in found:
        digest.update(repr((start.outer_fold, start.trial, start.recipe)).encode())
        for array in (*start.head.kernels, *start.head.biases) if start.head else ():
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _kinds(task_data: TaskData, place: np.ndarray, kind: np.ndarray | None) -> Kinds:
    """Of the items at these places of the table: each name within either class is a kind."""
    names = np.full(len(place), "") if kind is None else kind[place].astype(str)
    pairs = pd.MultiIndex.from_arrays([task_data.label[place].astype(np.int64), names])
    known = pairs.unique().sort_values()
    positive = int((known.get_level_values(0) == 1).sum())
    return Kinds(
        known.get_indexer(pairs).astype(np.int64),
        (len(known) - positive, positive),
        pd.factorize(task_data.table["patient"].iloc[place])[0].astype(np.int64),
    )


def _inner_runs(outer_folds: Sequence[Start], context: FinetuneContext) -> list[tuple[Start, Run]]:
    return [
        (
            start,
            Run(f"inner_{start.outer_fold}_{j}", start.recipe, frozenset({start.outer_fold, j}), j, epochs),
        )
        for epochs in [context.settings.epochs]
        for start in outer_folds
        for j in inner_folds(start.outer_fold, context.task_data, context.settings.inner_folds)
    ]


def _train(context: FinetuneContext, run: Run, head: Head) -> Iterator[Course]:
    trainer = context.begin(run.recipe, head, run.held_out)
    kept = context.folder / f"{run.name}.npz"
    yield from trainer.train(run, context.items, context.kinds, context.store(run.recipe), context.seed, kept)


def _heads(context: FinetuneContext, runs: Sequence[tuple[Start, Run]], final: Start) -> list[Head]:
    """The head that each inner run starts from, trained on the features of its own patients for as long as
    its judged fold says; and the final one, if `tune` did not train it."""
    path = context.folder / "heads.npz"
    if not path.is_file():
        material = context.task_data.material(context.tune, context.seed)
        jobs = [Job(start.trial, run.recipe, run.held_out) for start, run in runs]
        judged = judge_heads(jobs, material, context.tune.patience)
        failures = [result.failure for result in judged if result.failure]
        if failures:
            raise FinetuneError("heads cannot be trained:\n  " + "\n  ".join(failures))
        jobs = [
            replace(job, epochs=result.epoch[run.judged])
            for job, (_, run), result in zip(jobs, runs, judged, strict=True)
            if run.judged is not None
        ]
        if final.head is None:
            jobs.append(Job(final.trial, final.recipe, frozenset(), final.epochs))
        write_heads(path, train_heads(jobs, material))
    return read_heads(path)


def _mean(epochs: Sequence[int]) -> int:
    return int(np.floor(np.mean(epochs) + 0.5)) if epochs else 0


def _recipe(row: Mapping[Any, Any]) -> Recipe:
    """That of a row of trials.csv, which is read as text."""
    kinds: dict[Any, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    return Recipe(**{field.name: kinds[field.type](row[field.name]) for field in fields(Recipe)})
