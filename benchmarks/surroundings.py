"""Failures around the pipeline: disks, memory, other users, servers. Each case has a copy of a small clone.

A case is passed if the command succeeds or fails with a message that names the cause, and if the same command
gives the bytes of an undisturbed run once the cause is removed.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flips import flip
from kills import Place, forget

REPRO = ("dvc", "repro")
NOBODY, SOMEBODY, LAB = 65534, 1, 64000  # users that every system has, and a group for them
FREE = (20_000, 150_000, 500_000)  # bytes on the disk that fills up


@dataclass
class Case:
    """The clone and the folder of a case.

    Attributes:
        spare: a clone in which everything has run.
        wanted: hashes of its files.
        folder: only for this case.
        new: patients for `aplsmear predict`.
    """

    spare: Path
    wanted: dict[str, str]
    folder: Path
    new: Path

    def clone(self, name: str = "clone", root: Path | None = None) -> Place:
        """A copy of the clone."""
        place = Place((root or self.folder) / name, self.folder / f"outside {name}")
        shutil.copytree(self.spare, place.folder, symlinks=True)
        shutil.rmtree(place.folder / ".dvc/cache/runs", ignore_errors=True)
        return place

    def ends_well(self, place: Place, *command: str) -> str:
        """Give the same command again; return what differs from an undisturbed run, or an empty text."""
        code, printed = place.code(*(command or REPRO))
        mended = ""
        if code:
            mended = place.run("aplsmear", "mend", ok=False)
            code, printed = place.code(*(command or REPRO))
        found = place.files()
        differ = sorted(
            name for name in found.keys() | self.wanted if found.get(name) != self.wanted.get(name)
        )
        wrong = [*differ, *place.leftovers(), *place.unreadable(), *([printed[-500:]] if code else [])]
        return f"after `aplsmear mend` ({mended.strip()}): {wrong}" if wrong else ""


class NotHereError(Exception):
    """This machine cannot make the case."""


def last_of(printed: str, pattern: str) -> str:
    """The last line that names the cause."""
    lines = [line.strip() for line in printed.splitlines() if re.search(pattern, line)]
    return lines[-1][:160] if lines else f"SILENT: {printed[-300:]}"


def until(process: subprocess.Popen[str], word: str) -> str:
    """What a command prints up to a line with this word."""
    printed = ""
    for line in process.stdout or ():
        printed += line
        if word in line:
            break
    return printed


def full_disk(case: Case) -> str:
    """The disk is full (at three moments)."""
    if os.geteuid():
        raise NotHereError("mounting needs root")
    told = []
    for free in FREE:
        disk = case.folder / f"disk with {free}"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=True)
        try:
            place = case.clone(root=disk)
            forget(place, "augment")
            size = shutil.disk_usage(disk).used + free
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
            code, printed = place.code(*REPRO)
            told.append(last_of(printed, "disk is full|No space") if code else "enough")
            subprocess.run(["mount", "-o", "remount,size=1G", str(disk)], check=True)
            if wrong := case.ends_well(place):
                return f"WRONG: {wrong}"
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return " / ".join(dict.fromkeys(told))


def as_user(user: int, *command: str) -> tuple[str, ...]:
    """A command of another user, who may read everything (Python may be in root's home)."""
    may = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    return ("setpriv", f"--reuid={user}", f"--regid={LAB}", "--clear-groups", *may, *command)


def of_others(place: Place) -> Place:
    """The same clone, for git commands of users who do not own it."""
    trust = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    return replace(place, env=trust | {"HOME": str(place.outside)})


def give(folder: Path, user: int) -> None:
    subprocess.run(["chown", "-R", f"{user}:{LAB}", str(folder)], check=True)


def no_permission(case: Case) -> str:
    """A folder without permission to write."""
    if os.geteuid() or not shutil.which("setpriv"):
        raise NotHereError("acting as another user needs root and setpriv")
    place = of_others(case.clone())
    forget(place, "member_apl_aml@blast")
    place.run("git", "status")
    give(place.folder, NOBODY)
    give(place.outside, NOBODY)
    os.chown(place.folder / "members" / "apl_aml", 0, 0)
    code, printed = place.code(*as_user(NOBODY, *REPRO))
    if not code:
        return "WRONG: it was not refused"
    os.chown(place.folder / "members" / "apl_aml", NOBODY, LAB)
    wrong = case.ends_well(place, *as_user(NOBODY, *REPRO))
    return f"WRONG: {wrong}" if wrong else last_of(printed, "may not|Permission|permitted|No possible")


def out_of_memory(case: Case) -> str:
    """The memory limit of the machine is reached."""
    group = Path("/sys/fs/cgroup/memory") / f"faults-{os.getpid()}"
    if os.geteuid() or not group.parent.is_dir():
        raise NotHereError("limits of memory need root and cgroups")
    place = case.clone()
    forget(place, "augment")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(230 << 20))
        log = place.outside / "log"
        enter = f'echo $$ > "{group}/cgroup.procs" && exec dvc repro > "{log}" 2>&1'
        code, _ = place.code("sh", "-c", enter)
        printed = log.read_text(encoding="utf-8")
    finally:
        for orphan in (
            (group / "cgroup.procs").read_text().split()
        ):  # worker processes, which would wait some minutes for work
            os.kill(int(orphan), 9)
        time.sleep(1)
        group.rmdir()
    wrong = case.ends_well(place)
    if wrong or not code:
        return f"WRONG: {wrong or 'there was enough memory'}"
    return last_of(printed, "memory|exited with|Killed")


