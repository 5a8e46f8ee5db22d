"""The start and end of stages: light imports, CPU settings before NumPy, errors that a user can correct."""

import ast
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ruamel.yaml import YAML

from aplsmear.errors import UserError
from aplsmear.params import ParamsError
from aplsmear.runs.checksums import unsound
from aplsmear.runs.stage import check_inputs, home, run
from flips import flip

ROOT = Path(__file__).parents[2]
STAGES = sorted(path.name for path in (ROOT / "stages").glob("*.py"))
COMMITTER = ["-c", "user.name=x", "-c", "user.email=x@y"]
WORDS = {
    "bottleneck": ["mobilenet"],
    "tune": ["blast"],
    "ensemble": ["apl_aml"],
    "member": ["apl_aml", "blast"],
    "evaluate": ["dresden"],
}


def python(*words: str, cwd: Path, first: Path = ROOT / "src") -> subprocess.CompletedProcess[str]:
    """Run Python; it searches `first` for libraries before all other folders."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(first), str(ROOT / "src")])}
    return subprocess.run(
        [sys.executable, "-P", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_what_main_returns_is_the_exit_code():
    for returned, code in ((None, None), (0, 0), (3, 3)):
        with pytest.raises(SystemExit) as ended:
            run(lambda returned=returned: returned, [])
        assert ended.value.code == code


def test_arguments_are_passed_to_main_and_wrong_ones_print_the_usage(capsys):
    received = []

    def main(name: str) -> None:
        received.append(name)

    with pytest.raises(SystemExit):
        run(main, ["blast"])
    assert received == ["blast"]
    with pytest.raises(SystemExit) as ended:
        run(main, [])
    assert ended.value.code == 2
    assert "The start and end of stages" in capsys.readouterr().err


def test_a_user_error_prints_its_message_and_another_error_its_traceback(capsys):
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(fail, [ParamsError("change this")])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "change this\n"
    with pytest.raises(ZeroDivisionError):
        run(fail, [ZeroDivisionError()])


def test_files_that_are_kept_after_a_run_lie_where_dvc_was_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert home() == Path()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert home() == Path()  # messages then show short paths
    aside = tmp_path / ".dvc" / "tmp" / "exps" / "aside"
    aside.mkdir(parents=True)
    monkeypatch.chdir(aside)
    assert home() == tmp_path


@pytest.mark.parametrize("stage", STAGES)
def test_bad_parameters_end_every_stage_before_any_work_with_all_problems(stage, tmp_path):
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params |= {"seed": "one", "sed": 1, "task": "auer_rods"}
    params["augment"]["hue"] = 999
    params["backbones"]["mobilenet"]["layer"] = ["conv_pw_3_rel"]
    params["ensembles"]["apl_aml"]["members"] += ["blasts"]
    params["overrides"]["blast"] = {"pick": 99}
    here = tmp_path / "here"
    here.mkdir()
    YAML(typ="safe").dump(params, here / "params.yaml")
    for network in ("tensorflow", "keras"):  # would cost seconds
        (tmp_path / f"{network}.py").write_text("raise RuntimeError('imported')")
    words = WORDS.get(stage.removesuffix(".py"), [])
    ended = python(str(ROOT / "stages" / stage), *words, cwd=here, first=tmp_path)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    head, *lines = ended.stderr.splitlines()
    assert head == "params.yaml does not fit:"
    starts = ["seed: Input", "sed: unknown key (did you mean 'seed'?)", "augment.hue: Input"]
    starts += ["task: there is no task 'auer_rods'", "ensembles.apl_aml.members: there is no task 'blasts'"]
    starts += ["backbones.mobilenet: MobileNet has no layer 'conv_pw_3_rel'"]
    starts += ["overrides: blast has no trial 99 to pick"]
    assert all(any(line.strip().startswith(start) for line in lines) for start in starts), ended.stderr
    assert [path.name for path in here.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("stage", ["tune", "ensemble", "member"])
def test_an_unknown_name_of_a_task_or_ensemble_is_a_message(stage, tmp_path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    words = [word.replace("blast", "blasts").replace("aml", "amml") for word in WORDS[stage]]
    ended = python(str(ROOT / "stages" / f"{stage}.py"), *words, cwd=tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "did you mean" in ended.stderr


def test_a_stage_can_be_run_by_hand(tmp_path):
    """Its folder comes first then; pandas must not take stages/bottleneck.py for a library."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    command = [sys.executable, str(ROOT / "stages" / "tune.py"), "auer_rodd"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stderr.startswith("`tasks` of params.yaml has no 'auer_rodd' (did you mean 'auer_rod'?)")


