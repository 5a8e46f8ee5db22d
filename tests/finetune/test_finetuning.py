"""Finetuning: inner folds choose the epochs, outer models score held-out patients, the final model stays."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from aplsmear.errors import UserError
from aplsmear.evaluation.auroc import auroc
from aplsmear.finetune.finetuning import best_epoch, build_trainers, finetune, with_weights
from aplsmear.finetune.inputs import Start, check_backbones, read_inputs, read_starts
from aplsmear.finetune.results import conclude
from aplsmear.finetune.training import History
from aplsmear.heads.head import write_heads
from aplsmear.images.reading import decode
from aplsmear.params import read_params
from aplsmear.tables import write_table
from finetunings import RECIPE, SETTINGS, head, inputs, views

ROOT = Path(__file__).parents[2]


def test_inner_folds_choose_the_number_of_epochs_together() -> None:
    stopped, longer = History([0.5], [0.80, 0.70], 1.0), History([0.5] * 3, [0.60, 0.65, 0.75, 0.70], 1.0)
    assert best_epoch([stopped]) == 0
    assert best_epoch([stopped, longer]) == 2  # 0.725: the run that stopped keeps 0.70
    assert best_epoch([]) == 0


def test_a_trial_picked_by_hand_serves_the_final_model_only(tmp_path: Path) -> None:
    """Otherwise scores of held-out patients would depend on a choice by a person who had seen them."""
    best = {"trial": "1", "chosen_without_fold": {0: "1", 1: "0"}}
    row = {field: str(getattr(RECIPE, field)) for field in RECIPE.__dataclass_fields__}
    trials = pd.DataFrame(
        [row | {"trial": n, "failure": "loss" if n == 2 else "", "trained_epochs": "4"} for n in range(3)]
    )
    write_table(tmp_path / "trials.csv", trials)
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best), encoding="utf-8")
    write_heads(tmp_path / "heads.npz", [head() for _ in range(3)])

    def starts(picked: int | str) -> list[Start]:
        return read_starts(tmp_path, SETTINGS.model_copy(update={"trial": picked, "folds": 0}))

    assert [start.trial for start in starts("tuned")] == [1, 0, 1]
    picked = starts(0)
    assert [start.trial for start in picked] == [1, 0, 0]
    assert picked[0].recipe == RECIPE
    assert [start.head is None for start in picked] == [False, False, True]
    for number in (2, 7):  # failed; not there
        with pytest.raises(UserError, match="there are: 0, 1"):
            starts(number)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras writes weights
def test_each_fold_is_scored_by_its_outer_model_and_the_final_model_is_kept(tmp_path: Path) -> None:
    """The networks share memory: drawing an outer model must not change the final one that is written."""
    made, starts = inputs(tmp_path, (0, 1), epochs=2, inner_folds=2, rate=0.01, head_rate=0.1)
    trainers = build_trainers(made, starts, tmp_path)
    trained = list({each.run: each for each in finetune(made, starts, trainers, tmp_path)}.values())
    names = [each.run.name for each in trained]
    assert names == ["inner_0_1", "inner_0_2", "outer_0", "inner_1_2", "inner_1_0", "outer_1", "final"]
    for each in trained:
        if each.run.judged is None:  # the best epoch of the inner runs before it, which have two epochs
            assert len(each.history.loss) == each.run.epochs <= 2

    frozen = pd.DataFrame({"item": np.arange(24).astype(str), "probability": np.linspace(0, 1, 24)})
    results = conclude(made, trainers, trained, "blast", frozen, 100)
    assert sorted(results.predictions["fold"].unique()) == [0, 1]  # two outer folds were asked for
    seen = np.stack([decode(view.image) for view in views()])
    for fold, rows in results.predictions.groupby("fold"):
        network = with_weights(trainers, trained[names.index(f"outer_{fold}")])
        shown = 2 * rows["item"].astype(int).to_numpy()
        each = [network.score_images(seen[shown + view]) for view in range(2)]
        np.testing.assert_allclose(
            rows["probability"], np.mean(each, axis=0), atol=1e-3
        )  # cached in half precision
    assert results.metrics["auroc"]["value"] == auroc(
        results.predictions.label, results.predictions.probability
    )
    assert results.metrics["folds"] == 2

    final = with_weights(trainers, trained[-1])
    results.write(tmp_path / "out", final.network.whole)
    expected = final.score_images(seen[:4])
    with_weights(trainers, trained[2])
    assert (final.score_images(seen[:4]) != expected).any()
    final.network.whole.load_weights(tmp_path / "out" / "model.weights.h5")
    np.testing.assert_array_equal(final.score_images(seen[:4]), expected)


def test_finetuning_starts_anew_when_a_module_that_it_uses_changes(tmp_path: Path) -> None:
    """The AUROC is inverted in a module that training imports: no stored epoch keeps its old value."""
    library = tmp_path / "library" / "aplsmear"
    shutil.copytree(ROOT / "src" / "aplsmear", library)
    code = (
        "from pathlib import Path; import finetunings\n"
        "from aplsmear.finetune.finetuning import finetune_key\n"
        "key = finetune_key(*finetunings.inputs(Path()), 1); Path(key).mkdir(exist_ok=True)\n"
        "print(*(x for each in finetunings.trained(Path(key), epochs=1) for x in each.history.auroc))"
    )
    paths = os.pathsep.join(map(str, [library.parent, ROOT / "tests", ROOT / "benchmarks"]))

    def values() -> np.ndarray:
        printed = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        return np.array(printed.split(), dtype=float)

    first = values()
    assert len(list(tmp_path.glob("*/inner_0_1.npz"))) == 1
    with (library / "evaluation" / "auroc.py").open("a", encoding="utf-8") as file:
        file.write("_right = auroc\ndef auroc(*given):\n    return 1 - _right(*given)\n")
    np.testing.assert_allclose(values(), 1 - first)
    assert len(list(tmp_path.glob("*/inner_0_1.npz"))) == 2


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("file/x", r"features file/x, of an ONNX file, which is frozen: .* can: net\. Name layers of one"),
        ("net/x+file/x", r"features net/x\+file/x, of several backbones: they cannot be trained"),
    ],
)
def test_features_that_cannot_be_trained_are_refused_with_the_backbones_that_can(features, message) -> None:
    net = read_params(ROOT / "params.yaml").backbones["mobilenet"]
    backbones = {"net": net, "file": net.model_copy(update={"source": "onnx"})}
    start = Start(0, 0, replace(RECIPE, features=features), 1, None)
    inputs = SimpleNamespace(backbones=backbones)
    with pytest.raises(UserError, match=message):
        check_backbones(inputs, [start])
    check_backbones(inputs, [replace(start, recipe=replace(RECIPE, features="net/x+y"))])


def test_a_task_of_patients_is_refused_with_what_to_choose() -> None:
    params = read_params(ROOT / "params.yaml")
    task = next(task for task in params.tasks.values() if task.level == "patient")
    with pytest.raises(UserError, match="to a task of cells or smears"):
        read_inputs(task, params.finetune, params.tune, params.backbones, 0.0, 1)
