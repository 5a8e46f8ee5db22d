"""A folder in the Kaggle layout gives a data set, or all of its problems."""

import csv
import io
import json
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from aplsmear.compute.engine import Here
from aplsmear.data.dataset import (
    CELL_COLUMNS,
    SMEAR_COLUMNS,
    DataSet,
    DataSetError,
    Problem,
    read_data_set,
    render_problems,
)
from aplsmear.images.reading import read_image
from aplsmear.params import Task
from aplsmear.tables import read_table, write_table

SHARED = Path(__file__).parents[3] / "shared" / "data"

SMEARS = """id,imgName,label,patient
1,a.png,{'healthy'},P1
2,b.png,"{'aml', 'm2'}",P2
3,c.png,"{'aml', 'm3'}",P3
10,d.png,"{'aml', 'm3'}",P3
"""
CELLS = """id,segmentationSetId,wsi,cellType,segmentationQuality,specialCharacteristics,objectType,bbox,extent
1,1,1,,,,,"[2, 4, 30, 40]",0.79
2,1,3,{'Promyelocyte'},{'Good'},{'None'},{'Cell'},"[2, 4, 30, 40]",0.78
11,1,3,{'Promyelocyte'},{'Good'},"{'Auer rods', 'Faggot cell'}",{'Cell'},"[10, 20, 40, 60]",0.77
12,1,10,{'Myeloblast'},{'Bad'},{'None'},{'Cell'},"[20, 44, 48, 64]",0.76
"""
TASKS = {
    "auer_rod": Task(
        level="cell",
        positive={"special_characteristics": ["Auer rods"]},
        negative={"special_characteristics": ["*"]},
    ),
    "apl_aml": Task(level="smear", positive={"diagnosis": ["apl"]}, negative={"diagnosis": ["aml"]}),
}


