"""params.yaml: all problems are reported at once, each with the place to fix."""

from copy import deepcopy
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from aplsmear.params import RENAMED, Params, ParamsError, TaskTune, flat, named, read_params

ROOT = Path(__file__).parents[1]


BACKBONE = {"application": "MobileNet", "layer": ["conv_pw_3_relu"], "weights": "none", "batch": 8}
BACKBONE |= {"input_size": {"cell": 64, "smear": 64}}


def changed(tmp_path: Path, *changes: tuple[str, object]) -> Path:
    """params.yaml of the repository with one backbone; values at dotted places changed (None: taken away)."""
    yaml = YAML()
    params: dict = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["backbones"] = {"mobilenet": deepcopy(BACKBONE)}
    params["tune"]["space"] |= {"features": ["any"], "dropout": {"low": 0.0, "high": 0.5}}
    for place, value in changes:
        *path, last = place.split(".")
        table = params
        for key in path:
            table = table[key]
        if value is None:
            del table[last]
        else:
            table[last] = value
    yaml.dump(params, tmp_path / "params.yaml")
    return tmp_path / "params.yaml"


def problems(path: Path) -> list[str]:
    with pytest.raises(ParamsError) as error:
        read_params(path)
    head, *lines = str(error.value).splitlines()
    assert head == f"{path} does not fit:"
    return [line.strip() for line in lines]


def test_the_parameters_of_the_repository_are_valid():
    params = read_params(ROOT / "params.yaml")
    assert params.task in params.tasks
    assert Params.model_validate(params.model_dump()) == params


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("sed", 1, "sed: unknown key (did you mean 'seed'?)"),
        ("augment.rotat", 1, "augment.rotat: unknown key (did you mean 'rotate'?)"),
        ("backbones.mobilenet.weight", "none",
         "backbones.mobilenet.weight: unknown key (did you mean 'weights'?)"),
        ("tune.space.dropout.hi", 1, "tune.space.dropout.hi: unknown key (did you mean 'high'?)"),
        ("augment.size.smears", 9, "augment.size.smears: unknown key (did you mean 'smear'?)"),
        ("split.folds", None, "split.folds: is missing"),
        ("split.folds", 2, "split.folds: Input should be greater than or equal to 3, not 2"),
        ("split.folds", "five", "split.folds: Input should be a valid integer, not 'five'"),
        ("compute.threads", True, "compute.threads: Input should be a valid integer, not True"),
        ("augment.blur", float("nan"), "augment.blur: Input should be a finite number, not nan"),
        ("combine", 7, "combine: expected a table of keys, not 7"),
        ("dataset.source", "kagle", "dataset.source: Input should be"),
        ("task", "auer_rods",
         "task: there is no task 'auer_rods' (did you mean 'auer_rod'?); there are: auer_rod, "),
        ("ensembles.apl_aml.members", ["blasts"],
         "ensembles.apl_aml.members: there is no task 'blasts' (did you mean 'blast'?)"),
        ("ensembles.apl_aml.members", ["blast", "blast"],
         "ensembles.apl_aml.members: 'blast' is named twice"),
        ("ensembles.apl_aml.negative", "apl", "ensembles.apl_aml: positive and negative are both 'apl'"),
        ("augment.size.smear", None, "augment.size.smear: is missing"),
        ("backbones.mobilenet.input_size.cell", None, "backbones.mobilenet.input_size.cell: is missing"),
        ("backbones.mobilenet.layer", ["a", "a"], "backbones.mobilenet.layer: 'a' is named twice"),
        ("backbones.Mobile Net", {}, "backbones.Mobile Net: a name is made of small letters"),
        ("tune.space.features", ["any", "mobilenet/conv_pw_3_relu"],
         "tune.space.features: `backbones` has no layer 'any'"),
        ("tune.space.features", ["mobilenet/conv_pw_4_relu"], "(did you mean 'mobilenet/conv_pw_3_relu'?)"),
        ("tune.space.dropout.high", -1.0, "tune.space.dropout: low (0.0) is above high (-1.0)"),
        ("backbones.mobilenet.application", "MobilNet",
         "backbones.mobilenet: keras.applications has no network 'MobilNet' (did you mean 'MobileNet'"),
        ("backbones.mobilenet.layer", ["conv_pw_3_rel"],
         "MobileNet has no layer 'conv_pw_3_rel' (did you mean 'conv_pw_3_relu'?)"),
        ("backbones.mobilenet.layer", ["conv_pw_3_relu+nope"],
         "MobileNet has no layer 'nope'; there are: input_layer, conv1, conv1_bn,"),
        ("backbones.mobilenet.options", {"alfa": 0.5}, "MobileNet has no option 'alfa' (did you mean"),
        ("backbones.mobilenet.input_size.cell", 31, "MobileNet needs an input_size of 32 px or more"),
        ("backbones.mobilenet.application", None, "backbones.mobilenet: source: keras.applications needs"),
        ("backbones.mobilenet.source", "onnx", "backbones.mobilenet: source: onnx needs a table `onnx`"),
        ("backbones.mobilenet.onnx", {"pooling": "mean"}, ".onnx.pooling: Input should be"),
        ("tune.space.features", ["mobilenet/conv_pw_3_relu+mobilenet_v2/nope"],
         "tune.space.features: `backbones` has no layer 'mobilenet_v2/nope'"),
        ("tune.pick", {}, "tune.pick: is now called overrides.TASK.pick"),
        ("overrides.blast", {"pick": 99}, "overrides: blast has no trial 99 to pick: it has 12"),
        ("overrides.blast", {"pick": {"blast": 0}}, "overrides.blast.pick: Input should be a valid integer"),
        ("tasks.blast.positive", {}, "tasks.blast.positive: is empty"),
        ("tasks.blast.positive", {"celltype": ["a"]},
         "a cell has no column 'celltype' (did you mean 'cell_type'?)"),
        ("tasks.apl_aml_smear.positive", {"cell_type": ["a"]}, "a smear has no column 'cell_type'"),
        ("tasks.apl_aml_patient.positive", {"fab": ["m2"]}, "a patient has no column 'fab'"),
        ("overrides.blast", None, "overrides: 'blast' has no row; write `blast: {}`"),
        ("overrides.blasts", {}, "overrides: there is no task 'blasts' (did you mean 'blast'?)"),
        ("overrides.blast.trails", 3, "overrides.blast.trails: unknown key (did you mean 'trials'?)"),
        ("overrides.blast", {"space": {"features": ["x/y"]}},
         "overrides.blast.space.features: `backbones` has no layer 'x/y'"),
        ("overrides.blast", {"space": {"dropout": {"high": -1.0}}},
         "overrides.blast.space.dropout: low (0.0) is"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported(tmp_path, place, value, message):
    found = problems(changed(tmp_path, (place, value)))
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    "name", ["$(id)", "`id`", "a;b", "a b", "../a", "a/b", "-a", "A", "a\nb", "", "a" * 61, "ä", "a\0b"]
)
@pytest.mark.parametrize("table", ["tasks", "backbones", "ensembles", "overrides"])
def test_no_name_can_be_more_than_one_word_of_a_shell_or_leave_its_folder(tmp_path, table, name):
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params[table][name] = next(iter(params[table].values()))
    path = tmp_path / "params.yaml"
    YAML(typ="safe").dump(params, path)
    assert any(line.startswith(f"{table}.") and "a name" in line for line in problems(path))


