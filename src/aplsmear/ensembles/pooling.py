"""One number per patient from the scores of the patient's cells or smears: the summaries."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.special import expit, logit

PLAIN = ("mean", "upper", "top", "share", "noisy_or")
WEIGHTED = ("mean", "share")  # of these there is `weighted_...`, too
SUMMARIES = (*PLAIN, *(f"weighted_{name}" for name in WEIGHTED), "blend")
CLIP = 1e-4
# Share of a score that `noisy_or` takes as independent evidence: with 1 it is always 1 for hundreds of cells.
LEAK = 0.05
TOP = 5  # scores whose mean is `top`
UPPER = 0.9  # the quantile of `upper`


def summarise(
    score: np.ndarray, weight: np.ndarray | None = None, top: float = TOP
) -> dict[str, np.ndarray | np.float64]:
    """Summaries of the scores of one patient's items, each a probability-like number in [0, 1].

    `score`, float (..., items), has at least one item; leading axes are draws of cells of the same patient.
    `weight`, of the same shape, above 0 and up to 1, is how much each item counts; None: 1 for each. Each
    summary has the shape of the leading axes:

    ``mean``; ``logits``, the probability whose logit is the mean of the logits; ``upper``, the 0.9 quantile;
    ``top``, the mean of that many highest; ``share`` of those above 0.5, with half a cell added to either
    side; ``noisy_or``, the chance that at least one item is positive.
    """
    weight = np.ones(score.shape) if weight is None else weight.astype(np.float64)
    order = np.lexsort((weight, score))
    ordered = np.take_along_axis(score.astype(np.float64), order, axis=-1)
    weight = np.take_along_axis(weight, order, axis=-1)
    total = weight.sum(axis=-1)
    share = weight / total[..., None]
    above = np.where(ordered > 0.5, weight, 0).sum(axis=-1)
    from_highest = weight[..., ::-1].cumsum(axis=-1)[..., ::-1]
    taken = np.clip(top - (from_highest - weight), 0, weight)
    return {
        "mean": np.vecdot(ordered, share),
        "logits": expit(np.vecdot(logit(np.clip(ordered, CLIP, 1 - CLIP)), share)),
        "upper": _quantile(UPPER, ordered, share),
        "top": np.vecdot(ordered, taken) / taken.sum(axis=-1),
        "share": (above + 0.5) / (total + 1),
        "noisy_or": 1 - np.exp(np.vecdot(weight, np.log1p(-LEAK * ordered))),
    }


def _quantile(at: float, ordered: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A quantile of ascending values; it passes through the centre of each value's share (Hazen)."""
    place = share.cumsum(axis=-1) - share / 2
    right = (place <= at).sum(axis=-1, keepdims=True)
    ends = [np.clip(index, 0, ordered.shape[-1] - 1) for index in (right - 1, right)]
    (x0, x1), (y0, y1) = ([np.take_along_axis(each, end, -1) for end in ends] for each in (place, ordered))
    slope = (y1 - y0) / np.where(x1 > x0, x1 - x0, 1)
    inside = (right > 0) & (right < ordered.shape[-1])
    return np.asarray(np.where(inside, y0 + slope * (at - x0), y0)[..., 0])


def summarise_patients(scores: pd.DataFrame, weights: pd.DataFrame | None = None) -> pd.DataFrame:
    """Summaries of every patient in every outer fold.

    `scores` are ``item, patient, fold, outer_0 ... outer_K`` (of `aplsmear.heads.results.scores_table`).
    `weights` is a table like it, of the task whose scores are the weights of the items in each outer fold (an
    immature cell is more informative than a lymphocyte); None: all weights are 1.

    Returns ``patient, fold, outer_fold, items``, `SUMMARIES`: one row per patient and outer fold, sorted by
    both. The summaries are logits, clipped to probabilities of 0.0001 to 0.9999. Where no patient has more
    than one item, all summaries are that item's score.
    """
    outer_folds = [column for column in scores.columns if column.startswith("outer_")]
    weighting = None if weights is None else weights.set_index("item").loc[scores["item"], outer_folds]
    one_each = scores["patient"].is_unique
    rows = []
    for patient, mine in scores.groupby("patient"):
        fold = int(mine["fold"].iloc[0])
        for outer_fold, column in enumerate(outer_folds):
            score = mine[column].to_numpy()
            weight = None if weighting is None else weighting[column].loc[mine["item"]].to_numpy()
            place = {"patient": patient, "fold": fold, "outer_fold": outer_fold, "items": len(mine)}
            rows.append(place | (same_logits(score[0]) if one_each else summary_logits(score, weight)))
    return pd.DataFrame(rows)


def summary_logits(score: np.ndarray, weight: np.ndarray | None = None) -> dict[str, np.ndarray | np.float64]:
    """`SUMMARIES` of the scores of one patient's items, as logits; the arguments are as for `summarise`.

    ``blend`` is the mean of four: the plain and the weighted mean, of the scores and of their logits. With
    few patients, chance decides which single summary is best, and in another laboratory the weights are wrong
    too; the mean of four depends less on either.
    """
    weight = np.ones(score.shape) if weight is None else weight
    plain, weighted = (
        {name: logit(np.clip(value, CLIP, 1 - CLIP)) for name, value in found.items()}
        for found in (summarise(score), summarise(score, np.maximum(weight, CLIP)))
    )
    blend = np.mean([plain["mean"], plain["logits"], weighted["mean"], weighted["logits"]], axis=0)
    of_weighted = {f"weighted_{name}": weighted[name] for name in WEIGHTED}
    return {name: plain[name] for name in PLAIN} | of_weighted | {"blend": blend}


def summary_logit(name: str, score: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """One of `SUMMARIES`, as `summary_logits` gives it; the others are not computed."""
    if name == "blend":
        return np.asarray(summary_logits(score, weight)[name])
    plain = name.removeprefix("weighted_")
    weight = None if weight is None or name == plain else np.maximum(weight, CLIP)
    return np.asarray(logit(np.clip(summarise(score, weight)[plain], CLIP, 1 - CLIP)))


def same_logits(score: float) -> dict[str, float]:
    """`SUMMARIES` of a patient who has one item, as logits: each is the score of the item."""
    # In float64, also for a score of float32: `predict` must give the same digits.
    return dict.fromkeys(SUMMARIES, float(logit(np.clip(float(score), CLIP, 1 - CLIP))))
