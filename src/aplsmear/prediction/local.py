"""Recalibrate an ensemble to another hospital by the diagnoses of a few of its patients.

The members, their combination and the order of the patients stay. A line through the calibrated logits is
fitted to the local patients, then the operating points and the alarm are set again:

- the intercept always; the slope where each diagnosis has at least `ENOUGH` patients (Cox, Biometrika
  1958;45:562; Steyerberg et al., Stat Med 2004;23:2567; Van Calster et al., J Clin Epidemiol 2016;74:167).
  Both are shrunk towards no change, by normal priors of the intercept and the log slope.
- What is gained is measured nested: each patient is judged by a line fitted to the other local patients. Its
  interval is Student's (Biometrika 1908;6:1).
- The change is refused unless log loss gains, and the diagnoses contradict the probabilities as they are by
  the score test (Rao, Math Proc Camb Philos Soc 1948;44:50), with diagnoses drawn from these probabilities
  (Barnard, J R Stat Soc B 1963;25:294). The labelled patients must be taken as they come: if positive ones
  were picked, the test takes that for an error of the ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from aplsmear.compute.engine import HERE, Engine
from aplsmear.data.csvfile import read_all
from aplsmear.data.dataset import DataSet
from aplsmear.ensembles.bundle import Bundle, write_changed
from aplsmear.ensembles.combination import Combination, as_json, operating_points_of
from aplsmear.errors import UserError
from aplsmear.evaluation.columns import LEVEL
from aplsmear.prediction.predict import Models, check_input, judge_patients
from aplsmear.prediction.recalibration import SPREAD

FEWEST = 5  # labelled patients
FEWEST_EACH = 2  # of each diagnosis
ENOUGH = 10  # patients of each diagnosis for a slope
SLOPES = 0.5  # standard deviation of the log slopes of hospitals
_DRAWS = 10_000  # of the diagnoses of all patients, for the test


@dataclass(frozen=True)
class Line:
    """What recalibration does to calibrated logits: new = slope * old + intercept."""

    slope: float
    intercept: float


@dataclass(frozen=True)
class Gain:
    """A loss before and after recalibration, and the mean difference with its 95 % interval."""

    before: float
    after: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Local:
    """A recalibration and what it gained, each patient judged without the own diagnosis.

    `p` is that of `score_test`.
    """

    combination: Combination
    line: Line
    patients: int
    positive: int
    log_loss: Gain
    brier: Gain
    p: float

    @property
    def is_gain(self) -> bool:
        """Whether something is gained, and not by chance."""
        return self.log_loss.gain > 0 and self.p <= 1 - LEVEL


def fit_line(logit: np.ndarray, label: np.ndarray, sloped: bool) -> Line:
    """The most probable line for these patients; `sloped`: a slope is fitted, otherwise it is 1.

    `logit` is calibrated, float64 (patients,); `label` 0 or 1, (patients,).
    """
    sign = 2 * label - 1

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        intercept, slope = line[0], np.exp(line[1])
        margin = sign * (slope * logit + intercept)
        pull = -sign * expit(-margin)
        down = [pull.sum() + intercept / SPREAD**2, slope * (pull @ logit) + line[1] / SLOPES**2]
        value = -log_expit(margin).sum() + (line**2 / (2 * np.array([SPREAD, SLOPES]) ** 2)).sum()
        return float(value), np.array(down) * [1, sloped]

    intercept, log_slope = minimize(loss, np.zeros(2), jac=True, method="BFGS").x
    return Line(float(np.exp(log_slope)), float(intercept))


def score_test(logit: np.ndarray, label: np.ndarray, sloped: bool) -> float:
    """The p value of these diagnoses, if the calibrated probabilities are right.

    The arguments are as for `fit_line`: the test is against another intercept, and another slope if `sloped`.
    """
    probability = expit(logit)
    slopes = np.stack([np.ones(len(logit)), logit])[: 1 + sloped]
    weights = np.linalg.pinv((slopes * probability * (1 - probability)) @ slopes.T)
    rng = np.random.Generator(np.random.Philox(0))
    drawn = rng.random((_DRAWS, len(logit))) < probability
    scores = (np.vstack([label, drawn]) - probability) @ slopes.T
    size = np.einsum("di,ij,dj->d", scores, weights, scores)
    return float((size >= size[0] - 1e-9).mean())


def recalibrated(
    combination: Combination, logits: np.ndarray, label: np.ndarray, wanted: tuple[float, float]
) -> Local:
    """A calibrated combination, recalibrated to local patients, and what that gained.

    `logits` are float64 (patients, members), as for `Weights.logit`; `label` is 0 or 1, (patients,); `wanted`
    is the miss rate and the confidence of the alarm. Raises UserError for too few patients.
    """
    n, positive = len(label), int(label.sum())
    _check_number(positive, n - positive)
    before = combination.logit(logits)
    after, sloped = np.zeros(n), min(positive, n - positive) >= ENOUGH
    for place in range(n):
        others = np.arange(n) != place
        line = fit_line(before[others], label[others], sloped)
        after[place] = line.slope * before[place] + line.intercept
    line = fit_line(before, label, sloped)
    thresholds, alarm = operating_points_of(label, expit(after), *wanted)
    changed = replace(
        combination,
        slope=line.slope * combination.slope,
        offset=line.slope * combination.offset + line.intercept,
        thresholds=thresholds,
        alarm=alarm,
    )
    losses = [(-log_expit((2 * label - 1) * each), (expit(each) - label) ** 2) for each in (before, after)]
    log_loss, brier = (_gain(*pair) for pair in zip(*losses, strict=True))
    return Local(changed, line, n, positive, log_loss, brier, score_test(before, label, sloped))


def adapt(
    bundle: Bundle, found: DataSet, root: Path, labels: Mapping[str, str], engine: Engine = HERE
) -> Local:
    """Judge the labelled patients of a data set and recalibrate the ensemble to them.

    `labels` are diagnoses by patient; patients with another diagnosis than the two of the ensemble are left
    out. Raises UserError if a patient is not in the data set, there are too few, nothing is gained, or
    members need cells and there are none.
    """
    model = bundle.model
    known = set(found.smears["patient"]) | set(found.cells["patient"])
    if strangers := sorted(set(labels) - known):
        raise UserError(
            f"{root} has no patients with these names: {', '.join(strangers[:5])}. Correct the labels."
        )
    asked = {name for name, diagnosis in labels.items() if diagnosis in (model.positive, model.negative)}
    positive = sum(labels[name] == model.positive for name in asked)
    _check_number(positive, len(asked) - positive)
    smears, cells = (each[each["patient"].isin(asked)] for each in (found.smears, found.cells))
    check_input(bundle, smears, cells, root)
    models = Models(bundle, bundle.outer_fold_of(None))
    verdicts = list(judge_patients(models, root, smears, cells, engine))
    label = np.array([int(labels[each.patient] == model.positive) for each in verdicts])
    alarm = models.combination.alarm
    logits = np.array([each.logits for each in verdicts]).reshape(len(verdicts), -1)
    local = recalibrated(models.combination, logits, label, (alarm.wanted, alarm.confidence))
    if not local.is_gain:
        raise UserError(
            f"Nothing was written: with {local.patients} labelled patients, the gain may be chance "
            f"({in_words(local)}). Use the ensemble as it is, or label more patients."
        )
    return local


def _check_number(positive: int, negative: int) -> None:
    """Refuse too few labelled patients."""
    if positive + negative < FEWEST or min(positive, negative) < FEWEST_EACH:
        raise UserError(
            f"{positive} labelled patients have the positive diagnosis, {negative} the negative one. At "
            f"least {FEWEST} are needed, with {FEWEST_EACH} of each diagnosis: label more patients."
        )


def in_words(local: Local) -> str:
    """The gain of a recalibration."""
    return f"score test, p = {local.p:.2g}; " + "; ".join(
        f"{name} {each.before:.3f} before, {each.after:.3f} after, gain {each.gain:+.3f} "
        f"({each.low:+.3f} to {each.high:+.3f})"
        for name, each in (("log loss", local.log_loss), ("Brier score", local.brier))
    )


def write_adapted(out: Path, bundle: Bundle, local: Local) -> None:
    """Write the bundle with the recalibrated combination for new patients; those of the folds stay."""
    curve, slope = bundle.model.cell_curve, local.line.slope
    changed = {
        "combinations": [*bundle.model.combinations[:-1], as_json(local.combination)],
        "cell_curve": curve.model_copy(
            update={"spread": [slope * each for each in curve.spread], "models": slope * curve.models}
        ),
        "adapted": {name: value for name, value in asdict(local).items() if name != "combination"},
    }
    write_changed(out, bundle, bundle.model.model_copy(update=changed))


def read_labels(path: Path) -> dict[str, str]:
    """Patient -> diagnosis, of the columns ``patient`` and ``diagnosis`` of a CSV file.

    Raises DataSetError if the file has problems, UserError if a patient has two diagnoses.
    """
    table = read_all(path, {"patient": True, "diagnosis": True}).drop_duplicates()
    table["diagnosis"] = table["diagnosis"].str.lower()
    twice = table["patient"][table["patient"].duplicated()].unique()
    if len(twice):
        raise UserError(f"{path} has two diagnoses of {', '.join(twice[:5])}: keep one of each.")
    return dict(zip(table["patient"], table["diagnosis"], strict=True))


def _gain(before: np.ndarray, after: np.ndarray) -> Gain:
    """The mean of paired differences with Student's interval."""
    difference = before - after
    error = float(difference.std(ddof=1)) / len(difference) ** 0.5
    half = float(stats.t.isf((1 - LEVEL) / 2, len(difference) - 1)) * error
    mean = float(difference.mean())
    return Gain(float(before.mean()), float(after.mean()), mean, mean - half, mean + half)