def test_the_stage_prepare_says_what_an_experiment_has_changed(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for words in (["init", "-q"], ["add", "."], [*COMMITTER, "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert python(str(ROOT / "stages" / "prepare.py"), cwd=tmp_path).stdout == ""
    text = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    text = text.replace("seed: 1 ", "seed: 7 ").replace("folds: 5 ", "folds: 4 ")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    first, second = python(str(ROOT / "stages" / "prepare.py"), cwd=tmp_path).stdout.splitlines()
    assert first == "Changed in params.yaml since the last commit: seed=7, split.folds=4."
    assert "`git restore params.yaml` takes them back" in second
    assert (tmp_path / "prepared" / "params.txt").read_text(encoding="utf-8") == "params.yaml is valid\n"


def test_an_unknown_backbone_ends_with_the_nearest_name(tmp_path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    ended = python(str(ROOT / "stages" / "bottleneck.py"), "mobilnet", cwd=tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "did you mean 'mobilenet'" in ended.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_nothing_before_the_cpu_settings(stage):
    """A stage imports the standard library, yaml, and aplsmear, which makes them before it imports NumPy."""
    tree = ast.parse((ROOT / "stages" / stage).read_text(encoding="utf-8"))
    roots = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(str(node.module).split(".")[0])
    assert roots - sys.stdlib_module_names <= {"aplsmear", "yaml"}
    assert "run(main)" in ast.unparse(tree.body[-1])


def test_to_import_a_stage_takes_no_large_library(tmp_path):
    """Importing a stage (all but its `main`) loads neither TensorFlow nor MLflow nor Optuna."""
    code = """
import importlib.util, sys
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("a_stage", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
print(*sorted({"tensorflow", "keras", "mlflow", "optuna", "imgaug", "matplotlib"} & set(sys.modules)))
"""
    ended = python("-c", code, *(str(ROOT / "stages" / name) for name in STAGES), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == ""


def test_errors_that_a_user_can_correct_have_one_base():
    from aplsmear.data.problems import DataSetError
    from aplsmear.errors import UserError
    from aplsmear.images.reading import ImageError
    from aplsmear.sources.kaggle import KaggleError

    for error in (DataSetError, ImageError, KaggleError, ParamsError):
        assert issubclass(error, UserError)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "features/x.npy"),
            "features/x.npy: the disk is full",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "tuned"), "tuned: you may not write"),
        (MemoryError(), "too little memory"),
        (OSError(errno.EIO, "no answer from s3://lab:hunter22@host"), "no answer from s3://***@host"),
    ],
)
def test_a_full_disk_a_locked_folder_and_no_memory_are_reported_in_one_line(error, told, capsys):
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(fail, [])
    printed = capsys.readouterr().err
    assert ended.value.code == 1
    assert told in printed
    assert "then the same command again" in printed
    assert printed.count("\n") == 1


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The inputs of `tune@blast`, with their hashes in dvc.lock."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    files = [
        "features/cell/net/a.npy",
        "features/cell/net/index.csv",
        "dataset/cells.csv",
        "tuned/blast/best.yaml",
    ]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 100)
    outs = {
        "bottleneck@net": "features/cell/net",
        "download": "dataset",
        "tune@blast": "tuned/blast/best.yaml",
    }
    stages = {
        stage: {"outs": [{"path": out, "hash": "md5", "md5": hashed(tmp_path / out)}]}
        for stage, out in outs.items()
    }
    stages["bottleneck@net"]["outs"][0]["nfiles"] = 2
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    return tmp_path


def hashed(path: Path) -> str:
    """The hash that DVC itself computes."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import LocalFileSystem
    from dvc_objects.fs.memory import MemoryFileSystem

    _, _, found = build(HashFileDB(MemoryFileSystem(), "/nowhere"), str(path), LocalFileSystem(), "md5")
    return found.hash_info.value


def test_a_folder_that_was_pulled_in_part_does_not_count_as_damaged(made):
    (made / "features/cell/net/a.npy").unlink()  # `dvc repro --pull --allow-missing` leaves out what it can
    check_inputs("tune@blast")


def test_a_stage_names_inputs_with_a_flipped_bit_before_it_reads_them(made):
    check_inputs("tune@blast")
    for name in ("features/cell/net/a.npy", "dataset/cells.csv", "tuned/blast/best.yaml"):
        flip(made / name)
    with pytest.raises(UserError) as told:
        check_inputs("tune@blast")
    assert str(told.value).splitlines()[1:-1] == [
        "  features/cell/net",
        "  dataset",
    ]  # its own outs are no input
    assert "aplsmear mend" in str(told.value)
    (made / "params.yaml").write_text(
        (made / "params.yaml").read_text().replace("task: auer_rod #", "task: blast #")
    )
    with pytest.raises(UserError, match=r"tuned/blast/best\.yaml"):
        check_inputs("finetune")


def test_an_input_is_read_once_in_a_run_and_again_if_it_has_changed(tmp_path):
    path, record = tmp_path / "cells.csv", tmp_path / "sound"
    path.write_bytes(b"cells")
    outs = {str(path): hashed(path)}
    for run_of_dvc in ("first", "second"):
        assert unsound(outs, record, run_of_dvc) == []
        flip(path)  # keeps size and time
        assert unsound(outs, record, run_of_dvc) == []
        assert unsound(outs, record, "") == [str(path)]
        assert unsound(outs, record, f"after the {run_of_dvc}") == [str(path)]
        flip(path)
    path.touch()
    assert unsound(outs, record, "third") == []
    path.write_bytes(b"CELLS")
    assert unsound(outs, record, "third") == [str(path)]
