"""The search over heads: which trial each outer fold chooses, and the held-out scores that follow.

Candidates are drawn before any score is known (random search), so that one study serves every outer fold of
`aplsmear.evaluation.splits` without a leak: what steers the search for an outer fold never saw its held-out
patients. (A sampler that learns from scores would need a study of its own for every outer fold.) Every trial
is trained once for each pair of folds {w, j}: judged on j it serves outer fold w, judged on w it serves outer
fold j. World w then compares the trials, and finds out how long to train, by its own inner folds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aplsmear.errors import UserError
from aplsmear.evaluation.auroc import auroc, auroc_within_folds, average_precision
from aplsmear.evaluation.intervals import bootstrap_interval
from aplsmear.evaluation.splits import inner_sets, outer_set, tuning_sets
from aplsmear.features.store import Features
from aplsmear.files import give_back, rows_of
from aplsmear.heads.bags import attend, bag_parameters, judge_bags, train_bags
from aplsmear.heads.head import Head, Job, Recipe, TrainingItems, parameters, score
from aplsmear.heads.stack import Judged, Material, judge_heads, train_heads
from aplsmear.heads.study import Record, Study
from aplsmear.params import Range, Tune, nearest
from aplsmear.runs.imports import code_hash

Judge = Callable[[Sequence[Job], Material, int], list[Judged]]
POLL = 0.5  # seconds between two looks at what other workers have finished
WITHOUT_EFFECT = {"pick", "storage", "restarts"}  # settings that change no trial


class TuneError(UserError, ValueError):
    """A task that cannot be tuned as asked."""


@dataclass(frozen=True)
class Trial:
    """A candidate and how it did on each inner fold (columns) of each outer fold (rows).

    At [w, j] stands what the head that saw neither w nor j did on j; NaN (and 0 epochs) on the diagonal, and
    everywhere if the trial failed; NaN where j lacks a class. The last outer fold uses every entry.
    """

    number: int
    recipe: Recipe
    inner: np.ndarray  # float64 (folds, folds): AUROC
    best_epoch: np.ndarray  # int64 (folds, folds): after how many epochs
    parameters: int
    failure: str = ""  # why there are no scores
    started: float = 0.0  # seconds since 1970
    ended: float = 0.0

    def auroc(self, outer_fold: int) -> float:
        """Mean inner AUROC in an outer fold."""
        return float(np.nanmean(self._seen(self.inner, outer_fold))) if not self.failure else np.nan

    def standard_error(self, outer_fold: int) -> float:
        """Standard error of that mean over the outer fold's inner folds (0 with a single one)."""
        seen = self._seen(self.inner, outer_fold)
        seen = seen[~np.isnan(seen)]
        return float(seen.std(ddof=1) / np.sqrt(len(seen))) if len(seen) > 1 else 0.0

    def by_fold(self) -> list[float]:
        """AUROC on each fold: the mean over the heads that judged it."""
        return [float(value) for value in self._seen(self.inner, len(self.inner))]

    def epochs(self, outer_fold: int) -> int:
        """How long the heads of an outer fold train: the mean of the best epochs on its inner folds."""
        known = np.where(self.best_epoch > 0, self.best_epoch, np.nan)
        return max(int(np.floor(np.nanmean(self._seen(known, outer_fold)) + 0.5)), 1)

    def _seen(self, values: np.ndarray, outer_fold: int) -> np.ndarray:
        """One value an inner fold of the outer fold; in the last outer fold, a fold's mean over the heads
        that judged it."""
        folds = len(values)
        if outer_fold < folds:
            return np.delete(values[outer_fold], outer_fold)
        columns = [np.delete(values[:, j], j) for j in range(folds)]
        return np.array([np.nan if np.isnan(column).all() else np.nanmean(column) for column in columns])


