"""Boxes in another order or unit are told by what all of them have in common, and never by guessing."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aplsmear.compute.engine import Here
from aplsmear.data import boxes
from aplsmear.data.dataset import DataSet, DataSetError, Problem, read_data_set
from aplsmear.images.reading import read_image

DEMO = Path(__file__).parents[2] / "demo"
SMEARS = 12


@pytest.fixture(scope="module", params=[(400, 400), (480, 640)], ids=["square", "wide"])
def data(request, tmp_path_factory) -> Path:
    """Twelve smears of the demo, cut to this height and width."""
    folder, (height, width) = tmp_path_factory.mktemp("data"), request.param
    (folder / "wsi").mkdir()
    rows = listed(DEMO / "wsi.csv")[:SMEARS]
    for row in rows:
        picture = read_image(DEMO / "wsi" / row["imgName"])[:height, :width]
        Image.fromarray(picture).save(folder / "wsi" / row["imgName"], quality=95)
    write(folder / "wsi.csv", rows)
    ids = {row["id"] for row in rows}
    cells = [row for row in listed(DEMO / "labeled_cells.csv") if row["wsi"] in ids and row["bbox"]]
    inside = [row for row in cells if (np.array(json.loads(row["bbox"])[2:]) <= (height, width)).all()]
    write(folder / "labeled_cells.csv", inside)
    return folder


def listed(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def changed(data: Path, folder: Path, change, rows: slice = slice(None)) -> Path:
    """A copy of a data set, with other numbers in some boxes: `change` of y0, x0, y1, x1, h, w."""
    cells = listed(data / "labeled_cells.csv")
    if data != folder:
        shutil.copytree(data, folder, dirs_exist_ok=True)
    h, w = read_image(next((data / "wsi").iterdir())).shape[:2]
    for cell in cells[rows]:
        y0, x0, y1, x1 = json.loads(cell["bbox"])
        new = change(SimpleNamespace(y0=y0, x0=x0, y1=y1, x1=x1, h=h, w=w))
        cell["bbox"] = str([round(number, 4) for number in new])
    write(folder / "labeled_cells.csv", cells)
    return folder


def read(folder: Path) -> DataSet:
    return read_data_set(folder, {}, min_box=8, skip_bad_images=False, engine=Here(1))


def problems(folder: Path) -> list[Problem]:
    with pytest.raises(DataSetError) as caught:
        read(folder)
    return caught.value.problems


READINGS = {
    "[x0, y0, x1, y1] in px": lambda c: (c.x0, c.y0, c.x1, c.y1),
    "[y1, x1, y0, x0] in px": lambda c: (c.y1, c.x1, c.y0, c.x0),
    "[y0, y1, x0, x1] in px": lambda c: (c.y0, c.y1, c.x0, c.x1),
    "[x0, y0, width, height] in px": lambda c: (c.x0, c.y0, c.x1 - c.x0, c.y1 - c.y0),
    "[y0, x0, height, width] in px": lambda c: (c.y0, c.x0, c.y1 - c.y0, c.x1 - c.x0),
    "[x centre, y centre, width, height] in shares of the picture": lambda c: (
        *((c.x0 + c.x1) / 2 / c.w, (c.y0 + c.y1) / 2 / c.h),
        *((c.x1 - c.x0) / c.w, (c.y1 - c.y0) / c.h),
    ),
    "[x0, y0, x1, y1] in shares of the picture": lambda c: (c.x0 / c.w, c.y0 / c.h, c.x1 / c.w, c.y1 / c.h),
    "[y0, x0, y1, x1] in percent of the picture": lambda c: (
        *(round(100 * c.y0 / c.h), round(100 * c.x0 / c.w)),
        *(round(100 * c.y1 / c.h), round(100 * c.x1 / c.w)),
    ),
}


@pytest.mark.parametrize("reading", READINGS)
def test_a_table_in_another_order_or_unit_is_one_problem_that_names_it(data, tmp_path, reading):
    (found,) = problems(changed(data, tmp_path, READINGS[reading]))
    assert (found.file, found.row, found.column) == ("labeled_cells.csv", None, "bbox")
    assert found.expected == f"[y0, x0, y1, x1] in px; all boxes together fit only as {reading}"
    cell = read(data).cells.sort_values("cell", key=lambda ids: ids.astype(int)).iloc[0]
    fixed = json.loads(found.fix.split("row 2, ")[1].split("]")[0] + "]")
    assert np.abs(np.subtract(fixed, cell[["y0", "x0", "y1", "x1"]].tolist())).max() <= 4


def test_the_user_can_say_that_the_order_of_boxes_is_right(data, tmp_path):
    """Else a false alarm could not be overruled."""
    folder = changed(data, tmp_path, lambda c: (c.x0, c.y0, c.x1, c.y1))
    (found,) = problems(folder)
    row = found.fix.split("`")[1]
    (folder / "distinct.csv").write_text(f"what,name,other\n{row}\n", encoding="utf-8")
    left = [] if data_is_square(data) else problems(folder)
    assert all(one.row and "inside its image" in one.expected for one in left)
    assert left or read(folder).report["cells"]


def data_is_square(folder: Path) -> bool:
    height, width = read_image(next((folder / "wsi").iterdir())).shape[:2]
    return height == width


def test_right_boxes_are_left_alone(data):
    assert read(data).report["remarks"] == []


@pytest.mark.parametrize("share", [3, 10])
def test_no_order_is_suggested_if_only_some_boxes_are_wrong(data, tmp_path, share):
    wrong = changed(data, tmp_path, lambda c: (c.y1, c.x1, c.y0, c.x0), slice(None, None, share))
    for found in problems(wrong):
        assert found.row is not None
        assert found.fix == "correct the box, or leave it empty"


def test_boxes_that_count_from_one_are_told(data, tmp_path):
    changed(data, tmp_path, lambda c: (c.y0 + 1, c.x0 + 1, c.y1 + 1, c.x1 + 1))
    changed(tmp_path, tmp_path, lambda c: (1, c.x0, c.y1 - c.y0 + 1, c.x1), slice(0, 300, 20))
    assert any("they may count pixels from 1" in remark for remark in read(tmp_path).report["remarks"])


def test_boxes_beside_the_cells_are_told(data, tmp_path):
    """Pictures of other smears, for instance."""
    folder = changed(data, tmp_path, lambda c: (c.y0, c.x0, c.y1, c.x1))
    for number, path in enumerate((folder / "wsi").iterdir()):
        noise = np.random.default_rng(number).integers(100, 255, (48, 64, 3), dtype=np.uint8)
        height, width = read_image(path).shape[:2]
        Image.fromarray(noise).resize((width, height)).save(path)
    assert any("look whether they lie on cells" in remark for remark in read(folder).report["remarks"])


def test_scientific_notation_is_a_number(data, tmp_path):
    folder = changed(data, tmp_path, lambda c: (c.y0, c.x0, c.y1, c.x1))
    cells = listed(folder / "labeled_cells.csv")
    y0, x0, y1, x1 = json.loads(cells[0]["bbox"])
    cells[0]["bbox"] = f"[{y0:.3E}, {x0}.0, {y1:.3e}, {x1}]"
    write(folder / "labeled_cells.csv", cells)
    assert read(folder).cells.equals(read(data).cells)


@pytest.mark.parametrize("text", ["[0, 0, 1e99, 2]", "[1, 2, 3]", "[a, 1, 2, 3]", "[١, 2, 3, 4]", "1, 2"])
def test_other_texts_are_no_boxes(text):
    assert boxes.numbers_of(text) is None


@given(st.lists(st.tuples(*[st.integers(-20, 120)] * 4), max_size=30))
def test_any_numbers_can_be_read_in_every_way(drawn):
    numbers = np.array(drawn, dtype=np.float64).reshape(-1, 4)
    dark = boxes.darkness(np.full((60, 80, 3), 200, np.uint8), numbers)
    found = boxes.other_readings(numbers, np.tile([60.0, 80.0], (len(numbers), 1)), dark)
    assert set(found) <= set(boxes.READINGS[1:])
    assert boxes.other_readings(numbers, np.tile([60.0, 80.0], (len(numbers), 1)), None) == []
