"""`aplsmear mend`: repairs what a kill, a full disk or a failing disk has left in a repository."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
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
    """Repair what a kill, a full disk or a failing disk has left; yield what was done, in lines.

    `folder` is the top of a repository. Everything else in it stays as it is.

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
                words = " ".join(process.info["cmdline"] or ["of another user"])
                raise UserError(
                    f"DVC is running here (process {process.pid}, {words}): wait until it has ended."
                )
            yield from _mend_texts(folder)
            yield from _mend_ref_locks(folder)
            yield from _mend_experiments(folder)
            yield from _mend_locks(folder)
            with Repo(str(folder)) as repo:
                yield from _mend_outs(repo, folder)
    except LockError:
        raise UserError("DVC is running here: wait until it has ended.") from None
    except PermissionError as error:
        raise UserError(
            f"{error.filename}: you may not write there. Type this as the user who owns the repository."
        ) from None
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
    first, *rest = (words or [])[:5] or [""]
    if Path(first).name.startswith("python"):
        first = next((word for word in rest if not word.startswith("-")), "")
    return Path(first).name == "dvc"


def running_dvc(folder: Path) -> Iterator[Any]:
    """The processes (of psutil) of DVC in the repository, in any of its worktrees: they share git's refs.

    The system may hide the folder or the command line of another user's process. Such a process counts if
    DVC's lists of locks or of running experiments have its number.
    """
    import psutil

    trees = worktrees(folder)
    listed = {number for tree in trees for number in _listed(tree)}
    for process in psutil.process_iter(["cmdline", "cwd"]):
        where, words = process.info["cwd"], process.info["cmdline"]
        hidden = process.pid in listed and (words is None or (where is None and is_dvc(words)))
        if hidden or (
            where and is_dvc(words) and any(Path(where).is_relative_to(tree.resolve()) for tree in trees)
        ):
            yield process


def worktrees(folder: Path) -> list[Path]:
    """The top folders of all worktrees of the repository that are on this machine."""
    listed = git(folder, "worktree", "list", "--porcelain").split("\n")
    trees = [Path(line.removeprefix("worktree ")) for line in listed if line.startswith("worktree ")]
    return [tree for tree in trees if tree.is_dir()]


def _listed(tree: Path) -> set[int]:
    """The numbers of the processes that DVC has in its lists of locks and of running experiments."""
    temporary = tree / ".dvc" / "tmp"
    files = [temporary / "rwlock", tree / _EXPERIMENTS / "rwlock"]
    files += (tree / _EXPERIMENTS / "run").glob("*/*.json")
    text = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    return {int(number) for number in re.findall(r'"pid": *(\d+)', text)}


def leftovers(folder: Path, mine: Path | None = None) -> Iterator[str]:
    """What a killed `dvc exp run` has left that would disturb the next one, in words.

    `mine` is the folder in which an experiment runs that is alive; None: none runs.

    Raises:
        GitError: git does not work here.
    """
    if left := _left(folder, alive=mine is not None and mine.samefile(folder)):
        yield f"git is off its branch {left.branch}"
    if _is_put_aside(folder):
        yield "your uncommitted changes are in `git stash`"
    if _refs(folder, (_WAITING,)):
        yield "an experiment still waits to be run"
    yield from (
        f"{path} is still there" for path in _beside(folder) if mine is None or path != mine.resolve()
    )


def refuse_leftovers(folder: Path, mine: Path | None = None, known: Collection[int] = ()) -> None:
    """Raise a UserError about `leftovers`, unless another DVC than those with `known` numbers runs here.

    `mine` is as for `leftovers`. Raises GitError if git does not work here.
    """
    left = list(leftovers(folder, mine))
    if left and {each.pid for each in running_dvc(folder)} <= set(known):
        raise UserError(
            f"A `dvc exp run` was killed here: {'; '.join(left)}.\n"
            "Type `aplsmear mend`, then the same command again."
        )


