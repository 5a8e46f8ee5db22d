"""Fresh clones for tests: copies of the working tree in folders of their own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Variables of a person's shell that tests must not depend on.
UNSET = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT"}


def run(folder: Path, *command: str, env: Mapping[str, str] | None = None, ok: bool = True) -> str:
    """Run a command in a folder, in this environment, and return its stdout and stderr as they came."""
    process = start(folder, *command, env=env)
    printed, _ = process.communicate()
    if ok:
        assert process.returncode == 0, f"{' '.join(command)} in {folder}:\n{printed}"
    return printed


def start(folder: Path, *command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command that runs beside the test; see `run`."""
    whole = {key: value for key, value in os.environ.items() if key not in UNSET}
    whole |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "true",
    } | dict(env or {})
    return subprocess.Popen(
        command, cwd=folder, env=whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output_until(process: subprocess.Popen[str], text: str) -> str:
    """Wait until a command of `start` has printed a text, and return its output up to there."""
    printed = ""
    while text not in printed:
        line = process.stdout.readline()
        assert line, f"it ended without {text!r}:\n{printed}"
        printed += line
    return printed


def commit(folder: Path) -> None:
    run(folder, "git", "add", "--all")
    run(
        folder,
        "git",
        "-c",
        "user.name=Test",
        "-c",
        "user.email=test@localhost",
        "commit",
        "--quiet",
        "-m",
        "state",
    )


def clone(folder: Path) -> Path:
    """Make a repository of all files of the working tree that git tracks or would add."""
    listed = run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    commit(folder)
    return folder


def stages_run(output: str) -> list[str]:
    """The names of the stages that `dvc repro` or `dvc exp run` ran, without the check of params.yaml."""
    return [name for name in re.findall(r"Running stage '([^']+)'", output) if name != "prepare"]
