"""With `dataset.pseudonymise`, no name of a patient or picture is in an out, a report or a log."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.data.pseudonyms import Pseudonyms, read_key
from aplsmear.errors import UserError
from aplsmear.images.view_store import read_views
from aplsmear.sources.drawn import draw_data_set
from aplsmear.tables import read_table

ROOT = Path(__file__).parents[2]
NAME = "Meyer"
KEY = {"APLSMEAR_PSEUDONYM_KEY": "0123456789abcdef0123456789abcdef"}


def renamed(path: Path, change) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [head, *[change(dict(zip(head, row, strict=True))).values() for row in rows]]
        )


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """A workspace whose data set has a name of a person in every place that can contain one."""
    here = tmp_path_factory.mktemp("named")
    draw_data_set(here / "data", 9, 3, size=(160, 200), cells_per_smear=3)

    def smear(row: dict) -> dict:
        new = f"{NAME} {row['id']}.jpg"
        with Image.open(here / "data" / "wsi" / row["imgName"]) as picture:
            exif = picture.getexif()
            exif[0x013B] = exif[0x010E] = f"{NAME}, Anna"  # artist, description
            picture.save(here / "data" / "wsi" / new, exif=exif, comment=NAME.encode())
        (here / "data" / "wsi" / row["imgName"]).unlink()
        return row | {"id": f"{NAME}_{row['id']}", "imgName": new, "patient": f"{NAME} {row['patient']}"}

    renamed(here / "data" / "wsi.csv", smear)
    renamed(
        here / "data" / "labeled_cells.csv",
        lambda row: row | {"id": f"{NAME}-{row['id']}", "wsi": f"{NAME}_{row['wsi']}"},
    )
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["dataset"]["pseudonymise"], params["split"]["folds"] = True, 3
    params["augment"] |= {"views": 1, "size": {"cell": 32, "smear": 32}, "extra_views": {}}
    params["tasks"] = {"blast": params["tasks"]["apl_aml_smear"]}
    params |= {"task": "blast", "overrides": {"blast": {}}}
    params["combine"]["shares"] = []
    for ensemble in params["ensembles"].values():
        ensemble |= {"members": ["blast"], "weigh_by": "blast"}
    (here / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return here


@pytest.fixture
def workspace(named, tmp_path) -> Path:
    return Path(shutil.copytree(named, tmp_path / "workspace"))


def stage(name: str, workspace: Path, environment: dict[str, str]) -> tuple[int, str]:
    known = {key: value for key, value in os.environ.items() if key not in KEY}
    ended = subprocess.run(
        [sys.executable, "-P", ROOT / "stages" / f"{name}.py"],
        cwd=workspace,
        env=known | {"PYTHONPATH": str(ROOT / "src")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_no_name_and_no_metadata_is_in_outs_or_messages_of_the_stages(workspace):
    for name in ("download", "split", "augment"):
        code, output = stage(name, workspace, KEY)
        assert code == 0, output
        assert NAME not in output
    outs = [path for path in workspace.rglob("*") if path.is_file() and "data" not in path.parts]
    assert {path.name for path in outs} >= {"smears.csv", "cells.csv", "folds.csv", "views.parquet"}
    for path in outs:
        content = path.read_bytes()
        for secret in (NAME, NAME.lower(), NAME.upper(), *KEY.values()):
            assert secret.encode() not in content, path
            assert secret.encode("utf-16-le") not in content, path
    smears, cells = (read_table(workspace / "dataset" / f"{name}.csv") for name in ("smears", "cells"))
    names = Pseudonyms(*KEY.values())
    assert set(cells["smear"]) <= set(smears["smear"])
    assert names.of("patient", f"{NAME} P3-001") in set(smears["patient"])
    pictures = [
        view.image for batch in read_views(workspace / "augmented/smear/views.parquet", 9) for view in batch
    ]
    assert len(pictures) == 2 * len(smears)
    for picture in pictures:
        assert b"Exif" not in picture


def test_only_the_stages_that_replace_names_read_the_data_set():
    written = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    stages = {name: stage.get("do", stage) for name, stage in written.items()}
    reading = {name for name, stage in stages.items() if "${dataset.root}" in stage["deps"]}
    replacing = {name for name, stage in stages.items() if "dataset.pseudonymise" in stage.get("params", [])}
    assert reading == replacing == {"download", "augment", "evaluate"}


def test_problems_of_the_data_set_are_reported_by_row_and_pseudonym(workspace):
    table = workspace / "data" / "wsi.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1].replace("{'healthy'}", "{'health'}").replace("{'aml'", "{'alm'")
    lines += [
        lines[2],
        f"{NAME}_new,../{NAME}.jpg,{{'healthy'}},{NAME} P3-001",
        f"x,{NAME} none.jpg,,{NAME} P1",
    ]
    table.write_text("\n".join(lines), encoding="utf-8")
    code, output = stage("download", workspace, KEY)
    assert code == 1
    assert "Traceback" not in output
    assert NAME not in output
    for what in ("an id that no other row has", "a file name inside the folder", "no such file"):
        assert what in " ".join(output.split()), output


def test_a_picture_that_is_damaged_later_is_named_by_its_pseudonym(workspace):
    assert stage("download", workspace, KEY)[0] == 0
    first = min((workspace / "data" / "wsi").iterdir())
    first.write_bytes(first.read_bytes()[:200])
    code, output = stage("augment", workspace, KEY)
    assert code == 1
    assert NAME not in output
    assert Pseudonyms(*KEY.values()).of("image", f"wsi/{first.name}") in output


def test_without_its_key_a_stage_says_how_to_make_one_and_does_nothing(workspace):
    code, output = stage("download", workspace, {})
    assert (code, (workspace / "dataset").exists()) == (1, False)
    assert "secrets.token_hex(32)" in output
    code, output = stage("download", workspace, {"APLSMEAR_PSEUDONYM_KEY": "short"})
    assert code == 1
    assert "fewer than 16" in output
    assert "short" not in output
    (workspace / ".pseudonym-key").write_text("a" * 40 + "\n")
    assert stage("download", workspace, {})[0] == 0
    code, output = stage("augment", workspace, KEY)  # another one
    assert code == 1
    assert "is not the one" in output


def test_with_the_key_the_names_can_be_found_again(workspace, monkeypatch):
    assert stage("download", workspace, KEY)[0] == 0
    monkeypatch.chdir(workspace)
    for variable, key in KEY.items():
        monkeypatch.setenv(variable, key)
    shown = CliRunner().invoke(app, ["names", "data"])
    rows = list(csv.DictReader(shown.stdout.splitlines()))
    assert all(NAME in row["name"] for row in rows)
    smears, cells = (read_table(workspace / "dataset" / f"{name}.csv") for name in ("smears", "cells"))
    for kind, used in (("patient", smears["patient"]), ("smear", smears["smear"]), ("cell", cells["cell"])):
        assert set(used) <= {row["pseudonym"] for row in rows if row["kind"] == kind}
    assert set(smears["image"]) == {row["pseudonym"] for row in rows if row["kind"] == "image"}


def test_equal_names_have_equal_pseudonyms_only_under_one_key_and_kind(tmp_path):
    one, other = Pseudonyms("k" * 16), Pseudonyms("q" * 16)
    assert one.of("patient", "A") == one.of("patient", "A") != other.of("patient", "A")
    assert one.of("patient", "A")[1:] != one.of("smear", "A")[1:]
    assert one.of("patient", "") == ""
    with pytest.raises(UserError, match="there is neither"):
        read_key({}, tmp_path)
    (tmp_path / ".pseudonym-key").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="cannot be read"):
        read_key({}, tmp_path)


def test_git_ignores_the_key():
    command = ("git", "check-ignore", "--quiet", ".pseudonym-key")
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
