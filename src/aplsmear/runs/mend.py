"""`aplsmear mend`: repairs what a kill, a full disk or a failing disk has left in a repository."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

from aplsmear.errors import UserError
from aplsmear.files import copy_whole, whole
from aplsmear.runs.checksums import is_sound, unsound_objects
from aplsmear.runs.git import git

# What DVC sets in git for an experiment, and removes at its end.
_MERGE, _WAITING = "refs/exps/exec/EXEC_MERGE", "refs/exps/stash"
_REFS = (_MERGE, "refs/exps/exec/EXEC_BASELINE", "refs/exps/exec/EXEC_BRANCH", "refs/exps/temp/", _WAITING)
_TEXTS = ("params.yaml", "data.dvc", "dvc.lock")  # DVC writes these in place: a kill can cut them off
_EXPERIMENTS = ".dvc/tmp/exps"
_COMMIT = r"[0-9a-f]{40}"
_OWN_MOVES = rf"commit: dvc: commit experiment|dvc: Restore HEAD to '{_COMMIT}'"
_STASHING = 10  # seconds at most from `git stash` to the detached HEAD, on a busy machine


def mend(folder: Path) -> Iterator[str]:
    """Repair what a kill, a full disk or a failing disk has left; everything else stays as it is.

    Args:
        folder: the top of a repository.

    Yields:
        What was done, in lines.

    Raises:
        UserError: there is no repository, git does not work in it, or DVC is running in it.
    """
    from dvc.exceptions import NotDvcRepoError
    from dvc.lock import LockError
    from dvc.repo import Repo

    if not (folder / ".dvc").is_dir():
        raise UserError(f"{folder.resolve()} is not the top of a DVC repository: type this in a clone.")
    try:
        with _lock(folder):
            for process in running_dvc(folder):
                words = " ".join(process.info["cmdline"])
                raise UserError(
                    f"DVC is running here (process {process.pid}, {words}): wait until it has ended."
                )
            yield from _mend_texts(folder)
            yield from _mend_experiments(folder)
            yield from _mend_locks(folder)
            with Repo(str(folder)) as repo:
                yield from _mend_outs(repo, folder)
    except LockError:
        raise UserError("DVC is running here: wait until it has ended.") from None
    except NotDvcRepoError:
        raise UserError(f"{folder.resolve()} cannot be opened as a DVC repository.") from None


def _lock(folder: Path) -> Any:
    """DVC's lock of a repository, as a context manager. DVC waits for it for 3 s, then it gives up.

    DVC does not hold it while a stage runs: see `running_dvc`.
    """
    from dvc.config import Config
    from dvc.lock import make_lock

    temporary = folder / ".dvc" / "tmp"
    temporary.mkdir(exist_ok=True)
    hardlink = Config(str(folder / ".dvc"))["core"].get("hardlink_lock", False)
    return make_lock(str(temporary / "lock"), tmp_dir=str(temporary), hardlink_lock=hardlink)


def is_dvc(words: Sequence[str] | None) -> bool:
    """Whether a command line is DVC's; None, of a process that the system does not show to us, is not."""
    return any(Path(word).name == "dvc" for word in (words or [])[:3])


def running_dvc(folder: Path) -> Iterator[Any]:
    """The processes (of psutil) of DVC in the repository, in any of its worktrees: they share git's refs."""
    import psutil

    listed = git(folder, "worktree", "list", "--porcelain").splitlines()
    trees = [Path(line.removeprefix("worktree ")) for line in listed if line.startswith("worktree ")]
    for process in psutil.process_iter(["cmdline", "cwd"]):
        where = process.info["cwd"]
        if (
            where
            and is_dvc(process.info["cmdline"])
            and any(Path(where).is_relative_to(tree) for tree in trees)
        ):
            yield process


