"""`aplsmear mend` puts right what kills and failing disks leave behind, and touches nothing else."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from dvc.scm import Git

from aplsmear.errors import UserError
from aplsmear.runs.mend import mend
from clones import commit, run, start
from flips import flip

# DVC's own use of SQLite and of threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

CMD = "mkdir -p folder && cp params.yaml folder/a && cat params.yaml params.yaml > file && sleep $(cat nap)"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one quick stage that has run."""
    folder = tmp_path_factory.mktemp("mend") / "first"
    folder.mkdir()
    stage = {"cmd": CMD, "params": ["knob"], "outs": ["folder", "file"]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"make": stage}}))
    (folder / "params.yaml").write_text("knob: 1\n")
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
    assert "up to date" in run(place, "dvc", "status")  # that is why
    said = list(mend(place))
    assert all(line.startswith(("damaged: ", "object ")) for line in said)
    assert any("folder/a" in line for line in said) or where == "cache"
    assert list(mend(place)) == []
    printed = run(place, "dvc", "repro")
    assert ("Running stage" in printed) == (where == "both")
    assert whole(place) == before
    (place / "file").unlink()
    run(place, "dvc", "checkout")  # the cache is whole again, too
    assert whole(place) == before


@pytest.mark.parametrize("name", ["dvc.lock", "params.yaml"])
def test_a_file_that_dvc_was_killed_in_writing_is_that_of_the_last_commit(place: Path, name: str) -> None:
    before = whole(place)
    (place / name).write_bytes(before[name][: len(before[name]) // 2].rstrip() + b"\n  - : [")
    assert name in run(place, "dvc", "repro", ok=False)
    assert [name in line for line in mend(place)] == [True]
    assert "Running stage" not in run(place, "dvc", "repro")
    assert whole(place) == before


def test_a_lock_that_dvc_was_killed_in_writing_goes_and_that_of_the_dead_too(place: Path) -> None:
    lock = place / ".dvc" / "tmp" / "rwlock"
    lock.write_text("")
    assert "corrupted" in run(place, "dvc", "repro", ok=False)
    assert [str(lock) in line for line in mend(place)] == [True]
    mine = {"pid": os.getpid(), "cmd": "dvc repro of another life"}  # a number that is in use again
    lock.write_text(json.dumps({"write": {str(place / "file"): mine}, "read": {}}))
    assert "busy" in run(place, "dvc", "repro", "--force", ok=False)
    assert len(list(mend(place))) == 1


def test_an_experiment_that_was_killed_gives_git_its_branch_back(place: Path) -> None:
    (place / "nap").write_text("60\n")
    command = ("dvc", "exp", "run", "--name", "killed", "-S", "knob=2")
    process = start(place, "setsid", *command)
    assert process.stdout is not None
    for line in process.stdout:
        if "Running stage" in line:
            break
    with pytest.raises(UserError, match="at work here"):
        list(mend(place))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "(no branch)" in run(place, "git", "status", "--branch", "--short")
    said = "\n".join(mend(place))
    assert "branch main again" in said
    (place / "nap").write_text("0\n")
    run(place, *command)
    assert "## main" in run(place, "git", "status", "--branch", "--short")
    assert (place / "file").read_text() == "knob: 2\n" * 2
    assert list(mend(place)) == []
    run(place, "git", "checkout", "--quiet", "--force", "HEAD~0")  # off the branch by hand: so it stays
    assert list(mend(place)) == []
    assert "(no branch)" in run(place, "git", "status", "--branch", "--short")


def changed(place: Path) -> Path:
    """A file that is in git and that a person has changed."""
    file = place / "dvc.yaml"
    file.write_text(f"{file.read_text()}# mine\n")
    return file


@pytest.mark.parametrize("moment", ["put aside", "for the experiment", "taken away"])
def test_changes_that_dvc_held_when_it_was_killed_are_here_again(place: Path, moment: str) -> None:
    """The three moments of `dvc exp run` before its first stage, in DVC's own steps."""
    file = changed(place)
    wanted = file.read_text()
    git = Git(str(place))
    if moment == "taken away":
        run(
            place,
            "git",
            "update-ref",
            "refs/exps/exec/EXEC_MERGE",
            run(place, "git", "stash", "create").strip(),
        )
        git.checkout(git.get_rev(), detach=True, force=True)
    else:
        stashed = git.stash.push()
        git.checkout(git.get_rev(), detach=True)
        if moment == "for the experiment":
            git.stash.apply(stashed)
            (place / "params.yaml").write_text("knob: 2\n")
    git.close()
    assert (file.read_text() == wanted) == (moment == "for the experiment")
    assert len(list(mend(place))) >= 2
    assert file.read_text() == wanted
    assert list(mend(place)) == []
    assert run(place, "git", "stash", "list") == ""


def test_what_a_person_put_aside_stays_there(place: Path) -> None:
    changed(place)
    run(place, "git", "stash")
    git = Git(str(place))
    git.checkout(git.get_rev(), detach=True)  # by DVC, at once
    git.close()
    assert len(list(mend(place))) == 1
    assert run(place, "git", "stash", "list").count("\n") == 1
