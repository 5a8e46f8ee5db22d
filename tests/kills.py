"""Kills a command at a chosen moment, has it done again, and tells what is not as if nothing had happened."""

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from clones import UNSET, run

OF_A_RUN = ("refs/exps/stash", "refs/exps/temp", "refs/exps/exec/EXEC_BASELINE", "refs/exps/exec/EXEC_MERGE")
KEPT = (".git", ".dvc", ".studies", ".finetuning", "mlflow.db", "mlflow.db.lock", "mlartifacts")


@dataclass
class Place:
    """A repository in which things break, with a home of its own for what programs leave outside.

    Attributes:
        folder: a clone.
        outside: becomes TMPDIR and DVC's folder for the site.
        env: what else the commands see.
    """

    folder: Path
    outside: Path
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Of every command that runs here."""
        (self.outside / "tmp").mkdir(parents=True, exist_ok=True)
        return {
            "TMPDIR": str(self.outside / "tmp"),
            "DVC_SITE_CACHE_DIR": str(self.outside / "dvc"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONPATH": str(self.folder / "src"),
        } | dict(self.env)

    def run(self, *command: str, ok: bool = True) -> str:
        """What the command prints."""
        return run(self.folder, *command, env=self.environment, ok=ok)

    def code(self, *command: str) -> tuple[int, str]:
        """How the command ends, and what it prints."""
        done = self.start(*command)
        printed, _ = done.communicate()
        return done.returncode, printed

    def start(self, *command: str) -> subprocess.Popen[str]:
        """The command, the first process of a group of its own."""
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
        """SHA-256 of every file that a command could have written in the workspace, and what git sees."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if name.parts[0] not in KEPT and "__pycache__" not in name.parts and path.is_file():
                found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def settle(self, seconds: float = 10) -> None:
        """Wait until the guards (`aplsmear.runs.guard`) of what ran here have done what they are for."""
        deadline = time.monotonic() + seconds
        while any(self.guards()):
            assert time.monotonic() < deadline, "a guard does not end"
            time.sleep(0.02)

    def guards(self) -> Iterator[psutil.Process]:
        """Those that are alive."""
        top = str(self.folder.resolve())
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "aplsmear.runs.guard" in words and top in words:
                yield process

    def leftovers(self) -> list[str]:
        """What a person would have to clean up."""
        self.settle()
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
        """Bytes in the folder for temporary files: the system clears it, sooner or later."""
        return sum(path.stat().st_size for path in (self.outside / "tmp").rglob("*") if path.is_file())

    def unreadable(self) -> list[str]:
        """Databases and studies that no longer open."""
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
            found += [f"mlflow.db: {running[0]} runs for ever running"] if running[0] else []
        for journal in self.folder.glob(".studies/*.journal"):
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
            if not storage.get_all_studies():
                found.append(f"{journal.name} holds no study")
        return found


def stages(folder: Path) -> dict[str, dict[str, list[str]]]:
    """The outs of each stage, as dvc.lock has them: path and hash."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))
    return {
        name: {out["path"]: out["md5"] for out in stage.get("outs", [])}
        for name, stage in lock["stages"].items()
    }


def forget(place: Place, stage: str) -> None:
    """Take away what a stage made, here and in DVC's cache, so that it has to run again."""
    for path, md5 in stages(place.folder)[stage].items():
        out = place.folder / path
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        (place.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink(missing_ok=True)
    shutil.rmtree(place.folder / ".dvc/cache/runs", ignore_errors=True)


def kill(place: Place, command: Sequence[str], seconds: float, after: str = "") -> tuple[bool, str]:
    """Start a command and kill it with all its children.

    Args:
        place: where.
        command: it.
        seconds: to wait before the kill.
        after: a regular expression; seconds count from when it was printed. Empty: from the start.

    Returns:
        Whether it was still running, and what it had printed.
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
        seen.set()  # it has ended, or all of its children have been killed

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
    """Run a command to its end; the seconds that each stage took, and '' the whole."""
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