@dataclass(frozen=True)
class TaskData:
    """All that the study of one task works on. An item is a cell or a smear, one image."""

    table: (
        pd.DataFrame
    )  # every item of the level: item, patient, fold; in the order of the features' plain views
    label: np.ndarray  # int8 (items,): 1, 0, or -1 for items without a part in the task
    row: np.ndarray  # int64 (images,): the row of the image's plain view in the features; an image is an item
    views: np.ndarray  # int64 (images,): augmented views that follow it
    features: Mapping[str, Features]
    folds: int

    def training_places(self, per_patient: int, seed: int) -> np.ndarray:
        """The places in the table of the labelled items that train, at most `per_patient` of each class from
        one patient, chosen by a hash of their name: int64, in order."""
        classes = pd.DataFrame({"patient": self.table["patient"], "label": self.label})
        place = _drawn(self.table["item"], classes, seed)
        return np.flatnonzero((self.label >= 0) & (place < per_patient))

    def training_items(self, per_patient: int, seed: int) -> TrainingItems:
        """The items of `training_places`."""
        kept = self.training_places(per_patient, seed)
        least = max(int(self.views.min()), 1)
        return TrainingItems(
            row=self.row[kept],
            views=self.views[kept],
            copies=np.maximum(self.views[kept] // least, 1),
            label=self.label[kept],
            fold=self.table["fold"].to_numpy()[kept],
        )

    def material(self, settings: Tune, seed: int) -> Material:
        """What heads are trained on."""
        values = {name: each.values for name, each in self.features.items()}
        items = self.training_items(settings.items_per_patient, seed)
        return Material(values, items, seed, settings.memory, restarts=settings.restarts)

    def parameters(self, recipe: Recipe) -> int:
        """The number of weights of a head."""
        return parameters(recipe, self.features[recipe.features].values.shape[1])

    def judge(self, jobs: Sequence[Job], material: Material, patience: int) -> list[Judged]:
        """How heads do on each of their held-out folds."""
        return judge_heads(jobs, material, patience)

    def train(self, jobs: Sequence[Job], material: Material) -> list[Head]:
        """Heads, trained for good."""
        return train_heads(jobs, material)

    def score(self, head: Head, places: np.ndarray, view: int) -> np.ndarray:
        """Probabilities of the items at these places of the table, float32 (places,), by this view of each
        image (or its last)."""
        rows = self.row[places] + np.minimum(view, self.views[places])
        return np.asarray(score([head], self.features[head.features].values, rows)[0])


@dataclass(frozen=True)
class PatientBoard(TaskData):
    """A board whose items are patients: bags of cells, which are its images.

    The cells of a patient stand together, sorted by name, so that the order of the tables does not matter.
    """

    cell: np.ndarray  # str (images,): names
    size: np.ndarray  # int64 (items,): how many cells a patient has, at least one

    def training_items(self, per_patient: int, seed: int) -> TrainingItems:
        """The labelled patients, with at most `per_patient` cells of each, chosen by a hash of their name."""
        owner = np.repeat(np.arange(len(self.size)), self.size)
        place = _drawn(self.cell, pd.DataFrame({"patient": owner}), seed)
        images = np.flatnonzero((self.label[owner] >= 0) & (place < per_patient))
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
        """What heads are trained on."""
        return replace(super().material(settings, seed), bag=settings.cells_per_step)

    def parameters(self, recipe: Recipe) -> int:
        """The number of weights of a head."""
        return bag_parameters(recipe, self.features[recipe.features].values.shape[1])

    def judge(self, jobs: Sequence[Job], material: Material, patience: int) -> list[Judged]:
        """How heads do on each of their held-out folds."""
        return judge_bags(jobs, material, patience)

    def train(self, jobs: Sequence[Job], material: Material) -> list[Head]:
        """Heads, trained for good."""
        return train_bags(jobs, material)

    def score(self, head: Head, places: np.ndarray, view: int) -> np.ndarray:
        """Probabilities of the patients at these places of the table, float32 (places,)."""
        return np.array([self.attend(head, place, view)[0] for place in places], np.float32)

    def attend(self, head: Head, place: int, view: int = 0) -> tuple[float, pd.DataFrame]:
        """What a head says of one patient, and how much it looked at each cell.

        Args:
            head: on bags.
            place: of the patient in the table.
            view: of each cell, or its last where it has fewer.

        Returns:
            The probability, and ``item, attention``: all cells of the patient.
        """
        start = int(self.size[:place].sum())
        mine = slice(start, start + int(self.size[place]))
        rows = self.row[mine] + np.minimum(view, self.views[mine])
        probability, attention = attend(head, rows_of(self.features[head.features].values, rows))
        return probability, pd.DataFrame({"item": self.cell[mine], "attention": attention})


@dataclass(frozen=True)
class Choice:
    """The trial of an outer fold, and why."""

    trial: Trial
    why: str


def make_task_data(
    items: pd.DataFrame, label: np.ndarray, folds: pd.DataFrame, features: Mapping[str, Features]
) -> TaskData:
    """Bring together the cells or smears, their labels, folds and features.

    Args:
        items: ``item, patient`` of every cell or smear.
        label: int8 (items,), of `aplsmear.data.tasks.task_labels`.
        folds: ``splits/folds.csv``.
        features: of `aplsmear.features.store.read_features`.

    Raises:
        TuneError: features are missing, or are not those of these items; or too few folds have both classes.
    """
    rows = _rows(items, features)
    task_data = TaskData(
        table=_with_folds(items, folds),
        label=label,
        row=rows["min"].to_numpy(),
        views=rows["size"].to_numpy() - 1,
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
) -> PatientBoard:
    """Bring together patients, their labels and folds, their cells and the features of these.

    Args:
        cells: ``item, patient`` of every cell.
        patients: ``item, patient``, twice the name, of every patient who has cells.
        label: int8 (patients,), of `aplsmear.data.tasks.task_labels`.
        folds: ``splits/folds.csv``.
        features: of cells, of `aplsmear.features.store.read_features`.

    Raises:
        TuneError: as by `make_task_data`.
    """
    rows = _rows(cells, features).reset_index(drop=True)
    rows = rows.assign(item=cells["item"].astype(str).to_numpy(), patient=cells["patient"].to_numpy())
    order = np.argsort(patients["patient"].to_numpy(), kind="stable")
    rows = rows.sort_values(["patient", "item"], ignore_index=True)
    task_data = PatientBoard(
        table=_with_folds(patients.iloc[order], folds),
        label=label[order],
        row=rows["min"].to_numpy(),
        views=rows["size"].to_numpy() - 1,
        features=features,
        folds=int(folds["fold"].max()) + 1,
        cell=rows["item"].to_numpy(),
        size=rows.groupby("patient").size().to_numpy(),
    )
    _check_classes(task_data)
    return task_data


def _rows(items: pd.DataFrame, features: Mapping[str, Features]) -> pd.DataFrame:
    """``min``, the row of each item's plain view in the features, and ``size``, how many views it has."""
    if not features:
        raise TuneError("there are no features; `dvc repro bottleneck` makes them")
    index = next(iter(features.values())).index
    for other in features.values():
        if not other.index.equals(index):
            raise TuneError(f"the features {other.name} are of other views; run `dvc repro bottleneck` again")
    plain = np.flatnonzero(index["view"] == 0)  # an item's augmented views follow
    found = {"min": plain, "size": np.diff(plain, append=len(index))}
    rows = pd.DataFrame(found, index=index["item"].iloc[plain])
    if not rows.index.equals(pd.Index(items["item"])):
        raise TuneError("the features are not those of this data set; run `dvc repro bottleneck` again")
    return rows


def _with_folds(items: pd.DataFrame, folds: pd.DataFrame) -> pd.DataFrame:
    """``item, patient, fold``."""
    fold = items["patient"].map(folds.set_index("patient")["fold"])
    return items[["item", "patient"]].assign(fold=fold.astype(np.int64)).reset_index(drop=True)


def _drawn(names: Iterable[str], groups: pd.DataFrame, seed: int) -> np.ndarray:
    """The place of each name in its group (rows that are the same), drawn by lot: int64, from 0."""
    rank = np.fromiter((hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names), "S32")
    order = groups.iloc[np.argsort(rank, kind="stable")]
    return np.asarray(order.groupby(list(groups.columns)).cumcount().sort_index())


def draw_candidates(
    settings: Tune, features: Sequence[str], seed: int
) -> tuple[list[Recipe], dict[str, Any]]:
    """The recipes of a study, each from (seed, number) alone, and Optuna's distributions that they were drawn
    from.

    Raises:
        TuneError: the space names features that there are none of.
    """
    import optuna

    wanted = list(features) if settings.space.features == ["any"] else settings.space.features
    unknown = [f"{name!r}{nearest(name, features)}" for name in wanted if name not in features]
    if unknown:
        raise TuneError(
            f"tune.space.features: there are no features {', '.join(unknown)}; "
            f"there are: {', '.join(features)}"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {}
    for name, knob in settings.space:
        choices = wanted if name == "features" else knob
        space[name] = (
            optuna.distributions.FloatDistribution(knob.low, knob.high, log=knob.log)
            if isinstance(knob, Range)
            else optuna.distributions.CategoricalDistribution(choices)
        )
    drawn = []
    for number in range(settings.trials):
        entropy = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=entropy))
        drawn.append(Recipe(**study.ask(space).params))
    return drawn, space


