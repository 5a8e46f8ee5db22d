"""What a kill, a full disk or a failing one leaves behind in a repository, and how it is put right."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aplsmear.errors import UserError

# What git and DVC need while an experiment runs in the workspace, and take away at its end.
_MERGE = "refs/exps/exec/EXEC_MERGE"
_OF_THE_WORKSPACE = (_MERGE, "refs/exps/exec/EXEC_BASELINE", "refs/exps/exec/EXEC_BRANCH")
_OF_A_RUN = (*_OF_THE_WORKSPACE, "refs/exps/temp/", "refs/exps/stash")
_TEXTS = ("params.yaml", "data.dvc", "dvc.lock")
_FULL_NAME = r"[0-9a-f]{40}"  # of a commit
_OFF = rf"checkout: moving from (\S+) to {_FULL_NAME}"
_STASHING = 10  # seconds at most from the stash to the move, on a busy machine


def mend(folder: Path) -> Iterator[str]:
    """Put right what a kill, a full disk or a failing one has left behind; what is sound stays as it is.

    Args:
        folder: the top of a repository.

    Yields:
        What was done, in lines.

    Raises:
        UserError: there is no repository, or DVC is at work in it.
    """
    from dvc.exceptions import NotDvcRepoError
    from dvc.lock import LockError
    from dvc.repo import Repo

    if not (folder / ".dvc").is_dir():
        raise UserError(f"{folder.resolve()} is not the top of a DVC repository: type this in a clone.")
    try:
        with alone(folder):
            for process in at_work(folder):
                words = " ".join(process.info["cmdline"])
                raise UserError(f"DVC is at work here (process {process.pid}, {words}): let it end.")
            yield from _mend_locks(folder / ".dvc" / "tmp")
            yield from mend_texts(folder)
            yield from mend_experiments(folder)
            with Repo(str(folder)) as repo:
                yield from _mend_outs(repo, folder)
    except LockError:
        raise UserError("DVC is at work here: let it end.") from None
    except NotDvcRepoError:
        raise UserError(f"{folder.resolve()} cannot be opened as a DVC repository.") from None


def alone(folder: Path, patient: bool = False) -> Any:
    """DVC's lock of a repository, a context manager: while it is held, no DVC begins, but waits up to 3 s.

    A DVC that runs a stage does not hold it: see `at_work`.

    Args:
        folder: the top of the repository.
        patient: wait for the lock as long as need be, and not 3 seconds.
    """
    from dvc.config import Config
    from dvc.lock import make_lock

    temporary = folder / ".dvc" / "tmp"
    temporary.mkdir(exist_ok=True)
    hardlink = Config(str(folder / ".dvc"))["core"].get("hardlink_lock", False)
    lock = str(temporary / "lock")
    return make_lock(lock, tmp_dir=str(temporary), hardlink_lock=hardlink, wait=patient)


def is_dvc(words: Sequence[str] | None) -> bool:
    """Whether a command line is DVC's; None: that of a process of others, which the system does not show."""
    return any(Path(word).name == "dvc" for word in (words or [])[:3])


def at_work(folder: Path) -> Iterator[Any]:
    """The processes (of psutil) of DVC in the repository, those included that begin and wait for its lock."""
    import psutil

    for process in psutil.process_iter(["cmdline", "cwd"]):
        where = process.info["cwd"]
        if where and Path(where).is_relative_to(folder.resolve()) and is_dvc(process.info["cmdline"]):
            yield process


def _mend_locks(temporary: Path) -> Iterator[str]:
    """DVC's list of who reads and writes what: DVC takes the dead out of it, except where their number is
    another process's by now, or where it was cut off while it was written."""
    for path in (temporary / "rwlock", temporary / "exps" / "rwlock"):
        try:
            idle = not any(json.loads(path.read_text(encoding="utf-8")).values())
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError):
            idle = False
        if not idle:
            path.unlink()
            yield f"removed {path}: it was of a DVC that is no longer there"


