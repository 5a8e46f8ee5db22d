"""Views of cells that are pictures of their own."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aplsmear.images.augmentation import Pyramid
from aplsmear.images.view_store import read_views, view_writer
from aplsmear.images.views import cell_views, parts_of
from aplsmear.params import read_params
from made_views import all_views

AUGMENT = read_params(Path(__file__).parents[2] / "params.yaml").augment
KNOBS = AUGMENT.model_copy(update={"views": 1, "margin": 0.0, "extra_views": {}})
SMEAR = np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8)
NO_SMEARS = pd.DataFrame(columns=["smear", "patient", "image", "diagnosis"], dtype=object)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 40), st.data())
def test_a_square_cell_has_the_same_plain_view_in_its_smear_and_as_a_picture(
    half: int, data: st.DataObject
) -> None:
    y0, x0 = (data.draw(st.integers(0, side - 2 * half)) for side in SMEAR.shape[:2])
    box = (y0, x0, y0 + 2 * half, x0 + 2 * half)
    picture = np.ascontiguousarray(SMEAR[box[0] : box[2], box[1] : box[3]])
    inside = next(cell_views(Pyramid(SMEAR), box, "1", 0, KNOBS, 1))
    alone = next(cell_views(Pyramid(picture), (0, 0, 2 * half, 2 * half), "1", 0, KNOBS, 1))
    assert alone == inside


@pytest.mark.parametrize("side", [40, 400])
def test_a_cell_has_the_same_augmented_views_as_a_picture_and_in_a_smear_that_mirrors_it(side: int) -> None:
    """A picture has nothing around the cell: what a turned view shows there is the mirrored cell."""
    picture = cv2.resize(SMEAR, (side, side), interpolation=cv2.INTER_LINEAR)
    smear = cv2.copyMakeBorder(picture, side, side, side, side, cv2.BORDER_REFLECT)
    knobs = KNOBS.model_copy(update={"views": 6})
    alone = list(cell_views(Pyramid(picture), (0, 0, side, side), "1", 6, knobs, 1))
    inside = list(cell_views(Pyramid(smear), (side, side, 2 * side, 2 * side), "1", 6, knobs, 1))
    assert alone == inside
    assert len({view.image for view in alone}) == 7


@pytest.fixture
def cells(tmp_path: Path) -> pd.DataFrame:
    """150 cells of 50 patients, in the order of patients; all have the same picture."""
    (tmp_path / "cells").mkdir()
    Image.fromarray(SMEAR[:40, :40]).save(tmp_path / "cells" / "a.png")
    names = [f"c{number:03d}" for number in range(150)]
    rows = {"cell": names, "smear": "", "image": "cells/a.png", "y0": 0, "x0": 0, "y1": 40, "x1": 40}
    return pd.DataFrame(rows | {"patient": [f"P{number // 3:02d}" for number in range(150)]})


def test_views_are_stored_in_the_order_of_cells_in_few_groups(
    cells: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of rows for each picture would make a view store slow to read."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    paths = {"cell": tmp_path / "cell", "smear": tmp_path / "smear"}
    groups = list(all_views(tmp_path, NO_SMEARS, cells, KNOBS, 1))
    assert len(groups) == 3
    with view_writer(paths) as write:
        for group in groups:
            write(group)
    stored = [view for batch in read_views(paths["cell"], 100) for view in batch]
    assert [(view.item, view.view) for view in stored] == [
        (cell, view) for cell in cells["cell"] for view in (0, 1)
    ]
    assert list(read_views(paths["smear"], 100)) == []


def test_a_level_that_is_not_asked_for_costs_nothing(
    cells: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    smears = pd.DataFrame(
        {"smear": ["1"], "patient": ["P"], "image": ["not there.png"], "diagnosis": ["apl"]}
    )
    groups = list(all_views(tmp_path, smears, cells, KNOBS, 1, levels=["cell"]))  # no cell is in the smear
    assert all(group["smear"] == [] for group in groups)
    none = list(all_views(tmp_path, smears[:0], cells, KNOBS, 1, levels=["smear"]))
    assert all(group == {"smear": [], "cell": []} for group in none)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("ABCD"), max_size=20), st.lists(st.sampled_from("ABCD"), max_size=8))
def test_all_parts_of_a_patient_follow_one_another(of_cells: list[str], of_smears: list[str]) -> None:
    smears = pd.DataFrame({"patient": of_smears}, dtype=object)
    smears = smears.assign(smear=[f"s{row}" for row in range(len(smears))], image="a.png")
    cells = pd.DataFrame({"patient": of_cells, "smear": "", "image": "b.png"}, dtype=object)
    cells = cells.assign(cell=[f"c{row}" for row in range(len(cells))], y0=0, x0=0, y1=9, x1=9)
    parts = list(parts_of(Path(), smears, cells, KNOBS, by_patient=True))
    items = [item for part in parts for item in ([part.smear] if part.smear else part.cells)]
    assert [item.patient for item in items] == sorted([*of_cells, *of_smears])
    assert sorted(item.name for item in items) == sorted([*smears["smear"], *cells["cell"]])
