"""A verdict per patient: members' summaries, combined, calibrated and called, without a leak.

The scheme, for the world in which fold 0 of five is held out (see `aplsmear.splits`)::

    fold           0        1      2      3      4
                [held out]  <----- inner folds ----->
    members     scored by   each scored by heads that saw neither it nor fold 0
                heads that
                saw 1..4
    choice         -        every candidate combination is fitted on three inner folds and scored on the fourth;
                            the simplest within one standard error of the best is chosen
    calibration    -        a line through the logits of the chosen one's four held-out quarters
    call           -        the operating point on the calibrated probabilities of those quarters
    combination    -        fitted on all four inner folds
    verdict     [fold 0] <- combination, calibration and call are applied to it, once

The last world holds out nobody and gives the model that `predict` uses on new patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from aplsmear.members import SUMMARIES
from aplsmear.params import Ensemble
from aplsmear.statistics import (
    auroc_standard_error,
    auroc_within_folds,
    operating_points,
    summary,
)


@dataclass(frozen=True)
class Candidate:
    """A way to combine members: a summary of each patient's scores, and how freely the weights may differ."""

    number: int
    summary: str  # one of SUMMARIES
    freedom: float  # inverse strength of the ridge penalty on standardised logits


@dataclass(frozen=True)
class Combination:
    """A fitted combination: probability = sigmoid(slope * (weights . logits + intercept) + offset)."""

    summary: str
    members: tuple[str, ...]
    weights: np.ndarray  # float64 (members,), on raw logits
    intercept: float
    slope: float
    offset: float
    usual: np.ndarray  # float64 (members,): stands in where a patient has no item for a member
    thresholds: dict[str, float]  # operating points on the calibrated probability

    def logit(self, logits: np.ndarray) -> np.ndarray:
        """Uncalibrated: float64 (patients,) of summaries (patients, members), NaN where a patient has no item."""
        filled = np.where(np.isnan(logits), self.usual, logits)
        return np.asarray(filled @ self.weights + self.intercept)

    def probability(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probability of the positive diagnosis, float64 (patients,)."""
        return np.asarray(expit(self.slope * self.logit(logits) + self.offset))


@dataclass(frozen=True)
class Verdicts:
    """Held-out verdicts of every patient, the combination behind each world, and what it was chosen from."""

    table: pd.DataFrame
    combinations: list[Combination]
    chosen: list[Candidate]


def draw_candidates(trials: int, seed: int) -> list[Candidate]:
    """Optuna's random candidates, drawn before any score is known, so that they serve every world without a leak."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    space = {
        "summary": optuna.distributions.CategoricalDistribution(SUMMARIES),
        "freedom": optuna.distributions.FloatDistribution(0.001, 1.0, log=True),
    }
    return [Candidate(number, **study.ask(space).params) for number in range(trials)]


def patients_of(folds: pd.DataFrame, positive: str, negative: str) -> pd.DataFrame:
    """The patients that an ensemble is about: ``patient, diagnosis, fold, label``, sorted by patient."""
    mine = folds[folds["diagnosis"].isin([positive, negative])].sort_values("patient", ignore_index=True)
    return mine.assign(label=(mine["diagnosis"] == positive).astype(np.int64))


def judge(
    patients: pd.DataFrame,
    members: Mapping[str, pd.DataFrame],
    candidates: Sequence[Candidate],
    refits: int,
    seed: int,
) -> Verdicts:
    """Nested verdicts on every patient (see the picture at the head of this module).

    Args:
        patients: of `patients_of`.
        members: for each member, summaries of `aplsmear.members.summarise_patients`.
        candidates: of `draw_candidates`.
        refits: bootstrap refits of the combination behind each verdict's interval.
        seed: of these.

    Returns:
        The table has ``patient, diagnosis, fold, label, probability, low, high, verdict, sensitive``: 95 % interval of
        the probability over refits on resampled patients; calls at the balanced and the sensitive operating point.
    """
    folds = int(patients["fold"].max()) + 1
    label, fold = patients["label"].to_numpy(), patients["fold"].to_numpy()
    table = patients.assign(probability=0.0, low=0.0, high=0.0, verdict=0, sensitive=0)
    combinations, chosen = [], []
    for world in range(folds + 1):
        inside = fold != world
        logits = {name: _logits(patients, members, world, name) for name in SUMMARIES}
        candidate, inner = _choose(
            candidates, {name: each[inside] for name, each in logits.items()}, label[inside], fold[inside]
        )
        mine = logits[candidate.summary]
        combination = _fit_whole(candidate, tuple(members), mine[inside], label[inside], inner)
        combinations.append(combination)
        chosen.append(candidate)
        outside = np.flatnonzero(~inside)
        if len(outside):
            probability = combination.probability(mine[outside])
            low, high = _interval(combination, candidate, mine, label, inside, outside, refits, [seed, world])
            table.loc[outside, "probability"] = probability
            table.loc[outside, "low"] = np.minimum(low, probability)
            table.loc[outside, "high"] = np.maximum(high, probability)
            table.loc[outside, "verdict"] = (probability >= combination.thresholds["balanced"]).astype(int)
            table.loc[outside, "sensitive"] = (probability >= combination.thresholds["sensitive"]).astype(int)
    return Verdicts(table, combinations, chosen)


