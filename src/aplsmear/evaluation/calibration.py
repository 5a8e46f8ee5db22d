"""Are eight of ten patients with a probability of 0.8 positive? Cox's slope and intercept."""

import numpy as np
import numpy.typing as npt
from scipy import special

from aplsmear.evaluation.columns import Array, check_columns

_CLIP = 1e-6  # probabilities are kept this far from 0 and 1 before their logit is taken


def calibration_slope_intercept(label: npt.ArrayLike, probability: npt.ArrayLike) -> tuple[float, float]:
    """Cox's line ``logit P(label = 1) = intercept + slope * logit(probability)``: slope and intercept.

    A slope of 1 and an intercept of 0 are ideal; a slope below 1 means overconfident probabilities. Firth's
    penalty removes the small-sample bias of maximum likelihood and keeps both numbers finite under perfect
    separation; a slope far above 1 then means that the probabilities are more cautious than necessary.
    Probabilities are clipped to [1e-6, 1 - 1e-6]. If all are equal, the slope is 0, and the intercept is the
    log odds of the label (half an item added to each class). Cox, Biometrika 1958;45:562; Firth, Biometrika
    1993;80:27; Heinze & Schemper, Stat Med 2002;21:2409.
    """
    y, p = check_columns(label, probability, probability=True)
    slope, intercept = calibration_replicates(y, p, np.ones((1, len(y))))
    return float(slope[0]), float(intercept[0])


def calibration_replicates(y: Array, p: Array, weight: Array) -> tuple[Array, Array]:
    """Slopes and intercepts, float64 (b,) each, by Fisher's scoring on all rows of `weight` at once.

    Labels `y` and probabilities `p` are (n,); `weight` (b, n) is how often each item was drawn. Raises
    ArithmeticError if a line was not found in 5000 steps.
    """
    x = special.logit(np.clip(p, _CLIP, 1 - _CLIP))
    centre, scale = x.mean(), x.std()
    z = (x - centre) / scale if scale > 1e-9 else np.zeros_like(x)
    total = weight.sum(axis=1)
    varied = weight @ z**2 / total - (weight @ z / total) ** 2 > 1e-9
    coefficient = np.stack([special.logit((weight @ y + 0.5) / (total + 1)), np.zeros(len(weight))], axis=1)
    active, pace, last = np.flatnonzero(varied), np.ones((len(weight), 1)), np.zeros_like(coefficient)
    for _ in range(5000):  # about thirty, except where the likelihood is almost flat
        if not len(active):
            break
        step = _step(coefficient[active], z, y, weight[active])
        step /= np.maximum(np.abs(step).max(axis=1, keepdims=True) / 8, 1)
        # A step back means that the last one went too far.
        back = (step * last[active]).sum(axis=1, keepdims=True) < 0
        pace[active] = np.minimum(pace[active] * np.where(back, 0.5, 1.2), 1)
        last[active] = step
        coefficient[active] += pace[active] * step
        active = active[np.abs(step).max(axis=1) > 1e-9]
    else:
        raise ArithmeticError(f"the calibration line of {len(active)} resamples did not settle in 5000 steps")
    slope = coefficient[:, 1] / (scale if scale > 1e-9 else 1.0)
    return slope, coefficient[:, 0] - slope * centre


def _step(coefficient: Array, z: Array, y: Array, weight: Array) -> Array:
    """The step of each row's line by Firth's modified score and Fisher's information, shape (b, 2)."""
    chance = special.expit(coefficient[:, :1] + coefficient[:, 1:] * z)
    v = chance * (1 - chance)
    power = np.stack([np.ones_like(z), z, z**2], axis=1)
    s0, s1, s2 = ((weight * v) @ power).T[..., None]
    determinant = s0 * s2 - s1**2
    leverage = v * (s2 - 2 * s1 * z + s0 * z**2) / determinant
    score = (weight * (y - chance + leverage * (0.5 - chance))) @ power[:, :2]
    inverse = np.stack([s2, -s1, -s1, s0], axis=-1).reshape(-1, 2, 2) / determinant[..., None]
    return np.asarray((inverse @ score[..., None])[..., 0])
