"""The schema of params.yaml, and its check before any work starts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from aplsmear.errors import UserError
from aplsmear.layers import applications, layers_of, options_of, smallest_side
from aplsmear.secrets import holds_password, without_secrets
from aplsmear.words import nearest, no_such

Level = Literal["cell", "smear"]
LEVELS: tuple[Level, ...] = ("cell", "smear")
TaskLevel = Literal["cell", "smear", "patient"]
Precision = Literal["auto", "on", "off"]  # half precision; auto: where there is a GPU
Diagnosis = Literal["healthy", "aml", "apl"]
Condition = dict[str, Annotated[list[str], Field(min_length=1)]]
Summary = Literal["mean", "upper", "top", "share", "noisy_or", "weighted_mean", "weighted_share", "blend"]

CELL_COLUMNS = ("cell_type", "special_characteristics", "object_type", "diagnosis", "fab")
SMEAR_COLUMNS = ("diagnosis", "fab")
COLUMNS: dict[TaskLevel, tuple[str, ...]]
COLUMNS = {"cell": CELL_COLUMNS, "smear": SMEAR_COLUMNS, "patient": ("diagnosis",)}


_LONGEST = 80  # largest number of characters of a value in a message
_LARGEST = 100_000  # largest number of values; a few lines with aliases (`*name`) can stand for billions
JOINT = "+"  # between layers of a backbone whose features are concatenated
_OUTPUTS = r"(?a)\w[\w.:-]*(\+\w[\w.:-]*)*"  # of an ONNX file; each names a file of features
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
    "tune.pick": "overrides.TASK.pick",
    "tune.generation": "was removed: a trial trains alone, as fast. Delete this line.",
    "combine.standardise": "was removed: it brought no gain in another laboratory. Delete this line.",
    "augment.more": "augment.extra_views",
    "augment.normalise": "was removed: it gained nothing on real smears. Delete this line.",
    "augment.stain": "was removed: it gained nothing on real cells. Delete this line.",
}
_NOW = "is now called "

T = TypeVar("T")


def _among(lead: str, names: Iterable[str], known: Collection[str]) -> None:
    """Report the names that are not known, each with the nearest known name."""
    if lines := [no_such(lead, name, known) for name in dict.fromkeys(names) if name not in known]:
        raise ValueError("\n".join(lines))


def _is_task(name: str, info: ValidationInfo) -> str:
    if info.context:
        _among("there is no task", [name], info.context["tasks"])
    return name


def _are_features(names: list[str], info: ValidationInfo) -> list[str]:
    if info.context and names != [ANY_FEATURES]:
        each = [part for name in names for part in of_backbones(name)]
        _among("`backbones` has no layer", each, info.context["layers"])
    return names


def of_backbones(features: str) -> list[str]:
    """The features of each backbone in a name: ``a/x+y+b/z`` -> ``a/x+y`` and ``b/z``."""
    return re.split(r"\+(?=[a-z][a-z0-9_]*/)", features)


def _distinct(names: list[str]) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is named twice")
    return names


def _within(least: float, most: float) -> AfterValidator:
    """Check that both ends of a range lie within two numbers."""

    def check(values: Range) -> Range:
        if values.low < least or values.high > most:
            raise ValueError(f"must lie within {least} and {most}, not {values.low} and {values.high}")
        return values

    return AfterValidator(check)


# A name is part of paths and of shell commands in dvc.yaml.
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)]
TaskName = Annotated[Name, AfterValidator(_is_task)]
Side = Annotated[int, Field(ge=16, le=2048)]


class ParamsError(UserError, ValueError):
    """params.yaml cannot be used; the message lists every problem."""


class Strict(BaseModel):
    """A table that refuses unknown keys, converts no types and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Sides(Strict):
    """The side of square images of each level, in px."""

    cell: Side
    smear: Side

    def __getitem__(self, level: Level) -> int:
        """The side at a level."""
        return self.cell if level == "cell" else self.smear


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

    size: Sides
    margin: float = Field(ge=-0.9, le=2)
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


class OnnxFile(Strict):
    """How the network of an ONNX file takes images and gives features.

    Pixels, 0 to 255, are divided by `scale`; then `mean` is subtracted, and the rest divided by `std`. The
    `pooling` makes the features of an image: ``class``, the first token; ``patches``, the mean of the tokens
    of patches; ``class+patches``, both in this order; ``map``, the mean of a map; ``none``, the output.
    """

    layout: Literal["NCHW", "NHWC"]  # N images, C colours, H rows, W columns
    scale: float = Field(gt=0)
    mean: list[float] = Field(min_length=3, max_length=3)  # of red, green and blue
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=3, max_length=3)
    pooling: Literal["class", "patches", "class+patches", "map", "none"]
    tokens: int = Field(1, ge=0, le=64)  # before those of patches: the class token and the registers