def two_runs(case: Case) -> str:
    """Two runs in one workspace."""
    place = case.clone()
    forget(place, "augment")
    first = place.start(*REPRO)
    until(first, "Running stage")
    code, printed = place.code(*REPRO)
    first.communicate()
    wrong = case.ends_well(place)
    if wrong or first.returncode:
        return f"WRONG: {wrong or 'the first run failed'}"
    return last_of(printed, "is busy|lock:") if code else "the second waits its turn"


def two_users(case: Case) -> str:
    """Two users on one shared cache, at once."""
    if os.geteuid() or not shutil.which("setpriv"):
        raise NotHereError("acting as two users needs root and setpriv")
    cache, users = case.folder / "cache", {"one": NOBODY, "two": SOMEBODY}
    places = {name: of_others(case.clone(name)) for name in users}
    for place in places.values():
        for stage in ("split", "member_apl_healthy@blast", "ensemble_apl_aml"):
            forget(place, stage)
    shutil.copytree(places["one"].folder / ".dvc/cache", cache)
    subprocess.run(["chgrp", "-R", str(LAB), str(cache)], check=True)
    subprocess.run(["chmod", "-R", "g+rwXs", str(cache / "files")], check=True)
    cache.chmod(0o2775)
    for name, place in places.items():
        shutil.rmtree(place.folder / ".dvc/cache")
        for word, value in (("cache.dir", cache), ("cache.shared", "group")):
            place.run("dvc", "config", "--local", word, str(value))
        give(place.folder, users[name])
        give(place.outside, users[name])
    both = [places[name].start(*as_user(user, *REPRO)) for name, user in users.items()]
    printed = [process.communicate()[0] for process in both]
    wrong = [text[-600:] for text, process in zip(printed, both, strict=True) if process.returncode]
    for name, user in users.items():
        wrong += list(filter(None, [case.ends_well(places[name], *as_user(user, *REPRO))]))
    return f"WRONG: {wrong}" if wrong else "both end with the same bytes"


def lost_cache(case: Case) -> str:
    """The folder of a shared cache disappears during a run, and comes back."""
    cache = case.folder / "cache"
    place = case.clone()
    forget(place, "augment")
    shutil.move(place.folder / ".dvc/cache", cache)
    place.run("dvc", "config", "--local", "cache.dir", str(cache))
    process = place.start(*REPRO)
    until(process, "Running stage")
    cache.rename(case.folder / "away")
    cache.write_text("not mounted")  # a file, so that nothing can be written below it
    printed = process.communicate()[0]
    cache.unlink()
    (case.folder / "away").rename(cache)
    wrong = case.ends_well(place)
    if wrong:
        return f"WRONG: {wrong}"
    return last_of(printed, "cache|directory") if process.returncode else "it continues without it"


