"""Before the installation: find a suitable Python, and look for what would stop the installation later.

Prints `STAMP PYTHON`: the name of the file that marks a complete `.venv`, and the interpreter to make it.
If something is missing, prints one line on standard error that says what to do, and exits with 1.

The first Python on the machine runs this (3.6 or newer): hence plain syntax and only the standard library.
"""

import argparse
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

CANDIDATES = ("python3", "python3.13", "python3.12", "python3.11", "python")

# Gigabytes that an installation takes: the environment 3.5, the downloads and pip's copy of them 1 each.
# CUDA's libraries are not measured but estimated.
DISK_GB = {"requirements.lock": 6, "requirements-gpu.lock": 16}

MARK = "made-by-make"  # a file in .venv: `make` may delete what lies beside it

PROBE = """
import json, platform, sys
try:
    import ensurepip, venv
    can_make_venv = True
except ImportError:
    can_make_venv = False
print(json.dumps({
    "version": list(sys.version_info[:2]),
    "path": getattr(sys, "_base_executable", None) or sys.executable,
    "build": "%s, %d bit" % (platform.python_implementation(), 64 if sys.maxsize > 2**32 else 32),
    "can_make_venv": can_make_venv,
}))
"""


class MissingError(Exception):
    """The installation cannot start; the message is one line that says what to do."""


def supported_range(pyproject):
    """The first supported and the first unsupported Python, `((3, 11), (3, 14))`, from pyproject.toml."""
    low, high = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', pyproject, re.MULTILINE).groups()
    return (3, int(low)), (3, int(high))


def probe(command):
    """What `PROBE` prints in the interpreter `command`, as a dict; None if it does not run."""
    try:
        answer = subprocess.check_output([command, "-c", PROBE], stderr=subprocess.DEVNULL)
        return json.loads(answer.decode())
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None  # no such program, or the empty shim of a version manager


def check_python(command, found, low, high):
    """Raise MissingError if the interpreter `command` is not suitable; `found` is its answer to `probe`."""
    newest = f"3.{high[1] - 1}"
    needed = f"Python 3.{low[1]} to {newest}"
    remedy = f"install one or name it, as in `make demo PYTHON=python{newest}`."
    if found is None:
        raise MissingError(f"{command} is not a Python that runs, and {needed} is needed: {remedy}")
    major, minor = found["version"]
    if not low <= (major, minor) < high:
        raise MissingError(f"{command} is Python {major}.{minor}, and {needed} is needed: {remedy}")
    if found["build"] != "CPython, 64 bit":
        raise MissingError(f"{command} is {found['build']}, and 64 bit CPython is needed: {remedy}")
    if not found["can_make_venv"]:
        raise MissingError(
            f"{command} cannot make a virtual environment, as its module venv or ensurepip is missing: "
            f"install it, on Debian and Ubuntu with `apt-get install python{major}.{minor}-venv`."
        )


def choose_python(commands, low, high, ask=probe):
    """The answer to `probe` of the first suitable command; else MissingError on the nearest."""
    misfits = []
    for command in commands:
        found = ask(command)
        try:
            check_python(command, found, low, high)
        except MissingError as error:
            # 0: the right version, but a part is missing; 1: another version; 2: no such program.
            distance = 2 if found is None else int(not low <= tuple(found["version"]) < high)
            misfits.append((distance, len(misfits), error))
        else:
            return found
    raise min(misfits)[2]


def check_cpu(system, machine, cpuinfo):
    """Raise MissingError if TensorFlow cannot run on this processor; `cpuinfo` is /proc/cpuinfo's text."""
    if (system, machine) == ("Darwin", "x86_64"):
        raise MissingError("TensorFlow has no build for Macs with an Intel processor: use another machine.")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if (system, machine) == ("Linux", "x86_64") and flags and "avx2" not in flags.group(1).split():
        raise MissingError(
            "This processor has no AVX2, which the numbers are computed with: use a machine made after 2015 "
            "(a virtual machine must pass on the features of its processor)."
        )


def check_git(which=shutil.which):
    """Raise MissingError if git, which DVC builds on, is not installed."""
    if which("git") is None:
        raise MissingError(
            "git is not installed: install it, on Debian and Ubuntu with `apt-get install git`."
        )


def check_disk(folder, free_bytes, need_gb):
    """Raise MissingError if `need_gb` gigabytes do not fit into the `free_bytes` left for `folder`."""
    if free_bytes < need_gb * 1e9:
        raise MissingError(
            f"{free_bytes / 1e9:.1f} GB are free in {folder}, and the installation needs {need_gb}: "
            "make room, or clone to a larger disk."
        )


def made_by_make(venv):
    """Whether `make` may empty a folder: it has made it, and no other tool has made it anew since."""
    if not venv.is_dir():
        return False
    if not any(venv.iterdir()):
        return True
    settings = venv / "pyvenv.cfg"  # uv and virtualenv write their names into it
    text = settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else ""
    others = re.search(r"^(uv|virtualenv) *=", text, re.MULTILINE) or (venv / "conda-meta").exists()
    return not others and ((venv / MARK).exists() or any(venv.glob("whole-*")))


def check_environment(venv, stamp):
    """Raise MissingError if `make` would delete an environment that it has not made."""
    if (venv / stamp).exists():
        return  # complete: nothing will be deleted
    if venv.is_symlink():
        raise MissingError(
            ".venv is a link, and its target is not the complete environment of this clone: "
            "remove the link with `rm .venv`, then the same command again."
        )
    if venv.exists() and not made_by_make(venv):
        raise MissingError(
            ".venv was made by another tool than `make`, which would have to delete it: move it away with "
            "`mv .venv .venv-of-another-tool`, then the same command again."
        )


def stamp_name(lock, version, machine, folder):
    """Name of the file that marks a complete environment for this lock, Python, machine and folder."""
    parts = [lock, repr(tuple(version)).encode(), machine.encode(), str(folder).encode()]
    return "whole-" + hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def check(root, python, lock_name):
    """The stamp of the environment of the clone at `root`, and the interpreter to make it with.

    `python` is the only command to consider, or empty: then an environment that is there keeps its Python,
    even if `python3` is another one by now. Raises MissingError if the environment cannot be made.
    """
    if lock_name not in DISK_GB:
        raise MissingError(
            f"{lock_name} is no lock file of this project: LOCK is {' or '.join(sorted(DISK_GB))}."
        )
    venv = root / ".venv"
    own = str(venv / "bin" / "python")
    commands = [python] if python else [own, *CANDIDATES] if probe(own) else list(CANDIDATES)
    found = choose_python(commands, *supported_range((root / "pyproject.toml").read_text(encoding="utf-8")))

    cpuinfo = Path("/proc/cpuinfo")
    check_cpu(platform.system(), platform.machine(), cpuinfo.read_text() if cpuinfo.exists() else "")
    check_git()

    stamp = stamp_name((root / lock_name).read_bytes(), found["version"], platform.machine(), root)
    check_environment(venv, stamp)
    if not (venv / stamp).exists():
        given_back = sum(path.lstat().st_size for path in venv.glob("**/*"))
        check_disk(root, shutil.disk_usage(str(root)).free + given_back, DISK_GB[lock_name])
    return stamp, found["path"]


def main(arguments=None):
    """Command line: `preflight.py [--python COMMAND] [--lock FILE]`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--python", default="", help="the only interpreter to consider")
    parser.add_argument("--lock", default="requirements.lock", help="what to install")
    options = parser.parse_args(arguments)
    try:
        stamp, interpreter = check(Path(__file__).resolve().parent.parent, options.python, options.lock)
    except MissingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{stamp} {interpreter}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