class Backbone(Strict):
    """A frozen network: of keras.applications, cut at named layers, or of an ONNX file with named outputs.

    `sha256` belongs to the file that `weights` names, if it names a file. DVC tracks parameters and not this
    file, so the hash makes a changed file visible. Empty: the file is not checked. `trained_on` names public
    data sets whose images trained the weights: `aplsmear evaluate` warns where a folder has such a name.
    """

    source: Literal["keras.applications", "onnx"] = "keras.applications"
    application: str = ""
    options: dict[str, Any] = {}
    onnx: OnnxFile | None = None
    input_size: Sides
    layer: Annotated[list[str], AfterValidator(_distinct)] = Field(min_length=1)
    weights: str
    sha256: str = Field("", pattern="^([0-9a-f]{64})?$")
    batch: int = Field(ge=1, le=4096)
    trained_on: list[Name] = []

    @model_validator(mode="after")
    def _fits_its_source(self) -> Backbone:
        if self.source == "onnx":
            if self.onnx is None or self.application or self.options:
                raise ValueError("source: onnx needs a table `onnx`, and neither `application` nor `options`")
            for name in self.layer:
                if not re.fullmatch(_OUTPUTS, name):
                    raise ValueError(f"{name!r} cannot be the name of a file: write each / of an output as .")
        elif self.onnx is not None or not self.application:
            raise ValueError("source: keras.applications needs `application`, and no table `onnx`")
        return self

    @model_validator(mode="after")
    def _is_in_keras(self, info: ValidationInfo) -> Backbone:
        """Compare with the table of keras.applications; Keras is not imported."""
        if info.context and self.source == "keras.applications":
            name = self.application
            _among("keras.applications has no network", [name], applications())
            _among(f"{name} has no option", self.options, options_of(name))
            parts = [part for layer in self.layer for part in layer.split(JOINT)]
            _among(f"{name} has no layer", parts, layers_of(name, self.options))
            least = smallest_side(name)
            for level in LEVELS:
                if self.input_size[level] < least:
                    raise ValueError(f"{name} needs an input_size of {least} px or more")
        return self


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

    features: Annotated[list[str], AfterValidator(_are_features)] = Field(min_length=1)
    views: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    depth: list[Annotated[int, Field(ge=0, le=8)]] = Field(min_length=1)
    width: list[Annotated[int, Field(ge=1, le=4096)]] = Field(min_length=1)
    activation: list[Literal["relu", "gelu", "tanh"]] = Field(min_length=1)
    dropout: Annotated[Range, _within(0, 0.95)]
    learning_rate: Annotated[Range, _within(1e-9, 1)]
    schedule: list[Literal["constant", "linear", "cosine"]] = Field(min_length=1)
    weight_decay: Annotated[Range, _within(0, 100)]
    balance: Annotated[Range, _within(0, 1)]
    smoothing: list[Annotated[float, Field(ge=0, lt=1)]] = Field(min_length=1)
    mixup: list[Annotated[float, Field(ge=0, le=10)]] = Field(min_length=1)
    batch: list[Annotated[int, Field(ge=2, le=65536)]] = Field(min_length=1)
    epochs: list[Annotated[int, Field(ge=1, le=10000)]] = Field(min_length=1)


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


class TaskTune(Tune):
    """The search of one task. `pick`: the trial of the final model, if the user chooses it by hand."""

    pick: int | None = Field(None, ge=0)


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

    @field_validator("subclasses")
    @classmethod
    def _is_column(cls, column: str, info: ValidationInfo) -> str:
        if info.context and column and info.context["level"] in COLUMNS:
            _among(f"a {info.context['level']} has no column", [column], COLUMNS[info.context["level"]])
        return column


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
    positive: Condition = Field(min_length=1)
    negative: Condition = Field(min_length=1)

    @field_validator("positive", "negative")
    @classmethod
    def _are_columns(cls, condition: Condition, info: ValidationInfo) -> Condition:
        if "level" in info.data:
            _among(f"a {info.data['level']} has no column", condition, COLUMNS[info.data["level"]])
        return condition

    @property
    def images(self) -> Level:
        """The level of the images of an item: those of a patient are its cells."""
        return "cell" if self.level == "patient" else self.level


class Ensemble(Strict):
    """A probability per patient, from the scores of several tasks."""

    positive: Diagnosis
    negative: Diagnosis
    members: Annotated[list[TaskName], AfterValidator(_distinct)] = Field(min_length=1)
    weigh_by: TaskName

    @model_validator(mode="after")
    def _two_diagnoses(self) -> Ensemble:
        if self.positive == self.negative:
            raise ValueError(f"positive and negative are both {self.positive!r}")
        return self


