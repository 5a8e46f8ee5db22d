"""Trained there, judged here: each cohort trains an ensemble, and the other cohorts are judged by it.

The training is the pipeline itself. For each cohort it runs as an experiment of DVC (`dvc exp run --temp`)
in a temporary copy of the repository. There, the cohort is `dataset.root`, and the others are rows of
`external`. DVC's cache has the stages that have finished, so a run that was cut off goes on from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from aplsmear.data.dataset import DataSet, DataSetError, Problem, in_both, read_data_set
from aplsmear.data.tasks import patient_rows
from aplsmear.ensembles.combination import measure
from aplsmear.errors import UserError
from aplsmear.evaluation.splits import FEWEST
from aplsmear.params import Params
from aplsmear.reports import pages
from aplsmear.tables import read_table, write_table

OTHER_SITES = "all other sites"
FILES = ("report.html", "intervals.json", "predictions.csv")  # of an ensemble or an evaluation
TABLES = ("smears.csv", "cells.csv")  # of the data set


@dataclass(frozen=True)
class Judged:
    """The measures of an ensemble on a cohort or site."""

    trained_on: str  # name of the cohort, or `OTHER_SITES`
    judged_on: str  # cohort or site; if it is `trained_on`, cross-validation held its patients out
    measured: Mapping[str, Any]  # of `measure`; empty if a site has too few patients
    report: str  # path of a page about it, from the page of the table


@dataclass(frozen=True)
class Training:
    """One run of the pipeline: an experiment of DVC."""

    name: str  # of the experiment
    trained_on: str  # name of the cohort
    settings: Mapping[str, str | int]  # key of params.yaml -> value
    targets: Sequence[str]  # stages
    results: Mapping[str, str]  # name of each judged cohort -> folder of its results in the experiment
    by_site: bool = False  # each site of the cohort is one fold

    def files(self, out: Path) -> dict[str, Path]:
        """Path in the experiment -> its copy in `out`, of the files that `judged` and a reader need."""
        found = {
            f"{folder}/{file}": out / self.trained_on / cohort / file
            for cohort, folder in self.results.items()
            for file in FILES
        }
        sites = {f"dataset/{table}": out / self.trained_on / table for table in TABLES}
        return found | (sites if self.by_site else {})

    def judged(self, out: Path, params: Params) -> Iterator[Judged]:
        """The measures of each judged cohort, or of each site, from the copies of `files`."""
        for cohort in self.results:
            folder = Path(self.trained_on) / cohort
            report = (folder / "report.html").as_posix()
            if self.by_site:
                table = read_table(out / folder / "predictions.csv")
                patients = patient_rows(*(read_table(out / self.trained_on / name) for name in TABLES))
                yield from sites_judged(table, patients, params.combine.resamples, params.seed, report)
            else:
                measured = json.loads((out / folder / "intervals.json").read_text(encoding="utf-8"))
                yield Judged(self.trained_on, cohort, measured, report)


def cohorts_of(folders: Sequence[Path]) -> dict[str, Path]:
    """Full path of each cohort by its name, that of its folder in small letters, digits and _.

    Raises UserError if two folders have the same name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        path = folder.resolve() if ".." in folder.parts else folder.absolute()
        name = re.sub(r"[^a-z0-9]+", "_", path.name.lower()).strip("_")
        name = name if name[:1].isalpha() else f"cohort_{name}"
        if name in found:
            raise UserError(
                f"{found[name]} and {path} have the same name, {name}: rename one, or give a link to it "
                "with another name (ln -s)"
            )
        found[name] = path
    return found


def read_cohorts(cohorts: Mapping[str, Path], params: Params) -> dict[str, DataSet]:
    """Read all cohorts. DataSetError with all problems, also if a patient or a picture is in two of them."""
    found: dict[str, DataSet] = {}
    problems: list[Problem] = []
    for name, root in cohorts.items():
        try:
            found[name] = read_data_set(
                root,
                params.tasks,
                min_box=params.dataset.min_box,
                skip_bad_images=params.dataset.skip_bad_images,
            )
        except DataSetError as error:
            problems += _below(root, error.problems)
    for one, other in combinations(found, 2):
        problems += _below(cohorts[one], in_both(found[one], found[other]))
    if problems:
        raise DataSetError(problems)
    return found


