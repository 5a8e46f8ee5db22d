"""`benchmarks/shift.py`: what it says of patients shown as they are is what the pipeline says of them."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from aplsmear.heads.bags import attend
from aplsmear.heads.head import Head
from aplsmear.images.augmentation import source_factor
from aplsmear.images.reading import encode_jpeg
from aplsmear.images.view_store import View
from aplsmear.images.views import cut
from aplsmear.params import read_params

ROOT = Path(__file__).parents[2]
LAYER = "net/layer"


@pytest.fixture(scope="module")
def shift():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import shift
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return shift


def head(seed: int) -> Head:
    """On bags of cells with 5 channels."""
    random = np.random.Generator(np.random.Philox(seed))
    kernels = tuple(random.normal(size=shape).astype(np.float32) for shape in ((5, 4), (4, 1)))
    biases = tuple(random.normal(size=units).astype(np.float32) for units in (4, 1))
    attention = tuple(random.normal(size=shape).astype(np.float32) for shape in ((4, 8), (8,), (4, 1)))
    return Head(LAYER, kernels, biases, "tanh", attention)


@pytest.mark.parametrize("views", [1, 2])
def test_a_member_that_judges_whole_patients_sees_each_with_his_own_cells(shift, views: int) -> None:
    random = np.random.Generator(np.random.Philox(1))
    patient = np.array(["c", "a", "b", "a", "c", "c", "b"])
    items = pd.DataFrame({"cell": list("tuvwxyz"), "item": list("tuvwxyz"), "patient": patient})
    items = items.assign(diagnosis="apl", fold=items["patient"].map({"a": 0, "b": 1, "c": 2}))
    shown = [random.normal(size=(7, 5)).astype(np.float16) for _ in range(2)]
    heads = [head(seed) for seed in range(4)]
    bench = shift.Bench(
        params=read_params(ROOT / "params.yaml"),
        items={"cell": items},
        patients=items[["patient", "fold"]].drop_duplicates(),
        heads={"apl_aml_patient": heads},
        averages={"apl_aml_patient": views - 1},
        members=["apl_aml_patient"],
        weigh_by="immature",
        verdicts=None,
        chosen=None,
        pictures={},
        kept=Path(),
        typical=("cell", LAYER),
    )
    table = shift.scores_of(bench, "apl_aml_patient", {f"cell/{LAYER}": shown}, True)
    assert table[["item", "patient", "fold"]].to_numpy().tolist() == [
        ["a", "a", 0], ["b", "b", 1], ["c", "c", 2],
    ]  # fmt: skip
    for outer_fold, each in enumerate(heads):
        expected = [
            np.mean([attend(each, view[patient == name])[0] for view in shown[:views]]) for name in "abc"
        ]
        assert table[f"outer_{outer_fold}"].to_numpy() == pytest.approx(expected)


@pytest.mark.parametrize("box", [(0, 0, 30, 40), (100, 150, 140, 180), (170, 260, 200, 300)])
def test_what_is_cut_out_around_a_cell_shows_all_that_its_views_need(shift, box) -> None:
    params = read_params(ROOT / "params.yaml")
    image = np.random.Generator(np.random.Philox(1)).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    y0, x0, y1, x1 = shift.surroundings(box, params, image.shape)
    side = max(box[2] - box[0], box[3] - box[1]) * (1 + params.augment.margin) * source_factor(params.augment)
    inside = (box[0] - y0, box[1] - x0, box[2] - y0, box[3] - x0)
    assert (cut(image[y0:y1, x0:x1], inside, side, 64) == cut(image, box, side, 64)).all()


def test_a_patient_of_whom_a_selection_leaves_no_cell_keeps_all_cells(shift) -> None:
    cells = pd.DataFrame({"item": list("abcd"), "patient": ["p", "p", "q", "q"], "keep": [1, 0, 0, 0]})
    bench = shift.Bench(None, {"cell": cells}, None, {}, {}, [], "", None, None, {}, Path(), ("cell", LAYER))
    features = {f"cell/{LAYER}": [np.arange(4)[:, None]]}
    fewer, kept = shift.selected(bench, features, lambda table: table["keep"] == 1)
    assert fewer.items["cell"]["item"].tolist() == ["a", "c", "d"]
    assert kept[f"cell/{LAYER}"][0].ravel().tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("gains", "gamma", "how"), [([0.9, 1, 0.8], 1.3, "moved"), ([0.9, 1, 0.8], 1, "white_point")]
)
def test_colours_moved_to_those_of_training_are_those_of_training(shift, gains, gamma, how) -> None:
    random = np.random.Generator(np.random.Philox(1))
    there = random.integers(80, 200, (64, 64, 3), dtype=np.uint8)
    here = np.rint(256 * ((there + 1.0) / 256) ** gamma * gains - 1).astype(np.uint8)
    colours = [
        np.array([*shift.stain_of(View("cell", 0, encode_jpeg(image))), *shift.background(image)])
        for image in (here, there)
    ]
    moved = cv2.LUT(here, shift.RETOUCHES[how](*colours)[-1]).astype(int)
    assert np.abs(moved - there).mean() < 3 < np.abs(here.astype(int) - there).mean()


def test_cells_in_two_colours_get_the_mean_of_both_scores(shift) -> None:
    cells = pd.DataFrame({"cell": list("ab"), "item": list("ab"), "patient": list("pq"), "diagnosis": "apl"})
    patients = pd.DataFrame({"patient": list("pq"), "fold": [0, 1]})
    heads, averages = {"apl_aml_patient": [head(0)]}, {"apl_aml_patient": 0}
    params = read_params(ROOT / "params.yaml")
    level = ("cell", LAYER)
    bench = shift.Bench(
        params, {"cell": cells}, patients, heads, averages, [], "", None, None, {}, Path(), level
    )
    random = np.random.Generator(np.random.Philox(2))
    colours = [{f"cell/{LAYER}": [random.normal(size=(2, 5)).astype(np.float16)]} for _ in range(3)]
    scored = [
        shift.scores_of(bench, "apl_aml_patient", each, True)["outer_0"].to_numpy()
        for each in (*colours, shift.averaged(colours))
    ]
    assert scored[3] == pytest.approx(np.mean(scored[:3], axis=0))
