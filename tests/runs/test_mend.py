"""`aplsmear mend` repairs what kills and failing disks leave behind, and touches nothing else.

A stage refuses to run in what a killed `dvc exp run` has left, and names this command.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from dvc.scm import Git

from aplsmear.errors import UserError
from aplsmear.runs.mend import is_dvc, mend
from clones import ROOT, commit, run, start
from flips import flip

# DVC's own use of SQLite and of threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

EXPERIMENT = ("dvc", "exp", "run", "--name", "killed", "-S", "knob=2")
STAGE = """
import time
from pathlib import Path
from aplsmear.runs.stage import run

def main():
    print("At work", flush=True)
    time.sleep(float(Path("nap").read_text()))
    params = Path("params.yaml").read_text()
    Path("folder").mkdir(exist_ok=True)
    Path("folder/a").write_text(params)
    Path("file").write_text(params * 2)

run(main)
"""
NOTES = "notes of a person, not committed\n"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one quick stage that has run."""
    folder = tmp_path_factory.mktemp("mend") / "first"
    folder.mkdir()
    cmd = f"env PYTHONPATH={ROOT / 'src'} {sys.executable} -P stage.py"
    stage = {"cmd": cmd, "params": ["knob"], "deps": ["stage.py"], "outs": ["folder", "file"]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"make": stage}}))
    (folder / "stage.py").write_text(STAGE)
    (folder / "params.yaml").write_text("knob: 1\n")
    (folder / "notes").write_text("")
    (folder / "nap").write_text("0\n")
    run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    run(folder, "dvc", "init", "--quiet")
    run(folder, "dvc", "repro")
    (folder / ".gitignore").write_text("/folder\n/file\n/nap\n")
    commit(folder)
    return folder


@pytest.fixture
def place(first: Path, tmp_path: Path) -> Path:
    return shutil.copytree(first, tmp_path / "clone", symlinks=True)


def objects(place: Path) -> list[Path]:
    return sorted(path for path in place.glob(".dvc/cache/files/md5/*/*") if path.suffix != ".dir")


def whole(place: Path) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name in ("file", "folder/a", "dvc.lock", "params.yaml")}


def branch(place: Path) -> str:
    """What git says of the branch: ``## main``, or ``## HEAD (no branch)``."""
    return run(place, "git", "status", "--branch", "--short").splitlines()[0]


def begun(place: Path, *command: str) -> subprocess.Popen[str]:
    """The command, the first process of a group of its own, whose stage is at work and takes a minute."""
    if "--temp" in command:
        run(place, "git", "add", "--force", "nap")  # else it is not in the folder beside the workspace
    (place / "nap").write_text("60\n")
    process = start(place, "setsid", *command)
    assert process.stdout is not None
    while "At work" not in process.stdout.readline():
        assert process.poll() is None
    (place / "nap").write_text("0\n")
    return process


