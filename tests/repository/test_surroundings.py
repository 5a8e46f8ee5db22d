"""A clone works the same under other people's settings of git, of the shell and of Python."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from clones import ROOT, commit, run

BARE = "/usr/bin:/bin"  # no environment is activated
STAGE = """
import os
import sys
from pathlib import Path
names = sorted(name for name in os.environ if name.startswith("PYTHON"))
Path("seen").write_text("\\n".join([sys.prefix, *names]))
"""


def test_a_clone_that_turns_line_ends_around_has_the_same_bytes(tmp_path: Path) -> None:
    """Else all stages would be stale, and a pull would save nothing."""
    place = tmp_path / "first"
    (place / "docs").mkdir(parents=True)
    for name in (
        ".gitattributes",
        "params.yaml",
        "dvc.lock",
        "docs/safety.md",
        "demo/wsi.csv",
        "stages/run.sh",
    ):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    (place / "windows.csv").write_bytes(b"id\r\n1\r\n")
    run(place, "git", "init", "--quiet")
    commit(place)
    everywhere = tmp_path / "attributes"
    everywhere.write_text("* text=auto eol=crlf\n")
    settings = ("core.autocrlf=true", "core.eol=crlf", f"core.attributesFile={everywhere}")
    options = [word for setting in settings for word in ("-c", setting)]
    run(tmp_path, "git", "clone", "--quiet", *options, "first", "second")
    for path in (path for path in place.rglob("*") if path.is_file() and ".git" not in path.parts):
        assert (tmp_path / "second" / path.relative_to(place)).read_bytes() == path.read_bytes()
    assert run(tmp_path / "second", "git", "status", "--short") == ""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository with one stage, which is run as those of dvc.yaml are."""
    (tmp_path / "stages").mkdir()
    shutil.copy(ROOT / "stages" / "run.sh", tmp_path / "stages")
    (tmp_path / "stages" / "look.py").write_text(STAGE)
    stage = {"cmd": "sh stages/run.sh stages/look.py", "outs": ["seen"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"look": stage}}))
    run(tmp_path, "git", "init", "--quiet")
    run(tmp_path, "dvc", "init", "--quiet")
    return tmp_path


def test_every_stage_is_run_by_the_script_that_finds_python() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert all(cmd.startswith("sh stages/run.sh stages/") for cmd in re.findall(r"cmd: (.*)", text))


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_dvc_runs_stages_without_an_activated_environment(place: Path, shell: str) -> None:
    others = {"PYTHONOPTIMIZE": "2", "PYTHONHASHSEED": "7", "PYTHONDEVMODE": "1"}
    dvc = str(Path(sys.executable).parent / "dvc")
    run(place, dvc, "repro", env=others | {"PATH": BARE, "SHELL": shell})
    seen = (place / "seen").read_text().splitlines()
    assert seen == [sys.prefix, "PYTHONPATH", "PYTHONUTF8"]


def test_a_stage_takes_the_python_of_the_clone_or_says_that_there_is_none(place: Path) -> None:
    # `env` stands between, so that the process above is not Python
    command = ("env", "sh", "-c", "sh -c 'sh stages/run.sh stages/look.py; exit $?'; exit $?")
    printed = run(place, *command, env={"PATH": BARE}, ok=False)
    assert printed.strip().endswith("`make venv` makes one in .venv.")
    (place / ".venv").symlink_to(sys.prefix)
    run(place, *command, env={"PATH": BARE} | {"PYTHONHOME": "/nowhere"})
    assert Path((place / "seen").read_text().splitlines()[0]).samefile(sys.prefix)
