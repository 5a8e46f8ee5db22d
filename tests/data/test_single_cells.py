"""Data sets in which each cell is a picture of its own."""

import csv
import io
import re
import shutil
from itertools import pairwise
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.data.dataset import (
    CELL_COLUMNS,
    SINGLE_COLUMNS,
    DataSet,
    DataSetError,
    in_both,
    names_of,
    read_data_set,
)
from aplsmear.data.pseudonyms import Pseudonyms
from aplsmear.data.tasks import levels_of, patient_rows
from aplsmear.params import Task
from aplsmear.sources.drawn import draw_data_set
from crops import HEADER, cut_out, read_rows, write_rows

BLAST = Task(level="cell", positive={"cell_type": ["Myeloblast"]}, negative={"cell_type": ["*"]})
OF_SMEARS = Task(level="smear", positive={"diagnosis": ["apl"]}, negative={"diagnosis": ["aml"]})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `smears` and `crops`: the same cells."""
    folder = tmp_path_factory.mktemp("made")
    draw_data_set(folder / "smears", 6, 5, size=(240, 320), cells_per_smear=8)
    cut_out(folder / "smears", folder / "crops")
    return folder


@pytest.fixture
def crops(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "crops", tmp_path / "crops"))


def read(folder: Path, tasks: dict[str, Task] | None = None, **options: object) -> DataSet:
    return read_data_set(folder, tasks or {}, **({"min_box": 8, "skip_bad_images": False} | options))


def problems(folder: Path, **options: object) -> list[str]:
    with pytest.raises(DataSetError) as caught:
        read(folder, **options)
    return list(map(str, caught.value.problems))


def test_the_cells_are_those_of_the_smears_with_their_whole_pictures_as_boxes(made: Path) -> None:
    smears, crops = read(made / "smears"), read(made / "crops", {"blast": BLAST})
    assert tuple(smears.cells) == CELL_COLUMNS
    assert tuple(crops.cells) == (*CELL_COLUMNS, *SINGLE_COLUMNS)
    assert len(crops.smears) == 0
    same = ["cell", "patient", "diagnosis", "cell_type", "special_characteristics"]
    pairs = [each.cells.sort_values("cell", ignore_index=True) for each in (smears, crops)]
    assert pairs[0][same].equals(pairs[1][same])
    for start, end in (("y0", "y1"), ("x0", "x1")):
        assert (pairs[1][start] == 0).all()
        assert (pairs[1][end] == pairs[0][end] - pairs[0][start]).all()
    assert (crops.cells["smear"] == "").all()
    assert set(crops.cells["site"]) == {"Ulm"}
    assert crops.report["patients"] == smears.report["patients"] == 6
    assert crops.report["by_diagnosis"]["apl"]["patients"] == 2
    assert crops.report["tasks"]["blast"] == read(made / "smears", {"blast": BLAST}).report["tasks"]["blast"]


def test_drawn_cells_give_no_false_alarm(made: Path) -> None:
    assert read(made / "crops").report["remarks"] == []


def test_the_order_of_rows_changes_nothing(crops: Path) -> None:
    before = read(crops)
    write_rows(crops, read_rows(crops)[::-1])
    after = read(crops)
    assert before.cells.equals(after.cells)
    assert before.report == after.report
    patients = list(before.cells["patient"])
    assert len(set(patients)) == 1 + sum(one != other for one, other in pairwise(patients))


def test_a_data_set_may_hold_both_kinds(made: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(made / "smears", tmp_path / "both"))
    shutil.copytree(made / "crops" / "cells", both / "cells")
    with (both / "labeled_cells.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    singles = [dict(zip(HEADER, row, strict=True)) for row in read_rows(made / "crops")]
    for single in singles:
        single["id"] = f"s{single['id']}"
    names = [*rows[0], *(name for name in HEADER if name not in rows[0])]
    write_rows(both, [[row.get(name, "") for name in names] for row in [*rows, *singles]], names)
    found, smears = read(both), read(made / "smears")
    assert found.smears.equals(smears.smears)
    in_smears = found.cells[found.cells["smear"] != ""]
    assert in_smears[list(CELL_COLUMNS)].equals(smears.cells)
    assert len(found.cells) == 2 * len(smears.cells)
    assert found.report["patients"] == 6
    known = patient_rows(found.smears, found.cells).drop_duplicates(["patient", "diagnosis"])
    assert len(known) == 6

    for single in singles:
        single["patient"] = single["patient"].lower()
    write_rows(both, [[row.get(name, "") for name in names] for row in [*rows, *singles]], names)
    assert any("wsi.csv and labeled_cells.csv have" in each for each in problems(both))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"imgName": ""}, "row 2, imgName: expected a picture (imgName), or a smear and a box"),
        ({"imgName": "lost.png"}, "row 2, imgName, 'cells/lost.png': expected a whole picture"),
        ({"imgName": "../x.png"}, "expected a file name inside the folder cells"),
        ({"diagnosis": "{'helthy'}"}, "did you mean 'healthy'"),
        ({"patient": ""}, "expected the patient of every cell"),
        ({"cellType": "{'Promyelocite'}"}, "did you mean 'Promyelocyte'"),
        (
            {"wsi": "1"},
            "row 2, wsi, '1': expected an empty field, because this cell has a picture of its own",
        ),
    ],
)
def test_a_problem_is_reported_with_its_row(crops: Path, change: dict[str, str], told: str) -> None:
    header = [*HEADER, "wsi"]
    first, *others = read_rows(crops)
    changed = dict(zip(header, [*first, ""], strict=True)) | change
    write_rows(crops, [[changed[name] for name in header], *([*row, ""] for row in others)], header)
    assert any(told in each for each in problems(crops))


def test_a_repeated_id_and_a_picture_named_twice_are_problems(crops: Path) -> None:
    rows = read_rows(crops)
    write_rows(crops, [*rows, rows[0]])
    found = problems(crops)
    assert any("an id that no other row has" in each for each in found)
    rows.append(["new", *rows[0][1:]])
    write_rows(crops, rows)
    assert sum("a picture that no other row names" in each for each in problems(crops)) == 2


def test_a_damaged_picture_is_a_problem_or_left_out(crops: Path) -> None:
    first = read_rows(crops)[0]
    path = crops / "cells" / first[1]
    path.write_bytes(path.read_bytes()[:200])
    assert any(f"cells/{first[1]}" in each for each in problems(crops))
    left_out = read(crops, skip_bad_images=True).report["left_out"]["cells_with_bad_image"]
    assert list(left_out["images"]) == [first[0]]


def as_cells_of(folder: Path, files: dict[str, bytes]) -> None:
    """A data set of these pictures alone, each a cell of another patient."""
    (first, *_), names = read_rows(folder), dict(zip(HEADER, range(len(HEADER)), strict=True))
    rows = []
    for name, data in files.items():
        row = list(first)
        row[names["id"]] = row[names["patient"]] = name
        row[names["imgName"]] = name
        (folder / "cells" / name).write_bytes(data)
        rows.append(row)
    write_rows(folder, rows)


def encoded(pixels: np.ndarray, kind: str = "TIFF", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(*pages: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for page in pages:
            writer.write(page, **({"photometric": "rgb", "metadata": None} | options))
    return buffer.getvalue()


CELL = np.random.default_rng(2).integers(0, 250, (40, 56, 3)).astype(np.uint8)
OPAQUE = np.full((40, 56), 255, np.uint8)
TURNED = Image.Exif()
TURNED[0x0112] = 6
SAME_CELL = {  # one cell, as cameras and programs save it
    "plain.png": encoded(CELL, "PNG"),
    "deep.png": imagecodecs.png_encode(CELL.astype(np.uint16) * 257),
    "rgba.tif": encoded(np.dstack([CELL, OPAQUE])),
    "turned.tif": encoded(np.ascontiguousarray(np.rot90(CELL)), exif=TURNED),
    "planar and deep.tif": tiff(CELL.transpose(2, 0, 1).astype(np.uint16) * 257, planarconfig="separate"),
    "tiled JPEG.tif": tiff(CELL, tile=(16, 16), compression="jpeg", compressionargs={"lossless": True}),
    "cmyk.tif": tiff(np.dstack([255 - CELL, 0 * OPAQUE]), photometric="separated"),
}


def test_a_cell_has_the_same_pixels_however_its_picture_was_saved(crops: Path) -> None:
    as_cells_of(crops, SAME_CELL)
    found = problems(crops)  # equal pictures of many patients
    assert len(found) == len(SAME_CELL)
    assert all("another patient or label" in each for each in found)


def test_a_picture_of_several_cells_or_a_slide_is_a_problem_with_a_fix(crops: Path) -> None:
    pages = tiff(CELL, CELL[::-1])
    empty = iter([b"x"] * 16)
    huge = tiff(empty, shape=(13_000, 13_000, 3), dtype=np.uint8, tile=(4096, 4096), compression="zlib")
    files = {"pages.tif": pages, "huge.tif": huge, "slide.svs": pages, "plain.png": SAME_CELL["plain.png"]}
    as_cells_of(crops, files)
    found = "\n".join(problems(crops))
    assert "'cells/pages.tif': expected a whole picture: a TIFF of 2 planes of the same size" in found
    assert "save the one that is meant as a file, or each with a row of its own" in found
    assert "'cells/huge.tif': expected a whole picture: more than 150 million pixels" in found
    assert "'cells/slide.svs': expected a whole picture: a slide of a scanner" in found
    assert found.count("aplsmear fields SLIDE --to DIR") == 2
    assert "plain.png" not in found


def copied(folder: Path, **change: str) -> None:
    """Add a copy of the picture of a cell with a type, compressed again, in a new row."""
    rows = sorted(read_rows(folder), key=lambda row: row[5], reverse=True)
    copy = dict(zip(HEADER, rows[0], strict=True)) | {"id": "copy", "imgName": "copy.jpg"} | change
    Image.open(folder / "cells" / rows[0][1]).save(folder / "cells" / "copy.jpg", quality=90)
    write_rows(folder, [*rows, [copy[name] for name in HEADER]])


def test_a_copy_under_another_patient_or_type_is_a_problem_else_a_remark(crops: Path, made: Path) -> None:
    copied(crops)
    (remark,) = read(crops).report["remarks"]
    assert remark.startswith("2 cells have one of 1 pictures")
    shutil.copy(made / "crops" / "labeled_cells.csv", crops)
    other = next(row for row in read_rows(crops) if row[3] != read_rows(crops)[0][3])
    copied(crops, patient=other[2], diagnosis=other[3])
    assert any("has the same with another patient" in each for each in problems(crops))
    shutil.copy(made / "crops" / "labeled_cells.csv", crops)
    copied(crops, cellType="{'Plasma cell'}")
    found = problems(crops)
    assert any("image,copy.jpg," in each for each in found)
    first = read_rows(crops)[0][1]
    (crops / "distinct.csv").write_text(f"what,name,other\nimage,copy.jpg,{first}\n")
    assert read(crops).report["remarks"] == []


def test_pictures_that_are_in_the_training_set_too_are_found(crops: Path, made: Path) -> None:
    kept = read_rows(crops)[:1]
    write_rows(crops, kept)
    both = in_both(read(crops), read(made / "crops"))
    (found,) = [problem for problem in both if problem.column == "imgName"]
    assert found.file == "labeled_cells.csv"
    assert found.value == f"cells/{kept[0][1]}"


def test_without_patients_each_picture_counts_as_one_and_a_remark_warns(crops: Path) -> None:
    write_rows(crops, [[*row[:2], *row[3:]] for row in read_rows(crops)], [*HEADER[:2], *HEADER[3:]])
    found = read(crops)
    assert found.report["patients"] == len(found.cells)
    assert any("results look too good" in remark for remark in found.report["remarks"])


def test_cells_without_diagnosis_are_left_out_unless_no_cell_has_one(crops: Path) -> None:
    rows = read_rows(crops)
    patient = rows[0][2]
    theirs = [row[0] for row in rows if row[2] == patient]
    write_rows(crops, [[*row[:3], "" if row[2] == patient else row[3], *row[4:]] for row in rows])
    assert set(read(crops).report["left_out"]["cells_without_diagnosis"]["ids"]) == set(theirs)
    write_rows(crops, [[*row[:3], "", *row[4:]] for row in rows])
    found = read(crops, {"blast": BLAST})
    assert len(found.cells) == len(rows)
    assert set(found.cells["diagnosis"]) == {""}


def test_tasks_about_smears_are_named_in_one_sentence(crops: Path) -> None:
    (found,) = problems(crops, tasks={"one": OF_SMEARS, "two": OF_SMEARS, "blast": BLAST})
    assert "take one, two out of `tasks`, `overrides` and `ensembles.*.members`" in found
    assert list(levels_of({"one": OF_SMEARS, "blast": BLAST})["level"]) == ["cell", "smear"]
    assert list(levels_of({"blast": BLAST})["level"]) == ["cell"]


def test_under_pseudonyms_no_name_is_left_and_pictures_are_found(crops: Path) -> None:
    names = Pseudonyms("a key that nobody else has")
    found = read(crops, pseudonyms=names)
    listed = {(kind, name) for kind, name in names_of(crops) if kind != "cell"}
    text = found.cells.to_csv() + str(found.report)
    assert {kind for kind, _ in listed} == {"patient", "image"}
    assert [name for _, name in listed if name in text] == []
    files = names.files(crops, found.smears, found.cells)
    assert all((crops / files[image]).is_file() for image in found.cells["image"])


def test_the_command_cells_refuses_and_check_counts(crops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(crops.parent)
    refused = CliRunner().invoke(app, ["cells", str(crops), "--overwrite"])
    assert refused.exit_code == 1
    assert "these cells need no boxes" in refused.output.replace("\n", " ")
    checked = CliRunner().invoke(app, ["check", str(crops)])
    assert checked.exit_code == 0
    assert re.search(r"patients +6 *\n *smears +0 *\n", checked.output)
