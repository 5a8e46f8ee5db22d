"""Raw pictures and tables of patients must not get into git.

`dvc exp run` puts the files of a data set inside the repository into the commit of the experiment, unless a
.gitignore excludes them, and `dvc exp push` sends that commit.
"""

from __future__ import annotations

import os
from pathlib import Path

from aplsmear.errors import UserError
from aplsmear.runs.git import git


def check_root(root: Path, top: Path, name: str = "dataset.root") -> None:
    """Check that git stores no file of a data set; `name` is the parameter that names its folder.

    Nothing is checked if `top`, the top of the repository, has no `.git`. Only .gitignore counts. DVC does
    not read `.git/info/exclude` in a worktree, and the folder of `dvc exp run --temp` does not have it.

    Raises:
        UserError: git has files of the data set, or would store them with `git add`.
        GitError: git does not work here.
    """
    if not (top / ".git").exists():
        return
    here = top.resolve()
    for path in (Path(os.path.abspath(root)), root.resolve()):  # noqa: PTH100 (links stay in the first)
        if not path.is_relative_to(here):
            continue
        place = "" if path == here else path.relative_to(here).as_posix()
        listing = ("ls-files", "-z", "--cached", "--others", "--exclude-per-directory=.gitignore")
        if stored := git(here, *listing, "--", f":(top,literal){place}"):
            raise UserError(
                f"{name} is {root}, a folder in this repository, and git stores its files, such as "
                f"{stored.partition(chr(0))[0]}. They would be sent with `dvc exp push` or `git push`.\n"
                f"Move the data set out of the repository, and set {name} to the full path of its new place."
            )