def png(seed: int) -> bytes:
    """Purple squares on a pale field."""
    stained = np.random.default_rng(seed).random((6, 8)) < 0.3
    pixels = np.where(stained[:, :, None], (130, 70, 150), (225, 205, 215)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.repeat(8, axis=0).repeat(8, axis=1)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = {f"{name}.png": png(seed) for seed, name in enumerate("abcd")}


def folder(root: Path, smears: str | bytes = SMEARS, cells: str | bytes | None = CELLS) -> Path:
    """A data set of four smears, 48 px high and 64 px wide, with these tables."""
    (root / "wsi").mkdir(parents=True, exist_ok=True)
    for name, data in IMAGES.items():
        (root / "wsi" / name).write_bytes(data)
    for name, text in (("wsi.csv", smears), ("labeled_cells.csv", cells)):
        if text is not None:
            (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def read(root: Path, tasks=TASKS, **options) -> DataSet:
    return read_data_set(root, tasks, **{"min_box": 8, "skip_bad_images": False, "engine": Here(1)} | options)


def problems(root: Path, tasks=TASKS, **options) -> list[Problem]:
    with pytest.raises(DataSetError) as caught:
        read(root, tasks, **options)
    for problem in caught.value.problems:
        assert problem.expected
        assert problem.fix
    return caught.value.problems


def test_every_image_is_opened_once(tmp_path, monkeypatch):
    opened, plain = [], Path.open

    def noting(path: Path, *arguments: object, **options: object) -> object:
        opened.append(path.name)
        return plain(path, *arguments, **options)

    root = folder(tmp_path)
    monkeypatch.setattr(Path, "open", noting)
    read(root)
    assert sorted(name for name in opened if name in IMAGES) == sorted(IMAGES)


def places(found: list[Problem]) -> list[tuple[str, int | None, str]]:
    return [(problem.file, problem.row, problem.column) for problem in found]


def with_smear(row: str) -> str:
    return SMEARS + row + "\n"


def with_cell(
    box: str, smear: object = 3, labels: str = ",{'Good'},{'None'},{'Cell'}", cell: object = 99
) -> str:
    return CELLS + f'{cell},1,{smear},{labels},"{box}",1\n'


# --- what is read -----------------------------------------------------------------------------------


def test_tables_and_report(tmp_path):
    found = read(folder(tmp_path))
    assert tuple(found.smears) == SMEAR_COLUMNS
    assert tuple(found.cells) == CELL_COLUMNS
    assert found.smears.to_numpy().tolist() == [
        ["1", "wsi/a.png", "P1", "", "healthy", "", "healthy", 64, 48],
        ["2", "wsi/b.png", "P2", "", "aml", "m2", "aml|m2", 64, 48],
        ["3", "wsi/c.png", "P3", "", "apl", "m3", "aml|m3", 64, 48],
        ["10", "wsi/d.png", "P3", "", "apl", "m3", "aml|m3", 64, 48],
    ]
    assert found.cells.iloc[2].tolist() == [
        *("11", "3", "P3", "apl", "m3", "Promyelocyte", "Auer rods|Faggot cell", "Cell", "Good"),
        *(10, 20, 40, 60),
    ]
    report = json.loads(json.dumps(found.report))
    assert (report["smears"], report["patients"], report["cells"], report["cells_with_type"]) == (4, 3, 4, 3)
    assert report["by_diagnosis"]["apl"] == {"smears": 2, "patients": 1, "cells": 3}
    assert report["tasks"]["auer_rod"] == {"positive": 1, "negative": 2, "no_part": 1}
    assert report["labels"]["special_characteristics"] == {"Auer rods": 1, "Faggot cell": 1, "None": 2}
    assert report["remarks"] == []


def test_tables_survive_a_file_with_the_label_none(tmp_path):
    found = read(folder(tmp_path))
    for name, table in (("smears", found.smears), ("cells", found.cells)):
        write_table(tmp_path / f"{name}.csv", table)
        assert read_table(tmp_path / f"{name}.csv").to_numpy().tolist() == table.to_numpy().tolist()


def test_row_order_and_workers_change_nothing(tmp_path):
    smears = "id,imgName,label\n" + "".join(
        f"{n},{n}.png,{{'{'healthy' if n % 2 else 'm3'}'}}\n" for n in range(12)
    )
    cells = "id,wsi,bbox\n" + "".join(f'{n},{n % 12},"[{n}, 0, {20 + n}, 30]"\n' for n in range(40))
    folder(tmp_path, smears, cells)
    for n in range(12):
        Image.new("L", (64, 48), n).save(tmp_path / "wsi" / f"{n}.png")
    first = read(tmp_path, {}, engine=Here(2))
    assert first.smears["smear"].tolist() == [str(n) for n in range(12)]
    assert first.cells["cell"].tolist()[:5] == ["0", "12", "24", "36", "1"]
    shuffle = np.random.default_rng(1)
    for name, text in (("wsi.csv", smears), ("labeled_cells.csv", cells)):
        header, *rows = text.splitlines()
        shuffle.shuffle(rows)
        (tmp_path / name).write_text("\n".join([header, *rows]))
    second = read(tmp_path, {})
    assert first.smears.equals(second.smears)
    assert first.cells.equals(second.cells)
    assert first.report == second.report


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: b"\xef\xbb\xbf" * 2 + text.encode(),
        lambda text: text.replace("wsi", "\u200bwsi\u00a0", 1).encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: ("\n" + text + "\n\n,,\n").encode(),
        lambda text: recode(text, ";"),
        lambda text: recode(text, "\t"),
        lambda text: recode(text, "|"),
        lambda text: b"sep=;\r\n" + recode(text, ";"),
        lambda text: b'\xef\xbb\xbf"sep=;"\n' + recode(text, ";"),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace("\n1,", '\n"=""1""",').encode(),
    ],
    ids=[
        "BOM",
        "two BOMs",
        "invisible letters in the header",
        "CRLF",
        "UTF-16",
        "empty rows",
        "semicolons",
        "tabs",
        "bars",
        "sep=;",
        "BOM, sep=;",
        "CR",
        "=",
    ],
)
def test_tables_of_all_spreadsheet_programs_give_the_same_data_set(tmp_path, change):
    expected = read(folder(tmp_path / "a"))
    found = read(folder(tmp_path / "b", change(SMEARS), change(CELLS)))
    assert found.smears.equals(expected.smears)
    assert found.cells.equals(expected.cells)
    assert found.report == expected.report


def recode(text: str, delimiter: str) -> bytes:
    table = io.StringIO()
    csv.writer(table, delimiter=delimiter).writerows(csv.reader(io.StringIO(text)))
    return table.getvalue().encode()


