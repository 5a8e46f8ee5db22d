"""The search over heads: which trial each world chooses, and the held-out scores that follow.

Candidates are drawn before any score is known (random search), so that one study serves every world of
`aplsmear.splits` without a leak: what steers the search for a world never looked at the world's held-out patients.
Every trial is trained once for each pair of folds; world w then compares the trials by its own inner folds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aplsmear.errors import UserError
from aplsmear.features import Features
from aplsmear.heads import Head, Job, Recipe, TrainingItems, parameters, score, train_heads
from aplsmear.params import Range, Tune, nearest
from aplsmear.splits import inner_sets, outer_set, tuning_sets
from aplsmear.statistics import auroc, auroc_within_folds, average_precision, bootstrap_interval


class TuneError(UserError, ValueError):
    """A task that cannot be tuned as asked."""


@dataclass(frozen=True)
class Trial:
    """A candidate and how it did: AUROC of each inner fold (columns) in each world (rows), NaN where undefined."""

    number: int
    recipe: Recipe
    inner: (
        np.ndarray
    )  # float64 (folds, folds): [w, j], by the head that saw neither; the last world uses all of them
    parameters: int

    def auroc(self, world: int) -> float:
        """Mean inner AUROC in a world."""
        return float(np.nanmean(self._seen(world)))

    def standard_error(self, world: int) -> float:
        """Standard error of that mean over the world's inner folds (0 with a single one)."""
        seen = self._seen(world)
        seen = seen[~np.isnan(seen)]
        return float(seen.std(ddof=1) / np.sqrt(len(seen))) if len(seen) > 1 else 0.0

    def _seen(self, world: int) -> np.ndarray:
        folds = len(self.inner)
        if world < folds:
            return np.delete(self.inner[world], world)
        return np.array([np.nanmean(np.delete(self.inner[:, j], j)) for j in range(folds)])


