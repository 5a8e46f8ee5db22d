"""The results of the one answer: held-out tables, measures and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aplsmear.answer.coupling import DIAGNOSES, Judged, Pair, calls
from aplsmear.answer.measures import UNSURE, mean_interval, measure_diagnoses, predictive_values, surprises
from aplsmear.evaluation.curves import calibration_table, roc_curve_table
from aplsmear.evaluation.operating_points import wilson_interval
from aplsmear.files import write_json
from aplsmear.reports import pages
from aplsmear.tables import write_table


@dataclass(frozen=True)
class Results:
    """The held-out answers of all patients, and their measures."""

    judged: Sequence[Judged]  # the report shows the first, with all ensembles
    pairs: Mapping[str, Pair]  # of each ensemble
    table: pd.DataFrame  # ``patient, diagnosis, fold, answer, healthy, aml, apl``
    measured: Mapping[str, Any]  # of `measure_diagnoses`
    comparison: pd.DataFrame  # log loss of each set of ensembles, and its difference from that of all
    sure: float  # a diagnosis is called from this probability on
    resamples: int  # of the bootstrap
    seed: int  # of the bootstrap


def results_of(
    patients: pd.DataFrame,
    judged: Sequence[Judged],
    pairs: Mapping[str, Pair],
    sure: float,
    resamples: int,
    seed: int,
) -> Results:
    """Measure the held-out answers; `patients` has ``patient, diagnosis, fold``, as in `judged`."""
    chances = judged[0].probability
    label, called = patients["diagnosis"].map(DIAGNOSES.index).to_numpy(), calls(chances, sure)
    table = patients[["patient", "diagnosis", "fold"]].assign(
        answer=[names_of(each) for each in called], **dict(zip(DIAGNOSES, chances.T, strict=True))
    )
    losses = [surprises(label, each.probability) for each in judged]
    rows = []
    for each, loss in zip(judged, losses, strict=True):
        gain = mean_interval(loss - losses[0], label, resamples, seed)
        accuracy = float((each.probability.argmax(axis=1) == label).mean())
        rows.append([" ".join(each.ensembles), accuracy, float(loss.mean()), *gain])
    columns = ["ensembles", "accuracy", "log_loss", "difference", "difference_low", "difference_high"]
    comparison = pd.DataFrame(rows, columns=columns)
    measured = measure_diagnoses(label, chances, called, DIAGNOSES, resamples, seed)
    return Results(judged, pairs, table, measured, comparison, sure, resamples, seed)


def names_of(called: int) -> str:
    """The name of a call: a diagnosis, or ``unsure``."""
    return "unsure" if called == UNSURE else DIAGNOSES[called]


def write_results(out: Path, results: Results) -> None:
    """Write the tables, the measures and the report into a folder."""
    table, measured = results.table, results.measured
    write_table(out / "predictions.csv", table)
    write_table(out / "comparison.csv", results.comparison)
    most = table[list(DIAGNOSES)].idxmax(axis=1)
    confusion = pd.DataFrame({"actual": table["diagnosis"], "predicted": most})
    write_table(out / "confusion.csv", confusion.sort_values(["actual", "predicted"], ignore_index=True))
    write_json(out / "intervals.json", measured)
    short = {name: each["value"] for name, each in measured.items() if name not in {"of", "n_patients"}}
    for name, each in measured["of"].items():
        short |= {
            f"{measure}_{name}": each[measure]["value"] for measure in ("auroc", "brier", "sensitivity")
        }
    write_json(out / "metrics.json", short | {"n_patients": measured["n_patients"]}, digits=4)
    pages.write(out / "report.html", page(results))


def page(results: Results) -> str:
    """The report as HTML, which opens offline."""
    table = results.table
    label = table["diagnosis"].map(DIAGNOSES.index).to_numpy()
    chances = table[list(DIAGNOSES)].to_numpy()
    called = calls(chances, results.sure)
    last = results.judged[0].folds[-1]
    return pages.render(
        "answer/report.html.j2",
        diagnoses=[(name, pages.diagnosis(name)) for name in DIAGNOSES],
        measured=results.measured,
        confusion=[_row(label == k, chances.argmax(axis=1), called) for k in range(len(DIAGNOSES))],
        curves=[_curves(label == k, chances[:, k]) for k in range(len(DIAGNOSES))],
        values=pages.records(predictive_values(label, called, last.shares, DIAGNOSES, results.seed)),
        comparison=pages.records(results.comparison),
        patients=pages.records(
            table.sort_values(["diagnosis", "apl", "patient"], ascending=[True, False, True])
        ),
        pairs=results.pairs,
        folds=results.judged[0].folds,
        shares=last.shares,
        sure=results.sure,
        seed=results.seed,
        resamples=results.resamples,
    )


def _row(mine: np.ndarray, most: np.ndarray, called: np.ndarray) -> dict[str, Any]:
    """Of the patients with one diagnosis: how many have each most probable diagnosis, and each call."""
    counts = [int((mine & (most == k)).sum()) for k in range(len(DIAGNOSES))]
    return {
        "most": [(count, wilson_interval(count, int(mine.sum()))) for count in counts],
        "called": [int((mine & (called == k)).sum()) for k in (*range(len(DIAGNOSES)), UNSURE)],
    }


def _curves(is_k: np.ndarray, probability: np.ndarray) -> dict[str, Any]:
    """Points of the ROC curve and of the calibration of one diagnosis against the rest."""
    roc = pages.points(roc_curve_table(is_k, probability), "fpr", "tpr")
    return {"roc": roc, "calibration": pages.with_ends(calibration_table(is_k, probability))}
