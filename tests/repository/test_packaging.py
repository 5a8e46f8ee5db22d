"""The environment can be made from nothing, is the same for everyone, and says what hinders it."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
LOCKS = ("requirements.lock", "requirements-gpu.lock")
MINORS = [
    f"3.{minor}" for minor in range(30) if Version(f"3.{minor}") in SpecifierSet(PROJECT["requires-python"])
]
PLATFORMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
]


def lock_entries(name: str) -> list[str]:
    """Each entry of a lock file on one line: the requirement, then its hashes."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def environment_of(python: str, platform: dict[str, str]) -> dict[str, Any]:
    """What markers of requirements ask for."""
    full = {"python_version": python, "python_full_version": f"{python}.0"}
    return {**default_environment(), **full, **platform}


def locked(name: str, python: str, platform: dict[str, str]) -> dict[str, Version]:
    """Version of each package that a lock file installs on this Python and platform."""
    environment = environment_of(python, platform)
    versions: dict[str, Version] = {}
    for entry in lock_entries(name):
        requirement = Requirement(entry.split(" --hash=")[0])
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in versions, (
                f"{name} has two versions of {requirement.name} for {python}"
            )
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            versions[canonicalize_name(requirement.name)] = Version(specifier.version)
    return versions


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: platform["sys_platform"])
@pytest.mark.parametrize("python", MINORS)
@pytest.mark.parametrize(
    ("lock", "extras"), [(LOCKS[0], ["dev", "slides"]), (LOCKS[1], ["dev", "slides", "gpu"])]
)
def test_lock_holds_what_pyproject_asks_for(
    lock: str, extras: list[str], python: str, platform: dict[str, str]
) -> None:
    versions = locked(lock, python, platform)
    wanted = PROJECT["dependencies"] + [
        line for extra in extras for line in PROJECT["optional-dependencies"][extra]
    ]
    environment, replaced = environment_of(python, platform), set()
    if "gpu" in extras:  # onnxruntime-gpu installs the files of onnxruntime
        override = Requirement((ROOT / "requirements-gpu.overrides").read_text(encoding="utf-8").strip())
        assert override.marker is not None
        replaced = set() if override.marker.evaluate(environment) else {override.name}
        assert versions.keys() & {"onnxruntime", "onnxruntime-gpu"} == (
            {"onnxruntime-gpu"} if replaced else {"onnxruntime"}
        )
    unmet = [
        line
        for line, requirement in ((line, Requirement(line)) for line in wanted)
        if requirement.marker is None or requirement.marker.evaluate(environment)
        if requirement.name not in replaced
        if canonicalize_name(requirement.name) not in versions
        or versions[canonicalize_name(requirement.name)] not in requirement.specifier
    ]
    assert unmet == [], f"{lock} on Python {python} is not what pyproject.toml asks for: run `make lock`"


