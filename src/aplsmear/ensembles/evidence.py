"""How much does each cell or smear of a patient count for the result of an ensemble?

The evidence of an item is its part of the patient's calibrated logit. Evidence above 0 points to the
positive diagnosis. The evidence of all cells and smears of a patient adds up to

    logit of the patient - logit of the mean training patient

where the mean training patient is one for whom each member gives its mean logit (`Weights.mean`). An item has
evidence 0 if it looks like the mean training patient.

The way from the scores to the logit has two kinds of steps. A weighted sum is divided among its items: weight
times distance from the mean training patient. A function f of such a sum (the logit of a mean, a hidden unit)
multiplies all of them by the same slope, (f(sum) - f(mean patient)) / (sum - mean patient). This is the
method of integrated gradients (Sundararajan et al., ICML 2017, arXiv:1703.01365) along the straight line from
the mean patient to this one, here without a numerical integral.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from aplsmear.ensembles.combination import Combination
from aplsmear.ensembles.pooling import CLIP, LEAK, TOP, UPPER
from aplsmear.heads.bags import attention_and_logits
from aplsmear.tables import as_written

EVIDENCE, SCORE, ATTENTION = "evidence_", "score_", "attention_"  # columns of tables, before a name
PLACE = ("patient", "smear", "cell", "image", "y0", "x0", "y1", "x1")  # the other columns, of a cell
_STEP = 1e-6  # a shorter way to the mean patient gets the slope of a way of this length


@dataclass(frozen=True)
class Items:
    """What one member computed of the cells or smears of one patient."""

    score: np.ndarray  # float64 (items,): the probability that the member gives to each item alone
    # Logit of the mean training patient -> each item's part of the member's logit, float64 (items,). They
    # add up to the member's logit minus this number.
    parts: Callable[[float], np.ndarray]
    attention: np.ndarray | None = None  # float64 (items,), adding up to 1; None: the member has none


@dataclass(frozen=True)
class Evidence:
    """The evidence of the cells of one patient, or that of the smears."""

    items: Sequence[str]  # ids
    columns: Mapping[str, np.ndarray]  # ``score_TASK``, ``attention_TASK`` of the members: float64 (items,)
    evidence: np.ndarray  # float64 (items,), as this module defines it, summed over the members


def scored(score: np.ndarray, weight: np.ndarray | None, summary: str) -> Items:
    """The items (at least one) of a member that scores each alone.

    `score`, float (items,), are probabilities; `weight` and `summary` are as for
    `aplsmear.ensembles.pooling.summary_logit`.
    """
    score = score.astype(np.float64)
    ones = np.ones(len(score))
    weighted = ones if weight is None else np.maximum(weight.astype(np.float64), CLIP)

    def parts(mean: float) -> np.ndarray:
        if summary == "blend":
            each = [_parts(name, score, by, mean) for name in ("mean", "logits") for by in (ones, weighted)]
            return np.asarray(np.mean(each, axis=0))
        plain = summary.removeprefix("weighted_")
        return _parts(plain, score, ones if plain == summary else weighted, mean)

    return Items(score, parts)


def attended(seen: Sequence[tuple[np.ndarray, np.ndarray]]) -> Items:
    """The items of a member whose head scores the patient by all items together.

    `seen` has the gates and logits of `aplsmear.heads.bags.gates_and_logits`, once for each view that is
    averaged.
    """
    attention, logits = attention_and_logits(seen)  # (views, items, heads)
    of_view = (attention * logits).sum(axis=1).mean(axis=1)

    def parts(mean: float) -> np.ndarray:
        of_items = (attention * (logits - mean)).mean(axis=2)
        of_items = (_slope(expit, of_view, mean)[:, None] * of_items).mean(axis=0)
        return np.asarray(_slope(_logit, expit(of_view).mean(), expit(mean)) * of_items)

    return Items(expit(logits.mean(axis=2)).mean(axis=0), parts, attention.mean(axis=(0, 2)))


def evidence_of(
    names: Sequence[str], items: Mapping[str, Items], combination: Combination, logits: np.ndarray
) -> Evidence:
    """The evidence of the cells `names` of a patient, or that of the smears.

    `items` are of the members that read these items; in all other members the items have no part. `logits`
    are of each member of the combination for this patient, float64 (members,).
    """
    slopes = member_slopes(combination, logits)
    evidence, columns = np.zeros(len(names)), {}
    for task, member in items.items():
        place = combination.members.index(task)
        evidence += slopes[place] * member.parts(float(combination.fitted.mean[place]))
        columns[SCORE + task] = member.score
        if member.attention is not None:
            columns[ATTENTION + task] = member.attention
    return Evidence(names, columns, evidence)


def most_evidence(evidence: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """The places of the items that count most for the positive diagnosis, and most against it.

    Of each at most `count`, the most evidence first; `evidence` is float64 (items,).
    """
    order = np.argsort(-evidence, kind="stable")
    most = [int(n) for n in order if evidence[n] > 0]
    least = [int(n) for n in order[::-1] if evidence[n] < 0]
    return most[:count], least[:count]


def member_slopes(combination: Combination, logits: np.ndarray) -> np.ndarray:
    """How much the patient's logit changes with the logit of each member, float64 (members,).

    The sum of slope times (logit of the member - its mean) is the patient's logit minus that of the mean
    training patient. `logits` are float64 (members,), NaN where the patient has no item.
    """
    fitted = combination.fitted
    slopes = fitted.weights
    if fitted.hidden.shape[1]:
        moved = (np.where(np.isnan(logits), fitted.mean, logits) - fitted.mean) / fitted.scale
        start = fitted.hidden_intercept
        slopes = fitted.hidden @ (_slope(np.tanh, moved @ fitted.hidden + start, start) * fitted.weights)
    return np.asarray(combination.slope * slopes / fitted.scale)


def evidence_table(
    smears: pd.DataFrame, cells: pd.DataFrame, found: Mapping[str, Iterable[Evidence | None]]
) -> pd.DataFrame:
    """One row for each cell: where it lies, and what the members of the ensembles computed.

    `smears` have ``smear, image``; `cells` have ``patient, smear, cell, y0, x0, y1, x1``, and ``image`` of
    one with a picture of its own; `found` has the evidence of the cells of some patients, by ensemble.

    Returns `PLACE`, then ``score_TASK`` of each member (probability; of a head on bags, that of the cell
    alone), ``attention_TASK`` of each head on bags (adds up to 1 over the cells of a patient) and
    ``evidence_ENSEMBLE``, with the digits of a table. Sorted by patient, then as in `cells`. A cell that no
    ensemble judged has no numbers.
    """
    image = cells["smear"].map(dict(zip(smears["smear"], smears["image"], strict=True)))
    table = cells.assign(image=image.where(image.notna(), cells.get("image", image)))[list(PLACE)]
    for name, patients in found.items():
        parts = [
            pd.DataFrame({"cell": each.items, **each.columns, EVIDENCE + name: each.evidence})
            for each in patients
            if each is not None
        ]
        numbers = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"cell": []}, dtype=str)
        new = [column for column in numbers if column == "cell" or column not in table]
        table = table.merge(numbers[new], on="cell", how="left")
    columns: list[str] = sorted(map(str, table), key=_rank)
    table = table[columns].sort_values("patient", kind="stable", ignore_index=True)
    return table.assign(**{name: table[name].map(as_written) for name in table.columns[len(PLACE) :]})


def _rank(column: str) -> int:
    """The place of a column: `PLACE`, scores, attention, evidence."""
    starts = (SCORE, ATTENTION, EVIDENCE)
    return next((n for n, start in enumerate(starts, 1) if column.startswith(start)), 0)


def _parts(name: str, score: np.ndarray, weight: np.ndarray, mean: float) -> np.ndarray:
    """Each item's part of a summary of `aplsmear.ensembles.pooling.summarise`, as a logit minus `mean`."""
    total, share, value, start = weight.sum(), weight / weight.sum(), score, float(expit(mean))
    function: Callable[[np.ndarray], np.ndarray] = _logit
    if name == "logits":
        return np.asarray(share * (_logit(score) - mean))
    if name == "share":
        value = (total * (score > 0.5) + 0.5) / (total + 1)
    elif name == "noisy_or":
        value, start = total * np.log1p(-LEAK * score), float(np.log1p(-start))
        function = _logit_of_any
    elif name == "top":
        share = _share_of_highest(score, weight)
    elif name == "upper":
        share = _share_of_quantile(score, share)
    return np.asarray(_slope(function, (share * value).sum(), start) * share * (value - start))


