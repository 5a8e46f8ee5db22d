"""The schema of params.yaml, and its check before any work starts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from aplsmear.errors import UserError
from aplsmear.layers import applications, layers_of, options_of, smallest_side
from aplsmear.secrets import holds_password, without_secrets

Level = Literal["cell", "smear"]
LEVELS: tuple[Level, ...] = ("cell", "smear")
TaskLevel = Literal["cell", "smear", "patient"]
Precision = Literal["auto", "on", "off"]  # half precision; auto: where there is a GPU
Diagnosis = Literal["healthy", "aml", "apl"]
Condition = dict[str, list[str]]
Summary = Literal[
    "mean",
    "upper",
    "top",
    "share",
    "noisy_or",
    "weighted_mean",
    "weighted_share",
    "blend",
]
# A name is part of paths and of shell commands in dvc.yaml.
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)]

CELL_COLUMNS = ("cell_type", "special_characteristics", "object_type", "diagnosis", "fab")
SMEAR_COLUMNS = ("diagnosis", "fab")
COLUMNS: dict[TaskLevel, tuple[str, ...]]
COLUMNS = {"cell": CELL_COLUMNS, "smear": SMEAR_COLUMNS, "patient": ("diagnosis",)}


_LONGEST = 80  # largest number of characters of a value in a message
_LARGEST = 100_000  # largest number of values; a few lines with aliases (`*name`) can stand for billions
JOINT = "+"  # between layers of a backbone whose features are concatenated
ANY_FEATURES = "any"  # in `tune.space.features`: the features of all backbones

# Parameters of earlier versions: dotted name -> the name now, or a sentence that says why it is gone.
# Rows of `overrides` are searched for the names that begin with `tune.`, too; `*` stands for any backbone.
RENAMED: dict[str, str] = {
    "finetune.inner": "finetune.inner_folds",
    "finetune.even": "finetune.patient_weight",
    "finetune.deeper": "finetune.rate_decay",
    "finetune.head.kinds": "finetune.head.subclasses",
    "finetune.head.middle": "finetune.head.centre_crop",
    "backbones.*.precision": "was removed: features are float32 everywhere. Delete this line.",
    "combine.space.freedom": "combine.space.C",
    "tune.generation": "was removed: a trial trains alone, as fast. Delete this line.",
    "combine.standardise": "was removed: it brought no gain in another laboratory. Delete this line.",
    "augment.more": "augment.extra_views",
    "augment.stain": "was removed: it gained nothing on real cells. Delete this line.",
}
_NOW = "is now called "

T = TypeVar("T")


class ParamsError(UserError, ValueError):
    """params.yaml cannot be used; the message lists every problem."""


class Strict(BaseModel):
    """A table that refuses unknown keys, converts no types and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Compute(Strict):
    """How much of the machine is used."""

    threads: int = Field(ge=1, le=64)


class Engine(Strict):
    """The machines that compute the data stages and `predict`."""

    address: str = Field(pattern=r"^$|^(tcp|tls)://\S+$")


class Kaggle(Strict):
    """A data set on Kaggle."""

    owner: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    slug: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    version: int = Field(ge=1)


class Dataset(Strict):
    """Where the smears are, and what may be left out."""

    root: str
    source: Literal["folder", "kaggle"]
    kaggle: Kaggle
    min_box: int = Field(ge=2)
    skip_bad_images: bool
    pseudonymise: bool

    @model_validator(mode="after")
    def _root_of_source(self) -> Dataset:
        if self.source == "kaggle" and self.root != "kaggle":
            raise ValueError("with source: kaggle the data set lies in `kaggle`, so root must be `kaggle`")
        return self


class Split(Strict):
    """The outer folds."""

    folds: int = Field(ge=3, le=20)  # nested inner folds need two folds beside the held-out one
    by: Literal["patient", "site"]


