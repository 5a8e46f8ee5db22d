"""The search over heads: the trial that each outer fold chooses, and the held-out scores.

Candidates are drawn before any score is known (random search), so one study serves all outer folds of
`aplsmear.evaluation.splits` without a leak. (A sampler that learns from scores would need one study for each
outer fold.) Each trial is trained once for each pair of folds {w, j}: its score on j counts in outer fold w,
its score on w in outer fold j. Outer fold w compares trials, and chooses the number of epochs, by its inner
folds alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from aplsmear.errors import UserError
from aplsmear.evaluation.auroc import auroc_within_folds
from aplsmear.evaluation.splits import inner_sets, outer_set, tuning_sets
from aplsmear.files import give_back
from aplsmear.heads.head import Head, Job, Recipe
from aplsmear.heads.stack import Judged, Material, judge_heads, train_heads
from aplsmear.heads.study import Study
from aplsmear.heads.task_data import TaskData
from aplsmear.params import ANY_FEATURES, Range, Tune, of_backbones
from aplsmear.runs.imports import code_hash
from aplsmear.words import no_such

Judge = Callable[[Sequence[Job], Material, int], list[Judged]]
POLL = 0.5  # seconds between two looks at the results of other workers
WITHOUT_EFFECT = {"memory", "pick", "restarts", "storage"}  # settings that change no trial


@dataclass(frozen=True)
class Trial:
    """A candidate and its results on each inner fold (columns) of each outer fold (rows).

    [w, j] is the result, on fold j, of the head that saw neither fold w nor fold j. It is NaN (0 epochs) on
    the diagonal, for a failed trial, and where fold j lacks a class. The last outer fold, that of the final
    model, uses all entries.
    """

    number: int
    recipe: Recipe
    inner: np.ndarray  # float64 (folds, folds): AUROC
    best_epoch: np.ndarray  # int64 (folds, folds): number of epochs with the lowest loss
    parameters: int
    failure: str = ""  # the reason why there are no results
    started: float = 0.0  # seconds since 1970
    ended: float = 0.0

    def auroc(self, outer_fold: int) -> float:
        """Mean inner AUROC of an outer fold; NaN for a failed trial."""
        return float(np.nanmean(self._inner_results(self.inner, outer_fold))) if not self.failure else np.nan

    def standard_error(self, outer_fold: int) -> float:
        """Standard error of that mean over the inner folds (0 with a single one)."""
        each = self._inner_results(self.inner, outer_fold)
        each = each[~np.isnan(each)]
        return float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else 0.0

    def by_fold(self) -> list[float]:
        """AUROC on each fold, the mean over the heads that were judged on it."""
        return list(map(float, self._inner_results(self.inner, len(self.inner))))

    def epochs(self, outer_fold: int) -> int:
        """Number of epochs for the heads of an outer fold: the mean of the best ones on its inner folds."""
        known = np.where(self.best_epoch > 0, self.best_epoch, np.nan)
        return max(int(np.floor(np.nanmean(self._inner_results(known, outer_fold)) + 0.5)), 1)

    def _inner_results(self, values: np.ndarray, outer_fold: int) -> np.ndarray:
        """One value for each inner fold; for the last outer fold, the mean over heads."""
        folds = len(values)
        if outer_fold < folds:
            return np.delete(values[outer_fold], outer_fold)
        columns = [np.delete(values[:, j], j) for j in range(folds)]
        return np.array([np.nan if np.isnan(column).all() else np.nanmean(column) for column in columns])


@dataclass(frozen=True)
class Choice:
    """The trial of an outer fold, and the reason for it."""

    trial: Trial
    why: str


def study_key(task_data: TaskData, settings: Tune, seed: int) -> str:
    """The name of a study: a hash of all inputs, settings, versions and code that its results depend on."""
    digest = hashlib.sha256()
    used = settings.model_dump(exclude=WITHOUT_EFFECT)
    versions = [version(package) for package in ("numpy", "scipy", "optuna")]
    code = code_hash(Path(__file__))
    digest.update(json.dumps([used, seed, task_data.folds, versions, code], sort_keys=True).encode())
    digest.update(task_data.table.to_csv(index=False).encode())
    for array in (task_data.label, task_data.row, task_data.views):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name, features in sorted(task_data.features.items()):
        digest.update(name.encode())
        for start in range(0, len(features.values), 8192):
            digest.update(features.values[start : start + 8192].tobytes())
            give_back(features.values)
    return digest.hexdigest()[:16]


def draw_candidates(
    settings: Tune, features: Sequence[str], seed: int
) -> tuple[list[Recipe], dict[str, Any]]:
    """The recipes of a study, each drawn from seed and number alone, and Optuna's distribution of parameters.

    Raises UserError: `settings.space.features` names features that do not exist.
    """
    import optuna

    wanted = list(features) if settings.space.features == [ANY_FEATURES] else settings.space.features
    for name in (part for joint in wanted for part in of_backbones(joint)):
        if name not in features:
            raise UserError(no_such("tune.space.features: there are no features", name, features))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {}
    for name, knob in settings.space:
        if isinstance(knob, Range):
            space[name] = optuna.distributions.FloatDistribution(knob.low, knob.high, log=knob.log)
        else:
            choices = wanted if name == "features" else knob
            space[name] = optuna.distributions.CategoricalDistribution(choices)
    recipes = []
    for number in range(settings.trials):
        entropy = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=entropy))
        recipes.append(Recipe(**study.ask(space).params))
    return recipes, space


def run_study(
    task_data: TaskData, settings: Tune, seed: int, study: Study, judge: Judge = judge_heads
) -> Iterator[Trial]:
    """Train each candidate on each pair of folds. Other workers may train trials of the same study.

    Yields:
        All trials by number, as soon as they and all before them are finished. They are the same, to the bit,
        with any number of workers, killed or not.

    Raises UserError: all trials failed.
    """
    recipes, space = draw_candidates(settings, sorted(task_data.features), seed)
    material = task_data.material(settings, seed)
    study.queue([asdict(recipe) for recipe in recipes], space)
    pairs = tuning_sets(task_data.folds)

    def train(number: int) -> bool:
        """Train a trial; False if it is finished or another worker trains it."""
        with study.claim(number) as claimed:
            if claimed:
                jobs = [Job(number, recipes[number], pair) for pair in pairs]
                judged = judge(jobs, material, settings.patience)
                study.finish(number, *_result(recipes[number], judged, material, task_data.folds))
        return claimed

    failures: list[str] = []
    passed = 0
    while passed < len(recipes):
        for stored in study.trials()[passed:]:
            if not stored.state.is_finished():
                break
            trial = _trial_of(stored, task_data)
            failures += [f"trial {trial.number}: {trial.failure}"] if trial.failure else []
            passed += 1
            yield trial
        claims = (train(number) for number in range(passed, len(recipes)))
        if passed < len(recipes) and not any(claims):
            time.sleep(POLL)  # other workers train the rest
    if len(failures) == settings.trials:
        raise UserError("all trials failed:\n  " + "\n  ".join(failures))


def _result(
    recipe: Recipe, judged: Sequence[Judged], material: Material, folds: int
) -> tuple[float | None, dict[str, Any]]:
    """Mean inner AUROC of a trial (None: it failed), and its results on each pair of folds."""
    items = material.items
    inner, epochs = np.full((folds, folds), np.nan), np.zeros((folds, folds), np.int64)
    failure = next((result.failure for result in judged if result.failure), "")
    for pair, result in zip(tuning_sets(folds), judged, strict=True):
        for fold, scores in result.score.items() if not failure else ():
            (outer_fold,) = pair - {fold}
            label = items.label[items.fold == fold]
            inner[outer_fold, fold] = auroc_within_folds(label, scores, np.zeros(len(label), np.int64))
            epochs[outer_fold, fold] = result.epoch[fold]
    attributes = {
        "inner": [[None if np.isnan(value) else value for value in row] for row in inner.tolist()],
        "best_epoch": epochs.tolist(),
        "failure": failure,
    }
    return None if failure else Trial(0, recipe, inner, epochs, 0).auroc(folds), attributes


def _trial_of(stored: Any, task_data: TaskData) -> Trial:
    recipe = Recipe(**stored.params)
    return Trial(
        number=stored.number,
        recipe=recipe,
        inner=np.array(stored.user_attrs["inner"], np.float64),
        best_epoch=np.array(stored.user_attrs["best_epoch"]),
        parameters=task_data.parameters(recipe),
        failure=stored.user_attrs["failure"],
        started=stored.datetime_start.timestamp(),
        ended=stored.datetime_complete.timestamp(),
    )


def choose(trials: Sequence[Trial], outer_fold: int) -> Choice:
    """Choose the simplest trial within one standard error of the best inner AUROC (Breiman et al. 1984).

    Simplest: fewest parameters, then fewest hidden layers, then fewest views, then the better AUROC, then the
    lower number. Failed trials are left out.
    """
    scored = [(trial.auroc(outer_fold), trial) for trial in trials if not trial.failure]
    highest, best = max(scored, key=lambda each: (each[0], -each[1].number))
    error = best.standard_error(outer_fold)

    def complexity(each: tuple[float, Trial]) -> tuple[float, ...]:
        auroc, trial = each
        return trial.parameters, trial.recipe.depth, trial.recipe.views, -auroc, trial.number

    auroc, simplest = min((each for each in scored if each[0] >= highest - error), key=complexity)
    why = (
        f"best: trial {best.number} with inner AUROC {highest:.4f}, standard error {error:.4f}; "
        f"chosen: the simplest within one standard error, with {auroc:.4f}"
    )
    return Choice(simplest, why)


def choose_all(trials: Sequence[Trial], folds: int, picked: int | None = None) -> list[Choice]:
    """The choice of each outer fold, and then that of the final model.

    The user can pick the trial of the final model (`overrides.TASK.pick`). The outer folds still choose by
    their inner folds: the user has seen all patients, so the held-out scores would be biased.

    Raises UserError: `picked` is no trial, or one that failed.
    """
    choices = [choose(trials, outer_fold) for outer_fold in range(folds + 1)]
    if picked is not None:
        sound = {trial.number: trial for trial in trials if not trial.failure}
        if picked not in sound:
            raise UserError(
                f"`pick` of this task in params.yaml: trial {picked} does not exist or failed. Choose one of "
                f"{', '.join(map(str, sound))}"
            )
        own = choices[-1].trial.number
        choices[-1] = Choice(sound[picked], f"picked by the user; the study would have chosen trial {own}")
    return choices


def held_out_scores(
    task_data: TaskData, chosen: Sequence[Trial], settings: Tune, seed: int
) -> tuple[np.ndarray, list[Head]]:
    """Train the chosen trials, and score all items, labelled or not, in each outer fold.

    Returns:
        Scores, float32 (items, outer folds). In outer fold w, the items of fold w are scored by the head that
        saw all other folds; other items by the head that saw neither their own fold nor fold w.
        And of each outer fold the head that scores its held-out patients. The last one is the final head,
        trained on all patients.
    """
    fold, folds = task_data.table["fold"].to_numpy(), task_data.folds
    wanted: dict[tuple[int, int], Job] = {}  # by outer fold and the fold to score
    for outer_fold, trial in enumerate(chosen):
        held_out = inner_sets(outer_fold, folds) | {outer_fold: outer_set(outer_fold, folds)}
        for scored, unseen in held_out.items():
            wanted[outer_fold, scored] = Job(trial.number, trial.recipe, unseen, trial.epochs(outer_fold))
    jobs = list(dict.fromkeys(wanted.values()))
    trained = dict(zip(jobs, train_heads(jobs, task_data.material(settings, seed)), strict=True))
    scores = np.full((len(fold), len(chosen)), np.nan, dtype=np.float32)
    for (outer_fold, scored), job in wanted.items():
        places = np.flatnonzero(fold == scored)
        if len(places):
            scores[places, outer_fold] = task_data.score(trained[job], places, settings.average)
    return scores, [trained[wanted[outer_fold, outer_fold]] for outer_fold in range(len(chosen))]