def _share_of_highest(score: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The share of each item in the mean of the `TOP` highest."""
    order = np.lexsort((weight, score))[::-1]
    taken = np.empty(len(score))
    taken[order] = np.clip(TOP - (weight[order].cumsum() - weight[order]), 0, weight[order])
    return np.asarray(taken / taken.sum())


def _share_of_quantile(score: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The share of each item in the quantile `UPPER`: it lies between two items, or on one."""
    order = np.argsort(score, kind="stable")
    place = share[order].cumsum() - share[order] / 2
    right = int(np.clip((place <= UPPER).sum(), 0, len(place) - 1))
    left = max(right - 1, 0)
    way = place[right] - place[left]
    at = float(np.clip((UPPER - place[left]) / way, 0, 1)) if way > 0 else 1.0
    found = np.zeros(len(score))
    found[order[left]] += 1 - at
    found[order[right]] += at
    return found


def _logit_of_any(log_none: np.ndarray) -> np.ndarray:
    """The logit of the chance that some item is positive, from the logarithm of the chance of none."""
    return _logit(-np.expm1(log_none))


def _logit(probability: np.ndarray) -> np.ndarray:
    return np.asarray(logit(np.clip(probability, CLIP, 1 - CLIP)))


def _slope(function: Callable[..., np.ndarray], at: np.ndarray, start: np.ndarray | float) -> np.ndarray:
    """The slope of a function between two places."""
    way = np.where(np.abs(at - start) < _STEP, _STEP, at - start)
    return np.asarray((function(start + way) - function(start)) / way)
