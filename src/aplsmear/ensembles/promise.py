"""An alarm with a promise: the chance that it misses a positive patient is bounded.

A patient below a threshold gets no alarm. The threshold comes from the probabilities of n positive patients
who took no part in fitting the model. If new positive patients are exchangeable with them (same laboratory,
same kind of patients), the miss rate among new positive patients is at most `Alarm.miss_rate`, with the
probability `Alarm.confidence` over the choice of these n patients. Elsewhere nothing is promised. In an
ensemble, the probabilities come from models of the folds, and new patients get another model; so the promise
is close, not exact (benchmarks/promise.py).

This is Learn then Test (Angelopoulos, Bates, Candes, Jordan & Lei, arXiv:2110.01052, 2021) with thresholds
tested from the lowest upwards and exact binomial P-values. For one threshold this is an order statistic
(Wilks, Ann Math Stat 1941;12:91; Tong, Feng & Li, Sci Adv 2018;4:eaao1659). MAPIE's
BinaryClassificationController tests a grid of thresholds by Hoeffding-Bentkus P-values, and does not tell
which promise few patients allow; with about twenty patients both matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Alarm:
    """A threshold and what it promises."""

    threshold: float  # a probability below it: no alarm
    miss_rate: float  # that is promised
    confidence: float  # with which it is promised
    wanted: float  # miss rate that was asked for; below `miss_rate` if the patients were too few
    patients: int  # positive patients that it rests on

    @property
    def needed(self) -> int:
        """How many positive patients the miss rate that was asked for needs at least."""
        return math.ceil(math.log1p(-self.confidence) / math.log1p(-self.wanted) - 1e-9)


def smallest_miss_rate(patients: int, confidence: float) -> float:
    """The smallest miss rate that so many positive patients (at least 1) can promise, if none is missed."""
    return float(-np.expm1(math.log1p(-confidence) / patients))


def alarm(probability: np.ndarray, miss_rate: float, confidence: float) -> Alarm:
    """The highest threshold that keeps a promise; of too few patients the promise that they allow.

    `probability`, float (patients,), is of one or more positive patients who took no part in fitting the
    model. `miss_rate` is wanted, `confidence` asked for; both lie between 0 and 1.
    """
    ordered = np.sort(probability)
    n = len(ordered)
    # Entry k: chance of at most k misses in n if the true miss rate is the one that is wanted.
    chance = stats.binom.cdf(np.arange(n), n, miss_rate)
    below = max(int((chance <= 1 - confidence).sum()) - 1, 0)  # patients that may lie below the threshold
    promised = float(stats.beta.ppf(confidence, below + 1, n - below))
    return Alarm(float(ordered[below]), promised, confidence, miss_rate, n)
