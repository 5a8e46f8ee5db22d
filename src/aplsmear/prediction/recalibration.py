"""Models adapted to a new cohort by what the cohort itself looks like and scores, without a label.

Another laboratory's stain and camera move all its logits to one side, so that probabilities and calls are
wrong although the order of the patients is right. Where patients are like those of training, as many should
be positive; that tells how far the logits have moved. This is recalibration in the large (Steyerberg et al.,
Stat Med 2004;23:2567) with an expected share of positives in the place of labels, and shrunk: a small cohort
or one with another share of positives moves little.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from aplsmear.ensembles.combination import Combination

LIKENESS = 50.0  # patients: the share of positives is known as if that many had been counted
REACH = 2.0  # standard deviation of how far laboratories move logits
_FARTHEST = 50.0


def adapted(combination: Combination, logits: np.ndarray, share: float | None = None) -> Combination:
    """A calibrated combination with its offset moved to fit a new cohort; its operating points stay.

    Assumes that the cohort's share of positives is near `share`, to either side by what chance does in
    `LIKENESS` patients. Where that is wrong, as in a screening of healthy people, do not adapt or say the
    share.

    Args:
        combination: of `aplsmear.ensembles.combination`.
        logits: float64 (patients, members), as for `Weights.logit`: all patients of the cohort.
        share: expected of positives, between 0 and 1. None: as among the patients of training, which is the
            balanced operating point.
    """
    said = combination.slope * combination.fitted.logit(logits) + combination.offset
    expected = combination.thresholds["balanced"] if share is None else share
    return replace(combination, offset=combination.offset + moved(said, expected))


def moved(logit: np.ndarray, share: float, likeness: float = LIKENESS, reach: float = REACH) -> float:
    """What to add to the calibrated logits of a cohort, given how many of it should be positive.

    The most probable shift where the mean probability is normal around `share`, with the variance of a share
    among so many patients and among `likeness` ones, and the shift itself is normal around 0.

    Args:
        logit: float64 (patients,).
        share: expected of positives, between 0 and 1.
        likeness: so many patients' worth of trust in it.
        reach: standard deviation of shifts.
    """
    variance = share * (1 - share) * (1 / len(logit) + 1 / likeness)

    def slope(shift: float) -> float:
        probability = expit(logit + shift)
        pull = (probability.mean() - share) * (probability * (1 - probability)).mean() / variance
        return float(pull + shift / reach**2)

    full = brentq(lambda shift: float(expit(logit + shift).mean() - share), -_FARTHEST, _FARTHEST)
    low, high = sorted((0.0, full))
    return float(brentq(slope, low, high)) if slope(low) * slope(high) < 0 else 0.0