def run_study(
    task_data: TaskData, settings: Tune, seed: int, study: Study, judge: Judge | None = None
) -> Iterator[Trial]:
    """Train every candidate on every pair of folds, a generation at a time, together with whoever else does.

    Args:
        task_data: items and features.
        settings: the space and the budget.
        seed: of candidates and heads.
        study: keeps finished trials; other workers may be filling it too.
        judge: trains and judges heads; None: the board's way.

    Yields:
        Every trial in order, those that were finished before first. The same trials, to the bit, with any
        number of workers, killed or not.

    Raises:
        TuneError: all trials failed.
    """
    recipes, space = draw_candidates(settings, sorted(task_data.features), seed)
    material = task_data.material(settings, seed)
    pairs = tuning_sets(task_data.folds)

    def train(generation: Mapping[int, Recipe]) -> list[Record]:
        started = time.time()
        jobs = [Job(number, recipe, pair) for number, recipe in generation.items() for pair in pairs]
        judged = (judge or task_data.judge)(jobs, material, settings.patience)
        return [
            _record(
                recipe, judged[place * len(pairs) : (place + 1) * len(pairs)], task_data, material, started
            )
            for place, recipe in enumerate(generation.values())
        ]

    generations = [
        {number: recipes[number] for number in range(start, min(start + settings.generation, len(recipes)))}
        for start in range(0, len(recipes), settings.generation)
    ]
    failures: list[str] = []
    passed = 0
    while True:
        for kept in study.trials()[passed:]:
            trial = _trial_of(kept, task_data)
            failures += [f"trial {trial.number}: {trial.failure}"] if trial.failure else []
            passed += 1
            yield trial
        if passed == len(recipes):
            break
        if not _train_next(study, generations, train, space):
            time.sleep(POLL)
            study.tell(space)
    if len(failures) == settings.trials:
        raise TuneError("all trials failed:\n  " + "\n  ".join(failures))