class Augment(Strict):
    """Plain and augmented views of cells and smears."""

    size: dict[Level, Annotated[int, Field(ge=16, le=2048)]]
    normalise: Literal["none", "reinhard", "macenko"]
    margin: float = Field(ge=0, le=2)
    views: int = Field(ge=0, le=50)
    extra_views: dict[str, Annotated[int, Field(ge=1, le=50)]]
    rotate: float = Field(ge=0, le=180)
    scale: float = Field(ge=0, le=0.5)
    shift: float = Field(ge=0, le=0.5)
    hue: int = Field(ge=0, le=255)
    saturation: int = Field(ge=0, le=255)
    brightness: float = Field(ge=0, le=0.9)
    blur: float = Field(ge=0, le=10)
    noise: float = Field(ge=0, le=100)


class Backbone(Strict):
    """A frozen network of keras.applications, cut at a named layer.

    `sha256` belongs to the file that `weights` names, if it names a file. DVC tracks parameters and not this
    file, so the hash makes a changed file visible. Empty: the file is not checked.
    """

    application: str
    options: dict[str, Any] = {}
    input_size: dict[Level, Annotated[int, Field(ge=16, le=2048)]]
    layer: list[str] = Field(min_length=1)
    weights: str
    sha256: str = Field("", pattern="^([0-9a-f]{64})?$")
    batch: int = Field(ge=1, le=4096)