def test_windows_1252_is_read_with_a_remark(tmp_path):
    found = read(folder(tmp_path, SMEARS.replace("P1", "Köln – Š").encode("cp1252")))
    assert found.smears["patient"][0] == "Köln – Š"
    assert "wsi.csv is not UTF-8: read as Windows-1252" in found.report["remarks"][0]


def test_ids_may_be_any_text(tmp_path):
    smears = SMEARS.replace("3,c", " Ünal  7/α ,c")
    found = read(folder(tmp_path, smears, CELLS.replace(",1,3,", ",1,Ünal 7/α,")))
    assert found.smears["smear"].tolist() == ["1", "10", "2", "Ünal 7/α"]
    assert (found.cells["smear"] == "Ünal 7/α").sum() == 2


def test_ids_that_a_spreadsheet_turned_into_decimal_numbers_stay_the_same(tmp_path):
    found = read(folder(tmp_path, cells=CELLS.replace(",1,3,", ",1,3.0,")))
    assert (found.cells["smear"] == "3").sum() == 2


def test_without_a_patient_column_each_smear_counts_as_a_patient(tmp_path):
    without = "".join(line.rpartition(",")[0] + "\n" for line in SMEARS.splitlines())
    for text in (without, SMEARS.replace("P1", "").replace("P2", "").replace("P3", "")):
        found = read(folder(tmp_path, text))
        assert found.smears["patient"].tolist() == ["1", "2", "3", "10"]
        assert found.report["patients"] == 4
        assert found.report["remarks"] == ["no patient column: each smear counts as a patient"]


def test_site_is_kept(tmp_path):
    smears = SMEARS.replace("patient\n", "patient,site\n").replace("P1\n", "P1,Ulm\n")
    smears = smears.replace("P2\n", "P2,Ulm\n").replace("P3\n", "P3,\n")
    assert read(folder(tmp_path, smears)).smears["site"].tolist() == ["Ulm", "Ulm", "", ""]


def test_without_a_table_of_cells_smears_are_read(tmp_path):
    found = read(folder(tmp_path, cells=None), {"apl_aml": TASKS["apl_aml"]})
    assert len(found.smears) == 4
    assert found.cells.empty
    assert tuple(found.cells) == CELL_COLUMNS
    assert found.report["remarks"] == ["no labeled_cells.csv: only smears take part"]


def test_new_patients_need_no_labels(tmp_path):
    smears = "id,imgName,label\n1,a.png,whatever\n2,b.png,\n"
    cells = 'id,wsi,bbox,cellType\n1,1,"[0, 0, 30, 30]",whatever\n'
    found = read(folder(tmp_path, smears, cells), {}, labelled=False)
    assert found.smears["diagnosis"].tolist() == ["", ""]
    assert found.cells["cell_type"].tolist() == [""]
    assert len(read(folder(tmp_path, "id,imgName\n1,a.png\n", None), {}, labelled=False).smears) == 1


def test_images_may_lie_in_subfolders_and_behind_links(tmp_path):
    folder(tmp_path / "a", SMEARS.replace("a.png", "ulm\\a.png"))
    (tmp_path / "a/wsi/ulm").mkdir()
    (tmp_path / "a/wsi/a.png").rename(tmp_path / "elsewhere.png")
    (tmp_path / "a/wsi/ulm/a.png").symlink_to(tmp_path / "elsewhere.png")
    assert read(tmp_path / "a").smears["image"][0] == "wsi/ulm/a.png"


# --- what is left out, counted ----------------------------------------------------------------------


def test_cells_without_a_usable_box_are_left_out_and_listed(tmp_path):
    cells = with_cell("", cell=20) + '21,1,3,,,,,"[5, 5, 6, 6]",1\n22,1,3,,,,,"[0, 0, 0, 0]",1\n'
    found = read(folder(tmp_path, cells=cells + '23,1,3,,,,,"[0, 60, 40, 90]",1\n'))
    assert found.report["left_out"]["cells_without_box"] == {"count": 1, "ids": ["20"]}
    assert found.report["left_out"]["cells_with_box_under_min_box"] == {"count": 3, "ids": ["21", "22", "23"]}
    assert found.report["cells"] == 4