def test_what_is_imported_is_asked_for() -> None:
    names: dict[str, set[Path]] = {}
    for path in (
        path for folder in ("src", "stages", "tests", "tools") for path in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for module in modules:
                names.setdefault(module.split(".")[0], set()).add(path.relative_to(ROOT))
    own = {
        "aplsmear",
        *(
            path.stem
            for folder in ("stages", "tests", "tools", "benchmarks")
            for path in (ROOT / folder).rglob("*.py")
        ),
    }
    asked_for = {
        canonicalize_name(Requirement(line).name)
        for line in PROJECT["dependencies"]
        + [line for extra in ("dev", "slides") for line in PROJECT["optional-dependencies"][extra]]
    }
    distributions = importlib.metadata.packages_distributions()
    missing = [
        f"{name} (in {', '.join(sorted(map(str, paths)))})"
        for name, paths in sorted(names.items())
        if name not in sys.stdlib_module_names | own
        and not asked_for
        & {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
    ]
    assert not missing, f"imported, but not among the dependencies in pyproject.toml: {'; '.join(missing)}"


def test_every_python_gets_the_same_versions() -> None:
    first, *others = ([locked(lock, python, PLATFORMS[0]) for python in MINORS] for lock in LOCKS)
    assert all(versions == first[0] for versions in first)
    plain = {name: version for name, version in first[0].items() if name != "onnxruntime"}
    for gpu in others[0]:
        assert gpu == {**gpu, **plain}, "the GPU lock differs in more than what it adds"
        added = gpu.keys() - plain.keys()
        assert all(name.startswith(("nvidia-", "onnxruntime-gpu")) for name in added)
        assert len(added) > 1


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_pins_by_hash_and_names_no_host(lock: str) -> None:
    unhashed = [line for line in lock_entries(lock) if not re.search(r" --hash=sha256:[0-9a-f]{64}\b", line)]
    assert unhashed == []
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert not re.search(r"://|@ |--index|--extra-index|--find-links|--trusted-host", text)


@pytest.mark.parametrize("lock", LOCKS)
def test_opencv_is_the_build_without_a_display(lock: str) -> None:
    names = {Requirement(entry.split(" --hash=")[0]).name for entry in lock_entries(lock)}
    assert {name for name in names if name.startswith("opencv")} == {"opencv-python-headless"}


def test_tensorflow_runs_on_every_python_that_is_promised() -> None:
    tensorflow = importlib.metadata.metadata("tensorflow")
    assert Version(tensorflow["Version"]) == locked(LOCKS[0], MINORS[0], PLATFORMS[0])["tensorflow"]
    built_for = set(tensorflow.get_all("Classifier") or [])
    assert {f"Programming Language :: Python :: {python}" for python in MINORS} <= built_for


def test_conda_environment_has_the_same_python_and_the_same_lock() -> None:
    *plain, with_pip = ENVIRONMENT["dependencies"]
    (python,) = (entry for entry in plain if entry.startswith("python "))
    assert SpecifierSet(python.removeprefix("python ")) == SpecifierSet(PROJECT["requires-python"])
    assert with_pip == {"pip": ["-r requirements.lock"]}
    assert {"pip", "make", "git"} <= set(plain)


def test_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_make_alone_lists_every_target_with_a_remark() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    targets = re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE)
    assert sorted(targets) == sorted(phony.split())
    listed = dict(re.findall(r"^make (\S+) +(\S.*)$", run_make().stdout, re.MULTILINE))
    assert sorted(listed) == sorted(targets)


# --- before the installation


def run_make(
    *arguments: str, folder: Path = ROOT, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`make` as typed in a fresh shell: the make that runs these tests leaves no flags behind."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    make = shutil.which("make")
    assert make is not None
    return subprocess.run(
        [make, *arguments],
        cwd=folder,
        env={**environment, "PATH": path or os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module, though tools/ is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


preflight = load_tool("preflight")
LOW, HIGH = preflight.supported_range((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GOOD = {"version": [3, 12], "path": "/opt/python3.12", "build": "CPython, 64 bit", "can_make_venv": True}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What make needs before the installation, in a folder of its own with a blank in its name."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", *LOCKS):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def pretend_python(path: Path, answer: dict[str, Any]) -> str:
    """A command that answers the probe and can do nothing else."""
    words = repr(answer).replace("'", '"').replace("True", "true").replace("False", "false")
    path.write_text(f"#!/bin/sh\ncase \"$2\" in *ensurepip*) echo '{words}';; *) exit 9;; esac\n")
    path.chmod(0o755)
    return str(path)


def test_preflight_runs_on_old_pythons() -> None:
    ast.parse((ROOT / "tools" / "preflight.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_supported_range_is_that_of_pyproject() -> None:
    assert [f"3.{minor}" for minor in range(LOW[1], HIGH[1])] == MINORS


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            {**GOOD, "version": [3, 10]},
            r"is Python 3\.10, and Python 3\.11 to 3\.13 is needed.*PYTHON=python3\.13",
        ),
        ({**GOOD, "version": [3, 14]}, r"is Python 3\.14, and Python 3\.11 to 3\.13 is needed"),
        (
            {**GOOD, "can_make_venv": False},
            r"cannot make a virtual environment.*apt-get install python3\.12-venv",
        ),
        ({**GOOD, "build": "PyPy, 64 bit"}, r"is PyPy, 64 bit, and 64 bit CPython is needed"),
    ],
)
def test_make_says_in_one_line_what_is_wrong_with_a_python(
    clone: Path, answer: dict[str, Any], expected: str
) -> None:
    python = pretend_python(clone / "fake", answer)
    (clone / ".venv").mkdir()
    (clone / ".venv" / "project").touch()
    for target in ("venv", "demo", "test"):
        result = run_make(target, f"PYTHON={python}", folder=clone)
        assert result.returncode != 0
        assert result.stdout == ""
        assert re.fullmatch(rf".*{expected}.*\n", result.stderr)
    assert [path.name for path in (clone / ".venv").iterdir()] == ["project"]


def test_make_says_in_one_line_that_there_is_no_python(clone: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "sh").symlink_to("/bin/sh")
    result = run_make("demo", folder=clone, path=str(bare))
    assert result.returncode != 0
    assert re.fullmatch(r"No Python 3 is installed: .*\n", result.stderr)


def test_first_python_that_fits_is_taken() -> None:
    answers = {"old": {**GOOD, "version": [3, 9]}, "bare": {**GOOD, "can_make_venv": False}, "good": GOOD}
    assert preflight.choose_python(["absent", "old", "bare", "good"], LOW, HIGH, ask=answers.get) == GOOD


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        (["absent", "old", "bare"], "bare cannot make a virtual environment"),
        (["absent", "old"], r"old is Python 3\.9"),
        (["absent"], "absent is not a Python that runs"),
    ],
)
def test_the_python_that_nearly_fits_is_told(commands: list[str], expected: str) -> None:
    answers = {"old": {**GOOD, "version": [3, 9]}, "bare": {**GOOD, "can_make_venv": False}}
    with pytest.raises(preflight.MissingError, match=expected):
        preflight.choose_python(commands, LOW, HIGH, ask=answers.get)


def test_full_disk_is_told_before_the_installation(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(clone)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=int(0.9e9)))
    with pytest.raises(
        preflight.MissingError, match=r"^0\.9 GB are free in .*a clone, and the installation needs 6"
    ):
        preflight.check(clone, sys.executable, LOCKS[0])


def test_missing_git_is_told() -> None:
    with pytest.raises(preflight.MissingError, match="git is not installed"):
        preflight.check_git(which=lambda _: None)


def test_unknown_lock_is_told(clone: Path) -> None:
    with pytest.raises(preflight.MissingError, match=r"LOCK is requirements-gpu\.lock or requirements\.lock"):
        preflight.check(clone, sys.executable, "requirements.txt")


def test_processor_that_cannot_is_told() -> None:
    with pytest.raises(preflight.MissingError, match="no AVX2"):
        preflight.check_cpu("Linux", "x86_64", "processor : 0\nflags\t\t: fpu sse avx\n")
    with pytest.raises(preflight.MissingError, match="Intel"):
        preflight.check_cpu("Darwin", "x86_64", "")
    preflight.check_cpu("Linux", "x86_64", "processor : 0\nflags\t\t: fpu avx avx2\n")
    preflight.check_cpu("Linux", "aarch64", "Features : fp asimd\n")
    preflight.check_cpu("Darwin", "arm64", "")


def test_only_the_same_lock_python_machine_and_folder_share_an_environment() -> None:
    names = {
        preflight.stamp_name(lock, version, machine, folder)
        for lock in (b"numpy==2.4.6", b"numpy==2.4.7")
        for version in ([3, 11], [3, 12])
        for machine in ("x86_64", "aarch64")
        for folder in ("/here/.venv", "/there/.venv")
    }
    assert len(names) == 2**4


def test_whole_environment_asks_for_no_disk(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(clone)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=10**12))
    stamp, interpreter = preflight.check(clone, sys.executable, LOCKS[0])
    assert Path(interpreter).exists()
    (clone / ".venv").mkdir()
    (clone / ".venv" / stamp).touch()
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert preflight.check(clone, sys.executable, LOCKS[0]) == (stamp, interpreter)