class Range(Strict):
    """A number between two others."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError("a range with log: true starts above 0")
        return self


class Space(Strict):
    """What the search for a head chooses from."""

    features: list[str] = Field(min_length=1)
    views: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    depth: list[Annotated[int, Field(ge=0, le=8)]] = Field(min_length=1)
    width: list[Annotated[int, Field(ge=1, le=4096)]] = Field(min_length=1)
    activation: list[Literal["relu", "gelu", "tanh"]] = Field(min_length=1)
    dropout: Range
    learning_rate: Range
    schedule: list[Literal["constant", "linear", "cosine"]] = Field(min_length=1)
    weight_decay: Range
    balance: Range
    smoothing: list[Annotated[float, Field(ge=0, lt=1)]] = Field(min_length=1)
    mixup: list[Annotated[float, Field(ge=0, le=10)]] = Field(min_length=1)
    batch: list[Annotated[int, Field(ge=2, le=65536)]] = Field(min_length=1)
    epochs: list[Annotated[int, Field(ge=1, le=10000)]] = Field(min_length=1)

    @model_validator(mode="after")
    def _within_reason(self) -> Space:
        bounds = {"dropout": (0, 0.95), "learning_rate": (0, 1), "weight_decay": (0, 100), "balance": (0, 1)}
        wrong = [
            f"{name} must lie within {low} and {high}, not {knob.low} and {knob.high}"
            for name, (low, high) in bounds.items()
            for knob in [getattr(self, name)]
            if knob.low < low or knob.high > high or (name == "learning_rate" and knob.low == 0)
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class Tune(Strict):
    """The search for a head on bottleneck features."""

    trials: int = Field(ge=1)
    items_per_patient: int = Field(ge=1)
    cells_per_step: int = Field(ge=2)
    average: int = Field(ge=0)
    restarts: int = Field(ge=1, le=64)
    patience: int = Field(ge=0)
    memory: int = Field(ge=16)
    storage: str
    pick: dict[Name, Annotated[int, Field(ge=0)]]
    space: Space

    @field_validator("storage")
    @classmethod
    def _no_secret(cls, value: str) -> str:
        if value and not value.startswith("postgresql+psycopg://"):
            raise ValueError("must be empty, or the URL of a database: postgresql+psycopg://...")
        if holds_password(value):
            raise ValueError(
                "must not hold a password, since params.yaml is shared: give the URL in the environment "
                "variable APLSMEAR_STUDY_STORAGE, or the password in ~/.pgpass"
            )
        return value


class FinetuneHead(Strict):
    """Training of extra heads on features, before the blocks train."""

    subclasses: str
    centre_crop: float = Field(gt=0, le=1)
    members: int = Field(ge=1, le=100)
    units: int = Field(ge=1, le=65536)
    dropout: float = Field(ge=0, lt=1)
    epochs: int = Field(ge=0, le=10000)
    rate: float = Field(gt=0, le=1)
    weight_decay: float = Field(ge=0, le=10)


class Finetune(Strict):
    """Finetuning of one tuned head together with the uppermost blocks of its backbone."""

    trial: Literal["tuned"] | Annotated[int, Field(ge=0)]
    folds: int = Field(ge=0)
    inner_folds: int = Field(ge=1)
    patient_weight: float = Field(ge=0, le=1)
    head: FinetuneHead
    blocks: int = Field(ge=1)
    rate: float = Field(gt=0, le=1)
    rate_decay: float = Field(ge=0, le=1)
    head_rate: float = Field(gt=0, le=1)
    epochs: int = Field(ge=0, le=10000)
    patience: int = Field(ge=0)
    batch: int = Field(ge=2, le=65536)
    views: int = Field(ge=0)
    online: bool
    precision: Precision
    pictures: int = Field(ge=0, le=20)
    log_model: bool
    log_images: bool


class Task(Strict):
    """A binary question about cells, smears or patients."""

    level: TaskLevel
    positive: Condition
    negative: Condition

    @model_validator(mode="after")
    def _columns(self) -> Task:
        for condition in (self.positive, self.negative):
            for column, labels in condition.items():
                if column not in COLUMNS[self.level]:
                    raise ValueError(_no_column(self.level, column))
                if not labels:
                    raise ValueError(f"column {column!r} lists no label")
        return self

    @property
    def images(self) -> Level:
        """The level of the images of an item: those of a patient are its cells."""
        return "cell" if self.level == "patient" else self.level


class Ensemble(Strict):
    """A probability per patient, from the scores of several tasks."""

    positive: Diagnosis
    negative: Diagnosis
    members: list[Name] = Field(min_length=1)
    weigh_by: Name


class CombineSpace(Strict):
    """What the search for a combination chooses from."""

    model: list[Literal["average", "logistic", "network"]] = Field(min_length=1)
    summary: list[Summary] = Field(min_length=1)
    C: list[Annotated[float, Field(gt=0, le=1e6)]] = Field(min_length=1)
    units: list[Annotated[int, Field(ge=1, le=64)]] = Field(min_length=1)


class Combine(Strict):
    """How the scores of members become one probability per patient."""

    trials: int = Field(ge=1)
    space: CombineSpace
    resamples: int = Field(ge=100)
    refits: int = Field(ge=20)
    shuffles: int = Field(ge=1)
    shares: list[Name] = []


class Params(Strict):
    """All of params.yaml."""

    seed: int = Field(ge=0, lt=2**31)
    task: Name
    compute: Compute
    engine: Engine
    dataset: Dataset
    split: Split
    augment: Augment
    backbones: dict[Name, Backbone] = Field(min_length=1)
    tune: Tune
    finetune: Finetune
    overrides: dict[Name, dict[str, Any]]  # of `tune`, a row a task
    tasks: dict[Name, Task] = Field(min_length=1)
    ensembles: dict[Name, Ensemble] = Field(min_length=1)
    combine: Combine

    def tune_of(self, task: str) -> Tune:
        """The search settings of one task: `tune`, changed by the task's row of `overrides`."""
        merged = _merge(self.tune.model_dump(), self.overrides[task])
        return Tune.model_validate(merged)


