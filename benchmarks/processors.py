"""Runs Python code in a process of its own: on this processor, or on another one that qemu-user emulates."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

QEMU = "qemu-x86_64"
INSTALL = f"{QEMU} is not installed; it emulates other processors (Debian, Ubuntu: apt-get install qemu-user)"


SORTS = 10  # oldest version of qemu that was tried and sorts; 7.2 gives a wrong order of NumPy's argsort
UPDATE = f"{QEMU} {SORTS} or later is needed: 7.2 emulates AVX2 with an error (Debian 12: bookworm-backports)"


def can_emulate(version: int = 0) -> bool:
    """Whether qemu-user is installed, in this major version or a later one."""
    return shutil.which(QEMU) is not None and int(emulator().split()[2].split(".")[0]) >= version


def emulator() -> str:
    """Name and version of the emulator, such as ``qemu-x86_64 version 10.0.2``."""
    printed = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return printed.split(" (")[0].splitlines()[0]


def lines_of(code: str, *words: str, processor: str = "", **environment: str) -> Iterator[str]:
    """The lines that a Python program prints, as they come.

    The program finds the same modules as this process. A program that it starts itself is not emulated.

    Args:
        code: the program.
        words: its arguments, `sys.argv[1:]`.
        processor: a name from `qemu-x86_64 -cpu help`; empty: this processor.
        environment: variables that differ from those of this process.

    Raises:
        RuntimeError: the program failed; the message has what it wrote to stderr.
    """
    emulated = [QEMU, "-cpu", processor] if processor else []
    python = str(
        Path(sys.executable).resolve()
    )  # not the link in .venv: an emulated Python finds its own folder
    command = [*emulated, python, "-W", "ignore", "-c", code, *words]
    whole = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=whole, stdout=subprocess.PIPE, stderr=errors, text=True) as running,
    ):
        for line in running.stdout or ():
            yield line.rstrip("\n")
        if running.wait():
            errors.seek(0)
            where = processor or "this processor"
            raise RuntimeError(f"exit code {running.returncode} on {where}:\n{errors.read()}")


def output_of(code: str, *words: str, processor: str = "", **environment: str) -> str:
    """All that a Python program prints; see `lines_of`."""
    return "\n".join(lines_of(code, *words, processor=processor, **environment))
