"""How every script of ``stages/`` starts and ends."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import yaml

from aplsmear.errors import UserError
from aplsmear.secrets import hide_in_tracebacks, without_secrets

FAILED, MISUSED = 1, 2  # exit codes


def run(main: Callable[..., int | None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Call a stage's `main` with the words of its command line and end the process.

    The exit code is what `main` returns (None: 0); 1 after a `UserError`, whose message goes to stderr
    instead of a traceback; 2 where the words do not fit `main`, with the usage from its module's docstring.
    Any other exception passes through. Neither message nor traceback shows a key or a password
    (`aplsmear.secrets`).

    Args:
        main: takes each word as a positional argument.
        arguments: the words; None: those of this process.
    """
    hide_in_tracebacks()
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        inspect.signature(main).bind(*words)
    except TypeError:
        print(inspect.getdoc(inspect.getmodule(main)), file=sys.stderr)
        sys.exit(MISUSED)
    try:
        code = main(*words)
    except UserError as error:
        print(without_secrets(str(error)), file=sys.stderr)
        sys.exit(FAILED)
    sys.exit(code)


def home() -> Path:
    """The folder of what is to outlive a run beside its outs: tracking, studies, a training that was cut off.

    It is the top of the repository that dvc was called in, also for an experiment of the queue or of
    ``dvc exp run --temp``, which runs in a folder of its own that is gone afterwards.
    """
    here = Path()
    top = Path(os.environ.get("DVC_ROOT", here))
    return here if top.resolve() == here.resolve() else top


def origin(stage: str, task: str) -> dict[str, str]:
    """Where a run comes from: DVC's experiment, git's commit, the version of the data set in dvc.lock."""
    found = {"stage": stage, "task": task}
    if "DVC_EXP_NAME" in os.environ:
        found["DVC_EXP_NAME"] = os.environ["DVC_EXP_NAME"]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode == 0:
        found["git_commit"] = git.stdout.strip()
    lock = Path("dvc.lock")
    if lock.is_file():
        stages = yaml.safe_load(lock.read_text(encoding="utf-8")).get("stages", {})
        for out in stages.get("download", {}).get("outs", []):
            found["data_version"] = out.get("md5", "")
    return found
