"""A mark that only one patient's cells bear, learnt by heart, says nothing about another patient."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aplsmear.ensembles import combination as ensembles
from aplsmear.ensembles.pooling import summarise_patients
from aplsmear.evaluation.auroc import auroc, auroc_within_folds
from aplsmear.evaluation.splits import make_folds
from aplsmear.features.forward import features_of
from aplsmear.features.store import Features
from aplsmear.heads.head import Recipe
from aplsmear.heads.results import scores_table
from aplsmear.heads.search import Trial, held_out_scores
from aplsmear.heads.task_data import make_task_data
from aplsmear.images.reading import encode_jpeg
from aplsmear.images.view_store import View
from aplsmear.params import Backbone, read_params
from backbone_graphs import request_of

ROOT = Path(__file__).parents[2]
PATIENTS, CELLS, SIDE, FOLDS = 48, 6, 32, 3
LAYER = "conv_pw_1_relu"
BACKBONE = Backbone(
    application="MobileNet",
    options={"alpha": 1.0},
    input_size={"cell": SIDE, "smear": SIDE},
    layer=[LAYER],
    weights="none",
    batch=96,
)
RECIPE = Recipe(f"net/{LAYER}", 1, 1, 32, "relu", 0.0, 0.01, "constant", 0.01, 0.0, 0.0, 0.0, 32, 30)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Features:
    """Of cells that differ by chance alone, each with its patient's own pattern of colours in a corner."""
    random = np.random.Generator(np.random.Philox(1))
    marks = random.integers(0, 256, (PATIENTS, 4, 4, 3), dtype=np.uint8)
    cells = random.integers(130, 170, (PATIENTS * CELLS, SIDE, SIDE, 3), dtype=np.uint8)
    for place, cell in enumerate(cells):
        cell[:12, :12] = marks[place // CELLS].repeat(3, axis=0).repeat(3, axis=1)
    views = [View(str(place), 0, encode_jpeg(cell)) for place, cell in enumerate(cells)]
    batches = [views[start : start + BACKBONE.batch] for start in range(0, len(views), BACKBONE.batch)]
    request = request_of(BACKBONE, tmp_path_factory.mktemp("graph"))
    values = np.concatenate([part[0] for part in features_of(iter(batches), request)])
    index = pd.DataFrame({"item": [view.item for view in views], "view": 0})
    return Features(f"net/{LAYER}", index, values)


def held_out_aurocs(
    features: Features, patient: Sequence[str], diagnosis: Sequence[str]
) -> tuple[float, float]:
    """From features to held-out verdicts, as the stages do it: AUROC of all pairs, of pairs within a fold."""
    knobs = read_params(ROOT / "params.yaml")
    cells = pd.DataFrame({"item": features.index["item"], "patient": patient, "diagnosis": diagnosis})
    folds = make_folds(cells, FOLDS, 1)
    label = (cells["diagnosis"] == "apl").to_numpy().astype(np.int8)
    task_data = make_task_data(cells, label, folds, {features.name: features})
    full = np.full((FOLDS, FOLDS), RECIPE.epochs)
    trial = Trial(0, RECIPE, np.zeros((FOLDS, FOLDS)), full, 1)
    scores, _ = held_out_scores(task_data, [trial] * (FOLDS + 1), knobs.tune, 1)
    members = {"cell": summarise_patients(scores_table(task_data, scores))}
    asked = [ensembles.Candidate(0, "logistic", "mean", 0.1, 0)]
    table = ensembles.judge(ensembles.patients_of(folds, "apl", "aml"), members, asked, 0, 1).table
    said = table["label"], table["probability"]
    return auroc(*said), auroc_within_folds(*said, table["fold"])


def permuted(seed: int) -> np.ndarray:
    """A diagnosis for each patient that has nothing to do with anything."""
    random = np.random.Generator(np.random.Philox(seed))
    return random.permutation(np.array(["apl", "aml"]).repeat(PATIENTS // 2))


@pytest.mark.pipeline
def test_a_mark_of_the_patient_does_not_lift_the_null_result(features: Features) -> None:
    patient = np.array([f"p{place:02}" for place in range(PATIENTS)]).repeat(CELLS)
    found = [held_out_aurocs(features, patient, permuted(seed).repeat(CELLS)) for seed in range(12)]
    assert np.mean(found, axis=0) == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.mark.pipeline
def test_the_mark_would_be_found_if_a_patient_were_on_both_sides(features: Features) -> None:
    """Otherwise the test above could not fail: here half of each patient's cells go by another name."""
    half = np.array([f"p{place // 2:02}{'ab'[place % 2]}" for place in range(2 * PATIENTS)]).repeat(
        CELLS // 2
    )
    assert min(held_out_aurocs(features, half, permuted(0).repeat(CELLS))) > 0.8
