"""Probabilities of several diagnoses that add to 1: how good are they, and what is a call worth?

``label`` is the place of each patient's diagnosis in `names`, int64 (n,). ``probability`` is float64
(n, diagnoses). ``called`` is the place of the diagnosis that was called, or `UNSURE`, int64 (n,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from aplsmear.evaluation.columns import ENDS, Array, Interval, interval_around
from aplsmear.evaluation.intervals import summary
from aplsmear.evaluation.operating_points import mean_proportion, rates, wilson_interval

UNSURE = -1
_DRAWS = 4000  # of the rates of calls, for the interval of a predictive value
_FLOOR = 1e-6  # probabilities are at least this in the log loss


def measure_diagnoses(
    label: np.ndarray,
    probability: np.ndarray,
    called: np.ndarray,
    names: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The measures for intervals.json: ``{value, low, high}``, the 95 % intervals over patients.

    ``accuracy`` and ``balanced_accuracy`` (mean of the sensitivities) are of the most probable diagnosis;
    ``brier`` is the sum of squared differences over the diagnoses (0 to 2; Brier 1950), then ``log_loss``.
    ``unsure`` is the share of patients without a call, ``accuracy_of_calls`` the share of the calls that are
    right (left out if there is none). Under ``of``, for each diagnosis against the rest: `summary`, and
    `rates` of the most probable diagnosis. Every diagnosis needs two patients. The bootstrap is stratified by
    diagnosis.
    """
    first = probability.argmax(axis=1)
    right, sure = first == label, called != UNSURE
    is_k = label[:, None] == np.arange(len(names))
    error = ((probability - is_k) ** 2).sum(axis=1)
    measured: dict[str, Any] = {
        "accuracy": wilson_interval(int(right.sum()), len(label)),
        "balanced_accuracy": mean_proportion(
            [wilson_interval(int(right[k].sum()), int(k.sum())) for k in is_k.T]
        ),
        "brier": mean_interval(error, label, resamples, seed),
        "log_loss": mean_interval(surprises(label, probability), label, resamples, seed),
        "unsure": wilson_interval(int((~sure).sum()), len(label)),
    }
    if sure.any():
        measured["accuracy_of_calls"] = wilson_interval(int((called == label).sum()), int(sure.sum()))
    measured = {name: each._asdict() for name, each in measured.items()}
    of = {
        name: summary(is_k[:, k], probability[:, k], resamples=resamples, seed=seed)
        | rates(is_k[:, k], first == k)
        for k, name in enumerate(names)
    }
    return measured | {"n_patients": len(label), "of": of}


def surprises(label: np.ndarray, probability: np.ndarray) -> Array:
    """The log loss of each patient, float64 (n,): minus the logarithm of the probability of the diagnosis."""
    return np.asarray(-np.log(np.maximum(probability[np.arange(len(label)), label], _FLOOR)))


def mean_interval(values: Array, label: np.ndarray, resamples: int, seed: int) -> Interval:
    """A mean over patients with its percentile bootstrap interval, stratified by diagnosis (Efron 1979).

    `values` and `label` are as above, in any order of the rows.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    total = np.zeros(resamples)
    for k in np.unique(label):
        mine = np.sort(values[label == k])
        total += rng.choice(mine, (resamples, len(mine))).sum(axis=1)
    low, high = np.quantile(total / len(label), ENDS)
    return interval_around(float(values.mean()), float(low), float(high))


def predictive_values(
    label: np.ndarray, called: np.ndarray, prevalence: Sequence[float], names: Sequence[str], seed: int
) -> pd.DataFrame:
    """How often a call is right where the diagnoses have a given prevalence, by Bayes' rule.

    How often patients with each diagnosis are called so is counted; `UNSURE` is no call of any diagnosis. The
    prevalence is a share for each of `names`; they add to 1. The intervals are over 4,000 draws of the
    counted rates, from Jeffreys' posterior of each (Brown et al., Stat Sci 2001;16:101): they have a width
    even where no error was seen.

    Returns ``diagnosis, prevalence, ppv, ppv_low, ppv_high, npv, npv_low, npv_high``: of the patients called
    so, the share with this diagnosis; of the patients not called so, the share without it. NaN: no patient
    was called so.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    share = np.asarray(prevalence, dtype=np.float64)
    n = np.array([(label == j).sum() for j in range(len(names))])
    rows = []
    for k, name in enumerate(names):
        hits = np.array([((label == j) & (called == k)).sum() for j in range(len(names))])
        drawn = rng.beta(hits + 0.5, n - hits + 0.5, (_DRAWS, len(names)))
        row: dict[str, Any] = {"diagnosis": name, "prevalence": share[k]}
        for measure, value, many in zip(
            ("ppv", "npv"), _values(hits / n, share, k), _values(drawn, share, k), strict=True
        ):
            low, high = np.quantile(many, ENDS)
            known = interval_around(float(value), float(low), float(high)) if np.isfinite(value) else None
            row |= dict(
                zip((measure, f"{measure}_low", f"{measure}_high"), known or [math.nan] * 3, strict=True)
            )
        rows.append(row)
    return pd.DataFrame(rows)


def _values(rate: Array, share: Array, k: int) -> tuple[Array, Array]:
    """Positive and negative predictive value of diagnosis k, given how often each diagnosis is called k."""
    called, rest = rate * share, (1 - rate) * share
    with np.errstate(invalid="ignore", divide="ignore"):
        ppv = called[..., k] / called.sum(axis=-1)
        return ppv, 1 - rest[..., k] / rest.sum(axis=-1)
