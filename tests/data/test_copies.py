"""Copies of a picture or of a cell are found, and pictures that differ are left alone."""

import csv
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from changed_copies import CHANGES, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.compute.engine import Here
from aplsmear.data import copies
from aplsmear.data.copies import fingerprint, groups, same_boxes, same_pictures
from aplsmear.data.dataset import DataSet, DataSetError, Problem, in_both, read_data_set
from aplsmear.images.reading import read_image

DEMO = Path(__file__).parents[2] / "demo" / "wsi"
PICTURES = [read_image(path) for path in sorted(DEMO.iterdir())[:10]]
ONE = PICTURES[3]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_copy_of_a_picture_is_found_and_no_other_picture(change):
    copy = fingerprint(np.ascontiguousarray(change(ONE)))
    prints = [fingerprint(rgb) for rgb in PICTURES]
    assert same_pictures([*prints, copy]) == [(3, len(PICTURES))]
    assert same_pictures([copy], prints) == [(0, 3)]
    assert same_pictures(prints, [copy]) == [(3, 0)]


@pytest.mark.parametrize(("smear", "top", "left"), [(7, 0, 420), (9, 180, 120)])
def test_the_same_cells_cut_out_some_pixels_apart_are_copies(smear, top, left):
    """As on page 71 of DeepAPL. Their magnitudes differ more than those of other changed copies."""
    around = [
        fingerprint(np.ascontiguousarray(PICTURES[smear][top : top + 160, start : start + 160]))
        for start in (left, left + 12)
    ]
    assert same_pictures(around) == [(0, 1)]


def test_pictures_without_details_are_not_compared_in_detail():
    empty = [fingerprint(np.full((48, 64, 3), shade, np.uint8)) for shade in (250, 251, 252)]
    assert same_pictures(empty) == []
    assert same_pictures([*empty, empty[0]]) == [(0, 3)]
    assert same_pictures([], empty) == same_pictures(empty, []) == []


def test_pictures_with_the_same_background_and_other_cells_are_no_copies():
    """Fields of one slide, under the same uneven light: their perceptual hashes are nearly the same."""
    rng = np.random.default_rng(1)
    light = cv2.GaussianBlur(rng.normal(0, 900, (256, 256)), (0, 0), 30)
    fields = []
    for _ in range(2):
        cells = cv2.GaussianBlur(rng.normal(0, 60, (256, 256)), (0, 0), 4)
        fields.append(
            np.repeat(np.clip(190 + 4 * light + cells, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
        )
    one, other = map(fingerprint, fields)
    first, second = copies._hashes(copies._transforms([one, other], 1))[:, 0]
    assert np.bitwise_count(first ^ second) < 14
    assert same_pictures([one, other]) == []


def test_a_fingerprint_takes_little_memory():
    kept = fingerprint(ONE)
    assert kept.small.nbytes + len(kept.pixels) < 5_000


def test_transforms_are_those_of_the_parts_of_a_picture():
    """One product of matrices cuts, shrinks and transforms: as OpenCV and SciPy do it step by step."""
    one = fingerprint(ONE)
    for cut, low in zip(copies._CUTS, copies._transforms([one])[0], strict=True):
        part = copies._part(one.small, cut).astype(np.float64)
        shrunk = cv2.resize(part, (32, 32), interpolation=cv2.INTER_AREA)
        assert low / low[0, 0] == pytest.approx(dctn(shrunk)[:8, :8] / dctn(shrunk)[0, 0], abs=1e-7)


def test_many_copies_of_one_picture_are_one_group():
    prints = [fingerprint(saved(ONE, "JPEG", quality=quality)) for quality in range(40, 90, 4)]
    assert len(set(groups(len(prints), same_pictures(prints)))) == 1


def test_comparing_pictures_takes_milliseconds_for_each():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (200, 64, 64, 3), dtype=np.uint8)
    prints = [fingerprint(cv2.GaussianBlur(rgb, (0, 0), 3)) for rgb in noise]
    start = time.process_time()
    assert same_pictures(prints) == []
    assert time.process_time() - start < 6


# --- boxes ------------------------------------------------------------------------------------------


def test_nearly_the_same_box_of_one_smear_is_the_same_cell():
    boxes = np.array(
        [[0, 0, 100, 100], [5, 4, 103, 99], [0, 0, 100, 100], [60, 60, 160, 160], [0, 0, 100, 100]]
    )
    assert same_boxes(boxes, ["a", "a", "a", "a", "b"]) == [(0, 1), (0, 2)]


def test_very_many_equal_boxes_take_little_time():
    boxes = np.tile([[3, 4, 50, 60]], (100_000, 1))
    start = time.process_time()
    assert len(same_boxes(boxes, ["a"] * len(boxes))) == len(boxes) - 1
    assert time.process_time() - start < 10


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 30)] * 4, st.sampled_from("ab")), max_size=6))
def test_pairs_of_boxes_are_those_of_the_definition(drawn):
    boxes = np.array([[y, x, y + h + 8, x + w + 8] for y, x, h, w, _ in drawn]).reshape(-1, 4)
    smears = [each[4] for each in drawn]
    marks = np.zeros((len(boxes), 80, 80), bool)
    for mark, (y0, x0, y1, x1) in zip(marks, boxes, strict=True):
        mark[y0:y1, x0:x1] = True
    want = [
        (a, b)
        for a in range(len(boxes))
        for b in range(a + 1, len(boxes))
        if smears[a] == smears[b] and (marks[a] & marks[b]).sum() > 0.7 * (marks[a] | marks[b]).sum()
    ]
    found = same_boxes(boxes, smears)
    assert set(found) <= set(want)
    assert groups(len(boxes), found).tolist() == groups(len(boxes), want).tolist()