@dataclass(frozen=True)
class Board:
    """All that the study of one task works on."""

    table: (
        pd.DataFrame
    )  # every item of the level: item, patient, fold; in the order of the features' plain views
    label: np.ndarray  # int8 (items,): 1, 0, or -1 for items without a part in the task
    row: np.ndarray  # int64 (items,): the row of the item's plain view in the features
    views: np.ndarray  # int64 (items,): augmented views that follow it
    features: Mapping[str, Features]
    folds: int

    def training_items(self, per_patient: int, seed: int) -> TrainingItems:
        """The labelled items, at most `per_patient` of each class from one patient, chosen by a hash of their name."""
        rank = [hashlib.sha256(f"{seed}/{item}".encode()).hexdigest() for item in self.table["item"]]
        order = pd.DataFrame({"patient": self.table["patient"], "label": self.label, "rank": rank})
        place = order.sort_values("rank").groupby(["patient", "label"]).cumcount().sort_index().to_numpy()
        kept = np.flatnonzero((self.label >= 0) & (place < per_patient))
        least = max(int(self.views.min()), 1)
        return TrainingItems(
            row=self.row[kept],
            views=self.views[kept],
            copies=np.maximum(self.views[kept] // least, 1),
            label=self.label[kept],
            fold=self.table["fold"].to_numpy()[kept],
        )

    def values(self) -> dict[str, np.ndarray]:
        """The features by name."""
        return {name: each.values for name, each in self.features.items()}


def make_board(
    items: pd.DataFrame, label: np.ndarray, folds: pd.DataFrame, features: Mapping[str, Features]
) -> Board:
    """Bring together the items of a level, their labels, folds and features.

    Args:
        items: ``item, patient`` of every item of the level.
        label: int8 (items,), of `aplsmear.tasks.task_labels`.
        folds: ``splits/folds.csv``.
        features: of `aplsmear.features.read_features`.

    Raises:
        TuneError: features are missing, or are not those of these items.
    """
    if not features:
        raise TuneError("there are no features; `dvc repro bottleneck` makes them")
    index = next(iter(features.values())).index
    for other in features.values():
        if not other.index.equals(index):
            raise TuneError(f"the features {other.name} are of other views; run `dvc repro bottleneck` again")
    rows = index.reset_index(names="row").groupby("item", sort=False)["row"].agg(["min", "size"])
    if list(rows.index) != list(items["item"]):
        raise TuneError("the features are not those of this data set; run `dvc repro bottleneck` again")
    fold = items["patient"].map(folds.set_index("patient")["fold"])
    return Board(
        table=items[["item", "patient"]].assign(fold=fold.astype(np.int64)).reset_index(drop=True),
        label=label,
        row=rows["min"].to_numpy(),
        views=rows["size"].to_numpy() - 1,
        features=features,
        folds=int(folds["fold"].max()) + 1,
    )


def draw_candidates(
    settings: Tune, features: Sequence[str], seed: int
) -> list[tuple[Recipe, dict[str, Any]]]:
    """The recipes of a study and Optuna's distributions that they were drawn from, each from (seed, number) alone.

    Raises:
        TuneError: the space names features that there are none of.
    """
    import optuna

    wanted = list(features) if settings.space.features == ["any"] else settings.space.features
    for name in wanted:
        if name not in features:
            raise TuneError(
                f"tune.space.features: there are no features {name!r}{nearest(name, features)}; "
                f"there are: {', '.join(features)}"
            )
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
        drawn.append((Recipe(**study.ask(space).params), space))
    return drawn


def run_study(board: Board, settings: Tune, seed: int, study: Any) -> Iterator[Trial]:
    """Train every candidate on every pair of folds, a generation at a time; go on where the study was cut off.

    Args:
        board: items and features.
        settings: the space and the budget.
        seed: of candidates and heads.
        study: optuna.Study that keeps finished trials (of `open_study`).

    Yields:
        Every trial in order, those of earlier runs first.

    Raises:
        TuneError: no world has an inner fold with both classes.
    """
    items = board.training_items(settings.items_per_patient, seed)
    candidates = draw_candidates(settings, sorted(board.features), seed)
    finished = [_trial_of(each, board) for each in study.get_trials(deepcopy=False)]
    yield from finished
    for start in range(0, settings.trials, settings.generation):
        numbers = range(max(start, len(finished)), min(start + settings.generation, settings.trials))
        if not numbers:
            continue
        # The whole generation trains, as it would have without the cut: a stack's bits depend on who is in it.
        generation = range(start, min(start + settings.generation, settings.trials))
        inner = _inner_aurocs(board, items, {n: candidates[n][0] for n in generation}, seed)
        for number in numbers:
            recipe, space = candidates[number]
            trial = Trial(number, recipe, inner[number], _size(recipe, board))
            if np.isnan(trial.inner).all():
                raise TuneError(_too_few(board))
            _keep(study, trial, space, board.folds)
            yield trial


def choose(trials: Sequence[Trial], world: int) -> tuple[Trial, str]:
    """The simplest trial whose inner AUROC is within one standard error of the best (Breiman et al. 1984), and why.

    Simplest: fewest parameters, then fewest views, then the better AUROC, then the lower number.
    """
    best = max(trials, key=lambda trial: (trial.auroc(world), -trial.number))
    bar = best.auroc(world) - best.standard_error(world)
    simplest = min(
        (trial for trial in trials if trial.auroc(world) >= bar),
        key=lambda trial: (trial.parameters, trial.recipe.views, -trial.auroc(world), trial.number),
    )
    why = (
        f"best: trial {best.number} with inner AUROC {best.auroc(world):.4f}, standard error "
        f"{best.standard_error(world):.4f}; chosen: the simplest within one standard error, "
        f"with {simplest.auroc(world):.4f}"
    )
    return simplest, why


def held_out_scores(
    board: Board, chosen: Sequence[Trial], settings: Tune, seed: int
) -> tuple[np.ndarray, list[Head]]:
    """Train the chosen trials for good and score every item of the level, labelled or not, in every world.

    Args:
        board: items and features.
        chosen: the trial of each world.
        settings: for the number of items per patient.
        seed: of the heads.

    Returns:
        float32 (items, worlds): in world w, an item of fold w by the head that never saw fold w, any other by the head
        that saw neither its own fold nor w; and the head of each world that scores its held-out patients (the last
        one: the final head, trained on everybody).
    """
    fold = board.table["fold"].to_numpy()
    jobs: dict[tuple[int, Any], Job] = {}
    for world, trial in enumerate(chosen):
        for held_out in [*inner_sets(world, board.folds).values(), outer_set(world, board.folds)]:
            jobs[trial.number, held_out] = Job(trial.number, trial.recipe, held_out)
    items = board.training_items(settings.items_per_patient, seed)
    heads = dict(zip(jobs, train_heads(list(jobs.values()), board.values(), items, seed), strict=True))
    scores = np.full((len(fold), len(chosen)), np.nan, dtype=np.float32)
    outer = []
    for world, trial in enumerate(chosen):
        values = board.features[trial.recipe.features].values
        by_fold = {world: outer_set(world, board.folds)} | inner_sets(world, board.folds)
        for inner, held_out in by_fold.items():
            rows = np.flatnonzero(fold == inner)
            if len(rows):
                scores[rows, world] = score([heads[trial.number, held_out]], values, board.row[rows])[0]
        outer.append(heads[trial.number, outer_set(world, board.folds)])
    return scores, outer


def study_key(board: Board, settings: Tune, seed: int) -> str:
    """A name for a study by all that it depends on: other inputs, another study; the same inputs, the same one."""
    digest = hashlib.sha256()
    digest.update(json.dumps([settings.model_dump(), seed, board.folds], sort_keys=True).encode())
    digest.update(board.table.to_csv(index=False).encode())
    for array in (board.label, board.row, board.views):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name, features in sorted(board.features.items()):
        digest.update(name.encode())
        for start in range(0, len(features.values), 65536):
            digest.update(features.values[start : start + 65536].tobytes())
    return digest.hexdigest()[:16]


def open_study(path: Path, name: str) -> Any:
    """The optuna.Study of this name in a journal file, made if it is not there; finished trials are kept at once."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    return optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)


def trials_table(trials: Sequence[Trial], worlds: int) -> pd.DataFrame:
    """One row a trial: its recipe, size, and inner AUROC in every world."""
    return pd.DataFrame(
        [
            {
                "trial": trial.number,
                **asdict(trial.recipe),
                "parameters": trial.parameters,
                **{f"auroc_world_{world}": trial.auroc(world) for world in range(worlds)},
            }
            for trial in trials
        ]
    )


def scores_table(board: Board, scores: np.ndarray) -> pd.DataFrame:
    """``item, patient, fold, world_0 ... world_K``: every item of the level and its score in every world."""
    worlds = {f"world_{world}": scores[:, world] for world in range(scores.shape[1])}
    return board.table.assign(**worlds)


def held_out_predictions(board: Board, scores: np.ndarray) -> pd.DataFrame:
    """``item, patient, fold, label, probability`` of the labelled items, each by the head that never saw its fold."""
    fold = board.table["fold"].to_numpy()
    own = scores[np.arange(len(fold)), fold].astype(np.float64)
    table = board.table.assign(label=board.label.astype(np.int64), probability=own)
    return table[board.label >= 0].reset_index(drop=True)


def measure(predictions: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    """What metrics.json says of a task: AUROC and average precision with intervals over patients, and counts."""
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


def explain_choice(trials: Sequence[Trial], worlds: Sequence[tuple[Trial, str]]) -> dict[str, Any]:
    """What best.yaml says: the final trial, why it was chosen, what each held-out fold chose, how the others stood."""
    final, why = worlds[-1]
    standing = sorted(trials, key=lambda trial: (-trial.auroc(len(worlds) - 1), trial.number))
    return {
        "trial": final.number,
        "why": why,
        "recipe": asdict(final.recipe),
        "chosen_without_fold": {fold: trial.number for fold, (trial, _) in enumerate(worlds[:-1])},
        "standing": {trial.number: round(trial.auroc(len(worlds) - 1), 6) for trial in standing},
    }


def _inner_aurocs(
    board: Board, items: TrainingItems, recipes: Mapping[int, Recipe], seed: int
) -> dict[int, np.ndarray]:
    """AUROC [w, j] of each trial, by the head that saw neither w nor j, on the labelled items of fold j."""
    jobs = [
        Job(number, recipe, pair) for number, recipe in recipes.items() for pair in tuning_sets(board.folds)
    ]
    heads = train_heads(jobs, board.values(), items, seed)
    aurocs = {number: np.full((board.folds, board.folds), np.nan) for number in recipes}
    fold = board.table["fold"].to_numpy()
    for features in sorted({recipe.features for recipe in recipes.values()}):
        mine = [place for place, job in enumerate(jobs) if job.recipe.features == features]
        for held_out in range(board.folds):
            rows = np.flatnonzero((fold == held_out) & (board.label >= 0))
            judges = [place for place in mine if held_out in jobs[place].held_out]
            scores = score(
                [heads[place] for place in judges], board.features[features].values, board.row[rows]
            )
            for place, scored in zip(judges, scores, strict=True):
                (other,) = jobs[place].held_out - {held_out}
                aurocs[jobs[place].trial][other, held_out] = auroc_within_folds(
                    board.label[rows], scored, fold[rows]
                )
    return aurocs


def _size(recipe: Recipe, board: Board) -> int:
    return parameters(recipe, board.features[recipe.features].values.shape[1])


def _keep(study: Any, trial: Trial, space: dict[str, Any], worlds: int) -> None:
    import optuna

    kept = [None if np.isnan(value) else value for value in trial.inner.ravel().tolist()]
    study.add_trial(
        optuna.trial.create_trial(
            params=asdict(trial.recipe),
            distributions=space,
            value=trial.auroc(worlds),
            user_attrs={"inner": kept},
        )
    )


def _trial_of(kept: Any, board: Board) -> Trial:
    recipe = Recipe(**kept.params)
    inner = np.array([np.nan if v is None else v for v in kept.user_attrs["inner"]], dtype=np.float64)
    return Trial(kept.number, recipe, inner.reshape(board.folds, board.folds), _size(recipe, board))


def _too_few(board: Board) -> str:
    counts = {
        name: ", ".join(
            f"fold {fold}: {(board.label[board.table['fold'] == fold] == value).sum()}"
            for fold in range(board.folds)
        )
        for name, value in (("positive", 1), ("negative", 0))
    }
    return (
        f"no fold has both classes. Positive items, {counts['positive']}; negative items, {counts['negative']}. "
        "Add labelled items, lower split.folds, or remove the task from `tasks` and `ensembles` in params.yaml."
    )
