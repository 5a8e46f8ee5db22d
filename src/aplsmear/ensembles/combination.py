"""A probability and a verdict per patient from the scores of the members, without a leak.

The scheme, for the outer fold that holds out fold 0 of five (see `aplsmear.evaluation.splits`)::

    fold           0        1      2      3      4
                [held out]  <----- inner folds ----->
    members     scored by   each scored by heads that saw neither it nor fold 0
                heads that
                saw 1..4
    choice         -        every candidate combination is fitted on three inner folds and scored on the
                            fourth; the simplest within one standard error of the best is chosen
    calibration    -        a line through the held-out logits of the chosen candidate on the inner folds
    thresholds     -        the operating points on the calibrated probabilities of the inner folds
    combination    -        fitted on all four inner folds
    verdict     [fold 0] <- combination, calibration and thresholds are applied to it, once

The hyper-parameters and the heads of the members come from the inner folds alone, too
(`aplsmear.heads.search`). The last outer fold holds out no patient; it gives the final model, which `predict`
uses for new patients.

Patients are few. So the candidates (drawn by Optuna before any score is known) begin with strong ridge
penalties, continue with weaker ones and end with networks of a few units, and the simplest within one
standard error is chosen (Breiman et al., Classification and Regression Trees, 1984).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from aplsmear.ensembles.pooling import SUMMARIES, summarise_patients
from aplsmear.ensembles.promise import Alarm, alarm
from aplsmear.errors import UserError
from aplsmear.evaluation.auroc import auroc, auroc_standard_error, auroc_within_folds
from aplsmear.evaluation.intervals import summary
from aplsmear.evaluation.operating_points import operating_points, rates, wilson_interval
from aplsmear.params import Combine, Promise, TaskLevel
from aplsmear.tables import as_written
from aplsmear.words import unlike_params

MODELS = ("average", "logistic", "network")  # the simplest first
# C of the calibration line on standardised logits: enough that separated classes get no endless slope.
# With 1, probabilities are too cautious: slopes of 1.4 on real patients.
_CALIBRATION_C = 10.0
_MIN_SCALE = 1e-6  # of a member that gives every patient the same score
_SCORES = ".scores.parquet"
_PROMISE = Promise()
_NULL_MARGIN = 0.03  # the AUROC of `null_check` may differ from 0.5 by so much


@dataclass(frozen=True)
class Candidate:
    """A way to combine members.

    The model ``average`` is that of the members' standardised logits, each with the sign of its correlation
    with the diagnosis; ``logistic``: a ridge regression on them; ``network``: with a hidden layer.
    """

    number: int  # its place in the draw
    model: str  # one of `MODELS`
    summary: str  # of each patient's scores, one of `aplsmear.ensembles.pooling.SUMMARIES`
    C: float  # inverse strength of the ridge penalty (as in scikit-learn); 0 for an average
    units: int  # of the hidden layer; 0 unless it is a network

    @property
    def complexity(self) -> tuple[int, int, float]:
        """Smaller is simpler."""
        return MODELS.index(self.model), self.units, self.C


@dataclass(frozen=True)
class Weights:
    """A fitted, uncalibrated combination of standardised logits; linear if it has no hidden units."""

    mean: np.ndarray  # float64 (members,): mean logit; also replaces the logit of a member without items
    scale: np.ndarray  # float64 (members,): standard deviation
    hidden: np.ndarray  # float64 (members, units)
    hidden_intercept: np.ndarray  # float64 (units,)
    weights: np.ndarray  # float64 (members,), of a network (units,)
    intercept: np.ndarray  # float64 ()

    def logit(self, logits: np.ndarray) -> np.ndarray:
        """float64 (patients,) of summaries (patients, members), NaN where a patient has no item."""
        inputs = (np.where(np.isnan(logits), self.mean, logits) - self.mean) / self.scale
        if self.hidden.shape[1]:
            inputs = np.tanh(inputs @ self.hidden + self.hidden_intercept)
        return np.asarray(inputs @ self.weights + self.intercept)


@dataclass(frozen=True)
class Combination:
    """A calibrated combination, probability = sigmoid(slope * logit + offset), and its operating points."""

    members: tuple[str, ...]
    summary: str
    fitted: Weights
    slope: float
    offset: float
    thresholds: dict[str, float]  # operating points on the calibrated probability
    alarm: Alarm  # its threshold is never above the balanced point
    refits: tuple[Weights, ...] = ()  # on resampled patients; only the combination for new patients has them

    def logit(self, logits: np.ndarray, fitted: Weights | None = None) -> np.ndarray:
        """Calibrated logit of the positive diagnosis, float64 (patients,).

        `logits` are as for `Weights.logit`; `fitted` are other weights with the same calibration.
        """
        return np.asarray(self.slope * (fitted or self.fitted).logit(logits) + self.offset)

    def probability(self, logits: np.ndarray, fitted: Weights | None = None) -> np.ndarray:
        """Calibrated probability of the positive diagnosis, float64 (patients,); arguments as for `logit`."""
        return np.asarray(expit(self.logit(logits, fitted)))

    def interval(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the 95 % interval of the probability over the refits, float64 (patients,); else NaN."""
        probability = self.probability(logits)
        if not self.refits:
            return np.full(len(probability), np.nan), np.full(len(probability), np.nan)
        low, high = np.quantile(
            [*(self.probability(logits, each) for each in self.refits), probability], [0.025, 0.975], axis=0
        )
        return np.minimum(low, probability), np.maximum(high, probability)

    def calls(self, probability: np.ndarray) -> dict[str, np.ndarray]:
        """``verdict`` and ``sensitive``: the calls, int64, at the balanced and at the sensitive point.

        And ``alarm``, str: "no alarm" below the threshold of the alarm, "alarm" from the balanced point on,
        "look again" between them.
        """
        positive, sensitive = (
            (probability >= self.thresholds[point]).astype(np.int64) for point in ("balanced", "sensitive")
        )
        alarm = np.where(positive == 1, "alarm", "look again").astype(object)
        alarm[probability < self.alarm.threshold] = "no alarm"
        return {"verdict": positive, "sensitive": sensitive, "alarm": alarm}


