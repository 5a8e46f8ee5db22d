"""Git's commands."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from aplsmear.errors import UserError


class GitError(UserError):
    """A git command failed."""


def git(folder: Path, *words: str, fails: int = 0) -> Any:
    """The output of a git command without blanks at its end; None where it ends with the exit code `fails`.

    Raises:
        GitError: it ends with another code than 0 and `fails`.
    """
    texts: Any = {"encoding": "utf-8", "errors": "surrogateescape"}
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, check=False, **texts)
    if done.returncode not in {0, fails}:
        raise GitError(f"`git {' '.join(words)}` failed in {folder.resolve()}:\n{done.stderr.rstrip()}")
    return None if done.returncode else done.stdout.rstrip()
