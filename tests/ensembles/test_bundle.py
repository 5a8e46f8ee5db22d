"""A bundle is complete, of this version and harmless, or it is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_combination import RIDGE, cohort

from aplsmear.ensembles.baselines import Pooled
from aplsmear.ensembles.bundle import (
    VERSION,
    Member,
    Model,
    Reference,
    read_bundle,
    reference_features,
    write_bundle,
)
from aplsmear.ensembles.cell_curve import CellCurve
from aplsmear.ensembles.combination import Candidate, as_json, judge
from aplsmear.ensembles.familiarity import make_cloud
from aplsmear.errors import UserError
from aplsmear.heads.head import Head, write_heads
from aplsmear.params import Augment, Backbone

BACKBONE = Backbone(
    application="MobileNet", input_size={"cell": 32, "smear": 48}, layer=["a", "b"], weights="none", batch=8
)
LEVELS = {"m0": "cell", "m1": "smear", "m2": "cell", "gate": "cell"}


def augment() -> Augment:
    """Every setting at 0."""
    off = {name: 0 if field.annotation is int else 0.0 for name, field in Augment.model_fields.items()}
    return Augment(**off | {"size": {"cell": 32, "smear": 48}, "views": 1, "extra_views": {"apl": 2}})


def make(folder: Path) -> Path:
    """A folder of an ensemble, with a bundle in it."""
    patients, members = cohort()
    verdicts = judge(patients, members, RIDGE, 0, 1)
    share = judge(patients, {"m0": members["m0"]}, [Candidate(0, "average", "share", 0.0, 0)], 0, 1)
    random = np.random.default_rng(1)
    heads = {}
    for task in LEVELS:
        heads[task] = folder / "tuned" / task / "heads.npz"
        kernels = [random.normal(size=(5, 1)).astype(np.float32) for _ in verdicts.combinations]
        of_folds = [Head("net/a", (kernel,), (np.zeros(1, np.float32),)) for kernel in kernels]
        write_heads(heads[task], of_folds, average=1)
    for level in ("cell", "smear"):
        path = folder / "backbones" / "net" / f"{level}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights of " + level.encode())
    fold = patients["fold"].to_numpy()
    clouds = [make_cloud(random.normal(size=(len(fold), n)), fold) for n in (10, 6)]
    reference = Reference(*clouds)
    of_task = {task: Member(task=task, level=level) for task, level in LEVELS.items()}
    model = Model(
        name="apl_aml",
        positive="apl",
        negative="aml",
        members=[of_task[f"m{k}"] for k in range(3)],
        weigh_by=of_task["gate"],
        seed=1,
        min_box=8,
        augment=augment(),
        backbones={"net": BACKBONE.model_dump(exclude={"weights", "sha256"})},
        combinations=[as_json(each) for each in verdicts.combinations],
        reference_level="cell",
        reference_features="net/a",
        cell_curve=CellCurve(cells=[5, 10], spread=[1.0, 0.5], models=0.2),
        min_items=4.0,
        shares={"share of m0 cells": as_json(share.combinations[-1])},
        pooled_features="net/b",
        inputs={"splits/folds.csv": "0123"},
    )
    pooled = Pooled("net/b", np.zeros(5), np.ones(5), np.ones(5), np.array(0.5))
    write_bundle(folder / "apl_aml" / "model", model, heads, folder / "backbones", reference, pooled)
    return folder / "apl_aml"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A copy of the folder `model` alone, in another place."""
    return Path(shutil.copytree(made / "model", tmp_path / "a copy"))


