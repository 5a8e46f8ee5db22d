"""What is exported is read by other programs, and becomes the same tables when it is imported again."""

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import annotated
from aplsmear.cli import app
from aplsmear.data.labels import CELL_TYPES, CHARACTERISTICS, OBJECT_TYPES, QUALITIES
from aplsmear.exchange import export, importing, sources
from aplsmear.exchange.classes import known_classes, literal, meaning_of
from aplsmear.tables import write_table

KINDS = list(export.WRITERS)
KNOWN = known_classes()
SMEARS = [("17", "deep/a.png", "{'aml', 'm3'}", "P1", "Ulm"), ("x", "b.png", "{'healthy'}", "P2", "")]
# Classes that are types of their own names: those that the forms without attributes can give back.
PLAIN = [kind for kind in CELL_TYPES if meaning_of(kind, KNOWN) == (kind, "", "Cell")]


def boxes() -> st.SearchStrategy[str]:
    sides = [st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True).map(sorted) for n in (100, 200)]
    return st.tuples(*sides).map(lambda yx: str([yx[0][0], yx[1][0], yx[0][1], yx[1][1]]))


def labels(words: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.sets(st.sampled_from(words), max_size=2).map(lambda some: literal("|".join(sorted(some))))


CELLS = st.lists(
    st.tuples(
        st.sampled_from(["17", "x"]), boxes(), labels(CELL_TYPES), labels(CHARACTERISTICS),
        labels(OBJECT_TYPES), labels(QUALITIES),
    ),
    min_size=1, max_size=6,
)  # fmt: skip
PLAIN_CELLS = st.lists(
    st.tuples(
        st.sampled_from(["17", "x"]), boxes(), st.sampled_from(PLAIN).map(literal), st.just(""),
        st.just("{'Cell'}"), st.just(""),
    ),
    min_size=1, max_size=6,
)  # fmt: skip
SMEAR_TITLES = ["id", "imgName", "label", "patient", "site"]
TITLES = ["wsi", "bbox", "cellType", "specialCharacteristics", "objectType", "segmentationQuality"]


def data_set(folder: Path, cells: list[tuple[str, ...]]) -> Path:
    """A data set of two pictures."""
    for seed, name in enumerate(("deep/a.png", "b.png")):
        if not (folder / "wsi" / name).exists():
            annotated.picture(folder / "wsi" / name, seed)
    write_table(
        folder / "wsi.csv", pd.DataFrame(SMEARS, columns=["id", "imgName", "label", "patient", "site"])
    )
    table = pd.DataFrame(cells, columns=TITLES)
    table.insert(0, "id", [f"c{number}" for number in range(len(table))])
    write_table(folder / "labeled_cells.csv", table)
    return folder


def again(folder: Path, kind: str, place: Path) -> importing.Plan:
    """The tables after an export and an import."""
    to = place / ("out" if kind in ("geojson", "yolo") else "out.json")
    export.export(folder, kind, to)
    images = None if kind == "yolo" else folder / "wsi"
    found, root = sources.read_source(to, KNOWN, images=images)
    facts = importing.FactSources(table=folder / "wsi.csv")
    return importing.planned(found, root, KNOWN, facts, keep_unknown=False)


def rows(table: pd.DataFrame, titles: list[str]) -> list[tuple[str, ...]]:
    return sorted(map(tuple, table.reindex(columns=titles, fill_value="").to_numpy().tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_import_of_an_export_gives_the_same_tables(kind, tmp_path_factory):
    plain = kind == "yolo"  # which has no room for more than a box and a class
    base = tmp_path_factory.mktemp("base")

    @settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(cells=PLAIN_CELLS if plain else CELLS)
    def same(cells: list[tuple[str, ...]]) -> None:
        plan = again(data_set(base, cells), kind, tmp_path_factory.mktemp("out"))
        titles = TITLES if plain else ["id", *TITLES]
        expected = [cell if plain else (f"c{n}", *cell) for n, cell in enumerate(cells)]
        assert rows(plan.cells, titles) == sorted(expected)
        assert rows(plan.smears, SMEAR_TITLES) == sorted(SMEARS)

    same()


def test_a_class_that_was_corrected_in_the_other_program_is_the_class_after_the_import(tmp_path):
    cells = [
        ("17", "[10, 20, 50, 80]", "{'Blast'}", "{'Auer rods'}", "{'Cell'}", "{'Good'}"),
        ("x", "[1, 2, 30, 40]", "{'Blast'}", "", "{'Cell'}", ""),
    ]
    folder = data_set(tmp_path / "data", cells)
    export.export(folder, "geojson", tmp_path / "out")
    for name, label in (("deep/a", "Promyelocyte"), ("b", "Smudge")):
        path = tmp_path / "out" / f"{name}.png.geojson"
        path.write_text(path.read_text().replace('"name": "Blast"', f'"name": "{label}"'))
    found, root = sources.read_source(tmp_path / "out", KNOWN, images=folder / "wsi")
    facts = importing.FactSources(table=folder / "wsi.csv")
    table = importing.planned(found, root, KNOWN, facts, keep_unknown=False).cells
    assert rows(table, TITLES[2:]) == [
        ("", "", "{'Smudge'}", ""),
        ("{'Promyelocyte'}", "{'Auer rods'}", "{'Cell'}", "{'Good'}"),
    ]


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["export", *map(str, words)])
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_exported_where_the_program_looks_for_them(kind, tmp_path):
    cells = [("17", "[10, 20, 50, 80]", "{'Blast'}", "", "", ""), ("x", "[1, 2, 30, 40]", "", "", "", "")]
    folder = data_set(tmp_path / "data", cells)
    scores = tmp_path / "scores.csv"
    scores.write_text("cell,evidence_apl_aml\nc0,0.25\n")
    to = tmp_path / "out"
    said = run(folder, "--format", kind, "--to", to, "--predictions", scores, "--score", "evidence_apl_aml")
    assert "2 cells in 2 pictures, 1 with a score" in said
    if kind == "geojson":
        feature = json.loads((to / "deep" / "a.png.geojson").read_text())["features"][0]
        assert feature["properties"]["measurements"] == {"evidence_apl_aml": 0.25}
        assert feature["geometry"]["coordinates"] == [[[20, 10], [80, 10], [80, 50], [20, 50], [20, 10]]]
    elif kind == "coco":
        written = json.loads(to.read_text())
        assert [one.get("score") for one in written["annotations"]] == [0.25, None]
        assert [one["name"] for one in written["categories"]] == ["Blast", "Cell"]
    elif kind == "label-studio":
        first, second = json.loads(to.read_text())
        assert first["predictions"][0]["result"][0]["score"] == 0.25
        assert "predictions" not in second
    else:
        assert (to / "labels" / "deep" / "a.txt").read_text() == "0 0.25 0.3 0.3 0.4 0.25\n"
        assert (to / "images" / "b.png").exists()


def test_an_export_says_what_is_wrong_and_overwrites_nothing(tmp_path):
    folder = data_set(tmp_path / "data", [("17", "[10, 20, 50, 80]", "{'Blast'}", "", "", "")])
    scores = tmp_path / "scores.csv"
    scores.write_text("item,probability\nother,0.25\n")
    to = tmp_path / "out.json"
    words = (folder, "--format", "coco", "--to", to)
    assert "No cell" in run(*words, "--predictions", scores, code=1)
    assert "needs the columns" in run(*words, "--predictions", scores, "--score", "none", code=1)
    run(*words)
    assert "nothing is overwritten" in run(*words, code=1)
    smears = (folder / "wsi.csv").read_text()
    for name, said in (("../b.png", "outside the folder"), ("deep/a.tif", "differ only in their ending")):
        (folder / "wsi.csv").write_text(smears.replace("b.png", name))
        (folder / "wsi" / "deep" / "a.tif").write_bytes((folder / "wsi" / "deep" / "a.png").read_bytes())
        assert said in run(folder, "--format", "yolo", "--to", tmp_path / f"to{len(name)}" / "in", code=1)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".txt"] == []
    (folder / "wsi.csv").write_text(smears)
    (folder / "labeled_cells.csv").write_text("id,imgName\n1,x.png\n")
    assert "no boxes to export" in run(folder, "--format", "coco", "--to", tmp_path / "new.json", code=1)