def plan(
    cohorts: Mapping[str, Path], read: Mapping[str, DataSet], ensemble: str, params: Params
) -> list[Training]:
    """The runs of the pipeline: one for each cohort. A single cohort: one, in which each fold is a site.

    Raises UserError if a single cohort has too few sites, or a cohort lacks a diagnosis of the ensemble.
    """
    wanted = params.ensembles[ensemble]
    for name, each in read.items():
        if without := {wanted.positive, wanted.negative} - set(each.patients["diagnosis"]):
            raise UserError(f"{cohorts[name]} has no patient with {' or '.join(sorted(without))}")
    own = f"ensembles/{ensemble}"
    trainings = []
    for name, root in cohorts.items():
        settings: dict[str, str | int] = {"dataset.root": str(root), "dataset.source": "folder"}
        results = {name: own}
        if len(cohorts) == 1:
            sites = sorted(set(read[name].patients["site"]) - {""})
            if len(sites) < FEWEST:
                raise UserError(
                    f"{root} has {len(sites)} sites: leaving one out needs {FEWEST} (column `site` of "
                    "wsi.csv). Or give two or more folders: aplsmear cross DIR DIR2"
                )
            settings |= {"split.by": "site", "split.folds": len(sites)}
        others = [other for other in cohorts if other != name]
        for other in others:
            settings |= {
                f"external.{other}.ensemble": ensemble,
                f"external.{other}.root": str(cohorts[other]),
            }
            results[other] = f"evaluated/{other}"
        targets = [f"evaluate@{other}" for other in others] or [f"ensemble_{ensemble}"]
        experiment = f"cross-{ensemble}-{name}"
        trainings.append(Training(experiment, name, settings, targets, results, by_site=len(cohorts) == 1))
    return trainings


def sites_judged(
    predictions: pd.DataFrame, patients: pd.DataFrame, resamples: int, seed: int, report: str
) -> Iterator[Judged]:
    """Each site, judged by models that were trained on the other sites, then all patients.

    `predictions` are of the ensemble, trained with `split.by` site; `patients` of
    `aplsmear.data.tasks.patient_rows`.
    """
    site = patients.drop_duplicates("patient").set_index("patient")["site"]
    table = predictions.astype({"verdict": int, "sensitive": int})
    groups = [(str(name), mine) for name, mine in table.groupby(table["patient"].map(site))]
    for name, mine in [*groups, ("all sites", table)]:
        enough = mine["label"].value_counts().reindex([0, 1], fill_value=0).min() >= 2  # for a bootstrap
        yield Judged(OTHER_SITES, name, measure(mine, resamples, seed) if enough else {}, report)


def table_of(judged: Sequence[Judged]) -> pd.DataFrame:
    """A row for each pair: ``trained_on, judged_on, n_patients, n_positive``, and each measure.

    A measure has three columns, such as ``auroc, auroc_low, auroc_high``. Those of the sensitive operating
    point start with ``at_sensitive_``.
    """
    rows = []
    for each in judged:
        row: dict[str, Any] = {"trained_on": each.trained_on, "judged_on": each.judged_on}
        row |= {key: each.measured.get(key) for key in ("n_patients", "n_positive")}
        for prefix, group in (("", each.measured), ("at_sensitive_", each.measured.get("at_sensitive", {}))):
            for key, found in group.items():
                if isinstance(found, Mapping) and "value" in found:
                    ends = {f"{prefix}{key}_{end}": found[end] for end in ("low", "high")}
                    row |= {f"{prefix}{key}": found["value"], **ends}
        rows.append(row)
    return pd.DataFrame(rows)


def write_cross(out: Path, judged: Sequence[Judged], params: Params, ensemble: str) -> None:
    """Write cross.csv and report.html into a folder."""
    wanted = params.ensembles[ensemble]
    write_table(out / "cross.csv", table_of(judged))
    text = pages.render(
        "workspace/cross.html.j2",
        name=ensemble,
        positive=pages.diagnosis(wanted.positive),
        negative=pages.diagnosis(wanted.negative),
        trained=list(dict.fromkeys(each.trained_on for each in judged)),
        judged={each.judged_on: each.measured for each in judged},
        found={(each.trained_on, each.judged_on): each for each in judged},
    )
    pages.write(out / "report.html", text)


def _below(root: Path, problems: Sequence[Problem]) -> list[Problem]:
    """The problems of one of several data sets, with the folder in the names of files."""
    return [replace(each, file=str(root / each.file)) for each in problems]
