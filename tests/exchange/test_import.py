"""Annotations of other programs become a data set with the same boxes and classes."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import annotated
from aplsmear.cli import app

EXPECTED = [
    (Path(name).stem, f"[{y0}, {x0}, {y1}, {x1}]", f"{{'{label}'}}")
    for name, x0, y0, x1, y1, label in annotated.CELLS
]


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["import", *map(str, words)])
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return " ".join(done.output.split())


def table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def cells(folder: Path) -> list[tuple[str, ...]]:
    found = table(folder / "labeled_cells.csv")
    smear = found["wsi"].map(lambda name: Path(name).name)
    return sorted(zip(smear, found["bbox"], found["cellType"], strict=True))


@pytest.mark.parametrize("kind", annotated.ALL, ids=lambda kind: kind.__name__)
def test_boxes_of_each_program_are_found_out_and_read(kind, tmp_path):
    said = run(kind(tmp_path / "source"), "--to", tmp_path / "to")
    assert cells(tmp_path / "to") == sorted(EXPECTED)
    assert "Promyelocyte" in said
    assert re.search(r"patients +2 ", said)


def test_columns_of_any_title_are_named(tmp_path):
    path = annotated.csv_shares(tmp_path / "source")
    assert "no known columns of boxes; it has bild, mx" in run(path, "--to", tmp_path / "to", code=1)
    named = [word for what, title in annotated.TITLES.items() for word in ("--column", f"{what}={title}")]
    run(path, "--to", tmp_path / "to", "--format", "csv", *named)
    assert cells(tmp_path / "to") == sorted(EXPECTED)
    assert "no column 'nose'" in run(
        path, "--to", tmp_path / "x", "--format", "csv", "--column", "x0=nose", code=1
    )


def test_all_tables_of_a_folder_are_read_and_name_the_pictures_beside_them(tmp_path):
    for seed, part in enumerate(("train", "valid")):
        annotated.picture(tmp_path / "source" / part / "a.png", seed)
        rows = f"filename,x,y,w,h,class\na.png,{seed + 2},1,10,20,MYO\n"
        (tmp_path / "source" / part / "_annotations.csv").write_text(rows)
    run(tmp_path / "source", "--to", tmp_path / "to")
    found = table(tmp_path / "to" / "labeled_cells.csv")
    assert dict(zip(found["wsi"], found["bbox"], strict=True)) == {
        "train/a": "[1, 2, 21, 12]",
        "valid/a": "[1, 3, 21, 13]",
    }


def test_a_table_without_boxes_names_pictures_of_single_cells(tmp_path):
    folder = crops(tmp_path / "source", ["a.png", "b.png"])
    (folder / "labels.csv").write_text("image,label,patient\na.png,PMO,P1\nb.png,NGS,P2\n")
    run(folder, "--to", tmp_path / "to", "--diagnosis", "aml")
    assert [row[0] + row[2] for row in types(tmp_path / "to").values()] == [
        "P1{'Promyelocyte'}",
        "P2{'Segmented neutrophil'}",
    ]


def test_pictures_are_relative_links_or_copies_and_nothing_is_overwritten(tmp_path):
    path = annotated.csv(tmp_path / "source")
    run(path, "--to", tmp_path / "dry", "--dry-run")
    assert not (tmp_path / "dry").exists()
    run(path, "--to", tmp_path / "links")
    link = tmp_path / "links" / "wsi" / "a.png"
    assert not link.readlink().is_absolute()
    run(path, "--to", tmp_path / "copies", "--copy")
    assert (tmp_path / "copies" / "wsi" / "a.png").read_bytes() == link.read_bytes()
    before = {each: each.stat().st_mtime_ns for each in (tmp_path / "links").rglob("*")}
    assert "nothing is overwritten" in run(path, "--to", tmp_path / "links", code=1)
    assert before == {each: each.stat().st_mtime_ns for each in (tmp_path / "links").rglob("*")}


def test_an_unknown_class_is_listed_and_stops_the_import_until_it_is_mapped(tmp_path):
    path = annotated.csv(tmp_path / "source")
    path.write_text(path.read_text().replace("Lymphocyte", "Lympho_x"))
    assert "Unknown classes: 'Lympho_x'" in run(path, "--to", tmp_path / "to", code=1)
    assert not (tmp_path / "to").exists()
    own = tmp_path / "own.csv"
    own.write_text("class,cellType\nLympho_x,Lymphoblast\n")
    run(path, "--to", tmp_path / "mapped", "--classes", own)
    run(path, "--to", tmp_path / "kept", "--keep-unknown")
    assert {kind for *_, kind in cells(tmp_path / "mapped")} == {"{'Lymphoblast'}", "{'Promyelocyte'}"}
    assert {kind for *_, kind in cells(tmp_path / "kept")} == {"{'Lympho_x'}", "{'Promyelocyte'}"}


def test_patients_and_diagnoses_are_of_a_pattern_or_a_table(tmp_path):
    path = annotated.csv(tmp_path / "source")
    patients = tmp_path / "patients.csv"
    patients.write_text("Name,Diagnosis\na,APL\nb,healthy\n")
    run(
        path,
        "--to",
        tmp_path / "to",
        "--patient",
        r"(\w)\.png",
        "--table",
        patients,
        "--column",
        "patient=Name",
    )
    smears = table(tmp_path / "to" / "wsi.csv")
    assert smears[["label", "patient"]].to_numpy().tolist() == [["{'aml', 'm3'}", "a"], ["{'healthy'}", "b"]]
    for words, said in (
        (["--patient", r"(a)\.png"], "finds nothing in 1 paths: images/b.png"),
        (["--patient", "a"], "needs a group"),
        (["--patient", "("], "is no regular expression"),
        (["--diagnosis", "ill"], "Unknown diagnoses: ill"),
        (["--table", patients], "needs a column of pictures or patients"),
    ):
        assert said in run(path, "--to", tmp_path / "x", *words, code=1)


def test_a_table_with_two_rows_of_a_patient_is_refused_unless_they_say_the_same(tmp_path):
    path = annotated.csv(tmp_path / "source")
    patients = tmp_path / "patients.csv"
    words = (path, "--patient", r"(\w)\.png", "--table", patients, "--to")
    patients.write_text("patient,diagnosis,age\na,APL,1\na,APL,2\nb,AML,3\n")
    run(*words, tmp_path / "to")
    patients.write_text("patient,diagnosis\na,APL\na,AML\nb,AML\n")
    assert "more than one row for a" in run(*words, tmp_path / "x", code=1)
    path.write_text("filename,xmin,ymin,xmax,ymax,patient\na.png,1,1,9,9,P1\na.png,20,1,29,9,P2\n")
    assert "more than one patient for images/a.png" in run(path, "--to", tmp_path / "x", code=1)


def test_what_a_stopped_import_has_left_is_not_deleted(tmp_path):
    path = annotated.csv(tmp_path / "source")
    (tmp_path / "to.part").mkdir()
    assert "Delete it" in run(path, "--to", tmp_path / "to", code=1)
    assert (tmp_path / "to.part").exists()


def test_points_get_a_box_of_the_given_size_and_are_listed_without_one(tmp_path):
    folder = annotated.geojson(tmp_path / "source")
    path = folder / "b.png.geojson"
    content = json.loads(path.read_text())
    content["features"][0]["geometry"] = {"type": "MultiPoint", "coordinates": [[50, 40], [120, 60]]}
    path.write_text(json.dumps(content))
    assert "Left out: 2 points" in run(folder, "--to", tmp_path / "without")
    run(folder, "--to", tmp_path / "to", "--size", 20)
    assert [box for smear, box, _ in cells(tmp_path / "to") if smear == "b"] == [
        "[30, 40, 50, 60]",
        "[50, 110, 70, 130]",
    ]


def test_a_turned_box_of_label_studio_becomes_the_upright_box_around_it(tmp_path):
    """20 x 10 px, turned by 90 degrees about its upper left corner (100, 50): it lies left of it."""
    path = annotated.label_studio(tmp_path / "source")
    tasks = json.loads(path.read_text())
    value = {"x": 50, "y": 50, "width": 10, "height": 10, "rotation": 90, "rectanglelabels": ["Blast"]}
    tasks[1]["annotations"][0]["result"][0]["value"] = value
    path.write_text(json.dumps(tasks))
    run(path, "--to", tmp_path / "to")
    assert cells(tmp_path / "to")[-1] == ("b", "[50, 90, 70, 100]", "{'Blast'}")


def test_a_folder_with_two_kinds_asks_which_one(tmp_path):
    folder = annotated.kitti(tmp_path / "source")
    annotated.csv(folder)
    for name in ("a.png", "b.png"):
        (folder / "image_2" / name).unlink()
    said = run(folder, "--to", tmp_path / "to", code=1)
    assert "several kinds of annotations: csv (boxes.csv); kitti (a.txt, b.txt)" in said
    run(folder, "--to", tmp_path / "to", "--format", "kitti")
    assert cells(tmp_path / "to") == sorted(EXPECTED)


def test_annotations_without_their_picture_are_named(tmp_path):
    path = annotated.coco(tmp_path / "source")
    (tmp_path / "source" / "train2017" / "b.png").rename(tmp_path / "b.png")
    assert "no picture below" in run(path, "--to", tmp_path / "to", code=1)


def test_an_entity_bomb_is_refused(tmp_path):
    folder = annotated.voc(tmp_path / "source")
    levels = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    bomb = f'<!DOCTYPE a [<!ENTITY l0 "x">{levels}]><annotation><filename>&l9;</filename></annotation>'
    (folder / "Annotations" / "a.xml").write_text(bomb)
    assert "not valid XML" in run(folder, "--to", tmp_path / "to", code=1)


def crops(folder: Path, names: list[str]) -> Path:
    """Pictures of single cells, each another one."""
    for seed, name in enumerate(names):
        annotated.picture(folder / name, seed, (40, 40))
    return folder


def types(folder: Path) -> dict[str, tuple[str, ...]]:
    found = table(folder / "labeled_cells.csv").set_index("imgName")
    return {name: tuple(row) for name, row in found.drop(columns="id").iterrows()}


@pytest.mark.parametrize(
    ("names", "where"),
    [
        (["Promyelocytes/x1.png", "Band neutrophils/x2.png"], "from the folder"),
        (["PMO/0001-1000/x1.png", "NGB/0001-1000/x2.png"], "from the folder above"),
        (["PMO/PMO_1.png", "NGB/0001-1000/NGB_1.png"], "from the name of the file"),
    ],
)
def test_the_class_of_single_cells_is_where_most_classes_are_known(names, where, tmp_path):
    folder = crops(tmp_path / "source", names)
    assert where in run(folder, "--to", tmp_path / "to", "--diagnosis", "healthy")
    found = types(tmp_path / "to")
    assert [found[name][1] for name in names] == ["{'Promyelocyte'}", "{'Band neutrophil'}"]
    assert (tmp_path / "to" / "cells" / names[0]).is_symlink()


def test_copies_damaged_pictures_and_cells_of_two_types_or_patients_are_left_out_and_listed(tmp_path):
    names = ["P1/PMO/1.png", "P1/PMO/2.png", "P1/NGS/3.png", "P1/MYO/4.png", "P2/MYO/5.png", "P2/MYO/6.png"]
    folder = crops(tmp_path / "source", names)
    for original, copy in (("P1/PMO/1.png", "P1/PMO/copy.png"), ("P1/NGS/3.png", "P1/MYO/3.png")):
        (folder / copy).write_bytes((folder / original).read_bytes())
    (folder / "P2/MYO/4.png").write_bytes((folder / "P1/MYO/4.png").read_bytes())
    (folder / "P2/MYO/6.png").write_bytes((folder / "P2/MYO/6.png").read_bytes()[:100])
    said = run(folder, "--to", tmp_path / "to", "--patient", "(P.)", "--diagnosis", "aml")
    assert "Left out: 1 pictures that cannot be read: P2/MYO/6.png" in said
    assert "Left out: 1 copies of another picture: P1/PMO/copy.png" in said
    assert "Left out: 2 equal pictures under two classes: P1/MYO/3.png, P1/NGS/3.png" in said
    assert "Left out: 2 equal pictures of two patients: P1/MYO/4.png, P2/MYO/4.png" in said
    assert sorted(types(tmp_path / "to")) == ["P1/PMO/1.png", "P1/PMO/2.png", "P2/MYO/5.png"]


def test_the_published_layout_of_deepapl_is_read_whole(tmp_path):
    names = [
        "Patient_00/Signed slides/Promyelocyte/PMY_1.png",
        "Patient_00/Signed slides/Blast, no lineage spec/BL_2.png",
        "Patient_00/Unsigned slides/3.png",
        "Patient_01/10026417885/Signed slides/Smudge cells/SMU_4.png",
        "Patient_02/Signed slides/Promyelocyte/PMY_5.png",
        "Patient_09/Signed slides/Promyelocyte/PMY_6.png",
    ]
    folder = crops(tmp_path / "source" / "Data" / "All", names).parents[1]
    rows = ["Patient_ID,Diagnosis,Cohort", "Patient_00,APL,Discovery", "Patient_01,AML,Discovery"]
    rows += ["Patient_02,AML,Validation", "Patient_03,AML,Discovery"]
    (folder / "Data" / "master.csv").write_text("\n".join(rows))
    said = run(folder, "--to", tmp_path / "to", "--cohort", "Discovery")
    found = types(tmp_path / "to")
    apl = ("Patient_00", "{'aml', 'm3'}")
    assert found[names[0]] == (*apl, "{'Promyelocyte'}", "{'Cell'}")
    assert found[names[1]] == (*apl, "{'Myeloblast'}", "{'Cell'}")
    assert found[names[3]] == ("Patient_01", "{'aml'}", "", "{'Smudge'}")
    assert len(found) == 3
    for left in (
        "1 pictures of unsigned slides", "1 pictures of another cohort",
        "1 pictures of patients outside master.csv", "1 patients of master.csv without pictures: Patient_03",
    ):  # fmt: skip
        assert f"Left out: {left}" in said
    run(folder, "--to", tmp_path / "more", "--unsigned")
    assert len(types(tmp_path / "more")) == 5
    assert "has no cohort 'None'" in run(folder, "--to", tmp_path / "x", "--cohort", "None", code=1)
