"""A Dask scheduler and workers on 127.0.0.1, started by the commands that a user types."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aplsmear.cpu import PINNED
from clones import ROOT

SRC = str(ROOT / "src")
FIT = ("--nthreads", "1", "--preload-nanny", "aplsmear")


class Servers:
    """A context manager; all processes that it has started end with it. Workers have names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = ""
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Servers":
        self.scheduler()
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self.processes):
            self.kill(name)

    def scheduler(self) -> None:
        """Start the scheduler at a free port, or at its port of before."""
        known, port = self.folder / "scheduler.json", self.address.rpartition(":")[2] or "0"
        known.unlink(missing_ok=True)
        self._start("scheduler", "scheduler", "--port", port, "--scheduler-file", str(known))
        until(known.exists)
        self.address = json.loads(known.read_text())["address"]

    def worker(self, name: str, *words: str, src: str = SRC) -> None:
        """Start a worker; it needs some seconds to join."""
        room = ("--local-directory", str(self.folder))
        self._start(name, "worker", self.address, "--name", name, *room, *(words or FIT), src=src)

    def kill(self, name: str) -> None:
        """Kill a process with its children, as a power cut does."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _start(self, name: str, *words: str, src: str = SRC) -> None:
        command = [sys.executable, "-m", "dask", *words, "--host", "127.0.0.1", "--no-dashboard"]
        environment = {key: value for key, value in os.environ.items() if key not in PINNED}
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment | {"PYTHONPATH": src},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def workers(client: Any) -> dict[str, str]:
    """The workers of a scheduler: name -> address."""
    found = client.scheduler_info(n_workers=-1)["workers"]
    return {each["name"]: address for address, each in found.items()}


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
