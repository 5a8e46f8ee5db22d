"""What the items of a patient say together: the scores of cells or smears, summarised per patient."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.special import expit, logit

PLAIN = ("mean", "logits", "median", "upper", "top", "share", "noisy_or")
BLENDED = ("mean", "logits", "weighed_mean", "weighed_logits")  # by `blend`
SUMMARIES = (*PLAIN, *(f"weighed_{name}" for name in PLAIN), "blend")
CLIP = 1e-4
ENDS = 4  # items at either end of a patient's scores that are named


def summarise(
    score: np.ndarray,
    weight: np.ndarray | None = None,
    positive_above: float = 0.5,
    top: float = 5,
    leak: float = 0.05,
) -> dict[str, float]:
    """Summaries of the scores of one patient's items, each a probability-like number in [0, 1].

    Args:
        score: float (items,), at least one.
        weight: float (items,), above 0 and up to 1: how much of an item counts. None: all of each.
        positive_above: an item above it counts for `share`.
        top: so many of the highest scores are averaged for `top`.
        leak: share of a score that `noisy_or` takes as independent evidence; with hundreds of cells the plain
            noisy-or is always 1.

    Returns:
        ``mean``; ``logits``, the probability whose logit is the mean of the logits; ``median``; ``upper``,
        the 0.9 quantile; ``top``, the mean of the highest; ``share`` above the threshold, with half a cell
        added to either side; ``noisy_or``, the chance that at least one item is positive.
    """
    weight = np.ones(len(score)) if weight is None else weight.astype(np.float64)
    order = np.lexsort((weight, score))
    ordered, weight = score.astype(np.float64)[order], weight[order]
    share = weight / weight.sum()
    above = weight[ordered > positive_above].sum()
    taken = np.clip(top - (weight[::-1].cumsum()[::-1] - weight), 0, weight)
    place = share.cumsum() - share / 2  # a quantile goes through the middle of each item's share (Hazen)
    return {
        "mean": float(ordered @ share),
        "logits": float(expit(logit(np.clip(ordered, CLIP, 1 - CLIP)) @ share)),
        "median": float(np.interp(0.5, place, ordered)),
        "upper": float(np.interp(0.9, place, ordered)),
        "top": float(ordered @ taken / taken.sum()),
        "share": float((above + 0.5) / (weight.sum() + 1)),
        "noisy_or": float(1 - np.exp(weight @ np.log1p(-leak * ordered))),
    }


def summarise_patients(scores: pd.DataFrame, weights: pd.DataFrame | None = None) -> pd.DataFrame:
    """Summaries of every patient in every outer fold.

    Args:
        scores: ``item, patient, fold, outer_0 ... outer_K`` (of `aplsmear.heads.search.scores_table`).
        weights: a table like it, of the task that says how much an item counts in each outer fold (an
            immature cell tells more about a leukaemia than a lymphocyte). None: all items have weight 1.

    Returns:
        ``patient, fold, outer_fold, items``, `SUMMARIES`, ``most`` and ``least``, one row a patient and outer
        fold, sorted by both; the summaries as logits, clipped to probabilities of 0.0001 to 0.9999. ``most``
        and ``least`` are JSON lists of the items with the highest and the lowest scores by the heads that
        never saw the patient's fold, the furthest first; empty in the other outer folds. Where no patient has
        more than one
        item, there is nothing to summarise: all summaries are its score.
    """
    outer_folds = [column for column in scores.columns if column.startswith("outer_")]
    weighing = None if weights is None else weights.set_index("item").loc[scores["item"], outer_folds]
    one_each = scores["patient"].is_unique
    rows = []
    for patient, mine in scores.groupby("patient"):
        fold = int(mine["fold"].iloc[0])
        for outer_fold, column in enumerate(outer_folds):
            score = mine[column].to_numpy()
            weight = None if weighing is None else weighing[column].loc[mine["item"]].to_numpy()
            row = {"patient": patient, "fold": fold, "outer_fold": outer_fold, "items": len(mine)}
            row |= same_logits(score[0]) if one_each else summary_logits(score, weight)
            ends = ends_of(mine["item"], score) if outer_fold == fold else ([], [])
            rows.append(row | dict(zip(("most", "least"), map(json.dumps, ends), strict=True)))
    return pd.DataFrame(rows)


def summary_logits(score: np.ndarray, weight: np.ndarray | None = None) -> dict[str, float]:
    """`SUMMARIES` of the scores of one patient's items, as logits; ``blend`` is the mean of `BLENDED`.

    Which of several summaries is best is close to chance with few patients, and in another laboratory the
    weigher errs besides; their mean depends less on either.

    Args:
        score: float (items,), at least one.
        weight: float (items,), 0 to 1, for the weighed summaries; None: all items count whole.
    """
    weight = np.ones(len(score)) if weight is None else weight
    said = summarise(score)
    weighed = summarise(score, np.maximum(weight, CLIP))
    said |= {f"weighed_{name}": value for name, value in weighed.items()}
    logits = {name: float(logit(np.clip(value, CLIP, 1 - CLIP))) for name, value in said.items()}
    return logits | {"blend": float(np.mean([logits[name] for name in BLENDED]))}


def same_logits(score: float) -> dict[str, float]:
    """`SUMMARIES` of a patient who is one item, as logits: there is nothing to summarise."""
    return dict.fromkeys(SUMMARIES, float(logit(np.clip(score, CLIP, 1 - CLIP))))


def ends_of(items: Iterable[str], score: np.ndarray) -> tuple[list[str], list[str]]:
    """The items of a patient with the highest and the lowest scores, the furthest first; none is in both."""
    mine = pd.DataFrame({"item": list(items), "score": score})
    order = mine.sort_values(["score", "item"], ascending=[False, True])["item"].astype(str).tolist()
    half = min(ENDS, len(order) // 2)
    return order[:half], order[::-1][:half]
