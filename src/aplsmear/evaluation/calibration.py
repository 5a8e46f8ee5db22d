"""Are eight of ten patients with a probability of 0.8 positive? Brier score, slope and intercept."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from aplsmear.evaluation.columns import Array, check_columns

_CLIP = 1e-6  # probabilities are kept this far from 0 and 1 before their logit is taken


class Calibration(NamedTuple):
    """Cox's recalibration line ``logit P(label = 1) = intercept + slope * logit(probability)``."""

    slope: float
    intercept: float


def brier(label: npt.ArrayLike, probability: npt.ArrayLike) -> float:
    """Mean squared difference of probability and label, 0 (best) to 1 (Brier 1950)."""
    y, p = check_columns(label, probability, probability=True, both=False)
    return float(np.mean((p - y) ** 2))


def calibration_slope_intercept(label: npt.ArrayLike, probability: npt.ArrayLike) -> Calibration:
    """Cox's calibration slope and intercept: the logistic regression of the label on logit(probability).

    A slope of 1 and an intercept of 0 are ideal; a slope below 1 means overconfident probabilities. Firth's
    penalty removes the small-sample bias of maximum likelihood and keeps both numbers finite under perfect
    separation; a slope far above 1 then means that the probabilities are more cautious than necessary.
    Probabilities are clipped to [1e-6, 1 - 1e-6]. If all probabilities are equal, there is no slope: it is
    given as 0, and the intercept is the log odds of the label (half an item added to each class).

    References:
        Cox, Biometrika 1958;45:562. Firth, Biometrika 1993;80:27. Heinze & Schemper, Stat Med 2002;21:2409.
    """
    y, p = check_columns(label, probability, probability=True)
    slope, intercept = calibration_replicates(y, p, np.ones((1, len(y))))
    return Calibration(float(slope[0]), float(intercept[0]))


def calibration_replicates(y: Array, p: Array, weight: Array) -> tuple[Array, Array]:
    """Slope and intercept for each row of weights, by Newton's method on all rows at once.

    Args:
        y: labels, 0 or 1, shape (n,).
        p: probabilities, shape (n,).
        weight: how often each item was drawn, shape (b, n).

    Returns:
        Slopes and intercepts, shape (b,) each.

    Raises:
        ArithmeticError: a line was not found in 5000 steps.
    """
    x = special.logit(np.clip(p, _CLIP, 1 - _CLIP))
    centre, scale = x.mean(), x.std()
    z = (x - centre) / scale if scale > 1e-9 else np.zeros_like(x)
    power = np.stack([z**k for k in range(5)], axis=1)
    total = weight.sum(axis=1)
    sums = weight @ power[:, :3]
    varied = sums[:, 2] / total - (sums[:, 1] / total) ** 2 > 1e-9
    positive = weight @ y
    coefficient = np.stack([special.logit((positive + 0.5) / (total + 1)), np.zeros(len(weight))], axis=1)
    active = np.flatnonzero(varied)
    for _ in range(5000):  # about twenty, except where the likelihood is almost flat
        if not len(active):
            break
        step = _newton_step(coefficient[active], power, y, weight[active])
        size = np.abs(step).max(axis=1)
        step /= np.maximum(size / 8, 1)[:, None]
        coefficient[active] += _shortened(step, coefficient[active], z, y, weight[active])
        active = active[size > 1e-8]
    else:
        raise ArithmeticError(f"the calibration line of {len(active)} resamples did not settle in 5000 steps")
    slope = coefficient[:, 1] / (scale if scale > 1e-9 else 1.0)
    return slope, coefficient[:, 0] - slope * centre


def _newton_step(coefficient: Array, power: Array, y: Array, weight: Array) -> Array:
    """Newton's step for each row's line on the penalised likelihood, shape (b, 2).

    Let S, T, Q be the power sums of z, weighted with v = chance (1 - chance) and its first two derivatives.
    The penalty is half the logarithm of S0 S2 - S1^2, so its gradient and Hessian have closed forms.

    Args:
        coefficient: intercept and slope of each row, shape (b, 2).
        power: z to the power of 0 to 4, shape (n, 5).
        y: labels, 0 or 1, shape (n,).
        weight: how often each item was drawn, shape (b, n).
    """
    k = np.arange(2)
    pair = k[:, None] + k
    chance = special.expit(coefficient[:, :1] + coefficient[:, 1:] * power[:, 1])
    v = chance * (1 - chance)
    weighted = weight * v
    s = weighted @ power[:, :3]
    t = (weighted * (1 - 2 * chance)) @ power[:, :4]
    q = (weighted * (1 - 6 * v)) @ power
    score = (weight * (y - chance)) @ power[:, :2]

    s0, s1, s2 = (s[:, i, None] for i in range(3))
    determinant = s0 * s2 - s1**2
    first = (t[:, k] * s2 + s0 * t[:, k + 2] - 2 * s1 * t[:, k + 1]) / determinant
    second = q[:, pair] * s2[..., None] + s0[..., None] * q[:, pair + 2] - 2 * s1[..., None] * q[:, pair + 1]
    mixed = t[:, k, None] * t[:, None, k + 2]
    second += mixed + mixed.transpose(0, 2, 1) - 2 * t[:, k + 1, None] * t[:, None, k + 1]
    fisher = s[:, pair]
    curvature = fisher - second / (2 * determinant[..., None]) + first[:, :, None] * first[:, None] / 2
    convex = (curvature[:, 0, 0] > 0) & (np.linalg.det(curvature) > 1e-9 * determinant[:, 0])
    curvature = np.where(convex[:, None, None], curvature, fisher)
    return np.asarray(np.linalg.solve(curvature, (score + first / 2)[..., None])[..., 0])


def _shortened(step: Array, coefficient: Array, z: Array, y: Array, weight: Array) -> Array:
    """Each row's step, halved until the penalised likelihood no longer falls, shape (b, 2).

    For one resample in 10,000, full steps go in circles.
    """
    step = step.copy()
    start = _penalised_likelihood(coefficient, z, y, weight)
    falling = np.arange(len(step))
    for _ in range(40):
        there = _penalised_likelihood(coefficient[falling] + step[falling], z, y, weight[falling])
        falling = falling[there < start[falling] - 1e-9]
        if not len(falling):
            break
        step[falling] /= 2
    return step


def _penalised_likelihood(coefficient: Array, z: Array, y: Array, weight: Array) -> Array:
    """Log-likelihood of each row's line (b, 2) plus Firth's penalty, shape (b,)."""
    line = coefficient[:, :1] + coefficient[:, 1:] * z
    chance = special.expit(line)
    v = weight * chance * (1 - chance)
    determinant = v.sum(axis=1) * (v @ z**2) - (v @ z) ** 2
    likelihood = (weight * (y * line - np.logaddexp(0, line))).sum(axis=1)
    return np.asarray(likelihood + 0.5 * np.log(np.maximum(determinant, 1e-300)))