def test_boxes_that_reach_outside_are_clipped_and_listed(tmp_path):
    found = read(folder(tmp_path, cells=with_cell("[-5, 30, 20, 999]")))
    assert found.cells.set_index("cell").loc["99", ["y0", "x0", "y1", "x1"]].tolist() == [0, 30, 20, 64]
    assert found.report["changed"]["boxes_clipped"] == {"count": 1, "ids": ["99"]}


def test_boxes_belong_to_the_image_as_it_is_shown_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder(tmp_path, cells=with_cell("[50, 0, 64, 40]", smear=1))
    Image.new("RGB", (64, 48)).save(tmp_path / "wsi/a.png", exif=exif)
    assert read(tmp_path).smears.loc[0, ["width", "height"]].tolist() == [48, 64]


def test_smears_without_a_diagnosis_are_left_out_with_their_cells(tmp_path):
    smears = SMEARS.replace("{'healthy'}", "\"{'50x.png', 'al'}\"")
    found = read(folder(tmp_path, smears))
    assert found.report["left_out"]["smears_without_diagnosis"] == {"count": 1, "ids": ["1"]}
    assert found.report["left_out"]["cells_of_left_out_smears"] == {"count": 1, "ids": ["1"]}
    assert found.report["changed"]["labels_dropped"] == {"50x.png": 1, "al": 1}
    assert "1" not in found.smears["smear"].tolist()


def test_bad_images_are_left_out_only_if_a_parameter_allows_it(tmp_path):
    folder(tmp_path)
    whole = (tmp_path / "wsi/a.png").read_bytes()
    (tmp_path / "wsi/a.png").write_bytes(whole[:-30])
    (tmp_path / "wsi/d.png").unlink()
    found = problems(tmp_path)
    assert places(found) == [("wsi.csv", 2, "imgName"), ("wsi.csv", 5, "imgName")]
    assert "truncated" in found[0].expected
    assert "no such file" in found[1].expected
    assert "skip_bad_images" in found[0].fix
    left = read(tmp_path, skip_bad_images=True)
    assert left.report["left_out"]["smears_with_bad_image"]["count"] == 2
    assert set(left.report["left_out"]["smears_with_bad_image"]["images"]) == {"1", "10"}
    assert left.report["left_out"]["cells_of_left_out_smears"] == {"count": 2, "ids": ["1", "12"]}
    assert left.smears["smear"].tolist() == ["2", "3"]


def test_an_unknown_label_that_no_task_needs_is_counted(tmp_path):
    found = read(folder(tmp_path, cells=with_cell("[0, 0, 30, 30]", labels=",,{'Vacuoles'},")))
    assert found.report["unknown_labels"] == {"special_characteristics": {"Vacuoles": 1}}


def test_one_picture_is_never_two_patients(tmp_path):
    folder(tmp_path)
    (tmp_path / "wsi/b.png").write_bytes((tmp_path / "wsi/c.png").read_bytes())
    assert places(problems(tmp_path)) == [("wsi.csv", 3, "imgName"), ("wsi.csv", 4, "imgName")]
    folder(tmp_path, "".join(line.rpartition(",")[0] + "\n" for line in SMEARS.splitlines()))
    (tmp_path / "wsi/c.png").write_bytes((tmp_path / "wsi/d.png").read_bytes())
    found = read(tmp_path)
    assert found.smears["patient"].tolist() == ["1", "2", "3", "3"]
    assert "the same picture, counted as one patient: smears 3, 10" in found.report["remarks"]


