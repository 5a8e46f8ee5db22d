"""The ensemble is compared with its members and with plain baselines on the same held-out patients."""

import numpy as np
import pandas as pd
import pytest
from test_combination import RIDGE, cohort

from aplsmear.ensembles.baselines import baselines_of, compare, pooled_baseline, pooled_features
from aplsmear.ensembles.combination import judge
from aplsmear.features.store import Features


def test_the_ensemble_is_compared_with_members_and_plain_baselines() -> None:
    patients, members = cohort(n=12, folds=3, strength=1.5)
    judged = baselines_of(patients, members, {"m1": members["m1"]}, 1)
    baselines = {name: each.table["probability"].to_numpy() for name, each in judged.items()}
    assert list(baselines) == ["m0 alone", "m1 alone", "m2 alone", "share of m1 cells", "plain average"]
    table = compare(
        patients, judge(patients, members, RIDGE, 0, 1).table["probability"].to_numpy(), baselines
    )
    assert table["against"].tolist() == ["the ensemble", *baselines]
    assert table.loc[0, ["difference", "p", "p_holm"]].tolist() == [0, 1, 1]
    assert np.isfinite(table.drop(columns="against").to_numpy(dtype=float)).all()
    assert (table["p_holm"] >= table["p"]).all()
    np.testing.assert_allclose(table["auroc"], table["auroc"][0] - table["difference"])


def test_holm_by_hand() -> None:
    label = pd.DataFrame({"label": [0] * 10 + [1] * 10})
    ensemble = label["label"].to_numpy() + np.linspace(0, 0.5, 20)
    random = np.random.default_rng(0)
    table = compare(label, ensemble, {name: random.random(20) for name in "ab"})
    small, large = sorted(table["p"][1:])
    assert sorted(table["p_holm"][1:]) == pytest.approx([2 * small, max(2 * small, large)])


def test_pooled_features_by_hand() -> None:
    index = pd.DataFrame({"item": ["a", "a", "b", "c"], "view": [0, 1, 0, 0]})
    layer = Features("net/layer", index, np.float16([[1, 0], [9, 9], [3, 2], [5, 5]]))
    items = pd.DataFrame({"item": ["a", "b", "c"], "patient": ["p", "p", "stranger"]})
    pooled = pooled_features([layer], items, pd.DataFrame({"patient": ["p", "q"]}))
    np.testing.assert_array_equal(pooled["net/layer"], [[2, 1], [np.nan, np.nan]])


def test_the_baseline_on_pooled_features_finds_a_signal_without_a_leak() -> None:
    patients, _ = cohort(n=15, folds=3)
    random = np.random.default_rng(1)
    noise = random.normal(size=(len(patients), 40))
    signal = noise + 3 * patients["label"].to_numpy()[:, None] * (np.arange(40) < 3)
    signal[0] = np.nan  # a patient without cells
    found, model = pooled_baseline(patients, {"a": noise, "b": signal})
    assert compare(patients, found, {})["auroc"][0] > 0.9
    turned = patients.assign(label=np.where(patients["fold"] == 1, 1 - patients["label"], patients["label"]))
    there = (patients["fold"] == 1).to_numpy()
    again, _ = pooled_baseline(turned, {"a": noise, "b": signal})
    np.testing.assert_array_equal(again[there], found[there])
    assert model.layer == "b"
    new = model.probability(np.array([[3.0] * 3 + [0.0] * 37, [0.0] * 40, [np.nan] * 40]))
    assert new[1] < new[2] < new[0]