@dataclass(frozen=True)
class Verdicts:
    """Held-out verdicts of every patient, and what they were made from."""

    table: pd.DataFrame
    logits: np.ndarray  # float64 (patients, members): summaries that the held-out combination used
    combinations: list[Combination]  # of each outer fold; the last is for new patients
    chosen: list[Candidate]  # of each outer fold


def draw_candidates(combine: Combine, seed: int) -> list[Candidate]:
    """Candidates, drawn by Optuna before any score is known: the same serve every outer fold without a leak.

    The simplest of each summary come first. Different ones from `combine.space` follow by random search,
    until there are `combine.trials` or the space has no more.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    space = combine.space
    choices: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(values) for name, values in space
    }
    simplest = {"model": min(space.model, key=MODELS.index), "C": min(space.C), "units": min(space.units)}
    for summary_name in space.summary:
        study.enqueue_trial(simplest | {"summary": summary_name})
    found: dict[tuple[Any, ...], Candidate] = {}
    for _ in range(50 * combine.trials):
        drawn = study.ask(choices).params
        model = drawn["model"]
        C = 0.0 if model == "average" else drawn["C"]
        key = (model, drawn["summary"], C, drawn["units"] if model == "network" else 0)
        found.setdefault(key, Candidate(len(found), *key))
        if len(found) == combine.trials:
            break
    return list(found.values())


def patients_of(folds: pd.DataFrame, positive: str, negative: str) -> pd.DataFrame:
    """The patients of an ensemble: ``patient, diagnosis, fold, label``, sorted by patient.

    Raises UserError if a diagnosis has no patients.
    """
    counts = folds["diagnosis"].value_counts().sort_index()
    absent = [diagnosis for diagnosis in (positive, negative) if diagnosis not in counts]
    if absent:
        has = ", ".join(f"{count} {diagnosis}" for diagnosis, count in counts.items())
        raise UserError(
            f"an ensemble of {positive} against {negative} needs patients of both, but there are {has}. "
            f"Add patients with the diagnosis {' and '.join(absent)}, or set `positive` and `negative` of "
            "the ensemble in params.yaml. Ensembles of the other diagnoses can be made alone (`dvc repro "
            "ensemble_NAME`), but there is no one answer of several ensembles."
        )
    mine = folds[folds["diagnosis"].isin([positive, negative])].sort_values("patient", ignore_index=True)
    return mine.assign(label=(mine["diagnosis"] == positive).astype(np.int64))


def read_members(
    folder: Path, levels: Mapping[str, TaskLevel], weights: Mapping[TaskLevel, pd.DataFrame]
) -> dict[str, pd.DataFrame]:
    """`rounded_summaries` of the scores of each member in `levels`.

    The folder, ``members/<ensemble>``, has ``<task>.scores.parquet`` of each member. `weights` are the scores
    that weigh the items of a level; items of other levels have weight 1.

    Raises UserError if the folder lacks a member, or has one that is not named (DVC would take it for an
    input).
    """
    there = [path.name.removesuffix(_SCORES) for path in folder.glob(f"*{_SCORES}")]
    if problem := unlike_params(folder, "members", there, levels, f"member_{folder.name}"):
        raise UserError(problem)
    return {
        name: rounded_summaries(pd.read_parquet(folder / f"{name}{_SCORES}"), weights.get(level))
        for name, level in levels.items()
    }


def rounded_summaries(scores: pd.DataFrame, weights: pd.DataFrame | None = None) -> pd.DataFrame:
    """`aplsmear.ensembles.pooling.summarise_patients`, rounded to the digits of a table, as `predict` does.

    This removes the effect of the order in which cells were added up.
    """
    table = summarise_patients(scores, weights)
    return table.assign(**{column: table[column].map(as_written) for column in SUMMARIES})


def judge(
    patients: pd.DataFrame,
    members: Mapping[str, pd.DataFrame],
    candidates: Sequence[Candidate],
    refits: int,
    seed: int,
    promise: Promise = _PROMISE,
) -> Verdicts:
    """Nested verdicts on every patient; see the scheme at the top of this module.

    `members` have the tables of `aplsmear.ensembles.pooling.summarise_patients`, rows in any order; a patient
    without items for a member has no rows there. `refits` is the number of bootstrap refits for the interval
    of each probability; 0: no width. The seed is that of the refits and of the first weights of networks.

    The table has ``patient, diagnosis, fold, label, probability, low, high, verdict, sensitive, alarm``: the
    95 % interval of the probability over refits on resampled patients, and `Combination.calls`. Raises
    UserError if a member has scored none of the patients.
    """
    without = [
        name for name, table in members.items() if not patients["patient"].isin(table["patient"]).any()
    ]
    if without:
        raise UserError(
            f"the members {', '.join(without)} have scored none of the {len(patients)} patients of this "
            "ensemble. Take them out of `members` in params.yaml, or add cells or smears of these patients."
        )
    label, fold = patients["label"].to_numpy(), patients["fold"].to_numpy()
    table = patients.assign(probability=0.0, low=0.0, high=0.0, verdict=0, sensitive=0, alarm="")
    used = np.full((len(patients), len(members)), np.nan)
    summaries = sorted({candidate.summary for candidate in candidates})
    combinations, chosen = [], []
    for outer_fold in range(int(fold.max()) + 2):
        inside, outside = np.flatnonzero(fold != outer_fold), np.flatnonzero(fold == outer_fold)
        logits = {name: _logits(patients, members, outer_fold, name) for name in summaries}
        inner_logits = {name: each[inside] for name, each in logits.items()}
        candidate, combination = combined(
            candidates, inner_logits, label[inside], fold[inside], tuple(members), seed, promise
        )
        mine = logits[candidate.summary]
        refitted = _refitted(candidate, mine[inside], label[inside], refits, [seed, outer_fold])
        with_refits = replace(combination, refits=tuple(refitted))
        chosen.append(candidate)
        combinations.append(combination if len(outside) else with_refits)  # the last is for new patients
        used[outside] = mine[outside]
        probability = combination.probability(mine[outside])
        low, high = with_refits.interval(mine[outside]) if refits else (probability, probability)
        columns = {"probability": probability, "low": low, "high": high} | combination.calls(probability)
        table.loc[outside, list(columns)] = pd.DataFrame(columns, outside)
    return Verdicts(table, used, combinations, chosen)


def combined(
    candidates: Sequence[Candidate],
    logits: Mapping[str, np.ndarray],
    label: np.ndarray,
    fold: np.ndarray,
    members: tuple[str, ...],
    seed: int,
    promise: Promise = _PROMISE,
) -> tuple[Candidate, Combination]:
    """The best candidate for the patients of the inner folds, fitted to them and calibrated.

    `logits` has for each summary float64 (patients, members), of heads that did not see the patient. Label
    and fold are int64 (patients,). The other arguments are as for `judge`.
    """
    candidate, inner = _choose(candidates, logits, label, fold, seed)
    fitted = _fit(candidate, logits[candidate.summary], label, seed)
    # Calibration (Platt 1999), thresholds and alarm come from the logits that were held out on inner folds.
    line = LogisticRegression(C=_CALIBRATION_C, tol=1e-6, max_iter=1000)
    spread = max(float(inner.std()), _MIN_SCALE)
    line.fit(inner[:, None] / spread, label)
    slope, offset = float(line.coef_[0, 0] / spread), float(line.intercept_[0])
    points = operating_points_of(label, expit(slope * inner + offset), promise.miss_rate, promise.confidence)
    return candidate, Combination(members, candidate.summary, fitted, slope, offset, *points)


def logits_of_all(
    verdicts: Verdicts, everyone: pd.DataFrame, members: Mapping[str, pd.DataFrame], seed: int
) -> pd.DataFrame:
    """The calibrated logit of every patient of the data set in every outer fold, without a leak.

    In outer fold w, the patients of fold w get the logit of the combination of that outer fold, as in
    `Verdicts.table`. The patients of another fold get that of the same candidate, fitted without fold w and
    without their own fold, with the calibration of outer fold w. Patients with another diagnosis than the two
    of the ensemble take no part in any fit, and are scored in the same way.

    `everyone` has ``patient, diagnosis, fold`` of all patients; `members` and `seed` are as for `judge`. The
    result has ``patient, diagnosis, fold, outer_0 ... outer_K``, sorted by patient.
    """
    table = everyone.sort_values("patient", ignore_index=True)
    label = table["patient"].map(verdicts.table.set_index("patient")["label"]).to_numpy(np.float64)
    fold = table["fold"].to_numpy()
    for outer_fold, combination in enumerate(verdicts.combinations):
        candidate = verdicts.chosen[outer_fold]
        mine, found = _logits(table, members, outer_fold, candidate.summary), np.zeros(len(table))
        for held_out in np.unique(fold):
            there, fitted = fold == held_out, combination.fitted
            if held_out != outer_fold:
                rows = ~there & (fold != outer_fold) & ~np.isnan(label)
                fitted = _fit(candidate, mine[rows], label[rows].astype(np.int64), seed)
            found[there] = combination.logit(mine[there], fitted)
        table[f"outer_{outer_fold}"] = found
    return table


def measure(table: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    """The measures for intervals.json, each with its 95 % interval over patients.

    The table has ``label, probability, verdict, sensitive`` of each patient. Measures at the sensitive
    operating point are in the group ``at_sensitive``.
    """
    measured = summary(table["label"], table["probability"], resamples=resamples, seed=seed)
    balanced, sensitive = (rates(table["label"], table[column]) for column in ("verdict", "sensitive"))
    return measured | balanced | {"at_sensitive": sensitive}


def importance(verdicts: Verdicts, repeats: int, seed: int) -> pd.DataFrame:
    """Permutation importance of each member for the held-out AUROC (Breiman, Mach Learn 2001;45:5).

    The summaries of a member are permuted among the patients of a fold. The combination that never saw these
    patients then gives new probabilities. The table has ``member, auroc_drop, low, high``, in the order of
    the members: mean drop of the AUROC and the central 95 % of the permutations. Below 0: the verdicts are
    better without the member.
    """
    label, fold = verdicts.table["label"].to_numpy(), verdicts.table["fold"].to_numpy()
    whole = auroc(label, verdicts.table["probability"].to_numpy())
    rows = []
    for place, member in enumerate(verdicts.combinations[-1].members):
        rng = np.random.Generator(np.random.Philox([seed, place]))
        drops = []
        for _ in range(repeats):
            logits = verdicts.logits.copy()
            logits[:, place] = logits[_permuted_within(fold, rng), place]
            probability = np.zeros(len(fold))
            for outer_fold in np.unique(fold):
                here = fold == outer_fold
                probability[here] = verdicts.combinations[outer_fold].probability(logits[here])
            drops.append(whole - auroc(label, probability))
        low, high = np.quantile(drops, [0.025, 0.975])
        rows.append({"member": member, "auroc_drop": float(np.mean(drops)), "low": low, "high": high})
    return pd.DataFrame(rows)


def null_check(
    patients: pd.DataFrame,
    members: Mapping[str, pd.DataFrame],
    candidates: Sequence[Candidate],
    repeats: int,
    seed: int,
) -> Iterator[tuple[float, float]]:
    """`judge` on permuted diagnoses: an AUROC other than 0.5 shows a leak (`null_verdict`).

    Diagnoses are permuted among the patients of a fold, so that the folds stay stratified. The scores of the
    members stay the same; the choice of the combination, its weights and its calibration are made again.

    Yields for each permutation the AUROC of the held-out probabilities over all pairs of patients, and over
    the pairs of patients who were judged by the same combination. Without a leak, the expectation of the
    second is exactly 0.5. The first may be a little lower: two similar patients with different folds and
    labels push each other's probability in the wrong direction.
    """
    fold = patients["fold"].to_numpy()
    for repeat in range(repeats):
        rng = np.random.Generator(np.random.Philox([seed, repeat]))
        permuted = patients.assign(label=patients["label"].to_numpy()[_permuted_within(fold, rng)])
        table = judge(permuted, members, candidates, 0, seed).table
        label, probability = table["label"], table["probability"]
        yield auroc(label, probability), auroc_within_folds(label, probability, fold)


@dataclass(frozen=True)
class NullVerdict:
    """What permutations show."""

    mean: float  # AUROC
    low: float  # ends of the 95 % interval of the mean, by Student's t
    high: float
    leaks: bool
    needed: int  # the number of permutations that it takes to tell a leak from chance


def null_verdict(values: Sequence[float], *, within_folds: bool) -> NullVerdict:
    """Decide by the AUROC of each permutation whether there is a leak.

    A leak: the mean lies further from 0.5 than `_NULL_MARGIN`, and chance alone goes as far in at most 3
    of 1000 checks. Over all pairs only a mean above 0.5 shows a leak (see `null_check`). Chance has to stay
    within the margin for a verdict that there is no leak.
    """
    count, mean, deviation = len(values), float(np.mean(values)), float(np.std(values, ddof=1))

    def reach(level: float, repeats: int) -> float:
        return float(student.ppf(level, repeats - 1) * deviation / np.sqrt(repeats))

    half = reach(0.975, count)
    return NullVerdict(
        mean,
        mean - half,
        mean + half,
        leaks=(abs(mean - 0.5) if within_folds else mean - 0.5) > max(_NULL_MARGIN, reach(0.9985, count)),
        needed=next(repeats for repeats in itertools.count(2) if reach(0.9985, repeats) <= _NULL_MARGIN),
    )


def as_json(combination: Combination) -> dict[str, Any]:
    """A combination as plain JSON; `combination_of` reads it back."""

    def plain(fitted: Weights) -> dict[str, Any]:
        return {each.name: np.asarray(getattr(fitted, each.name)).tolist() for each in fields(Weights)}

    return {
        "summary": combination.summary,
        "members": list(combination.members),
        **plain(combination.fitted),
        "slope": combination.slope,
        "offset": combination.offset,
        "thresholds": combination.thresholds,
        "refits": [plain(each) for each in combination.refits],
        "alarm": asdict(combination.alarm),
    }


def combination_of(model: Mapping[str, Any]) -> Combination:
    """The combination of an object of `as_json`, also after a trip through JSON.

    Raises UserError if something is missing or does not fit together.
    """
    try:
        members = tuple(str(member) for member in model["members"])
        return Combination(
            members=members,
            summary=SUMMARIES[SUMMARIES.index(model["summary"])],
            fitted=_weights_of(model, len(members)),
            slope=float(model["slope"]),
            offset=float(model["offset"]),
            thresholds={point: float(model["thresholds"][point]) for point in ("balanced", "sensitive")},
            alarm=Alarm(**model["alarm"]),
            refits=tuple(_weights_of(each, len(members)) for each in model["refits"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"this is no combination ({type(error).__name__}: {error})") from None


def _weights_of(model: Mapping[str, Any], members: int) -> Weights:
    arrays = {each.name: np.asarray(model[each.name], dtype=np.float64) for each in fields(Weights)}
    arrays["hidden"] = arrays["hidden"].reshape(members, -1)
    units = arrays["hidden"].shape[1]
    shapes: dict[str, tuple[int, ...]]
    shapes = {"mean": (members,), "scale": (members,), "hidden_intercept": (units,)}
    shapes |= {"weights": (units or members,), "intercept": ()}
    if any(arrays[name].shape != shape for name, shape in shapes.items()):
        raise ValueError("numbers of weights that do not fit the members")
    return Weights(**arrays)


def _logits(
    patients: pd.DataFrame, members: Mapping[str, pd.DataFrame], outer_fold: int, summary_name: str
) -> np.ndarray:
    """float64 (patients, members): one summary of the scores in an outer fold, NaN without items."""
    columns = []
    for table in members.values():
        mine = table[table["outer_fold"] == outer_fold].set_index("patient")[summary_name]
        columns.append(mine.reindex(patients["patient"]).to_numpy(dtype=np.float64))
    return np.stack(columns, axis=1)


def _choose(
    candidates: Sequence[Candidate],
    logits: Mapping[str, np.ndarray],
    label: np.ndarray,
    fold: np.ndarray,
    seed: int,
) -> tuple[Candidate, np.ndarray]:
    """The simplest candidate within one standard error of the best, and its logits held out on inner folds.

    Among equally simple ones the best is chosen, then the first.
    """
    inner = [
        _cross_fitted(candidate, logits[candidate.summary], label, fold, seed) for candidate in candidates
    ]
    aurocs = [auroc_within_folds(label, each, fold) for each in inner]
    best = int(np.argmax(aurocs))
    lowest = aurocs[best] - auroc_standard_error(label, inner[best], fold=fold)
    place = min(
        (place for place, value in enumerate(aurocs) if value >= lowest),
        key=lambda place: (candidates[place].complexity, -aurocs[place], place),
    )
    return candidates[place], inner[place]


def _cross_fitted(
    candidate: Candidate, logits: np.ndarray, label: np.ndarray, fold: np.ndarray, seed: int
) -> np.ndarray:
    """Each inner fold's combined logits, fitted on the other inner folds: float64 (patients,)."""
    out = np.zeros(len(label))
    for held_out in np.unique(fold):
        there = fold == held_out
        out[there] = _fit(candidate, logits[~there], label[~there], seed).logit(logits[there])
    return out