def choose(trials: Sequence[Trial], outer_fold: int) -> Choice:
    """The simplest trial whose inner AUROC is within one standard error of the best (Breiman et al. 1984),
    and why.

    Simplest: fewest parameters, then fewest hidden layers, then fewest views, then the better AUROC, then the
    lower number. Trials that failed take no part.
    """
    sound = [trial for trial in trials if not trial.failure]
    best = max(sound, key=lambda trial: (trial.auroc(outer_fold), -trial.number))
    bar = best.auroc(outer_fold) - best.standard_error(outer_fold)
    simplest = min(
        (trial for trial in sound if trial.auroc(outer_fold) >= bar),
        key=lambda trial: (
            trial.parameters, trial.recipe.depth, trial.recipe.views, -trial.auroc(outer_fold), trial.number
        ),
    )  # fmt: skip
    why = (
        f"best: trial {best.number} with inner AUROC {best.auroc(outer_fold):.4f}, standard error "
        f"{best.standard_error(outer_fold):.4f}; chosen: the simplest within one standard error, "
        f"with {simplest.auroc(outer_fold):.4f}"
    )
    return Choice(simplest, why)


def choose_all(trials: Sequence[Trial], folds: int, picked: int | None = None) -> list[Choice]:
    """The choice of every outer fold; `picked` by hand overrides the last one, that of the final models.

    The held-out folds go on choosing by their inner folds: a hand that has looked at all patients must not
    choose for them, or the scores that are reported would have chosen something.

    Raises:
        TuneError: `picked` is no trial, or one that failed.
    """
    choices = [choose(trials, outer_fold) for outer_fold in range(folds + 1)]
    if picked is not None:
        sound = {trial.number: trial for trial in trials if not trial.failure}
        if picked not in sound:
            raise TuneError(
                f"tune.pick: there is no trial {picked} with scores; there are: {', '.join(map(str, sound))}"
            )
        own = choices[-1].trial.number
        why = f"picked by hand (tune.pick); by itself the study would have chosen trial {own}"
        choices[-1] = Choice(sound[picked], why)
    return choices


