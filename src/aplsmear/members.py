"""What the items of a patient say together: the scores of cells or smears, summarised per patient."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from scipy.special import logit

SUMMARIES = ("mean", "median", "upper", "top", "share", "noisy_or")
CLIP = 1e-4
ENDS = 4  # items at either end of a patient's scores that are named


def summarise(
    score: np.ndarray, positive_above: float = 0.5, top: int = 5, leak: float = 0.05
) -> dict[str, float]:
    """Summaries of the scores of one patient's items, each a probability-like number in (0, 1).

    Args:
        score: float (items,), at least one.
        positive_above: an item above it counts for `share`.
        top: so many of the highest scores are averaged for `top`.
        leak: share of a score that `noisy_or` takes as independent evidence; with hundreds of cells the plain
            noisy-or is always 1.

    Returns:
        ``mean``; ``median``; ``upper``, the 0.9 quantile; ``top``, the mean of the highest; ``share`` above
        the threshold, with half a cell added to either side; ``noisy_or``, the chance that at least one
        item is positive.
    """
    ordered = np.sort(score.astype(np.float64))[::-1]
    above = int((ordered > positive_above).sum())
    return {
        "mean": float(ordered.mean()),
        "median": float(np.median(ordered)),
        "upper": float(np.quantile(ordered, 0.9)),
        "top": float(ordered[:top].mean()),
        "share": (above + 0.5) / (len(ordered) + 1),
        "noisy_or": float(1 - np.exp(np.log1p(-leak * ordered).sum())),
    }


def summarise_patients(scores: pd.DataFrame) -> pd.DataFrame:
    """Summaries of every patient in every world.

    Args:
        scores: ``item, patient, fold, world_0 ... world_K`` (of `aplsmear.tuning.scores_table`).

    Returns:
        ``patient, fold, world, items``, `SUMMARIES`, ``most`` and ``least``, one row a patient and world,
        sorted by both; the summaries as logits, clipped to probabilities of 0.0001 to 0.9999. ``most`` and
        ``least`` are JSON lists of the items with the highest and the lowest scores by the heads that never
        saw the patient's fold, the furthest first; empty in the other worlds. Where no patient has more than
        one item, there is nothing to summarise: all summaries are its score.
    """
    worlds = [column for column in scores.columns if column.startswith("world_")]
    one_each = scores["patient"].is_unique
    rows = []
    for patient, mine in sorted(dict(list(scores.groupby("patient", sort=False))).items()):
        fold = int(mine["fold"].iloc[0])
        for world, column in enumerate(worlds):
            score = mine[column].to_numpy()
            summary = dict.fromkeys(SUMMARIES, float(score[0])) if one_each else summarise(score)
            logits = {name: float(logit(np.clip(value, CLIP, 1 - CLIP))) for name, value in summary.items()}
            row = {"patient": patient, "fold": fold, "world": world, "items": len(mine)} | logits
            ends = _ends(mine, column) if world == fold else ([], [])
            rows.append(row | dict(zip(("most", "least"), map(json.dumps, ends), strict=True)))
    return pd.DataFrame(rows)


def _ends(mine: pd.DataFrame, column: str) -> tuple[list[str], list[str]]:
    """The items of a patient with the highest and the lowest scores; none is in both."""
    order = mine.sort_values([column, "item"], ascending=[False, True])["item"].astype(str).tolist()
    half = min(ENDS, len(order) // 2)
    return order[:half], order[::-1][:half]