# --- what is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "column", "told"),
    [
        ("1,e.png,{'healthy'},P9", "id", "no other row"),
        (",e.png,{'healthy'},P9", "id", "a value"),
        ("4\x01,a.png,{'healthy'},P9", "id", "printable"),
        ("4,,{'healthy'},P9", "imgName", "a value"),
        ("4,a.png,{'healthy'},P9", "imgName", "no other row"),
        ("4,e.png,{'healthy'},P9", "imgName", "no such file"),
        ("4,../wsi.csv,{'healthy'},P9", "imgName", "inside"),
        ("4,/etc/passwd,{'healthy'},P9", "imgName", "inside"),
        ("4,C:\\smears\\a.png,{'healthy'},P9", "imgName", "inside"),
        ("4,..\\a.png,{'healthy'},P9", "imgName", "inside"),
        ("4,.,{'healthy'},P9", "imgName", "not a file"),
        ("4,e.png,{'helthy'},P9", "label", "did you mean 'healthy'"),
        ("4,e.png,aml,P9", "label", "a set of labels"),
        ("4,e.png,__import__('os').abort(),P9", "label", "a set of labels"),
        ("4,e.png,\"{'aml', 'healthy'}\",P9", "label", "healthy alone"),
        ("4,e.png,{'healthy'},", "patient", "the patient of every smear"),
        ("4,e.png,{'healthy'},P2", "patient", "one diagnosis for each patient"),
        ("4,e.png,{'healthy'}", "", "4 fields"),
        ("4,e.png,{'aml', 'm2'},P9", "", "4 fields"),
    ],
)
def test_a_problem_of_a_smear_is_reported_with_its_row_and_column(tmp_path, row, column, told):
    found = problems(folder(tmp_path, with_smear(row)))
    assert any(
        p.file == "wsi.csv" and p.row == 6 and p.column == column and told in p.expected for p in found
    )


@pytest.mark.parametrize(
    ("cells", "column", "told"),
    [
        (with_cell("[0, 0, 30, 30]", smear=77), "wsi", "the id of a smear"),
        (with_cell("[0, 0, 30, 30]", smear=""), "wsi", "a value"),
        (with_cell("[0, 0, 30, 30]", cell=1), "id", "no other row"),
        (with_cell("[30, 0, 0, 30]"), "bbox", "y0 before y1"),
        (with_cell("[48, 0, 90, 30]"), "bbox", "48 px height and 64 px width"),
        (with_cell("[0, -30, 30, 0]"), "bbox", "inside its image"),
        (with_cell("[0, 0, 30]"), "bbox", "four whole numbers"),
        (with_cell("[0, 0, 30, 30.5]"), "bbox", "four whole numbers"),
        (with_cell("[0, 0, 30, NaN]"), "bbox", "four whole numbers"),
        (with_cell("[0, 0, 30, 99999999999999999999]"), "bbox", "four whole numbers"),
        (with_cell("[0, 0, 30, 30]", labels="Promyelocyte,,,"), "cellType", "a set of labels"),
        (with_cell("[0, 0, 30, 30]", labels="{'Promyelocite'},,,"), "cellType", "'Promyelocyte'"),
        (with_cell("[0, 0, 30, 30]", labels=",,{'auer rods'},"), "specialCharacteristics", "'Auer rods'"),
        (CELLS + "99,1,3,,,,,[0, 0, 30, 30],1\n", "", "9 fields"),
    ],
)
def test_a_problem_of_a_cell_is_reported_with_its_row_and_column(tmp_path, cells, column, told):
    found = problems(folder(tmp_path, cells=cells))
    assert [(p.file, p.row, p.column) for p in found] == [("labeled_cells.csv", 6, column)] or column == "id"
    assert any(p.row == 6 and told in p.expected for p in found)


@pytest.mark.parametrize(
    ("text", "row", "column", "told"),
    [
        (b"", None, "", "it is empty"),
        (b"sep=;\n", None, "", "it is empty"),
        (b"id,imgName,label\n", None, "", "below the header there is none"),
        (b"PK\x03\x04rest", None, "", "it is an Excel"),
        (b"<!DOCTYPE html><table>", None, "", "it is a web page"),
        (b"\0\0\0", None, "", "zero bytes"),
        (b"id,imgname,label\n1,a.png,{'healthy'}\n", 1, "imgName", "a column imgName"),
        (b"id,imgName,label,id\n1,a.png,{'healthy'},1\n", 1, "id", "once in the header"),
        (b"id,imgName,label\n1,\"a.png,{'healthy'}\n", 2, "", "closed quotes"),
        (None, None, "", "No such file"),
    ],
)
def test_a_problem_of_a_file_is_reported(tmp_path, text, row, column, told):
    folder(tmp_path, text)
    first = problems(tmp_path)[0]
    assert (first.file, first.row, first.column) == ("wsi.csv", row, column)
    assert told in first.expected


def test_rows_have_the_numbers_that_a_spreadsheet_shows(tmp_path):
    """Empty rows count, and so does a field of two lines once."""
    rows = SMEARS.replace("2,b.png", "\n,,,\n2,b.png").replace("P2", '"P\n2"') + "4,e.png,{'cml'},P9\n"
    assert places(problems(folder(tmp_path, rows))) == [("wsi.csv", 8, "imgName"), ("wsi.csv", 8, "label")]