def mend_texts(folder: Path, names: Sequence[str] = _TEXTS) -> Iterator[str]:
    """What DVC writes in place, so that a kill can cut it off: back to the last commit.

    Yields:
        What was done, in lines.
    """
    from aplsmear.files import whole  # NumPy, which the guard does without

    for name in names:
        path = folder / name
        if not is_cut_off(path):
            continue
        kept = _git(folder, "show", f"HEAD:{name}")
        if kept is None:
            path.unlink()
            yield f"removed {name}, which was cut off: DVC makes it again"
        else:
            with whole(path) as part:
                part.write_text(f"{kept}\n", encoding="utf-8")
            yield f"{name} was cut off: it is that of the last commit again"


def is_cut_off(path: Path) -> bool:
    """Whether a file of DVC's holds no keys or, if it is dvc.lock, is none; one that is not there is fine."""
    import yaml
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        if path.name == "dvc.lock":
            COMPILED_LOCKFILE_SCHEMA(content)
    except FileNotFoundError:
        return False
    except (yaml.YAMLError, ValueError, Invalid):
        return True
    return not isinstance(content, dict)


def remains(folder: Path) -> bool:
    """Whether there is anything for `mend_experiments` to do."""
    return bool(_refs(folder, _OF_A_RUN) or _beside(folder) or left_branch(folder) or put_aside(folder))


def mend_experiments(folder: Path) -> Iterator[str]:
    """Put right what `dvc exp run` left behind that was killed, here or beside the workspace.

    No experiment may be running.

    Yields:
        What was done, in lines.
    """
    # DVC takes all changes away, and brings them back from there.
    lost = _git(folder, "diff", "--name-only", f"{_MERGE}^", _MERGE, "--", ".", ":(exclude).dvc/tmp")
    if lost and left_branch(folder) and _git(folder, "diff", "--quiet", f"{_MERGE}^") is not None:
        _git(folder, "stash", "apply", _MERGE)
        yield f"what you had changed is here again: {', '.join(lost.split())}"
    yield from mend_branch(folder, _OF_A_RUN)
    for path in _beside(folder):
        shutil.rmtree(path)
        yield f"removed {path}: an experiment that was cut off ran there"
    if put_aside(folder):
        back = "drop" if has_changes(folder, folder) else "pop"
        if _git(folder, "stash", back, "--quiet") is not None:
            yield "what you had changed, and `dvc exp run` had put aside (`git stash`), is here again"
        else:
            yield "what you had changed lies in `git stash`: git cannot put it together with what is here now"


def mend_branch(folder: Path, refs: tuple[str, ...] = _OF_THE_WORKSPACE) -> Iterator[str]:
    """`dvc exp run` takes git off its branch, and back at its end: what of that is left to do.

    Args:
        folder: the top of a repository.
        refs: how the names begin of those refs that are to go.

    Yields:
        What was done, in lines.
    """
    for ref in _refs(folder, refs):
        _git(folder, "update-ref", "-d", ref)
        yield f"removed {ref}: it was of an experiment that was cut off"
    if branch := left_branch(folder):
        _git(folder, "symbolic-ref", "-m", "aplsmear mend", "HEAD", f"refs/heads/{branch}")
        _git(folder, "restore", "--staged", ":/")  # the index alone, as DVC does it
        yield f"git is on the branch {branch} again, off which `dvc exp run` had taken it"


def _refs(folder: Path, begins: tuple[str, ...]) -> list[str]:
    found = (_git(folder, "for-each-ref", "--format=%(refname)", "refs/exps") or "").split()
    return [ref for ref in found if ref.startswith(begins)]


def _beside(folder: Path) -> list[Path]:
    """The folders in which `dvc exp run --temp` runs its experiments."""
    return sorted((folder / ".dvc" / "tmp" / "exps" / "standalone").glob("tmp*"))