def clock_set_back(case: Case) -> str:
    """The clock is set back by three days between two stages."""
    if not shutil.which("faketime"):
        raise NotHereError("faketime is not installed")
    place = case.clone()
    for stage in ("split", "tune@blast", "ensemble_apl_aml"):
        forget(place, stage)
    code, printed = place.code("faketime", "-f", "-3d", *REPRO)
    wrong = case.ends_well(place)
    return f"WRONG: {wrong or printed[-500:]}" if wrong or code else "the same bytes"


def flipped(out: str, stage: str) -> Callable[[Case], str]:
    """A case: a bit of an out flips before a stage reads it."""

    def happens(case: Case) -> str:
        place = case.clone()
        forget(place, stage)
        place.run("dvc", "status")  # DVC notes size and time of all files
        flip(place.folder / out)
        code, printed = place.code(*REPRO)
        if not code or out.partition("/")[0] not in printed:
            return f"WRONG: not noticed: {printed[-500:]}"
        mended = place.run("aplsmear", "mend")
        if out not in mended:
            return f"WRONG: not mended: {mended}"
        wrong = case.ends_well(place)
        return f"WRONG: {wrong}" if wrong else last_of(mended, out)

    happens.__doc__ = f"A bit of {out} flips."
    return happens


def flipped_bundle(case: Case) -> str:
    """A bit of a bundle flips."""
    place = case.clone()
    flip(place.folder / "ensembles/apl_aml/model/heads/blast.npz")
    here = ("--ensemble", "ensembles/apl_aml", "--data", str(case.new), "--out", "new.csv")
    code, printed = place.code("aplsmear", "predict", *here)
    place.run("aplsmear", "mend")
    wrong = case.ends_well(place)
    return f"WRONG: {wrong or 'not noticed'}" if wrong or not code else last_of(printed, "heads/blast")


def flipped_object(case: Case) -> str:
    """A bit of every object of DVC's cache flips."""
    place = case.clone()
    objects = [path for path in place.folder.glob(".dvc/cache/files/md5/*/*") if path.suffix != ".dir"]
    for path in objects:
        path.chmod(0o644)
        flip(path)
        path.chmod(0o444)
    mended = place.run("aplsmear", "mend")
    named = mended.count("of DVC's cache")
    shutil.rmtree(place.folder / "splits")
    wrong = case.ends_well(place)
    if wrong or named != len(objects):
        return f"WRONG: {wrong or mended}"
    return f"{named} of {len(objects)} named, {mended.count('there again')} made again from the outs"


def mlflow_stops(case: Case) -> str:
    """MLflow's server stops during a run, and is started again."""
    place = case.clone()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = replace(place, env={"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"})
    with server(place, port) as running:
        forget(place, "tune@blast")
        shutil.rmtree(place.folder / ".studies")
        process = place.start(*REPRO)
        printed = until(process, "study blast")
        time.sleep(1)
        os.killpg(running.pid, 9)
        printed += process.communicate()[0]
    if process.returncode:
        return f"WRONG: {printed[-600:]}"
    with server(place, port):
        forget(place, "tune@blast")
        wrong = case.ends_well(place)
    return f"WRONG: {wrong}" if wrong else last_of(printed, "MLflow cannot be reached")


@contextmanager
def server(place: Place, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An MLflow server on 127.0.0.1."""
    program = Path(sys.executable).with_name("mlflow")
    store = f"sqlite:///{place.outside}/server.db"
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", store]
    with subprocess.Popen(
        [str(program), "server", *options, "--default-artifact-root", str(place.outside / "artifacts")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    ) as running:
        for _ in range(600):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.2)
        try:
            yield running
        finally:
            if running.poll() is None:
                os.killpg(running.pid, 9)


CASES: tuple[Callable[[Case], str], ...] = (
    full_disk,
    no_permission,
    out_of_memory,
    two_runs,
    two_users,
    lost_cache,
    clock_set_back,
    flipped("features/cell/mobilenet/index.csv", "tune@blast"),
    flipped("augmented/smear/views.parquet", "bottleneck@mobilenet"),
    flipped("backbones/mobilenet/cell.onnx", "ensemble_apl_aml"),
    flipped_bundle,
    flipped_object,
    mlflow_stops,
)
