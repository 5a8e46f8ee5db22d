"""The start and end of every script of ``stages/``: checks, error messages, exit codes."""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import yaml

from aplsmear import cpu
from aplsmear.errors import UserError, brief
from aplsmear.params import flat
from aplsmear.runs.checksums import unsound
from aplsmear.runs.data_root import check_root
from aplsmear.runs.git import GitError, git
from aplsmear.runs.mend import is_dvc, refuse_leftovers
from aplsmear.secrets import hide_in_tracebacks, without_secrets

FAILED, MISUSED = 1, 2  # exit codes
# Errors of the machine, and what to do about them.
_SURROUNDINGS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your quota of the disk is used up: free some space",
    errno.EACCES: "you may not write (or read) there: check its owner (`ls -l`)",
    errno.EPERM: "you may not write there: check its owner (`ls -l`)",
    errno.EROFS: "the disk is read-only: mount it for writing",
    errno.EIO: "the disk has an error: check its health",
    errno.ENOMEM: "there is too little memory: end other programs, or use a larger machine",
}


def run(main: Callable[..., int | None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Call the `main` of a stage with the arguments of its command line, and end the process.

    If DVC runs the stage, the state of the repository and the inputs are checked first.

    Exit code 0 or the number that `main` returns; 1 after a `UserError` or an error of disk or memory, with a
    message instead of a traceback; 2 if the arguments are not those of `main`, with the docstring of its
    module. Any other exception is raised. Messages and tracebacks show no secrets (`aplsmear.secrets`).
    """
    hide_in_tracebacks()
    if note := cpu.note():
        print(note, file=sys.stderr)
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        inspect.signature(main).bind(*words)
    except TypeError:
        print(inspect.getdoc(inspect.getmodule(main)), file=sys.stderr)
        sys.exit(MISUSED)
    try:
        if "DVC_STAGE" in os.environ:
            check_repository(home())
            check_data_root()
            check_inputs(os.environ["DVC_STAGE"])
        code = main(*words)
    except UserError as error:
        print(without_secrets(str(error)), file=sys.stderr)
        sys.exit(FAILED)
    except (OSError, MemoryError) as error:
        number = getattr(error, "errno", errno.ENOMEM)
        if number not in _SURROUNDINGS:
            raise
        where = getattr(error, "filename", None) or Path().resolve()
        message = f"{where}: {_SURROUNDINGS[number]}; then the same command again. ({brief(error)})"
        print(without_secrets(message), file=sys.stderr)
        sys.exit(FAILED)
    sys.exit(code)


def check_repository(top: Path) -> None:
    """Raise a UserError if a killed `dvc exp run` has left git off its branch, or changes in git's stash.

    There is no check if DVC was not started as a command, if another DVC runs in the repository (`top` is its
    folder), or if git does not work.
    """
    if _dvc() is not None:
        mine = Path() if "DVC_EXP_NAME" in os.environ else None
        with suppress(GitError):
            refuse_leftovers(top, mine, {each.pid for each in _above()})


def check_data_root() -> None:
    """Check that git stores no file of the data sets in params.yaml (`check_root`), where git works."""
    for name, root in flat(_loaded(Path("params.yaml"))):
        if re.fullmatch(r"dataset\.root|external\..*\.root", name) and isinstance(root, str):
            with suppress(GitError):
                for top in {Path(), home()}:
                    check_root(Path(root), top, name)


def check_inputs(stage: str) -> None:
    """Raise a UserError if inputs of a stage (``tune@blast``) do not have the hashes in dvc.lock.

    Each file is read once in a run of DVC, however many stages depend on it (`aplsmear.runs.checksums`).
    """
    if not (locked := _locked_stages()):
        return
    template, _, item = stage.partition("@")
    values = dict(flat(_loaded(Path("params.yaml"))))
    declared = _loaded(Path("dvc.yaml"))["stages"][template]
    if table := declared.get("foreach"):  # `${item.root}` is in the row of that name
        row = f"{table[2:-1]}.{item}."
        for key in [key for key in values if key.startswith(row)]:
            values[f"item.{key.removeprefix(row)}"] = values[key]
    wanted = [
        PurePosixPath(re.sub(r"\$\{([^}]+)\}", lambda found: str(values.get(found[1], item)), dep))
        for dep in declared.get("do", declared)["deps"]  # `${item.task}` is in no params.yaml
    ]
    inputs = {
        out["path"]: out["md5"]
        for entry in locked.values()
        for out in entry.get("outs", [])
        for dep in wanted
        if PurePosixPath(out["path"]).is_relative_to(dep) or dep.is_relative_to(out["path"])
        if out.get("hash") == "md5" and _is_complete(Path(out["path"]), out.get("nfiles", 0))
    }
    dvc = _dvc()
    damaged = unsound(inputs, Path(".dvc/tmp/sound"), f"{dvc.pid} {dvc.create_time()}" if dvc else "")
    if damaged:
        raise UserError(
            "\n  ".join(["these inputs do not have the hashes in dvc.lock (a failing disk?):", *damaged])
            + "\nType `aplsmear mend`, then the same command again."
        )


def _above() -> list[Any]:
    """The processes (of psutil) above this one."""
    import psutil

    return list(psutil.Process().parents())


def _dvc() -> Any:
    """The process of DVC above this one; None: there is none, or another program uses DVC as a library."""
    return next((each for each in _above() if is_dvc(each.as_dict(["cmdline"])["cmdline"])), None)


def _is_complete(path: Path, files: int) -> bool:
    """Whether a folder has all its files: ``dvc repro --pull --allow-missing`` may have pulled a part."""
    return not path.is_dir() or sum(each.is_file() for each in path.rglob("*")) >= files


def _loaded(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)  # ten times as fast


def _locked_stages() -> Any:
    lock = Path("dvc.lock")
    return _loaded(lock).get("stages", {}) if lock.is_file() else {}


def home() -> Path:
    """The folder for files that are kept after a run, beside its outs: MLflow, studies, unfinished trainings.

    It is the top of the repository in which dvc was called, also for an experiment of the queue or of
    ``dvc exp run --temp``, which runs in a temporary folder.
    """
    here = Path()
    top = Path(os.environ.get("DVC_ROOT", here))
    return here if top.resolve() == here.resolve() else top


def origin(stage: str, task: str) -> dict[str, str]:
    """Tags of a run: stage, task, DVC experiment, git commit, and the hash of the data set in dvc.lock."""
    found = {"stage": stage, "task": task}
    if "DVC_EXP_NAME" in os.environ:
        found["DVC_EXP_NAME"] = os.environ["DVC_EXP_NAME"]
    if commit := git(Path(), "rev-parse", "HEAD", fails=128):
        found["git_commit"] = commit
    for out in _locked_stages().get("download", {}).get("outs", []):
        found["data_version"] = out.get("md5", "")
    return found