def test_switches_of_a_network_change_which_layers_it_has(tmp_path):
    v3 = BACKBONE | {"application": "MobileNetV3Small", "layer": ["expanded_conv_1_expand"]}
    other = BACKBONE | {"application": "MobileNetV3Small", "layer": ["rescaling"]}
    assert read_params(changed(tmp_path, ("backbones", {"a": v3 | {"options": {"minimalistic": True}}})))
    assert read_params(changed(tmp_path, ("backbones", {"a": other})))
    found = problems(
        changed(tmp_path, ("backbones", {"a": other | {"options": {"include_preprocessing": False}}}))
    )
    assert "no layer 'rescaling'" in found[0]


def test_old_names_are_answered_with_the_new_ones_all_at_once(tmp_path, monkeypatch):
    gone = "is gone: it made nothing better"
    names = {"finetune.inside": "finetune.blocks", "tune.old": "tune.trials", "combine.gone": gone}
    monkeypatch.setattr("aplsmear.params.RENAMED", names)
    changes = [("finetune.inside", 1), ("finetune.blocks", None), ("combine.gone", 1), ("combine.shufles", 1)]
    assert problems(changed(tmp_path, *changes, ("overrides.blast", {"old": 3}))) == [
        "combine.shufles: unknown key (did you mean 'shuffles'?)",
        "finetune.inside: is now called finetune.blocks",
        "overrides.blast.old: is now called overrides.blast.trials",
        f"combine.gone: {gone}",
    ]


def test_the_new_name_of_every_renamed_parameter_exists():
    known = {name for name, _ in flat(YAML(typ="safe").load(ROOT / "params.yaml"), tables=True)}
    known |= {f"overrides.TASK.{key}" for key in TaskTune.model_fields}
    assert {now for now in RENAMED.values() if " " not in now} <= known
    assert known.isdisjoint(RENAMED)


