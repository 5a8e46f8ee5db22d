"""Files for GitHub, Docker and editors are valid and run the project's own commands."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from clones import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))


def check(program: str, *arguments: object) -> None:
    """Run a linter of .venv; the test is skipped, with a reason, where it is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_and_dependabot_follow_their_schemas() -> None:
    check("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    check("check-jsonschema", "--builtin-schema", "vendor.dependabot", ROOT / ".github" / "dependabot.yml")


def test_the_dockerfile_has_no_remarks_of_hadolint() -> None:
    check("hadolint", ROOT / "Dockerfile")


def test_linux_runs_what_every_change_must_pass_and_macos_its_first_part() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yaml").read_text(encoding="utf-8"))["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands == {"linux": [".ci/run"], "macos": ["make lint"]}
    assert {name: job["runs-on"].split("-")[0] for name, job in jobs.items()} == {
        "linux": "ubuntu",
        "macos": "macos",
    }


def test_an_image_holds_what_git_stores_and_no_data_of_patients() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["*", "!.git"]
    steps = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^COPY(?: --\S+)* (\S+)", steps, re.MULTILINE) == [
        ".git",
        "/home/aplsmear/repository",
    ]
    assert re.findall(r"^USER (\S+)", steps, re.MULTILINE) == ["1000"]
    assert json.loads(re.search(r"^CMD (.+)$", steps, re.MULTILINE)[1]) == ["make", "demo"]


def test_the_development_container_is_a_stage_of_the_dockerfile() -> None:
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    stage = settings["build"]["target"]
    assert f" AS {stage}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert settings["postCreateCommand"] == "make venv"


def test_artifacts_are_outs_of_the_pipeline() -> None:
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    paths = [artifact["path"] for artifact in pipeline["artifacts"].values()]
    outs = {
        out.replace("${ensemble}", variables["ensemble"])
        for stage in pipeline["stages"].values()
        for out in stage.get("outs", [])
        for variables in stage.get("vars", [{"ensemble": ""}])
        if isinstance(out, str)
    }
    assert [path for path in paths if path not in outs] == []
