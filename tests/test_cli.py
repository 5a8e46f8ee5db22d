"""The command `aplsmear`: help with examples, and errors as messages."""

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
        ["names", "nowhere"],
        ["null-check", "--ensemble", "apl_aml"],
        ["predict", "--ensemble", "nowhere", "--data", "nowhere", "--out", "new.csv"],
        ["profile", "nonsense"],
        ["share-check"],
        ["tidy"],
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