def test_a_misspelt_column_is_named_with_what_to_do(tmp_path):
    assert "'imgname'" in problems(folder(tmp_path, SMEARS.replace("imgName", "imgname")))[0].fix


@pytest.mark.parametrize(
    "title", ["Patient", "PATIENT", "patients", "patient_id", "PatientID", "Patient-Nr.", "patient name"]
)
def test_a_column_of_nearly_the_right_name_is_a_problem(tmp_path, title):
    """Else each smear would count as a patient, and one patient could be on both sides of a split."""
    (found,) = problems(folder(tmp_path, SMEARS.replace("patient", title, 1)))
    assert (found.file, found.row, found.column) == ("wsi.csv", 1, title)
    assert "the name patient" in found.expected


def test_without_a_patient_column_the_columns_that_are_not_read_are_named(tmp_path):
    (remark,) = read(folder(tmp_path, SMEARS.replace("patient", "case", 1))).report["remarks"]
    assert remark.endswith("Columns that are not read: 'case'")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("labeled_cells.csv", "Labeled_Cells.CSV"), ("labeled_cells.csv", "labelled_cells (1).csv"),
        ("labeled_cells.csv", "labeled_cells.csv.txt"), ("distinct.csv", "Distinct.csv"),
        ("distinct.csv", "distinct - Copy.csv"),
    ],
)  # fmt: skip
def test_a_table_of_nearly_the_right_name_is_a_problem(tmp_path, name, other):
    (folder(tmp_path) / "distinct.csv").write_text("what,name,other\npatient,P1,\n")
    (tmp_path / name).rename(tmp_path / other)
    (found,) = problems(tmp_path, {})
    assert (found.file, found.expected) == (other, f"the name {name}")


def test_a_table_of_another_time_is_none(tmp_path):
    (folder(tmp_path) / "labeled_cells.csv").rename(tmp_path / "labeled_cells_old.csv")
    assert read(tmp_path, {}).report["remarks"] == ["no labeled_cells.csv: only smears take part"]


def test_a_table_of_smears_of_another_name_is_named(tmp_path):
    (folder(tmp_path) / "wsi.csv").rename(tmp_path / "WSI (2).csv")
    assert (problems(tmp_path)[0].file, problems(tmp_path)[0].expected) == ("WSI (2).csv", "the name wsi.csv")


@pytest.mark.parametrize("name", ["wsi.csv", "labeled_cells.csv", "distinct.csv"])
def test_a_link_to_a_table_that_is_not_there_is_a_problem(tmp_path, name):
    (folder(tmp_path) / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("nothing.csv")
    (found,) = problems(tmp_path, {})
    assert (found.file, "No such file" in found.expected) == (name, True)


@pytest.mark.parametrize("name", ["wsi.csv", "wsi/a.png"])
def test_a_file_without_a_size_is_never_read(tmp_path, name, monkeypatch):
    """Files of /proc have none, and reading them may never end."""
    (folder(tmp_path) / name).write_bytes(b"")
    opened = []
    plain = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *how, **more: opened.append(path.name) or plain(path, *how, **more)
    )
    found = problems(tmp_path, {})[0]
    assert "empty" in found.expected
    assert Path(name).name not in opened


def test_a_missing_folder_is_a_problem(tmp_path):
    assert str(tmp_path / "nothing") == problems(tmp_path / "nothing")[0].file


def test_all_problems_are_reported_at_once_in_one_table(tmp_path):
    smears = with_smear("10,../x.png,{'cml'},P9")
    cells = with_cell("[9, 9, 1, 1]") + "".join(f'{n},1,77,,,,,"[0, 0, 9, 9]",1\n' for n in range(100, 150))
    folder(tmp_path, smears, cells)
    (tmp_path / "wsi/a.png").write_bytes(b"no picture")
    found = problems(tmp_path)
    counted = Counter((p.file, p.column) for p in found)
    assert counted == {
        ("wsi.csv", "id"): 2,
        ("wsi.csv", "imgName"): 2,
        ("wsi.csv", "label"): 1,
        ("labeled_cells.csv", "bbox"): 1,
        ("labeled_cells.csv", "wsi"): 50,
    }
    console = Console(width=140, file=io.StringIO())
    console.print(render_problems(found))
    shown = console.file.getvalue()
    assert "56 problems" in shown
    assert "and 45 more" in shown
    assert "[9, 9, 1, 1]" in shown
    assert len(shown.splitlines()) < 60