def read_params(path: Path) -> Params:
    """Read and check params.yaml, in YAML 1.2, as DVC reads it.

    Args:
        path: of the file.

    Raises:
        ParamsError: the message lists every problem: a file that is missing or not valid YAML, a key given
            twice, old or unknown keys (with the nearest known key), wrong types, values out of range, names
            of tasks, layers or columns that do not exist.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} cannot be read ({error}): start in the folder of dvc.yaml") from None
    except YAMLError as error:
        raise ParamsError(no_yaml(path, error)) from None
    if _is_large(raw):
        raise ParamsError(f"{path} holds more than {_LARGEST:,} values, aliases (`*name`) resolved")
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} holds {_shown(raw)}, expected a table of keys such as `seed: 1`")
    lines = []
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        lines = _lines(error, Params)
    lines += _crossed(raw)
    if not lines:
        return params
    old = renamed(raw)
    missing = {f"{answer.removeprefix(_NOW)}: is missing" for answer in old.values()}
    lines = [line for line in lines if line not in missing and line.split(": ")[0] not in old]
    lines += [f"{name}: {answer}" for name, answer in old.items()]
    raise ParamsError("\n  ".join([f"{path} does not fit:", *dict.fromkeys(lines)]))


def no_yaml(path: Path, error: YAMLError) -> str:
    """The message about a file that cannot be parsed, without the parser's advice to allow a key twice."""
    lines = [line.strip() for line in str(error).split("To suppress")[0].splitlines() if line.strip()]
    return "\n  ".join([f"{path} is not valid YAML, or has a key twice:", *lines])


def named(rows: Mapping[str, T], name: str, where: str) -> T:
    """The row of this name.

    Args:
        rows: a table of params.yaml.
        name: the name asked for.
        where: name of the table.

    Raises:
        ParamsError: there is no such row; the message names the nearest row.
    """
    if name not in rows:
        raise ParamsError(
            f"{where} of params.yaml has no {name!r}{nearest(name, rows)}; it has: {', '.join(rows)}"
        )
    return rows[name]