def held_out_scores(
    task_data: TaskData, chosen: Sequence[Trial], settings: Tune, seed: int
) -> tuple[np.ndarray, list[Head]]:
    """Train the chosen trials for good and score every item of the level, labelled or not, in every outer
    fold.

    Args:
        task_data: items and features.
        chosen: the trial of each outer fold.
        settings: for the number of items per patient, the memory, and how many views of an item are averaged.
        seed: of the heads.

    Returns:
        float32 (items, outer folds): in outer fold w, an item of fold w by the head that never saw fold w,
        any other by the head that saw neither its own fold nor w, all trained for as long as the outer fold's
        inner folds say; and the head of each outer fold that scores its held-out patients (the last one: the
        final head, trained on everybody).
    """
    fold = task_data.table["fold"].to_numpy()
    wanted: dict[tuple[int, int], Job] = {}  # by outer fold and the fold to score
    for outer_fold, trial in enumerate(chosen):
        held_out = inner_sets(outer_fold, task_data.folds) | {
            outer_fold: outer_set(outer_fold, task_data.folds)
        }
        for scored, unseen in held_out.items():
            wanted[outer_fold, scored] = Job(trial.number, trial.recipe, unseen, trial.epochs(outer_fold))
    jobs = list(dict.fromkeys(wanted.values()))
    trained = dict(zip(jobs, task_data.train(jobs, task_data.material(settings, seed)), strict=True))
    scores = np.full((len(fold), len(chosen)), np.nan, dtype=np.float32)
    for (outer_fold, scored), job in wanted.items():
        places = np.flatnonzero(fold == scored)
        if len(places):
            each = [task_data.score(trained[job], places, view) for view in range(settings.average + 1)]
            scores[places, outer_fold] = np.mean(each, axis=0)
    return scores, [trained[wanted[outer_fold, outer_fold]] for outer_fold in range(len(chosen))]


def study_key(task_data: TaskData, settings: Tune, seed: int, threads: int) -> str:
    """The name of a study: a hash of all inputs, settings, versions and code that its results depend on."""
    digest = hashlib.sha256()
    told = settings.model_dump(exclude=WITHOUT_EFFECT)
    versions = [version(package) for package in ("tensorflow", "numpy", "optuna")]
    code = code_hash(Path(__file__))
    digest.update(json.dumps([told, seed, threads, task_data.folds, versions, code], sort_keys=True).encode())
    digest.update(task_data.table.to_csv(index=False).encode())
    for array in (task_data.label, task_data.row, task_data.views):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name, features in sorted(task_data.features.items()):
        digest.update(name.encode())
        for start in range(0, len(features.values), 8192):
            digest.update(features.values[start : start + 8192].tobytes())
            give_back(features.values)
    return digest.hexdigest()[:16]