def _mend_ref_locks(folder: Path) -> Iterator[str]:
    """Remove the lock files of DVC's own refs in git; a DVC killed in writing a ref leaves one."""
    refs = folder / git(folder, "rev-parse", "--git-common-dir") / "refs" / "exps"
    for path in sorted(refs.rglob("*.lock")):
        path.unlink()
        yield f"removed {path}: it belonged to a DVC that no longer runs"


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
    """Repair what a killed `dvc exp run` has left; no experiment may be running.

    All worktrees have the same refs. They stay until no other worktree needs them.
    """
    left, aside = _left(folder), _is_put_aside(folder)
    if left and left.has_merge:
        # DVC removes all changes from the workspace, and then takes them back from there.
        show = ("diff", "-z", "--name-only", f"{_MERGE}^", _MERGE, "--", ".", ":(exclude).dvc/tmp")
        lost = git(folder, *show).rstrip("\0")
        if lost and git(folder, "diff", "--quiet", f"{_MERGE}^", fails=1) is not None:
            git(folder, "stash", "apply", _MERGE)
            yield f"your uncommitted changes are here again: {', '.join(lost.split(chr(0)))}"
    others = [tree for tree in worktrees(folder) if not tree.samefile(folder) and _left(tree)]
    for tree in others:
        yield f"an experiment was killed in {tree}, too: type `aplsmear mend` there"
    for ref in [] if others else _refs(folder, _REFS):
        git(folder, "update-ref", "-d", ref)
        yield f"removed {ref}: it belonged to an experiment that was killed"
    if left:
        git(folder, "symbolic-ref", "-m", "aplsmear mend", "HEAD", f"refs/heads/{left.branch}")
        git(folder, "restore", "--staged", ":/")  # the index alone, as DVC does it
        yield f"git is on the branch {left.branch} again"
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


@dataclass(frozen=True)
class _Left:
    """How a killed `dvc exp run` left a worktree off its branch."""

    branch: str
    has_merge: bool  # whether `_MERGE` holds the changes of this worktree, and not those of another one


def _left(folder: Path, alive: bool = False) -> _Left | None:
    """Whether a killed `dvc exp run` took git off its branch in a worktree.

    None: git is on a branch, a person took it off, or commits were made since; or an experiment that is
    `alive` runs in the workspace, which takes git off its branch as long as it does.
    """
    if git(folder, "symbolic-ref", "--quiet", "HEAD", fails=1):
        return None
    moves = list(dropwhile(lambda each: re.match(_OWN_MOVES, each[1]), _moves(folder)))
    when, move = moves[0] if moves else (0, "")
    found = re.fullmatch(rf"checkout: moving from (\S+) to {_COMMIT}", move)
    # DVC sets its ref first, and then takes git off the branch.
    merged = int(git(folder, "for-each-ref", "--format=%(creatordate:unix)", _MERGE) or 0)
    if not found or (alive and when >= merged):
        return None
    branch = f"refs/heads/{found[1]}"
    if not git(folder, "for-each-ref", branch) or git(folder, "rev-list", f"HEAD..{branch}"):
        return None
    ahead = git(folder, "log", "--format=%s", f"{branch}..HEAD").splitlines()
    if not all(each.startswith("dvc: commit experiment") for each in ahead):
        return None
    # A person can detach HEAD in the same way (`git checkout COMMIT`), also before the experiment or after
    # its end. DVC does it twice, the second time right after the end of the first. In the first it has just
    # written its list of locks, or has put changes aside. Before the second it writes a file about the run.
    ended = f"dvc: Restore HEAD to '{found[1]}'"
    last = [each for then, each in moves[:3] if when - then <= _STASHING]
    twice = last == [move, ended, move]
    has_merge = twice and 0 <= when - merged <= _STASHING
    runs = (folder / _EXPERIMENTS / "run").glob("*/*.run")
    began = [_time(run) for run in runs if '"location": "workspace"' in run.read_text("utf-8")]
    lock = folder / _EXPERIMENTS / "rwlock"
    locked = _time(lock) if lock.exists() and '"workspace"' in lock.read_text("utf-8") else 0
    before = moves[1][0] if len(moves) > 1 else 0
    sure = (
        has_merge
        or (twice and any(0 <= when - time <= _STASHING for time in began))
        or (before < locked <= when <= locked + _STASHING)
        or _is_put_aside(folder)
    )
    return _Left(found[1], has_merge) if sure else None


def _time(path: Path) -> int:
    """When a file was written: seconds since 1970, as git counts them."""
    return int(path.stat().st_mtime)


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
        kept, now = Path(cache.oid_to_path(expected)), "removed, `dvc repro` makes it again"
        if kept.is_file():
            copy_whole(kept, file)
            now = "it is here again, from DVC's cache"
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
