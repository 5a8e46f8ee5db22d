"""Folds by patient or by site, and the nested cross-validation that follows from them.

The patient is the unit of every split, or the site with all its patients. K folds give K outer folds, and the
final model::

    fold           0   1   2   3   4
    outer fold 0 [out] in  in  in  in     fold 0 is held out: what is fitted or chosen for its patients comes
    outer fold 1   in [out] in  in  in    from the inner folds 1 to 4
      ...
    outer fold 4   in  in  in  in [out]
    final model    in  in  in  in  in     nobody is held out, all five folds are inner folds

In code, an outer fold is its number, 0 to K - 1, and the final model is number K.

In outer fold w, each inner fold j is scored by a network that saw neither w nor j. So a network is described
by the set of folds that it has *not* seen: {w, j} for inner scores, {w} for the held-out patients of outer
fold w, {} for the final model. The network without {w, j} serves outer fold w (it scores j) and outer fold j
(it scores w).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from aplsmear.errors import UserError

HeldOut = frozenset[int]
Unit = Literal["patient", "site"]

FEWEST = 3  # folds: one is held out, one trains, one is scored


class SplitError(UserError, ValueError):
    """The patients cannot be split as asked."""


def make_folds(patients: pd.DataFrame, folds: int, seed: int, by: Unit = "patient") -> pd.DataFrame:
    """Deal patients into folds, each with its share of every diagnosis (as near as whole sites allow).

    Args:
        patients: rows with ``patient`` and ``diagnosis``; a patient may occur often (one row a smear); by
            site, ``site`` too.
        folds: how many; by site, as many as there are sites leave one site out at a time.
        seed: of the shuffle.
        by: what stays together.

    Returns:
        ``patient, diagnosis, fold``, one row a patient, sorted by patient, whatever the order of `patients`.

    Raises:
        SplitError: a diagnosis has fewer patients than there are folds, a patient has two diagnoses, or there
            is no patient; by site: patients without a site or with two, fewer sites than folds, or a fold
            that would lack a diagnosis. Says all of it.
    """
    unique = patients[["patient", "diagnosis"]].drop_duplicates().sort_values("patient", ignore_index=True)
    problems = _unsplittable(unique, folds)
    if by == "site":
        problems += _unsplittable_sites(patients, folds)
    if problems:
        raise SplitError("\n".join(problems))
    if by == "site":
        site = unique["patient"].map(patients.drop_duplicates("patient").set_index("patient")["site"])
        return unique.assign(fold=_folds_of_sites(unique["diagnosis"], site, folds, seed))
    fold = np.zeros(len(unique), dtype=np.int64)
    dealer = StratifiedKFold(n_splits=folds, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(dealer.split(unique["patient"], unique["diagnosis"])):
        fold[held_out] = number
    return unique.assign(fold=fold)


def inner_sets(outer_fold: int, folds: int) -> dict[int, HeldOut]:
    """For each inner fold of an outer fold, the folds unseen by the network that scores it."""
    return {fold: frozenset({outer_fold, fold} - {folds}) for fold in range(folds) if fold != outer_fold}


def outer_set(outer_fold: int, folds: int) -> HeldOut:
    """The folds unseen by the network that scores an outer fold (none for the final model)."""
    return frozenset({outer_fold} - {folds})


def tuning_sets(folds: int) -> list[HeldOut]:
    """The distinct held-out pairs, which every trial trains: all inner folds of all outer folds."""
    return [frozenset({first, second}) for first in range(folds) for second in range(first)]


def _unsplittable(unique: pd.DataFrame, folds: int) -> list[str]:
    """What keeps these pairs of patient and diagnosis from being dealt into folds."""
    if unique.empty:
        return ["there is no patient to split"]
    problems = []
    for patient, theirs in unique.groupby("patient")["diagnosis"]:
        if len(theirs) > 1:
            problems.append(
                f"patient {patient!r} has the diagnoses {', '.join(sorted(theirs))}: give all smears of a "
                "patient the same one, or name two patients"
            )
    counts = unique["diagnosis"].value_counts().sort_index()
    scarce = counts[counts < folds]
    if len(scarce):
        few = ", ".join(f"{diagnosis}: {count}" for diagnosis, count in scarce.items())
        least = int(scarce.min())
        fewer = f"set split.folds in params.yaml to {least} or " if least >= FEWEST else ""
        problems.append(
            f"{folds} folds need at least {folds} patients of every diagnosis, but there are {few}: "
            f"{fewer}add patients"
        )
    return problems


def _unsplittable_sites(patients: pd.DataFrame, folds: int) -> list[str]:
    """What keeps whole sites from being dealt into folds."""
    if patients.empty:
        return []
    named = patients[patients["site"] != ""]
    if named.empty:
        return [
            "split.by is site, but no smear has one: add a column `site` to wsi.csv (hospital or cohort), or "
            "set split.by in params.yaml to patient"
        ]
    problems = []
    nameless = sorted(set(patients["patient"]) - set(named["patient"]))
    if nameless:
        problems.append(
            f"split.by is site, but {len(nameless)} patients have none: {_some(nameless)}. Fill the column "
            "`site` of wsi.csv"
        )
    for patient, theirs in named.groupby("patient")["site"]:
        places = sorted(set(theirs))
        if len(places) > 1:
            problems.append(
                f"patient {patient!r} has the sites {', '.join(places)}: correct the column `site` of "
                "wsi.csv, give both places one name, or name two patients"
            )
    sites = sorted(set(named["site"]))
    if len(sites) < folds:
        fewer = f"set split.folds to {len(sites)}, " if len(sites) >= FEWEST else ""
        problems.append(
            f"{folds} folds need at least {folds} sites, but there are {len(sites)}: {_some(sites)}. "
            f"In params.yaml {fewer}or set split.by to patient"
        )
    return problems


def _folds_of_sites(diagnosis: pd.Series, site: pd.Series, folds: int, seed: int) -> np.ndarray:
    """The fold of each patient, int64 (patients,), with whole sites on one side.

    Raises:
        SplitError: a fold would lack a diagnosis.
    """
    fold = np.zeros(len(site), dtype=np.int64)
    if site.nunique() == folds:
        fold[:] = site.astype("category").cat.codes
    else:
        dealer = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
        for number, (_, held_out) in enumerate(dealer.split(site, diagnosis, groups=site)):
            fold[held_out] = number
    problems = []
    for number in range(folds):
        absent = sorted(set(diagnosis) - set(diagnosis[fold == number]))
        if absent:
            here = sorted(set(site[fold == number]))
            problems.append(
                f"fold {number} (sites: {_some(here)}) would have no patient with {', '.join(absent)}"
            )
    if problems:
        raise SplitError(
            "\n".join(problems) + f"\nEach of {folds} folds of whole sites needs every diagnosis: lower "
            "split.folds, give small sites a common name, or set split.by in params.yaml to patient"
        )
    return fold


def _some(names: list[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