def trials_table(trials: Sequence[Trial], choices: Sequence[Choice]) -> pd.DataFrame:
    """One row a trial: recipe, size, epochs, inner AUROC overall and by outer fold, how it stands among them.

    Columns: ``trial``; those of the recipe (``epochs``: at most) and ``trained_epochs``;
    ``parameters``; ``auroc`` and ``standard_error`` over all folds; ``best_so_far``; ``standing``
    (chosen; within one standard error of the best; other; failed); ``auroc_outer_w``, that without fold
    w; ``failure``.
    """
    final = len(choices) - 1
    best = max(trials, key=lambda trial: -np.inf if trial.failure else trial.auroc(final))
    bar = best.auroc(final) - best.standard_error(final)
    rows = []
    so_far = -np.inf
    for trial in trials:
        value = trial.auroc(final)
        so_far = np.fmax(so_far, value)
        if trial.number == choices[-1].trial.number:
            standing = "chosen"
        elif trial.failure:
            standing = "failed"
        else:
            standing = "within one standard error" if value >= bar else "other"
        rows.append(
            {
                "trial": trial.number,
                **asdict(trial.recipe),
                "trained_epochs": 0 if trial.failure else trial.epochs(final),
                "parameters": trial.parameters,
                "auroc": value,
                "standard_error": trial.standard_error(final),
                "best_so_far": so_far,
                "standing": standing,
                **{f"auroc_outer_{outer_fold}": trial.auroc(outer_fold) for outer_fold in range(final)},
                "failure": trial.failure,
            }
        )
    return pd.DataFrame(rows)


def importances(trials: Sequence[Any], seed: int) -> dict[str, float]:
    """How much of the AUROC hangs on each parameter, by functional ANOVA (Hutter et al. 2014).

    Args:
        trials: of `Study.trials`.
        seed: of its random forest.

    Returns:
        Parameter -> its share, the most important first; of those that took more than one value. With fewer
        than four sound trials, of none.
    """
    import optuna

    sound = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    moved = sorted(
        name for name in (sound[0].params if sound else {}) if len({t.params[name] for t in sound}) > 1
    )
    found: dict[str, float] = {}
    if len(sound) >= 4 and moved and len({trial.value for trial in sound}) > 1:
        study = optuna.create_study(direction="maximize")
        study.add_trials(sound)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=moved)
    shares = {name: float(share) for name, share in found.items()}
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def scores_table(task_data: TaskData, scores: np.ndarray) -> pd.DataFrame:
    """``item, patient, fold, outer_0 ... outer_K``: every item and its score in every outer fold."""
    outer_folds = {f"outer_{outer_fold}": scores[:, outer_fold] for outer_fold in range(scores.shape[1])}
    return task_data.table.assign(**outer_folds)


def held_out_predictions(task_data: TaskData, scores: np.ndarray) -> pd.DataFrame:
    """``item, patient, fold, label, probability`` of the labelled items, each by the head that never saw its
    fold."""
    fold = task_data.table["fold"].to_numpy()
    own = scores[np.arange(len(fold)), fold].astype(np.float64)
    table = task_data.table.assign(label=task_data.label.astype(np.int64), probability=own)
    return table[task_data.label >= 0].reset_index(drop=True)