def leftovers(folder: Path, mine: Path | None = None) -> Iterator[str]:
    """What a killed `dvc exp run` has left that would disturb the next one, in words.

    Args:
        folder: the top of a repository.
        mine: the folder in which an experiment runs that is alive; None: none runs.

    Raises:
        GitError: git does not work here.
    """
    if branch := _left_branch(folder, alive=mine is not None and mine.samefile(folder)):
        yield f"git is off its branch {branch}"
    if _is_put_aside(folder):
        yield "your uncommitted changes are in `git stash`"
    if _refs(folder, (_WAITING,)):
        yield "an experiment still waits to be run"
    yield from (
        f"{path} is still there" for path in _beside(folder) if mine is None or path != mine.resolve()
    )


def _mend_locks(folder: Path) -> Iterator[str]:
    """Remove DVC's lists of locks that are not empty, or are cut off.

    DVC itself takes out those of dead processes, unless another process has got the same number since.
    """
    for path in (folder / ".dvc/tmp/rwlock", folder / _EXPERIMENTS / "rwlock"):
        try:
            idle = not any(json.loads(path.read_text(encoding="utf-8")).values())
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError):
            idle = False
        if not idle:
            path.unlink()
            yield f"removed {path}: it belonged to a DVC that no longer runs"


def _mend_texts(folder: Path) -> Iterator[str]:
    """Restore files that are cut off from the last commit."""
    for name in _TEXTS:
        path = folder / name
        if not _is_cut_off(path):
            continue
        if git(folder, "rev-parse", "--verify", "--quiet", f"HEAD:{name}", fails=1):
            with whole(path) as part:
                part.write_text(git(folder, "show", f"HEAD:{name}") + "\n", encoding="utf-8")
            yield f"{name} was cut off: it is restored from the last commit"
        else:
            path.unlink()
            yield f"removed {name}, which was cut off: DVC makes it again"


def _is_cut_off(path: Path) -> bool:
    """Whether a file of DVC's holds no keys or, if it is dvc.lock, does not fit its schema."""
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


def _mend_experiments(folder: Path) -> Iterator[str]:
    """Repair what a killed `dvc exp run` has left; no experiment may be running."""
    branch, aside = _left_branch(folder), _is_put_aside(folder)
    if branch and _refs(folder, (_MERGE,)):
        # DVC removes all changes from the workspace, and then takes them back from there.
        lost = git(
            folder, "diff", "--name-only", f"{_MERGE}^", _MERGE, "--", ".", ":(exclude).dvc/tmp"
        ).split()
        if lost and git(folder, "diff", "--quiet", f"{_MERGE}^", fails=1) is not None:
            git(folder, "stash", "apply", _MERGE)
            yield f"your uncommitted changes are here again: {', '.join(lost)}"
    for ref in _refs(folder, _REFS):
        git(folder, "update-ref", "-d", ref)
        yield f"removed {ref}: it belonged to an experiment that was killed"
    if branch:
        git(folder, "symbolic-ref", "-m", "aplsmear mend", "HEAD", f"refs/heads/{branch}")
        git(folder, "restore", "--staged", ":/")  # the index alone, as DVC does it
        yield f"git is on the branch {branch} again"
    for path in _beside(folder):
        shutil.rmtree(path)
        yield f"removed {path}: an experiment that was killed ran there"
    if aside:
        back = "drop" if _has_changes(folder) else "pop"
        if git(folder, "stash", back, "--quiet", fails=1) is not None:
            yield "your uncommitted changes, which `dvc exp run` had put into `git stash`, are here again"
        else:
            yield "your uncommitted changes are in `git stash`: they do not fit here (`git stash pop`)"