def test_the_changelog_lists_every_renamed_parameter() -> None:
    """DVC itself refuses an unknown name after -S, so its user has to look the new name up."""
    rows = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for old, now in RENAMED.items():
        assert f"| `{old}` | {'removed' if ' ' in now else f'`{now}`'} |" in rows


def test_one_mistake_is_one_line(tmp_path):
    assert len(problems(changed(tmp_path, ("task", "nope")))) == 1
    assert len(problems(changed(tmp_path, ("tune.trials", 0)))) == 1  # not again for each override


def test_wrong_shapes_and_wrong_names_are_reported_together(tmp_path):
    found = problems(
        changed(
            tmp_path,
            ("seed", "one"),
            ("augment.size.smear", None),
            ("augment.hue", 999),
            ("ensembles.apl_aml.members", ["nope"]),
            ("overrides.blast", {"trails": 1}),
            ("combine", None),
        )
    )
    starts = [
        "seed",
        "augment.hue",
        "combine",
        "augment.size",
        "ensembles.apl_aml.members",
        "overrides.blast",
    ]
    assert all(any(line.startswith(start) for line in found) for start in starts), found
    assert len(found) == len(starts)


def test_an_override_changes_what_it_names_and_no_more(tmp_path):
    row = {"trials": 3, "space": {"dropout": {"low": 0.25}, "width": [8]}}
    params = read_params(changed(tmp_path, ("overrides.blast", row)))
    tune, own = params.tune, params.tune_of("blast")
    assert (own.trials, own.space.width) == (3, [8])
    assert (own.space.dropout.low, own.space.dropout.high) == (0.25, tune.space.dropout.high)
    theirs = own.model_copy(update={"trials": tune.trials, "space": tune.space}).model_dump()
    assert theirs == tune.model_dump() | {"pick": None}
    assert params.tune_of("faggot").space == tune.space


def test_a_key_given_twice_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text(encoding="utf-8") + "\nseed: 2\n", encoding="utf-8")
    with pytest.raises(ParamsError, match='found duplicate key "seed"') as error:
        read_params(path)
    assert "suppress" not in str(error.value)


@pytest.mark.parametrize("text", ["seed: [1", "just words", "- a\n- b\n", "", "seed: \xff"])
def test_a_file_without_a_table_is_an_error_without_traceback(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ParamsError, match=r"params\.yaml"):
        read_params(path)


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch touched']",
        "seed: !!python/name:os.system",
        "seed: !env HOME",
        "!!python/object:pathlib.Path {}",
    ],
)
def test_a_yaml_tag_runs_no_code(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError, match=r"params\.yaml is not valid YAML"):
        read_params(path)
    assert [each.name for each in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
        "seed: &a [*a]\n",
        "seed: &a {b: *a}\n",
    ],
)
def test_aliases_that_stand_for_billions_of_values_are_refused(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError, match="more than 100,000 values"):
        read_params(path)


def test_a_missing_file_says_where_to_start(tmp_path):
    with pytest.raises(ParamsError, match=r"start in the folder of dvc\.yaml"):
        read_params(tmp_path / "params.yaml")


def test_numbers_are_read_as_dvc_reads_them(tmp_path):
    """YAML 1.1, which PyYAML reads, takes 1e-3 for text and `on` for true."""
    path = changed(tmp_path, ("tune.space.dropout", {"low": 0.001, "high": 0.5}))
    expected = read_params(path)
    text = path.read_text(encoding="utf-8")
    assert "low: 0.001\n      high: 0.5\n" in text
    path.write_text(
        text.replace("low: 0.001\n      high: 0.5\n", "low: 1e-3\n      high: 5e-1\n"), encoding="utf-8"
    )
    assert read_params(path) == expected


def test_an_unknown_name_is_answered_with_the_nearest_one():
    assert named({"mobilenet": 1}, "mobilenet", "backbones") == 1
    with pytest.raises(
        ParamsError, match=r"`backbones` of params\.yaml has no 'mobilnet' \(did you mean 'mobilenet'"
    ):
        named({"mobilenet": 1}, "mobilnet", "backbones")


def test_a_command_refuses_only_over_the_parameters_that_it_uses(tmp_path):
    path = changed(tmp_path, ("engine.address", "10.0.0.1"), ("tune.trials", 0), ("combine.freedom", 1))
    assert read_params(path, "seed", "tasks").tasks["blast"].level == "cell"
    with pytest.raises(ParamsError) as error:
        read_params(path, "engine", "seed")
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == ["engine.address"]
