"""A bundle is whole, of this version, and harmless, or it is not used."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_combination import RIDGE, cohort

from aplsmear.ensembles.bundle import (
    BundleError,
    Member,
    Reference,
    make_model,
    read_bundle,
    reference_features,
    write_bundle,
)
from aplsmear.ensembles.combination import judge
from aplsmear.ensembles.familiarity import make_cloud
from aplsmear.heads.head import Head, write_heads
from aplsmear.params import Augment, Backbone

BACKBONE = Backbone(
    application="MobileNet", input_size={"cell": 32, "smear": 48}, layer=["a", "b"], weights="none", batch=8
)
LEVELS = {"m0": "cell", "m1": "smear", "m2": "cell", "gate": "cell"}


def augment() -> Augment:
    """Whatever knobs there are, at 0."""
    off = {name: 0 if field.annotation is int else 0.0 for name, field in Augment.model_fields.items()}
    return Augment(
        **off
        | {"size": {"cell": 32, "smear": 48}, "views": 1, "extra_views": {"apl": 2}, "normalise": "none"}
    )


def make(folder: Path) -> Path:
    """An ensemble's folder with a bundle in it."""
    patients, members = cohort()
    verdicts = judge(patients, members, RIDGE, 0, 1)
    random = np.random.default_rng(1)
    heads = {}
    for task in LEVELS:
        heads[task] = folder / "tuned" / task / "heads.npz"
        kernels = [random.normal(size=(5, 1)).astype(np.float32) for _ in verdicts.combinations]
        of_worlds = [Head("net/a", (kernel,), (np.zeros(1, np.float32),)) for kernel in kernels]
        write_heads(heads[task], of_worlds, average=1)
    for level in ("cell", "smear"):
        path = folder / "backbones" / "net" / f"{level}.weights.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights of " + level.encode())
    fold = patients["fold"].to_numpy()
    clouds = [make_cloud(random.normal(size=(len(fold), n)), fold) for n in (10, 6)]
    reference = Reference("cell", "net/a", 4.0, *clouds)
    of_task = {task: Member(task=task, level=level) for task, level in LEVELS.items()}
    model = make_model(
        name="apl_aml",
        positive="apl",
        negative="aml",
        members=[of_task[f"m{k}"] for k in range(3)],
        weigh_by=of_task["gate"],
        seed=1,
        min_box=8,
        augment=augment(),
        backbones={"net": BACKBONE},
        combinations=verdicts.combinations,
        reference_level="cell",
        reference_features="net/a",
        min_items=4.0,
        pictured_by="m0",
        high_is_positive=True,
        inputs={"splits/folds.csv": "0123"},
    )
    write_bundle(folder / "apl_aml" / "model", model, heads, folder / "backbones", reference)
    return folder / "apl_aml"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A copy of the folder `model` alone, somewhere else."""
    return Path(shutil.copytree(made / "model", tmp_path / "a copy"))


def signed(folder: Path) -> None:
    """Make the manifest agree with the files: whoever alters one may alter both."""
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


def test_a_copy_of_its_folder_is_all_that_is_needed(made, copy) -> None:
    here, there = read_bundle(made), read_bundle(copy)
    said = np.random.default_rng(2).normal(size=(9, 3))
    for mine, other in zip(here.combinations, there.combinations, strict=True):
        assert mine.probability(said).tolist() == other.probability(said).tolist()
    assert [each.task for each in there.members] == ["m0", "m1", "m2"]
    assert {each.average for each in there.members} == {1}
    assert there.reference.typical.distance(np.ones(10)) == here.reference.typical.distance(np.ones(10))
    assert there.backbone("net", "smear").weights == str(copy / "backbones" / "net" / "smear.weights.h5")


def test_the_same_bytes_from_the_same_inputs(made, tmp_path) -> None:
    assert contents(make(tmp_path) / "model") == contents(made / "model")


def test_nobodys_name_is_in_it(made) -> None:
    assert not [name for name, data in contents(made / "model").items() if b"apl000" in data]


def test_the_models_of_a_fold_or_those_for_new_patients(made) -> None:
    bundle = read_bundle(made)
    assert [bundle.outer_fold_of(fold) for fold in (0, 4, None)] == [0, 4, 5]
    for fold in (-1, 5):
        with pytest.raises(BundleError, match=f"no fold {fold}.* had 5"):
            bundle.outer_fold_of(fold)


def test_all_that_is_missing_or_altered_is_named_at_once(copy) -> None:
    (copy / "heads" / "m1.npz").unlink()
    path = copy / "backbones" / "net" / "cell.weights.h5"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError) as error:
        read_bundle(copy)
    assert "heads/m1.npz is missing" in str(error.value)
    assert "backbones/net/cell.weights.h5 is not what it was" in str(error.value)
    assert "dvc repro" in str(error.value)


def test_another_version_says_who_wrote_it(copy) -> None:
    edited(copy / "manifest.json", version=1, aplsmear="7.0.1")
    with pytest.raises(BundleError, match=r"version 1 .*reads 2.*7\.0\.1"):
        read_bundle(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other", "version": 2, "files": {}}', "\x00"])
def test_what_is_no_manifest_is_refused(copy, text) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json cannot be used"):
        read_bundle(copy)


def test_a_folder_that_is_no_bundle_says_where_one_comes_from(tmp_path) -> None:
    with pytest.raises(BundleError, match="dvc repro"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "heads/../../secret"])
def test_nothing_outside_the_folder_is_touched(copy, name) -> None:
    (copy.parent / "secret").write_text("secret")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(b"secret").hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="leads out of the folder"):
        read_bundle(copy)


def test_a_link_out_of_the_folder_is_refused(copy) -> None:
    path = copy / "heads" / "m0.npz"
    outside = path.rename(copy.parent / "m0.npz")
    path.symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of the folder"):
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
    with pytest.raises(BundleError, match="does not fit together"):
        read_bundle(copy)
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"surprise": 1}, "surprise"),
        ({"seed": "1"}, "seed"),
        ({"combinations": []}, "heads for 0 outer folds"),
        ({"reference_features": "net/c"}, "no backbone that gives net/c"),
        ({"members": [{"task": "../m0", "level": "cell"}]}, "not in its manifest"),
        ({"backbones": {}}, "no backbone that gives net/a"),
    ],
    ids=lambda each: str(each)[:20],
)
def test_settings_that_do_not_fit_together_are_refused(copy, changed, said) -> None:
    edited(copy / "model.json", **changed)
    signed(copy)
    with pytest.raises(BundleError, match=said):
        read_bundle(copy)


def test_its_weights_are_its_own_whatever_it_says(copy) -> None:
    model = json.loads((copy / "model.json").read_text())
    model["backbones"]["net"]["weights"] = "/etc/hostname"
    (copy / "model.json").write_text(json.dumps(model))
    signed(copy)
    assert read_bundle(copy).backbone("net", "cell").weights.startswith(str(copy))


def test_the_features_of_most_heads_describe_patients() -> None:
    def heads(*features: str) -> list[Head]:
        return [Head(each, (), ()) for each in features]

    assert reference_features([heads("a/x", "b/y"), heads("c/z", "b/y"), heads("a/x")]) == "b/y"
    assert reference_features([heads("b/y"), heads("a/x")]) == "a/x"
