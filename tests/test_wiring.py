"""What dvc.yaml declares is what the stages read: parameters, code, data."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))

# Code that cannot change what a stage writes: where it is done, how waiting and errors look, what is logged
# beside the outs, what puts right a killed run, the schema of params.yaml (values are declared one by one).
PLUMBING = {
    "__init__",
    "engine",
    "errors",
    "guard",
    "layers",
    "mending",
    "params",
    "problems",
    "progress",
    "runtime",
    "secrets",
    "soundness",
    "stage",
    "tracking",
}

# Plumbing whose own imports are for a process beside the stage.
BESIDE = {"guard", "mending"}

# Read although the value changes no result: `tune` looks at the names of the backbones, to refuse others.
WITHOUT_EFFECT = {"tune": {"backbones"}}


def script_of(stage: dict) -> str:
    return re.search(r"stages/(\w+)\.py", stage["cmd"]).group(1)


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Modules of aplsmear that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "aplsmear":
            names = node.module.split(".")[1:] or [alias.name for alias in node.names]
            found.update(names[:1] if node.module != "aplsmear" else names)
    return frozenset(found)


def closure_of(script: str) -> set[str]:
    waiting, seen = set(imports_of(ROOT / "stages" / f"{script}.py")), {"cpu"}
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            if module not in BESIDE:
                waiting |= imports_of(ROOT / "src" / "aplsmear" / f"{module}.py")
    return seen - PLUMBING


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_code_that_makes_its_outs(name: str) -> None:
    stage = STAGES[name]
    declared = {dep for dep in stage["deps"] if dep.endswith(".py")}
    script = script_of(stage)
    needed = {f"stages/{script}.py"} | {f"src/aplsmear/{module}.py" for module in closure_of(script)}
    assert declared == needed


def covers(declared: str, read: str) -> bool:
    return read == declared or read.startswith(f"{declared}.")


class _Reads(ast.NodeVisitor):
    """Dotted names read from `params` in a stage, e.g. dataset.root, tune_of(name)."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id == "params":
            self.read.add(".".join(reversed(names)))
        else:
            self.generic_visit(node)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_every_parameter_that_it_reads_and_no_other(name: str) -> None:
    stage = STAGES[name]
    reads = _Reads()
    reads.visit(ast.parse((ROOT / "stages" / f"{script_of(stage)}.py").read_text(encoding="utf-8")))
    read = set(reads.read)
    if "tune_of" in read:
        read = read - {"tune_of"} - WITHOUT_EFFECT.get(script_of(stage), set()) | {"tune", "overrides"}
    declared = {re.sub(r"\.(\$\{.*|apl_healthy|apl_aml)$", "", param) for param in stage.get("params", [])}
    assert [each for each in sorted(read) if not any(covers(given, each) for given in declared)] == []
    assert [given for given in sorted(declared) if not any(covers(given, each) for each in read)] == []


def test_every_parameter_belongs_to_a_stage_but_for_the_single_model_and_who_does_the_work() -> None:
    declared = {str(param).split(".")[0] for stage in STAGES.values() for param in stage.get("params", [])}
    matrices = {
        re.search(r"\$\{(\w+)", str(over)).group(1)
        for stage in STAGES.values()
        for over in stage.get("matrix", {}).values()
    }
    assert set(PARAMS) - declared - matrices - {"task", "engine"} == set()
