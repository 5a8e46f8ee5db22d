"""Profiles: whole sets of parameters, and what an earlier set left behind."""

import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.params import read_params
from aplsmear.workspace.profiles import ProfileError, leftovers, read_profile, with_settings

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "profiles"


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_is_a_valid_params_yaml(path: Path) -> None:
    assert read_params(path).tasks


@pytest.mark.parametrize("name", ["deepapl", "kaggle"])
def test_the_head_of_a_profile_says_what_to_type_and_what_to_expect(name: str) -> None:
    head = read_profile(PROFILES, name).split("\nseed:")[0]
    for word in ("Command:", "Needs:", "Time:", "Expect:", f"aplsmear profile {name}"):
        assert word in head
    assert "@@" not in head


def test_a_setting_changes_its_value_and_no_remark() -> None:
    text = read_profile(PROFILES, "demo")
    assert with_settings(text, {"split.folds": "7"}) == text.replace("folds: 5", "folds: 7")


def test_settings_that_do_not_exist_are_named_all_at_once() -> None:
    with pytest.raises(ProfileError, match=r"split\.fold'.*split\.folds.*nonsense"):
        with_settings(read_profile(PROFILES, "demo"), {"split.fold": "7", "nonsense": "1"})


def test_a_setting_with_an_old_name_is_answered_with_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aplsmear.params.RENAMED", {"split.parts": "split.folds"})
    with pytest.raises(ProfileError, match=r"^'split.parts' is now called split.folds$"):
        with_settings(read_profile(PROFILES, "demo"), {"split.parts": "7"})


def test_an_unknown_profile_is_answered_with_those_there_are() -> None:
    with pytest.raises(ProfileError, match=r"'deepap'.*deepapl.*demo, kaggle"):
        read_profile(PROFILES, "deepap")


def test_leftovers_are_what_no_stage_of_these_parameters_makes(tmp_path: Path) -> None:
    params = read_params(PROFILES / "demo.yaml")
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
    members = [tmp_path / "members" / "apl_aml" / name for name in ("old.csv", "old.heads.npz")]
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
    assert "# of everything random" in (tmp_path / "params.yaml").read_text(encoding="utf-8")


def test_a_bad_setting_leaves_params_yaml_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").symlink_to(PROFILES)
    (tmp_path / "params.yaml").write_text("seed: 3\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["profile", "demo", "split.folds=two"])
    assert done.exit_code == 1
    assert "folds" in done.output
    assert (tmp_path / "params.yaml").read_text(encoding="utf-8") == "seed: 3\n"
