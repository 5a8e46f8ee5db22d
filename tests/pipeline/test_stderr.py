"""A command that succeeds prints no line that a library wrote: warnings hide the lines that count."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.pipeline

PROGRESS = r".*\d+%\|.*|\d+ epochs \[.*"
DVC = "|".join(
    (
        r"Importing 'demo' -> 'data'",
        r"Running stage '.*':",
        r"> sh stages/run\.sh .*",
        r"(Generating|Updating) lock file .*",
        r"WARNING: 'kaggle' is empty\.",
        r"(To track the changes|To enable) .*",
        r"\t(git add|dvc config) .*",
        r"Use `dvc push` .*",
    )
)
OURS = "|".join(
    (
        r"dataset\.source is .*",
        r"\d+ smears of .*",
        r"(TensorFlow|ONNX Runtime) .*",
        r"study \S+",
        r"blast: AUROC .*",
        r"\d+ of \d+ folds .*",
        r"Changed in params\.yaml since .*",
        r"The next experiment has these .*",
        r"\w+ is untrained \(`weights: none`\): .*",
        r"The last digits of results differ .*",
    )
)
COMMANDS = (
    "check new",
    "predict --ensemble ensembles/apl_healthy --data new --out p.csv --report p.html",
    "evaluate --ensemble ensembles/apl_healthy --data new --out evaluated/new",
    "experiments",
    "compare main workspace",
    "share-check",
    "cells new --overwrite",
    "names new",
    "tidy",
    "mend",
    "profile demo",
)


def lines(printed: str) -> list[str]:
    """Without empty lines; a progress bar writes over its line."""
    return [line for line in re.split(r"[\r\n]+", printed) if line.strip()]


def test_the_whole_pipeline_prints_lines_of_its_own_and_of_dvc_alone(small: Path) -> None:
    printed = lines((small / ".dvc" / "tmp" / "printed").read_text(encoding="utf-8"))
    assert [line for line in printed if not re.fullmatch(f"{PROGRESS}|{DVC}|{OURS}", line)] == []


def test_commands_print_nothing_on_stderr_but_their_progress(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "clone", symlinks=True)
    environment = os.environ | {"APLSMEAR_PSEUDONYM_KEY": "0123456789abcdef" * 4}
    program = Path(sys.executable).parent / "aplsmear"
    for command in ("demo-data new --patients 6 --seed 77", *COMMANDS):
        words = [program, *command.split()]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told = [line for line in lines(done.stderr) if not re.fullmatch(f"{PROGRESS}|{OURS}", line)]
        assert told == [], command