def kill(process: subprocess.Popen[str]) -> None:
    """With its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_nothing_to_mend_is_left_alone(place: Path) -> None:
    (place / "file").write_text("changed by hand, as DVC sees itself")
    before = whole(place)
    assert list(mend(place)) == []
    assert whole(place) == before


@pytest.mark.parametrize("where", ["out", "cache", "both"])
def test_a_flipped_bit_is_named_and_mended_from_what_is_sound(place: Path, where: str) -> None:
    before = whole(place)
    run(place, "dvc", "status")  # DVC has looked at all of it
    if where != "cache":
        flip(place / "folder" / "a")
    if where != "out":
        for path in objects(place):
            path.chmod(0o644)
            flip(path)
            path.chmod(0o444)
    assert "up to date" in run(place, "dvc", "status")  # DVC does not notice
    lines = list(mend(place))
    assert all(line.startswith(("damaged: ", "object ")) for line in lines)
    assert any("folder/a" in line for line in lines) or where == "cache"
    assert list(mend(place)) == []
    printed = run(place, "dvc", "repro")
    assert ("Running stage" in printed) == (where == "both")
    assert whole(place) == before
    (place / "file").unlink()
    run(place, "dvc", "checkout")  # the cache is whole again, too
    assert whole(place) == before


@pytest.mark.parametrize("name", ["dvc.lock", "params.yaml"])
def test_a_file_that_dvc_was_killed_in_writing_is_restored_from_the_last_commit(
    place: Path, name: str
) -> None:
    before = whole(place)
    (place / name).write_bytes(before[name][: len(before[name]) // 2].rstrip() + b"\n  - : [")
    assert name in run(place, "dvc", "repro", ok=False)
    assert [name in line for line in mend(place)] == [True]
    assert "Running stage" not in run(place, "dvc", "repro")
    assert whole(place) == before


def test_a_list_of_locks_that_was_cut_off_or_belongs_to_the_dead_is_removed(place: Path) -> None:
    lock = place / ".dvc" / "tmp" / "rwlock"
    lock.write_text("")
    assert "corrupted" in run(place, "dvc", "repro", ok=False)
    assert [str(lock) in line for line in mend(place)] == [True]
    mine = {"pid": os.getpid(), "cmd": "dvc repro, killed; another process has its number now"}
    lock.write_text(json.dumps({"write": {str(place / "file"): mine}, "read": {}}))
    assert "busy" in run(place, "dvc", "repro", "--force", ok=False)
    assert len(list(mend(place))) == 1


def test_a_lock_of_a_ref_that_a_killed_dvc_left_is_removed_and_others_stay(place: Path) -> None:
    lock, other = place / ".git/refs/exps/stash.lock", place / ".git/refs/tags/mine.lock"
    lock.parent.mkdir(parents=True)
    for path in (lock, other):
        path.touch()
    assert "File exists" in run(place, *EXPERIMENT, ok=False)
    assert any(str(lock.relative_to(place)) in line for line in mend(place))
    assert other.exists()
    run(place, *EXPERIMENT)


@pytest.mark.parametrize("again", [EXPERIMENT, ("dvc", "repro")], ids=["the same", "dvc repro"])
def test_after_a_killed_experiment_a_stage_refuses_and_names_the_command_that_helps(
    place: Path, again: tuple[str, ...]
) -> None:
    (place / "notes").write_text(NOTES)
    kill(begun(place, *EXPERIMENT))
    assert branch(place) == "## HEAD (no branch)"
    printed = run(place, *again, ok=False)
    assert "git is off its branch main" in printed
    assert "Type `aplsmear mend`, then the same command again." in printed
    assert "git is on the branch main again" in list(mend(place))
    assert list(mend(place)) == []
    run(place, *again)
    assert branch(place) == "## main"
    assert (place / "notes").read_text() == NOTES
    assert (place / "file").read_text() == "knob: 2\n" * 2
    assert run(place, "git", "diff", "--cached", "--name-only") == ""  # nothing staged
    if again == EXPERIMENT:
        (name,) = run(place, "git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/killed").split()
        assert run(place, "git", "rev-parse", "main").strip() in name.replace("/", "")
        assert run(place, "git", "show", f"{name}:notes") == NOTES
        assert run(place, "git", "show", f"{name}:params.yaml") == "knob: 2\n"


def test_an_experiment_beside_the_workspace_that_was_killed_leaves_no_folder(place: Path) -> None:
    command = (*EXPERIMENT, "--temp")
    kill(begun(place, *command))
    assert "standalone/tmp" in run(place, *command, ok=False)
    assert any(line.startswith("removed") for line in mend(place))
    run(place, *command)
    assert list(place.glob(".dvc/tmp/exps/standalone/tmp*")) == []
    assert branch(place) == "## main"


def test_nothing_is_touched_while_dvc_runs_in_the_repository_or_in_another_worktree(place: Path) -> None:
    tree = place.parent / "worktree"
    run(place, "git", "worktree", "add", "--quiet", "--detach", str(tree))
    process = begun(place, *EXPERIMENT)
    refs = run(place, "git", "for-each-ref")
    for folder in (place, tree):
        with pytest.raises(UserError, match="DVC is running here"):
            list(mend(folder))
    assert run(place, "git", "for-each-ref") == refs
    kill(process)


@pytest.mark.parametrize("how", ["--detach", "COMMIT"])
def test_a_person_may_leave_the_branch(place: Path, how: str) -> None:
    run(place, *EXPERIMENT)
    full = run(place, "git", "rev-parse", "HEAD").strip()
    run(place, "git", "checkout", "--quiet", how.replace("COMMIT", full))
    assert list(mend(place)) == []
    run(place, "dvc", "exp", "run", "--name", "off-the-branch", "-S", "knob=3")
    run(place, "dvc", "repro", "--force")
    assert list(mend(place)) == []
    assert branch(place) == "## HEAD (no branch)"


def by_hand(place: Path) -> str:
    """Leave the branch as a person does, and return the commit."""
    commit_ = run(place, "git", "rev-parse", "HEAD").strip()
    run(place, "git", "checkout", "--quiet", commit_)
    return commit_


def before_it(place: Path) -> None:
    by_hand(place)
    kill(begun(place, *EXPERIMENT))


def after_one_beside_the_workspace(place: Path) -> None:
    kill(begun(place, *EXPERIMENT, "--temp"))
    by_hand(place)


def after_it(place: Path) -> None:
    kill(begun(place, *EXPERIMENT))
    run(place, "git", "checkout", "--quiet", "--force", "main")
    by_hand(place)


@pytest.mark.parametrize("left", [before_it, after_one_beside_the_workspace, after_it])
def test_the_branch_stays_left_where_a_person_left_it_before_or_after_an_experiment_that_was_killed(
    place: Path, left: Callable[[Path], None]
) -> None:
    left(place)
    assert list(mend(place)) != []
    assert branch(place) == "## HEAD (no branch)"
    assert list(mend(place)) == []


def test_mending_in_one_worktree_leaves_what_another_one_needs(place: Path) -> None:
    tree = place.parent / "other tree"
    run(place, "git", "worktree", "add", "--quiet", "-b", "other", str(tree))
    (place / "notes").write_text(NOTES)
    git = Git(str(place))
    taken_away(git, place)
    git.close()
    refs = run(place, "git", "for-each-ref")
    (line,) = mend(tree)
    assert f"killed in {place}, too" in line
    assert run(place, "git", "for-each-ref") == refs
    assert "your uncommitted changes are here again: notes" in list(mend(place))
    assert (place / "notes").read_text() == NOTES
    assert branch(place) == "## main"
    assert list(mend(tree)) == list(mend(place)) == []
    assert branch(tree) == "## other"


def in_the_stash(git: Git, place: Path) -> None:
    git.stash.push()
    git.checkout(git.get_rev(), detach=True)


def for_the_experiment(git: Git, place: Path) -> None:
    stashed = git.stash.push()
    git.checkout(git.get_rev(), detach=True)
    git.stash.apply(stashed)
    (place / "params.yaml").write_text("knob: 2\n")


def taken_away(git: Git, place: Path) -> None:
    kept = run(place, "git", "stash", "create").strip()
    with git.detach_head(client="dvc"):
        pass
    run(place, "git", "update-ref", "refs/exps/exec/EXEC_MERGE", kept)
    git.checkout(git.get_rev(), detach=True, force=True)


@pytest.mark.parametrize("moment", [in_the_stash, for_the_experiment, taken_away])
def test_changes_that_dvc_held_when_it_was_killed_are_here_again(
    place: Path, moment: Callable[[Git, Path], None]
) -> None:
    """The three moments of `dvc exp run` before its first stage, in DVC's own steps."""
    (place / "notes").write_text(NOTES)
    git = Git(str(place))
    moment(git, place)
    git.close()
    assert ((place / "notes").read_text() == NOTES) == (moment == for_the_experiment)
    if moment == in_the_stash:
        assert "`git stash`" in run(place, *EXPERIMENT, ok=False)
    assert len(list(mend(place))) >= 2
    assert (place / "notes").read_text() == NOTES
    assert list(mend(place)) == []
    assert run(place, "git", "stash", "list") == ""
    run(place, *EXPERIMENT)
    assert branch(place) == "## main"


