"""Tables for the curves that `dvc plots` draws: small and byte-stable for any number of items.

Arguments are as in `aplsmear.evaluation.columns`: ``label`` is 0 or 1, ``score`` and ``probability`` are
higher for items that are more likely positive, all have shape (n,). Bad input raises ``ValueError``.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn import metrics

from aplsmear.evaluation.columns import check_call, check_columns
from aplsmear.evaluation.intervals import roc_band_table

MAX_ROWS = 500


def curve_tables(
    label: npt.ArrayLike, probability: npt.ArrayLike, resamples: int, seed: int
) -> dict[str, pd.DataFrame]:
    """The curves of probabilities by name: roc, band (of the ROC curve), precision_recall, calibration."""
    return {
        "roc": roc_curve_table(label, probability),
        "band": roc_band_table(label, probability, resamples, seed),
        "precision_recall": precision_recall_table(label, probability),
        "calibration": calibration_table(label, probability),
    }


def roc_curve_table(label: npt.ArrayLike, score: npt.ArrayLike, max_rows: int = MAX_ROWS) -> pd.DataFrame:
    """The ROC curve from (0, 0) to (1, 1): ``fpr, tpr, threshold`` (positive if score >= threshold).

    The threshold of the first row, without positive items, is the highest score plus 1. A curve is reduced to
    `max_rows`: both ends, its convex hull (where every sensible threshold lies), and evenly spaced rows.
    """
    y, s = check_columns(label, score)
    fpr, tpr, threshold = metrics.roc_curve(y, s, drop_intermediate=True)
    threshold[0] = s.max() + 1
    keep = _thinned(fpr, tpr, max_rows)
    return pd.DataFrame({"fpr": fpr[keep], "tpr": tpr[keep], "threshold": threshold[keep]})


def precision_recall_table(
    label: npt.ArrayLike, score: npt.ArrayLike, max_rows: int = MAX_ROWS
) -> pd.DataFrame:
    """The precision-recall curve by increasing recall: ``recall, precision, threshold``.

    The first row is recall 0 and precision 1 by convention, with the highest score plus 1 as threshold. A
    longer curve is reduced as in `roc_curve_table`.
    """
    y, s = check_columns(label, score)
    precision, recall, threshold = metrics.precision_recall_curve(y, s, drop_intermediate=True)
    recall, precision = recall[::-1], precision[::-1]
    threshold = np.concatenate([[s.max() + 1], threshold[::-1]])
    keep = _thinned(recall, precision, max_rows)
    return pd.DataFrame({"recall": recall[keep], "precision": precision[keep], "threshold": threshold[keep]})


def calibration_table(
    label: npt.ArrayLike, probability: npt.ArrayLike, bins: int | None = None
) -> pd.DataFrame:
    """Calibration in quantile bins: ``predicted`` (mean), ``observed`` (share of positives), ``n`` (items).

    `bins` is by default one for every 20 items, at least 5 and at most 10. Equal probabilities share a bin,
    so there may be fewer; no bin is empty.
    """
    y, p = check_columns(label, probability, probability=True)
    bins = bins or min(10, max(5, len(y) // 20))
    table = pd.DataFrame({"predicted": p, "observed": y, "n": 1}).sort_values(["predicted", "observed"])
    # By rank, not by interpolated quantiles: equal probabilities go into the bin of the first of them.
    place = (table["predicted"].rank(method="min") - 1) * bins // len(table)
    found = table.groupby(place).agg({"predicted": "mean", "observed": "mean", "n": "sum"})
    return found.reset_index(drop=True)


def decision_table(label: npt.ArrayLike, probability: npt.ArrayLike, points: int = 99) -> pd.DataFrame:
    """Decision curve: ``threshold, model, treat_all, treat_none`` at `points` thresholds between 0 and 1.

    The net benefit of calling patients positive from a threshold t on is the share of true positives minus
    the share of false positives times t / (1 - t): t says how many false alarms one found patient is worth
    (Vickers & Elkin, Med Decis Making 2006;26:565). The model is worth using where its net benefit is above
    that of treating all and of treating none (0).
    """
    y, p = check_columns(label, probability, probability=True)
    threshold = np.arange(1, points + 1) / (points + 1)
    worth = threshold / (1 - threshold)
    called = p >= threshold[:, None]
    model = (called & (y == 1)).mean(axis=1) - worth * (called & (y == 0)).mean(axis=1)
    treat_all = y.mean() - worth * (1 - y.mean())
    columns = {"threshold": threshold, "model": model, "treat_all": treat_all, "treat_none": 0.0}
    return pd.DataFrame(columns)


def confusion_table(label: npt.ArrayLike, call: npt.ArrayLike, names: Sequence[str]) -> pd.DataFrame:
    """One row per item for DVC's template ``confusion``: ``actual, predicted``, sorted.

    `names` are the words for 0 and 1, such as ``("aml", "apl")``; `call` is 0 or 1.
    """
    columns = dict(zip(("actual", "predicted"), check_call(label, call), strict=True))
    table = pd.DataFrame(columns).sort_values(["actual", "predicted"], ignore_index=True)
    return table.replace(dict(enumerate(names)))


def _thinned(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], max_rows: int) -> npt.NDArray[np.intp]:
    """Up to `max_rows` rows of a curve by increasing x: both ends and the upper hull, then evenly spaced."""
    if len(x) <= max_rows:
        return np.arange(len(x))
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1 and (
            (x[hull[-1]] - x[hull[-2]]) * (y[i] - y[hull[-2]])
            >= (y[hull[-1]] - y[hull[-2]]) * (x[i] - x[hull[-2]])
        ):
            hull.pop()
        hull.append(i)
    kept = np.asarray(hull)
    if len(kept) > max_rows:
        return kept[_evenly(len(kept), max_rows)]
    others = np.setdiff1d(np.arange(len(x)), kept)
    return np.sort(np.concatenate([kept, others[_evenly(len(others), max_rows - len(kept))]]))


def _evenly(n: int, k: int) -> npt.NDArray[np.intp]:
    """`k` (at most `n`) different indices below `n`, evenly spaced, with both ends if `k` > 1."""
    if k < 2:
        return np.arange(k)
    return np.arange(k) * (n - 1) // (k - 1)
