"""Folds by patient or by site, and the nested cross-validation on them.

All items of a patient are in one fold. In a split by site, all patients of a site are in one fold. K folds
give K outer folds and the final model::

    fold           0   1   2   3   4
    outer fold 0 [out] in  in  in  in     fold 0 is held out: its patients are scored by models that are
    outer fold 1   in [out] in  in  in    fitted and chosen on the inner folds 1 to 4
      ...
    outer fold 4   in  in  in  in [out]
    final model    in  in  in  in  in     no fold is held out, all five are inner folds

In the code, an outer fold has the number 0 to K - 1, and the final model has the number K. A network is
identified by the set of folds that it was trained *without*: {i, j} for the scores of inner folds, {i} for
the held-out patients of outer fold i, {} for the final model. The network without {i, j} is used twice: in
outer fold i it scores fold j, and in outer fold j it scores fold i.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from aplsmear.errors import UserError
from aplsmear.words import named

HeldOut = frozenset[int]
Unit = Literal["patient", "site"]

FEWEST = 3  # folds: one held out, one for training, one for inner scores


def make_folds(patients: pd.DataFrame, folds: int, seed: int, by: Unit = "patient") -> pd.DataFrame:
    """Divide patients into folds with similar shares of every diagnosis (as far as whole sites allow).

    `patients` has rows with ``patient`` and ``diagnosis`` (and ``site``, if `by` is site), one or several for
    each patient, who has one diagnosis. If `by` is site and `folds` is the number of sites, each fold is one
    site. Returns ``patient, diagnosis, fold``, one row for each patient, sorted by patient; the same for any
    order of the rows.

    Raises UserError with all problems: no patient, a diagnosis with fewer patients than folds; by site also
    a patient without a site or with two, fewer sites than folds, a fold without a diagnosis.
    """
    unique = patients[["patient", "diagnosis"]].drop_duplicates().sort_values("patient", ignore_index=True)
    problems = _too_few(unique, folds) + (_problems_of_sites(patients, folds) if by == "site" else [])
    if problems:
        raise UserError("\n".join(problems))
    site, splitter = None, StratifiedKFold
    if by == "site":
        site = unique["patient"].map(patients.drop_duplicates("patient").set_index("patient")["site"])
        splitter = StratifiedGroupKFold
    fold = np.zeros(len(unique), dtype=np.int64)
    if site is not None and site.nunique() == folds:
        fold[:] = site.astype("category").cat.codes
    else:
        parts = splitter(folds, shuffle=True, random_state=seed).split(unique, unique["diagnosis"], site)
        for number, (_, held_out) in enumerate(parts):
            fold[held_out] = number
    if site is not None:
        _check_diagnoses(unique["diagnosis"], site, fold)
    return unique.assign(fold=fold)


def inner_sets(outer_fold: int, folds: int) -> dict[int, HeldOut]:
    """Inner fold of an outer fold -> the folds that the network which scores it was trained without."""
    return {fold: frozenset({outer_fold, fold} - {folds}) for fold in range(folds) if fold != outer_fold}


def outer_set(outer_fold: int, folds: int) -> HeldOut:
    """The folds that the network which scores an outer fold was trained without; none for the final model."""
    return frozenset({outer_fold} - {folds})


def tuning_sets(folds: int) -> list[HeldOut]:
    """All pairs of folds; each trial trains a network without each pair, for all inner folds."""
    return [frozenset({first, second}) for first in range(folds) for second in range(first)]


def _too_few(unique: pd.DataFrame, folds: int) -> list[str]:
    """Reasons why these patients, one row for each, cannot be split."""
    if unique.empty:
        return ["there is no patient to split: add smears to the data set"]
    counts = unique["diagnosis"].value_counts().sort_index()
    scarce = counts[counts < folds]
    if scarce.empty:
        return []
    few = ", ".join(f"{diagnosis}: {count}" for diagnosis, count in scarce.items())
    fewer = f"set split.folds in params.yaml to {scarce.min()} or " if scarce.min() >= FEWEST else ""
    return [
        f"{folds} folds need at least {folds} patients of each diagnosis, but there are {few}: "
        f"{fewer}add patients"
    ]


def _problems_of_sites(patients: pd.DataFrame, folds: int) -> list[str]:
    """Reasons why whole sites cannot be split."""
    given = patients[patients["site"] != ""]
    if given.empty:
        return [
            "split.by is site, but no smear has a site: add a column `site` (hospital or cohort) to wsi.csv, "
            "or set split.by in params.yaml to patient"
        ]
    problems = []
    if nameless := sorted(set(patients["patient"]) - set(given["patient"])):
        problems.append(
            f"split.by is site, but {len(nameless)} patients have no site: {named(nameless)}. Fill in the "
            "column `site` of wsi.csv"
        )
    for patient, places in given.groupby("patient")["site"].unique().items():
        if len(places) > 1:
            problems.append(
                f"patient {patient!r} has the sites {', '.join(sorted(places))}: correct the column `site` "
                "of wsi.csv, give both sites one name, or use two names for two patients"
            )
    sites = sorted(set(given["site"]))
    if len(sites) < folds:
        fewer = f"set split.folds to {len(sites)}, " if len(sites) >= FEWEST else ""
        problems.append(
            f"{folds} folds need at least {folds} sites, but there are {len(sites)}: {named(sites)}. "
            f"In params.yaml {fewer}or set split.by to patient"
        )
    return problems


def _check_diagnoses(diagnosis: pd.Series, site: pd.Series, fold: np.ndarray) -> None:
    """Raise UserError if a fold of whole sites has no patient of some diagnosis."""
    problems = []
    for number, counts in pd.crosstab(fold, diagnosis).iterrows():
        if absent := ", ".join(counts.index[counts == 0]):
            here = named(sorted(set(site[fold == number])))
            problems.append(f"fold {number} (sites: {here}) would have no patient with {absent}")
    if problems:
        raise UserError(
            "\n".join(problems) + f"\nEach of {len(set(fold))} folds of whole sites needs every diagnosis: "
            "lower split.folds, give small sites a common name, or set split.by in params.yaml to patient"
        )