def measure(verdicts: Verdicts, resamples: int, seed: int) -> dict[str, Any]:
    """What metrics.json says: every number with its 95 % interval over patients; the second operating point aside."""
    table = verdicts.table
    label, probability = table["label"], table["probability"]
    measured = summary(label, probability, table["verdict"], resamples=resamples, seed=seed)
    sensitive = summary(label, probability, table["sensitive"], resamples=resamples, seed=seed)
    at_sensitive = {name: sensitive[name] for name in ("sensitivity", "specificity", "balanced_accuracy")}
    return measured | {"at_sensitive": at_sensitive}


def read_members(folder: Path, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The summaries ``folder/<task>.csv`` of the members named.

    Raises:
        ValueError: the folder holds a member that is not named (DVC would take it for an input).
    """
    strangers = sorted(path.stem for path in folder.glob("*.csv") if path.stem not in names)
    if strangers:
        raise ValueError(
            f"{folder} holds members that params.yaml does not name: {', '.join(strangers)}. "
            "`aplsmear tidy` removes them (DVC keeps them in its cache)."
        )
    return {
        name: pd.read_csv(folder / f"{name}.csv", dtype={"patient": str}, keep_default_na=False)
        for name in names
    }


def as_model(verdicts: Verdicts, ensemble: Ensemble) -> dict[str, Any]:
    """The final combination as plain JSON."""
    final = verdicts.combinations[-1]
    return {
        "positive": ensemble.positive,
        "negative": ensemble.negative,
        "summary": final.summary,
        "weights": dict(zip(final.members, final.weights.tolist(), strict=True)),
        "usual": dict(zip(final.members, final.usual.tolist(), strict=True)),
        "intercept": final.intercept,
        "slope": final.slope,
        "offset": final.offset,
        "thresholds": final.thresholds,
    }


def _logits(
    patients: pd.DataFrame, members: Mapping[str, pd.DataFrame], world: int, kind: str
) -> np.ndarray:
    """float64 (patients, members): what each member says in a world, NaN where a patient has no item for it."""
    columns = []
    for table in members.values():
        mine = table[table["world"] == world].set_index("patient")[kind]
        columns.append(mine.reindex(patients["patient"]).to_numpy(dtype=np.float64))
    return np.stack(columns, axis=1)


def _choose(
    candidates: Sequence[Candidate], logits: Mapping[str, np.ndarray], label: np.ndarray, fold: np.ndarray
) -> tuple[Candidate, np.ndarray]:
    """The least free candidate within one standard error of the best, and its held-out logits on the inner folds."""
    inner = [_cross_fitted(candidate, logits[candidate.summary], label, fold) for candidate in candidates]
    aurocs = [auroc_within_folds(label, each, fold) for each in inner]
    best = int(np.argmax(aurocs))
    bar = aurocs[best] - auroc_standard_error(label, inner[best], fold=fold)
    place = min(
        (place for place, value in enumerate(aurocs) if value >= bar),
        key=lambda place: (candidates[place].freedom, place),
    )
    return candidates[place], inner[place]


def _cross_fitted(
    candidate: Candidate, logits: np.ndarray, label: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """Each inner fold's combined logits, fitted on the other inner folds: float64 (patients,)."""
    out = np.zeros(len(label))
    for held_out in np.unique(fold):
        there = fold == held_out
        weights, intercept, usual = _fit(candidate, logits[~there], label[~there])
        out[there] = np.where(np.isnan(logits[there]), usual, logits[there]) @ weights + intercept
    return out


def _fit(
    candidate: Candidate, logits: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray]:
    """Ridge-penalised logistic regression on standardised logits; weights and intercept for raw ones, and the usual."""
    known = ~np.isnan(logits)
    usual = np.where(known.any(0), np.where(known, logits, 0).sum(0) / np.maximum(known.sum(0), 1), 0.0)
    filled = np.where(known, logits, usual)
    scale = filled.std(0) + 1e-6
    model = LogisticRegression(C=candidate.freedom, max_iter=1000)
    model.fit((filled - usual) / scale, label)
    weights = model.coef_[0] / scale
    return weights, float(model.intercept_[0] - usual @ weights), usual


def _fit_whole(
    candidate: Candidate,
    members: tuple[str, ...],
    logits: np.ndarray,
    label: np.ndarray,
    inner: np.ndarray,
) -> Combination:
    """Fit on all inner folds; calibrate (Platt 1999) and call on the cross-fitted logits `inner`."""
    weights, intercept, usual = _fit(candidate, logits, label)
    line = LogisticRegression(C=1.0, max_iter=1000)
    spread = inner.std() + 1e-6
    line.fit(inner[:, None] / spread, label)
    slope, offset = float(line.coef_[0, 0] / spread), float(line.intercept_[0])
    thresholds = operating_points(label, expit(slope * inner + offset))
    return Combination(candidate.summary, members, weights, intercept, slope, offset, usual, thresholds)


def _interval(
    combination: Combination,
    candidate: Candidate,
    logits: np.ndarray,
    label: np.ndarray,
    inside: np.ndarray,
    outside: np.ndarray,
    refits: int,
    seed: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the held-out patients' probabilities over combinations refitted on resampled patients."""
    random = np.random.Generator(np.random.Philox(seed))
    classes = [np.flatnonzero(inside & (label == value)) for value in (0, 1)]
    drawn = []
    for _ in range(refits):
        rows = np.concatenate([random.choice(each, len(each)) for each in classes])
        weights, intercept, usual = _fit(candidate, logits[rows], label[rows])
        filled = np.where(np.isnan(logits[outside]), usual, logits[outside])
        drawn.append(expit(combination.slope * (filled @ weights + intercept) + combination.offset))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return low, high