def _refs(folder: Path, begins: tuple[str, ...]) -> list[str]:
    found = git(folder, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    return [ref for ref in found if ref.startswith(begins)]


def _beside(folder: Path) -> list[Path]:
    """The folders in which `dvc exp run --temp` runs experiments."""
    return sorted((folder.resolve() / _EXPERIMENTS / "standalone").glob("tmp*"))


def _left_branch(folder: Path, alive: bool = False) -> str | None:
    """The branch that a killed `dvc exp run` took git off.

    Args:
        folder: the top of a repository.
        alive: an experiment runs in the workspace, which takes git off its branch as long as it does.

    Returns:
        The branch; None: git is on a branch, a person took it off, or commits were made since.
    """
    if git(folder, "symbolic-ref", "--quiet", "HEAD", fails=1):
        return None
    moves = list(dropwhile(lambda each: re.match(_OWN_MOVES, each[1]), _moves(folder)))
    found = re.fullmatch(rf"checkout: moving from (\S+) to {_COMMIT}", moves[0][1] if moves else "")
    if not found or (alive and not _is_older(folder, "logs/HEAD", _MERGE)):
        return None  # DVC sets its ref first, and then takes git off the branch
    branch = f"refs/heads/{found[1]}"
    if not git(folder, "for-each-ref", branch) or git(folder, "rev-list", f"HEAD..{branch}"):
        return None
    ahead = git(folder, "log", "--format=%s", f"{branch}..HEAD").splitlines()
    if not all(each.startswith("dvc: commit experiment") for each in ahead):
        return None
    # A person can detach HEAD in the same way (`git checkout COMMIT`). DVC does it twice, the second time
    # right after the end of the first; in the first it holds a lock, and may have put changes aside.
    ended = f"dvc: Restore HEAD to '{found[1]}'"
    twice = [move for when, move in moves[:3] if moves[0][0] - when <= _STASHING] == [
        found[0],
        ended,
        found[0],
    ]
    lock = folder / _EXPERIMENTS / "rwlock"
    sure = (
        twice
        or (not alive and _refs(folder, _REFS))
        or (lock.exists() and '"workspace"' in lock.read_text(encoding="utf-8"))
        or _is_put_aside(folder)
    )
    return found[1] if sure else None


def _is_older(folder: Path, one: str, other: str) -> bool:
    """Whether a file of git was changed before another one."""
    times = [
        (folder / git(folder, "rev-parse", "--git-path", name)).stat().st_mtime_ns for name in (one, other)
    ]
    return bool(times[0] < times[1])


def _moves(folder: Path) -> list[tuple[int, str]]:
    """Git's reflog of HEAD, newest first: seconds since 1970, and what happened."""
    if not git(folder, "rev-parse", "--verify", "--quiet", "HEAD", fails=1):
        return []  # no commit yet
    found = git(folder, "log", "--walk-reflogs", "--date=unix", "--format=%gd %gs", "HEAD")
    return [(int(when), move) for when, move in re.findall(r"^HEAD@\{(\d+)\} (.*)", found, re.MULTILINE)]


def _is_put_aside(folder: Path) -> bool:
    """Whether `git stash` holds changes of a person that DVC put there before it was killed.

    DVC takes git off its branch right after that; git's own command resets to HEAD instead.
    """
    stashed = int(git(folder, "for-each-ref", "--format=%(creatordate:unix)", "refs/stash") or 0)
    then = [move for when, move in _moves(folder) if 0 <= when - stashed <= _STASHING] if stashed else []
    detached = any(re.fullmatch(rf"checkout: moving from \S+ to {_COMMIT}", move) for move in then)
    return detached and "reset: moving to HEAD" not in then


def _has_changes(folder: Path) -> bool:
    """Whether the changes in `git stash` are in the workspace too, apart from what DVC itself writes."""
    wanted = (".", ":(exclude)dvc.lock", ":(exclude)data.dvc")
    show = ("git", "diff", "--binary", "--unified=0", "stash^", "stash", "--", *wanted)
    patch = subprocess.run(show, cwd=folder, capture_output=True, check=True).stdout
    back = ("git", "apply", "--reverse", "--check", "--unidiff-zero")
    fits = subprocess.run(back, cwd=folder, input=patch, capture_output=True, check=False)
    return not patch or not fits.returncode


def _mend_outs(repo: Any, folder: Path) -> Iterator[str]:
    """Restore damaged outs from DVC's cache, and damaged objects of the cache from outs; or remove them."""
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
        now = (
            "it is here again, from DVC's cache" if kept.is_file() else "removed, `dvc repro` makes it again"
        )
        yield f"damaged: {file.relative_to(folder.resolve())}; {now}"


def _files(repo: Any) -> Iterator[tuple[Path, str]]:
    """The files of all outs and the hashes that they should have.

    Left out are outs that DVC itself finds changed: by a person, by a kill, by `git checkout`.
    """
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
