"""The results of a finetuning: held-out scores, and the gain over the frozen model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aplsmear.errors import UserError
from aplsmear.evaluation.auroc import auroc, average_precision
from aplsmear.evaluation.curves import roc_curve_table
from aplsmear.evaluation.intervals import bootstrap_interval
from aplsmear.files import whole, write_json
from aplsmear.finetune.finetuning import Trained, with_weights
from aplsmear.finetune.inputs import Inputs
from aplsmear.finetune.training import Trainer
from aplsmear.heads.head import Recipe, mean_over_views
from aplsmear.runs.tracking import Tracker
from aplsmear.tables import write_table


@dataclass(frozen=True)
class Results:
    """The outs of a finetuning, beside its pictures."""

    predictions: pd.DataFrame  # of `predict_held_out`
    epochs: pd.DataFrame  # of `epochs_table`
    metrics: dict[str, Any]  # of `measure`, and the numbers of epochs and folds

    def write(self, folder: Path, model: Any) -> None:
        """Write all as files of a folder, with a keras.Model as architecture and weights."""
        predictions = self.predictions
        write_table(folder / "predictions.csv", predictions)
        write_table(folder / "roc.csv", roc_curve_table(predictions["label"], predictions["probability"]))
        write_table(folder / "epochs.csv", self.epochs)
        write_table(folder / "history.csv", mean_history(self.epochs))
        write_json(folder / "metrics.json", self.metrics, digits=4)
        with whole(folder / "architecture.json") as part:
            part.write_text(model.to_json() + "\n", encoding="utf-8")
        unfinished = folder / "part.weights.h5"  # Keras takes no other ending
        model.save_weights(unfinished)
        unfinished.replace(folder / "model.weights.h5")

    def summary(self, minutes: float) -> str:
        """What a user reads at the end, after so many minutes of training."""
        numbers, gain = self.metrics, self.metrics["difference"]
        text = (
            f"{numbers['task']}: AUROC {numbers['auroc']['value']:.3f}, "
            f"frozen {numbers['frozen']['auroc']:.3f}; difference {gain['value']:+.3f} "
            f"({gain['low']:+.3f} to {gain['high']:+.3f}); {minutes:.1f} minutes of training"
        )
        if numbers["folds_left_frozen"]:
            text += (
                f"\n{numbers['folds_left_frozen']} of {numbers['folds']} folds keep the frozen model: "
                "their inner folds gained nothing"
            )
        return text


def conclude(
    inputs: Inputs,
    trainers: Mapping[Recipe, Trainer],
    trained: Sequence[Trained],
    task: str,
    frozen: pd.DataFrame,
    resamples: int,
) -> Results:
    """Score held-out items and compare with the frozen model (`frozen`: ``predictions.csv`` of `tune`)."""
    predictions = predict_held_out(inputs, trainers, trained)
    outer = [each.run.epochs for each in trained if each.outer_fold is not None]
    counts = {"epochs": trained[-1].run.epochs, "folds": len(outer), "folds_left_frozen": outer.count(0)}
    measured = measure(predictions, frozen, resamples, inputs.seed)
    return Results(predictions, epochs_table(trained), measured | counts | {"task": task})


def predict_held_out(
    inputs: Inputs, trainers: Mapping[Recipe, Trainer], trained: Sequence[Trained]
) -> pd.DataFrame:
    """``item, patient, fold, label, probability`` of the labelled items of the outer folds.

    The outer model of their fold scores them; it was not trained on their patients.
    """
    task_data = inputs.task_data
    fold = task_data.table["fold"].to_numpy()
    probability = np.full(len(fold), np.nan)
    for each in trained:
        if each.outer_fold is not None:
            here = np.flatnonzero((task_data.label >= 0) & (fold == each.outer_fold))
            score = with_weights(trainers, each).score
            rows = task_data.row[here], task_data.views[here]
            probability[here] = mean_over_views(score, *rows, inputs.tune.average)
    scored = np.flatnonzero(~np.isnan(probability))
    columns = {"label": task_data.label[scored].astype(np.int64), "probability": probability[scored]}
    return task_data.table.iloc[scored].reset_index(drop=True).assign(**columns)


def measure(predictions: pd.DataFrame, frozen: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    """AUROC with its interval, that of the frozen model on the same items, and the difference.

    Intervals are over resamples of patients; the difference is taken within each resample. `frozen` may have
    more items.

    Raises UserError: `frozen` lacks an item.
    """
    paired = predictions.merge(frozen[["item", "probability"]], on="item", suffixes=("", "_frozen"))
    if len(paired) != len(predictions):
        raise UserError("tuned/ lacks the scores of some items: run `dvc repro` on the stage `tune` again")
    label, scores, before = (paired[name] for name in ("label", "probability", "probability_frozen"))
    drawn: dict[str, Any] = {"groups": paired["patient"], "resamples": resamples, "seed": seed}
    return {
        "auroc": bootstrap_interval(auroc, label, scores, **drawn)._asdict(),
        "frozen": {"auroc": auroc(label, before)},
        "difference": bootstrap_interval(auroc, label, scores, before, **drawn)._asdict(),
        "average_precision": average_precision(label, scores),
        "n_items": len(paired),
        "n_patients": int(paired["patient"].nunique()),
        "n_positive": int(label.sum()),
    }


def epochs_table(trained: Sequence[Trained]) -> pd.DataFrame:
    """``run, epoch, loss, auroc`` of each inner model. The loss of epoch 0, the frozen model, is empty."""
    rows = [
        (each.run.name, epoch, loss, value)
        for each in trained
        if each.run.judged is not None
        for epoch, (loss, value) in enumerate(
            zip([np.nan, *each.history.loss], each.history.auroc, strict=True)
        )
    ]
    return pd.DataFrame(rows, columns=["run", "epoch", "loss", "auroc"])


def mean_history(epochs: pd.DataFrame) -> pd.DataFrame:
    """``epoch, auroc, loss``: means over the runs of `epochs_table`. A stopped run keeps its last values."""
    wide = epochs.pivot_table(index="epoch", columns="run", values=["auroc", "loss"], dropna=False).ffill()
    means: pd.DataFrame = wide.T.groupby(level=0).mean().T.reset_index()
    return means


def log_runs(tracker: Tracker, trained: Sequence[Trained]) -> None:
    """Log each model as a nested run, with its loss and AUROC over the epochs."""
    now = time.time()
    for number, each in enumerate(trained):
        run, history = each.run, each.history
        tracker.log_trial(
            number,
            {"held_out": sorted(run.held_out), "judged": run.judged, "epochs": len(history.loss)},
            {"best_auroc": max(history.auroc)} if history.auroc else {},
            started=now - history.seconds,
            ended=now,
            name=run.name,
            curves={"auroc": history.auroc, "loss": history.loss},
        )
