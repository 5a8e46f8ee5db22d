"""Is the ensemble better than its members and than plain baselines? Paired comparisons.

Every baseline is judged on the same held-out patients by the same nested scheme as the ensemble
(`aplsmear.ensembles.combination`): what it chooses or fits comes from the other folds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression

from aplsmear.ensembles.combination import Candidate, judge
from aplsmear.ensembles.familiarity import describe_features
from aplsmear.ensembles.pooling import SUMMARIES
from aplsmear.evaluation.auroc import auroc_within_folds, delong_interval, delong_test
from aplsmear.features.store import Features

_STRENGTHS = (0.0001, 0.001, 0.01, 0.1)  # C of a regression on hundreds of features


def baselines_of(
    patients: pd.DataFrame, members: Mapping[str, pd.DataFrame], shares: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    """Held-out probabilities of simpler models than the ensemble, each float64 (patients,).

    Args:
        patients: of `aplsmear.ensembles.combination.patients_of`.
        members: of `aplsmear.ensembles.combination.read_members`.
        shares: members that score cells; of each, the share of positive cells is a baseline. Names that are
            not members are ignored.
        seed: for `aplsmear.ensembles.combination.judge`; nothing here is random.

    Returns:
        ``<member> alone``, by the summary that is best on the inner folds; ``share of <member> cells``; and
        ``plain average`` of the members' standardised logits (Dawes, Am Psychol 1979;34:571).
    """
    average = [Candidate(n, "average", summary, 0.0, 0) for n, summary in enumerate(SUMMARIES)]
    share = [candidate for candidate in average if candidate.summary == "share"]
    models = {f"{name} alone": ({name: table}, average) for name, table in members.items()}
    models |= {f"share of {name} cells": ({name: members[name]}, share) for name in shares if name in members}
    models["plain average"] = (dict(members), average)
    return {
        name: judge(patients, tables, candidates, 0, seed).table["probability"].to_numpy()
        for name, (tables, candidates) in models.items()
    }


def pooled_features(
    features: Iterable[Features], items: pd.DataFrame, patients: pd.DataFrame
) -> dict[str, np.ndarray]:
    """Each patient's features, averaged over the plain views of the patient's items (``item, patient``).

    For each layer float64 (patients, channels), rows as in `patients`; NaN for a patient without items.
    """
    owner = dict(zip(items["item"], items["patient"], strict=True))
    pooled = {}
    for layer in features:
        found, channels = describe_features(layer, owner), layer.values.shape[1]
        nothing = np.full(channels, np.nan)
        pooled[layer.name] = np.array([found.get(each, nothing)[:channels] for each in patients["patient"]])
    return pooled


def pooled_baseline(patients: pd.DataFrame, pooled: Mapping[str, np.ndarray]) -> np.ndarray:
    """Held-out probabilities of a ridge regression on mean-pooled features, float64 (patients,).

    The layer and the strength of the penalty with the best AUROC on the inner folds are chosen. A patient
    without items gets the mean features of the training patients.
    """
    label, fold = patients["label"].to_numpy(), patients["fold"].to_numpy()
    out = np.zeros(len(patients))
    for outer_fold in np.unique(fold):
        inside, outside = np.flatnonzero(fold != outer_fold), np.flatnonzero(fold == outer_fold)

        def inner_auroc(choice: tuple[str, float], inside: np.ndarray = inside) -> float:
            inner = np.zeros(len(patients))
            for held_out in np.unique(fold[inside]):
                train, test = inside[fold[inside] != held_out], inside[fold[inside] == held_out]
                inner[test] = _regressed(pooled[choice[0]], train, test, label, choice[1])
            return auroc_within_folds(label[inside], inner[inside], fold[inside])

        layer, C = max(product(pooled, _STRENGTHS), key=inner_auroc)
        out[outside] = expit(_regressed(pooled[layer], inside, outside, label, C))
    return out


def compare(
    patients: pd.DataFrame, ensemble: np.ndarray, baselines: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """The ensemble against each baseline on the same held-out patients (DeLong et al. 1988).

    Args:
        patients: ``label`` of each.
        ensemble: held-out probabilities, float64 (patients,).
        baselines: likewise, by name.

    Returns:
        ``against, auroc, low, high, difference, difference_low, difference_high, p, p_holm``: first the
        ensemble itself (difference 0), then the baselines in their order. AUROC of the row with its 95 %
        interval; ensemble minus baseline with its 95 % interval; two-sided p value, also adjusted for the
        number of comparisons (Holm, Scand J Stat 1979;6:65).
    """
    label = patients["label"].to_numpy()
    rows = []
    for name, scores in {"the ensemble": ensemble, **baselines}.items():
        interval = delong_interval(label, scores)
        test = delong_test(label, ensemble, scores)
        rows.append(
            {
                "against": name,
                "auroc": interval.value,
                "low": interval.low,
                "high": interval.high,
                "difference": test.difference,
                "difference_low": test.interval.low,
                "difference_high": test.interval.high,
                "p": test.p,
            }
        )
    table = pd.DataFrame(rows)
    return table.assign(p_holm=[1.0, *_holm(table["p"].to_numpy()[1:])])


def _holm(p: np.ndarray) -> np.ndarray:
    """P values adjusted by Holm's method, float64 (comparisons,)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def _regressed(
    values: np.ndarray, train: np.ndarray, test: np.ndarray, label: np.ndarray, C: float
) -> np.ndarray:
    """Logits of the rows `test` by a ridge regression on standardised features of the rows `train`."""
    filled = SimpleImputer(keep_empty_features=True).fit(values[train]).transform(values)
    mean, scale = filled[train].mean(axis=0), filled[train].std(axis=0)
    standard = (filled - mean) / np.maximum(scale, 1e-9)
    model = LogisticRegression(C=C, max_iter=1000).fit(standard[train], label[train])
    return np.asarray(model.decision_function(standard[test]))
