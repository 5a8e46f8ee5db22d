"""What an experiment gained on the same items."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aplsmear.tables import write_table
from aplsmear.workspace import dvc_api
from aplsmear.workspace.compare_page import Compared
from aplsmear.workspace.paired import gain


def table(noise: float) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    label = np.tile([0, 1], 100)
    score = np.clip(0.5 + 0.1 * (2 * label - 1) + noise * rng.normal(size=200), 0, 1)
    items = [f"c{n}" for n in range(200)]
    patients = np.repeat([f"P{n}" for n in range(10)], 20)
    return pd.DataFrame({"item": items, "patient": patients, "label": label, "probability": score})


def test_the_gain_is_that_on_items_with_the_same_label_in_both():
    before, after = table(0.2), table(0.05)
    text = gain(before, after)
    assert text.startswith("AUROC +0.")
    assert "(+0." in text
    assert text.endswith("on the 200 items labelled in both")
    newly = after.iloc[:20].assign(item=[f"new{n}" for n in range(20)], label=1, probability=0.0)
    assert gain(before, pd.concat([after, newly])) == text
    assert "on the 198 items" in gain(
        before, after.assign(label=after["label"].where(after.index > 1, 1 - after["label"]))
    )
    assert gain(before, before).startswith("AUROC +0.0000 (+0.0000 to +0.0000)")
    assert gain(before[before["patient"] == "P1"], after) == ""


def test_a_comparison_says_the_gain_of_each_task_whose_heads_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(folder: Path, revision: str, paths: Mapping[str, Path]) -> None:
        (copy,) = paths.values()
        write_table(copy, table({"main": 0.2, "asked": 0.05}[revision]))

    monkeypatch.setattr(dvc_api, "fetch", fetched)
    write_table(tmp_path / "tuned" / "blast" / "predictions.csv", table(0.1))
    metrics = {
        "tuned/blast/metrics.json": {"auroc.value": [0.7, 0.9, 0.8]},
        "tuned/same/metrics.json": {"auroc.value": [0.7, 0.7, 0.7]},
        "tuned/new/metrics.json": {"auroc.value": [None, 0.7, 0.7]},
        "ensembles/apl_aml/metrics.json": {"auroc.value": [0.7, 0.8, 0.9]},
    }
    lines = list(dvc_api.gains(tmp_path, Compared(["main", "asked", "workspace"], metrics, {})))
    assert [line.split(":")[0] for line in lines] == [
        "blast, asked beside main",
        "blast, workspace beside main",
    ]
    assert all("on the 200 items labelled in both" in line for line in lines)
