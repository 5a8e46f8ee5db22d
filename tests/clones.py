"""Fresh clones for tests: the repository as it stands in the working tree, in a folder of its own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What a person's shell may say and a test must not depend on.
UNSET = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT"}


def run(folder: Path, *command: str, env: Mapping[str, str] | None = None, ok: bool = True) -> str:
    """What a command prints, stdout and stderr as they come, run in a folder in this environment."""
    process = start(folder, *command, env=env)
    printed, _ = process.communicate()
    if ok:
        assert process.returncode == 0, f"{' '.join(command)} in {folder}:\n{printed}"
    return printed


def start(folder: Path, *command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A command that goes on beside the test; see `run`."""
    whole = {key: value for key, value in os.environ.items() if key not in UNSET}
    whole |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "true",
    } | dict(env or {})
    return subprocess.Popen(
        command, cwd=folder, env=whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def heard(process: subprocess.Popen[str], text: str) -> str:
    """What a command of `start` has printed as soon as some text is in it."""
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
    """A repository in `folder` that holds the files of the working tree that git knows or would take in."""
    listed = run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    commit(folder)
    return folder


def stages_run(output: str) -> list[str]:
    """The names of the stages that a `dvc repro` or `dvc exp run` ran."""
    return re.findall(r"Running stage '([^']+)'", output)
