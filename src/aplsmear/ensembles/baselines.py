"""Is the ensemble better than its members and than plain baselines? Paired comparisons.

Every baseline is judged on the same held-out patients by the same nested scheme as the ensemble
(`aplsmear.ensembles.combination`): what it chooses or fits comes from the other folds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from aplsmear.ensembles.combination import Candidate, Combination, Verdicts, judge, standardised
from aplsmear.ensembles.familiarity import describe_features
from aplsmear.ensembles.pooling import SUMMARIES
from aplsmear.evaluation.auroc import auroc_within_folds, delong_interval, delong_test
from aplsmear.features.store import Features

_STRENGTHS = (0.0001, 0.001, 0.01, 0.1)  # C of a regression on hundreds of features


POOLED = "mean-pooled features"


@dataclass(frozen=True)
class Pooled:
    """A ridge regression on a patient's mean-pooled features."""

    layer: str  # backbone/layer
    mean: np.ndarray  # float64 (channels,); also replaces the features of a patient without cells
    scale: np.ndarray  # float64 (channels,)
    weights: np.ndarray  # float64 (channels,)
    intercept: np.ndarray  # float64 ()

    def probability(self, values: np.ndarray) -> np.ndarray:
        """Float64 (patients,) of pooled features (patients, channels), NaN for a patient without cells."""
        standard = (np.where(np.isnan(values), self.mean, values) - self.mean) / self.scale
        return np.asarray(expit(standard @ self.weights + self.intercept))


@dataclass(frozen=True)
class Baselines:
    """The plain baselines that go with an ensemble to new patients, fitted to all training patients."""

    shares: Mapping[str, Combination]  # by the name of `share_of`
    pooled: Pooled | None  # None: the ensemble has no cells


def share_of(task: str) -> str:
    """The name of the baseline that is the share of cells that a task calls positive."""
    return f"share of {task} cells"


def baselines_of(
    patients: pd.DataFrame, members: Mapping[str, pd.DataFrame], shares: Mapping[str, pd.DataFrame], seed: int
) -> dict[str, Verdicts]:
    """Held-out verdicts of simpler models than the ensemble.

    ``<member> alone``, by the summary that is best on the inner folds; `share_of` each task in `shares`; and
    ``plain average`` of the members' standardised logits (Dawes, Am Psychol 1979;34:571). Members and shares
    are tables of `aplsmear.ensembles.pooling.summarise_patients`, by task.
    """
    average = [Candidate(n, "average", summary, 0.0, 0) for n, summary in enumerate(SUMMARIES)]
    share = [candidate for candidate in average if candidate.summary == "share"]
    models = {f"{name} alone": ({name: table}, average) for name, table in members.items()}
    models |= {share_of(name): ({name: table}, share) for name, table in shares.items()}
    models["plain average"] = (dict(members), average)
    return {
        name: judge(patients, tables, candidates, 0, seed) for name, (tables, candidates) in models.items()
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


def pooled_baseline(patients: pd.DataFrame, pooled: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Pooled]:
    """Held-out probabilities of a ridge regression on mean-pooled features, and the one for new patients.

    The layer and the strength of the penalty with the best AUROC on the inner folds are chosen. A patient
    without items gets the mean features of the training patients. `pooled` is of `pooled_features`. The
    probabilities are float64 (patients,); the model is fitted to all patients.
    """
    label, fold = patients["label"].to_numpy(), patients["fold"].to_numpy()
    out = np.zeros(len(patients))
    for outer_fold in range(int(fold.max()) + 2):
        inside, outside = np.flatnonzero(fold != outer_fold), np.flatnonzero(fold == outer_fold)

        def inner_auroc(choice: tuple[str, float], inside: np.ndarray = inside) -> float:
            inner = np.zeros(len(patients))
            for held_out in np.unique(fold[inside]):
                train, test = inside[fold[inside] != held_out], inside[fold[inside] == held_out]
                model = _regressed(choice[0], pooled[choice[0]][train], label[train], choice[1])
                inner[test] = model.probability(pooled[choice[0]][test])
            return auroc_within_folds(label[inside], inner[inside], fold[inside])

        layer, C = max(product(pooled, _STRENGTHS), key=inner_auroc)
        model = _regressed(layer, pooled[layer][inside], label[inside], C)
        out[outside] = model.probability(pooled[layer][outside])
    return out, model


def compare(
    patients: pd.DataFrame, ensemble: np.ndarray, baselines: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """The ensemble against each baseline on the same held-out patients (DeLong et al. 1988).

    Held-out probabilities are float64 (patients,). Columns: ``against, auroc, low, high, difference,
    difference_low, difference_high, p, p_holm``. The first row is the ensemble itself (difference 0), then
    come the baselines in their order. AUROC of the row with its 95 % interval; ensemble minus baseline with
    its 95 % interval; two-sided p value, also adjusted for the number of comparisons (Holm, Scand J Stat
    1979;6:65).
    """
    label = patients["label"].to_numpy()
    rows = []
    for name, scores in {"the ensemble": ensemble, **baselines}.items():
        test = delong_test(label, ensemble, scores)
        rows.append([name, *delong_interval(label, scores), *test.interval, test.p])
    columns = ["against", "auroc", "low", "high", "difference", "difference_low", "difference_high", "p"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=[1.0, *_holm(table["p"].to_numpy()[1:])])


def _holm(p: np.ndarray) -> np.ndarray:
    """P values adjusted by Holm's method, float64 (comparisons,)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def _regressed(layer: str, values: np.ndarray, label: np.ndarray, C: float) -> Pooled:
    """A ridge regression on the standardised features of some patients, float64 (patients, channels)."""
    mean, scale, inputs = standardised(values, 1e-9)
    model = LogisticRegression(C=C, max_iter=1000).fit(inputs, label)
    return Pooled(layer, mean, scale, model.coef_[0], np.asarray(model.intercept_[0]))
