"""Models adapted to a new cohort by what the cohort itself looks like and scores, without a label.

Another laboratory's stain and camera move all its logits to one side, so that probabilities and calls are
wrong although the order of the patients is right. Where patients are like those of training, as many should
be positive; that tells how far the logits have moved. This is recalibration in the large (Steyerberg et al.,
Stat Med 2004;23:2567) with an expected share of positives in the place of labels, and shrunk: a small cohort
or one with another share of positives moves little.

Before that, features can move to the mean and spread that they have among the patients of training, channel
by channel (as batch statistics of the new domain take the place of those of training in Li et al., Pattern
Recognition 2018;80:109). This too takes the cohort for a like mixture, and is not shrunk.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from aplsmear.ensembles.combination import Combination
from aplsmear.heads.head import Head

LIKENESS = 50.0  # patients: the share of positives is known as if that many had been counted
REACH = 2.0  # standard deviation of how far laboratories move logits
_FARTHEST = 50.0
_LEAST_SHARE = 0.05  # of the mean spread, added to each: a channel that hardly varies must not be blown up
_LEAST = 1e-6


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


def standardising(own: np.ndarray, usual: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The affine map, channel by channel, that takes a cohort's features to their usual mean and spread.

    Args:
        own: float (2 channels,): means of the cohort's features, then their standard deviations, as
            `aplsmear.ensembles.familiarity.Moments.describe` gives them.
        usual: likewise, of the patients of training.
        share: how far to go; 0: not at all, 1: all the way.

    Returns:
        Scale (above 0) and offset, float (channels,) each: features become ``features * scale + offset``.
    """
    (mean, spread), (usual_mean, usual_spread) = np.split(own, 2), np.split(usual, 2)
    least = _LEAST_SHARE * usual_spread.mean() + _LEAST
    scale = (usual_spread + least) / (spread + least)
    return 1 + share * (scale - 1), share * (usual_mean - scale * mean)


def taking(head: Head, scale: np.ndarray, offset: np.ndarray) -> Head:
    """The head that says of features what `head` says of ``features * scale + offset``.

    The map is folded into the first product: (x s + o) @ k + b = x @ (s k) + (o @ k + b). Attention looks at
    what comes of it, if at anything.

    Args:
        head: any, on bags too.
        scale: float (channels,).
        offset: float (channels,).
    """
    first = head.kernels[0].astype(np.float64)
    kernel, bias = scale[:, None] * first, offset @ first + head.biases[0]
    return replace(
        head,
        kernels=(kernel.astype(np.float32), *head.kernels[1:]),
        biases=(bias.astype(np.float32), *head.biases[1:]),
    )
