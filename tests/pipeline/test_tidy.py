"""`aplsmear tidy` removes searches that no result comes from, and nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aplsmear.cli import app

ROOT = Path(__file__).parents[2]
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "rb+")
fcntl.lockf(file, fcntl.LOCK_EX, 1, 7)
print("held", flush=True)
input()
"""


def tidy(*words: str) -> str:
    done = CliRunner().invoke(app, ["tidy", *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_searches_without_a_result_are_listed_and_removed_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "tuned" / "blast").mkdir(parents=True)
    (tmp_path / "tuned" / "blast" / "best.yaml").write_text("study: blast-2\ntrial: 3\n", encoding="utf-8")
    studies = tmp_path / ".studies"
    studies.mkdir()
    for name in ("blast-1", "blast-2", "faggot-running"):
        (studies / f"{name}.journal").write_text("a trial\n", encoding="utf-8")
        (studies / f"{name}.locks").touch()
    names = {path.name for path in studies.iterdir()}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, studies / "faggot-running.locks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"held\n"
        printed = tidy()  # without a terminal there is no question
        assert "blast-1" in printed
        assert "--yes" in printed
        assert "blast-2" not in printed
        assert "running" not in printed
        assert {path.name for path in studies.iterdir()} == names
        assert "1 searches removed" in tidy("--yes")
        worker.communicate(b"\n")
    assert {path.name for path in studies.iterdir()} == names - {"blast-1.journal", "blast-1.locks"}
    assert "1 searches removed" in tidy("--yes")  # its worker has ended
    assert tidy() == "Nothing to tidy.\n"