def measure(predictions: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    """What metrics.json says of a task: AUROC and average precision with intervals over patients, and
    counts."""
    label, probability = predictions["label"], predictions["probability"]
    groups = predictions["patient"]
    measured = {
        name: bootstrap_interval(statistic, label, probability, groups=groups, resamples=resamples, seed=seed)
        for name, statistic in (("auroc", auroc), ("average_precision", average_precision))
    }
    return {name: interval.as_dict() for name, interval in measured.items()} | {
        "n_items": len(predictions),
        "n_positive": int(label.sum()),
        "n_patients": int(groups.nunique()),
    }


def explain_choice(
    trials: Sequence[Trial], choices: Sequence[Choice], important: Mapping[str, float]
) -> dict[str, Any]:
    """What best.yaml says: the final trial, why it was chosen, what each held-out fold chose, how the others
    stood, and what mattered (of `importances`; as `dvc plots` draws it, which needs a row in any case)."""
    last = len(choices) - 1
    final = choices[-1].trial
    standing = sorted(
        (trial for trial in trials if not trial.failure), key=lambda trial: (-trial.auroc(last), trial.number)
    )
    explained: dict[str, Any] = {
        "trial": final.number,
        "why": choices[-1].why,
        "recipe": asdict(final.recipe),
        "epochs": final.epochs(last),
        "parameters": final.parameters,
        "chosen_without_fold": {fold: choice.trial.number for fold, choice in enumerate(choices[:-1])},
        "standing": {trial.number: round(trial.auroc(last), 6) for trial in standing},
    }
    failed = {trial.number: trial.failure for trial in trials if trial.failure}
    shares: Mapping[str, float | None] = important or dict.fromkeys(explained["recipe"])
    explained["importance"] = [
        {"parameter": name, "importance": None if share is None else round(share, 6)}
        for name, share in shares.items()
    ]
    return explained | ({"failed": failed} if failed else {})


def _train_next(
    study: Study,
    generations: Sequence[Mapping[int, Recipe]],
    train: Callable[[Mapping[int, Recipe]], list[Record]],
    space: Mapping[str, Any],
) -> bool:
    """Train and keep the first generation that nobody has finished or is at; False if there is none."""
    for number, generation in enumerate(generations):
        if not study.has(number):
            with study.claim(number) as mine:
                if mine:
                    study.keep(number, train(generation), space)
                    return True
    return False


def _record(
    recipe: Recipe, judged: Sequence[Judged], task_data: TaskData, material: Material, started: float
) -> Record:
    """What the study keeps of a trial: how it did on each pair of folds."""
    folds, items = task_data.folds, material.items
    inner: list[list[float | None]] = [[None] * folds for _ in range(folds)]
    epochs = [[0] * folds for _ in range(folds)]
    failure = next((result.failure for result in judged if result.failure), "")
    for pair, result in zip(tuning_sets(folds), judged, strict=True):
        for fold, scores in result.score.items() if not failure else ():
            (outer_fold,) = pair - {fold}
            label = items.label[items.fold == fold]
            value = auroc_within_folds(label, scores, np.zeros(len(label), np.int64))
            inner[outer_fold][fold] = None if np.isnan(value) else value
            epochs[outer_fold][fold] = result.epoch[fold]
    return {
        "params": asdict(recipe),
        "value": None if failure else Trial(0, recipe, _matrix(inner), np.array(epochs), 0).auroc(folds),
        "attributes": {"inner": inner, "best_epoch": epochs, "failure": failure},
        "started": started,
        "ended": time.time(),
    }


def _trial_of(kept: Any, task_data: TaskData) -> Trial:
    recipe = Recipe(**kept.params)
    return Trial(
        number=kept.number,
        recipe=recipe,
        inner=_matrix(kept.user_attrs["inner"]),
        best_epoch=np.array(kept.user_attrs["best_epoch"]),
        parameters=task_data.parameters(recipe),
        failure=kept.user_attrs["failure"],
        started=kept.datetime_start.timestamp(),
        ended=kept.datetime_complete.timestamp(),
    )


def _matrix(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def _check_classes(task_data: TaskData) -> None:
    """Every outer fold needs an inner fold with both classes, and every head both classes to train on."""
    fold = task_data.table["fold"].to_numpy()
    has = {
        label: np.array(
            [((fold == number) & (task_data.label == label)).any() for number in range(task_data.folds)]
        )
        for label in (0, 1)
    }
    judges = (has[0] & has[1]).sum()
    if judges >= 2 and all(each.sum() >= 3 for each in has.values()):
        return
    counts = {
        name: ", ".join(
            f"fold {f}: {((fold == f) & (task_data.label == value)).sum()}" for f in range(task_data.folds)
        )
        for name, value in (("positive", 1), ("negative", 0))
    }
    raise TuneError(
        f"at least three folds must have positive items, three negative ones, and two both. Positive items, "
        f"{counts['positive']}; negative items, {counts['negative']}. "
        "Add labelled items, lower split.folds, or remove the task from `tasks` and `ensembles`."
    )
