"""The results of a search: what `tune` writes of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from aplsmear.evaluation.auroc import auroc, average_precision
from aplsmear.evaluation.curves import roc_curve_table
from aplsmear.evaluation.intervals import bootstrap_interval, headline
from aplsmear.files import whole, write_json
from aplsmear.heads.head import Head, write_heads
from aplsmear.heads.search import Choice, Trial, choose_all, held_out_scores
from aplsmear.heads.study import Study
from aplsmear.heads.task_data import TaskData
from aplsmear.params import Tune
from aplsmear.tables import write_table

_ENOUGH_TRIALS = 50  # for the importance of parameters


@dataclass(frozen=True)
class Results:
    """The outs of a search."""

    trials: pd.DataFrame  # of `trials_table`
    best: dict[str, Any]  # of `explain_choice`
    heads: list[Head]  # of each outer fold
    average: int  # augmented views whose scores are averaged with that of the plain view
    scores: pd.DataFrame  # of `scores_table`
    attention: pd.DataFrame  # of `TaskData.attention`
    predictions: pd.DataFrame  # of `held_out_predictions`
    metrics: dict[str, Any]  # of `measure`

    def write(self, folder: Path) -> None:
        """Write all as files of a folder."""
        write_table(folder / "trials.csv", self.trials)
        with whole(folder / "best.yaml") as part:
            part.write_text(yaml.safe_dump(self.best, sort_keys=False, allow_unicode=True), encoding="utf-8")
        write_heads(folder / "heads.npz", self.heads, self.average)
        for name, table in (("scores", self.scores), ("attention", self.attention)):
            with whole(folder / f"{name}.parquet") as part:
                table.to_parquet(part, index=False)
        write_table(folder / "predictions.csv", self.predictions)
        curve = roc_curve_table(self.predictions["label"], self.predictions["probability"])
        write_table(folder / "roc.csv", curve)
        write_json(folder / "metrics.json", headline(self.metrics), digits=4)


def conclude(
    task_data: TaskData,
    study: Study,
    trials: Sequence[Trial],
    settings: Tune,
    seed: int,
    resamples: int,
    picked: int | None = None,
) -> Results:
    """Choose trials of a finished study, train their heads and score all items.

    Raises UserError: the trial that the user `picked` for the final model does not exist, or failed.
    """
    choices = choose_all(trials, task_data.folds, picked)
    scores, heads = held_out_scores(task_data, [choice.trial for choice in choices], settings, seed)
    predictions = held_out_predictions(task_data, scores)
    return Results(
        trials=trials_table(trials, choices),
        best={"study": study.name} | explain_choice(trials, choices, importances(study.trials(), seed)),
        heads=heads,
        average=settings.average,
        scores=scores_table(task_data, scores),
        attention=task_data.attention(heads, settings.average),
        predictions=predictions,
        metrics=measure(predictions, resamples, seed),
    )


def trials_table(trials: Sequence[Trial], choices: Sequence[Choice]) -> pd.DataFrame:
    """One row a trial.

    Columns: ``trial``; those of `Recipe` (``epochs``: at most) and ``trained_epochs``; ``parameters``;
    ``auroc`` and ``standard_error``, inner, over all folds; ``best_so_far``; ``standing`` (chosen; within one
    standard error of the best; other; failed); ``auroc_outer_w``, of outer fold w; ``failure``.
    """
    final = len(choices) - 1
    best = max(trials, key=lambda trial: -np.inf if trial.failure else trial.auroc(final))
    bar = best.auroc(final) - best.standard_error(final)
    rows = []
    so_far = -np.inf
    for trial in trials:
        value = trial.auroc(final)
        so_far = np.fmax(so_far, value)
        standing = "within one standard error" if value >= bar else "other"
        standing = "failed" if trial.failure else standing
        standing = "chosen" if trial.number == choices[-1].trial.number else standing
        row = {"trial": trial.number} | asdict(trial.recipe)
        row |= {
            "trained_epochs": 0 if trial.failure else trial.epochs(final),
            "parameters": trial.parameters,
            "auroc": value,
            "standard_error": trial.standard_error(final),
            "best_so_far": so_far,
            "standing": standing,
        }
        row |= {f"auroc_outer_{outer_fold}": trial.auroc(outer_fold) for outer_fold in range(final)}
        rows.append(row | {"failure": trial.failure})
    return pd.DataFrame(rows)


def importances(trials: Sequence[Any], seed: int) -> dict[str, float]:
    """The share of each parameter in the variance of the AUROC, by functional ANOVA (Hutter et al. 2014).

    The largest comes first; parameters with one value are left out. Empty with fewer than `_ENOUGH_TRIALS`
    that did not fail: shares from a few trials are chance.
    """
    import optuna

    sound = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    moved = sorted(
        name for name in (sound[0].params if sound else {}) if len({t.params[name] for t in sound}) > 1
    )
    if len(sound) < _ENOUGH_TRIALS or not moved or len({trial.value for trial in sound}) == 1:
        return {}
    study = optuna.create_study(direction="maximize")
    study.add_trials(sound)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=moved)
    shares = ((name, float(share)) for name, share in found.items())
    return dict(sorted(shares, key=lambda item: (-item[1], item[0])))


def scores_table(task_data: TaskData, scores: np.ndarray) -> pd.DataFrame:
    """``item, patient, fold, outer_0 ... outer_K``: the scores of all items in each outer fold."""
    outer_folds = {f"outer_{outer_fold}": scores[:, outer_fold] for outer_fold in range(scores.shape[1])}
    return task_data.table.assign(**outer_folds)


def held_out_predictions(task_data: TaskData, scores: np.ndarray) -> pd.DataFrame:
    """``item, patient, fold, label, probability`` of the labelled items, by the head that did not see their
    fold."""
    fold = task_data.table["fold"].to_numpy()
    own = scores[np.arange(len(fold)), fold].astype(np.float64)
    table = task_data.table.assign(label=task_data.label.astype(np.int64), probability=own)
    return table[task_data.label >= 0].reset_index(drop=True)


def measure(predictions: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    """AUROC and average precision with bootstrap intervals over patients, and counts."""
    scored = predictions["label"], predictions["probability"]
    drawn: dict[str, Any] = {"groups": predictions["patient"], "resamples": resamples, "seed": seed}
    return {
        "auroc": bootstrap_interval(auroc, *scored, **drawn)._asdict(),
        "average_precision": bootstrap_interval(average_precision, *scored, **drawn)._asdict(),
        "n_items": len(predictions),
        "n_positive": int(predictions["label"].sum()),
        "n_patients": int(predictions["patient"].nunique()),
    }


def explain_choice(
    trials: Sequence[Trial], choices: Sequence[Choice], shares: Mapping[str, float]
) -> dict[str, Any]:
    """The trial of the final model, why it was chosen, how all others compare, and `shares` if there are."""
    last, final = len(choices) - 1, choices[-1].trial
    sound = [trial for trial in trials if not trial.failure]
    ranked = sorted(sound, key=lambda trial: (-trial.auroc(last), trial.number))
    explained: dict[str, Any] = {
        "trial": final.number,
        "why": choices[-1].why,
        "recipe": asdict(final.recipe),
        "epochs": final.epochs(last),
        "parameters": final.parameters,
        "chosen_without_fold": {fold: choice.trial.number for fold, choice in enumerate(choices[:-1])},
        "standing": {trial.number: round(trial.auroc(last), 6) for trial in ranked},
    }
    if shares:
        explained["importance"] = {name: round(share, 6) for name, share in shares.items()}
        explained["importance_from_trials"] = len(ranked)
    failed = {trial.number: trial.failure for trial in trials if trial.failure}
    return explained | ({"failed": failed} if failed else {})