def signed(folder: Path) -> None:
    """Make the manifest agree with the files, as an attacker could."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edited(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_copy_of_the_folder_gives_the_same_probabilities(made, copy) -> None:
    here, there = read_bundle(made), read_bundle(copy)
    logits = np.random.default_rng(2).normal(size=(9, 3))
    for mine, other in zip(here.combinations, there.combinations, strict=True):
        assert mine.probability(logits).tolist() == other.probability(logits).tolist()
    assert [each.task for each in there.members] == ["m0", "m1", "m2"]
    assert {each.average for each in there.members} == {1}
    assert there.reference.typical.distance(np.ones(10)) == here.reference.typical.distance(np.ones(10))
    assert there.backbone("net", "smear", []).graph == copy / "backbones" / "net" / "smear.onnx"


def test_the_same_bytes_from_the_same_inputs(made, tmp_path) -> None:
    assert contents(make(tmp_path) / "model") == contents(made / "model")


def test_it_holds_no_name_of_a_patient(made) -> None:
    assert not [name for name, data in contents(made / "model").items() if b"apl000" in data]


def test_the_models_of_a_fold_or_the_final_model_can_judge(made) -> None:
    bundle = read_bundle(made)
    assert [bundle.outer_fold_of(fold) for fold in (0, 4, None)] == [0, 4, 5]
    for fold in (-1, 5):
        with pytest.raises(UserError, match=f"no fold {fold}.* had 5"):
            bundle.outer_fold_of(fold)


def test_all_missing_and_changed_files_are_listed_together(copy) -> None:
    (copy / "heads" / "m1.npz").unlink()
    path = copy / "backbones" / "net" / "cell.onnx"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_bundle(copy)
    assert "heads/m1.npz is missing" in str(error.value)
    assert "backbones/net/cell.onnx has changed since" in str(error.value)
    assert "dvc repro" in str(error.value)


def test_a_misspelt_ensemble_ends_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "apl_aml" / "model").mkdir(parents=True)
    (tmp_path / "apl_aml" / "model" / "manifest.json").touch()
    with pytest.raises(UserError, match=r"apl_amll has no manifest.json \(did you mean 'apl_aml'\?\)"):
        read_bundle(tmp_path / "apl_amll")


def test_an_older_bundle_is_refused_with_the_program_that_reads_it(copy) -> None:
    """Also if model.json has settings that this version does not have."""
    edited(copy / "model.json", standardise=0.0, upwards=True)
    edited(copy / "manifest.json", version=1, aplsmear="0.2.0")
    with pytest.raises(UserError, match=rf"version 1 .*reads {VERSION}.*0\.2\.0.*dvc repro") as error:
        read_bundle(copy)
    assert "standardise" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other", "version": 3, "files": {}}', "\x00"])
def test_an_invalid_manifest_is_refused(copy, text) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json cannot be used"):
        read_bundle(copy)


def test_for_a_folder_without_a_bundle_the_message_names_the_command_that_makes_one(tmp_path) -> None:
    with pytest.raises(UserError, match="dvc repro"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "heads/../../secret"])
def test_paths_out_of_the_folder_are_refused(copy, name) -> None:
    (copy.parent / "secret").write_text("secret")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(b"secret").hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="leads out of the folder"):
        read_bundle(copy)


def test_a_link_out_of_the_folder_is_refused(copy) -> None:
    path = copy / "heads" / "m0.npz"
    outside = path.rename(copy.parent / "m0.npz")
    path.symlink_to(outside)
    with pytest.raises(UserError, match="leads out of the folder"):
        read_bundle(copy)


class Trap:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("name", ["heads/m0.npz", "reference.npz"])
def test_a_pickle_is_never_opened(copy, name, monkeypatch) -> None:
    monkeypatch.chdir(copy)
    with np.load(copy / name) as file:
        arrays = {key: file[key] for key in file.files}
    with (copy / name).open("wb") as out:
        np.savez(out, **dict.fromkeys(arrays, np.array([Trap()], dtype=object)))
    signed(copy)
    with pytest.raises(UserError, match="do not fit together"):
        read_bundle(copy)
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"seed": "1"}, "seed"),
        ({"combinations": []}, "heads for 0 outer folds"),
        ({"reference_features": "net/c"}, "no backbone with the features net/c"),
        ({"members": [{"task": "../m0", "level": "cell"}]}, "not in its manifest"),
        ({"backbones": {}}, "no backbone with the features net/a"),
    ],
    ids=lambda each: str(each)[:20],
)
def test_settings_that_do_not_fit_together_are_refused(copy, changed, message) -> None:
    edited(copy / "model.json", **changed)
    signed(copy)
    with pytest.raises(UserError, match=message):
        read_bundle(copy)


def test_weights_outside_the_bundle_are_ignored(copy) -> None:
    model = json.loads((copy / "model.json").read_text())
    model["backbones"]["net"]["weights"] = "/etc/hostname"
    (copy / "model.json").write_text(json.dumps(model))
    signed(copy)
    assert read_bundle(copy).backbone("net", "cell", ["a"]).graph.is_relative_to(copy)


def test_patients_are_described_by_the_features_that_most_heads_read() -> None:
    def heads(*features: str) -> list[Head]:
        return [Head(each, (), ()) for each in features]

    assert reference_features([heads("a/x", "b/y"), heads("c/z", "b/y"), heads("a/x")]) == "b/y"
    assert reference_features([heads("b/y"), heads("a/x")]) == "a/x"