# --- in a data set ----------------------------------------------------------------------------------


def read(
    root: Path, smears: list[tuple[np.ndarray, str, str]], cells: list[tuple], distinct: str = ""
) -> DataSet:
    """A data set of these pictures, with their patients and labels."""
    (root / "wsi").mkdir(exist_ok=True)
    rows = [["id", "imgName", "label", "patient"]]
    for number, (picture, patient, label) in enumerate(smears):
        Image.fromarray(np.ascontiguousarray(picture)).save(root / "wsi" / f"{number}.png")
        rows.append([number, f"{number}.png", label, patient])
    for name, table in (("wsi", rows), ("labeled_cells", [["id", "wsi", "bbox", "cellType"], *cells])):
        with (root / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(table)
    if distinct:
        (root / "distinct.csv").write_text(f"what,name,other\n{distinct}\n", encoding="utf-8")
    return read_data_set(root, {}, min_box=8, skip_bad_images=False, engine=Here(1))


def problems(*arguments) -> list[Problem]:
    with pytest.raises(DataSetError) as caught:
        read(*arguments)
    return caught.value.problems


CELL = [(1, 0, "[0, 0, 50, 50]", "")]
SMEARS = [(ONE, "P1", "{'healthy'}"), (PICTURES[0], "P2", "{'healthy'}")]


def test_a_picture_under_two_patients_is_a_problem_until_it_is_declared_two(tmp_path):
    smears = [*SMEARS, (saved(ONE, "JPEG", quality=50)[6:], "P3", "{'healthy'}")]
    found = problems(tmp_path, smears, CELL)
    assert [(one.row, one.column, one.value) for one in found] == [
        (2, "imgName", "wsi/0.png"),
        (4, "imgName", "wsi/2.png"),
    ]
    row = found[0].fix.split("`")[1]
    assert row == "image,0.png,2.png"
    assert read(tmp_path, smears, CELL, row).report["patients"] == 3


def test_a_changed_copy_without_patients_is_one_patient(tmp_path):
    smears = [(picture, "", label) for picture, _, label in [*SMEARS, (ONE[::-1], "", "{'healthy'}")]]
    found = read(tmp_path, smears, CELL)
    assert found.smears["patient"].tolist() == ["0", "1", "0"]
    assert "the same picture, counted as one patient: smears 0, 2" in found.report["remarks"]


def test_a_cell_with_two_types_is_a_problem_that_names_both_rows(tmp_path):
    types = ["{'Promyelocyte'}", "{'Myeloblast'}"]
    cells = [(1, 0, "[0, 0, 50, 50]", types[0]), (2, 0, "[2, 1, 51, 49]", types[1])]
    (found,) = problems(tmp_path, SMEARS, cells)
    assert (found.file, found.row, found.column, found.value) == (
        "labeled_cells.csv",
        3,
        "cellType",
        "Myeloblast",
    )
    assert "row 2" in found.expected


def test_a_cell_that_is_listed_twice_is_told(tmp_path):
    found = read(tmp_path, SMEARS, [(1, 0, "[0, 0, 50, 50]", ""), (2, 0, "[0, 0, 50, 50]", "{'Myeloblast'}")])
    assert (
        "1 pairs of cells have nearly the same box and count twice, such as 1 and 2"
        in found.report["remarks"]
    )


def test_a_picture_or_a_patient_who_is_also_in_another_data_set_is_a_problem(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
    new = read(tmp_path / "new", SMEARS, CELL)
    old = [(PICTURES[5], "P9", "{'aml'}"), (np.rot90(ONE[:, 9:]), "P8", "{'aml'}")]
    (found,) = in_both(new, read(tmp_path / "old", old, CELL))
    assert found.value == "wsi/0.png"
    assert "wsi/1.png" in found.expected
    assert in_both(new, read(tmp_path / "old", old[:1], CELL)) == []
    (same_name,) = in_both(new, read(tmp_path / "old", [(PICTURES[5], "P1", "{'aml'}")], CELL))
    assert (same_name.file, same_name.column, same_name.value) == ("wsi.csv", "patient", "P1")
    command = ["check", str(tmp_path / "new"), "--against", str(tmp_path / "new")]
    assert CliRunner().invoke(app, command).exit_code == 1
