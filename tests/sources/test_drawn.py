"""The synthetic data set: same bytes, a valid layout, plausible patients, and a diagnosis only in cells."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.stats import kruskal
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.errors import UserError
from aplsmear.sources import drawn as demo

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"size": (160, 200), "cells_per_smear": 4}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def labels(literal: str) -> set[str]:
    return set(literal.strip("{}").replace("'", "").split(", ")) - {""}


def drawn_smear(diagnosis: demo.Diagnosis, rng: np.random.Generator, *form: Any) -> demo.Smear:
    """A smear of a patient who is drawn with the same random numbers."""
    return demo.draw_smear(demo.sample_patient(diagnosis, rng), rng, *form)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    demo.draw_data_set(folder, 24, 7, **SMALL)
    return folder


@pytest.fixture(scope="module")
def drawn() -> list[demo.Smear]:
    return [drawn_smear("apl", demo.generator(3, number), (320, 400), 14) for number in range(25)]


@pytest.fixture(scope="module")
def planned() -> dict[str, list[demo.CellPlan]]:
    plans: dict[str, list[demo.CellPlan]] = {}
    for place, diagnosis in enumerate(demo.DIAGNOSES):
        plans[diagnosis] = []
        for number in range(500):
            rng = demo.generator(5, place, number)
            patient = demo.sample_patient(diagnosis, rng)
            plans[diagnosis] += demo.sample_cells(patient, 30, rng)
    return plans


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("first", 7), ("second", 7), ("other", 8)):
        demo.draw_data_set(tmp_path / name, 3, seed, **SMALL)
    first, second, other = (contents(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert first["wsi/smear_0001.jpg"] != other["wsi/smear_0001.jpg"]


def test_a_patient_is_the_same_in_a_larger_data_set(data_set: Path, tmp_path: Path) -> None:
    demo.draw_data_set(tmp_path / "few", 5, 7, **SMALL)
    few, many = contents(tmp_path / "few"), contents(data_set)
    for name in few:
        if name.endswith(".csv"):
            assert many[name].startswith(few[name])
        else:
            assert many[name] == few[name]


def test_the_layout_is_that_of_the_kaggle_data_set(data_set: Path) -> None:
    smears, cells = read(data_set / "wsi.csv"), read(data_set / "labeled_cells.csv")
    assert list(smears[0]) == ["id", "imgName", "label", "patient"]
    assert list(cells[0]) == [
        *("id", "segmentationSetId", "wsi", "cellType", "segmentationQuality", "specialCharacteristics"),
        *("objectType", "bbox", "convexArea", "eccentricity", "equivalentDiameter", "perimeter"),
        *("meanIntensity", "eulerNumber", "extent"),
    ]
    assert {path.name for path in data_set.iterdir()} == {"wsi.csv", "labeled_cells.csv", "wsi"}
    assert sorted(smear["imgName"] for smear in smears) == sorted(
        path.name for path in (data_set / "wsi").iterdir()
    )
    assert [int(row["id"]) for row in smears] == list(range(1, len(smears) + 1))
    assert [int(row["id"]) for row in cells] == list(range(1, len(cells) + 1))
    assert {row["wsi"] for row in cells} == {row["id"] for row in smears}
    for row in cells:
        assert labels(row["cellType"]) <= {look.cell_type for look in demo._LOOKS.values()}
        assert labels(row["specialCharacteristics"]) <= {
            "Auer rods",
            "Faggot cell",
            "Bilobed",
            "Mitosis",
            "None",
        }
        assert (
            bool(row["cellType"]) == bool(row["specialCharacteristics"]) == (row["objectType"] == "{'Cell'}")
        )


def test_each_diagnosis_has_a_third_of_the_patients_in_random_order() -> None:
    diagnoses = [demo.diagnosis_of(patient, 1) for patient in range(1, 61)]
    assert Counter(diagnoses) == {"healthy": 20, "aml": 20, "apl": 20}
    assert len({tuple(diagnoses[start : start + 3]) for start in range(0, 60, 3)}) > 3


def test_the_labels_of_smears_give_the_diagnosis(data_set: Path) -> None:
    smears = read(data_set / "wsi.csv")
    of_patient = {row["patient"]: labels(row["label"]) for row in smears}
    assert len(of_patient) == 24
    for number in range(1, 25):
        label = of_patient[f"P7-{number:03d}"]
        expected = demo.diagnosis_of(number, 7)
        if expected == "healthy":
            assert label == {"healthy"}
        else:
            (fab,) = label - {"aml"}
            assert "aml" in label
            assert (fab == "m3") == (expected == "apl")


def test_boxes_lie_inside_the_smear_and_some_are_flawed_as_in_the_real_table(data_set: Path) -> None:
    sides = []
    for row in read(data_set / "labeled_cells.csv"):
        if row["bbox"]:
            y0, x0, y1, x1 = json.loads(row["bbox"])
            assert 0 <= y0 < y1 <= 160
            assert 0 <= x0 < x1 <= 200
            sides.append(min(y1 - y0, x1 - x0))
        else:
            sides.append(0)
    assert 1 <= sides.count(0) <= 0.03 * len(sides)
    assert 1 <= sides.count(1) <= 0.03 * len(sides)
    assert np.median(sides) == pytest.approx(54, abs=10)


def test_a_box_fits_its_cell_tightly(drawn: list[demo.Smear]) -> None:
    for smear in drawn:
        height, width = smear.image.shape[:2]
        for cell in smear.cells:
            y0, x0, y1, x1 = cell.box
            assert cell.mask.shape == cell.rods.shape == (y1 - y0, x1 - x0)
            for side, at_edge in (
                (cell.mask[:2], y0 == 0),
                (cell.mask[-2:], y1 == height),
                (cell.mask[:, :2], x0 == 0),
                (cell.mask[:, -2:], x1 == width),
            ):
                assert at_edge or side.any()


def test_a_cell_is_darker_than_its_surroundings(drawn: list[demo.Smear]) -> None:
    for smear in drawn[:5]:
        outside = np.ones(smear.image.shape[:2], bool)
        for cell in smear.cells:
            y0, x0, y1, x1 = cell.box
            outside[y0:y1, x0:x1] = False
        for cell in smear.cells:
            y0, x0, y1, x1 = cell.box
            assert smear.image[y0:y1, x0:x1][cell.mask].mean() < smear.image[outside].mean()


def test_rods_are_drawn_only_in_cells_that_have_rods(drawn: list[demo.Smear]) -> None:
    cells = [cell for smear in drawn for cell in smear.cells]
    assert sum(cell.plan.rods > 0 for cell in cells) > 10
    for cell in cells:
        assert cell.rods.any() == (cell.plan.rods > 0)
        assert not cell.plan.typed or cell.rods.any() == ("Auer rods" in cell.plan.characteristics)
        assert not (cell.rods & ~cell.mask).any()


def test_rods_are_visible_in_the_picture_where_their_mask_is(drawn: list[demo.Smear]) -> None:
    contrast = []
    for smear in drawn:
        for cell in smear.cells:
            if cell.plan.rods:
                y0, x0, y1, x1 = cell.box
                green = smear.image[y0:y1, x0:x1, 1].astype(int)
                near = cv2.dilate(cell.rods.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
                contrast.append(green[near & ~cell.rods & cell.mask].mean() - green[cell.rods].mean())
    assert np.mean(np.array(contrast) > 5) > 0.9


def test_shares_of_typed_cells_rods_and_faggot_cells_are_those_of_the_real_set(
    planned: dict[str, list[demo.CellPlan]],
) -> None:
    every = [plan for plans in planned.values() for plan in plans]
    assert np.mean([plan.typed for plan in every]) == pytest.approx(demo.TYPED_SHARE, abs=0.02)
    typed = [plan for name in ("aml", "apl") for plan in planned[name] if plan.typed]
    marks = Counter(name for plan in typed for name in plan.characteristics)
    assert marks["Auer rods"] / len(typed) == pytest.approx(0.06, abs=0.015)
    assert marks["Faggot cell"] / len(typed) == pytest.approx(0.02, abs=0.007)
    assert 0 < marks["Bilobed"] / len(typed) < 0.02
    assert 0 < marks["Mitosis"] / len(typed) < 0.02
    faggots = {name: sum(plan.faggot for plan in plans) for name, plans in planned.items()}
    assert faggots["apl"] > 50 * max(1, faggots["aml"] + faggots["healthy"])
    rods = {name: np.mean([plan.rods > 0 for plan in plans]) for name, plans in planned.items()}
    assert rods["apl"] > rods["aml"] > 0
    assert rods["healthy"] == 0


def test_every_kind_of_cell_occurs_in_every_diagnosis(planned: dict[str, list[demo.CellPlan]]) -> None:
    for plans in planned.values():
        assert {plan.kind for plan in plans} == set(demo.KINDS)


def test_the_share_of_abnormal_cells_overlaps_between_diagnoses() -> None:
    def burden(diagnosis: demo.Diagnosis, *kinds: str) -> np.ndarray:
        patients = [demo.sample_patient(diagnosis, demo.generator(11, number)) for number in range(300)]
        return np.array([sum(patient.mix[kind] for kind in kinds) for patient in patients])

    promyelocytes = {name: burden(name, "promyelocyte", "abnormal promyelocyte") for name in demo.DIAGNOSES}
    blasts = {name: burden(name, "myeloblast") for name in demo.DIAGNOSES}
    assert np.mean(promyelocytes["apl"] < promyelocytes["healthy"].max()) > 0.03
    assert np.mean(promyelocytes["apl"] < promyelocytes["aml"].max()) > 0.03
    assert np.mean(blasts["aml"] < np.quantile(blasts["healthy"], 0.95)) > 0.03
    assert np.ptp(promyelocytes["apl"]) > 0.6


def test_stain_light_and_red_cells_do_not_depend_on_the_diagnosis() -> None:
    views = []
    for diagnosis in demo.DIAGNOSES:
        patient = demo.sample_patient(diagnosis, demo.generator(1, 4))
        views.append(demo.draw_smear(patient, demo.generator(1, 4, 1), (160, 200), 0).image)
    for view in views[1:]:
        np.testing.assert_array_equal(view, views[0])


def test_the_background_does_not_reveal_the_diagnosis() -> None:
    measures: dict[str, list[list[float]]] = {diagnosis: [] for diagnosis in demo.DIAGNOSES}
    for number in range(1, 151):
        diagnosis = demo.diagnosis_of(number, 1)
        patient = demo.sample_patient(diagnosis, demo.generator(1, number))
        image = demo.draw_smear(patient, demo.generator(1, number, 1), (128, 128), 0).image
        measures[diagnosis].append([*image.mean(axis=(0, 1)), *image.std(axis=(0, 1))])
    groups = [np.array(rows) for rows in measures.values()]
    for column in range(6):
        # six measures, correlated: a diagnosis in the background would push p far below this
        assert kruskal(*(group[:, column] for group in groups)).pvalue > 0.005


def test_cells_have_the_size_that_is_asked_for() -> None:
    def diameters(cell_size: int) -> float:
        smear = drawn_smear("healthy", demo.generator(2), (400, 520), 12, cell_size)
        return float(np.median([np.sqrt(cell.mask.sum()) for cell in smear.cells]))

    assert diameters(96) / diameters(48) == pytest.approx(2, rel=0.15)


def test_too_few_patients_a_bad_seed_and_a_tiny_field_are_refused(tmp_path: Path) -> None:
    for words in (["--patients", "2"], ["--seed", "-1"]):
        assert CliRunner().invoke(app, ["demo-data", str(tmp_path / "new"), *words]).exit_code == 2
    with pytest.raises(UserError, match="larger smears"):
        demo.draw_data_set(tmp_path / "new", 3, 1, size=(100, 100))
    assert not (tmp_path / "new").exists()


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "wsi.csv").write_text("precious")
    with pytest.raises(UserError, match="not an empty folder"):
        demo.draw_data_set(tmp_path, 3, 1, **SMALL)
    assert contents(tmp_path) == {"wsi.csv": b"precious"}


def test_a_data_set_cut_off_in_the_middle_has_no_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = demo.draw_smear

    def fail_later(patient, *args):
        if patient.diagnosis == demo.diagnosis_of(3, 7):
            raise KeyboardInterrupt
        return draw(patient, *args)

    monkeypatch.setattr(demo, "draw_smear", fail_later)
    with pytest.raises(KeyboardInterrupt):
        demo.draw_data_set(tmp_path / "cut", 3, 7, **SMALL)
    assert not list((tmp_path / "cut").glob("*.csv"))


def test_the_demo_in_the_repository_is_the_one_that_the_program_draws() -> None:
    embedded = REPOSITORY / "demo"
    smears = read(embedded / "wsi.csv")
    cells = read(embedded / "labeled_cells.csv")
    assert len({row["patient"] for row in smears}) == 60
    assert sum(path.stat().st_size for path in embedded.rglob("*") if path.is_file()) < 5.5e6
    smear_id = 0
    for number in range(1, 61):
        rows = [row for row in smears if row["patient"] == f"P{number:03d}"]
        if number % 12 == 1 or len(rows) > 1:
            for row, (patient, smear) in zip(rows, demo.patient_smears(number, 1), strict=True):
                assert row["label"] == demo._literal(demo.smear_labels(patient))
                assert (embedded / "wsi" / row["imgName"]).read_bytes() == demo._jpeg(smear.image)
                written = [list(cell.values())[3:] for cell in cells if cell["wsi"] == row["id"]]
                assert written == demo._rows(smear, number)
        smear_id += len(rows)
    assert smear_id == len(smears) == len(list((embedded / "wsi").iterdir()))


def test_the_picture_of_the_docs_is_the_one_that_the_tool_draws(tmp_path: Path) -> None:
    tool = [sys.executable, REPOSITORY / "tools" / "demo_picture.py", tmp_path / "smears.png"]
    subprocess.run(tool, env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}, check=True)
    assert (tmp_path / "smears.png").read_bytes() == (REPOSITORY / "docs" / "demo_smears.png").read_bytes()
