"""The tables for `dvc plots` are correct, short and reproducible to the byte."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import special
from sklearn import metrics

from aplsmear.evaluation import curves
from aplsmear.evaluation.intervals import roc_band_table
from aplsmear.tables import write_table


def items(n, seed=0):
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < 0.3).astype(int)
    return label, special.expit(rng.normal(size=n) + 1.5 * label - 1)


def test_roc_by_hand():
    table = curves.roc_curve_table([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.9])
    assert table.columns.tolist() == ["fpr", "tpr", "threshold"]
    assert table.to_numpy().tolist() == [
        [0, 0, 1.9], [0, 0.5, 0.9], [0.5, 0.5, 0.6], [0.5, 1, 0.4], [1, 1, 0.1]
    ]  # fmt: skip


def test_precision_recall_by_hand():
    table = curves.precision_recall_table([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.9])
    assert table.columns.tolist() == ["recall", "precision", "threshold"]
    assert table.recall.tolist() == [0, 0.5, 0.5, 1, 1]
    assert table.precision.tolist() == pytest.approx([1, 1, 0.5, 2 / 3, 0.5])
    assert table.threshold.tolist() == [1.9, 0.9, 0.6, 0.4, 0.1]


@pytest.mark.parametrize("make", [curves.roc_curve_table, curves.precision_recall_table])
def test_a_long_curve_is_thinned_without_changing_its_shape(make):
    label, score = items(20_000)
    full, thin = make(label, score, max_rows=10**6), make(label, score)
    assert len(full) > 2000
    assert len(thin) == curves.MAX_ROWS
    assert thin.iloc[[0, -1]].to_numpy().tolist() == full.iloc[[0, -1]].to_numpy().tolist()
    x, y, _ = full.columns
    assert metrics.auc(thin[x], thin[y]) == pytest.approx(metrics.auc(full[x], full[y]), abs=2e-3)
    # every kept row is a row of the curve
    assert len(thin.merge(full)) == len(thin)


def test_the_best_operating_point_survives_thinning():
    label, score = items(20_000)
    full = curves.roc_curve_table(label, score, max_rows=10**6)
    thin = curves.roc_curve_table(label, score, max_rows=200)
    for weight in (0.2, 1, 5):  # a best point under any costs lies on the hull
        assert (thin.tpr - weight * thin.fpr).max() == pytest.approx((full.tpr - weight * full.fpr).max())


@pytest.mark.parametrize("n", [7, 50, 199, 1000])
def test_calibration_bins(n):
    label, probability = items(n)
    table = curves.calibration_table(label, probability)
    assert len(table) == min(10, max(5, n // 20))
    assert table.n.sum() == n
    assert table.n.max() - table.n.min() <= 1
    assert (table.n * table.observed).sum() == pytest.approx(label.sum())
    assert (table.n * table.predicted).sum() == pytest.approx(probability.sum())
    assert table.predicted.is_monotonic_increasing


def test_equal_probabilities_share_a_calibration_bin():
    table = curves.calibration_table([0, 0, 1, 0, 1, 1], [0.2, 0.2, 0.2, 0.2, 0.2, 0.9], bins=6)
    assert table.to_numpy().tolist() == [pytest.approx([0.2, 0.4, 5]), [0.9, 1, 1]]


def test_confusion_table_has_a_row_for_each_patient():
    table = curves.confusion_table([1, 0, 0, 1], [1, 1, 0, 1], ("aml", "apl"))
    assert table.to_numpy().tolist() == [["aml", "aml"], ["aml", "apl"], ["apl", "apl"], ["apl", "apl"]]
    assert table.columns.tolist() == ["actual", "predicted"]
    with pytest.raises(ValueError, match="call must be 0 or 1"):
        curves.confusion_table([1, 0], [0.7, 0.2], ("aml", "apl"))


def test_row_order_changes_no_byte(tmp_path):
    label, score = items(300)
    score = np.round(score, 2)
    shuffle = np.random.default_rng(1).permutation(300)
    makers = {
        "roc": curves.roc_curve_table,
        "pr": curves.precision_recall_table,
        "calibration": curves.calibration_table,
        "confusion": lambda y, p: curves.confusion_table(y, p >= 0.5, ("aml", "apl")),
    }
    for name, make in makers.items():
        write_table(tmp_path / "a.csv", make(label, score))
        write_table(tmp_path / "b.csv", make(label[shuffle], score[shuffle]))
        assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes(), name


@pytest.mark.parametrize(
    "make", [curves.roc_curve_table, curves.precision_recall_table, curves.calibration_table]
)
def test_bad_input_is_an_error(make):
    with pytest.raises(ValueError, match="row 0: nan"):
        make([1, 0], [math.nan, 0.2])
    with pytest.raises(ValueError, match="no negative"):
        make([1, 1], [0.3, 0.2])


def test_the_roc_band_contains_the_curve_and_ends_at_1():
    label, score = items(200)
    band = roc_band_table(label, score, 500, 1, points=21)
    assert band.columns.tolist() == ["fpr", "low", "high"]
    fpr, tpr, _ = metrics.roc_curve(label, score)
    reached = tpr[np.searchsorted(fpr, band["fpr"] + 1e-12, side="right") - 1]
    assert ((band["low"] - 0.02 <= reached) & (reached <= band["high"] + 0.02)).all()
    assert band[["low", "high"]].iloc[-1].tolist() == [1, 1]
    assert 0.05 < (band["high"] - band["low"]).max() < 0.5
    mixed = np.random.default_rng(2).permutation(200)
    pd.testing.assert_frame_equal(band, roc_band_table(label[mixed], score[mixed], 500, 1, points=21))


def test_a_perfect_score_has_a_band_without_width():
    band = roc_band_table([0, 0, 0, 1, 1, 1], [0, 0.1, 0.2, 0.7, 0.8, 0.9], 200, 1, points=5)
    assert band[["low", "high"]].to_numpy().tolist() == [[1, 1]] * 5


def test_the_net_benefit_by_hand() -> None:
    """Vickers & Elkin (2006): at 0.2, a false alarm costs a quarter of what a found patient is worth."""
    label, probability = [1, 1, 0, 0, 0], [0.9, 0.1, 0.3, 0.1, 0.05]
    table = curves.decision_table(label, probability, points=4).set_index("threshold").round(12)
    assert table.loc[0.2].tolist() == [round(1 / 5 - 0.25 / 5, 12), round(2 / 5 - 0.25 * 3 / 5, 12), 0]
    assert table["model"].iloc[-1] == 1 / 5
    assert len(curves.decision_table(label, probability)) == 99
