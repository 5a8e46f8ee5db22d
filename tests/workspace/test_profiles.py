"""Profiles: whole sets of parameters, and what an earlier set left behind."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.params import flat, read_params
from aplsmear.workspace.profiles import ProfileError, leftovers, read_profile, with_settings
from clones import run

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "profiles"


NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml"))
DEMO = read_profile(PROFILES, "demo")


def profile(tmp_path: Path, text: str) -> dict[str, Any]:
    """The parameters under a profile with this text."""
    (tmp_path / "demo.yaml").write_text(DEMO, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    return yaml.safe_load(read_profile(tmp_path, "mine"))


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_gives_a_valid_params_yaml(name: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(read_profile(PROFILES, name), encoding="utf-8")
    assert read_params(tmp_path / "params.yaml").tasks


@pytest.mark.parametrize("name", NAMES)
def test_dvc_exp_run_changes_no_other_line_of_a_profile(name: str) -> None:
    """`dvc exp run -S` turns `[a, b]` into lines: git would show changes that nobody made."""
    text = read_profile(PROFILES, name)
    assert with_settings(text, {"seed": "1"}) == text


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_keeps_the_remarks_of_the_demo(name: str) -> None:
    _, *sections = DEMO.split("\n\n")
    lines = [line for line in "\n".join(sections).splitlines() if line.lstrip().startswith("#")]
    start = next(place for place, line in enumerate(lines) if "The demo runs without" in line)
    assert set(lines[:start] + lines[start + 5 :]) <= set(read_profile(PROFILES, name).splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_tune_changes_every_task_unless_its_row_differs(name: str) -> None:
    """Rows that repeat values of `tune` would keep the old values when `tune` is changed."""
    params = yaml.safe_load(read_profile(PROFILES, name))
    tune = dict(flat(params["tune"]))
    rows = {task: dict(flat(row)) for task, row in params["overrides"].items()}
    assert [(task, key) for task, row in rows.items() for key in row if row[key] == tune.get(key)] == []


def test_a_profile_replaces_lists_and_tables_of_rows_and_merges_other_tables(tmp_path: Path) -> None:
    demo = yaml.safe_load(DEMO)
    task = demo["tasks"]["blast"]
    found = profile(
        tmp_path,
        "# Mine.\n\nseed: 3\ntune: {trials: 7, space: {width: [8]}}\noverrides: {blast: {patience: 2}}\n"
        f"tasks: {{blast: {json.dumps(task)}}}\n",
    )
    assert found["tasks"] == {"blast": task}
    assert found["overrides"] == {"blast": {"patience": 2}}
    assert found["tune"] == demo["tune"] | {"trials": 7, "space": demo["tune"]["space"] | {"width": [8]}}
    rest = demo.keys() - {"seed", "tune", "tasks", "overrides"}
    assert {key: found[key] for key in rest} == {key: demo[key] for key in rest}


def test_each_task_without_a_row_of_overrides_gets_one(tmp_path: Path) -> None:
    found = profile(tmp_path, "tune:\n  trials: 9\n")
    assert found["overrides"] == {task: {} for task in found["tasks"]}


def test_a_profile_may_have_another_base_than_the_demo(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("# Other.\n\nseed: 3\ntune: {trials: 7}\n", encoding="utf-8")
    found = profile(tmp_path, "# Mine.\n\nbase: other\ntune: {patience: 2}\n")
    assert (found["seed"], found["tune"]["trials"], found["tune"]["patience"]) == (3, 7, 2)
    assert "base" not in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere\n", "there is no profile 'nowhere'"),
        ("seed: [1\n", "not valid YAML"),
        ("", "holds no parameters"),
        ("tasks:\n", "'tasks' is a table of parameters"),
    ],
)
def test_a_profile_that_cannot_be_used_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        profile(tmp_path, text)


@pytest.mark.parametrize("name", ["deepapl", "kaggle"])
def test_the_head_of_a_profile_says_what_to_type_and_what_to_expect(name: str) -> None:
    head = read_profile(PROFILES, name).split("\nseed:")[0]
    for word in ("Command:", "Needs:", "Time:", "Expect:", f"aplsmear profile {name}"):
        assert word in head
    assert "@@" not in head


def test_a_setting_changes_its_value_and_no_remark() -> None:
    assert with_settings(DEMO, {"split.folds": "7"}) == DEMO.replace("folds: 5", "folds: 7")


def test_a_row_of_overrides_can_get_what_tune_has_and_nothing_else() -> None:
    settings = {"overrides.blast.trials": "24", "overrides.blast.space.dropout.low": "0.1"}
    found = yaml.safe_load(with_settings(DEMO, settings))
    assert found["overrides"]["blast"] == {"trials": 24, "space": {"dropout": {"low": 0.1}}}
    for key in ("overrides.blasts.trials", "overrides.blast.trails", "overrides.trials"):
        with pytest.raises(ProfileError, match=f"there is no '{key}'"):
            with_settings(DEMO, {key: "24"})


def test_settings_that_do_not_exist_are_named_all_at_once() -> None:
    with pytest.raises(ProfileError, match=r"split\.fold'.*split\.folds.*nonsense"):
        with_settings(DEMO, {"split.fold": "7", "nonsense": "1"})


def test_a_setting_with_an_old_name_is_answered_with_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aplsmear.params.RENAMED", {"split.parts": "split.folds"})
    with pytest.raises(ProfileError, match=r"^'split.parts' is now called split.folds$"):
        with_settings(DEMO, {"split.parts": "7"})


def test_an_unknown_profile_is_answered_with_those_there_are() -> None:
    with pytest.raises(ProfileError, match=r"'deepap'.*deepapl.*demo, dinobloom, dinov2, kaggle"):
        read_profile(PROFILES, "deepap")


def test_leftovers_are_what_no_stage_of_these_parameters_makes(tmp_path: Path) -> None:
    params = read_params(ROOT / "params.yaml")
    backbone, task = next(iter(params.backbones)), next(iter(params.tasks))
    kept = [tmp_path / "features" / "cell" / backbone, tmp_path / "backbones" / backbone]
    kept += [tmp_path / "tuned" / task]
    old = [
        tmp_path / "features" / "cell" / "old",
        tmp_path / "backbones" / "old",
        tmp_path / "tuned" / "old",
    ]
    for folder in kept + old:
        folder.mkdir(parents=True)
    members = [tmp_path / "members" / "apl_aml" / name for name in ("old.heads.npz", "old.scores.parquet")]
    for member in members:
        member.parent.mkdir(parents=True, exist_ok=True)
        member.touch()
    assert leftovers(tmp_path, params) == sorted([*old, *members])


def test_the_command_writes_params_yaml_and_clears_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").symlink_to(PROFILES)
    (tmp_path / "tuned" / "faggot").mkdir(parents=True)
    (tmp_path / "mine.h5").write_bytes(b"weights")
    settings = ["dataset.root=/data/with blank", "backbones.mobilenet.weights=mine.h5"]
    done = CliRunner().invoke(app, ["profile", "deepapl", *settings])
    assert done.exit_code == 0, done.output
    sums = read_params(tmp_path / "params.yaml").backbones["mobilenet"].sha256
    assert sums == hashlib.sha256(b"weights").hexdigest()
    assert read_params(tmp_path / "params.yaml").dataset.root == "/data/with blank"
    assert not (tmp_path / "tuned" / "faggot").exists()
    assert "# seed of all random numbers" in (tmp_path / "params.yaml").read_text(encoding="utf-8")


def test_the_demo_comes_back_to_the_bit_after_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").symlink_to(PROFILES)
    assert CliRunner().invoke(app, ["profile", "kaggle", "split.folds=3"]).exit_code == 0
    assert CliRunner().invoke(app, ["profile", "demo"]).exit_code == 0
    assert (tmp_path / "params.yaml").read_text(encoding="utf-8") == DEMO


def test_a_bad_setting_leaves_params_yaml_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").symlink_to(PROFILES)
    (tmp_path / "params.yaml").write_text("seed: 3\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["profile", "demo", "split.folds=two"])
    assert done.exit_code == 1
    assert "folds" in done.output
    assert (tmp_path / "params.yaml").read_text(encoding="utf-8") == "seed: 3\n"


@pytest.mark.parametrize(
    "root", ["/x/charge #2", "2024", "'x", "true", "/p 20%c?x", "a: b", "[x", "-", "${seed}"]
)
def test_text_on_the_command_line_is_taken_as_it_is(root: str) -> None:
    written = with_settings(DEMO, {"dataset.root": root})
    assert yaml.safe_load(written)["dataset"]["root"] == root
    assert YAML(typ="safe").load(written)["dataset"]["root"] == root  # as DVC and a stage read it


def test_numbers_lists_and_tables_on_the_command_line_are_read_as_such() -> None:
    given = {
        "finetune.trial": "3",
        "augment.rotate": "9.5",
        "finetune.online": "true",
        "tune.space.epochs": "[2, 5]",
        "tune.space.features": "[any]",
        "overrides.blast": "{pick: 1}",
        "backbones.mobilenet.layer": "[conv_pw_3_relu]",
    }
    found = dict(flat(yaml.safe_load(with_settings(DEMO, given)), tables=True))
    assert [found[key] for key in given] == [3, 9.5, True, [2, 5], ["any"], {"pick": 1}, ["conv_pw_3_relu"]]


@pytest.mark.parametrize("text", ["10 #2", "'x", "[1", "10\n---\n11", "!!python/name:os.system"])
def test_a_value_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ProfileError, match=re.escape(f"split.folds: {text!r} is no value")):
        with_settings(DEMO, {"split.folds": text})


def test_the_command_writes_full_paths_which_an_experiment_in_another_folder_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").symlink_to(PROFILES)
    (tmp_path / "mine.h5").write_bytes(b"weights")
    for root, full in (
        ("our_smears", tmp_path / "our_smears"),
        ("../d", tmp_path.parent / "d"),
        ("data", "data"),
        ("./kaggle", "./kaggle"),
        ("/full", "/full"),
    ):
        settings = [f"dataset.root={root}", "backbones.mobilenet.weights=mine.h5"]
        done = CliRunner().invoke(app, ["profile", "demo", *settings])
        assert done.exit_code == 0, done.output
        params = read_params(tmp_path / "params.yaml")
        assert params.dataset.root == str(full)
        assert params.backbones["mobilenet"].weights == str(tmp_path / "mine.h5")


def test_the_command_refuses_a_data_set_whose_files_git_would_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").symlink_to(PROFILES)
    run(tmp_path, "git", "init", "--quiet")
    (tmp_path / "our_smears").mkdir()
    (tmp_path / "our_smears" / "wsi.csv").touch()
    done = CliRunner().invoke(app, ["profile", "demo", "dataset.root=our_smears"])
    assert done.exit_code == 1
    assert "our_smears/wsi.csv" in done.output
    assert not (tmp_path / "params.yaml").exists()


def test_files_that_no_stage_wrote_are_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").symlink_to(PROFILES)
    elsewhere = tmp_path / "elsewhere"
    for folder in (
        elsewhere,
        tmp_path / "tuned" / "old",
        tmp_path / "tuned" / "mine",
        tmp_path / "features" / "cell",
    ):
        folder.mkdir(parents=True)
    for file in (
        "elsewhere/index.csv",
        "tuned/old/heads.npz",
        "tuned/mine/heads.npz",
        "tuned/mine/notes.txt",
    ):
        (tmp_path / file).touch()
    (tmp_path / "features" / "cell" / "linked").symlink_to(elsewhere)
    done = CliRunner().invoke(app, ["profile", "demo"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "tuned" / "old").exists()
    assert "no stage wrote tuned/mine/notes.txt" in done.output
    assert "no stage wrote features/cell/linked" in done.output
    assert sorted(path.name for path in (tmp_path / "tuned" / "mine").iterdir()) == ["heads.npz", "notes.txt"]
    assert (elsewhere / "index.csv").exists()
    assert (tmp_path / "features" / "cell" / "linked").is_symlink()