class External(Strict):
    """A labelled cohort that took no part in training, and the ensemble that is judged on it."""

    ensemble: Name
    root: str = Field(min_length=1)


class CombineSpace(Strict):
    """What the search for a combination chooses from."""

    model: list[Literal["average", "logistic", "network"]] = Field(min_length=1)
    summary: list[Summary] = Field(min_length=1)
    C: list[Annotated[float, Field(gt=0, le=1e6)]] = Field(min_length=1)
    units: list[Annotated[int, Field(ge=1, le=64)]] = Field(min_length=1)


class Promise(Strict):
    """What the alarm of an ensemble is to promise."""

    miss_rate: float = Field(default=0.1, gt=0, lt=1)
    confidence: float = Field(default=0.9, gt=0, lt=1)


class Combine(Strict):
    """How the scores of members become one probability per patient."""

    trials: int = Field(ge=1)
    space: CombineSpace
    resamples: int = Field(ge=100)
    refits: int = Field(ge=20)
    shuffles: int = Field(ge=1)
    shares: list[TaskName] = []
    promise: Promise = Promise()


class OneAnswer(Strict):
    """How several ensembles give one answer."""

    sure: float = Field(ge=0, lt=1)


class Params(Strict):
    """All of params.yaml."""

    seed: int = Field(ge=0, lt=2**31)
    task: TaskName
    compute: Compute
    engine: Engine
    dataset: Dataset
    split: Split
    augment: Augment
    backbones: dict[Name, Backbone] = Field(min_length=1)
    tune: Tune
    finetune: Finetune
    overrides: dict[TaskName, TaskTune]  # params.yaml has only what differs from `tune` in the row of a task
    tasks: dict[Name, Task] = Field(min_length=1)
    ensembles: dict[Name, Ensemble] = Field(min_length=1)
    external: dict[Name, External]
    combine: Combine
    answer: OneAnswer

    @model_validator(mode="before")
    @classmethod
    def _whole_rows(cls, raw: Any) -> Any:
        """Fill each row of `overrides` up with the values of `tune`."""
        if not isinstance(raw, dict):
            return raw
        tune, rows = _table(raw.get("tune")), _table(raw.get("overrides"))
        return raw | ({"overrides": {task: _merge(tune, row) for task, row in rows.items()}} if rows else {})

    @field_validator("overrides")
    @classmethod
    def _has_rows_and_trials(cls, rows: dict[str, TaskTune], info: ValidationInfo) -> dict[str, TaskTune]:
        for task in info.context["tasks"] if info.context else ():
            if task not in rows:
                raise ValueError(f"{task!r} has no row; write `{task}: {{}}` if nothing differs")
        for task, row in rows.items():
            if row.pick is not None and row.pick >= row.trials:
                raise ValueError(
                    f"{task} has no trial {row.pick} to pick: it has {row.trials}, counted from 0"
                )
        return rows

    @field_validator("external")
    @classmethod
    def _judges_by_ensembles(cls, rows: dict[str, External], info: ValidationInfo) -> dict[str, External]:
        if "ensembles" in info.data:
            asked = (row.ensemble for row in rows.values())
            _among("there is no ensemble", asked, info.data["ensembles"])
        return rows

    def tune_of(self, task: str) -> TaskTune:
        """The search settings of one task: `tune`, changed by the task's row of `overrides`."""
        return self.overrides[task]


def read_params(path: Path, *used: str) -> Params:
    """Read and check params.yaml, in YAML 1.2, as DVC reads it.

    If top-level keys are given as `used`, such as ``engine``, only these are checked and in the result.

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
    tasks, backbones = (_table(raw.get(key)) for key in ("tasks", "backbones"))
    layers = {name: _table(row).get("layer") for name, row in backbones.items()}
    known = {
        "tasks": list(tasks),
        "level": _table(tasks.get(str(raw.get("task")))).get("level"),
        "layers": [f"{name}/{each}" for name, of in layers.items() if isinstance(of, list) for each in of],
    }
    try:
        if not used:
            return Params.model_validate(raw, context=known)
        fields = {name: Params.model_fields[name] for name in used}
        declared: dict[str, Any] = {name: (field.annotation, field) for name, field in fields.items()}
        part = create_model("Part", __base__=Strict, **declared)
        asked = {name: raw[name] for name in used if name in raw}
        return Params.model_construct(**dict(part.model_validate(asked, context=known)))
    except ValidationError as error:
        lines = _lines(error)
    old = {name: answer for name, answer in renamed(raw).items() if not used or name.split(".")[0] in used}
    missing = {f"{answer.removeprefix(_NOW)}: is missing" for answer in old.values()}
    lines = [line for line in lines if line not in missing and line.split(": ")[0] not in old]
    lines += [f"{name}: {answer}" for name, answer in old.items()]
    raise ParamsError("\n  ".join([f"{path} does not fit:", *lines]))


def no_yaml(path: Path, error: YAMLError) -> str:
    """The message about a file that cannot be parsed, without the parser's advice to allow a key twice."""
    lines = [line.strip() for line in str(error).split("To suppress")[0].splitlines() if line.strip()]
    return "\n  ".join([f"{path} is not valid YAML, or has a key twice:", *lines])