def test_a_table_of_problems_shows_no_control_characters(tmp_path):
    found = problems(folder(tmp_path, with_smear("4\x1b[31m,a.png,{'healthy'},P9")))
    console = Console(width=140, file=io.StringIO(), force_terminal=False)
    console.print(render_problems(found))
    assert "\x1b" not in console.file.getvalue()
    assert "\\x1b" in console.file.getvalue()


def test_a_task_without_a_class_is_reported_with_its_label_and_how_to_remove_it(tmp_path):
    marks = {name: {"special_characteristics": [name]} for name in ("Mitosis", "None")}
    tasks = TASKS | {"mitosis": Task(level="cell", positive=marks["Mitosis"], negative=marks["None"])}
    (first, second) = problems(folder(tmp_path), tasks)[:2] + problems(folder(tmp_path), TASKS | {
        "healthy": Task(level="smear", positive={"diagnosis": ["Healthy"]}, negative={"diagnosis": ["aml"]})
    })[:1]  # fmt: skip
    assert (first.file, first.column, first.value) == (
        "labeled_cells.csv",
        "specialCharacteristics",
        "Mitosis",
    )
    assert "mitosis" in first.expected
    assert "remove mitosis from tasks and ensembles.*.members" in first.fix
    assert "did you mean 'healthy'" in second.expected
    assert second.file == "wsi.csv"


def test_patients_without_cells_do_not_count_in_a_task_on_patients(tmp_path):
    """P1 and P3 have cells, P2, the only one with another AML, has none."""
    apl = {"level": "patient", "positive": {"diagnosis": ["apl"]}}
    fine = read(folder(tmp_path), {"apl_healthy": Task(**apl, negative={"diagnosis": ["healthy"]})})
    assert fine.report["tasks"]["apl_healthy"] == {"positive": 1, "negative": 1, "no_part": 0}
    (found, *_) = problems(tmp_path, {"apl_aml": Task(**apl, negative={"diagnosis": ["aml"]})})
    assert "at least one negative patient with cells for the task apl_aml" in found.expected


def test_a_class_that_is_empty_after_images_are_left_out_is_reported(tmp_path):
    folder(tmp_path)
    (tmp_path / "wsi/b.png").unlink()
    assert "apl_aml" in problems(tmp_path, skip_bad_images=True)[0].expected


# --- rules ------------------------------------------------------------------------------------------

FIELDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "1",
            "2",
            "3",
            "1.0",
            "a.png",
            "b.png",
            "../a.png",
            "P1",
            "nan",
            '"',
            "{",
            "{'healthy'}",
            "{'aml'}",
            "{'None'}",
            "[0,0,0",
        ]
    ),
    st.sampled_from(["", "{'aml', 'm3'}", "[0, 0, 30, 30]", "[-9, 1, 20, 99]", "[1, 1, 2, 2]"]),
    st.sampled_from(
        ["p1", "\u04201", "P01", "1.2E+05", "#N/A", '="1"', "[0.1, 0.2, .3, 1e9]", "[1E1, 2, 30.0, 40]"]
    ),
)


