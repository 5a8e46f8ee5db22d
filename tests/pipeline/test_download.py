"""The stage `download`, run as dvc runs it, and the command `aplsmear check`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.tables import read_table

REPOSITORY = Path(__file__).parents[2]
SMEARS = """id,imgName,label
1,1.png,{'healthy'}
2,2.png,"{'aml', 'm1'}"
3,3.png,"{'aml', 'm3'}"
"""
CELLS = """id,wsi,cellType,specialCharacteristics,bbox
1,1,{'Lymphocyte'},{'None'},"[0, 0, 30, 30]"
2,2,{'Myeloblast'},{'None'},"[0, 0, 30, 30]"
3,3,{'Promyelocyte'},"{'Auer rods', 'Faggot cell'}","[0, 0, 30, 99]"
4,3,{'Promyelocyte'},{'None'},
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with the repository's params.yaml and a small data set."""
    (tmp_path / "data/wsi").mkdir(parents=True)
    for number in (1, 2, 3):
        Image.new("RGB", (64, 48), (number, 90, 150)).save(tmp_path / f"data/wsi/{number}.png")
    (tmp_path / "data/wsi.csv").write_text(SMEARS)
    (tmp_path / "data/labeled_cells.csv").write_text(CELLS)
    (tmp_path / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", REPOSITORY / "stages/download.py"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_stage_writes_the_same_tables_twice(place):
    written = []
    for _ in range(2):
        done = stage()
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "3 smears of 3 patients, 3 cells"
        assert "no patient column: each smear counts as a patient" in done.stdout
        written.append({path.name: path.read_bytes() for path in (place / "dataset").iterdir()})
    assert written[0] == written[1]
    assert sorted(written[0]) == ["cells.csv", "levels.csv", "report.json", "smears.csv"]
    assert read_table(place / "dataset/cells.csv")["special_characteristics"].tolist() == [
        "None",
        "None",
        "Auer rods|Faggot cell",
    ]


def test_the_stage_lists_all_problems_and_writes_nothing(place):
    (place / "data/wsi/2.png").unlink()
    (place / "data/wsi.csv").write_text(SMEARS.replace("healthy", "helthy"))
    done = stage()
    assert done.returncode == 1
    assert "2 problems" in done.stderr
    assert "helthy" in done.stderr
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "dataset").exists()


def check(*arguments: str):
    return CliRunner().invoke(app, ["check", *arguments])


def test_check_shows_the_contents_of_a_folder(place):
    done = check("data")
    assert done.exit_code == 0, done.output
    assert re.search(r"patients +3 ", done.output)
    for shown in (
        "task auer_rod",
        "cells without a box: 1",
        "1 boxes cut",
        "no patient column",
    ):
        assert shown in done.output


def test_check_requires_the_labels_of_the_tasks_of_params_yaml_if_there_is_one(place):
    (place / "data/labeled_cells.csv").unlink()
    done = check("data")
    assert done.exit_code == 1
    assert "auer_rod" in done.stderr
    (place / "params.yaml").rename("other.yaml")
    assert check("data").exit_code == 0


def test_check_reports_problems_of_params_yaml(place):
    params = yaml.safe_load((place / "params.yaml").read_text())
    params["dataset"]["rot"] = 1
    (place / "params.yaml").write_text(yaml.safe_dump(params))
    done = check("data")
    assert done.exit_code == 1
    assert "dataset.rot" in done.stderr


def test_demo_data_is_a_valid_data_set(place):
    made = CliRunner().invoke(app, ["demo-data", "drawn", "--patients", "3", "--seed", "2"])
    assert made.exit_code == 0, made.output
    (place / "params.yaml").unlink()
    assert check("drawn").exit_code == 0
    again = CliRunner().invoke(app, ["demo-data", "drawn", "--patients", "3"])
    assert again.exit_code == 1
    assert "drawn" in again.stderr
    assert (again.exception is None) or isinstance(again.exception, SystemExit)


def test_the_commands_explain_themselves_with_an_example():
    for command in ("check", "demo-data"):
        shown = CliRunner().invoke(app, [command, "--help"])
        assert shown.exit_code == 0
        assert f"aplsmear {command} /" in shown.output
