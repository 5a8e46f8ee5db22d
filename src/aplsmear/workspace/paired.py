"""What a task gained from one experiment to another: held-out scores of the same items, compared in pairs."""

from __future__ import annotations

import pandas as pd

from aplsmear.evaluation.auroc import auroc
from aplsmear.evaluation.intervals import bootstrap_interval

_RESAMPLES = 2000


def gain(before: pd.DataFrame, after: pd.DataFrame) -> str:
    """How much better the held-out scores of a task have become, as text; empty if this cannot be said.

    The tables are two experiments' tuned/TASK/predictions.csv. Only items with the same label in both count,
    so that new labels do not change what is compared. Patients are resampled, and the difference in AUROC is
    taken within each resample.
    """
    both = before.merge(
        after[["item", "label", "probability"]], on=["item", "label"], suffixes=("", "_after")
    )
    patients = both.groupby("patient")["label"].agg(["max", "min"])
    if min((patients["max"] == 1).sum(), (patients["min"] == 0).sum()) < 2:
        return ""
    label, first, other = both["label"], both["probability"], both["probability_after"]
    value, low, high = bootstrap_interval(
        auroc, label, other, first, groups=both["patient"], resamples=_RESAMPLES, seed=1
    )
    return f"AUROC {value:+.4f} ({low:+.4f} to {high:+.4f}) on the {len(both):,} items labelled in both"