def named(rows: Mapping[str, T], name: str, where: str) -> T:
    """The row of this name in the table `where` of params.yaml.

    Raises:
        ParamsError: there is no such row; the message names the nearest row.
    """
    if name not in rows:
        raise ParamsError(no_such(f"`{where}` of params.yaml has no", name, rows))
    return rows[name]


def renamed(raw: Mapping[Any, Any]) -> dict[str, str]:
    """Parameters with the names of an earlier version: dotted name -> the name now, or why it is gone."""
    found = {}
    for name, _ in flat(raw, tables=True):
        row = re.sub(r"(^overrides\.[^.]+\.)?.*", r"\1", name, count=1, flags=re.DOTALL)
        listed = re.sub(r"^backbones\.[^.]+", "backbones.*", name)
        key = name.removeprefix(row)
        now = None if row and key in TaskTune.model_fields else RENAMED.get(f"tune.{key}" if row else listed)
        if now and " " not in now:
            now = _NOW + (row + now.removeprefix("tune.") if row else now)
        if now:
            found[name] = now
    return found


def flat(nested: Any, above: str = "", *, tables: bool = False) -> Iterator[tuple[str, Any]]:
    """The values in a table of tables, each with its dotted name; with `tables`, the inner tables, too."""
    is_table = isinstance(nested, Mapping)
    if above and (tables or not is_table):
        yield above, nested
    for key, value in nested.items() if is_table else ():
        yield from flat(value, f"{above}.{key}" if above else str(key), tables=tables)


def changes(base: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are not as in `base`: dotted name -> value; None: the parameter is gone."""
    before, after = dict(flat(base)), dict(flat(params))
    names = sorted(before | after)
    return {name: after.get(name) for name in names if after.get(name) != before.get(name)}


def changes_since(committed: str, path: Path) -> dict[str, Any]:
    """What params.yaml changes, compared with the text of the committed file."""
    reader = YAML(typ="safe", pure=True)
    return changes(reader.load(committed), reader.load(path.read_text(encoding="utf-8")))


def _merge(base: Mapping[str, Any], over: Any) -> Any:
    """`base` with the keys of `over` in place of its own, table by table; `over` if it is no table."""
    if not isinstance(over, dict):
        return over
    inner = {key: _merge(value, over[key]) for key, value in base.items() if key in over and _table(value)}
    return {**base, **over, **inner}


def _table(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _lines(error: ValidationError) -> list[str]:
    """A line for each problem: where it is, what was expected, what is there.

    A row of `overrides` is checked with the values of `tune` that it does not change: their problems are
    reported once, at `tune`.
    """
    lines: dict[str, None] = {}
    for problem in error.errors():
        kind, parts = problem["type"], list(problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if parts and parts[-1] == "[key]":
            parts = parts[:-1] if kind != "value_error" else parts[:-2]
        if kind == "extra_forbidden":
            message = f"unknown key{nearest(str(parts[-1]), _keys_at(parts[:-1]))}"
        elif kind == "missing":
            message = "is missing"
        elif kind == "too_short":
            message = "is empty"
        elif problem["loc"][-1:] == ("[key]",) and kind != "value_error":
            message = "a name is made of small letters, digits and _, and starts with a letter"
        elif kind in ("model_type", "dict_type"):
            message = f"expected a table of keys, not {_shown(problem['input'])}"
        elif kind != "value_error":
            message = f"{message}, not {_shown(problem['input'])}"
        names = [str(part) for part in parts if not isinstance(part, int)]
        where = ".".join(name if name.isprintable() else repr(name) for name in names)
        lines |= {f"{where}: {line}": None for line in message.splitlines()}
    return [
        line
        for line in lines
        if not (row := re.match(r"overrides\.[^.]+\.", line))
        or (f"tune.{line[row.end() :]}" not in lines and not line.endswith(": is missing"))
    ]


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


def _keys_at(place: Sequence[str | int]) -> list[str]:
    """The keys that the table at this place of params.yaml can have; empty: any key."""
    model: Any = Params
    for part in place:
        fields = getattr(model, "model_fields", None)
        model = fields[part].annotation if fields else get_args(model)[-1]
    return list(getattr(model, "model_fields", ()))
