"""The commands of the pages in docs/, taken out of them and run.

    python tests/walks.py FOLDER [PAGE]...   (with nothing: all of them)

writes into the pages what their commands print in clones of FOLDER, in which `dvc repro` has run and its
dvc.lock is committed.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from clones import ROOT, run

PAGES = sorted(path for path in (ROOT / "docs").glob("*.md"))
# A block of commands, perhaps below a remark that says why the test leaves it out.
BLOCK = re.compile(r"(<!-- not in the test: [^>]+-->\n)?```console\n(.*?)```", re.DOTALL)
FAILS = "# exit code 1"
MARK = "\x1e"
COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# What `mktemp` draws anew in each walk; shown as its own template.
DRAWN = re.compile(r"\btmp\.\w{10}\b")
BAR = re.compile(r"^[\w ]*:? *\d+%\|[^|]*\| \S+ \[[^\]]*\]")


@dataclass
class Command:
    """What is typed, and the lines that a page shows below it."""

    typed: str
    shown: list[str] = field(default_factory=list)


def commands(block: str) -> list[Command]:
    """Of a block: a line that begins with ``$`` is typed, what follows is printed."""
    found: list[Command] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(Command(line.removeprefix("$ ")))
        else:
            found[-1].shown.append(line)
    return found


def steps_of(page: str) -> list[Command]:
    """The commands of a page, but for the blocks that the test leaves out."""
    return [command for remark, block in BLOCK.findall(page) if not remark for command in commands(block)]


def printed(folder: Path, typed: list[str]) -> list[list[str]]:
    """The lines that each command prints, typed one after another into one shell.

    Raises:
        AssertionError: a command ends with another exit code than the page says.
    """
    script = ["export COLUMNS=100"]
    for line in typed:
        script += [line, f"printf '\\n{MARK}%s{MARK}\\n' $?"]
    path = folder / ".git" / "walk.sh"
    path.write_text("\n".join(script) + "\n", encoding="utf-8")
    person = {f"GIT_{who}_{what}": "reader" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    text = run(folder, "bash", str(path), env=person | {"PYTHONPATH": str(folder / "src")})
    parts = re.split(f"\n{MARK}(\\d+){MARK}\n", text)
    outputs, codes = parts[0:-1:2], [int(code) for code in parts[1::2]]
    for line, output, code in zip(typed, outputs, codes, strict=True):
        assert code == (1 if FAILS in line else 0), f"$ {line}\n{output}\nexit code {code}"
    return [clean(output) for output in outputs]


def copied(folder: Path, copy: Path) -> Path:
    """Copy a clone without its run cache: a stage that ran before would not print that it runs."""
    shutil.copytree(folder, copy, symlinks=True)
    shutil.rmtree(copy / ".dvc" / "cache" / "runs", ignore_errors=True)
    return copy


def clean(output: str) -> list[str]:
    """Without colours, progress bars and the drawn names of temporary folders."""
    lines = [line.rstrip() for line in DRAWN.sub("tmp.XXXXXXXXXX", COLOUR.sub("", output)).splitlines()]
    lines = [BAR.sub("", line) for line in lines if BAR.sub("", line) or not line]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return lines


def refreshed(page: str, outputs: list[list[str]]) -> str:
    """The page with these outputs below its commands."""
    waiting = iter(outputs)

    def block(match: re.Match[str]) -> str:
        if match[1]:
            return match[0]
        lines = [line for each in commands(match[2]) for line in (f"$ {each.typed}", *next(waiting))]
        return "```console\n" + "\n".join(lines) + "\n```"

    return BLOCK.sub(block, page)


def main(folder: str, *names: str) -> None:
    """Write what the commands print.

    Raises:
        SystemExit: there is no page of that name.
    """
    unknown = {*names} - {path.stem for path in PAGES}
    if unknown:
        sys.exit(f"No page: {', '.join(sorted(unknown))}. Pages: {', '.join(path.stem for path in PAGES)}.")
    for path in PAGES:
        if names and path.stem not in names:
            continue
        with TemporaryDirectory() as temporary:
            copy = copied(Path(folder), Path(temporary) / "aplsmear")
            page = path.read_text(encoding="utf-8")
            outputs = printed(copy, [command.typed for command in steps_of(page)])
        hidden = [[line.replace(temporary, "...") for line in output] for output in outputs]
        path.write_text(refreshed(page, hidden), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