def left_branch(folder: Path) -> str | None:
    """The branch that DVC took git off and that stands where git stands, but for DVC's own commits; None:
    git is on a branch, or a person took it off."""
    if _git(folder, "symbolic-ref", "--quiet", "HEAD"):
        return None
    for line in (_git(folder, "log", "--walk-reflogs", "--format=%gs", "HEAD") or "").splitlines():
        moved = re.fullmatch(r"checkout: moving from (\S+) to (\S+)", line)
        if moved and not re.fullmatch(_FULL_NAME, moved[2]):
            return None  # a person did it: DVC gives the full name of the commit
        if moved and not re.fullmatch(_FULL_NAME, moved[1]):
            behind = _git(folder, "rev-list", f"HEAD..refs/heads/{moved[1]}")
            ahead = _git(folder, "log", "--format=%s", f"refs/heads/{moved[1]}..HEAD")
            if behind == "" and ahead is not None:
                mine = all(subject.startswith("dvc: commit experiment") for subject in ahead.splitlines())
                return moved[1] if mine else None
            return None
    return None


def put_aside(folder: Path) -> bool:
    """Whether git's stash holds changes of a person that DVC had put aside there when it was killed.

    DVC takes git off its branch right after that; git's own command resets to HEAD.
    """
    stashed = int(_git(folder, "log", "-1", "--format=%ct", "refs/stash") or 0)
    found = (_git(folder, "log", "-g", "--date=unix", "--format=%gd %gs", "HEAD") if stashed else "") or ""
    entries = re.findall(r"^HEAD@\{(\d+)\} (.*)", found, re.MULTILINE)
    then = [move for when, move in entries if 0 <= int(when) - stashed <= _STASHING]
    return "reset: moving to HEAD" not in then and any(re.fullmatch(_OFF, move) for move in then)


def has_changes(top: Path, folder: Path) -> bool:
    """Whether a folder has what is put aside in the repository `top`, too, but for what DVC itself writes."""
    wanted = (".", ":(exclude)dvc.lock", ":(exclude)data.dvc")
    show = ("git", "diff", "--binary", "--unified=0", "stash^", "stash", "--", *wanted)
    patch = subprocess.run(show, cwd=top, capture_output=True, check=True).stdout
    back = ("git", "apply", "--reverse", "--check", "--unidiff-zero")
    fits = subprocess.run(back, cwd=folder, input=patch, capture_output=True, check=False)
    return not patch or not fits.returncode


def experiment_at_work(folder: Path) -> str | None:
    """What DVC calls EXEC_MERGE, another commit for each `dvc exp run` in the workspace; None: there is none,
    or it has ended."""
    return _git(folder, "rev-parse", "--verify", "--quiet", _MERGE)


def _mend_outs(repo: Any, folder: Path) -> Iterator[str]:
    """Outs and objects of the cache that are not what they were: each is made again of the other, or goes."""
    from aplsmear.files import copy_whole
    from aplsmear.runs.checksums import is_sound, unsound_objects

    cache = repo.cache.local
    lost = set()
    for path in unsound_objects(Path(cache.path)):
        path.unlink()
        lost.add(path.parent.name + path.name)
        yield f"damaged: object {path.parent.name + path.name} of DVC's cache"
    damaged = {}
    for file, expected in _files(repo):
        if not is_sound(file, expected):
            damaged[file] = expected
        elif expected in lost:
            cache.add(str(file), repo.fs, expected)
            lost.remove(expected)
            yield f"object {expected} is there again, from {file.relative_to(folder.resolve())}"
    for file, expected in damaged.items():
        file.unlink()
        kept = Path(cache.oid_to_path(expected))
        if kept.is_file():
            copy_whole(kept, file)
        how = (
            "it is here again, from DVC's cache"
            if kept.is_file()
            else "it is gone, `dvc repro` makes it again"
        )
        yield f"damaged: {file.relative_to(folder.resolve())}; {how}"


def _files(repo: Any) -> Iterator[tuple[Path, str]]:
    """The files of all outs, each with the hash that it should have, without those of outs that DVC itself
    finds changed: by hand, by a kill, by a look at another commit."""
    for out in repo.index.outs:
        path = Path(out.fs_path)
        ours = out.hash_name == "md5" and out.hash_info and not out.stage.is_import
        if not ours or not path.exists() or out.changed_checksum():
            continue
        if not path.is_dir():
            yield path, out.hash_info.value
        elif tree := out.get_obj():
            for key, (_, each) in tree.iteritems():
                yield path.joinpath(*key), each.value


def _git(folder: Path, *words: str) -> str | None:
    """What git prints, without blanks at its end; None where it fails."""
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.rstrip()