@pytest.fixture
def quick(clone: Path, tmp_path: Path) -> list[str]:
    """Arguments of a `make` that takes no time: its Python makes environments in which all succeeds."""
    python = tmp_path / "python"
    pretend_python(python, {**GOOD, "path": str(python)})
    python.write_text(
        python.read_text().replace(
            "*) exit 9;;",
            'venv) mkdir "$3/bin"; printf "#!/bin/sh\\n" > "$3/bin/python"; chmod +x "$3/bin/python";;'
            " *) exit 9;;",
        )
    )
    (clone / "requirements.lock").write_text("nothing==1\n")
    return ["venv", f"PYTHON={python}"]


def test_an_environment_is_made_once_and_anew_when_it_is_not_complete(clone: Path, quick: list[str]) -> None:
    venv = clone / ".venv"
    done = run_make(*quick, folder=clone)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in venv.iterdir()}
    (stamp,) = (name for name in made if name.startswith("whole-"))
    assert made == {"bin", "project", "made-by-make", stamp}
    assert "Making" not in run_make(*quick, folder=clone).stdout
    (venv / stamp).unlink()  # as if the installation had been cut off
    (venv / "half").mkdir()
    assert "Making" in run_make(*quick, folder=clone).stdout
    assert {path.name for path in venv.iterdir()} == made