def test_what_a_person_put_into_the_stash_stays_there(place: Path) -> None:
    (place / "notes").write_text(NOTES)
    run(place, "git", "stash")
    time.sleep(1.1)  # git's times are seconds
    lock = place / ".dvc" / "tmp" / "exps" / "rwlock"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"read": {}, "write": {"workspace": {"pid": 1, "cmd": "dvc exp run"}}}))
    git = Git(str(place))
    git.checkout(git.get_rev(), detach=True)  # by DVC, which held the lock when it was killed
    git.close()
    assert any("branch main again" in line for line in mend(place))
    assert run(place, "git", "stash", "list").count("\n") == 1


def test_a_dvc_of_another_user_counts_if_a_list_of_dvc_names_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system hides the folder of such a process, and some systems its command line."""
    other = SimpleNamespace(pid=os.getpid(), info={"cmdline": ["/usr/bin/dvc", "exp", "run"], "cwd": None})
    monkeypatch.setattr("psutil.process_iter", lambda _: [other])
    assert list(mend(place)) == []  # it may run in another repository
    folder = place / ".dvc" / "tmp" / "exps" / "run" / "workspace"
    folder.mkdir(parents=True)
    (folder / "workspace.json").write_text(json.dumps({"pid": os.getpid(), "stdin": None}))
    for words in (other.info["cmdline"], None):
        other.info["cmdline"] = words
        with pytest.raises(UserError, match=f"DVC is running here .process {os.getpid()}"):
            list(mend(place))
    other.info["cmdline"] = ["/usr/bin/vim"]  # the number is used again
    assert list(mend(place)) == []


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("/a b/.venv/bin/python /a b/.venv/bin/dvc repro", True),
        ("python3.11 -u -m dvc exp queue-worker", True),
        ("python -P -m dvc repro", True),
        ("dvc repro", True),
        ("vim dvc", False),
        ("tail -f dvc", False),
        ("", False),
    ],
)
def test_a_command_line_of_dvc_is_told_from_others(line: str, is_one: bool) -> None:
    assert is_dvc(line.replace("a b", "a-b").split()) == is_one


def test_where_git_fails_mend_says_why(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(UserError, match="dubious ownership"):
        list(mend(place))


def test_where_another_user_owns_the_repository_mend_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_right(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", ".dvc/tmp/lock")

    monkeypatch.setattr("aplsmear.runs.mend._lock", no_right)
    with pytest.raises(UserError, match=r"\.dvc/tmp/lock: you may not write there.*user who owns"):
        list(mend(place))