def nearest(word: str, known: Any) -> str:
    """A question after an unknown word: ``(did you mean 'X'?)``; empty if no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def renamed(raw: Mapping[Any, Any]) -> dict[str, str]:
    """The parameters whose names are those of an earlier version (`RENAMED`).

    Args:
        raw: params.yaml, or a part of it, as read from YAML.

    Returns:
        Dotted name -> a sentence: the name now, or why it is gone.
    """
    found = {}
    for name, _ in flat(raw, tables=True):
        row = re.sub(r"(^overrides\.[^.]+\.)?.*", r"\1", name, count=1, flags=re.DOTALL)
        listed = re.sub(r"^backbones\.[^.]+", "backbones.*", name)
        now = RENAMED.get(f"tune.{name.removeprefix(row)}" if row else listed)
        if now and " " not in now:
            now = _NOW + (row + now.removeprefix("tune.") if row else now)
        if now:
            found[name] = now
    return found


def flat(nested: Any, above: str = "", *, tables: bool = False) -> Iterator[tuple[str, Any]]:
    """The values of tables in tables, each with its dotted name.

    Args:
        nested: the outermost table.
        above: dotted name of `nested`; empty: it has none.
        tables: whether tables are given, too, each before what it holds.
    """
    is_table = isinstance(nested, Mapping)
    if above and (tables or not is_table):
        yield above, nested
    for key, value in nested.items() if is_table else ():
        yield from flat(value, f"{above}.{key}" if above else str(key), tables=tables)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` in place of its own, table by table."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _crossed(raw: Mapping[str, Any]) -> Iterator[str]:
    """Problems between parts of params.yaml. Values of a wrong shape are skipped: `Params` reports them."""
    tasks, backbones, finetune = (_table(raw.get(key)) for key in ("tasks", "backbones", "finetune"))
    level = _table(tasks.get(str(raw.get("task")))).get("level")
    column = _table(finetune.get("head")).get("subclasses")
    if column and level in COLUMNS and column not in COLUMNS[level]:
        yield f"finetune.head.subclasses: {_no_column(level, column)}"
    for name, task in tasks.items():
        for side in ("positive", "negative"):
            if _table(task).get(side) == {}:
                yield f"tasks.{name}.{side}: is empty: name a column and its labels"
    yield from _not_tasks("task", [raw.get("task")], tasks)
    yield from _not_tasks("combine.shares", _table(raw.get("combine")).get("shares"), tasks)
    for name, row in _table(raw.get("ensembles")).items():
        where, ensemble = f"ensembles.{name}", _table(row)
        yield from _not_tasks(f"{where}.members", ensemble.get("members"), tasks)
        yield from _twice(f"{where}.members", ensemble.get("members"))
        yield from _not_tasks(f"{where}.weigh_by", [ensemble.get("weigh_by")], tasks)
        if "positive" in ensemble and ensemble["positive"] == ensemble.get("negative"):
            yield f"{where}: positive and negative are both {ensemble['positive']!r}"
    yield from _without_level("augment.size", _table(raw.get("augment")).get("size"))
    layers = []
    for name, row in backbones.items():
        yield from _crossed_backbone(f"backbones.{name}", _table(row))
        layers += [f"{name}/{layer}" for layer in _texts(_table(row).get("layer"))]
    yield from _crossed_search(raw, tasks, layers)


def _crossed_backbone(where: str, backbone: Mapping[str, Any]) -> Iterator[str]:
    """Problems of a backbone with keras.applications; Keras is not imported."""
    sizes, options = _table(backbone.get("input_size")), _table(backbone.get("options"))
    layers, application = _texts(backbone.get("layer")), backbone.get("application")
    yield from _without_level(f"{where}.input_size", backbone.get("input_size"))
    yield from _twice(f"{where}.layer", layers)
    if not isinstance(application, str):
        return
    if application not in applications():
        yield (
            f"{where}.application: keras.applications has no {application!r}"
            f"{nearest(application, applications())}; it has: {', '.join(applications())}"
        )
        return
    taken = options_of(application)
    for option in [option for option in options if option not in taken]:
        yield (
            f"{where}.options: {application} has no option {option!r}{nearest(str(option), taken)}; "
            f"options that you can set: {', '.join(taken)}"
        )
    least = smallest_side(application)
    for level, side in sizes.items():
        if isinstance(side, int) and side < least:
            yield f"{where}.input_size.{level}: {application} needs {least} px or more, not {side}"
    known = layers_of(application, options)
    wrong = [part for layer in layers for part in layer.split(JOINT) if part not in known]
    for part in dict.fromkeys(wrong):
        yield f"{where}.layer: {application} has no layer {part!r} with a map{nearest(part, known)}"
    if wrong:
        yield f"{where}.layer: {application} has: {', '.join(known)}"


def _crossed_search(raw: Mapping[str, Any], tasks: Collection[str], layers: Collection[str]) -> Iterator[str]:
    """Problems of `tune` and of the rows of `overrides`."""
    overrides, tune = _table(raw.get("overrides")), _table(raw.get("tune"))
    yield from _not_tasks("overrides", list(overrides), tasks)
    if "overrides" in raw:
        for name in [name for name in tasks if name not in overrides]:
            yield f"overrides: {name!r} has no row; write `{name}: {{}}` if nothing differs"
    yield from _crossed_features("tune", tune, layers)
    yield from _not_tasks("tune.pick", list(_table(tune.get("pick"))), tasks)
    try:
        Tune.model_validate(tune)
    except ValidationError:
        return  # reported by `Params`; rows cannot be checked without `tune`
    for name, row in overrides.items():
        merged = _merge(tune, _table(row))
        try:
            own = Tune.model_validate(merged)
        except ValidationError as error:
            yield from (f"overrides.{name}.{line}" for line in _lines(error, Tune))
        else:
            yield from _crossed_picks(name, own, _table(_table(row).get("pick")))
        if "features" in _table(_table(row).get("space")):
            yield from _crossed_features(f"overrides.{name}", merged, layers)


def _crossed_picks(task: str, tune: Tune, own: Mapping[Any, Any]) -> Iterator[str]:
    """Picked trials that the search of the task does not have, or that are of another task."""
    for other in own:
        if other != task:
            yield f"overrides.{task}.pick: {other!r} is another task: this row can pick for {task} only"
    if tune.pick.get(task, 0) >= tune.trials:
        yield f"pick: {task} has no trial {tune.pick[task]}: it has {tune.trials}, counted from 0"


def _crossed_features(where: str, tune: Mapping[str, Any], layers: Collection[str]) -> Iterator[str]:
    features = _texts(_table(tune.get("space")).get("features"))
    if ANY_FEATURES in features and len(features) > 1:
        yield f"{where}.space.features: {ANY_FEATURES!r} stands alone, without other names"
    for name in features:
        if name != ANY_FEATURES and name not in layers:
            yield (
                f"{where}.space.features: {name!r} is no backbone/layer{nearest(name, layers)}; "
                f"`backbones` has: {', '.join(layers)}"
            )


def _not_tasks(where: str, names: Any, tasks: Collection[str]) -> Iterator[str]:
    for name in _texts(names):
        if name not in tasks:
            yield f"{where}: {name!r} is no task{nearest(name, tasks)}"


def _twice(where: str, names: Any) -> Iterator[str]:
    found = _texts(names)
    yield from (f"{where}: {name!r} is named twice" for name in sorted(set(found)) if found.count(name) > 1)


def _without_level(where: str, sizes: Any) -> Iterator[str]:
    if isinstance(sizes, dict):
        yield from (f"{where}.{level}: is missing" for level in LEVELS if level not in sizes)


def _no_column(level: TaskLevel, column: Any) -> str:
    known = COLUMNS[level]
    return f"a {level} has no column {column!r}{nearest(str(column), known)}; it has: {', '.join(known)}"


def _table(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _lines(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for each problem: where it is, what was expected, what is there."""
    lines = []
    for problem in error.errors():
        kind, parts = problem["type"], list(problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            message = f"unknown key{nearest(str(parts[-1]), _known_keys(model, parts[:-1]))}"
        elif kind == "missing":
            message = "is missing"
        elif parts and parts[-1] == "[key]":
            parts.pop()
            known = _known_keys(model, parts[:-1])
            message = (
                f"unknown key{nearest(str(parts[-1]), known)}"
                if known
                else "a name is made of small letters, digits and _, and starts with a letter"
            )
        elif kind in ("model_type", "dict_type"):
            message = f"expected a table of keys, not {_shown(problem['input'])}"
        elif kind != "value_error":
            message = f"{message}, not {_shown(problem['input'])}"
        where = ".".join(text if (text := str(part)).isprintable() else repr(part) for part in parts)
        lines += [f"{where}: {line}" if where else line for line in message.splitlines()]
    return lines


def _is_large(value: Any) -> bool:
    """Whether a tree has more than `_LARGEST` values; a shared value counts each time that it occurs."""
    waiting = [value]
    for _ in range(_LARGEST):
        if not waiting:
            return False
        each = waiting.pop()
        if isinstance(each, (list, set, dict)):
            waiting.extend([*each, *each.values()] if isinstance(each, dict) else each)
    return True


def _shown(value: Any) -> str:
    """A value, shortened for a message."""
    text = "nothing" if value is None else without_secrets(repr(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _known_keys(model: Any, location: list[int | str]) -> list[str]:
    """The keys that the table at this place in `model` can have; empty: any key."""
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            if part not in model.model_fields:
                return []
            model = model.model_fields[str(part)].annotation
        elif get_origin(model) in (dict, list):
            model = get_args(model)[-1]
        else:
            return []
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    keys = get_args(model)[0] if get_origin(model) is dict else None
    return list(get_args(keys)) if get_origin(keys) is Literal else []