@st.composite
def tables(draw, columns: list[str]) -> bytes:
    """A CSV file: nearly right, or any text at all."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
    header = draw(st.permutations(columns)) if draw(st.booleans()) else columns
    header = [*header, *draw(st.lists(st.sampled_from([*columns, "x", ""]), max_size=1))]
    rows = draw(st.lists(st.lists(FIELDS, min_size=len(header), max_size=len(header)), max_size=5))
    table, delimiter = io.StringIO(), draw(st.sampled_from(",;\t|"))
    csv.writer(table, delimiter=delimiter).writerows([header, *rows])
    first = draw(st.sampled_from(["", "", f"sep={delimiter}\r\n", "sep=\n", 'sep="\n']))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le"]))
    return (first + table.getvalue()).encode(encoding, "replace")


GOOD_SMEARS = st.just(SMEARS.encode())
GOOD_CELLS = st.just(CELLS.encode())
COLUMNS = ["id", "wsi", "bbox", "cellType", "specialCharacteristics"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tables(["id", "imgName", "label", "patient"]) | GOOD_SMEARS,
    tables(COLUMNS) | GOOD_CELLS | st.none(),
    st.booleans(),
    st.booleans(),
)
def test_any_text_gives_a_data_set_or_its_problems(tmp_path, smears, cells, labelled, skip):
    (tmp_path / "labeled_cells.csv").unlink(missing_ok=True)
    folder(tmp_path, smears, cells)
    try:
        found = read(tmp_path, {}, labelled=labelled, skip_bad_images=skip)
    except DataSetError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert refused.problems
        Console(file=io.StringIO()).print(render_problems(refused.problems))
        assert len(str(refused).splitlines()) >= len(refused.problems)
        return
    json.dumps(found.report)
    write_table(tmp_path / "cells.out", found.cells)
    assert read_table(tmp_path / "cells.out").to_numpy().tolist() == found.cells.to_numpy().tolist()
    for cell in found.cells.merge(found.smears[["smear", "image"]], on="smear").itertuples():
        crop = read_image(tmp_path / cell.image)[cell.y0 : cell.y1, cell.x0 : cell.x1]
        assert crop.shape == (cell.y1 - cell.y0, cell.x1 - cell.x0, 3)
        assert min(crop.shape[:2]) >= 8


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.lists(st.text(string.printable, max_size=8), max_size=2))
def test_problems_do_not_depend_on_the_order_of_rows(tmp_path, shuffle, ids):
    """Row numbers aside."""
    rows = [
        ["3", "c.png", "{'aml'}", "P3"],
        ["1", "a.png", "{'cml'}", "P1"],
        ["1", "b.png", "{'healthy'}", "P3"],
    ]
    rows += [[text, "d.png", "{'m2'}", "P4"] for text in ids]
    seen = set()
    for _ in range(2):
        table = io.StringIO()
        csv.writer(table).writerows([["id", "imgName", "label", "patient"], *rows])
        found = problems(folder(tmp_path, table.getvalue(), None), {})
        seen.add(tuple(sorted((one.column, one.value, one.fix) for one in found)))
        shuffle.shuffle(rows)
    assert len(seen) == 1


# --- real data --------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "kaggle_rows").exists(), reason="the rows of the Kaggle set are not here")
def test_the_real_rows_give_the_published_counts(tmp_path):
    text = (SHARED / "kaggle_rows/labeled_cells.csv").read_text()
    used = sorted({row["wsi"] for row in csv.DictReader(io.StringIO(text))}, key=int)
    smears = "id,imgName,label\n" + "".join(f"{smear},{smear}.png,\"{{'aml', 'm3'}}\"\n" for smear in used)
    folder(tmp_path, smears, text)
    for number, smear in enumerate(used):
        field = np.zeros((1920, 2560), bool)
        field[0, :number] = True
        Image.fromarray(field).save(tmp_path / "wsi" / f"{smear}.png", compress_level=1)
    report = read(tmp_path, {}, min_box=2, check_images=False).report
    left = report["left_out"]
    assert left["cells_without_box"]["count"] == left["cells_with_box_under_min_box"]["count"] == 1
    assert report["cells"] == 7186 - 2
    assert report["unknown_labels"] == {}
    types = report["labels"]["cell_type"]
    assert (types["Promyelocyte"], types["Myeloblast"], types["Erythroblast"]) == (611, 201, 154)
    assert (types["Plasma cell"], types["erythrocyte"], types["Lymphoblast"]) == (2, 2, 6)
    assert report["cells_with_type"] == 1073
    assert report["labels"]["special_characteristics"] == {
        "Auer rods": 68, "Bilobed": 5, "Faggot cell": 24, "Mitosis": 5, "None": 998,
    }  # fmt: skip


@pytest.mark.skipif(not (SHARED / "deepapl_discovery").exists(), reason="the DeepAPL cells are not here")
def test_the_real_smears_are_read():
    report = read(SHARED / "deepapl_discovery", {}, check_images=False).report
    assert (report["smears"], report["patients"], report["cells"]) == (93, 82, 12107)
    assert report["labels"]["cell_type"]["Promyelocyte"] == 508