def test_an_environment_from_before_the_mark_is_made_anew(clone: Path, quick: list[str]) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / "whole-of-another-lock").touch()
    assert run_make(*quick, folder=clone).returncode == 0
    assert not (clone / ".venv" / "whole-of-another-lock").exists()


def by_uv(venv: Path) -> None:
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, venv], check=True)


def by_uv_over_ours(venv: Path) -> None:
    by_uv(venv)
    (venv / "made-by-make").touch()  # `uv venv --allow-existing` keeps it


def by_an_editor(venv: Path) -> None:
    """As `python -m venv`."""
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.3\n")


def by_conda(venv: Path) -> None:
    (venv / "conda-meta").mkdir(parents=True)
    (venv / "made-by-make").touch()


def by_hand(venv: Path) -> None:
    venv.mkdir()
    (venv / "notes").touch()


@pytest.mark.parametrize("made", [by_uv, by_uv_over_ours, by_an_editor, by_conda, by_hand])
@pytest.mark.parametrize("link", [False, True])
def test_an_environment_that_another_tool_made_is_never_emptied(
    clone: Path, quick: list[str], tmp_path: Path, link: bool, made: Callable[[Path], None]
) -> None:
    folder = tmp_path / "other" if link else clone / ".venv"
    made(folder)
    if link:
        (clone / ".venv").symlink_to(folder)
        (folder / "made-by-make").touch()  # by the `make` of another clone
    before = sorted(folder.rglob("*"))
    done = run_make(*quick, folder=clone)
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert ("`rm .venv`" if link else "`mv .venv ") in line
    assert sorted(folder.rglob("*")) == before


def test_a_file_or_a_broken_link_of_this_name_is_left_alone(clone: Path, quick: list[str]) -> None:
    (clone / ".venv").write_text("a person's")
    assert run_make(*quick, folder=clone).returncode != 0
    assert (clone / ".venv").read_text() == "a person's"
    (clone / ".venv").unlink()
    (clone / ".venv").symlink_to("/nowhere")
    assert run_make(*quick, folder=clone).returncode != 0
    assert (clone / ".venv").is_symlink()


def test_a_link_to_the_complete_environment_of_this_clone_is_followed(
    clone: Path, quick: list[str], tmp_path: Path
) -> None:
    run_make(*quick, folder=clone)
    shutil.move(clone / ".venv", tmp_path / "larger disk")
    (clone / ".venv").symlink_to(tmp_path / "larger disk")
    done = run_make(*quick, folder=clone)
    assert done.returncode == 0, done.stderr
    assert "Making" not in done.stdout
    assert (clone / ".venv").is_symlink()


# --- after the demo


def test_demo_summary_tells_the_numbers() -> None:
    text = load_tool("demo_summary").summary(
        "APL or healthy?",
        {
            "auroc": {"value": 0.9431, "low": 0.8802, "high": 0.9859},
            "sensitivity": {"value": 0.95, "low": 0.8, "high": 1.0},
            "specificity": {"value": 0.9, "low": 0.75, "high": 1.0},
            "n_patients": 40,
        },
    )
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[0].startswith("APL or healthy? 40 patients")
    assert rows[1:] == [
        "AUROC 0.943 95 % interval 0.880 to 0.986",
        "sensitivity at the operating point 0.950 95 % interval 0.800 to 1.000",
        "specificity at the operating point 0.900 95 % interval 0.750 to 1.000",
    ]
