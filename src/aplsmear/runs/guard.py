"""A process beside DVC that outlives a kill of DVC and puts right what only DVC's own end would have.

``python -m aplsmear.runs.guard PID TOP HERE [MINE]`` is started by a stage; see `start` and `watch`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from aplsmear.runs.mend import (
    alone,
    at_work,
    experiment_at_work,
    is_cut_off,
    is_dvc,
    left_branch,
    mend_branch,
    mend_experiments,
    mend_texts,
    remains,
)

LOG = "guard.log"  # in .dvc/tmp: what guards did, and why they could not


def start(top: Path) -> None:
    """See that a guard watches the DVC that runs this process: one for all stages of a run.

    It is of a session of its own, so that who kills DVC with all of its children does not kill it, and it
    ends when DVC has. An experiment of the queue needs none: DVC keeps account of these itself.

    Args:
        top: the top of the repository that DVC was called in.
    """
    import psutil

    here, top = Path().resolve(), top.resolve()
    if here != top and not _is_beside(here):
        return
    above = psutil.Process().parents()
    dvc = next((each for each in above if is_dvc(each.as_dict(["cmdline"])["cmdline"])), None)
    if dvc is None:
        return  # DVC as a library of another program, which is not ours to watch
    mine = experiment_at_work(top) if "DVC_EXP_NAME" in os.environ and here == top else None
    words = ["-m", "aplsmear.runs.guard", str(dvc.pid), str(top), str(here), *([mine] if mine else [])]
    if any((each.info["cmdline"] or [])[-len(words) :] == words for each in psutil.process_iter(["cmdline"])):
        return
    with (top / ".dvc" / "tmp" / LOG).open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-P", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def others(top: Path) -> bool:
    """Whether a DVC that does not run this process is at work in the repository."""
    import psutil

    above = {process.pid for process in psutil.Process().parents()}
    return any(process.pid not in above for process in at_work(top))


def watch(pid: int, top: Path, here: Path, mine: str = "") -> None:
    """Wait for the end of a DVC, and put right what it then has not put right itself.

    What is of this DVC alone is done at once: the lock is held before the next DVC has come so far as to ask
    for it, so that the same command may be given again at once. What is left of runs that were killed before
    their first stage began is done as soon as no DVC is at work.

    Args:
        pid: the process of DVC.
        top: the top of the repository that it was called in.
        here: where its stages run: `top`, or the folder of an experiment beside the workspace.
        mine: what `experiment_at_work` was for it; empty: it is no `dvc exp run` in the workspace.
    """
    lock = alone(top, patient=True)
    is_cut_off(top / "dvc.lock")  # imports what is needed later, while there is time
    _wait([pid])
    if here != top:
        if here.is_dir():
            shutil.rmtree(here)
            _say(f"removed {here}: an experiment that was cut off ran there")
    elif is_cut_off(top / "dvc.lock") or _is_off(top, mine):
        with lock:
            _say(*mend_texts(top, ["dvc.lock"]))
            if _is_off(top, mine):
                _say(*mend_branch(top))
    while (mine or here != top) and remains(top):
        if busy := [process.pid for process in at_work(top)]:
            _wait(busy)
            continue
        with lock:
            if not any(at_work(top)):
                _say(*mend_experiments(top))
                return


def _is_off(top: Path, mine: str) -> bool:
    """Whether an experiment has ended and left git off its branch, and none has begun since."""
    return bool(mine and left_branch(top)) and experiment_at_work(top) in {mine, None}


def _is_beside(here: Path) -> bool:
    """Whether a folder is that of ``dvc exp run --temp``; those of the queue lie elsewhere."""
    return here.parent.name == "standalone"


def _wait(pids: Iterable[int]) -> None:
    """Until these have ended, if need be as processes that nobody takes note of (zombies)."""
    import psutil

    for pid in filter(psutil.pid_exists, pids):
        try:
            process = psutil.Process(pid)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                psutil.wait_procs([process], timeout=1)
        except psutil.NoSuchProcess:
            continue


def _say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    watch(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