def _fit(candidate: Candidate, logits: np.ndarray, label: np.ndarray, seed: int) -> Weights:
    """The weights of a candidate on members' logits; these are standardised, and the mean replaces gaps."""
    mean, scale, inputs = standardised(logits, _MIN_SCALE)
    hidden, hidden_intercept = np.zeros((inputs.shape[1], 0)), np.zeros(0)
    if candidate.model == "average":
        weights = np.sign(np.round(inputs.T @ (label - label.mean()), 9)) / inputs.shape[1]
        intercept = np.zeros(())
    elif candidate.model == "logistic":
        model = LogisticRegression(C=candidate.C, tol=1e-6, max_iter=1000).fit(inputs, label)
        weights, intercept = model.coef_[0], model.intercept_[0]
    else:
        network = MLPClassifier(
            (candidate.units,),
            activation="tanh",
            solver="lbfgs",
            alpha=1 / candidate.C,  # on the same scale as C
            max_iter=2000,
            random_state=seed,
        ).fit(inputs, label)
        (hidden, outer), (hidden_intercept, last) = network.coefs_, network.intercepts_
        weights, intercept = outer[:, 0], last[0]
    return Weights(mean, scale, hidden, hidden_intercept, weights, np.asarray(intercept))


def standardised(values: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of columns, their standard deviations (at least `floor`), and standardised values; NaN: mean."""
    known = ~np.isnan(values)
    mean = np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    centred = np.where(known, values, mean) - mean
    scale = np.maximum(centred.std(axis=0), floor)
    return mean, scale, centred / scale


def operating_points_of(
    label: np.ndarray, probability: np.ndarray, miss_rate: float, confidence: float
) -> tuple[dict[str, float], Alarm]:
    """The operating points and the alarm, on calibrated probabilities of patients who were held out.

    ``balanced`` is the share of positives. If probabilities are calibrated, sensitivity + specificity is
    highest there. On few patients that is far more stable than a search for the best threshold (simulated, 16
    + 16 patients, AUROC 0.88: balanced accuracy on new patients 0.794 +/- 0.007, against 0.779 +/- 0.023 by
    Youden's index). ``sensitive`` is that of `operating_points`, but never above ``balanced``: a patient who
    is positive at the balanced point is also positive at the sensitive point.
    """
    balanced = float(label.mean())
    sensitive = min(operating_points(label, probability)["sensitive"], balanced)
    found = alarm(probability[label == 1], miss_rate, confidence)
    thresholds = {"balanced": balanced, "sensitive": sensitive}
    return thresholds, replace(found, threshold=min(found.threshold, balanced))


def measure_alarm(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """What the alarm did to patients who were held out, each ``{value, low, high}`` (Wilson).

    ``missed``: share of positive patients without an alarm; ``cleared``: share of negative ones without;
    ``look_again``: share of all patients between alarm and no alarm. `table` has ``label, alarm``.
    """
    label, call = table["label"], table["alarm"]
    shares = {"missed": call[label == 1] == "no alarm", "cleared": call[label == 0] == "no alarm"}
    shares["look_again"] = call == "look again"
    return {name: wilson_interval(int(each.sum()), len(each))._asdict() for name, each in shares.items()}


def _refitted(
    candidate: Candidate, logits: np.ndarray, label: np.ndarray, refits: int, seed: list[int]
) -> Iterator[Weights]:
    """The weights of a candidate on patients resampled within each class, `refits` times."""
    rng = np.random.Generator(np.random.Philox(seed))
    classes = [np.flatnonzero(label == value) for value in (0, 1)]
    for _ in range(refits):
        rows = np.concatenate([rng.choice(each, len(each)) for each in classes])
        yield _fit(candidate, logits[rows], label[rows], seed[0])


def _permuted_within(fold: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation of the patients within their folds: int64 (patients,)."""
    order = np.arange(len(fold))
    for each in np.unique(fold):
        here = np.flatnonzero(fold == each)
        order[here] = rng.permutation(here)
    return order
