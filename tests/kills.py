"""Kills a command at a chosen moment, and compares what is there with a run that was not disturbed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from clones import UNSET, run

OF_A_RUN = ("refs/exps/stash", "refs/exps/temp", "refs/exps/exec/EXEC_BASELINE", "refs/exps/exec/EXEC_MERGE")
KEPT = (".git", ".dvc", ".studies", ".finetuning", "mlflow.db", "mlflow.db.lock", "mlartifacts")


@dataclass
class Place:
    """A repository in which commands are killed, and a folder for what programs write elsewhere.

    Attributes:
        folder: a clone.
        outside: becomes TMPDIR and DVC's site cache.
        env: other environment variables of the commands.
    """

    folder: Path
    outside: Path
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of every command that runs here."""
        (self.outside / "tmp").mkdir(parents=True, exist_ok=True)
        return {
            "TMPDIR": str(self.outside / "tmp"),
            "DVC_SITE_CACHE_DIR": str(self.outside / "dvc"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONPATH": str(self.folder / "src"),
        } | dict(self.env)

    def run(self, *command: str, ok: bool = True) -> str:
        """Run a command and return what it prints."""
        return run(self.folder, *command, env=self.environment, ok=ok)

    def code(self, *command: str) -> tuple[int, str]:
        """Run a command and return its exit code and what it prints."""
        done = self.start(*command)
        printed, _ = done.communicate()
        return done.returncode, printed

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command as the first process of a new process group."""
        whole = {key: value for key, value in os.environ.items() if key not in UNSET}
        whole |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "true",
        } | self.environment
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=whole,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def files(self) -> dict[str, str]:
        """The SHA-256 of every file in the workspace, without what git, DVC, MLflow and Optuna keep."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if name.parts[0] not in KEPT and "__pycache__" not in name.parts and path.is_file():
                found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def leftovers(self) -> list[str]:
        """What a killed command has left for a person to clean up."""
        found = [f".finetuning/{path.name}/" for path in self.folder.glob(".finetuning/*/")]
        found += [str(path) for path in self.folder.glob(".dvc/tmp/exps/standalone/tmp*")]
        found += [f"{path.name} in .git" for path in self.folder.glob(".git/**/*.lock")]
        locks = self.folder / ".dvc" / "tmp" / "rwlock"
        try:
            json.loads(locks.read_text(encoding="utf-8") if locks.exists() else "{}")
        except ValueError:
            found.append(".dvc/tmp/rwlock is cut off")
        found += [f"stash: {line}" for line in self.run("git", "stash", "list").splitlines()]
        refs = self.run("git", "for-each-ref", "--format=%(refname)").split()
        found += [ref for ref in refs if ref.startswith(OF_A_RUN)]
        if "(no branch)" in self.run("git", "status", "--branch", "--short"):
            found.append("git is off its branch")
        return found

    def litter(self) -> int:
        """Bytes in the folder for temporary files, which the system empties at some time."""
        return sum(path.stat().st_size for path in (self.outside / "tmp").rglob("*") if path.is_file())

    def unreadable(self) -> list[str]:
        """Databases and studies that do not open, and MLflow runs that count as running."""
        import optuna
        from optuna.storages.journal import JournalFileBackend

        found = []
        database = self.folder / "mlflow.db"
        if database.exists():
            with sqlite3.connect(database) as connection:
                (verdict,) = connection.execute("pragma integrity_check").fetchone()
                running = connection.execute("select count(*) from runs where status = 'RUNNING'").fetchone()
            connection.close()
            found += [] if verdict == "ok" else [f"mlflow.db: {verdict}"]
            found += [f"mlflow.db: {running[0]} runs still count as running"] if running[0] else []
        for journal in self.folder.glob(".studies/*.journal"):
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
            if not storage.get_all_studies():
                found.append(f"{journal.name} holds no study")
        return found


def stages(folder: Path) -> dict[str, dict[str, list[str]]]:
    """The outs of each stage in dvc.lock: path -> hash."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))
    return {
        name: {out["path"]: out["md5"] for out in stage.get("outs", [])}
        for name, stage in lock["stages"].items()
    }


def forget(place: Place, stage: str) -> None:
    """Delete the outs of a stage, here and in DVC's cache, so that it must run again."""
    for path, md5 in stages(place.folder)[stage].items():
        out = place.folder / path
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        (place.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink(missing_ok=True)
    shutil.rmtree(place.folder / ".dvc/cache/runs", ignore_errors=True)


def kill(place: Place, command: Sequence[str], seconds: float, after: str = "") -> tuple[bool, str]:
    """Start a command and kill it with all its children.

    Args:
        place: the clone.
        command: its words.
        seconds: from the start of the command to the kill.
        after: a regular expression; if not empty, seconds count from the line that matches it.

    Returns:
        Whether it was still running when it was killed, and what it had printed.
    """
    process = place.start(*command)
    printed: list[str] = []
    seen = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if after and re.search(after, line):
                seen.set()
        seen.set()  # the command has ended

    reader = threading.Thread(target=read)
    reader.start()
    if after:
        seen.wait()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reader.join()
    assert process.stdout is not None
    process.stdout.close()
    return running, "".join(printed)


def timed(place: Place, *command: str) -> dict[str, float]:
    """Run a command to its end and return the seconds of each stage, and of the whole under ''."""
    began = time.monotonic()
    process = place.start(*command)
    starts: list[tuple[str, float]] = []
    printed = []
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            printed.append(line)
            if found := re.search(r"Running stage '([^']+)'", line):
                starts.append((found[1], time.monotonic()))
    assert process.wait() == 0, "".join(printed)
    ended = time.monotonic()
    ends = [*(start for _, start in starts), ended][1:]
    took = {name: end - start for (name, start), end in zip(starts, ends, strict=True)}
    return took | {"": ended - began}
