"""Adapt a combination to a new cohort by its own scores, without labels.

The stain and the camera of another laboratory shift all logits to one side. Probabilities and calls are then
wrong, although the order of the patients is right. If the cohort has about the same mixture of diagnoses as
the training patients, the expected share of positives shows how far the logits have shifted. This is
recalibration in the large (Steyerberg et al., Stat Med 2004;23:2567) with an expected share of positives
instead of labels. It is shrunk: a small cohort, or one with another share of positives, is shifted little.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from aplsmear.ensembles.combination import Combination

TRUST = 50.0  # patients: the expected share is taken as if it had been counted among that many
SPREAD = 2.0  # standard deviation of the shifts of laboratories, in logits
_FARTHEST = 50.0
_STEPS = 201  # between no shift and the full one: a quarter of a logit at most


def adapted(combination: Combination, logits: np.ndarray) -> Combination:
    """A calibrated combination with its offset fitted to a new cohort; its operating points stay.

    It assumes that the cohort's share of positives is near that among the training patients (the balanced
    operating point), within the error of a share counted among `TRUST` patients. If that is wrong, as in a
    screening of healthy people, do not adapt. `logits` are float64 (patients, members), as for
    `Weights.logit`: all patients of the cohort.
    """
    shift = shift_of(combination.logit(logits), combination.thresholds["balanced"])
    return replace(combination, offset=combination.offset + shift)


def in_words(before: Combination, after: Combination, whom: str) -> str:
    """How `adapted` has changed a combination, for a sentence about the logits of `whom`."""
    shift, share = after.offset - before.offset, before.thresholds["balanced"]
    return f"shifted by {shift:+.2f}, assuming that about {share:.0%} of {whom} are positive, as in training."


def shift_of(logit: np.ndarray, share: float) -> float:
    """What to add to a cohort's calibrated logits, float64 (patients,), given its expected share of
    positives.

    The most probable shift, if the mean probability is normal around `share` (between 0 and 1), with the
    variance of a share among these patients plus that among `TRUST` patients, and the shift itself is normal
    around 0. If all probabilities are near 0 or 1, a shift near 0 may be a local optimum: all are compared.
    """
    variance = share * (1 - share) * (1 / len(logit) + 1 / TRUST)

    def slope(shift: float) -> float:
        probability = expit(logit + shift)
        pull = (probability.mean() - share) * (probability * (1 - probability)).mean() / variance
        return float(pull + shift / SPREAD**2)

    def cost(shift: float) -> float:
        return float((expit(logit + shift).mean() - share) ** 2 / variance + (shift / SPREAD) ** 2)

    full = brentq(lambda shift: float(expit(logit + shift).mean() - share), -_FARTHEST, _FARTHEST)
    steps = np.linspace(0.0, full, _STEPS).tolist()
    optima = [float(brentq(slope, *two)) for two in pairwise(steps) if slope(two[0]) * slope(two[1]) < 0]
    return min([0.0, *optima], key=cost)
