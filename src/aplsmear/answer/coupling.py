"""One answer from several ensembles: probabilities of healthy, other AML and APL that add to 1.

An ensemble compares two diagnoses and gives every patient a logit, also a patient with the third diagnosis,
for whom it means little alone. The logits of several ensembles are estimates of differences: the logit of APL
against healthy is score(APL) - score(healthy). The three scores are the least-squares solution of these
equations. So the ensemble that knows a patient's diagnosis outvotes the one that does not (pairwise coupling;
Hastie & Tibshirani, Ann Stat 1998;26:451). Then

    probabilities = softmax(slope * scores + offsets)

with three fitted numbers: slope and two offsets. More weights did not help on few patients: on the 60 drawn
patients a multinomial ridge regression on the logits had a log loss of 0.58 to 0.60, this has 0.55.

The fit is nested like that of an ensemble. In outer fold w it has the patients of the other folds alone, with
logits that are held out on them (`aplsmear.ensembles.combination.logits_of_all`). It then judges fold w, with
the logits of models that never saw fold w. The last outer fold holds out no patient; it is for new patients.

The priors of a fit are the shares of the diagnoses among its patients. For another prevalence, the
probabilities are multiplied by new share / old share and made to add to 1 again (Saerens et al., Neural
Comput 2002;14:21; Elkan, IJCAI 2001).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from aplsmear.answer.measures import UNSURE
from aplsmear.errors import UserError, brief
from aplsmear.files import round_floats, sha256, write_json
from aplsmear.params import Strict
from aplsmear.words import no_such

DIAGNOSES = ("healthy", "aml", "apl")
VERSION = 1  # of the format of answer.json
FILE = "answer.json"
_C = 10.0  # inverse strength of the penalty on the slope, as for the calibration of an ensemble
_MIN_SPREAD = 1e-6  # of scores that are all the same
_DIGITS = 12  # decimals of numbers in answer.json

Pair = tuple[str, str]  # of an ensemble: positive and negative diagnosis


class Fitted(Strict):
    """The three fitted numbers of an outer fold, and its priors."""

    slope: float
    offsets: list[float] = Field(min_length=3, max_length=3)  # of `DIAGNOSES`; the first is 0
    shares: list[float] = Field(min_length=3, max_length=3)  # of `DIAGNOSES` among the patients of the fit


class HeldOut(Strict):
    """A patient of the training run, without a name: diagnosis, and held-out probabilities of `DIAGNOSES`."""

    diagnosis: str
    probabilities: list[float] = Field(min_length=3, max_length=3)


class Answer(Strict):
    """One answer of a set of ensembles."""

    ensembles: list[str] = Field(min_length=2)
    folds: list[Fitted]  # of every outer fold; the last is for new patients
    held_out: list[HeldOut]


class Answers(Strict):
    """The content of answer.json: one answer for each set of ensembles that compares all three diagnoses."""

    format: Literal["aplsmear answer"] = "aplsmear answer"
    version: int = VERSION
    pairs: dict[str, Pair]  # of each ensemble
    manifests: dict[str, str]  # of each ensemble the SHA-256 of the manifest of its bundle
    sure: float  # a diagnosis is called from this probability on
    answers: list[Answer] = Field(min_length=1)  # the one with all ensembles first
    checksum: str = ""  # of all the rest

    def of(self, names: Sequence[str]) -> Answer:
        """The answer of a set of ensembles; UserError if there is none."""
        for each in self.answers:
            if set(each.ensembles) == set(names):
                return each
        known = "; ".join(" and ".join(each.ensembles) for each in self.answers)
        raise UserError(
            f"There is no one answer of {' and '.join(names)}. It needs ensembles that together compare "
            f"healthy, other AML and APL, one of: {known}. Or give one --ensemble alone."
        )


@dataclass(frozen=True)
class Judged:
    """The held-out probabilities of every patient by one set of ensembles, and the fits that gave them."""

    ensembles: tuple[str, ...]
    probability: np.ndarray  # float64 (patients, 3)
    folds: list[Fitted]


def probabilities(
    fitted: Fitted, logits: np.ndarray, pairs: Sequence[Pair], prevalence: Sequence[float] | None = None
) -> np.ndarray:
    """Probabilities of `DIAGNOSES`, float64 (patients, 3), of calibrated logits (patients, ensembles).

    `prevalence` is of `DIAGNOSES`, adding to 1; None: as among the patients of the fit.
    """
    chances = softmax(fitted.slope * coupled(logits, pairs) + np.array(fitted.offsets), axis=1)
    return chances if prevalence is None else shifted(chances, fitted.shares, prevalence)


def shifted(chances: np.ndarray, old: Sequence[float], new: Sequence[float]) -> np.ndarray:
    """Probabilities (patients, 3), fitted with the shares `old` of `DIAGNOSES`, for the prevalence `new`."""
    moved = chances * (np.array(new) / np.array(old))
    return np.asarray(moved / moved.sum(axis=1, keepdims=True))


def coupled(logits: np.ndarray, pairs: Sequence[Pair]) -> np.ndarray:
    """Scores of `DIAGNOSES`, float64 (patients, 3), whose differences are nearest to the logits."""
    differences = np.array(
        [[(d == pair[0]) - (d == pair[1]) for d in DIAGNOSES] for pair in pairs], np.float64
    )
    return np.asarray(logits @ np.linalg.pinv(differences).T)


def calls(chances: np.ndarray, sure: float) -> np.ndarray:
    """The place in `DIAGNOSES` of the most probable diagnosis, int64 (patients,); `UNSURE` below `sure`.

    A patient is called only if the risk of an error is at most 1 - `sure` (Chow, IEEE Trans Inf Theory
    1970;16:41).
    """
    return np.where(chances.max(axis=1) >= sure, chances.argmax(axis=1), UNSURE)


def fit(logits: np.ndarray, pairs: Sequence[Pair], label: np.ndarray) -> Fitted:
    """Slope and offsets by penalised maximum likelihood, on held-out logits, float64 (patients, ensembles).

    `label`, int64 (patients,), is the place of each diagnosis in `DIAGNOSES`; all three occur.
    """
    scores = coupled(logits, pairs)
    spread = max(float(scores.std()), _MIN_SPREAD)
    inputs = np.zeros((len(label), 3, 3))  # patient, diagnosis, parameter
    inputs[:, :, 0] = scores / spread
    inputs[:, 1, 1] = inputs[:, 2, 2] = 1
    penalty = np.diag([1 / _C, 0, 0])
    own = inputs[np.arange(len(label)), label].sum(axis=0)

    def loss(x: np.ndarray) -> float:
        return float(logsumexp(inputs @ x, axis=1).sum() - own @ x + x @ penalty @ x / 2)

    def gradient(x: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("nk,nkp->p", softmax(inputs @ x, axis=1), inputs) - own + penalty @ x)

    def curvature(x: np.ndarray) -> np.ndarray:
        chances = softmax(inputs @ x, axis=1)
        mean = np.einsum("nk,nkp->np", chances, inputs)
        return np.asarray(np.einsum("nk,nkp,nkq->pq", chances, inputs, inputs) - mean.T @ mean + penalty)

    start = np.array([spread, 0.0, 0.0])
    found = minimize(
        loss, start, jac=gradient, hess=curvature, method="trust-exact", options={"gtol": 1e-9}
    ).x
    shares = np.bincount(label, minlength=3) / len(label)
    return Fitted(
        slope=float(found[0] / spread), offsets=[0.0, *map(float, found[1:])], shares=shares.tolist()
    )


def prevalence_of(text: str) -> list[float]:
    """The prevalence of `DIAGNOSES` from a text such as ``apl=0.05,aml=0.15``; the third is the rest.

    Raises UserError if it is no such text, or the numbers are no shares that add to 1.
    """
    parts = [part.partition("=")[::2] for part in text.split(",")]
    names = [name.strip() for name, _ in parts]
    example = f"--prevalence {text}: write for example apl=0.05,aml=0.15"
    strangers = [no_such("there is no diagnosis", name, DIAGNOSES) for name in names if name not in DIAGNOSES]
    if lines := strangers or [f"{name} is there twice" for name in DIAGNOSES if names.count(name) > 1]:
        raise UserError(f"{example}. {'; '.join(lines)}")
    try:
        found = {name: float(value) for name, (_, value) in zip(names, parts, strict=True)}
    except ValueError:
        raise UserError(f"{example}. Each diagnosis needs a number.") from None
    if len(found) < len(DIAGNOSES) - 1:
        raise UserError(f"{example}. Two of {', '.join(DIAGNOSES)} are needed; the third is the rest.")
    for name in DIAGNOSES:
        found.setdefault(name, 1 - sum(found.values()))
    inside = all(0 < value < 1 for value in found.values())
    if not inside or not math.isclose(sum(found.values()), 1, abs_tol=1e-6):
        shown = ", ".join(f"{name} {value:g}" for name, value in found.items())
        raise UserError(f"{example}. All three must lie between 0 and 1 and add to 1; these are {shown}.")
    return [found[name] for name in DIAGNOSES]


def judge_all(tables: Mapping[str, pd.DataFrame], pairs: Mapping[str, Pair]) -> list[Judged]:
    """Nested probabilities of every patient, by each set of ensembles that compares all three diagnoses.

    Each ensemble has a table of `aplsmear.ensembles.combination.logits_of_all`; all have the same patients.
    The set of all ensembles comes first, then the others by falling number of ensembles.

    Raises UserError: a diagnosis has no patients, or the ensembles do not compare all three.
    """
    first = next(iter(tables.values()))
    counts = first["diagnosis"].value_counts().reindex(DIAGNOSES, fill_value=0)
    if absent := [name for name in DIAGNOSES if not counts[name]]:
        raise UserError(
            "There is no one answer of several ensembles: the data set has no patients with "
            f"{' and '.join(absent)}. An ensemble of the other diagnoses can be used alone."
        )
    label, fold = first["diagnosis"].map(DIAGNOSES.index).to_numpy(), first["fold"].to_numpy()
    logits = {
        name: table[[f"outer_{w}" for w in range(fold.max() + 2)]].astype(np.float64).to_numpy()
        for name, table in tables.items()
    }
    found = []
    sets = (names for size in range(len(pairs), 1, -1) for names in combinations(pairs, size))
    for names in sets:
        if len({diagnosis for name in names for diagnosis in pairs[name]}) < len(DIAGNOSES):
            continue  # it does not compare all three
        mine, of = np.stack([logits[name] for name in names], axis=1), [pairs[name] for name in names]
        chances, folds = np.zeros((len(label), 3)), []
        for outer_fold in range(fold.max() + 2):
            inside, outside = fold != outer_fold, fold == outer_fold
            folds.append(fit(mine[inside, :, outer_fold], of, label[inside]))
            if outside.any():
                chances[outside] = probabilities(folds[-1], mine[outside, :, outer_fold], of)
        found.append(Judged(names, chances, folds))
    if not found:
        raise UserError(
            f"There is no one answer: the ensembles {', '.join(pairs)} do not compare healthy, aml and apl. "
            "Set `positive` and `negative` of an ensemble in params.yaml."
        )
    return found


def write_answers(
    path: Path,
    judged: Sequence[Judged],
    pairs: Mapping[str, Pair],
    manifests: Mapping[str, Path],
    diagnosis: Sequence[str],
    sure: float,
) -> None:
    """Write answer.json, for new patients.

    `manifests` are those of the ensembles' bundles; `diagnosis` is that of each patient, in the order of
    `judged`; a diagnosis is called from the probability `sure` on.
    """
    answers = [
        Answer(
            ensembles=list(each.ensembles),
            folds=each.folds,
            held_out=[
                HeldOut(diagnosis=of, probabilities=row)
                for of, row in sorted(zip(diagnosis, each.probability.tolist(), strict=True))
            ],
        )
        for each in judged
    ]
    sums = {name: sha256(manifests[name]) for name in pairs}
    whole = Answers(pairs=dict(pairs), manifests=sums, sure=sure, answers=answers)
    plain = round_floats(whole.model_dump(), _DIGITS)
    write_json(path, plain | {"checksum": _checksum(plain)}, _DIGITS)


def read_answers(path: Path) -> Answers:
    """Read answer.json. UserError if it is not there, was changed, or has another version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("version") != VERSION:
            raise ValueError(f"version {raw.get('version')} of the format, this program reads {VERSION}")
        if raw.get("checksum") != _checksum(raw):
            raise ValueError("it has changed since it was written")
        return Answers.model_validate_json(json.dumps(raw))
    except FileNotFoundError:
        raise UserError(
            f"There is no one answer: {path} is not there. `dvc repro answer` makes it, if the data set has "
            "healthy patients, patients with other AML and patients with APL. For the answer of one ensemble "
            "alone, add `--ensemble ensembles/NAME`."
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be used ({brief(error)}): copy it again, or run `dvc repro answer`"
        ) from None


def check_manifests(answers: Answers, manifests: Mapping[str, Path]) -> None:
    """Raise UserError unless the bundles of ensembles are those that the answers were fitted on."""
    for name, path in manifests.items():
        if answers.manifests[name] != sha256(path):
            raise UserError(
                f"{path.parent} is not the ensemble {name} that the one answer was fitted on: take both from "
                "the same run (`dvc repro answer`)"
            )


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {name: each for name, each in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
