"""Killed with all its children, DVC leaves nothing to a person but to give the same command again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from dvc.scm import Git

from clones import ROOT, commit
from kills import Place

EXPERIMENT = ("dvc", "exp", "run", "--name", "killed", "-S", "knob=2")
STAGE = """
import os, shutil, sys, time
from aplsmear.runs.stage import run

def main(out):
    print("At work", flush=True)
    time.sleep(float(os.environ.get("NAP", 0)))
    shutil.copy("params.yaml", out)

run(main)
"""
NOTES = "notes of a person, not committed\n"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two quick stages that have run."""
    folder = tmp_path_factory.mktemp("guard") / "first"
    folder.mkdir()
    cmd = f"env PYTHONPATH={ROOT / 'src'} {sys.executable} -P stage.py"
    each = {"params": ["knob"], "deps": ["stage.py"]}
    stages = {name: {"cmd": f"{cmd} {name}", "outs": [name]} | each for name in ("one", "two")}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (folder / "params.yaml").write_text("knob: 1\n")
    (folder / "stage.py").write_text(STAGE)
    (folder / "notes").write_text("")
    place = Place(folder, folder.parent / "outside")
    place.run("git", "init", "--quiet", "--initial-branch", "main")
    place.run("dvc", "init", "--quiet")
    place.run("dvc", "repro")
    (folder / ".gitignore").write_text("/one\n/two\n")
    commit(folder)
    return folder


@pytest.fixture
def place(first: Path, tmp_path: Path) -> Place:
    folder = shutil.copytree(first, tmp_path / "clone", symlinks=True)
    (folder / "notes").write_text(NOTES)
    return Place(folder, tmp_path / "outside")


def started(place: Place, *command: str, nap: float = 60) -> subprocess.Popen[str]:
    """The command, whose first stage is at work and whose guard is there."""
    process = Place(place.folder, place.outside, {"NAP": str(nap)}).start(*command)
    assert process.stdout is not None
    while "At work" not in process.stdout.readline():
        assert process.poll() is None
    return process


def kill(process: subprocess.Popen[str]) -> None:
    """With its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def head(place: Place) -> str:
    return (place.folder / ".git" / "HEAD").read_text().strip()


def wanted(place: Place, knob: int) -> None:
    """As after a run that nobody disturbed."""
    place.settle()
    assert not place.leftovers()
    assert head(place) == "ref: refs/heads/main"
    assert (place.folder / "notes").read_text() == NOTES
    assert all((place.folder / out).read_text() == f"knob: {knob}\n" for out in ("params.yaml", "one", "two"))
    assert place.run("git", "diff", "--cached", "--name-only") == ""  # nothing staged


@pytest.mark.parametrize("beside", [False, True])
def test_an_experiment_needs_the_same_command_alone(place: Place, beside: bool) -> None:
    command = (*EXPERIMENT, "--temp") if beside else EXPERIMENT
    kill(started(place, *command))
    place.run(*command)  # at once: the guard is still at it
    wanted(place, 1 if beside else 2)
    (name,) = place.run("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/killed").split()
    assert place.run("git", "rev-parse", "main").strip() in name.replace("/", "")
    assert place.run("git", "show", f"{name}:notes") == NOTES
    assert place.run("git", "show", f"{name}:params.yaml") == "knob: 2\n"


def test_git_is_back_on_its_branch_without_any_command(place: Place) -> None:
    kill(started(place, *EXPERIMENT))
    began = time.monotonic()
    place.settle()
    assert time.monotonic() - began < 5
    assert not place.leftovers()
    assert (place.folder / "notes").read_text() == NOTES


def test_where_the_guard_died_too_that_of_the_next_run_does_it(place: Place) -> None:
    process = started(place, *EXPERIMENT)
    for guard in place.guards():
        guard.kill()
    kill(process)
    assert "git is off its branch" in place.leftovers()
    place.run(*EXPERIMENT)
    wanted(place, 2)


def test_a_guard_that_comes_late_leaves_the_next_run_alone(place: Place) -> None:
    process = started(place, *EXPERIMENT)
    (late,) = place.guards()
    time.sleep(1)  # in which it begins to watch
    late.suspend()
    kill(process)
    again = started(place, *EXPERIMENT, nap=2)
    late.resume()
    said, _ = again.communicate()
    assert not again.returncode, said
    wanted(place, 2)


def test_who_had_left_the_branch_stays_off_it(place: Place) -> None:
    place.run("git", "checkout", "--quiet", "--detach")
    before = head(place)
    kill(started(place, *EXPERIMENT))
    place.settle()
    assert head(place) == before
    place.run(*EXPERIMENT)
    place.settle()
    assert head(place) == before
    assert place.leftovers() == ["git is off its branch"]


def test_a_lock_file_that_was_cut_off_is_whole_for_the_next_command(place: Place) -> None:
    (place.folder / "params.yaml").write_text("knob: 3\n")
    lock = place.folder / "dvc.lock"
    process = started(place, "dvc", "repro")
    text = lock.read_text()
    lock.write_text(text[: text.index("params") + 3])
    kill(process)
    place.run("dvc", "repro")
    wanted(place, 3)


def test_all_stages_of_a_run_have_one_guard_and_nothing_to_mend_is_left_alone(place: Place) -> None:
    process = Place(place.folder, place.outside, {"NAP": "1"}).start("dvc", "repro", "--force")
    seen = set()
    while process.poll() is None:
        seen |= {guard.pid for guard in place.guards()}
        time.sleep(0.05)
    process.communicate()
    assert len(seen) == 1
    wanted(place, 1)
    assert (place.folder / ".dvc" / "tmp" / "guard.log").read_text() == ""


def test_without_changes_that_lie_in_the_stash_nothing_is_run(place: Place) -> None:
    git = Git(str(place.folder))
    git.stash.push()
    git.checkout(git.get_rev(), detach=True)
    git.close()  # here DVC was killed: it would have brought them back next
    assert "had put your changes aside" in place.run(*EXPERIMENT, ok=False)
    place.settle()
    place.run(*EXPERIMENT)
    wanted(place, 2)
