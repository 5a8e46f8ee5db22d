"""`aplsmear ask`: the cells that are worth a label, and the way of the answers back into the data set."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import annotated
from aplsmear.cli import app
from aplsmear.exchange.asking import least_sure, open_cells
from aplsmear.params import Task
from aplsmear.tables import write_table

ROOT = Path(__file__).parents[2]
ROWS, COLUMNS, SIDE = 3, 6, 20  # cells of a picture
TYPED = {"Myeloblast": 0.9, "Lymphocyte": 0.1}
LABELS = ["cell_type", "special_characteristics", "object_type", "quality"]


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def test_the_least_sure_cells_come_first_and_no_patient_has_most_of_them():
    logit = np.array([0.1, -0.2, 0.3, -0.4, 5.0, 0.5, -6.0])
    patient = np.array(["A", "A", "A", "A", "B", "B", "C"])
    assert least_sure(logit, patient, 3).tolist() == [0, 1, 5]
    assert least_sure(logit, patient, 6).tolist() == [0, 1, 5, 4, 6, 2]
    assert sorted(least_sure(logit, patient, 50)) == list(range(7))


def test_cells_with_a_label_or_of_another_diagnosis_are_not_asked_about():
    rows = [("", "", "", "apl"), ("", "", "Cell", "aml"), ("Myeloblast", "", "Cell", "apl")]
    rows += [("", "", "Smudge", "apl"), ("", "", "", "healthy"), ("", "Auer rods", "", "apl")]
    cells = pd.DataFrame(rows, columns=[*LABELS[:3], "diagnosis"]).assign(smear="1")
    blasts = {"cell_type": ["Myeloblast"], "diagnosis": ["apl", "aml"]}
    task = Task(level="cell", positive=blasts, negative={"cell_type": ["*"], "diagnosis": ["apl", "aml"]})
    assert open_cells(cells, task).tolist() == [True, True, False, False, False, True]
    assert not open_cells(cells.assign(smear=""), task).any()  # pictures of single cells


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace after `tune`: six patients, in whose pictures two of three rows of cells have no type."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    smears, cells, scores = [], [], []
    rng = np.random.default_rng(1)
    for number in range(6):
        patient = f"P{number}"
        annotated.picture(Path(f"data/wsi/{patient}.png"), number)
        smears.append([patient, f"{patient}.png", "{'aml', 'm2'}", patient])
        for row in range(ROWS):
            for column in range(COLUMNS):
                kind = ["Myeloblast", "Lymphocyte"][column % 2] if row == 0 else ""
                y, x = 30 * row, 30 * column
                cells.append(
                    [f"{patient}-{row}{column}", patient, f"[{y}, {x}, {y + SIDE}, {x + SIDE}]", kind]
                )
                own = TYPED.get(kind, 0.5 if column < 2 else 0.99)  # two cells of each row are unclear
                scores.append([number % 3, *(own + rng.uniform(-0.01, 0.01, 4))])
    table = pd.DataFrame(cells, columns=["id", "wsi", "bbox", "cellType"])
    write_table(Path("data/wsi.csv"), pd.DataFrame(smears, columns=["id", "imgName", "label", "patient"]))
    written = table.assign(cellType=[f"{{'{kind}'}}" if kind else "" for kind in table["cellType"]])
    write_table(Path("data/labeled_cells.csv"), written)
    indexed = {"cell": table["id"], "smear": table["wsi"], "patient": table["wsi"], "diagnosis": "aml"}
    indexed |= {"cell_type": table["cellType"], **dict.fromkeys(LABELS[1:], "")}
    write_table(Path("dataset/cells.csv"), pd.DataFrame(indexed))
    outer = pd.DataFrame(scores, columns=["fold", *(f"outer_{n}" for n in range(4))])
    outer = outer.assign(fold=outer["fold"].astype(int), item=table["id"], patient=table["wsi"])
    Path("tuned/blast").mkdir(parents=True)
    outer.to_parquet("tuned/blast/scores.parquet")
    return tmp_path


def answer_label_studio(answers: dict[str, str]) -> Path:
    """What Label Studio exports after the work: predictions have become annotations."""
    tasks = json.loads(Path("asked/tasks.json").read_text())
    for task in tasks:
        assert task["data"]["image"].startswith("/data/local-files/?d=wsi/P")
        assert "annotations" not in task  # else the program counts it as done
        results = task["predictions"][0]["result"]
        for result in results:
            result["value"]["rectanglelabels"] = [answers.get(result["meta"].pop("id"), "Cell")]
        task["annotations"] = [{"result": results}]
    Path("answers.json").write_text(json.dumps(tasks))
    return Path("answers.json")


def answer_qupath(answers: dict[str, str]) -> Path:
    for path in Path("asked/qupath").glob("*.geojson"):
        content = json.loads(path.read_text())
        for feature in content["features"]:
            label = answers.get(feature["properties"]["metadata"]["id"], "Cell")
            feature["properties"]["classification"]["name"] = label
        path.write_text(json.dumps(content))
    return Path("asked/qupath")


@pytest.mark.parametrize("answered", [answer_label_studio, answer_qupath])
def test_the_answers_about_asked_cells_are_labels_of_a_new_version_of_the_data_set(finished, answered):
    said = run("ask", "--task", "blast", "--cells", 4, "--to", "asked")
    assert "4 cells of" in said
    assert "Lymphocyte" in said
    asked = pd.read_csv("asked/cells.csv", dtype=str)["cell"].tolist()
    assert len(asked) == 4
    assert all(cell[-2] != "0" for cell in asked)
    assert '<Label value="Myeloblast"/>' in Path("asked/config.xml").read_text()
    answers = {asked[0]: "Myeloblast", asked[1]: "Smudge"}  # nobody has answered about the others
    run("import", answered(answers), "--update", "data", "--to", "data2")
    before, after = (
        pd.read_csv(f"{name}/labeled_cells.csv", dtype=str, keep_default_na=False).set_index("id")
        for name in ("data", "data2")
    )
    assert after.loc[asked[0], ["cellType", "objectType"]].tolist() == ["{'Myeloblast'}", "{'Cell'}"]
    assert after.loc[asked[1], ["cellType", "objectType"]].tolist() == ["", "{'Smudge'}"]
    same = ~after.index.isin(answers)
    assert after[same][before.columns].equals(before[same])
    assert not after[same]["objectType"].any()
    assert Path("data/wsi.csv").read_bytes() == Path("data2/wsi.csv").read_bytes()
    assert Path("data2/wsi/P0.png").read_bytes() == Path("data/wsi/P0.png").read_bytes()


def test_a_box_that_is_no_cell_of_the_data_set_is_left_out(finished):
    Path("boxes.csv").write_text("picture,x0,y0,x1,y1,label\nP0.png,1,31,21,50,PMO\nP0.png,11,41,31,61,PMO\n")
    said = run("import", "boxes.csv", "--update", "data", "--to", "data2")
    assert "1 boxes that are no cell of data: P0.png" in said
    after = pd.read_csv("data2/labeled_cells.csv", dtype=str).set_index("id")
    assert after.loc["P0-10", "cellType"] == "{'Promyelocyte'}"


def test_a_question_that_makes_no_sense_is_refused(finished):
    assert "did you mean 'blast'" in run("ask", "--task", "blasts", "--to", "asked", code=1)
    assert "does not use labels of cells" in run("ask", "--task", "apl_aml_cell", "--to", "asked", code=1)
    assert "`dvc repro tune@auer_rod`" in run("ask", "--task", "auer_rod", "--to", "asked", code=1)
    assert "nothing is overwritten" in run("ask", "--task", "blast", "--to", "data", code=1)
    words = ("import", "data/wsi", "--update", "data", "--to", "data2")
    assert "leave out" in run(*words, "--diagnosis", "aml", code=1)
    cells = pd.read_csv("dataset/cells.csv", keep_default_na=False)
    write_table(Path("dataset/cells.csv"), cells.assign(cell_type="Myeloblast"))
    assert "nothing to ask about" in run("ask", "--task", "blast", "--to", "asked", code=1)
    assert not Path("asked").exists()
