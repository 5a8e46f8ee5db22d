"""The command `aplsmear`: help with examples, and errors as messages."""

import os
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from aplsmear.cli import app

COMMANDS = sorted(get_command(app).commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert f"Example: aplsmear {name}" in done.output


@pytest.mark.parametrize(
    "words",
    [
        ["check", "nowhere"],
        ["cells", "nowhere"],
        ["compare", "a", "b"],
        ["demo-data", "file"],
        ["export", "nowhere", "--format", "coco", "--to", "boxes.json"],
        ["import", "nowhere", "--to", "imported"],
        ["names", "nowhere"],
        ["null-check", "--ensemble", "apl_aml"],
        ["predict", "--ensemble", "nowhere", "--data", "nowhere", "--out", "new.csv"],
        ["profile", "nonsense"],
        ["share-check"],
        ["tidy"],
        ["weights", "convert", "nowhere.pth", "--to", "weights"],
    ],
    ids=lambda words: words[0],
)
def test_an_error_is_a_message_and_exit_code_1(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    assert done.output.strip()


@pytest.mark.parametrize(
    "words",
    [
        ["cells", "locked"],
        ["cells", "data", "--out", "locked/cells.csv"],
        ["compare", "main", "workspace", "--out", "locked/page.html"],
        ["demo-data", "locked/more/drawn"],
        ["export", "data", "--format", "yolo", "--to", "locked/boxes"],
        ["import", "data", "--to", "locked/imported"],
        ["evaluate", "--ensemble", "e", "--data", "data", "--out", "locked/here"],
        ["predict", "--ensemble", "e", "--data", "data", "--out", "locked/new/p.csv"],
        ["predict", "--ensemble", "e", "--data", "data", "--out", "p.csv", "--report", "locked/p.html"],
    ],
    ids=" ".join,
)
def test_a_place_that_may_not_be_written_is_named_before_the_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("locked", "data"):
        (tmp_path / name).mkdir()
    allowed = os.access

    def access(path: Path, mode: int, **other: bool) -> bool:
        return not (mode & os.W_OK and "locked" in str(path)) and allowed(path, mode, **other)

    monkeypatch.setattr(os, "access", access)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert f"you may not write in {tmp_path / 'locked'}. Choose another place." in done.stderr.replace(
        "\n", " "
    )


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder_are_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for out, message in (("there", "there is a folder"), ("file/p.csv", "is no folder")):
        done = CliRunner().invoke(app, ["predict", "--ensemble", "e", "--data", "d", "--out", out])
        assert done.exit_code == 1
        assert message in done.stderr
