"""dvc.yaml declares the parameters and the code that the stages read, and no more."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from aplsmear.runs.imports import PACKAGE, WITHOUT_EFFECT, imported_modules

ROOT = Path(__file__).parents[2]
DECLARED = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in DECLARED.items()}  # `do`: of each row of `foreach`
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))

# Read, but the value changes no result: these stages check that names exist.
UNDECLARED = {"tune": {"backbones"}, "member": {"ensembles", "tasks"}}


def script_of(stage: dict) -> str:
    return re.search(r"stages/(\w+)\.py", stage["cmd"]).group(1)


def modules_in(dep: str) -> set[str]:
    """The modules that a dependency of dvc.yaml names: one, or those of a room."""
    path = ROOT / dep
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.suffix == ".py" else []
    names = {".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files}
    return {name for name in names if not name.endswith("__init__")} - WITHOUT_EFFECT


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_code_that_makes_its_outs(name: str) -> None:
    deps = [dep for dep in STAGES[name]["deps"] if dep.startswith("src/aplsmear/")]
    declared = set[str]().union(*(modules_in(dep) for dep in deps))
    script = script_of(STAGES[name])
    assert f"stages/{script}.py" in STAGES[name]["deps"]
    assert declared == imported_modules(ROOT / "stages" / f"{script}.py").keys()


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


def test_the_stage_prepare_checks_all_of_params_yaml_before_the_first_other_stage() -> None:
    assert STAGES["prepare"]["params"] == [{"params.yaml": None}]
    assert set(STAGES["prepare"]["outs"]) & set(STAGES["download"]["deps"]) == {"prepared/params.txt"}


@pytest.mark.parametrize("name", sorted(set(STAGES) - {"prepare"}))
def test_a_stage_declares_every_parameter_that_it_reads_and_no_other(name: str) -> None:
    stage = STAGES[name]
    reads = _Reads()
    reads.visit(ast.parse((ROOT / "stages" / f"{script_of(stage)}.py").read_text(encoding="utf-8")))
    read = reads.read - UNDECLARED.get(script_of(stage), set())
    if "tune_of" in read:
        read = read - {"tune_of"} | {"tune", "overrides"}
    declared = {
        re.sub(r"\.(\$\{.*|apl_healthy|apl_aml|aml_healthy)$", "", param) for param in stage.get("params", [])
    }
    assert [each for each in sorted(read) if not any(covers(given, each) for given in declared)] == []
    assert [given for given in sorted(declared) if not any(covers(given, each) for each in read)] == []


def test_nothing_of_a_cohort_that_is_judged_flows_back_into_training() -> None:
    """Neither a row of `external` nor what `evaluate` writes is an input of another stage."""
    training = {name: stage for name, stage in STAGES.items() if name != "evaluate"}
    read = [str(each) for stage in training.values() for each in [*stage["deps"], *stage.get("params", [])]]
    commands = [
        f"{stage['cmd']} {stage.get('matrix', '')} {stage.get('vars', '')}" for stage in training.values()
    ]
    assert [each for each in [*read, *commands] if re.search("external|evaluated", each)] == []
    assert all(out.startswith("evaluated/") for out in STAGES["evaluate"]["outs"])


def test_every_parameter_belongs_to_a_stage_except_task_and_engine() -> None:
    stages = [stage for name, stage in STAGES.items() if name != "prepare"]
    declared = {param.split(".")[0] for stage in stages for param in stage.get("params", [])}
    matrices = {
        re.search(r"\$\{(\w+)", str(over)).group(1)
        for stage in STAGES.values()
        for over in stage.get("matrix", {}).values()
    }
    assert set(PARAMS) - declared - matrices - {"task", "engine"} == set()


@pytest.mark.parametrize("name", sorted(PARAMS["ensembles"]))
def test_stages_of_ensembles_differ_in_the_name_of_the_ensemble_only(name: str) -> None:
    """dvc.yaml repeats the deps of each ensemble, because DVC accepts no list inside a list."""
    first, other = STAGES["ensemble_apl_healthy"], STAGES[f"ensemble_{name}"]
    assert [dep.replace("apl_healthy", name) for dep in first["deps"]] == other["deps"]


def test_no_stage_reads_what_finetune_writes() -> None:
    """Its bytes depend on the processor, and would pass this on (docs/safety.md)."""
    assert [name for name, stage in STAGES.items() if any("finetuned" in dep for dep in stage["deps"])] == []
