"""A labelled cohort, judged by a finished ensemble: what would the ensemble have been worth there?

The operating points and the calibration are those of the training run. Nothing is fitted to the cohort, with
one exception that is shown beside it: `aplsmear.prediction.recalibration` shifts all logits by one number,
without labels. The plain baselines of the bundle judge the same patients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from aplsmear import words
from aplsmear.compute.engine import HERE, Engine
from aplsmear.data.dataset import DataSet, DataSetError, in_both, read_data_set
from aplsmear.data.pseudonyms import Pseudonyms
from aplsmear.data.tasks import patient_rows
from aplsmear.ensembles.baselines import compare
from aplsmear.ensembles.bundle import Bundle
from aplsmear.ensembles.combination import measure, measure_alarm
from aplsmear.errors import UserError
from aplsmear.evaluation.columns import Z
from aplsmear.evaluation.curves import confusion_table, curve_tables, decision_table
from aplsmear.evaluation.intervals import headline
from aplsmear.files import write_json
from aplsmear.prediction.predict import Models, check_input, judge_patients, verdict_table
from aplsmear.prediction.recalibration import adapted, in_words
from aplsmear.reports import pages
from aplsmear.tables import write_table

_FEWEST = 2  # patients of each diagnosis, below which there are no intervals
_FEWEST_RANKED = 4  # patients below which a rank correlation has no interval
_NOT_COMPARED = (
    "It was not checked whether patients of this cohort are in the training data set: "
    "`aplsmear evaluate --trained-on DIR` compares names and pictures."
)
_ADAPTED = {"probability": "adapted", "verdict": "adapted_verdict", "sensitive": "adapted_sensitive"}


@dataclass(frozen=True)
class Evaluation:
    """The verdicts of an ensemble on a labelled cohort, and its measures."""

    bundle: Bundle
    table: pd.DataFrame  # of `labelled_table`
    measured: Mapping[str, Any]  # of `measure_cohort`
    comparison: pd.DataFrame  # of `aplsmear.ensembles.baselines.compare`
    curves: Mapping[str, pd.DataFrame]  # roc, band, precision_recall, calibration, decision
    left_out: Mapping[str, Any]  # what was left out of the data set, and how much of it
    study: Mapping[str, Any]  # of `aplsmear.reports.pages.study_content`
    remarks: Sequence[str] = ()  # for the head of the page


def evaluate(
    bundle: Bundle,
    root: Path,
    resamples: int,
    seed: int,
    engine: Engine = HERE,
    pseudonyms: Pseudonyms | None = None,
    trained_on: Path | None = None,
) -> Evaluation:
    """Judge the patients of a data set that have one of the two diagnoses of an ensemble.

    `root` is the folder of the data set, with diagnoses. Pseudonyms replace the names of patients, smears and
    cells. `trained_on` is the folder of the training data set; None: it is not compared, and a remark says
    so. Raises DataSetError if the data set has problems, or shares patients or pictures with the training
    data set; UserError if there are too few patients of a diagnosis, or members need cells and there
    are none.
    """
    model = bundle.model
    found = _read(root, model.min_box, engine, pseudonyms, trained_on)
    asked = [model.positive, model.negative]
    smears, cells = (each[each["diagnosis"].isin(asked)] for each in (found.smears, found.cells))
    patients = patient_rows(smears, cells)
    others = sorted(set(patient_rows(found.smears, found.cells)["patient"]) - set(patients["patient"]))
    _check_diagnoses(patients, bundle, root)
    check_input(bundle, smears, cells, root)
    models = Models(bundle, bundle.outer_fold_of(None), baselines=True)
    files = pseudonyms.files(root, smears, cells) if pseudonyms else None
    verdicts = list(judge_patients(models, root, smears, cells, engine, files))
    logits = np.array([each.logits for each in verdicts])
    shifted = adapted(models.combination, logits)
    both = [verdict_table(verdicts, each, model.cell_curve) for each in (models.combination, shifted)]
    table = labelled_table(both[0], both[1], patients, model.positive)
    names = verdicts[0].baselines
    baselines = {name: np.array([each.baselines[name] for each in verdicts]) for name in names}
    answers = table["label"], table["probability"]
    return Evaluation(
        bundle=bundle,
        table=table,
        measured=measure_cohort(table, resamples, seed),
        comparison=compare(table, table["probability"].to_numpy(), baselines),
        curves=curve_tables(*answers, resamples, seed) | {"decision": decision_table(*answers)},
        study=pages.study_content(table["patient"], smears, cells, found.report["left_out"], logits),
        left_out=found.report["left_out"]
        | {"patients_with_another_diagnosis": {"count": len(others), "examples": others[:5]}},
        remarks=[
            *found.report["remarks"],
            "For the second result, `adapted`, all logits are "
            f"{in_words(models.combination, shifted, 'the patients')} No diagnosis was used for this.",
            *([] if trained_on else [_NOT_COMPARED]),
            *seen_by_backbones(model.backbones, root),
        ],
    )


def seen_by_backbones(backbones: Mapping[str, Mapping[str, Any]], root: Path) -> list[str]:
    """A warning for each backbone whose weights were trained on images of this data set, as far as known.

    `backbones` are rows of params.yaml, by name; their `trained_on` names public data sets. The name of the
    folder is compared, without capitals and signs.
    """
    name = re.sub(r"[^a-z0-9]", "", root.resolve().name.lower())
    return [
        f"`trained_on` in params.yaml says that {each} trained the weights of the backbone {backbone}, and "
        f"the folder {root.name} has this name. If so, its patients are not held out, and the result is too "
        "good."
        for backbone, row in backbones.items()
        for each in row.get("trained_on", [])
        if each.replace("_", "") in name
    ]


def labelled_table(
    verdicts: pd.DataFrame, shifted: pd.DataFrame, patients: pd.DataFrame, positive: str
) -> pd.DataFrame:
    """The verdicts beside the diagnoses.

    `verdicts` (of `verdict_table`) are by the combination of the training run, `shifted` by the adapted one;
    `patients` are of `aplsmear.data.tasks.patient_rows`; `positive` is the diagnosis with label 1.

    Returns ``patient, site, diagnosis, label``, the columns of `verdicts`, and ``adapted, adapted_verdict,
    adapted_sensitive``: probability and calls of `shifted`.
    """
    known = patients.drop_duplicates("patient").set_index("patient").loc[verdicts["patient"]]
    diagnosis = known["diagnosis"].to_numpy()
    front = {"patient": verdicts["patient"], "site": known["site"].to_numpy(), "diagnosis": diagnosis}
    front["label"] = (diagnosis == positive).astype(np.int64)
    new = {name: shifted[column].to_numpy() for column, name in _ADAPTED.items()}
    return pd.DataFrame(front).join(verdicts.drop(columns="patient")).assign(**new)


def measure_cohort(table: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    """The measures of a table of `labelled_table`, for intervals.json.

    They are those of `aplsmear.ensembles.combination.measure`, and the groups ``adapted``: the same after the
    adaptation; ``sites``: the same for each site, if there are several, without a site that has fewer than
    two patients of a diagnosis; ``unfamiliar``: how many patients and how many wrong calls (at the balanced
    operating point) carried a warning, and Spearman's rank correlation of each distance with the error of the
    probability, with its interval (Bonett & Wright, Psychometrika 2000;65:23).
    """
    names = {new: old for old, new in _ADAPTED.items()}
    shifted = table[["label", *names]].rename(columns=names)
    wrong, warned = table["verdict"] != table["label"], table["warning"] != ""
    error = (table["probability"] - table["label"]).abs().to_numpy()
    unfamiliar: dict[str, Any] = {
        "warned": int(warned.sum()),
        "wrong": int(wrong.sum()),
        "wrong_and_warned": int((wrong & warned).sum()),
    }
    for column in ("distance", "stain"):
        if correlation := _rank_correlation(table[column].to_numpy(), error):
            unfamiliar[f"error_by_{column}"] = correlation
    several = len(set(table["site"])) > 1
    sites = {
        site: measure(mine, resamples, seed)
        for site, mine in table.groupby("site")
        if several and mine["label"].value_counts().reindex([0, 1], fill_value=0).min() >= _FEWEST
    }
    return measure(table, resamples, seed) | {
        "alarm": measure_alarm(table),
        "adapted": measure(shifted, resamples, seed),
        "sites": sites,
        "unfamiliar": unfamiliar,
    }


def write_evaluation(out: Path, found: Evaluation) -> None:
    """Write the tables, the measures and the page into a folder, such as ``evaluated/<name>``."""
    model, measured = found.bundle.model, found.measured
    write_table(out / "predictions.csv", found.table)
    write_table(out / "comparison.csv", found.comparison)
    for name, curve in found.curves.items():
        write_table(out / f"{name}.csv", curve)
    calls = confusion_table(found.table["label"], found.table["verdict"], [model.negative, model.positive])
    write_table(out / "confusion.csv", calls)
    write_json(out / "intervals.json", measured)
    short = headline(measured) | {"adapted": headline(measured["adapted"])}
    write_json(out / "metrics.json", short, digits=4)
    pages.write(out / "report.html", page(found))
    pages.write(out / "summary.svg", summary(found))


def page(found: Evaluation) -> str:
    """The page of a cohort as HTML."""
    model, table = found.bundle.model, found.table
    variants: dict[str, Any] = {"in training, held out": model.held_out} if model.held_out else {}
    variants |= {"here, as trained": found.measured, "here, adapted": found.measured["adapted"]}
    decision = found.curves["decision"]
    share = float(table["label"].mean())
    # As a share of the most that could be gained, so that 1 is perfect (Kerr, J Clin Oncol 2016;34:2534).
    drawn = {
        name: [(x, y / share) for x, y in pages.points(decision, "threshold", name) if y >= 0]
        for name in ("model", "treat_all")
    }
    return pages.render(
        "prediction/cohort.html.j2",
        name=model.name,
        positive=pages.diagnosis(model.positive),
        negative=pages.diagnosis(model.negative),
        measured=found.measured,
        variants=variants,
        decision=drawn,
        comparison=pages.records(found.comparison),
        patients=pages.records(table.sort_values(["probability", "patient"], ascending=[False, True])),
        thresholds=found.bundle.combinations[-1].thresholds,
        alarm=found.bundle.combinations[-1].alarm,
        left_out=words.left_out(found.left_out),
        remarks=found.remarks,
        inputs=model.inputs,
        **pages.curve_content(table, found.curves, found.measured),
        study=found.study,
    )


def summary(found: Evaluation) -> str:
    """The numbers in short, as an SVG that the report of the ensemble shows."""
    names = {side: pages.diagnosis(getattr(found.bundle.model, side)) for side in ("positive", "negative")}
    return pages.render("prediction/summary.svg.j2", measured=found.measured, **names)


def _read(
    root: Path, min_box: int, engine: Engine, pseudonyms: Pseudonyms | None, trained_on: Path | None
) -> DataSet:
    """The data set of the cohort, which shares no patient and no picture with the training data set."""
    options: dict[str, Any] = {"min_box": min_box, "engine": engine, "pseudonyms": pseudonyms}
    found = read_data_set(root, {}, skip_bad_images=False, **options)
    if trained_on:
        training = read_data_set(trained_on, {}, skip_bad_images=True, labelled=False, **options)
        if problems := in_both(found, training):
            raise DataSetError(problems)
    return found


def _check_diagnoses(patients: pd.DataFrame, bundle: Bundle, root: Path) -> None:
    """Refuse a cohort in which a diagnosis has too few patients."""
    counts = patients.drop_duplicates("patient")["diagnosis"].value_counts()
    wanted = (bundle.model.positive, bundle.model.negative)
    if any(counts.get(diagnosis, 0) < _FEWEST for diagnosis in wanted):
        has = " and ".join(f"{counts.get(diagnosis, 0)} with {diagnosis}" for diagnosis in wanted)
        raise UserError(
            f"{root}: an evaluation of the ensemble {bundle.model.name} needs at least {_FEWEST} patients of "
            f"each diagnosis, but there are {has}. Add patients, or use `aplsmear predict`, which needs no "
            "diagnoses."
        )


def _rank_correlation(distance: np.ndarray, error: np.ndarray) -> dict[str, float] | None:
    """Spearman's correlation with its 95 % interval; None: too few patients, or all the same distance."""
    known = np.isfinite(distance)
    n = int(known.sum())
    if n < _FEWEST_RANKED or np.ptp(distance[known]) == 0 or np.ptp(error[known]) == 0:
        return None
    value = float(stats.spearmanr(distance[known], error[known]).statistic)
    if abs(value) >= 1:
        return {"value": value, "low": value, "high": value}
    half = Z * math.sqrt((1 + value**2 / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(value) + side * half) for side in (-1, 1))
    return {"value": value, "low": low, "high": high}
